"""One gradient: what TRL's machinery accumulates against the local engine, on the same batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import tiny_recipe
from tests.engines.trl_case import Watch, copied, gradients_of, made, tiny, trained
from tests.selection import slow
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer

from proxstep.algorithms import OldPolicy, SignalInputs
from proxstep.config.recipe import Recipe
from proxstep.engines.trl import IsopoTrainer, OpoTrainer
from proxstep.engines.trl.policy import GROUP, KEY
from proxstep.isopo import Isopo
from proxstep.training.objective import Objective, make_isopo
from proxstep.training.rollout import Completions, score


def local_gradients(
    model: nn.Module,
    recipe: Recipe,
    microbatches: list[dict[str, Tensor]],
    first: int = 0,
    state: dict[str, Any] | None = None,
    beta: float = 0.0,
    losses: list[float] | None = None,
) -> dict[str, Tensor]:
    """The local engine's gradient of a rollout's microbatches from `first` on, as one step.

    What groups share is computed here again, from all of them.
    """
    objective, isopo = Objective(recipe), make_isopo(recipe, model)
    if isopo is not None and state is not None:
        isopo.load_state_dict(state)
    scored = [_completions(batch) for batch in microbatches]
    old = [_aligned(*pair) for pair in zip(microbatches, scored, strict=True)]
    signals, weights, hyper = _signals(recipe, model, microbatches, scored, old)
    count = sum(int(done.response_BT.any(dim=1).sum()) for done in scored[first:])
    tokens = sum(int(done.response_BT.sum()) for done in scored[first:])
    parts = list(zip(microbatches, scored, signals, weights, old, strict=True))
    _measure_past(isopo, model, microbatches[first:], scored[first:])
    for batch, done, signal_B, weight_B, old_BT in parts[first:]:
        kept = done.response_BT.any(dim=1)  # the local engine leaves masked completions out
        if not kept.any():
            continue
        done, signal_B = done.rows(kept), signal_B[kept]
        batch = {name: value[kept] for name, value in batch.items() if value.dim()}
        old_BT = None if old_BT is None else old_BT[kept]
        response_BT = done.response_BT[:, 1:]
        log_prob_BT = score(model, done, 1.0).log_prob_BT
        loss, _ = objective.backward(
            log_prob_BT,
            log_prob_BT.detach() if old_BT is None else old_BT,
            signal_B,
            response_BT,
            num_sequences=count,
            num_tokens=tokens,
            isopo=isopo,
            extra_loss=None,
            sequence_ids=done.sequence_ids(),
            completion_mask=done.response_BT,
            groups=batch[GROUP],
            sequence_keys=batch[KEY],
            importance_B=None if weight_B is None else weight_B[kept],
            hyper=hyper,
        )
        if losses is not None:
            losses.append(loss.item())
        if beta:
            with nullcontext() if isopo is None else isopo.off():
                log_prob_BT = score(model, done, 1.0).log_prob_BT
                (beta * _divergence(log_prob_BT, batch, response_BT) / tokens).backward()
    return gradients_of(model)


def _measure_past(
    isopo: Isopo | None,
    model: nn.Module,
    microbatches: list[dict[str, Tensor]],
    scored: list[Completions],
) -> None:
    """What the very first update builds on, measured over the whole step."""
    while isopo is not None and isopo.needs_past:
        with isopo.measuring():
            for batch, done in zip(microbatches, scored, strict=True):
                kept = done.response_BT.any(dim=1)
                if not kept.any():
                    continue
                done = done.rows(kept)
                with isopo.microbatch(
                    done.sequence_ids(),
                    torch.zeros(len(done)),
                    done.response_BT,
                    groups=batch[GROUP][kept],
                    sequence_keys=batch[KEY][kept],
                ) as microbatch:
                    log_prob_BT = score(model, done, 1.0).log_prob_BT
                    microbatch.objective(log_prob_BT, done.response_BT[:, 1:]).backward()


def _divergence(log_prob_BT: Tensor, batch: dict[str, Tensor], response_BT: Tensor) -> Tensor:
    """TRL's estimate of the KL from the reference, with its ratio, summed over tokens."""
    reference_BT = batch["ref_per_token_logps"]
    log_prob_BT = log_prob_BT[:, -reference_BT.shape[1] :]
    delta_BT = reference_BT - log_prob_BT
    ratio_BT = (log_prob_BT - log_prob_BT.detach()).exp()
    value_BT = (delta_BT.exp() - delta_BT - 1) * ratio_BT
    return (value_BT * response_BT[:, -reference_BT.shape[1] :]).sum()


