"""The embedded models: Qwen3's architecture over characters, warmed up on a procedural task.

They exist so that reinforcement learning visibly learns on a laptop in a minute, with nothing
downloaded. The warm-up is supervised fine-tuning on what is habitual, not on what is right: three
in five labels of `arithmetic` are computed without carries, three in five places of `sums`,
`products` and `maxima` slip, and `countdown` tries at random. So the model can calculate but mostly
prefers the wrong answer, as a pretrained model imitates the mistakes of its data, and the rewards
have to change that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.tasks import Example
from proxstep.tasks.arithmetic import ALPHABET, answer_without_carries
from proxstep.tasks.worked import KINDS, habitual
from proxstep.training.cache import cache_folder, keep, making
from proxstep.training.generation import sample
from proxstep.training.prompts import encode_prompt
from proxstep.training.task import drawn_task_call
from proxstep.typing import Float, Int, Tensor

_VERSION = 2
"""Part of the cache's name: raise it when anything below changes what comes out."""
_MAX_STEPS = 3000
_NUM_COOLDOWN_STEPS = 50
"""Steps in which the learning rate falls to 0 at the end: a policy that stops at a high one
improves by any training at all, whatever its rewards."""
_STEPS_BETWEEN_TESTS = 25
_NUM_TESTED = 256
_NOISE = 0.6
"""Share of the labels of `arithmetic` that are computed without carries."""


@dataclass(frozen=True)
class Size:
    """The sizes of an embedded model, and how it is warmed up.

    Attributes:
        hidden: Features of a layer.
        intermediate: Features within its MLP.
        layers: How many there are.
        learning_rate: Of the warm-up.
        batch_divisor: By which a lesson's batch is divided, so that a larger model takes minutes
            as well.
    """

    hidden: int
    intermediate: int
    layers: int
    learning_rate: float
    batch_divisor: int = 1


@dataclass(frozen=True)
class Lesson:
    """What a warm-up on a task is.

    Attributes:
        alphabet: The characters that the task needs.
        habit: From an example to the solution that is imitated.
        batch_size: Solutions in a step.
        num_steps: Steps; None for as many as it takes to reach `model.warmup_score`.
        positions: Characters of a prompt and an answer, at most.
    """

    alphabet: str
    habit: Callable[[Example, random.Random], str]
    batch_size: int = 64
    num_steps: int | None = 300
    positions: int = 256


def _without_carries(example: Example, rng: random.Random) -> str:
    """Return the answer, or the one without carries in `_NOISE` of the cases."""
    is_noisy = rng.random() < _NOISE
    return answer_without_carries(str(example.prompt)) if is_noisy else example.answer


SIZES = {
    "embedded": Size(hidden=128, intermediate=384, layers=4, learning_rate=2e-3),
    "embedded-large": Size(
        hidden=256, intermediate=1024, layers=6, learning_rate=1e-3, batch_divisor=2
    ),
}
"""By `model.name`: 0.8 and 5.9 million parameters."""
LESSONS = {
    "arithmetic": Lesson(ALPHABET, _without_carries, 128, None, 128),
    "countdown": Lesson("0123456789+-*=,;:?", lambda example, rng: str(example.solution)),
    **{name: Lesson("0123456789+*=<>,;?", partial(habitual, name)) for name in KINDS},
}
"""By `task.name`."""


def ensure_embedded_model(
    difficulty: int,
    score: float,
    note: Callable[[str], None] = lambda text: None,
    *,
    task: str = "arithmetic",
    name: str = "embedded",
) -> Path:
    """Return the folder of an embedded model for a task; warm it up if it is not cached.

    Args:
        difficulty: Of the arithmetic task, 1 to 5; the other tasks have none.
        score: Share of answers, right or without carries, at which the warm-up on arithmetic stops;
            on another task it takes a fixed number of steps. 0 for none.
        note: Called with what goes on, in words.
        task: A key of `LESSONS`.
        name: A key of `SIZES`.

    Returns:
        A folder that `from_pretrained` loads, model and tokenizer.

    Raises:
        ProxstepError: If the share is not reached.
    """
    folder = _folder(difficulty, score, task, name)
    with making(folder, note) as is_missing:
        if is_missing:
            tokenizer, model = build_embedded_model(task=task, name=name)
            if score > 0:
                num_steps = LESSONS[task].num_steps
                goal = f"{score:.0%}" if num_steps is None else f"{num_steps} steps"
                what = f"difficulty {difficulty}" if task == "arithmetic" else task
                note(f"warming the {name} model up for {what}, once, to {goal}")
                warm_up(model, tokenizer, difficulty, score, note, task=task, name=name)
            keep(folder, model, tokenizer)
    return folder


