"""Every mistake in what is typed or named is one message, before a model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command_case import chats, jsonl, mistake, sums, table


@pytest.mark.usefixtures("unloaded")
class TestMistakesOnTheCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["train"], "which recipe? Try proxstep train arithmetic"),
            (["train", "--dry-run"], "which recipe?"),
            (["train", "none.yaml"], "none.yaml: no such recipe file; proxstep recipes"),
            (["train", "."], ".: a folder, not a recipe file"),
            (["eval", "none"], "none: no such recipe file"),
            (["compare", "none.yaml", "--algorithms", "opo"], "none.yaml: no such recipe file"),
            (["train", "tiny.yaml", "more"], "'more' is not expected here; see proxstep train"),
            (["train", "tiny.yaml", "-s", "3"], "'-s' is not expected here; see proxstep train"),
            (["train", "tiny.yaml", "--steps"], "--steps has no value; recipe keys are written"),
            (["train", "tiny.yaml", "--stps", "3"], "unknown key stps; did you mean steps?"),
            (["train", "tiny.yaml", "--steps", "ten"], "steps: input should be a valid integer"),
            (
                ["train", "tiny.yaml", "--optimizer", "3"],
                "optimizer: expected keys and values, got 3",
            ),
            (
                ["train", "tiny.yaml", "--optimizer.learning_rat=1e-5"],
                "unknown key optimizer.learning_rat; did you mean learning_rate?",
            ),
            (["eval", "tiny.yaml", "--difficulty", "1"], "unknown key difficulty"),
            (["train", "tiny.yaml", "--algorithm", "grop"], "did you mean grpo?"),
            (["train", "tiny.yaml", "--algorithm", "isopo+dapo"], "geometry.rule isopo with"),
            (
                ["train", "tiny.yaml", "--rollout.num_generations", "1"],
                "rollout.num_generations is 1, but objective.advantage group-zscore",
            ),
            (
                ["train", "tiny.yaml", "--update.num_minibatches", "4"],
                "update.num_minibatches 4 does not divide",
            ),
            (
                ["train", "tiny.yaml", "--task.name", "gsm8k"],
                "model.name embedded knows only the characters of the tasks arithmetic, countdown, "
                "maxima, products, sums, not gsm8k's",
            ),
            (["train", "tiny.yaml", "--task.name=table"], "task.train is needed"),
            (["compare", "tiny.yaml", "--algorithms", "opo", "--seeds", "0"], "at least 1"),
            (["compare", "tiny.yaml", "--algorithms", ","], "needs distinct names, separated by"),
            (["compare", "tiny.yaml", "--algorithms", "opo,opo"], "needs distinct names"),
            (["compare", "tiny.yaml", "--algorithms", "opo,grop"], "did you mean grpo?"),
            (["compare", "tiny.yaml", "--algorithms=opo,isopo+grpo"], "isopo with objective grpo"),
            (
                ["report", "x", "--fig", "a.png"],
                "'--fig' is not expected here; see proxstep report",
            ),
            (
                ["report", "x", "--steps", "3"],
                "'--steps' is not expected here; see proxstep report",
            ),
            (["report", "nowhere"], "nowhere: no such folder"),
            (["report", "tiny.yaml"], "tiny.yaml: no such folder"),
            (["report", "."], ".: holds no run"),
            (
                ["train", "tiny.yaml", "--steps="],
                "steps: input should be a valid integer, got None",
            ),
            (
                ["train", "tiny.yaml", "--objective.mu=1"],
                "unknown key objective.mu; it belongs to opo, gopo (known here: ",
            ),
            (["train", "arithmtic"], "no such recipe file; did you mean arithmetic?"),
            (["train", "--dry-rn"], "--dry-rn has no value; did you mean --dry-run?"),
            (["train", "tiny.yaml", "--alpha=1"], "did you mean model.lora.alpha or objective.al"),
            (["init", "tabel"], "invalid choice: 'tabel'"),
            (["init", "table", "--output", "tiny.yaml"], "tiny.yaml is there already"),
            (["init", "table", "--output", "no/t.yaml"], "--output no/t.yaml: no is no folder"),
            (["eval", "."], ".: not a run folder, it has no recipe.yaml, nor a model's"),
            (["train", "--resume", "x", "--steps", "3"], "x: not a run folder, it has no recipe"),
            (["train", "--resume", "x", "--seed", "3"], "give nothing else but --steps"),
            (["train", "tiny.yaml", "--engine", "nccl"], "'nccl'"),
            (["train", "tiny.yaml", "--resume"], "--resume: expected one"),
            (["train", "--steps", "5", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
            (["train", "--steps", "5"], "which recipe?"),
            (["eval"], "the following arguments are required: target; see proxstep eval --help"),
            (["compare", "tiny.yaml"], "Give --algorithms a,b, or a recipe with compare.arms"),
            (["compare", "tiny.yaml", "--algorithms=opo", "--seeds"], "--seeds: expected one"),
            (["compare", "tiny.yaml", "--algorithms=opo", "--seeds", "two"], "value: 'two'; see"),
            (["compare", "tiny.yaml", "--algorithms=opo", "--jobs", "x"], "value: 'x'; see"),
            (
                ["compare", "tiny.yaml", "--algorithms=opo", "--jobs", "0"],
                "--jobs must be at least",
            ),
            (
                ["compare", "tiny.yaml", "--algorithms=opo", "--jobs=-1"],
                "--jobs must be at least 1",
            ),
            (["compare", "tiny.yaml", "--algorithms=opo", "--seed=1"], "--seed does not go with"),
            (["compare", "tiny.yaml", "--algorithms=opo", "--algorithm=dro"], "use --algorithms"),
            (["compare", "tiny.yaml", "--algorithms=opo", "--output_dir=x"], "use --output"),
            (
                ["compare", "tiny.yaml", "--algorithms=opo", "--output=tiny.yaml"],
                "is a file; choose",
            ),
            (["report"], "the following arguments are required: runs; see proxstep report --help"),
            (["trian", "tiny.yaml"], "invalid choice: 'trian'"),
            (["toy"], "the following arguments are required: toy; see proxstep toy --help"),
            (["toy", "slots", "--out", "x"], "invalid choice: 'slots'"),
            (["toy", "bandit"], "are required: --out; see proxstep toy bandit --help"),
            (["toy", "bandit", "--out", "x", "--steps", "0"], "--steps must be at least 1, got 0"),
            (["toy", "bandit", "--out", "x", "--seeds=-1"], "--seeds must be at least 1, got -1"),
            (["toy", "bandit", "--out", "x", "--steps", "ten"], "value: 'ten'; see proxstep toy"),
            (["toy", "saturation", "--out", "x", "--steps", "3"], "'--steps' is not expected here"),
            (["toy", "saturation", "--out", "tiny.yaml"], "--out tiny.yaml: tiny.yaml is a file"),
            (["toy", "bandit", "--out="], "--out: is empty; name a folder"),
            (["toy", "bandit", "--out", "tiny.yaml/x"], "--out tiny.yaml/x: tiny.yaml is a file"),
            ([], "the following arguments are required: command; see proxstep --help"),
        ],
    )
    def test_is_one_message(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
    ) -> None:
        assert complaint in mistake(capsys, *arguments)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            ("- algorithm\n", "bad.yaml: a recipe is a YAML mapping of keys to values"),
            ("algorithm: grpo\nsteps: {\nseed: 1\n", "bad.yaml, line 4: not valid YAML: "),
            ("algorithm: grpo\nsteps: 3: 4\n", "bad.yaml, line 2: not valid YAML: "),
            (b"\x7fELF\x02\x01\xff\xfe\x80", "bad.yaml: not a text file in UTF-8"),
            (b"algorithm: \x01\n", "bad.yaml: not valid YAML"),
        ],
    )
    def test_covers_files_that_are_no_recipes(
        self, capsys: pytest.CaptureFixture[str], content: str | bytes, complaint: str
    ) -> None:
        Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        for command in (["train"], ["eval"], ["compare", "--algorithms=opo"]):
            assert complaint in mistake(capsys, *command, "bad.yaml")


@pytest.mark.usefixtures("unloaded")
class TestMistakesInData:
    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("", "rows.jsonl has no rows"),
            ('{"prompt": "1+1=", "answer": "2"', "rows.jsonl, line 4: not valid JSON"),
            ("[1, 2]", "rows.jsonl, line 4: a JSON list, not an object"),
            ('{"prompt": "", "answer": "2"}', "rows.jsonl, line 4: column 'prompt' is empty"),
            ('{"promt": "1+1=", "answer": "2"}', "line 4: there is no column 'prompt'; did you"),
            ('{"prompt": "1+1=", "answer": "two"}', "line 4: the answer 'two' holds no number"),
            ('{"prompt": [], "answer": "2"}', "line 4: column 'prompt' has no messages"),
        ],
    )
    def test_are_named_with_their_line(
        self, capsys: pytest.CaptureFixture[str], models: Path, line: str, complaint: str
    ) -> None:
        path = jsonl(Path("rows.jsonl"), sums(3) if line else [])
        path.write_text(path.read_text() + line + "\n" + (path.read_text() if line else ""))
        assert complaint in mistake(capsys, *table(models, path))

    def test_cover_files_that_are_missing(
        self, capsys: pytest.CaptureFixture[str], models: Path
    ) -> None:
        assert "none.jsonl is not a file" in mistake(capsys, *table(models, Path("none.jsonl")))
        more = ("--task.validation", "gone.parquet")
        assert "gone.parquet is not a file" in mistake(capsys, *table(models, sums(4), *more))

    def test_cover_too_few_rows(self, capsys: pytest.CaptureFixture[str], models: Path) -> None:
        assert "2 validation rows cannot be held out of 2" in mistake(
            capsys, *table(models, sums(2))
        )

    def test_cover_chats_without_a_template(
        self, capsys: pytest.CaptureFixture[str], models: Path
    ) -> None:
        message = mistake(capsys, *table(models, chats(4)))
        assert message.startswith(
            "task.train row 1: the prompt is a chat, but the model's tokenizer "
        )
        assert "has no chat template: use a chat model" in message

    def test_cover_chats_of_word_problems_without_a_template(
        self, capsys: pytest.CaptureFixture[str], models: Path
    ) -> None:
        rows = [{"question": f"{i}+1", "answer": f"#### {i + 1}"} for i in range(4)]
        path = jsonl(Path("gsm.jsonl"), rows)
        keys = ("--task.name=gsm8k", "--task.num_validation=1", f"--task.train={path}")
        arithmetic_s = ("--task.difficulty=3", "--model.warmup_score=0.6")  # the defaults
        model = f"--model.name={models / 'plain'}"
        keys = (*keys, *arithmetic_s, model)
        message = mistake(capsys, "train", "tiny.yaml", *keys, "--task.prompt_format", "chat")
        assert "has no chat template: use a chat model" in message
        assert "task.prompt_format plain" in message

    def test_cover_prompts_that_are_too_long(
        self, capsys: pytest.CaptureFixture[str], models: Path
    ) -> None:
        rows = [*sums(3), {"prompt": "1+1+1+1+1=", "answer": 5}, *sums(2)]
        message = mistake(capsys, *table(models, rows, "--task.max_prompt_length", 9))
        assert message == (
            "task.train row 4: the prompt has 10 tokens, task.max_prompt_length is 9: raise it, "
            "drop the row, or set task.drop_long_prompts"
        )
        message = mistake(
            capsys,
            *table(models, sums(4), "--task.max_prompt_length=9"),
            f"--task.validation={jsonl(Path('v.jsonl'), rows[3:])}",
        )
        assert message.startswith("task.validation row 1: the prompt has 10 tokens")


@pytest.mark.usefixtures("unloaded")
class TestMistakesInWhatARecipeNames:
    @pytest.mark.parametrize(
        ("rewards", "complaint"),
        [
            ("[none.py:f]", "reward 'none.py:f': the file none.py does not exist; check the path"),
            ("[rewards.py:lenght]", "has no function 'lenght'; did you mean length?"),
            ("[rewards.py:LIMIT]", "reward 'rewards.py:LIMIT' is a int"),
            ("[broken.py:f]", "cannot import broken.py (expected ':'"),
            ("[exact_mtch]", "is unknown; did you mean exact_match?"),
            ("[no_such_package.rewards:f]", "cannot import 'no_such_package.rewards'"),
            ("[':f']", "is incomplete; write FILE.py:FUNCTION"),
        ],
    )
    def test_rewards(
        self, capsys: pytest.CaptureFixture[str], models: Path, rewards: str, complaint: str
    ) -> None:
        Path("rewards.py").write_text(
            "LIMIT = 3\ndef length(prompts, completions, **columns):\n    return [0] * 4\n"
        )
        Path("broken.py").write_text("def f(x)\n    return 1\n")
        message = mistake(capsys, *table(models, sums(4), "--task.rewards", rewards))
        assert complaint in message

    @pytest.mark.parametrize(
        ("device", "complaint"),
        [
            ("cuda:99", "device cuda:99 is not available here; use auto or cpu"),
            ("meta", "device meta is not available here"),
            ("gpu", "device 'gpu' is not one of auto, cpu, cuda, cuda:N, mps"),
        ],
    )
    def test_devices(self, capsys: pytest.CaptureFixture[str], device: str, complaint: str) -> None:
        assert complaint in mistake(capsys, "train", "tiny.yaml", "--device", device)
        assert complaint in mistake(capsys, "eval", "tiny.yaml", "--device", device)

    @pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
    def test_trackers(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tracker: str
    ) -> None:
        module = "torch.utils.tensorboard" if tracker == "tensorboard" else tracker
        monkeypatch.setitem(sys.modules, module, None)
        message = mistake(capsys, "train", "tiny.yaml", "--logging.tracker", tracker)
        assert message == (
            f"logging.tracker {tracker} is not installed: pip install {tracker}, or set "
            "logging.tracker to none"
        )
        assert not Path("run").exists()

    def test_models(self, capsys: pytest.CaptureFixture[str], models: Path) -> None:
        def with_model(name: Any) -> str:
            keys = table(models, sums(4), "--model.name", name)
            return mistake(capsys, *keys)

        Path("empty").mkdir()
        for folder in ("empty", "./none", "no/such/folder"):
            expected = f"model.name {folder}: no config.json there; give a folder that save_pretr"
            assert with_model(folder).startswith(expected)
        message = with_model("nobody/nothing-of-that-name")
        assert message.startswith("model.name nobody/nothing-of-that-name: no tokenizer could be")
        assert message.endswith("check the name and the network, or give a local folder")
        assert "has no end-of-sequence token" in with_model(models / "endless")


@pytest.mark.parametrize(
    ("model", "keys", "complaint"),
    [
        ("plain", ["--model.lora.target_modules", "[zzz]"], "model.lora: Target modules {'zzz'}"),
        ("plain", ["--model.lora.target_modules", "zzz"], "model.lora: Target modules zzz not"),
        ("headless", [], "no causal language model could be loaded"),
        ("encoder", [], "no causal language model could be loaded"),
    ],
)
def test_what_only_the_model_itself_can_tell(
    capsys: pytest.CaptureFixture[str], models: Path, model: str, keys: list[str], complaint: str
) -> None:
    assert complaint in mistake(capsys, *table(models, sums(4), *keys, model=model))
    assert not Path("run").exists()
