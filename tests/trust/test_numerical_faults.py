"""Numbers that are not finite, huge or tiny, wherever one can come in: none passes in silence.

Each is an error, or a gradient that is finite and right.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from proxstep import PRESETS, IsometricRule, NaturalRule, ProxstepError
from proxstep.algorithms import ALGORITHMS
from proxstep.isopo.rule import fisher_squares
from proxstep.training.trainer import Trainer
from tests.engine import collected, made_trainer
from tests.trust.library import COEFFICIENTS, FORMULAS, IDS, MASK, Tiny, World, expected, log_probs

NAN, INF = float("nan"), float("inf")
NUMBERS = {
    "NaN": NAN,
    "inf": INF,
    "-inf": -INF,
    "huge": 3e38,
    "-huge": -3e38,
    "1e20": 1e20,
    "tiny": 1e-42,
    "zero": 0.0,
}
UNMEASURED = ("reinforce", "proma", "proma-intra")
"""The rules that measure nothing by which a step could tell that a gradient is not finite."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# -- the library -----------------------------------------------------------------------------------


def in_parameter(name: str) -> Callable[[World, float], Any]:
    @torch.no_grad()
    def put(world: World, value: float) -> None:
        dict(world.model.named_parameters())[name].reshape(-1)[7 % 6] = value

    return put


def everywhere(name: str) -> Callable[[World, float], Any]:
    @torch.no_grad()
    def put(world: World, value: float) -> None:
        dict(world.model.named_parameters())[name].fill_(value)

    return put


PLACES = {
    "table": in_parameter("table.weight"),
    "norm": in_parameter("norm.weight"),
    "shift": in_parameter("norm.bias"),
    "head": in_parameter("head.weight"),
    "bias": in_parameter("head.bias"),
    "whole head": everywhere("head.weight"),
    "whole norm": everywhere("norm.weight"),
}


def is_spoken_of(world: World, act: Callable[[], Any]) -> bool:
    """Whether a step raises, or has finite gradients after all; and is whole again afterwards."""
    try:
        act()
        world.isopo.step()
    except ProxstepError:
        return True
    return all(g is None or bool(g.isfinite().all()) for g in world.gradients().values())


def is_as_before(world: World) -> bool:
    """Whether what comes after a fault is not touched by it: neither means nor samples."""
    state = world.isopo.state_dict()
    kept = [*state["trailing"].values()]
    for sample in state["samples"].values():
        kept += [x for x in sample.values() if isinstance(x, torch.Tensor)]
    return all(bool(x.isfinite().all()) for x in kept if x.is_floating_point())


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (rule, dtype)
        if (rule, dtype) == ("isopo", torch.float32)
        else pytest.param(rule, dtype, marks=pytest.mark.slow)
        for rule in PRESETS
        for dtype in DTYPES
    ],
)
def test_a_number_in_the_weights(
    rule: str, dtype: torch.dtype, counted: Callable[..., None]
) -> None:
    silent = []
    for place, put in PLACES.items():
        for what, value in NUMBERS.items():
            world = World(rule, {"overlap_source": "previous_step"}, dtype)
            put(world, value)
            spoken = is_spoken_of(world, world.backward)
            if rule in UNMEASURED and not spoken:  # as in plain torch: the norm says it
                norm = nn.utils.clip_grad_norm_(world.model.parameters(), 1.0)
                spoken = not bool(norm.isfinite())
            if not spoken or not is_as_before(world):
                silent.append(f"{place}: {what}")
    counted("numerical faults: weights", len(PLACES) * len(NUMBERS), len(silent))
    assert not silent


@pytest.mark.parametrize("rule", PRESETS)
def test_a_number_in_the_log_probabilities(rule: str, counted: Callable[..., None]) -> None:
    """Where the mask leaves it out it changes nothing; where it counts it is an error."""
    silent, tried = [], 0
    wanted = expected(rule) if rule in FORMULAS else {}
    for what, value in NUMBERS.items():
        for counts in (True, False):
            tried += 1
            world = World(rule)
            spot = torch.zeros_like(MASK)
            spot[1, 0 if counts else -1] = True

            def act(world: World = world, spot: Any = spot, value: float = value) -> None:
                with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
                    log_prob = log_probs(world.model).masked_fill(spot, value)
                    microbatch.objective(log_prob, MASK).backward()

            spoken = is_spoken_of(world, act)
            if not spoken or (
                counts and not math.isfinite(value) and world.model.head.bias.grad is not None
            ):
                silent.append(f"{what}, {counts}")
            if not counts and wanted and not world.is_right():
                silent.append(f"{what} is not left out")
    counted("numerical faults: log-probabilities", tried, len(silent))
    assert not silent


