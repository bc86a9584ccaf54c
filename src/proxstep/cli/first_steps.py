"""The commands of the first hour: recipes, init, doctor, completion. None needs an extra."""

from __future__ import annotations

import re
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from proxstep.cli.completion import completion_script
from proxstep.cli.installed import ENGINE_EXTRAS, device, missing_for_engine, versions
from proxstep.config.names import choices_of, described_keys
from proxstep.config.reading import RECIPES, recipe_names
from proxstep.errors import ProxstepError


def recipes(arguments: Namespace) -> int:
    """List our recipes with the first sentence of each."""
    del arguments
    names = recipe_names()
    width = max(map(len, names), default=0)
    for name in names:
        _say(f"{name:{width}}  {_first_sentence((RECIPES / f'{name}.yaml').read_text('utf-8'))}")
    _say(f"\nproxstep train NAME trains by one; the files are in {RECIPES}")
    return 0


def _first_sentence(recipe: str) -> str:
    lines = re.match(r"(?:# .*\n)+", recipe)
    text = " ".join(line.removeprefix("# ") for line in lines.group().splitlines()) if lines else ""
    return re.split(r"(?<=[^.]\.) |: ", text)[0].rstrip(".:")


SHOWN = (
    "algorithm",
    "seed",
    "steps",
    "output_dir",
    "model.name",
    "task.name",
    "task.train",
    "task.validation",
    "task.prompt_column",
    "task.answer_column",
    "task.rewards",
    "task.num_validation",
    "rollout.num_prompts",
    "rollout.num_generations",
    "rollout.max_completion_length",
    "optimizer.learning_rate",
    "optimizer.max_grad_norm",
    "evaluation.every",
)
"""The keys that `init` writes; those of data are `table`'s alone."""
_OF_TABLE = ("task.train", "task.validation", "task.prompt_column", "task.answer_column")
_EMBEDDED = {"model.name": "embedded", "optimizer.learning_rate": "1e-4"}
_WORKED = {**_EMBEDDED, "rollout.max_completion_length": "96"}
_REASONING = {"model.name": "Qwen/Qwen3-0.6B", "rollout.max_completion_length": "512"}
STARTS: Mapping[str, Mapping[str, str]] = {
    "arithmetic": {**_EMBEDDED, "rollout.max_completion_length": "6"},
    **dict.fromkeys(("countdown", "maxima", "products", "sums"), _WORKED),
    **dict.fromkeys(("gsm8k", "math", "svamp"), _REASONING),
    "stories": {"model.name": "smollm2", "optimizer.learning_rate": "2e-5"},
    "table": {**_REASONING, "task.train": "train.jsonl"},
}
"""By task: what differs from the default in the recipe that `init` writes."""


def init(arguments: Namespace) -> int:
    """Write a commented recipe for a task."""
    file: Path = arguments.output or Path(f"{arguments.task}.yaml")
    if file.exists():
        raise ProxstepError(f"{file} is there already: give another --output")
    if not file.parent.is_dir():
        raise ProxstepError(f"--output {file}: {file.parent} is no folder")
    file.write_text(commented_recipe(arguments.task, file), encoding="utf-8")
    _say(f"wrote {file}: read it, then proxstep train {file} --dry-run")
    return 0


def commented_recipe(task: str, file: Path) -> str:
    """Return a recipe for a task in which a comment says what each key is."""
    values = {"algorithm": "isopo", "steps": "50", "output_dir": f"runs/{file.stem}"}
    values |= {"task.name": task, **STARTS[task]}
    lines = [
        f"# proxstep train {file}",
        "# Every other key: proxstep train --keys. Paths here are relative to this file.",
    ]
    section = ""
    for dotted, kind, default, text in described_keys():
        if dotted not in SHOWN or (dotted in _OF_TABLE and task != "table"):
            continue
        above, _, key = dotted.rpartition(".")
        if above != section:
            section = above
            lines += ["", f"{section}:"]
        indent = "  " if section else ""
        choices = choices_of(kind)
        text += f" One of {', '.join(choices)}." if choices else ""
        lines += textwrap.wrap(
            text, 96, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        lines.append(f"{indent}{key}: {values.get(dotted, default)}")
    return "\n".join(lines) + "\n"


def doctor(arguments: Namespace) -> int:
    """Say what is installed, and what each engine would miss."""
    del arguments
    _say(versions())
    _say("a loop of your own: ready")
    for engine, extra in ENGINE_EXTRAS.items():
        what = "rollout.engine vllm" if engine == "vllm" else f"engine {engine}"
        _say(f"{what}: {missing_for_engine(engine, extra) or 'ready'}")
    _say(device())
    return 0


def completion(arguments: Namespace) -> int:
    """Print what a shell runs to complete our commands, options, keys and recipes."""
    _say(completion_script(arguments.shell))
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


LIGHT: Mapping[str, Callable[[Any], int]] = {
    "recipes": recipes,
    "init": init,
    "doctor": doctor,
    "completion": completion,
}
"""The commands that need neither an extra nor the keys of a recipe."""
