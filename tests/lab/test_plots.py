import matplotlib as mpl
import pytest

from proxstep.lab.panels import CHARTS
from proxstep.lab.plots import overview_figure
from proxstep.runs.reading import load_run


def bands(figure):
    return [len(axes.collections) for axes in figure.axes]


@pytest.fixture
def runs(make_run):
    return [load_run(make_run(name, seed)) for name in ("reinforce", "isopo") for seed in (0, 1)]


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
    assert overview_figure(runs).legends[0].get_title().get_text() == "one seed each, so no band"


def test_gradient_norms_of_different_units_share_a_log_scale(make_run):
    records = [{"step": 1, "grad_norm": 0.5}, {"step": 2, "grad_norm": 50.0}]
    norm = overview_figure([load_run(make_run(records=records))]).axes[-1]
    assert norm.get_yscale() == "log"
    assert "log scale" in norm.get_ylabel()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("huge", [1e308, -1e308])
def test_what_no_axis_can_show_is_a_gap(make_run, tmp_path, huge):
    scores = [0.5, huge, -huge, 0.75]
    records = [{"step": step, "score": score} for step, score in enumerate(scores)]
    figure = overview_figure([load_run(make_run(seed=seed, records=records)) for seed in (0, 1)])
    figure.savefig(tmp_path / "figure.png")
    low, high = figure.axes[1].get_ylim()
    assert -1 < low < 0.5 < 0.75 < high < 2
