"""ISOPO: per layer, each sequence's gradient is re-scaled before the advantages act."""

from proxstep.isopo.proma import IntraProjectingRule, ProjectingRule
from proxstep.isopo.rule import IsometricRule, NaturalRule
from proxstep.isopo.session import Isopo
from proxstep.isopo.settings import PRESETS, Rule

__all__ = [
    "PRESETS",
    "IntraProjectingRule",
    "IsometricRule",
    "Isopo",
    "NaturalRule",
    "ProjectingRule",
    "Rule",
]
