"""Adapters in float32 on a frozen base in bfloat16: their gradients, checkpoints and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import Silent, records, spread_reward, tiny_recipe

from proxstep import Isopo
from proxstep.config.sections import Lora
from proxstep.runs.checkpoint import latest_checkpoint
from proxstep.training import lifecycle
from proxstep.training.models import load_model, quiet_transformers
from proxstep.training.source import model_source

CPU = torch.device("cpu")
MODEL = {"name": "embedded", "warmup_score": 0.0, "dtype": "bfloat16", "lora": {"rank": 2}}


def adapters_of(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("rule", "most"), [(None, 0.05), ("isopo", 0.15), ("isopo-natural", 0.05)])
def test_the_gradient_is_that_of_a_float32_base_with_the_same_values(
    tmp_path: Path, rule: str | None, most: float
) -> None:
    """Measured: 0.039, 0.118 and 0.044 (AMD EPYC); docs/isopo.md has the first two."""
    quiet_transformers()
    source = model_source(tiny_recipe(tmp_path / "run"), print)
    gradients = []
    for dtype in ("bfloat16", "float32"):
        torch.manual_seed(0)
        model: Any = load_model(source, dtype, CPU, Lora(rank=2, target_modules="all-linear"))
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.dtype for p in frozen} == {getattr(torch, dtype)}
        assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
        torch.manual_seed(1)
        for parameter in adapters_of(model).values():  # peft begins with a product of 0
            parameter.data.normal_(std=0.2)
        for parameter in frozen:
            parameter.data = parameter.data.bfloat16().to(getattr(torch, dtype))
        token_BT = torch.arange(2, 14).reshape(2, 6)
        response_BT = torch.ones_like(token_BT).bool()

        def log_prob_BT(model: Any = model, token_BT: Any = token_BT) -> torch.Tensor:
            logits_BTV = model(input_ids=token_BT).logits[:, :-1].float()
            return logits_BTV.log_softmax(-1).gather(-1, token_BT[:, 1:, None]).squeeze(-1)

        coefficient_B = torch.tensor([1.0, -0.5])
        if rule is None:
            (coefficient_B[:, None] * log_prob_BT()).sum().backward()
        else:
            isopo = Isopo(model, rule, overlap_source="microbatch", num_overlap_positions=None)
            ids_BT = torch.arange(2)[:, None].expand(2, 6)
            with isopo.microbatch(ids_BT, coefficient_B, response_BT) as microbatch:
                microbatch.objective(log_prob_BT(), response_BT[:, 1:]).backward()
            isopo.step()
        gradients.append({name: p.grad for name, p in adapters_of(model).items()})
    rough, exact = gradients
    assert {gradient.dtype for gradient in rough.values()} == {torch.float32}
    whole, wanted = (torch.cat([g.flatten() for g in found.values()]) for found in (rough, exact))
    assert (whole - wanted).norm() <= most * wanted.norm()


@pytest.mark.parametrize("algorithm", ["grpo", "isopo"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, algorithm: str) -> None:
    recipe = tiny_recipe(
        tmp_path / "run",
        algorithm,
        model=MODEL,
        task=spread_reward(tmp_path),
        logging={"checkpoint_every": 1},
    )
    assert lifecycle.train(recipe, Silent()) == "finished"
    last = latest_checkpoint(tmp_path / "run")
    weights = load_file(last / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    scores = [record.get("kl_policy_initial") for record in records(tmp_path / "run")]
    shutil.rmtree(last)
    assert lifecycle.resume(tmp_path / "run", Silent()) == "finished"
    again = load_file(last / "adapter_model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert [record.get("kl_policy_initial") for record in records(tmp_path / "run")] == scores
