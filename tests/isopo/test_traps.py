"""The traps that implementations of ISOPO fall into: each is handled, or refused with its remedy.

What installing alone can find (fused heads, adapters added later, padding) is in test_install.
"""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests import models
from tests.families import FAMILIES, MORE, build
from tests.isopo.rules import paper
from tests.isopo.test_install import COEFFICIENTS, IDS, TOKENS, gradients, log_probs
from tests.models import tiny_qwen3
from tests.selection import square
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from proxstep import (
    IsometricRule,
    Isopo,
    NaturalRule,
    ProxstepError,
    completion_log_probs,
    sequence_ids,
)
from proxstep.isopo import Rule

RULES = ["isopo", "isopo-figure4", "isopo-natural"]


def one_gradient(rule: object = "isopo", coefficients: Tensor = COEFFICIENTS) -> dict[str, Tensor]:
    """The gradient of the usual microbatch, on the usual model."""
    torch.manual_seed(0)
    model = tiny_qwen3()
    with Isopo(model, rule).microbatch(IDS, coefficients) as microbatch:  # type: ignore[arg-type]
        microbatch.objective(log_probs(model)).backward()
    return gradients(model)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], factor: float = 1.0) -> None:
    for name, wanted in theirs.items():
        assert (ours[name] - factor * wanted).norm() <= 1e-10 * wanted.norm(), name


@pytest.mark.parametrize("factor", [0.25, 1024.0, -1.0])
def test_a_scale_of_the_loss_is_refused(factor: float) -> None:
    """A gradient scaler, or a division by accumulation steps, would enter the norms."""
    model = tiny_qwen3()
    with Isopo(model).microbatch(IDS, COEFFICIENTS) as microbatch:
        loss = factor * microbatch.objective(log_probs(model))
        with pytest.raises(ProxstepError, match=f"multiplied by {factor:g} .*coefficients"):
            loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_a_scale_of_the_coefficients_is_exact(rule: str) -> None:
    assert_same(one_gradient(rule, 3 * COEFFICIENTS), one_gradient(rule), 3.0)


def reentrant(model: nn.Module) -> nn.Module:
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})  # type: ignore[operator]
    return model


@pytest.mark.parametrize("rule", RULES)
def test_reentrant_checkpointing_is_right_inside(rule: str) -> None:
    torch.manual_seed(0)
    model = reentrant(tiny_qwen3())
    model.enable_input_require_grads()  # type: ignore[operator]
    with Isopo(model, rule).microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    assert_same(gradients(model), one_gradient(rule))


def test_reentrant_checkpointing_is_refused_outside() -> None:
    model = reentrant(tiny_qwen3())
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model))
    with pytest.raises(ProxstepError, match="use_reentrant=False"):
        total.backward()


@pytest.mark.parametrize("family", ["qwen3-untied", "gpt2", "nano-gpt"])
def test_other_checkpointing_is_right_outside(family: str) -> None:
    results = []
    for wrapped in (False, True):
        model = build(family, 0).train()
        if wrapped:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        isopo = Isopo(model)
        torch.manual_seed(0)  # of GPT-2's dropout
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            total = microbatch.objective(log_probs(model))
        total.backward()
        results.append(gradients(model))
    assert_same(*results)


def test_positions_are_looked_up_within_a_checkpointed_part() -> None:
    """Of shape (columns,), outside the block, where the shape of the token grid is not known."""
    torch.manual_seed(0)
    parts = nn.ModuleList([nn.Embedding(19, 8), nn.Embedding(5, 8), nn.Linear(8, 19)]).double()

    def forward(token: Tensor) -> Tensor:
        return parts[2](parts[0](token) + parts[1](torch.arange(5)))

    results = []
    for wrapped in (False, True):
        parts.zero_grad()
        isopo = Isopo(parts, "isopo-natural")
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            y = checkpoint(forward, TOKENS, use_reentrant=False) if wrapped else forward(TOKENS)
            assert isinstance(y, Tensor)
            total = microbatch.objective(y.log_softmax(-1)[..., 0])
        total.backward()
        results.append(gradients(parts))
        isopo.remove()
    assert_same(*results)


