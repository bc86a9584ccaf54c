"""Folders of adapters: merged once with their base model into a folder that is a model of its own.

transformers would load them as adapters that stay apart, and new ones of the same name would take
their place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from proxstep.errors import ProxstepError
from proxstep.training.cache import cache_folder, keep, making
from proxstep.training.models import load_adapters, load_model, load_tokenizer

_VERSION = 1
"""Part of the cache's name: raise it when anything below changes what comes out."""


def has_adapters(name: str) -> bool:
    """Whether a recipe's `model.name` is a folder of adapters, such as a checkpoint with LoRA."""
    return (_folder(name) / "adapter_config.json").is_file()


def base_of(name: str) -> str:
    """Return the folder or hub name of the model that a folder's adapters are for.

    Raises:
        ProxstepError: If the adapters' configuration does not say, or they are no change of
            weights, which could be merged.
    """
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(_folder(name)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ProxstepError(
            f"model.name {name}: its adapter_config.json cannot be read ({reason})"
        ) from None
    if not config.base_model_name_or_path:
        raise ProxstepError(f"model.name {name}: its adapter_config.json names no base model")
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ProxstepError(
            f"model.name {name}: adapters of the kind {config.peft_type.value} cannot be merged "
            "with their base model: give LoRA's, or a whole model"
        )
    return config.base_model_name_or_path


def ensure_merged(name: str, note: Callable[[str], None] = lambda text: None) -> Path:
    """Return the folder of a base model with a folder's adapters in its weights, in float32.

    Args:
        name: The adapters' folder.
        note: Called with what goes on, in words.

    Returns:
        A folder that `from_pretrained` loads, model and tokenizer.

    Raises:
        ProxstepError: If either cannot be loaded, or they cannot be merged.
    """
    adapters, base = _folder(name), base_of(name)
    folder = cache_folder() / f"merged-v{_VERSION}-{_digest(adapters, Path(base))}"
    with making(folder, note) as is_missing:
        if not is_missing:
            return folder
        note(f"merging the adapters of {name} with {base}, once")
        model = load_model(base, "float32", torch.device("cpu"))
        if getattr(model.config, "quantization_config", None) is not None:
            raise ProxstepError(
                f"model.name {name}: its base model {base} is quantized, and adapters cannot be "
                "merged with it without loss: merge them with peft, and give that folder"
            )
        whole: Any = load_adapters(model, adapters).merge_and_unload()  # type: ignore[operator]
        own = (adapters / "tokenizer_config.json").is_file()
        keep(folder, whole, load_tokenizer(str(adapters) if own else base))
    return folder


def _folder(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _digest(adapters: Path, base: Path) -> str:
    """Return what names the result: the adapters to the bit, and their base as it is now."""
    found = hashlib.sha256()
    for file in sorted(adapters.glob("adapter_*")):
        found.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    for file in sorted(base.glob("*.safetensors")):
        found.update(f"{file.stat().st_size} {file.stat().st_mtime_ns} ".encode())
    return found.hexdigest()[:16]
