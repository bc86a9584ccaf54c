"""What the metrics of a run say: it learns, it does not and why, or it collapses and why.

Everything is held against the run itself: the initial policy, which step 1 measured before any
update, or the best level so far, and the noise is how much the run's own steps differ from one to
the next. No sign counts unless it lasts for `WINDOW` steps, and a collapse takes two signs of
different kinds, one of which is harm: a run that has learned its task may well have a low entropy,
equal rewards and small gradients all at once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["learning", "not learning", "collapsing"]
Rows = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl in the order of their steps."""

WINDOW = 3
"""Steps for which a sign must last: a chance of one in ten a step is then one in a thousand."""
NOISE = 2.0
"""A level is another one where it is so many times the noise away in each of those steps."""
HARM = 0.25
"""Harm, in standard deviations of the rewards of a prompt's completions (reward_std), or where a
trainer does not measure that, a share of the best reward."""
HALF = 0.5
"""A validation score that is lost: a share of the best, or of what it gained where negative."""
NARROW, WIDE = 1 / 3, 2.0
"""Entropy beside the initial policy's: learning a task takes it down too, hardly ever up."""
STEEP = 4.0
"""A gradient beside the median of those before."""
DRIFT = 0.5
"""Nats a token from the initial policy; long runs that learn get there too, so it is no harm."""
ONE_LAYER = 0.9
"""Share of the squared gradient that one parameter use carries, and not in the first steps."""
NOISY = 10.0
"""A gradient noise scale beside the median of those before, or beside a step's completions."""
STALE = 0.1
"""Nats a token between the old policy and the one that is updated; clipping allows about 0.02."""
OVERSHOOT = 3.0
"""What steps did to the policy, beside what the KL budget predicted."""
CUT = 0.5
"""Share of completions that do not end."""
EQUAL = 0.9
"""Share of groups without a difference, at which there is hardly anything to learn from."""
STILL = 1e-3
"""Nats a token: a policy that is no further from the initial one has not moved."""
HORIZON = 500
"""Rows that signs are looked for in, the first two among them: a look takes milliseconds."""
FEWEST = 6
"""Steps before which nobody can tell whether a run learns."""


