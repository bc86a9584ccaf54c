"""Our algorithms in TRL: GRPOTrainer with another loss, and everything else as it is there."""

from proxstep.config.releases import check_trl

check_trl()

from proxstep.engines.trl.configs import IsopoConfig, OpoConfig, PolicyConfig  # noqa: E402
from proxstep.engines.trl.isopo import IsopoTrainer  # noqa: E402
from proxstep.engines.trl.policy import OpoTrainer, PolicyTrainer  # noqa: E402

__all__ = [
    "IsopoConfig",
    "IsopoTrainer",
    "OpoConfig",
    "OpoTrainer",
    "PolicyConfig",
    "PolicyTrainer",
]
