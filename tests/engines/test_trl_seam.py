"""The patch that docs/upstream proposes to TRL: it applies, changes nothing, and suffices."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trl
from tests.engines.test_trl_gradients import difference
from tests.engines.trl_case import copied, made, tiny, trained
from tests.selection import slow
from trl.trainer import grpo_trainer

from proxstep import IsometricRule, Isopo, sequence_ids
from proxstep.engines.trl import IsopoTrainer
from proxstep.engines.trl.scoring import transform_head

PAGE = Path(__file__).parents[2] / "docs" / "upstream" / "trl-per-sequence-hook.md"
RELEASE = "1.16.0"
MODULE = "trl.trainer.grpo_trainer_with_seam"
GEOMETRY: dict[str, Any] = {"num_overlap_positions": None, "damping": 0.0, "scale": "paper"}

pytestmark = pytest.mark.skipif(
    trl.__version__ != RELEASE, reason=f"the patch is against TRL {RELEASE}"
)


def block(language: str) -> str:
    """The page's one block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The installed module with the patch, under another name."""
    folder = tmp_path_factory.mktemp("trl")
    file = folder / "trl" / "trainer" / "grpo_trainer.py"
    file.parent.mkdir(parents=True)
    shutil.copy(grpo_trainer.__file__, file)
    (folder / "seam.diff").write_text(block("diff"), encoding="utf-8")
    subprocess.run(["git", "apply", "--verbose", "seam.diff"], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location(MODULE, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[MODULE]


def test_the_patch_only_adds() -> None:
    lines = block("diff").splitlines()[2:]
    assert not [line for line in lines if line.startswith("-")]
    assert len([line for line in lines if line.startswith("+")]) == 10


KL = {"loss_type": "dapo", "beta": 0.1, "entropy_coef": 0.01, "max_steps": 2}


@pytest.mark.parametrize("options", [KL, *slow({"loss_type": "grpo"}, {"loss_type": "cispo"})])
def test_the_default_is_unchanged_to_the_bit(
    patched: ModuleType, tmp_path: Path, options: dict[str, Any]
) -> None:
    watches = []
    for name, trainer_class in (
        ("own", grpo_trainer.GRPOTrainer),
        ("patched", patched.GRPOTrainer),
    ):
        tokenizer, model = tiny(lora="beta" in options)
        trainer, watch = made(trainer_class, tmp_path / name, model, tokenizer, **options)
        trained(trainer)
        watches.append(watch)
    own, other = watches
    assert own.weights
    for a, b in zip(own.weights, other.weights, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(own.logs, other.logs, strict=True):
        assert a.keys() == b.keys()
        assert {k: v for k, v in a.items() if not _is_time(k)} == {
            k: v for k, v in b.items() if not _is_time(k)
        }


def _is_time(key: str) -> bool:
    return "time" in key or "per_second" in key or key == "train_runtime"


def seam_trainer(patched: ModuleType) -> Any:
    """The page's class."""
    names = {"GRPOTrainer": patched.GRPOTrainer, "torch": torch, "sequence_ids": sequence_ids}
    exec(block("py"), names)
    return names["SeamTrainer"]


@pytest.mark.parametrize("tied", [True, *slow(False)])
def test_isopo_through_the_seam(patched: ModuleType, tmp_path: Path, tied: bool) -> None:
    tokenizer, model = tiny(tied=tied)
    twin = copied(model)
    options = {**GEOMETRY, "rule": "isopo"}
    trainer, ours = made(IsopoTrainer, tmp_path / "ours", model, tokenizer, **options)
    trained(trainer)
    trainer, seam = made(seam_trainer(patched), tmp_path / "seam", twin, tokenizer)
    rule = IsometricRule(damping=0.0, scale="paper")
    trainer.isopo = Isopo(trainer.model, rule, num_overlap_positions=None)
    transform_head(trainer.model, trainer.temperature, needs_full=False)
    trained(trainer)
    assert len(ours.gradients) == len(seam.gradients) == 1
    assert any(gradient.abs().max() > 1e-3 for gradient in ours.gradients[0].values())
    assert difference(seam.gradients[0], ours.gradients[0]) <= 1e-5


def test_the_method_is_on_the_path(patched: ModuleType, tmp_path: Path) -> None:
    class Doubled(patched.GRPOTrainer):
        def _compute_loss_from_logps(self, *scores: Any) -> Any:
            return 2 * super()._compute_loss_from_logps(*scores)

    gradients = []
    for trainer_class in (patched.GRPOTrainer, Doubled):
        tokenizer, model = tiny()
        trainer, watch = made(trainer_class, tmp_path / trainer_class.__name__, model, tokenizer)
        trained(trainer)
        gradients.append(watch.gradients[0])
    plain, doubled = gradients
    assert all(torch.allclose(2 * plain[name], doubled[name], atol=1e-7) for name in plain)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())