def _completions(batch: dict[str, Tensor]) -> Completions:
    prompt_BT, completion_BT = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    counted_BT = completion_BT
    if "tool_mask" in batch:
        counted_BT = completion_BT & batch["tool_mask"].bool()
    return Completions(
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([prompt_BT, completion_BT], dim=1),
        torch.cat([torch.zeros_like(prompt_BT), counted_BT], dim=1),
        torch.zeros(len(prompt_BT), dtype=torch.bool),
    )


def _aligned(batch: dict[str, Tensor], done: Completions) -> Tensor | None:
    """TRL's old log-probabilities, from the input's second position on; None without any."""
    old_BT = batch.get("old_per_token_logps")
    if old_BT is None:
        return None
    missing = done.token_BT.shape[1] - 1 - old_BT.shape[1]
    return torch.nn.functional.pad(old_BT, (missing, 0))


def _signals(
    recipe: Recipe,
    model: nn.Module,
    microbatches: list[dict[str, Tensor]],
    scored: list[Completions],
    old: list[Tensor | None],
) -> tuple[list[Tensor], list[Tensor | None], dict[str, float]]:
    """What the loss takes of the rollout's advantages, split as the microbatches are."""
    inputs = {"advantage_B": "advantages", "group_B": GROUP}
    of_rollout: dict[str, Any] = {
        name: torch.cat([batch[key] for batch in microbatches]) for name, key in inputs.items()
    }
    if "importance_sampling_ratio" in microbatches[0]:
        weights = [batch["importance_sampling_ratio"].squeeze(1) for batch in microbatches]
        of_rollout["importance_B"] = torch.cat(weights)
    algorithm, options = recipe.objective.algorithm, recipe.objective.options()
    if algorithm.reads_old_policy(options):
        with torch.no_grad():
            rows = [
                score(model, done, 1.0).log_prob_BT if old_BT is None else old_BT
                for done, old_BT in zip(scored, old, strict=True)
            ]
        masks = [done.response_BT[:, 1:] for done in scored]
        vocabulary = model.config.vocab_size
        of_rollout["old_policy"] = OldPolicy(torch.cat(rows), torch.cat(masks), vocabulary)
    signal = algorithm.signal(SignalInputs(**of_rollout), options)
    sizes = [len(batch["advantages"]) for batch in microbatches]
    weights = signal.importance_B
    split = [None] * len(sizes) if weights is None else list(weights.split(sizes))
    return list(signal.value_B.split(sizes)), split, dict(signal.hyper)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient."""
    assert set(found) == set(expected)
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in expected.items()
    )


def run(
    folder: Path, trainer_class: Any, options: dict[str, Any], **of_model: Any
) -> tuple[Watch, nn.Module]:
    """One optimizer step in TRL; the model as it was before."""
    tokenizer, model = tiny(**of_model)
    before = copied(model)
    trainer, watch = made(trainer_class, folder, model, tokenizer, **options)
    trained(trainer)
    return watch, before


def _of_local(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if not name.startswith("mask_")}


def compare(
    folder: Path, trainer_class: Any, algorithm: str, changes: dict[str, Any], **options: Any
) -> float:
    """The largest difference of one step's gradient between TRL and the local engine."""
    of_model = {name: options.pop(name) for name in ("tied", "lora", "exact") if name in options}
    watch, before = run(folder / "trl", trainer_class, options, **of_model)
    assert len(watch.gradients) == 1
    lengths = torch.cat([batch["completion_mask"].sum(dim=1) for batch in watch.microbatches])
    assert len(lengths.unique()) > 1
    recipe = tiny_recipe(folder / "local", algorithm, **changes)
    beta = options.get("beta", 0.0)
    expected = local_gradients(before, recipe, watch.microbatches, beta=beta)
    return difference(watch.gradients[0], expected)


