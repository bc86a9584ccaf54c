"""Loading the policy and its tokenizer: from the hub, from a local folder, or the embedded one."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from proxstep.config.sections import Lora
from proxstep.errors import ProxstepError
from proxstep.hub import hub_or_cache


def pick_device(name: str) -> torch.device:
    """Return the device that a recipe names; "auto" is cuda, else cpu: nothing was tried on mps.

    Raises:
        ProxstepError: If it is not a device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ProxstepError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N, mps") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ProxstepError(f"device {name} is not available here; use auto or cpu")
    return device


_LOADING_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""What transformers raises for folders that are damaged, foreign or incomplete."""


def load_tokenizer(source: str) -> Any:
    """Return the tokenizer, padding on the left.

    Raises:
        ProxstepError: If there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    _check_local(source)
    try:
        with hub_or_cache(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise ProxstepError(_not_loaded("tokenizer", source, error)) from None
    if tokenizer.eos_token_id is None:
        raise ProxstepError(
            f"model.name {source}: its tokenizer has no end-of-sequence token, so no completion "
            "could end; set one and save the tokenizer again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    _check_vocabulary(source, tokenizer)
    return tokenizer


def _check_vocabulary(source: str, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens for which the model has no embedding."""
    from transformers import AutoConfig

    if not (Path(source) / "config.json").is_file() and Path(source).is_dir():
        return  # adapters, whose base model was checked when they were begun
    try:
        with hub_or_cache(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except _LOADING_ERRORS:
        return  # whoever loads the model says it better
    rows = getattr(config.get_text_config(), "vocab_size", None)
    highest = max([*tokenizer.get_vocab().values(), tokenizer.pad_token_id])
    if rows is not None and highest >= rows:
        raise ProxstepError(
            f"model.name {source}: its tokenizer has tokens up to {highest}, the model embeds "
            f"{rows}: call model.resize_token_embeddings(len(tokenizer)) and save both again"
        )


def load_model(
    source: str, dtype: str, device: torch.device, lora: Lora | None = None
) -> nn.Module:
    """Return a causal language model in float32 or bfloat16, with adapters if asked for.

    No code of the model's repository is run.

    Raises:
        ProxstepError: If it cannot be loaded whole, or the adapters fit nothing in it.
    """
    from transformers import AutoModelForCausalLM

    _check_local(source)
    try:
        with hub_or_cache(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                output_loading_info=True,
            )
    except _LOADING_ERRORS as error:
        raise ProxstepError(_not_loaded("causal language model", source, error)) from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ProxstepError(
            f"model.name {source}: {len(missing)} of its weights are missing, such as "
            f"{missing[0]}; they would be random. Is it a causal language model, saved completely?"
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # those of a recipe's folder are merged
        raise ProxstepError(
            f"model.name {source}: these are adapters, which are merged with their base model only "
            "from a local folder: download them, and give the folder"
        )
    if lora is not None:
        model = _with_lora(model, lora)
    return model.to(device)


def load_adapters(base: nn.Module, folder: Path) -> nn.Module:
    """Return a base model with the adapters of a checkpoint, trainable.

    Raises:
        ProxstepError: If they cannot be loaded.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=True)  # type: ignore[arg-type]
    except _LOADING_ERRORS as error:
        raise ProxstepError(_not_loaded("adapter", str(folder), error)) from None


def reload_weights(model: nn.Module, checkpoint: Path) -> None:
    """Give a model the weights, or the adapters, of a checkpoint of its own, in place.

    Raises:
        ProxstepError: If they cannot be loaded.
    """
    if (checkpoint / "adapter_config.json").is_file():
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        return
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    model.load_state_dict(load_model(str(checkpoint), dtype, torch.device("cpu")).state_dict())


def _with_lora(model: Any, lora: Lora) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ProxstepError(f"model.lora: {str(error).splitlines()[0]}") from None


def _check_local(source: str) -> None:
    """Refuse a path that is no model folder, with a clearer message than the hub's."""
    path = Path(source)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or path.exists()
    if (
        looks_local
        and not (path / "config.json").is_file()
        and not (path / "adapter_config.json").is_file()
    ):
        raise ProxstepError(
            f"model.name {source}: no config.json there; give a folder that save_pretrained "
            "wrote, or a hub name"
        )


def _not_loaded(what: str, source: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, pickle.UnpicklingError):  # whose own advice is to trust the file
        reason = "its weights are a damaged pickle, or one with code in it; save safetensors"
    return (
        f"model.name {source}: no {what} could be loaded ({reason}); check the name and the "
        "network, or give a local folder"
    )


def quiet_transformers() -> None:
    """Keep transformers' progress bars and advice out of the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")