@dataclass(frozen=True)
class Sign:
    """One thing that is not as it should be.

    Attributes:
        kind: What it is about: reward, score, entropy, gradient, drift, stale, length, equal, rank,
            layer, noise.
        text: What was seen, with its figures.
        harm: Whether it is harm by itself, and not only what often comes before.
    """

    kind: str
    text: str
    harm: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a run's metrics say.

    Attributes:
        state: learning, not learning or collapsing.
        reason: What was seen, with its figures.
        remedy: What to do; empty where nothing is wrong.
        step: The last step that was judged.
    """

    state: State
    reason: str
    remedy: str
    step: int

    def __str__(self) -> str:
        text = f"{self.state}: {self.reason}"
        return f"{text}: {self.remedy}" if self.remedy else text


@dataclass(frozen=True)
class Series:
    """A field's finite values over the training steps."""

    values: tuple[float, ...]
    window: int = WINDOW

    @classmethod
    def of(cls, rows: Rows, name: str, window: int = WINDOW) -> Series:
        """Return what the training steps measured of a field."""
        return cls(tuple(_finite(row.get(name)) for row in _measured(rows, name)), window)

    @property
    def last(self) -> tuple[float, ...]:
        """The newest values, which are judged; none where there are too few beside them."""
        return self.values[-self.window :] if len(self.values) > self.window else ()

    @property
    def before(self) -> tuple[float, ...]:
        """The values before those."""
        return self.values[: -self.window]

    @property
    def noise(self) -> float:
        """The standard deviation of one value, by the median difference of neighbors.

        A trend hardly enters it, nor does a single jump. 1.4826 makes the median of absolute values
        a normal distribution's standard deviation, and a difference has the noise of two values.
        """
        pairs = zip(self.values, self.values[1:], strict=False)
        differences = [abs(right - left) for left, right in pairs]
        return 1.4826 * statistics.median(differences) / math.sqrt(2) if differences else 0.0

    @property
    def best(self) -> float:
        """The highest level before that lasted for a tenth of the values, or the first.

        A level is the median of as many neighbors, three at least. Of hundreds of medians of three
        the highest is chance, and an ordinary value is far below it.
        """
        count = max(3, len(self.before) // 10)
        starts = range(len(self.before) - count + 1)
        levels = (statistics.median(self.before[start : start + count]) for start in starts)
        return max([self.before[0], *levels])


def verdict(rows: Rows) -> Verdict:
    """Return what a run's metrics say.

    Args:
        rows: The lines of its metrics.jsonl, in the order of their steps.
    """
    step = int(rows[-1]["step"]) if rows else 0
    found = {sign.kind: sign for sign in signs(rows)}
    if len(found) >= 2 and any(sign.harm for sign in found.values()):
        return Verdict("collapsing", _told(found), _remedy(found, rows), step)
    if (last := _unrewarded(rows)) is not None:
        remedy = "look at rewards/ in metrics.jsonl and at the completions in samples.jsonl"
        return Verdict("not learning", f"no reward since step {last}", remedy, step)
    learned = _learned(rows)
    if learned is not None and "score" not in found:
        return Verdict("learning", learned, "", step)
    reason, remedy = _obstacle(rows, found, learned)
    return Verdict("not learning", reason, remedy, step)


def signs(rows: Rows, window: int = WINDOW) -> list[Sign]:
    """Return what is not as it should be in the last steps of a run.

    Args:
        rows: The lines of its metrics.jsonl.
        window: Steps for which a sign must last.
    """
    if len(rows) > HORIZON:
        rows = [*rows[:2], *rows[2 - HORIZON :]]
    return [sign for find in _SIGNS if (sign := find(rows, window)) is not None]


def after_returns(rows: Rows, returns: Sequence[Mapping[str, int]]) -> list[Mapping[str, Any]]:
    """Return the rows without those that the run went back behind.

    Args:
        rows: The lines of metrics.jsonl.
        returns: What `halve` did: after step "from" the run went on from the policy of step "to".
    """
    undone = [range(each["to"] + 1, each["from"] + 1) for each in returns]
    return [row for row in rows if not any(row["step"] in steps for steps in undone)]


def _reward(rows: Rows, window: int) -> Sign | None:
    reward = Series.of(rows, "reward", window)
    if not reward.last:
        return None
    best, now = reward.best, statistics.mean(reward.last)
    spreads = Series.of(rows, "reward_std").values
    spread = max(spreads) if spreads else best - min(0.0, *reward.before)
    lost = best - max(reward.last)
    if not spread or lost < HARM * spread or lost <= NOISE * reward.noise:
        return None
    return Sign("reward", f"the reward fell from {best:.3g} to {now:.3g}", harm=True)


def _score(rows: Rows, window: int) -> Sign | None:
    del window  # evaluations are many steps apart
    scores = Series.of(rows, "score", 1)
    if not scores.last:
        return None
    best, now = max(scores.before), scores.last[0]
    floor = min(0.0, *scores.before)
    error = max(Series.of(rows, "score_standard_error").values, default=0.0)
    if best == floor or best - now < max(HALF * (best - floor), NOISE * error):
        return None
    return Sign("score", f"the validation score fell from {best:.3g} to {now:.3g}", harm=True)


def _entropy(rows: Rows, window: int) -> Sign | None:
    entropy = Series.of(rows, "entropy", window)
    if not entropy.last or not entropy.before[0]:
        return None
    first, now = entropy.before[0], statistics.mean(entropy.last)
    text = f"from {first:.2g} to {now:.2g} nats a token in {len(entropy.values) - 1} steps"
    if max(entropy.last) < NARROW * first:
        return Sign("entropy", f"the entropy fell {text}")
    if min(entropy.last) > WIDE * first:
        return Sign("entropy", f"the entropy rose {text}", harm=not _improves(rows))
    return None


def _gradient(rows: Rows, window: int) -> Sign | None:
    norm = Series.of(rows, "grad_norm", window)
    usual = statistics.median(norm.before) if norm.last else 0.0
    if not usual or min(norm.last) <= STEEP * usual:
        return None
    now = statistics.mean(norm.last)
    return Sign("gradient", f"the gradient's norm rose from {usual:.2g} to {now:.2g}")


def _drift(rows: Rows, window: int) -> Sign | None:
    kl = Series.of(rows, "kl_initial_policy").values[-1:]
    if kl and kl[0] > DRIFT:
        return Sign("drift", f"the policy is {kl[0]:.2g} nats a token from the initial one")
    done = Series.of(rows, "kl_budget/realized", window)
    proposed = Series.of(rows, "kl_budget/predicted", window).last
    scale = Series.of(rows, "kl_budget/scale", window).last
    if not done.last or not proposed or not scale:
        return None
    told = statistics.mean(p * s**2 for p, s in zip(proposed, scale, strict=True))
    if min(done.last) <= OVERSHOOT * told:
        return None
    now = statistics.mean(done.last)
    return Sign("drift", f"steps moved the policy by {now:.2g} nats where {told:.2g} were expected")


def _stale(rows: Rows, window: int) -> Sign | None:
    kl = Series.of(rows, "objective/kl_old_policy", window)
    if not kl.last or min(kl.last) <= STALE:
        return None
    now = statistics.mean(kl.last)
    return Sign("stale", f"the policy is {now:.2g} nats a token from the old one in its updates")


def _length(rows: Rows, window: int) -> Sign | None:
    cut = Series.of(rows, "completions_clipped_ratio", window)
    if not cut.last or min(cut.last) < max(CUT, 2 * cut.before[0]):
        return None
    now = statistics.mean(cut.last)
    text = f"completions that do not end went from {cut.before[0]:.0%} to {now:.0%}"
    return Sign("length", text, harm=True)


def _equal(rows: Rows, window: int) -> Sign | None:
    share = Series.of(rows, "frac_reward_zero_std", window)
    if not share.last or min(share.last) < EQUAL or share.before[0] >= EQUAL:
        return None
    now = statistics.mean(share.last)
    return Sign("equal", f"groups of equal rewards went from {share.before[0]:.0%} to {now:.0%}")


def _rank(rows: Rows, window: int) -> Sign | None:
    rank = Series.of(rows, "geometry/ntk_effective_rank", window)
    if not rank.last or max(rank.last) >= NARROW * rank.before[0]:
        return None
    now = statistics.mean(rank.last)
    text = f"the kernel's effective rank fell from {rank.before[0]:.2g} to {now:.2g}"
    return Sign("rank", text)


def _layer(rows: Rows, window: int) -> Sign | None:
    share = Series.of(rows, "geometry/max_grad_share", window)
    if not share.last or min(share.last) < ONE_LAYER or share.before[0] >= ONE_LAYER:
        return None
    now, first = statistics.mean(share.last), share.before[0]
    return Sign("layer", f"one layer's share of the step went from {first:.0%} to {now:.0%}")


def _noise(rows: Rows, window: int) -> Sign | None:
    scale = Series.of(rows, "geometry/noise_scale", window)
    usual = statistics.median(scale.before) if scale.last else 0.0
    if not usual or min(scale.last) <= NOISY * usual:
        return None
    now = statistics.mean(scale.last)
    return Sign("noise", f"the noise scale rose from {usual:.3g} to {now:.3g} completions")


_SIGNS = (
    *(_reward, _score, _entropy, _gradient, _drift, _stale, _length, _equal, _rank, _layer, _noise),
)


def _told(found: Mapping[str, Sign]) -> str:
    """Return the most important signs in words, harm first."""
    texts = [sign.text for sign in sorted(found.values(), key=lambda sign: not sign.harm)]
    return " while ".join([texts[0], " and ".join(texts[1:3])] if texts[1:] else texts)


def _remedy(found: Mapping[str, Sign], rows: Rows) -> str:
    """Return what a collapse's signs are most likely of, and what to do."""
    if "stale" in found:
        return (
            "the old policy is too old; lower update.num_iterations or update.num_minibatches, and "
            "see that the sampler has the newest weights"
        )
    # A score counts after one evaluation, a reward after three steps: one low reward is enough.
    if "score" in found and "reward" not in found and _reward(rows, window=1) is None:
        reward = Series.of(rows, "reward")
        if _rises(reward, reward.noise):
            return (
                "what is learned is not what the score grades; look at the sign of rewards/ and of "
                "task.reward_weights, and if that is right, training's prompts may be learned by "
                "heart: train on more and different ones (task.num_train)"
            )
        return (
            "the completions are not the newest policy's, or the steps are too large, or what is "
            "learned is not what the score grades; see that the sampler has the newest weights, "
            f"{_smaller(rows)}, and look at the sign of rewards/ and of task.reward_weights"
        )
    if "length" in found and not {"entropy", "gradient", "drift"} & set(found):
        return (
            "completions grow without an end; set rollout.overlong_buffer, or "
            "rollout.mask_truncated_completions"
        )
    return f"the steps are too large; {_smaller(rows)}"


def _smaller(rows: Rows) -> str:
    """Return how to make steps smaller."""
    scales = Series.of(rows, "kl_budget/scale").values
    if scales and min(scales[-WINDOW:]) < 1:  # else the budget limited nothing
        return "halve update.kl_budget"
    rates = Series.of(rows, "learning_rate").values
    lower = "lower optimizer.learning_rate to a third"
    lower += f" (it was {max(rates):.2g} at most)" if rates else ""
    return lower if scales else f"{lower}, or set update.kl_budget"


def _improves(rows: Rows) -> bool:
    """Whether the reward rises, and the score too where it was measured."""
    reward, score = Series.of(rows, "reward"), Series.of(rows, "score", 1)
    return _rises(reward, reward.noise) and (not score.last or _rises(score))


def _rises(series: Series, noise: float = 0.0) -> bool:
    """Whether the newest level is above the first, and keeps more than half of the best gain."""
    if not series.last:
        return False
    first = series.before[0]
    gained = statistics.mean(series.last) - first
    return gained > max(NOISE * noise, (series.best - first) / 2)


def _unrewarded(rows: Rows) -> int | None:
    """Return the first of the last steps without a finite reward, if there are enough of them."""
    steps: list[int] = []
    for row in reversed(rows):
        if not row["step"] or math.isfinite(_finite(row.get("reward"))):
            break
        steps.append(row["step"])
    return steps[-1] if len(steps) >= WINDOW else None


def _learned(rows: Rows) -> str | None:
    """Return what the run has gained, with its figures, or None where that is not clear."""
    reward = Series.of(rows, "reward")
    values, share = reward.values, len(reward.values) // 4
    if len(values) < FEWEST:
        return None
    count = max(2, share)
    first, last = statistics.mean(values[:count]), statistics.mean(values[-count:])
    if last - first <= NOISE * reward.noise * math.sqrt(2 / count):
        return None
    scores = Series.of(rows, "score").values
    graded = f", the validation score from {scores[0]:.3g} to {scores[-1]:.3g}" if scores else ""
    return f"the reward went from {first:.3g} to {last:.3g}{graded}"


def _obstacle(rows: Rows, found: Mapping[str, Sign], learned: str | None) -> tuple[str, str]:
    """Return why a run does not learn, and what to do."""
    reward = Series.of(rows, "reward")
    if len(reward.values) < FEWEST and "score" not in found:
        return f"{len(reward.values)} steps are too few to tell", ""
    if any(sign.harm for sign in found.values()):
        gained = f", and {learned}" if learned else ""
        return f"{_told(found)}{gained}", _remedy(found, rows)
    equal = statistics.median(Series.of(rows, "frac_reward_zero_std").values or (0.0,))
    if equal >= EQUAL:
        return (
            f"in {equal:.0%} of the groups all rewards are equal",
            "take prompts that are neither too easy nor too hard, or more "
            "rollout.num_generations, or set rollout.dynamic_sampling_max_batches",
        )
    kl = Series.of(rows, "kl_initial_policy").values
    if len(kl) > 1 and kl[-1] < STILL:  # step 0 measures it before any training
        return (
            f"the policy is {kl[-1]:.1g} nats a token from the initial one",
            "raise optimizer.learning_rate, and keep the weights in float32 (model.dtype)",
        )
    scale = Series.of(rows, "geometry/noise_scale").values
    step = Series.of(rows, "num_sequences").values
    per_step = step[-1] / max(1, int(rows[-1]["step"])) if step else math.inf
    if scale and statistics.median(scale) > NOISY * per_step:
        return (
            f"the noise scale is {statistics.median(scale):.3g} completions, and a step has "
            f"{per_step:.3g}",
            "sample more (rollout.num_prompts), and see proxstep diagnose for how",
        )
    values, count = reward.values, max(2, len(reward.values) // 4)
    first, last = statistics.mean(values[:count]), statistics.mean(values[-count:])
    return (
        f"the reward went from {first:.3g} to {last:.3g}, and a step's noise is {reward.noise:.2g}",
        "train longer, or with more rollout.num_prompts",
    )


def _measured(rows: Rows, name: str) -> Iterator[Mapping[str, Any]]:
    return (row for row in rows if math.isfinite(_finite(row.get(name))))


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
