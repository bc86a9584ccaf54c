"""How an algorithm is drawn: color and dash by its name, on every page and in every figure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from zlib import crc32

from proxstep.algorithms import ALGORITHMS
from proxstep.config.recipe import algorithm_names

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
"""Okabe and Ito's palette, which the color-blind tell apart, without the yellow that vanishes on
white."""

COLORS_ON_DARK = ("#3f7fe0", "#f07a3a", "#00b488", "#e08fbd", "#8accf5", "#ffd166", "#d9dde2")
"""The same hues, told apart as well on a dark ground."""

_DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (3.6, 1.7),
    (1.0, 1.6),
    (6.0, 1.6, 1.0, 1.6),
    (6.0, 1.6, 1.0, 1.6, 1.0, 1.6),
    (10.0, 2.0),
)
# What is compared most often has colors of its own and solid lines.
_FIRST = ("reinforce", "grpo", "isopo", "opo", "isopo+opo", "dapo", "gspo")
_OF_THE_TOYS = ("sft", "dpo", "natural gradient")


class Stroke(NamedTuple):
    """How an algorithm is drawn.

    Attributes:
        place: Its color's place in the palettes.
        dash: Lengths of lines and gaps in widths of the line; empty for a solid one.
    """

    place: int
    dash: tuple[float, ...]

    @property
    def color(self) -> str:
        """Its color on a light ground."""
        return COLORS[self.place]

    @property
    def matplotlib(self) -> dict[str, Any]:
        """The keywords of matplotlib's `plot`."""
        return {"color": self.color, "linestyle": (0, self.dash) if self.dash else "-"}


def strokes(algorithms: Iterable[str]) -> dict[str, Stroke]:
    """Return each algorithm's stroke, which depends on its name alone.

    "opo, log" is a variant of "opo": its color, another dash. Only where two names that nobody
    knows meet in one stroke does the later one get the next that is free.

    >>> strokes(["grpo"]), strokes(["opo", "grpo"])["grpo"]
    ({'grpo': Stroke(place=1, dash=())}, Stroke(place=1, dash=()))
    """
    everything = [Stroke(place, dash) for dash in _DASHES for place in range(len(COLORS))]
    number = len(everything)
    known = dict.fromkeys((*_FIRST, *_OF_THE_TOYS, *ALGORITHMS))
    places = {name: place for place, name in enumerate(known)}
    # Rules from the end: the next objective changes no other's stroke.
    rules = [name for name in algorithm_names() if name not in places]
    places |= {name: number - 1 - i for i, name in enumerate(rules)}
    names = list(dict.fromkeys(algorithms))
    found: dict[str, Stroke] = {}
    for name in sorted(names, key=lambda name: name not in places):
        family = name if name in places else name.partition(",")[0].partition(" ")[0]
        of_family = family in places
        start = places[family] if of_family else crc32(name.encode("utf-8", "replace"))
        stride = len(COLORS) if of_family else 1
        order = [everything[(start + i * stride) % number] for i in range(number)] + everything
        free = (stroke for stroke in order if stroke not in found.values())
        found[name] = next(free, order[0])
    return {name: found[name] for name in names}
