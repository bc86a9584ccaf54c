"""verl's own loss function in two: the policy term's coefficients, and the other terms.

The policy term acts on log-probabilities that are cut off from the model: its gradient there is
what verl's loss, aggregation, scaling over ranks and importance weights make of a sequence.

Legend for shape suffixes: B sequences, R response tokens, N tokens without padding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from proxstep.algorithms.aggregate import gradient_by_sequence
from proxstep.errors import ProxstepError
from proxstep.typing import Bool, Float, Tensor

NO_POLICY_TERM = "chi2_no_policy_term"
"""The policy loss that is zero, with which verl's loss function computes its other terms alone."""

_VARIES = (
    "the policy loss's gradient differs between the tokens of a response, so that ISOPO has no one "
    "coefficient for it: use an estimator with one advantage per response (algorithm.adv_estimator="
    "grpo, rloo, ... or the policy loss's own), importance weights by sequence "
    "(algorithm.rollout_correction.rollout_is=sequence), and a policy loss of sequences "
    "(actor_rollout_ref.actor.policy_loss.loss_mode=gpg, gspo, chi2_opo, ...)"
)

LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]


def no_policy_term(log_prob: Tensor, **others: Any) -> tuple[Tensor, dict[str, float]]:
    """Return zero, with a gradient of zero, and no metrics."""
    del others
    return 0.0 * log_prob.sum(), {}


@dataclass(frozen=True)
class Terms:
    """A training step's loss function in two.

    Attributes:
        policy: The policy term alone.
        others: Entropy and KL terms alone; without them, zero.
        has_others: Whether there are any.
    """

    policy: LossFunction
    others: LossFunction
    has_others: bool

    def nothing(
        self, model_output: Mapping[str, Tensor], data: Any, dp_group: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return zero, with a gradient of zero and the policy term's metrics.

        For a micro-batch of padding: every rank must run as many passes, with the same metrics.
        """
        with torch.no_grad():
            _, metrics = self.policy(model_output=model_output, data=data, dp_group=dp_group)
        return 0.0 * model_output["log_probs"].values().sum(), metrics


def split_terms(loss_function: Any) -> Terms:
    """Return the terms of the loss function that verl's worker hands to its engine.

    Raises:
        ProxstepError: If it is not that of policy optimization.
    """
    known = isinstance(loss_function, functools.partial) and loss_function.func is ppo_loss
    if not known:
        name = getattr(loss_function, "func", loss_function)
        raise ProxstepError(
            f"actor_rollout_ref.actor.strategy=isopo trains with verl's ppo_loss alone, not with "
            f"{getattr(name, '__name__', name)} (distillation, supervised training): use "
            "strategy=fsdp2 for that"
        )
    config = loss_function.keywords["config"]
    return Terms(
        policy=functools.partial(ppo_loss, _with(config, entropy_coeff=0.0, use_kl_loss=False)),
        others=functools.partial(
            ppo_loss, _with(config, policy_loss={"loss_mode": NO_POLICY_TERM})
        ),
        has_others=bool(config.entropy_coeff != 0 or config.use_kl_loss),
    )


def policy_coefficients(
    policy: LossFunction,
    model_output: Mapping[str, Tensor],
    data: Any,
    response_BR: Bool[Tensor, "batch response"],
    dp_group: Any,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], dict[str, Any]]:
    """Return the weight with which the policy term pushes each sequence's log-probability up.

    The arguments are those of verl's losses, and where the response tokens count.

    Returns:
        coefficient_b = -dL / d log pi(y_b), with all of verl's scaling in it; the term's value and
        its metrics, without gradient.

    Raises:
        ProxstepError: If a sequence has no single coefficient.
    """
    outputs = {name: value.detach() for name, value in model_output.items()}
    log_prob: Any = outputs["log_probs"]
    with torch.enable_grad():
        leaf_N = log_prob.values().clone().requires_grad_()
        outputs["log_probs"] = torch.nested.nested_tensor_from_jagged(leaf_N, log_prob.offsets())
        loss, metrics = policy(model_output=outputs, data=data, dp_group=dp_group)
        (grad_N,) = torch.autograd.grad(loss, leaf_N)
    grad_BR = no_padding_2_padding(grad_N, data)
    return -gradient_by_sequence(grad_BR, response_BR, _VARIES), loss.detach(), metrics


def _with(config: Any, **changes: Any) -> Any:
    """Return an ActorConfig with other values; verl's own are frozen, and checked when made."""
    changed = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed
