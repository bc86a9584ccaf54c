"""Figures on the pages are those of the committed results, recomputed from the files."""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from experiments import guard, kl_budget, layer_budgets, noise_split, pairs, worked_tasks

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"


def page(name: str) -> str:
    """A page, a sentence on one line."""
    return re.sub(r"\s*\n\s*(?![|\n#-])", " ", (ROOT / name).read_text())


def rows(name: str, *, columns: int) -> list[list[str]]:
    """The cells of a page's table rows that are so many."""
    lines = re.findall(r"^\|(.*)\|$", (ROOT / name).read_text(), re.MULTILINE)
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]
    return [cells for cells in found if len(cells) == columns]


def results(name: str) -> Any:
    return json.loads((EXPERIMENTS / name).read_text())


def baseline(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "baselines" / f"{name}-cpu.json").read_text())


# -- costs -----------------------------------------------------------------------------------------


def overhead(name: str) -> dict[tuple[str, int, int, int | None], dict[str, float]]:
    return {
        (row["row"], row["hidden_size"], row["length"], row["num_samples"]): row
        for row in json.loads((ROOT / "benchmarks" / "baselines" / name).read_text())["rows"]
    }


def test_costs_with_the_defaults() -> None:
    both = (overhead("overhead-cpu-smollm2.json"), overhead("overhead-cpu-embedded.json"))
    measured = [
        {key[0]: f"{r['ratio']:.3f} [{r['lower_quartile']:.3f}, {r['upper_quartile']:.3f}]"}
        for found in both
        for key, r in found.items()
    ]
    names = {
        "plain REINFORCE against itself": "reinforce",
        "isopo, `overlap_source: microbatch`": "isopo-microbatch",
    }
    text = (ROOT / "docs" / "cost.md").read_text().split("A [KL budget]")[0]
    known = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    table = [[c.strip() for c in cells] for cells in known if "[" in cells[2] + cells[1]]
    said = [
        {names.get(name, name): cell}
        for i in (1, 2)
        for name, *cells in table
        if (cell := cells[i - 1])
    ]
    assert sorted(map(str, said)) == sorted(map(str, measured))
    isopo = [found[next(key for key in found if key[0] == "isopo")]["ratio"] for found in both]
    text = f"{isopo[0]:.2f} of plain REINFORCE's processor time"
    assert text in page("README.md")
    assert f"{isopo[1]:.2f} with the embedded model" in page("README.md")
    of_papers = (
        f"one backward; {isopo[0]:.2f} of REINFORCE's time at 135 M parameters, {isopo[1]:.2f}"
    )
    assert of_papers in page("docs/papers.md")


def test_costs_of_a_kl_budget() -> None:
    names = {
        "without a budget, against itself": "reinforce",
        "`predicted`": "predicted",
        "`corrected`": "corrected",
        "exact derivatives of the same sequences": "slopes",
        "products at all positions, in the backward pass": "backward",
    }
    reports = [baseline("kl-budget-sixteenth"), baseline("kl-budget")]
    assert [report["settings"]["judges"] for report in reports] == [4, 8]
    table = [cells for cells in rows("docs/cost.md", columns=4) if cells[0] in names]
    assert len(table) == len(names)
    for name, *times, memory in table:
        for time, report in zip(times, reports, strict=True):
            (row,) = (row for row in report["figures"] if row["row"] == names[name])
            ends = f"[{row['lower_quartile']:.3f}, {row['upper_quartile']:.3f}]"
            assert time == f"{row['ratio']:.3f} {ends}"
            peak = f"{row['memory_ratio']:.3f}"
        assert memory == peak


