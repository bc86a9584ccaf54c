"""One gradient: what verl's engine accumulates against the local engine, on the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.distributed import Ranks
from tests.engine import tiny_recipe
from tests.verl.verl_case import (
    Case,
    actor_config,
    local_gradients,
    made_engine,
    numbered,
    saved_model,
    step_on_rank,
    trained,
)
from tests.verl.verl_data import (
    Rollout,
    aligned,
    completions,
    estimated,
    padded_batch,
    rollout,
    verl_batch,
)
from torch import Tensor, nn
from verl.trainer.config import RolloutCorrectionConfig
from verl.workers.utils.padding import left_right_2_no_padding

from proxstep.algorithms import ALGORITHMS, Algorithm
from proxstep.engines.verl.seams import find_obstacle, loss_mode
from proxstep.errors import ProxstepError
from proxstep.training.objective import Objective
from proxstep.training.rollout import score

pytestmark = pytest.mark.verl

ALL = {"num_overlap_positions": None}
GEOMETRIES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "reinforce": {"rule": "reinforce"},
    "isopo": {"rule": "isopo", **ALL},
    "isopo-npg": {"rule": "isopo-npg", **ALL},
    "isopo-figure4": {"rule": "isopo-figure4", **ALL},
    "isopo-natural": {"rule": "isopo-natural"},
    "in groups": {"rule": "isopo-natural", "interact": "group"},
    "proma-intra": {"rule": "proma-intra"},
    "five positions": {
        "rule": "isopo",
        "num_overlap_positions": 5,
        "overlap_positions": "completion",
        "overlap_source": "microbatch",
    },
    "not damped": {"rule": "isopo", **ALL, "damping": 0.0, "scale": "paper"},
    "linear layers alone": {"rule": "isopo", **ALL, "other_parameters": "reinforce"},
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def recipe_of(folder: Path, name: str, loss: str = "reinforce", **changes: Any) -> Any:
    """The local engine's recipe of a geometry and an objective."""
    geometry = dict(GEOMETRIES[name] or {})
    rule = geometry.pop("rule", "reinforce")
    algorithm = loss if rule == "reinforce" else f"{rule}+{loss}"
    changes |= {"seed": 42}  # verl's default
    return tiny_recipe(folder / "local", algorithm, geometry=geometry, **changes)


def options_of(case: Case, data: Rollout, **more: Any) -> dict[str, Any]:
    return {
        "global_batch_size": len(data.uids),
        "micro_batch_size_per_gpu": case.micro_batch,
        "use_remove_padding": case.model.get("use_remove_padding", True),
        **more,
    }


def parts_of(case: Case, data: Rollout, num_ranks: int) -> list[list[int]]:
    """The rows of each microbatch of each rank."""
    rows = list(range(len(data.uids)))
    assert len(rows) % (case.micro_batch * num_ranks) == 0
    return [rows[i : i + case.micro_batch] for i in range(0, len(rows), case.micro_batch)]


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a parameter's gradient."""
    assert set(found) == set(expected)
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in expected.items()
    )


