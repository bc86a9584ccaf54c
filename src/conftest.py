"""Doctests of what is installed: the verl engines' modules need verl to be imported."""

from __future__ import annotations

import importlib.util

collect_ignore = ["conftest.py"]
collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["proxstep/engines/verl*"]
