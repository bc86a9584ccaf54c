"""What the local engine does when a run collapses: say so, stop, or go back with smaller steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxstep.budget import KlBudget
from proxstep.errors import ProxstepError
from proxstep.runs.checkpoint import checkpoint_path, damage, drop_later_checkpoints, load_state
from proxstep.runs.guard import Verdict, after_returns, signs, verdict
from proxstep.runs.reading import read_rows
from proxstep.training.models import reload_weights
from proxstep.training.optimizers import recipe_kept, set_peaks
from proxstep.training.saving import Resumable

MOST_RETURNS = 3
"""After three returns the steps are an eighth: it is not their size then."""


class Guarding(Resumable):
    """A run that watches its own metrics.

    Where the guard may have to go back, every evaluation that shows no sign of harm saves a
    checkpoint, the one before the first step included, and the newest of them stays.

    Attributes:
        stopped: Why the guard ended the run, if it did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stopped: Verdict | None = None
        self._rows: list[Mapping[str, Any]] = []
        self._collapsing = False

    def begin_watch(self) -> None:
        """Read what the run has measured so far: nothing, unless it is resumed."""
        if self.recipe.guard != "off" and self.folder.metrics.exists():
            self._rows = [*read_rows(self.folder.metrics)]
            self._collapsing = self._judge().state == "collapsing"
        self._scale_budget()

    def watch(self, row: Mapping[str, Any]) -> None:
        """Look at a step that was recorded, and do what the recipe says.

        Raises:
            ProxstepError: If the checkpoint to go back to is damaged.
        """
        guard = self.recipe.guard
        if guard == "off":
            return
        self._rows.append(row)
        found = self._judge()
        collapses = found.state == "collapsing"
        if collapses != self._collapsing:
            self.progress.note(f"step {self.step}: {found}")
        self._collapsing = collapses
        if guard == "warn":
            return
        if not collapses:
            if "score" in row and not any(sign.harm for sign in signs(self._history(), window=1)):
                self.good = self.step
                self.save()
        elif guard == "halve" and self.good is not None and len(self.returns) < MOST_RETURNS:
            self._go_back(self.good, found)
        else:
            self.stopped = found

    def keep_last_good(self) -> None:
        """After a stop, write down why, and delete what is later than the last good checkpoint.

        The best one stays. Where the good one is damaged or missing, so does everything.
        """
        self._write_down(self.stopped)
        if self.good is None:
            return
        if self.at_best:
            self.save()
        checkpoint = checkpoint_path(self.folder.path, self.good)
        if complaint := damage(checkpoint):
            self.progress.note(
                f"{checkpoint} was the last good one and is damaged ({complaint}): later ones stay"
            )
            return
        drop_later_checkpoints(self.folder.path, self.good, self.besides)

    def _history(self) -> list[Mapping[str, Any]]:
        return after_returns(self._rows, self.returns)

    def _judge(self) -> Verdict:
        return verdict(self._history())

    def _go_back(self, good: int, found: Verdict) -> None:
        """Take weights, optimizer and geometry from a checkpoint, and halve the steps.

        Steps and updates count on, and so do the prompts and the learning rate's schedule.
        """
        checkpoint = checkpoint_path(self.folder.path, good)
        if complaint := damage(checkpoint):
            raise ProxstepError(
                f"guard halve would go back to {checkpoint}, which is damaged ({complaint}): "
                "restore it, then proxstep train --resume, or set guard to warn in recipe.yaml"
            )
        state = load_state(checkpoint)
        self.torn = True
        reload_weights(self.model, checkpoint)
        with recipe_kept(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        if self.isopo is not None:
            self.isopo.load_state_dict(state["isopo"])
        self.returns.append({"from": self.step, "to": good})
        before = self.schedule.get_last_lr()[0]
        peaks = [float(rate) / 2 for rate in self.schedule.base_lrs]
        set_peaks(self.optimizer, self.schedule, peaks)
        self._scale_budget()
        self.torn, self._collapsing = False, False
        self._write_down(found)
        self.progress.note(
            f"step {self.step}: the guard went back to the policy of step {good}, and the learning "
            f"rate from {before:.3g} to {before / 2:.3g}"
        )

    def _scale_budget(self) -> None:
        budget = self.recipe.update.kl_budget
        if isinstance(self.optimizer, KlBudget) and budget is not None:
            self.optimizer.rescale(budget / 2 ** len(self.returns))

    def _write_down(self, found: Verdict | None) -> None:
        self.folder.update_info(
            guard={"step": self.step, "verdict": str(found), "returns": self.returns}
        )
