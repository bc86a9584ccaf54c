"""Greedy completions that are kept between runs: those of a comparison begin with the same policy.

They are found by everything that they depend on, the weights to the last bit among it, so that what
is read is what would be computed. Rewards are not kept: completions are graded every time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.runs.durable import write_file
from proxstep.training.cache import cache_folder
from proxstep.training.generation import end_tokens
from proxstep.training.prompts import Prompts


def memory_of(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str],
) -> Path:
    """Return the file in which a policy's greedy completions of some prompts are kept.

    It depends on the autocast in whose context this is called.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    device = next(model.parameters()).device.type
    cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    how = [
        max_new_tokens,
        batch_size,
        list(stop),
        end_tokens(model, tokenizer),
        tokenizer.pad_token_id,
        sorted(tokenizer.get_vocab().items()),
        device,
        cast,
        torch.get_num_threads(),
        torch.__version__,
        version("transformers"),
    ]
    tokens = [prompts.tokens(row) for row in range(len(prompts))]
    digest.update(json.dumps([how, tokens]).encode())
    return cache_folder() / "greedy" / f"{digest.hexdigest()}.json"


def recall(path: Path, number: int) -> tuple[list[str], list[int], list[bool]] | None:
    """Return the texts, lengths and truncations that a file keeps, None where there is none."""
    try:
        kept = json.loads(path.read_bytes())
        texts, lengths, truncated = kept["texts"], kept["lengths"], kept["truncated"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    whole = len(texts) == len(lengths) == len(truncated) == number
    return (texts, lengths, truncated) if whole else None


def remember(path: Path, texts: list[str], lengths: list[int], truncated: list[bool]) -> None:
    """Keep them; a cache that cannot be written is none."""
    kept = {"texts": texts, "lengths": lengths, "truncated": truncated}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(kept).encode())
    except (OSError, ProxstepError):
        return
