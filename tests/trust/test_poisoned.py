"""Suite 8: poisoned weights, states, templates and files fire nothing; the report escapes all."""

from __future__ import annotations

import json
import pickle
import re
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proxstep.errors import ProxstepError
from proxstep.lab.report import write_report
from proxstep.rewards import exact_match
from proxstep.runs.checkpoint import STATE_FILE, load_state
from proxstep.runs.reading import load_run
from proxstep.tasks import Example, table_task
from proxstep.training import lifecycle
from proxstep.training.demo_model import build_embedded_model
from proxstep.training.models import load_adapters, load_model, load_tokenizer
from proxstep.training.prompts import Prompts
from tests.engine import Silent, spread_reward, tiny_recipe

WHAT = "poisoned files: fired"
_CPU = torch.device("cpu")
_CONNECTIONS: list[tuple[Any, ...]] = []


class Poison:
    """Unpickles to a call that leaves a canary behind."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._canary,)


def mistake(call: Callable[[], Any], otherwise: str) -> str:
    """Return the message of a refusal, or something else where nothing is refused."""
    try:
        call()
    except ProxstepError as error:
        return str(error)
    return otherwise


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for part in build_embedded_model():
        part.save_pretrained(folder)  # type: ignore[operator]
    return folder


def test_the_poison_works(canary: Path) -> None:
    pickle.loads(pickle.dumps(Poison(canary)))
    assert canary.exists()


def poisons(canary: Path) -> list[bytes]:
    """What an attacker would write in the place of tensors."""
    plain = [pickle.dumps(Poison(canary), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL)]
    with_tensors = pickle.dumps({"step": 1, "weights": [1.0], "more": Poison(canary)})
    saved = canary.parent / "saved"
    torch.save({"step": 1, "model": torch.ones(2), "more": Poison(canary)}, saved)
    zipped = saved.read_bytes()
    torch.save(Poison(canary), saved, _use_new_zipfile_serialization=False)
    return [*plain, with_tensors, zipped, saved.read_bytes()]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_poisoned_states(tmp_path: Path, canary: Path, counted: Callable[..., None]) -> None:
    found = poisons(canary)
    for content in found:
        (tmp_path / STATE_FILE).write_bytes(content)
        with pytest.raises(ProxstepError, match=STATE_FILE):
            load_state(tmp_path)
        assert not canary.exists()
    counted(WHAT, len(found))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.bin"])
def test_poisoned_weights(
    name: str, model: Path, canary: Path, counted: Callable[..., None]
) -> None:
    (model / "model.safetensors").unlink()
    base = build_embedded_model()[1]
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    found = poisons(canary)
    for content in found:
        (model / name).write_bytes(content)
        if name.startswith("adapter"):
            (model / "adapter_config.json").write_text(json.dumps(config))
            with pytest.raises(ProxstepError, match="could be loaded"):
                load_adapters(base, model)
        else:
            with pytest.raises(ProxstepError, match="could be loaded"):
                load_model(str(model), "float32", _CPU)
        assert not canary.exists()
    counted(WHAT, len(found))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_folder(
    file: str, model: Path, canary: Path, counted: Callable[..., None]
) -> None:
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    for kind in ("own", "unknown"):
        settings = json.loads((model / file).read_text())
        settings["auto_map"] = dict.fromkeys(names, "evil.Evil")
        settings["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        if kind == "unknown":
            settings |= {"model_type": "evil", "tokenizer_class": "Evil", "architectures": ["Evil"]}
        (model / file).write_text(json.dumps(settings))
        for load in (load_tokenizer, lambda source: load_model(source, "float32", _CPU)):
            assert str(model) in mistake(partial(load, str(model)), str(model))
        assert not canary.exists()
        assert "evil" not in sys.modules
    counted(WHAT, 4)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ namespace.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0]('CANARY') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "{{ '%s'.__mod__.__self__.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ ('{0.__class__.__init__.__globals__}').format_map({'0': cycler}) }}",
    "{% set x = messages.append(1) %}{{ x }}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'CANARY' %}",
    "{{ range(10 ** 12)|list }}",
    "{{ __import__('os').system('touch CANARY') }}",
    "{{ open('CANARY', 'w') }}",
    "{{ exec('open(1)') }}",
    "{{ config.items() }}",
    "{{ messages[0].content.__class__ }}",
    "{{ dict.__base__ }}",
    "{{ g.pop.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{",
    "{% for %}",
    "{{ undefined.attribute.more }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('touch CANARY') }}",
]


def test_poisoned_chat_templates(canary: Path, counted: Callable[..., None]) -> None:
    tokenizer, _ = build_embedded_model()
    chat = [{"role": "user", "content": "1+2="}]
    for template in TEMPLATES:
        tokenizer.chat_template = template.replace("CANARY", str(canary))
        prompts = Prompts([Example(chat, "3")], tokenizer, [exact_match], [1.0])
        assert "rows row 1: " in mistake(partial(prompts.check, 64, "rows"), "rows row 1: ")
        assert not canary.exists(), template
    counted(WHAT, len(TEMPLATES))


ROWS = [
    '{"prompt": "1", "answer": "1", "x": "!!python/object/apply:os.system [touch CANARY]"}',
    '{"prompt": "__import__(\'os\').system(\'touch CANARY\')", "answer": "1"}',
    '{"prompt": "{{ cycler.__init__.__globals__.os.system(\'touch CANARY\') }}", "answer": "1"}',
    '{"prompt": "1", "answer": "open(\'CANARY\', \'w\')"}',
    '{"__class__": "os", "prompt": "1", "answer": "1", "py/reduce": ["os.system", "touch CANARY"]}',
    '{"prompt": "1", "answer": "1", "prompts": "x"}',
    '{"prompt": ' + "[" * 5000,
    '{"prompt": "1", "answer": ' + "9" * 5000 + "}",
    '{"prompt": "1", "answer": NaN}',
    '{"prompt": "\\ud800", "answer": "1"}',
]


def test_poisoned_rows(tmp_path: Path, canary: Path, counted: Callable[..., None]) -> None:
    file = tmp_path / "rows.jsonl"
    for row in ROWS:
        file.write_text(3 * (row.replace("CANARY", str(canary)) + "\n"))
        read = partial(table_task, str(file), num_validation=1, rewards=("exact_match",))
        assert f"{file}, line 1" in mistake(read, f"{file}, line 1")
        assert not canary.exists(), row
    counted(WHAT, len(ROWS))


MARKS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus='alert(1)' autofocus='",
    "<!-- --><svg onload=alert(1)>",
    "]]><iframe src=javascript:alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;\u2028\u2029\u202e\x00\x1b[31m",
    "</style><style>*{display:none}</style>",
]


class Elements(HTMLParser):
    """The elements of a page, as (tag, names of attributes)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def test_a_report_escapes_what_models_and_users_wrote(
    tmp_path: Path, counted: Callable[..., None]
) -> None:
    tried = 0
    for mark in MARKS:
        folder = tmp_path / f"run{tried}"
        folder.mkdir()
        text = mark.replace("\x00", "")  # which no recipe holds
        settings = {
            "algorithm": text,
            "seed": 0,
            "steps": 1,
            "task": {"name": text},
            "model": {"name": text},
            text: text,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        info = {"status": mark, "machine": mark, "started": mark, "torch_version": mark}
        (folder / "run.json").write_text(json.dumps(info))
        steps = [{"step": step, "reward": 0.5, "score": 0.5, mark: 1.0} for step in range(2)]
        sample = {"step": 1, "prompt": mark, "completion": mark, "reward": 1.0, "answer": mark}
        for name, rows in (("metrics", steps), ("samples", [sample])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        page = write_report([load_run(folder)], tmp_path / "page.html").read_text("utf-8")
        page, number = re.subn(r"<script>\s*\"use strict\".*?</script>", "", page, flags=re.DOTALL)
        assert number == 1  # the page's own script
        assert not re.search(r"<(script|img|iframe|!--)|<svg onload|<style>\*", page), mark
        elements = Elements(page).found
        assert not [name for _, names in elements for name in names if name.startswith("on")], mark
        assert "49" not in re.findall(r"<h1>.*?</h1>", page, re.DOTALL)[0]
        tried += 1
    counted("marks in a report: not escaped", tried)


def _remember(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        _CONNECTIONS.append(arguments)


@pytest.mark.parametrize("engine", ["local", "trl"])
def test_a_run_connects_to_nobody(
    engine: str, tmp_path: Path, counted: Callable[..., None]
) -> None:
    if engine == "trl":
        from proxstep.engines.trl import launch as runs
    else:
        runs = lifecycle
    if _remember not in _HOOKED:
        sys.addaudithook(_remember)
        _HOOKED.append(_remember)
    _CONNECTIONS.clear()
    recipe = tiny_recipe(tmp_path / "run", steps=1, device="cpu", task=spread_reward(tmp_path))
    runs.train(recipe, Silent())
    assert _CONNECTIONS == []
    counted("runs: connections opened", 1)


_HOOKED: list[Any] = []
