"""How many prompts a task has in both splits."""

from __future__ import annotations

import json

from proxstep.tasks import Task


def num_overlapping(task: Task) -> int:
    train = {json.dumps(example.prompt) for example in task.train}
    return sum(json.dumps(example.prompt) in train for example in task.validation)
