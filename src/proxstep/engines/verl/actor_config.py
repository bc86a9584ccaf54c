"""verl's actor configuration with ISOPO's keys or a KL budget's, checked before any process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

from proxstep.algorithms.aggregate import check_number
from proxstep.config.geometry import GeometrySection
from proxstep.config.sections import UpdateSection, default_of
from proxstep.engines.fields import (
    BUDGET_OPTIONS,
    budget_options,
    read_budget,
    read_section,
    rule_of,
)
from proxstep.engines.verl.refusals import (
    refuse_actor,
    refuse_budget,
    refuse_command,
    refuse_updates,
)
from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo, Rule

ACTOR = "actor_rollout_ref.actor."
PLACE = f"{ACTOR}geometry."
BACKEND, BUDGET_BACKEND = "isopo", "kl_budget"
"""Values of `actor_rollout_ref.actor.strategy`."""

_BudgetOptions: Any = dataclasses.make_dataclass("_BudgetOptions", budget_options())


@dataclass
class BudgetEngineConfig(FSDPEngineConfig):
    """FSDPEngineConfig with a KL budget; `BudgetActorConfig` makes it.

    Attributes:
        budget: The budget's keys, or None.
        num_updates: Optimizer steps of a rollout.
    """

    budget: UpdateSection | None = None
    num_updates: int = 1


@dataclass
class IsopoEngineConfig(BudgetEngineConfig):
    """The same with the geometry; `IsopoActorConfig` makes it."""

    geometry: dict[str, Any] = field(default_factory=dict)


@dataclass
class _OwnActorConfig(_BudgetOptions, FSDPActorConfig):
    """FSDPActorConfig for our engines, with the keys of a KL budget (docs/kl-budget.md).

    `kl_num_updates` is how many optimizer steps share a rollout's budget:
    data.train_batch_size / ppo_mini_batch_size * ppo_epochs.
    """

    kl_num_updates: int = 1
    backend: ClassVar[str]
    engine_class: ClassVar[type[BudgetEngineConfig]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy != self.backend:
            raise ProxstepError(
                f"{ACTOR}strategy is {self.strategy!r}, but {type(self).__name__}'s is "
                f"{self.backend!r}: set {ACTOR}strategy={self.backend}"
            )
        keys = self._keys()
        own = {item.name for item in dataclasses.fields(FSDPEngineConfig)}
        values = {name: getattr(self.fsdp_config, name) for name in own if name != "_target_"}
        engine = self.engine_class(**values | {"strategy": "fsdp2"} | keys)
        object.__setattr__(engine, "strategy", self.backend)  # verl's class knows its own names
        self.engine = engine

    def _keys(self) -> dict[str, Any]:
        """Check our keys, and return them as the engine's configuration has them."""
        budget = read_budget({name: getattr(self, name) for name in BUDGET_OPTIONS}, ACTOR)
        if budget.kl_budget is None:
            return {}
        check_number(f"{ACTOR}kl_num_updates", self.kl_num_updates, 1.0)
        refuse_budget(self)
        return {"budget": budget, "num_updates": self.kl_num_updates}

    def validate(
        self, n_gpus: int, train_batch_size: int, model_config: Mapping[str, Any] | None = None
    ) -> None:
        """Check the command line as a whole: verl's main program calls it before it starts Ray."""
        super().validate(n_gpus, train_batch_size, model_config)
        if self.kl_budget is not None:
            refuse_updates(self, train_batch_size)
        if model_config is not None:
            isopo = self.backend == BACKEND
            refuse_command(model_config, isopo=isopo, budget=self.kl_budget is not None)


@dataclass
class BudgetActorConfig(_OwnActorConfig):
    """FSDPActorConfig with a KL budget, whose keys are those of a recipe (docs/kl-budget.md)."""

    strategy: str = BUDGET_BACKEND
    backend: ClassVar[str] = BUDGET_BACKEND
    engine_class: ClassVar[type[BudgetEngineConfig]] = BudgetEngineConfig

    def _keys(self) -> dict[str, Any]:
        if self.kl_budget is None:
            raise ProxstepError(
                f"{ACTOR}strategy={BUDGET_BACKEND} needs {ACTOR}kl_budget, a number of nats: set "
                "it, or use strategy=fsdp2 without BudgetActorConfig"
            )
        return super()._keys()


@dataclass
class IsopoActorConfig(_OwnActorConfig):
    """FSDPActorConfig with `geometry`, ISOPO's keys as a recipe has them (docs/recipe.md).

    `policy_loss.loss_mode` is the sequence-level objective that the geometry acts on. A KL budget's
    keys may be set beside it.
    """

    strategy: str = BACKEND
    geometry: dict[str, Any] = field(default_factory=dict)
    backend: ClassVar[str] = BACKEND
    engine_class: ClassVar[type[BudgetEngineConfig]] = IsopoEngineConfig

    def _keys(self) -> dict[str, Any]:
        section, rule = read_geometry(self.geometry)
        refuse_actor(self, section, rule)
        return {"geometry": self.geometry, **super()._keys()}


def read_geometry(values: dict[str, Any]) -> tuple[GeometrySection, Rule]:
    """Return the geometry's keys as a recipe has them, and the rule that they describe.

    Raises:
        ProxstepError: If a key is unknown, does not fit, or does not belong to the preset's rule.
    """
    given = {"rule": default_of(Isopo, "rule"), **values}
    if "diagnose_every" in given:
        raise ProxstepError(f"{PLACE}diagnose_every is an option of the local engine: leave it out")
    section = read_section(GeometrySection, given, PLACE)
    if section.rule == "none":
        raise ProxstepError(
            f'{PLACE}rule is "none": use {ACTOR}strategy=fsdp2 without IsopoActorConfig, or '
            "rule=reinforce"
        )
    return section, rule_of(section, PLACE)
