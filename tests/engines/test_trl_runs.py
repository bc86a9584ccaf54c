"""Runs of the TRL engine: resuming after a kill, the head, ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import tiny_recipe
from tests.engines.test_trl_gradients import difference, local_gradients
from tests.engines.trl_case import environment, made, tiny, trained
from tests.selection import slow
from torch import nn
from transformers import TrainerCallback

from proxstep.engines.trl import IsopoTrainer, OpoTrainer
from proxstep.engines.trl.isopo import STATE_FILE
from proxstep.engines.trl.release import FusedOutput
from proxstep.errors import ProxstepError

CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


@pytest.mark.parametrize(
    "options", [{"num_overlap_positions": 5}, *slow({"rule": "isopo-natural"})]
)
def test_a_resumed_run_is_as_if_never_killed(tmp_path: Path, options: dict[str, Any]) -> None:
    """From a checkpoint: parameters, trailing means and samples of positions, to the bit."""
    options |= CHECKPOINTS
    whole, _ = made(IsopoTrainer, tmp_path / "whole", *_model(), **options)
    trained(whole)
    resumed, _ = made(IsopoTrainer, tmp_path / "resumed", *_model(), **options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    before = torch.load(checkpoint / STATE_FILE, weights_only=True)
    trained(resumed, resume_from_checkpoint=str(checkpoint))
    found, expected = resumed.isopo.state_dict(), whole.isopo.state_dict()
    assert (before["step"], found["step"], expected["step"]) == (2, 4, 4)
    assert expected["trailing"]
    for name, mean in expected["trailing"].items():
        assert not torch.equal(before["trailing"][name], mean)
        assert torch.equal(found["trailing"][name], mean)
    pairs = zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert torch.equal(ours, theirs), name


def _model() -> tuple[nn.Module, Any]:
    tokenizer, model = tiny()
    return model, tokenizer


@pytest.mark.slow
def test_a_checkpoint_without_our_state_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {**CHECKPOINTS, "max_steps": 1}
    trainer, _ = made(OpoTrainer, tmp_path / "opo", *_model(), **options)
    trained(trainer)
    isopo, _ = made(IsopoTrainer, tmp_path / "isopo", *_model(), **(CHECKPOINTS | {"max_steps": 2}))
    with caplog.at_level("WARNING"):
        trained(isopo, resume_from_checkpoint=str(tmp_path / "opo" / "checkpoint-1"))
    assert f"{STATE_FILE} is missing" in caplog.text


@pytest.mark.parametrize(
    ("of_model", "options", "said"),
    [
        ({}, {}, "no fused one" if FusedOutput is None else "transformed in chunks"),
        ({}, {"rule": "isopo-natural"}, "transformed from all logits"),
        ({}, {"fisher": "sequences"}, "transformed from all logits"),
        ({"lora": True}, {}, "frozen"),
    ],
)
def test_the_log_says_what_becomes_of_the_head(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    of_model: dict[str, Any],
    options: dict[str, Any],
    said: str,
) -> None:
    tokenizer, model = tiny(**of_model)
    with caplog.at_level("INFO", logger="proxstep.engines.trl"):
        made(IsopoTrainer, tmp_path, model, tokenizer, **options)
    assert said in caplog.text


def test_a_head_that_bypasses_the_rule_is_an_error(tmp_path: Path) -> None:
    """As another library's fused output layer would, put in when the training begins."""

    class Replaces(TrainerCallback):
        def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
            model.forward = model.forward.__wrapped__

    trainer, _ = made(IsopoTrainer, tmp_path, *_model())
    trainer.add_callback(Replaces())
    said = "received a gradient" if FusedOutput is not None else r"saw \d+ token positions, but"
    with pytest.raises(ProxstepError, match=rf"lm_head\.weight {said}"):
        trained(trainer)


# -- two ranks -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["isopo", "opo", "isopo+kl"])
def test_two_ranks_have_the_gradient_of_one_process(tmp_path: Path, case: str) -> None:
    """Under torchrun, each rank's gradient is the local engine's on both ranks' completions."""
    script = Path(__file__).with_name("trl_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", "0", "--standalone", str(script), str(tmp_path), case]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    microbatches = [batch for rank in ranks for batch in rank["microbatches"]]
    for found in ranks:
        assert difference(found["gradients"], ranks[0]["gradients"]) <= 1e-6
        assert found["trailing"] == ranks[0]["trailing"]
        assert case != "opo" or found["scale"] < 0.5  # by the judges of both
        for name, weight in found["weights"].items():
            assert torch.equal(weight, ranks[0]["weights"][name])
    _, model = tiny(lora="kl" in case)
    changes = {} if case == "opo" else {"geometry": {"num_overlap_positions": None}}
    recipe = tiny_recipe(tmp_path / "local", case.removesuffix("+kl"), **changes)
    beta = 0.1 if "kl" in case else 0.0
    expected = local_gradients(model, recipe, microbatches, beta=beta)
    assert difference(ranks[0]["gradients"], expected) <= 1e-5
