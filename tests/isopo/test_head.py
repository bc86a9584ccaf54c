"""The chunked head gives ISOPO's gradient of the full one, sequence by sequence."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.families import build
from tests.selection import square
from torch import Tensor, nn

from proxstep import PRESETS, IsometricRule, Isopo, ProxstepError
from proxstep.isopo.head import head_log_probs
from proxstep.training.output_layer import forward_with_head, output_head

COEFFICIENTS = torch.tensor([0.7, -1.3, 0.4, 2.1], dtype=torch.float64)
NEED_A_FULL_HEAD = ["isopo-natural", "proma", "proma-intra"]
RULES = {name: rule for name, rule in PRESETS.items() if name not in NEED_A_FULL_HEAD} | {
    "damped": IsometricRule(-0.5, -1.5, 0.7, damping=2.0, scale="preserved"),
    "relative": IsometricRule(-1.0, damping=0.5, damping_form="relative", scale="paper"),
}


def batch(seed: int) -> dict[str, Tensor]:
    """Four rows, two of them padded, their completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    token_BT = torch.randint(19, (4, 9), generator=generator)
    attention_BT = torch.ones_like(token_BT).bool()
    attention_BT[0, :2] = False
    attention_BT[1, 7:] = False
    response_BT = attention_BT.clone()
    response_BT[:, :4] = False
    response_BT[2, :7] = False
    ids_BT = torch.where(attention_BT, torch.arange(4)[:, None], -1)
    return {"token": token_BT, "attention": attention_BT, "response": response_BT, "ids": ids_BT}


def log_probs(model: nn.Module, data: dict[str, Tensor], chunk_size: int | None) -> Tensor:
    """Of the completions, through the full head where there is no chunk size."""
    token_BT, attention = data["token"], data["attention"].long()
    position_BT = (attention.cumsum(1) - 1).clamp(min=0)
    chosen_BT = data["response"][:, 1:]
    if chunk_size is None:
        logits = model(input_ids=token_BT, attention_mask=attention, position_ids=position_BT)
        log_prob_BTV = (logits.logits[:, :-1] / 0.7).log_softmax(-1)
        return log_prob_BTV.gather(-1, token_BT[:, 1:, None]).squeeze(-1)[chosen_BT]
    index_BT = torch.arange(token_BT.numel()).view_as(token_BT)[:, :-1]
    return forward_with_head(
        model,
        lambda hidden_BTD: head_log_probs(  # type: ignore[arg-type,return-value]
            output_head(model),
            hidden_BTD[:, :-1][chosen_BT],
            token_BT[:, 1:][chosen_BT],
            index_BT[chosen_BT],
            temperature=0.7,
            chunk_size=chunk_size,
        ),
        token_BT,
        attention,
        position_BT,
    )


@cache
def full_head(family: str, rule: str) -> list[Tensor]:
    """What every chunk size is compared with."""
    return two_steps(family, RULES[rule], None)


def two_steps(family: str, rule: object, chunk_size: int | None, **options: object) -> list[Tensor]:
    """The gradients of two optimizer steps; the second has a past."""
    model = build(family, 1)
    isopo = Isopo(model, rule, num_overlap_positions=9, seed=3, **options)  # type: ignore[arg-type]
    gradients = []
    for step in range(2):
        data = batch(step)
        model.zero_grad()
        keys = torch.arange(4) if options.get("overlap_source") else None
        with isopo.microbatch(
            data["ids"], COEFFICIENTS, data["response"], sequence_keys=keys
        ) as microbatch:
            microbatch.objective(log_probs(model, data, chunk_size)).backward()
        isopo.step()
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return gradients


@pytest.mark.parametrize(
    ("family", "rule", "chunk_size"),
    square(["qwen3-tied", "qwen3-untied", "gpt2"], RULES, [1, 2, 100]),
)
def test_equals_the_full_head(family: str, rule: str, chunk_size: int) -> None:
    expected, found = full_head(family, rule), two_steps(family, RULES[rule], chunk_size)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"overlap_positions": "completion"},
        {"overlap_source": "previous_step"},
        {"fisher_denominator": "trailing"},
        {"diagnose": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_equals_the_full_head_with(options: dict[str, object]) -> None:
    expected = two_steps("qwen3-tied", "isopo-figure4", None, **options)
    found = two_steps("qwen3-tied", "isopo-figure4", 3, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_fisher_norms_that_are_given() -> None:
    data, gradients = batch(0), []
    for chunk_size in (None, 2):
        model = build("qwen3-untied", 1)
        isopo = Isopo(model, "isopo")
        given = {"lm_head.weight": torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)}
        with isopo.microbatch(data["ids"], COEFFICIENTS, fisher_squares=given) as microbatch:
            microbatch.objective(log_probs(model, data, chunk_size)).backward()
        gradients.append(output_head(model).weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "option", [*({"rule": rule} for rule in NEED_A_FULL_HEAD), {"fisher": "sequences"}]
)
def test_rules_that_need_the_full_head_are_refused(option: dict[str, str]) -> None:
    model, data = build("qwen3-tied", 1), batch(0)
    isopo = Isopo(model, **option)  # type: ignore[arg-type]
    with isopo.microbatch(data["ids"], COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(model, data, 2))
        with pytest.raises(ProxstepError, match=r"lm_head\.weight: .*use the full head"):
            total.backward()


def test_a_trainable_bias_of_the_head_is_refused() -> None:
    model, data = build("phi", 1), batch(0)
    isopo = Isopo(model)
    with (
        isopo.microbatch(data["ids"], COEFFICIENTS),
        pytest.raises(ProxstepError, match=r"lm_head\.bias: .*freeze the bias"),
    ):
        log_probs(model, data, 2)


def test_off_is_ordinary() -> None:
    data, gradients = batch(0), []
    for chunk_size in (None, 2):
        model = build("qwen3-tied", 1)
        with Isopo(model, "isopo-natural").off():
            log_probs(model, data, chunk_size).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_no_tensor_of_all_logits_exists() -> None:
    """With 19 tokens of a vocabulary of 4000, the largest tensors have the size of the weight."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor) and value.shape[-1:] == (4000,):
                    self.size = max(self.size, value.numel())
            return out

    torch.manual_seed(0)
    head = nn.Linear(3, 4000, bias=False)
    hidden_ND = torch.randn(38, 3, requires_grad=True)
    isopo = Isopo(head, "isopo-figure4", num_overlap_positions=4)
    ids_BT = torch.arange(2)[:, None].expand(2, 19)
    token_N = torch.randint(4000, (38,))
    with (
        Largest() as largest,
        isopo.microbatch(ids_BT, torch.ones(2)) as microbatch,
    ):
        scores = head_log_probs(head, hidden_ND, token_N, torch.arange(38), chunk_size=5)
        assert isinstance(scores, Tensor)
        microbatch.objective(scores).backward()
    assert 0 < largest.size <= 5 * 4000
