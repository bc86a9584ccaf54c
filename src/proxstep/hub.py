"""The hub of models and data: whether it answers, since its own client tries for over a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

SECONDS = 5


@contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """Let the hub's libraries read `name` from their cache alone while the hub does not answer.

    What is not in the cache is then an error at once. The hub is asked only if `name` is no path
    that exists.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (Path(name).exists() or hub_answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_answers() -> bool:
    """Whether the hub answers at all, within some seconds; never, if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urlopen(constants.ENDPOINT, timeout=SECONDS).close()
    except HTTPError:
        return True
    except URLError as error:  # a certificate that only the hub's own client trusts is an answer
        return isinstance(error.reason, SSLError)
    except OSError:
        return False
    return True
