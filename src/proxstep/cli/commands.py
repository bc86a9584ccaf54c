"""The `proxstep` command: train, eval, compare, diagnose, report, toy."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from proxstep import __version__
from proxstep.cli.help import EXAMPLES, OVERRIDES
from proxstep.errors import ProxstepError
from proxstep.lab.toy import add_toys, run_toy


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise ProxstepError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0 for success, 2 for a mistake in the input, 130 after Ctrl-C.
    """
    try:
        own, overrides = _split(list(sys.argv[1:] if argv is None else argv))
        arguments, unexpected = _parser().parse_known_args(own)
        if unexpected:
            raise ProxstepError(
                f"{unexpected[0]!r} is not expected here; see proxstep {arguments.command} --help"
            )
        for package in ("pydantic", "ruamel", "rich", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ProxstepError(f'{package} is missing: pip install "proxstep[train]"')
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console = Console(width=100)  # pipes and logs have no width: this one fits the tables
        return arguments.run(arguments, overrides, console)
    except ProxstepError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a command's own arguments, and the recipe keys with their values among the others."""
    if not argv or argv[0] not in TAKES_KEYS:
        return argv, []
    commands: Any = _parser()._subparsers
    known = commands._group_actions[0].choices[argv[0]]._option_string_actions
    own, pairs, waiting = [argv[0]], [], argv[1:]
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        if option in known or not word.startswith("--"):
            own.append(word)
            if option in known and not equals and known[option].nargs != 0 and waiting:
                own.append(waiting.pop(0))
            continue
        if not equals:
            if not waiting:
                raise ProxstepError(f"{word} has no value; recipe keys are written --key value")
            value = waiting.pop(0)
        pairs.append((option[2:], value))
    return own, pairs


ENGINES = {
    "local": "proxstep.training.lifecycle",
    "trl": "proxstep.engines.trl.launch",
    "verl": "proxstep.engines.verl.launch",
}
"""Modules with `train` and `resume`, by the engine's name; but for local also with `command`. The
others need the package of their name.
"""
TAKES_KEYS = {"train", "eval", "compare"}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="proxstep",
        description="Proximal policy steps for language models: ISOPO, OPO and their baselines.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"proxstep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    _add_train(commands)
    evaluate = _add_command(commands, "eval", "score a checkpoint or a model greedily", _eval)
    evaluate.add_argument("target", help="a run folder, or a recipe")
    evaluate.add_argument("--output", type=Path, help="write the completions to this JSONL file")
    _add_compare(commands)
    diagnose = _add_command(
        commands, "diagnose", "say what the geometry did to the gradient of a run", _diagnose
    )
    diagnose.add_argument("run_folder", metavar="RUN", help="a run folder")
    diagnose.add_argument("--step", type=int, help="of that step (default: the last measured)")
    report = _add_command(commands, "report", "write a page with the curves of runs", _report)
    report.add_argument("runs", nargs="+", help="run folders, or folders of them")
    report.add_argument(
        "--output", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    _add_figure(report)
    add_toys(_add_command(commands, "toy", "compute a small experiment exactly", run_toy))
    return parser


def _add_train(commands: Any) -> None:
    train = _add_command(commands, "train", "train a policy by a recipe", _train)
    train.add_argument("recipe", nargs="?", help="a YAML file; recipes/ has examples")
    train.add_argument(
        "--engine",
        choices=list(ENGINES),
        help="what runs the training (default: local)",
    )
    train.add_argument(
        "--print-command",
        action="store_true",
        help="print what runs the recipe without us: a script (trl), a command line (verl)",
    )
    train.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe")
    train.add_argument("--resume", metavar="RUN", help="continue a run from its newest checkpoint")
    train.add_argument(
        "--overwrite", action="store_true", help="delete the run in the output folder"
    )
    train.add_argument("--keys", action="store_true", help="list every key of a recipe and exit")


def _add_compare(commands: Any) -> None:
    compare = _add_command(
        commands, "compare", "train several algorithms on one recipe and report", _compare
    )
    compare.add_argument("recipe", help="a YAML file")
    compare.add_argument("--algorithms", required=True, help="names, separated by commas")
    compare.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)"
    )
    compare.add_argument(
        "--jobs", type=int, help="runs at a time (default: the number of cores, on a CPU)"
    )
    compare.add_argument(
        "--output", type=Path, default=Path("outputs/compare"), help="folder of the runs"
    )
    compare.add_argument("--overwrite", action="store_true", help="delete the runs in that folder")
    _add_figure(compare)


def _add_figure(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--figure", type=Path, help="also draw the curves to this PNG, SVG or PDF file"
    )


