"""KlBudget in a plain loop: what is scaled, what is not, and what is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import ScheduleFreeAdamW
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import proxstep
from proxstep import KlBudget, ProxstepError
from proxstep.budget import CONTROLS
from proxstep.budget.control import State, adapt, backtrack, predict
from proxstep.budget.prediction import sampled_kl

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=10 * lr, momentum=0.9),
}


class Loop:
    """A tiny policy and its loop, always the same."""

    def __init__(self, name: str, rate: float, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Embedding(11, 16), nn.Linear(16, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 11)
        )
        self.inner = OPTIMIZERS[name](self.model.parameters(), rate)
        self.optimizer: torch.optim.Optimizer = self.inner
        if options:
            self.optimizer = KlBudget(self.inner, self.model, **options)

    def log_probs(self) -> tuple[Tensor, Tensor]:
        chosen = self.model(self.token[:, :-1]).log_softmax(-1)
        log_prob = chosen.gather(-1, self.token[:, 1:, None]).squeeze(-1)
        return log_prob, torch.ones_like(log_prob, dtype=torch.bool)

    def backward(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.token = torch.randint(11, (16, 9), generator=generator)
        advantage = torch.randn(16, generator=generator)
        torch.manual_seed(step)
        self.optimizer.zero_grad()
        (-(advantage[:, None] * self.log_probs()[0]).sum() / 16).backward()

    def run(self, steps: int, first: int = 0) -> list[dict[str, float]]:
        measured = []
        for step in range(first, first + steps):
            self.backward(step)
            if isinstance(self.optimizer, KlBudget):
                self.optimizer.step(self.log_probs)
                measured.append(self.optimizer.measured)
            else:
                self.optimizer.step()
        return measured

    @torch.no_grad()
    def log_probs_without_dropout(self) -> Tensor:
        self.model.eval()
        found, _ = self.log_probs()
        self.model.train()
        return found

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("control", ["predicted", "corrected", "measured-backtracking"])
def test_a_step_within_the_budget_is_the_optimizers_own_to_the_bit(name: str, control: str) -> None:
    plain, limited = Loop(name, 1e-3), Loop(name, 1e-3, nats=1e3, control=control)
    plain.run(3)
    assert [m["scale"] for m in limited.run(3)] == [1.0, 1.0, 1.0]
    for mine, its in zip(limited.weights(), plain.weights(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_scaled_and_not_the_moments(name: str) -> None:
    plain, limited = Loop(name, 0.1), Loop(name, 0.1, nats=1e-3)
    start = limited.weights()
    plain.run(1)
    (measured,) = limited.run(1)
    scale = measured["scale"]
    assert 1e-4 < scale < 0.5
    for old, mine, its in zip(start, limited.weights(), plain.weights(), strict=True):
        torch.testing.assert_close(mine - old, scale * (its - old), rtol=1e-4, atol=1e-6)
    mine, its = limited.inner.state_dict()["state"], plain.inner.state_dict()["state"]
    for key in its:
        for field, value in its[key].items():
            assert torch.equal(torch.as_tensor(mine[key][field]), torch.as_tensor(value)), field


@pytest.mark.parametrize("control", ["predicted", "corrected", "measured-backtracking"])
@pytest.mark.parametrize("rate", [1e-3, 0.03, 1.0])
def test_what_the_step_does_to_the_sequences_is_within_the_budget(
    control: str, rate: float
) -> None:
    loop = Loop("adamw", rate, nats=0.02, control=control)
    loop.model.eval()
    for step in range(6):
        loop.backward(step)
        before, counts = (x.detach() for x in loop.log_probs())
        loop.optimizer.step(loop.log_probs)  # type: ignore[arg-type]
        taken = float(sampled_kl(before, loop.log_probs()[0].detach(), counts).mean())
        assert taken <= (0.03 if control != "measured-backtracking" else 0.02 + 1e-9)
        if rate >= 0.03 and control == "predicted":
            assert taken >= 0.013


def test_the_model_scores_in_evaluation_mode_and_without_gradient_and_trains_on() -> None:
    loop = Loop("adamw", 0.1, nats=1e-3)
    seen = []
    loop.backward(0)

    def log_probs() -> tuple[Tensor, Tensor]:
        seen.append((loop.model.training, torch.is_grad_enabled()))
        return loop.log_probs()

    loop.optimizer.step(log_probs)  # type: ignore[arg-type]
    assert set(seen) == {(False, False)}
    assert loop.model.training
    assert loop.optimizer.measured["forwards"] == len(seen)  # type: ignore[union-attr]


def test_a_budget_of_a_token_is_that_of_a_sequence_over_its_length() -> None:
    by_sequence = Loop("adamw", 0.1, nats=8 * 1e-3)
    by_token = Loop("adamw", 0.1, nats=1e-3, per="token")
    (whole,), (each,) = by_sequence.run(1), by_token.run(1)
    assert each["scale"] == pytest.approx(whole["scale"], rel=1e-6)
    assert each["predicted"] == pytest.approx(whole["predicted"] / 8, rel=1e-6)


def test_a_rollouts_steps_share_its_budget() -> None:
    loop = Loop("adamw", 0.1, nats=0.01)
    budget = loop.optimizer
    assert isinstance(budget, KlBudget)
    for _ in range(2):
        budget.begin_rollout(4)
        spent = [m["predicted"] * m["scale"] ** 2 for m in loop.run(4)]
        assert spent == pytest.approx([0.0025] * 4, rel=1e-3)
    loop = Loop("adamw", 1e-5, nats=0.01)
    loop.optimizer.begin_rollout(2)  # type: ignore[union-attr]
    assert loop.run(1)[0]["scale"] == 1.0
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.1
    (last,) = loop.run(1)
    assert last["predicted"] * last["scale"] ** 2 == pytest.approx(0.01, rel=0.05)  # what was left


@pytest.mark.parametrize("control", CONTROLS)
def test_a_state_goes_on_to_the_bit(control: str) -> None:
    whole = Loop("adamw", 0.05, nats=0.01, control=control)
    expected = whole.run(6)
    first = Loop("adamw", 0.05, nats=0.01, control=control)
    first.run(3)
    second = Loop("adamw", 0.05, nats=0.01, control=control)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert second.run(3, first=3) == expected[3:]
    for mine, its in zip(second.weights(), whole.weights(), strict=True):
        assert torch.equal(mine, its)


def test_a_learning_rate_that_is_always_too_large_is_told_once() -> None:
    told: list[str] = []
    loop = Loop("adamw", 3.0, nats=1e-3, note=told.append)
    loop.run(19)
    assert not told
    loop.run(5, first=19)
    assert len(told) == 1
    assert "times what the budget allows" in told[0]


def test_a_schedule_reaches_the_optimizer() -> None:
    loop = Loop("adamw", 0.1, nats=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: 1 / (1 + step))
    loop.run(1)
    schedule.step()
    assert [group["lr"] for group in loop.inner.param_groups] == [0.05]


@pytest.mark.parametrize("control", ["predicted", "corrected", "measured-backtracking"])
def test_a_schedule_is_the_budgets_too(control: Any) -> None:
    """Of a rate that is far too large it would do nothing else."""
    factors = [1.0, 0.5, 0.1, 0.0, 0.5]
    loop = Loop("sgd", 10.0, nats=0.02, control=control)
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: factors[step % 5])
    for step, factor in enumerate(factors):
        loop.backward(step)
        before = loop.log_probs_without_dropout()
        loop.optimizer.step(loop.log_probs)
        after = loop.log_probs_without_dropout()
        mask = torch.ones_like(before, dtype=torch.bool)
        assert sampled_kl(before, after, mask).mean() <= 1.3 * 0.02 * factor**2 + 1e-9
        schedule.step()


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "by hand": lambda optimizer: None,
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=10.0, total_steps=10, cycle_momentum=False
    ),
    "up and down": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: [0.1, 1.0, 3.0, 0.5][step % 4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_raises_the_budget(name: str) -> None:
    """The rates that a schedule begins with may be far below its peak."""
    loop = Loop("sgd", 1.0, nats=0.02)
    schedule = SCHEDULES[name](loop.optimizer)
    for step in range(9):
        loop.backward(step)
        before = loop.log_probs_without_dropout()
        if schedule is None:
            loop.inner.param_groups[0]["lr"] = 10.0 / (1 + abs(step - 4))
        loop.optimizer.step(loop.log_probs)  # type: ignore[arg-type]
        mask = torch.ones_like(before, dtype=torch.bool)
        after = loop.log_probs_without_dropout()
        assert sampled_kl(before, after, mask).mean() <= 1.3 * 0.02
        if schedule is not None:
            schedule.step()


def test_a_rate_that_is_lowered_by_hand_lowers_the_budget() -> None:
    loop = Loop("sgd", 10.0, nats=0.02)
    (first,) = loop.run(1)
    loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    loop.inner.param_groups[0]["lr"] *= 0.1
    loop.backward(1)
    before = loop.log_probs_without_dropout()
    loop.optimizer.step(loop.log_probs)  # type: ignore[arg-type]
    after = loop.log_probs_without_dropout()
    assert first["scale"] < 1
    assert sampled_kl(before, after, torch.ones_like(before).bool()).mean() <= 1.3 * 0.0002


def test_a_budget_that_is_halved_with_the_rates_is_halved_once() -> None:
    """As the guard does it, from one checkpoint again and again."""
    loop = Loop("adamw", 1e-2, nats=0.04)
    optimizer: Any = loop.optimizer
    mask = torch.ones(16, 1, dtype=torch.bool)
    loop.run(1)
    kept = copy.deepcopy(optimizer.state_dict())
    for returns in (1, 2, 3):
        optimizer.load_state_dict(copy.deepcopy(kept))
        for group in optimizer.param_groups:
            group |= {"lr": 1e-2 / 2**returns, "initial_lr": 1e-2 / 2**returns}
        optimizer.rescale(0.04 / 2**returns)
        optimizer.begin_rollout(1)
        assert optimizer._budget(mask)[0] == pytest.approx(0.04 / 2**returns)
        optimizer.param_groups[0]["lr"] /= 2
        assert optimizer._budget(mask)[0] == pytest.approx(0.01 / 2**returns)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_step_that_is_not_finite_changes_no_parameter(control: Any) -> None:
    loop = Loop("sgd", 0.1, nats=0.1, control=control)
    loop.backward(0)
    start = loop.weights()
    next(loop.model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(ProxstepError, match="is nan"):
        loop.optimizer.step(loop.log_probs)  # type: ignore[arg-type]
    for mine, old in zip(loop.weights(), start, strict=True):
        assert torch.equal(mine, old)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_error_of_any_kind_leaves_the_parameters_as_they_were(call: int, control: Any) -> None:
    """Such as one of memory, after which a loop may go on."""
    loop = Loop("adamw", 0.1, nats=0.01, control=control)
    loop.run(1)
    loop.backward(1)
    start, calls = loop.weights(), 0

    def score() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError
        return loop.log_probs()

    if call == 3 and control in ("predicted", "adaptive-learning-rate"):
        loop.optimizer.step(score)  # type: ignore[arg-type]
        assert calls == 2
        return
    with pytest.raises(MemoryError):
        loop.optimizer.step(score)  # type: ignore[arg-type]
    for mine, old in zip(loop.weights(), start, strict=True):
        assert torch.equal(mine, old)


def test_an_optimizer_that_fails_leaves_the_parameters_as_they_were() -> None:
    loop = Loop("adamw", 0.1, nats=0.01)
    loop.backward(0)
    start = loop.weights()
    step = loop.inner.step

    def failing() -> None:
        step()
        raise MemoryError

    loop.inner.step = failing  # type: ignore[assignment,method-assign]
    with pytest.raises(MemoryError):
        loop.optimizer.step(loop.log_probs)  # type: ignore[arg-type]
    for mine, old in zip(loop.weights(), start, strict=True):
        assert torch.equal(mine, old)


@pytest.mark.parametrize("control", CONTROLS)
def test_sequences_without_a_token_that_counts_have_no_say(control: Any) -> None:
    whole, some = (Loop("adamw", 0.1, nats=0.01, control=control) for _ in range(2))
    for step in range(2):
        for loop in (whole, some):
            loop.backward(step)

        def counted() -> tuple[Tensor, Tensor]:
            log_prob, counts = some.log_probs()
            return log_prob, counts & (torch.arange(16) % 2 == 0)[:, None]

        def cut() -> tuple[Tensor, Tensor]:
            log_prob, counts = whole.log_probs()
            return log_prob[::2], counts[::2]

        whole.optimizer.step(cut)  # type: ignore[arg-type]
        some.optimizer.step(counted)  # type: ignore[arg-type]
        expected = whole.optimizer.measured  # type: ignore[union-attr]
        assert some.optimizer.measured == pytest.approx(expected)  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused() -> None:
    for options in ({"nats": 0.0}, {"nats": 1.0, "per": "word"}, {"nats": 1.0, "control": "none"}):
        with pytest.raises(ProxstepError, match=list(options)[-1]):
            Loop("sgd", 0.1, **options)
    loop = Loop("sgd", 0.1, nats=1.0)
    loop.backward(0)
    with pytest.raises(ProxstepError, match=r"\(batch, tokens\)"):
        loop.optimizer.step(lambda: (torch.zeros(3), torch.ones(3)))  # type: ignore[arg-type]


def half(tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tensors[0].bfloat16(), tensors[1]


class Anew:
    """Scores other sequences at each call."""

    def __init__(self, loop: Loop, *, length: bool) -> None:
        self.loop, self.calls, self.length = loop, 0, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        columns = 9 - self.calls * self.length
        generator = torch.Generator().manual_seed(self.calls)
        self.loop.token = torch.randint(11, (16, columns), generator=generator)
        return self.loop.log_probs()


MISTAKES: dict[str, tuple[Callable[[Loop], Any], str]] = {
    "a loss": (lambda loop: lambda: loop.log_probs()[0].sum(), r"two tensors .*: got \(\)"),
    "one tensor": (lambda loop: lambda: loop.log_probs()[0], r"two tensors .*: got \(16, 8\)"),
    "a mask of all tokens": (
        lambda loop: lambda: (loop.log_probs()[0], torch.ones(16, 9)),
        r"mask\[:, 1:\]: got \(16, 8\) and \(16, 9\)",
    ),
    "nothing": (lambda loop: lambda: None, "got NoneType"),
    "half precision": (lambda loop: lambda: half(loop.log_probs()), "float32: got torch.bfloat16"),
    "probabilities": (
        lambda loop: lambda: (loop.log_probs()[0].exp(), loop.log_probs()[1]),
        "no log-probabilities",
    ),
    "a closure": (lambda loop: lambda: loop.log_probs()[0].sum().backward(), "without gradient"),
    "scores": (lambda loop: loop.log_probs(), "needs a function"),
    "sequences anew": (lambda loop: Anew(loop, length=False), "nats apart"),
    "lengths anew": (lambda loop: Anew(loop, length=True), "number, length or mask"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_what_scores_is_named_and_changes_nothing(name: str) -> None:
    loop = Loop("adamw", 0.1, nats=0.01)
    loop.backward(0)
    start = loop.weights()
    score, message = MISTAKES[name]
    with pytest.raises(ProxstepError, match=message):
        loop.optimizer.step(score(loop))
    for mine, old in zip(loop.weights(), start, strict=True):
        assert torch.equal(mine, old)


@pytest.mark.parametrize("name", ["another model", "no token"])
def test_a_step_that_nothing_measures_is_told_once(name: str) -> None:
    told: list[str] = []
    loop = Loop("adamw", 0.1, nats=0.01, note=told.append)
    other = Loop("adamw", 0.1)

    def score() -> tuple[Tensor, Tensor]:
        other.token = loop.token
        other.model.eval()
        log_prob, counts = (other if name == "another model" else loop).log_probs()
        return log_prob, counts if name == "another model" else torch.zeros_like(counts)

    for step in range(2):
        loop.backward(step)
        loop.optimizer.step(score)  # type: ignore[arg-type]
    assert len(told) == 1
    assert "limits nothing" in told[0]
    still: list[str] = []
    loop = Loop("adamw", 0.0, nats=0.01, note=still.append)  # a warm-up begins with a rate of 0
    loop.run(1)
    assert not still


def test_a_policy_that_is_sure_of_every_token_is_no_mistake() -> None:
    """Its log-probabilities are 0 before the step and after it, in float32."""
    told: list[str] = []
    loop = Loop("adamw", 0.1, nats=0.01, note=told.append)
    loop.backward(0)
    _, counts = loop.log_probs()
    loop.optimizer.step(lambda: (torch.zeros(counts.shape), counts))  # type: ignore[arg-type]
    assert not told


def test_a_step_whose_judges_have_no_token_takes_the_last_share() -> None:
    """As where all of them were cut off and are masked: a whole step could be far too large."""
    loop = Loop("adamw", 0.1, nats=1e-3, note=lambda _: None)
    (first,) = loop.run(1)
    loop.backward(1)
    loop.optimizer.step(lambda: (loop.log_probs()[0], torch.zeros(16, 8)))  # type: ignore[arg-type]
    assert loop.optimizer.measured["scale"] == first["scale"] < 1  # type: ignore[union-attr]


def test_autocast_around_the_step_changes_nothing() -> None:
    """Its cache would hold the weights as they were before the step."""
    loop, cast = Loop("adamw", 0.1, nats=0.01), Loop("adamw", 0.1, nats=0.01)
    expected = loop.run(1)
    cast.backward(0)
    with torch.autocast("cpu", torch.bfloat16):
        cast.log_probs()
        cast.optimizer.step(cast.log_probs)  # type: ignore[arg-type]
    assert [cast.optimizer.measured] == expected  # type: ignore[union-attr]


def test_what_accelerate_puts_around_the_model_is_left_out_while_it_scores() -> None:
    loop, cast = Loop("adamw", 0.1, nats=0.01), Loop("adamw", 0.1, nats=0.01)
    expected = loop.run(1)
    cast.backward(0)
    cast.model._original_forward = cast.model.forward  # type: ignore[assignment]
    around = torch.autocast("cpu", torch.bfloat16)(cast.model.forward)
    cast.model.forward = around  # type: ignore[method-assign]
    cast.optimizer.step(cast.log_probs)  # type: ignore[arg-type]
    assert [cast.optimizer.measured] == expected  # type: ignore[union-attr]
    assert cast.model.forward is around


def test_a_gradient_scaler_steps_it() -> None:
    loop, scaled = Loop("sgd", 0.1, nats=0.01), Loop("sgd", 0.1, nats=0.01)
    loop.run(1)
    scaled.backward(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for parameter in scaled.model.parameters():
        parameter.grad *= 4  # as scaler.scale(loss).backward() leaves it
    scaler.scale(torch.ones(()))
    scaler.step(scaled.optimizer, scaled.log_probs)
    for mine, its in zip(scaled.weights(), loop.weights(), strict=True):
        assert torch.equal(mine, its)


def test_a_group_that_is_added_is_trained() -> None:
    loop = Loop("sgd", 0.1, nats=0.01, control="corrected")
    loop.run(2)
    more = nn.Parameter(torch.zeros(3))
    loop.optimizer.add_param_group({"params": [more], "lr": 0.5})
    assert loop.inner.param_groups is loop.optimizer.param_groups
    assert [group["lr"] for group in loop.inner.param_groups] == [1.0, 0.5]
    loop.run(1, first=2)


def test_a_host_that_moves_the_optimizers_state_finds_it() -> None:
    """As verl does, which offloads it: one state, also after a checkpoint."""
    loop = Loop("adamw", 0.1, nats=0.01)
    loop.run(1)
    assert len(loop.inner.state) == 5
    assert loop.optimizer.state is loop.inner.state
    loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    assert loop.optimizer.state is loop.inner.state


def test_a_frozen_base_is_not_copied() -> None:
    """Some hosts hand an optimizer all parameters, and adapters train a few of them."""
    loop = Loop("adamw", 0.1, nats=0.01, control="corrected")
    base: Any = loop.model[0].weight
    base.requires_grad_(False)
    frozen = base.clone()
    loop.run(2)
    kept = loop.optimizer.state_dict()["kl_budget"]["before"]
    assert [value.shape for value in kept] == [p.shape for p in loop.model[1:].parameters()]
    assert torch.equal(base, frozen)
    base.requires_grad_(True)
    (measured,) = loop.run(1, first=2)
    assert "realized" not in measured  # the parameters from before are not all of them


def test_a_checkpoint_goes_on_with_a_budget_or_without() -> None:
    """A budget may begin, or be left out, where a run is resumed."""
    limited, plain = Loop("adamw", 0.1, nats=0.01), Loop("adamw", 0.1)
    limited.run(2)
    plain.run(2)
    begun, left = Loop("adamw", 0.1, nats=0.01), Loop("adamw", 0.1)
    begun.optimizer.load_state_dict(plain.optimizer.state_dict())
    left.optimizer.load_state_dict(limited.optimizer.state_dict())
    for mine, its in ((begun, plain), (left, limited)):
        for one, other in zip(
            mine.inner.state_dict()["state"].values(),
            its.inner.state_dict()["state"].values(),
            strict=True,
        ):
            assert all(torch.equal(one[name], other[name]) for name in other)
    begun.run(1, first=2)
    left.run(1, first=2)


def test_a_plain_state_begins_the_budget_anew() -> None:
    """Else the next step would learn from weights of another run."""
    used = Loop("adamw", 0.1, nats=0.01, control="corrected")
    used.run(3)
    used.optimizer.load_state_dict(copy.deepcopy(used.inner.state_dict()))
    own = used.optimizer.state_dict()["kl_budget"]
    fresh = Loop("adamw", 0.1, nats=0.01, control="corrected").optimizer.state_dict()["kl_budget"]
    assert {**own, "last": None} == {**fresh, "last": None}


def test_a_copy_goes_on_by_itself() -> None:
    loop = Loop("adamw", 0.1, nats=0.01, control="corrected")
    loop.run(2)
    twin = copy.deepcopy(loop)
    assert twin.run(1, first=2) == loop.run(1, first=2)
    for mine, its in zip(loop.weights(), twin.weights(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("given", [True, False])
def test_torchs_distributed_checkpoint_takes_its_state(given: bool) -> None:
    """It fills a new optimizer's state by a step of rate 0 without a function."""
    used, fresh = (Loop("adamw", 0.1, nats=0.01, control="corrected") for _ in range(2))
    for loop in (used, fresh) if given else ():
        loop.optimizer._log_probs = loop.log_probs  # type: ignore[union-attr]
    used.run(3)
    saved = get_optimizer_state_dict(used.model, used.optimizer)
    saved = copy.deepcopy(saved)
    start = fresh.weights()
    set_optimizer_state_dict(fresh.model, fresh.optimizer, saved)
    for mine, old in zip(fresh.weights(), start, strict=True):
        assert torch.equal(mine, old)
    assert fresh.inner.param_groups[0]["lr"] == 0.1
    fresh.model.load_state_dict(used.model.state_dict())
    for one, other in zip(
        fresh.inner.state_dict()["state"].values(),
        used.inner.state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(one[name], other[name]) for name in other)
    (measured,) = fresh.run(1, first=3)
    assert "realized" not in measured
    assert measured["factor"] == 1.0


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As accelerate's, which has both methods whatever it holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def train(self) -> None: ...
    def eval(self) -> None: ...


