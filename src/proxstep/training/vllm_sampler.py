"""vLLM samples the rollout, in this process and on the policy's GPU.

It has not run on a GPU. It is written against vLLM 0.31.0's sources (the wheel on PyPI) and tested
with a stand-in for its classes (tests/training/vllm_stub.py). What it uses of them:

- `vllm.LLM`, entrypoints/llm.py: the constructor, whose other keywords are those of `EngineArgs`;
  `generate`, a `RequestOutput` for each prompt in their order; `sleep(level=2)`, which discards
  weights and keys and values, and the prefix cache with them (v1/engine/core.py); `wake_up(tags)`;
  `apply_model`, which calls a function on the model: in this process where
  VLLM_ENABLE_V1_MULTIPROCESSING is 0.
- `load_weights` of its models, under the checkpoint's names: TRL's way of handing weights over.
- `vllm.SamplingParams`: of `n` completions the i-th takes `seed + i` (v1/engine/parallel_sampling);
  `logprobs=0` gives the drawn token's alone.
- `logprobs_mode="processed_logprobs"`: after temperature, top_k and top_p (config/model.py). The
  default, raw_logprobs, would be before them.
- `CompletionOutput`, outputs.py: `token_ids` with the end token and with the token that completes a
  stop text; `logprobs`, a {token: Logprob} for each; `finish_reason` stop or length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.config.releases import check_release
from proxstep.errors import ProxstepError
from proxstep.training.generation import Drawn, end_tokens, padded
from proxstep.training.models import pick_device
from proxstep.training.output_layer import unwrapped
from proxstep.training.rollout import Completions
from proxstep.typing import Tensor


def check_vllm(recipe: Recipe) -> None:
    """Refuse a machine on which a recipe's rollout cannot be sampled, before any work.

    Raises:
        ProxstepError: If vLLM is asked for and there is no GPU, no vLLM, or another release.
    """
    if recipe.rollout.engine != "vllm":
        return
    if (device := pick_device(recipe.device)).type != "cuda":
        raise ProxstepError(
            f"rollout.engine vllm needs an NVIDIA GPU, and the device here is {device}: use "
            "rollout.engine transformers"
        )
    check_release("vLLM", "vllm", ">=0.31,<0.32", {"": "only 0.31's interface was looked at"})


class VllmSampler:
    """vLLM in this process and on the policy's GPU; it sleeps between rollouts, without weights.

    Args:
        recipe: What to do.
        model: The policy.
        tokenizer: Its tokenizer.

    Raises:
        ProxstepError: If weights of the policy cannot be handed over.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, tokenizer: Any) -> None:
        self._recipe, self._model, self._tokenizer = recipe, model, tokenizer
        core: Any = unwrapped(model)
        _check_weights(core)
        self._ends = end_tokens(core, tokenizer)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when an LLM is made
        from vllm import LLM  # type: ignore[import-not-found]

        rollout, section = recipe.rollout, recipe.model
        half = "bfloat16" in (section.dtype, section.autocast)
        self._llm = LLM(
            model=core.name_or_path,
            dtype="bfloat16" if half else "float32",
            seed=recipe.seed,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            max_model_len=recipe.task.max_prompt_length + rollout.max_completion_length,
            enable_sleep_mode=True,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # no sampling defaults of the model's own
        )
        self._llm.sleep(level=2)

    def __call__(self, prompts: Sequence[list[int]]) -> Completions:
        """Sample with the policy's weights as they are now, by seeds from torch's generator.

        Its state afterwards follows from them too, whatever vLLM drew from it.
        """
        *seeds, after = torch.randint(2**62, (len(prompts) + 1,)).tolist()
        torch.cuda.empty_cache()  # vLLM's memory is no part of torch's pool
        self._llm.wake_up(tags=["weights"])
        try:
            self._llm.apply_model(self._hand_over)
            self._llm.wake_up(tags=["kv_cache"])
            requests = self._llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._options(seed) for seed in seeds],
                use_tqdm=False,
            )
        finally:
            self._llm.sleep(level=2)
        torch.manual_seed(after)
        repeated = [
            prompt for prompt in prompts for _ in range(self._recipe.rollout.num_generations)
        ]
        return self._completions(repeated, [out for found in requests for out in found.outputs])

    def _options(self, seed: int) -> Any:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        section = self._recipe.rollout
        return SamplingParams(
            n=section.num_generations,
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            seed=seed,
            stop=section.stop,
            stop_token_ids=self._ends,
            max_tokens=section.max_completion_length,
            logprobs=0,
            detokenize=section.stop is not None,
            skip_special_tokens=False,  # they count in a stop text here
        )

    @torch.no_grad()
    def _hand_over(self, target: Any) -> None:
        """Load the policy's weights into vLLM's model; what is missing would be arbitrary."""
        loaded = target.load_weights(merged_weights(unwrapped(self._model)))
        if left := {name for name, _ in target.named_parameters()} - set(loaded or ()):
            raise ProxstepError(
                f"rollout.engine vllm: its model has {len(left)} weights that the policy does not "
                f"hand over, such as {min(left)}: use rollout.engine transformers"
            )

    def _completions(self, prompts: Sequence[list[int]], outputs: Sequence[Any]) -> Completions:
        """Return vLLM's completions as a grid on the policy's device."""
        longest = max(len(out.token_ids) for out in outputs)
        token_BT = torch.full((len(outputs), longest), self._tokenizer.pad_token_id)
        log_prob_BT = torch.zeros(token_BT.shape)
        for row, out in enumerate(outputs):
            if out.finish_reason not in ("stop", "length"):
                raise ProxstepError(
                    f"rollout.engine vllm ended a completion by {out.finish_reason}"
                )
            tokens = list(out.token_ids)
            drawn = [at[token].logprob for token, at in zip(tokens, out.logprobs, strict=True)]
            token_BT[row, : len(tokens)] = torch.tensor(tokens)
            log_prob_BT[row, : len(tokens)] = torch.tensor(drawn)
        if not log_prob_BT.isfinite().all():
            raise ProxstepError(
                "rollout.engine vllm: a token's log-probability is not finite. The policy's "
                "weights have diverged: lower optimizer.learning_rate"
            )
        device = next(self._model.parameters()).device
        drawn_B = Drawn(
            token_BT.to(device),
            torch.tensor([len(out.token_ids) for out in outputs], device=device),
            torch.tensor([out.finish_reason == "stop" for out in outputs], device=device),
            log_prob_BT.to(device),
        )
        prompt_BT, attention_BT = padded(prompts, self._tokenizer.pad_token_id, device)
        return drawn_B.after(prompt_BT, attention_BT.bool())


def merged_weights(core: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a transformers model's weights under the checkpoint's names, adapters added to theirs.

    One at a time: the frozen weights stay as they are, to the bit.
    """
    for name, parameter in core.named_parameters():
        place, adapted, last = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        weight = parameter.detach()
        if adapted and last == "weight":
            layer: Any = core.get_submodule(place)
            weight = weight + layer.get_delta_weight(layer.active_adapters[0])
        yield (f"{place}.{last}" if adapted else name), weight


def _check_weights(core: Any) -> None:
    """Refuse weights that vLLM holds in another form, by name."""
    table = core.get_input_embeddings().weight
    for name, module in core.named_modules():
        if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
            raise ProxstepError(
                f"rollout.engine vllm: {name} holds several layers' weights in one, such as "
                "experts, which vLLM loads one by one: use rollout.engine transformers"
            )
        base = getattr(module, "base_layer", None)
        if base is not None and (not isinstance(base, nn.Linear) or base.weight is table):
            raise ProxstepError(
                f"model.lora.target_modules has {name}, and rollout.engine vllm takes adapters "
                "merged into linear layers with weights of their own: leave it out"
            )
