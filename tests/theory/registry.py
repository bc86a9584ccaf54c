"""What a statement of a paper is: what it says, whether it holds, and a check that can fail."""

from __future__ import annotations
import __future__

import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Holds = Literal["as printed", "with a correction", "not as printed"]

PRINTED: Holds = "as printed"
CORRECTED: Holds = "with a correction"
FALSE: Holds = "not as printed"


@dataclass(frozen=True)
class Mutant:
    """A change to one function under which a check must fail.

    Attributes:
        function: Its path below proxstep, or below tests.theory where it begins with maths.
        old: A piece of its source, which occurs once.
        new: What stands there instead.
    """

    function: str
    old: str
    new: str

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the function with the change, wherever it was imported to."""
        package = "tests.theory" if self.function.startswith("maths.") else "proxstep"
        function = inspect.unwrap(pkgutil.resolve_name(f"{package}.{self.function}"))
        module, name = sys.modules[function.__module__], function.__name__
        source = textwrap.dedent(inspect.getsource(function))
        if source.count(self.old) != 1:
            raise ValueError(f"{self.old!r} occurs {source.count(self.old)} times in {name}")
        changed = compile(
            source.replace(self.old, self.new),
            f"<mutant of {name}>",
            "exec",
            flags=__future__.annotations.compiler_flag,
        )
        names: dict[str, Callable] = {}
        exec(changed, vars(module), names)
        original = function.__code__
        function.__code__ = names[name].__code__
        try:
            yield
        finally:
            function.__code__ = original


@dataclass(frozen=True)
class Statement:
    """A statement of a paper.

    Attributes:
        paper: OPO or ISOPO.
        number: Where it stands.
        says: What it says, in one sentence.
        holds: Whether it does.
        remark: What is wrong with it as printed, or what else is worth knowing.
        check: Raises AssertionError unless what `holds` and `remark` say is so, on the random
            instance of a seed.
        mutants: Changes under which the check fails.
    """

    paper: str
    number: str
    says: str
    holds: Holds
    remark: str
    check: Callable[[int], None]
    mutants: tuple[Mutant, ...]

    @property
    def test_id(self) -> str:
        """The name in the tests and in docs/theory.md."""
        words = re.findall(r"[a-z0-9.]+", f"{self.paper} {self.number}".lower())
        return "-".join(word.strip(".") for word in words)


def states(
    paper: str,
    number: str,
    says: str,
    *mutants: tuple[str, str, str],
    holds: Holds = PRINTED,
    remark: str = "",
) -> Callable[[Callable[[int], None]], Statement]:
    """Turn the decorated check into a statement."""

    def statement(check: Callable[[int], None]) -> Statement:
        found = tuple(Mutant(*mutant) for mutant in mutants)
        return Statement(paper, number, says, holds, remark, check, found)

    return statement
