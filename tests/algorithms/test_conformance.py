"""What every registered algorithm promises, whatever it computes.

All of it runs over the registry: a new algorithm is tested by being there. What it computes is
tested elsewhere, against its paper's formula.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from tests.algorithms.loss_cases import (
    MODES,
    SEEDS,
    Case,
    assert_close,
    counted,
    loss_and_gradient,
    make_case,
)
from torch import Tensor

from proxstep import algorithms
from proxstep.algorithms import (
    ADVANTAGES,
    ALGORITHMS,
    Aggregation,
    Algorithm,
    OldPolicy,
    Signal,
    SignalInputs,
)
from proxstep.algorithms.aggregate import gradient_by_sequence
from proxstep.errors import ProxstepError

DRIFTS = (1e-3, 0.5, 2.0)
"""How far the policy is from the old one: inside every clip, across most, and far outside."""
GROUP = torch.tensor([3, 0, 3, 0, 3, 0, 3, 0])


def variants(algorithm: Algorithm, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The defaults, and each key changed alone: every choice, the switch, half and twice."""
    found: list[dict[str, Any]] = [{}]
    for name, default in keys.items():
        key = algorithm.keys[name]
        values: list[Any] = [choice for choice in key.choices if choice != default]
        if isinstance(default, bool):
            values = [not default]
        elif isinstance(default, int | float):
            values = [v for v in (default / 2, default * 2) if within(v, key.bounds)]
        found += [{name: value} for value in values]
    return found


def within(value: float, bounds: dict[str, float]) -> bool:
    compare = {"ge": value.__ge__, "gt": value.__gt__, "le": value.__le__, "lt": value.__lt__}
    return all(compare[name](limit) for name, limit in bounds.items())


def options_of(*levels: str, prepared: bool = False) -> list[Any]:
    """Every variant of the algorithms' losses, or with `prepared` of all their keys."""
    return [
        pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
        for name, algorithm in ALGORITHMS.items()
        for keys in [algorithm.defaults if prepared else algorithm.loss_options(algorithm.defaults)]
        for options in variants(algorithm, keys)
        if algorithm.level in levels
    ]


with_options = pytest.mark.parametrize(("name", "options"), options_of("sequence", "token"))
of_each = pytest.mark.parametrize("name", ALGORITHMS)


# The gradient


@contextmanager
def detach_as(function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    plain = Tensor.detach
    Tensor.detach = function  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.detach = plain  # type: ignore[method-assign]


def with_constants(function: Callable[[Tensor], float], at: Tensor) -> Callable[[Tensor], float]:
    """The function in which all that is detached stays what it is at that point.

    A stop-gradient is a constant for the gradient, and so it must be for the finite differences.
    """
    plain, constants = Tensor.detach, []

    def record(tensor: Tensor) -> Tensor:
        constants.append(plain(tensor))
        return constants[-1]

    with detach_as(record):
        function(at)

    def played_back(x: Tensor) -> float:
        rest = iter(constants)
        with detach_as(lambda tensor: next(rest)):
            return function(x)

    return played_back


@with_options
def test_the_gradient_is_that_of_finite_differences(name, options):
    """Along random directions; the step is below the distance to the nearest clip."""
    generator, step = torch.Generator().manual_seed(9), 1e-6
    for drift in DRIFTS:
        case = make_case(5, drift=drift)
        _, gradient, _ = loss_and_gradient(name, case, **options)

        def value(at: Tensor, case: Case = case) -> float:
            return ALGORITHMS[name].loss(at, *case.tensors[1:], **options)[0].item()

        fixed = with_constants(value, case.log_probs)
        for _ in range(4):
            toward = torch.randn(6, 7, generator=generator, dtype=torch.float64)
            there, back = (case.log_probs + sign * step * toward for sign in (1, -1))
            expected = (fixed(there) - fixed(back)) / (2 * step)
            actual = (gradient * toward).sum().item()
            assert actual == pytest.approx(expected, rel=1e-6, abs=1e-8)


@with_options
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_sum_over_sequences_without_padding(name, options, mode):
    case = make_case(6)
    aggregation = counted(mode, case.response_mask)
    loss, gradient, metrics = loss_and_gradient(name, case, aggregation=aggregation, **options)
    total, expected = torch.zeros((), dtype=torch.float64), torch.zeros_like(gradient)
    for b in range(len(gradient)):
        kept = case.response_mask[b]
        if not kept.any():
            continue
        alone = Case(
            case.log_probs[b, kept][None],
            case.old_log_probs[b, kept][None],
            case.advantages[b][None],
            torch.ones(1, int(kept.sum()), dtype=torch.bool),
        )
        share, own, measured = loss_and_gradient(name, alone, aggregation=aggregation, **options)
        total += share
        expected[b, kept] = own[0]
        assert measured.keys() == metrics.keys()
        for key, value in measured.items():
            assert_close(metrics[key][b], value[0])
    assert_close(loss, total)
    assert_close(gradient, expected)


@pytest.mark.parametrize(("name", "options"), options_of("sequence"))
def test_a_sequence_level_gradient_is_the_same_at_all_tokens(name, options):
    for drift in DRIFTS:
        case = make_case(7, drift=drift)
        _, gradient, _ = loss_and_gradient(name, case, **options)
        gradient_by_sequence(gradient, case.response_mask, otherwise="it differs between tokens")


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if a.level == "token"])
def test_a_token_level_gradient_is_not(name):
    """Where it were, the algorithm could be declared sequence-level and compose with ISOPO."""
    case = make_case(7, drift=2.0)
    _, gradient, _ = loss_and_gradient(name, case)
    with pytest.raises(ProxstepError, match="differs"):
        gradient_by_sequence(gradient, case.response_mask, otherwise="it differs")