def test_a_checkpointed_layer_alone() -> None:
    """As users do by hand, around a part of their model."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    ids = torch.arange(2)[:, None].expand(2, 5)
    results = []
    for wrapped in (False, True):
        for layer in layers:
            layer.zero_grad()
        isopo = Isopo(layers, "isopo-natural")
        with isopo.microbatch(ids, COEFFICIENTS) as microbatch:
            y = layers[0](x).tanh()
            y = checkpoint(layers[1], y, use_reentrant=False) if wrapped else layers[1](y)
            assert isinstance(y, Tensor)
            microbatch.objective(layers[2](y.tanh())).backward()
        results.append(gradients(layers))
        isopo.remove()
    assert_same(*results)


def test_a_sequence_in_two_rows_is_refused() -> None:
    ids = torch.tensor([[0, 0, 1], [0, 0, -1]])
    with (
        pytest.raises(ProxstepError, match=r"more than one row.*context parallelism"),
        Isopo(tiny_qwen3()).microbatch(ids, COEFFICIENTS),
    ):
        pass


def test_a_sequence_in_two_microbatches_is_refused() -> None:
    isopo = Isopo(tiny_qwen3())
    with isopo.microbatch(IDS, COEFFICIENTS, sequence_keys=torch.tensor([4, 7])):
        pass
    with (
        pytest.raises(ProxstepError, match="7 was seen before in this optimizer step"),
        isopo.microbatch(IDS, COEFFICIENTS, sequence_keys=torch.tensor([7, 8])),
    ):
        pass
    isopo.step()
    with isopo.microbatch(IDS, COEFFICIENTS, sequence_keys=torch.tensor([7, 8])):
        pass


def two_groups(interact: str, microbatches: list[list[int]]) -> dict[str, Tensor]:
    """Four sequences of two prompts, some of them in each microbatch; with a past, so that c is
    the same for all.
    """
    torch.manual_seed(0)
    model = tiny_qwen3()
    isopo = Isopo(model, NaturalRule(0.5, interact=interact, scale="paper"))  # type: ignore[arg-type]
    token = torch.randint(19, (4, 6), generator=torch.Generator().manual_seed(1))
    coefficient = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    for _ in range(2):
        model.zero_grad()
        for rows in microbatches:
            ids = torch.arange(len(rows))[:, None].expand(len(rows), 6)
            with isopo.microbatch(ids, coefficient[rows], groups=group[rows]) as microbatch:
                logits = model(input_ids=token[rows]).logits[:, :-1].log_softmax(-1)
                chosen = logits.gather(-1, token[rows][:, 1:, None])
                microbatch.objective(chosen).backward()
        isopo.step()
    return gradients(model)


def test_the_natural_rule_depends_on_what_shares_a_microbatch() -> None:
    together, apart = (two_groups("microbatch", m) for m in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]))
    errors = [float((together[n] - apart[n]).norm() / apart[n].norm()) for n in apart]
    assert min(errors) > 1e-3


def test_the_natural_rule_by_group_does_not() -> None:
    together, apart = (two_groups("group", m) for m in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]))
    assert_same(together, apart)


def test_the_natural_rule_by_group_needs_groups() -> None:
    isopo = Isopo(tiny_qwen3(), NaturalRule(interact="group"))
    with pytest.raises(ProxstepError, match="needs groups"), isopo.microbatch(IDS, COEFFICIENTS):
        pass


def test_entropy_has_an_ordinary_backward_of_its_own() -> None:
    torch.manual_seed(0)
    model = tiny_qwen3()
    isopo = Isopo(model, "isopo-figure4")
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    alone = gradients(model)
    with isopo.off():
        (0.3 * log_probs(model).square().sum()).backward()
    both = gradients(model)
    isopo.remove()
    model.zero_grad()
    (0.3 * log_probs(model).square().sum()).backward()
    assert_same({name: both[name] - alone[name] for name in both}, gradients(model))


def test_autocast_leaves_gradients_in_the_parameters_dtype() -> None:
    torch.manual_seed(0)
    model = tiny_qwen3(dtype=torch.float32)
    isopo = Isopo(model, "isopo-figure4")
    with (
        isopo.microbatch(IDS, COEFFICIENTS.float()) as microbatch,
        torch.autocast("cpu", torch.bfloat16),
    ):
        microbatch.objective(log_probs(model)).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("rule", RULES)
def test_inner_products_are_float32_where_backward_runs_inside_autocast(rule: str) -> None:
    """As many loops have it, with the loss and its backward in one block."""
    torch.manual_seed(0)
    model = tiny_qwen3(dtype=torch.float32)
    results = []
    for inside in (False, True):
        isopo = Isopo(model, rule)
        model.zero_grad()
        with isopo.microbatch(IDS, COEFFICIENTS.float()) as microbatch:
            with torch.autocast("cpu", torch.bfloat16):
                total = microbatch.objective(log_probs(model))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                total.backward()
        results.append(gradients(model))
        isopo.remove()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("family", "dtype"), square([*FAMILIES, *MORE], [torch.float32, torch.bfloat16])
)
def test_the_forward_is_the_models_to_the_last_bit(family: str, dtype: torch.dtype) -> None:
    """Not only up to rounding: else the policy that is trained is not the one that sampled."""
    model = build(family, 0, dtype, exact=False)
    wanted = log_probs(model)
    with Isopo(model).microbatch(IDS, COEFFICIENTS):
        assert torch.equal(log_probs(model), wanted)


def test_the_sample_has_a_generator_of_its_own() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        own: dict[str, Any] = {"overlap_source": "microbatch", "num_overlap_positions": 4}
        isopo = Isopo(tiny_qwen3(), seed=seed, **own)
        torch.set_rng_state(before)
        for _ in range(2):
            with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
                drawn.append(microbatch.samples.index_K.tolist())
            isopo.step()
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[:2] == drawn[2:4] != drawn[4:]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("source", ["microbatch", "previous_step"])
def test_a_checkpoint_holds_the_whole_state(source: str) -> None:
    rule = IsometricRule(-1.0, damping=0.5, scale="preserved")
    keys = torch.arange(2)
    results = []
    for stops in (False, True):
        torch.manual_seed(0)
        model = tiny_qwen3()
        options = {"overlap_source": source, "num_overlap_positions": 4}
        isopo = Isopo(model, rule, **options)  # type: ignore[arg-type]
        for _ in range(3):
            if stops:
                file = io.BytesIO()
                torch.save(isopo.state_dict(), file)
                file.seek(0)
                isopo.remove()
                isopo = Isopo(model, rule, **options)  # type: ignore[arg-type]
                isopo.load_state_dict(torch.load(file, weights_only=True))
            model.zero_grad()
            with isopo.microbatch(IDS, COEFFICIENTS, sequence_keys=keys) as microbatch:
                microbatch.objective(log_probs(model)).backward()
            isopo.step()
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_state_of_something_else_is_refused() -> None:
    isopo = Isopo(tiny_qwen3())
    with pytest.raises(ProxstepError, match="no state of an Isopo, it has param_groups: give"):
        isopo.load_state_dict({"param_groups": []})
    other = nn.Sequential(nn.Embedding(19, 4), nn.Linear(4, 19))
    narrow = nn.Sequential(nn.Embedding(19, 3), nn.Linear(3, 19))
    state = Isopo(other).state_dict()
    with pytest.raises(ProxstepError, match=r"another model: 0\.weight .*here it is not trained"):
        isopo.load_state_dict(state)
    with pytest.raises(ProxstepError, match=r"0\.weight has shape \(19, 4\) there, here \(19, 3\)"):
        Isopo(narrow).load_state_dict(state)


def test_a_prompt_that_is_called_padding_is_refused() -> None:
    """The completion's mask in the place of the attention mask: gradients would be lost."""
    model = tiny_qwen3()
    isopo = Isopo(model)
    completion = torch.zeros(2, 5, dtype=torch.bool)
    completion[:, 3:] = True
    tokens = torch.ones(2, 5, dtype=torch.long)
    for mask, fits in ((completion, False), (torch.ones_like(completion), True)):
        with isopo.microbatch(sequence_ids(mask), torch.ones(2)) as microbatch:
            log_prob = completion_log_probs(model(input_ids=tokens).logits, tokens, completion)
            objective = microbatch.objective(log_prob)
            with nullcontext() if fits else pytest.raises(ProxstepError, match="attention_mask"):
                objective.backward()


