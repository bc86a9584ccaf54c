"""A task's prompts: tokenized, graded, and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.rewards import (
    CODE_REWARDS,
    Baselines,
    RewardFunction,
    RewardTable,
    check_rewards,
    completion_text,
    load_reward,
    reward_columns,
    reward_name,
    score_completions,
)
from proxstep.rewards.baselines import measure
from proxstep.tasks import Example, Task
from proxstep.training.guarded import guarded

ADDED_REWARDS = ("overlong", "kl")
"""What a recipe can add to the reward, by the names in rewards/NAME."""


class Prompts:
    """Examples with their token ids and their reward functions.

    Args:
        examples: The examples.
        tokenizer: Encodes them.
        functions: The reward functions.
        weights: One per function.
        template: Arguments of the chat template.
        prefill: What every completion's turn begins with.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        functions: Sequence[RewardFunction],
        weights: Sequence[float],
        template: Mapping[str, Any] | None = None,
        prefill: str = "",
    ) -> None:
        self.examples = examples
        self._tokenizer = tokenizer
        self._template, self._prefill = template or {}, prefill
        self._functions, self._weights = functions, weights

    def __len__(self) -> int:
        return len(self.examples)

    def tokens(self, index: int) -> list[int]:
        """Return a prompt's token ids; a chat goes through the template."""
        prompt = self.examples[index].prompt
        return encode_prompt(self._tokenizer, prompt, self._template, self._prefill)

    def grade(
        self,
        indices: Iterable[int],
        completions: Sequence[str],
        truncated: Sequence[bool] | None = None,
    ) -> RewardTable:
        """Return the rewards of completions, one for each of the indices.

        `truncated` says of each whether it was cut off at the length limit; None for never.
        """
        return self._grade(self._functions, self._weights, indices, completions, truncated)

    def baselines(self, advance: Callable[[], None] = lambda: None) -> Baselines:
        """Return what a constant answer and copied numbers earn, by the first reward function.

        `advance` is called after each of at most `baselines.NUM_PASSES` passes over the prompts.
        """
        if reward_name(self._functions[0]) in CODE_REWARDS:
            return Baselines(note="the completions are programs")
        examples = list(self.examples)

        def grade(completions: list[str]) -> list[float | None]:
            table = self._grade(self._functions[:1], [1.0], range(len(examples)), completions, None)
            advance()
            return next(iter(table.per_function.values()))

        questions = [e.question or completion_text(e.prompt) for e in examples]
        return measure(questions, [e.answer for e in examples], grade)

    def _grade(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float],
        indices: Iterable[int],
        completions: Sequence[str],
        truncated: Sequence[bool] | None,
    ) -> RewardTable:
        examples = [self.examples[i] for i in indices]
        prompts: list[Any] = [e.prompt for e in examples]
        answers: list[Any] = [
            text if isinstance(e.prompt, str) else [{"role": "assistant", "content": text}]
            for e, text in zip(examples, completions, strict=True)
        ]
        columns = reward_columns(examples)
        return score_completions(functions, weights, prompts, answers, columns, truncated)

    def check(self, limit: int, where: str, *, drop: bool = False) -> int:
        """Refuse prompts that do not fit the tokenizer, are empty, or are longer than the limit.

        Args:
            limit: In tokens.
            where: What to call these prompts in the message.
            drop: Leave prompts that are too long out instead.

        Returns:
            How many were left out.

        Raises:
            ProxstepError: Naming the first such row.
        """
        if not isinstance(self.examples, list | tuple):
            return 0  # a procedural task's prompts are short by construction
        kept = []
        for row, example in enumerate(self.examples):
            place = f"{where} row {row + 1}"
            if not isinstance(example.prompt, str) and self._tokenizer.chat_template is None:
                raise ProxstepError(
                    f"{place}: the prompt is a chat, but the model's tokenizer has no chat "
                    "template: use a chat model, or prompts that are texts with "
                    "task.prompt_format plain"
                )
            if not isinstance(example.prompt, str) and example.prompt[-1]["role"] == "assistant":
                raise ProxstepError(
                    f"{place}: the chat ends with an assistant's message, after which the template "
                    "would begin another: end it with the user's"
                )
            try:
                length = len(self.tokens(row))
            except Exception as error:  # whatever a model's template raises
                raise ProxstepError(
                    f"{place}: the tokenizer's chat template refuses this prompt: {error}"
                ) from error
            if length == 0:
                raise ProxstepError(
                    f"{place}: the prompt has no tokens; is the tokenizer of model.name complete?"
                )
            if length > limit and not drop:
                raise ProxstepError(
                    f"{place}: the prompt has {length} tokens, task.max_prompt_length is {limit}: "
                    "raise it, drop the row, or set task.drop_long_prompts"
                )
            if length <= limit:
                kept.append(example)
        if not kept:
            raise ProxstepError(
                f"{where}: every prompt has more than task.max_prompt_length {limit} tokens: raise "
                "it"
            )
        dropped = len(self.examples) - len(kept)
        self.examples = kept if dropped else self.examples
        return dropped


