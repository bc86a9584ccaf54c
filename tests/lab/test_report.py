import base64
import hashlib
import io
import re
from dataclasses import astuple
from html.parser import HTMLParser

import pytest
from rich.console import Console

from proxstep.errors import ProxstepError
from proxstep.lab.panels import CHARTS
from proxstep.lab.report import write_report
from proxstep.lab.summary import AlgorithmSummary, comparison_table, summarize
from proxstep.runs.lock import locked
from proxstep.runs.reading import load_run

HOSTILE = "<script>alert('x')</script><img src=http://example.com/x onerror=alert(1)>"


class Elements(HTMLParser):
    """The elements of a page, as (tag, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def tags(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


@pytest.fixture
def page(tmp_path):
    def write(*paths):
        runs = [load_run(path) for path in paths]
        return write_report(runs, tmp_path / "out/report.html").read_text(encoding="utf-8")

    return write


def printed(runs, width=100):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(comparison_table(summarize(runs)))
    return capture.get()


def test_summary_matches_the_numbers_computed_by_hand(make_run):
    (summary,) = summarize([load_run(make_run(seed=seed)) for seed in (0, 2)])
    assert (summary.algorithm, summary.num_seeds) == ("isopo", 2)
    expected = {
        "start_score": (0.25, 0.25, 0.25),
        "final_score": (0.6, 0.5, 0.7),
        "gain": (0.35, 0.25, 0.45),
        "kl_policy_initial": (0.06, 0.06, 0.06),
        "kl_initial_policy": (0.03, 0.03, 0.03),
        "entropy": (0.4, 0.4, 0.4),
        "reward": (0.4, 0.4, 0.4),  # steps 2 to 6
        "grad_norm": (8.0, 8.0, 8.0),
        "grad_response_efficiency": (0.5, 0.5, 0.5),
        "seconds_per_step": (2.0, 2.0, 2.0),  # step 0 left out, step 1 outvoted
    }
    for name, spread in expected.items():
        assert astuple(getattr(summary, name)) == pytest.approx(spread), name


def test_gain_pairs_start_and_end_of_the_same_run(make_run):
    without_start = [{"step": 3, "score": 1.0}]
    paths = [make_run(seed=0), make_run(seed=1, records=without_start)]
    (summary,) = summarize(map(load_run, paths))
    assert astuple(summary.gain) == (0.25, 0.25, 0.25)
    assert astuple(summary.final_score) == (0.75, 0.5, 1.0)


def test_unmeasured_statistics_are_none(make_run):
    summary, only_start = summarize(
        [
            load_run(make_run("grpo", records=[{"step": 1}])),
            load_run(make_run("opo", records=[{"step": 0, "score": 0.5}])),
        ]
    )
    assert summary == AlgorithmSummary("grpo", 1, *[None] * 10)
    assert only_start.final_score is None
    assert only_start.gain is None


def test_table_shows_the_numbers(make_run):
    rows = printed([load_run(make_run(seed=seed)) for seed in (0, 2)]).splitlines()
    (row,) = [line for line in rows if line.startswith("isopo")]
    cells = "isopo 2 0.250 0.600 +0.350 [0.250, 0.450] 0.0600 0.0300 0.400 8.00 2.00"
    assert " ".join(row.split()) == cells


def test_table_shows_a_dash_for_what_was_not_measured_and_no_range_for_one_seed(make_run):
    text = printed([load_run(make_run(records=[{"step": 1}])), load_run(make_run("grpo"))])
    assert re.search("isopo +1( +\N{EN DASH}){8}", text)
    assert re.search(r"grpo +1 0\.250 0\.500 +\+0\.250 +0\.0600", text)


def test_table_fits_100_columns_on_single_lines(make_run):
    names = ["reinforce", "isopo-euclidean", "[red]grpo"]
    runs = [load_run(make_run(name, seed)) for name in names for seed in (0, 1)]
    lines = printed(runs).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[3:6]] == names


def test_page_is_self_contained(make_run, page):
    text = page(make_run("grpo"), make_run("isopo"))
    elements = Elements(text)
    targets = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}
    ]
    assert targets == []
    assert not elements.tags("link") + elements.tags("img")
    assert not re.search(r"@import|url\((?!#)", text)


def test_only_the_page_s_own_script_may_run(make_run, page):
    text = page(make_run())
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (tag for tag in Elements(text).tags("meta") if "http-equiv" in tag)
    assert policy["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )


def charts(text):
    return re.findall(r'<svg class="chart".*?</svg></svg>', text, flags=re.DOTALL)


def test_page_has_six_charts_and_the_score_against_kl(make_run, page):
    text = page(make_run("grpo"), make_run("isopo"), make_run("opo"))
    frontier, *found = charts(text)
    assert "grpo ends at 0.5 for 0.06 nats, isopo ends at 0.5" in frontier
    assert len(found) == len(CHARTS) == 6
    for chart, svg in zip(CHARTS, found, strict=True):
        assert re.findall(r'data-algorithm="([^"]+)"', svg) == ["grpo", "isopo", "opo"]
        assert f"<figcaption>{chart.teaching.replace(chr(39), '&#39;')}</figcaption>" in text


def test_at_most_eight_curves_are_drawn_the_highest(make_run, page):
    finals = [0.3, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.95]
    paths = [
        make_run(f"a{i}", records=[{"step": 0, "score": 0.1}, {"step": 1, "score": final}])
        for i, final in enumerate(finals)
    ]
    text = page(*paths)
    assert "Drawn are the 8 algorithms with the highest final scores" in text
    (svg,) = [svg for svg in charts(text) if 'aria-label="Greedy score' in svg]
    assert re.findall(r'data-algorithm="([^"]+)"', svg) == [f"a{i}" for i in range(1, 9)]


def test_page_is_accessible(make_run, page):
    elements = Elements(page(make_run("grpo"), make_run("isopo")))
    assert all(attributes["scope"] in {"col", "row"} for attributes in elements.tags("th"))
    svgs = [svg for svg in elements.tags("svg") if "class" in svg and svg["class"] != "plot"]
    assert all("aria-hidden" in svg or (svg["role"] == "img" and svg["aria-label"]) for svg in svgs)
    assert len(elements.tags("figure")) == len(elements.tags("figcaption")) == 7
    assert elements.tags("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_hostile_text_is_escaped_everywhere(make_run, page):
    sample = {"step": 6, "prompt": HOSTILE, "completion": HOSTILE, "answer": HOSTILE, "reward": 0}
    folder = make_run(
        HOSTILE, recipe={"note": HOSTILE}, info={"machine": HOSTILE}, samples=[sample], name="evil"
    )
    text = page(folder, make_run("grpo", recipe={"note": "kind"}))
    assert len(Elements(text).tags("script")) == 1  # the page's own
    assert not Elements(text).tags("img")
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 6


def test_first_and_last_samples_are_shown(make_run, page):
    rows = [{"step": i, "prompt": "2+2=", "completion": f"it is {i}"} for i in range(5)]
    text = page(make_run(seed=0), make_run(seed=1, samples=rows), make_run("grpo", seed=0))
    assert re.findall(r"it is \d", text) == ["it is 0", "it is 4"]
    assert "isopo, seed 1" in text
    assert "After step 4: <strong>reward \N{EN DASH}</strong>" in text
    assert "Samples</h2>" not in page(make_run("opo"))


def test_half_a_character_does_not_stop_the_page(make_run, page):
    assert "cut ?" in page(make_run(samples=[{"step": 1, "completion": "cut \ud83d"}]))


def test_page_lists_recipes_versions_and_differences(make_run, page):
    text = page(
        make_run("grpo", recipe={"optimizer": {"learning_rate": 0.25}}), make_run("isopo", seed=0)
    )
    assert "Recipe of grpo" in text
    assert "Recipe of isopo" in text
    assert "learning_rate: 0.25" in text
    assert "optimizer.learning_rate (0.25 for grpo; 0.001 for isopo)" in text
    assert '<th scope="row">optimizer.learning_rate</th><td>0.25</td><td>0.001</td>' in text
    assert "812,345 parameters" in text
    assert "2026-11-21T01:32:11" in text
    assert "Yes, as far as the records tell" not in text


def test_a_run_that_was_killed_does_not_run_in_the_page(make_run, page):
    folder = make_run(info={"status": "running"})
    text = page(folder)
    assert "isopo, seed 0: killed after step 6 of 6." in text
    assert "<td>killed</td>" in text
    assert "<td>running</td>" not in text
    with locked(folder, "output_dir"):
        assert "isopo, seed 0: running after step 6 of 6." in page(folder)


def test_page_says_when_nothing_speaks_against_the_comparison(make_run, page):
    paths = [make_run(name, seed) for name in ("grpo", "isopo") for seed in (0, 1)]
    assert "Yes, as far as the records tell" in page(*paths)


def test_page_of_one_run_with_little_measured(make_run, page):
    text = page(make_run(records=[{"step": 1}], recipe={"model": "path/to/model", "task": None}))
    assert "1 algorithm for" in text
    assert "Model: path/to/model" in text
    assert text.count(">not measured<") == 6


def test_page_replaces_an_earlier_one_and_leaves_nothing_else(make_run, tmp_path):
    runs = [load_run(make_run())]
    path = tmp_path / "out" / "report.html"
    path.parent.mkdir()
    path.write_text("old")
    assert write_report(runs, str(path)) == path
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def test_no_runs_and_a_folder_as_page_are_refused(make_run, tmp_path):
    with pytest.raises(ProxstepError, match="no runs"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(ProxstepError, match="is a folder"):
        write_report([load_run(make_run())], tmp_path)
