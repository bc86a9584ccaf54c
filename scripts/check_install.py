"""Install a wheel with each of its extras into an empty environment, and try it.

    make dist
    python scripts/check_install.py dist/*.whl                    # all of them, one at a time
    python scripts/check_install.py dist/*.whl --extras none trl  # some
    python scripts/check_install.py dist/*.whl --resolve verl     # only look whether pip finds all

Environments lie in a temporary folder and are deleted. torch comes first and pinned, as in the
Makefile; what is tried runs outside the checkout, so that nothing of it is imported.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = tuple(sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
SECONDS = 900

NAMES = "import proxstep; [getattr(proxstep, name) for name in proxstep.__all__]"
"""Imports everything that is public, and with it torch."""


@dataclass(frozen=True)
class Trial:
    """A command in an environment.

    Attributes:
        words: The command; "python" and "proxstep" are the environment's.
        says: What its output must contain, as regular expressions.
        status: Its exit status.
        silent: Whether it may print no warning: nothing on the error stream.
    """

    words: tuple[str, ...]
    says: tuple[str, ...] = ()
    status: int = 0
    silent: bool = True


def readme_snippet() -> str:
    """Return the README's Python, which runs as pasted."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def _python(code: str, *options: str, silent: bool = True) -> Trial:
    return Trial(("python", *options, "-c", code), silent=silent)


def _ready(engine: str) -> Trial:
    return Trial(("proxstep", "doctor"), (rf"engine {engine}: ready",))


CORE = (
    _python(NAMES, "-W", "error"),
    _python(readme_snippet(), "-W", "error"),
    Trial(("proxstep", "--version"), (r"^proxstep \d+\.\d+\.\d+ \(torch \d",)),
    Trial(("proxstep", "doctor"), (r"^device auto: ",)),
    Trial(("proxstep", "recipes"), RECIPES),
)
DRY_RUN = ("proxstep", "train", "arithmetic", "--dry-run")
TRAIN = (*CORE, _ready("local"), Trial(DRY_RUN, (r"rollout:",)))
TRIALS: dict[str, tuple[Trial, ...]] = {
    "none": (*CORE, Trial(DRY_RUN, (r'pip install "proxstep\[train\]"',), status=2, silent=False)),
    "train": TRAIN,
    "trl": (
        *TRAIN,
        _ready("trl"),
        _python("from proxstep.engines.trl import IsopoTrainer, OpoTrainer", silent=False),
        Trial((*DRY_RUN, "--engine", "trl"), (r"rollout:",)),
    ),
    "smollm2": (*TRAIN, _python("import gguf", silent=False)),
    "bench": (*TRAIN, _python("import opacus", silent=False)),
    "docs": (*CORE, Trial(("python", "-m", "mkdocs", "--version"), ("mkdocs",), silent=False)),
}
"""By extra: what must work. verl and vllm ask for several GB; `--resolve` looks for them."""


def failure(trial: Trial, done: subprocess.CompletedProcess[str]) -> str:
    """Return what is wrong with a trial's outcome, or an empty text."""
    everything = done.stdout + done.stderr
    if done.returncode != trial.status:
        return f"status {done.returncode} instead of {trial.status}: {everything[-800:]}"
    missing = [text for text in trial.says if not re.search(text, everything, re.MULTILINE)]
    if missing:
        return f"does not say {missing[0]}: {everything[-800:]}"
    if trial.silent and done.stderr.strip():
        return f"prints on the error stream: {done.stderr[-800:]}"
    return ""


def run(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment's folder, far from the checkout."""
    program = str(folder / "bin" / words[0])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PROXSTEP_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [program, *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def pip(folder: Path, *words: str) -> None:
    """Install into an environment.

    Raises:
        SystemExit: If pip fails.
    """
    command = ("python", "-m", "pip", "install", "--disable-pip-version-check", "--no-compile")
    done = run((*command, *words), folder)
    if done.returncode:
        raise SystemExit(f"pip install {' '.join(words)} failed: {done.stderr[-2000:]}")


def environment_with(folder: Path, torch: str) -> None:
    """Make an environment with torch alone."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip(folder, "-q", f"torch=={torch}")


def tried(wheel: Path, extra: str, torch: str) -> list[str]:
    """Install the wheel with an extra, try it, and return what failed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environment_with(folder, torch)
        pip(folder, "-q", str(wheel) if extra == "none" else f"{wheel}[{extra}]")
        outcomes = [(trial, failure(trial, run(trial.words, folder))) for trial in TRIALS[extra]]
    return [f"  {' '.join(trial.words)[:100]}\n    {why}" for trial, why in outcomes if why]


def resolved(wheel: Path, extra: str, torch: str) -> list[str]:
    """Let pip look for an extra's packages without installing them, and return why it cannot."""
    with tempfile.TemporaryDirectory() as temporary:
        environment_with(Path(temporary), torch)
        try:
            pip(Path(temporary), "-q", "--dry-run", f"{wheel}[{extra}]")
        except SystemExit as error:
            return [f"  {error}"]
    return []


def main() -> int:
    """Print a line for each extra; the status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=lambda text: Path(text).resolve(strict=True))
    parser.add_argument("--extras", nargs="*", choices=TRIALS, help="all by default")
    parser.add_argument("--resolve", nargs="*", default=(), metavar="EXTRA")
    parser.add_argument("--torch", default="2.13.0")
    arguments = parser.parse_args()
    extras = arguments.extras or ([] if arguments.resolve else list(TRIALS))
    work = [(extra, tried, f"{len(TRIALS[extra])} trials") for extra in extras]
    work += [(extra, resolved, "resolved only") for extra in arguments.resolve]
    failed = False
    for extra, check, what in work:
        begun = time.monotonic()
        found = check(arguments.wheel, extra, arguments.torch)
        verdict = "FAILED" if found else "ok"
        print(f"{extra:8} {verdict:6} {what}, {time.monotonic() - begun:.0f} s", flush=True)
        print("\n".join(found), end="\n" if found else "", flush=True)
        failed |= bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
