"""The `proxstep` command: train, eval, compare, diagnose, report, toy.

What needs torch is imported once nothing is wrong with what was typed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proxstep.cli.arguments import ENGINES, make_parser, split_keys
from proxstep.cli.first_steps import LIGHT
from proxstep.config.names import check_names, described_keys
from proxstep.config.reading import read_overrides, read_recipe
from proxstep.errors import ProxstepError

Overrides = list[tuple[str, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0 for success, 2 for a mistake in the input, 3 for a run that its guard stopped, 130 after
        Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if any("\0" in word for word in words):
            raise ProxstepError("an argument holds a NUL character, which no name has")
        own, overrides = split_keys(words)
        arguments, unexpected = make_parser().parse_known_args(own)
        if unexpected:
            raise ProxstepError(
                f"{unexpected[0]!r} is not expected here; see proxstep {arguments.command} --help"
            )
        if arguments.command in LIGHT:
            return LIGHT[arguments.command](arguments)
        for package in ("pydantic", "ruamel", "rich", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ProxstepError(f'{package} is missing: pip install "proxstep[train]"')
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=100)  # pipes and logs have no width: this one fits the tables
        return COMMANDS[arguments.command](arguments, overrides, console)
    except ProxstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"error: {error.filename!s:.200}: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


def _recipe(name: str, overrides: Overrides) -> Any:
    """Return a recipe; a name in it that does not exist is found before torch is imported."""
    found = read_recipe(name, overrides)
    check_names(*found)
    from proxstep.config.loading import resolve

    return resolve(*found)


def _train(arguments: Namespace, overrides: Overrides, console: Any) -> int:
    if arguments.keys:
        _print_keys(console)
        return 0
    if arguments.resume:
        given = (arguments.recipe, arguments.engine, {key for key, _ in overrides} - {"steps"})
        if any((*given, arguments.dry_run, arguments.print_command, arguments.overwrite)):
            raise ProxstepError(
                "--resume continues a run by its own recipe: give nothing else but --steps"
            )
        from proxstep.runs.console import make_progress
        from proxstep.runs.folder import RunFolder

        progress = make_progress(console)
        folder = arguments.resume
        if overrides:
            RunFolder(folder).extend(overrides)
        name = _engine_of(folder)
        if name == "trl":  # it makes options of what an external_lib has registered by then
            from proxstep.training.lifecycle import load_run_recipe

            load_run_recipe(folder)
        engine = _engine(name)
        begin = lambda: engine.resume(folder, progress)  # noqa: E731
    else:
        if not arguments.recipe:
            raise ProxstepError("which recipe? Try proxstep train arithmetic")
        name = arguments.engine or "local"
        if arguments.print_command and name == "local":
            raise ProxstepError(
                "--print-command is for the engines that can run without us: add --engine trl or "
                "--engine verl"
            )
        recipe = _recipe(arguments.recipe, overrides)
        from proxstep.config.loading import dump_recipe
        from proxstep.runs.console import make_progress

        progress = make_progress(console)
        engine = _engine(name)
        if arguments.dry_run or arguments.print_command:
            command = "" if name == "local" else engine.command(recipe)  # or says what it cannot do
            text = command if arguments.print_command else dump_recipe(recipe)
            if name == "local" and arguments.dry_run:
                from proxstep.training.memory import memory_note

                text += memory_note(recipe)
            console.out(text, end="", highlight=False)
            return 0
        folder = recipe.output_dir
        begin = lambda: engine.train(recipe, progress, overwrite=arguments.overwrite)  # noqa: E731
    try:
        status = begin()
    finally:
        progress.end()
    if status == "interrupted":
        console.out(
            f"interrupted; the run is complete up to here: proxstep train --resume {folder}"
        )
        return 130
    if status == "stopped":
        console.out(f"stopped by the guard; the last good checkpoint is the newest in {folder}")
        return 3
    console.out(f"done: {folder}")
    return 0


def _engine(name: str) -> Any:
    """Return an engine's module."""
    return importlib.import_module(ENGINES[name])


def _engine_of(folder: str) -> str:
    """Return the name of the engine that began a run."""
    from proxstep.runs.folder import RunFolder

    name = RunFolder(folder).info().get("engine", "local")
    if name not in ENGINES:
        raise ProxstepError(
            f"{folder}: its run.json says engine {name!r}, which is none of {', '.join(ENGINES)}"
        )
    return name


