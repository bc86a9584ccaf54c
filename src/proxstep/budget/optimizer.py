"""KlBudget: any optimizer's step, scaled so that it moves the policy by so many nats at most."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, repeat
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from proxstep.algorithms.aggregate import check_literal, check_number
from proxstep.budget.checks import ANEW, MISSING, RETURNS, check_trained, checked
from proxstep.budget.control import (
    LEAST_SCALE,
    Control,
    State,
    adapt,
    backtrack,
    predict,
    scale_for,
)
from proxstep.budget.prediction import LogProbs, sampled_kl
from proxstep.errors import ProxstepError
from proxstep.logprobs.evaluating import evaluating
from proxstep.logprobs.tokens import widest_dtype
from proxstep.typing import Tensor

_SMALL, _MANY = 0.05, 20


class KlBudget(torch.optim.Optimizer):
    """An optimizer whose steps move the policy by so many nats at most.

        optimizer = KlBudget(torch.optim.AdamW(model.parameters(), lr=1e-3), model, nats=0.03)
        loss.backward()
        optimizer.step(log_probs)

    The optimizer proposes its step, with momentum, weight decay and whatever it does; the KL
    divergence of that step is predicted, and the step is multiplied by min(1, sqrt(nats /
    predicted)). The step is scaled, not the gradient and not the moments: those are the same as
    without a budget. A step that needs no scaling is the optimizer's own to the bit.

    A schedule of the learning rate is the budget's too: at half of the peak rate a step is half as
    long, a quarter of the nats. Else the schedule of a rate that is too large would do nothing. The
    peak is what torch's schedules say of themselves, or the largest rate so far.

    `log_probs` is a function without arguments that scores a few of the minibatch's sequences with
    the model as it is: it returns their tokens' log-probabilities in nats, (batch, tokens), at the
    temperature at which they were sampled, and a mask of the tokens that count. It is no closure
    that computes a loss: it runs without gradient, with the model in evaluation mode and autocast
    off, two times in most steps, and must score the same sequences each time. In half precision
    the differences that are measured drown in rounding errors: keep autocast out of it.

    Two copies of the trainable parameters are held during a step; with "corrected" one of them
    stays until the next. On several ranks each scores sequences of its own, and all of them take
    the same step; every rank must take it.

    Args:
        optimizer: Proposes steps. Schedules may be made on it or on this one.
        model: The policy.
        nats: The budget of a rollout: of one optimizer step, unless `begin_rollout` says how many
            share it.
        per: Whether the budget is of a "sequence", on average, or of a "token".
        control: One of `CONTROLS`.
        note: Told once if the scale stays below 0.05 for 20 steps.
        log_probs: What a step without a function is judged by, for a host that steps by itself.

    Attributes:
        inner: The optimizer that was given.
        measured: What the last step was: "predicted" (of the step as it was proposed, in the
            budget's unit), "scale", "forwards" (calls of `log_probs`), and where the control
            measures it "realized": of the step before, on samples that this step brought
            ("corrected"), or of this step ("measured-backtracking", "adaptive-learning-rate").
            Empty before the first step.

    Raises:
        ProxstepError: If an option does not fit, the optimizer trains nothing of the model, or
            something in half precision.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        nats: float,
        *,
        per: Literal["sequence", "token"] = "sequence",
        control: Control = "predicted",
        note: Callable[[str], None] = warnings.warn,
        log_probs: LogProbs | None = None,
    ) -> None:
        check_number("nats", nats, above=True)
        check_literal("per", per, Literal["sequence", "token"])
        check_literal("control", control, Control)
        check_trained(optimizer, model)
        self.inner, self.model, self.nats = optimizer, model, nats
        self.per, self.control, self.note = per, control, note
        self._log_probs = log_probs
        self.measured: dict[str, float] = {}
        self._kl = State()
        self._share, self._left, self._steps = 1.0, 0.0, 1
        self._small, self._forwards, self._still = 0, 0, False
        self._before: list[Tensor] | None = None
        self._expected = (0.0, 1.0)
        self._peaks: list[float] = []
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._be_one()

    def __getstate__(self) -> dict[str, Any]:
        """Return all of it: the base class would copy its own part alone."""
        return dict(vars(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Let the optimizer train more parameters.

        Args:
            param_group: As any optimizer takes it.
        """
        if all(param_group is not group for group in self.inner.param_groups):
            self.inner.add_param_group(param_group)
            self._before = None  # without the new ones

    def _be_one(self) -> None:
        """Have the optimizer's groups and state: for new groups, and hosts that move the state."""
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def begin_rollout(self, num_steps: int) -> None:
        """Let the next optimizer steps share one budget, in equal parts.

        What a step leaves of its part is added to those after it.

        Args:
            num_steps: How many there are.
        """
        check_number("num_steps", num_steps, 1.0)
        self._share, self._left, self._steps = 1.0 / num_steps, 0.0, num_steps

    def rescale(self, nats: float) -> None:
        """Go on with another budget and other learning rates, which are at their peak anew.

        Args:
            nats: The budget, as the class takes it.
        """
        check_number("nats", nats, above=True)
        self.nats, self._peaks = nats, []

    # The base class's annotation has overloads for closures that return a loss.
    def step(self, closure: LogProbs | None = None) -> None:  # type: ignore[override]
        """Take the optimizer's step, or as much of it as the budget allows.

        Args:
            closure: `log_probs`: scores a few of the minibatch's sequences; see the class. It may
                be left out where the constructor was given one.

        Raises:
            ProxstepError: If there is none, it returns something else or scores other sequences at
                each call, or the step's KL divergence is not finite at any size. The parameters
                are what they were then, as after any other error.
        """
        self._be_one()
        if all(float(group["lr"]) == 0.0 for group in self.param_groups):
            self.inner.step()  # also how torch.distributed.checkpoint makes a new state
            return
        closure = closure or self._log_probs
        if not callable(closure):
            raise ProxstepError(MISSING)
        self._forwards = 0
        parameters = self._parameters()
        with torch.no_grad(), evaluating(self.model), _full_precision(self.model):
            log_prob_BT, response_BT = self._score(closure)
            budget, unit = self._budget(response_BT)
            before = [parameter.clone() for parameter in parameters]

            def measure(scale: float) -> float:
                _place(parameters, before, proposed, scale)
                other_BT, counts_BT = self._score(closure)
                if not torch.equal(counts_BT, response_BT):
                    raise ProxstepError(f"{ANEW}: their number, length or mask is another one")
                return _mean(sampled_kl(log_prob_BT, other_BT, response_BT), response_BT)

            last = self._kl.scale
            try:
                realized = self._realized(closure, parameters, before, log_prob_BT, response_BT)
                with torch.enable_grad():
                    self.inner.step()
                proposed = [parameter.clone() for parameter in parameters]
                scale, predicted, measured = self._choose(measure, budget)
                if scale < 2 * LEAST_SCALE and (drift := measure(0.0)) > budget:
                    raise ProxstepError(f"{ANEW}: unchanged parameters are {drift:.3g} nats apart")
                if predicted == 0.0:
                    self._tell_still(before, proposed, log_prob_BT[response_BT])
                    if _mean_length(response_BT) == 0.0:  # nothing was measured
                        scale = self._kl.scale = last
            except BaseException:  # an interrupt too: no trial step may stay
                _place(parameters, before, before, 0.0)
                raise
            _place(parameters, before, proposed, scale)
        if self.control == "corrected":
            self._before = before
        self._spend(predicted * scale**2, budget)
        realized = realized if measured is None else measured
        self.measured = {"predicted": predicted / unit, "scale": scale}
        self.measured |= {"forwards": float(self._forwards), "factor": self._kl.factor}
        if realized is not None:
            self.measured["realized"] = realized / unit
        self._count_small(scale)

    def _spend(self, expected: float, budget: float) -> None:
        """Count a step of the rollout, which leaves the rest of its part to those after it."""
        self._expected = (expected, budget)
        self._steps -= 1
        self._left = max(0.0, budget - expected * self._kl.factor)
        if self._steps == 0:  # the next step is a rollout of its own, if nobody says otherwise
            self.begin_rollout(1)

    def _choose(
        self, measure: Callable[[float], float], budget: float
    ) -> tuple[float, float, float | None]:
        """Return the step's scale, the prediction for the whole step, and what was measured."""
        state = self._kl
        if self.control == "measured-backtracking":
            scale, measured = backtrack(measure, budget)
            return scale, measured / scale**2, measured
        if self.control == "adaptive-learning-rate":
            scale = state.scale
            measured = measure(scale)
            state.scale = adapt(state, measured, budget)
            return scale, measured / scale**2, measured
        predicted = predict(measure, state, budget / state.factor)
        state.scale = scale_for(budget, predicted * state.factor)
        return state.scale, predicted, None

    def _score(self, log_probs: LogProbs) -> tuple[Tensor, Tensor]:
        self._forwards += 1
        torch.clear_autocast_cache()  # else autocast around the step would keep its old weights
        try:
            found = log_probs()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ProxstepError(
                f"{RETURNS}. It is no closure that computes a loss: it runs without gradient; "
                "call backward() before optimizer.step(log_probs)"
            ) from error
        for module in self.model.modules():
            if hasattr(module, "reshard"):  # FSDP2: else the next pass would use these full weights
                module.reshard()  # type: ignore[operator]
        log_prob_BT, response_BT = checked(found)
        if not self.measured and bool((log_prob_BT.masked_fill(~response_BT, 0.0) > 1e-3).any()):
            raise ProxstepError(f"{RETURNS}: it has positive ones, which are no log-probabilities")
        return log_prob_BT.detach(), response_BT

    def _budget(self, response_BT: Tensor) -> tuple[float, float]:
        """Return this step's budget in nats per sequence, and the sequence's length in units."""
        unit = 1.0
        if self.per == "token":
            unit = max(1.0, _mean_length(response_BT))
        nats = self.nats * self._schedule() ** 2
        return nats * unit * self._share + self._left, unit

    def _schedule(self) -> float:
        """Return the learning rate over its peak, of the group with the largest such share."""
        earlier = chain(self._peaks, repeat(0.0))  # new groups have none
        self._peaks = [
            max(peak, *(float(group.get(name, 0.0)) for name in ("lr", "initial_lr", "max_lr")))
            for group, peak in zip(self.param_groups, earlier, strict=False)
        ]
        pairs = zip(self.param_groups, self._peaks, strict=True)
        return max(float(group["lr"]) / peak for group, peak in pairs if peak)

    def _realized(
        self,
        log_probs: LogProbs,
        parameters: list[Tensor],
        current: list[Tensor],
        log_prob_BT: Tensor,
        response_BT: Tensor,
    ) -> float | None:
        """Return the last step's KL divergence on this step's samples, and learn from it."""
        if self._before is None or len(self._before) != len(parameters):
            return None
        _place(parameters, current, self._before, 1.0)
        earlier_BT, _ = self._score(log_probs)
        _place(parameters, current, self._before, 0.0)
        realized = _mean(sampled_kl(log_prob_BT, earlier_BT, response_BT), response_BT)
        self._kl.learn(realized, *self._expected)
        self._before = None
        return realized

    def _parameters(self) -> list[Tensor]:
        """Return what the optimizer may move: some hosts hand it a frozen base as well."""
        every = (p for group in self.param_groups for p in group["params"])
        return [p for p in every if p.requires_grad or p.grad is not None]

    def _count_small(self, scale: float) -> None:
        self._small = self._small + 1 if scale < _SMALL else 0
        if self._small == _MANY:
            self.note(
                f"the KL budget scaled {_MANY} steps in a row below {_SMALL:g}: the learning rate "
                f"is {1 / scale:.0f} times what the budget allows"
            )

    def _tell_still(self, before: list[Tensor], proposed: list[Tensor], log_prob_N: Tensor) -> None:
        """Say once that a step moves the parameters and no log-probability, of N that count.

        Those of a policy that is sure of every token do not move.
        """
        certain = len(log_prob_N) > 0 and bool((log_prob_N == 0.0).all())
        if self._still or certain or all(map(torch.equal, before, proposed)):
            return
        self._still = True
        self.note(
            "the optimizer moved the parameters, but no log-probability that log_probs() returned "
            "and that counts changed, so that the KL budget limits nothing: log_probs() must run "
            "the model that is trained anew at each call, and its mask must be true somewhere"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, which may go on without a budget, and the budget's."""
        own = {
            "kl": asdict(self._kl),
            "rollout": (self._share, self._left, self._steps),
            "last": (self._expected, self._small),
            "peaks": self._peaks,
            "before": self._before,
        }
        return {**self.inner.state_dict(), _OWN: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; from one without a budget the budget begins.

        Args:
            state_dict: What `state_dict` returned, or that of the optimizer within.
        """
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != _OWN})
        self._be_one()
        self._kl, self._before, self._peaks = State(), None, []
        self.begin_rollout(1)
        own = state_dict.get(_OWN)
        if own is None:
            return
        self._kl = State(**own["kl"])
        self._share, self._left, self._steps = own["rollout"]
        self._expected, self._small = own["last"]
        self._peaks = own.get("peaks", [])
        before = own["before"]
        if before is not None:
            device = self._parameters()[0].device
            before = [value.to(device) for value in before]
        self._before = before


_OWN = "kl_budget"


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """Switch autocast off, also the one that accelerate puts around a model's forward."""
    cast = [module for module in model.modules() if "_original_forward" in vars(module)]
    forwards = [module.forward for module in cast]
    try:
        for module in cast:
            module.forward = vars(module)["_original_forward"]
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module, forward in zip(cast, forwards, strict=True):
            module.forward = forward


def _place(
    parameters: list[Tensor], before: list[Tensor], proposed: list[Tensor], scale: float
) -> None:
    """Set parameters to before + scale (proposed - before)."""
    for parameter, old, new in zip(parameters, before, proposed, strict=True):
        if scale in (0.0, 1.0):
            parameter.copy_(new if scale else old)
        else:
            parameter.copy_(torch.lerp(old, new, scale))


def _mean(value_B: Tensor, response_BT: Tensor) -> float:
    """Return the mean over sequences with a token that counts, of all ranks; 0 of none."""
    value_N = value_B[response_BT.any(dim=1)]
    sums = torch.stack([value_N.sum(), value_N.new_tensor(float(len(value_N)))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / max(count, 1.0)


def _mean_length(response_BT: Tensor) -> float:
    """Return how many tokens count of a sequence, in the mean."""
    length_B = response_BT.sum(dim=1).to(widest_dtype(response_BT.device))
    return _mean(length_B, response_BT)
