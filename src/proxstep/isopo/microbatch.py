"""A microbatch's backward pass: from each layer's position-wise gradients to its gradient.

Legend for shape suffixes: B sequences of the microbatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch.nn import functional

from proxstep.algorithms.aggregate import as_mask
from proxstep.errors import ProxstepError
from proxstep.isopo.diagnostics.records import LayerRecord, joined
from proxstep.isopo.hooks import OWNERS, UNBOUND, PositionGradients
from proxstep.isopo.plan import Layout, Memory, Needs, Part, Statistics
from proxstep.isopo.proma import IntraProjectingRule
from proxstep.isopo.rescue import Rescue
from proxstep.isopo.rule import Means, NaturalRule, fisher_squares, kernel_fisher_squares
from proxstep.isopo.sampling import Sample, Samples
from proxstep.isopo.settings import Sequences, Settings, check_coefficients
from proxstep.logprobs.tokens import SumOfLogProbs
from proxstep.typing import Bool, Float, Tensor

Log = list[tuple[str, LayerRecord]]
"""What was measured, by parameter use, in the order of the reductions."""

_NUMBERS = itertools.count()
_MOST_PENDING = 64


class Microbatch:
    """One microbatch's layout and coefficients, and what becomes of its gradients.

    Args:
        layout: Which position belongs to which sequence.
        sequences: Their coefficients and groups.
        settings: The rule.
        samples: The positions that estimate the Fisher norm.
        past: Averages over earlier optimizer steps, by parameter use.
        memory: The workspace.
        log: This microbatch's measurements are added to it.
        diagnose: Whether to measure and keep all statistics, the unneeded ones too.
        measuring: Whether all gradients are to be zeros.
        running: The step's gradients so far, where the rule needs them.
    """

    def __init__(
        self,
        layout: Layout,
        sequences: Sequences,
        settings: Settings,
        samples: Samples,
        past: Mapping[str, Means],
        memory: Memory,
        log: Log,
        *,
        diagnose: bool = False,
        measuring: bool = False,
        running: dict[str, Tensor] | None = None,
    ) -> None:
        self.layout, self.sequences, self.samples = layout, sequences, samples
        self.settings, self.diagnose, self._measuring = settings, diagnose, measuring
        self.needs = settings.needs
        if diagnose:
            if isinstance(settings.rule, IntraProjectingRule):
                raise ProxstepError(
                    "diagnose describes a weight for each sequence, which Intra-PROMA's gradient "
                    "does not have: set it to False"
                )
            positions = settings.fisher == "positions"
            self.needs = replace(self.needs, fisher=positions, norm=True, ntk=True)
        self.reduced: set[str] = set()
        self.announced = self.reached = False
        self._averages = set(settings.rule.averages)
        self.before_backward: Callable[[Tensor, Tensor], None] | None = None
        self._past, self._memory, self._log = past, memory, log
        memory.same_positions = samples.same_positions
        self._running = {} if running is None else running
        self._related_BB = None
        if isinstance(settings.rule, NaturalRule) and settings.rule.interact == "group":
            assert sequences.group_B is not None
            self._related_BB = sequences.group_B[:, None] == sequences.group_B[None, :]

    def set_coefficients(self, coefficients: Float[Tensor, " batch"]) -> None:
        """Replace the coefficients, where they follow from the forward itself; before backward.

        Args:
            coefficients: One number per sequence, as in `Isopo.microbatch`.

        Raises:
            ProxstepError: If they are not one finite number per sequence, or a parameter was
                back-propagated with the earlier ones.
        """
        like = self.layout.sequence_T
        coefficient_B = check_coefficients(coefficients, like, self.layout.num_sequences)
        if self.reduced:
            raise ProxstepError("set_coefficients() came after backward: call it before")
        self.sequences = replace(self.sequences, coefficient_B=coefficient_B)

    def objective(
        self, log_prob_BT: Float[Tensor, ...], response_mask: Bool[Tensor, ...] | None = None
    ) -> Float[Tensor, ""]:
        """Return the sum of the log-probabilities, whose backward refuses a loss scale.

        Args:
            log_prob_BT: Log-probabilities in nats, with their graph.
            response_mask: True at those that count; None for all.

        Raises:
            ProxstepError: If the log-probabilities have no graph, or the mask does not fit them. In
                backward, if the sum is not finite or was multiplied by anything: a gradient scaler,
                or a division by accumulation steps, would enter the norms.
        """
        if not isinstance(log_prob_BT, Tensor) or not log_prob_BT.is_floating_point():
            raise ProxstepError("log_prob_BT must be a tensor of log-probabilities, with its graph")
        if torch.is_grad_enabled() and not log_prob_BT.requires_grad:
            raise ProxstepError(
                "log_prob_BT has no graph: the forward ran under no_grad or inference_mode, it was "
                "detached, or nothing in it is trainable"
            )
        if response_mask is not None:
            mask_BT = as_mask("response_mask", response_mask, log_prob_BT)
            log_prob_BT = log_prob_BT.masked_fill(~mask_BT, 0.0)
        total = log_prob_BT.sum()
        if total.requires_grad:
            value = total.detach()
            total.register_hook(lambda grad: self._begin_backward(grad, value, log_prob_BT))
        return total.as_subclass(SumOfLogProbs)

    def _begin_backward(self, grad: Tensor, value: Tensor, log_prob_BT: Tensor) -> None:
        """Check what is back-propagated, before any parameter's gradient follows from it."""
        if bool((grad != 1) | ~value.isfinite()):
            if not bool(value.isfinite()):
                raise ProxstepError(
                    f"the sum of log-probabilities is {value.item()}: no gradient was computed. "
                    "Look for parameters or log-probabilities that are not finite"
                )
            raise ProxstepError(
                f"the sum of log-probabilities was multiplied by {grad.item():g} before backward: "
                "a loss scale, a gradient scaler or a division by accumulation steps would enter "
                "ISOPO's norms. Back-propagate microbatch.objective(...) as it is, and put the "
                "factor into the coefficients"
            )
        coefficient_B = self.sequences.coefficient_B
        if self.before_backward is not None:
            self.before_backward(log_prob_BT, coefficient_B)
        dtype = torch.promote_types(coefficient_B.dtype, log_prob_BT.dtype)
        self.sequences = replace(self.sequences, coefficient_B=coefficient_B.to(dtype))
        self.announced = True

    # -- one layer ---------------------------------------------------------------------------------

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to (positions, features), in the layout's order.

        Args:
            key: The parameter's use, for messages.
            value: What a layer saw or gave.

        Returns:
            A row for each position that is not padding.

        Raises:
            ProxstepError: If the layer saw another number of positions than sequence_ids has, or
                saw them columns first.
        """
        flat = value.reshape(-1, value.shape[-1])
        rows, columns = self.layout.grid
        lead = tuple(size for size in value.shape[:-1] if size != 1)
        if lead == (columns, rows) != (rows, columns):
            raise ProxstepError(
                f"{key} saw positions as (columns, rows) = ({columns}, {rows}), but sequence_ids "
                f"has {rows} rows of {columns} columns: each sequence's gradient would be made of "
                "other sequences' positions. Give the layer (rows, columns, features): torch's "
                "own transformer layers have batch_first=True for it"
            )
        if flat.shape[0] != rows * columns:
            raise ProxstepError(
                f"{key} saw {flat.shape[0]} token positions, but sequence_ids has "
                f"{rows * columns} ({rows} x {columns}): make sequence_ids from the mask of the "
                "same input_ids, turn off logits_to_keep and fused heads, run the forward inside "
                "isopo.microbatch(...), and freeze experts that see only their own tokens"
            )
        return flat if self.layout.order_T is None else flat[self.layout.order_T]

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the parameter's gradient, -sum_b weight_b G_b.

        Args:
            key: The parameter's use.
            gradients: Its position-wise gradients.

        Raises:
            ProxstepError: If the parameter's use was reduced before in this microbatch, or its
                statistics are not finite.
        """
        try:
            return self._reduce(key, gradients)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise ProxstepError(
                f"{key}: the sequences' gradients are not finite, or too large to be multiplied: "
                "look for parameters and activations that are not finite"
            ) from error

    def _reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        if key in self.reduced:
            raise ProxstepError(
                f"{key} was back-propagated twice in one microbatch: a sequence's gradient must "
                "arrive whole; use one forward and one backward per isopo.microbatch(...)"
            )
        self.reduced.add(key)
        rule, sequences, past = self.settings.rule, self.sequences, self._past.get(key, {})
        intra = rule if isinstance(rule, IntraProjectingRule) else None
        given_B = sequences.fisher_sq.get(key)
        needs = self.needs if given_B is None else replace(self.needs, fisher=False)
        excluded = self.settings.only_linear and not gradients.is_matrix
        if excluded or (needs == Needs() and given_B is None):
            weight_B = -sequences.coefficient_B * (not self._measuring)
            weight_T = functional.pad(weight_B, (0, 1))[self.layout.sequence_T]  # 0 at padding
            total = gradients.contract(weight_T)
            return total if intra is None else intra.project(total, gradients, self.layout)
        by_sequences = self.settings.fisher == "sequences"
        wanted = {"fisher_sq", *self._averages} if needs.fisher else self._averages
        separable = not (rule.interacting or by_sequences) and wanted <= past.keys()
        sample, sample_sq_B, moments = None, None, {}
        if needs.fisher:
            sample, sample_sq_B, moments = self._sample(key, gradients, past)
        dtype = torch.promote_types(sequences.coefficient_B.dtype, torch.float32)
        along_B = None
        if needs.along and key not in self._running:  # nothing to project
            needs = replace(needs, ntk=self.diagnose)
        elif needs.along:  # the negative one is of a gradient to minimize
            along_T = gradients.along(self._running[key])
            along_B = -self.layout.sum_by_sequence(along_T[None])[0]
        length_B = None
        if self.diagnose:
            length_B = torch.tensor(self.layout.lengths, device=self.layout.sequence_T.device)
        total, records = None, []
        drawn = None if sample is None else sample.gradients
        for part in gradients.parts(self.layout, needs, drawn, self._memory, separable=separable):
            fisher_B, filled_B = None, None
            if given_B is not None:
                fisher_B = given_B[part.sequences]
            elif sample is not None and sample_sq_B is not None:
                fisher_B, filled_B = self._estimate(part, sample, sample_sq_B, past)
            elif by_sequences and part.ntk_BB is not None:
                fisher_B = kernel_fisher_squares(part.ntk_BB)
            ntk_BB = part.ntk_BB
            if ntk_BB is not None and self._related_BB is not None:
                ntk_BB = ntk_BB * self._related_BB
            coefficient_B = sequences.coefficient_B[part.sequences]
            found = Statistics(coefficient_B, fisher_B, part.norm_sq_B, ntk_BB, along_B)
            weight_B, more, report = rule.weigh(found, past, self.samples.over_ranks)
            if self._measuring and filled_B is not None:  # what is filled in is no measurement of F
                more = {
                    name: value_B[~filled_B] if "fisher" in name else value_B
                    for name, value_B in more.items()
                }
            used_B = torch.zeros_like(weight_B) if self._measuring else -weight_B  # to minimize
            total = part.add(used_B.to(dtype), total)
            records.append(
                LayerRecord(
                    coefficient_B,
                    weight_B,
                    fisher_B,
                    filled_B,
                    part.norm_sq_B,
                    part.ntk_BB if self.diagnose else None,
                    None if sequences.group_B is None else sequences.group_B[part.sequences],
                    {**moments, **more},
                    report,
                    None if length_B is None else length_B[part.sequences],
                )
            )
            moments = {}
        assert total is not None
        if needs.along:
            self._running[key] = total + self._running.get(key, 0.0)
        self._log.append((key, records[0] if len(records) == 1 else joined(records)))
        return total if intra is None else intra.project(total, gradients, self.layout)

    def _estimate(
        self, part: Part, sample: Sample, sample_sq_B: Tensor, past: Means
    ) -> tuple[Tensor, Tensor]:
        """Return F_b^2 of a part's sequences by the sample, and which were 0 and are filled in."""
        assert part.cross_KB is not None
        cross_KB = part.cross_KB
        if sample.own_KB is not None:
            cross_KB = cross_KB.masked_fill(sample.own_KB[:, part.sequences], 0.0)
        square_B = sample_sq_B[part.sequences]
        return fisher_squares(cross_KB, sample.weight_K, square_B, past, self.samples.over_ranks)

    def _sample(
        self, key: str, gradients: PositionGradients, past: Means
    ) -> tuple[Sample, Tensor, dict[str, Tensor]]:
        """Return the sample, what each sequence's sum is divided by, and the sample's mean."""
        sample = self.samples.of(key, gradients)
        square_K, own_KB = sample.gradients.squares(), sample.own_KB
        weight_K = sample.weight_K
        weight_K = torch.ones_like(square_K) if weight_K is None else weight_K.to(square_K.dtype)
        sum_2 = torch.stack([square_K, torch.ones_like(square_K)]) @ weight_K
        mean = sum_2[0] / sum_2[1].clamp(min=torch.finfo(square_K.dtype).tiny)
        used = past.get("sample_sq", mean)
        trailing = self.settings.fisher_denominator == "trailing"
        if own_KB is None:
            total = used * sum_2[1] if trailing else sum_2[0]
            total_B = total.expand(len(self.sequences.coefficient_B))
        else:
            weight_KB = weight_K[:, None].masked_fill(own_KB, 0.0)
            square_B = square_K @ weight_KB
            # Others that are rounding errors (at a first position no query matters) count as 0.
            rounding = (64 * torch.finfo(square_K.dtype).eps) ** 2
            own_KB = own_KB | (square_B <= rounding * sum_2[0])
            total_B = used * weight_KB.sum(dim=0) if trailing else square_B
        return Sample(sample.gradients, own_KB, sample.weight_K), total_B, {"sample_sq": mean[None]}


