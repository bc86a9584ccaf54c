"""A few optimizer steps of ISOPO, with the sequences of each spread over ranks and microbatches."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from tests.isopo.grids import log_probs, make_grid
from tests.models import finish, gpt2, qwen3
from tests.oracle import random_sequences
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from proxstep.isopo import IsometricRule, Isopo, Rule

PAPER = IsometricRule(-1.0, scale="paper")
NUM_SEQUENCES = 7
"""Of each optimizer step; some 50 positions."""
Spread = tuple[tuple[tuple[int, ...], ...], ...]
"""The numbers of one step's sequences, by rank and by microbatch."""

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen3-tied": lambda: qwen3(tied=True),
    "qwen3-untied": lambda: qwen3(tied=False),
    "gpt2": gpt2,
}
WRAPPERS = ["ddp(isopo)", "isopo(ddp)", "isopo(ddp.module)", "fsdp(isopo)", "isopo(fsdp)"]
"""Which is applied to which."""


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        spreads: One per optimizer step; of one rank only, where one process has all.
        rule: Of ISOPO.
        family: One of `FAMILIES`.
        wrapper: One of `WRAPPERS`, or "".
        wrapping: Options of DistributedDataParallel or `fully_shard`.
        leaves: Whether every layer is sharded on its own.
        options: Of `Isopo`.
        dtype: Of the parameters.
        checkpointing: Whose, if blocks are computed again in backward.
        clip: The gradient's greatest norm.
        evaluating: Whether a forward without gradients precedes every microbatch.
        restart: The step before which everything is made anew and loaded from a checkpoint.
        group: The ranks whose statistics are put together: by default all, "all" by name, or
            "each" one alone.
    """

    spreads: tuple[Spread, ...]
    rule: str | Rule = PAPER
    family: str = "qwen3-tied"
    wrapper: str = ""
    wrapping: Mapping[str, Any] = field(default_factory=dict)
    leaves: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    checkpointing: Literal["", "transformers", "torch"] = ""
    clip: float | None = None
    evaluating: bool = False
    restart: int | None = None
    group: Literal["", "all", "each"] = ""

    def but(self, **changes: Any) -> Run:
        """Return the same with changes."""
        return dataclasses.replace(self, **changes)

    def alone(self) -> Run:
        """Return the same in one process, which goes through the microbatches of all ranks."""
        spreads = tuple((tuple(m for rank in spread for m in rank),) for spread in self.spreads)
        return self._plainly(spreads)

    def whole(self) -> Run:
        """Return the same in one process, with each step's sequences in one microbatch."""
        spreads = tuple(
            ((tuple(b for rank in spread for members in rank for b in members),),)
            for spread in self.spreads
        )
        return self._plainly(spreads)

    def _plainly(self, spreads: tuple[Spread, ...]) -> Run:
        kept = {"options": self.options, "dtype": self.dtype, "clip": self.clip}
        return Run(spreads, self.rule, self.family, **kept)


@dataclass
class Outcome:
    """What came out.

    Attributes:
        gradients: Each step's, by parameter; clipped.
        norms: Each step's gradient norm, where it was clipped.
        parameters: After the last step, by name.
        state: Of `Isopo`, after the last step.
        scalars: What each `Isopo.step` returned.
    """

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    scalars: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Parts:
    """What is trained: the bare model, how it is called, and what changes it."""

    bare: nn.Module
    model: nn.Module
    isopo: Isopo
    optimizer: torch.optim.Optimizer

    def named(self, of: Callable[[nn.Parameter], Any]) -> dict[str, Tensor]:
        """Return what there is of every parameter, whole, by its name in the bare model."""
        values = {name: of(parameter) for name, parameter in self.bare.named_parameters()}
        return {
            name.replace("_checkpoint_wrapped_module.", ""): whole_tensor(value).clone()
            for name, value in values.items()
            if value is not None
        }


def train(run: Run) -> Outcome:
    """Take one step per spread, on this rank's part of it."""
    parts, outcome = build(run), Outcome()
    for step, spread in enumerate(run.spreads):
        if step == run.restart:
            parts = _restarted(run, parts)
        own = spread[dist.get_rank() if len(spread) > 1 else 0]
        for place, members in enumerate(own):
            with _reduced(parts.model, last=place == len(own) - 1):
                microbatch(run, parts, step, members)
        if run.clip is not None:
            norm = nn.utils.clip_grad_norm_(parts.model.parameters(), run.clip)
            outcome.norms.append(float(whole_tensor(norm)))
        outcome.gradients.append(parts.named(lambda parameter: parameter.grad))
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        outcome.scalars.append(parts.isopo.step())
    outcome.parameters = parts.named(lambda parameter: parameter.detach())
    outcome.state = parts.isopo.state_dict()
    return outcome


