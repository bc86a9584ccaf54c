"""proxstep: proximal policy steps for language models, without pi_old and without clipping.

`import proxstep` needs torch alone; the local engine and the command line need `pip install
"proxstep[train]"`.
"""

from proxstep import algorithms
from proxstep.errors import ProxstepError
from proxstep.isopo import PRESETS, IsometricRule, Isopo, NaturalRule

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "IsometricRule",
    "Isopo",
    "NaturalRule",
    "ProxstepError",
    "algorithms",
]
