import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from proxstep.lab.plots import CHARTS, curve_svg, overview_figure, strokes
from proxstep.runs.reading import load_run
from proxstep.runs.schema import FIELDS

SVG = "{http://www.w3.org/2000/svg}"


def bands(figure):
    return [len(axes.collections) for axes in figure.axes]


@pytest.fixture
def runs(make_run):
    return [load_run(make_run(name, seed)) for name in ("reinforce", "isopo") for seed in (0, 1)]


def test_charts_draw_fields_of_the_schema():
    assert [chart.field for chart in CHARTS if chart.field not in FIELDS] == []


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.field)
def test_svg_names_every_algorithm_as_text(runs, chart):
    root = ElementTree.fromstring(curve_svg(runs, chart))
    texts = {element.text for element in root.iter(f"{SVG}text")}
    assert {"reinforce", "isopo", chart.unit, "step"} <= texts
    assert "line: mean over seeds; band: min to max" in texts
    assert root.get("role") == "img"
    assert root.get("aria-label", "").startswith(chart.title)


def test_svg_scales_and_leaves_the_page_alone(runs):
    svg = curve_svg(runs, CHARTS[0])
    assert svg.startswith("<svg ")
    assert "width" not in ElementTree.fromstring(svg).attrib
    assert not re.search(r"<style|<metadata|xlink|font-family: ", svg)


def test_ids_of_one_page_do_not_clash_and_all_resolve(runs):
    pages = [curve_svg(runs, chart) for chart in CHARTS]
    ids = [name for svg in pages for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids)) > 0
    for svg in pages:
        used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
        assert used == set(re.findall(r' id="([^"]+)"', svg))


def test_svg_is_reproducible(runs):
    assert curve_svg(runs, CHARTS[0]) == curve_svg(runs, CHARTS[0])


def test_label_tells_how_the_curves_end(runs):
    score = CHARTS[1]
    assert "reinforce ends at 0.55, isopo ends at 0.55." in curve_svg(runs, score)


def test_overview_has_six_titled_charts_and_leaves_no_settings_behind(runs):
    before = dict(mpl.rcParams)
    figure = overview_figure(runs)
    assert dict(mpl.rcParams) == before
    assert [axes.get_title(loc="left") for axes in figure.axes] == [c.title for c in CHARTS]
    assert bands(figure) == [2] * 6
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["reinforce", "isopo"]


def test_one_seed_has_no_band(make_run):
    runs = [load_run(make_run("grpo")), load_run(make_run("opo"))]
    assert bands(overview_figure(runs)) == [0] * 6
    assert "one seed each, so no band" in curve_svg(runs, CHARTS[0])


def test_unmeasured_field_says_so(make_run):
    runs = [load_run(make_run(records=[{"step": 0}, {"step": 1, "score": None}]))]
    svg = curve_svg(runs, CHARTS[1])
    assert ">not measured<" in svg
    assert "isopo not measured." in svg


def test_values_that_are_not_finite_leave_a_gap(make_run):
    wild = [float("nan"), float("inf"), 1.0, 100.0]
    records = [{"step": i, "grad_norm": value} for i, value in enumerate(wild)]
    runs = [load_run(make_run(seed=seed, records=records)) for seed in (0, 1)]
    assert curve_svg(runs, CHARTS[-1])


def test_gradient_norms_of_different_units_share_a_log_scale(make_run):
    records = [{"step": 1, "grad_norm": 0.5}, {"step": 2, "grad_norm": 50.0}]
    norm, score = overview_figure([load_run(make_run(records=records))]).axes[-1], CHARTS[1]
    assert norm.get_yscale() == "log"
    assert "log scale" in norm.get_ylabel()
    assert not score.may_be_log


def test_names_are_shown_as_they_are(make_run):
    runs = [load_run(make_run("a$b^<i>$ & co", name="odd"))]
    svg = curve_svg(runs, CHARTS[0])
    assert "a$b^&lt;i&gt;$ &amp; co" in svg
    assert "<i>" not in svg


def test_an_algorithm_keeps_its_stroke_whatever_it_is_compared_with():
    assert strokes(["opo", "isopo"])["opo"] == strokes(["dro", "grpo", "opo"])["opo"]


def test_strokes_differ_and_do_not_depend_on_later_algorithms():
    names = [f"algorithm-{i}" for i in range(14)]
    assert len(set(strokes(names).values())) == 14
    assert strokes(names)["algorithm-1"] == strokes(names[:2])["algorithm-1"]
