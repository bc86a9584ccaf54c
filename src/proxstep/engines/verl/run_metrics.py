"""verl's metrics under our names, and its validation completions as samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxstep.config.recipe import Recipe

FIELDS = {
    "reward": "critic/score/mean",
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "learning_rate": "actor/lr",
    "completions_mean_length": "response_length/mean",
    "completions_max_length": "response_length/max",
    "completions_clipped_ratio": "response_length/clip_ratio",
    "seconds_rollout": "timing_s/gen",
    "seconds_log_probs": "timing_s/old_log_prob",
    "seconds_update": "timing_s/update_actor",
    "seconds_evaluation": "timing_s/testing",
    "seconds_step": "timing_s/step",
}
"""Our fields, and verl's names of the same."""

PREFIXES = {f"{ours}/": f"actor/{ours}_" for ours in ("objective", "geometry", "kl_budget")}
"""Our prefixes, and those under which `proxstep.engines.verl` reports the same."""


def record(recipe: Recipe, step: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line of metrics.jsonl from what verl logged of a step; step 0 is validation.

    >>> from proxstep.config.loading import resolve
    >>> recipe = resolve({"algorithm": "reinforce"}, {}, "example")
    >>> record(recipe, 0, {"val-core/arithmetic/acc/mean@1": 0.5})["score"]
    0.5
    """
    section = recipe.rollout
    found: dict[str, Any] = {
        "step": step,
        "num_updates": step * recipe.update.num_updates,
        "num_sequences": step * section.num_prompts * section.num_generations,
    }
    found |= {ours: measured[theirs] for ours, theirs in FIELDS.items() if theirs in measured}
    entropy = _entropy(recipe, measured)
    found |= {} if entropy is None else {"entropy": entropy}
    for name, value in measured.items():
        for ours, theirs in PREFIXES.items():
            if name.startswith(theirs):
                found[ours + name.removeprefix(theirs)] = value
        if name.startswith("val-core/") and name.endswith("/acc/mean@1"):
            found["score"] = value
    return found


def _entropy(recipe: Recipe, measured: Mapping[str, Any]) -> float | None:
    """Return the entropy in nats per token; verl aggregates it as the loss.

    None where it was not measured, or is a mean over sequences of their means.
    """
    entropy, length = measured.get("actor/entropy"), measured.get("response_length/mean")
    mode = recipe.objective.loss_agg_mode
    if entropy is None or length is None or mode == "seq-mean-token-mean":
        return None
    if mode == "token-mean":
        return entropy
    horizon = recipe.rollout.max_completion_length if mode.endswith("norm") else 1
    return entropy * horizon / length


def samples(path: Path, step: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield the first lines of verl's file of validation completions, as samples.jsonl has them.

    verl writes it in a thread of its own, so that it may not be there yet, or end within a line.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for _, line in zip(range(count), file, strict=False):
            if not line.endswith("\n"):
                return
            row = json.loads(line)
            yield {
                "step": step,
                "prompt": row["input"],
                "completion": row["output"],
                "answer": row["gts"],
                "reward": row["acc"],
            }
