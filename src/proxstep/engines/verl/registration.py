"""What verl finds by name, put into its registries once and over nobody else's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    register_adv_est,
    register_policy_loss,
)
from verl.workers.engine import EngineRegistry

from proxstep.engines.verl.coefficients import NO_POLICY_TERM, no_policy_term
from proxstep.engines.verl.engine import BACKEND, IsopoEngine
from proxstep.engines.verl.estimator import opo_drive
from proxstep.engines.verl.policy_loss import NAME, opo_policy_loss
from proxstep.errors import ProxstepError

MODEL_TYPE = "language_model"


def register() -> None:
    """Register our loss, advantage estimator and engine.

    Raises:
        ProxstepError: If one of the names is another library's.
    """
    _check_free("policy loss", NAME, POLICY_LOSS_REGISTRY, opo_policy_loss)
    _check_free("policy loss", NO_POLICY_TERM, POLICY_LOSS_REGISTRY, no_policy_term)
    _check_free("advantage estimator", NAME, ADV_ESTIMATOR_REGISTRY, opo_drive)
    register_policy_loss(NAME)(opo_policy_loss)  # type: ignore[arg-type]
    register_policy_loss(NO_POLICY_TERM)(no_policy_term)  # type: ignore[arg-type]
    register_adv_est(NAME)(opo_drive)
    engines = EngineRegistry._engines.get(MODEL_TYPE, {}).get(BACKEND, {})
    for device in ("cuda", "npu"):
        _check_free("engine", BACKEND, engines, IsopoEngine, device)
    if not engines:
        EngineRegistry.register(MODEL_TYPE, BACKEND, ["cuda", "npu"])(IsopoEngine)


def _check_free(
    kind: str, name: str, registry: Mapping[Any, Any], ours: Any, key: str | None = None
) -> None:
    """Refuse a name that stands for something else."""
    found = registry.get(key or name, ours)
    if found is not ours:
        raise ProxstepError(
            f"verl's {kind} {name!r} is {found.__module__}.{found.__qualname__} already: load "
            "proxstep.engines.verl alone, or rename the other one"
        )
