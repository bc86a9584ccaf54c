"""Processor time of a rollout, of a whole training step, and of each of its phases.

    python benchmarks/rollout.py --data svamp.jsonl --json rollout.json
    python benchmarks/rollout.py --parts phases --model embedded

On real word problems, with completions as long as they fall. `rollout` is our sampler against
transformers' plain `generate`, on the same prompts. `step` is the local engine's GRPO step against
that of TRL's GRPOTrainer, on the same prompts and settings. `phases` is where a step's time goes.
The two of a pair take turns in one process, with one thread, and a row is the geometric mean of the
pairs' ratios with a 95 % interval. With --json every pair is kept as soon as it is measured, and
another call goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import stamp

from benchmarks.turns import Turns
from proxstep.config.loading import resolve
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.runs.folder import RunFolder, check_file
from proxstep.runs.waiting import UNSEEN
from proxstep.tasks import Task
from proxstep.training import evaluation
from proxstep.training.generation import end_tokens, sample
from proxstep.training.models import load_model, load_tokenizer, quiet_transformers
from proxstep.training.prompts import Prompts, load_prompts
from proxstep.training.source import model_source
from proxstep.training.task import task_call
from proxstep.training.trainer import Clock, Trainer

MANY = 10_000
"""Steps that no benchmark reaches."""

NUM_GENERATIONS, MICROBATCH = 8, 4

SHORT = " Answer in one short sentence."
"""With the tasks' own instruction, to think step by step, nearly every completion is cut off."""


def recipe_of(arguments: argparse.Namespace, folder: Path, **changes: Any) -> Recipe:
    """Return GRPO on the task: one optimizer step for each rollout."""
    embedded = arguments.model == "embedded"
    data = {"train": arguments.data, "validation": arguments.data} if arguments.data else {}
    task = {"name": "arithmetic"} if embedded else {"name": arguments.task, **data}
    settings: dict[str, Any] = {
        "steps": MANY,
        "device": "cpu",
        "output_dir": str(folder),
        "model": {"name": arguments.model},
        "task": {**task, "num_validation": 16},
        "rollout": {
            "num_prompts": arguments.num_prompts,
            "num_generations": NUM_GENERATIONS,
            "max_completion_length": arguments.length,
        },
        "update": {"microbatch_size": None if embedded else MICROBATCH},
        "optimizer": {"learning_rate": 1e-6},
        "evaluation": {"every": MANY, "num_probe_prompts": 8},
        **changes,
    }
    return resolve({"algorithm": "grpo"}, settings, "benchmark")


def task_of(arguments: argparse.Namespace, recipe: Recipe, *, chat: bool) -> Task:
    """Return the task, with the instruction that was asked for after each question."""
    function, options = task_call(recipe, chat=chat)
    if recipe.task.name != "arithmetic":
        options |= {"instruction": arguments.instruction}
    return function(**options)


def loaded(
    arguments: argparse.Namespace, recipe: Recipe
) -> tuple[Any, Any, tuple[Prompts, Prompts]]:
    """Return a recipe's tokenizer, model, and training and validation prompts."""
    source = model_source(recipe, lambda text: None)
    tokenizer = load_tokenizer(source)
    task = task_of(arguments, recipe, chat=tokenizer.chat_template is not None)
    model = load_model(source, "float32", torch.device("cpu"))
    return tokenizer, model, load_prompts(recipe, tokenizer, task)


# -- a rollout -------------------------------------------------------------------------------------


def plain_generate(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int) -> list[int]:
    """Return the lengths of what transformers' generate samples."""
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    token = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ends = end_tokens(model, tokenizer)
    out = model.generate(
        input_ids=token,
        attention_mask=mask,
        max_new_tokens=limit,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        pad_token_id=pad,
        eos_token_id=ends,
    )
    is_end = torch.isin(out[:, width:], torch.tensor(ends))
    return (is_end.cumsum(1) - is_end.long() == 0).sum(1).tolist()