ALL = {"num_overlap_positions": None}
NARROW = {"clip_ratio_low": 0.02, "clip_ratio_high": 0.02}


CASES = [
    ("isopo", True),
    ("proma-intra", False),
    *slow(
        ("isopo-natural", True),
        ("isopo-natural", False),
        ("isopo-figure4", True),
        ("isopo-figure4", False),
        ("isopo-npg", True),
        ("isopo-npg", False),
        ("isopo-euclidean", True),
        ("isopo", False),
    ),
]


@pytest.mark.parametrize(("rule", "tied"), CASES)
def test_isopo(tmp_path: Path, rule: str, tied: bool) -> None:
    """Four microbatches with checkpointing, the head's weight included, every parameter."""
    looks_at_none = ("isopo-natural", "isopo-euclidean", "proma-intra")
    sample = {} if rule in looks_at_none else ALL
    changes = {"geometry": sample}
    assert compare(tmp_path, IsopoTrainer, rule, changes, rule=rule, tied=tied, **sample) <= 1e-5


ISOPO_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("isopo", {"geometry": ALL}, {**ALL, "lora": True}),
    "lora, natural": ("isopo-natural", {}, {"lora": True, "rule": "isopo-natural"}),
    "natural in groups": (
        *("isopo-natural", {"geometry": {"interact": "group"}}),
        {"rule": "isopo-natural", "interact": "group"},
    ),
    "with opo": ("isopo+opo", {"geometry": ALL}, {**ALL, "loss_type": "opo"}),
    "token mean": (
        *("isopo", {"geometry": ALL, "objective": {"loss_agg_mode": "token-mean"}}),
        {**ALL, "loss_agg_mode": "token-mean"},
    ),
    "sampled completion positions": (
        "isopo",
        {
            "seed": 42,
            "geometry": {"overlap_positions": "completion", "num_overlap_positions": 5},
        },
        {"overlap_positions": "completion", "num_overlap_positions": 5, "exact": True},
    ),
    "no checkpointing": ("isopo", {"geometry": ALL}, {**ALL, "gradient_checkpointing": False}),
    "re-entrant checkpointing": (
        *("isopo", {"geometry": ALL}),
        {**ALL, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "not damped": (
        *("isopo", {"geometry": {**ALL, "damping": 0.0, "scale": "paper"}}),
        {**ALL, "damping": 0.0, "scale": "paper"},
    ),
    "truncated ones masked": (
        *("isopo", {"geometry": ALL}),
        {**ALL, "mask_truncated_completions": True},
    ),
    "linear layers alone": (
        *("isopo", {"geometry": {**ALL, "other_parameters": "reinforce"}}),
        {**ALL, "other_parameters": "reinforce"},
    ),
}


FAST = {
    *("lora", "sampled completion positions", "truncated ones masked"),
    *("default", "ratio", "length", "adaptive"),
}


def marked(cases: dict[str, Any]) -> list[Any]:
    """The cases' names, most of them as slow tests."""
    return [name if name in FAST else slow(name)[0] for name in cases]


@pytest.mark.parametrize("case", marked(ISOPO_CASES))
def test_isopo_with(tmp_path: Path, case: str) -> None:
    """In float64 what few positions estimate agrees too, which magnifies float32's rounding."""
    algorithm, changes, options = ISOPO_CASES[case]
    tolerance = 1e-10 if options.get("exact") else 1e-5
    assert compare(tmp_path, IsopoTrainer, algorithm, changes, **options) <= tolerance


def test_the_identity_is_reinforce(tmp_path: Path) -> None:
    """In its gradient, and in the loss that is logged."""
    watch, before = run(tmp_path / "trl", IsopoTrainer, {"rule": "reinforce"})
    recipe, losses = tiny_recipe(tmp_path / "local", "reinforce"), []
    expected = local_gradients(before, recipe, watch.microbatches, losses=losses)
    assert difference(watch.gradients[0], expected) <= 1e-5
    assert watch.logs[0]["loss"] == pytest.approx(sum(losses), abs=1e-4)
    assert abs(sum(losses)) > 1e-2


@pytest.mark.parametrize(
    ("trainer_class", "algorithm"), [(IsopoTrainer, "isopo"), *slow((OpoTrainer, "opo"))]
)
def test_tokens_of_tools_and_weights_of_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer_class: Any, algorithm: str
) -> None:
    """As TRL adds them for agents and for vLLM, whose samplers are not here."""
    generate = GRPOTrainer._generate_and_score_completions

    def with_both(self: Any, inputs: Any) -> Any:
        output = generate(self, inputs)
        torch.manual_seed(0)
        output["tool_mask"] = (torch.rand(output["completion_mask"].shape) < 0.7).long()
        output["importance_sampling_ratio"] = 0.5 + torch.rand(len(output["advantages"]), 1)
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_both)
    isopo = algorithm == "isopo"
    changes, options = ({"geometry": ALL}, ALL) if isopo else ({}, {})
    assert compare(tmp_path, trainer_class, algorithm, changes, **options) <= 1e-5


