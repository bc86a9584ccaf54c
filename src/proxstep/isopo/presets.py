"""The rules by name."""

from __future__ import annotations

from proxstep.isopo.proma import IntraProjectingRule, ProjectingRule
from proxstep.isopo.rule import IsometricRule, NaturalRule

Rule = IsometricRule | NaturalRule | ProjectingRule | IntraProjectingRule

PRESETS: dict[str, Rule] = {
    "reinforce": IsometricRule(0.0, 0.0, 0.0),
    "isopo": IsometricRule(-1.0, 0.0, 0.0),
    "isopo-npg": IsometricRule(0.0, 0.0, -2.0),
    "isopo-figure4": IsometricRule(0.0, -1.0, -2.0),
    "isopo-euclidean": IsometricRule(0.0, -1.0, 0.0),
    "isopo-natural": NaturalRule(),
    "proma": ProjectingRule(),
    "proma-intra": IntraProjectingRule(),
}
"""ISOPO's settings in the paper, and PROMA's two rules; "reinforce" is the identity."""
