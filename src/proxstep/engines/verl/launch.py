"""Runs of verl by a recipe: `python -m verl.trainer.main_ppo` in a process of its own.

The run folder is the local engine's, with what verl writes beside its metrics under verl/.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from proxstep.config.loading import dump_recipe
from proxstep.config.recipe import Recipe
from proxstep.config.releases import check_verl
from proxstep.engines.verl.hydra import override
from proxstep.engines.verl.overrides import Machine, Prepared, gpus, overrides
from proxstep.engines.verl.prompt_files import plan, prepare, write
from proxstep.engines.verl.run_metrics import record, samples
from proxstep.errors import ProxstepError
from proxstep.hub import hub_or_cache
from proxstep.runs.children import die_with_parent
from proxstep.runs.folder import RunFolder
from proxstep.runs.stop import StopRequest, stop_on_signal
from proxstep.runs.telemetry import SWITCHES, switch_off_telemetry
from proxstep.runs.tracking import MetricsLog, Progress
from proxstep.training.lifecycle import check, keep_baselines, load_run_recipe
from proxstep.training.models import pick_device

_SECONDS_TO_STOP = 20
_SECONDS_BETWEEN_LOOKS = 0.5


def command(recipe: Recipe) -> str:
    """Return a shell script that does the same run without `proxstep train`.

    It is for as many GPUs as this machine has, or for one where it has none.

    Raises:
        ProxstepError: If the recipe asks for what verl cannot do.
    """
    prepared, _ = plan(recipe)
    machine = gpus(torch.cuda.device_count() or 1)
    folder = shlex.quote(recipe.output_dir)
    arguments = [_quoted(text) for text in overrides(recipe, prepared, machine)]
    lines = [
        "#!/bin/sh",
        "set -e",
        "# The recipe, the prompts as Parquet files (and the embedded model): once.",
        f"mkdir -p {folder}",
        f"cat > {folder}/recipe.yaml <<'END_OF_RECIPE'",
        dump_recipe(recipe).rstrip("\n"),
        "END_OF_RECIPE",
        f"python -m proxstep.engines.verl {folder}/recipe.yaml",
        f"# The run, on one machine with {machine.num_ranks} GPU(s).",
        "# On several: start Ray on all of them, and set trainer.nnodes.",
        *(f"export {name}={shlex.quote(value)}" for name, value in SWITCHES.items()),
        "python -m verl.trainer.main_ppo \\",
        " \\\n".join(f"  {text}" for text in arguments),
    ]
    return "\n".join(lines) + "\n"


def train(recipe: Recipe, progress: Progress, *, overwrite: bool = False) -> str:
    """Run a recipe in verl from its beginning.

    Returns:
        "finished" or "interrupted".

    Raises:
        ProxstepError: If anything in the recipe, the data or the model is wrong, or verl fails.
    """
    check_verl()
    folder = RunFolder(recipe.output_dir)
    with folder.claimed(overwrite=overwrite):
        check(recipe)
        machine = find_machine()
        prepared, task = plan(recipe, progress.note)
        overrides(recipe, prepared, machine)  # refuses what verl cannot do
        if overwrite:
            folder.clear()
        with progress.wait("writing the prompts") as wait:
            validation = write(recipe, prepared, task, wait.say)
        folder.create(recipe, pick_device(recipe.device), _num_parameters(prepared.model))
        folder.update_info(engine="verl", verl_version=version("verl"))
        keep_baselines(recipe, validation, folder, progress)
        return _run(recipe, folder, prepared, machine, progress, first_step=0)


def resume(path: str | Path, progress: Progress) -> str:
    """Continue a run from verl's newest checkpoint.

    Raises:
        ProxstepError: If the folder holds no run with a checkpoint, or its run is finished.
    """
    check_verl()
    folder = RunFolder(path)
    recipe = load_run_recipe(path)
    step = _last_checkpoint(folder)
    if step == 0:
        raise ProxstepError(
            f"{path}: no checkpoint there; verl writes one every logging.checkpoint_every steps, "
            "and at the end"
        )
    if step >= recipe.steps:
        raise ProxstepError(f"{path}: the run is finished, at step {step} of {recipe.steps}")
    machine = find_machine()
    with folder.locked():
        folder.drop_later_steps(step)
        with progress.wait("writing the prompts") as wait:
            prepared = prepare(recipe, wait.say)
        return _run(recipe, folder, prepared, machine, progress, first_step=step)


def _run(
    recipe: Recipe,
    folder: RunFolder,
    prepared: Prepared,
    machine: Machine,
    progress: Progress,
    first_step: int,
) -> str:
    """Run verl and follow what it logs until it ends."""
    own = folder.path.absolute() / "verl"
    measured, log = own / "metrics.jsonl", own / "log.txt"
    measured.unlink(missing_ok=True)
    arguments = overrides(recipe, prepared, machine)
    arguments.append(override("trainer.val_before_train", first_step == 0))
    switch_off_telemetry()
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(measured)}
    folder.update_info(status="running")
    progress.note("verl starts; its output goes to " + str(log))
    before = folder.info().get("elapsed_seconds", 0.0)
    began = time.monotonic()
    with stop_on_signal() as stop, log.open("wb") as output:
        sink, validated = MetricsLog(folder.metrics), []
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
        try:
            for number, line in enumerate(_follow(process, measured, stop)):
                if number == 0:
                    progress.begin(recipe)
                elapsed = before + time.monotonic() - began
                full = record(recipe, line["step"], line["data"]) | {"elapsed_seconds": elapsed}
                sink.write(full)
                progress.record(full)
                if full.get("score") is not None:
                    validated.append(line["step"])
                validated = add_samples(recipe, folder, validated)
                folder.update_info(elapsed_seconds=elapsed)
        finally:
            _end(process)
            sink.close()
            add_samples(recipe, folder, validated, ended=True)
    return _conclude(folder, process.returncode, stop, log)


def _follow(
    process: subprocess.Popen[bytes], measured: Path, stop: StopRequest
) -> Iterator[dict[str, Any]]:
    """Yield verl's lines of metrics as they come, until it ends or is to stop."""
    position, running = 0, True
    while running and not stop.made:
        running = process.poll() is None
        if measured.exists():
            with measured.open("rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    yield json.loads(line)
        if running:
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End verl and what it started, if it is still there; Ray's processes follow their driver."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            continue


def _conclude(folder: RunFolder, status: int, stop: StopRequest, log: Path) -> str:
    """Return how the run ended.

    Raises:
        ProxstepError: If verl failed, or was stopped with nothing saved.
    """
    if status == 0:
        folder.update_info(status="finished")
        return "finished"
    folder.update_info(status="interrupted" if stop.made else "failed")
    if not stop.made:
        raise ProxstepError(f"verl ended with status {status}: {_reason(log)}; all it said: {log}")
    if _last_checkpoint(folder) == 0:
        raise ProxstepError(
            f"{folder.path}: stopped before verl saved a checkpoint; set logging.checkpoint_every "
            "for one every so many steps"
        )
    return "interrupted"


def _reason(log: Path) -> str:
    """Return the first error that a log names, ours before others: later ones follow from it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    ours = [line for line in errors if "ProxstepError" in line]
    chosen = (ours or errors or lines[-1:] or ["no output"])[0]
    return re.sub(r"^.*?((\w+\.)*\w*(Error|Exception): )", r"\1", chosen).strip()


def add_samples(
    recipe: Recipe, folder: RunFolder, steps: Sequence[int], *, ended: bool = False
) -> list[int]:
    """Add what was sampled in validations, which verl writes beside its training.

    Args:
        recipe: Its `logging.num_samples` is how many of each.
        folder: The run's.
        steps: Of the validations.
        ended: Whether verl writes no more.

    Returns:
        The steps of which there is too little yet.
    """
    count, missing = recipe.logging.num_samples, []
    for step in steps if count else ():
        found = list(samples(folder.path / "verl" / "validation" / f"{step}.jsonl", step, count))
        if found and (ended or len(found) == count):
            folder.add_samples(found)
        else:
            missing.append(step)
    return missing


def _last_checkpoint(folder: RunFolder) -> int:
    """Return the step of verl's newest complete checkpoint, 0 for none."""
    path = folder.path / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else 0


def find_machine() -> Machine:
    """Return what this machine is to verl.

    Raises:
        ProxstepError: If it has no GPU, or no vLLM.
    """
    if not torch.cuda.is_available():
        raise ProxstepError(
            "--engine verl needs a GPU, and CUDA shows none on this machine: use --engine local or "
            "trl here"
        )
    if find_spec("vllm") is None:
        raise ProxstepError(
            "--engine verl samples with vLLM, which is not installed: "
            'pip install "verl[vllm]==0.9.1" brings the release that verl asks for'
        )
    return gpus(torch.cuda.device_count())


def _quoted(text: str) -> str:
    """Return a word of a shell command; in double quotes where it has single ones itself."""
    if "'" in text and not re.search(r'["$`\\!]', text):
        return f'"{text}"'
    return shlex.quote(text)


def _num_parameters(source: str) -> int:
    """Return how many weights a model has, without loading them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with hub_or_cache(source), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    return sum(parameter.numel() for parameter in model.parameters())
