import csv
import itertools
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from proxstep.algorithms import ALGORITHMS
from proxstep.lab import saturation, toy_report
from proxstep.lab.saturation import (
    Curve,
    dpo_loss,
    isopo_magnitude,
    logit_magnitude,
    make_curves,
    objective_magnitude,
    pair_drives,
    pair_magnitude,
    rate,
    sft_loss,
    trace,
)

LOGITS = [-3.0, -0.7, 0.0, 0.1, 0.35, 1.3, 4.0, 8.0]
MU = ALGORITHMS["opo"].defaults["mu"]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def curve(name):
    return {curve.name: curve for curve in make_curves()}[name]


def fit_slope(points):
    """The least squares slope, and the largest distance from the line."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum(
        (x - mean_x) ** 2 for x, _ in points
    )
    return slope, max(abs(y - mean_y - slope * (x - mean_x)) for x, y in points)


@pytest.mark.parametrize("z", LOGITS)
def test_sft_falls_like_the_other_outcomes_probability(z):
    assert logit_magnitude(sft_loss, z) == pytest.approx(sigmoid(-z), rel=1e-12)


def test_reinforce_with_advantage_one_is_sft():
    for z in LOGITS:
        assert objective_magnitude("reinforce", z) == pytest.approx(sigmoid(-z), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
def test_dpo_saturates_at_the_rate_beta(beta):
    dpo = Curve("dpo", "", "z", lambda z: logit_magnitude(lambda x: dpo_loss(x, beta=beta), z))
    assert rate(dpo, low=9 / beta, high=10 / beta) == pytest.approx(-beta, rel=1e-3)
    for z in LOGITS:
        assert dpo.magnitude(z) == pytest.approx(beta * sigmoid(-beta * z), rel=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_a_clip_cuts_the_gradient_off_exactly_at_its_window(name):
    edge = math.log((1 + ALGORITHMS[name].defaults["clip_ratio_high"]) / 2)
    z_edge = edge - math.log1p(-math.exp(edge))
    inside = objective_magnitude(name, z_edge - 1e-6)
    p = sigmoid(z_edge)
    assert inside == pytest.approx(2 * p * (1 - p), rel=1e-4)
    assert [objective_magnitude(name, z_edge + gap) for gap in (1e-6, 0.1, 1.0, 8.0)] == [0.0] * 4
    assert rate(curve(name)) is None


def test_cispo_keeps_its_gradient_where_the_ratio_cannot_reach_the_cap():
    for z in LOGITS:
        p = sigmoid(z)
        assert objective_magnitude("cispo", z) == pytest.approx(2 * p * (1 - p), rel=1e-12)


@pytest.mark.parametrize(("mu", "is_favored"), [(MU, True), (MU, False), (3.0, True), (0.5, False)])
def test_opo_in_ratio_space_grows_linearly_with_slope_mu(mu, is_favored):
    drive = pair_drives()[0 if is_favored else 1]
    first = max(drive / mu, -1.0)
    points = []
    for i in range(1, 20):
        v = first + (1 - first) * i / 20
        z = math.log((1 + v) / (1 - v))
        in_ratio_space = {"coordinate": "v", "surrogate": "ratio", "mu": mu}
        points.append((v, objective_magnitude("opo", z, advantage=drive, **in_ratio_space)))
    slope, miss = fit_slope(points)
    assert slope == pytest.approx(mu, rel=1e-9)
    assert miss < 1e-9


def test_opo_in_ratio_space_is_the_distance_to_its_target():
    favored, disfavored = pair_drives()
    assert favored == pytest.approx(-disfavored)
    assert 0.5 < favored < 0.6
    for z in LOGITS:
        v = 2 * sigmoid(z) - 1
        for name, drive in (("favored", favored), ("disfavored", disfavored)):
            expected = abs(MU * v - drive)
            assert curve(f"opo in v, {name}").magnitude(z) == pytest.approx(expected, rel=1e-9)


def test_only_the_disfavored_outcome_in_ratio_space_grows_all_the_way():
    growing = []
    for one in make_curves():
        values = [one.magnitude(i / 4) for i in range(33)]
        if all(later > earlier for earlier, later in itertools.pairwise(values)):
            growing.append(one.name)
    assert growing == ["opo in v, disfavored"]


@pytest.mark.parametrize("surrogate", ["log", "ratio"])
def test_opo_in_the_logit_has_a_zero_and_falls_like_sft(surrogate):
    favored, _ = pair_drives()
    one = curve(f"opo, {surrogate}")
    deviation = math.expm1(favored / MU) if surrogate == "log" else favored / MU
    zero = math.log((1 + deviation) / (1 - deviation))
    assert one.magnitude(zero) < 1e-12
    assert one.magnitude(zero - 0.1) > 1e-3
    assert one.magnitude(zero + 0.1) > 1e-3
    assert rate(one) == pytest.approx(-1, abs=1e-2)


@pytest.mark.parametrize("z", LOGITS)
def test_opo_over_both_outcomes_is_the_expectation_under_the_anchor(z):
    p, (favored, disfavored) = sigmoid(z), pair_drives()
    delta, other = math.log(2 * p), math.log(2 * (1 - p))
    in_log = (MU * delta - favored) * (1 - p) - (MU * other - disfavored) * p
    assert pair_magnitude("log", z) == pytest.approx(abs(in_log) / 2, rel=1e-12)
    v = 2 * p - 1
    in_ratio = 2 * p * (1 - p) * ((MU * v - favored) - (-MU * v - disfavored))
    assert pair_magnitude("ratio", z) == pytest.approx(abs(in_ratio) / 2, rel=1e-9)


def test_opo_over_both_outcomes_grows_linearly_in_the_logit():
    slope, miss = fit_slope([(z, pair_magnitude("log", z)) for z in range(6, 16)])
    assert slope == pytest.approx(MU / 2, rel=1e-2)
    assert miss < 5e-3
    grown = [pair_magnitude("log", z / 4) for z in range(4, 40)]
    assert all(later > earlier for earlier, later in itertools.pairwise(grown))
    in_ratio = Curve("", "", "z", lambda z: pair_magnitude("ratio", z))
    assert rate(in_ratio) == pytest.approx(-1, abs=1e-2)


def test_isopo_in_the_exact_metric():
    for z in (-3.0, -0.7, 0.0, 1.3, 4.0):
        p = sigmoid(z)
        fisher_length = (1 - p) * math.sqrt(p * (1 - p))
        assert isopo_magnitude("reinforce", z) == pytest.approx(1 - p, rel=1e-9)
        assert isopo_magnitude("isopo", z) == pytest.approx((1 - p) / fisher_length, rel=2e-3)
        natural = (1 - p) / (p * (1 - p))
        assert isopo_magnitude("isopo-npg", z) == pytest.approx(natural, rel=1e-5)
    assert abs(rate(curve("isopo-npg"))) < 1e-3
    before_the_guard = rate(curve("isopo"), low=3.0, high=4.0)
    assert before_the_guard == pytest.approx(0.5, abs=0.05)
    assert rate(curve("isopo")) == pytest.approx(-1, abs=0.1)


def test_trace_has_a_column_per_curve():
    curves = make_curves()
    columns = trace(curves, [0.0, 2.0])
    assert list(columns) == ["z", "p", *(one.name for one in curves)]
    assert columns["p"] == [0.5, pytest.approx(sigmoid(2.0))]
    assert columns["sft"] == [0.5, pytest.approx(sigmoid(-2.0))]
    assert len({one.name for one in curves}) == len(curves)


def test_report_writes_figure_curves_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy_report, "LOGITS", (-1.0, 0.0, 1.0, 5.0))
    toy_report.report_saturation(tmp_path, Console(width=100))
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines())
    for one in make_curves():
        assert one.name in printed
    assert (tmp_path / "saturation.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "saturation.svg").read_text()
    with (tmp_path / "saturation.csv").open() as file:
        rows = list(csv.DictReader(file))
    logits = [float(row["z"]) for row in rows]
    assert logits == sorted(logits)
    assert {-1.0, 0.0, 1.0, 5.0} < set(logits)
    at_one = rows[logits.index(1.0)]
    assert float(at_one["sft"]) == pytest.approx(sigmoid(-1.0), rel=1e-5)
    edges = [row for row in rows if row["z"] == "0.405465"]  # p = 0.6: both sides of GRPO's clip
    assert [float(row["grpo"]) for row in edges] == [pytest.approx(0.48), 0.0]
    summary = json.loads((tmp_path / "saturation.json").read_text())["summary"]
    assert summary["grpo"]["p=0.9"] == 0.0
    assert summary["grpo"]["rate"] is None
    assert summary["sft"]["p=0.9"] == pytest.approx(0.1, rel=1e-5)
    assert summary["opo in v, favored"]["derivative"] == "|dL/dv|"


def test_default_logits_reach_far_enough():
    assert toy_report.LOGITS[0] < -4 < 9 < toy_report.LOGITS[-1]
    assert 0.0 in toy_report.LOGITS
    assert saturation.ANCHOR_PROB == 0.5


def test_the_page_shows_the_committed_table_and_it_is_current():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "toy.md").read_text()
    content = json.loads((root / "experiments" / "toy" / "saturation.json").read_text())
    assert list(content["summary"]) == [one.name for one in make_curves()]
    for one in make_curves():
        row = content["summary"][one.name]
        assert row["settings"] == one.settings
        assert row["rate"] == (None if rate(one) is None else pytest.approx(rate(one), rel=1e-4))
        for p in toy_report.SHOWN_PROBS:
            now = one.magnitude(math.log(p / (1 - p)))
            assert row[f"p={p:g}"] == pytest.approx(now, rel=1e-4)
        numbers = [f"{row[f'p={p:g}']:.2g}" for p in toy_report.SHOWN_PROBS]
        last = "-" if row["rate"] is None else f"{round(row['rate'], 2) + 0.0:.2f}"
        derivative = row["derivative"].replace("|", "\\|")
        cells = [one.name, derivative, one.settings, *numbers, last]
        assert f"| {' | '.join(cells)} |" in page
