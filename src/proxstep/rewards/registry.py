"""Reward functions by name, from a file or from a package.

A file or package that the user names is imported, and so executed, like any module of a program:
name only what you trust. Completions are never executed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import zlib
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from proxstep.errors import ProxstepError, did_you_mean
from proxstep.rewards.functions import (
    check_math_verify,
    exact_match,
    math_verify,
    numeric_answer,
)


class RewardFunction(Protocol):
    """A function from completions to rewards, with TRL's signature; None means "does not apply"."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[Any]:
        """Return one reward, or None, per completion."""
        ...


BUILTIN_REWARDS: dict[str, RewardFunction] = {
    "numeric_answer": numeric_answer,
    "exact_match": exact_match,
    "math_verify": math_verify,
}


def load_reward(spec: str) -> RewardFunction:
    """Return the reward function that a specification names.

    Args:
        spec: A key of `BUILTIN_REWARDS`, or "path/to/file.py:function" (relative to the working
            directory, or absolute), or "package.module:function".

    Returns:
        The function.

    Raises:
        ProxstepError: Nothing of that name exists, it cannot be imported, or it is not callable;
            or what math_verify needs is not there.
    """
    place, colon, name = spec.rpartition(":")
    if not colon:
        if spec not in BUILTIN_REWARDS:
            raise ProxstepError(
                f"reward {spec!r} is unknown{did_you_mean(spec, BUILTIN_REWARDS)}; use one of "
                f"{', '.join(BUILTIN_REWARDS)}, or FILE.py:FUNCTION, or PACKAGE.MODULE:FUNCTION"
            )
        if spec == "math_verify":
            check_math_verify()
        return BUILTIN_REWARDS[spec]
    if not place or not name:
        raise ProxstepError(
            f"reward {spec!r} is incomplete; write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"
        )
    module = _import_file(Path(place), spec) if place.endswith(".py") else _import(place, spec)
    function = getattr(module, name, None)
    if function is None:
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ProxstepError(
            f"reward {spec!r}: {place} has no function {name!r}{did_you_mean(name, public)}; "
            "name a function that it defines"
        )
    if not callable(function):
        raise ProxstepError(
            f"reward {spec!r} is a {type(function).__name__}; name a function f(prompts, "
            "completions, **columns)"
        )
    return cast(RewardFunction, function)


def reward_name(function: RewardFunction) -> str:
    """Return the name under which a reward function is reported.

    >>> reward_name(numeric_answer)
    'numeric_answer'
    """
    return getattr(function, "__name__", type(function).__name__)


def _import(module_name: str, spec: str) -> ModuleType:
    """Return an installed module."""
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ProxstepError(
            f"reward {spec!r}: {module_name!r} is not a module's name; a file's name ends in .py"
        )
    try:
        return importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ProxstepError(
            f"reward {spec!r}: cannot import {module_name!r} ({_one_line(error)}); "
            "check the spelling, install the package, or name a file as FILE.py:FUNCTION"
        ) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    """Return the module in a file, executed once per process as an import is."""
    if not path.is_file():
        raise ProxstepError(
            f"reward {spec!r}: the file {path} does not exist; check the path, which is relative "
            "to the working directory"
        )
    resolved = str(path.resolve())
    module_name = f"proxstep_reward_{path.stem}_{zlib.crc32(resolved.encode()):08x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module = ModuleType(module_name)
    module.__file__ = resolved
    try:
        with contextlib.ExitStack() as on_failure:
            sys.modules[module_name] = module  # dataclasses and pickle look modules up here
            on_failure.callback(sys.modules.pop, module_name)
            SourceFileLoader(module_name, resolved).exec_module(module)
            on_failure.pop_all()
    except (ImportError, SyntaxError) as error:
        raise ProxstepError(
            f"reward {spec!r}: cannot import {path} ({_one_line(error)}); correct that file"
        ) from error
    return module


def _one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())
