"""Every registered algorithm in TRL: its own gradient there, or a refusal by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import tiny_recipe
from tests.engines.test_trl_gradients import difference, local_gradients
from tests.engines.trl_case import Watch, copied, dataset, made, quiet, tiny, trained
from tests.selection import slow
from torch import Tensor, nn
from trl.trainer.grpo_trainer import GRPOTrainer

from proxstep.algorithms import (
    ADVANTAGES,
    ALGORITHMS,
    LOSS_AGG_MODES,
    TOKEN_MEAN,
    Aggregation,
    Algorithm,
    Key,
    Signal,
    SignalInputs,
)
from proxstep.algorithms.aggregate import aggregate
from proxstep.config.recipe import Recipe
from proxstep.engines.trl import IsopoConfig, PolicyConfig, PolicyTrainer
from proxstep.engines.trl.expressions import make
from proxstep.engines.trl.policy import _COUNTS, GROUP, KEY
from proxstep.engines.trl.tables import TRL_LOSSES
from proxstep.engines.trl.translation import translate
from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import masked_mean, token_log_ratio


def sometimes(completions: list[str], **columns: Any) -> list[float | None]:
    """A reward of some completions alone."""
    del columns
    return [None if index % 3 else float(len(text)) for index, text in enumerate(completions)]


def seldom(completions: list[str], **columns: Any) -> list[float | None]:
    del columns
    return [None if index % 4 else float(index) for index, _ in enumerate(completions)]


TWICE = {
    "rollout": {"max_completion_length": 5},
    "update": {"microbatch_size": 4, "num_iterations": 2},
    "optimizer": {"learning_rate": 0.02, "max_grad_norm": None},
    "steps": 1,
}
"""Two updates on one rollout: at the second one the ratios are not 1."""


def run(folder: Path, recipe: Recipe) -> tuple[Any, Watch, nn.Module]:
    """Two updates by what the recipe becomes in TRL; the model as it was between them."""
    tokenizer, model = tiny()
    between, found = copied(model), translate(recipe, chat=False)
    options = {name: make(value, 1) for name, value in found.args.keywords.items()}
    options |= {"use_cpu": True, "save_strategy": "no"}
    del options["output_dir"]
    trainer, watch = made(make(found.trainer, 1), folder, model, tokenizer, **options)
    trained(trainer)
    assert len(watch.gradients) == 2
    between.load_state_dict(watch.weights[0])
    return trainer, watch, between


def compare(folder: Path, algorithm: str, **changes: Any) -> tuple[float, Any]:
    """The difference of the second update's gradient from the local engine's, and the trainer."""
    recipe = tiny_recipe(folder / "local", algorithm, **{**TWICE, **changes})
    trainer, watch, between = run(folder / "trl", recipe)
    again = watch.microbatches[4:]
    for batch in again:  # TRL's own trainer has none, and its algorithms need none
        batch.setdefault(GROUP, torch.zeros(4, dtype=torch.long))
        batch.setdefault(KEY, torch.arange(4))
    expected = local_gradients(between, recipe, again)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-6
    return difference(watch.gradients[1], expected), trainer


FAST = ("grpo", "reinforce", "rloo", "gspo", "dro", "dppo-kl", "reinforce-plus-plus", "opo")
"""Of TRL's own and of ours, each kind of ratio once."""


@pytest.mark.parametrize("algorithm", [n if n in FAST else slow(n)[0] for n in ALGORITHMS])
def test_every_algorithm_has_its_own_gradient(tmp_path: Path, algorithm: str) -> None:
    """Whichever of TRL's trainers or ours computes it."""
    error, trainer = compare(tmp_path, algorithm)
    assert error <= 1e-5
    assert (type(trainer).__name__ == "GRPOTrainer") == (algorithm in TRL_LOSSES)


@pytest.mark.slow
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("algorithm", ["cispo", "gspo", "grpo", "dro"])
def test_every_aggregation(tmp_path: Path, algorithm: str, mode: str) -> None:
    error, _ = compare(tmp_path, algorithm, objective={"loss_agg_mode": mode})
    assert error <= 1e-5


def test_every_aggregation_has_its_count() -> None:
    assert set(_COUNTS) == set(LOSS_AGG_MODES)


