"""Rewards, models and chats are checked first, which costs nothing."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from proxstep.training import demo_model
from tests.cli.command_case import REWARDS, chats, jsonl, make_run, mistake, sums, table

WRONG_REWARDS = [
    (["--task.rewards=[r.py:one]"], "reward function 'one' does not accept the data's columns"),
    (["--task.rewards=[exact_match,exact_match]"], "two reward functions are named 'exact_match'"),
    (
        ["--task.rewards=[exact_match]", "--task.reward_weights=[.nan]"],
        "reward_weights[0]: input should be a finite number, got nan",
    ),
]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("keys", "complaint"), WRONG_REWARDS)
def test_rewards_are_checked_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], keys: list[str], complaint: str
) -> None:
    Path("r.py").write_text(REWARDS)
    for command in (["train"], ["eval"], ["compare", "--algorithms=opo"]):
        assert complaint in mistake(capsys, *command, "tiny.yaml", *keys)
    assert not Path("run").exists()


@pytest.mark.usefixtures("unloaded")
def test_checks_come_before_the_warm_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo_model, "ensure_embedded_model", lambda *_: pytest.fail("it warms a model up")
    )
    make_run(Path("run"))
    make_run(Path("compared/opo-seed0"))
    Path("v.jsonl").write_text("")
    for keys in (
        [],
        ["--output_dir=x", "--device=cuda:99"],
        ["--output_dir=x", "--task.rewards=[none.py:f]"],
        ["--output_dir=tiny.yaml/x"],
    ):
        mistake(capsys, "train", "tiny.yaml", "--task.difficulty=2", *keys)
    for keys in (
        ["--output=compared"],
        ["--output=new", "--device=cuda:99"],
        ["--output=new", "--task.rewards=[none.py:f]"],
        ["--output=tiny.yaml"],
    ):
        compare = ("compare", "tiny.yaml", "--algorithms=opo", "--task.difficulty=2")
        mistake(capsys, *compare, *keys)
    for keys in (["--device=cuda:99"], ["--task.rewards=[none.py:f]"], ["--output=compared"]):
        mistake(capsys, "eval", "tiny.yaml", "--task.difficulty=2", *keys)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("where", ["train", "validation"])
def test_chats_anywhere_need_a_template(
    capsys: pytest.CaptureFixture[str], models: Path, where: str
) -> None:
    rows, more = sums(3) + chats(3), ("--task.num_validation=1",)
    if where == "validation":
        rows, more = sums(4), ("--task.validation", str(jsonl(Path("v.jsonl"), sums(1) + chats(2))))
    message = mistake(capsys, *table(models, rows, *more))
    row = {"train": "task.train row 4", "validation": "task.validation row 2"}[where]
    assert message.startswith(f"{row}: the prompt is a chat, but the model's tokenizer has no chat")


@pytest.mark.usefixtures("unloaded")
def test_a_template_that_refuses_a_chat(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    shutil.copytree(models / "plain", "strict")
    tokenizer = AutoTokenizer.from_pretrained("strict")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    tokenizer.save_pretrained("strict")
    message = mistake(capsys, *table(models, chats(4)), "--model.name=strict")
    assert message == (
        "task.train row 1: the tokenizer's chat template refuses this prompt: System role not "
        "supported"
    )


def test_no_code_of_a_model_runs(
    capsys: pytest.CaptureFixture[str], models: Path, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    shutil.copytree(models / "plain", "coded")
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    config = json.loads(Path("coded/config.json").read_text())
    config |= {"model_type": "zzz", "auto_map": own}
    Path("coded/config.json").write_text(json.dumps(config))
    Path("coded/mine.py").write_text("open('was-here', 'w')\n")
    message = mistake(capsys, *table(models, sums(4)), "--model.name", "coded")
    assert message.startswith("model.name coded: no ")
    assert not Path("was-here").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("model.safetensors", b"x" * 16),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", None),
    ],
)
def test_damaged_models_are_refused(
    capsys: pytest.CaptureFixture[str], models: Path, file: str, content: bytes | None
) -> None:
    path = Path(shutil.copytree(models / "plain", "damaged")) / file
    if file == "config.json":
        content = path.read_bytes().replace(b'"hidden_size": 128', b'"hidden_size": 64')
        assert content != path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = mistake(capsys, *table(models, sums(4)), "--model.name=damaged")
    assert "model.name" in message
    assert not Path("run").exists()
