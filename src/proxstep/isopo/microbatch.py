"""Where a backward pass's position-wise gradients go: into a microbatch's rule, or a plain sum.

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from proxstep.errors import ProxstepError
from proxstep.isopo.forms import Needs
from proxstep.isopo.gradients import PositionGradients
from proxstep.isopo.layout import Layout
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.memory import Memory
from proxstep.isopo.reduction import Request, reduce
from proxstep.isopo.samples import Samples
from proxstep.isopo.trailing import TrailingMeans
from proxstep.isopo.weighing import Log, Sequences, Settings, Weighing
from proxstep.typing import Bool, Float, Tensor


class Microbatch:
    """One microbatch's layout and coefficients, and what becomes of its gradients.

    Args:
        layout: Which position belongs to which sequence.
        sequences: Their coefficients and groups.
        settings: The rule.
        samples: The positions that estimate the Fisher norm.
        trailing: Averages over earlier optimizer steps; this microbatch is added to them.
        memory: The workspace.
        log: This microbatch's measurements are added to it.
    """

    def __init__(
        self,
        layout: Layout,
        sequences: Sequences,
        settings: Settings,
        samples: Samples,
        trailing: TrailingMeans,
        memory: Memory,
        log: Log,
    ) -> None:
        self.layout, self.samples, self.sequences = layout, samples, sequences
        self.reduced: set[str] = set()
        self._settings, self._trailing = settings, trailing
        self._memory, self._log = memory, log

    def set_coefficients(self, coefficients: Float[Tensor, " batch"]) -> None:
        """Replace the coefficients, where they follow from the forward itself; before backward.

        Raises:
            ProxstepError: If they are not one finite number per sequence, or a parameter was
                back-propagated with the earlier ones.
        """
        check_coefficients(coefficients, len(self.sequences.coefficient_B))
        if self.reduced:
            raise ProxstepError("set_coefficients() came after backward: call it before")
        self.sequences = replace(self.sequences, coefficient_B=coefficients.detach())

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to (positions, features), in the layout's order.

        Raises:
            ProxstepError: If the layer saw another number of positions than sequence_ids has.
        """
        flat = value.reshape(-1, value.shape[-1])
        rows, columns = self.layout.grid
        if flat.shape[0] != rows * columns:
            raise ProxstepError(
                f"{key} saw {flat.shape[0]} token positions, but sequence_ids has "
                f"{rows * columns} ({rows} x {columns}): turn off logits_to_keep and fused heads, "
                "run the forward inside isopo.microbatch(...), and freeze experts that see only "
                "their own tokens"
            )
        return flat if self.layout.order_T is None else flat[self.layout.order_T]

    def objective(
        self, log_prob_BT: Float[Tensor, ...], response_mask: Bool[Tensor, ...] | None = None
    ) -> Float[Tensor, ""]:
        """Return the sum of the log-probabilities, whose backward refuses a loss scale.

        Args:
            log_prob_BT: Log-probabilities in nats, with their graph.
            response_mask: True at those that count; None for all.

        Raises:
            ProxstepError: In backward, if the sum was multiplied by anything: a gradient scaler, or
                a division by accumulation steps, would enter the norms.
        """
        if response_mask is not None:
            log_prob_BT = log_prob_BT.masked_fill(~response_mask, 0.0)
        total = log_prob_BT.sum()
        if total.requires_grad:
            total.register_hook(_refuse_scale)
        return total

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the parameter's gradient, -sum_b weight_b G_b.

        Raises:
            ProxstepError: If the parameter's use was reduced before in this microbatch.
        """
        self.claim(key)
        settings, coefficient_B = self._settings, self.sequences.coefficient_B
        excluded = settings.only_linear and not isinstance(gradients, OuterGradients)
        needs = self.needs(key)
        given = key in self.sequences.fisher_sq
        if excluded or (needs == Needs() and not given):
            return gradients.contract(self.layout.spread(-coefficient_B))
        weighing = self.weighing(key)
        sample = None
        if needs.fisher:
            sample, count = self.samples.of(key, gradients)
            weighing.measure_sample(sample.squares(), count)
        request = Request(needs, sample, weighing.fisher_of, weighing.weigh, weighing.separable)
        total = reduce(gradients, self.layout, request, self._memory)
        weighing.conclude()
        return total

    def claim(self, key: str) -> None:
        """Note that a parameter's use is reduced now.

        Raises:
            ProxstepError: If it was before.
        """
        if key in self.reduced:
            raise ProxstepError(
                f"{key} was back-propagated twice in one microbatch: a sequence's gradient must "
                "arrive whole; use one forward and one backward per isopo.microbatch(...)"
            )
        self.reduced.add(key)

    def needs(self, key: str) -> Needs:
        """Return the statistics that are needed for a parameter's use."""
        if self._log.keep_records:
            return Needs(fisher=self._settings.fisher == "positions", norm=True, ntk=True)
        needs = self._settings.needs
        given = key in self.sequences.fisher_sq
        return Needs(norm=needs.norm) if given else needs

    def weighing(self, key: str) -> Weighing:
        """Return what turns one parameter's statistics into weights, and takes note of them."""
        return Weighing(
            key, self.sequences, self._settings, self.samples, self._trailing, self._log
        )


class PlainSum:
    """The sink of a backward inside `off()` whose forward ran outside: the ordinary gradient."""

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to all positions."""
        del key
        return value.reshape(-1, value.shape[-1])

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the sum over positions."""
        del key
        first = gradients.grad_TO if isinstance(gradients, OuterGradients) else gradients.grad_TD
        return gradients.contract(first.new_ones(len(first)))


Sink = Microbatch | PlainSum


def check_coefficients(coefficients: Tensor, count: int | None = None) -> None:
    """Raise ProxstepError unless they are one finite number per sequence."""
    fits = coefficients.dim() == 1 and count in (None, len(coefficients))
    if not fits or not torch.isfinite(coefficients).all():
        raise ProxstepError("coefficients must be one finite number per sequence")


def _refuse_scale(grad: Tensor) -> None:
    if bool(grad != 1):
        raise ProxstepError(
            f"the sum of log-probabilities was multiplied by {grad.item():g} before backward: a "
            "loss scale, a gradient scaler or a division by accumulation steps would enter ISOPO's "
            "norms. Back-propagate microbatch.objective(...) as it is, and put the factor into the "
            "coefficients"
        )
