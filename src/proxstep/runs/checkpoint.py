"""Checkpoints: what `from_pretrained` loads and the trainer's state, all or nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxstep.errors import ProxstepError
from proxstep.runs.durable import sha256, sync, sync_tree

STATE_FILE = "trainer_state.pt"
MANIFEST = "manifest.json"
"""The step and the SHA-256 sums of a checkpoint's other files; written last."""
STATE_KEYS = {
    "step",
    "num_updates",
    "num_prompts",
    "num_sequences",
    "elapsed_seconds",
    "optimizer",
    "schedule",
    "isopo",
    "probe",
    "recipe",
    "trained",
    "unrecorded",
    "best",
    "guard",
    "logs",
}

_OF_GARBAGE = (ValueError, LookupError, TypeError, AssertionError)
"""What torch's unpickler raises besides, for bytes that are no pickle."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    tokenizer: Any,
    state: dict[str, Any],
    kept: int = 2,
    besides: Collection[int] = (),
) -> Path:
    """Write checkpoints/step-N, and delete the oldest ones.

    Args:
        folder: The run folder.
        step: Rollout steps done.
        model: Saved with save_pretrained (safetensors); adapters alone, where it has them.
        tokenizer: Saved beside it.
        state: Tensors, numbers, strings, and containers of them.
        kept: How many checkpoints stay, this one included.
        besides: The steps of others that stay.

    Returns:
        The checkpoint's folder.
    """
    parent = folder / "checkpoints"
    parent.mkdir(exist_ok=True)
    scratch = parent / f"step-{step:06d}.incomplete"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        model.save_pretrained(scratch)  # type: ignore[operator]
        tokenizer.save_pretrained(scratch)
        torch.save(state, scratch / STATE_FILE)
        return publish(scratch, folder, step, kept, besides)
    except BaseException:  # an interrupt too: a full disk needs the room
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def publish(
    scratch: Path, folder: Path, step: int, kept: int, besides: Collection[int] = ()
) -> Path:
    """Give a complete checkpoint its manifest and its name, and delete the oldest ones.

    It is on disk before it has its name, and the others go only then. Those of later steps go too:
    a run that went on from an older one has left them behind.
    """
    parent = folder / "checkpoints"
    sums = {name: sha256(scratch / name) for name in _files(scratch)}
    manifest = json.dumps({"step": step, "sha256": sums}, indent=2)
    (scratch / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    sync_tree(scratch)
    final = checkpoint_path(folder, step)
    replaced = final.with_suffix(".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        os.replace(final, replaced)
    os.replace(scratch, final)
    sync(parent)
    whole = checkpoints(folder)
    newest = [path for path in whole if _step(path) <= step][-kept:]
    newest += [checkpoint_path(folder, other) for other in besides]
    leftovers = [*parent.glob("*.incomplete"), *parent.glob("*.replaced")]
    for other in {*whole, *leftovers} - {*newest}:
        shutil.rmtree(other)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where a run's checkpoint of a step is."""
    return folder / "checkpoints" / f"step-{step:06d}"


def drop_later_checkpoints(folder: Path, step: int, besides: Collection[int] = ()) -> None:
    """Delete a run's checkpoints of later steps, but those of some."""
    kept = [checkpoint_path(folder, other) for other in besides]
    for path in checkpoints(folder):
        if _step(path) > step and path not in kept:
            shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that a run wrote to their end, oldest first."""
    found = (folder / "checkpoints").glob("step-[0-9]*")
    return sorted((path for path in found if path.name.removeprefix("step-").isdigit()), key=_step)


def _step(path: Path) -> int:
    """Return a checkpoint's step; its name has six digits, or more from step 1,000,000 on."""
    return int(path.name.removeprefix("step-"))


def latest_checkpoint(folder: Path, note: Callable[[str], None] | None = None) -> Path:
    """Return a run's newest checkpoint that is whole; of a run of verl, the model saved there.

    Args:
        folder: The run folder.
        note: Called with a sentence on each newer one that is damaged.

    Raises:
        ProxstepError: If there is none.
    """
    found = checkpoints(folder)
    complaints = []
    for path in reversed(found):
        complaint = damage(path)
        if complaint is None:
            if note is not None:
                for text in complaints:
                    note(f"{text}; using {path.name}, the one before it")
            return path
        complaints.append(f"{path} is damaged: {complaint}")
    if complaints:
        raise ProxstepError(
            f"{'; '.join(complaints)}; no other checkpoint is there: restore one, or begin again "
            "with --overwrite"
        )
    of_verl = _of_verl(folder)
    if not of_verl:
        raise ProxstepError(
            f"{folder}: no checkpoint there; a run writes one when it ends or is interrupted, when "
            "it fails after a step, and every logging.checkpoint_minutes or "
            "logging.checkpoint_every steps"
        )
    return of_verl[-1]


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None where they are as they were saved."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        named, sums = f"step-{manifest['step']:06d}", dict(manifest["sha256"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError):
        return f"{MANIFEST} cannot be read"
    if checkpoint.name != named:
        return f"its {MANIFEST} is of {named}"
    held = _files(checkpoint)
    if missing := sorted(set(sums) - set(held)):
        return f"{missing[0]} is missing"
    if foreign := sorted(set(held) - set(sums)):
        return f"{foreign[0]} is none of its files"
    for name, digest in sums.items():
        try:
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was saved (its SHA-256 sum differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _files(checkpoint: Path) -> list[str]:
    """Return the names of a checkpoint's files; hidden ones, such as a file browser's, aside."""
    found = (path for path in checkpoint.rglob("*") if path.is_file())
    names = (path.relative_to(checkpoint).as_posix() for path in found)
    return sorted(name for name in names if name[0] != "." and name != MANIFEST)


def _of_verl(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("global_step_*/actor/huggingface")
    return sorted(found, key=lambda path: int(path.parts[-3].removeprefix("global_step_")))


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return the trainer's state; tensors and plain data only, no code is run.

    Raises:
        ProxstepError: If the file is missing or damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, *_OF_GARBAGE) as error:
        reason = type(error).__name__
    else:
        if isinstance(state, dict) and set(state) >= STATE_KEYS:
            return state
        reason = "it is not a trainer's state"
    raise ProxstepError(
        f"{path}: cannot be read ({reason}), so the run cannot be continued; the model beside it "
        "may still load, as model.name of a new run"
    )
