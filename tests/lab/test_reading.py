import pytest

from proxstep.errors import ProxstepError
from proxstep.runs.reading import Spread, fairness_notes, find_runs, load_run, seed_spread


def test_series_skips_what_was_not_measured(make_run):
    run = load_run(make_run(seed=1))
    assert (run.algorithm, run.seed, run.info["status"]) == ("isopo", 1, "finished")
    assert run.series("score") == ([0, 6], [0.25, 0.6])
    assert run.series("objective/clip_ratio") == ([], [])


@pytest.mark.parametrize("tail", [b'{"step": 7, "rew', b'{"step": 7, "prompt": "\xe2\x80', b"\0\0"])
def test_unfinished_last_line_is_ignored(make_run, tail):
    folder = make_run()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert [record["step"] for record in load_run(folder).records] == list(range(7))


def test_last_line_without_newline_counts_if_complete(make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7}')
    assert load_run(folder).records[-1] == {"step": 7}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 1, "rew', "line 2: not valid JSON"),
        ("", "line 2: not valid JSON"),
        ("[1]", "line 2: a JSON list, not an object"),
        ('{"reward": 1.0}', "line 2: no integer `step`"),
        ('{"step": 1, "reward": "high"}', "line 2: `reward` is not a number"),
        ('{"step": 0}', "line 2: step 0 follows step 0"),
    ],
)
def test_malformed_middle_line_is_an_error_with_its_number(make_run, line, complaint):
    folder = make_run()
    (folder / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ProxstepError, match=rf"metrics\.jsonl, {complaint}"):
        load_run(folder)


def test_malformed_last_line_with_its_newline_is_an_error(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n')
    with pytest.raises(ProxstepError, match="line 2"):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("recipe.yaml", "a: [", "not valid YAML"),
        ("recipe.yaml", "seed: 0", "lacks `algorithm`"),
        ("recipe.yaml", "- 1", "a YAML mapping"),
        ("run.json", "{", "not valid JSON"),
        ("run.json", "[]", "one JSON object"),
        ("metrics.jsonl", "", "no step yet"),
    ],
)
def test_bad_file_is_named(make_run, name, content, complaint):
    folder = make_run()
    (folder / name).write_text(content)
    with pytest.raises(ProxstepError, match=f"{name}(, line 1)?: .*{complaint}"):
        load_run(folder)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "metrics.jsonl"])
def test_missing_file_is_named(make_run, name):
    folder = make_run()
    (folder / name).unlink()
    with pytest.raises(ProxstepError, match=name):
        load_run(folder)


def test_find_runs_keeps_the_order_given_and_reads_each_run_once(make_run, tmp_path):
    make_run("grpo", name="deep/down/grpo")
    make_run("opo", name="deep/opo")
    (tmp_path / "deep/opo/checkpoint").mkdir()
    (tmp_path / "deep/opo/checkpoint/run.json").write_text("not a run of its own")
    found = find_runs([tmp_path / "deep/opo", tmp_path / "deep", tmp_path])
    assert [run.algorithm for run in found] == ["opo", "grpo"]


def test_find_runs_without_any_run(tmp_path):
    with pytest.raises(ProxstepError, match="holds no run"):
        find_runs([tmp_path])
    with pytest.raises(ProxstepError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])


def test_seed_spread_covers_the_steps_that_all_runs_have(make_run):
    short = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}]
    unmeasured = [{"step": 1, "reward": None}]
    runs = [
        load_run(make_run(seed=0)),
        load_run(make_run(seed=1, records=short)),
        load_run(make_run(seed=2, records=unmeasured)),
    ]
    assert seed_spread(runs, "reward") == {1: Spread(0.3, 0.1, 0.5), 2: Spread(0.6, 0.2, 1.0)}
    assert seed_spread(runs[2:], "reward") == {}


def test_runs_that_differ_as_they_should_need_no_note(make_run):
    paths = [make_run(name, seed) for name in ("grpo", "isopo") for seed in (0, 1)]
    assert fairness_notes([load_run(path) for path in paths]) == []


def test_notes_tell_what_makes_a_comparison_unfair(make_run):
    slow, fast = ({"optimizer": {"learning_rate": rate}} for rate in (0.1, 0.2))
    paths = [
        make_run("grpo", 0, recipe={**slow, "beta": 1}),
        make_run("grpo", 0, recipe=slow, name="again"),
        make_run("isopo", 3, recipe=fast, info={"status": "interrupted", "machine": "GPU"}),
    ]
    assert fairness_notes([load_run(path) for path in paths]) == [
        "isopo, seed 3: interrupted after step 6 of 6.",
        "grpo has 2 runs over 1 seeds.",
        "One seed only for grpo, isopo: a gap between curves may be chance.",
        "The algorithms differ in: seed (0 for grpo; 3 for isopo).",
        "The grpo runs differ in: beta (1 | –).",  # noqa: RUF001
        "The algorithms differ in: beta (1 | – for grpo; – for isopo), "  # noqa: RUF001
        "optimizer.learning_rate (0.1 for grpo; 0.2 for isopo), "
        "run.machine (CPU, 2 cores for grpo; GPU for isopo).",
    ]


def test_long_settings_that_differ_at_their_end_do_differ(make_run):
    paths = [
        make_run(name, seed, recipe={"prompt": "x" * 100 + name})
        for name in ("a", "b")
        for seed in (0, 1)
    ]
    (note,) = fairness_notes([load_run(path) for path in paths])
    assert note.startswith("The algorithms differ in: prompt (xxx")
    assert "…" in note


def test_a_run_that_learned_nothing_is_named(make_run):
    steps = [{"step": step, "reward": 1.0, "advantage_range": None} for step in range(3)]
    idle = make_run("opo", seed=0, records=steps)
    steps = [{**row, "advantage_range": 0.0} for row in steps]
    equal = make_run("opo", seed=1, records=steps)
    steps[1]["advantage_range"] = 0.5
    learned = make_run("opo", seed=2, records=steps)
    notes = fairness_notes([load_run(path) for path in (idle, equal, learned)])
    assert [note.partition(":")[0] for note in notes] == ["opo, seed 0", "opo, seed 1"]
