"""Options of the geometry, its diagnostics and the chunked head in whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import Silent, records, spread_reward, tiny_recipe, weights
from tests.selection import slow
from tests.training.one_batch import one_batch

from proxstep.training import lifecycle

GEOMETRIES = {
    "carried": {"overlap_source": "previous_step"},
    "ranks": {"overlap_source": "ranks"},
    "sequences": {"fisher": "sequences"},
    "trailing": {"fisher_denominator": "trailing"},
    "small memory": {"memory_mib": 1},
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            options,
            marks=pytest.mark.slow
            if name in ("ranks", "small memory", "sequences", "carried")
            else (),
        )
        for name, options in GEOMETRIES.items()
    ],
    ids=GEOMETRIES,
)
def test_options_of_the_geometry_change_the_run(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = {"overlap_source": "microbatch", "num_overlap_positions": 20}
    if "fisher" in options:
        plain = {}
    for name, geometry in (("plain", plain), ("given", plain | options)):
        recipe = tiny_recipe(
            tmp_path / name,
            "isopo",
            task=spread_reward(tmp_path),
            update={"microbatch_size": 8},
            geometry=geometry,
        )
        assert lifecycle.train(recipe, Silent()) == "finished"
    ours, theirs = weights(tmp_path / "given"), weights(tmp_path / "plain")
    same = all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert same == ("memory_mib" in options or options.get("overlap_source") == "ranks")


@pytest.mark.parametrize("interact", ["group", *slow("microbatch")])
def test_the_natural_rule_by_prompt_does_not_depend_on_microbatches(
    tmp_path: Path, interact: str
) -> None:
    """Without a step before, c is of each microbatch: the second step's is the first's mean."""
    runs = []
    for size in (4, 8, None):
        made, batch = one_batch(
            tmp_path / str(size),
            "isopo-natural",
            task=spread_reward(tmp_path),
            update={"microbatch_size": size},
            geometry={"interact": interact},
        )
        assert made.isopo is not None
        for _ in range(2):
            made.model.zero_grad()
            made._accumulate(batch, {}, measure_entropy=False)
            made.isopo.step()
        runs.append([p.grad for p in made.model.parameters()])
    errors = [
        max(float((a - b).norm() / b.norm()) for a, b in zip(run, runs[-1], strict=True))
        for run in runs[:-1]
    ]
    assert max(errors) < 1e-3 if interact == "group" else min(errors) > 1e-2


def test_diagnostics_are_written_on_their_cadence(tmp_path: Path, capsys: Any) -> None:
    from proxstep.cli import commands as cli

    folder = tmp_path / "run"
    recipe = tiny_recipe(
        folder, "isopo", steps=3, task=spread_reward(tmp_path), geometry={"diagnose_every": 2}
    )
    assert lifecycle.train(recipe, Silent()) == "finished"
    lines = [json.loads(line) for line in (folder / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert all(layer["ntk_condition"] != 0 for line in lines for layer in line["layers"])
    first, second, third = records(folder)[1:]
    assert first["geometry/cosine_to_reinforce"] is not None
    assert third["geometry/noise_variance"] > 0
    assert "geometry/noise_variance" not in second
    assert cli.main(["diagnose", str(folder), "--step", "1"]) == 0
    assert capsys.readouterr().out.startswith("step 1\n")
    assert cli.main(["diagnose", str(folder), "--step", "2"]) == 2
    assert "was not measured" in capsys.readouterr().err


def test_diagnostics_do_not_change_the_run(tmp_path: Path) -> None:
    for every in (1, None):
        recipe = tiny_recipe(
            tmp_path / str(every),
            "isopo-figure4",
            task=spread_reward(tmp_path),
            geometry={"diagnose_every": every},
        )
        lifecycle.train(recipe, Silent())
    ours, theirs = weights(tmp_path / "1"), weights(tmp_path / "None")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize(
    "algorithm",
    [
        "isopo+opo",
        *slow("reinforce", "grpo", "isopo"),
    ],
)
def test_the_chunked_head_gives_the_same_run(tmp_path: Path, algorithm: str) -> None:
    for head in ("full", "chunked"):
        recipe = tiny_recipe(
            tmp_path / head,
            algorithm,
            steps=2,
            model={"head": head},
            task=spread_reward(tmp_path),
            update={"num_minibatches": 2},
            optimizer={"name": "sgd", "learning_rate": 0.05},
        )
        assert lifecycle.train(recipe, Silent()) == "finished"
    ours, theirs = records(tmp_path / "chunked"), records(tmp_path / "full")
    for a, b in zip(ours, theirs, strict=True):
        for name in ("score", "kl_initial_policy", "kl_policy_initial", "entropy", "grad_norm"):
            if a[name] is not None or b[name] is not None:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-6), name
