"""Time of a training step in each engine: proxstep's own, TRL's GRPOTrainer, and ours inside it.

    python benchmarks/engines.py
    python benchmarks/engines.py --json benchmarks/baselines/engines-cpu.json

All loops run in one process and one thread of computation, on copies of one model, with the same
prompts, numbers of completions and lengths; they take turns, step by step. Two things are compared:
every row's step with that of TRL's plain GRPO, and what ISOPO and OPO add to the update (the step
without sampling and grading) of the engine that they run in. A ratio is a step's time over the mean
of the plain steps just before and just after it; a row is the median with its quartiles. Options
that cost time are off in all of them: activation checkpointing, evaluation, checkpoints.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.settings import add_options, prepare, shape_of, write_report
from benchmarks.turns import Seconds, Turns
from benchmarks.workload import build_model
from proxstep.config.loading import resolve
from proxstep.engines.trl import IsopoConfig, IsopoTrainer, OpoConfig, OpoTrainer
from proxstep.runs.folder import RunFolder
from proxstep.runs.waiting import UNSEEN
from proxstep.training.models import load_model, load_tokenizer, quiet_transformers
from proxstep.training.prompts import load_prompts
from proxstep.training.task import load_task
from proxstep.training.trainer import Trainer

NUM_PROMPTS, NUM_GENERATIONS, PROMPT_LENGTH = 2, 8, 32
"""Prompts of a step, completions of each, tokens of a prompt."""

MANY = 10_000
"""Steps that no benchmark reaches."""


@dataclass(frozen=True)
class Case:
    """What every loop works on.

    Attributes:
        folder: Holds the model, and takes what the loops write.
        prompts: As many as a step uses, again and again.
        length: Tokens of a completion.
        microbatch_size: Sequences of one forward and backward.
    """

    folder: Path
    prompts: list[str]
    length: int
    microbatch_size: int


def text_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """Return a number for each completion that differs between most of them."""
    del columns
    return [zlib.crc32(text.encode()) % 7 / 7 for text in completions]


class _Watch:
    """Hands over after every step of the local engine."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def begin(self, recipe: Any) -> None:
        """Nothing to draw."""

    def note(self, text: str) -> None:
        """Nobody reads."""

    wait = UNSEEN.wait

    def record(self, record: Any) -> None:
        """A step ended; step 0 is the evaluation before the first."""
        if record["step"]:
            self._turns.end_of_step()


def local(algorithm: str, case: Case) -> Callable[[Turns], object]:
    """Return the local engine's training loop."""
    name = algorithm.replace("+", "-")
    data = case.folder / "prompts.jsonl"
    changes = {
        "steps": MANY,
        "device": "cpu",
        "output_dir": str(case.folder / f"local-{name}"),
        "model": {"name": str(case.folder / "model")},
        "task": {
            "name": "table",
            "train": str(data),
            "validation": str(data),
            "num_validation": 1,
            "rewards": [f"{__file__}:text_reward"],
        },
        "rollout": {
            "num_prompts": NUM_PROMPTS,
            "num_generations": NUM_GENERATIONS,
            "max_completion_length": case.length,
        },
        "update": {"microbatch_size": case.microbatch_size},
        "optimizer": {"learning_rate": 1e-6},
        "evaluation": {"every": MANY, "num_probe_prompts": 1, "kl_policy_initial": False},
    }
    recipe = resolve({"algorithm": algorithm}, changes, "benchmark")
    folder = RunFolder(recipe.output_dir)

    def run(turns: Turns) -> None:
        source = recipe.model.name
        tokenizer, device = load_tokenizer(source), torch.device("cpu")
        prompts = load_prompts(recipe, tokenizer, load_task(recipe, chat=False))
        model = load_model(source, "float32", device)
        trainer = Trainer(recipe, model, tokenizer, *prompts, folder, _Watch(turns))
        folder.create(recipe, device, 0)
        turns.measure(trainer, "_update", is_update=True)
        trainer.run()

    return run


class _EndOfStep(TrainerCallback):
    """Hands over after every step of TRL."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step ended."""
        self._turns.end_of_step()


def trl(trainer_class: Any, options: dict[str, Any], case: Case) -> Callable[[Turns], object]:
    """Return the training loop of one of TRL's trainers, or of ours in it."""
    config_class = {OpoTrainer: OpoConfig, IsopoTrainer: IsopoConfig}.get(trainer_class, GRPOConfig)
    accumulation = NUM_PROMPTS * NUM_GENERATIONS // case.microbatch_size
    settings: dict[str, Any] = {
        "per_device_train_batch_size": case.microbatch_size,
        "gradient_accumulation_steps": accumulation,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": case.length,
        "max_steps": MANY,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }

    def run(turns: Turns) -> None:
        trainer: Any = trainer_class(
            str(case.folder / "model"),
            text_reward,
            config_class(str(case.folder / "trl"), **settings, **options),
            Dataset.from_dict({"prompt": case.prompts}),
            callbacks=[_EndOfStep(turns)],
        )
        trainer.remove_callback(PrinterCallback)
        turns.measure(trainer, "_generate_and_score_completions", is_update=False)
        trainer.train()

    return run


