"""A step measured in nats: how far an optimizer's step moves the policy, and how far it may."""

from proxstep.budget.control import CONTROLS
from proxstep.budget.optimizer import KlBudget

__all__ = ["CONTROLS", "KlBudget"]