def test_a_prompt_that_is_called_padding_is_refused_later_too() -> None:
    """In the first microbatches every prompt may have had a token."""
    model = tiny_qwen3()
    isopo = Isopo(model)
    tokens = torch.ones(2, 5, dtype=torch.long)
    completion = torch.arange(5).expand(2, 5) >= 3
    for attended, fits in ((torch.ones(2, 5), True), (completion, False)):
        with isopo.microbatch(sequence_ids(attended > 0), torch.ones(2)) as microbatch:
            log_prob = completion_log_probs(model(input_ids=tokens).logits, tokens, completion)
            objective = microbatch.objective(log_prob)
            with nullcontext() if fits else pytest.raises(ProxstepError, match="attention_mask"):
                objective.backward()


LATER: dict[str, tuple[Any, Any]] = {
    "a ratio": (
        lambda log_prob: (log_prob - log_prob.detach()).exp(),
        lambda log_prob: (log_prob - log_prob.detach() + 0.1).exp(),
    ),
    "advantages": (lambda log_prob: 0 * log_prob, lambda log_prob: -2 * log_prob),
    "a mean": (lambda log_prob: log_prob[:1, :1].mean(), lambda log_prob: log_prob.mean()),
}
"""What is the sum of log-probabilities, or 0, in a first microbatch, and what it is later."""


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("stepped", [False, True])
def test_another_objective_is_refused_later_too(name: str, stepped: bool) -> None:
    first, later = LATER[name]
    model = tiny_qwen3()
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(first(log_probs(model))).backward()
    if stepped:
        isopo.step()
    with (
        pytest.raises(ProxstepError, match="something else than log-probabilities"),
        isopo.microbatch(IDS, COEFFICIENTS) as microbatch,
    ):
        microbatch.objective(later(log_probs(model))).backward()


