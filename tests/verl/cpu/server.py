"""The process that generates: requests come one by one and are completed together."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from typing import Any

from tests.verl.cpu.generation import Completion, Request, Sampling, complete
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import TokenOutput

from proxstep.errors import ProxstepError
from proxstep.training.generation import end_tokens

_QUIET = 0.05
"""Seconds without a new request after which a batch is complete: a step's requests come within
some milliseconds of each other."""
_KNOWN = {"temperature", "top_p", "top_k", "logprobs", "max_tokens", "max_new_tokens", "ignore_eos"}


class CpuServer:
    """A model, and the requests that wait for it; the class of a Ray actor.

    Args:
        config: verl's rollout section. Read are dtype, seed, prompt_length, response_length,
            max_num_seqs and ignore_eos; what concerns drawing comes with each request.
        model_config: verl's model section.
        replica_rank: Which replica this is; added to the seed, as verl's vLLM server does.
    """

    def __init__(self, config: RolloutConfig, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        model_config = omega_conf_to_dataclass(model_config, HFModelConfig)
        self._config, self._seed = config, config.seed + replica_rank
        self._model = AutoModelForCausalLM.from_pretrained(
            model_config.local_path,
            config=model_config.hf_config,
            dtype=PrecisionType.to_dtype(config.dtype),
        ).eval()
        self._ends = end_tokens(self._model, model_config.tokenizer)
        self._model.generation_config = GenerationConfig()  # not the hub model's own defaults
        self._pad = model_config.tokenizer.pad_token_id
        self._global_steps: int | None = None
        self._num_drawn: Counter[tuple[int, ...]] = Counter()
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._serving: asyncio.Task[None] | None = None
        self._model_lock = asyncio.Lock()

    async def ready(self) -> None:
        """Return once the model is loaded."""

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
    ) -> TokenOutput:
        """Complete a prompt, with whatever other requests are waiting.

        Args:
            prompt_ids: The prompt's tokens.
            sampling_params: verl's; max_tokens defaults to what is left of response_length.
            request_id: Not used: the noise depends on the prompt, so that it can be repeated.
            image_data: None.
            video_data: None.

        Raises:
            ProxstepError: If the request holds images or videos, or options not known here.
        """
        if image_data or video_data:
            raise ProxstepError(
                "actor_rollout_ref.rollout.name=cpu completes text alone: leave images and videos "
                "out of the data, or choose another rollout"
            )
        sampling = _sampling(sampling_params, len(prompt_ids), self._config)
        prompt = tuple(prompt_ids)
        request = Request(prompt, sampling, self._next_seed(prompt, sampling))
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        completion = await future
        return TokenOutput(
            token_ids=completion.token_ids,
            log_probs=completion.log_probs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self._global_steps},
        )

    async def update_weights(self, weights: dict[str, Tensor], global_steps: int | None) -> None:
        """Take over weights; every name of the model must be among them, and no other."""
        async with self._model_lock:
            self._model.load_state_dict(weights)
            self._global_steps = global_steps
            self._num_drawn.clear()

    def _next_seed(self, prompt: tuple[int, ...], sampling: Sampling) -> int:
        """Return the seed of a prompt's next completion from these weights.

        A run that is resumed from a checkpoint draws what the first one would have drawn.
        """
        if sampling.temperature == 0:
            return 0
        key = (self._seed, self._global_steps, prompt, self._num_drawn[prompt])
        self._num_drawn[prompt] += 1
        return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())

    async def _serve(self) -> None:
        while self._waiting:
            await self._until_quiet()
            most = self._config.max_num_seqs
            batch, self._waiting = self._waiting[:most], self._waiting[most:]
            requests = [request for request, _ in batch]
            async with self._model_lock:
                work = asyncio.create_task(
                    asyncio.to_thread(complete, self._model, requests, self._pad, self._ends)
                )
                await asyncio.wait([work])
            error = work.exception()
            for i, (_, future) in enumerate(batch):
                if error is None:
                    future.set_result(work.result()[i])
                else:
                    future.set_exception(error)

    async def _until_quiet(self) -> None:
        before = 0
        while before < len(self._waiting) < self._config.max_num_seqs:
            before = len(self._waiting)
            await asyncio.sleep(_QUIET)


def _sampling(params: dict[str, Any], prompt_length: int, config: RolloutConfig) -> Sampling:
    """Return verl's sampling parameters in this module's terms.

    Raises:
        ProxstepError: For one that is not known here.
    """
    known = _KNOWN | {"repetition_penalty"} if params.get("repetition_penalty") == 1.0 else _KNOWN
    unknown = sorted(set(params) - known)
    if unknown:
        raise ProxstepError(
            f"actor_rollout_ref.rollout.name=cpu has no sampling parameter "
            f"{', '.join(unknown)}: leave it out, or choose another rollout"
        )
    left = config.prompt_length + config.response_length - prompt_length
    longest = min(config.response_length, left)
    asked = params.get("max_tokens", params.get("max_new_tokens", longest))
    return Sampling(
        max_new_tokens=max(1, asked),
        temperature=params.get("temperature", 1.0),
        top_p=params.get("top_p", 1.0),
        top_k=max(0, params.get("top_k", 0)),
        ignore_eos=params.get("ignore_eos", config.ignore_eos),
    )
