"""What installing ISOPO leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from tests.isopo.rules import paper
from tests.models import tiny_gpt2, tiny_qwen3
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo import IsometricRule, Isopo, NaturalRule

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
IDS = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, -1]])
COEFFICIENTS = torch.tensor([0.5, -0.25], dtype=torch.float64)


def log_probs(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=TOKENS, attention_mask=(IDS >= 0).long()).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
    return chosen * (IDS[:, 1:] >= 0)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_state_dict_types_and_values_are_untouched() -> None:
    model = tiny_qwen3()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    before = log_probs(model)
    isopo = Isopo(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert type(model.lm_head) is nn.Linear
    with isopo.microbatch(IDS, COEFFICIENTS):
        assert torch.equal(log_probs(model), before)
    isopo.remove()
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_ordinary_and_independent(clone) -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    twin = clone(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(log_probs(twin), log_probs(model).detach())
    log_probs(twin).sum().backward()  # needs no microbatch
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())
    Isopo(twin)
    assert isopo.model is model  # and so still installed while all this happened


def test_forward_may_run_outside_and_backward_too() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model, paper("isopo"))
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    inside = gradients(model)

    model.zero_grad()
    isopo.step()
    isopo.load_state_dict({"step": 0, "trailing": {}})
    log_prob = log_probs(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_prob).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, inside[name])

    model.zero_grad()
    isopo.load_state_dict({"step": 0, "trailing": {}})
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model))
    total.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, inside[name])


def test_off_gives_the_ordinary_gradient() -> None:
    model, plain = tiny_gpt2(), None
    plain = copy.deepcopy(model)
    isopo = Isopo(model)
    log_probs(plain).square().sum().backward()
    with isopo.off():
        log_probs(model).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    model.zero_grad()
    total = log_probs(model).square().sum()
    with isopo.off():
        total.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_backward_outside_is_refused() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    assert isopo.model is model
    with pytest.raises(ProxstepError, match=r"outside isopo\.microbatch"):
        log_probs(model).sum().backward()


def test_unknown_trainable_parameters_are_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    model = nn.Sequential(nn.Linear(3, 3), Scale())
    with pytest.raises(ProxstepError, match=r"1\.gain \(Scale\).*requires_grad_\(False\)"):
        Isopo(model)
    model[1].gain.requires_grad_(False)
    Isopo(model)


def test_parameters_unfrozen_later_are_found_at_the_microbatch() -> None:
    model = tiny_qwen3()
    model.lm_head.weight.requires_grad_(False)  # tied: the embedding too
    isopo = Isopo(model)
    model.lm_head.weight.requires_grad_(True)
    with (
        pytest.raises(ProxstepError, match=r"lm_head\.weight"),
        isopo.microbatch(IDS, COEFFICIENTS),
    ):
        pass


def test_a_bypassed_head_is_found() -> None:
    model = tiny_qwen3(tied=True)
    isopo = Isopo(model)
    with (  # noqa: PT012
        pytest.raises(ProxstepError, match=r"lm_head\.weight is used past its layer's forward"),
        isopo.microbatch(IDS, COEFFICIENTS) as microbatch,
    ):
        hidden = model.model(input_ids=TOKENS).last_hidden_state
        logits = hidden @ model.lm_head.weight.mT
        microbatch.objective(logits.log_softmax(-1)[..., 0]).backward()


def test_logits_to_keep_is_found() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    with (  # noqa: PT012
        pytest.raises(ProxstepError, match="logits_to_keep"),
        isopo.microbatch(IDS, COEFFICIENTS) as microbatch,
    ):
        logits = model(input_ids=TOKENS, logits_to_keep=2).logits
        microbatch.objective(logits.log_softmax(-1)[..., 0]).backward()


def test_two_backwards_in_one_microbatch_are_refused() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    with (  # noqa: PT012
        pytest.raises(ProxstepError, match="twice in one microbatch"),
        isopo.microbatch(IDS, COEFFICIENTS) as microbatch,
    ):
        microbatch.objective(log_probs(model)).backward()
        microbatch.objective(log_probs(model)).backward()


def test_two_installations_are_refused_and_remove_allows_another() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    with pytest.raises(ProxstepError, match="installed on this model already"):
        Isopo(model)
    isopo.remove()
    Isopo(model, "isopo-natural")


@pytest.mark.parametrize(
    ("ids", "coefficients", "message"),
    [
        (IDS.double(), COEFFICIENTS, "must be integers"),
        (IDS[0], COEFFICIENTS, "must be integers"),
        (IDS, COEFFICIENTS[:1], "coefficients has 1 numbers"),
        (IDS, torch.ones(3), "coefficients has 3 numbers"),
        (IDS, torch.tensor([1.0, float("nan")]), "finite"),
    ],
)
def test_wrong_microbatches_are_refused(ids, coefficients, message: str) -> None:
    isopo = Isopo(tiny_qwen3())
    with pytest.raises(ProxstepError, match=message), isopo.microbatch(ids, coefficients):
        pass


def test_wrong_options_are_refused() -> None:
    for wrong, message in [
        (lambda: Isopo(tiny_qwen3(), "isopo-nat"), "isopo-natural"),
        (lambda: Isopo(tiny_qwen3(), num_overlap_positions=0), "num_overlap_positions"),
        (lambda: Isopo(tiny_qwen3(), other_parameters="skip"), "other_parameters"),
        (lambda: NaturalRule(0.0), "ntk_damping"),
        (lambda: IsometricRule(damping=-1.0), "damping"),
        (lambda: IsometricRule(damping_form="relative"), "damping > 0"),
    ]:
        with pytest.raises(ProxstepError, match=message):
            wrong()


def test_forgetting_step_is_found_where_it_matters() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model, "isopo-natural")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:  # the parameters have not moved
        microbatch.objective(log_probs(model)).backward()
    optimizer.step()
    with (
        pytest.raises(ProxstepError, match=r"call it after optimizer\.step"),
        isopo.microbatch(IDS, COEFFICIENTS),
    ):
        pass
    isopo.step()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()


def test_other_parameters_reinforce_and_freeze() -> None:
    plain, mixed, frozen = tiny_gpt2(), None, None
    mixed, frozen = copy.deepcopy(plain), copy.deepcopy(plain)
    for model, rule, other in (
        (plain, "reinforce", "transform"),
        (mixed, "isopo", "reinforce"),
        (frozen, "isopo", "freeze"),
    ):
        isopo = Isopo(model, rule, other_parameters=other)
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            microbatch.objective(log_probs(model)).backward()
    assert torch.allclose(mixed.transformer.wpe.weight.grad, plain.transformer.wpe.weight.grad)
    layer, same = mixed.transformer.h[0], plain.transformer.h[0]
    assert torch.allclose(layer.ln_1.weight.grad, same.ln_1.weight.grad)
    assert torch.allclose(layer.attn.c_attn.bias.grad, same.attn.c_attn.bias.grad)
    assert not torch.allclose(layer.attn.c_attn.weight.grad, same.attn.c_attn.weight.grad)
    assert frozen.transformer.h[0].ln_1.weight.grad is None
    assert torch.allclose(
        frozen.transformer.h[0].attn.c_attn.weight.grad, layer.attn.c_attn.weight.grad
    )
    isopo.remove()
    assert frozen.transformer.h[0].ln_1.weight.requires_grad


def test_padding_idx_is_honoured() -> None:
    embedding = nn.Embedding(12, 4, padding_idx=3).double()
    model = nn.Sequential(embedding, nn.Linear(4, 12).double())
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(model(TOKENS).log_softmax(-1)[..., 0]).backward()
    assert (embedding.weight.grad[3] == 0).all()
    assert (embedding.weight.grad[4] != 0).any()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("num_heads", [3, 5])
def test_norms_over_heads_in_either_order(heads_first: bool, num_heads: int) -> None:
    """Five heads and five positions: the order shows only in memory."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, num_heads * 4)
            self.norm = nn.RMSNorm(4)

        def forward(self, token: torch.Tensor) -> torch.Tensor:
            x = self.table(token).view(*token.shape, num_heads, 4)
            x = self.norm(x.transpose(1, 2)).transpose(1, 2) if heads_first else self.norm(x)
            return x.sin().sum((-1, -2))

    torch.manual_seed(0)
    model = Heads().double()
    nn.init.normal_(model.norm.weight)
    expected = []
    for b in range(2):
        model.zero_grad()
        (model(TOKENS)[b] * (IDS[b] >= 0)).sum().backward()
        expected.append(model.norm.weight.grad.clone())
    isopo = Isopo(model, paper("isopo-euclidean"))
    model.zero_grad()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(model(TOKENS) * (IDS >= 0)).backward()
    wanted = -sum(
        c * g / (g.norm() ** 2 + 1e-8) ** 0.5 for c, g in zip(COEFFICIENTS, expected, strict=True)
    )
    assert torch.allclose(model.norm.weight.grad, wanted, rtol=1e-10)


