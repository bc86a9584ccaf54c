"""How a question becomes a prompt: the instruction, a chat's turns, worked examples before it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from proxstep.errors import ProxstepError
from proxstep.tasks.base import Example, Prompt, Task

BETWEEN_EXAMPLES = "\n\n"
"""What parts worked examples of plain prompts."""


@dataclass(frozen=True)
class Layout:
    """What stands around every question of a task.

    Attributes:
        chat: Whether a question is a user's chat message rather than plain text.
        instruction: Text put after the question, after a space where it begins with none.
        system_prompt: A chat's first message, or None.
        num_few_shot: Worked examples before each question, always the same ones: training rows,
            drawn by `few_shot_seed` and left out of training. In a chat each is a user's and an
            assistant's message.
        few_shot_seed: Which rows they are.
    """

    chat: bool = False
    instruction: str = ""
    system_prompt: str | None = None
    num_few_shot: int = 0
    few_shot_seed: int = 0

    def instructed(self, question: str) -> str:
        """Return a question with the instruction after it.

        >>> Layout(instruction="Be brief.").instructed("1+1?")
        '1+1? Be brief.'
        """
        is_apart = not self.instruction or self.instruction[0].isspace()
        return f"{question}{'' if is_apart else ' '}{self.instruction}"

    def prompt(self, question: str) -> Prompt:
        """Return a word problem as a chat, or as "Question: ...", "Answer:"."""
        text = self.instructed(question)
        return _user(text) if self.chat else f"Question: {text}\nAnswer:"

    def table_prompt(self, prompt: Prompt) -> Prompt:
        """Return a table's prompt with the instruction; a text as a chat where `chat` says so."""
        if isinstance(prompt, str):
            text = self.instructed(prompt)
            return _user(text) if self.chat else text
        last = {**prompt[-1], "content": self.instructed(prompt[-1]["content"])}
        return [*prompt[:-1], last]

    def apply(self, task: Task) -> Task:
        """Return a task with the system prompt and the worked examples before every prompt.

        Raises:
            ProxstepError: If prompts are no chats and there is a system prompt, or a prompt has its
                own; or there are not more training rows than worked examples.
        """
        train, shots = task.train, []
        if self.num_few_shot:
            train, shots = self._drawn(train)
        if not shots and self.system_prompt is None:
            return task
        return replace(
            task,
            train=[self._complete(example, shots) for example in train],
            validation=[self._complete(example, shots) for example in task.validation],
        )

    def _drawn(self, train: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        """Return the training examples that are left, and the worked ones."""
        if self.num_few_shot >= len(train):
            raise ProxstepError(
                f"num_few_shot {self.num_few_shot} takes all {len(train)} training rows, and none "
                "are left to train on: lower it"
            )
        rng = random.Random(f"few-shot/{self.few_shot_seed}")
        chosen = rng.sample(range(len(train)), self.num_few_shot)
        left = set(range(len(train))) - set(chosen)
        return [train[i] for i in sorted(left)], [train[i] for i in chosen]

    def _complete(self, example: Example, shots: Sequence[Example]) -> Example:
        prompt = example.prompt
        if isinstance(prompt, str):
            if self.system_prompt is not None:
                raise ProxstepError(
                    "system_prompt is the first message of a chat, and these prompts are plain "
                    "text: use a model whose tokenizer has a chat template, with prompt_format "
                    "auto or chat"
                )
            worked = [f"{shot.prompt}{_worked(shot)}" for shot in shots]
            return replace(example, prompt=BETWEEN_EXAMPLES.join([*worked, prompt]))
        own = prompt[0]["role"] == "system"
        if own and self.system_prompt is not None:
            raise ProxstepError(
                "system_prompt: a prompt of the data has a system message of its own; leave it out"
            )
        head = prompt[:1] if own else []
        if self.system_prompt is not None:
            head = [{"role": "system", "content": self.system_prompt}]
        turns = [message for shot in shots for message in _turns(shot)]
        rest = prompt[1:] if own else prompt
        return replace(example, prompt=[*head, *turns, *rest])


def _turns(shot: Example) -> list[dict[str, str]]:
    """Return a worked example as a chat's messages, without a system message."""
    asked = _user(shot.prompt) if isinstance(shot.prompt, str) else shot.prompt
    asked = [message for message in asked if message["role"] != "system"]
    return [*asked, {"role": "assistant", "content": _worked(shot).strip()}]


def _worked(shot: Example) -> str:
    """Return the solution that follows a prompt, or the answer where there is none."""
    return f" {shot.answer}" if shot.solution is None else shot.solution


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
