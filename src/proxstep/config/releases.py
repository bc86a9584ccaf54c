"""Which releases of a host library an engine was tested with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from proxstep.errors import ProxstepError


def check_release(name: str, package: str, supported: str, reasons: Mapping[str, str]) -> None:
    """Refuse a missing or an untested host library.

    Args:
        name: What people call it.
        package: Its distribution, which is the name of our extra too.
        supported: Its releases, as the extra asks for them.
        reasons: Why others are not supported, by releases; the first that fits is said.

    Raises:
        ProxstepError: With the command that installs a tested one.
    """
    remedy = f'pip install "proxstep[{package}]" ({package}{supported})'
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ProxstepError(f"{name} is not installed: {remedy}") from None
    from packaging.specifiers import SpecifierSet  # transformers needs it itself

    if not SpecifierSet(supported).contains(found, prereleases=True):
        why = next(why for of, why in reasons.items() if SpecifierSet(of).contains(found, True))
        raise ProxstepError(f"{name} {found} is not supported, since {why}: {remedy}")


def check_trl() -> None:
    """Refuse a missing or an untested TRL.

    1.14.2 and 1.16.0 are tested; what differs between them is in trl/release.py. GRPOTrainer of
    1.14.0 and 1.14.1 does not import without vLLM's requirements.

    Raises:
        ProxstepError: With the command that installs a tested one.
    """
    reasons = {
        "==1.15.*": "its trainer scores tokens with Triton alone, which was not tested",
        "": "its trainer's insides change often",
    }
    check_release("TRL", "trl", ">=1.14.2,<1.17,!=1.15.*", reasons)


def check_verl() -> None:
    """Refuse a missing or an untested verl, or one beside our TRL; 0.9.1 is tested.

    Where TRL is installed, verl 0.9.1 imports a class that TRL 1.14.2 and 1.16.0 do not have.

    Raises:
        ProxstepError: With the remedy.
    """
    check_release("verl", "verl", ">=0.9.1,<0.10", {"": "its engines' insides change often"})
    if reason := beside_trl():
        raise ProxstepError(reason)


def beside_trl() -> str:
    """Return why verl 0.9 does not work beside the TRL that is installed; empty where it does."""
    try:
        found = version("trl")
    except PackageNotFoundError:
        return ""
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(">=1.14").contains(found, prereleases=True):
        return ""
    return (
        f"verl 0.9 does not load a model beside TRL {found}, of which it imports a class that "
        "is gone: install verl in an environment of its own, or pip uninstall trl"
    )
