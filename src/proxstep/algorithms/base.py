"""What an algorithm is: its loss, its preparation and its keys, declared once.

A file of this folder holds an algorithm whole, and one line in `proxstep.algorithms` registers it.
From the declaration follow the recipe's keys and their checks, the command line, the comparison,
the reference pages, the conformance tests and the options of the TRL and verl engines.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, get_type_hints

from proxstep.algorithms.advantages import plain_signal
from proxstep.algorithms.aggregate import LossAndMetrics, check_choice, coefficients_of
from proxstep.algorithms.preparation import Signal, SignalInputs
from proxstep.errors import ProxstepError
from proxstep.typing import Bool, Float, Tensor

Options = Mapping[str, Any]
"""The values of an algorithm's keys."""


@dataclass(frozen=True)
class Key:
    """A key of an algorithm; its type and default are those of the keyword that it names.

    Attributes:
        help: A sentence.
        ge: Smallest number, if any; likewise `gt` (above), `le` and `lt`.
        choices: The texts that it may be; empty for a number or a switch.
    """

    help: str
    ge: int | float | None = None
    gt: int | float | None = None
    le: int | float | None = None
    lt: int | float | None = None
    choices: tuple[str, ...] = ()

    @property
    def bounds(self) -> dict[str, int | float]:
        """The limits that are set, by name."""
        limits = {name: getattr(self, name) for name in ("ge", "gt", "le", "lt")}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, eq=False)
