"""How large a share of a proposed step is taken: the controls of `KlBudget`, one function each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from proxstep.errors import ProxstepError

Control = Literal["predicted", "corrected", "measured-backtracking", "adaptive-learning-rate"]
CONTROLS: tuple[str, ...] = get_args(Control)
"""predicted: the square root of budget / predicted. corrected: the same, with the prediction times
a factor that is learned from what earlier steps did to the KL divergence of the next samples.
measured-backtracking: halve the step until the measured KL divergence is within the budget.
adaptive-learning-rate: PPO's; the share follows from the step before."""

LEAST_SCALE = 1e-4
"""A step is never scaled below it."""


_FAR = 4.0
_MOST_TRIALS = 4

Measure = Callable[[float], float]
"""The KL divergence at a share of the proposed step, in nats; a forward pass."""


@dataclass
class State:
    """What a control remembers from step to step; part of a checkpoint.

    Attributes:
        scale: The last step's share.
        realized: Sum of the steps' realized KL divergences over their budgets, each step counting
            for 0.9 of the one after it; it begins with one step that was as predicted.
        predicted: The same of what was predicted for them.
    """

    scale: float = 1.0
    realized: float = 1.0
    predicted: float = 1.0

    @property
    def factor(self) -> float:
        """What a prediction is multiplied by.

        A ratio of sums: the mean of the logarithms of noisy ratios would lie below it.
        """
        return self.realized / self.predicted

    def learn(self, realized: float, predicted: float, budget: float) -> None:
        """Learn from what a step did and what was predicted for it, in nats."""
        if math.isfinite(realized) and budget > 0:
            # One step that went far astray counts as a few.
            least = min(1.0, _LARGEST * budget / max(realized, predicted, budget))
            self.realized = _DECAY * self.realized + least * realized / budget
            self.predicted = _DECAY * self.predicted + least * predicted / budget


_DECAY, _LARGEST = 0.9, 10.0


def scale_for(budget: float, predicted: float) -> float:
    """Return min(1, sqrt(budget / predicted)).

    >>> scale_for(0.03, 0.12), scale_for(0.03, 0.01)
    (0.5, 1.0)
    """
    if predicted <= budget:
        return 1.0
    return max(LEAST_SCALE, math.sqrt(budget / predicted))


def predict(measure: Measure, state: State, budget: float) -> float:
    """Return the KL divergence of the whole step, as the square that a trial of it lies on.

    The trial is the share that the last step took, where the square is as good as it gets for this
    one; a trial that turns out to be far from this step's share is made again.
    """
    trial = state.scale
    for _ in range(_MOST_TRIALS):
        predicted = measure(trial) / trial**2
        if not math.isfinite(predicted):
            trial = max(LEAST_SCALE, trial / 16)
            continue
        wanted = scale_for(budget, predicted)
        if max(wanted / trial, trial / wanted) <= _FAR or predicted * max(wanted, trial) ** 2 < (
            budget / _FAR
        ):
            return predicted
        trial = wanted
    return _finite(measure(trial), trial) / trial**2


def backtrack(measure: Measure, budget: float) -> tuple[float, float]:
    """Return the first of 1, 1/2, 1/4, ... within the budget, and its KL divergence."""
    scale = 1.0
    while True:
        measured = measure(scale)
        if measured <= budget or scale / 2 < LEAST_SCALE:
            return scale, _finite(measured, scale)
        scale /= 2


def adapt(state: State, measured: float, budget: float) -> float:
    """Return the next step's share: less by half after too much, more after too little.

    Source: the adaptive learning rate of PPO's implementations (rsl_rl: factor 1.5, bounds 2).
    """
    if _finite(measured, state.scale) > 2 * budget:
        return max(LEAST_SCALE, state.scale / 1.5)
    return min(1.0, state.scale * 1.5) if measured < budget / 2 else state.scale


def _finite(measured: float, scale: float) -> float:
    """Return a KL divergence that was measured at a share of the step, if it is a number."""
    if not math.isfinite(measured):
        raise ProxstepError(
            f"the KL divergence of {scale:g} of the optimizer's step is {measured}: the "
            "parameters were not changed. Look for gradients and log-probabilities that are not "
            "finite; a gradient that is not spoils the optimizer's moments as well, so go back to "
            "a checkpoint then"
        )
    return measured