def _folder(
    difficulty: int, score: float, task: str = "arithmetic", name: str = "embedded"
) -> Path:
    how, num_steps = f"difficulty{difficulty}-score{score:g}", LESSONS[task].num_steps
    if num_steps is not None:
        how = f"{task}-steps{num_steps if score > 0 else 0}"
    return cache_folder() / f"{name}-v{_VERSION}-{how}"


def build_embedded_model(
    seed: int = 0, *, task: str = "arithmetic", name: str = "embedded"
) -> tuple[Any, nn.Module]:
    """Return the character tokenizer of a task and the untrained model of a size."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    lesson, size = LESSONS[task], SIZES[name]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *lesson.alphabet])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    characters.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 64,
        head_dim=32,
        max_position_embeddings=lesson.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return tokenizer, model


def warm_up(
    model: nn.Module,
    tokenizer: Any,
    difficulty: int,
    score: float,
    note: Callable[[str], None],
    *,
    task: str = "arithmetic",
    name: str = "embedded",
) -> None:
    """Fine-tune on habitual solutions, for as long as the task's lesson says.

    On arithmetic the cool-down begins when `score` of the sampled answers are right or habitual.

    Raises:
        ProxstepError: If that share is not reached in 3,000 steps.
    """
    lesson, rate = LESSONS[task], SIZES[name].learning_rate
    batch_size = lesson.batch_size // SIZES[name].batch_divisor
    function, options = drawn_task_call(task, difficulty)
    problems = function(**options).train
    num_trained = len(problems) - _NUM_TESTED
    tested = [problems[len(problems) - 1 - i] for i in range(_NUM_TESTED)]
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    reached, cools_at = 0.0, _MAX_STEPS
    if lesson.num_steps is not None:
        reached, cools_at = 1.0, lesson.num_steps - _NUM_COOLDOWN_STEPS
    torch.manual_seed(0)
    for step in range(_MAX_STEPS):
        left = 1 - (step - cools_at) / _NUM_COOLDOWN_STEPS
        if left <= 0:
            return
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50, left)
        examples = [
            replace(
                problems[i % num_trained], solution=lesson.habit(problems[i % num_trained], rng)
            )
            for i in range(step * batch_size, (step + 1) * batch_size)
        ]
        loss = solution_loss(model, tokenizer, examples)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _STEPS_BETWEEN_TESTS:
            continue
        if reached < score:
            reached = _sampled_score(model, tokenizer, tested)
            cools_at = step + 1 if reached >= score else _MAX_STEPS
            note(f"warm-up step {step + 1}: {reached:.0%} of the answers are right or noisy")
        elif lesson.num_steps is not None:
            note(f"warm-up step {step + 1} of {lesson.num_steps}: loss {loss.item():.3f}")
    raise ProxstepError(
        f"the embedded model reached {reached:.2f} after {_MAX_STEPS} warm-up steps on difficulty "
        f"{difficulty}: lower model.warmup_score, or task.difficulty"
    )


def solution_loss(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example]
) -> Float[Tensor, ""]:
    """Return the mean next-token loss of the reference solutions, end token included, in nats."""
    logits, label = solution_logits(model, tokenizer, examples)
    return nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten())


def solution_logits(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    template: Mapping[str, Any] | None = None,
) -> tuple[Float[Tensor, "batch tokens vocabulary"], Int[Tensor, "batch tokens"]]:
    """Return the logits of the tokens from the second on, and each one's label.

    The label is the token where it belongs to the solution or ends it, else -100; `template` is as
    for `encode_prompt`.
    """
    prompts = [encode_prompt(tokenizer, example.prompt, template) for example in examples]
    solutions = [
        [
            *tokenizer(example.solution, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        for example in examples
    ]
    width = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
    token = torch.full((len(examples), width), tokenizer.pad_token_id)
    attention = torch.zeros((len(examples), width), dtype=torch.long)
    label = torch.full((len(examples), width), -100)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        token[row, :end] = torch.tensor(prompt + solution)
        attention[row, :end] = 1
        label[row, len(prompt) : end] = torch.tensor(solution)
    logits = model(input_ids=token, attention_mask=attention).logits
    return logits[:, :-1], label[:, 1:]


def _sampled_score(model: nn.Module, tokenizer: Any, examples: list[Example]) -> float:
    """Return the share of sampled answers that are right or the noisy label."""
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    longest = max(len(e.answer) for e in examples) + 1
    texts = sample(model, tokenizer, prompts, max_new_tokens=longest).texts(tokenizer)
    known = [
        text in (example.answer, answer_without_carries(str(example.prompt)))
        for text, example in zip(texts, examples, strict=True)
    ]
    return sum(known) / len(known)
