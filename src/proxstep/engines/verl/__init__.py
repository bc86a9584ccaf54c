"""verl: our losses and ISOPO inside its runs, and runs of it by a recipe.

`actor_rollout_ref.model.external_lib=proxstep.engines.verl` has verl import this package in every
process of a run, the driver's included, and the import registers every algorithm as a policy loss
and an advantage estimator, and FSDP2 engines for ISOPO and for a KL budget; docs/verl.md says how
to choose them.

Where verl is not imported, so in a process that only launches it, nothing is registered and verl
need not be installed.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from proxstep.algorithms import ALGORITHMS
from proxstep.config.releases import check_verl
from proxstep.engines.verl.seams import config_name

if TYPE_CHECKING:
    from proxstep.engines.verl.actor_config import (
        BudgetActorConfig,
        BudgetEngineConfig,
        IsopoActorConfig,
        IsopoEngineConfig,
    )

__all__ = [
    "BudgetActorConfig",
    "BudgetEngineConfig",
    "IsopoActorConfig",
    "IsopoEngineConfig",
    "register",
]


def register() -> None:
    """Make our names known to verl; again, for an algorithm that was declared since.

    Raises:
        ProxstepError: If verl is missing or untested, or one of the names is another library's.
    """
    check_verl()
    from proxstep.engines.verl.registration import register_all

    register_all()


def __getattr__(name: str) -> Any:
    """Return a configuration class: an actor's, or an algorithm's, such as OpoPolicyLossConfig."""
    if name in __all__:
        register()
        from proxstep.engines.verl import actor_config

        return getattr(actor_config, name)
    for algorithm in ALGORITHMS.values():
        if name == config_name(algorithm):
            register()
            from proxstep.engines.verl.policy_loss import config_class

            return config_class(algorithm)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "verl" in sys.modules:
    register()
