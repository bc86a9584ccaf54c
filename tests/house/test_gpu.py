"""What only an accelerator can show; run by `make gpu`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.engine import Silent, tiny_recipe
from tests.isopo.test_install import COEFFICIENTS, IDS, TOKENS
from tests.models import tiny_gpt2, tiny_qwen3

from proxstep import PRESETS, Isopo
from proxstep.training import lifecycle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_gpt2])
@pytest.mark.parametrize("rule", PRESETS)
def test_gradients_equal_the_cpus(build, rule: str) -> None:
    torch.manual_seed(0)
    model = build()
    results = []
    for device in ("cpu", "cuda"):
        twin = copy.deepcopy(model).to(device)
        isopo = Isopo(twin, rule)
        token, ids = TOKENS.to(device), IDS.to(device)
        with isopo.microbatch(ids, COEFFICIENTS.to(device)):
            position = (ids >= 0).long().cumsum(1) - 1
            logits = twin(
                input_ids=token,
                attention_mask=(ids >= 0).long(),
                position_ids=position.clamp(min=0),
            ).logits
            chosen = logits[:, :-1].log_softmax(-1).gather(-1, token[:, 1:, None]).squeeze(-1)
            (chosen * (ids[:, 1:] >= 0)).sum().backward()
        isopo.step()
        results.append([p.grad.cpu() for p in twin.parameters()])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-8 * a.norm()


@pytest.mark.parametrize("algorithm", ["isopo", "isopo-natural", "opo", "grpo"])
def test_the_local_engine_runs(tmp_path: Path, algorithm: str) -> None:
    recipe = tiny_recipe(tmp_path / "run", algorithm, device="cuda", steps=2)
    assert lifecycle.train(recipe, Silent()) == "finished"
