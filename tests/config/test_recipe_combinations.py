"""Settings that do and do not go together."""

from __future__ import annotations

from typing import Any

import pytest
from tests.config.recipe_case import mistake

from proxstep.config.loading import resolve
from proxstep.config.optimizer import OPTIMIZER_OPTIONS
from proxstep.isopo import PRESETS


@pytest.mark.parametrize("advantage", ["group-zscore", "group-centered", "leave-one-out"])
def test_a_group_of_one_cannot_be_compared(advantage: str) -> None:
    data = {
        "algorithm": "grpo",
        "rollout": {"num_generations": 1},
        "objective": {"advantage": advantage},
    }
    message = mistake(data)
    assert message.startswith(f"rollout.num_generations is 1, but objective.advantage {advantage} ")
    assert message.endswith("use at least 2, or batch-normalized advantages")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {
                "algorithm": "grpo",
                "rollout": {"num_generations": 1, "num_prompts": 1},
                "objective": {"advantage": "batch-normalized"},
            },
            "one completion per step has nothing to be compared with: sample more",
        ),
        (
            {
                "algorithm": "opo",
                "rollout": {"num_generations": 1},
                "objective": {"advantage": "batch-normalized"},
            },
            "rollout.num_generations is 1, but opo compares the completions of a prompt",
        ),
        (
            {
                "algorithm": "opo",
                "rollout": {"num_generations": 1},
                "objective": {"advantage": "batch-normalized", "drive": "zscore"},
            },
            "rollout.num_generations is 1, but opo compares the completions of a prompt",
        ),
    ],
)
def test_where_nothing_can_be_compared(data: dict[str, Any], complaint: str) -> None:
    assert mistake(data).startswith(complaint)


def test_a_group_of_one_is_fine_with_the_batch_as_its_group() -> None:
    data = {
        "algorithm": "grpo",
        "rollout": {"num_generations": 1},
        "objective": {"advantage": "batch-normalized"},
    }
    assert resolve(data, {}, "test").rollout.num_generations == 1


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (
            {"algorithm": "grpo", "rollout": {"num_prompts": 6}, "update": {"num_minibatches": 4}},
            "update.num_minibatches 4 does not divide rollout.num_prompts 6: a prompt's group "
            "stays in one minibatch",
        ),
        (
            {"algorithm": "isopo", "geometry": {"ntk_damping": 1.0}},
            "geometry.ntk_damping is not an option of isopo, an isometric rule",
        ),
        (
            {"algorithm": "isopo-natural", "geometry": {"fisher_power": 1.0, "damping": 1.0}},
            "geometry.damping is not an option of isopo-natural, the natural rule",
        ),
        (
            {"algorithm": "isopo", "geometry": {"damping_form": "relative"}},
            'damping_form "relative" needs damping > 0; try damping=1.0',
        ),
        (
            {"algorithm": "isopo-natural", "geometry": {"damping_form": "relative"}},
            'damping_form "relative" has no units to preserve: use scale="paper"',
        ),
        (
            {"algorithm": "grpo", "task": {"name": "table"}},
            "task.train is needed: a JSONL or Parquet file, or a hub data set",
        ),
        (
            {"algorithm": "grpo", "task": {"name": "gsm8k"}},
            "model.name embedded knows only the characters of the tasks arithmetic, countdown, "
            "maxima, products, sums, not gsm8k's: name a model of "
            "the hub or a local folder",
        ),
        (
            {"algorithm": "grpo", "task": {"name": "svamp"}},
            "model.name embedded knows only the characters of the tasks arithmetic, countdown, "
            "maxima, products, sums, not svamp's",
        ),
        (
            {"algorithm": "grpo", "task": {"name": "table", "train": "x.jsonl"}},
            "model.name embedded knows only the characters of the tasks arithmetic, countdown, "
            "maxima, products, sums, not table's",
        ),
        (
            {"algorithm": "grpo", "task": {"reward_weights": [1.0]}},
            "task.reward_weights needs task.rewards, with one weight for each",
        ),
        (
            {
                "algorithm": "grpo",
                "task": {"rewards": ["exact_match"], "reward_weights": [1.0, 2.0]},
            },
            "task.reward_weights needs task.rewards, with one weight for each",
        ),
        (
            {"algorithm": "grpo", "optimizer": {"momentum": 0.9}},
            "optimizer.momentum is not an option of adamw, which has betas and eps: leave it null",
        ),
        (
            {
                "algorithm": "isopo-natural",
                "geometry": {"interact": "group"},
                "update": {"microbatch_size": 4},
                "rollout": {"num_generations": 8},
            },
            "update.microbatch_size 4 is below rollout.num_generations 8",
        ),
        (
            {"algorithm": "isopo", "geometry": {"interact": "group"}},
            "geometry.interact is not an option of isopo, an isometric rule",
        ),
        (
            {"algorithm": "isopo-natural", "model": {"head": "chunked"}},
            "model.head chunked has no kernel",
        ),
        (
            {"algorithm": "proma-intra", "model": {"head": "chunked"}},
            "use model.head full",
        ),
        (
            {"algorithm": "proma-intra", "geometry": {"diagnose_every": 2}},
            "geometry.diagnose_every describes a weight for each sequence",
        ),
        (
            {
                "algorithm": "isopo",
                "geometry": {"fisher": "sequences"},
                "model": {"head": "chunked"},
            },
            "use model.head full",
        ),
        (
            {
                "algorithm": "grpo",
                "model": {"head": "chunked"},
                "regularizer": {"entropy_coef": 0.1},
            },
            "regularizer needs all logits",
        ),
        (
            {"algorithm": "grpo", "model": {"head": "chunked"}, "regularizer": {"kl_coef": 0.1}},
            "take regularizer.kl_estimator k2",
        ),
        (
            {"algorithm": "grpo", "regularizer": {"kl_coef": 0.1, "kl_in": "reward"}},
            "regularizer.kl_in reward needs a regularizer.kl_estimator that depends on the sampled "
            "token, or its last token's choice would cost nothing: use k1",
        ),
        (
            {"algorithm": "grpo", "regularizer": {"kl_estimator": "k3"}},
            "regularizer.kl_estimator is of a divergence that regularizer.kl_coef 0 does not price",
        ),
        (
            {"algorithm": "dapo", "rollout": {"overlong_penalty": 2.0}},
            "rollout.overlong_penalty is the largest punishment within rollout.overlong_buffer",
        ),
        (
            {"algorithm": "dapo", "rollout": {"overlong_buffer": 65}},
            "rollout.overlong_buffer 65 is longer than a completion can be "
            "(rollout.max_completion_length 64): lower it",
        ),
        (
            {
                "algorithm": "reinforce",
                "objective": {"advantage": "batch-normalized"},
                "rollout": {"num_generations": 1, "dynamic_sampling_max_batches": 2},
            },
            "rollout.dynamic_sampling_max_batches looks for completions of a prompt with different "
            "rewards, but rollout.num_generations is 1",
        ),
        (
            {
                "algorithm": "isopo",
                "geometry": {
                    "overlap_source": "previous_step",
                    "num_overlap_positions": None,
                },
            },
            "geometry.num_overlap_positions",
        ),
        (
            {"algorithm": "grpo", "model": {"dtype": "bfloat16", "autocast": "bfloat16"}},
            "model.autocast computes with float32 weights in bfloat16, but model.dtype is bfloat16 "
            "already: leave one of them out",
        ),
        *(
            (
                {
                    "algorithm": "grpo",
                    "model": {"dtype": "bfloat16"},
                    "optimizer": {"name": optimizer},
                },
                f"optimizer.name {optimizer} keeps its preconditioner in the dtype of the weights, "
                "and model.dtype bfloat16 is too coarse for one: use float32",
            )
            for optimizer in ("soap", "kron")
        ),
    ],
)
def test_settings_that_do_not_go_together(data: dict[str, Any], complaint: str) -> None:
    assert complaint in mistake(data)