def test_overlap_positions_of_the_completion() -> None:
    model = tiny_qwen3()
    completion = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    own: dict[str, Any] = {"overlap_source": "microbatch", "num_overlap_positions": 3}
    isopo = Isopo(model, overlap_positions="completion", **own)
    with isopo.microbatch(IDS, COEFFICIENTS, completion) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    sampled = microbatch.samples.index_K
    assert len(sampled) == 3
    predicting = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    assert predicting.flatten()[sampled].all()
    with pytest.raises(ProxstepError, match="completion_mask"), isopo.microbatch(IDS, COEFFICIENTS):
        pass


def test_padding_is_never_sampled_and_steps_draw_anew() -> None:
    isopo = Isopo(tiny_qwen3(), num_overlap_positions=5, overlap_source="microbatch")
    drawn = []
    for _ in range(3):
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            pass
        drawn.append(microbatch.samples.index_K.tolist())
        assert (IDS.flatten()[microbatch.samples.index_K] >= 0).all()
        isopo.step()
    assert len({tuple(d) for d in drawn}) > 1


def test_a_sequence_without_overlap_gets_the_mean_scale() -> None:
    """Only sequence 0 is sampled and they share no token: sequence 1's estimate on the embedding
    is exactly 0.
    """
    embedding = nn.Embedding(12, 4).double()
    isopo = Isopo(embedding, overlap_positions="completion")
    only_first = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    with isopo.microbatch(IDS, torch.ones(2, dtype=torch.float64), only_first) as microbatch:
        microbatch.objective(embedding(TOKENS).sin()).backward()
    diagnostics = isopo.step()
    assert diagnostics["frac_filled_fisher"] == 0.5
    assert embedding.weight.grad.abs().max() < 100
    assert embedding.weight.grad[6:10].abs().min() > 0


