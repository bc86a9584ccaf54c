"""Models that are made once and kept on this machine, by one process at a time."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from proxstep.errors import ProxstepError
from proxstep.runs.lock import locked


def cache_folder() -> Path:
    """Return where models are kept: $PROXSTEP_CACHE, else the user's cache folder."""
    if "PROXSTEP_CACHE" in os.environ:
        return Path(os.environ["PROXSTEP_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "proxstep"


def is_kept(folder: Path) -> bool:
    """Whether a folder of the cache holds a model, which is then whole."""
    return (folder / "config.json").is_file()


@contextmanager
def making(folder: Path, note: Callable[[str], None] = lambda text: None) -> Iterator[bool]:
    """Wait until no other process makes a folder's model; give whether it is still to be made.

    Args:
        folder: The model's, in the cache.
        note: Told where there is something to wait for.

    Raises:
        ProxstepError: If nothing can be written there.
    """
    if is_kept(folder):
        yield False
        return
    with locked(
        folder.parent,
        "the models' cache (PROXSTEP_CACHE)",
        f"{folder.name}.lock",
        patience=math.inf,
        on_wait=lambda: note(f"another process is making {folder}: waiting for it"),
    ):
        yield not is_kept(folder)


def keep(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save a model in the cache, whole or not at all.

    Raises:
        ProxstepError: If it cannot be written.
    """
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # without a lock another process may have been faster
            if not is_kept(folder):
                raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own
        raise ProxstepError(
            f"the model cannot be written to {folder} ({error}): make room, or set PROXSTEP_CACHE "
            "to another folder"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
