"""A task's examples as rows of the data set that TRL takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from proxstep.rewards import reward_columns
from proxstep.tasks import Example


def rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return one row for each example: its prompt, and the columns that reward functions take.

    >>> rows([Example("1+1=", "2")])
    [{'prompt': '1+1=', 'answer': '2'}]
    """
    examples = list(examples)  # a procedural task makes each one anew
    columns = reward_columns(examples)
    return [
        {"prompt": example.prompt} | {name: values[i] for name, values in columns.items()}
        for i, example in enumerate(examples)
    ]
