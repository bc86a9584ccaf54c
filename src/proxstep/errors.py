"""The one exception that a user of proxstep is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ProxstepError(ValueError):
    """A mistake in the input, with its remedy in the message.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def shown(value: object) -> str:
    r"""Return a value as a message shows it: its beginning, on one line.

    >>> shown("two\nlines"), shown(10**5000)
    ("'two\\nlines'", 'an integer of thousands of digits')
    """
    try:
        return f"{value!r:.80}"
    except ValueError:
        return "an integer of thousands of digits"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest of the known names, or nothing.

    >>> did_you_mean("grop", ["grpo", "opo"]), did_you_mean("xyz", ["grpo"])
    ('; did you mean grpo?', '')
    """
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