def _to_evaluate(target: str, overrides: Overrides, note: Any) -> tuple[Any, Path | None]:
    """Return the recipe and the checkpoint that `eval` is given, None for the recipe's model."""
    folder = Path(target)
    if not folder.is_dir() and folder.suffix != ".gguf":
        return _recipe(target, overrides), None
    above = folder.absolute().parent
    places = (folder, above.parent) if above.name == "checkpoints" else (folder,)
    run = next((place for place in places if (place / "recipe.yaml").is_file()), None)
    if run is None and (folder.suffix == ".gguf" or (folder / "config.json").is_file()):
        from proxstep.config.loading import resolve

        changes = read_overrides(overrides)
        data = {"algorithm": "reinforce", "model": {"name": str(folder.absolute())}}
        check_names(data, changes, target)
        return resolve(data, changes, target), None
    if run is None:
        raise ProxstepError(
            f"{target}: not a run folder, it has no recipe.yaml, nor a model's, it has no "
            "config.json"
        )
    recipe = _recipe(str(run / "recipe.yaml"), overrides)
    from proxstep.runs.checkpoint import damage, latest_checkpoint

    if run == folder:
        return recipe, latest_checkpoint(folder, note)
    if complaint := damage(folder):
        raise ProxstepError(f"{folder} is damaged: {complaint}; name another checkpoint of its run")
    return recipe, folder


def _eval(arguments: Namespace, overrides: Overrides, console: Any) -> int:
    recipe, checkpoint = _to_evaluate(arguments.target, overrides, console.out)
    from proxstep.runs.console import make_progress
    from proxstep.runs.folder import check_file
    from proxstep.training import lifecycle
    from proxstep.training.evaluation import truncation_note

    if arguments.output:
        check_file(arguments.output, "--output")
    progress = make_progress(console)
    try:
        result, scores, validation = lifecycle.evaluate(recipe, checkpoint, progress)
        baselines = lifecycle.baselines_of(recipe, validation, progress)
    finally:
        progress.end()
    console.out(
        f"greedy score {result.score:.4f} +- {result.standard_error:.4f} (standard error) on "
        f"{len(validation)} prompts of {recipe.task.name}, mean length {result.mean_length:.1f} "
        f"tokens, {checkpoint or recipe.model.name}"
    )
    if scores:
        console.out(
            ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            + f" of samples at temperature {recipe.evaluation.temperature:g}"
        )
    narrow = result.narrowness
    console.out(
        f"most frequent answer {narrow.answer!r}: {narrow.share:.0%} of the completions; "
        f"{narrow.without:.0%} have no answer; {result.clipped_ratio:.0%} were cut off"
    )
    if note := truncation_note(result.clipped_ratio, recipe.rollout.max_completion_length):
        console.out(note)
    for line in baselines.lines() if baselines else ():
        console.out(line)
    if arguments.output:
        with arguments.output.open("w", encoding="utf-8") as file:
            for row in result.rows(validation):
                file.write(json.dumps(row) + "\n")
    return 0


def _compare(arguments: Namespace, overrides: Overrides, console: Any) -> int:
    from proxstep.lab.arms import Design

    data, changes, source = read_recipe(arguments.recipe, overrides)
    design = Design.of(data, source)
    names = design.names(arguments.algorithms)
    library = changes.get("external_lib", data.get("external_lib"))
    for name in names:
        part = design.part(name)
        if name in design.arms:
            check_names({"external_lib": library}, part, f"{source}: compare.arms.{name}")
        check_names(data, {**changes, "algorithm": part["algorithm"]}, source)
    from proxstep.lab.compare import clear, run_plan
    from proxstep.lab.plan import parse_budget
    from proxstep.runs.console import make_progress
    from proxstep.runs.folder import check_folder
    from proxstep.runs.lock import locked
    from proxstep.training import lifecycle
    from proxstep.training.models import pick_device

    plan = _plan(arguments, overrides, names, design)
    budget = parse_budget(arguments.budget) if arguments.budget else None
    output: Path = arguments.output
    check_folder(output, "--output")
    _check_files(arguments)
    progress = make_progress(console)
    with locked(output, "--output"):
        try:
            for variant in plan.variants:
                lifecycle.check(variant.recipe)
                if plan.engine != "local":
                    _engine(plan.engine).command(variant.recipe)  # or says what it cannot do
            if arguments.overwrite:
                clear(output)
            plan = plan.continuing(output)
            for recipe in plan.distinct_models():  # once, before all runs would do it
                lifecycle.prepared_source(recipe, progress)
            plan.write(output)
        finally:
            progress.end()
        on_cpu = pick_device(plan.variants[0].recipe.device).type == "cpu"
        num_parallel = arguments.jobs or (os.cpu_count() or 1 if on_cpu else 1)
        paths = [str(path) for path in run_plan(plan, output, num_parallel, console, budget)]
    return _summarize(paths, output / "report.html", arguments, console)


