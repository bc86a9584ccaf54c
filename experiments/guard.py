"""How early does the guard see a collapse, and how often is it wrong, beside single thresholds?

    python experiments/guard.py --seconds 1500    # runs that guard/runs.jsonl lacks, then figures
    python experiments/guard.py --figures         # the figures alone

Arithmetic with the embedded model, 20 steps of 16 x 8 completions; the validation score is taken
after every step. A run has collapsed at the first step after which every score is at most half of
the best one. Six causes are planted, each at a strength drawn at random: three on which the guard's
constants were looked at (design), three that were kept for this (test); every second run is a
healthy one, of several algorithms and learning rates.

The guard sees scores and the divergence from the initial policy at every fourth step alone, as a
run would. A single threshold sees its field at every step, and raises an alarm where the value is
beyond it for three steps in a row (as the guard's signs) or for one; it is set so that it finds at
least as many collapses as the guard, with as few false alarms as that allows. "Known" is a
threshold on the divergence that no run has in advance: just above the highest of the healthy runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from proxstep.__main__ import main as proxstep_main
from proxstep.isopo.rule import IsometricRule
from proxstep.runs.guard import WINDOW, verdict
from proxstep.training import batch, trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import POLICIES, stamp, words

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "arithmetic.yaml"
RUNS = Path(__file__).with_suffix("") / "runs.jsonl"
FIGURES = RUNS.with_name("figures.json")
DESIGN = ("learning rate", "stale sampler", "wrong sign")
TEST = ("leaked advantages", "one prompt", "bfloat16 weights")
CAUSES = (*DESIGN, *TEST)
NAMED = {
    "learning rate": "the steps are too large",
    "stale sampler": "not the newest policy's",
    "wrong sign": "the sign of rewards/",
    "one prompt": "learned by heart",
}
"""What a remedy calls a cause; the others are faults of a program, which none names."""
NUM_BAD = 100
MILD = 18
"""Runs before which two causes were planted more mildly: none of those collapsed."""
STEPS, EVERY = 20, 4
SIZES = {
    "model.name": POLICIES / "arithmetic",
    "device": "cpu",
    "steps": STEPS,
    "guard": "off",
    "task.num_validation": 128,
    "rollout.num_prompts": 16,
    "evaluation.every": 1,
    "evaluation.kl_policy_initial": False,
    "evaluation.num_probe_prompts": 8,
    "evaluation.baselines": False,
    "evaluation.remember_first": True,
    "logging.checkpoint_last": False,
    "logging.num_samples": 0,
}
KEPT = (
    *("step", "reward", "reward_std", "score", "entropy", "grad_norm", "kl_initial_policy"),
    *("frac_reward_zero_std", "completions_clipped_ratio", "learning_rate"),
    "objective/kl_old_policy",
)
NEGATED = """from proxstep.rewards import load_reward

right = load_reward("exact_match")


def negated(prompts, completions, **columns):
    return [-reward for reward in right(prompts, completions, **columns)]