def test_a_mixture_with_frozen_experts_is_covered() -> None:
    model = build("qwen3-moe", 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." not in name)
    with Isopo(model).microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_experts_that_see_only_their_tokens_are_refused() -> None:
    layer = nn.Linear(4, 4).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with Isopo(layer).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(layer(x.reshape(10, 4)[:7]))
        with pytest.raises(ProxstepError, match=r"saw 7 token positions.*freeze experts"):
            total.backward()


@pytest.mark.parametrize("family", ["qwen3-dora", "llama-dora"])
def test_a_trainable_bias_under_dora_is_refused(family: str) -> None:
    model = build(family, 0)
    layers = [m for m in model.modules() if getattr(m, "lora_magnitude_vector", None)]
    for layer in layers:
        base = layer.base_layer
        assert isinstance(base, nn.Linear)
        base.bias = nn.Parameter(torch.zeros(base.out_features, dtype=base.weight.dtype))
    with pytest.raises(ProxstepError, match="a bias under DoRA"):
        Isopo(model)


class Int8Linear(nn.Linear):
    """As bitsandbytes' layers: an integer weight that is scaled in the forward."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 0.01 * self.weight.to(input.dtype), self.bias)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_quantized_weight_is_covered_by_lora_and_refused_under_dora(use_dora: bool) -> None:
    model = build("qwen3-dora" if use_dora else "qwen3-lora", 0)
    for module in model.modules():
        if (base := getattr(module, "base_layer", None)) is not None:
            base.__class__ = Int8Linear
            weight = (100 * base.weight).round().clamp(-127, 127).to(torch.int8)
            base.weight = nn.Parameter(weight, requires_grad=False)
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        if use_dora:
            with pytest.raises(ProxstepError, match=r"DoRA on a quantized layer.*use LoRA"):
                log_probs(model)
        else:
            microbatch.objective(log_probs(model)).backward()


def test_adapters_that_are_added_later_are_found() -> None:
    model = models.qwen3()
    isopo = Isopo(model)
    models.with_adapters(model)
    with (
        pytest.raises(ProxstepError, match=r"lora_A\.default\.weight .*before Isopo"),
        isopo.microbatch(IDS, COEFFICIENTS),
    ):
        pass


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("rule", [*RULES, "isopo-npg", "isopo-euclidean", paper("isopo")])
def test_a_parameter_begins_with_its_first_gradient(rule: str | Rule, measured: bool) -> None:
    """LoRA's A has none while B is 0: as a past that is 0 it would be the scale of what follows."""
    model = build("qwen3-lora", 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_("lora_B" not in name)
    isopo = Isopo(model, rule)
    while measured and isopo.needs_past:
        with isopo.measuring(), isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            microbatch.objective(log_probs(model)).backward()
    one_step(model, isopo)
    assert all(not p.grad.any() for n, p in model.named_parameters() if "lora_A" in n)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1 * ("lora_B" in name))
        if seed == 0:
            twin = copy.deepcopy(model)
            fresh = Isopo(twin, rule)
        twin.load_state_dict(model.state_dict())
        found, wanted = one_step(model, isopo), one_step(twin, fresh)
        names = [name for name in found if "lora_A" in name]
        assert names
        for name in names:
            assert (found[name] - wanted[name]).norm() <= 1e-10 * wanted[name].norm() > 0, name


def test_a_step_without_any_gradient_changes_nothing_that_is_carried() -> None:
    """No token of it counted."""
    model = tiny_qwen3()
    isopo = Isopo(model, "isopo-figure4")
    one_step(model, isopo)
    before = copy.deepcopy(isopo.state_dict())
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model), torch.zeros(2, 4, dtype=torch.bool)).backward()
    isopo.step()
    after = isopo.state_dict()
    assert after["trailing"].keys() == before["trailing"].keys()
    for name, mean in before["trailing"].items():
        assert abs(after["trailing"][name] - mean) <= 1e-12 * mean, name
    for key, of in before["samples"].items():
        same = zip(of["rows"], after["samples"][key]["rows"], strict=True)
        assert all(torch.equal(*pair) for pair in same)


