"""What a training step sends over the network, and what ISOPO adds to it.

n is the number of data-parallel ranks; the rest as in `scaling_formulas`. The tests count the bytes
of the collectives between two ranks.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping

from scripts.scaling_formulas import (
    ROW_NUMBERS,
    WIDE,
    Model,
    Work,
    num_parameters,
    row_bytes,
    uses,
)


def fsdp_bytes(model: Model, ranks: int) -> float:
    """Return what a rank receives per microbatch under FSDP2 in bfloat16 with float32 reduction.

    Every parameter is gathered in forward and again in backward (those of the root, a tied
    embedding and the last norm, once) and its gradient is scattered.
    """
    total = num_parameters(model)
    tied = model.vocab_size * model.hidden_size * model.tie_word_embeddings
    root = tied + model.hidden_size
    return (2.0 * (2 * total - root) + WIDE * total) * (ranks - 1) / ranks


def fold_bytes(model: Model, num_moments: int) -> int:
    """Return what a rank hands to the others in `TrailingMeans.fold`: a digest, and the numbers."""
    numbers = 2 * num_moments * len(uses(model))
    return len(pickle.dumps((bytes(16), bytes(8 * numbers))))


def gathered(model: Model, work: Work, ranks: int, rows: int) -> float:
    """Return what a rank gets in one microbatch of overlap_source="ranks", its own part included.

    Args:
        model: Its sizes.
        work: The microbatch.
        ranks: n.
        rows: Of the sample, on the rank with the most; see `largest_share`.
    """
    drawing = ranks * (work.num_samples + 1) * 8  # priorities and counts
    return drawing + float(ranks * rows) * sum(row_bytes(use, work) for use in uses(model))


def merged(model: Model, work: Work, ranks: int, rows: int | Mapping[str, int]) -> float:
    """Return what a rank gets per step of overlap_source="previous_step", its own part included.

    Every rank hands out K priorities per parameter, and of the rows that are chosen the gradients,
    whose they are (the sequence's key and its group), and their importance.

    Args:
        model: Its sizes.
        work: The microbatch.
        ranks: n.
        rows: Of the sample, on the rank with the most; one number, or one for each parameter.
    """
    total = 0
    for use in uses(model):
        own = rows if isinstance(rows, int) else rows[use.key]
        each = row_bytes(use, work) + 8 * (ROW_NUMBERS - 1)
        total += ranks * (8 * work.num_samples + own * each)
    return float(total)


def num_gathers(model: Model) -> int:
    """Return the collectives in one backward of overlap_source="ranks": one per tensor."""
    return sum(1 if use.kind == "vector" else 2 for use in uses(model))


def largest_share(num_samples: int, ranks: int) -> int:
    """Return the median of the largest part that one rank has of a sample drawn over all ranks."""
    rate = num_samples / ranks
    term = below = math.exp(-rate)
    rows = 0
    while below**ranks < 0.5:
        rows += 1
        term *= rate / rows
        below += term
    return rows


def exact_natural(model: Model, work: Work, ranks: int) -> tuple[float, float]:
    """Return bytes per rank and operations of a kernel over all ranks' sequences.

    Every rank forms its B gradients of a layer, in float32, and gets an n-th of everybody's by an
    all-to-all; its part of the kernel is one product of nB rows.
    """
    matrices = sum(u.out_features * u.in_features for u in uses(model))
    sent = WIDE * float(work.num_sequences) * matrices * (ranks - 1) / ranks
    return sent, 2.0 * ranks * work.num_sequences**2 * matrices
