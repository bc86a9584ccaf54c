"""Isopo: the rules of `rule` inside the backward pass of a model that the user already has.

A module's `forward` is replaced on the instance by one that routes its parameters through an
autograd function, so that `.grad` comes out transformed: state_dict keys, module types, optimizers
and gradient reduction stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from proxstep.algorithms.aggregate import as_integers, as_mask, check_literal, check_number
from proxstep.errors import ProxstepError
from proxstep.isopo.coverage import (
    check_coverage,
    check_graph,
    check_sum,
    freeze_others,
    install,
    unpatch,
)
from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.isopo.diagnostics.step import StepDiagnostics, diagnose
from proxstep.isopo.hooks import check_bypassed, gradient_stamps, parts_of, uses
from proxstep.isopo.means import TrailingMeans, step_means
from proxstep.isopo.microbatch import Log, Microbatch, Router
from proxstep.isopo.plan import MEMORY_BUDGET, Memory, make_layout
from proxstep.isopo.rescue import Rescue
from proxstep.isopo.rule import NaturalRule
from proxstep.isopo.sampling import Drawing, OverlapPositions, OverlapSource
from proxstep.isopo.settings import Denominator, Fisher, Rule, Sequences, Settings, as_rule
from proxstep.typing import Bool, Float, Int, Tensor

OtherParameters = Literal["transform", "reinforce", "freeze"]


class Isopo:
    """ISOPO on a model: inside `microbatch`, backward gives the ISOPO gradient.

        isopo = Isopo(model, rule="isopo")
        with isopo.microbatch(sequence_ids, coefficients) as microbatch:
            microbatch.objective(log_probs).backward()

    `.grad` then holds -sum_b weight_b G_b, the gradient of a loss to minimize: with coefficients =
    advantages divided by the number of sequences of the optimizer step, `optimizer.step()` raises
    the probability of what was better than expected. Back-propagate the plain sum of the
    log-probabilities: a factor in the loss would enter the norms. Every parameter tensor is a layer
    of its own; a tied weight is transformed once per use, and the uses are added.

    Args:
        model: Any model made of the kinds of layers that docs/isopo.md lists (linear layers,
            embeddings, norms, packed experts, attention), also one that is wrapped in DDP or
            sharded by FSDP2.
        rule: A preset's name (see `PRESETS`), or a rule: `IsometricRule`, `NaturalRule`,
            `ProjectingRule`, `IntraProjectingRule`.
        other_parameters: What happens to trainable parameters that are not linear layers' weights
            (embeddings, normalizations, biases): "transform" treats them by the rule, "reinforce"
            gives them, and parameters of any other kind, the plain policy gradient, "freeze" sets
            requires_grad to False until `remove`.
        fisher: What F_b is estimated from: "positions", the position-wise gradients of equations 3
            to 6, or "sequences", those of the microbatch's sequences (equation 2).
        num_overlap_positions: K, the token positions on which Fisher norms are estimated; None for
            all. The default is for those of the previous step, which are drawn by importance; of
            other sources, drawn evenly as in the paper, some 250 estimate as well.
        overlap_positions: Sample them from "all" positions or only from those that predict a token
            of the "completion".
        overlap_source: Sample them from the "previous_step", which makes the isometric rule
            independent of how sequences are spread over microbatches and ranks, and keeps 2 K rows
            of every layer's inputs and gradients; from the "microbatch"; or from all "ranks", which
            needs `sequence_keys` and exchanges samples in backward: every rank must run the same
            number of microbatches. None for "previous_step", or for "microbatch" where all of its
            positions are taken, or its sequences.
        fisher_denominator: Divide by the "sample"'s own sum of squares or by its "trailing" mean.
        decay: Share of the past that trailing means keep at each optimizer step.
        seed: Seed of the sample of positions.
        diagnose: Measure everything at each step and put it into `diagnostics`. It costs as much as
            the natural rule; it can be switched between steps.
        memory_budget: Bytes that the statistics of one layer may take at a time.
        process_group: The data-parallel ranks, where torch.distributed is initialized; None for
            all.

    Raises:
        ProxstepError: If a trainable parameter belongs to a kind of layer that is not covered, by
            name, or an option does not fit.

    Source: arXiv 2512.23353.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str | Rule = "isopo",
        *,
        other_parameters: OtherParameters = "transform",
        fisher: Fisher = "positions",
        num_overlap_positions: int | None = 32,
        overlap_positions: OverlapPositions = "all",
        overlap_source: OverlapSource | None = None,
        fisher_denominator: Denominator = "sample",
        decay: float = 0.9,
        seed: int = 0,
        diagnose: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ProxstepError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.rule = as_rule(rule)
        check_number("decay", decay)
        check_number("memory_budget", memory_budget, above=True)
        if decay >= 1:
            raise ProxstepError(f"decay must be below 1, got {decay}: the means would stand still")
        for name, value in (("seed", seed), ("num_overlap_positions", num_overlap_positions)):
            if type(value) is not int and (value is not None or name == "seed"):
                raise ProxstepError(f"{name} must be an integer, got {value!r}")
        check_literal("other_parameters", other_parameters, OtherParameters)
        check_literal("fisher", fisher, Fisher)
        check_literal("overlap_positions", overlap_positions, OverlapPositions)
        check_literal("fisher_denominator", fisher_denominator, Denominator)
        overlap_source = _source_of(overlap_source, fisher, num_overlap_positions)
        if self.rule.needs.along and dist.is_initialized() and dist.get_world_size() > 1:
            raise ProxstepError(
                "PROMA projects the gradient that one process accumulates: on several ranks (DDP, "
                "FSDP) the step's gradient is not at hand before its end; use one process, or "
                "proma-intra"
            )
        self.model = model
        self.other_parameters = other_parameters
        self.diagnose, self.process_group = diagnose, process_group
        self.diagnostics: StepDiagnostics | None = None
        self.trailing = TrailingMeans(decay)
        only_linear = other_parameters == "reinforce"
        self._settings = Settings(self.rule, fisher, fisher_denominator, only_linear)
        self._drawing = Drawing(
            num_overlap_positions, overlap_positions, overlap_source, seed, process_group
        )
        self._memory, self._router = Memory(memory_budget), Router()
        self._log: Log = []
        self._diagnosing = self._graph_is_checked = False
        self._step, self._microbatch = 0, 0
        self._measuring, self._passes, self._late = False, 0, False
        self._running: dict[str, Tensor] = {}
        self._versions: dict[nn.Parameter, int] = {}
        self._values: tuple[list[int], Tensor] | None = None
        self._frozen = freeze_others(model) if other_parameters == "freeze" else []
        if only_linear:
            self._router.rescue = Rescue(self._router.number)
        self._modules = install(model, self._router)
        self._covered = parts_of(model)

    # -- using it ----------------------------------------------------------------------------------

    @contextmanager
    def microbatch(
        self,
        sequence_ids: Int[Tensor, "rows columns"],
        coefficients: Float[Tensor, " batch"],
        completion_mask: Bool[Tensor, "rows columns"] | None = None,
        *,
        groups: Int[Tensor, " batch"] | None = None,
        sequence_keys: Int[Tensor, " batch"] | None = None,
        fisher_squares: Mapping[str, Float[Tensor, " batch"]] | None = None,
    ) -> Iterator[Microbatch]:
        """Transform the backward pass of one microbatch of whole sequences.

        The forward runs inside; it is bound to the microbatch, so that the backward may follow
        later. A forward that ran outside is bound by a backward inside. One backward per
        microbatch. Re-entrant checkpointing, which runs the forward again in backward, needs the
        backward inside.

        Args:
            sequence_ids: The sequence of each token position, 0 to batch - 1; -1 for padding. In a
                padded batch row b is sequence b; packed rows hold several.
            coefficients: One number per sequence, with any normalization already in it: 1 / number
                of sequences of the optimizer step, on all ranks; times the number of ranks where
                gradients are averaged over them, as DDP and FSDP2 do by default. Where they follow
                from the forward, pass zeros and call `Microbatch.set_coefficients`.
            completion_mask: True at completion positions; needed where overlap_positions is
                "completion".
            groups: Each sequence's prompt, for the natural rule's interact="group" and for the
                diagnostics: noise between prompts, conflict within them.
            sequence_keys: A number for each sequence that no other one of the optimizer step has,
                on any rank; by default they are counted.
            fisher_squares: F_b^2 by parameter use, instead of an estimate.

        Yields:
            The microbatch, with its `layout`.

        Raises:
            ProxstepError: If the arguments do not fit, a trainable parameter is not covered, or a
                layer was bypassed (a fused head).
        """
        self._check_ready()
        sequence_ids = as_integers("sequence_ids", sequence_ids)
        sequences = Sequences.of(coefficients, groups, fisher_squares, sequence_ids)
        layout = make_layout(sequence_ids, len(sequences.coefficient_B))
        if completion_mask is not None:
            completion_mask = as_mask("completion_mask", completion_mask, sequence_ids)
        if sequence_keys is not None:
            sequence_keys = as_integers("sequence_keys", sequence_keys)
        self._check_sequences(sequences)
        undo, failed = self._bookmark(), True
        number = self._step * 2**20 + self._microbatch
        microbatch = None
        try:
            samples = self._drawing.draw(
                layout, completion_mask, sequence_keys, sequences.group_B, self._step
            )
            microbatch = Microbatch(
                layout,
                sequences,
                self._settings,
                samples,
                self.trailing.means,
                self._memory,
                self._log,
                diagnose=self.diagnose,
                measuring=self._measuring,
                running=self._running,
            )
            microbatch.before_backward = self._before_backward(sequence_ids, microbatch.reduced)
            self._diagnosing |= self.diagnose
            before = gradient_stamps(self._modules)
            self._microbatch += 1
            self._router.begin(number, microbatch)
            yield microbatch
            if microbatch.reduced:
                check_bypassed(self._modules, microbatch.reduced, before, self._router)
            failed = False
        finally:
            if failed:
                undo()
            if microbatch is not None:
                self._router.end(number, microbatch, failed=failed)
            self._memory.release()

    @property
    def needs_past(self) -> bool:
        """Whether a measuring pass should come first: see `measuring`."""
        sampled = self._settings.needs.fisher
        passes = 2 if sampled and self._drawing.carries else 0
        denominators = sampled and self._settings.fisher_denominator == "trailing"
        passes = passes or int(bool(self.rule.averages or denominators))
        return (self._step == 0 or self._late) and self._passes < passes

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what an update builds on that has no past, and leave its gradients zero.

            while isopo.needs_past:  # before each step
                with isopo.measuring():
                    ...  # forward and backward of all microbatches of the optimizer step

        Trailing means, and the positions of a previous step, have no past in the first step, nor in
        the second those of a parameter that had no gradient in the first (LoRA's A, while B is 0):
        by itself each microbatch would make its own, and the gradient would depend on how the step
        was cut. One pass or two are needed, or none; torch's random numbers go on as if there had
        been none. Leave losses inside `off()` out: their gradients would be added.

        Raises:
            ProxstepError: If a microbatch of the step came before.
        """
        if self._router.active is not None or self._log:
            raise ProxstepError("measuring() comes before the first microbatch of a step")
        collecting = self._drawing.carries and not self._passes
        devices = {p.device for _, p in uses(self._modules) if p.device.type == "cuda"}
        self._measuring, failed = True, True
        try:
            with torch.random.fork_rng(sorted(device.index for device in devices)):
                yield
            failed = False
        finally:
            self._measuring = False
            if failed:
                self._forget_microbatches()
                self._drawing.end_step(keep=False)
                self._router.forget(failed=True)
        self._passes += 1
        measured = [] if collecting and self._settings.needs.fisher else self._log
        for key, record in measured:
            self.trailing.add(key, record.moments)
        self._end_step(missing=True)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Make forwards and backwards inside ordinary: for entropy and KL losses.

        Raises:
            ProxstepError: If it is inside `microbatch` or another `off`.
        """
        if self._router.active is not None:
            raise ProxstepError("off() inside microbatch() or off(): they do not nest")
        self._router.switch(on=False)
        try:
            yield
        finally:
            self._router.switch(on=True)

    def step(self) -> dict[str, float]:
        """End an optimizer step: update the trailing means, draw new positions from now on.

        Where torch.distributed is initialized, every rank must call it: it puts together what they
        measured, so that the next step starts from the same state on all of them.

        Returns:
            Diagnostics of the step, averaged over layers and this rank's microbatches:
            "weight_spread", the standard deviation of the sequences' scales over their mean
            (isometric), "frac_filled_fisher", the share of Fisher estimates that were exactly zero
            and filled in, "ntk_off_diagonal", the share of |K| off the diagonal (natural); and with
            `diagnose` what `StepDiagnostics.scalars` says, of which `diagnostics` then has all.
        """
        measured = step_means([record for _, record in self._log])
        kept: dict[str, list[LayerRecord]] = {}
        for key, record in self._log:
            self.trailing.add(key, record.moments)
            kept.setdefault(key, []).append(record)
        if kept and self._diagnosing:
            self.diagnostics = diagnose(kept)
            measured |= self.diagnostics.scalars()
        self._end_step()
        self._late = self._step == 0 and bool(self.trailing.unmeasured or self._drawing.unmeasured)
        self._step, self._passes = self._step + 1, 0
        return measured

    def _end_step(self, *, missing: bool = False) -> None:
        """Fold what was measured into what the next step builds on, or only what is `missing`."""
        self._forget_microbatches()
        broken = self.trailing.fold(self.process_group, missing=missing)
        self._drawing.end_step(keep=broken is None, missing=missing)
        self._router.forget()
        if broken is not None:
            raise ProxstepError(
                f"{broken}: the gradients of this optimizer step are not finite, or too large to "
                "be multiplied: nothing of it was kept. Do not take the step, and look for "
                "parameters and activations that are not finite"
            )

    def _forget_microbatches(self) -> None:
        self._log, self._diagnosing, self._microbatch = [], False, 0
        self._running.clear()
        self._memory.release()

    def remove(self) -> None:
        """Give every module its own forward back, and thaw what was frozen."""
        for module in self._modules:
            unpatch(module)
        self._modules = {}
        if self._router.rescue is not None:
            self._router.rescue.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: trailing means, carried samples, the number of steps."""
        return {
            "step": self._step,
            "late": self._late,
            "trailing": self.trailing.state_dict(),
            "samples": self._drawing.state_dict(),
            "shapes": self._shapes(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Args:
            state: What `state_dict` returned.

        Raises:
            ProxstepError: If it is something else, or that of another model.
        """
        if not {"step", "trailing"} <= state.keys():
            raise ProxstepError(
                f"this is no state of an Isopo, it has {', '.join(map(str, state)) or 'nothing'}: "
                "give what isopo.state_dict() returned"
            )
        own, its = self._shapes(), state.get("shapes", {})
        other = [name for name in its if own.get(name, its[name]) != its[name]]
        if other or (its and not own.keys() & its.keys()):
            name = next(iter(other or its))
            raise ProxstepError(
                f"this is the state of an Isopo on another model: {name} has shape {its[name]} "
                f"there, here {own.get(name, 'it is not trained')}"
            )
        self._step, self._microbatch, self._log = state["step"], 0, []
        self._late, self._passes = state.get("late", False), 0
        self._running.clear()
        self._router.forget()
        self.trailing.load_state_dict(state["trailing"])
        self._drawing.load_state_dict(state.get("samples", {}))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(parameter.shape) for key, parameter in uses(self._modules)}

    def _before_backward(
        self, sequence_ids: Tensor, reduced: set[str]
    ) -> Callable[[Tensor, Tensor], None]:
        """Return what is to be done with the log-probabilities before their backward."""
        owner = weakref.ref(self)

        def prepare(log_prob: Tensor, coefficient_B: Tensor) -> None:
            isopo = owner()
            if isopo is None:
                return
            _check_prompts(log_prob, sequence_ids)
            if not isopo._graph_is_checked:
                check_graph(log_prob, isopo._modules, isopo._router)
            if isopo._router.rescue is not None:
                isopo._router.rescue.measure(log_prob, sequence_ids, coefficient_B)
            check_sum(log_prob)
            isopo._graph_is_checked = True
            if not isinstance(isopo._router.active, Microbatch):  # whose end would check it
                modules, before = isopo._modules, gradient_stamps(isopo._modules)
                check = partial(check_bypassed, modules, reduced, before, isopo._router)
                torch.autograd.Variable._execution_engine.queue_callback(check)

        return prepare

    def _check_ready(self) -> None:
        """Refuse a microbatch inside another one, or of a model that is not as it was left."""
        if self._router.active is not None:
            raise ProxstepError("microbatch() inside microbatch() or off(): they do not nest")
        if not self._modules:
            raise ProxstepError(
                "this Isopo was removed from its model by remove(): install another one, "
                "Isopo(model)"
            )
        model = parts_of(self.model)
        if model != self._covered:  # it was changed since the last microbatch
            check_coverage(self.model, self._modules, self._router)
            self._covered = model
        self._check_step_was_called()

    def _check_sequences(self, sequences: Sequences) -> None:
        groups = sequences.group_B
        if groups is None and isinstance(self.rule, NaturalRule) and self.rule.interact == "group":
            raise ProxstepError('interact="group" needs groups, one number per sequence')
        unknown = sorted(set(sequences.fisher_sq) - {key for key, _ in uses(self._modules)})
        if unknown:
            raise ProxstepError(f"fisher_squares: {unknown[0]} is no parameter that ISOPO covers")

    def _check_step_was_called(self) -> None:
        """Refuse a microbatch of the next step before `step` has ended the last one."""
        trainable = [parameter for _, parameter in uses(self._modules)]
        if not trainable:
            raise ProxstepError("every parameter that ISOPO covered is frozen now: nothing is left")
        if not self._router.accumulated:
            self._versions, self._values = {}, None
        # FSDP2 swaps a sharded parameter for an unsharded one, with a version of its own.
        before = [self._versions.setdefault(p, p._version) for p in trainable]
        moved = any(p._version != version for p, version in zip(trainable, before, strict=True))
        values = _some_values(trainable)  # a fused optimizer leaves the versions as they are
        if self._values is None or self._values[0] != values[0]:
            self._values = values
        elif not moved:
            moved = not torch.equal(self._values[1], values[1])
        if moved:
            raise ProxstepError(
                "the parameters changed, but isopo.step() was not called: call it after "
                "optimizer.step(), so that the next step starts from what this one measured"
            )

    def _bookmark(self) -> Callable[[], None]:
        """Return what undoes whatever a microbatch that fails has left behind, but gradients."""
        length, running, drawn = len(self._log), dict(self._running), self._drawing.bookmark()

        def undo() -> None:
            del self._log[length:]
            self._running.clear()
            self._running.update(running)
            drawn()

        return undo


