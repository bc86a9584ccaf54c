"""Shapes and types of the pure modules are checked at every call in one test of eight.

The checks take as long as the rest of the suite. PROXSTEP_CHECK_SHAPES=1 checks in every test.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Generator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch

CHECKED = [
    "proxstep.logprobs.tokens",
    "proxstep.algorithms.advantages",
    "proxstep.algorithms",
    "proxstep.logprobs.chunked",
    "proxstep.training.regularizers",
    "proxstep.isopo.diagnostics.step",
    "proxstep.isopo.diagnostics.statistics",
    "proxstep.isopo.embedding",
    "proxstep.isopo.linear",
    "proxstep.isopo.vector",
    "proxstep.isopo.diagnostics.noise",
    "proxstep.isopo.plan",
    "proxstep.isopo.diagnostics.stacked",
    "proxstep.isopo.diagnostics.summary",
    "proxstep.isopo.means",
    "proxstep.isopo.rule",
    "proxstep.budget.prediction",
    "tests.theory.maths",
]
_jaxtyped = jaxtyping.jaxtyped


def _checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """Decorate what the hook hands over, but for functions in functions, which have no shapes.

    Each call of the outer one makes them anew, and making the checks takes longer than the call.
    """

    def decorate(of: Any) -> Any:
        if "<locals>" in getattr(of, "__qualname__", ""):
            return of
        return _jaxtyped(of, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = _checked
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each test's slow cases, every Nth"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is imported here is garbage: a sixth of the time went into looking for some."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test's slow cases leave the first and every Nth after it; what is fast stays."""
    every, cases = config.getoption("every"), defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    left_out = {item for of in cases.values() for i, item in enumerate(of) if i % every}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the embedded models of the tests out of the user's cache.

    Those without a warm-up are there already, and much smaller than the real one.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from proxstep.training import demo_model

    cache = tmp_path_factory.mktemp("cache")
    os.environ["PROXSTEP_CACHE"] = str(cache)
    tokenizer, model = demo_model.build_embedded_model()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**{**model.config.to_dict(), **sizes, **heads}))
    for difficulty in range(1, 6):
        folder = demo_model._folder(difficulty, 0.0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(autouse=True)
def _check_shapes(request: pytest.FixtureRequest) -> None:
    """Switch the checks on or off by the test's name, so that each test is always the same."""
    chosen = zlib.crc32(request.node.nodeid.encode()) % 8 == 0
    checks = chosen or "PROXSTEP_CHECK_SHAPES" in os.environ
    jaxtyping.config.update("jaxtyping_disable", not checks)