def rollout_pairs(arguments: argparse.Namespace, done: int) -> Iterator[dict[str, Any]]:
    """Sample other prompts in each pair, by generate and by us, in turns of either order."""
    with tempfile.TemporaryDirectory() as place:
        tokenizer, model, (train, _) = loaded(arguments, recipe_of(arguments, Path(place)))
    model.eval()

    def ours(prompts: list[list[int]]) -> list[int]:
        drawn = sample(model, tokenizer, prompts, max_new_tokens=arguments.length)
        return drawn.lengths().tolist()

    def theirs(prompts: list[list[int]]) -> list[int]:
        return plain_generate(model, tokenizer, prompts, arguments.length)

    for run in (ours, theirs):  # the first call reads the weights from the disk
        run([train.tokens(0)])
    for pair in range(done, arguments.repeats):
        first = pair * arguments.num_prompts
        rows = [(first + i) % len(train) for i in range(arguments.num_prompts)]
        prompts = [train.tokens(row) for row in rows for _ in range(NUM_GENERATIONS)]
        found: dict[str, Any] = {"part": "rollout"}
        contestants: list[tuple[str, Callable[..., list[int]]]]
        contestants = [("generate", theirs), ("ours", ours)]
        for name, run in contestants if pair % 2 else contestants[::-1]:
            torch.manual_seed(pair)
            start = time.process_time()
            lengths = run(prompts)
            found[name] = time.process_time() - start
            found[f"{name}_tokens"] = sum(lengths)
            found[f"{name}_longest"] = max(lengths)
        yield found | {"ratio": found["generate"] / found["ours"]}


# -- a step ----------------------------------------------------------------------------------------


class _Watch:
    """Hands over after every step of the local engine, and keeps its record."""

    def __init__(self, turns: Turns | None) -> None:
        self._turns, self.records = turns, []

    def begin(self, recipe: Any) -> None:
        """Nothing to draw."""

    wait = UNSEEN.wait

    def note(self, text: str) -> None:
        """Nobody reads."""

    def record(self, record: Any) -> None:
        """A step ended; step 0 is the evaluation before the first."""
        self.records.append(record)
        if record["step"] and self._turns is not None:
            self._turns.end_of_step()


def local_loop(arguments: argparse.Namespace, place: Path) -> Callable[[Turns], object]:
    """Return the local engine's training loop; its records are put into `arguments.records`."""
    recipe = recipe_of(arguments, place / "local", evaluation=_LITTLE)

    def run(turns: Turns) -> None:
        watch = _Watch(turns)
        arguments.records = watch.records
        trainer = _trainer(arguments, recipe, watch, arguments.num_prompts)
        trainer.clock = ProcessorClock()
        turns.measure(trainer, "_update", is_update=True)
        trainer.run()

    return run


_LITTLE = {"every": MANY, "num_probe_prompts": 1, "kl_policy_initial": False}


def _trainer(
    arguments: argparse.Namespace, recipe: Recipe, watch: _Watch, num_train: int | None = None
) -> Trainer:
    tokenizer, model, (train, validation) = loaded(arguments, recipe)
    if num_train is not None:  # the same prompts in every step
        train.examples = train.examples[:num_train]
    folder = RunFolder(recipe.output_dir)
    trainer = Trainer(recipe, model, tokenizer, train, validation, folder, watch)
    folder.create(recipe, torch.device("cpu"), 0)
    return trainer