def one_step(model: nn.Module, isopo: Isopo) -> dict[str, Tensor]:
    """One optimizer step's gradient, of the usual microbatch."""
    model.zero_grad()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    isopo.step()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rule", RULES)
def test_a_tied_weight_gets_both_its_uses_gradients(rule: str) -> None:
    """They are those of the same model with two copies of the weight."""
    tied, untied = build("qwen3-tied", 0), build("qwen3-untied", 0)
    untied.load_state_dict(tied.state_dict())
    found = []
    for model in (tied, untied):
        with Isopo(model, rule).microbatch(IDS, COEFFICIENTS) as microbatch:
            microbatch.objective(log_probs(model)).backward()
        found.append(gradients(model))
    both = found[1]["model.embed_tokens.weight"] + found[1].pop("lm_head.weight")
    found[1]["model.embed_tokens.weight"] = both
    assert found[0].keys() == found[1].keys()
    assert_same(*found)


@pytest.mark.parametrize("of", ["input", "weight"])
def test_a_gradients_gradient_is_refused(of: str) -> None:
    layer = nn.Linear(4, 4).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    with Isopo(layer).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(layer(x).sin())
        wanted = x if of == "input" else layer.weight
        (gradient,) = torch.autograd.grad(total, wanted, create_graph=True)
        with pytest.raises((ProxstepError, RuntimeError), match=r"twice|no autograd formula"):
            gradient.square().sum().backward()
    assert layer.weight.grad is None


def test_a_graph_is_back_propagated_once() -> None:
    model = tiny_qwen3()
    with Isopo(model).microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model))
        total.backward(retain_graph=True)
        with pytest.raises(ProxstepError, match="twice in one microbatch"):
            total.backward()


def test_microbatches_may_be_back_propagated_later_in_any_order() -> None:
    torch.manual_seed(0)
    model = tiny_qwen3()
    isopo = Isopo(model, "isopo-natural")
    totals = []
    for coefficients in (COEFFICIENTS, 2 * COEFFICIENTS):
        with isopo.microbatch(IDS, coefficients) as microbatch:
            totals.append(microbatch.objective(log_probs(model)))
    for total in reversed(totals):
        total.backward()
    assert_same(gradients(model), one_gradient("isopo-natural"), 3.0)


