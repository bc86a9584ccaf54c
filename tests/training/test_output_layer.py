"""Chunked log-probabilities of transformers models against their full output layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from tests.models import tiny_gpt2, tiny_qwen3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen3ForCausalLM,
)

from proxstep.errors import ProxstepError
from proxstep.isopo import Isopo
from proxstep.logprobs.tokens import entropy, token_log_probs
from proxstep.training.chunkable import check_chunkable
from proxstep.training.output_layer import (
    completion_log_probs_chunked,
    forward_with_head,
    output_head,
)
from proxstep.training.rollout import Completions, response_logits

VOCAB = 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA2: dict[str, Any] = SIZES | {
    "attn_implementation": "eager"
}  # caps its attention too, which sdpa cannot


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> nn.Module:
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def adapted(model: nn.Module, config: PeftConfig) -> nn.Module:
    with warnings.catch_warnings():  # peft asks transformers for a property by its old name
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def with_lora(model: nn.Module, **options) -> nn.Module:
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **options)
    wrapped = adapted(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return wrapped.to(torch.float64).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen3-tied": lambda: tiny_qwen3(tied=True),
    "qwen3-untied": lambda: tiny_qwen3(tied=False),
    "gpt2": tiny_gpt2,
    "phi-with-bias": lambda: build(PhiConfig(**SIZES)),
    "qwen3-lora": lambda: with_lora(tiny_qwen3()),
}


def build_named(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    head = output_head(model)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def draw_completions(seed: int, num: int = 4) -> Completions:
    """Prompts of random lengths, padded on the left, with completions padded on the right."""
    torch.manual_seed(seed)
    prompt, completion = torch.randint(1, 5, (num, 1)), torch.randint(1, 7, (num, 1))
    column = torch.arange(10)
    attention = (column >= 4 - prompt) & (column < 4 + completion)
    response = attention & (column >= 4)
    token = torch.randint(VOCAB, (num, 10))
    return Completions(token, attention, response, torch.zeros(num, dtype=torch.bool))


def chunked(model: nn.Module, completions: Completions, temperature: float = 1.0, **options):
    log_prob_BT, entropy_BT = completion_log_probs_chunked(
        model,
        completions.token_BT,
        completions.attention_BT,
        completions.response_BT,
        temperature,
        **options,
    )
    return log_prob_BT if entropy_BT is None else (log_prob_BT, entropy_BT)


def full(model: nn.Module, completions: Completions, temperature: float = 1.0) -> Tensor:
    logits = response_logits(model, completions, temperature)
    return token_log_probs(logits, completions.token_BT[:, 1:]) * completions.response_BT[:, 1:]


def trained_gradients(model: nn.Module, log_prob: Tensor, seed: int) -> dict[str, Tensor]:
    """Gradients of a random combination of the log-probabilities."""
    upstream = torch.randn(log_prob.shape, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (log_prob * upstream.to(log_prob.dtype)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_equal_the_full_head(
    name: str, chunk_size: int | None, seed: int
) -> None:
    model, completions = build_named(name, seed), draw_completions(seed)
    check_chunkable(model)
    expected = full(model, completions, 0.7)
    found = chunked(model, completions, 0.7, chunk_size=chunk_size)
    assert found.shape == completions.token_BT[:, 1:].shape
    assert (found[~completions.response_BT[:, 1:]] == 0).all()
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    theirs = trained_gradients(model, expected, seed)
    assert_same_gradients(trained_gradients(model, found, seed), theirs)
    head_trains = output_head(model).weight.requires_grad
    assert head_trains != (name == "qwen3-lora")


def test_a_tied_embedding_gets_both_parts() -> None:
    completions = draw_completions(2)
    tied = build_named("qwen3-tied", 2)
    parts = build_named("qwen3-untied", 2)
    parts.load_state_dict(tied.state_dict() | {"lm_head.weight": output_head(tied).weight})
    both = trained_gradients(tied, chunked(tied, completions), 2)["model.embed_tokens.weight"]
    split = trained_gradients(parts, chunked(parts, completions), 2)
    lookup, head = split["model.embed_tokens.weight"], split["lm_head.weight"]
    assert lookup.norm() > 0.01 * both.norm()
    assert head.norm() > 0.01 * both.norm()
    assert torch.allclose(both, lookup + head, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen3-tied", "gpt2"])
def test_entropy_equals_the_full_head(name: str) -> None:
    model, completions = build_named(name, 4), draw_completions(4)
    found, entropy_BT = chunked(model, completions, 0.7, with_entropy=True)
    response = completions.response_BT[:, 1:]
    expected = entropy(response_logits(model, completions, 0.7))
    assert torch.allclose(entropy_BT[response], expected[response].double(), atol=1e-5)
    assert (entropy_BT[~response] == 0).all()
    assert not entropy_BT.requires_grad
    assert torch.equal(found, chunked(model, completions, 0.7))


def test_without_completions_everything_is_zero() -> None:
    model, completions = build_named("qwen3-tied", 5), draw_completions(5)
    completions.response_BT.zero_()
    found = chunked(model, completions)
    assert (found == 0).all()
    assert all((g == 0).all() for g in trained_gradients(model, found, 5).values())


@pytest.mark.parametrize("name", MODELS)
def test_response_hidden(name: str) -> None:
    model, completions = build_named(name, 6), draw_completions(6)
    attention = completions.attention_BT.long()
    position = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = (completions.token_BT, attention, position)
    hidden_BTD = forward_with_head(model, lambda hidden_BTD: hidden_BTD, *inputs)
    logits = output_head(model)(hidden_BTD)[:, :-1] / 0.7
    assert torch.equal(logits, response_logits(model, completions, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_models_pass_the_check(dtype: torch.dtype) -> None:
    model, completions = build_named("qwen3-tied", 7).to(dtype), draw_completions(7)
    check_chunkable(model)
    exact = full(model.double(), completions)
    model.to(dtype)
    error = (chunked(model, completions) - exact).norm()
    assert error <= 2 * (full(model, completions) - exact).norm()


def test_autocast() -> None:
    model, completions = build_named("qwen3-tied", 8).float(), draw_completions(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_chunkable(model)
        found, expected = chunked(model, completions), full(model, completions)
    assert torch.allclose(found, expected, atol=1e-6)
    theirs = trained_gradients(model, expected, 8)
    ours = trained_gradients(model, found, 8)
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())
    assert_same_gradients(ours, theirs, tolerance=2e-2)


# -- what is refused -------------------------------------------------------------------------------


class Capped(Qwen3ForCausalLM):
    """Caps its logits, and says so nowhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out: Any = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Normed(nn.Linear):
    """An output layer that normalizes its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(dim=1, keepdim=True))


def capped() -> nn.Module:
    model = tiny_qwen3()
    model.__class__ = Capped
    return model


def with_head(make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model: Any = tiny_qwen3(tied=False)
    model.lm_head = make(model.lm_head)
    return model


def normed(head: nn.Linear) -> nn.Module:
    head.__class__ = Normed
    return head


def scaled_by_a_hook(head: nn.Linear) -> nn.Module:
    def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 2

    head.register_forward_hook(double)
    return head


def quantized(head: nn.Linear) -> nn.Module:
    head.weight = nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    return head


def prompt_tuned() -> nn.Module:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return adapted(tiny_qwen3(), config).double()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gemma2": (lambda: build(Gemma2Config(**GEMMA2)), r"Gemma2.*final_logit_softcapping = 30"),
    "granite": (
        lambda: build(GraniteConfig(**SIZES, logits_scaling=8.0)),
        r"Granite.*logits_scaling = 8",
    ),
    "cohere": (lambda: build(CohereConfig(**SIZES)), r"Cohere.*logit_scale = 0\.0625"),
    "unnamed-cap": (capped, r"Capped changes what its output layer returns, so"),
    "normalized-head": (lambda: with_head(normed), "Qwen3.*does not return hidden states times"),
    "hook": (lambda: with_head(scaled_by_a_hook), "output layer"),
    "int8-head": (lambda: with_head(quantized), r"lm_head is a Linear, not .*floating-point"),
    "no-linear-head": (
        lambda: with_head(lambda head: nn.Sequential(head)),
        "lm_head is a Sequential",
    ),
    "lora-on-head": (
        lambda: with_lora(tiny_qwen3(tied=False), target_modules=["lm_head"]),
        "lm_head is wrapped by a PEFT adapter.*keep adapters off lm_head",
    ),
    "saved-head": (
        lambda: with_lora(tiny_qwen3(tied=False), modules_to_save=["lm_head"]),
        "lm_head is wrapped by a PEFT adapter",
    ),
    "prompt-tuning": (prompt_tuned, r"prompt adapter"),
    "no-head": (lambda: tiny_qwen3().get_submodule("model"), "Qwen3Model names no output layer"),
    "not-transformers": (lambda: nn.Linear(2, 2), "Linear names no output layer"),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # prompt tuning's
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(9)
    model = make()
    with pytest.raises(ProxstepError, match=message) as caught:
        check_chunkable(model)
    assert "use the full head" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**GEMMA2, final_logit_softcapping=None),
        GraniteConfig(**SIZES, logits_scaling=1.0),
        CohereConfig(**SIZES, logit_scale=1.0),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_the_same_families_without_it_are_not_refused(config: PreTrainedConfig) -> None:
    torch.manual_seed(10)
    model, completions = build(config, torch.float32), draw_completions(10)
    check_chunkable(model)
    assert torch.allclose(chunked(model, completions), full(model, completions), atol=1e-5)


def test_diverged_weights_are_refused() -> None:
    model = build_named("gpt2", 11)
    with torch.no_grad():
        output_head(model).weight.fill_(float("nan"))
    with pytest.raises(ProxstepError, match="differ by nan"):
        check_chunkable(model)


# -- what is left as it was ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3-lora", "gpt2"])
def test_the_check_leaves_modes_gradients_and_random_numbers(name: str) -> None:
    model = build_named(name, 12)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    frozen.eval()
    trained_gradients(model, full(model, draw_completions(12)), 12)
    modes = [module.training for module in model.modules()]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    keys, random = list(vars(output_head(model))), torch.get_rng_state()
    recording = []
    hook = frozen.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    check_chunkable(model)
    hook.remove()
    assert recording == [False, False]
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {True, False}
    assert torch.equal(torch.get_rng_state(), random)
    assert list(vars(output_head(model))) == keys
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in gradients:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradients[parameter_name])


def test_dropout_is_as_in_the_full_head() -> None:
    model, completions = build_named("gpt2", 13).train(), draw_completions(13)
    torch.manual_seed(13)
    expected = full(model, completions)
    torch.manual_seed(13)
    assert torch.allclose(chunked(model, completions), expected, atol=1e-12)
    assert not torch.allclose(chunked(model, completions), expected, atol=1e-3)


def test_the_head_is_put_back_after_an_error() -> None:
    model, completions = build_named("qwen3-tied", 14), draw_completions(14)

    def fail(hidden: Tensor) -> Tensor:
        raise KeyError("in the head")

    attention = completions.attention_BT.long()
    with pytest.raises(KeyError, match="in the head"):
        forward_with_head(model, fail, completions.token_BT, attention, attention)
    assert "forward" not in vars(output_head(model))


def test_a_forward_replaced_by_isopo_stays() -> None:
    model, completions = build_named("qwen3-untied", 15), draw_completions(15)
    expected = full(model, completions).detach()
    isopo = Isopo(model, "reinforce")
    patched = vars(output_head(model))["forward"]
    check_chunkable(model)
    with isopo.off():
        found = chunked(model, completions)
    assert vars(output_head(model))["forward"] is patched
    assert torch.allclose(found, expected, atol=1e-12)
    isopo.remove()
    assert "forward" not in vars(output_head(model))


# -- wrappers --------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp_own_head(model: nn.Module) -> nn.Module:
    fully_shard(output_head(model), mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    return fsdp(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (ddp, "qwen3-tied"),
        (ddp, "qwen3-lora"),
        (fsdp, "qwen3-tied"),
        (fsdp, "qwen3-untied"),
        (fsdp_own_head, "qwen3-untied"),
    ],
)
def test_wrapped_models(wrap: Callable[[nn.Module], nn.Module], name: str) -> None:
    model, completions = build_named(name, 16), draw_completions(16)
    plain = copy.deepcopy(model)
    wrapped = wrap(model)
    check_chunkable(wrapped)
    found, expected = chunked(wrapped, completions), full(plain, completions)
    assert torch.allclose(found, expected, atol=1e-12)
    theirs = trained_gradients(plain, expected, 16)
    ours = {
        name.removeprefix("module."): getattr(gradient, "full_tensor", lambda g=gradient: g)()
        for name, gradient in trained_gradients(wrapped, found, 16).items()
    }
    assert_same_gradients(ours, theirs)
