"""Python that a recipe names: a file or a module, imported once per process."""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
import zlib
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from proxstep.errors import ProxstepError


def load_module(place: str, what: str) -> ModuleType:
    """Return the module in a file, or of a name.

    Args:
        place: A path that ends in .py, relative to the working directory or absolute; or a
            module's dotted name.
        what: What names it, for messages.

    Raises:
        ProxstepError: It is not there, or cannot be imported, or raises or exits when it is.
    """
    return _of_file(Path(place), what) if place.endswith(".py") else _of_name(place, what)


def _of_name(name: str, what: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ProxstepError(f"{what}: {name!r} is not a module's name; a file's name ends in .py")
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:
        raise ProxstepError(
            f"{what}: cannot import {name!r} ({_one_line(error)}); check the spelling, install the "
            "package, or name a file, FILE.py"
        ) from error
    except ProxstepError:
        raise
    except (Exception, SystemExit) as error:  # whatever a module does when it is imported
        raise ProxstepError(
            f"{what}: importing {name!r} raised {_raised(error)}; correct that module"
        ) from error


def _of_file(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise ProxstepError(
            f"{what}: the file {path} does not exist; check the path, which is relative to the "
            "working directory"
        )
    resolved = str(path.resolve())
    name = f"proxstep_user_{path.stem}_{zlib.crc32(resolved.encode()):08x}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = resolved
    try:
        with contextlib.ExitStack() as on_failure:
            sys.modules[name] = module  # dataclasses and pickle look modules up here
            on_failure.callback(sys.modules.pop, name)
            SourceFileLoader(name, resolved).exec_module(module)
            on_failure.pop_all()
    except (ImportError, SyntaxError) as error:
        raise ProxstepError(
            f"{what}: cannot import {path} ({_one_line(error)}); correct that file"
        ) from error
    except ProxstepError:
        raise
    except (Exception, SystemExit) as error:
        raise ProxstepError(
            f"{what}: importing {path} raised {_raised(error, resolved)}; correct that file"
        ) from error
    return module


def place_of(error: BaseException, file: str | None = None) -> str:
    """Return the line that raised, the last one in a file where it went through that file."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1])
    return f"{frame.filename}, line {frame.lineno}"


def _raised(error: BaseException, file: str | None = None) -> str:
    text = f": {_one_line(error)}" if str(error) else ""
    return f"{type(error).__name__}{text} ({place_of(error, file)})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
