"""The task, tokenized and graded; what is wrong with it is found before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from proxstep.config import Recipe
from proxstep.errors import ProxstepError
from proxstep.rewards import RewardFunction, RewardTable, load_reward, score_completions
from proxstep.tasks import Example, Task, reward_columns


class Prompts:
    """Examples with their token ids and their reward functions.

    Args:
        examples: The examples.
        tokenizer: Encodes them.
        functions: The reward functions.
        weights: One per function.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        functions: Sequence[RewardFunction],
        weights: Sequence[float],
    ) -> None:
        self.examples = examples
        self._tokenizer = tokenizer
        self._functions, self._weights = functions, weights

    def __len__(self) -> int:
        return len(self.examples)

    def tokens(self, index: int) -> list[int]:
        """Return a prompt's token ids; a chat goes through the template."""
        return encode_prompt(self._tokenizer, self.examples[index].prompt)

    def grade(self, indices: Iterable[int], completions: Sequence[str]) -> RewardTable:
        """Return the rewards of completions, one for each of the indices."""
        examples = [self.examples[i] for i in indices]
        prompts: list[Any] = [e.prompt for e in examples]
        answers: list[Any] = [
            text if isinstance(e.prompt, str) else [{"role": "assistant", "content": text}]
            for e, text in zip(examples, completions, strict=True)
        ]
        return score_completions(
            self._functions, self._weights, prompts, answers, reward_columns(examples)
        )

    def check_lengths(self, limit: int, where: str) -> None:
        """Refuse prompts that are empty or longer than the limit, in tokens.

        Raises:
            ProxstepError: Naming the first such row.
        """
        if not isinstance(self.examples, list | tuple):
            return  # a procedural task's prompts are short by construction
        for row in range(len(self)):
            length = len(self.tokens(row))
            if length == 0:
                raise ProxstepError(f"{where} row {row + 1}: the prompt has no tokens")
            if length > limit:
                raise ProxstepError(
                    f"{where} row {row + 1}: the prompt has {length} tokens, "
                    f"task.max_prompt_length is {limit}: raise "
                    "it, or drop the row"
                )


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Return the token ids of a string, or of a chat up to the assistant's turn."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def load_prompts(recipe: Recipe, tokenizer: Any, task: Task) -> tuple[Prompts, Prompts]:
    """Return the training and the validation prompts of a task.

    Raises:
        ProxstepError: If a reward cannot be loaded, or a prompt does not fit the tokenizer.
    """
    specs = recipe.task.rewards or list(task.rewards)
    functions = [load_reward(spec) for spec in specs]
    weights = recipe.task.reward_weights or [1.0] * len(functions)
    _check_chat_template(tokenizer, task.train, recipe.model.name)
    train = Prompts(task.train, tokenizer, functions, weights)
    validation = Prompts(task.validation, tokenizer, functions, weights)
    train.check_lengths(recipe.task.max_prompt_length, "task.train")
    validation.check_lengths(recipe.task.max_prompt_length, "task.validation")
    return train, validation


def _check_chat_template(tokenizer: Any, examples: Sequence[Example], name: str) -> None:
    if isinstance(examples[0].prompt, str) or tokenizer.chat_template is not None:
        return
    raise ProxstepError(
        f"the prompts are chats, but the tokenizer of model.name {name} has no chat template: use "
        f"a chat model, set "
        "task.prompt_format to plain, or give prompts as strings"
    )


def step_rows(num_rows: int, num_per_step: int, step: int, seed: int) -> list[int]:
    """Return the rows of one step; every epoch is a permutation of its own.

    Args:
        num_rows: Rows of the data set.
        num_per_step: Rows to return; may exceed the data set.
        step: From 0.
        seed: Of the permutations.

    >>> sorted(step_rows(4, 2, 0, seed=0) + step_rows(4, 2, 1, seed=0))
    [0, 1, 2, 3]
    """
    rows = []
    permutation, current = torch.empty(0), -1
    for position in range(step * num_per_step, (step + 1) * num_per_step):
        epoch, place = divmod(position, num_rows)
        if epoch != current:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutation, current = torch.randperm(num_rows, generator=generator), epoch
        rows.append(int(permutation[place]))
    return rows