@pytest.mark.parametrize("kind", ["leave-one-out", *slow("batch-normalized", "group-zscore")])
def test_advantages_that_are_not_left_to_trl(tmp_path: Path, kind: str) -> None:
    """Of the weighted rewards of all that have one; in the batch, and in what TRL logs."""
    tokenizer, model = tiny()
    options = {"loss_type": "reinforce", "advantage": kind, "reward_weights": [0.5, 2.0]}
    trainer, watch = made(
        *(PolicyTrainer, tmp_path, model, tokenizer), rewards=[sometimes, seldom], **options
    )
    trained(trainer)
    rewards = [list(trainer._logs["rewards"][name]) for name in ("sometimes", "seldom")]
    value_FB = torch.tensor(rewards) * torch.tensor([[0.5], [2.0]])
    scored_B = ~value_FB.isnan().all(dim=0)
    number_P = scored_B.reshape(4, 4).sum(dim=1)
    scored_B &= number_P.repeat_interleave(4) > 1  # one alone has nothing to be compared with
    assert value_FB.isnan().any()
    assert scored_B.any()
    assert not scored_B.all()
    group_B, expected_B = torch.arange(16) // 4, torch.zeros(16)
    expected_B[scored_B], _ = ADVANTAGES[kind](value_FB.nansum(0)[scored_B], group_B[scored_B])
    found = {
        int(key): float(value)
        for batch in watch.microbatches
        for key, value in zip(batch[KEY], batch["advantages"], strict=True)
    }
    assert [found[key] for key in range(16)] == pytest.approx(expected_B.tolist())
    assert list(trainer._logs["advantages"]) == pytest.approx(expected_B.tolist())


@pytest.mark.parametrize("bad", [None, math.inf])
@pytest.mark.parametrize("algorithm", ["rloo", *slow("maxrl", "reinforce-plus-plus")])
def test_a_completion_that_is_left_alone_in_its_group_has_no_advantage(
    tmp_path: Path, algorithm: str, bad: float | None
) -> None:
    """As in the local engine, which leaves it out as it does those without a finite reward."""

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        del columns
        return [bad if 5 <= i < 8 else float(len(set(t))) for i, t in enumerate(completions)]

    tokenizer, model = tiny()
    options: Any = {"loss_type": algorithm, "rewards": reward}
    trainer, watch = made(PolicyTrainer, tmp_path, model, tokenizer, **options)
    trained(trainer)
    advantages = list(trainer._logs["advantages"])
    assert advantages[4:8] == [0.0] * 4
    assert any(advantages[:4])
    assert all(gradient.isfinite().all() for gradient in watch.gradients[0].values())


@pytest.mark.parametrize("algorithm", ["rloo", *slow("maxrl")])
def test_one_completion_a_prompt_can_be_evaluated(tmp_path: Path, algorithm: str) -> None:
    """By their rewards: TRL's own advantages are 0 then."""
    tokenizer, model = tiny()
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1}
    options: Any = {"loss_type": algorithm, "eval_dataset": dataset(), **evaluation}
    trainer, watch = made(
        PolicyTrainer, tmp_path, model, tokenizer, per_device_eval_batch_size=2, **options
    )
    trained(trainer)
    (found,) = [log for log in watch.logs if "eval_loss" in log]
    assert found["eval_loss"] == 0.0
    assert found["eval_reward"] > 0.0


# -- ratios to the sampler -------------------------------------------------------------------------

TO_SAMPLER = [name for name, found in ALGORITHMS.items() if found.ratio_to_sampler]


@pytest.mark.parametrize("algorithm", TO_SAMPLER)
def test_the_sampler_s_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """As vLLM gives them, which is not here; NaN where it gives none."""
    generate = GRPOTrainer._generate_and_score_completions

    def with_sampler(self: Any, inputs: Any) -> Any:
        output = generate(self, inputs)
        old_BT = output["old_per_token_logps"]
        torch.manual_seed(0)
        output["sampling_per_token_logps"] = old_BT + 0.3 * torch.randn(old_BT.shape)
        output["sampling_per_token_logps"][::3, 0] = torch.nan
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_sampler)
    recipe = tiny_recipe(tmp_path / "local", algorithm, **TWICE)
    _, watch, between = run(tmp_path / "trl", recipe)
    again = watch.microbatches[4:]
    with_old = local_gradients(copied(between), recipe, again)
    for batch in again:
        sampler_BT = batch["sampling_per_token_logps"]
        old_BT = batch["old_per_token_logps"]
        batch["old_per_token_logps"] = torch.where(sampler_BT.isnan(), old_BT, sampler_BT)
    assert difference(watch.gradients[1], local_gradients(between, recipe, again)) <= 1e-5
    assert difference(watch.gradients[1], with_old) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"suppress_tokens": [0]}},
        {"vllm_importance_sampling_correction": True, "use_vllm": True},
    ],
)
@pytest.mark.parametrize("algorithm", TO_SAMPLER)
def test_another_sampler(tmp_path: Path, algorithm: str, options: dict[str, Any]) -> None:
    sizes = {"bf16": False, "use_cpu": True, "vllm_importance_sampling_mode": "sequence_mask"}
    with pytest.raises(ProxstepError, match=rf"^{next(iter(options))} .*{algorithm}"), quiet():
        PolicyConfig(str(tmp_path), loss_type=algorithm, **sizes, **options)


