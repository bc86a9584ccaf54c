"""The run folder: recipe.yaml, run.json, checkpoints/ and the .jsonl files of a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

import proxstep
from proxstep.config.loading import dump_recipe
from proxstep.config.recipe import Recipe
from proxstep.errors import ProxstepError
from proxstep.runs.tracking import drop_later_steps


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
        if not self._info.exists() and self.path.exists() and any(self.path.iterdir()):
            raise ProxstepError(
                f"output_dir {self.path} holds files that are no run: choose another folder"
            )

    def clear(self) -> None:
        """Delete the files of the run that the folder holds, and nothing else."""
        if not self._info.exists():
            return
        for below in ("checkpoints", "verl"):
            shutil.rmtree(self.path / below, ignore_errors=True)
        for file in (self.metrics, self.samples, self.diagnostics, self._info):
            file.unlink(missing_ok=True)
        (self.path / "recipe.yaml").unlink(missing_ok=True)
        for file in self.path.glob("events.out.tfevents.*"):
            file.unlink()

    def create(self, recipe: Recipe, device: torch.device, num_parameters: int) -> None:
        """Begin a run: delete the one before, write the recipe and what it runs on."""
        import transformers

        self.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        self.update_info(
            status="running",
            proxstep_version=proxstep.__version__,
            torch_version=torch.__version__,
            transformers_version=transformers.__version__,
            machine=describe_machine(device),
            started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            num_parameters=num_parameters,
        )

    def update_info(self, **changes: Any) -> None:
        """Change fields of run.json, all or nothing."""
        info = {**self.info(), **changes}
        scratch = self._info.with_suffix(".tmp")
        scratch.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, self._info)

    def info(self) -> dict[str, Any]:
        """Return run.json, empty if there is none."""
        return json.loads(self._info.read_text(encoding="utf-8")) if self._info.exists() else {}

    def drop_later_steps(self, step: int) -> None:
        """Delete what came after a step, which a resumed run does again."""
        for file in (self.metrics, self.samples, self.diagnostics):
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
        lines = self.diagnostics.read_text("utf-8") if self.diagnostics.exists() else ""
        records = [json.loads(line) for line in lines.splitlines()]
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