@of_each
def test_idle_at_zero_is_what_the_loss_does(name):
    case = make_case(4, drift=3.0, with_empty=False)
    at_zero = Case(case.log_probs, case.old_log_probs, 0 * case.advantages, case.response_mask)
    _, gradient, _ = loss_and_gradient(name, at_zero)
    assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
    idle = bool((gradient == 0).all())
    assert ALGORITHMS[name].idle_at_zero == idle, f"declare {name} with idle_at_zero={idle}"


@of_each
def test_the_old_policy_and_the_advantages_carry_no_gradient(name):
    case = make_case(0)
    leaves = [tensor.clone().requires_grad_() for tensor in case.tensors[:3]]
    loss, _ = ALGORITHMS[name].loss(*leaves, case.response_mask)
    loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


@of_each
def test_the_metrics_are_detached_and_have_one_entry_per_sequence(name):
    case = make_case(0)
    leaf = case.log_probs.requires_grad_()
    loss, metrics = ALGORITHMS[name].loss(leaf, *case.tensors[1:])
    assert loss.shape == ()
    assert metrics
    for value in metrics.values():
        assert value.shape == (6,)
        assert value.dtype == torch.float64
        assert not value.requires_grad


# Where the batch is cut


@of_each
@pytest.mark.parametrize("mode", MODES)
def test_microbatches_add_up_and_have_the_metrics_of_the_whole_batch(name, mode):
    case = make_case(8)
    aggregation = counted(mode, case.response_mask)
    loss, gradient, metrics = loss_and_gradient(name, case, aggregation=aggregation)
    total = 0.0
    for part in ([4], [5, 2, 3], [1, 0]):
        share, own, measured = loss_and_gradient(name, case.select(part), aggregation=aggregation)
        total += share
        assert_close(own, gradient[part])
        for key, value in measured.items():
            assert torch.equal(value, metrics[key][part])
    assert_close(loss, total)


@of_each
def test_weights_of_the_sequences_multiply_their_gradients(name):
    case = make_case(1)
    weight_B = case.advantages.exp()
    for mode in MODES:
        plain = counted(mode, case.response_mask)
        counts = (plain.num_sequences, plain.num_tokens, plain.max_length)
        weighted = Aggregation(mode, *counts, weight_B)
        _, expected, _ = loss_and_gradient(name, case, aggregation=plain)
        _, gradient, _ = loss_and_gradient(name, case, aggregation=weighted)
        assert_close(gradient, weight_B[:, None] * expected)


