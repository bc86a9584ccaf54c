"""Supervised warm-up: fine-tuning on some of a task's own solutions before reinforcement learning.

It happens once for a model, a task and the keys `model.warmup_*`; its result is cached, with
`warmup.json`, which says what was done and how long it took.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.runs.durable import write_file
from proxstep.tasks import Example
from proxstep.training.cache import cache_folder, keep, making
from proxstep.training.demo_model import solution_logits
from proxstep.training.models import load_model, load_tokenizer, pick_device
from proxstep.training.precision import with_autocast
from proxstep.training.prompts import batch_rows
from proxstep.training.rollout import autocast
from proxstep.training.task import load_task

_VERSION = 4
"""Part of the cache's name: raise it when anything below changes what comes out."""
_BATCH_SIZE, _PART = 16, 4
_NUM_RISING_STEPS = 5
_COOLDOWN = 0.3
"""Share of the steps, at the end, over which the learning rate falls to 0: a policy that stops at
a high one improves by any training at all, whatever its rewards."""
_SEED = 2**31 - 1
"""Of the draw of the examples; hardly a run's own."""
RECORD = "warmup.json"


def ensure_warmed_up(
    source: str, recipe: Recipe, note: Callable[[str], None] = lambda text: None
) -> Path:
    """Return the folder of a model that was fine-tuned on solutions; do it if it is not cached.

    Args:
        source: Folder or hub name of the model to begin with.
        recipe: Its keys `model.warmup_*` say how.
        note: Called with what goes on, in words.

    Returns:
        A folder that `from_pretrained` loads, model and tokenizer.

    Raises:
        ProxstepError: If the task has no solutions.
    """
    start = time.perf_counter()
    tokenizer = load_tokenizer(source)
    task = load_task(recipe, chat=tokenizer.chat_template is not None)
    examples = _examples(task.train, recipe.model.warmup_solutions or 0)
    folder = cache_folder() / f"warmed-up-v{_VERSION}-{_key(source, recipe, examples):08x}"
    with making(folder, note) as is_missing:
        if not is_missing:
            return folder
        model = load_model(source, "float32", pick_device(recipe.device))
        note(f"supervised warm-up of {recipe.model.name} on {len(examples)} solutions, once")
        losses = fine_tune(with_autocast(recipe, model, note), model, tokenizer, examples, note)
        record = {
            "model": recipe.model.name,
            "task": recipe.task.name,
            "num_solutions": len(examples),
            "learning_rate": recipe.model.warmup_learning_rate,
            "batch_size": _BATCH_SIZE,
            "losses": losses,
            "seconds": time.perf_counter() - start,
        }
        keep(folder, model, tokenizer)
        del model
        _give_memory_back()
        write_file(folder / RECORD, json.dumps(record).encode())
    return folder


def _key(source: str, recipe: Recipe, examples: Sequence[Example]) -> int:
    """Return a number for everything that the result depends on."""
    files = [path.stat() for path in sorted(Path(source).glob("*.safetensors"))]
    what = [
        *(source, [(file.st_size, file.st_mtime_ns) for file in files]),
        *(recipe.model.warmup_learning_rate, recipe.model.autocast),
        recipe.task.chat_template_kwargs,
        [(example.prompt, example.solution) for example in examples],
    ]
    return zlib.crc32(json.dumps(what).encode())


def _examples(train: Sequence[Example], number: int) -> list[Example]:
    """Return training examples, drawn as a run of another seed would draw its prompts.

    Raises:
        ProxstepError: If there are not so many, or one has no solution.
    """
    if number > len(train):
        raise ProxstepError(
            f"model.warmup_solutions is {number}, but there are {len(train)} training examples"
        )
    examples = [train[row] for row in batch_rows(len(train), number, 0, _SEED)]
    if any(example.solution is None for example in examples):
        raise ProxstepError(
            "model.warmup_solutions needs a task with solutions: stories, sums, products, maxima, "
            "countdown, gsm8k or math"
        )
    return examples


def fine_tune(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    note: Callable[[str], None],
) -> list[float]:
    """Train on each example's solution once, in their order; return the loss of each step."""
    learning_rate = recipe.model.warmup_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    batches = [examples[i : i + _BATCH_SIZE] for i in range(0, len(examples), _BATCH_SIZE)]
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step, batch in enumerate(batches):
        left = (1 - step / len(batches)) / _COOLDOWN
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / _NUM_RISING_STEPS, left)
        loss = _backward(recipe, model, tokenizer, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        spent = time.perf_counter() - start
        rest = spent / (step + 1) * (len(batches) - step - 1)
        note(f"warm-up {step + 1}/{len(batches)}: loss {losses[-1]:.2f}, about {rest:.0f} s left")
    model.eval()
    return losses


def _backward(recipe: Recipe, model: nn.Module, tokenizer: Any, batch: Sequence[Example]) -> float:
    """Leave the gradient of the batch's mean loss per token, a few sequences at a time; return it.

    The logits of one part alone exist at a time: at a vocabulary of 49,152 those of sixteen
    solutions of 150 tokens are 470 MB, and their gradients as many again.
    """
    total, count = 0.0, 0
    for first in range(0, len(batch), _PART):
        part = batch[first : first + _PART]
        with autocast(recipe, model):
            logits, label = solution_logits(
                model, tokenizer, part, recipe.task.chat_template_kwargs
            )
        is_solution = label >= 0
        loss = cross_entropy(logits[is_solution].float(), label[is_solution], reduction="sum")
        loss.backward()
        total += loss.item()
        count += int(is_solution.sum())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(count)
    return total / count


def _give_memory_back() -> None:
    """Return what the warm-up held to the system, where glibc would keep it for later."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
