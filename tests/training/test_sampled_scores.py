"""avg@n and pass@k at evaluation, the baselines in run.json, and the waits on the way."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from tests.engine import Silent, made_trainer, records, tiny_recipe

from proxstep.runs.waiting import Wait
from proxstep.training import lifecycle
from proxstep.training.evaluation import greedy_score, sampled

NUM = 8


def test_a_run_measures_what_eval_prints(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", steps=1, evaluation={"num_samples": NUM})
    progress = Silent()
    lifecycle.train(recipe, progress)
    first, last = records(tmp_path / "run")
    names = [f"avg@{NUM}", *(f"pass@{k}" for k in (1, 2, 4, NUM))]
    assert all(f"score_{name}" in record for record in (first, last) for name in names)
    shares = ("score_clipped_ratio", "score_top_answer_share", "score_no_answer_share")
    assert all(0 <= last[name] <= 1 for name in shares)
    baselines = json.loads((tmp_path / "run" / "run.json").read_text())["baselines"]
    assert set(baselines) == {"constant", "copied", "reference", "form", "note"}
    assert baselines["constant"]["score"] > 0
    for what in ("preparing the model", "tokenizing the prompts", "baselines", "greedy evaluation"):
        assert what in progress.waits
    result, scores, _ = lifecycle.evaluate(recipe, None, Silent())
    assert result.score == first["score"]
    assert {f"score_{name}": value for name, value in scores.items()} == {
        f"score_{name}": first[f"score_{name}"] for name in names
    }


def test_samples_follow_from_the_seed_and_change_no_step(tmp_path: Path) -> None:
    made = made_trainer(tmp_path, evaluation={"num_samples": NUM, "temperature": 0.5})
    arguments = (made.recipe, made.model, made.tokenizer, made.validation)
    torch.manual_seed(1)
    first = sampled(*arguments)
    torch.rand(3)
    assert sampled(*arguments) == first
    assert first[f"avg@{NUM}"] == first["pass@1"]  # rewards of 0 and 1
    without = tiny_recipe(tmp_path / "without", steps=2)
    lifecycle.train(without, Silent())
    with_samples = tiny_recipe(tmp_path / "with", steps=2, evaluation={"num_samples": 2})
    lifecycle.train(with_samples, Silent())
    steps = [
        [record["loss"] for record in records(tmp_path / name)] for name in ("without", "with")
    ]
    assert steps[0] == steps[1]


def test_the_wait_advances_with_every_token(tmp_path: Path) -> None:
    made = made_trainer(tmp_path)
    told: list[float] = []

    class Watching(Silent):
        @contextmanager
        def wait(self, what, total=None, unit="", *, brief=False):
            wait = Wait(what, total, unit)
            wait.advance = told.append
            self.total = total
            yield wait

    watching = Watching()
    greedy_score(
        *(made.model, made.tokenizer, made.validation),
        max_new_tokens=3,
        batch_size=4,
        waits=watching,
    )
    assert watching.total == len(made.validation) == told[-1]
    assert told == sorted(told)
    assert len(told) > 4  # and not once a batch
    assert not made.model.get_input_embeddings()._forward_hooks