def trl_loop(arguments: argparse.Namespace, place: Path) -> Callable[[Turns], object]:
    """Return the training loop of TRL's GRPOTrainer, on the same prompts and settings."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from proxstep.rewards import load_reward

    recipe = recipe_of(arguments, place / "trl")
    source = model_source(recipe, lambda text: None)
    chat = load_tokenizer(source).chat_template is not None
    task = task_of(arguments, recipe, chat=chat)
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in task.train[: arguments.num_prompts]]
    total = arguments.num_prompts * NUM_GENERATIONS
    config = GRPOConfig(
        str(place / "trl"),
        per_device_train_batch_size=MICROBATCH,
        gradient_accumulation_steps=total // MICROBATCH,
        num_generations=NUM_GENERATIONS,
        max_completion_length=arguments.length,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="grpo",
        max_steps=MANY,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

    class EndOfStep(TrainerCallback):
        def __init__(self, turns: Turns) -> None:
            self._turns = turns

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self._turns.end_of_step()

    def run(turns: Turns) -> None:
        trainer: Any = GRPOTrainer(
            source,
            [load_reward(spec) for spec in task.rewards],  # type: ignore[arg-type]
            config,
            Dataset.from_list(rows),
            callbacks=[EndOfStep(turns)],
        )
        trainer.remove_callback(PrinterCallback)
        turns.measure(trainer, "_generate_and_score_completions", is_update=False)
        trainer.train()

    return run


def step_pairs(arguments: argparse.Namespace, done: int) -> Iterator[dict[str, Any]]:
    """Take one step of either engine in turns; the first step of each is not counted."""
    if done >= arguments.repeats:
        return
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        makers = {"trl": trl_loop, "ours": local_loop}
        loops = {
            name: stack.enter_context(contextlib.closing(Turns(make(arguments, place))))
            for name, make in makers.items()
        }
        for turns in loops.values():
            turns.step()
        for pair in range(done, arguments.repeats):
            found: dict[str, Any] = {"part": "step"}
            for name in loops if pair % 2 else [*loops][::-1]:
                seconds = loops[name].step()
                found[name], found[f"{name}_update"] = seconds.step, seconds.update
            found["ours_phases"] = _phases(arguments.records[-1:])
            yield found | {"ratio": found["ours"] / found["trl"]}


# -- the phases of a step --------------------------------------------------------------------------


class ProcessorClock(Clock):
    """The trainer's clock, of this process's processor time.

    Attributes:
        calls: Seconds of each call of the functions that are watched, by their names.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.calls: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = time.process_time()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.process_time() - start

    def watch(self, stack: contextlib.ExitStack, owner: Any, name: str) -> None:
        """Time a function's calls."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            self.calls.setdefault(name, []).append(time.process_time() - start)
            return result

        setattr(owner, name, timed)
        stack.callback(setattr, owner, name, function)


def _phases(records: list[Any]) -> dict[str, float]:
    """Return the median seconds of each phase."""
    names = {name for record in records for name in record if name.startswith("seconds_")}
    return {
        name.removeprefix("seconds_"): statistics.median(r.get(name, 0.0) for r in records)
        for name in sorted(names - {"seconds_step"})
    }


def phase_rows(arguments: argparse.Namespace, done: int) -> Iterator[dict[str, Any]]:
    """Train so many steps, with an evaluation after each; the median of each phase's seconds."""
    if done:
        return
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        recipe = recipe_of(
            arguments,
            Path(place) / "run",
            steps=arguments.repeats,
            evaluation={"every": 1, "num_probe_prompts": 8},
        )
        watch = _Watch(None)
        trainer = _trainer(arguments, recipe, watch)
        trainer.clock = clock = ProcessorClock()
        clock.watch(stack, evaluation, "greedy_score")
        clock.watch(stack, evaluation, "drift_from_initial")
        clock.watch(stack, evaluation.Probe, "kl")
        trainer.run()
        steps = [record for record in watch.records if record["step"]]
        medians = _phases(steps) | {
            f"evaluation/{name}": statistics.median(seconds)
            for name, seconds in clock.calls.items()
        }
        lengths = statistics.mean(r["completions_mean_length"] for r in steps)
        yield {"part": "phases", "mean_length": lengths, "seconds": medians}


PARTS: dict[str, Callable[[argparse.Namespace, int], Iterator[dict[str, Any]]]] = {
    "rollout": rollout_pairs,
    "step": step_pairs,
    "phases": phase_rows,
}


def interval(ratios: list[float]) -> dict[str, float]:
    """Return the geometric mean of ratios, with Student's 95 % interval of their logarithms.

    >>> interval([2.0, 2.0, 2.0])
    {'mean': 2.0, 'lower': 2.0, 'upper': 2.0}
    """
    logs = [math.log(ratio) for ratio in ratios]
    middle, half = statistics.mean(logs), 0.0
    if len(logs) > 1:
        quantile = float(t.ppf(0.975, len(logs) - 1))
        half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    values = {"mean": middle, "lower": middle - half, "upper": middle + half}
    return {name: round(math.exp(value), 4) for name, value in values.items()}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each part's interval."""
    found = {}
    for part in ("rollout", "step"):
        if ratios := [row["ratio"] for row in rows if row["part"] == part]:
            found[part] = interval(ratios)
    return found


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Processor time of rollouts and steps.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="smollm2", help="as model.name in a recipe")
    parser.add_argument("--task", default="svamp", choices=("svamp", "gsm8k"))
    parser.add_argument("--data", help="a local file of the task's; by default the hub's")
    parser.add_argument("--instruction", default=SHORT, help="what follows each question")
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="limit of a completion, in tokens")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of each part")
    parser.add_argument("--json", type=Path, help="keep the figures in this file, and go on there")
    return parser.parse_args(words)


def main() -> None:
    """Measure what is not measured yet, print, write."""
    arguments, console = options(), Console(width=100)
    torch.set_num_threads(1)
    quiet_transformers()
    rows: list[dict[str, Any]] = []
    try:
        if arguments.json:
            if arguments.json.exists():
                rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
            check_file(arguments.json, "--json")
        for part in arguments.parts:
            done = sum(row["part"] == part for row in rows)
            for row in PARTS[part](arguments, done):
                rows.append(row)
                console.print(row)
                _keep(arguments, rows)
    except ProxstepError as error:
        sys.exit(str(error))
    console.print(summary(rows))


def _keep(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if not arguments.json:
        return
    names = ("task", "instruction", "num_prompts", "length")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"model": Path(arguments.model).name, "num_generations": NUM_GENERATIONS}
    report = {
        **stamp(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "settings": settings,
        "summary": summary(rows),
        "rows": rows,
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
