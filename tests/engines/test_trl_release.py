"""Which releases of TRL are supported, and what the oldest lacks."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import models
from tests.engine import tiny_recipe
from tests.engines.test_trl_gradients import difference, local_gradients
from tests.engines.trl_case import copied, environment, made, tiny, trained
from tests.selection import slow
from trl.trainer.grpo_trainer import GRPOTrainer

from proxstep.config.releases import check_trl
from proxstep.engines.trl import IsopoTrainer, OpoTrainer, tables, translation
from proxstep.engines.trl.release import FusedOutput
from proxstep.errors import ProxstepError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "arithmetic-isopo.yaml"
COMMAND = ["-m", "proxstep", "train", str(RECIPE), "--engine", "trl", "--output_dir=run"]

UNTESTED = r"its trainer's insides change often: pip install \"proxstep\[trl\]\""
REFUSED = {
    "1.13.0": UNTESTED,
    "1.14.1": UNTESTED,
    "1.15.0": r"Triton alone, .*: pip install \"proxstep\[trl\]\" \(trl>=1.14.2,<1.17,!=1.15.\*\)$",
    "1.15.2": "Triton alone",
    "1.17.0": UNTESTED,
    "2.0.0": UNTESTED,
    "0.29.1": UNTESTED,
    None: r"^TRL is not installed: pip install \"proxstep\[trl\]\"",
}


@pytest.mark.parametrize("found", REFUSED)
def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr("proxstep.config.releases.version", version)
    with pytest.raises(ProxstepError, match=REFUSED[found]) as refusal:
        check_trl()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("arguments", [COMMAND, *slow(["-c", "import proxstep.engines.trl"])])
def test_a_refusal_comes_before_trl_is_imported(tmp_path: Path, arguments: list[str]) -> None:
    """In a library's import and on the command line, where TRL's own import would fail."""
    (tmp_path / "trl-1.15.0.dist-info").mkdir()
    (tmp_path / "trl-1.15.0.dist-info" / "METADATA").write_text("Name: trl\nVersion: 1.15.0\n")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise SystemError")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment(str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == (2 if arguments is COMMAND else 1)
    assert "TRL 1.15.0 is not supported" in done.stderr.splitlines()[-1]
    if arguments is COMMAND:
        assert len((done.stdout + done.stderr).splitlines()) == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("found", ["1.14.2", "1.14.3", "1.16.0", "1.16.3"])
def test_these_are_supported(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr("proxstep.config.releases.version", lambda name: found)
    check_trl()


def test_the_extra_asks_for_what_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    _, asked = settings["project"]["optional-dependencies"]["trl"]
    monkeypatch.setattr("proxstep.config.releases.version", lambda name: "0.1")
    with pytest.raises(ProxstepError) as refusal:
        check_trl()
    assert str(refusal.value).endswith(f"({asked})")


def test_an_option_that_the_release_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(tables.RENAMED, "rollout.top_k", "top_of_tomorrow")
    with pytest.raises(ProxstepError, match=r"^TRL \d.* no option top_of_tomorrow, .*-U") as found:
        translation.translate(tiny_recipe(tmp_path, "isopo"), chat=False)
    assert "\n" not in str(found.value)


# -- what the oldest lacks -------------------------------------------------------------------------


def test_adapters_on_the_output_layer(tmp_path: Path) -> None:
    """Where TRL fuses the layer it refuses them; elsewhere the rule has them as it has others."""
    tokenizer, model = tiny(tied=False)
    model = models.with_adapters(model, target_modules=["q_proj", "lm_head"])
    before, options = copied(model), {"num_overlap_positions": None}
    if FusedOutput is not None:
        with pytest.raises(ValueError, match="adapter to `lm_head`"):
            made(IsopoTrainer, tmp_path / "trl", model, tokenizer, **options)
        return
    trainer, watch = made(IsopoTrainer, tmp_path / "trl", model, tokenizer, **options)
    trained(trainer)
    assert [name for name in watch.gradients[0] if "lm_head.lora_A" in name]
    local = tiny_recipe(tmp_path / "local", "isopo", geometry=options)
    expected = local_gradients(before, local, watch.microbatches)
    assert difference(watch.gradients[0], expected) <= 1e-5


def test_scoring_again_takes_images_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that the installed release has for them."""
    tokenizer, model = tiny()
    trainer, _ = made(OpoTrainer, tmp_path, model, tokenizer, adaptive_tau=True)
    asked: dict[str, Any] = {}

    def scoring(self: Any, *args: Any, **options: Any) -> Any:
        asked.update(options)
        return torch.zeros(2, 3), None, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", scoring)
    ids_BT = torch.ones(2, 3, dtype=torch.long)
    batch = {"prompt_ids": ids_BT, "completion_ids": ids_BT, "advantages": torch.zeros(2)}
    batch |= {"prompt_mask": ids_BT, "completion_mask": ids_BT}
    images = {"pixel_values": torch.rand(2, 4), "num_images": [1, 1], "image_sizes": ids_BT}
    trainer._score_again(batch | images)
    assert {name for name in asked if name != "batch_size"} == set(images)
    assert asked["pixel_values"] is images["pixel_values"]
