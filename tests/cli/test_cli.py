"""The command line: every mistake is one message before a model is loaded, and what works works."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.config.test_recipes import leaves
from transformers import AutoTokenizer

from proxstep.cli import commands as cli
from proxstep.config.explain import OBJECTIVES
from proxstep.config.loading import load_recipe
from proxstep.config.recipe import ALGORITHMS
from proxstep.runs.checkpoint import STATE_FILE, latest_checkpoint
from proxstep.runs.folder import RunFolder
from proxstep.runs.interrupt import StopRequest
from proxstep.training import demo_model, lifecycle
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.models import quiet_transformers

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
COMMANDS = ("train", "eval", "compare", "report")
TINY = """\
algorithm: reinforce
steps: 2
output_dir: run
device: cpu
model: {name: embedded, warmup_score: 0.0}
task: {name: arithmetic, difficulty: 1, num_validation: 4}
rollout: {num_prompts: 2, num_generations: 2, max_completion_length: 3}
evaluation: {num_probe_prompts: 2}
"""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local models over arithmetic's characters: with a chat template, without, without an end."""
    quiet_transformers()
    folder = tmp_path_factory.mktemp("models")
    for name in ("plain", "chat", "endless", "headless", "encoder"):
        tokenizer, model = build_embedded_model()
        if name == "chat":
            tokenizer.chat_template = TEMPLATE
        if name == "endless":
            tokenizer.eos_token = None
        tokenizer.save_pretrained(folder / name)
        model.config.save_pretrained(folder / name)
        if name in ("plain", "chat"):
            model.save_pretrained(folder / name)  # type: ignore[operator]
        if name == "encoder":
            (folder / name / "config.json").write_text('{"model_type": "t5"}')
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Work in an empty folder that holds tiny.yaml, a recipe of two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROXSTEP_CACHE", str(cache))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test where a model is loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail(f"load_model was called with {arguments} {options}")

    monkeypatch.setattr(lifecycle, "load_model", refuse)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that succeeds and return what it printed."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def mistake(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Run a command that is refused and return its one message."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err.removeprefix("error: ").rstrip("\n")


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(
    models: Path, rows: list[Any] | Path, *more: Any, model: str = "plain"
) -> tuple[Any, ...]:
    """Arguments of a run on rows of one's own."""
    if isinstance(rows, list):
        rows = jsonl(Path("rows.jsonl"), rows)
    keys = {
        "task.name": "table",
        "task.train": rows,
        "task.num_validation": 2,
        "model.name": models / model,
    }
    return ("train", "tiny.yaml", *(f"--{key}={value}" for key, value in keys.items()), *more)


def sums(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(number)]


def chats(number: int) -> list[dict[str, Any]]:
    return [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in sums(number)]


# Mistakes in what is typed