OPTIONS = {"muon_learning_rate": 1e-3, "betas": [0.8, 0.9], "eps": 1e-6, "momentum": 0.5}


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
@pytest.mark.parametrize("key", OPTIONS)
def test_an_optimizer_takes_its_own_options_alone(name: str, key: str) -> None:
    data = {"algorithm": "grpo", "optimizer": {"name": name, key: OPTIONS[key]}}
    if key in OPTIMIZER_OPTIONS[name]:
        assert resolve(data, {}, "test").optimizer.options() == {key: OPTIONS[key]}
    else:
        message = mistake(data)
        assert message.startswith(f"optimizer.{key} is not an option of {name}, which has ")
        assert all(own in message for own in OPTIMIZER_OPTIONS[name])


@pytest.mark.parametrize("name", OPTIMIZER_OPTIONS)
def test_a_zero_is_set_and_null_is_not(name: str) -> None:
    plain = resolve({"algorithm": "grpo", "optimizer": {"name": name}}, {}, "test").optimizer
    assert plain.options() == {}
    foreign = {"algorithm": "grpo", "optimizer": {"name": "adamw", "momentum": 0.0}}
    assert "momentum is not an option of adamw" in mistake(foreign)


@pytest.mark.parametrize(
    ("evaluation", "regularizer", "lora", "kept"),
    [
        (True, 0.0, None, True),
        (False, 0.0, None, False),
        (False, 0.1, None, True),
        (True, 0.1, {"rank": 2}, False),
    ],
)
def test_when_a_copy_of_the_initial_weights_is_kept(
    evaluation: bool, regularizer: float, lora: Any, kept: bool
) -> None:
    data = {
        "algorithm": "grpo",
        "model": {"lora": lora},
        "evaluation": {"kl_policy_initial": evaluation},
        "regularizer": {"kl_coef": regularizer},
    }
    assert resolve(data, {}, "test").keeps_initial is kept


def test_settings_that_do_go_together() -> None:
    data = {
        "algorithm": "isopo-natural",
        "geometry": {"damping_form": "relative", "scale": "paper", "ntk_damping": 2.0},
        "model": {"name": "some/model"},
        "task": {"name": "table", "train": "x.jsonl", "rewards": ["a.py:f"], "reward_weights": [2]},
        "optimizer": {"name": "sgd", "momentum": 0.9},
        "regularizer": {"entropy_coef": 0, "kl_coef": 0.1},
        "rollout": {"num_prompts": 6},
        "update": {"num_minibatches": 3},
    }
    recipe = resolve(data, {}, "test")
    assert recipe.geometry.to_rule() == PRESETS["isopo-natural"].__class__(
        ntk_damping=2.0, damping_form="relative", scale="paper"
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_kl_estimate_goes_with_the_chunked_head(estimator: str, place: str) -> None:
    data = {
        "algorithm": "isopo",
        "model": {"head": "chunked"},
        "regularizer": {"kl_coef": 0.1, "kl_estimator": estimator, "kl_in": place},
        "rollout": {"overlong_buffer": 64, "dynamic_sampling_max_batches": 1},
    }
    section = resolve(data, {}, "test").regularizer
    assert (section.in_loss, section.in_reward) == (place == "loss", place == "reward")
    assert not section.needs_logits