"""


def settings(cause: str, number: int, folder: Path) -> tuple[dict[str, Any], Any]:
    """Return a run's keys and the context in which it is done."""
    draw = random.Random(f"{cause} {number}")

    def between(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    keys: dict[str, Any] = {"seed": number, "algorithm": draw.choice(["reinforce", "grpo"])}
    keys["optimizer.learning_rate"] = between(2e-4, 8e-4)
    context: Any = contextlib.nullcontext()
    if cause == "healthy":
        keys["algorithm"] = draw.choice(["reinforce", "grpo", "isopo", "opo"])
        keys["optimizer.learning_rate"] = between(5e-5, 4e-4)
    elif cause == "learning rate":
        keys["optimizer.learning_rate"] = between(1.5e-3, 8e-3)
    elif cause == "stale sampler":
        context = stale_sampler(draw.randrange(5))
    elif cause == "wrong sign":
        (folder / "negated.py").write_text(NEGATED)
        keys["task.rewards"] = f"[exact_match, {folder / 'negated.py'}:negated]"
        keys["task.reward_weights"] = "[0.0, 1.0]"
    elif cause == "leaked advantages":
        keys["algorithm"] = "isopo"
        context = leaked_advantages()
    elif cause == "one prompt":
        context = one_prompt(number)
    elif cause == "bfloat16 weights":
        keys["model.dtype"] = "bfloat16"
        keys["optimizer.learning_rate"] = between(2e-4, 3e-3)
    if number >= MILD and cause in ("leaked advantages", "one prompt"):
        keys["optimizer.learning_rate"] = between(1e-3, 4e-3)
    return keys, context


@contextlib.contextmanager
def stale_sampler(since: int) -> Iterator[None]:
    """The sampler gets no weights any more after some steps, and nothing corrects for it."""
    make = trainer.make_sampler

    def stale(recipe: Any, model: Any, tokenizer: Any) -> Any:
        fresh, kept, count = make(recipe, model, tokenizer), [], 0

        def sample(prompts: Any) -> Any:
            nonlocal count
            count += 1
            if count > since and not kept:
                kept.append(make(recipe, copy.deepcopy(model), tokenizer))
            return (kept[0] if kept else fresh)(prompts)

        return sample

    with mock.patch.object(trainer, "make_sampler", stale):
        yield


@contextlib.contextmanager
def leaked_advantages() -> Iterator[None]:
    """The loss was scaled by the advantages, so that the geometry's gradients hold them too."""
    weigh = IsometricRule.weigh

    def leaked(self: Any, found: Any, *args: Any, **keywords: Any) -> Any:
        loss_B = found.coefficient_B / found.coefficient_B.abs().mean().clamp(min=1e-12)
        scaled = replace(found, fisher_sq_B=found.fisher_sq_B * loss_B.square())
        weight_B, *rest = weigh(self, scaled, *args, **keywords)
        return weight_B * loss_B, *rest

    with mock.patch.object(IsometricRule, "weigh", leaked):
        yield


@contextlib.contextmanager
def one_prompt(number: int) -> Iterator[None]:
    """Every step draws the same prompt, again and again."""

    def repeated(num_rows: int, num_per_batch: int, *args: Any, **keywords: Any) -> list[int]:
        return [number % num_rows] * num_per_batch

    with mock.patch.object(batch, "batch_rows", repeated):
        yield


def run(cause: str, number: int) -> dict[str, Any]:
    """Train once and return what the guard can see of it, by field."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys, context = settings(cause, number, folder)
        given = words({**SIZES, **keys})
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), context:
            code = proxstep_main(["train", str(RECIPE), *given, "--output_dir", f"{folder}/run"])
        rows = [
            json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
        ]
    shown = {k: v for k, v in keys.items() if not k.startswith("task.")}
    fields = {name: [_rounded(row.get(name)) for row in rows] for name in KEPT}
    seconds = round(time.process_time() - start, 1)
    failed = output.getvalue().strip().splitlines()[-1] if code else None
    return {
        **{"cause": cause, "number": number, "settings": shown},
        **{"seconds": seconds, "failed": failed, "fields": fields},
        **stamp(),
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def written() -> list[dict[str, Any]]:
    """Return the runs that are there."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def rows_of(one: dict[str, Any], every: int = 1) -> list[dict[str, Any]]:
    """Return a run's rows, with evaluations at every so many steps."""
    names = list(one["fields"])
    columns = zip(*one["fields"].values(), strict=True)
    rows = [dict(zip(names, values, strict=True)) for values in columns]
    for row in rows:
        if row["step"] % every:
            row["score"] = row["kl_initial_policy"] = None
    return rows


def collapse(one: dict[str, Any]) -> int | None:
    """Return the first step after which every score is at most half of the best, if there is one.

    A run that fails, with a gradient that is not finite, has collapsed at its last step.
    """
    scores = one["fields"]["score"]
    low = [score <= max(scores) / 2 for score in scores]
    if one["failed"]:
        return len(scores) - 1
    if not low[-1] or max(scores) <= 0:
        return None
    return len(low) - low[::-1].index(False) if False in low else 0


Alarm = Callable[[dict[str, Any]], int | None]


def guard_alarm(one: dict[str, Any]) -> int | None:
    """Return the step of the guard's first alarm."""
    rows = rows_of(one, EVERY)
    for count in range(1, len(rows) + 1):
        if verdict(rows[:count]).state == "collapsing":
            return rows[count - 1]["step"]
    return None


def remedies(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return how often a remedy names the planted cause of an alarm.

    "first" is where it names that one before any other, "named" where it names it at all.
    """
    out: dict[str, Any] = {}
    for cause, words_of in NAMED.items():
        told: dict[str, list[str]] = {"first alarm": [], "last row": []}
        for one in runs:
            if one["cause"] == cause and (step := guard_alarm(one)) is not None:
                rows = rows_of(one, EVERY)
                early = [row for row in rows if row["step"] <= step]
                told["first alarm"].append(verdict(early).remedy)
                told["last row"].append(verdict(rows).remedy)
        out[cause] = {
            when: {
                "alarms": len(texts),
                "first": sum(_first_named(text) == cause for text in texts),
                "named": sum(words_of in text for text in texts),
            }
            for when, texts in told.items()
        }
    return out


def _first_named(remedy: str) -> str | None:
    places = {remedy.find(text): cause for cause, text in NAMED.items() if text in remedy}
    return places[min(places)] if places else None


def levels(one: dict[str, Any], field: str, lasting: int) -> list[tuple[float, int]]:
    """Return the highest level that lasted so many steps up to each step, with the step.

    Entropy and gradient are held against step 1; entropy counts in both directions.
    """
    found = []
    pairs = [(row["step"], row[field]) for row in rows_of(one) if row[field] is not None]
    if field != "kl_initial_policy":
        first = pairs[0][1] or 1e-9
        pairs = [(step, math.log(max(value, 1e-9) / first)) for step, value in pairs]
        if field == "entropy":
            pairs = [(step, abs(value)) for step, value in pairs]
    for end in range(lasting, len(pairs) + 1):
        part = pairs[end - lasting : end]
        found.append((min(value for _, value in part), part[-1][0]))
    return found


def threshold_alarm(field: str, lasting: int, threshold: float) -> Alarm:
    """Return the alarm of one field beyond one value."""

    def alarm(one: dict[str, Any]) -> int | None:
        steps = [step for level, step in levels(one, field, lasting) if level >= threshold]
        return min(steps, default=None)

    return alarm


def measured(alarm: Alarm, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return recall, false alarms and lead of an alarm."""
    bad = [(alarm(one), at) for one in runs if (at := collapse(one)) is not None]
    good = [alarm(one) for one in runs if one["cause"] == "healthy" and collapse(one) is None]
    leads = sorted(at - step for step, at in bad if step is not None)
    return {
        "collapses": len(bad),
        "found": len(leads),
        "healthy": len(good),
        "false alarms": sum(step is not None for step in good),
        "lead, median": statistics.median(leads) if leads else None,
        "lead, quartiles": [leads[len(leads) // 4], leads[3 * len(leads) // 4]] if leads else None,
        "found by the collapse": sum(lead >= 0 for lead in leads),
    }


def at_equal_recall(field: str, lasting: int, runs: Any, found: int) -> tuple[float, Alarm]:
    """Return the highest threshold that finds at least as many collapses."""
    tops = [
        max((level for level, _ in levels(one, field, lasting)), default=-math.inf)
        for one in runs
        if collapse(one) is not None
    ]
    threshold = sorted(tops, reverse=True)[min(found, len(tops)) - 1] if found else math.inf
    return threshold, threshold_alarm(field, lasting, threshold)


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return everything that is compared, by part of the causes."""
    out: dict[str, Any] = {"runs": len(runs), "by cause": {}, "remedies": remedies(runs)}
    for cause in ("healthy", *CAUSES):
        own = [one for one in runs if one["cause"] == cause]
        bad = [one for one in own if collapse(one) is not None]
        last = [verdict(rows_of(one, EVERY)).state for one in own]
        out["by cause"][cause] = {
            "runs": len(own),
            "collapsed": len(bad),
            "alarms": sum(guard_alarm(one) is not None for one in own),
            "alarms where collapsed": sum(guard_alarm(one) is not None for one in bad),
            "last verdicts": {state: last.count(state) for state in sorted({*last})},
        }
    for name, causes in {"design": DESIGN, "test": TEST, "all": CAUSES}.items():
        # Healthy runs are split between the parts, even and odd.
        part = [
            one
            for one in runs
            if one["cause"] in causes
            or (
                one["cause"] == "healthy"
                and (name == "all" or one["number"] % 2 == (name == "test"))
            )
        ]
        guard = measured(guard_alarm, part)
        rows = {"guard": guard}
        for field in ("entropy", "kl_initial_policy", "grad_norm"):
            for lasting in (1, WINDOW):
                threshold, alarm = at_equal_recall(field, lasting, part, guard["found"])
                label = f"{field}, {lasting} step{'s' * (lasting > 1)}"
                rows[label] = {"threshold": round(threshold, 4), **measured(alarm, part)}
        known = 1.01 * max(
            (
                level
                for one in part
                if one["cause"] == "healthy" and collapse(one) is None
                for level, _ in levels(one, "kl_initial_policy", 1)
            ),
            default=math.inf,
        )
        alarm = threshold_alarm("kl_initial_policy", 1, known)
        rows["kl_initial_policy, known"] = {"threshold": round(known, 4), **measured(alarm, part)}
        out[name] = rows
    return out


def main() -> None:
    """Do what is missing, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--figures", action="store_true")
    arguments = parser.parse_args()
    console, start = Console(width=110), time.monotonic()
    RUNS.parent.mkdir(exist_ok=True)
    if not arguments.figures:
        done = {(one["cause"], one["number"]) for one in written()}
        for number in range(NUM_BAD):
            for cause in (CAUSES[number % len(CAUSES)], "healthy"):
                if (cause, number) in done or time.monotonic() - start > arguments.seconds:
                    continue
                one = run(cause, number)
                with RUNS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(one) + "\n")
                found = f"collapse {collapse(one)}, alarm {guard_alarm(one)}"
                console.print(f"{cause} {number}: {found}, {one['seconds']} s")
    out = figures(written())
    FIGURES.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    console.print_json(json.dumps(out))


if __name__ == "__main__":
    main()
