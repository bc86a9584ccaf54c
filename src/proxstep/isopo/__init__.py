"""ISOPO: per layer, each sequence's gradient is re-scaled before the advantages act."""

from proxstep.isopo.rule import PRESETS, IsometricRule, NaturalRule, Rule
from proxstep.isopo.session import Isopo

__all__ = ["PRESETS", "IsometricRule", "Isopo", "NaturalRule", "Rule"]
