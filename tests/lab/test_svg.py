import json
import re
from xml.etree import ElementTree

import pytest

from proxstep.lab.comparison import compare_runs
from proxstep.lab.panels import CHARTS, Curve, Panel, panel_groups, step_panel
from proxstep.lab.strokes import strokes
from proxstep.lab.svg import MOST_POINTS, Limits, log_ticks, panel_svg, ticks
from proxstep.runs.reading import load_run
from proxstep.runs.schema import FIELDS
from tests.lab.conftest import write_lines


def drawn(panel):
    """The panel as an element tree, as a browser would read it."""
    names = [curve.algorithm for curve in panel.curves]
    return ElementTree.fromstring(panel_svg(panel, strokes(names)))


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+(?:e[-+]?\d+)?", text)]


def line(svg):
    (path,) = [path for path in svg.iter("path") if path.get("class") == "line"]
    found = numbers(path.get("d"))
    return list(zip(found[::2], found[1::2], strict=True))


def panel_of(x, y, **more):
    return Panel("Title", "step", "unit", "", [Curve("grpo", x, y)], **more)


@pytest.fixture
def runs(make_run):
    return [load_run(make_run(name, seed)) for name in ("reinforce", "isopo") for seed in (0, 1)]


def test_charts_draw_fields_of_the_schema():
    assert [chart.field for chart in CHARTS if chart.field not in FIELDS] == []


def test_paths_hold_the_values_and_the_transform_maps_them_into_the_plot(runs):
    svg = drawn(step_panel(runs, CHARTS[0]))
    plot = svg.find("svg")
    for path in plot.iter("path"):
        scale_x, _, _, scale_y, left, top = numbers(path.get("transform"))
        found = numbers(path.get("d").replace("h0", ""))
        for x, y in zip(found[::2], found[1::2], strict=True):
            assert 0 <= x * scale_x + left <= float(plot.get("width"))
            assert 0 <= y * scale_y + top <= float(plot.get("height"))
    (isopo,) = [c for c in plot if c.get("data-algorithm") == "isopo"]
    band, mean, _ = isopo
    assert numbers(mean.get("d")) == [x for i in range(1, 7) for x in (i, i / 10)]
    assert (band.get("class"), len(numbers(band.get("d")))) == ("band", 24)


def test_label_tells_how_the_curves_end(runs):
    label = drawn(step_panel(runs, CHARTS[1])).get("aria-label")
    assert label == (
        "Greedy score by step, reward units: reinforce ends at 0.55, isopo ends at 0.55."
    )


def test_one_seed_has_no_band(make_run):
    svg = drawn(step_panel([load_run(make_run())], CHARTS[0]))
    assert "band" not in {path.get("class") for path in svg.iter("path")}


def test_unmeasured_field_says_so(make_run):
    run = load_run(make_run(records=[{"step": 0}, {"step": 1, "score": None}]))
    svg = drawn(step_panel([run], CHARTS[1]))
    assert [element.text for element in svg] == ["not measured"]
    assert svg.get("aria-label").endswith("reward units: not measured.")


def test_values_that_are_not_finite_leave_a_gap():
    svg = drawn(panel_of([0, 1, 2, 3, 4, 5], [1, float("nan"), 2, float("inf"), 1e300, 3]))
    (path,) = [path for path in svg.iter("path") if path.get("class") == "line"]
    assert path.get("d") == "M0 1M2 2M5 3"
    nothing = drawn(panel_of([0], [float("nan")]))
    assert nothing.find("text").text == "not measured"


def test_a_log_axis_holds_logarithms_and_leaves_out_what_has_none():
    svg = drawn(panel_of([0, 1, 2], [1.0, 0.0, 100.0], log=True))
    assert line(svg) == [(0, 0), (2, 2)]
    assert {"1", "10", "100"} <= {text.text for text in svg.iter("text")}


def test_long_curves_are_thinned_to_their_last_point():
    svg = drawn(panel_of(list(range(10_000)), [i / 7 for i in range(10_000)]))
    found = line(svg)
    assert MOST_POINTS / 2 < len(found) <= MOST_POINTS + 1
    assert found[-1] == (9999, 1428.4)


def test_names_are_shown_as_they_are(make_run):
    name = "a$b^<i>\"'& co"
    svg = drawn(step_panel([load_run(make_run(name, name="odd"))], CHARTS[0]))
    assert [g.get("data-algorithm") for g in svg.iter("g") if g.get("data-algorithm")] == [name]


@pytest.mark.parametrize("low", [-1e-9, 0.0, 3.2, 1e6])
@pytest.mark.parametrize("width", [1e-6, 0.3, 1.0, 77.0, 1e9])
def test_ticks_are_few_round_and_on_the_axis(low, width):
    found = ticks(Limits(low, low + width))
    assert 3 <= len(found) <= 13
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in found)


@pytest.mark.parametrize("decades", [0.5, 1.0, 3.0, 8.0, 40.0])
def test_log_ticks_are_few(decades):
    assert 1 <= len(log_ticks(Limits(-1.3, -1.3 + decades))) <= 9


def test_what_was_measured_has_its_figures(make_run):
    budget = {"kl_budget/predicted": 0.12, "kl_budget/scale": 0.5, "kl_budget/realized": 0.02}
    records = [
        {"step": 0, "score": 0.1},
        {"step": 1, "score": 0.2, "kl_policy_initial": 0.1, "objective/weight_max": 2.0, **budget},
    ]
    folder = make_run("isopo", records=records)
    layers = [{"name": n, "grad_share": 0.5, "weight_spread": None} for n in ("first", "second")]
    write_lines(folder / "diagnostics.jsonl", [{"step": 1, "layers": layers}])
    groups = {g.title: g.panels for g in panel_groups(compare_runs([load_run(folder)]))}
    assert groups["Curves"][0].title == "Score against KL"
    assert [panel.title for panel in groups["Escort weights"]] == ["Largest escort weight"]
    (shares,) = groups["Per-layer geometry"]
    assert (shares.x_names, shares.curves[0].y) == (("first", "second"), [0.5, 0.5])
    assert json.loads(drawn(shares).get("data-names")) == ["first", "second"]
    steps, scale = groups["KL budget"]
    predicted, realized = steps.curves
    assert (predicted.y, realized.y, scale.curves[0].y) == ([0.12 * 0.25], [0.02], [0.5])
    assert [g.title for g in panel_groups(compare_runs([load_run(make_run("grpo"))]))] == ["Curves"]