@pytest.mark.parametrize("rule", PRESETS)
def test_a_number_among_the_coefficients(rule: str, counted: Callable[..., None]) -> None:
    silent = []
    for what, value in NUMBERS.items():
        for dtype in (torch.float32, torch.float64):
            world = World(rule, {}, torch.float64)
            coefficients = torch.tensor([value, -0.25], dtype=dtype)
            if not is_spoken_of(world, lambda w=world, c=coefficients: w.backward(coefficients=c)):
                silent.append(what)
    counted("numerical faults: coefficients", 2 * len(NUMBERS), len(silent))
    assert not silent


@pytest.mark.parametrize("rule", PRESETS)
def test_gradients_of_zero(rule: str, counted: Callable[..., None]) -> None:
    """Of one sequence, of all, and of no coefficients: finite, and zero where they should be."""
    cases = {"one": torch.tensor([[1.0], [0.0]]), "all": torch.zeros(2, 1)}
    silent = []
    for name, scale in cases.items():
        world = World(rule)
        with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            log_prob = log_probs(world.model)
            held = torch.where(scale.bool(), log_prob, log_prob * 0.0)
            microbatch.objective(
                held.detach() + held - held.detach(), MASK & scale.bool()
            ).backward()
        world.isopo.step()
        found = [g for g in world.gradients().values() if g is not None]
        if not all(bool(g.isfinite().all()) for g in found):
            silent.append(name)
        if name == "all" and any(bool(g.any()) for g in found):
            silent.append("all is not zero")
    world = World(rule)
    world.backward(coefficients=torch.zeros(2))
    if any(bool(g.any()) for g in world.gradients().values() if g is not None):
        silent.append("coefficients")
    counted("numerical faults: zeros", 3, len(silent))
    assert not silent


def test_a_step_that_was_not_finite_leaves_nothing_behind(counted: Callable[..., None]) -> None:
    """The next steps are those of a run without it."""
    for rule in ("isopo", "isopo-natural"):
        runs = []
        for broken in (False, True):
            world = World(rule, {"overlap_source": "previous_step"})
            world.backward()
            world.isopo.step()
            if broken:
                kept = world.model.norm.weight.detach().clone()
                with torch.no_grad():
                    world.model.norm.weight[0] = 1e200
                with pytest.raises(ProxstepError):  # noqa: PT012
                    world.backward()
                    world.isopo.step()
                with torch.no_grad():
                    world.model.norm.weight.copy_(kept)
                world.isopo.load_state_dict({**world.isopo.state_dict(), "step": 1})
            world.model.zero_grad()
            world.backward(sequence_keys=[4, 7])
            runs.append(world.gradients())
        assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])  # type: ignore[arg-type]
    counted("numerical faults: what comes after", 2)


def test_fisher_norms_and_kernels(counted: Callable[..., None]) -> None:
    """Of zero, tiny and huge lengths: the documented values."""
    square_B, filled_B = fisher_squares(torch.zeros(3, 2), None, torch.zeros(2), {}, None)
    assert filled_B.all()
    assert not square_B.any()
    past = {"fisher_sq": torch.tensor(4.0)}
    square_B, _ = fisher_squares(torch.zeros(3, 2), None, torch.ones(2), past, None)
    assert square_B.tolist() == [4.0, 4.0]
    tried = 2
    for rule in (IsometricRule(-1.0), IsometricRule(-1.0, scale="paper"), NaturalRule()):
        for scale in (0.0, 1e-20, 1e-3, 1e3):
            world = World("reinforce")
            world.isopo.remove()
            world = World(rule)
            with torch.no_grad():
                world.model.head.weight.mul_(scale)
            world.backward()
            world.isopo.step()
            found = [g for g in world.gradients().values() if g is not None]
            assert all(bool(g.isfinite().all()) for g in found)
            tried += 1
    counted("numerical faults: lengths of zero and beyond", tried)


