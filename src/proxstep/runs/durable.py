"""Files that are whole after a crash: on disk before they get their names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
