"""The plain policy gradient for parameters that no kind of layer covers.

Before a microbatch's backward, one ordinary backward of sum_b coefficient_b log pi(y_b) finds these
parameters' gradients, and a hook puts them in the place of what the microbatch's own backward would
bring: the gradient of the sum of the log-probabilities, in which no coefficient is.

Legend for shape suffixes: B sequences, R rows and C columns of the token grid.
"""

from __future__ import annotations

import weakref

import torch

from proxstep.errors import ProxstepError
from proxstep.isopo.hooks import SKIPPED
from proxstep.typing import Float, Int, Tensor


class Rescue:
    """The parameters that get the plain policy gradient.

    Args:
        owner: Number of the `Isopo`, whose operator stands still in the ordinary backward.

    Attributes:
        off: Whether `Isopo.off()` is active, where gradients stay as they are.
    """

    def __init__(self, owner: int) -> None:
        self._owner, self.off = owner, False
        self._parameters: dict[int, tuple[str, Tensor]] = {}
        self._found: dict[int, Tensor | None] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def add(self, name: str, parameter: Tensor) -> None:
        """Rescue one more parameter.

        Raises:
            ProxstepError: If it is sharded: the hook would see another tensor's gradient.
        """
        if type(parameter.data) is not Tensor and hasattr(parameter, "device_mesh"):
            raise ProxstepError(
                f'{name} is sharded, and other_parameters="reinforce" cannot reach it: freeze it'
            )
        number = id(parameter)
        self._parameters[number] = (name, parameter)
        owner = weakref.ref(self)  # a model whose Isopo is gone is ordinary

        def replace(grad: Tensor) -> Tensor | None:
            rescue = owner()
            return None if rescue is None else rescue._replace(number)

        self._handles.append(parameter.register_hook(replace))

    def has(self, parameter: Tensor) -> bool:
        """Whether a parameter is rescued."""
        return id(parameter) in self._parameters

    def measure(
        self,
        log_prob: Float[Tensor, "rows ..."],
        sequence_ids: Int[Tensor, "rows columns"],
        coefficient_B: Float[Tensor, " batch"],
    ) -> None:
        """Find the gradients of the microbatch whose backward follows.

        Raises:
            ProxstepError: If it does not show which sequence a log-probability belongs to.
        """
        wanted = {n: p for n, (_, p) in self._parameters.items() if p.requires_grad}
        if not wanted:
            return
        weight = -_spread(log_prob, sequence_ids, coefficient_B)
        SKIPPED.add(self._owner)
        try:
            grads = torch.autograd.grad(
                log_prob, list(wanted.values()), weight, retain_graph=True, allow_unused=True
            )
        finally:
            SKIPPED.discard(self._owner)
        self._found = dict(zip(wanted, grads, strict=True))

    def remove(self) -> None:
        """Leave all gradients as they are from now on."""
        for handle in self._handles:
            handle.remove()
        self._parameters.clear()

    def _replace(self, number: int) -> Tensor | None:
        if self._owner in SKIPPED:
            return None
        found = self._found.pop(number, None)
        if found is None and not self.off:
            raise ProxstepError(
                f"{self._parameters[number][0]} gets the plain policy gradient, which "
                "microbatch.objective(...) finds: back-propagate that, once, or run an ordinary "
                "backward inside isopo.off()"
            )
        return found


def _spread(log_prob: Tensor, sequence_ids: Tensor, coefficient_B: Tensor) -> Tensor:
    """Return each log-probability's sequence's coefficient, 0 at padding."""
    (rows, columns), shape = sequence_ids.shape, log_prob.shape
    only_R1 = sequence_ids.max(dim=1, keepdim=True).values
    if len(shape) == 2 and shape[0] == rows and shape[1] in (columns - 1, columns):
        id_RC = sequence_ids[:, columns - shape[1] :]
    elif shape[:1] == (rows,) and bool(((sequence_ids == only_R1) | (sequence_ids < 0)).all()):
        id_RC = only_R1.view(rows, *(1,) * (len(shape) - 1)).expand(shape)  # one in each row
    else:
        raise ProxstepError(
            'other_parameters="reinforce" must know each log-probability\'s sequence: give '
            f"microbatch.objective(...) log-probabilities of shape ({rows}, {columns - 1}), as "
            "sequence_ids has without its first column"
        )
    padded = torch.cat([coefficient_B, coefficient_B.new_zeros(1)]).to(log_prob)
    return padded[id_RC]  # -1 is the last one
