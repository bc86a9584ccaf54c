"""Which releases of TRL the engine was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from proxstep.errors import ProxstepError

OLDEST, BEYOND = (1, 16), (1, 17)
"""The first release that is supported, and the first that is not any more.

In 1.15 GRPOTrainer itself needs Triton, so that nothing of it can be tested without an accelerator.
"""


def check_trl() -> None:
    """Refuse a missing or an untested TRL.

    Raises:
        ProxstepError: With the command that installs a tested one.
    """
    low, high = (".".join(map(str, bound)) for bound in (OLDEST, BEYOND))
    remedy = f'pip install "proxstep[trl]" (trl>={low},<{high})'
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ProxstepError(f"TRL is not installed: {remedy}") from None
    major, minor = (int(part) for part in found.split(".")[:2])
    if not OLDEST <= (major, minor) < BEYOND:
        raise ProxstepError(
            f"TRL {found} is not supported, since its trainer's insides change often: {remedy}"
        )
