"""ISOPO: the gradient of each sequence's log-probability, re-scaled or mixed per layer before the advantages act."""

from proxstep.isopo.install import Isopo
from proxstep.isopo.weights import PRESETS, IsometricRule, NaturalRule, Rule

__all__ = ["PRESETS", "IsometricRule", "Isopo", "NaturalRule", "Rule"]
