"""proxstep: proximal policy steps for language models, without pi_old and without clipping.

`import proxstep` needs torch alone, and imports it with the first name that is asked for; the local
engine and the command line need `pip install "proxstep[train]"`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from proxstep.errors import ProxstepError

if TYPE_CHECKING:
    from proxstep import algorithms
    from proxstep.budget import KlBudget
    from proxstep.isopo import PRESETS, IsometricRule, Isopo, NaturalRule
    from proxstep.logprobs.completions import (
        completion_log_probs,
        packed_sequence_ids,
        sequence_ids,
    )

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "IsometricRule",
    "Isopo",
    "KlBudget",
    "NaturalRule",
    "ProxstepError",
    "algorithms",
    "completion_log_probs",
    "packed_sequence_ids",
    "sequence_ids",
]

_ROOMS = ("algorithms", "isopo", "logprobs")
_HOME = {
    "KlBudget": "budget",
    **dict.fromkeys(("PRESETS", "IsometricRule", "Isopo", "NaturalRule"), "isopo"),
    **dict.fromkeys(
        ("completion_log_probs", "packed_sequence_ids", "sequence_ids"), "logprobs.completions"
    ),
}
"""Where a name is from."""


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, and a command's mistake needs none of it."""
    if name in _ROOMS:
        return import_module(f"proxstep.{name}")
    if name in _HOME:
        return getattr(import_module(f"proxstep.{_HOME[name]}"), name)
    raise AttributeError(f"module 'proxstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
