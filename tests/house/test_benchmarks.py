"""The benchmarks compare like with like: their contestants compute what proxstep computes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.models import tiny_qwen3
from torch import Tensor, nn

from benchmarks import literal, memory, overhead, per_sample, training, turns
from benchmarks.rows import MAIN_ROWS, ROWS
from benchmarks.workload import (
    Batch,
    build_model,
    completion_log_probs,
    draw_batch,
    reinforce,
    scaled_shape,
    twin_of,
    untied,
)
from proxstep import PRESETS, Isopo

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LENGTH, VOCAB = 24, 300
FIGURES = {
    "isopo": literal.figure2(None),
    "isopo-figure4": literal.figure4(None),
    "isopo-natural": literal.interacting,
}
CONTRACTS = {"isopo-euclidean": per_sample.euclidean, "isopo-natural": per_sample.natural}
SIZES = ["--num-layers", "1", "--vocab-size", "50", "--num-sequences", "3"]


@pytest.fixture(scope="module")
def model() -> Any:
    """An untied model; every test takes a twin of it."""
    return untied(build_model(scaled_shape(128, 2, VOCAB), CPU, torch.float32))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return draw_batch(4, LENGTH, VOCAB, CPU)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def isopo_gradients(model: nn.Module, batch: Batch, rule: str) -> dict[str, Tensor]:
    """From all positions."""
    isopo = Isopo(model, replace(PRESETS[rule], scale="paper"), num_overlap_positions=None)
    model.zero_grad()
    with isopo.microbatch(batch.sequence_BT, batch.coefficient_B) as microbatch:
        log_prob_B = completion_log_probs(model, batch.token_BT, batch.num_prompt)
        microbatch.objective(log_prob_B).backward()
    return gradients(model)


def hook_gradients(
    model: nn.Module, batch: Batch, figure: literal.ComputeGrad
) -> dict[str, Tensor]:
    """Of the linear layers only."""
    hooks = literal.PaperHooks(model, figure)
    model.zero_grad()
    log_prob_B = completion_log_probs(model, batch.token_BT, batch.num_prompt)
    position_T = torch.arange(batch.token_BT.numel())
    hooks.backward(log_prob_B.sum(), position_T.split(batch.token_BT.shape[1]), batch.coefficient_B)
    hooks.remove()
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    every = gradients(model)
    return {f"{name}.weight": every[f"{name}.weight"] for name in linear}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        assert expected.norm() > 0
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("rule", FIGURES)
def test_the_papers_hooks_compute_isopo(model, batch: Batch, rule: str) -> None:
    theirs = hook_gradients(twin_of(model), batch, FIGURES[rule])
    assert len(theirs) == 2 * 7 + 1
    assert_close(isopo_gradients(twin_of(model), batch, rule), theirs, 1e-4)


@pytest.mark.parametrize("rule", FIGURES)
def test_the_papers_hooks_compute_isopo_to_the_last_digits(rule: str) -> None:
    torch.manual_seed(0)
    exact: Any = tiny_qwen3(tied=False)
    drawn = draw_batch(3, 10, 19, CPU)
    batch = Batch(drawn.token_BT, drawn.coefficient_B.double())
    theirs = hook_gradients(twin_of(exact), batch, FIGURES[rule])
    assert_close(isopo_gradients(twin_of(exact), batch, rule), theirs, 1e-8)


def test_the_papers_hooks_draw_distinct_positions() -> None:
    sample_K = literal.draw_overlap_samples(50, 20, CPU)
    assert len(sample_K.unique()) == 20
    assert 0 <= sample_K.min() <= sample_K.max() < 50


@pytest.mark.parametrize("rule", CONTRACTS)
@pytest.mark.parametrize("library", [per_sample.OpacusGradients, per_sample.VmapGradients])
def test_per_sequence_gradients_make_isopos(
    model, batch: Batch, rule: str, library: Callable[..., Callable[[Batch], None]]
) -> None:
    twin = twin_of(model)
    library(twin, CONTRACTS[rule])(batch)
    theirs = gradients(twin)
    assert theirs.keys() == dict(model.named_parameters()).keys()
    assert_close(isopo_gradients(twin_of(model), batch, rule), theirs, 1e-4)


def test_ghost_clipping_divides_by_norms_over_the_whole_model(model, batch: Batch) -> None:
    twin = twin_of(model)
    ghost = per_sample.OpacusGhost(twin)
    for _ in range(2):
        ghost(batch)
    sampled = per_sample.per_sequence_gradients(twin_of(model), batch)
    norm_sq = [value.flatten(1).square().sum(1) for value in sampled.values()]
    weight_B = batch.coefficient_B / torch.stack(norm_sq).sum(0).sqrt()
    expected = {name: -torch.tensordot(weight_B, value, dims=1) for name, value in sampled.items()}
    assert_close(gradients(twin), expected, 1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_rows_leave_finite_gradients_that_do_not_add_up(name: str, batch: Batch) -> None:
    tied = build_model(scaled_shape(128, 1, VOCAB), CPU, torch.float32)
    model = twin_of(tied if ROWS[name].tied else untied(tied))
    step = ROWS[name].build(model, batch, LENGTH * 4)
    step()
    first = gradients(model)
    step()
    assert all(value.isfinite().all() for value in first.values())
    tolerance = 0.2 if name.endswith("natural") else 1e-4  # the trailing mean is not the first's
    assert_close(gradients(model), first, tolerance)


def test_a_twin_shares_parameters_and_an_untied_one_all_but_the_head() -> None:
    tied = build_model(scaled_shape(64, 1, 20), CPU, torch.float32)
    twin, apart = twin_of(tied), untied(tied)
    assert all(a is b for a, b in zip(tied.parameters(), twin.parameters(), strict=True))
    assert twin.model is not tied.model
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    assert torch.equal(apart.lm_head.weight, tied.lm_head.weight)


def test_plain_reinforce_raises_what_has_an_advantage() -> None:
    model = build_model(scaled_shape(64, 1, 20), CPU, torch.float32)
    drawn = draw_batch(2, 8, 20, CPU)
    batch = Batch(drawn.token_BT, torch.tensor([1.0, -1.0]))
    before_B = completion_log_probs(model, batch.token_BT, batch.num_prompt)
    reinforce(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    after_B = completion_log_probs(model, batch.token_BT, batch.num_prompt)
    assert (after_B - before_B)[0] > 0 > (after_B - before_B)[1]


def test_k_varies_only_where_it_matters() -> None:
    sizes = ["--hidden-sizes", "64", "--lengths", "8", "16", "--samples", "4", "5"]
    rows = ["--rows", "isopo", "isopo-natural", "reinforce"]
    cases = list(overhead.cases(overhead.options([*sizes, *rows])))
    assert len(cases) == 2 * (2 + 1 + 1)
    assert {case[3] for case in cases if case[2] == "isopo"} == {4, 5}
    assert {case[3] for case in cases if case[2] != "isopo"} == {None}


def test_the_grids() -> None:
    quick, full = overhead.options([]), overhead.options(["--full"])
    assert quick.rows == MAIN_ROWS
    assert full.rows == list(ROWS)
    assert (full.hidden_sizes, full.lengths, full.samples) == ([512, 1024], [128, 256], [32, 250])
    assert overhead.options(["--full", "--lengths", "8"]).lengths == [8]
    assert overhead.options(["--shape", "qwen3-0.6b"]).lengths == [512, 1024, 2048]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--repeats 1", "quartiles"),
        ("--shape qwen3-0.6b --full", "its own sizes"),
        ("--rows nonsense", "invalid choice"),
        ("--device nonsense", "neither cpu nor cuda"),
    ],
)
def test_mistakes_on_the_command_line(words: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        overhead.options(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "device", "length", "num_samples", "target"),
    [
        ("isopo", "cpu", 256, 250, 1.05),
        ("isopo", "cpu", 128, 64, 1.07),
        ("isopo-npg", "cpu", 256, 64, 1.10),
        ("isopo-npg", "cpu", 256, 250, None),
        ("isopo-figure4", "cuda", 2048, 250, 1.20),
        ("isopo-natural", "cpu", 128, None, 1.12),
        ("isopo-natural", "cuda", 512, None, None),
        ("isopo-euclidean", "cpu", 256, None, None),
        ("paper", "cpu", 256, 64, None),
        ("reinforce", "cpu", 256, None, None),
    ],
)
def test_targets(name, device, length, num_samples, target) -> None:
    assert overhead.target_of(ROWS[name], device, length, num_samples) == target


def test_a_ratio_is_to_the_plain_steps_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 6.0, 2.0, 9.0, 4.0])
    monkeypatch.setattr(overhead, "timed", lambda step, device: next(seconds))
    ratios, plain_seconds = overhead.ratios_to(lambda: None, lambda: None, 2, CPU)
    assert ratios == [4.0, 3.0]
    assert plain_seconds == [1.0, 2.0, 4.0]


def test_only_a_library_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("cannot\nfor a long reason")

    def overflow(*arguments: Any) -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate")

    batch = draw_batch(2, 8, 20, CPU)
    model = build_model(scaled_shape(64, 1, 20), CPU, torch.float32)
    monkeypatch.setattr(overhead, "measure", fail)
    row = overhead.attempt(ROWS["vmap-natural"], model, batch, None, 2)
    assert row == {"failure": "cannot"}
    with pytest.raises(RuntimeError, match="for a long reason"):
        overhead.attempt(ROWS["isopo"], model, batch, 4, 2)
    monkeypatch.setattr(overhead, "measure", overflow)
    assert overhead.attempt(ROWS["isopo"], model, batch, 4, 2) == {"failure": "out of memory"}


def test_the_table_shows_verdicts_and_failures() -> None:
    case = {"row": "isopo", "hidden_size": 512, "length": 128, "num_samples": 64, "target": 1.07}
    times = {"lower_quartile": 1.0, "upper_quartile": 2.0, "peak_memory_ratio": 1.5}
    rows = [
        case | times | {"ratio": 1.07},
        case | times | {"ratio": 1.08},
        case | {"failure": "out of memory"},
    ]
    printed = io.StringIO()
    Console(width=120, file=printed).print(overhead.table_of(rows))
    lines = printed.getvalue().splitlines()[-3:]
    assert [line.split()[-1] for line in lines] == ["met", "missed", "memory"]
    assert "1.080 1.000-2.000 1.50 1.07" in " ".join(lines[1].split())


def run(script: str, *words: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *words, *SIZES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_overhead_script_runs(tmp_path: Path) -> None:
    path = tmp_path / "new" / "overhead.json"
    rows = ["reinforce", "isopo", "paper", "vmap-euclidean"]
    grid = ["--hidden-sizes", "64", "--lengths", "128", "--samples", "4", "--repeats", "2"]
    printed = run("overhead.py", *grid, "--json", str(path), "--rows", *rows)
    report = json.loads(path.read_text())
    assert {"date", "machine", "torch", "settings", "rows"} == report.keys()
    assert report["settings"]["vocab_size"] == 50
    assert [row["row"] for row in report["rows"]] == rows
    for row in report["rows"]:
        assert 0 < row["lower_quartile"] <= row["ratio"] <= row["upper_quartile"]
        assert row["reinforce_seconds"] > 0
        assert row["row"] in printed
    assert report["rows"][1]["num_samples"] == 4
    assert report["rows"][1]["target"] == 1.07
    assert ("met" in printed) != ("missed" in printed)


def test_profiles_of_a_row_and_of_plain_reinforce(capsys) -> None:
    words = ["--hidden-sizes", "64", "--lengths", "8", "--profile", "isopo", *SIZES]
    overhead.print_operators(overhead.options(words), Console())
    printed = capsys.readouterr().out
    assert printed.count("Self CPU time total") == 2
    assert "aten::mm" in printed


@pytest.mark.slow
def test_the_memory_script_runs(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    sizes = ["--hidden-size", "64", "--length", "64", "--samples", "4"]
    run("memory.py", *sizes, "--json", str(path), "--rows", "paper-natural")
    report = json.loads(path.read_text())
    assert {"date", "machine", "torch", "settings", "sections"} == report.keys()
    (row,) = report["sections"]["rules"]
    assert row["row"] == "paper-natural"
    assert row["ratio"] == row["growth_bytes"] / row["reinforce_growth_bytes"]
    assert row["growth_bytes"] > 3 * 50 * 64 * 4  # the head's gradients of three sequences


def test_the_peak_is_the_most_that_was_held() -> None:
    before = memory.reset_peak(CPU)
    held = torch.ones(2**25)
    size = held.numel() * held.element_size()
    del held
    grown = memory.peak(CPU) - before
    assert 0.95 * size < grown < 1.2 * size
    assert memory.peak(CPU) - memory.reset_peak(CPU) > 0.9 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_scripts_run_on_an_accelerator(tmp_path: Path, dtype: str) -> None:
    path, place = tmp_path / "figures.json", ["--device", "cuda", "--dtype", dtype]
    grid = ["--hidden-sizes", "128", "--lengths", "64", "--repeats", "2"]
    run("overhead.py", *grid, *place, "--json", str(path))
    for row in json.loads(path.read_text())["rows"]:
        assert row.get("peak_memory_ratio", 0) > 0, row
    sizes = ["--hidden-size", "128", "--length", "64", "--rows", "isopo", "paper"]
    run("memory.py", *sizes, *place, "--json", str(path))
    for row in json.loads(path.read_text())["sections"]["rules"]:
        assert row["ratio"] > 0


def test_loops_take_turns_and_their_failures_arrive() -> None:
    log: list[str] = []

    class Loop:
        def update(self) -> None:
            time.sleep(0)
            sum(range(200_000))

    def loop(name: str, steps: int) -> Callable[[turns.Turns], None]:
        def run(turn: turns.Turns) -> None:
            work = Loop()
            turn.measure(work, "update", is_update=name == "a")
            for _ in range(steps):
                work.update()
                log.append(name)
                turn.end_of_step()

        return run

    first, second = turns.Turns(loop("a", 9)), turns.Turns(loop("b", 1))
    assert not log
    of_first = first.step()
    of_second = second.step()
    assert 0 < of_first.update <= of_first.step
    assert of_second.update < of_second.step / 2  # what was measured there is no update
    first.step()
    assert log == ["a", "b", "a"]
    with pytest.raises(RuntimeError, match="ended before the benchmark"):
        second.step()
    first.close()
    assert log == ["a", "b", "a"]


@pytest.mark.slow
def test_engines_benchmark_runs(tmp_path: Path) -> None:
    path = tmp_path / "engines.json"
    words = ["--hidden-size", "64", *SIZES, "--num-sequences", "16", "--lengths", "3"]
    rows = ["trl-isopo", "local-grpo"]
    command = [sys.executable, ROOT / "benchmarks" / "engines.py", *words, "--repeats", "2"]
    subprocess.run([*command, "--rows", *rows, "--json", path], check=True)
    report = json.loads(path.read_text())
    assert [row["row"] for row in report["rows"]] == rows
    for row in report["rows"]:
        assert all(0 < value < 100 for value in row["step_over_trl_grpo"] + row["update"])


def test_training_steps_in_a_tiny_form(tmp_path: Path) -> None:
    """What `make gpu` runs on SmolLM2."""
    words = ["--model", "embedded", "--steps", "2", "--device", "cpu", "--num-prompts", "2"]
    words += ["--length", "3", "--algorithms", "grpo", "isopo", "--json", str(tmp_path / "x.json")]
    found = training.main(words, Console(file=io.StringIO()))
    assert [row["algorithm"] for row in found] == ["grpo", "isopo"]
    for row in found:
        assert row["steps"] == 2
        assert 0 < row["seconds_update"] < row["seconds_step"]
        assert row["peak_gib"] > 0.1
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["rows"] == found
    assert report["settings"]["steps"] == 2
