"""The supervised warm-up on a task's solutions, and greedy completions kept between runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine import Silent, records, tiny_recipe

from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.tasks import Example
from proxstep.training import evaluation, lifecycle, warmup
from proxstep.training.demo_model import solution_loss
from proxstep.training.models import load_model, load_tokenizer
from proxstep.training.source import model_source


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's folder, and a cache of the test's own."""
    folder = model_source(tiny_recipe(tmp_path / "unused"), print)
    monkeypatch.setenv("PROXSTEP_CACHE", str(tmp_path / "cache"))
    return folder


def warm_recipe(folder: Path, source: str, **model: float | str | None) -> Recipe:
    keys = {"name": source, "warmup_solutions": 80, "warmup_learning_rate": 1e-3, **model}
    return tiny_recipe(folder, model=keys)


def test_the_warm_up_lowers_the_loss_once(source: str, tmp_path: Path) -> None:
    recipe, notes = warm_recipe(tmp_path / "run", source), []
    warm = Path(model_source(recipe, notes.append))
    record = json.loads((warm / warmup.RECORD).read_text())
    assert len(record["losses"]) == 5
    assert record["losses"][-1] < record["losses"][0]
    assert record["num_solutions"] == 80
    assert notes[0].startswith("supervised warm-up of")
    assert "80 solutions" in notes[0]
    assert len(notes) == 6
    weights = [load_file(Path(f) / "model.safetensors") for f in (source, warm)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert model_source(recipe, pytest.fail) == str(warm)


def test_another_warm_up_is_another_model(source: str, tmp_path: Path) -> None:
    changes = (
        *({}, {"warmup_solutions": 16}, {"warmup_learning_rate": 1e-4}),
        {"autocast": "bfloat16"},
    )
    folders = {model_source(warm_recipe(tmp_path / "run", source, **c), print) for c in changes}
    assert len(folders) == 4


def test_the_warm_up_computes_under_autocast(source: str, tmp_path: Path) -> None:
    recipe = warm_recipe(tmp_path / "run", source, autocast="bfloat16", warmup_solutions=16)
    losses = []
    for kind in (None, "bfloat16"):
        section = recipe.model.model_copy(update={"autocast": kind})
        warm = model_source(recipe.model_copy(update={"model": section}), print)
        losses += json.loads((Path(warm) / warmup.RECORD).read_text())["losses"]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_the_gradient_in_parts_is_that_of_the_mean(source: str, tmp_path: Path) -> None:
    """With solutions of different lengths, so that a mean of means would be another one."""
    recipe = warm_recipe(tmp_path / "run", source)
    tokenizer, model = load_tokenizer(source), load_model(source, "float64", torch.device("cpu"))
    examples = [Example("1+1=", str(10**n), solution=str(10**n)) for n in range(6)]
    loss = warmup._backward(recipe, model, tokenizer, examples)
    parts = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = solution_loss(model, tokenizer, examples)
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-6)  # the sum of each part is in float32
    for part, parameter in zip(parts, model.parameters(), strict=True):
        torch.testing.assert_close(part, parameter.grad, rtol=1e-5, atol=1e-7)


def test_more_solutions_than_there_are(source: str, tmp_path: Path) -> None:
    recipe = warm_recipe(tmp_path / "run", source, warmup_solutions=100_001)
    with pytest.raises(ProxstepError, match="there are 100000 training examples"):
        model_source(recipe, print)


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each time that an evaluation computes its completions."""
    times: list[int] = []
    complete = evaluation._completed

    def counted(*arguments: object, **options: object) -> object:
        times.append(1)
        return complete(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "_completed", counted)
    return times


def test_a_comparisons_runs_begin_with_one_evaluation(
    source: str, tmp_path: Path, completed: list[int]
) -> None:
    scores = []
    for seed, remember in enumerate((True, True, False)):
        changes = {"seed": seed, "evaluation": {"every": 3, "remember_first": remember}}
        recipe = tiny_recipe(tmp_path / f"run{seed}", model={"name": source}, **changes)
        lifecycle.train(recipe, Silent())
        first = records(tmp_path / f"run{seed}")[0]
        scores.append({key: value for key, value in first.items() if key.startswith("score")})
        samples = (tmp_path / f"run{seed}" / "samples.jsonl").read_text().splitlines()
        scores[-1]["samples"] = samples[:4]
    assert scores[0] == scores[1] == scores[2]
    assert len(completed) == 2 + 1 + 2  # before and after; after alone; before and after


@pytest.mark.parametrize("other", ["autocast", "end tokens"])
def test_completions_that_were_computed_otherwise_are_not_recalled(
    source: str, tmp_path: Path, other: str, completed: list[int]
) -> None:
    for run, autocast in enumerate((None, "bfloat16" if other == "autocast" else None)):
        recipe = tiny_recipe(
            tmp_path / f"run{run}",
            model={"name": source, "autocast": autocast},
            evaluation={"every": 3, "remember_first": True},
        )
        lifecycle.train(recipe, Silent())
        if other == "end tokens":
            file = Path(source) / "generation_config.json"
            held = json.loads(file.read_text())
            file.write_text(json.dumps(held | {"eos_token_id": [1, 2, 3]}))
    assert len(completed) == 2 + 2


def test_a_damaged_memory_is_none(source: str, tmp_path: Path) -> None:
    for seed in range(2):
        recipe = tiny_recipe(
            tmp_path / f"run{seed}",
            model={"name": source},
            evaluation={"every": 3, "remember_first": True},
        )
        lifecycle.train(recipe, Silent())
        for file in (tmp_path / "cache" / "greedy").iterdir():
            file.write_text("{")
    first, second = (records(tmp_path / f"run{seed}") for seed in range(2))
    assert [r["score"] for r in first] == [r["score"] for r in second]
