"""A reward of one's own; my_reward.yaml names it."""

from __future__ import annotations

from typing import Any


def digits(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list:
    """Return 1 where a completion is as many digits as the row's answer says, and nothing else.

    Some digits among other characters, too few or too many, get a part of it: a reward that is 0
    for everything that a model writes at first has nothing to teach.

    Args:
        prompts: B prompts, as in the table.
        completions: B texts, or B chats with one message.
        answer: B values of the table's column of answers.
        **columns: B values of each of the table's other columns, by name.
    """
    del prompts, columns
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        found = sum("0" <= character <= "9" for character in text)
        rewards.append(min(found, int(wanted)) / max(len(text), int(wanted)))
    return rewards
