"""Files that are whole after a crash, on disk before they get their names, and valid JSON."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any


def write_file(path: Path, content: bytes) -> None:
    """Write a file all or nothing: its old content stays until the new one is on disk."""
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_bytes(content)
        sync(scratch)
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() and os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder with everything in it is on disk."""
    for below in folder.rglob("*"):
        sync(below)
    sync(folder)


def sha256(path: Path) -> str:
    """Return the SHA-256 sum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finite(tree: Any) -> Any:
    """Return the same with None for every number that is not finite, which JSON cannot hold.

    >>> finite({"score": float("nan"), "guard": {"returns": [1.5, float("inf")]}})
    {'score': None, 'guard': {'returns': [1.5, None]}}
    """
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
