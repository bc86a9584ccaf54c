"""One process at a time writes into a folder; the lock goes when its process does, however."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from proxstep.errors import ProxstepError

LOCK = "run.lock"
"""The file that is locked, gone when the lock is released. One that a killed process left behind is
not locked and means nothing."""

_MOMENT = 0.2
_HELD: set[int] = set()


@contextmanager
def locked(
    folder: Path,
    name: str,
    lock: str = LOCK,
    *,
    patience: float = _MOMENT,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made if need be.

    On a file system that has no locks (Lustre without `flock`, say) there is none.

    Args:
        folder: The folder; gone again afterwards if it was made here and stayed empty.
        name: What to call it in messages.
        lock: The name of the file in it that is locked.
        patience: Seconds to wait for another process; `is_locked` holds a lock for a moment.
        on_wait: Called once if another process holds it for longer than such a moment.

    Raises:
        ProxstepError: If another process holds it, or nothing can be written there.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / lock
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, f"{name} {folder}", patience, on_wait)
    except OSError as error:
        _remove(made)
        raise ProxstepError(
            f"{name} {folder} cannot be written ({error.strerror}): choose another folder"
        ) from None
    _HELD.add(descriptor)
    try:
        yield
    finally:
        _HELD.discard(descriptor)
        if os.name == "nt":  # Windows deletes no file that is open
            os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        if os.name != "nt":
            os.close(descriptor)
        _remove(made)


def is_locked(folder: Path, lock: str = LOCK) -> bool:
    """Whether a process holds the lock of a folder."""
    try:
        descriptor = os.open(folder / lock, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _acquire(path: Path, name: str, patience: float, on_wait: Callable[[], None]) -> int:
    on_wait = cache(on_wait)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor, patience, on_wait):
                holder = os.pread(descriptor, 20, 0).decode() if os.name != "nt" else ""
                raise ProxstepError(
                    f"{name} is being written by another process{holder and f' ({holder})'}: wait "
                    "for it, stop it, or choose another folder"
                )
            if _is_at(path, descriptor):  # not one that its holder just deleted
                os.truncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                os.fsync(descriptor)
                return descriptor
        except BaseException:  # an interrupt too, while it waits: the file would stay open
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, patience: float, on_wait: Callable[[], None]) -> bool:
    """Lock a file that is open, and return whether that could be done."""
    begun = time.monotonic()
    while not _try_lock(descriptor):
        waited = time.monotonic() - begun
        if waited >= patience:
            return False
        if waited >= _MOMENT:
            on_wait()
        time.sleep(0.1)
    return True


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(folders: list[Path]) -> None:
    """Remove the folders that were made for the lock, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _close_in_child() -> None:
    """Leave the lock to the process that took it: it would last as long as any fork does."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
