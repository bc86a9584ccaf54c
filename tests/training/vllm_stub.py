"""A stand-in for vLLM 0.31.0: its names, its strictness and its states, on a transformers model.

An unknown keyword is an error, and so is a call in a state in which vLLM could not answer. Sleeping
at level 2 makes every weight NaN, as good as what is in discarded memory.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

OF_LLM = """runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code
allowed_local_media_path allowed_media_domains tensor_parallel_size dtype quantization revision
tokenizer_revision chat_template seed gpu_memory_utilization cpu_offload_gb offload_group_size
offload_num_in_group offload_prefetch_step offload_params enforce_eager enable_return_routed_experts
return_sampling_mask disable_custom_all_reduce hf_token hf_overrides mm_processor_kwargs
pooler_config structured_outputs_config profiler_config attention_config kv_cache_memory_bytes
compilation_config quantization_config logits_processors spec_method spec_model spec_tokens"""
OF_ENGINE_ARGS = """download_dir load_format max_model_len distributed_executor_backend
pipeline_parallel_size data_parallel_size block_size enable_prefix_caching max_num_batched_tokens
max_num_seqs max_logprobs logprobs_mode use_fp64_gumbel disable_log_stats enable_lora
generation_config override_generation_config enable_sleep_mode model_impl attention_backend
worker_cls worker_extension_cls async_scheduling weight_transfer_config enable_chunked_prefill"""
"""Of its many, those that sampling may have to do with."""


@dataclass
class SamplingParams:
    """Its fields and their defaults, those that are not set by hand left out."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool = True
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        assert self.n >= 1
        assert self.temperature == 0 or 0.01 <= self.temperature <= 2  # else changed, or refused
        assert 0 < self.top_p <= 1
        assert type(self.top_k) is int
        assert self.top_k >= -1
        assert self.seed is None or -(2**63) <= self.seed + self.n < 2**63
        assert self.max_tokens is not None
        assert self.max_tokens >= 1
        assert all(type(token) is int for token in self.stop_token_ids or [])
        assert not self.stop or self.detokenize
        assert "" not in (self.stop or [])


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Model(nn.Module):
    """One of vLLM's models: it is loaded under the checkpoint's names and says what it loaded."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return self.inner.named_parameters()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        own, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            own[name].data.copy_(weight)  # KeyError for a name that it does not know
            loaded.add(name)
        return loaded


@dataclass
class Stub:
    """What the test sees and may change.

    Attributes:
        llms: The LLMs that were made.
        distort: Applied to the logits, for a sampler that is not the policy.
        finish: Takes the place of every finish_reason.
        log_prob: Takes the place of every log-probability.
    """

    llms: list[LLM] = field(default_factory=list)
    distort: Callable[[Tensor], Tensor] = lambda logits: logits
    finish: str | None = None
    log_prob: float | None = None


class LLM:
    stub: Stub

    def __init__(self, model: str, **keywords: Any) -> None:
        known = {*OF_LLM.split(), *OF_ENGINE_ARGS.split()}
        if unknown := keywords.keys() - known:
            raise TypeError(f"unknown keywords {unknown}")
        self.model, self.keywords, self.asleep = Model(model), keywords, set[str]()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.calls: list[tuple[Any, list[SamplingParams]]] = []
        self.stub.llms.append(self)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.keywords["enable_sleep_mode"]
        assert level == 2
        assert mode == "abort"
        self.asleep = {"weights", "kv_cache"}
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert self.asleep.issuperset(tags or [])
        self.asleep -= set(tags or ["weights", "kv_cache"])

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        assert "weights" not in self.asleep
        return [func(self.model)]

    @torch.no_grad()
    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: Any = None,
        tokenization_kwargs: Any = None,
        mm_processor_kwargs: Any = None,
    ) -> list[RequestOutput]:
        assert not self.asleep
        self.calls.append((prompts, sampling_params))
        return [
            RequestOutput(ids, [self._draw(ids, options, index) for index in range(options.n)])
            for prompt, options in zip(prompts, sampling_params, strict=True)
            for ids in [prompt["prompt_token_ids"]]
        ]

    def _draw(self, prompt: list[int], options: SamplingParams, index: int) -> CompletionOutput:
        assert options.seed is not None
        assert options.max_tokens is not None
        assert len(prompt) + options.max_tokens <= self.keywords["max_model_len"]
        generator = torch.Generator().manual_seed(options.seed + index)
        tokens: list[int] = []
        found, finish = [], "length"
        while len(tokens) < options.max_tokens:
            input_ids = torch.tensor([[*prompt, *tokens]])
            logits = self.stub.distort(self.model.inner(input_ids=input_ids).logits[0, -1])
            raw, logits = logits, logits / options.temperature
            if options.top_k > 0:
                logits[logits < logits.topk(options.top_k).values[-1]] = -torch.inf
            order = logits.argsort()
            outside = logits[order].softmax(-1).cumsum(-1) <= 1 - options.top_p
            logits[order[outside]] = -torch.inf
            processed = logits.log_softmax(-1)
            token = int(processed.exp().multinomial(1, generator=generator))
            mode = self.keywords.get("logprobs_mode", "raw_logprobs")
            given = {"raw_logprobs": raw.log_softmax(-1), "processed_logprobs": processed}[mode]
            tokens.append(token)
            said = given[token].item() if self.stub.log_prob is None else self.stub.log_prob
            found.append({token: Logprob(said, 1)})
            text = self.tokenizer.decode(tokens, skip_special_tokens=options.skip_special_tokens)
            if token in (options.stop_token_ids or []) or any(
                s in text for s in options.stop or []
            ):
                finish = "stop"
                break
        reason = self.stub.finish or finish
        return CompletionOutput(
            index, "", tuple(tokens), None, found if options.logprobs == 0 else None, reason
        )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stand-in in vLLM's place, and what it saw."""
    stub, module = Stub(), types.ModuleType("vllm")
    made = type("LLM", (LLM,), {"stub": stub})
    module.__dict__.update(LLM=made, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    return stub