def compare(
    case: Case,
    data: Rollout,
    signal: Tensor,
    recipe: Any,
    ranks: Ranks | None,
    *,
    extra: Any = None,
    options: dict[str, Any] | None = None,
    **of_model: Any,
) -> float:
    """The largest difference of one step's gradient between verl and the local engine."""
    model = saved_model(Path(case.folder), **of_model)
    options = options_of(case, data, **(options or {}))
    if ranks is None:
        results = [step_on_rank(case, data, signal, options)]
    else:
        results = ranks.run(step_on_rank, case, data, signal, options)
        first, second = (result["gradients"] for result in results)
        assert difference(first, second) == 0
        assert repr(results[0]["state"]) == repr(results[1]["state"])
    parts = parts_of(case, data, len(results))
    half = len(data.uids) // len(results)
    keys = [(row // half << 32) + row % half for row in range(len(data.uids))]
    expected = local_gradients(model, recipe, data, signal, parts, keys, extra=extra)
    return max(difference(result["gradients"], expected) for result in results)


LAYOUTS = {
    "packed, checkpointed, tied": (True, True, True),
    "padded, checkpointed": (False, True, False),
    "packed, tied": (True, False, True),
    "packed, checkpointed": (True, True, False),
}


def made_case(folder: Path, name: str, layout: str, **options: Any) -> tuple[Case, bool]:
    packed, checkpointed, tied = LAYOUTS[layout]
    model = {"use_remove_padding": packed, "enable_gradient_checkpointing": checkpointed}
    return Case(str(folder / "model"), geometry=GEOMETRIES[name], model=model, **options), tied


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    "name", ["plain", "reinforce", "isopo", "isopo-figure4", "isopo-natural", "in groups"]
)
def test_one_rank(tmp_path: Path, name: str, layout: str) -> None:
    case, tied = made_case(tmp_path, name, layout, micro_batch=4)
    data, signal = rollout(0), torch.randn(8)
    assert len({len(response) for response in data.responses}) > 2
    assert compare(case, data, signal, recipe_of(tmp_path, name), None, tied=tied) <= 1e-5


@pytest.mark.parametrize("layout", ["packed, checkpointed, tied", "padded, checkpointed"])
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "proma-intra"])
def test_two_ranks(tmp_path: Path, ranks: Ranks, name: str, layout: str) -> None:
    case, tied = made_case(tmp_path, name, layout)
    data, signal = rollout(1), torch.randn(8)
    recipe = recipe_of(tmp_path, name)
    assert compare(case, data, signal, recipe, ranks, tied=tied) <= 1e-5


@pytest.mark.parametrize("layout", ["packed, checkpointed, tied", "padded, checkpointed"])
def test_intra_proma_on_two_ranks(tmp_path: Path, ranks: Ranks, layout: str) -> None:
    """Microbatches of 4 sequences.

    Of 2, rank 10 leaves a tenth of a gradient, by singular values that nearly meet: both engines
    are then 1.5e-5 to 3e-5 from float64 in the worst layers, and 1.2e-5 from each other.
    """
    case, tied = made_case(tmp_path, "proma-intra", layout, micro_batch=4)
    data, signal, recipe = rollout(1), torch.randn(8), recipe_of(tmp_path, "proma-intra")
    assert compare(case, data, signal, recipe, ranks, tied=tied) <= 1e-5


# -- objectives ------------------------------------------------------------------------------------

OPO_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "zscore": {"drive": "zscore", "advantage": "group-centered", "tau": 0.7},
    "batch": {"normalize": "batch", "alpha": 0.1},
    "ratio": {"surrogate": "ratio", "mu": 2.5},
    "length": {"length_normalize": True},
    "clipped": {"target_min": -0.2, "alpha": 0.0},
}


@pytest.mark.parametrize("name", ["plain", "isopo"])
@pytest.mark.parametrize("keys", list(OPO_CASES))
def test_opo(tmp_path: Path, ranks: Ranks, keys: str, name: str) -> None:
    """The drive is verl's estimator's, on the driver; the groups lie on both ranks."""
    options = OPO_CASES[keys]
    data = rollout(2, (5, 2, 5))
    near = [-2.9 + 0.1 * torch.randn(len(response)) for response in data.responses]
    data = replace(data, old_log_probs=near)
    policy_loss = {"loss_mode": "chi2_opo", **options}
    case, _ = made_case(tmp_path, name, "packed, checkpointed, tied", policy_loss=policy_loss)
    case.loss_agg_mode = "seq-mean-token-mean"
    recipe = recipe_of(tmp_path, name, "opo", objective=options)
    algorithm = Objective(recipe)
    groups = numbered(data.uids)
    expected = algorithm.signal(algorithm.advantages(data.rewards, groups)[0], groups, None)
    found = estimated(data, "opo", policy_loss)
    assert (found - expected.value_B).abs().max() <= 1e-6
    assert compare(case, data, found, recipe, ranks) <= 1e-5


