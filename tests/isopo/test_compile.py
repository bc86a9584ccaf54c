"""torch.compile traces a patched model into one graph, and the gradients stay ISOPO's."""

from __future__ import annotations

import gc
from itertools import product

import jaxtyping
import pytest
import torch
from tests.families import FAMILIES, build
from tests.isopo.test_install import COEFFICIENTS, IDS
from tests.models import tiny_gpt2, tiny_qwen3
from tests.selection import slow
from torch import nn

from proxstep import Isopo

pytestmark = pytest.mark.filterwarnings(  # torch's own, of how it traces autograd functions
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit.script_method.*:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def _check_no_shapes() -> None:
    """The checks of shapes and types, which are the tests' alone, cannot be traced."""
    jaxtyping.config.update("jaxtyping_disable", True)


MODELS = {"qwen3": tiny_qwen3, "gpt2": tiny_gpt2}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gradient_of(
    forward: nn.Module, model: nn.Module, isopo: Isopo, seed: int
) -> dict[str, torch.Tensor]:
    token = torch.randint(19, (2, 5), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        logits = forward(input_ids=token, use_cache=False).logits[:, :-1].log_softmax(-1)
        chosen = logits.gather(-1, token[:, 1:, None]).squeeze(-1)
        microbatch.objective(chosen, IDS[:, 1:] >= 0).backward()
    isopo.step()
    return gradients(model)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("gpt2", "isopo"),
        *slow(("qwen3", "isopo")),
        *slow(*product(MODELS, ("reinforce", "isopo-figure4", "isopo-natural"))),
    ],
)
def test_one_graph_for_all_microbatches(name: str, rule: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = MODELS[name]()
    isopo = Isopo(model, rule)
    expected = [gradient_of(model, model, isopo, seed) for seed in range(3)]
    isopo.load_state_dict({"step": 0, "trailing": {}})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed, wanted in enumerate(expected):
        found = gradient_of(compiled, model, isopo, seed)  # type: ignore[arg-type]
        for parameter, value in wanted.items():
            error = (found[parameter] - value).norm()
            assert error <= 1e-10 * value.norm(), parameter
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_one_graph(family: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(family, 0)
    isopo = Isopo(model, "isopo-figure4")
    expected = [gradient_of(model, model, isopo, seed) for seed in range(2)]
    isopo.load_state_dict({"step": 0, "trailing": {}})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed, wanted in enumerate(expected):
        found = gradient_of(compiled, model, isopo, seed)  # type: ignore[arg-type]
        assert found.keys() == wanted.keys()
        for parameter, value in wanted.items():
            assert (found[parameter] - value).norm() <= 1e-10 * value.norm(), parameter
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_inductor_agrees_in_float32() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny_qwen3(dtype=torch.float32)
    isopo = Isopo(model)
    expected = gradient_of(model, model, isopo, 0)
    isopo.load_state_dict({"step": 0, "trailing": {}})
    found = gradient_of(torch.compile(model, fullgraph=True), model, isopo, 0)  # type: ignore[arg-type]
    for name, wanted in expected.items():
        assert (found[name] - wanted).norm() <= 1e-4 * wanted.norm(), name


def test_freeing_another_model_compiles_nothing_again() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    other = nn.Linear(4, 4).double()
    others = Isopo(other)
    layer = nn.Linear(4, 4).double()
    isopo = Isopo(layer, "isopo-natural")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    for step in range(2):
        with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            microbatch.objective(compiled(x)).backward()
        isopo.step()
        if step == 0:
            del other, others
            gc.collect()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_off_and_on_are_two_graphs() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = nn.Linear(4, 4).double()
    isopo = Isopo(layer, "isopo-natural")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with isopo.off():
        compiled(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum((0, 1)).expand(4, 4))  # type: ignore[arg-type]
    layer.zero_grad()
    with isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(compiled(x)).backward()
    assert not torch.allclose(layer.weight.grad, x.sum((0, 1)).expand(4, 4))  # type: ignore[arg-type]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
