"""The objectives, one pure function each, and the table that names them.

Every objective is (log_probs, old_log_probs, advantages, response_mask, *, hyper-parameters,
aggregation) -> (scalar loss, metrics); metrics are detached and have one entry per sequence, so
that their mean over a batch does not depend on how it was split into microbatches.
"""

from proxstep.losses.aggregate import (
    LOSS_AGG_MODES,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM,
    TOKEN_MEAN,
    Aggregation,
    aggregate,
)
from proxstep.losses.cispo import cispo
from proxstep.losses.composition import gradient_by_sequence, sequence_coefficients
from proxstep.losses.dro import dro
from proxstep.losses.escort import drive, escort_weights
from proxstep.losses.gspo import gspo
from proxstep.losses.importance import importance_weights
from proxstep.losses.opo import (
    auto_mu,
    clip_target,
    opo,
    opo_by_sequence,
    positivity,
    regression_target,
    target_shares,
    tv_bound,
)
from proxstep.losses.ppo import dapo, grpo
from proxstep.losses.reinforce import reinforce
from proxstep.losses.table import LOSSES, Objective, find_objective
from proxstep.losses.temperature import adaptive_tau, entropy_proxy

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