def verls(algorithm: Algorithm) -> bool:
    return find_obstacle(algorithm, algorithm.defaults) is None


@pytest.mark.parametrize("name", ["plain", "isopo"])
@pytest.mark.parametrize("objective", [a.name for a in ALGORITHMS.values() if verls(a)])
def test_every_algorithm(tmp_path: Path, ranks: Ranks, objective: str, name: str) -> None:
    """At its defaults, estimator and loss; off-policy by as much as some clips allow."""
    algorithm = ALGORITHMS[objective]
    if name == "isopo" and algorithm.level == "token":
        with pytest.raises(ProxstepError, match="ISOPO needs one coefficient per sequence"):
            actor_config(Case("", policy_loss={"loss_mode": loss_mode(algorithm)}))
        return
    data = rollout(14, (5, 2, 5))
    policy_loss = {"loss_mode": loss_mode(algorithm)}
    case, _ = made_case(tmp_path, name, "packed, checkpointed, tied", policy_loss=policy_loss)
    saved_model(tmp_path / "model")
    near = [value + 0.15 * torch.randn_like(value) for value in log_probs(case, data)]
    data = replace(data, old_log_probs=near)
    case.loss_agg_mode = algorithm.default_loss_agg_mode
    if case.loss_agg_mode == "seq-mean-token-sum-norm":
        case.actor["loss_scale_factor"] = 6
    recipe = recipe_of(tmp_path, name, objective, rollout={"max_completion_length": 6})
    groups, local = numbered(data.uids), Objective(recipe)
    signal = local.signal(local.advantages(data.rewards, groups)[0], groups, None)
    found = estimated(data, objective, policy_loss)
    assert (found - signal.value_B).abs().max() <= 1e-6
    assert compare(case, data, found, recipe, ranks) <= 1e-5


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("name", ["plain", "isopo"])
def test_aggregations(tmp_path: Path, ranks: Ranks, mode: str, name: str) -> None:
    case, _ = made_case(tmp_path, name, "packed, checkpointed, tied", loss_agg_mode=mode)
    case.actor["loss_scale_factor"] = 6  # the local engine's max_completion_length
    objective = {"loss_agg_mode": mode}
    recipe = recipe_of(tmp_path, name, objective=objective, rollout={"max_completion_length": 6})
    assert compare(case, rollout(3), torch.randn(8), recipe, ranks) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "isopo-figure4"])
def test_gspo(tmp_path: Path, ranks: Ranks, name: str) -> None:
    data = rollout(4)
    case, _ = made_case(tmp_path, name, "packed, tied", policy_loss={"loss_mode": "gspo"})
    case.loss_agg_mode = "seq-mean-token-mean"
    case.actor |= {"clip_ratio_low": 0.5, "clip_ratio_high": 0.5}
    objective = {"clip_ratio_low": 0.5, "clip_ratio_high": 0.5}
    recipe = recipe_of(tmp_path, name, "gspo", objective=objective)
    assert compare(case, data, torch.randn(8), recipe, ranks) <= 1e-5


def test_importance_weights_of_sequences(tmp_path: Path, ranks: Ranks) -> None:
    data = replace(rollout(5), weights=0.5 + torch.rand(8))
    for name in ("plain", "isopo"):
        case, _ = made_case(tmp_path, name, "packed, checkpointed, tied")
        recipe = recipe_of(tmp_path, name, rollout={"importance_cap": 2.0})
        assert compare(case, data, torch.randn(8), recipe, ranks) <= 1e-5


