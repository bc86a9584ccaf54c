"""What verl finds by name; a name that another library has taken is an error."""

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

from proxstep.algorithms import ALGORITHMS
from proxstep.engines.verl.budget import BUDGET_BACKEND, BudgetEngine
from proxstep.engines.verl.coefficients import NO_POLICY_TERM, no_policy_term
from proxstep.engines.verl.engine import BACKEND, IsopoEngine
from proxstep.engines.verl.estimator import estimator
from proxstep.engines.verl.policy_loss import policy_loss
from proxstep.engines.verl.seams import loss_mode
from proxstep.errors import ProxstepError

MODEL_TYPE = "language_model"


def register_all() -> None:
    """Register every algorithm's loss and advantage estimator, and our engines.

    A second call registers the algorithms that were declared since the first.

    Raises:
        ProxstepError: If one of the names is another library's.
    """
    losses: dict[str, Any] = {NO_POLICY_TERM: no_policy_term}
    for algorithm in ALGORITHMS.values():
        mode = loss_mode(algorithm)
        losses[mode] = policy_loss(algorithm)
        _check_free("advantage estimator", mode, ADV_ESTIMATOR_REGISTRY, estimator(algorithm))
        register_adv_est(mode)(estimator(algorithm))
    for mode, loss in losses.items():
        _check_free("policy loss", mode, POLICY_LOSS_REGISTRY, loss)
        register_policy_loss(mode)(loss)
    for backend, engine in {BACKEND: IsopoEngine, BUDGET_BACKEND: BudgetEngine}.items():
        found = EngineRegistry._engines.get(MODEL_TYPE, {}).get(backend, {})
        for device in ("cuda", "npu"):
            _check_free(f"engine {backend!r} on", device, found, engine)
        if not found:
            EngineRegistry.register(MODEL_TYPE, backend, ["cuda", "npu"])(engine)


def _check_free(kind: str, name: str, registry: Mapping[Any, Any], ours: Any) -> None:
    """Refuse a name that stands for something else."""
    if name in registry and registry[name] is not ours:
        found = registry[name]
        raise ProxstepError(
            f"verl's {kind} {name!r} is {found.__module__}.{found.__qualname__} already: load "
            "proxstep.engines.verl alone, or rename the other one"
        )
