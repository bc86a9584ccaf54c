"""GRPOConfig with our keys beside TRL's; their defaults are the core's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from trl.trainer.grpo_config import GRPOConfig

from proxstep.algorithms import LOSSES, Aggregation
from proxstep.config.objectives import OpoSection
from proxstep.config.sections import GeometrySection, default_of
from proxstep.engines.fields import (
    OpoKeys,
    field_of,
    known_fields,
    read_section,
    refuse_with_isopo,
    rule_of,
)
from proxstep.engines.trl.refusals import ISOPO, refuse_other_losses
from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo, Rule

OBJECTIVES = ("reinforce", "gspo", "opo")
"""What ISOPO acts on: sequence-level objectives whose advantages are TRL's."""


@dataclass
class OpoConfig(OpoKeys, GRPOConfig):
    """GRPOConfig for `OpoTrainer`: all of TRL's options, and OPO's (docs/algorithms.md).

    What shapes TRL's own losses (epsilon, loss_type, ...) is refused, since it would do nothing.
    """

    loss_type: str = dataclasses.field(default="opo", metadata={"help": '"opo".'})
    loss_agg_mode: str | None = dataclasses.field(
        default=None,
        metadata={"help": "How token values become one loss; None for the objective's own."},
    )
    tau_min: float = field_of(OpoSection, "tau_min")
    tau_max: float = field_of(OpoSection, "tau_max")
    tau_entropy_coef: float = field_of(OpoSection, "tau_entropy_coef")
    tau_confidence_coef: float = field_of(OpoSection, "tau_confidence_coef")

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
    fisher_power: float | None = field_of(GeometrySection, "fisher_power")
    norm_power: float | None = field_of(GeometrySection, "norm_power")
    relative_fisher_power: float | None = field_of(GeometrySection, "relative_fisher_power")
    damping: float | None = field_of(GeometrySection, "damping")
    ntk_damping: float | None = field_of(GeometrySection, "ntk_damping")
    interact: str | None = field_of(GeometrySection, "interact")
    damping_form: str | None = field_of(GeometrySection, "damping_form")
    scale: str = field_of(GeometrySection, "scale")
    other_parameters: str = field_of(GeometrySection, "other_parameters")
    fisher: str = field_of(GeometrySection, "fisher")
    num_overlap_positions: int | None = field_of(GeometrySection, "num_overlap_positions")
    overlap_positions: str = field_of(GeometrySection, "overlap_positions")
    overlap_source: str = field_of(GeometrySection, "overlap_source")
    fisher_denominator: str = field_of(GeometrySection, "fisher_denominator")
    decay: float = field_of(GeometrySection, "decay")
    memory_mib: int = field_of(GeometrySection, "memory_mib")

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_with_isopo(self, ISOPO)
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
        return read_section(GeometrySection, known_fields(GeometrySection, self))

    def to_rule(self) -> Rule:
        """Return the rule that the keys describe.

        Raises:
            ProxstepError: If a key does not belong to the preset's rule.
        """
        section = self.geometry_section()
        if section.rule == "none":
            raise ProxstepError('rule is "none": use TRL\'s own trainer, or rule="reinforce"')
        return rule_of(section)

    def _check_loss_type(self) -> None:
        if self.loss_type not in OBJECTIVES:
            raise ProxstepError(
                f"loss_type is {self.loss_type!r}; ISOPO needs one coefficient per sequence, which "
                f"a token-level objective does not have: use {', '.join(OBJECTIVES)}"
            )
