"""The example of data and a reward of one's own, as docs/tasks.md prints it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxstep.config.loading import load_recipe
from proxstep.rewards import load_reward
from proxstep.training.lifecycle import load_task

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
SECTION = PAGE.read_text("utf-8").partition("## Data and a reward of your own")[2]
FILES = {"json": "capitals.jsonl", "py": "capitals_reward.py", "yaml": "capitals.yaml"}


@pytest.mark.parametrize("chat", [True, False])
def test_the_files_of_the_page_are_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for language, name in FILES.items():
        found = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
        assert found
        assert f"`{name}`" in SECTION
        (folder / name).write_text(found[1], "utf-8")
    monkeypatch.chdir(tmp_path)  # paths are relative to the recipe
    recipe = load_recipe("mine/capitals.yaml")
    task = load_task(recipe, chat=chat)
    examples = [*task.train, *task.validation]
    assert {example.answer for example in examples} == {"Lima", "Nairobi", "Paris", "Tokyo"}
    reward = load_reward(recipe.task.rewards[0])
    texts = [" Paris.", "It is Paris, of course", "Lima"]
    completions = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    columns = {"answer": ["Paris"] * 3, "continent": ["Europe"] * 3}
    assert reward(prompts=texts, completions=completions, **columns)[::2] == [1.0, 0.0]
