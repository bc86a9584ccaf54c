"""Doctests of what is installed: some of the verl engine's modules need verl to be imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

collect_ignore = ["conftest.py"]
if importlib.util.find_spec("verl") is None:
    files = (Path(__file__).parent / "proxstep/engines/verl").glob("*.py")
    collect_ignore += [str(file) for file in files if "\nfrom verl" in file.read_text()]
