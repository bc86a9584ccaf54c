"""What policies wrote before training and after it, to be read side by side with the grades."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from proxstep.runs.reading import MISSING, Run, load_samples

_NUM_SHOWN = 6
_LONGEST = 1500


@dataclass(frozen=True)
class Written:
    """One completion.

    Attributes:
        when: "before training" or "after step N".
        text: What was written, cut where it is very long.
        grade: Its reward, as text.
        full: Whether the reward is at least 1.
    """

    when: str
    text: str
    grade: str
    full: bool

    @classmethod
    def of(cls, row: dict[str, Any]) -> Written:
        """Return a row of `samples.jsonl` as it is shown."""
        step, reward = row.get("step"), row.get("reward")
        known = isinstance(reward, int | float)
        grade = f"{reward:.3g}" if known else MISSING
        when = "before training" if step == 0 else f"after step {MISSING if step is None else step}"
        return cls(when, _cut(row.get("completion")), grade, known and reward >= 1)


@dataclass(frozen=True)
class Sample:
    """A prompt and what one run wrote for it.

    Attributes:
        prompt: The prompt.
        answer: The expected answer.
        written: The first completion and the last, or the one that there is.
    """

    prompt: str
    answer: str
    written: list[Written]


@dataclass(frozen=True)
class Samples:
    """Samples of one run.

    Attributes:
        seed: Its seed.
        shown: A few of them.
    """

    seed: int
    shown: list[Sample]


def first_samples(runs: Sequence[Run]) -> Samples | None:
    """Return the first prompts of the first run that kept any, not picked; None where none did."""
    for run in runs:
        rows = load_samples(run)
        if rows:
            return Samples(run.seed, _paired(rows))
    return None


def _paired(rows: Sequence[dict[str, Any]]) -> list[Sample]:
    last_step = rows[-1].get("step")
    started = {_text(row.get("prompt")): row for row in rows if row.get("step") == 0}
    pairs = []
    for row in rows:
        if row.get("step") == last_step:
            first = started.get(_text(row.get("prompt"))) if last_step != 0 else None
            pairs.append([first, row] if first else [row])
    return [
        Sample(
            _cut(pair[-1].get("prompt")),
            _cut(pair[-1].get("answer")),
            [Written.of(row) for row in pair],
        )
        for pair in pairs[:_NUM_SHOWN]
    ]


def _text(value: Any) -> str:
    return MISSING if value is None else str(value)


def _cut(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text) - _LONGEST:,} more)"
