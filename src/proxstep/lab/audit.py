"""Whether a gain is real: intervals, trivial answers, and what the policy wrote before and after.

It reads the greedy completions that runs keep, and says nothing of runs that kept only a few:
`logging.num_samples` says how many.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import mean
from typing import Any

from proxstep.lab.statistics import Estimate, mean_interval
from proxstep.rewards import narrowness
from proxstep.runs.reading import Run, by_algorithm, load_samples

_FEWEST_ROWS = 50
_EQUATION = re.compile(r"(-?[0-9]{1,9}) ([-+*/]) (-?[0-9]{1,9}) = (-?[0-9]{1,9})(?!\.?[0-9])")

Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """What a policy answered.

    Attributes:
        most_frequent: Its most frequent answer, as numbers are graded.
        share: Of the completions that give it.
        with_equations: Share of the completions that have an equation of two numbers.
        true_equations: Share of the completions whose equations, at least one, are all true.
    """

    most_frequent: str
    share: float
    with_equations: float
    true_equations: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Answers:
        """Return what the completions answered."""
        texts = [str(row["completion"]) for row in rows]
        narrow = narrowness(texts, [str(row["answer"]) for row in rows])
        some = [bool(_EQUATION.search(text)) for text in texts]
        true = [has_true_equations(text) for text in texts]
        answer = "none" if narrow.answer is None else narrow.answer
        return cls(answer, narrow.share, mean(some), mean(true))


@dataclass(frozen=True)
class AlgorithmAudit:
    """One algorithm's runs.

    Attributes:
        algorithm: Its name.
        num_seeds: Number of runs that kept their completions.
        start: Greedy score before training.
        final: Greedy score after it.
        gain: Of each run.
        before: The answers before training, over all runs.
        after: The answers after it.
    """

    algorithm: str
    num_seeds: int
    start: Estimate
    final: Estimate
    gain: Estimate
    before: Answers
    after: Answers


@dataclass(frozen=True)
class Audit:
    """All of a comparison.

    Attributes:
        num_prompts: Validation prompts whose completions were kept.
        constant: The best constant answer and its score, None where it was not measured.
        copied: The same of copying a number from the prompt.
        algorithms: One for each algorithm.
    """

    num_prompts: int
    constant: dict[str, Any] | None
    copied: dict[str, Any] | None
    algorithms: list[AlgorithmAudit]


def audit(runs: Sequence[Run]) -> Audit | None:
    """Return the audit, or None where no run kept enough completions of its first and last step."""
    kept = [(run, rows) for run in runs if (rows := _first_and_last(run)) is not None]
    if not kept:
        return None
    completions = {id(run): rows for run, rows in kept}
    first, baselines = kept[0][1][0], kept[0][0].info.get("baselines") or {}
    return Audit(
        len(first),
        _measured(baselines.get("constant")),
        _measured(baselines.get("copied")),
        [
            _of_algorithm(algorithm, [completions[id(run)] for run in members])
            for algorithm, members in by_algorithm(run for run, _ in kept).items()
        ],
    )


def _measured(guess: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a baseline, or None where its score was not a number."""
    return None if guess is None or guess["score"] is None else guess


def _of_algorithm(algorithm: str, runs: Sequence[tuple[list[Row], list[Row]]]) -> AlgorithmAudit:
    starts = [_score(before) for before, _ in runs]
    finals = [_score(after) for _, after in runs]
    return AlgorithmAudit(
        algorithm,
        len(runs),
        mean_interval(starts),
        mean_interval(finals),
        mean_interval([final - start for start, final in zip(starts, finals, strict=True)]),
        Answers.of([row for before, _ in runs for row in before]),
        Answers.of([row for _, after in runs for row in after]),
    )


def _first_and_last(run: Run) -> tuple[list[Row], list[Row]] | None:
    """Return a run's completions before and after training, of the same prompts; None if few."""
    by_step: dict[int, list[Row]] = {}
    for row in load_samples(run):
        by_step.setdefault(row.get("step", 0), []).append(row)
    before, after = by_step.get(0, []), by_step.get(max(by_step, default=0), [])
    whole = all({"prompt", "completion", "answer", "reward"} <= row.keys() for row in before)
    if len(by_step) < 2 or len(before) < _FEWEST_ROWS or len(after) != len(before) or not whole:
        return None
    return before, after


def _score(rows: Sequence[Row]) -> float:
    given = [row["reward"] for row in rows if row["reward"] is not None]
    return mean(given) if given else 0.0


def has_true_equations(text: str) -> bool:
    """Whether a text has equations of two numbers, and all of them are true.

    >>> has_true_equations("5 + 3 = 8. 8 * 2 = 16."), has_true_equations("5 + 3 = 9.")
    (True, False)
    """
    found = _EQUATION.findall(text)
    return bool(found) and all(_is_true(*equation) for equation in found)


def _is_true(left: str, operator: str, right: str, result: str) -> bool:
    a, b, c = Fraction(left), Fraction(right), Fraction(result)
    if operator == "/":
        return b != 0 and a / b == c
    return {"+": a + b, "-": a - b, "*": a * b}[operator] == c
