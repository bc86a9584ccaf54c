"""Isopo: the rules of `weights` inside the backward pass of a model that the user already has.

A module's `forward` is replaced on the instance by one that routes its parameters through an
autograd function, so that `.grad` comes out transformed: state_dict keys, module types, optimizers
and gradient reduction stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.isopo.layers import Layout
from proxstep.isopo.microbatch import Microbatch, PlainSum
from proxstep.isopo.patches import Sink, Site, kind_of, patch, unpatch
from proxstep.isopo.trailing import TrailingMeans
from proxstep.isopo.weights import PRESETS, Rule
from proxstep.types import Bool, Float, Int, Tensor

OtherParameters = Literal["transform", "reinforce", "freeze"]
OverlapPositions = Literal["all", "completion"]


class Isopo:
    """ISOPO on a model: inside `microbatch`, backward gives the ISOPO gradient.

        isopo = Isopo(model, rule="isopo")
        with isopo.microbatch(sequence_ids, coefficients):
            log_probs.sum().backward()

    `.grad` then holds -sum_b weight_b G_b, the gradient of a loss to minimize: with coefficients =
    advantages divided by the number of sequences of the optimizer step, `optimizer.step()` raises
    the probability of what was better than expected. Back-propagate the plain sum of the
    log-probabilities: a factor in the loss would enter the norms. Every parameter tensor is a layer
    of its own; a tied weight is transformed once per use, and the uses are added.

    Args:
        model: Any model made of linear layers (transformers' Conv1D included), embeddings,
            LayerNorm and RMSNorm.
        rule: A preset's name (see `PRESETS`), an `IsometricRule` or a `NaturalRule`.
        other_parameters: What happens to trainable parameters that are not linear layers' weights
            (embeddings, normalizations, biases): "transform" treats them by the rule, "reinforce"
            gives them the plain policy gradient, "freeze" sets requires_grad to False until
            `remove`.
        num_overlap_positions: K, the token positions on which Fisher norms are estimated; None for
            all.
        overlap_positions: Sample them from "all" positions or only from those of the "completion".
        decay: Of the trailing means, per optimizer step.
        seed: Of the sample of positions.

    Raises:
        ProxstepError: If a trainable parameter belongs to a kind of layer that is not covered, by
            name.

    Source: arXiv 2512.23353.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "isopo",
        *,
        other_parameters: OtherParameters = "transform",
        num_overlap_positions: int | None = 250,
        overlap_positions: OverlapPositions = "all",
        decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        self.rule = _as_rule(rule)
        _check_choice("other_parameters", other_parameters, OtherParameters)
        _check_choice("overlap_positions", overlap_positions, OverlapPositions)
        if num_overlap_positions is not None and num_overlap_positions < 1:
            raise ProxstepError("num_overlap_positions must be positive, or None for all positions")
        self.model = model
        self.other_parameters = other_parameters
        self.num_overlap_positions = num_overlap_positions
        self.overlap_positions = overlap_positions
        self.trailing = TrailingMeans(decay)
        self._seed, self._step, self._microbatch = seed, 0, 0
        self._active: Microbatch | PlainSum | None = None
        self._diagnostics: dict[str, list[Tensor]] = {}
        self._version = 0
        self._frozen = self._freeze() if other_parameters == "freeze" else []
        self._modules: dict[nn.Module, str] = {}
        self._install()

    # -- using it ----------------------------------------------------------------------------------

    @contextmanager
    def microbatch(
        self,
        sequence_ids: Int[Tensor, "rows columns"],
        coefficients: Float[Tensor, " batch"],
        completion_mask: Bool[Tensor, "rows columns"] | None = None,
    ) -> Iterator[Microbatch]:
        """Transform the backward pass of one microbatch of whole sequences.

        The backward of sum(log_probs) runs inside; the forward may, and must where position
        embeddings are broadcast over the rows. One backward per microbatch.

        Args:
            sequence_ids: The sequence of each token position, 0 to batch - 1; -1 for padding. In a
                padded batch row b is sequence b; packed rows hold several.
            coefficients: One number per sequence, with any normalization (1 / number of sequences
                of the optimizer step) already in it.
            completion_mask: True at completion positions; needed where overlap_positions is
                "completion".

        Yields:
            The microbatch, with its `layout`.

        Raises:
            ProxstepError: If ids and coefficients do not fit, a trainable parameter is not covered,
                or a layer was bypassed (a fused head).
        """
        if self._active is not None:
            raise ProxstepError("microbatch() inside microbatch() or off(): they do not nest")
        self._check_step_was_called()
        self._check_coverage()
        generator = torch.Generator().manual_seed(
            self._seed + 1_000_003 * self._step + self._microbatch
        )
        layout = self._layout(sequence_ids, coefficients, completion_mask, generator)
        microbatch = Microbatch(
            layout,
            coefficients.detach(),
            self.rule,
            self.trailing,
            self._diagnostics,
            only_linear=self.other_parameters == "reinforce",
        )
        before = {key: _gradient_stamp(parameter) for key, parameter in self._uses()}
        self._active = microbatch
        try:
            yield microbatch
        finally:
            self._active = None
            self._microbatch += 1
        if microbatch.reduced:
            for key, parameter in self._uses():
                if key not in microbatch.reduced and _gradient_stamp(parameter) != before[key]:
                    raise ProxstepError(
                        f"{key} received a gradient without its layer's forward having run: a "
                        "fused head or another replacement bypasses it; turn that off, or freeze "
                        "the parameter"
                    )

    @contextmanager
    def off(self) -> Iterator[None]:
        """Make forwards and backwards inside ordinary: for entropy and KL losses."""
        if self._active is not None:
            raise ProxstepError("off() inside microbatch() or off(): they do not nest")
        self._active = PlainSum()
        try:
            yield
        finally:
            self._active = None

    def step(self) -> dict[str, float]:
        """End an optimizer step: update the trailing means, draw new positions from now on.

        Returns:
            Diagnostics of the step, averaged over layers and microbatches: "weight_spread", the
            standard deviation of the sequences' scales over their mean (isometric),
            "frac_filled_fisher", the share of Fisher estimates that were exactly zero and filled
            in, "ntk_off_diagonal", the share of |K| off the diagonal (natural).
        """
        diagnostics = {
            name: torch.stack(values).mean().item() for name, values in self._diagnostics.items()
        }
        self._diagnostics = {}
        self.trailing.fold()
        self._step, self._microbatch = self._step + 1, 0
        return diagnostics

    def remove(self) -> None:
        """Give every module its own forward back, and thaw what was frozen."""
        for module in self._modules:
            unpatch(module)
        self._modules = {}
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: the trailing means and the number of steps."""
        return {"step": self._step, "trailing": self.trailing.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._step, self._microbatch = state["step"], 0
        self.trailing.load_state_dict(state["trailing"])

    # -- what the patched modules ask --------------------------------------------------------------

    def is_off(self) -> bool:
        """Whether forwards should be ordinary at the moment."""
        return isinstance(self._active, PlainSum)

    def bind(self) -> Sink | None:
        """Return the active microbatch, if any."""
        return self._active

    def resolve(self, bound: Sink | None, key: str) -> Sink:
        """Return where gradients go: to the forward's microbatch, else to the active one."""
        sink = bound or self._active
        if sink is None:
            raise ProxstepError(
                f"backward reached {key} outside isopo.microbatch(...): its gradient would lack "
                "the coefficients; wrap the backward, or use isopo.off() for a loss of its own"
            )
        return sink

    # -- installation ------------------------------------------------------------------------------

    def _install(self) -> None:
        self._check_coverage(installing=True)
        for name, module in self.model.named_modules():
            kind = kind_of(module)
            if kind is not None and any(p.requires_grad for p in module.parameters(recurse=False)):
                patch(module, kind, Site(self, name))
                self._modules[module] = name
        if not self._modules:
            raise ProxstepError("the model has no trainable parameter that ISOPO could transform")

    def _check_coverage(self, *, installing: bool = False) -> None:
        """Name every trainable parameter that no patched module holds."""
        missing = []
        for name, module in self.model.named_modules():
            covered = kind_of(module) is not None if installing else module in self._modules
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and not covered:
                    missing.append(f"{name}.{parameter_name} ({type(module).__name__})")
        if missing:
            shown = ", ".join(missing[:5]) + (
                f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            )
            remedy = (
                "freeze them with requires_grad_(False)"
                if installing
                else "add adapters and unfreeze parameters before Isopo(...)"
            )
            raise ProxstepError(
                f"ISOPO does not cover these trainable parameters: {shown}; {remedy}"
            )

    def _freeze(self) -> list[nn.Parameter]:
        frozen = []
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                linear_weight = kind_of(module) == "linear" and name == "weight"
                if parameter.requires_grad and not linear_weight:
                    frozen.append(parameter)
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def _uses(self) -> Iterator[tuple[str, nn.Parameter]]:
        for module, name in self._modules.items():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield f"{name}.{parameter_name}" if name else parameter_name, parameter

    def _check_step_was_called(self) -> None:
        """Refuse to damp by averages that are never folded in."""
        _, parameter = next(self._uses())
        version = parameter._version
        if (
            self.rule.needs_trailing_means
            and self.trailing.has_pending
            and version != self._version
        ):
            raise ProxstepError(
                "the parameters changed, but isopo.step() was not called: call it after "
                "optimizer.step(), so that the trailing means that this rule damps by are updated"
            )
        self._version = version

    def _layout(
        self,
        sequence_ids: Tensor,
        coefficients: Tensor,
        completion_mask: Tensor | None,
        generator: torch.Generator,
    ) -> Layout:
        _check_microbatch(sequence_ids, coefficients)
        flat = sequence_ids.reshape(-1)
        position_T = (flat >= 0).nonzero().squeeze(1)
        candidates = torch.arange(len(position_T), device=flat.device)
        if self.overlap_positions == "completion":
            if completion_mask is None or completion_mask.shape != sequence_ids.shape:
                raise ProxstepError(
                    'overlap_positions="completion" needs completion_mask in the shape of '
                    "sequence_ids"
                )
            candidates = candidates[completion_mask.reshape(-1)[position_T]]
        if self.num_overlap_positions is not None:
            order = torch.randperm(len(candidates), generator=generator)[
                : self.num_overlap_positions
            ]
            candidates = candidates[order.to(candidates.device)]
        grid = (sequence_ids.shape[0], sequence_ids.shape[1])
        return Layout(grid, position_T, flat[position_T], candidates, len(coefficients))


def _as_rule(rule: str | Rule) -> Rule:
    if not isinstance(rule, str):
        return rule
    if rule not in PRESETS:
        raise ProxstepError(f"rule {rule!r} is not a preset; choose one of {', '.join(PRESETS)}")
    return PRESETS[rule]


def _check_choice(name: str, value: object, literal: Any) -> None:
    if value not in get_args(literal):
        raise ProxstepError(f"{name} must be one of {', '.join(get_args(literal))}, got {value!r}")


def _check_microbatch(sequence_ids: Tensor, coefficients: Tensor) -> None:
    if sequence_ids.dim() != 2 or sequence_ids.is_floating_point():
        raise ProxstepError(
            "sequence_ids must be integers of shape (rows, columns), -1 for padding"
        )
    if coefficients.dim() != 1 or not torch.isfinite(coefficients).all():
        raise ProxstepError("coefficients must be one finite number per sequence")
    present = sequence_ids[sequence_ids >= 0].unique()
    expected = torch.arange(len(coefficients), device=present.device)
    if not torch.equal(present, expected.to(present)):
        raise ProxstepError(
            f"sequence_ids must name each of the {len(coefficients)} sequences that have a "
            f"coefficient, 0 to {len(coefficients) - 1}, and no other"
        )


def _gradient_stamp(parameter: nn.Parameter) -> tuple[int, int] | None:
    grad = parameter.grad
    return None if grad is None else (id(grad), grad._version)