OPO_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "zscore": {"drive": "zscore"},
    "batch": {"normalize": "batch", "alpha": 0.1},
    "auto": {"mu": "auto", "alpha": 0.0},
    "ratio": {"surrogate": "ratio"},
    "length": {"anchor_correction": "length", "length_normalize": True},
    "adaptive": {"adaptive_tau": True},
    "clipped": {"target_min": -0.2},
    "truncated ones masked": {"mask_truncated_completions": True},
}


@pytest.mark.parametrize("case", marked(OPO_CASES))
def test_opo(tmp_path: Path, case: str) -> None:
    changes = {"objective": _of_local(OPO_CASES[case])}
    assert compare(tmp_path, OpoTrainer, "opo", changes, **OPO_CASES[case]) <= 1e-5


def test_opo_with_adapters(tmp_path: Path) -> None:
    assert compare(tmp_path, OpoTrainer, "opo", {}, lora=True) <= 1e-5


@pytest.mark.parametrize(
    ("trainer_class", "algorithm"), [(IsopoTrainer, "isopo"), *slow((OpoTrainer, "opo"))]
)
def test_the_divergence_keeps_its_plain_gradient(
    tmp_path: Path, trainer_class: Any, algorithm: str
) -> None:
    """The random adapters are far from the reference, the model without them."""
    geometry = {"geometry": ALL} if algorithm == "isopo" else {}
    options = ALL if algorithm == "isopo" else {}
    error = compare(tmp_path, trainer_class, algorithm, geometry, lora=True, beta=0.1, **options)
    assert error <= 1e-5


@pytest.mark.parametrize(
    ("trainer_class", "algorithm", "options"),
    [
        (OpoTrainer, "opo", {}),
        (IsopoTrainer, "isopo+gspo", {**ALL, "loss_type": "gspo", **NARROW}),
        *slow(
            (OpoTrainer, "opo", {"surrogate": "ratio"}),
            (IsopoTrainer, "isopo+opo", {**ALL, "loss_type": "opo"}),
            (IsopoTrainer, "isopo", ALL),
        ),
    ],
)
def test_the_second_update_of_a_rollout(
    tmp_path: Path, trainer_class: Any, algorithm: str, options: dict[str, Any]
) -> None:
    """Two optimizer steps on one generation: the old policy is that before the first of them."""
    tokenizer, model = tiny()
    between, states = copied(model), []
    twice = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 2}
    trainer, watch = made(trainer_class, tmp_path / "trl", model, tokenizer, **options | twice)
    step = trainer.training_step

    def watched(*args: Any) -> Tensor:
        if len(watch.gradients) == 1 and not states:
            between.load_state_dict(trainer.model.state_dict())
            states.append(trainer.isopo.state_dict() if trainer_class is IsopoTrainer else None)
        return step(*args)

    trainer.training_step = watched
    trained(trainer)
    assert len(watch.gradients) == 2
    assert "old_per_token_logps" in watch.microbatches[0]
    changes: dict[str, Any] = {"geometry": ALL} if trainer_class is IsopoTrainer else {}
    if "surrogate" in options:
        changes["objective"] = {"surrogate": "ratio"}
    if "clip_ratio_low" in options:
        changes["objective"] = NARROW
    recipe = tiny_recipe(tmp_path / "local", algorithm, **changes)
    expected = local_gradients(between, recipe, watch.microbatches, 2, states[0])
    assert difference(watch.gradients[1], expected) <= 1e-5
