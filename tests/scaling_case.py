"""One microbatch of a small model, with its arithmetic, its collectives and its memory counted."""

from __future__ import annotations

import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from scripts.scaling_formulas import Model, Work
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from proxstep.isopo import Isopo, gathering
from proxstep.isopo.hooks import PositionGradients
from proxstep.isopo.microbatch import Microbatch
from proxstep.isopo.sampling import CarriedSamples, Samples
from proxstep.logprobs.tokens import token_log_probs

SMALL = Model("small", 16, 2, 4, 2, 8, 24, 40, False, True)
WORK = Work(3, 12, 7, num_samples=10, device="cpu", attention=1.0, checkpointing=False)


def build(model: Model, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the model with random weights, the same on every rank."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        tie_word_embeddings=model.tie_word_embeddings,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return Qwen3ForCausalLM(config).to(dtype)


def scored(model: nn.Module, token_BT: Tensor, work: Work) -> Tensor:
    """Return the log-probabilities of each row's last tokens."""
    first = work.length - work.scored
    logits_BTV = model(input_ids=token_BT, use_cache=False).logits
    return token_log_probs(logits_BTV[:, first - 1 : -1], token_BT[:, first:])


def tokens(model: Model, work: Work, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (work.num_sequences, work.length)
    return torch.randint(model.vocab_size, shape, generator=generator)


def backward(
    network: nn.Module, isopo: Isopo, token_BT: Tensor, work: Work, key: int = 0
) -> Microbatch:
    """Run a microbatch of whole rows."""
    row_B = torch.arange(work.num_sequences)
    sequence_ids = row_B[:, None].expand_as(token_BT)
    coefficient_B = torch.linspace(-1, 1, work.num_sequences)
    found = isopo.microbatch(sequence_ids, coefficient_B, sequence_keys=key + row_B)
    with found as microbatch:
        microbatch.objective(scored(network, token_BT, work)).backward()
    return microbatch


def give_past(network: nn.Module, isopo: Isopo, token_BT: Tensor, work: Work) -> None:
    """Measure the trailing means, as a run does before its first step."""
    while isopo.needs_past:
        with isopo.measuring():
            backward(network, isopo, token_BT, work)
    network.zero_grad()


@contextmanager
def reductions(around: Callable[[str, Any], Any], *, afresh: bool = False) -> Iterator[None]:
    """Enter a context for each parameter's reduction: modes do not see into an operator.

    Args:
        around: Makes the context from the parameter's name and its position-wise gradients.
        afresh: Whether nothing is to be left in memory by the parameters before.
    """
    with pytest.MonkeyPatch.context() as patch:
        plain = Microbatch.reduce

        def reduce(self: Microbatch, key: str, gradients: Any) -> Tensor:
            if afresh:
                self._memory.release()
            with around(key, gradients):
                return plain(self, key, gradients)

        patch.setattr(Microbatch, "reduce", reduce)
        yield


def counter() -> FlopCounterMode:
    """Return torch's counter of matrix products, and of the one product by a vector."""

    def addmv(total: Any, matrix: Any, vector: Any, **_: Any) -> int:
        del total, vector
        return 2 * matrix[0] * matrix[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmv_: addmv})


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have taken at a time.

    Args:
        outside: Tensors that were there before.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {value.untyped_storage()._cdata for value in outside}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor) and function.namespace == "aten":
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


# -- on ranks --------------------------------------------------------------------------------------


def traffic(overlap_source: str, sharded: bool, seed: int) -> dict[str, Any]:
    """Run two steps of a microbatch each; return what the second one's collectives carried."""
    rank, work = dist.get_rank(), replace(WORK, itemsize=2)
    network: Any = build(SMALL, torch.float32 if sharded else torch.bfloat16)
    if sharded:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        core = network.model
        for module in (*core.layers, core.embed_tokens, network.lm_head, network):
            fully_shard(module, mp_policy=policy)
    isopo = Isopo(network, num_overlap_positions=10, overlap_source=overlap_source)
    count: Counter[str] = Counter()
    first = 0
    for step in range(2):
        first = count["all_reduce calls"]
        count.clear()
        token_BT = tokens(SMALL, work, 100 * seed + 10 * step + rank)
        with pytest.MonkeyPatch.context() as patch:
            _watch(patch, count)
            microbatch = backward(network, isopo, token_BT, work, 10 * rank)
            count["own rows"] = _own_rows(isopo, microbatch.samples)
            count["carried"] = _carried(isopo)
            isopo.step()
    return {**count, "first all_reduce calls": first}


def _own_rows(isopo: Isopo, samples: Samples) -> int:
    """Return how many of a microbatch's positions were sampled."""
    if not isinstance(samples, CarriedSamples):
        return len(samples.index_K)
    store = isopo._drawing._store
    assert store is not None
    return max(len(rows.priority_K) for rows, _ in store.pending.values())


def _watch(patch: pytest.MonkeyPatch, count: Counter[str]) -> None:
    """Count the bytes and the calls of every collective, and note the rows of gathered samples."""

    def watch(name: str, size: Callable[..., int]) -> None:
        plain = getattr(dist, name)

        def collective(*args: Any, **kwargs: Any) -> Any:
            count[name] += size(*args, **kwargs)
            count[name + " calls"] += 1
            return plain(*args, **kwargs)

        patch.setattr(dist, name, collective)

    def sizes(parts: list[Tensor], *_: Any, **__: Any) -> int:
        return sum(part.nbytes for part in parts)

    gather = gathering.gather

    def gathered(gradients: Any, counts: list[int], group: Any) -> Any:
        sample = gather(gradients, counts, group)
        count[f"rows {sum(name.startswith('rows ') for name in count)}"] = max(counts)
        count["rows"] = max(count["rows"], *counts)
        count["all rows"] = max(count["all rows"], sample.num_rows)
        return sample

    patch.setattr(gathering, "gather", gathered)
    watch("all_gather", sizes)
    watch("all_reduce", lambda value, **_: value.nbytes)
    watch("all_gather_object", lambda out, value, **_: len(pickle.dumps(value)) * len(out))
    watch("all_gather_single", lambda output_tensor, *_, **__: output_tensor.nbytes)
    watch("reduce_scatter_single", lambda output, input, **_: input.nbytes)


def _carried(isopo: Isopo) -> int:
    """Return the bytes of the last step's rows and of this one's, a shared tensor once."""
    store = isopo._drawing._store

    def of(sample: PositionGradients) -> list[object]:
        return [getattr(sample, field.name) for field in fields(sample)]

    kept = [] if store is None else [*store.current.values(), *store.pending.values()]
    tensors = [value for rows, sample in kept for value in (*rows, *of(sample))]
    found = {id(value): value.nbytes for value in tensors if isinstance(value, Tensor)}
    return sum(found.values())