def _plan(arguments: Namespace, overrides: Overrides, names: list[str], design: Any) -> Any:
    from proxstep.lab.plan import Plan, parse_vary

    for name, least in (("seeds", 1), ("jobs", 1), ("add_seeds", 0)):
        number = getattr(arguments, name)
        if number is not None and number < least:
            option = name.replace("_", "-")
            raise ProxstepError(f"--{option} must be at least {least}, got {number}")
    return Plan.of(
        arguments.recipe,
        overrides,
        names,
        {**design.vary, **parse_vary(arguments.vary)},
        (arguments.seeds or design.seeds) + arguments.add_seeds,
        halving=arguments.budget is not None,
        engine=arguments.engine,
        design=design,
    )


def _report(arguments: Namespace, overrides: Overrides, console: Any) -> int:
    del overrides
    return _summarize(arguments.runs, arguments.output, arguments, console)


def _diagnose(arguments: Namespace, overrides: Overrides, console: Any) -> int:
    from proxstep.runs.folder import RunFolder
    from proxstep.runs.reading import read_rows

    del overrides
    folder = RunFolder(arguments.run_folder)
    if arguments.step is not None or read_rows(folder.diagnostics):
        record = folder.find_diagnostics(arguments.step)
        console.out(f"step {record['step']}\n{record['summary']}\n", highlight=False)
    if found := folder.noise_split():
        text = f"Over {found[0]} steps: {found[1].sentence()}\n"
        console.out(textwrap.fill(text, 100) + "\n", highlight=False)
    console.out(textwrap.fill(str(folder.verdict()), 100), highlight=False)
    return 0


def _toy(arguments: Namespace, overrides: Overrides, console: Any) -> int:
    from proxstep.runs.folder import check_folder

    del overrides
    numbers = ("seeds", "steps") if arguments.toy == "bandit" else ()
    for name in numbers:
        if getattr(arguments, name) < 1:
            raise ProxstepError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    folder: Path = arguments.out
    check_folder(folder, "--out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ProxstepError(f"--out {folder} cannot be written; choose another folder")
    from proxstep.lab.toy_report import report_bandit, report_saturation

    try:
        if arguments.toy == "bandit":
            report_bandit(folder, console, num_seeds=arguments.seeds, steps=arguments.steps)
        else:
            report_saturation(folder, console)
    except OSError as error:
        raise ProxstepError(
            f"{error.filename} cannot be written ({error.strerror}); choose another --out"
        ) from None
    console.out(f"done: {folder}")
    return 0


def _summarize(paths: Sequence[str], page: Path, arguments: Namespace, console: Any) -> int:
    from proxstep.lab.comparison import compare_runs
    from proxstep.lab.panels import drawn_runs
    from proxstep.lab.plots import overview_figure
    from proxstep.lab.report import write_report
    from proxstep.lab.summary import comparison_table, summarize
    from proxstep.lab.tables import comma_separated, markdown, terminal_tables
    from proxstep.lab.verdict import verdict
    from proxstep.runs.folder import check_file
    from proxstep.runs.reading import find_runs

    check_file(page, "--output")
    _check_files(arguments)
    runs = find_runs(paths)
    comparison = compare_runs(runs)
    console.print(verdict(comparison), style="bold", highlight=False, markup=False)
    console.print(comparison_table(summarize(comparison.runs)))
    for table in terminal_tables(comparison):
        console.print()
        console.print(table)
    for note in comparison.notes:
        console.out(note)
    write_report(runs, page)
    console.out(f"report: {page}")
    for path, text in ((arguments.markdown, markdown), (arguments.csv, comma_separated)):
        if path:
            path.write_text(text(comparison), encoding="utf-8")
            console.out(f"table: {path}")
    if arguments.figure:
        overview_figure(drawn_runs(comparison)).savefig(arguments.figure, dpi=160)
        console.out(f"figure: {arguments.figure}")
    return 0


def _check_files(arguments: Namespace) -> None:
    from proxstep.runs.folder import check_file

    figure = arguments.figure
    if figure and figure.suffix not in FIGURE_TYPES:
        raise ProxstepError(f"--figure {figure} must end in one of {', '.join(FIGURE_TYPES)}")
    for name in ("figure", "markdown", "csv"):
        if path := getattr(arguments, name):
            check_file(path, f"--{name}")


FIGURE_TYPES = (".png", ".svg", ".pdf")


def _print_keys(console: Any) -> None:
    for key, kind, default, text in described_keys():
        console.out(f"--{key}  ({kind}; default {default})", highlight=False)
        console.out(textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    "))


COMMANDS = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "diagnose": _diagnose,
    "report": _report,
    "toy": _toy,
}
