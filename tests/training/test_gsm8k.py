"""The real data path: GSM8K's questions, a small local model, an ordinary checkpoint."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from proxstep.cli import commands as cli

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PROXSTEP_DATA", ROOT.parent / "shared" / "data"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DATA / "gsm8k_train.jsonl").exists(), reason=f"no GSM8K in {DATA}"),
]


def make_small_model(folder: Path) -> None:
    path = ROOT / "scripts" / "make_small_model.py"
    spec = importlib.util.spec_from_file_location("make_small_model", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    torch.manual_seed(0)
    examples = list(script.gsm8k_task(DATA / "gsm8k_train.jsonl", chat=True).train)
    texts = [f"{e.prompt[0]['content']}\n{e.solution}" for e in examples]
    tokenizer = script.make_tokenizer(texts, 2048)
    model = script.make_model(tokenizer, 64, 2)
    script.train(model, tokenizer, examples, steps=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_run_on_gsm8k(tmp_path: Path) -> None:
    make_small_model(tmp_path / "small")
    run = tmp_path / "run"
    arguments = [
        *("train", str(ROOT / "recipes" / "gsm8k-isopo.yaml")),
        *("--model.name", str(tmp_path / "small")),
        *("--task.train", str(DATA / "gsm8k_train.jsonl")),
        *("--task.validation", str(DATA / "gsm8k_test.jsonl")),
        *("--task.num_validation", "8", "--evaluation.num_probe_prompts", "4"),
        *("--rollout.num_prompts", "2", "--rollout.num_generations", "4"),
        *("--rollout.max_completion_length", "32", "--steps", "2", "--output_dir", str(run)),
    ]
    assert cli.main(arguments) == 0
    (checkpoint,) = (run / "checkpoints").iterdir()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    question = "How many eggs are 3 and 4 eggs?"
    assert tokenizer.decode(tokenizer(question)["input_ids"]) == question
    assert model(**tokenizer(question, return_tensors="pt")).logits.isfinite().all()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(r["rewards/numeric_answer"] is not None for r in records[1:])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert "ducks" in samples[0]["prompt"][0]["content"]  # the first question of the test set
    assert samples[0]["answer"] == "18"
