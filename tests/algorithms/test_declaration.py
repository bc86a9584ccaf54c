"""What a declaration may be, and what follows from it without another line."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from proxstep.algorithms import (
    ADVANTAGES,
    ALGORITHMS,
    SEQ_MEAN_TOKEN_SUM,
    Aggregation,
    Algorithm,
    Key,
    Signal,
    SignalInputs,
    find_algorithm,
    register,
)
from proxstep.algorithms.advantages import advantage
from proxstep.algorithms.aggregate import aggregate
from proxstep.errors import ProxstepError


def loss(
    log_probs,
    old_log_probs,
    advantages,
    response_mask,
    *,
    width: float = 0.5,
    mu: float = 1.0,
    aggregation: Aggregation = SEQ_MEAN_TOKEN_SUM,
):
    return aggregate(-advantages[:, None] * log_probs, response_mask, aggregation), {}


def prepare(inputs: SignalInputs, *, mu: float | str = "auto", alpha: float = 0.4) -> Signal:
    return Signal(alpha * inputs.advantage_B, hyper={"mu": 3.0})


KEYS = {name: Key(f"{name} of a test.") for name in ("alpha", "width", "mu")}


def made(**changes) -> Algorithm:
    fields = {"name": "made", "loss": loss, "level": "sequence", "about": "A test's."}
    return Algorithm(**(fields | {"keys": KEYS, "prepare": prepare} | changes))


def test_keys_have_the_defaults_and_types_of_the_signatures():
    algorithm = made()
    assert algorithm.defaults == {"alpha": 0.4, "width": 0.5, "mu": "auto"}
    assert algorithm.types == {"alpha": float, "width": float, "mu": float | str}
    assert algorithm.default_loss_agg_mode == "seq-mean-token-sum"
    assert algorithm.loss_options({"alpha": 1.0, "width": 2.0}) == {"width": 2.0}


def test_a_partial_changes_defaults():
    algorithm = made(loss=partial(loss, width=0.1, aggregation=Aggregation("token-mean")))
    assert algorithm.defaults["width"] == 0.1
    assert algorithm.default_loss_agg_mode == "token-mean"


def test_the_signal_is_prepared_with_its_own_keys():
    inputs = SignalInputs(torch.ones(2), torch.zeros(2, dtype=torch.int64))
    signal = made().signal(inputs, {"alpha": 0.25, "width": 9.0})
    assert signal.value_B.tolist() == [0.25, 0.25]
    assert signal.hyper == {"mu": 3.0}
    plain = made(prepare=None, keys={name: KEYS[name] for name in ("width", "mu")})
    assert plain.signal(inputs, {}).value_B is inputs.advantage_B


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({}, "what width, mu, alpha is"),
        ({"width": KEYS["width"]}, "what mu, alpha is"),
        (KEYS | {"height": Key("Of nothing.")}, "its key height is no keyword"),
    ],
)
def test_a_key_without_a_sentence_or_a_keyword_is_refused(keys, why):
    with pytest.raises(ProxstepError, match=f"algorithm made: .*{why}"):
        made(keys=keys)


def test_a_name_stands_for_one_algorithm():
    with pytest.raises(ProxstepError, match=r"taken, by gspo of proxstep\.alg.*\.gspo; choose"):
        register(made(name="gspo"))
    with pytest.raises(ProxstepError, match="plus sign"):
        register(made(name="isopo+gspo"))
    assert find_algorithm("gspo") is ALGORITHMS["gspo"]
    with pytest.raises(ProxstepError, match="did you mean reinforce"):
        find_algorithm("reinforc")


def test_a_name_stands_for_one_kind_of_advantage():
    before = dict(ADVANTAGES)
    with pytest.raises(ProxstepError, match="leave-one-out"):
        advantage("leave-one-out")
    assert before == ADVANTAGES
