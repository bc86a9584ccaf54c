"""The embedded model: Qwen3's architecture over characters, warmed up on arithmetic.

It exists so that reinforcement learning visibly learns on a laptop in a minute, with nothing
downloaded. The warm-up is supervised fine-tuning on noisy labels: three in five are computed
without carries. So the model can calculate but mostly prefers the wrong answer, as a pretrained
model imitates the mistakes of its data, and the rewards have to change that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.tasks import Example, arithmetic_task
from proxstep.tasks.arithmetic import ALPHABET, answer_without_carries
from proxstep.training.cache import cache_folder, is_kept, keep, making
from proxstep.training.generation import sample
from proxstep.training.prompts import encode_prompt
from proxstep.typing import Float, Tensor

_VERSION = 2
"""Part of the cache's name: raise it when anything below changes what comes out."""
_BATCH_SIZE = 128
_LEARNING_RATE = 2e-3
_MAX_STEPS = 3000
_NUM_COOLDOWN_STEPS = 50
"""Steps in which the learning rate falls to 0 at the end: a policy that stops at a high one
improves by any training at all, whatever its rewards."""
_STEPS_BETWEEN_TESTS = 25
_NUM_TESTED = 256
_NOISE = 0.6
"""Share of the labels that are computed without carries."""


def is_cached(difficulty: int, score: float) -> bool:
    """Whether the embedded model for a difficulty was warmed up on this machine before."""
    return is_kept(_folder(difficulty, score))


def _folder(difficulty: int, score: float) -> Path:
    return cache_folder() / f"embedded-v{_VERSION}-difficulty{difficulty}-score{score:g}"


def ensure_embedded_model(
    difficulty: int, score: float, note: Callable[[str], None] = lambda text: None
) -> Path:
    """Return the folder of the embedded model for a difficulty; warm it up if it is not cached.

    Args:
        difficulty: Of the arithmetic task, 1 to 5.
        score: Share of answers, right or without carries, at which the warm-up stops; 0 for none.
        note: Called with what goes on, in words.

    Returns:
        A folder that `from_pretrained` loads, model and tokenizer.

    Raises:
        ProxstepError: If the share is not reached.
    """
    folder = _folder(difficulty, score)
    with making(folder, note) as is_missing:
        if is_missing:
            tokenizer, model = build_embedded_model()
            if score > 0:
                what = f"for difficulty {difficulty}, once, to {score:.0%}"
                note(f"warming the embedded model up {what}")
                warm_up(model, tokenizer, difficulty, score, note)
            keep(folder, model, tokenizer)
    return folder


def build_embedded_model(seed: int = 0) -> tuple[Any, nn.Module]:
    """Return the character tokenizer and the untrained model."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    characters.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
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
) -> None:
    """Fine-tune on noisy labels until the model often gives the right answer or the noisy one.

    The cool-down begins when `score` of the sampled answers are one of the two.

    Raises:
        ProxstepError: If the share is not reached in 3,000 steps.
    """
    problems = arithmetic_task(difficulty).train
    num_trained = len(problems) - _NUM_TESTED
    tested = [problems[len(problems) - 1 - i] for i in range(_NUM_TESTED)]
    noise = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    reached, reached_at = 0.0, _MAX_STEPS
    torch.manual_seed(0)
    for step in range(_MAX_STEPS):
        left = 1 - (step - reached_at) / _NUM_COOLDOWN_STEPS
        if left <= 0:
            return
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / 50, left)
        examples = [
            _labeled(problems[i % num_trained], noisy=noise.random() < _NOISE)
            for i in range(step * _BATCH_SIZE, (step + 1) * _BATCH_SIZE)
        ]
        loss = solution_loss(model, tokenizer, examples)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if reached < score and (step + 1) % _STEPS_BETWEEN_TESTS == 0:
            reached = _sampled_score(model, tokenizer, tested)
            reached_at = step + 1 if reached >= score else _MAX_STEPS
            note(f"warm-up step {step + 1}: {reached:.0%} of the answers are right or noisy")
    raise ProxstepError(
        f"the embedded model reached {reached:.2f} after {_MAX_STEPS} warm-up steps on difficulty "
        f"{difficulty}: lower model.warmup_score, or task.difficulty"
    )


def solution_loss(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    template: Mapping[str, Any] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean next-token loss of the reference solutions, end token included, in nats.

    `template` is as for `encode_prompt`.
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
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), label[:, 1:].flatten())


def _labeled(example: Example, *, noisy: bool) -> Example:
    """Return the example with the label that it is trained on as its solution."""
    prompt = str(example.prompt)
    return replace(example, solution=answer_without_carries(prompt) if noisy else example.answer)


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
