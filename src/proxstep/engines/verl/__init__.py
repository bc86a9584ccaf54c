"""OPO and ISOPO in verl: `actor_rollout_ref.model.external_lib=proxstep.engines.verl` loads them.

verl imports its external library in every process of a run, the driver's included. OPO is a policy
loss and an advantage estimator, ISOPO an FSDP2 engine; docs/verl.md says how to choose them.
"""

from proxstep.engines.versions import check_verl

check_verl()

from proxstep.engines.verl.configs import IsopoActorConfig, IsopoEngineConfig  # noqa: E402
from proxstep.engines.verl.policy_loss import OpoPolicyLossConfig  # noqa: E402
from proxstep.engines.verl.registration import register  # noqa: E402

register()

__all__ = ["IsopoActorConfig", "IsopoEngineConfig", "OpoPolicyLossConfig"]