def test_reinforce_in_bypass_mode(tmp_path: Path) -> None:
    """verl's own importance weights, which it computes inside the loss."""
    data = rollout(6)
    correction = {
        "loss_type": "reinforce",
        "rollout_is": "sequence",
        "rollout_is_threshold": 2.0,
        "bypass_mode": True,
    }
    policy_loss = {
        "loss_mode": "bypass_mode",
        "rollout_correction": RolloutCorrectionConfig(**correction),
    }
    case, _ = made_case(tmp_path, "isopo", "packed, tied", policy_loss=policy_loss)
    pairs = zip(log_probs(case, data), data.old_log_probs, strict=True)
    weights = torch.stack([(now - old).sum().exp().clamp(max=2.0) for now, old in pairs])
    assert len(weights.unique()) > 2
    recipe, signal = recipe_of(tmp_path, "isopo"), torch.randn(8)
    result = step_on_rank(case, data, signal, options_of(case, data))
    model, data = saved_model(Path(case.folder)), replace(data, weights=weights)
    expected = local_gradients(model, recipe, data, signal, parts_of(case, data, 1))
    assert difference(result["gradients"], expected) <= 1e-5


# -- entropy and divergence ------------------------------------------------------------------------


def log_probs(case: Case, data: Rollout) -> list[Tensor]:
    """What the model gives to the responses."""
    model, done = saved_model(Path(case.folder)), completions(data)
    with torch.no_grad():
        now_BT = score(model, done, 1.0).log_prob_BT
    return [row_T[mask_T] for row_T, mask_T in zip(now_BT, done.response_BT[:, 1:], strict=True)]


def other_terms(num_tokens: int, entropy: float, divergence: float) -> Any:
    """What verl adds to the policy term, token-mean, written down again."""

    def extra(model: nn.Module, part: Rollout) -> Tensor:
        done = completions(part)
        logits = model(done.token_BT, attention_mask=done.attention_BT.long()).logits[:, :-1]
        log_prob_BTV = logits.log_softmax(dim=-1)
        entropy_BT = -(log_prob_BTV.exp() * log_prob_BTV).sum(dim=-1)
        log_prob_BT = log_prob_BTV.gather(2, done.token_BT[:, 1:, None]).squeeze(2)
        delta_BT = aligned(part, part.ref_log_prob) - log_prob_BT
        value_BT = divergence * (delta_BT.exp() - delta_BT - 1) - entropy * entropy_BT
        return (value_BT * done.response_BT[:, 1:]).sum() / num_tokens

    return extra


