"""Record short training runs to the bit, or check that changed code still reproduces them.

    git worktree add /tmp/old main                        # the code before the change
    python /tmp/old/scripts/golden.py --write runs        # runs/ENGINE-CASE.json
    python scripts/golden.py --check runs                 # exit status 1 if anything differs
    python scripts/golden.py --check runs --engines local --algorithms gspo,isopo

For a change that is meant to change no number. Each case is ten steps of recipes/arithmetic.yaml,
made small: 64 completions a step, two minibatches, two passes, so that ratios leave 1 and clipping
happens. A file holds every metric of every step that is not a time or an amount of memory, with
all digits, and a checksum of the final weights.

Only the command line and the files of the run folder are used, so the script does not care where
the code lies. No recording is kept in the repository: another processor or release of torch rounds
differently, and the embedded model's warm-up ends elsewhere, so that runs are equal on the machine
that recorded them alone (its machine.json says which). verl is left out: responses reach its
trainer in any order, and two runs of one recipe differ from the first gradient on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from proxstep import PRESETS
from proxstep.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "arithmetic.yaml"

OBJECTIVES, RULES = tuple(ALGORITHMS), tuple(rule for rule in PRESETS if rule != "reinforce")
NAMES = (*OBJECTIVES, *RULES, "isopo+opo")

OPTIONS = {
    "steps": 10,
    "seed": 0,
    "device": "cpu",
    "task.num_validation": 64,
    "rollout.num_prompts": 8,
    "update.num_minibatches": 2,
    "update.num_iterations": 2,
    "evaluation.every": 5,
    "evaluation.num_probe_prompts": 16,
}
MICROBATCH = {"update.microbatch_size": 16}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{preset}-microbatch": (preset, MICROBATCH) for preset in RULES},
    "isopo+opo-microbatch": ("isopo+opo", MICROBATCH),
    "isopo-own": ("isopo", {**MICROBATCH, "geometry.overlap_source": "microbatch"}),
    "isopo-trailing": ("isopo", {**MICROBATCH, "geometry.fisher_denominator": "trailing"}),
    "isopo-sequences": ("isopo", {"geometry.fisher": "sequences"}),
    "isopo-chunked": ("isopo", {"model.head": "chunked"}),
    "isopo-lora": ("isopo", {"model.lora": "{rank: 4}"}),
    "isopo-diagnosed": ("isopo", {"geometry.diagnose_every": 5}),
    "grpo-kl": ("grpo", {"regularizer.kl_coef": 0.1, "regularizer.entropy_coef": 0.01}),
    "dapo-dynamic": ("dapo", {"rollout.dynamic_sampling_max_batches": 3}),
    "opo-adaptive": ("opo", {"objective.adaptive_tau": "true"}),
}
"""Other paths through the code: a case's name, its algorithm, and what it adds to OPTIONS."""

LOCAL = {**{name: (name, {}) for name in NAMES}, **VARIANTS}
CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "local": LOCAL,
    "trl": {
        name: LOCAL[name]
        for name in (*NAMES, "isopo-microbatch")
        if name != "dro"  # which TRL has not
    },
}
"""By engine: a case's name, its algorithm and its own options."""

NOT_REPEATABLE = re.compile(r"(^|_|/)(seconds|time|date|memory|mib|per_second)(_|/|$)")
"""Names of what depends on the clock or the machine's state."""