def test_costs_with_64_positions() -> None:
    names = ("overhead-cpu", "overhead-cpu-1024-128", "overhead-cpu-1024-256")
    measured: dict[Any, Any] = {}
    for name in names:
        measured |= overhead(f"{name}.json")
    for name, *cells in rows("docs/cost.md", columns=7)[2:]:
        row = "paper" if name.startswith("the paper") else name
        for cell, size in zip(
            (*cells[:2], *cells[3:5]),
            ((512, 128), (1024, 128), (512, 256), (1024, 256)),
            strict=True,
        ):
            (ratio,) = (
                r["ratio"]
                for key, r in measured.items()
                if key[:3] == (row, *size) and key[3] != 250
            )
            assert cell == f"{ratio:.3f}", (name, size)


def test_costs_of_engines_and_memory() -> None:
    text = page("docs/cost.md")
    engines = {row["row"]: row for row in baseline("engines")["rows"]}
    step = [
        statistics.median(engines[f"local-{name}"]["step_over_trl_grpo"])
        for name in ("reinforce", "grpo", "opo", "isopo")
    ]
    shown = "{:.2f} (REINFORCE), {:.2f} (GRPO), {:.2f} (OPO) and {:.2f} (ISOPO)".format(*step)
    assert shown in text
    update = [
        statistics.median(engines[f"trl-{name}"]["update"])
        for name in ("isopo", "isopo-natural", "opo")
    ]
    shown = "ISOPO's update takes {:.2f} of GRPO's, the natural rule's {:.2f}, OPO's {:.2f}"
    assert shown.format(*update) in text
    verl = {row["row"]: statistics.median(row["ratio"]) for row in baseline("engines-verl")["rows"]}
    shown = (
        "OPO {opo:.2f}, ISOPO {isopo:.2f}, figure4 {isopo-figure4:.2f}, natural {isopo-natural:.2f}"
    )
    assert shown.format(**verl) in text
    memory = {row["row"]: row for row in baseline("memory-smollm2")["sections"]["rules"]}
    plain = memory["isopo"]["reinforce_growth_bytes"] / 2**20
    ratio = memory["isopo"]["ratio"], plain, memory["isopo-natural"]["ratio"]
    assert "isopo {:.3f} of {:,.0f} MiB, natural {:.3f}".format(*ratio) in text


def test_rates_of_graders_and_of_the_sampler() -> None:
    grades = baseline("grading")["grades_a_second"]
    rates = {name: statistics.median(values) for name, values in grades.items()}
    text = page("docs/tasks.md")
    assert f"grades {round(rates['numeric_answer'], -2):,.0f} completions" in text
    assert f"`math_verify` {round(rates['math_verify'], -1):.0f} of answers" in text
    assert f"and {rates['math_verify, undecided']:.0f} of answers" in text
    summary = baseline("rollout")["summary"]
    for part in ("rollout", "step"):
        shown = "{mean:.2f} [{lower:.2f}, {upper:.2f}]".format(**summary[part])
        assert shown in page("docs/cost.md"), part


# -- ISOPO -----------------------------------------------------------------------------------------


def test_how_many_positions() -> None:
    models = {
        "even": "even",
        "stratified": "stratified",
        "shared": "shared",
        "weighted": "weighted",
    }
    found = {
        (row["model"], row["way"], row["num_sampled"]): row["gradient"]
        for row in results("sampled_positions.json")["rows"]
    }
    columns = [("SmolLM2-135M-Instruct", way) for way in models]
    columns += [("embedded", "even"), ("embedded", "weighted")]
    table = [cells for cells in rows("docs/isopo.md", columns=7) if cells[0].isdigit()]
    assert [cells[0] for cells in table] == ["16", "32", "64", "250"]
    for size, *cells in table:
        for cell, column in zip(cells, columns, strict=True):
            said = cell.strip("*")
            digits = len(said.split(".")[1])
            assert said == f"{found[*column, int(size)]:.{digits}f}", (column, size)
    plain = [found[model, "no scaling (REINFORCE)", 0] for model, _ in (columns[0], columns[4])]
    assert "is {:.2f} and {:.2f} from it".format(*plain) in page("docs/isopo.md")