@pytest.mark.parametrize(("entropy", "divergence"), [(0.0, 0.3), (0.2, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("name", ["plain", "isopo", "isopo-natural"])
def test_other_terms_keep_their_plain_gradient(
    tmp_path: Path, ranks: Ranks, name: str, entropy: float, divergence: float
) -> None:
    data = rollout(7)
    actor = {
        "entropy_coeff": entropy,
        "use_kl_loss": divergence > 0,
        "kl_loss_coef": divergence,
        "kl_loss_type": "low_var_kl",
    }
    case, _ = made_case(tmp_path, name, "packed, checkpointed, tied", loss_agg_mode="token-mean")
    case.actor = actor
    near = [value - 0.5 * torch.rand_like(value) for value in log_probs(case, data)]
    data = replace(data, ref_log_prob=near)
    extra = other_terms(sum(len(mask) for mask in data.masks), entropy, divergence)
    recipe = recipe_of(tmp_path, name, objective={"loss_agg_mode": "token-mean"})
    options = {"calculate_entropy": entropy > 0}
    error = compare(case, data, torch.randn(8), recipe, ranks, extra=extra, options=options)
    assert error <= 1e-5


# -- how a mini-batch is cut -----------------------------------------------------------------------


def gradients_of_steps(
    folder: Path, geometry: dict[str, Any], size: int
) -> list[dict[str, Tensor]]:
    """Two optimizer steps' gradients at a learning rate of 0, in micro-batches of a size."""
    saved_model(folder / "model")
    case = Case(str(folder / "model"), geometry, micro_batch=size, optimizer={"lr": 0.0})
    engine, loss_function = made_engine(case)
    found = []
    for seed in (15, 16):
        data = rollout(seed)
        batch = verl_batch(data, torch.randn(8), **options_of(case, data))
        found.append(trained(engine, loss_function, batch)[1])
    return found


def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path: Path) -> None:
    """From the very first step on: what it builds on is measured before it; up to float32."""
    geometry = {"rule": "isopo", "overlap_source": "previous_step", "num_overlap_positions": 20}
    whole = gradients_of_steps(tmp_path, geometry, 8)
    for size in (4, 1):
        for found, expected in zip(
            gradients_of_steps(tmp_path, geometry, size), whole, strict=True
        ):
            assert difference(found, expected) <= 1e-4


# -- what else a batch may be ----------------------------------------------------------------------


def masked(data: Rollout, rows: list[int]) -> Rollout:
    """Without these rows' tokens, as verl pads a batch and rejects samples; of tools, too."""
    masks = [mask.clone() for mask in data.masks]
    for row in rows:
        masks[row].zero_()
    for mask in masks:
        if len(mask) > 3:
            mask[1] = 0
    return replace(data, masks=masks)


@pytest.mark.parametrize("rows", [[0], [0, 1], [0, 5]])
@pytest.mark.parametrize("name", ["isopo", "in groups"])
def test_padding_and_tools(tmp_path: Path, ranks: Ranks, name: str, rows: list[int]) -> None:
    """A masked sequence, a micro-batch of nothing else, masked tokens within a response."""
    data = masked(rollout(8), rows)
    case, _ = made_case(tmp_path, name, "packed, checkpointed, tied")
    case.actor = {"use_kl_loss": True, "kl_loss_coef": 0.0}
    recipe = recipe_of(tmp_path, name)
    assert compare(case, data, torch.randn(8), recipe, ranks) <= 1e-5


@pytest.mark.parametrize("name", ["isopo", "isopo-natural"])
def test_adapters(tmp_path: Path, ranks: Ranks, name: str) -> None:
    case, _ = made_case(tmp_path, name, "packed, checkpointed, tied")
    case.model |= {"lora_rank": 3, "lora_adapter_path": str(tmp_path / "model" / "adapters")}
    recipe = recipe_of(tmp_path, name)
    assert compare(case, rollout(9), torch.randn(8), recipe, ranks, lora=True) <= 1e-5


def test_padding_to_a_bucket(tmp_path: Path) -> None:
    case, _ = made_case(tmp_path, "isopo", "packed, checkpointed, tied")
    case.engine |= {"pad_to_length": True, "pad_to_length_bucket": 32}
    assert compare(case, rollout(10), torch.randn(8), recipe_of(tmp_path, "isopo"), None) <= 1e-5


def test_verls_older_format(tmp_path: Path) -> None:
    """Rows padded on both sides, as its other trainer holds a batch."""
    case, _ = made_case(tmp_path, "isopo", "packed, checkpointed, tied")
    data, signal = masked(rollout(13), [3]), torch.randn(8)
    model = saved_model(Path(case.folder))
    engine, loss_function = made_engine(case)
    batch = left_right_2_no_padding(padded_batch(data, signal, **options_of(case, data)))
    _, found = trained(engine, loss_function, batch)
    recipe = recipe_of(tmp_path, "isopo")
    expected = local_gradients(model, recipe, data, signal, parts_of(case, data, 1))
    assert difference(found, expected) <= 1e-5


def test_gradients_kept_to_the_last_microbatch(tmp_path: Path, ranks: Ranks) -> None:
    case, _ = made_case(tmp_path, "isopo", "packed, checkpointed, tied")
    case.engine |= {"use_no_sync_for_gradient_accumulation": False}
    assert compare(case, rollout(11), torch.randn(8), recipe_of(tmp_path, "isopo"), ranks) <= 1e-5


def test_batches_by_length(tmp_path: Path, ranks: Ranks) -> None:
    """With the identity the gradient does not depend on which sequences share a micro-batch."""
    case, _ = made_case(tmp_path, "reinforce", "packed, checkpointed, tied")
    case.actor["use_dynamic_bsz"] = True
    options = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 14}
    recipe = recipe_of(tmp_path, "reinforce")
    signal = torch.randn(8)
    assert compare(case, rollout(12), signal, recipe, ranks, options=options) <= 1e-5