@pytest.mark.usefixtures("unloaded")
class TestMistakesOnTheCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["train"], "which recipe? Try proxstep train recipes/arithmetic.yaml"),
            (["train", "--dry-run"], "which recipe?"),
            (["train", "none.yaml"], "none.yaml: no such recipe file; recipes/ has examples"),
            (["train", "."], ".: no such recipe file"),
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
                "model.name embedded knows only arithmetic's characters, not gsm8k's",
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
                "unknown key objective.mu (known here: ad",
            ),
            (["train", "tiny.yaml", "--engine", "nccl"], "'nccl'"),
            (["train", "tiny.yaml", "--resume"], "--resume: expected one"),
            (["train", "--steps", "5", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
            (["train", "--steps", "5"], "which recipe?"),
            (["eval"], "the following arguments are required: target; see proxstep eval --help"),
            (["compare", "tiny.yaml"], "are required: --algorithms; see proxstep compare --help"),
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


# Mistakes in what a recipe names


@pytest.mark.usefixtures("unloaded")
class TestMistakesInData:
    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("", "rows.jsonl has no rows"),
            ('{"prompt": "1+1=", "answer": "2"', "rows.jsonl, line 4: not valid JSON"),
            ("[1, 2]", "rows.jsonl, line 4: a JSON list, not an object"),
            ('{"prompt": "", "answer": "2"}', "rows.jsonl, line 4: column 'prompt' is empty"),
            ('{"promt": "1+1=", "answer": "2"}', "line 4: there is no column 'prompt' (did you"),
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
        model = f"--model.name={models / 'plain'}"
        message = mistake(
            capsys, "train", "tiny.yaml", *keys, model, "--task.prompt_format", "chat"
        )
        assert "has no chat template: use a chat model" in message
        assert "task.prompt_format plain" in message

    def test_cover_prompts_that_are_too_long(
        self, capsys: pytest.CaptureFixture[str], models: Path
    ) -> None:
        rows = [*sums(3), {"prompt": "1+1+1+1+1=", "answer": 5}, *sums(2)]
        message = mistake(capsys, *table(models, rows, "--task.max_prompt_length", 9))
        assert message == (
            "task.train row 4: the prompt has 10 tokens, task.max_prompt_length is 9: raise it, or "
            "drop the row"
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
            ("[rewards.py:lenght]", "has no function 'lenght' (did you mean 'length'?)"),
            ("[rewards.py:LIMIT]", "reward 'rewards.py:LIMIT' is a int"),
            ("[broken.py:f]", "cannot import broken.py (expected ':'"),
            ("[exact_mtch]", "is unknown (did you mean 'exact_match'?)"),
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


# Output folders


@pytest.mark.usefixtures("unloaded")
class TestOutputFolders:
    def test_that_hold_other_files_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("run").mkdir()
        Path("run/notes.txt").write_text("mine")
        for more in ((), ("--overwrite",)):
            message = mistake(capsys, "train", "tiny.yaml", *more)
            assert message == "output_dir run holds files that are no run: choose another folder"
        assert Path("run/notes.txt").read_text() == "mine"

    def test_that_are_files_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        for path in ("tiny.yaml", "tiny.yaml/x"):
            for more in ((), ("--overwrite",)):
                message = mistake(capsys, "train", "tiny.yaml", "--output_dir", path, *more)
                assert message == f"output_dir {path}: tiny.yaml is a file; choose another folder"
        assert Path("tiny.yaml").read_text() == TINY

    def test_that_hold_a_run_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(Path("run"))
        message = mistake(capsys, "train", "tiny.yaml")
        assert message == (
            "output_dir run already holds a run: choose another, continue it with --resume, or "
            "delete it with --overwrite"
        )
        make_run(Path("compared/opo-seed0"))
        keys = ("--algorithms=opo", "--output=compared")
        message = mistake(capsys, "compare", "tiny.yaml", *keys)
        assert message.startswith("output compared already holds 1 run")
        assert Path("compared/opo-seed0/run.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--resume", "nowhere"], "nowhere: not a run folder, it has no recipe.yaml"),
            (["--resume", "tiny.yaml"], "tiny.yaml: not a run folder, it has no recipe.yaml"),
            (["--resume", "run"], "run: no checkpoint there; a run writes one when it ends or is"),
            (["tiny.yaml", "--resume", "run"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--steps=9"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--steps", "9"], "continues a run by its own recipe: give"),
            (["--resume", "run", "--dry-run"], "continues a run by its own recipe: give nothing"),
            (["--resume", "run", "--overwrite"], "continues a run by its own recipe: give nothing"),
        ],
    )
    def test_that_cannot_be_resumed(
        self, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
    ) -> None:
        make_run(Path("run"))
        assert complaint in mistake(capsys, "train", *arguments)

    def test_with_a_damaged_state_cannot_be_resumed(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make_run(Path("run"))
        state = Path("run/checkpoints/step-000001") / STATE_FILE
        state.parent.mkdir(parents=True)
        state.write_bytes(b"PK\x03\x04 and then nothing")
        assert f"{state}: cannot be read" in mistake(capsys, "train", "--resume", "run")

    def test_that_cannot_be_evaluated(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("folder").mkdir()
        assert "folder: not a run folder" in mistake(capsys, "eval", "folder")
        make_run(Path("run"))
        assert "run: no checkpoint there" in mistake(capsys, "eval", "run")
        assert "unknown key x" in mistake(capsys, "eval", "run", "--x", "3")
        make_run(Path("run"), recipe="algorithm: [")
        assert "run/recipe.yaml, line" in mistake(capsys, "eval", "run")

    def test_that_cannot_be_reported(self, capsys: pytest.CaptureFixture[str]) -> None:
        make_run(Path("run"))
        Path("run/metrics.jsonl").write_text("")
        assert "run/metrics.jsonl: no step yet" in mistake(capsys, "report", "run")
        Path("run/run.json").write_text("{")
        assert "run/run.json: not valid JSON" in mistake(capsys, "report", "run")


def make_run(path: Path, recipe: str = f"{TINY}seed: 0\n") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(recipe)
    RunFolder(path).update_info(status="running")


# What works


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "isopo+opo"])
def test_a_dry_run_prints_the_recipe_and_touches_nothing(
    capsys: pytest.CaptureFixture[str], here: Path, algorithm: str
) -> None:
    overrides = [("algorithm", algorithm), ("optimizer.learning_rate", "1e-6"), ("seed", "7")]
    words = [word for key, value in overrides for word in (f"--{key}", value)]
    printed = run(capsys, "train", "tiny.yaml", "--dry-run", *words)
    assert sorted(path.name for path in here.iterdir()) == ["tiny.yaml"]
    Path("printed.yaml").write_text(printed)
    assert load_recipe("printed.yaml") == load_recipe("tiny.yaml", overrides)
    assert run(capsys, "train", "printed.yaml", "--dry-run") == printed


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_passes_a_dry_run_from_anywhere(
    capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    printed = run(capsys, "train", path, "--dry-run")
    assert yaml.safe_load(printed)["algorithm"] == load_recipe(path).algorithm
    for line in path.read_text().splitlines():  # the examples in the comments name real keys
        words = line.lstrip("# ").rstrip("\\").split()
        keys = [word[2:] for word in words if word.startswith("--") and "." in word]
        known = set(leaves(load_recipe(path).model_dump()))
        assert set(keys) <= known, line


def test_keys_lists_every_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    printed = run(capsys, "train", "--keys")
    lines = [line for line in printed.splitlines() if line.startswith("--")]
    listed = {line.split()[0].removeprefix("--") for line in lines}
    assert all(re.search(r"  \(.+; default .+\)$", line) for line in lines)
    assert "--steps  (int; default 100)\n    Rollout steps.\n" in printed
    assert "--objective.mu (opo)  (float | auto; default 1.0)\n" in printed
    for objective in OBJECTIVES:
        recipe = load_recipe("tiny.yaml", [("algorithm", objective)])
        assert set(leaves(recipe.model_dump())) - {"objective.name"} <= listed


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert f"examples:\n  proxstep {command} " in out
    assert ("--objective.alpha 0.2" in out) == (command != "report")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, expected in (
        ("--help", "{train,eval,compare,diagnose,report,toy}"),
        ("--version", "proxst"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([argument])
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_a_missing_package_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "pydantic" else find(name)
    )
    message = mistake(capsys, "train", "tiny.yaml")
    assert message == 'pydantic is missing: pip install "proxstep[train]"'


def test_train_eval_report_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "train", "tiny.yaml", "--logging.tracker=tensorboard")
    assert printed.endswith("done: run\n")
    assert "\x1b" not in printed
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("step")] == [
        ["step", str(step)] for step in (0, 1, 2)
    ]
    assert json.loads(Path("run/run.json").read_text())["status"] == "finished"
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert latest_checkpoint(Path("run")).name == "step-000002"
    assert list(Path("run").glob("events.out.tfevents.*"))
    recipe = load_recipe("tiny.yaml", [("logging.tracker", "tensorboard")])
    assert load_recipe("run/recipe.yaml") == recipe

    assert mistake(capsys, "train", "--resume", "run") == (
        "run: the run is finished, at step 2 of 2"
    )

    printed = run(capsys, "eval", "run", "--output", "scored.jsonl")
    assert printed.startswith("greedy score 0.")
    assert "on 4 prompts of arithmetic" in printed
    assert printed.endswith("run/checkpoints/step-000002\n")
    rows = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion", "answer", "reward"}] * 4

    printed = run(capsys, "eval", "tiny.yaml", "--task.num_validation", "3")
    assert "on 3 prompts of arithmetic" in printed
    assert printed.endswith("embedded\n")

    printed = run(capsys, "report", "run", "--output", "pages/run.html", "--figure", "new/a.svg")
    assert "reinforce" in printed
    assert "report: pages/run.html" in printed
    assert Path("pages/run.html").read_text().startswith("<!doctype html")
    assert "<svg" in Path("new/a.svg").read_text()

    before = Path("run/run.json").read_bytes()
    assert "already holds a run" in mistake(capsys, "train", "tiny.yaml")
    assert Path("run/run.json").read_bytes() == before
    run(capsys, "train", "tiny.yaml", "--overwrite", "--algorithm=isopo", "--steps=1")
    assert latest_checkpoint(Path("run")).name == "step-000001"
    assert not list(Path("run").glob("events.out.tfevents.*"))
    assert load_recipe("run/recipe.yaml").algorithm == "isopo"