class Algorithm:
    """An algorithm: from rewards to a signal per sequence, and from there to a loss.

    The keyword arguments of `loss` and `prepare` are its keys. Their defaults in the signatures are
    the only place where defaults stand.

    Attributes:
        name: The name in recipes.
        loss: (log_probs, old_log_probs, signal, response_mask, *, keys, aggregation) -> (scalar
            loss, per-sequence metrics).
        level: "sequence" if the loss depends on each sequence through log pi(y_b) alone, so that
            every token of it has the same gradient; "token" otherwise. Only the former composes
            with ISOPO.
        about: What it is, in a phrase with its source.
        keys: What is to be said of each key, in the order of the documentation.
        prepare: (inputs, *, keys) -> signal, once for all updates of a rollout; None where the loss
            takes the advantages.
        advantage: The default of `objective.advantage`.
        on_policy: What is idle in it at one update per rollout, where every ratio is 1.
        ratio_to_sampler: Whether the loss's old_log_probs are those with which the tokens were
            drawn, after temperature, top-k and top-p, instead of the old policy's own. The two are
            one where neither cut acts and one engine does both.
        idle_at_zero: Whether a sequence whose signal is exactly 0 has a gradient of exactly 0 in
            the loss, whatever its log-probabilities: an update can leave it out.
        reads_old_policy: Whether `prepare` needs the old policy's log-probabilities.
        compares: Where the keys compare a prompt's completions, which the advantage may do besides,
            the setting that does not; else "".
        checks: Each raises ValueError for keys that do not go together.
        source: Where it stands, where its loss's docstring tells of another algorithm.

    Raises:
        ProxstepError: The level is unknown, or a key lacks its sentence or its type, names no
            keyword, or has the name of what every objective has.
    """

    name: str
    loss: Callable[..., LossAndMetrics]
    level: Literal["token", "sequence"]
    about: str
    keys: Mapping[str, Key] = field(default_factory=dict)
    prepare: Callable[..., Signal] | None = None
    advantage: str = "group-zscore"
    on_policy: str = ""
    ratio_to_sampler: bool = False
    idle_at_zero: bool = False
    reads_old_policy: Callable[[Options], bool] = lambda options: False
    compares: Callable[[Options], str] = lambda options: ""
    checks: tuple[Callable[[Options], None], ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        check_choice("level", self.level, ("token", "sequence"))
        if unsaid := [name for name in self.defaults if name not in self.keys]:
            raise ProxstepError(
                f"algorithm {self.name}: say in its keys what {', '.join(unsaid)} is, a keyword "
                "argument of its loss or its preparation"
            )
        if unread := [name for name in self.keys if name not in self.defaults]:
            raise ProxstepError(
                f"algorithm {self.name}: its key {', '.join(unread)} is no keyword argument of its "
                "loss or its preparation"
            )
        unusable = [name for name in self.keys if name in _TAKEN or self.types[name] is None]
        if unusable:
            raise ProxstepError(
                f"algorithm {self.name}: {', '.join(unusable)} must have a type in the signature "
                f"and another name than {', '.join(_TAKEN)}"
            )

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Each key's default."""
        found = _keywords(self.loss) | (_keywords(self.prepare) if self.prepare else {})
        return {name: found[name] for name in [*self.keys, *found] if name in found}

    @cached_property
    def types(self) -> dict[str, Any]:
        """Each key's type, as the signature says it."""
        hints = get_type_hints(_plain(self.prepare), include_extras=True) if self.prepare else {}
        hints |= {
            name: hint
            for name, hint in get_type_hints(_plain(self.loss), include_extras=True).items()
            if name not in hints  # the preparation's mu may be "auto", the loss's is a number
        }
        return {name: hints.get(name) for name in self.defaults}

    @property
    def default_loss_agg_mode(self) -> str:
        """The aggregation's mode when none is given."""
        return inspect.signature(self.loss).parameters["aggregation"].default.mode

    def preparation(self, options: Options) -> Callable[[SignalInputs], Signal]:
        """Return the function from a rollout to what the loss takes of it.

        Args:
            options: Values of the keys; defaults stand for those that are left out.
        """
        if self.prepare is None:
            return plain_signal
        names = [name for name in _keywords(self.prepare) if name in options]
        return partial(self.prepare, **{name: options[name] for name in names})

    def signal(self, inputs: SignalInputs, options: Options) -> Signal:
        """Return what the loss takes of a rollout; see `preparation`.

        Args:
            inputs: The rollout.
            options: Values of the keys.
        """
        return self.preparation(options)(inputs)

    def loss_options(self, options: Options) -> dict[str, Any]:
        """Return those of the keys that the loss takes.

        Args:
            options: Values of the keys.
        """
        return {name: options[name] for name in _keywords(self.loss) if name in options}


_TAKEN = ("name", "advantage", "loss_agg_mode", "algorithm", "options")
"""What every objective's section has."""

ALGORITHMS: dict[str, Algorithm] = {}
"""Every algorithm by name; `proxstep.algorithms` fills it."""


def register(algorithm: Algorithm) -> Algorithm:
    """Add an algorithm to `ALGORITHMS`.

    Args:
        algorithm: The declaration.

    Returns:
        The same.

    Raises:
        ProxstepError: Its name is taken, or could be read as RULE+OBJECTIVE.
    """
    if "+" in algorithm.name:
        raise ProxstepError(
            f"algorithm {algorithm.name}: a plus sign in a recipe stands between rule and "
            "objective; give it a name without"
        )
    if algorithm.name in ALGORITHMS:
        other = _plain(ALGORITHMS[algorithm.name].loss)
        raise ProxstepError(
            f"algorithm {algorithm.name}: the name is taken, by {other.__name__} of "
            f"{other.__module__}; choose another for {_plain(algorithm.loss).__name__} of "
            f"{_plain(algorithm.loss).__module__}"
        )
    ALGORITHMS[algorithm.name] = algorithm
    return algorithm


def find_algorithm(name: str) -> Algorithm:
    """Return the algorithm of that name.

    Args:
        name: As in a recipe; without a rule of ISOPO.

    Raises:
        ProxstepError: There is none; the message names the nearest.
    """
    check_choice("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name != "aggregation"
    }


def _plain(function: Any) -> Any:
    """Return the function in a partial."""
    return getattr(function, "func", function)


def sequence_coefficients(
    algorithm: Algorithm,
    log_probs: Float[Tensor, "batch tokens"],
    old_log_probs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, " batch"],
    response_mask: Bool[Tensor, "batch tokens"],
    **hyper: Any,
) -> tuple[Float[Tensor, " batch"], Float[Tensor, ""], dict[str, Float[Tensor, " batch"]]]:
    """Return the weight with which the objective pushes each sequence's log-probability up.

    coefficient_b = -dL / d log pi(y_b), so that -grad L = sum_b coefficient_b grad log pi(y_b).

    The coefficients carry the loss's scale: with the aggregation's counts given, those of the
    step's microbatches are the coefficients of the whole batch.

    Args:
        algorithm: A sequence-level one of `ALGORITHMS`, or one's own.
        log_probs: The policy's log-probabilities of the sampled tokens, in nats; only their values
            are used.
        old_log_probs: The second argument of the objective, in nats.
        advantages: The third argument of the objective.
        response_mask: True at the response's tokens.
        **hyper: The objective's hyper-parameters and `aggregation`.

    Returns:
        The coefficients (per nat; 0 for a sequence without response tokens), the loss and its
        metrics, all without gradient.

    Raises:
        ProxstepError: The objective is token-level, or its gradient differs between the tokens of a
            sequence.

    >>> import torch
    >>> log_probs, advantages = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([1.0, -3.0])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> coefficient_B, _, _ = sequence_coefficients(
    ...     ALGORITHMS["reinforce"], log_probs, log_probs, advantages, mask
    ... )
    >>> coefficient_B.tolist()
    [0.5, -1.5]
    """
    if algorithm.level != "sequence":
        names = ", ".join(name for name, known in ALGORITHMS.items() if known.level == "sequence")
        raise ProxstepError(
            f"{algorithm.name} is a token-level objective: its gradient differs from token to "
            "token, so a sequence has no single coefficient to hand to ISOPO. Objectives that have "
            f"one: {names}."
        )
    return coefficients_of(
        algorithm.loss,
        algorithm.name,
        log_probs,
        old_log_probs,
        advantages,
        response_mask,
        **hyper,
    )
