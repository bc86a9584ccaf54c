"""The command `proxstep toy`: its arguments, and what is wrong with them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from proxstep.errors import ProxstepError

SUMMARIES = {
    "saturation": "draw each objective's gradient against the confidence of a binary choice",
    "bandit": "compare every method's direction with the exact natural gradient",
}
DETAILS = {
    "saturation": """\
example:
  proxstep toy saturation --out outputs/saturation

Writes saturation.png, .svg, .csv (the curves) and .json (the table). Seconds on one core.
""",
    "bandit": """\
example:
  proxstep toy bandit --out outputs/bandit --seeds 5 --steps 64

Writes bandit.png, .svg, .csv (every update) and .json (the table). Ten seconds on one core.
""",
}


def add_toys(parser: argparse.ArgumentParser) -> None:
    """Add the toys and their options to the parser of `proxstep toy`."""
    toys = parser.add_subparsers(dest="toy", required=True)
    for name, summary in SUMMARIES.items():
        toy = toys.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=DETAILS[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        toy.add_argument(
            "--out", type=_folder, required=True, metavar="DIR", help="folder of the files"
        )
        if name == "bandit":
            toy.add_argument(
                "--seeds",
                type=int,
                default=5,
                metavar="N",
                help="instances, seeds 0 to N - 1 (default: %(default)s)",
            )
            toy.add_argument(
                "--steps",
                type=int,
                default=64,
                metavar="N",
                help="updates of each method (default: %(default)s)",
            )


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a folder")
    return Path(text)


def run_toy(arguments: argparse.Namespace, overrides: list[tuple[str, str]], console: Any) -> int:
    """Run a toy.

    Args:
        arguments: The parsed arguments.
        overrides: None, as a toy has no recipe.
        console: Where the table goes.

    Returns:
        The exit status.

    Raises:
        ProxstepError: A number is below 1, or the folder cannot be written.
    """
    del overrides
    numbers = {"--seeds": "seeds", "--steps": "steps"} if arguments.toy == "bandit" else {}
    for option, name in numbers.items():
        if getattr(arguments, name) < 1:
            raise ProxstepError(f"{option} must be at least 1, got {getattr(arguments, name)}")
    from proxstep.runs.folder import check_folder

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