class FullyShardedDataParallel(nn.Sequential):
    """Named as torch's."""


def test_what_keeps_weights_of_its_own_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
    free = ScheduleFreeAdamW(model.parameters(), lr=0.1)
    with pytest.raises(ProxstepError, match="ScheduleFreeAdamW keeps weights of its own"):
        KlBudget(free, model, nats=0.1)
    with pytest.raises(ProxstepError, match="ScheduleFreeAdamW"):
        KlBudget(AcceleratedOptimizer(free), model, nats=0.1)
    KlBudget(AcceleratedOptimizer(adamw), model, nats=0.1)
    with pytest.raises(ProxstepError, match="fully_shard"):
        KlBudget(adamw, FullyShardedDataParallel(model), nats=0.1)


def test_what_is_given_is_checked() -> None:
    model: Any = nn.Linear(2, 2)
    sgd: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    for optimizer, its, message in (
        (model, sgd, "optimizer is Linear"),
        (sgd, model.parameters(), "model is generator"),
        (sgd, nn.Linear(2, 2), "no parameter of the model"),
        (torch.optim.SGD(model.bfloat16().parameters()), model, r'bfloat16.*dtype="float32"'),
    ):
        with pytest.raises(ProxstepError, match=message):
            KlBudget(optimizer, its, nats=0.1)
    with pytest.raises(ProxstepError, match="num_steps is 0"):
        Loop("sgd", 0.1, nats=0.1).optimizer.begin_rollout(0)  # type: ignore[union-attr]


