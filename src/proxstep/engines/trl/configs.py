"""GRPOConfig with our keys beside TRL's; their defaults are the core's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from trl.trainer.grpo_config import GRPOConfig

from proxstep.engines.trl.refusals import refuse_for_isopo, refuse_other_losses
from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo, Rule
from proxstep.losses import LOSSES, Aggregation
from proxstep.objective_sections import OpoSection
from proxstep.sections import GeometrySection, Section, default_of

OBJECTIVES = ("reinforce", "gspo", "opo")
"""What ISOPO acts on: sequence-level objectives whose advantages are TRL's."""


def _key(section: type[Section], name: str) -> Any:
    """Return a field with a recipe section's default and sentence."""
    info = section.model_fields[name]
    text = (info.description or "").replace("%", "%%")
    return dataclasses.field(default=info.default, metadata={"help": text})


def _read(section: type[Section], config: GRPOConfig, **fixed: Any) -> Any:
    """Return a recipe's section made of the configuration's fields that it knows.

    Raises:
        ProxstepError: If one of them does not fit, by name.
    """
    names = set(section.model_fields) & {field.name for field in dataclasses.fields(config)}
    try:
        return section(**fixed, **{name: getattr(config, name) for name in names})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1])
        raise ProxstepError(f"{name} is {first['input']!r}: {first['msg']}") from None


@dataclass
class OpoConfig(GRPOConfig):
    """GRPOConfig for `OpoTrainer`: all of TRL's options, and OPO's (docs/algorithms.md).

    What shapes TRL's own losses (epsilon, loss_type, ...) is refused, since it would do nothing.
    """

    loss_type: str = dataclasses.field(default="opo", metadata={"help": '"opo".'})
    loss_agg_mode: str | None = dataclasses.field(
        default=None,
        metadata={"help": "How token values become one loss; None for the objective's own."},
    )
    alpha: float = _key(OpoSection, "alpha")
    tau: float = _key(OpoSection, "tau")
    adaptive_tau: bool = _key(OpoSection, "adaptive_tau")
    tau_min: float = _key(OpoSection, "tau_min")
    tau_max: float = _key(OpoSection, "tau_max")
    tau_entropy_coef: float = _key(OpoSection, "tau_entropy_coef")
    tau_confidence_coef: float = _key(OpoSection, "tau_confidence_coef")
    mu: float | str = _key(OpoSection, "mu")
    target_min: float | None = _key(OpoSection, "target_min")
    surrogate: str = _key(OpoSection, "surrogate")
    form: str = _key(OpoSection, "form")
    drive: str = _key(OpoSection, "drive")
    normalize: str = _key(OpoSection, "normalize")
    anchor_correction: str = _key(OpoSection, "anchor_correction")
    length_normalize: bool = _key(OpoSection, "length_normalize")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mu, str) and self.mu != "auto":  # from a command line
            try:
                self.mu = float(self.mu)
            except ValueError:
                raise ProxstepError(f'mu is {self.mu!r}; give a number or "auto"') from None
        self._check_loss_type()
        refuse_other_losses(self)
        self.aggregation()
        self.opo_section()

    def opo_section(self) -> OpoSection:
        """Return OPO's keys as a recipe has them."""
        return _read(OpoSection, self, name="opo")

    def aggregation(self) -> Aggregation:
        """Return how token values become one loss."""
        mode = self.loss_agg_mode or LOSSES[self.loss_type].default_loss_agg_mode
        length = self.max_completion_length
        return Aggregation(mode, num_sequences=1, num_tokens=1, max_length=length)

    def _check_loss_type(self) -> None:
        if self.loss_type != "opo":
            raise ProxstepError(
                f'loss_type is {self.loss_type!r}, but OpoTrainer\'s is "opo": leave it out'
            )


@dataclass
class IsopoConfig(OpoConfig):
    """GRPOConfig for `IsopoTrainer`: all of TRL's options, and ISOPO's (docs/isopo.md).

    `loss_type` is the sequence-level objective that the geometry acts on: reinforce, gspo (with
    TRL's epsilon and epsilon_high) or opo (with OPO's options).
    """

    loss_type: str = dataclasses.field(
        default="reinforce",
        metadata={"help": "A sequence-level objective: reinforce, gspo or opo."},
    )
    rule: str = dataclasses.field(
        default=default_of(Isopo, "rule"),
        metadata={"help": "A preset of ISOPO; the keys below are the preset's where None."},
    )
    fisher_power: float | None = _key(GeometrySection, "fisher_power")
    norm_power: float | None = _key(GeometrySection, "norm_power")
    relative_fisher_power: float | None = _key(GeometrySection, "relative_fisher_power")
    damping: float | None = _key(GeometrySection, "damping")
    ntk_damping: float | None = _key(GeometrySection, "ntk_damping")
    interact: str | None = _key(GeometrySection, "interact")
    damping_form: str | None = _key(GeometrySection, "damping_form")
    scale: str = _key(GeometrySection, "scale")
    other_parameters: str = _key(GeometrySection, "other_parameters")
    fisher: str = _key(GeometrySection, "fisher")
    num_overlap_positions: int | None = _key(GeometrySection, "num_overlap_positions")
    overlap_positions: str = _key(GeometrySection, "overlap_positions")
    overlap_source: str = _key(GeometrySection, "overlap_source")
    fisher_denominator: str = _key(GeometrySection, "fisher_denominator")
    decay: float = _key(GeometrySection, "decay")
    memory_mib: int = _key(GeometrySection, "memory_mib")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_for_isopo(self)
        self.to_rule()
        if self.loss_type != "opo":
            for field in dataclasses.fields(OpoConfig):
                ours = field.name in OpoSection.model_fields
                if ours and getattr(self, field.name) != field.default:
                    raise ProxstepError(
                        f'{field.name} is an option of OPO: set loss_type="opo", or remove it'
                    )

    def geometry_section(self) -> GeometrySection:
        """Return ISOPO's keys as a recipe has them."""
        return _read(GeometrySection, self)

    def to_rule(self) -> Rule:
        """Return the rule that the keys describe.

        Raises:
            ProxstepError: If a key does not belong to the preset's rule.
        """
        section = self.geometry_section()
        if section.rule == "none":
            raise ProxstepError('rule is "none": use TRL\'s own trainer, or rule="reinforce"')
        try:
            return section.to_rule()
        except ValueError as error:
            raise ProxstepError(str(error).removeprefix("geometry.")) from None

    def _check_loss_type(self) -> None:
        if self.loss_type not in OBJECTIVES:
            raise ProxstepError(
                f"loss_type is {self.loss_type!r}; ISOPO needs one coefficient per sequence, which "
                f"a token-level objective does not have: use {', '.join(OBJECTIVES)}"
            )
