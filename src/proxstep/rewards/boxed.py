r"""The content of a text's last `\boxed{...}`, read as data."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character, not a group


def boxed_answer(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` or `\fbox{...}` holds, in time linear in the text.

    Without braces, as some of MATH's solutions have it, the box holds what follows up to the end
    of the formula or of the line.

    Args:
        text: Any text at all.

    Returns:
        The content without outer white space. None where there is no box, or where the last one is
        empty or stays open, as in a completion that was cut off.

    >>> boxed_answer(r"First \boxed{1}, so it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> boxed_answer(r"so $\boxed 7$ of them")
    '7'
    >>> boxed_answer(r"so \boxed{\frac{1}{2}") is None
    True
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip() or None
    return None