def encode_prompt(
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    template: Mapping[str, Any] | None = None,
    prefill: str = "",
) -> list[int]:
    """Return the token ids of a string, or of a chat up to the assistant's turn, and the prefill.

    `template` holds further arguments of the chat template.
    An end token that the tokenizer itself puts after a string is left out: nothing follows it.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt + prefill)["input_ids"]
        end = getattr(tokenizer, "eos_token_id", None)
        return ids[:-1] if ids[-1:] == [end] and appends_end(tokenizer) else ids
    text = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True, **(template or {})
    )
    return tokenizer(text + prefill, add_special_tokens=False)["input_ids"]


def appends_end(tokenizer: Any) -> bool:
    """Whether a tokenizer ends every text with its end token."""
    return tokenizer("1")["input_ids"][-1:] == [tokenizer.eos_token_id]


def load_rewards(recipe: Recipe, task: Task) -> tuple[list[RewardFunction], list[float]]:
    """Return the reward functions and their weights.

    Raises:
        ProxstepError: If one cannot be loaded, does not accept the task's columns, or has a name
            that the metrics need for something else.
    """
    seconds = recipe.task.reward_seconds
    specs = recipe.task.rewards or task.rewards
    functions = [guarded(load_reward(spec), seconds) for spec in specs]
    weights = recipe.task.reward_weights or [1.0] * len(functions)
    check_rewards(functions, weights, reward_columns([task.train[0]]))
    for function in functions:
        if (name := reward_name(function)) in ADDED_REWARDS:
            raise ProxstepError(
                f"task.rewards: a reward function is named {name!r}, and rewards/{name} reports "
                "what the recipe itself adds to the reward; rename the function"
            )
    return functions, weights


def load_prompts(
    recipe: Recipe, tokenizer: Any, task: Task, note: Callable[[str], None] = lambda text: None
) -> tuple[Prompts, Prompts]:
    """Return the training and the validation prompts of a task.

    `note` is told how many were too long, where a recipe says to leave those out, and how many of
    the validation prompts are training prompts.

    Raises:
        ProxstepError: If a reward cannot be loaded, or a prompt does not fit the tokenizer.
    """
    rewards, section = load_rewards(recipe, task), recipe.task
    given = (section.chat_template_kwargs, recipe.rollout.prefill or "")
    train = Prompts(task.train, tokenizer, *rewards, *given)
    validation = Prompts(task.validation, tokenizer, *rewards, *given)
    for prompts, what in ((train, "train"), (validation, "validation")):
        total = len(prompts)
        dropped = prompts.check(
            section.max_prompt_length, f"task.{what}", drop=section.drop_long_prompts
        )
        if section.drop_long_prompts:
            note(
                f"task.drop_long_prompts: {dropped} of {total} {what} prompts have more than "
                f"{section.max_prompt_length} tokens"
            )
    if shared := _num_shared(train.examples, validation.examples):
        note(
            f"{shared} of {len(validation)} validation prompts are training prompts too: their "
            "score says little of other prompts"
        )
    return train, validation


def _num_shared(train: Sequence[Example], validation: Sequence[Example]) -> int:
    """Return how many validation prompts are trained on; a procedural task's are none."""
    if not isinstance(train, list | tuple):
        return 0
    trained = {str(example.prompt) for example in train}
    return sum(str(example.prompt) in trained for example in validation)


def batch_rows(num_rows: int, num_per_batch: int, batch: int, seed: int) -> list[int]:
    """Return the rows of one batch of prompts; every epoch is permuted anew.

    Args:
        num_rows: Rows of the data set.
        num_per_batch: Rows to return; may exceed the data set.
        batch: How many came before: one for each step, more with dynamic sampling.
        seed: Of the permutations.

    >>> sorted(batch_rows(4, 2, 0, seed=0) + batch_rows(4, 2, 1, seed=0))
    [0, 1, 2, 3]
    """
    rows = []
    permutation, current = torch.empty(0), -1
    for position in range(batch * num_per_batch, (batch + 1) * num_per_batch):
        epoch, place = divmod(position, num_rows)
        if epoch != current:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutation, current = torch.randperm(num_rows, generator=generator), epoch
        rows.append(int(permutation[place]))
    return rows
