"""Docstrings as Markdown: doctests and an algorithm's loss become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A paragraph that begins with a prompt or with the loss that `make reference` puts into its table.
_AS_IT_IS = re.compile(r"(?:(?<=\n\n)|^)( *>>> |L = ).*(?:\n.*\S.*)*")


class Blocks(griffe.Extension):
    """Fences what a terminal shows as it is and Markdown would take for text."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Fence the doctests and the loss of one docstring."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nDiffers:", "\n\nDiffers:")
            obj.docstring.value = _AS_IT_IS.sub(_fenced, text)


def _fenced(match: re.Match[str]) -> str:
    language = "text" if match[1].startswith("L") else "pycon"
    return f"```{language}\n{match[0]}\n```"
