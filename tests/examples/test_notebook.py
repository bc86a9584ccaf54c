"""The notebook first_steps.ipynb runs from its first cell to its last, and its curves rise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert printed(notebook) == ""
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    assert NOTEBOOK.stat().st_size < 30_000


@pytest.mark.slow
# Of pyzmq's sockets, jupyter_client's own event loop, and a debugger that this Python cannot have.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(jupyter_client|zmq|tornado).*")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1] / "src"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = printed(notebook)
    for name in ("reinforce", "isopo", "opo"):
        (first, last) = re.findall(rf"^{name}: reward (\S+) at first, (\S+) at last", text, re.M)[0]
        assert float(first) < 0.2
        assert float(last) > 0.9, name
    tuned, too_large, budget = map(
        float, re.findall(r"^learning rate .*: reward (\S+) at", text, re.M)
    )
    assert too_large < 0.6
    assert min(tuned, budget) > 0.85
    images = [
        o
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert len(images) == 2