def test_chats_go_through_the_template(capsys: pytest.CaptureFixture[str], models: Path) -> None:
    run(capsys, *table(models, chats(4), "--steps=1", model="chat"))
    sample = json.loads(Path("run/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == [{"role": "user", "content": "2+1="}]


def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as interrupted:
        interrupted.setattr(StopRequest, "made", True)
        assert cli.main(["train", "tiny.yaml"]) == 130
    out, err = capsys.readouterr()
    advice = "interrupted; the run is complete up to here: proxstep train --resume run"
    assert (out.splitlines()[-1], err) == (advice, "")
    assert json.loads(Path("run/run.json").read_text())["status"] == "interrupted"
    assert run(capsys, "train", "--resume", "run").endswith("done: run\n")
    assert latest_checkpoint(Path("run")).name == "step-000002"


def test_a_second_ctrl_c_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "train", stop)
    assert cli.main(["train", "tiny.yaml"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_first_warm_up_is_announced_and_the_only_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    scores = []

    def warm_up(model: Any, tokenizer: Any, difficulty: int, score: float, note: Any) -> None:
        scores.append((difficulty, score))
        note("warm-up step 25: 30% of the answers are right or careless")

    monkeypatch.setattr(demo_model, "warm_up", warm_up)
    monkeypatch.setenv("PROXSTEP_CACHE", str(here / "cache"))
    keys = ("--model.warmup_score=0.3", "--steps=1")
    first = run(capsys, "train", "tiny.yaml", *keys).splitlines()
    assert first[:3] == [
        "warming the embedded model up for difficulty 1, once, to 30%",
        "warm-up step 25: 30% of the answers are right or careless",
        "reinforce on arithmetic, 1 steps",
    ]
    second = run(capsys, "train", "tiny.yaml", "--overwrite", *keys).splitlines()
    assert second[0] == first[2]
    assert scores == [(1, 0.3)]


# Mistakes are found first, and cost nothing


REWARDS = """\
def one(x):
    return [1.0]


def good(prompts, completions, **columns):
    return [0.5] * len(completions)
"""
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


@pytest.mark.parametrize(
    "keys",
    [
        ["--task.rewards=[r.py:one]"],
        ["--device=cuda:99"],
        ["--model.name=./none"],
        ["--model.lora.target_modules=[zzz]"],
    ],
)
def test_overwriting_keeps_the_old_run_until_the_new_one_can_begin(
    capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    run(capsys, "train", "tiny.yaml")
    Path("r.py").write_text(REWARDS)
    held = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    mistake(capsys, "train", "tiny.yaml", "--overwrite", *keys)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == held
    assert latest_checkpoint(Path("run")).name == "step-000002"


@pytest.mark.parametrize("keys", [["--task.rewards=[r.py:one]"], ["--device=cuda:99"]])
def test_comparing_again_keeps_the_old_runs_until_the_new_ones_can_begin(
    capsys: pytest.CaptureFixture[str], keys: list[str]
) -> None:
    make_run(Path("compared/opo-seed0"))
    Path("r.py").write_text(REWARDS)
    again = ("--algorithms=opo", "--output=compared", "--overwrite")
    mistake(capsys, "compare", "tiny.yaml", *again, *keys)
    assert Path("compared/opo-seed0/run.json").exists()


def test_overwriting_follows_a_link_and_leaves_it(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("elsewhere"))
    Path("elsewhere/notes.txt").write_text("mine")
    Path("link").symlink_to("elsewhere")
    assert "link already holds a run" in mistake(capsys, "train", "tiny.yaml", "--output_dir=link")
    run(capsys, "train", "tiny.yaml", "--output_dir=link", "--overwrite")
    assert Path("link").is_symlink()
    assert latest_checkpoint(Path("elsewhere")).name == "step-000002"
    assert Path("elsewhere/notes.txt").read_text() == "mine"


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


def test_a_checkpoint_brings_its_own_tokenizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "train", "tiny.yaml")
    monkeypatch.setattr(
        demo_model, "ensure_embedded_model", lambda *_: pytest.fail("it warms a model up")
    )
    printed = run(capsys, "eval", "run", "--task.difficulty=2")
    assert printed.endswith("run/checkpoints/step-000002\n")


@pytest.mark.parametrize("state", [[1], {"step": 1}])
def test_a_state_of_something_else_cannot_be_resumed(
    capsys: pytest.CaptureFixture[str], state: Any
) -> None:
    make_run(Path("run"))
    path = Path("run/checkpoints/step-000002") / STATE_FILE
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    assert f"{path}: cannot be read" in mistake(capsys, "train", "--resume", "run")


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


# Where results are written


@pytest.mark.usefixtures("unloaded")
def test_a_scored_file_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for output, complaint in (
        ("folder", "--output folder is a folder; name a file"),
        ("tiny.yaml/x.jsonl", "--output tiny.yaml: tiny.yaml is a file"),
    ):
        assert complaint in mistake(capsys, "eval", "tiny.yaml", "--output", output)


def test_a_scored_file_gets_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "eval", "tiny.yaml", "--output", "new/deep/scored.jsonl")
    assert len(Path("new/deep/scored.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (["--figure=x.foo"], "--figure x.foo must end in one of .png, .svg, .pdf"),
        (["--figure=x"], "--figure x must end in one of"),
        (["--figure=tiny.yaml/x.png"], "tiny.yaml is a file"),
        (["--output=tiny.yaml/x.html"], "tiny.yaml is a file"),
        (["--output=folder"], "--output folder is a folder; name a file"),
    ],
)
def test_a_page_and_a_figure_need_a_place(
    capsys: pytest.CaptureFixture[str], keys: list[str], complaint: str
) -> None:
    make_run(Path("run"))
    Path("folder").mkdir()
    assert complaint in mistake(capsys, "report", "run", *keys)
    assert not Path("report.html").exists()
    if keys[0].startswith("--figure"):
        new = ("--algorithms=opo", "--output=new")
        assert complaint in mistake(capsys, "compare", "tiny.yaml", *new, *keys)
        assert not Path("new").exists()


def test_one_gpu_runs_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("proxstep.lab.compare.run_jobs", lambda jobs, n, console: seen.append(n))
    monkeypatch.setattr(cli, "_summarize", lambda *_: 0)
    command = ["compare", "tiny.yaml", "--algorithms=opo"]
    for more in (["--device=auto"], ["--device=cpu"], ["--device=auto", "--jobs=3"]):
        assert cli.main([*command, *more]) == 0
    assert seen == [1, 16, 3]


@pytest.mark.usefixtures("unloaded")
def test_keys_may_come_before_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    after = run(capsys, "train", "tiny.yaml", "--dry-run", "--steps", "5", "--seed=3")
    assert yaml.safe_load(after)["steps"] == 5
    for arguments in (
        ["--steps", "5", "tiny.yaml", "--seed=3", "--dry-run"],
        ["--seed=3", "--dry-run", "--steps", "5", "tiny.yaml"],
        ["--dry-run", "--engine", "local", "--seed", "3", "--steps=5", "tiny.yaml"],
    ):
        assert run(capsys, "train", *arguments) == after


# The toys


@pytest.mark.parametrize("toy", ["saturation", "bandit"])
def test_a_toy_writes_its_files_and_prints_its_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, toy: str
) -> None:
    monkeypatch.setattr("proxstep.lab.toy_report.LOGITS", (0.0, 1.0))
    numbers = ["--seeds", "1", "--steps=2"] if toy == "bandit" else []
    printed = run(capsys, "toy", toy, "--out", "new/deep", *numbers)
    assert "gspo" in printed
    assert printed.endswith("done: new/deep\n")
    names = {f"{toy}.{ending}" for ending in ("png", "svg", "csv", "json")}
    assert {path.name for path in Path("new/deep").iterdir()} == names


def test_a_toy_names_the_file_that_it_cannot_write(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxstep.lab.toy_report.LOGITS", (0.0, 1.0))
    Path("taken/saturation.png").mkdir(parents=True)
    assert cli.main(["toy", "saturation", "--out", "taken"]) == 2
    assert "taken/saturation.png cannot be written (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("toy", ["saturation", "bandit"])
def test_help_of_a_toy_has_an_example(capsys: pytest.CaptureFixture[str], toy: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", toy, "--help"])
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    assert f"example:\n  proxstep toy {toy} --out " in out


def test_a_toy_needs_a_folder_that_can_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    message = mistake(capsys, "toy", "saturation", "--out", "locked")
    assert message == "--out locked cannot be written; choose another folder"

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = mistake(capsys, "toy", "bandit", "--out", "below")
    assert message == "--out below cannot be written; choose another folder"
