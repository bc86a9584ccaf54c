"""verl's actor configuration with ISOPO's keys, checked before any process is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

from proxstep.config.geometry import GeometrySection
from proxstep.config.sections import default_of
from proxstep.engines.fields import read_section, rule_of
from proxstep.engines.verl.refusals import refuse_actor, refuse_command
from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo, Rule

BACKEND = "isopo"
"""The value of `actor_rollout_ref.actor.strategy`."""

PLACE = "actor_rollout_ref.actor.geometry."


@dataclass
class IsopoEngineConfig(FSDPEngineConfig):
    """FSDPEngineConfig with the geometry; `IsopoActorConfig` makes it."""

    geometry: dict[str, Any] = field(default_factory=dict)


@dataclass
class IsopoActorConfig(FSDPActorConfig):
    """FSDPActorConfig with `geometry`, ISOPO's keys as a recipe has them (docs/recipe.md).

    `policy_loss.loss_mode` is the sequence-level objective that the geometry acts on.
    """

    strategy: str = BACKEND
    geometry: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy != BACKEND:
            raise ProxstepError(
                f"actor_rollout_ref.actor.strategy is {self.strategy!r}, but IsopoActorConfig's is "
                f"{BACKEND!r}: set actor_rollout_ref.actor.strategy={BACKEND}"
            )
        section, rule = read_geometry(self.geometry)
        refuse_actor(self, section, rule)
        own = {item.name for item in dataclasses.fields(FSDPEngineConfig)}
        values = {name: getattr(self.fsdp_config, name) for name in own if name != "_target_"}
        engine = IsopoEngineConfig(**values | {"strategy": "fsdp2", "geometry": self.geometry})
        object.__setattr__(engine, "strategy", BACKEND)  # verl's class knows its own names alone
        self.engine = engine

    def validate(
        self, n_gpus: int, train_batch_size: int, model_config: Mapping[str, Any] | None = None
    ) -> None:
        """Check the command line as a whole: verl's main program calls it before it starts Ray."""
        super().validate(n_gpus, train_batch_size, model_config)  # type: ignore[arg-type]
        if model_config is not None:
            refuse_command(model_config)


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
            f'{PLACE}rule is "none": use actor_rollout_ref.actor.strategy=fsdp2 without '
            "IsopoActorConfig, or rule=reinforce"
        )
    return section, rule_of(section, PLACE)