class PlainSum:
    """The sink of a backward inside `off()` whose forward ran outside: the ordinary gradient."""

    def select(self, key: str, value: Tensor) -> Tensor:
        """Flatten (..., features) to all positions."""
        del key
        return value.reshape(-1, value.shape[-1])

    def reduce(self, key: str, gradients: PositionGradients) -> Tensor:
        """Return the sum over positions."""
        del key
        return gradients.contract(gradients.first.new_ones(gradients.num_rows))


Sink = Microbatch | PlainSum


class Router:
    """Which microbatch a forward and its backward belong to: what patched layers know of an Isopo.

    Attributes:
        number: Its key in `OWNERS`.
        enabled: Whether forwards are to be routed at the moment.
        microbatch_id: The active microbatch's id, or `UNBOUND`.
        grid: Shape of the active microbatch's token grid.
        active: Where a backward goes whose forward was outside.
        rescue: The parameters that get the plain policy gradient.
        accumulated: Whether there was a backward in this optimizer step.
    """

    def __init__(self) -> None:
        self.number, self.enabled = next(_NUMBERS), True
        self.microbatch_id, self.grid = torch.tensor(UNBOUND), None
        self.active: Sink | None = None
        self.rescue: Rescue | None = None
        self.accumulated = False
        self._pending: dict[int, Microbatch] = {}
        OWNERS[self.number] = self

    def begin(self, number: int, microbatch: Microbatch) -> None:
        """Bind the forwards from now on to a microbatch."""
        while len(self._pending) >= _MOST_PENDING:
            del self._pending[next(iter(self._pending))]
        self._pending[number] = self.active = microbatch
        self.microbatch_id, self.grid = torch.tensor(number), microbatch.layout.grid

    def end(self, number: int, microbatch: Microbatch, *, failed: bool) -> None:
        """Bind no more forwards; unless there was a backward or an error, it is still to come.

        Raises:
            ProxstepError: If there was a backward of something else than the model.
        """
        self.active, self.grid, self.microbatch_id = None, None, torch.tensor(UNBOUND)
        if microbatch.reduced or failed:
            self._pending.pop(number, None)
        if not failed:
            self._check_reached(microbatch)

    def switch(self, *, on: bool) -> None:
        """Route forwards from now on, or let them and their backwards be ordinary ones."""
        self.active, self.enabled = None if on else PlainSum(), on
        if self.rescue is not None:
            self.rescue.off = not on

    def forget(self, *, failed: bool = False) -> None:
        """End the optimizer step: no backward is still to come.

        Raises:
            ProxstepError: As `end`.
        """
        pending, self._pending, self.accumulated = self._pending, {}, False
        for microbatch in () if failed else pending.values():
            self._check_reached(microbatch)

    def _check_reached(self, microbatch: Microbatch) -> None:
        if microbatch.announced and not microbatch.reached and self.rescue is None:
            raise ProxstepError(
                "microbatch.objective(...) was back-propagated, but reached no parameter of the "
                "model that this Isopo was given: the log-probabilities are those of a copy of it, "
                "or of another model. Copies are ordinary models: install Isopo on what is trained"
            )

    def spares(self, parameter: Tensor) -> bool:
        """Whether a parameter's uses are not to be routed."""
        return self.rescue is not None and self.rescue.has(parameter)

    def spare(self, key: str, parameter: Tensor) -> bool:
        """Give a parameter the plain policy gradient, where that is what the user wants."""
        if self.rescue is None:
            return False
        self.rescue.add(key, parameter)
        return True

    def resolve(self, microbatch_id: int, key: str) -> Sink:
        """Return where a parameter's gradients go, for a backward whose forward got this id.

        Raises:
            ProxstepError: If that is nowhere.
        """
        if microbatch_id == UNBOUND:
            if self.active is None:
                raise ProxstepError(
                    f"backward reached {key} outside isopo.microbatch(...): its gradient would "
                    "lack the coefficients; wrap the backward, or use isopo.off() for a loss of "
                    "its own. With activation checkpointing set use_reentrant=False, or run the "
                    "backward inside isopo.microbatch(...)"
                )
            return self._checked(self.active, key)
        if microbatch_id not in self._pending:
            raise ProxstepError(
                f"backward reached {key} for a microbatch that was back-propagated before, or that "
                "belongs to an earlier optimizer step: use one backward per isopo.microbatch(...), "
                "before isopo.step()"
            )
        bound = self._pending[microbatch_id]
        if isinstance(self.active, Microbatch) and self.active is not bound:
            raise ProxstepError(
                f"backward reached {key} for another microbatch than the one that is active: run "
                "it inside its own isopo.microbatch(...), or outside all of them"
            )
        return self._checked(bound, key)

    def _checked(self, sink: Sink, key: str) -> Sink:
        """Return where a gradient goes, if it is one of what is to be back-propagated."""
        if isinstance(sink, Microbatch):
            if not sink.announced:
                raise ProxstepError(
                    f"backward reached {key} from another loss than microbatch.objective(...): its "
                    "sign, its scale and its advantages would enter ISOPO's norms. Back-propagate "
                    "microbatch.objective(log_probs), put the advantages into the coefficients, "
                    "and run losses of their own forward and backward inside isopo.off()"
                )
            sink.reached = self.accumulated = True
        return sink
