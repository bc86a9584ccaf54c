"""What several experiments use: initial policies, trainers that take no step, a row's machine."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from proxstep.config.loading import load_recipe
from proxstep.runs.folder import RunFolder, describe_machine
from proxstep.runs.waiting import UNSEEN
from proxstep.training import lifecycle
from proxstep.training.batch import Batch, collect
from proxstep.training.models import load_model, load_tokenizer
from proxstep.training.precision import with_autocast
from proxstep.training.prompts import load_prompts
from proxstep.training.task import load_task
from proxstep.training.trainer import Trainer

POLICIES = Path(__file__).parent / "policies"
"""The embedded model after its warm-up on a task, in float16. A warm-up ends elsewhere on every
kind of processor; runs from these weights can be put together, whichever machine made them."""


class Quiet:
    """Nobody watches; what is worth knowing goes to the log."""

    begin = record = lambda self, what: None
    wait = UNSEEN.wait

    def note(self, text: str) -> None:
        """Print it."""
        print(text)  # noqa: T201


def words(keys: Mapping[str, Any]) -> list[str]:
    """Return a recipe's keys as a command line has them.

    >>> words({"steps": 3, "evaluation.baselines": False})
    ['--steps', '3', '--evaluation.baselines', 'false']
    """
    return [
        word
        for key, value in keys.items()
        for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
    ]


def write_between(page: Path, begin: str, end: str, made: str) -> None:
    """Write a page anew between two markers, which stay."""
    before, rest = page.read_text(encoding="utf-8").split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n\n{made}\n\n{end}{after}", encoding="utf-8")


def stamp(device: str | torch.device = "cpu") -> dict[str, str]:
    """Return when and on what a run is made."""
    machine = describe_machine(torch.device(device))
    return {"date": datetime.date.today().isoformat(), "machine": machine}


def trainer_of(recipe: Path, keys: Mapping[str, Any], folder: Path) -> Trainer:
    """Return a recipe's trainer, to sample and to take gradients with."""
    given = [(key, str(value)) for key, value in {**keys, "output_dir": folder}.items()]
    loaded, progress = load_recipe(recipe, given), Quiet()
    source = lifecycle.prepared_source(loaded, progress)
    tokenizer, model = load_tokenizer(source), load_model(source, "float32", torch.device("cpu"))
    loaded = with_autocast(loaded, model, progress.note)
    task = load_task(loaded, chat=False)
    data = load_prompts(loaded, tokenizer, task, progress.note)
    return Trainer(loaded, model, tokenizer, *data, RunFolder(folder), progress)


def batches(trainer: Trainer, numbers: Iterable[int]) -> Iterator[Batch]:
    """Yield one batch after another, of other prompts, from the same policy."""
    for number in numbers:
        first = number * trainer.recipe.rollout.num_prompts
        torch.manual_seed(number)
        batch, _ = collect(
            *(trainer.recipe, trainer.objective, trainer.model, trainer.sampler),
            *(trainer.tokenizer, trainer.train_prompts, first, trainer.clock.phase),
        )
        assert batch is not None
        yield batch
