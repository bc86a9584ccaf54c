"""The recipe's optimizer: torch's own, and pytorch-optimizer's SOAP and Kron."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from proxstep.config.optimizer import OPTIMIZER_OPTIONS, OptimizerSection
from proxstep.errors import ProxstepError


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters that act as one.

    Its groups are theirs, so that a schedule reaches them all.

    Args:
        parts: The optimizers.

    Raises:
        ValueError: If two of them share a parameter.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        """Take a step with each of them."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each of them."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def make_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """Return a recipe's optimizer over the trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    common: dict[str, Any] = {"lr": section.learning_rate, "weight_decay": section.weight_decay}
    options = section.options()
    if section.name == "adamw":
        return torch.optim.AdamW(parameters, **common, **options)
    if section.name == "sgd":
        return torch.optim.SGD(parameters, **common, **options)
    if section.name == "muon":
        return _muon(list(hidden_matrices(model).values()), parameters, common, options)
    from pytorch_optimizer import SOAP, Kron

    if section.name == "soap":
        return SOAP(parameters, **common, **options)
    # Balancing would draw from numpy's global generator, which a resumed run could not repeat; in
    # float32 the factors do not need it.
    return Kron(parameters, **common, **options, balance_prob=0.0)


def make_schedule(
    optimizer: torch.optim.Optimizer, section: OptimizerSection, num_updates: int
) -> LambdaLR:
    """Return the learning rate's schedule: a linear warm-up, then what the recipe says.

    transformers' own warm up from a rate of 0, an update that changes nothing; after it these are
    the same.

    Args:
        optimizer: Whose groups' learning rates are the peaks.
        section: The recipe's.
        num_updates: Optimizer steps of the whole run, at whose end the lowest rate is reached.
    """
    warmup, floor = section.warmup_updates, section.min_lr_rate

    def share(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        done = min(1.0, (update - warmup) / max(1, num_updates - warmup))
        if section.lr_scheduler_type == "constant":
            return 1.0
        fall = (
            done if section.lr_scheduler_type == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
        )
        return 1.0 - (1.0 - floor) * fall

    return LambdaLR(optimizer, share)


_OF_THE_RECIPE = ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum")
"""What a group of parameters has of the recipe; the rest of it is the optimizer's own count."""


@contextmanager
def recipe_kept(optimizer: Any) -> Iterator[None]:
    """Leave the recipe's hyper-parameters as they are while a checkpoint's state is loaded."""
    said = [{k: group[k] for k in _OF_THE_RECIPE if k in group} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, said, strict=True):
        group |= own


def set_peaks(optimizer: Any, schedule: Any, peaks: Sequence[float]) -> None:
    """Give each group another peak of its learning rate, and what the schedule makes of it now.

    Args:
        optimizer: The optimizer.
        schedule: Its schedule, torch's LambdaLR.
        peaks: One for each group.
    """
    shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
    rates = [peak * share for peak, share in zip(peaks, shares, strict=True)]
    schedule.base_lrs, schedule._last_lr = [*peaks], rates
    for group, rate, peak in zip(optimizer.param_groups, rates, peaks, strict=True):
        group |= {"lr": rate, "initial_lr": peak}


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that this environment does not have.

    Raises:
        ProxstepError: With what to install.
    """
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ProxstepError(
            f"optimizer.name muon needs torch 2.9 or newer, this is {torch.__version__}: upgrade "
            "torch, or use adamw"
        )
    if name in ("soap", "kron") and importlib.util.find_spec("pytorch_optimizer") is None:
        raise ProxstepError(
            f"optimizer.name {name} needs the package pytorch-optimizer: install proxstep[train], "
            "or use adamw"
        )


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weights of a model's hidden linear layers, by name: muon's share.

    Output layers, tied or not, and embeddings are left out. Both matrices of a hidden layer's LoRA
    adapter are linear layers, so they are in.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    outer = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [head]
    excluded = {id(p) for module in outer if module is not None for p in module.parameters()}
    weights = {id(m.weight) for m in model.modules() if _is_linear(m)} - excluded
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in weights
    }


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is nn.Linear, or GPT-2's linear layer with its weight transposed."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D"
        and type(module).__module__ == "transformers.pytorch_utils"
    )


def _muon(
    matrices: list[nn.Parameter],
    parameters: list[nn.Parameter],
    common: dict[str, Any],
    options: dict[str, Any],
) -> torch.optim.Optimizer:
    """Return Muon over the matrices and AdamW over the other parameters, as one optimizer."""
    of_muon = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in of_muon]
    for_adamw = {key: options[key] for key in OPTIMIZER_OPTIONS["adamw"] if key in options}
    for_muon = {key: options[key] for key in ("momentum",) if key in options}
    for_muon["lr"] = options.get("muon_learning_rate", common["lr"])
    parts: list[torch.optim.Optimizer] = []
    if others:
        parts.append(torch.optim.AdamW(others, **common, **for_adamw))
    if matrices:
        settings = {**common, **for_muon, "adjust_lr_fn": "match_rms_adamw"}
        parts.append(torch.optim.Muon(matrices, **settings))
    return JointOptimizer(parts)
