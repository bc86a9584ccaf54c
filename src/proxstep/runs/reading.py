"""Run folders: reading them, the spread of a field over seeds, and what differs between runs.

A run folder holds `recipe.yaml` (the resolved recipe), `run.json` (status, versions, machine),
`metrics.jsonl` (one JSON object a line, the fields of `proxstep.runs.schema`) and, as an option,
`samples.jsonl` and `diagnostics.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any

from proxstep.config.yamlfile import read_yaml
from proxstep.errors import ProxstepError
from proxstep.runs.lock import is_locked
from proxstep.runs.schema import FIELDS, PREFIXES
from proxstep.tasks.data import json_object

MISSING = "\N{EN DASH}"  # what is shown for what was not measured or not set

# What a fair comparison varies: within an algorithm, and between algorithms.
_VARIED_BY_RUN = {"seed", "output_dir"}
_VARIED_BY_ALGORITHM = {"algorithm", "label", "objective", "geometry", "advantage"}
_COMPARED_INFO = ("machine", "proxstep_version", "torch_version", "transformers_version")
_LONGEST_VALUE = 60
_CONTENT = "a run folder holds run.json, recipe.yaml and metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """One training run, as its folder holds it.

    Attributes:
        path: The run folder, as it was given.
        algorithm: The recipe's `label`, else its `algorithm`.
        seed: The recipe's `seed`.
        recipe: The resolved recipe.
        info: The content of `run.json`; its status is "killed" where it says "running" and no
            process writes there.
        records: The lines of `metrics.jsonl` in order of their step.
    """

    path: Path
    algorithm: str
    seed: int
    recipe: dict[str, Any]
    info: dict[str, Any]
    records: list[dict[str, Any]]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps in which a field was measured, and its values there."""
        measured = [record for record in self.records if record.get(name) is not None]
        return [record["step"] for record in measured], [float(record[name]) for record in measured]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of its evaluations, also of those that gave no score."""
        return [record for record in self.records if is_evaluation(record)]

    @property
    def lacks_last_score(self) -> bool:
        """Whether its last evaluation gave no score: no reward applied, or one was not finite."""
        return bool(self.evaluations) and self.evaluations[-1].get("score") is None


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of one value over seeds, all NaN if any of the values is."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value.

        >>> Spread.of([0.25, 0.75])
        Spread(mean=0.5, low=0.25, high=0.75)
        """
        if any(map(isnan, values)):
            return cls(nan, nan, nan)
        return cls(sum(values) / len(values), min(values), max(values))


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a record is of an evaluation; its score is null where that is not a number."""
    return any(record.get(name) is not None for name in ("score", "score_mean_length"))


def load_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        ProxstepError: A file is missing or malformed. The one thing forgiven is an unfinished last
            line of `metrics.jsonl`, which a killed run leaves behind.
    """
    folder = Path(path)
    recipe = _read_recipe(folder / "recipe.yaml")
    info = _read_json(folder / "run.json")
    if "status" in info:
        info["status"] = true_status(folder, info["status"])
    records = read_metrics(folder / "metrics.jsonl")
    name = recipe.get("label") or recipe["algorithm"]
    return Run(folder, name, recipe["seed"], recipe, info, records)


def true_status(folder: Path, status: str | None) -> str | None:
    """Return a run's status as its file has it, but "killed" where no process writes any more."""
    return "killed" if status == "running" and not is_locked(folder) else status


