"""The run folder: recipe.yaml, run.json, checkpoints/ and the .jsonl files of a run."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import proxstep
from proxstep.config.loading import dump_recipe, load_recipe, with_absolute_paths
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.isopo.diagnostics.noise_split import NoiseSplit, pooled
from proxstep.runs.durable import finite, sha256, sync, write_file
from proxstep.runs.guard import Verdict, after_returns, verdict
from proxstep.runs.lock import LOCK, locked
from proxstep.runs.reading import read_metrics, read_rows, true_status
from proxstep.runs.tracking import drop_later_steps, lines_until


class RunFolder:
    """One run's files.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.diagnostics = self.path / "diagnostics.jsonl"
        self._info = self.path / "run.json"

    @property
    def _logs(self) -> tuple[Path, ...]:
        return self.metrics, self.samples, self.diagnostics

    @contextmanager
    def claimed(self, *, overwrite: bool) -> Iterator[None]:
        """Keep every other process out of the folder, after `check_usable`.

        Raises:
            ProxstepError: If another process writes there, or nobody can.
        """
        self.check_usable(overwrite=overwrite)
        with self.locked():
            self.check_usable(overwrite=overwrite)  # somebody may have been faster
            yield

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the folder.

        Raises:
            ProxstepError: If another process writes there, or nobody can.
        """
        with locked(self.path, "output_dir"):
            yield

    def check_usable(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds a run, unless it is to be overwritten, or anything else.

        Raises:
            ProxstepError: With the ways out.
        """
        if self._info.exists() and not overwrite:
            raise ProxstepError(
                f"output_dir {self.path} already holds a run: choose another, continue it with "
                "--resume, or delete it with --overwrite"
            )
        check_folder(self.path, "output_dir")
        if self._info.exists() or not self.path.exists():
            return
        if {path.name for path in self.path.iterdir()} - {LOCK, "run.tmp"}:
            raise ProxstepError(
                f"output_dir {self.path} holds files that are no run: choose another folder"
            )

    def clear(self) -> None:
        """Delete the files of the run that the folder holds, and nothing else."""
        if self._info.exists():
            self._delete_results()
            self._info.unlink()

    def _delete_results(self) -> None:
        """Delete everything of a run but run.json, without which nobody knows it for one."""
        for below in ("checkpoints", "verl"):
            shutil.rmtree(self.path / below, ignore_errors=True)
        for file in (*self._logs, self.path / "recipe.yaml"):
            file.unlink(missing_ok=True)
        for file in self.path.glob("events.out.tfevents.*"):
            file.unlink()

    def create(self, recipe: Recipe, device: torch.device, num_parameters: int) -> None:
        """Begin a run: delete the one before, write the recipe and what it runs on."""
        import transformers

        if self._info.exists():
            self._delete_results()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_info(
            {
                "status": "running",
                "proxstep_version": proxstep.__version__,
                "torch_version": torch.__version__,
                "transformers_version": transformers.__version__,
                "machine": describe_machine(device),
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "num_parameters": num_parameters,
            }
        )
        write_file(self.path / "recipe.yaml", dump_recipe(with_absolute_paths(recipe)).encode())

    def extend(self, overrides: Sequence[tuple[str, str]]) -> None:
        """Give the run more steps, for a later resume.

        Args:
            overrides: One pair, ("steps", how many from the run's beginning).

        Raises:
            ProxstepError: The folder holds no run, or its run has as many steps already.
        """
        file = self.path / "recipe.yaml"
        if not file.is_file():
            raise ProxstepError(f"{self.path}: not a run folder, it has no recipe.yaml")
        with self.locked():
            steps, recipe = load_recipe(file).steps, load_recipe(file, overrides)
            if recipe.steps < steps:
                raise ProxstepError(
                    f"--steps {recipe.steps}: the run in {self.path} has {steps} steps; give more"
                )
            write_file(file, dump_recipe(recipe).encode())

    def check_room(self, model: nn.Module) -> None:
        """Refuse a disk on which what a model trains does not fit once.

        Raises:
            ProxstepError: With what is free and what is needed.
        """
        trained = [p for p in model.parameters() if p.requires_grad]
        needed = sum(p.numel() * p.element_size() for p in trained)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise ProxstepError(
                f"output_dir {self.path}: {free / 2**30:.2g} GiB are free, and one checkpoint's "
                f"weights alone take {needed / 2**30:.2g}: make room, or choose another folder"
            )

    def update_info(self, **changes: Any) -> None:
        """Change fields of run.json, all or nothing; what is not finite is null."""
        self._write_info({**self.info(), **changes})

    def _write_info(self, info: Mapping[str, Any]) -> None:
        text = json.dumps(finite(info), indent=2, allow_nan=False) + "\n"
        write_file(self._info, text.encode())

    def conclude(self, status: str) -> None:
        """Write how a run ended; on a full disk into the room that run.json has already."""
        try:
            self.update_info(status=status)
        except OSError:
            with suppress(OSError), self._info.open("r+b") as file:
                text = json.dumps({**self.info(), "status": status}, indent=2).encode()
                size = len(file.read())
                if len(text) < size:
                    file.seek(0)
                    file.write(text.ljust(size - 1) + b"\n")

    def info(self) -> dict[str, Any]:
        """Return run.json, empty if there is none.

        Raises:
            ProxstepError: If it is damaged.
        """
        if not self._info.exists():
            return {}
        try:
            info = json.loads(self._info.read_bytes())
        except ValueError:
            info = None
        if not isinstance(info, dict):
            raise ProxstepError(
                f"{self._info}: damaged, it holds no JSON object; restore it, or delete it and "
                "--resume the run, which writes a new one"
            )
        return info

    def status(self) -> str | None:
        """Return how the run ended, "running" or "killed"; None where there is none."""
        return true_status(self.path, self.info().get("status"))

    def log_sums(self) -> dict[str, str]:
        """Return the SHA-256 sums of the files of JSON lines, once they are on disk."""
        held = [file for file in self._logs if file.exists()]
        for file in held:
            sync(file)
        return {file.name: sha256(file) for file in held}

    def check_logs(self, step: int, sums: Mapping[str, str], note: Callable[[str], None]) -> None:
        """Refuse logs that are not what they were after a step.

        Raises:
            ProxstepError: If one is damaged. One that is missing is noted.
        """
        for name, digest in sums.items():
            file = self.path / name
            if not file.exists():
                note(f"{file} is missing: what it had of the steps up to {step} is lost")
            elif hashlib.sha256(lines_until(file, step)).hexdigest() != digest:
                raise ProxstepError(
                    f"{file} is not what the run wrote up to step {step}: a line was changed or is "
                    "gone. Restore it, or move it away, and the run goes on without the lines "
                    "that it had"
                )

    def drop_later_steps(self, step: int) -> None:
        """Delete what came after a step, which a resumed run does again."""
        for file in self._logs:
            drop_later_steps(file, step)

    def add_samples(self, samples: list[dict[str, Any]]) -> None:
        """Append completions to samples.jsonl."""
        _append(self.samples, samples)

    def find_diagnostics(self, step: int | None) -> dict[str, Any]:
        """Return one step's diagnostics; None for the last.

        Raises:
            ProxstepError: If the folder holds no run, or nothing was measured then.
        """
        if not self._info.exists():
            raise ProxstepError(f"{self.path}: not a run folder, it has no run.json")
        records = read_rows(self.diagnostics)
        if not records:
            raise ProxstepError(
                f"{self.path}: nothing was measured; train with a geometry.rule and "
                "--geometry.diagnose_every 1"
            )
        chosen = [record for record in records if step in (None, record["step"])]
        if not chosen:
            measured = ", ".join(str(record["step"]) for record in records[:10])
            raise ProxstepError(f"--step {step} was not measured; these were first: {measured}")
        return chosen[-1]

    def noise_split(self) -> tuple[int, NoiseSplit] | None:
        """Return over how many steps the gradient's noise was split, and the mean; None of none."""
        splits = [
            found for record in read_rows(self.diagnostics) if (found := record.get("noise_split"))
        ]
        mean = pooled([NoiseSplit(**split) for split in splits])
        return None if mean is None else (len(splits), mean)

    def verdict(self) -> Verdict:
        """Return what the run's metrics say of it.

        Raises:
            ProxstepError: If the folder holds no run, or no step is recorded.
        """
        if not self._info.exists():
            raise ProxstepError(f"{self.path}: not a run folder, it has no run.json")
        returns = self.info().get("guard", {}).get("returns", [])
        return verdict(after_returns(read_metrics(self.metrics), returns))

    def add_diagnostics(self, record: dict[str, Any]) -> None:
        """Append one step's diagnostics to diagnostics.jsonl."""
        _append(self.diagnostics, [record])


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def check_folder(path: Path, name: str) -> None:
    """Refuse a path at which no folder is or can be made.

    Raises:
        ProxstepError: Calling the path by `name`.
    """
    for above in (path, *path.parents):
        if above.exists():
            if not above.is_dir():
                raise ProxstepError(f"{name} {path}: {above} is a file; choose another folder")
            return


def check_file(path: Path, name: str) -> None:
    """Refuse a path at which no file can be written, and make the folder that it lies in.

    Raises:
        ProxstepError: Calling the path by `name`.
    """
    check_folder(path.parent, name)
    if path.is_dir():
        raise ProxstepError(f"{name} {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)


def describe_machine(device: torch.device) -> str:
    """Return the processor or accelerator and the number of threads in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device.type}"
