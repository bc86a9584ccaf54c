"""ISOPO: per layer, each sequence's gradient is re-scaled before the advantages act."""

from proxstep.isopo.session import Isopo
from proxstep.isopo.weights import PRESETS, IsometricRule, NaturalRule, Rule

__all__ = ["PRESETS", "IsometricRule", "Isopo", "NaturalRule", "Rule"]
