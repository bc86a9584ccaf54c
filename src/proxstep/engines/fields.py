"""A recipe's keys as options of a host library's configuration class, and back.

The options are made from the algorithms' declarations and from the recipe's sections: type,
default and sentence stand there alone.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from proxstep.algorithms import ALGORITHMS, Algorithm
from proxstep.config.geometry import GeometrySection
from proxstep.config.objectives import ObjectiveSection, section_of
from proxstep.config.sections import Section, UpdateSection
from proxstep.config.unread import unread_geometry
from proxstep.errors import ProxstepError, did_you_mean
from proxstep.isopo import Rule

Option = tuple[str, Any, Any]
"""Name, type and field, as `dataclasses.make_dataclass` takes them."""
Refusal = tuple[str, Callable[[Any], Any], str]
"""An option of a host library, when ISOPO refuses its value, and the reason with the remedy."""

BUDGET_OPTIONS = tuple(name for name in UpdateSection.model_fields if name.startswith("kl_"))
"""The keys of a KL budget."""


def option_name(key: str, taken: Collection[str]) -> str:
    """Return the option of an algorithm's key: the key, or objective_KEY where the name is taken.

    Args:
        key: A key of an algorithm.
        taken: The host library's own options.

    >>> option_name("mu", ["beta"]), option_name("beta", ["beta"])
    ('mu', 'objective_beta')
    """
    return f"objective_{key}" if key in taken else key


def algorithm_options(taken: Collection[str]) -> list[Option]:
    """Return an option for every algorithm's key; None is the default. `taken`: the host's own."""
    return [
        _option(
            option_name(key, taken),
            Union[(*(user.types[key] for user in users), None)],
            None,
            _sentences(key, users),
        )
        for key, users in _users().items()
    ]


def section_options(section: type[Section], *without: str) -> list[Option]:
    """Return an option for every key of a recipe's section, but for those that are named."""
    return [
        _option(name, info.annotation, info.default, info.description or "")
        for name, info in section.model_fields.items()
        if name not in without
    ]


def objective_of(config: Any, algorithm: Algorithm, taken: Collection[str]) -> ObjectiveSection:
    """Return a recipe's objective made of a configuration's options; None is the default.

    Args:
        config: A dataclass with `algorithm_options`, and perhaps `advantage` and `loss_agg_mode`.
        algorithm: The algorithm.
        taken: The host library's own options.

    Raises:
        ProxstepError: If an option does not fit, or is another algorithm's, by name.
    """
    both = {name: name for name in ("advantage", "loss_agg_mode")}
    own = {option_name(key, taken): key for key in algorithm.keys} | both
    users = _users()
    foreign = {option_name(key, taken): key for key in users if key not in algorithm.keys}
    values: dict[str, Any] = {"name": algorithm.name}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        if field.name in foreign:
            names = ", ".join(user.name for user in users[foreign[field.name]])
            raise ProxstepError(
                f"{field.name} is an option of {names}, not of {algorithm.name}: remove it"
            )
        if field.name in own:
            values[own[field.name]] = _number(value)
    section = read_section(
        section_of(algorithm), values, names={key: name for name, key in own.items()}
    )
    for check in algorithm.checks:
        try:
            check(section.options())
        except ValueError as error:
            raise ProxstepError(str(error).replace("objective.", "")) from None
    return section


def read_section(
    section: type[Section],
    values: Mapping[str, Any],
    place: str = "",
    names: Mapping[str, str] | None = None,
) -> Any:
    """Return a recipe's section made of a configuration's values.

    Args:
        section: The section.
        values: By key.
        place: What stands before an option in the host library, for the message.
        names: The options of keys that have another name there.

    Raises:
        ProxstepError: If one of them does not fit, by name.
    """
    try:
        return section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        name = place + (names or {}).get(key, key)
        if first["type"] == "extra_forbidden":
            known = [*section.model_fields]
            raise ProxstepError(
                f"{name} is not an option{did_you_mean(key, known)} (known here: "
                f"{', '.join(known)})"
            ) from None
        raise ProxstepError(f"{name} is {first['input']!r}: {first['msg']}") from None


def budget_options() -> list[Option]:
    """Return an option for every key of a KL budget."""
    return section_options(UpdateSection, *(set(UpdateSection.model_fields) - set(BUDGET_OPTIONS)))


def read_budget(values: Mapping[str, Any], place: str = "") -> UpdateSection:
    """Return a recipe's section made of a KL budget's options.

    Raises:
        ProxstepError: If one of them does not fit, or belongs to a budget that is not there.
    """
    section = read_section(UpdateSection, values, place)
    for name in values:
        if section.kl_budget is None and section.differs(name):
            raise ProxstepError(
                f"{place}{name} is of {place}kl_budget, which is None: give a number of nats, or "
                "leave it out"
            )
    return section


def rule_of(section: GeometrySection, place: str = "") -> Rule:
    """Return the rule that a geometry's keys describe.

    Raises:
        ProxstepError: If one of them, named as in the host library, is not of the preset's rule.
    """
    try:
        rule = section.to_rule()
        if unread := unread_geometry(section):
            raise ValueError(unread)
    except ValueError as error:
        raise ProxstepError(place + str(error).removeprefix("geometry.")) from None
    return rule


def refuse_together(what: str, config: Any, refusals: Iterable[Refusal], place: str = "") -> None:
    """Refuse the first option that does not go together with something of ours, such as ISOPO.

    Raises:
        ProxstepError: Naming the option, after `place`, and the remedy.
    """
    for name, applies, reason in refusals:
        if applies(config):
            raise ProxstepError(f"{place}{name} and {what} do not go together: {reason}")


def _users() -> dict[str, list[Algorithm]]:
    """Return the algorithms that have a key, for every key."""
    users: dict[str, list[Algorithm]] = {}
    for algorithm in ALGORITHMS.values():
        for key in algorithm.keys:
            users.setdefault(key, []).append(algorithm)
    return users


def _sentences(key: str, users: Iterable[Algorithm]) -> str:
    """Return what a key means, with its default, in each of the algorithms that have it."""
    defaults: dict[str, dict[Any, list[str]]] = {}
    for user in users:
        of_default = defaults.setdefault(user.keys[key].help, {})
        of_default.setdefault(user.defaults[key], []).append(user.name)
    sentences = []
    for text, found in defaults.items():
        listed = [f"{value} ({', '.join(names)})" for value, names in found.items()]
        sentences.append(f"{text} Default: {', '.join(listed)}.")
    return " ".join(sentences)


def _option(name: str, hint: Any, default: Any, text: str) -> Option:
    metadata = {"help": text.replace("%", "%%")}  # argparse formats it
    return name, _parsed(hint), dataclasses.field(default=default, metadata=metadata)


def _parsed(hint: Any) -> Any:
    """Return a type that argparse and its users in host libraries can read a value of."""
    if get_origin(hint) is Annotated:
        return _parsed(get_args(hint)[0])
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    several = [_parsed(each) for each in get_args(hint) if each is not types.NoneType]
    one = several[0] if len(several) == 1 else str  # a number or a word
    return one | None if types.NoneType in get_args(hint) else one


def _number(value: Any) -> Any:
    """Return the number that a text from a command line stands for, or the value as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
