"""Each algorithm's page has everything that a reader looks for, and says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scripts.algorithm_figures import factors, pushes
from scripts.algorithm_metrics import geometry_metrics, objective_metrics
from tests.engine import Silent, records, tiny_recipe

from proxstep.algorithms import ALGORITHMS
from proxstep.isopo import PRESETS
from proxstep.lab.strokes import strokes
from proxstep.training import lifecycle

FOLDER = Path(__file__).parents[2] / "docs" / "algorithms"
RULES = [name for name in PRESETS if name != "reinforce"]
HEADINGS = ["When to take it, and when not", "Keys", "Metrics", "Measured", "Through TRL and verl"]


@pytest.mark.parametrize("name", [*ALGORITHMS, *RULES])
def test_a_page_is_whole(name: str) -> None:
    page = FOLDER / f"{name}.md"
    assert page.exists(), f"run make reference: it makes {page.name}"
    text = page.read_text()
    places = [text.find(f"\n## {heading}\n") for heading in HEADINGS]
    assert -1 not in places
    assert places == sorted(places)
    by_hand = "Not written yet" not in text and "- **Take it** " in text
    assert by_hand, (
        f"{page.name}: say when to take it, in a bullet '- **Take it** ...', and when not"
    )
    assert re.search(r"\n- \*\*Source\*\*: \S.{10}", text)
    assert "\n    " in text[: places[0]], "no equation"
    assert "|  |\n" not in text[places[2] : places[3]], "a metric without words"


@pytest.mark.parametrize("name", ["opo", "sapo", "gopo", "isopo", "isopo-natural"])
def test_the_metrics_are_those_of_a_run(tmp_path: Path, name: str) -> None:
    assert lifecycle.train(tiny_recipe(tmp_path / "run", name, steps=1), Silent()) == "finished"
    (record,) = [record for record in records(tmp_path / "run") if record["step"] == 1]
    prefix = "geometry/" if name in RULES else "objective/"
    written = {key.removeprefix(prefix) for key in record if key.startswith(prefix)}
    found = (
        geometry_metrics(PRESETS[name]) if name in RULES else objective_metrics(ALGORITHMS[name])
    )
    assert set(found) == written


def test_the_picture_of_a_clip_is_a_clip() -> None:
    up, down = (dict(points) for points in pushes(ALGORITHMS["grpo"]))
    inside = [ratio for ratio in up if abs(ratio - 0.8) > 1e-6 and abs(ratio - 1.2) > 1e-6]
    assert len(inside) > 100
    for ratio in inside:
        assert up[ratio] == pytest.approx(ratio if ratio < 1.2 else 0.0), ratio
        assert down[ratio] == pytest.approx(-ratio if ratio > 0.8 else 0.0), ratio


def test_the_picture_of_a_rule_is_its_power() -> None:
    lines = factors(PRESETS["isopo-npg"])
    longer, both = lines.values()
    assert all(factor == pytest.approx(length**-2, rel=1e-6) for length, factor in longer)
    assert all(factor == pytest.approx(1.0) for _, factor in both)


def test_a_picture_has_the_color_of_every_other_page() -> None:
    picture = (FOLDER.parent / "figures" / "algorithms" / "isopo.svg").read_text()
    assert strokes(["isopo"])["isopo"].color in picture