def _source_of(given: OverlapSource | None, fisher: Fisher, num: int | None) -> OverlapSource:
    """Return where the sample of positions is from, as it was given or else by default."""
    if given is None:
        carries = fisher == "positions" and num is not None
        return "previous_step" if carries else "microbatch"
    check_literal("overlap_source", given, OverlapSource)
    if fisher == "sequences" and given != "microbatch":
        raise ProxstepError(
            f'overlap_source="{given}" chooses positions, and fisher="sequences" uses none: leave '
            "one of them out"
        )
    return given


def _check_prompts(log_prob: Tensor, sequence_ids: Tensor) -> None:
    """Refuse tokens that count while what predicts them is called padding."""
    if log_prob.shape != sequence_ids[:, 1:].shape:
        return
    padded = (sequence_ids[:, :-1] < 0) & (sequence_ids[:, 1:] >= 0)
    if bool((padded & (log_prob != 0)).any()):
        raise ProxstepError(
            "sequence_ids calls a position padding that predicts a token which counts: make them "
            "from the mask of prompt and completion, sequence_ids(attention_mask), not from the "
            "completion's; and every row's prompt needs a token"
        )


def _some_values(parameters: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """Return what tells which parameters these are, and copies of some numbers of some of them.

    A step of an optimizer changes them, whatever it does to the tensors' versions.
    """
    chosen = parameters[:: max(1, len(parameters) // 16)]
    own = [getattr(parameter, "_local_tensor", parameter).detach() for parameter in chosen]
    parts = [value.reshape(-1)[value.numel() // 2 :][:64] for value in own]
    return list(map(id, chosen)), torch.cat([part.to(own[0].device) for part in parts])
