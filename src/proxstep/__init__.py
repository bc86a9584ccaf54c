"""proxstep: proximal policy steps for language models, without pi_old and without clipping.

`import proxstep` needs torch alone; the local engine and the command line need `pip install
"proxstep[train]"`.
"""

from typing import TYPE_CHECKING, Any

from proxstep import algorithms
from proxstep.errors import ProxstepError
from proxstep.isopo import PRESETS, IsometricRule, Isopo, NaturalRule

if TYPE_CHECKING:
    from proxstep.budget import KlBudget

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "IsometricRule",
    "Isopo",
    "KlBudget",
    "NaturalRule",
    "ProxstepError",
    "algorithms",
]


def __getattr__(name: str) -> Any:
    """Import what most programs do not use when it is asked for."""
    if name == "KlBudget":
        from proxstep.budget import KlBudget

        return KlBudget
    raise AttributeError(f"module 'proxstep' has no attribute {name!r}")
