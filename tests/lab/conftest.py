import json
from pathlib import Path

import pytest
import yaml

INFO = {
    "status": "finished",
    "proxstep_version": "0.1.0",
    "torch_version": "2.13.0",
    "transformers_version": "5.2.0",
    "machine": "CPU, 2 cores",
    "started": "2026-11-21T01:32:11",
    "num_parameters": 812345,
}


def two_evaluations(seed: int) -> list[dict]:
    """Six steps with numbers that are easy to follow by hand."""
    start = {"step": 0, "score": 0.25, "kl_initial_policy": 0.0, "seconds_step": 100.0}
    steps = [
        {
            "step": step,
            "reward": step / 10,
            "score": None,
            "kl_policy_initial": step / 100,
            "kl_initial_policy": step / 200,
            "entropy": 1 - step / 10,
            "grad_norm": 2.0 * step,
            "grad_response_efficiency": 0.5,
            "seconds_step": 50.0 if step == 1 else 2.0,
        }
        for step in range(1, 7)
    ]
    steps[-1]["score"] = 0.5 + seed / 10
    return [start, *steps]


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder below `tmp_path` and returns its path."""

    def make(
        algorithm: str = "isopo",
        seed: int = 0,
        records: list[dict] | None = None,
        recipe: dict | None = None,
        info: dict | None = None,
        samples: list[dict] | None = None,
        name: str | None = None,
    ) -> Path:
        folder = tmp_path / (name or f"{algorithm}-{seed}")
        folder.mkdir(parents=True)
        settings = {
            "algorithm": algorithm,
            "seed": seed,
            "steps": 6,
            "output_dir": str(folder),
            "task": {"name": "arithmetic"},
            "model": {"name": "small"},
            "optimizer": {"learning_rate": 0.001},
            "geometry": {"name": algorithm},
            **(recipe or {}),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
        (folder / "run.json").write_text(json.dumps({**INFO, **(info or {})}))
        write_lines(folder / "metrics.jsonl", two_evaluations(seed) if records is None else records)
        if samples is not None:
            write_lines(folder / "samples.jsonl", samples)
        return folder

    return make


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
