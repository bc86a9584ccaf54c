"""GRPOConfig with our keys beside TRL's, made from the declarations of the algorithms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from trl.trainer.grpo_config import GRPOConfig

from proxstep.algorithms import ADVANTAGES, ALGORITHMS, LOSS_AGG_MODES
from proxstep.algorithms.aggregate import check_choice
from proxstep.config.geometry import GeometrySection
from proxstep.config.objectives import ObjectiveSection
from proxstep.config.sections import default_of
from proxstep.engines.fields import (
    BUDGET_OPTIONS,
    Option,
    algorithm_options,
    budget_options,
    objective_of,
    read_budget,
    read_section,
    refuse_together,
    rule_of,
    section_options,
)
from proxstep.engines.trl.refusals import (
    BUDGET,
    ISOPO,
    refuse_sampler,
    refuse_without_effect,
)
from proxstep.errors import ProxstepError
from proxstep.isopo import PRESETS, Isopo, Rule

TRL_OPTIONS = frozenset(field.name for field in dataclasses.fields(GRPOConfig))
"""The names that an algorithm's key cannot have; `option_name` gives it another one."""

TRL_ADVANTAGE = "group-zscore"
"""The advantage that is left to TRL and its own options of it, where the algorithm's is this."""

_AlgorithmOptions: Any = dataclasses.make_dataclass(
    "_AlgorithmOptions", algorithm_options(TRL_OPTIONS)
)


def _as_text(option: Option) -> Option:
    """Return an option that a command line can set to None, where that is not its default."""
    name, hint, field = option
    other = field.default is not None and type(None) in get_args(hint)
    return name, (str | None if other else hint), field


def _read(value: Any) -> Any:
    """Return what a text stands for where None or a number may be meant."""
    if not isinstance(value, str):
        return value
    return None if value.lower() in ("none", "null") else int(value) if value.isdigit() else value


_GeometryOptions: Any = dataclasses.make_dataclass(
    "_GeometryOptions", map(_as_text, section_options(GeometrySection, "diagnose_every"))
)


_BudgetOptions: Any = dataclasses.make_dataclass("_BudgetOptions", budget_options())


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class PolicyConfig(_AlgorithmOptions, _BudgetOptions, GRPOConfig):
    """GRPOConfig for `PolicyTrainer`: all of TRL's options, every algorithm's keys, a KL budget.

    A key that is None has the algorithm's default (docs/algorithms.md). What shapes TRL's own
    losses is refused, since it would do nothing.
    """

    loss_type: str = _field("", f"The algorithm: {', '.join(ALGORITHMS)}.")
    loss_agg_mode: str | None = _field(
        None, f"How token values become one loss: {', '.join(LOSS_AGG_MODES)}; None: its own."
    )
    advantage: str | None = _field(
        None,
        f"How rewards become advantages: {', '.join(ADVANTAGES)}; None: its own, and where that is "
        f"{TRL_ADVANTAGE}, TRL's by scale_rewards.",
    )

    taken = False  # whether a trainer of ours has it; no option, since it has no annotation

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Refuse TRL's own trainer, which would train by its own loss; it asks as it begins.

        Raises:
            ProxstepError: If no trainer of ours was made with this configuration.
        """
        if not self.taken:
            raise ProxstepError(
                f"{type(self).__name__} was given to a trainer of TRL's, which would train by "
                "its own loss and leave kl_budget and every other option of ours out: make a "
                "PolicyTrainer, an OpoTrainer or an IsopoTrainer with it"
            )
        return super().get_warmup_steps(num_training_steps)

    def __post_init__(self) -> None:
        self.objective()  # refuses unknown algorithms before TRL looks at more
        super().__post_init__()
        self.check()

    def check(self) -> None:
        """Refuse what our trainers do not do; they ask again, since options may be set later.

        Raises:
            ProxstepError: Naming the option and the remedy.
        """
        refuse_without_effect(self, self.own_advantage())
        refuse_sampler(self, ratio_to_sampler=self.objective().algorithm.ratio_to_sampler)
        self._check_budget()

    def _check_budget(self) -> None:
        budget = {name: _read(getattr(self, name)) for name in BUDGET_OPTIONS}
        section = read_budget(budget)
        for name in budget:
            setattr(self, name, getattr(section, name))
        if section.kl_budget is not None:
            refuse_together("kl_budget", self, BUDGET)

    def objective(self) -> ObjectiveSection:
        """Return the algorithm with its keys, as a recipe has them.

        Raises:
            ProxstepError: If one of them does not fit, by name.
        """
        if self.loss_type not in self._algorithms():
            self._refuse_loss_type()
        return objective_of(self, ALGORITHMS[self.loss_type], TRL_OPTIONS)

    def own_advantage(self) -> str | None:
        """Return how rewards become advantages; None where that is left to TRL."""
        kind = self.objective().advantage
        return None if self.advantage is None and kind == TRL_ADVANTAGE else kind

    def _algorithms(self) -> list[str]:
        """Return what `loss_type` may be."""
        return list(ALGORITHMS)

    def _refuse_loss_type(self) -> None:
        if not self.loss_type:
            names = ", ".join(self._algorithms())
            raise ProxstepError(f"loss_type is missing, the algorithm's name: one of {names}")
        if self.loss_type in PRESETS and self.loss_type not in ALGORITHMS:
            raise ProxstepError(
                f"loss_type is {self.loss_type!r}, which is a rule for gradients and not a loss: "
                f'use IsopoTrainer with IsopoConfig(rule="{self.loss_type}")'
            )
        check_choice("loss_type", self.loss_type, self._algorithms())


@dataclass
class OpoConfig(PolicyConfig):
    """PolicyConfig for `OpoTrainer`, whose algorithm is OPO."""

    loss_type: str = _field("opo", '"opo".')

    def _algorithms(self) -> list[str]:
        return ["opo"]


@dataclass
class IsopoConfig(_GeometryOptions, PolicyConfig):
    """PolicyConfig for `IsopoTrainer`: with ISOPO's options (docs/isopo.md).

    `loss_type` is the sequence-level algorithm that the geometry acts on.
    """

    loss_type: str = _field("reinforce", "A sequence-level algorithm, such as opo.")
    rule: str = _field(
        default_of(Isopo, "rule"), "A preset of ISOPO; options that are None are the preset's."
    )

    def check(self) -> None:
        """Refuse what ISOPO does not go together with as well."""
        super().check()
        refuse_together("ISOPO", self, ISOPO)
        self.to_rule()

    def geometry(self) -> GeometrySection:
        """Return ISOPO's keys as a recipe has them."""
        names = {field.name for field in dataclasses.fields(_GeometryOptions)}
        return read_section(GeometrySection, {name: _read(getattr(self, name)) for name in names})

    def to_rule(self) -> Rule:
        """Return the rule that the keys describe.

        Raises:
            ProxstepError: If a key does not belong to the preset's rule.
        """
        section = self.geometry()
        if section.rule == "none":
            raise ProxstepError('rule is "none": use PolicyTrainer, or rule="reinforce"')
        return rule_of(section)

    def _algorithms(self) -> list[str]:
        return [name for name, found in ALGORITHMS.items() if found.level == "sequence"]

    def _refuse_loss_type(self) -> None:
        if self.loss_type in ALGORITHMS:
            raise ProxstepError(
                f"loss_type is {self.loss_type!r}; ISOPO needs one coefficient per sequence, which "
                f"a token-level algorithm does not have: use {', '.join(self._algorithms())}"
            )
        super()._refuse_loss_type()
