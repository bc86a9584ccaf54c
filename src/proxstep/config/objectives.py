"""The objective's section of a recipe, made from the algorithm's declaration."""

from __future__ import annotations

import types
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, create_model

from proxstep.algorithms import ADVANTAGES, ALGORITHMS, LOSS_AGG_MODES, Algorithm, Key
from proxstep.config.sections import Section


class ObjectiveSection(Section):
    """What all algorithms have; the rest of the keys is each algorithm's own."""

    name: str
    advantage: str
    loss_agg_mode: str

    @cached_property
    def algorithm(self) -> Algorithm:
        """The declaration."""
        return ALGORITHMS[self.name]

    def options(self) -> dict[str, Any]:
        """Return the values of the algorithm's own keys."""
        return {key: getattr(self, key) for key in self.algorithm.keys}


@lru_cache
def section_of(algorithm: Algorithm) -> type[ObjectiveSection]:
    """Return the section of a recipe whose objective is that algorithm's."""
    fields: dict[str, Any] = {
        "name": (_one_of((algorithm.name,)), Field(description="The algorithm.")),
        "advantage": (
            _one_of(ADVANTAGES),
            Field(default=algorithm.advantage, description="How rewards become advantages."),
        ),
        **{key: field_of(algorithm, key) for key in algorithm.keys},
        "loss_agg_mode": (
            _one_of(LOSS_AGG_MODES),
            Field(
                default=algorithm.default_loss_agg_mode,
                description="How token values become one loss.",
            ),
        ),
    }
    name = f"{algorithm.name.title().replace('-', '')}Section"
    return create_model(name, __base__=ObjectiveSection, __doc__=algorithm.about, **fields)


def field_of(algorithm: Algorithm, name: str) -> tuple[Any, Any]:
    """Return the type of an algorithm's key, with its limits, and its default with its sentence."""
    key = algorithm.keys[name]
    default = Field(default=algorithm.defaults[name], description=key.help)
    return _limited(algorithm.types[name], key), default


def _limited(hint: Any, key: Key) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_limited(option, key) for option in get_args(hint))]  # noqa: UP007
    if hint is str and key.choices:
        return _one_of(key.choices)
    if hint in (int, float) and key.bounds:
        limits: dict[str, Any] = dict(key.bounds)
        return Annotated[hint, Field(**limits)]
    return hint


def _one_of(choices: Any) -> Any:
    return Literal[tuple(choices)]