def test_it_is_exported_lazily() -> None:
    assert proxstep.KlBudget is KlBudget
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = proxstep.nothing_of_the_kind  # type: ignore[attr-defined]


# -- the controls ----------------------------------------------------------------------------------


def test_a_trial_far_from_the_step_is_made_again() -> None:
    tried = []

    def measure(scale: float) -> float:
        """Far out the divergence grows more slowly than the square."""
        tried.append(scale)
        return min(100 * scale**2, 1.0)

    assert predict(measure, State(scale=1.0), 0.01) == pytest.approx(100)
    assert tried == [1.0, 0.1, 0.01] or tried == [1.0, 0.1]


def test_a_factor_is_learned_without_the_bias_of_logarithms() -> None:
    state, generator = State(), torch.Generator().manual_seed(0)
    for noise in torch.rand(4000, generator=generator).tolist():
        state.learn(realized=0.02 * 1.5 * 2 * noise, predicted=0.02, budget=0.03)
    factors = []
    for noise in torch.rand(1000, generator=generator).tolist():
        state.learn(realized=0.02 * 1.5 * 2 * noise, predicted=0.02, budget=0.03)
        factors.append(state.factor)
    assert sum(factors) / 1000 == pytest.approx(1.5, rel=0.03)
    before = state.factor
    state.learn(realized=float("nan"), predicted=0.02, budget=0.03)
    assert state.factor == before


def test_backtracking_halves_and_adapting_goes_step_by_step() -> None:
    assert backtrack(lambda scale: scale, 0.3) == (0.25, 0.25)
    state = State(scale=0.5)
    assert adapt(state, 0.5, 0.1) == pytest.approx(0.5 / 1.5)
    assert adapt(state, 0.01, 0.1) == pytest.approx(0.75)
    assert adapt(state, 0.1, 0.1) == 0.5
    assert adapt(State(), 0.0, 0.1) == 1.0
