"""Does a KL budget make a run independent of its learning rate?

    python experiments/kl_budget.py                        # what arithmetic.json lacks; two hours
    python experiments/kl_budget.py --task sums            # the longer task; three hours
    python experiments/kl_budget.py --judges 16            # more completions that judge each step
    python experiments/kl_budget.py --seconds 500          # no new run after so many seconds
    python experiments/kl_budget_figures.py                # tables and plots of the rows

REINFORCE with the embedded model, every learning rate with every control and seed, on one of two
tasks: recipes/arithmetic.yaml for 15 steps (answers of 3 characters), or recipes/worked.yaml for 20
(sums worked out, 22 to 88 characters). What an optimizer step really did is measured apart from
what the control measures: KL(before || after) per sequence, on completions of the step's own batch
of which one in sixteen (on sums one in eight) had judged it, by the same estimate from sampled
tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from proxstep.__main__ import main as proxstep_main
from proxstep.budget.prediction import sampled_kl
from proxstep.training.rollout import Cut, completion_log_probs
from proxstep.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import POLICIES, stamp, words

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).with_suffix("")
TASKS = {"arithmetic": ("arithmetic", 15, 16), "sums": ("worked", 20, 8)}
"""The recipe, the steps, and the completions that judge a step, which are the default number."""
BUDGET = 0.03
"""Of the grid; `--budget` tries another one."""
CONTROLS = ("none", "predicted", "corrected", "measured-backtracking", "adaptive-learning-rate")
OPTIMIZERS = ("adamw", "sgd", "muon")
RATES = {
    "arithmetic": {
        "adamw": (3e-4, 1e-3, 3e-3, 1e-4, 3e-5, 1e-2),
        "sgd": (3e-2, 1e-1, 3e-1, 1e-2, 1.0),
        "muon": (3e-4, 1e-3, 3e-3, 1e-4, 1e-2),
    },
    "sums": {
        "adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "muon": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    },
}
SETTINGS = {
    "algorithm": "reinforce",
    "device": "cpu",
    "optimizer.warmup_updates": 0,
    "evaluation.kl_policy_initial": False,
    "evaluation.remember_first": True,
    "logging.checkpoint_last": False,
}


@contextlib.contextmanager
def watched(found: list[float]) -> Any:
    """Measure each optimizer step from outside, on completions that hardly had a part in it."""
    step = Trainer._optimizer_step

    def measured(self: Trainer, losses: Any, minibatch: Any) -> dict[str, float]:
        # Of these as large a share are judges as of the whole batch.
        rows = torch.arange(3, len(minibatch), 4)
        completions = minibatch.rows(rows).trimmed().completions
        settings = (completions, 1.0, Cut())
        before_BT = completion_log_probs(self.model, *settings)
        taken = step(self, losses, minibatch)
        after_BT = completion_log_probs(self.model, *settings)
        kl_B = sampled_kl(before_BT, after_BT, completions.response_BT[:, 1:])
        found.append(kl_B.mean().item())
        return taken

    Trainer._optimizer_step = measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._optimizer_step = step  # type: ignore[method-assign]


def trained(
    optimizer: str, rate: float, seed: int, budget: dict[str, Any], task: str
) -> list[dict[str, Any]]:
    """Train once; return the run's records."""
    name, steps, judges = TASKS[task]
    keys = SETTINGS | {"model.name": POLICIES / task, "steps": steps, "evaluation.every": steps}
    keys |= {"optimizer.name": optimizer, "optimizer.learning_rate": rate, "seed": seed}
    keys |= {"update.kl_num_sequences": judges, **budget} if budget else {}
    if optimizer == "sgd":
        keys["optimizer.momentum"] = 0.9
    with tempfile.TemporaryDirectory() as folder:
        output = io.StringIO()
        recipe = str(ROOT / "recipes" / f"{name}.yaml")
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = proxstep_main(["train", recipe, *words(keys), "--output_dir", folder])
        if status:
            raise SystemExit(f"{keys}: {output.getvalue()[-500:]}")
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def run(
    task: str,
    optimizer: str,
    rate: float,
    control: str,
    seed: int,
    budget: float,
    judges: int | None,
) -> dict[str, Any]:
    """Train once; return the score and what every step was."""
    given: dict[str, Any] = {"update.kl_budget": budget, "update.kl_control": control}
    if judges is not None:
        given["update.kl_num_sequences"] = judges
    realized: list[float] = []
    start = time.process_time()
    with watched(realized):
        records = trained(optimizer, rate, seed, given if control != "none" else {}, task)
    steps = records[1:]

    def column(name: str) -> list[float | None]:
        return [step.get(f"kl_budget/{name}") for step in steps]

    return {
        **stamp(),
        "optimizer": optimizer,
        "learning_rate": rate,
        "control": control,
        "budget": budget,
        **({} if judges is None else {"judges": judges}),
        "seed": seed,
        "first_score": records[0]["score"],
        "score": records[-1]["score"],
        "kl_initial_policy": records[-1]["kl_initial_policy"],
        "processor_seconds": round(time.process_time() - start, 1),
        "seconds_update": round(sum(step["seconds_update"] for step in steps), 2),
        "reward": [step["reward"] for step in steps],
        "kl_of_the_step": realized,
        **{name: column(name) for name in ("predicted", "scale", "realized", "factor", "forwards")},
    }


def written(task: str) -> list[dict[str, Any]]:
    """Return the task's runs that are there."""
    path = FOLDER / f"{task}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _key(result: dict[str, Any]) -> tuple[Any, ...]:
    names = ("optimizer", "learning_rate", "control", "seed", "budget")
    return (*(result[name] for name in names), result.get("judges"))


def main() -> None:
    """Run what is missing, write after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="arithmetic", choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--controls", nargs="+", default=CONTROLS, choices=CONTROLS)
    parser.add_argument(
        "--rates", nargs="+", type=float, help="all of the optimizer's, if left out"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--budget", type=float, default=BUDGET, help="nats per sequence and step")
    parser.add_argument("--judges", type=int, help="completions; the task's, if left out")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new run after that")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    begin, console = time.monotonic(), Console()
    for seed, optimizer in itertools.product(options.seeds, options.optimizers):
        rates = options.rates or RATES[options.task][optimizer]
        for rate, control in itertools.product(rates, options.controls):
            if time.monotonic() - begin > options.seconds:
                break
            wanted = (optimizer, rate, control, seed, options.budget, options.judges)
            if wanted in {_key(r) for r in written(options.task)}:
                continue
            made = run(options.task, *wanted)
            results = [*written(options.task), made]  # another process may have written meanwhile
            lines = ",\n".join(json.dumps(result) for result in results)
            path = FOLDER / f"{options.task}.json"
            path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            console.print(*_key(made), made["score"], made["processor_seconds"])


if __name__ == "__main__":
    main()
