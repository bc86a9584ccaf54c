"""What can be typed after `proxstep`: commands, their options, and the keys of a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from proxstep.config.names import described_keys, task_names
from proxstep.errors import ProxstepError, did_you_mean

ENGINES = {
    "local": "proxstep.training.lifecycle",
    "trl": "proxstep.engines.trl.launch",
    "verl": "proxstep.engines.verl.launch",
}
"""Modules with `train` and `resume`, by the engine's name; but for local also with `command`. The
others need the package of their name.
"""
SHELLS = ("bash", "zsh")
"""What `completion` knows."""
TAKES_KEYS = {"train", "eval", "compare"}
"""The commands after which any key of a recipe can follow."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are `ProxstepError`s, and which knows what its options take.

    Attributes:
        takes_value: For each option whether a value follows it.
        commands: The subcommands' parsers by name, where it has any.
    """

    def __init__(self, **options: Any) -> None:
        self.takes_value: dict[str, bool] = {}
        self.commands: dict[str, Parser] = {}
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """Add an argument, as argparse does."""
        action = super().add_argument(*names, **options)
        self.takes_value |= dict.fromkeys(action.option_strings, action.nargs != 0)
        return action

    def add_commands(self, dest: str, summaries: dict[str, str]) -> None:
        """Add one subcommand for each name and its summary."""
        group = self.add_subparsers(dest=dest, required=True)
        for name, summary in summaries.items():
            text = EXAMPLES[name if dest == "command" else f"{dest} {name}"]
            self.commands[name] = group.add_parser(
                name,
                help=summary,
                description=summary[0].upper() + summary[1:] + ".",
                epilog=text + ("\n" + OVERRIDES if name in TAKES_KEYS else ""),
            )

    def error(self, message: str) -> NoReturn:
        """Raise the complaint as a `ProxstepError`."""
        raise ProxstepError(f"{message}; see {self.prog} --help")


def split_keys(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return a command's own arguments, and the recipe keys with their values among the others."""
    if not argv or argv[0] not in TAKES_KEYS:
        return argv, []
    takes_value = make_parser().commands[argv[0]].takes_value
    own, pairs, waiting = [argv[0]], [], argv[1:]
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        if option in takes_value or not word.startswith("--"):
            own.append(word)
            if takes_value.get(option) and not equals and waiting:
                own.append(waiting.pop(0))
            continue
        if not equals:
            if not waiting:
                keys = {key.partition(" ")[0] for key, _, _, _ in described_keys()}
                guess = "" if word[2:] in keys else did_you_mean(word, takes_value)
                raise ProxstepError(
                    f"{word} has no value{guess}; recipe keys are written --key value"
                )
            value = waiting.pop(0)
        pairs.append((option[2:], value))
    return own, pairs


