"""An algorithm's loss as a policy loss of verl, and its keys as a configuration class of verl.

Legend for shape suffixes: B sequences, T response tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar

from verl.utils.torch_functional import masked_mean
from verl.workers.config import ActorConfig, PolicyLossConfig

from proxstep.algorithms import Aggregation, Algorithm
from proxstep.algorithms.aggregate import gradient_by_sequence
from proxstep.algorithms.safeguards import regression_target, target_shares
from proxstep.config.objectives import ObjectiveSection, section_of
from proxstep.engines.fields import read_section, section_options
from proxstep.engines.verl.seams import LIBRARY, config_name, find_obstacle, loss_mode
from proxstep.errors import ProxstepError
from proxstep.typing import Tensor

ACTOR = "actor_rollout_ref.actor."
PLACE = f"{ACTOR}policy_loss."
_WEIGHTS_VARY = (
    "algorithm.rollout_correction.rollout_is is by token, and the loss weighs sequences: set "
    "algorithm.rollout_correction.rollout_is=sequence"
)

BATCH_INFO: dict[str, Any] = {
    "dp_size": 1,
    "batch_num_tokens": None,
    "global_batch_size": None,
    "loss_scale_factor": None,
}
"""The counts of an optimizer step that verl hands to its losses, and what they are without one."""


@dataclasses.dataclass
class AlgorithmLossConfig(PolicyLossConfig):
    """PolicyLossConfig with an algorithm's keys, those of a recipe (docs/algorithms.md).

    The driver computes the signal of them and the workers the loss: each key stands here alone.
    `config_class` makes the classes of the algorithms.
    """

    algorithm: ClassVar[Algorithm]

    def __post_init__(self) -> None:
        mode = loss_mode(self.algorithm)
        if self.loss_mode != mode:
            raise ProxstepError(
                f"{PLACE}loss_mode is {self.loss_mode!r}, but {type(self).__name__}'s is {mode!r}: "
                f"set {PLACE}loss_mode={mode}"
            )
        options = self.section().options()
        for check in self.algorithm.checks:
            try:
                check(options)
            except ValueError as error:
                raise ProxstepError(str(error).replace("objective.", PLACE)) from None
        found = find_obstacle(self.algorithm, options)
        if found is not None and found.key is not None:
            raise ProxstepError(f"{PLACE}{found.key} is {options[found.key]}: {found.reason}")
        if found is not None:
            raise ProxstepError(f"{PLACE}loss_mode={mode} is not for verl: {found.reason}")

    def section(self) -> ObjectiveSection:
        """Return the keys as a recipe has them.

        Raises:
            ProxstepError: If one of them does not fit, by name.
        """
        keys = {name: getattr(self, name) for name in ("advantage", *self.algorithm.keys)}
        keys["name"] = self.algorithm.name
        return read_section(section_of(self.algorithm), keys, PLACE)


@cache
def config_class(algorithm: Algorithm) -> type[AlgorithmLossConfig]:
    """Return the configuration class of an algorithm, made from its declaration.

    Raises:
        ProxstepError: If one of its keys is already a field of verl's, whose value it would get.
    """
    taken = {field.name for field in dataclasses.fields(PolicyLossConfig)} & set(algorithm.keys)
    if taken:
        raise ProxstepError(
            f"algorithm {algorithm.name}: {min(taken)} is a field of verl's PolicyLossConfig with "
            "a meaning of its own: rename the key"
        )
    fields = [
        ("loss_mode", str, dataclasses.field(default=loss_mode(algorithm))),
        *section_options(section_of(algorithm), "name", "loss_agg_mode"),
    ]
    namespace = {"algorithm": algorithm, "__doc__": algorithm.about, "__module__": LIBRARY}
    return dataclasses.make_dataclass(
        config_name(algorithm), fields, bases=(AlgorithmLossConfig,), namespace=namespace
    )


def check_config(policy_loss: Any, algorithm: Algorithm) -> AlgorithmLossConfig:
    """Return a policy loss's configuration as the algorithm's.

    Raises:
        ProxstepError: If it is another class.
    """
    if not isinstance(policy_loss, config_class(algorithm)):
        target = f"{LIBRARY}.{config_name(algorithm)}"
        raise ProxstepError(
            f"{PLACE}_target_ is not {target}, which has {loss_mode(algorithm)}'s keys: set "
            f"{PLACE}_target_={target}"
        )
    return policy_loss


@cache
def policy_loss(algorithm: Algorithm) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """Return an algorithm's loss as verl calls it."""
    mode = loss_mode(algorithm)
    varies = f"advantages differ within a response: set algorithm.adv_estimator={mode}"

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str,
        config: ActorConfig,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss, aggregated as verl's losses are, and metrics averaged over sequences.

        The arguments are verl's: log-probabilities in nats and a mask of (batch, tokens); the
        signal, from the algorithm's estimator, as `advantages`; the importance weights against the
        sampler, one per sequence, at each token; and verl's ActorConfig, with the counts of the
        whole step in `global_batch_info`.

        Raises:
            ProxstepError: If the configuration is not the algorithm's, or advantages or weights
                differ within a sequence.
        """
        options = check_config(config.policy_loss, algorithm).section().options()
        _check_actor(config, options)
        response_BT = response_mask.bool()
        signal_B = gradient_by_sequence(advantages, response_BT, varies)
        weight_B = None
        if rollout_is_weights is not None:
            weight_B = gradient_by_sequence(rollout_is_weights, response_BT, _WEIGHTS_VARY)
        info = BATCH_INFO | config.global_batch_info
        value, measured = algorithm.loss(
            log_prob,
            old_log_prob,
            signal_B,
            response_BT,
            **algorithm.loss_options(options),
            aggregation=_aggregation(loss_agg_mode, info, weight_B),
        )
        counted_B = response_BT.any(dim=1)
        if not counted_B.any():  # every micro-batch of every rank must have the same metrics
            counted_B[:1] = True
        means = {name: value_B[counted_B].mean().item() for name, value_B in measured.items()}
        if algorithm.name == "opo":  # what else its preparation measures stays on verl's driver
            means |= target_shares(regression_target(signal_B[counted_B], mu=options["mu"]))
        divergence = masked_mean((old_log_prob - log_prob).detach(), response_BT)
        metrics = {f"actor/objective_{name}": mean for name, mean in means.items()}
        return value * info["dp_size"], {"actor/ppo_kl": divergence.item(), **metrics}

    return loss


def _aggregation(mode: str, info: Mapping[str, Any], weight_B: Tensor | None) -> Aggregation:
    """Return one of verl's aggregations; the factor dp_size is left out.

    Raises:
        ProxstepError: If there are several ranks and the step's counts are not known.
    """
    if mode == "token-sum":
        return Aggregation("token-mean", num_tokens=1, sequence_weights=weight_B)
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    if info["dp_size"] != 1 and info[name] is None:
        raise ProxstepError(f"verl's loss on several ranks needs {name} in global_batch_info")
    return Aggregation(
        mode,
        num_sequences=info["global_batch_size"],
        num_tokens=info["batch_num_tokens"],
        max_length=info["loss_scale_factor"],
        sequence_weights=weight_B,
    )


def _check_actor(config: ActorConfig, options: Mapping[str, Any]) -> None:
    """Refuse a key that was given to the actor, where verl's own losses have it.

    Raises:
        ProxstepError: Naming the key, and where it belongs.
    """
    for field in dataclasses.fields(ActorConfig):
        if field.name in options and getattr(config, field.name) != field.default:
            raise ProxstepError(
                f"{ACTOR}{field.name} is of verl's own losses: set {PLACE}{field.name} instead"
            )