# Padding and extremes


@of_each
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_positions_are_harmless(name, poison):
    case = make_case(1)
    outside = ~case.response_mask
    poisoned = Case(
        case.log_probs.masked_fill(outside, poison),
        case.old_log_probs.masked_fill(outside, poison),
        case.advantages,
        case.response_mask,
    )
    clean_loss, clean_gradient, clean_metrics = loss_and_gradient(name, case)
    loss, gradient, metrics = loss_and_gradient(name, poisoned)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[outside] == 0).all()
    for key, value in metrics.items():
        assert torch.equal(value, clean_metrics[key])


@with_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_drift_of_a_thousand_nats_stays_finite(name, options, dtype):
    log_probs, _, advantages, mask = make_case(2, dtype=dtype).tensors
    for policy, old in ((log_probs, log_probs - 1e3), (log_probs - 1e3, log_probs)):
        at = Case(policy, old, 100 * advantages, mask)
        loss, gradient, metrics = loss_and_gradient(name, at, **options)
        assert loss.dtype == dtype
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
        assert all(torch.isfinite(value).all() for value in metrics.values())


@with_options
def test_certain_tokens_stay_finite(name, options):
    """Log-probability 0, under one policy or both."""
    case = make_case(3)
    certain = torch.zeros_like(case.log_probs)
    for log_probs, old in (
        (certain, certain),
        (certain, case.old_log_probs),
        (case.log_probs, certain),
    ):
        at = Case(log_probs, old, case.advantages, case.response_mask)
        loss, gradient, _ = loss_and_gradient(name, at, **options)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@with_options
def test_a_batch_without_any_token_has_loss_and_gradient_zero(name, options):
    case = make_case(0)
    empty = Case(*case.tensors[:3], torch.zeros_like(case.response_mask))
    loss, gradient, metrics = loss_and_gradient(name, empty, **options)
    assert loss == 0
    assert (gradient == 0).all()
    assert all(value.isfinite().all() for value in metrics.values())


@of_each
def test_inputs_that_do_not_fit_together_are_refused(name):
    loss = unchecked(ALGORITHMS[name].loss)
    log_probs, old, advantages, mask = make_case(0).tensors
    with pytest.raises(ProxstepError, match=r"advantages has shape \(6, 7\).*\(6,\)"):
        loss(log_probs, old, log_probs, mask)
    with pytest.raises(ProxstepError, match=r"old_log_probs has shape \(6, 6\)"):
        loss(log_probs, old[:, :-1], advantages, mask)
    with pytest.raises(ProxstepError, match=r"response_mask\.bool"):
        loss(log_probs, old, advantages, mask.double())
    with pytest.raises(ProxstepError, match=r"response_mask has shape \(5, 7\)"):
        loss(log_probs, old, advantages, mask[1:])
    with pytest.raises(ProxstepError, match=r"log_probs has shape \(6,\)"):
        loss(log_probs[:, 0], old, advantages, mask)


def unchecked(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss without the shape checks of the test suite."""
    if isinstance(loss, partial):
        return partial(inspect.unwrap(loss.func), *loss.args, **loss.keywords)
    return inspect.unwrap(loss)


@with_options
def test_every_number_of_the_loss_is_checked(name, options):
    """A key that the declaration bounds is refused by the loss too, beyond its bound."""
    algorithm = ALGORITHMS[name]
    for key, value in algorithm.loss_options(options).items():
        if isinstance(value, bool | str):
            continue
        bounds = algorithm.keys[key].bounds
        for limit in (bounds.get("ge"), bounds.get("gt")):
            if limit is not None:
                with pytest.raises(ProxstepError, match=f"{key} is"):
                    algorithm.loss(*make_case(0).tensors, **{key: float(limit - 1)})
                with pytest.raises(ProxstepError, match=f"{key} is nan"):
                    algorithm.loss(*make_case(0).tensors, **{key: float("nan")})


# From rewards to the signal


def old_policy(seed: int) -> OldPolicy:
    generator = torch.Generator().manual_seed(seed)
    log_prob_BT = -2 * torch.rand(8, 5, generator=generator)
    response_BT = torch.rand(8, 5, generator=generator) < 0.7
    response_BT[6] = False  # no token at all
    sampler_BT = log_prob_BT + 0.3 * torch.randn(8, 5, generator=generator)
    return OldPolicy(log_prob_BT, response_BT, 50, sampler_BT)


def signal_of(
    name: str, reward_B: Tensor, options: dict[str, Any], order: Tensor | None = None
) -> Signal:
    algorithm, rows = ALGORITHMS[name], torch.arange(8) if order is None else order
    advantage_B, _ = ADVANTAGES[algorithm.advantage](reward_B[rows], GROUP[rows])
    old = old_policy(0)
    seen = OldPolicy(old.log_prob_BT[rows], old.response_BT[rows], old.vocabulary_size)
    return algorithm.signal(SignalInputs(advantage_B, GROUP[rows], seen), options)


@pytest.mark.parametrize(("name", "options"), options_of("sequence", "token", prepared=True))
@pytest.mark.parametrize("seed", SEEDS)
def test_the_signal_is_finite_detached_and_follows_its_sequence(name, options, seed):
    generator = torch.Generator().manual_seed(seed)
    reward_B = torch.rand(8, generator=generator)
    signal = signal_of(name, reward_B, options)
    assert signal.value_B.shape == (8,)
    assert signal.value_B.isfinite().all()
    assert not signal.value_B.requires_grad
    order = torch.randperm(8, generator=generator)
    moved = signal_of(name, reward_B, options, order)
    torch.testing.assert_close(moved.value_B, signal.value_B[order], rtol=1e-4, atol=1e-5)
    assert signal.hyper.keys() <= algorithm_keys(name)


def algorithm_keys(name: str) -> set[str]:
    return set(ALGORITHMS[name].loss_options(ALGORITHMS[name].defaults))


@of_each
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_equal_rewards_move_nothing(name, value):
    """On-policy, with the algorithm's own advantages: exactly."""
    signal = signal_of(name, torch.full((8,), value), {})
    log_probs = old_policy(0).log_prob_BT
    mask = old_policy(0).response_BT
    case = Case(log_probs, log_probs.clone(), signal.value_B, mask)
    _, gradient, _ = loss_and_gradient(name, case, **signal.hyper)
    assert (gradient == 0).all()


@of_each
def test_better_than_the_rest_is_pushed_up_and_worse_down(name):
    reward_B = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    signal = signal_of(name, reward_B, {})
    log_probs = old_policy(0).log_prob_BT
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    case = Case(log_probs, log_probs.clone(), signal.value_B, mask)
    _, gradient, _ = loss_and_gradient(name, case, **signal.hyper)
    push_B = -gradient.sum(dim=1)
    assert (push_B[reward_B == 1] > 0).all()
    assert (push_B[reward_B == 0] < 0).all()


@of_each
def test_its_loss_can_be_imported(name):
    loss = getattr(ALGORITHMS[name].loss, "func", ALGORITHMS[name].loss)
    public = getattr(algorithms, loss.__name__, None)
    assert public is loss, f"import {loss.__name__} in algorithms/__init__.py"
    assert loss.__name__ in algorithms.__all__


@of_each
def test_the_declaration_says_what_each_key_is(name):
    algorithm = ALGORITHMS[name]
    assert algorithm.name == name
    assert algorithm.about.endswith(".")
    assert algorithm.advantage in ADVANTAGES
    assert algorithm.default_loss_agg_mode in MODES
    assert list(algorithm.keys) == list(algorithm.defaults) == list(algorithm.types)
    for key, default in algorithm.defaults.items():
        assert algorithm.keys[key].help.endswith(".")
        if algorithm.keys[key].choices:
            assert default in algorithm.keys[key].choices
        elif isinstance(default, int | float):
            assert within(default, algorithm.keys[key].bounds)