# -- an algorithm that nobody knows ----------------------------------------------------------------


def squared(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    steepness: float = 0.5,
    beta: float = 1.5,
    aggregation: Aggregation = TOKEN_MEAN,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Nobody's loss: none of TRL's computes it."""
    ratio_BT = token_log_ratio(log_probs, old_log_probs, response_mask)
    value_BT = -advantages[:, None] * log_probs * steepness + (ratio_BT - 0.1) ** 2 * beta
    return aggregate(value_BT, response_mask, aggregation), {"ratio": ratio_BT.mean(1).detach()}


def prepare(inputs: SignalInputs, *, power: float = 2.0) -> Signal:
    old = inputs.old_policy
    assert old is not None
    mean_B = masked_mean(old.log_prob_BT, old.response_BT).exp()
    return Signal(inputs.advantage_B * mean_B**power, hyper={"beta": 2.5}, metrics={"found": 1.0})


def reward_itself(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, dict[str, float]]:
    return reward_B * (1 + group_B), {}


KEYS = {name: Key("Nobody knows it.") for name in ("steepness", "beta")}
UNKNOWN = {
    "loss alone": Algorithm("abacus", squared, "token", "Nobody's.", KEYS),
    "with a preparation": Algorithm(
        *("abacus", squared, "token", "Nobody's.", KEYS | {"power": Key("Nobody knows it.")}),
        prepare=prepare,
        reads_old_policy=lambda options: True,
    ),
    "with its own advantage": Algorithm(
        *("abacus", squared, "token", "Nobody's.", KEYS), advantage="reward-itself"
    ),
    "under a name of TRL's": Algorithm("bnpo", squared, "token", "Nobody's.", KEYS),
    "keys of another": Algorithm("sapo", squared, "token", "Nobody's.", KEYS),
}


@pytest.fixture
def unknown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    algorithm = UNKNOWN[request.param]
    monkeypatch.setitem(ALGORITHMS, algorithm.name, algorithm)
    monkeypatch.setitem(ADVANTAGES, "reward-itself", reward_itself)
    return algorithm


FAST_UNKNOWN = ("with a preparation", "under a name of TRL's")


@pytest.mark.parametrize(
    "unknown", [n if n in FAST_UNKNOWN else slow(n)[0] for n in UNKNOWN], indirect=True
)
def test_an_algorithm_registered_here_alone(tmp_path: Path, unknown: Algorithm) -> None:
    """It trains with its own loss; none of TRL's takes its place."""
    error, trainer = compare(tmp_path, unknown.name)
    assert error <= 1e-5
    assert trainer.algorithm is unknown
    error, _ = compare(tmp_path / "reinforce", "reinforce")
    assert error <= 1e-5


@pytest.mark.parametrize("unknown", ["loss alone"], indirect=True)
def test_a_key_that_came_too_late(tmp_path: Path, unknown: Algorithm) -> None:
    """The configuration's options are made at the import; a value that has none is refused."""
    recipe = tiny_recipe(tmp_path, unknown.name, objective={"steepness": 0.25})
    with pytest.raises(ProxstepError, match=r"objective\.steepness .* before") as refusal:
        translate(recipe, chat=False)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("unknown", ["loss alone"], indirect=True)
def test_isopo_with_an_algorithm_without_coefficients(tmp_path: Path, unknown: Algorithm) -> None:
    with pytest.raises(ProxstepError, match=r"'abacus'; ISOPO needs one coefficient"), quiet():
        IsopoConfig(str(tmp_path), loss_type=unknown.name, bf16=False, use_cpu=True)
