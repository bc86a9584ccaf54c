"""The tutorial's snippets run in their order and print what stands below them."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.house.test_docs import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "make_tutorial.py"
    spec = importlib.util.spec_from_file_location("make_tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(script: ModuleType) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The names that the snippets leave, and for each what is printed on the page and here."""
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        return names, list(script.run(PAGE, names))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d{3}\b", text)]


def test_the_page_shows_what_its_snippets_print(ran: Any) -> None:
    _, outputs = ran
    assert sum(bool(shown) for shown, _ in outputs) > 5
    for shown, printed in outputs:
        assert re.sub(r"[\d.-]+", "", shown).split() == re.sub(r"[\d.-]+", "", printed).split()
        assert numbers(shown) == pytest.approx(numbers(printed), rel=1e-3, abs=2e-3)


def test_the_check_sees_another_number(script: ModuleType) -> None:
    page = "```python\nprint('x 0.500')\n```\n\n```text\nx 0.600\n```\n"
    with pytest.raises(AssertionError):
        test_the_page_shows_what_its_snippets_print(({}, [*script.run(page, {})] * 6))


def test_what_the_text_says_of_the_numbers(ran: Any) -> None:
    names, _ = ran
    norms, lengths = names["norms"], names["fisher_lengths"]
    assert 2.5 < norms[3] / norms[0] < 3
    assert abs(lengths[3] / lengths[0] - 1) < 0.1
    assert names["plain"].max() > 5 * names["plain"].min()
    assert names["isometric"].max() < 1.3 * names["isometric"].min()
    moved = names["kernel"] @ names["advantages"]
    assert moved[2] > 0 > names["advantages"][2]
    effects = names["effects"]
    assert effects["reinforce"].abs().argmax() == 2
    assert abs(effects["isopo"][2] + effects["isopo"][3]) < 0.02
    drives = torch.stack([names["drive"][names["sampled"] == y].mean() for y in range(4)])
    assert torch.allclose(names["ratios"]["opo"][-1], 1 + drives, atol=0.05)
    assert max(names["budgeted"]) < 0.03


def test_every_figure_is_drawn_by_the_script(script: ModuleType, ran: Any) -> None:
    shown = re.findall(r"figures/tutorial-(\w+)\.png", PAGE)
    assert sorted(shown) == sorted(script.DRAWN)
    for name, draw in script.DRAWN.items():
        assert draw(ran[0]).axes, name
        assert (ROOT / "docs" / "figures" / f"tutorial-{name}.png").stat().st_size < 100_000