def _add_command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES[name] + ("\n" + OVERRIDES if name in TAKES_KEYS else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def _train(arguments: argparse.Namespace, overrides: list[tuple[str, str]], console: Any) -> int:
    from proxstep.config.loading import dump_recipe, load_recipe
    from proxstep.runs.console import make_progress

    if arguments.keys:
        _print_keys(console)
        return 0
    progress = make_progress(console)
    if arguments.resume:
        given = (arguments.recipe, overrides, arguments.engine)
        if any((*given, arguments.dry_run, arguments.print_command, arguments.overwrite)):
            raise ProxstepError("--resume continues a run by its own recipe: give nothing else")
        folder = arguments.resume
        engine = _engine(_engine_of(folder))
        begin = lambda: engine.resume(folder, progress)  # noqa: E731
    else:
        if not arguments.recipe:
            raise ProxstepError("which recipe? Try proxstep train recipes/arithmetic.yaml")
        name = arguments.engine or "local"
        if arguments.print_command and name == "local":
            raise ProxstepError(
                "--print-command is for the engines that can run without us: add --engine trl or "
                "--engine verl"
            )
        recipe = load_recipe(arguments.recipe, overrides)
        engine = _engine(name)
        if arguments.dry_run or arguments.print_command:
            command = "" if name == "local" else engine.command(recipe)  # or says what it cannot do
            text = command if arguments.print_command else dump_recipe(recipe)
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


def _eval(arguments: argparse.Namespace, overrides: list[tuple[str, str]], console: Any) -> int:
    from proxstep.config.loading import load_recipe
    from proxstep.runs.checkpoint import latest_checkpoint
    from proxstep.runs.console import make_progress
    from proxstep.runs.folder import check_file
    from proxstep.training import lifecycle

    checkpoint = None
    if Path(arguments.target).is_dir():
        lifecycle.load_run_recipe(arguments.target)
        recipe = load_recipe(Path(arguments.target) / "recipe.yaml", overrides)
        checkpoint = latest_checkpoint(Path(arguments.target))
    else:
        recipe = load_recipe(arguments.target, overrides)
    if arguments.output:
        check_file(arguments.output, "--output")
    progress = make_progress(console)
    try:
        result, validation = lifecycle.evaluate(recipe, checkpoint, progress)
    finally:
        progress.end()
    given = [reward for reward in result.rewards if reward is not None]
    error = statistics.stdev(given) / len(given) ** 0.5 if len(given) > 1 else float("nan")
    console.out(
        f"greedy score {result.score:.4f} +- {error:.4f} (standard error) on "
        f"{len(validation)} prompts of {recipe.task.name}, mean length {result.mean_length:.1f} "
        f"tokens, {checkpoint or recipe.model.name}"
    )
    if arguments.output:
        rows = zip(validation.examples, result.completions, result.rewards, strict=True)
        with arguments.output.open("w", encoding="utf-8") as file:
            for example, completion, reward in rows:
                row = {
                    "prompt": example.prompt,
                    "completion": completion,
                    "answer": example.answer,
                    "reward": reward,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return 0


def _compare(arguments: argparse.Namespace, overrides: list[tuple[str, str]], console: Any) -> int:
    from proxstep.config.loading import load_recipe
    from proxstep.lab.compare import check_output, plan, run_jobs
    from proxstep.runs.console import make_progress
    from proxstep.runs.folder import check_folder
    from proxstep.training import lifecycle
    from proxstep.training.models import model_source, pick_device

    names = [name.strip() for name in arguments.algorithms.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ProxstepError("--algorithms needs distinct names, separated by commas")
    for name, number in (("--seeds", arguments.seeds), ("--jobs", arguments.jobs)):
        if number is not None and number < 1:
            raise ProxstepError(f"{name} must be at least 1, got {number}")
    for key, _ in overrides:
        if key in COMPARED:
            raise ProxstepError(f"--{key} does not go with compare: use {COMPARED[key]}")
    recipes = [load_recipe(arguments.recipe, [*overrides, ("algorithm", name)]) for name in names]
    check_folder(arguments.output, "--output")
    _check_figure(arguments.figure)
    progress = make_progress(console)
    try:
        for recipe in recipes:
            lifecycle.check(recipe)
        check_output(arguments.output, overwrite=arguments.overwrite)
        model_source(recipes[0], progress.note)  # once, before the runs would all do it
    finally:
        progress.end()
    on_cpu = pick_device(recipes[0].device).type == "cpu"
    num_parallel = arguments.jobs or (os.cpu_count() or 1 if on_cpu else 1)
    jobs = plan(recipes, arguments.seeds, arguments.output)
    run_jobs(jobs, num_parallel, console)
    paths = [str(job.folder) for job in jobs]
    return _summarize(paths, arguments.output / "report.html", arguments.figure, console)


COMPARED = {"algorithm": "--algorithms", "seed": "--seeds", "output_dir": "--output"}


def _report(arguments: argparse.Namespace, overrides: list[tuple[str, str]], console: Any) -> int:
    del overrides
    return _summarize(arguments.runs, arguments.output, arguments.figure, console)


def _diagnose(arguments: argparse.Namespace, overrides: list[tuple[str, str]], console: Any) -> int:
    from proxstep.runs.folder import RunFolder

    del overrides
    record = RunFolder(arguments.run_folder).find_diagnostics(arguments.step)
    console.out(f"step {record['step']}\n{record['summary']}", highlight=False)
    return 0


def _summarize(paths: Sequence[str], page: Path, figure: Path | None, console: Any) -> int:
    from proxstep.lab.plots import overview_figure
    from proxstep.lab.report import comparison_table, summarize, write_report
    from proxstep.runs.folder import check_file
    from proxstep.runs.reading import fairness_notes, find_runs

    check_file(page, "--output")
    _check_figure(figure)
    runs = find_runs(paths)
    console.print(comparison_table(summarize(runs)))
    for note in fairness_notes(runs):
        console.out(note)
    write_report(runs, page)
    console.out(f"report: {page}")
    if figure:
        overview_figure(runs).savefig(figure, dpi=160)
        console.out(f"figure: {figure}")
    return 0


def _check_figure(path: Path | None) -> None:
    from proxstep.runs.folder import check_file

    if path is None:
        return
    if path.suffix not in FIGURE_TYPES:
        raise ProxstepError(f"--figure {path} must end in one of {', '.join(FIGURE_TYPES)}")
    check_file(path, "--figure")


FIGURE_TYPES = (".png", ".svg", ".pdf")


def _print_keys(console: Any) -> None:
    from proxstep.config.explain import describe_keys

    for key, kind, default, text in describe_keys():
        console.out(f"--{key}  ({kind}; default {default})", highlight=False)
        console.out(textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    "))
