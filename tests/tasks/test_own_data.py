"""The example of data and a reward of one's own: examples/my_reward.*."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxstep.config.loading import load_recipe
from proxstep.rewards import load_reward
from proxstep.training.lifecycle import load_task

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("chat", [True, False])
def test_the_files_of_the_example_are_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.chdir(tmp_path)  # paths are relative to the recipe
    recipe = load_recipe(EXAMPLES / "my_reward.yaml")
    task = load_task(recipe, chat=chat)
    assert len(task.validation) == recipe.task.num_validation
    assert {example.answer for example in (*task.train, *task.validation)} == {"2", "3", "4", "5"}
    reward = load_reward(recipe.task.rewards[0])
    texts = ["12", "1a", "123", "1", ""]
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    found = reward(prompts=texts, completions=completions, answer=["2"] * len(texts))
    assert found == [1.0, 0.5, pytest.approx(2 / 3), 0.5, 0.0]