def test_state_continues() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model, "isopo-natural")

    def one_step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            microbatch.objective(log_probs(model)).backward()
        isopo.step()
        return gradients(model)

    first = one_step()
    state = copy.deepcopy(isopo.state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    second = one_step()
    isopo.load_state_dict(state)
    again = one_step()
    assert all(torch.equal(second[n], again[n]) for n in second)
    assert any(not torch.allclose(first[n], second[n]) for n in second)


def test_a_model_and_its_isopo_are_freed_together() -> None:
    model = tiny_qwen3()
    isopo = Isopo(model)
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model)).backward()
    alive = weakref.ref(model.lm_head)
    del model, isopo
    gc.collect()
    assert alive() is None


def test_a_model_whose_isopo_is_gone_is_ordinary() -> None:
    model = tiny_qwen3()
    Isopo(model)
    gc.collect()
    log_probs(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    Isopo(model)


def test_gradient_checkpointing_gives_the_same() -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = tiny_qwen3()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        isopo = Isopo(model, "isopo-figure4")
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            microbatch.objective(log_probs(model)).backward()
        results.append(gradients(model))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], rtol=1e-10, atol=1e-14)


def test_autocast_is_close_to_float32() -> None:
    torch.manual_seed(4)
    model = tiny_qwen3(dtype=torch.float32)
    isopo = Isopo(model)
    results = []
    for enabled in (False, True):
        model.zero_grad()
        isopo.load_state_dict({"step": 0, "trailing": {}})
        with (
            isopo.microbatch(IDS, COEFFICIENTS.float()) as microbatch,
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            microbatch.objective(log_probs(model)).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    cosine = torch.nn.functional.cosine_similarity(*results, dim=0)
    assert cosine > 0.99
