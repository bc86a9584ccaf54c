from __future__ import annotations

from tests.tasks.overlap import num_overlapping

from proxstep import tasks
from proxstep.rewards import reward_columns
from proxstep.tasks import TASKS, Example, Task
from proxstep.tasks.worked import KINDS


def chat(content):
    return [{"role": "user", "content": content}]


def test_overlap_counts_validation_prompts_seen_in_training():
    train = [Example("a", "1"), Example("a", "1"), Example(chat("b"), "2"), Example("c", "3")]
    validation = [Example("a", "9"), Example(chat("b"), "2"), Example("b", "2"), Example("d", "4")]
    assert num_overlapping(Task("t", train, validation, ("exact_match",))) == 2
    assert num_overlapping(Task("t", train, [], ("exact_match",))) == 0


def test_columns_of_a_ragged_batch():
    batch = [
        Example("a", "1", columns={"level": 3}),
        Example("b", "2", columns={"level": 4, "tag": "x"}),
    ]
    assert reward_columns(batch) == {"answer": ["1", "2"], "level": [3, 4], "tag": [None, "x"]}


def test_examples_do_not_share_columns():
    assert Example("a", "1").columns is not Example("b", "2").columns


def test_every_task_has_its_function():
    worked = ("maxima", "products", "sums")
    others = ("arithmetic", "countdown", "gsm8k", "math", "stories", "svamp", "table")
    assert tuple(sorted((*worked, *others))) == TASKS
    assert set(KINDS) == set(worked)
    assert all(callable(getattr(tasks, f"{name}_task")) for name in (*others, "worked"))