# -- the local trainer -----------------------------------------------------------------------------

SMALL = {"num_prompts": 2, "num_generations": 4, "max_completion_length": 3}
SOME = ("reinforce", "opo")
CHOSEN = [*ALGORITHMS, "isopo+opo", "isopo+reinforce"]
Fault = Callable[[Trainer, pytest.MonkeyPatch], None]


@torch.no_grad()
def parameter(value: float) -> Fault:
    def put(made: Trainer, patch: pytest.MonkeyPatch) -> None:
        with torch.no_grad():
            next(made.model.parameters()).view(-1)[5] = value

    return put


def of_batch(name: str, value: float) -> Fault:
    """A number in what the update gets of a rollout."""

    def put(made: Trainer, patch: pytest.MonkeyPatch) -> None:
        plain = made._update

        def update(batch: Any) -> Any:
            held = getattr(batch, name)
            if held is None:
                held = torch.ones_like(batch.signal_B)
                setattr(batch, name, held) if not _frozen(batch) else None
            held.view(-1)[0] = value
            where = batch.completions.response_BT
            if held.dim() == 2:
                held.masked_fill_(where[:, 1:], value)
            return plain(batch)

        patch.setattr(made, "_update", update)

    return put


def _frozen(value: Any) -> bool:
    return bool(getattr(type(value), "__dataclass_params__", None)) and (
        type(value).__dataclass_params__.frozen
    )


def gradient(value: float) -> Fault:
    """A number in a gradient, with a finite loss."""

    def put(made: Trainer, patch: pytest.MonkeyPatch) -> None:
        def change(grad: Any) -> Any:
            grad = grad.clone()
            grad.view(-1)[0] = value
            return grad

        list(made.model.parameters())[3].register_hook(change)

    return put


def loss(value: float) -> Fault:
    """A loss that is not finite, with a finite gradient."""

    def put(made: Trainer, patch: pytest.MonkeyPatch) -> None:
        plain = made.objective.backward

        def backward(*args: Any, **options: Any) -> Any:
            found, metrics = plain(*args, **options)
            return torch.full_like(found, value), metrics

        patch.setattr(made.objective, "backward", backward)

    return put


FAULTS: dict[str, Fault] = {
    **{f"parameter {v}": parameter(v) for v in (NAN, INF, -INF, 3e38)},
    **{f"signal {v}": of_batch("signal_B", v) for v in (NAN, INF, -INF, 3e38)},
    **{f"old log-prob {v}": of_batch("old_log_prob_BT", v) for v in (NAN, -INF, INF)},
    **{f"gradient {v}": gradient(v) for v in (NAN, INF)},
    **{f"loss {v}": loss(v) for v in (NAN, INF)},
}


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in CHOSEN]
)
def test_a_number_in_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[..., None]
) -> None:
    """It is an error and changes no parameter, or the step is taken and all stays finite."""
    silent = []
    changes = {"rollout": SMALL, "update": {"num_minibatches": 2}}
    for number, (what, fault) in enumerate(FAULTS.items()):
        made = made_trainer(tmp_path / str(number), name, **changes)
        with monkeypatch.context() as patch:
            batch, _ = collected(made)
            assert batch is not None
            fault(made, patch)
            before = copy.deepcopy(made.model.state_dict())
            try:
                made._update(batch)
            except ProxstepError:
                same = all(
                    torch.allclose(value, before[key], rtol=0, atol=0, equal_nan=True)
                    or bool(value.isfinite().all())
                    for key, value in made.model.state_dict().items()
                )
                if not same:
                    silent.append(what)
                continue
        finite = all(bool(value.isfinite().all()) for value in made.model.state_dict().values())
        if not finite or what.startswith(("loss", "gradient")):
            silent.append(what)
    counted("numerical faults: training", len(FAULTS), len(silent))
    assert not silent


def test_a_model_in_which_nothing_is_finite() -> None:
    world = World("isopo-natural")
    for parameter_ in world.model.parameters():
        nn.init.constant_(parameter_, NAN)
    with pytest.raises(ProxstepError, match="not finite"):
        world.backward()
    assert all(p.grad is None for p in Tiny().parameters())
