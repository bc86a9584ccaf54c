"""verl's tests: collected where verl is installed, on the CPU platform."""

from __future__ import annotations

import importlib.util
import os
import warnings

if importlib.util.find_spec("verl") is None:
    collect_ignore_glob = ["*.py"]
else:
    collect_ignore_glob = ["cpu/*.py"]  # collected by path, the plugin would register itself twice
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "tests.verl.cpu"
    with warnings.catch_warnings():  # verl warns of the engines that are not installed
        warnings.simplefilter("ignore")
        import verl.workers.engine  # noqa: F401
