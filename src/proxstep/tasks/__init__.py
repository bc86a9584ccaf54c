"""Tasks: procedural ones, GSM8K, MATH, SVAMP, and any table of prompts."""

from proxstep.tasks.arithmetic import ALPHABET, arithmetic_task
from proxstep.tasks.base import REWARDS, TASKS, Example, Prompt, Task, TaskName
from proxstep.tasks.countdown import countdown_task
from proxstep.tasks.data import Row, load_hub_rows, load_rows, read_rows
from proxstep.tasks.stories import stories_task
from proxstep.tasks.tabular import (
    IN_A_BOX,
    STEP_BY_STEP,
    gsm8k_task,
    math_task,
    svamp_task,
    table_task,
)
from proxstep.tasks.worked import worked_task

__all__ = [
    "ALPHABET",
    "IN_A_BOX",
    "REWARDS",
    "STEP_BY_STEP",
    "TASKS",
    "Example",
    "Prompt",
    "Row",
    "Task",
    "TaskName",
    "arithmetic_task",
    "countdown_task",
    "gsm8k_task",
    "load_hub_rows",
    "load_rows",
    "math_task",
    "read_rows",
    "stories_task",
    "svamp_task",
    "table_task",
    "worked_task",
]