def test_the_scales() -> None:
    report = results("scale/results.json")
    score = {
        (row["optimizer"], row["method"]): statistics.mean(run["score"] for run in row["runs"])
        for row in report["rows"]
    }
    text = page("docs/isopo.md")
    for name in ("AdamW", "SGD", "Muon"):
        both = [score[name.lower(), f"isopo, {scale}"] for scale in ("preserved", "paper")]
        assert "{:.3f} and {:.3f} with {}".format(*both, name) in text
    norms = report["norms_over_reinforce"]
    norms = norms["rows"] if isinstance(norms, dict) else norms  # of before the date was kept
    for scale in ("preserved", "paper"):
        values = [row[scale] for row in norms]
        assert f"{min(values):.2f} to {max(values):.2f} times REINFORCE's" in text, scale


def test_the_noise_split() -> None:
    found = results("noise_split.json")
    sentence, _, _, *lines = noise_split.table(found)
    example = " ".join((ROOT / "docs" / "diagnostics.md").read_text().split())
    assert sentence in example
    ratios = [float(line.split("|")[-2]) for line in lines if line.startswith("|")]
    text = f"the predicted noise of six shapes is {min(ratios):.2f} to {max(ratios):.2f} times"
    assert len(ratios) == 6
    assert text in page("docs/diagnostics.md")


def test_pairs_of_the_five_seed_table() -> None:
    found = pairs.pairs(pairs.objective_scores())
    text = page("docs/algorithms.md")
    assert f"Corrected for the {len(found)} pairs" in text
    told = [pair for pair in found if pair.p * len(found) < 0.05]
    read_literally = [pair for pair in told if "opo, sequence" in pair[:2]]
    assert f"`opo, sequence` is told from {len(read_literally)} rows" in text
    (other,) = (pair for pair in told if pair not in read_literally)
    interval = f"{other.difference:.3f} [{other.low:.3f}, {other.high:.3f}] above it"
    assert f"`{other.first}` from `{other.second}`, {interval}" in text
    weak = ("rloo", "reinforce", "proma")
    strong = ("opo", "opo, length", "isopo+opo")
    p = [pair.p for pair in found if pair.first in strong and pair.second in weak]
    assert len(p) == 9
    assert f"p from {min(p):.3f} to {max(p):.3f}" in text


# -- what was found --------------------------------------------------------------------------------


def test_learning_rates_with_and_without_a_budget() -> None:
    """Mean and worst seed, and the median share of the step that was taken."""
    cells: dict[Any, list[Any]] = defaultdict(list)
    for task in kl_budget.TASKS:
        for run in kl_budget.written(task):
            own = run["budget"] == kl_budget.BUDGET and "judges" not in run
            if own and run["optimizer"] == "adamw":
                cells[task, run["learning_rate"], run["control"]].append(run)

    def shown(runs: list[Any]) -> str:
        scores = [run["score"] for run in runs]
        return f"{statistics.mean(scores):.3f} ({min(scores):.3f})"

    table = [row for row in rows("docs/findings.md", columns=5) if re.match(r"\de-\d", row[1])]
    assert {row[0] for row in table} == set(kl_budget.TASKS)
    for task, rate, without, budget, share in table:
        assert without == shown(cells[task, float(rate), "none"]), rate
        runs = cells[task, float(rate), "predicted"]
        assert budget == shown(runs), rate
        scale = statistics.median(scale for run in runs for scale in run["scale"] if scale)
        assert float(share) == pytest.approx(scale, abs=0.005 if scale > 0.05 else 0.0005), rate


