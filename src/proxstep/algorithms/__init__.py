"""The algorithms, one file each: keys, preparation and loss together.

Every loss is (log_probs, old_log_probs, signal, response_mask, *, keys, aggregation) -> (scalar
loss, metrics); metrics are detached and have one entry per sequence, so that their mean over a
batch does not depend on how it was split into microbatches.

A new algorithm is a file with an `Algorithm`, and its lines below.
"""

from proxstep.algorithms.advantages import ADVANTAGES
from proxstep.algorithms.aggregate import (
    LOSS_AGG_MODES,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM,
    SEQ_MEAN_TOKEN_SUM_NORM,
    TOKEN_MEAN,
    Aggregation,
)
from proxstep.algorithms.base import (
    ALGORITHMS,
    Algorithm,
    Key,
    find_algorithm,
    register,
    sequence_coefficients,
)
from proxstep.algorithms.cispo import CISPO, cispo
from proxstep.algorithms.dppo import DPPO_KL, DPPO_TV, dppo
from proxstep.algorithms.dro import DRO, dro
from proxstep.algorithms.escort import centered_weights, escort_weights
from proxstep.algorithms.gmpo import GMPO, gmpo
from proxstep.algorithms.gopo import GOPO, gopo
from proxstep.algorithms.grpo import DAPO, DR_GRPO, GRPO, grpo
from proxstep.algorithms.gspo import GSPO, gspo
from proxstep.algorithms.importance import importance_weights
from proxstep.algorithms.maxrl import MAXRL
from proxstep.algorithms.opo import OPO, opo
from proxstep.algorithms.preparation import OldPolicy, Signal, SignalInputs
from proxstep.algorithms.reinforce import REINFORCE, RLOO, reinforce
from proxstep.algorithms.reinforce_pp import REINFORCE_PLUS_PLUS, REINFORCE_PLUS_PLUS_BASELINE
from proxstep.algorithms.sapo import SAPO, sapo
from proxstep.algorithms.topr import TOPR, topr

for _algorithm in (
    REINFORCE,
    GRPO,
    DAPO,
    GSPO,
    CISPO,
    DRO,
    OPO,
    DR_GRPO,
    RLOO,
    DPPO_TV,
    DPPO_KL,
    SAPO,
    GMPO,
    REINFORCE_PLUS_PLUS,
    REINFORCE_PLUS_PLUS_BASELINE,
    MAXRL,
    GOPO,
    TOPR,
):
    register(_algorithm)

__all__ = [
    "ADVANTAGES",
    "ALGORITHMS",
    "LOSS_AGG_MODES",
    "SEQ_MEAN_TOKEN_MEAN",
    "SEQ_MEAN_TOKEN_SUM",
    "SEQ_MEAN_TOKEN_SUM_NORM",
    "TOKEN_MEAN",
    "Aggregation",
    "Algorithm",
    "Key",
    "OldPolicy",
    "Signal",
    "SignalInputs",
    "centered_weights",
    "cispo",
    "dppo",
    "dro",
    "escort_weights",
    "find_algorithm",
    "gmpo",
    "gopo",
    "grpo",
    "gspo",
    "importance_weights",
    "opo",
    "register",
    "reinforce",
    "sapo",
    "sequence_coefficients",
    "topr",
]
