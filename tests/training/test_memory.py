"""The estimate of a run's memory, against the cards that the recipes name and a run's own peak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts.make_reference import CONFIGS, recipe_estimates
from tests.engine import tiny_recipe
from tests.training.test_gguf import tiny_llama, write_gguf

from proxstep.config.loading import load_recipe
from proxstep.errors import ProxstepError
from proxstep.training.memory import config_of, estimate_memory, memory_note

ROOT = Path(__file__).parents[2]
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "smollm2": 134_515_008,
}
"""As the models' cards and files have them."""


def test_every_recipe_fits_what_it_names() -> None:
    found = list(recipe_estimates())
    assert {file for file, *_ in found} == {p.name for p in (ROOT / "recipes").glob("*.yaml")}
    for file, card, size, algorithm, estimate in found:
        assert estimate.peak < size, (file, card, algorithm)
    assert {estimate.weights for *_, estimate in found} >= {4 * n for n in PARAMETERS.values()}
    assert CONFIGS.keys() == PARAMETERS.keys()


def test_isopo_carries_positions_and_no_more_workspace_than_it_uses() -> None:
    paper = ROOT / "recipes" / "gsm8k-isopo.yaml"
    config = CONFIGS["Qwen/Qwen3-0.6B"]
    own, carried = (
        estimate_memory(load_recipe(paper, [("geometry.overlap_source", source)]), config)
        for source in ("microbatch", "previous_step")
    )
    layer = 1024 + 2048 + 2 * (1024 + 1024) + 2048 + 1024 + 3 * (1024 + 3072)
    assert carried.geometry == 4 * 2 * 32 * (28 * layer + 1024 + 151936)
    assert own.geometry == 0
    assert own.workspace < 128 * 2**20 + 4 * 1024 * 151936


MEASURED = ("isopo", "opo", "grpo:autocast")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("memory")
    words = [sys.executable, "-m", "tests.training.memory_case", str(folder), *MEASURED]
    one = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **one}, capture_output=True, text=True, check=True
    )
    rows = map(str.split, done.stdout.splitlines())
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own count")
@pytest.mark.parametrize("algorithm", MEASURED)
def test_the_estimate_is_near_what_a_run_takes(
    measured: dict[str, list[float]], algorithm: str
) -> None:
    estimated, peak = measured[algorithm]
    assert estimated == pytest.approx(peak, rel=0.15)


def test_a_gguf_file_tells_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is converted, and from the converted folder afterwards."""
    monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / "cache"))
    model = tiny_llama()
    file = write_gguf(tmp_path / "tiny.gguf", model)
    recipe = tiny_recipe(tmp_path / "run", model={"name": str(file)})
    found = config_of(recipe)
    assert not (tmp_path / "cache").exists()
    assert found.hidden_size == model.config.hidden_size
    assert estimate_memory(recipe, found).weights == 4 * model.num_parameters()
    bad = tiny_recipe(tmp_path / "run", model={"name": str(tmp_path / "none.gguf")})
    assert "not estimated, model.name" in memory_note(bad)
    monkeypatch.setattr("proxstep.training.gguf.is_kept", lambda folder: True)
    load = SimpleNamespace(from_pretrained=lambda folder, **_: folder)
    monkeypatch.setattr("transformers.AutoConfig", load)
    assert config_of(recipe).parent == tmp_path / "cache"


def test_the_hub_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("proxstep.hub.hub_answers", lambda: False)
    recipe = tiny_recipe(tmp_path, model={"name": "some/model"})
    with pytest.raises(ProxstepError, match="couldn't find them in the cached files"):
        config_of(recipe)
    assert memory_note(recipe).startswith("# memory: not estimated, no configuration of some/model")