PLAIN = {"local": "local-reinforce", "trl": "trl-grpo"}
"""Each engine's plain run, with which its updates are compared."""

ROWS: dict[str, Callable[[Case], Callable[[Turns], object]]] = {
    "trl-grpo": lambda case: trl(GRPOTrainer, {}, case),
    "trl-opo": lambda case: trl(OpoTrainer, {}, case),
    "trl-isopo": lambda case: trl(IsopoTrainer, {}, case),
    "trl-isopo-natural": lambda case: trl(IsopoTrainer, {"rule": "isopo-natural"}, case),
    "local-reinforce": lambda case: local("reinforce", case),
    "local-grpo": lambda case: local("grpo", case),
    "local-opo": lambda case: local("opo", case),
    "local-isopo": lambda case: local("isopo", case),
    "local-isopo-natural": lambda case: local("isopo-natural", case),
}


def write_case(folder: Path, arguments: argparse.Namespace, length: int) -> Case:
    """Write the model, its tokenizer of numbered words, and the prompts."""
    shape = shape_of(arguments, arguments.hidden_size)
    words = [f"w{i}" for i in range(shape.vocab_size)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token="w0")
    model: Any = build_model(shape, torch.device("cpu"), torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = 1
    for part in (tokenizer, model):
        part.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, shape.vocab_size, (NUM_PROMPTS, PROMPT_LENGTH), generator=generator)
    prompts = [" ".join(words[i] for i in row) for row in ids.tolist()]
    lines = [f'{{"prompt": "{prompt}", "answer": "1"}}\n' for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return Case(folder, prompts, length, arguments.num_sequences)


def ratios(plain: Turns, turns: Turns, repeats: int) -> list[tuple[float, float]]:
    """Return each step's ratio to the plain steps around it: of the step, and of the update."""
    before, found = plain.step(), []
    for _ in range(repeats):
        own, after = turns.step(), plain.step()
        found.append((_ratio(own, before, after, "step"), _ratio(own, before, after, "update")))
        before = after
    return found


def _ratio(own: Seconds, before: Seconds, after: Seconds, name: str) -> float:
    return 2 * getattr(own, name) / (getattr(before, name) + getattr(after, name))


def measure(name: str, loops: dict[str, Turns], case: Case, repeats: int) -> dict[str, Any]:
    """Return a row's ratios, with their quartiles."""
    with contextlib.closing(Turns(ROWS[name](case))) as turns:
        turns.step()  # the first is slower
        engine = PLAIN[name.partition("-")[0]]
        to_trl = ratios(loops["trl-grpo"], turns, repeats)
        to_own = to_trl if engine == "trl-grpo" else ratios(loops[engine], turns, repeats)
    of_step, of_update = [step for step, _ in to_trl], [update for _, update in to_own]
    return {
        "row": name,
        "step_over_trl_grpo": statistics.quantiles(of_step, n=4),
        "update_over": engine,
        "update": statistics.quantiles(of_update, n=4),
    }


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every row at every length."""
    for length in arguments.lengths:
        with tempfile.TemporaryDirectory() as place:
            case = write_case(Path(place), arguments, length)
            loops = {name: Turns(ROWS[name](case)) for name in PLAIN.values()}
            for plain in loops.values():
                plain.step()
            for name in arguments.rows:
                yield {"length": length} | measure(name, loops, case, arguments.repeats)
            for plain in loops.values():
                plain.close()


def table_of(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table."""
    table = Table(title="processor time of a training step", box=None)
    for heading in ("row", "length", "step / trl-grpo", "quartiles", "update / plain", "quartiles"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        cells = [row["row"], str(row["length"])]
        for name in ("step_over_trl_grpo", "update"):
            lower, median, upper = row[name]
            cells += [f"{median:.3f}", f"{lower:.3f}-{upper:.3f}"]
        table.add_row(*cells)
    return table


def options(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Time of a training step in each engine.")
    add_options(parser, ROWS)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64], help="of completions")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each row, 2 or more")
    arguments = parser.parse_args(words)
    arguments.rows = arguments.rows or list(ROWS)
    if arguments.repeats < 2:
        parser.error("--repeats must be 2 or more: a row has quartiles")
    return arguments


def main() -> None:
    """Measure, print, write."""
    arguments, console, rows = options(), Console(width=100), []
    prepare(arguments)
    quiet_transformers()
    warnings.simplefilter("ignore")
    for row in run(arguments):
        rows.append(row)
        console.print(f"{row['row']}, {row['length']}: {row['step_over_trl_grpo'][1]:.3f}")
        settings = {"hidden_size": arguments.hidden_size, "repeats": arguments.repeats}
        write_report(arguments, settings, rows=rows)
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
