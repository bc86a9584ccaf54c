"""Every change that the plugin makes to torch or verl, each with the obstacle that it removes."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

_POLL_SECONDS = 0.1


def apply() -> None:
    """Make the changes, in this process; a second call changes nothing more."""
    _find_engines_registered_for_cuda()
    _name_gloo_once()
    _offload_without_pinned_memory()
    _take_tokenizers_without_chat_tokens()


def look_for_completions_often() -> None:
    """The replay buffer looks every 2 seconds, which is longer than a small model's step.

    Only in the process that trains, which is the one that makes replicas.
    """
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    wait = ReplayBuffer._wait_for_next_poll
    if getattr(wait, "_proxstep_is_short", False):
        return

    @functools.wraps(wait)
    def wait_for_next_poll(self: Any, *args: Any) -> float:
        self.poll_interval = _POLL_SECONDS
        return wait(self, *args)

    wait_for_next_poll._proxstep_is_short = True  # type: ignore[attr-defined]
    ReplayBuffer._wait_for_next_poll = wait_for_next_poll


def _find_engines_registered_for_cuda() -> None:
    """The FSDP engines are registered for the devices cuda and npu, yet run on any."""
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")


def _name_gloo_once() -> None:
    """A group is of "cpu:gloo" and the platform's backend; torch refuses to name a device twice."""
    init = torch.distributed.init_process_group
    if getattr(init, "_proxstep_names_gloo_once", False):
        return

    @functools.wraps(init)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    init_process_group._proxstep_names_gloo_once = True  # type: ignore[attr-defined]
    torch.distributed.init_process_group = init_process_group


def _offload_without_pinned_memory() -> None:
    """Forward-only engines ask for pinned memory, which needs an accelerator."""

    def init(self: CPUOffloadPolicy, pin_memory: bool = False) -> None:
        self.pin_memory = False

    CPUOffloadPolicy.__init__ = init  # type: ignore[method-assign]


def _take_tokenizers_without_chat_tokens() -> None:
    """A Qwen model's tokenizer is taken to know ChatML, which a small one for tests does not."""
    from verl.utils.tokenizer import continuous_token_wiring as wiring
    from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder

    get_class = wiring.get_continuous_token_builder_class
    create = wiring.create_continuous_token_builder
    if getattr(create, "_proxstep_takes_any_tokenizer", False):
        return

    @functools.wraps(create)
    def create_continuous_token_builder(tokenizer: Any, **kwargs: Any) -> Any:
        family = wiring.infer_continuous_token_model_family(
            hf_model_type=kwargs.get("hf_model_type")
        )
        is_qwen = get_class(family) is QwenContinuousTokenBuilder
        if is_qwen and "<|im_end|>" not in tokenizer.get_vocab():
            kwargs["model_family"] = "default"
        return create(tokenizer, **kwargs)

    create_continuous_token_builder._proxstep_takes_any_tokenizer = True  # type: ignore[attr-defined]
    wiring.create_continuous_token_builder = create_continuous_token_builder