def load_samples(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the run's `samples.jsonl`, none if it has no such file."""
    return read_rows(run.path / "samples.jsonl")


def load_diagnostics(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the run's `diagnostics.jsonl`, none if it has no such file."""
    return read_rows(run.path / "diagnostics.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one a line, none if there is no such file."""
    return [row for _, row in read_jsonl(path)] if path.is_file() else []


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read every run in the given folders, in the order given, below that in order of name.

    Args:
        paths: Run folders, or folders that hold run folders at any depth. A run reached twice is
            read once.

    Raises:
        ProxstepError: A path is not a folder, holds no run, or holds a run that cannot be read.
    """
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ProxstepError(f"{path}: no such folder; give folders that hold runs.")
        folders = list(_run_folders(path))
        if not folders:
            raise ProxstepError(f"{path}: holds no run; {_CONTENT}.")
        for folder in folders:
            if folder.resolve() not in found:
                found[folder.resolve()] = load_run(folder)
    return list(found.values())


def by_algorithm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of each algorithm, the algorithms in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.algorithm, []).append(run)
    return groups


def entropy_field(runs: Iterable[Run]) -> str:
    """Return the entropy that runs can be compared by: at evaluations, if all measured it there."""
    alike = all(run.series("evaluation_entropy")[1] for run in runs)
    return "evaluation_entropy" if alike else "entropy"


def seed_spread(runs: Sequence[Run], name: str) -> dict[int, Spread]:
    """Return a field's spread over runs by step, for the steps in which every run has it.

    A run that stopped early thus ends the curve, rather than shifting the mean by dropping out of
    it. Runs that never measured the field are left out.
    """
    curves = [dict(zip(*run.series(name), strict=True)) for run in runs]
    curves = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return {step: Spread.of([curve[step] for curve in curves]) for step in steps}


def fairness_notes(runs: Sequence[Run], varied: Sequence[str] = ()) -> list[str]:
    """Return one sentence for each thing that makes the runs less comparable than they look.

    These are: runs that did not finish or learned nothing; seeds that repeat, are single or
    differ between algorithms; and differences in the recipe, the machine or the versions, except
    those that a comparison is about (seed and output folder; between algorithms also algorithm,
    label, objective, geometry and advantage) and the keys that a plan varies.
    """
    groups = by_algorithm(runs)
    return [*_unfinished_notes(runs), *_seed_notes(groups), *_setting_notes(groups, varied)]


def _unfinished_notes(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        ranges = [row.get("advantage_range", nan) for row in run.records if row["step"] > 0]
        if ranges and not any(ranges):
            yield (
                f"{run.algorithm}, seed {run.seed}: no step learned anything; its rewards were "
                "missing, not finite or equal."
            )
        if run.lacks_last_score:
            yield f"{run.algorithm}, seed {run.seed}: no score at its last evaluation."
        if run.info.get("stopped_early"):
            best = f"its best score was at step {run.info.get('best_step')}"
            yield f"{run.algorithm}, seed {run.seed}: stopped early, {best} (evaluation.patience)."
        if run.info.get("status") != "finished":
            progress = f"step {run.records[-1]['step']} of {run.recipe.get('steps', '?')}"
            yield f"{run.algorithm}, seed {run.seed}: {run.info.get('status')} after {progress}."


def _seed_notes(groups: dict[str, list[Run]]) -> Iterator[str]:
    seeds = {algorithm: {run.seed for run in runs} for algorithm, runs in groups.items()}
    for algorithm, runs in groups.items():
        if len(runs) > len(seeds[algorithm]):
            yield f"{algorithm} has {len(runs)} runs over {len(seeds[algorithm])} seeds."
    if single := [algorithm for algorithm, used in seeds.items() if len(used) == 1]:
        yield f"One seed only for {', '.join(single)}: a gap between curves may be chance."
    listed = {algorithm: ", ".join(map(str, sorted(used))) for algorithm, used in seeds.items()}
    if len(set(listed.values())) > 1:
        yield f"The algorithms differ in: seed ({_who_has_what(listed)})."


def _setting_notes(groups: dict[str, list[Run]], varied: Sequence[str]) -> Iterator[str]:
    settings = {algorithm: list(map(_settings, runs)) for algorithm, runs in groups.items()}
    keys = dict.fromkeys(key for members in settings.values() for one in members for key in one)
    keys = [key for key in keys if key not in varied]
    between: list[str] = []
    within: dict[str, list[str]] = {algorithm: [] for algorithm in groups}
    for key in keys:
        values: dict[str, str] = {}
        for algorithm, members in settings.items():
            distinct = sorted({one.get(key, MISSING) for one in members})
            values[algorithm] = " | ".join(distinct)
            if len(distinct) > 1:
                within[algorithm].append(f"{key} ({' | '.join(map(shorten, distinct))})")
        if key.split(".")[0] not in _VARIED_BY_ALGORITHM and len(set(values.values())) > 1:
            between.append(f"{key} ({_who_has_what(values)})")
    for algorithm, differences in within.items():
        if differences:
            yield f"The {algorithm} runs differ in: {', '.join(differences)}."
    if between:
        yield f"The algorithms differ in: {', '.join(between)}."


def _who_has_what(values: dict[str, str]) -> str:
    """Return each value with those that have it.

    >>> _who_has_what({"grpo": "0.1", "isopo": "0.2", "opo": "0.1"})
    '0.1 for grpo, opo; 0.2 for isopo'
    """
    holders: dict[str, list[str]] = {}
    for algorithm, value in values.items():
        holders.setdefault(value, []).append(algorithm)
    return "; ".join(f"{shorten(value)} for {', '.join(who)}" for value, who in holders.items())


def _settings(run: Run) -> dict[str, str]:
    """Return what is compared between runs, as text by dotted key: recipe, machine, versions."""
    recipe = {key: value for key, value in run.recipe.items() if key not in _VARIED_BY_RUN}
    info = {key: run.info.get(key) for key in _COMPARED_INFO}
    return {key: as_text(value) for key, value in flatten({**recipe, "run": info})}


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values.

    >>> list(flatten({"task": {"name": "math", "difficulty": 3}, "steps": 5}))
    [('task.name', 'math'), ('task.difficulty', 3), ('steps', 5)]
    """
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_text(value: Any) -> str:
    """Return a value of a recipe as a reader would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shorten(text: str) -> str:
    """Return a value's text, cut where it is long."""
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.is_symlink():
            yield from _run_folders(child)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProxstepError(f"{path}: {error.strerror}; {_CONTENT}.") from error


def _read_recipe(path: Path) -> dict[str, Any]:
    match recipe := read_yaml(path):
        case {"algorithm": str(), "seed": int()}:
            return recipe
    raise ProxstepError(
        f"{path}: lacks `algorithm` or `seed`; give the recipe as the run wrote it."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise ProxstepError(f"{path}: not valid JSON; restore it or leave the run out.") from error
    if not isinstance(content, dict):
        raise ProxstepError(f"{path}: must hold one JSON object; restore it or leave the run out.")
    return content


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and objects, without an unfinished last line (no newline, no JSON)."""
    *lines, tail = _read(path).split(b"\n")
    for number, line in enumerate([*lines, tail] if tail else lines, start=1):
        try:
            row = json_object(line, f"{path}, line {number}")
        except ProxstepError:
            if number > len(lines):
                return
            raise
        yield number, row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in the order of their steps.

    Raises:
        ProxstepError: If it is missing, empty or malformed.
    """
    records: list[dict[str, Any]] = []
    for number, record in read_jsonl(path):
        where = f"{path}, line {number}"
        for name, value in record.items():
            known = name in FIELDS or name.startswith(tuple(PREFIXES))
            if known and not isinstance(value, int | float | None):
                raise ProxstepError(f"{where}: `{name}` is not a number; mend or delete the line.")
        if not isinstance(record.get("step"), int):
            raise ProxstepError(f"{where}: no integer `step`; mend or delete the line.")
        if records and record["step"] <= records[-1]["step"]:
            raise ProxstepError(
                f"{where}: step {record['step']} follows step {records[-1]['step']}; "
                "delete the lines of the abandoned attempt."
            )
        records.append(record)
    if not records:
        raise ProxstepError(f"{path}: no step yet; wait for the first, or leave the run out.")
    return records