def run_case(engine: str, algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what is compared.

    Args:
        engine: local or trl.
        algorithm: The recipe's.
        options: Keys of the recipe besides OPTIONS.

    Returns:
        "steps", a list of dictionaries without what was not measured, and "weights"; where the run
        measured the geometry, "diagnostics" too.

    Raises:
        RuntimeError: With the end of the output, if the run fails.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        keys = {**OPTIONS, **options, "algorithm": algorithm, "output_dir": folder}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "proxstep", "train", str(RECIPE), "--engine", engine]
        environment = {
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [*command, *words],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{engine} {algorithm} {options}:\n{done.stdout[-3000:]}")
        return read_run(Path(folder))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what is compared of a finished run's folder."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = {"steps": [_repeatable(json.loads(line)) for line in lines]}
    weights = sorted(folder.rglob("*.safetensors"))
    if weights:
        found["weights"] = _checksum(weights)
    diagnostics = folder / "diagnostics.jsonl"
    if diagnostics.exists():
        found["diagnostics"] = hashlib.sha256(diagnostics.read_bytes()).hexdigest()
    return found


def _repeatable(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if value is not None and not NOT_REPEATABLE.search(name)
    }


def _checksum(paths: list[Path]) -> str:
    """Return the SHA-256 of all tensors, with names, types and shapes, in the names' order."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    for path in paths:
        with safe_open(path, framework="np") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name)
                digest.update(f"{name} {value.dtype} {value.shape}".encode())
                digest.update(value.tobytes())
    return digest.hexdigest()


def first_difference(golden: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Return where a run leaves the recorded one, in words; None where they are equal."""
    pairs = zip(golden["steps"], found["steps"], strict=False)
    for number, (expected, measured) in enumerate(pairs):
        for name in sorted(expected.keys() | measured.keys()):
            values = [repr(record.get(name, "absent")) for record in (expected, measured)]
            if values[0] != values[1]:  # repr, so that NaN equals NaN and -0.0 is not 0.0
                return f"step {number}, {name}: was {values[0]}, is {values[1]}"
    if len(golden["steps"]) != len(found["steps"]):
        return f"was {len(golden['steps'])} lines of metrics, is {len(found['steps'])}"
    for name in ("weights", "diagnostics"):
        if golden.get(name) != found.get(name):
            return f"{name}: was {golden.get(name)}, is {found.get(name)}"
    return None


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a run, one step a line; floats as repr has them."""
    steps = ",\n".join(json.dumps(record, sort_keys=True) for record in found["steps"])
    rest = {name: value for name, value in found.items() if name != "steps"}
    text = json.dumps({"steps": [], **rest}, sort_keys=True, indent=1)
    path.write_text(text.replace('"steps": []', f'"steps": [\n{steps}\n]') + "\n", "utf-8")


def machine() -> dict[str, str]:
    """Return what the numbers of an engine depend on besides the code."""
    found = {"python": sys.version.split()[0]}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        line = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        found["cpu"] = line[1] if line else "unknown"
    for package in ("torch", "transformers", "trl", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def chosen_cases(engines: list[str], algorithms: list[str] | None) -> Iterator[tuple[str, str]]:
    """Yield engine and name of each case of these engines and, unless None, algorithms.

    An algorithm's name stands for all its cases, a variant's for itself.
    """
    for engine in engines:
        for name, (algorithm, _) in CASES[engine].items():
            if algorithms is None or name in algorithms or algorithm in algorithms:
                yield engine, name


def _report(folder: Path, engine: str, name: str, *, writing: bool) -> tuple[bool, str]:
    """Run a case; return whether all is well, and what to say."""
    path, began = folder / f"{engine}-{name}.json", time.monotonic()
    if not writing and not path.exists():
        return False, "not recorded: --write first"
    try:
        found = run_case(engine, *CASES[engine][name])
    except RuntimeError as error:
        return False, f"failed: {error}"
    seconds = f"({time.monotonic() - began:.0f} s)"
    if writing:
        write(path, found)
        return True, f"written {seconds}"
    different = first_difference(json.loads(path.read_text("utf-8")), found)
    return different is None, f"{different or 'equal'} {seconds}"


def main() -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", type=Path, metavar="FOLDER", help="record the runs there")
    mode.add_argument("--check", type=Path, metavar="FOLDER", help="repeat those recorded there")
    parser.add_argument("--engines", default="local,trl", help="of local, trl")
    parser.add_argument("--algorithms", help="names of algorithms or cases; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    unknown = sorted(set(engines) - set(CASES))
    if unknown:
        parser.error(f"--engines {unknown[0]}: use {', '.join(CASES)}")
    wanted = arguments.algorithms.split(",") if arguments.algorithms else None
    cases = list(chosen_cases(engines, wanted))
    if not cases:
        parser.error(f"--algorithms {arguments.algorithms}: no such case")
    folder: Path = arguments.write or arguments.check
    kept, here = folder / "machine.json", json.dumps(machine(), indent=2, sort_keys=True) + "\n"
    if arguments.write:
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(here, "utf-8")
    elif not kept.exists():
        parser.error(f"--check {folder}: nothing is recorded there; --write first")
    elif kept.read_text("utf-8") != here:
        parser.error(f"--check {folder}: recorded on another machine or release, see {kept}")
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        record = partial(_report, folder, writing=arguments.write is not None)
        results = [pool.submit(record, *case) for case in cases]
        for case, result in zip(cases, results, strict=True):
            well, text = result.result()
            failed += not well
            print(f"{'-'.join(case)}: {text}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
