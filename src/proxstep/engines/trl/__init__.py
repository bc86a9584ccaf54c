"""ISOPO and OPO in TRL: GRPOTrainer with another objective, and everything else as it is there."""

from proxstep.engines.versions import check_trl

check_trl()

from proxstep.engines.trl.configs import IsopoConfig, OpoConfig  # noqa: E402
from proxstep.engines.trl.trainers import IsopoTrainer, OpoTrainer  # noqa: E402

__all__ = ["IsopoConfig", "IsopoTrainer", "OpoConfig", "OpoTrainer"]