def make_parser() -> Parser:
    """Return the parser of the whole command line, without the keys of recipes."""
    parser = Parser(
        prog="proxstep",
        description="Proximal policy steps for language models: ISOPO, OPO and their baselines.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="the versions of proxstep, torch and engines"
    )
    parser.add_commands(
        "command",
        {
            "train": "train a policy by a recipe",
            "eval": "score a checkpoint or a model greedily",
            "compare": "train several algorithms on one recipe and report",
            "diagnose": "say whether a run learns, and what the geometry did to its gradient",
            "report": "write a page with the curves of runs",
            "toy": "compute a small experiment exactly",
            "recipes": "list the recipes that come with proxstep",
            "init": "write a commented recipe for a task",
            "doctor": "say what is installed, and what each engine would miss",
            "completion": "print what makes a shell complete these commands",
        },
    )
    commands = parser.commands
    _add_train(commands["train"])
    evaluate = commands["eval"]
    evaluate.add_argument("target", help="a run, a checkpoint, a model's folder, or a recipe")
    evaluate.add_argument("--output", type=Path, help="write the completions to this JSONL file")
    _add_compare(commands["compare"])
    diagnose = commands["diagnose"]
    diagnose.add_argument("run_folder", metavar="RUN", help="a run folder")
    diagnose.add_argument("--step", type=int, help="of that step (default: the last measured)")
    report = commands["report"]
    report.add_argument("runs", nargs="+", help="run folders, or folders of them")
    report.add_argument(
        "--output", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    _add_files(report)
    _add_toys(commands["toy"])
    init = commands["init"]
    init.add_argument("task", choices=task_names(), help="task.name; table for data of your own")
    init.add_argument("--output", type=Path, metavar="FILE", help="default: TASK.yaml, here")
    commands["completion"].add_argument("shell", choices=SHELLS)
    return parser


class _Version(argparse.Action):
    """Prints the versions; they take time to find, so nothing else looks for them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from proxstep.cli.installed import versions

        sys.stdout.write(f"{versions()}\n")
        parser.exit()


def _add_train(train: Parser) -> None:
    train.add_argument("recipe", nargs="?", help="a YAML file, or a name of proxstep recipes")
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
    train.add_argument(
        "--resume",
        metavar="RUN",
        help="continue a run from its newest checkpoint; with --steps N to more steps than it had",
    )
    train.add_argument(
        "--overwrite", action="store_true", help="delete the run in the output folder"
    )
    train.add_argument("--keys", action="store_true", help="list every key of a recipe and exit")


def _add_compare(compare: Parser) -> None:
    compare.add_argument("recipe", help="a YAML file, or a name of proxstep recipes")
    compare.add_argument(
        "--algorithms",
        metavar="A,B",
        help="names of algorithms and of the recipe's arms (default: all of its arms)",
    )
    compare.add_argument(
        "--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the recipe's, or 1)"
    )
    compare.add_argument(
        "--add-seeds", type=int, default=0, metavar="K", help="K more: seeds 0 to N + K - 1"
    )
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="also run every algorithm with each of these values of a key; may be given again",
    )
    compare.add_argument(
        "--budget",
        metavar="TIME",
        help="such as 2h or 90m: choose among the varied values by successive halving in that time",
    )
    compare.add_argument(
        "--engine",
        choices=["local", "trl"],
        default="local",
        help="what runs the training (default: local)",
    )
    compare.add_argument(
        "--jobs", type=int, help="runs at a time (default: the number of cores, on a CPU)"
    )
    compare.add_argument(
        "--output", type=Path, default=Path("outputs/compare"), help="folder of the runs"
    )
    compare.add_argument("--overwrite", action="store_true", help="delete the runs in that folder")
    _add_files(compare)


def _add_files(command: Parser) -> None:
    command.add_argument(
        "--figure", type=Path, help="also draw the curves to this PNG, SVG or PDF file"
    )
    command.add_argument("--markdown", type=Path, help="also write the tables to this file")
    command.add_argument("--csv", type=Path, help="also write every figure to this file")


def _add_toys(toy: Parser) -> None:
    toy.add_commands(
        "toy",
        {
            "saturation": "draw each objective's gradient against the confidence of a binary "
            "choice",
            "bandit": "compare every method's direction with the exact natural gradient",
        },
    )
    for command in toy.commands.values():
        command.add_argument(
            "--out", type=_folder, required=True, metavar="DIR", help="folder of the files"
        )
    bandit = toy.commands["bandit"]
    bandit.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="instances, seeds 0 to N - 1 (default: %(default)s)",
    )
    bandit.add_argument(
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


OVERRIDES = """\
Any key of the recipe can follow as --key value, with dots for sections and YAML for values:
  --algorithm opo --objective.alpha 0.2 --optimizer.learning_rate 1e-5 --rollout.num_generations 16
`proxstep train --keys` lists all of them with their defaults.
"""
EXAMPLES = {
    "recipes": """\
examples:
  proxstep recipes
""",
    "init": """\
examples:
  proxstep init arithmetic
  proxstep init table --output mine.yaml
""",
    "doctor": """\
examples:
  proxstep doctor
""",
    "completion": """\
examples:
  proxstep completion bash >> ~/.bashrc
  proxstep completion zsh >> ~/.zshrc
""",
    "train": """\
examples:
  proxstep train arithmetic
  proxstep train arithmetic --algorithm isopo-natural --output_dir runs/natural
  proxstep train gsm8k-isopo --model.name ./my-model --dry-run
  proxstep train --resume runs/natural               # go on after Ctrl-C
  proxstep train --resume runs/natural --steps 80    # and after its end
  proxstep train arithmetic --engine trl
  proxstep train arithmetic --engine trl --print-command > train.py

The run folder holds recipe.yaml (every value resolved), metrics.jsonl, samples.jsonl and
checkpoints/, whose newest `transformers.AutoModelForCausalLM.from_pretrained` loads.
Ctrl-C stops after the current step and writes a checkpoint.
""",
    "eval": """\
examples:
  proxstep eval runs/arithmetic                          # the newest checkpoint of a run
  proxstep eval runs/arithmetic/checkpoints/step-000040  # one that is named
  proxstep eval runs/arithmetic --task.difficulty 4      # the same on something harder
  proxstep eval gsm8k-isopo                              # a recipe's model, before any training
  proxstep eval ./my-model --task.name gsm8k             # a model's folder
""",
    "compare": """\
examples:
  proxstep compare arithmetic --algorithms reinforce,grpo,isopo,opo --seeds 3
  proxstep compare arithmetic --algorithms isopo,isopo+opo --seeds 5 --steps 80
  proxstep compare arithmetic --algorithms grpo,opo --seeds 5 \\
    --vary optimizer.learning_rate=3e-5,1e-4,3e-4

A recipe's section `compare` can name arms, settings of one algorithm or several; then --algorithms
may be left out (docs/compare.md).
The output folder holds the plan, plan.yaml. The same command again goes on where a comparison was
stopped; with more seeds, algorithms or values it extends the plan. docs/compare.md has the rest.
Every algorithm gets the same recipe, prompts and seeds. Settings of one algorithm alone, such as a
learning rate tuned for it, go under the recipe's key per_algorithm; the report says what differs.
""",
    "diagnose": """\
examples:
  proxstep train arithmetic-isopo --geometry.diagnose_every 10
  proxstep diagnose runs/arithmetic-isopo

docs/diagnostics.md says what the figures mean; diagnostics.jsonl holds them all.
""",
    "report": """\
examples:
  proxstep report outputs/demo                              # a folder of runs
  proxstep report runs/a runs/b --output ab.html --figure ab.png
""",
    "toy": """\
examples:
  proxstep toy saturation --out outputs/saturation
  proxstep toy bandit --out outputs/bandit --seeds 5 --steps 64

docs/toy.md says what they show; both take seconds.
""",
    "toy saturation": """\
example:
  proxstep toy saturation --out outputs/saturation

Writes saturation.png, .svg, .csv (the curves) and .json (the table). Seconds on one core.
""",
    "toy bandit": """\
example:
  proxstep toy bandit --out outputs/bandit --seeds 5 --steps 64

Writes bandit.png, .svg, .csv (every update) and .json (the table). Ten seconds on one core.
""",
}