def test_methods_on_worked_tasks() -> None:
    runs = results("worked_tasks/rows.json")["rows"]
    table = [r for r in rows("docs/findings.md", columns=7) if r[1] in worked_tasks.METHODS]
    assert table
    task = ""
    for name, method, rate, *figures in table:
        task = name.strip("`") or task
        assert rate == worked_tasks.best_rate(runs, task, method), (task, method)
        own = [
            r
            for r in runs
            if (r["task"], r["method"], r["rate"]) == (task, method, rate)
            and r["seed"] in worked_tasks.SEEDS
        ]
        ends = [worked_tasks.end(run) for run in own]
        expected = [
            statistics.mean(run["score"]["0"] for run in own),
            statistics.mean(ends),
            statistics.stdev(ends),
            statistics.mean(run["kl"][0] for run in own if run["kl"]),
        ]
        assert figures == [f"{value:.3f}" for value in expected], (task, method)


def test_costs_of_whole_runs() -> None:
    runs = results("worked_tasks/rows.json")["rows"]
    table = [
        r
        for r in rows("docs/cost.md", columns=5)
        if r[0].strip("`") in ("sums", "products", "maxima", "countdown")
    ]
    assert table
    for name, *figures in table:
        for method, shown in zip(worked_tasks.METHODS, figures, strict=True):
            own = [
                run["processor_seconds"]
                for run in runs
                if (run["task"], run["method"]) == (name.strip("`"), method)
            ]
            assert float(shown) == pytest.approx(statistics.median(own), abs=0.051), (name, method)


INTERVAL = r"\[(-?\+?[\d.]+), (-?\+?[\d.]+)\]"


def intervals(text: str) -> set[frozenset[float]]:
    """The ends of intervals, without their signs: a difference may be told from either side."""
    return {frozenset(abs(float(end)) for end in ends) for ends in re.findall(INTERVAL, text)}


@pytest.mark.parametrize("name", ["README.md", "docs/which.md", "docs/claims.md"])
def test_every_interval_is_on_a_page_of_results(name: str) -> None:
    text = page(name)
    if name == "README.md":
        text = text.split("## What was found so far")[1].split("## What it costs")[0]
    pages = ["docs/findings.md", "docs/cost.md", "docs/algorithms.md"]
    pages += [f"docs/findings/{path.name}" for path in (ROOT / "docs" / "findings").iterdir()]
    known = set().union(*(intervals(page(other)) for other in pages))
    assert intervals(text)
    assert intervals(text) <= known


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "findings").iterdir()), ids=lambda p: p.stem
)
def test_intervals_of_a_findings_text_are_in_its_tables(path: Path) -> None:
    text, begin, table = path.read_text().partition("<!-- results:")
    assert begin
    assert intervals(text) <= intervals(table)


def test_the_guards_figures() -> None:
    committed = json.loads(guard.FIGURES.read_text())
    everything = guard.written()
    assert committed == json.loads(json.dumps(guard.figures(everything))), "guard.py --figures"
    found = committed["all"]["guard"]
    text = page("docs/diagnostics.md")
    assert f"of {found['collapses']} runs that collapsed" in text
    assert f"{found['healthy']} healthy ones" in text
    warning = re.search(
        r"\n    step (\d+): collapsing: (.*?)\n\n",
        (ROOT / "docs/diagnostics.md").read_text(),
        re.DOTALL,
    )
    assert warning
    said = " ".join(warning[2].split())
    one = next(o for o in everything if (o["cause"], o["number"]) == ("learning rate", 0))
    for cause, told in committed["remedies"].items():
        early, late = told["first alarm"], told["last row"]
        figures = [
            early["alarms"],
            *(each[n] for each in (early, late) for n in ("first", "named")),
        ]
        assert [cause, *map(str, figures)] in rows("docs/diagnostics.md", columns=6)
    step = guard.guard_alarm(one)
    assert step == int(warning[1])
    assert said in str(guard.verdict(guard.rows_of(one, guard.EVERY)[: step + 1]))


def test_budgets_of_layers() -> None:
    lines = layer_budgets.table(layer_budgets.written()).splitlines()[2:]
    wholes = [float(line.split("|")[-2]) for line in lines]
    assert f"{min(wholes):.1f} (SGD) to {max(wholes):.1f} times (AdamW, Muon)" in page(
        "docs/kl-budget.md"
    )
