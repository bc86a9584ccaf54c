"""Which releases of a host library an engine was tested with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from proxstep.errors import ProxstepError

Release = tuple[int, ...]
_NONE: Mapping[Release, str] = MappingProxyType({})


def check_release(
    name: str,
    package: str,
    oldest: Release,
    beyond: Release,
    reason: str,
    without: Mapping[Release, str] = _NONE,
) -> None:
    """Refuse a missing or an untested host library.

    Args:
        name: What people call it.
        package: Its distribution, which is the name of our extra too.
        oldest: The first release that is supported.
        beyond: The first one that is not any more.
        reason: Why others are not.
        without: Releases between the two that are not supported either, and why.

    Raises:
        ProxstepError: With the command that installs a tested one.
    """
    bounds = [f">={_dotted(oldest)}", f"<{_dotted(beyond)}"]
    bounds += [f"!={_dotted(release)}.*" for release in without]
    remedy = f'pip install "proxstep[{package}]" ({package}{",".join(bounds)})'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ProxstepError(f"{name} is not installed: {remedy}") from None
    numbers = _numbers(found)
    reasons = [why for release, why in without.items() if numbers[: len(release)] == release]
    if not oldest <= numbers < beyond:
        reasons = [reason]
    if reasons:
        raise ProxstepError(f"{name} {found} is not supported, since {reasons[0]}: {remedy}")


def check_trl() -> None:
    """Refuse a missing or an untested TRL.

    1.14.2 and 1.16.0 are tested; what differs between them is in trl/release.py. GRPOTrainer of
    1.14.0 and 1.14.1 does not import without vLLM's requirements.

    Raises:
        ProxstepError: With the command that installs a tested one.
    """
    without = {(1, 15): "its trainer scores tokens with Triton alone, which was not tested"}
    check_release("TRL", "trl", (1, 14, 2), (1, 17), "its trainer's insides change often", without)


def check_verl() -> None:
    """Refuse a missing or an untested verl; 0.9.1 is tested.

    Raises:
        ProxstepError: With the command that installs a tested one.
    """
    check_release("verl", "verl", (0, 9, 1), (0, 10), "its engines' insides change often")


def _dotted(release: Release) -> str:
    return ".".join(map(str, release))


def _numbers(found: str) -> Release:
    """Return a release's leading numbers, without what marks it as a development version."""
    numbers = []
    for part in found.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
