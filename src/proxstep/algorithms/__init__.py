"""The objectives, one pure function each, and the table that names them.

Every objective is (log_probs, old_log_probs, advantages, response_mask, *, hyper-parameters,
aggregation) -> (scalar loss, metrics); metrics are detached and have one entry per sequence, so
that their mean over a batch does not depend on how it was split into microbatches.
"""

from proxstep.algorithms.aggregate import (
    LOSS_AGG_MODES,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM,
    TOKEN_MEAN,
    Aggregation,
    aggregate,
)
from proxstep.algorithms.cispo import cispo
from proxstep.algorithms.composition import gradient_by_sequence, sequence_coefficients
from proxstep.algorithms.dro import dro
from proxstep.algorithms.escort import drive, escort_weights
from proxstep.algorithms.grpo import dapo, grpo
from proxstep.algorithms.gspo import gspo
from proxstep.algorithms.importance import importance_weights
from proxstep.algorithms.opo import (
    auto_mu,
    clip_target,
    opo,
    opo_by_sequence,
    positivity,
    regression_target,
    target_shares,
    tv_bound,
)
from proxstep.algorithms.reinforce import reinforce
from proxstep.algorithms.table import LOSSES, Objective, find_objective
from proxstep.algorithms.temperature import adaptive_tau, entropy_proxy

__all__ = [
    "LOSSES",
    "LOSS_AGG_MODES",
    "SEQ_MEAN_TOKEN_MEAN",
    "SEQ_MEAN_TOKEN_SUM",
    "TOKEN_MEAN",
    "Aggregation",
    "Objective",
    "adaptive_tau",
    "aggregate",
    "auto_mu",
    "cispo",
    "clip_target",
    "dapo",
    "drive",
    "dro",
    "entropy_proxy",
    "escort_weights",
    "find_objective",
    "gradient_by_sequence",
    "grpo",
    "gspo",
    "importance_weights",
    "opo",
    "opo_by_sequence",
    "positivity",
    "regression_target",
    "reinforce",
    "sequence_coefficients",
    "target_shares",
    "tv_bound",
]