def test_a_backward_in_anothers_microbatch_is_refused() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS):
        first = log_probs(model).sum()
    with (
        isopo.microbatch(IDS, COEFFICIENTS),
        pytest.raises(ProxstepError, match="another microbatch than the one that is active"),
    ):
        first.backward()


def test_a_backward_after_the_step_is_refused() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model))
    isopo.step()
    with pytest.raises(ProxstepError, match="earlier optimizer step"):
        total.backward()


class Multiply(torch.autograd.Function):
    """A product with a backward of its own, as fused kernels have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        return grad * gain, (grad * x).sum((0, 1))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return Multiply.apply(x, self.gain)


@pytest.mark.parametrize("late", [False, True])
def test_a_gradient_by_an_autograd_function_is_found(late: bool) -> None:
    """Also where the backward follows after the block, and others came in between."""
    model = nn.Sequential(nn.Embedding(19, 8), Fused(), nn.Linear(8, 19)).double()
    isopo = Isopo(model)
    found = pytest.raises(ProxstepError, match=r"1\.gain received a gradient without its layer's")
    with nullcontext() if late else found, isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(model(TOKENS).log_softmax(-1)[..., 0])
        if not late:
            total.backward()
    if late:
        with isopo.off():
            model[1].gain.square().sum().backward()
        with found:
            total.backward()


def test_a_late_backward_minds_its_own_gradients_alone() -> None:
    """Not those of a loss of its own, nor what clipping does to them."""
    model = nn.Sequential(nn.Embedding(19, 8), nn.Linear(8, 19), nn.Linear(8, 1)).double()
    isopo = Isopo(model)
    totals = []
    for _ in range(2):
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            totals.append(microbatch.objective(model[:2](TOKENS).log_softmax(-1)[..., 0]))
        with isopo.off():
            model[2](model[0](TOKENS)).square().sum().backward()
    for total in totals:
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    isopo.step()
    assert all(p.grad is not None for p in model.parameters())


def test_a_measuring_pass_that_fails_leaves_nothing_behind() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    keys = torch.arange(2)

    def measure(fails: bool) -> None:
        with isopo.measuring():
            with isopo.microbatch(IDS, COEFFICIENTS, sequence_keys=keys) as microbatch:
                microbatch.objective(log_probs(model)).backward()
            if fails:
                raise MemoryError

    for fails in (False, True, False):
        with pytest.raises(MemoryError) if fails else nullcontext():
            measure(fails)
    assert not isopo.needs_past
    once = Isopo(tiny := copy.deepcopy(model))
    for _ in range(2):
        with once.measuring(), once.microbatch(IDS, COEFFICIENTS, sequence_keys=keys) as microbatch:
            microbatch.objective(log_probs(tiny)).backward()
    assert isopo.state_dict()["trailing"] == once.state_dict()["trailing"]


def test_a_removed_isopo_says_so() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    isopo.remove()
    with (
        pytest.raises(ProxstepError, match=r"was removed.*Isopo\(model\)"),
        isopo.microbatch(IDS, COEFFICIENTS),
    ):
        pass


def test_flattened_parameters_of_fsdp1_are_refused() -> None:
    """As FullyShardedDataParallel makes one of all parameters of a module."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._flat_param = nn.Parameter(torch.ones(5))

    with pytest.raises(ProxstepError, match=r"_flat_param.*use_orig_params=True.*fully_shard"):
        Isopo(nn.Sequential(Flat(), nn.Linear(3, 3)))


def test_shared_samples_need_keys() -> None:
    isopo = Isopo(tiny_qwen3(), overlap_source="ranks")
    refused = pytest.raises(ProxstepError, match="needs sequence_keys")
    with refused, isopo.microbatch(IDS, COEFFICIENTS):
        pass


def test_fisher_norms_of_unknown_parameters_are_refused() -> None:
    isopo, given = Isopo(tiny_qwen3()), {"lm_head.wieght": torch.ones(2)}
    with (
        pytest.raises(ProxstepError, match=r"lm_head\.wieght is no parameter"),
        isopo.microbatch(IDS, COEFFICIENTS, fisher_squares=given),
    ):
        pass
