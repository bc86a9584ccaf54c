"""The theory of both papers as exact functions of small categorical policies.

Every expectation is a sum over the outcomes, so that a statement is checked to rounding error and
not by sampling. `docs/theory.md` lists which statements hold, and `tests/theory` checks each.
"""

from proxstep.theory import (
    categorical,
    descent,
    escort,
    estimates,
    fisher,
    isopo,
    opo,
    simplex,
    surrogate,
    trust_region,
)

__all__ = [
    "categorical",
    "descent",
    "escort",
    "estimates",
    "fisher",
    "isopo",
    "opo",
    "simplex",
    "surrogate",
    "trust_region",
]
