"""An algorithm that only a test registers: what works by itself, and nothing stands in for it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.engine import Silent, records, tiny_recipe, weights

from proxstep.algorithms import ALGORITHMS, Aggregation, Algorithm, Key, register
from proxstep.algorithms.aggregate import TOKEN_MEAN, aggregate, aggregate_sequences
from proxstep.algorithms.preparation import Signal, SignalInputs
from proxstep.config.explain import describe_keys
from proxstep.config.loading import resolve
from proxstep.config.recipe import algorithm_names
from proxstep.errors import ProxstepError
from proxstep.logprobs.tokens import masked_sum
from proxstep.training import lifecycle

ROOT = Path(__file__).parents[2]


def damped(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    damping: float = 0.5,
    aggregation=TOKEN_MEAN,
):
    """Return a token-level loss that no engine has of its own.

    L = token-mean of -A tanh(damping log rho) / damping
    """
    log_ratio = (log_probs - old_log_probs.detach()).masked_fill(~response_mask, 0.0)
    loss = -advantages.detach()[:, None] * torch.tanh(damping * log_ratio) / damping
    return aggregate(loss, response_mask, aggregation), {"ratio": log_ratio.detach().exp().mean(1)}


def cubed(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    aggregation=Aggregation("seq-mean-token-mean"),  # noqa: B008
):
    """Return a sequence-level loss that no engine has of its own.

    L = mean_b -signal_b log pi(y_b)
    """
    loss_B = -advantages.detach() * masked_sum(log_probs, response_mask)
    return aggregate_sequences(loss_B, response_mask, aggregation), {}


def cube(inputs: SignalInputs, *, power: int = 3) -> Signal:
    return Signal(inputs.advantage_B**power, inputs.importance_B)


TOKEN = Algorithm(
    "test-damped",
    damped,
    level="token",
    about="A loss of the tests.",
    keys={"damping": Key("How soon it saturates.", gt=0)},
)
SEQUENCE = Algorithm(
    "test-cubed",
    cubed,
    level="sequence",
    about="A signal of the tests.",
    keys={"power": Key("Of the advantage.", ge=1)},
    prepare=cube,
    advantage="group-centered",
)
BOTH = pytest.mark.parametrize("algorithm", [TOKEN, SEQUENCE], ids=lambda found: found.name)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(TOKEN)
    register(SEQUENCE)
    yield
    del ALGORITHMS[TOKEN.name], ALGORITHMS[SEQUENCE.name]


@BOTH
def test_its_keys_are_a_recipes(algorithm: Algorithm) -> None:
    (key,) = algorithm.keys
    assert algorithm.name in algorithm_names()
    recipe = resolve({"algorithm": algorithm.name}, {}, "test")
    assert recipe.objective.options() == algorithm.defaults
    assert recipe.objective.advantage == algorithm.advantage
    assert resolve(recipe.model_dump(), {}, "again") == recipe
    rows = {row[0]: row[3] for row in describe_keys()}
    assert rows[f"objective.{key} ({algorithm.name})"] == algorithm.keys[key].help
    with pytest.raises(ProxstepError, match=rf"objective\.{key}: .*-1"):
        resolve({"algorithm": algorithm.name, "objective": {key: -1}}, {}, "test")
    with pytest.raises(ProxstepError, match=rf"unknown key objective\.{key}x; did you mean {key}"):
        resolve({"algorithm": algorithm.name, "objective": {f"{key}x": 1}}, {}, "test")


@BOTH
def test_it_trains_with_its_own_loss_and_resumes(tmp_path: Path, algorithm: Algorithm) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def spread(completions, **_):\n    return [sum(map(ord, c)) % 7 for c in completions]\n"
    )
    common = {
        "update": {"num_minibatches": 2, "num_iterations": 2},
        "task": {"name": "arithmetic", "rewards": [f"{reward}:spread"], "num_validation": 6},
    }
    recipe = tiny_recipe(tmp_path / "whole", algorithm.name, **common)
    assert lifecycle.train(recipe, Silent()) == "finished"
    lifecycle.train(tiny_recipe(tmp_path / "reinforce", **common), Silent())
    ours, theirs = records(tmp_path / "whole")[-1], records(tmp_path / "reinforce")[-1]
    assert math.isfinite(ours["loss"])
    assert ours["loss"] != theirs["loss"]
    half = tiny_recipe(tmp_path / "half", algorithm.name, **common, logging={"checkpoint_every": 1})

    class Stops(Silent):
        def record(self, record: dict) -> None:
            super().record(record)
            if record["step"] == 2:
                raise KeyboardInterrupt

    assert lifecycle.train(half, Stops()) == "interrupted"
    lifecycle.resume(tmp_path / "half", Silent())
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "half")[name]), name


def test_isopo_takes_the_sequence_level_one_alone(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", f"isopo+{SEQUENCE.name}", steps=1)
    assert lifecycle.train(recipe, Silent()) == "finished"
    with pytest.raises(ProxstepError, match=f"geometry.rule isopo with objective {TOKEN.name}"):
        resolve({"algorithm": f"isopo+{TOKEN.name}"}, {}, "test")


def test_it_has_a_row_and_a_page_in_the_docs() -> None:
    path = ROOT / "scripts" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.algorithms_page()
    assert "| `test-damped` | token | A loss of the tests. | [test-damped](algori" in page
    pages = dict(module.pages())
    damped, cubed = (pages[f"algorithms/{found.name}.md"] for found in (TOKEN, SEQUENCE))
    assert damped.startswith("# test-damped\n\nA loss of the tests.\n")
    assert "    L = token-mean of -A tanh(damping log rho) / damping\n" in damped
    assert "| `objective.damping` | float | `0.5` | above 0 | How soon it saturates. |" in damped
    assert "| `objective.power` | int | `3` | at least 1 | Of the advantage. |" in cubed
    assert "`isopo+test-cubed`" in cubed
    assert "figures/algorithms/test-cubed.svg" in pages


def test_the_name_of_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "isopo", TOKEN)
    with pytest.raises(ProxstepError, match="algorithm isopo: a rule has that name"):
        resolve({"algorithm": "isopo"}, {}, "test")


def test_a_declaration_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ProxstepError, match="algorithm twice: say in its keys what damping is"):
        Algorithm("twice", damped, level="token", about="")
    keys = {"name": Key("A key.")}
    with pytest.raises(ProxstepError, match="name must have a type"):
        Algorithm("named", lambda *, name="", aggregation=TOKEN_MEAN: name, "token", "", keys)
    with pytest.raises(ProxstepError, match="the name is taken"):
        register(TOKEN)