def build(run: Run) -> Parts:
    """Make the model, always the same, wrap it and install ISOPO."""
    torch.manual_seed(0)
    bare: Any = finish(FAMILIES[run.family](), run.dtype, exact=True)
    if run.checkpointing == "transformers":
        bare.train().activation_checkpointing_enable({"use_reentrant": False})
    if run.checkpointing == "torch":
        blocks = _blocks(bare)
        for place, block in enumerate(blocks):
            blocks[place] = checkpoint_wrapper(block)
    group = None
    if run.group:
        group = dist.new_group() if run.group == "all" else dist.new_subgroups(group_size=1)[0]
    model, isopo = _wrapped(run, bare, group)
    return Parts(bare, model, isopo, torch.optim.AdamW(model.parameters(), 0.01))


def microbatch(run: Run, parts: Parts, step: int, members: tuple[int, ...]) -> None:
    """Accumulate the gradient of some of a step's sequences."""
    sequences = random_sequences(step, NUM_SEQUENCES)
    generator = torch.Generator().manual_seed(step)
    advantage_B = torch.randn(NUM_SEQUENCES, generator=generator, dtype=torch.float64)
    averaged = dist.get_world_size() if run.wrapper else 1
    coefficient_B = advantage_B[list(members)] * averaged / NUM_SEQUENCES
    grid = make_grid([sequences[b] for b in members], "right")
    if run.evaluating:
        with torch.no_grad():
            log_probs(parts.model, grid)
    keys = 100 + torch.tensor(members)
    with parts.isopo.microbatch(
        grid.sequence_id, coefficient_B, grid.completion, sequence_keys=keys
    ) as found:
        found.objective(log_probs(parts.model, grid)).backward()


def whole_tensor(value: Any) -> Tensor:
    """Gather what is sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _wrapped(run: Run, bare: nn.Module, group: Any) -> tuple[nn.Module, Isopo]:
    """Return what is called, and what is installed on it."""

    def install(model: nn.Module) -> Isopo:
        return Isopo(model, run.rule, process_group=group, **run.options)

    if not run.wrapper:
        return bare, install(bare)
    isopo = install(bare) if run.wrapper.endswith("(isopo)") else None
    if "fsdp" in run.wrapper:
        model = _sharded(run, bare, group)
    else:
        model = DistributedDataParallel(bare, process_group=group, **run.wrapping)
    inner = bare if run.wrapper == "isopo(ddp.module)" else model
    return model, isopo or install(inner)


def _sharded(run: Run, bare: Any, group: Any) -> nn.Module:
    """Shard the layers if asked to, then every block, then the rest."""
    world: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(group or world, "cpu")
    policy = MixedPrecisionPolicy(param_dtype=bare.dtype, reduce_dtype=bare.dtype)
    options = {"mesh": mesh, "mp_policy": policy} | dict(run.wrapping)
    leaves = [m for m in bare.modules() if list(m.parameters(recurse=False))]
    for module in (*(leaves if run.leaves else ()), *_blocks(bare), bare):
        fully_shard(module, **options)
    return bare


def _blocks(bare: Any) -> Any:
    return bare.transformer.h if hasattr(bare, "transformer") else bare.model.layers


@contextlib.contextmanager
def _reduced(model: nn.Module, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks in the last microbatch alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    accumulating = contextlib.nullcontext()
    if isinstance(model, DistributedDataParallel) and not last:
        accumulating = model.no_sync()
    with accumulating:
        yield


def _restarted(run: Run, parts: Parts) -> Parts:
    """Return new parts, loaded from the old; what is ISOPO's goes through a file's bytes."""
    file = io.BytesIO()
    torch.save(parts.isopo.state_dict(), file)
    new = build(run)
    new.model.load_state_dict(parts.model.state_dict())
    new.optimizer.load_state_dict(parts.optimizer.state_dict())
    new.isopo.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    return new
