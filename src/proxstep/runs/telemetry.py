"""What a run calls sends nothing home."""

from __future__ import annotations

import os
import sys

SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # of transformers, datasets and TRL too
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",  # trackio's
    "WANDB_ERROR_REPORTING": "False",
}
"""Environment variables by which libraries are told; their children inherit them."""


def switch_off_telemetry() -> None:
    """Tell this process's libraries and its children's to report to nobody.

    A tracker that a recipe names still gets the metrics, and a model or data set of the hub is
    still loaded from there.
    """
    os.environ.update(SWITCHES)
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read its environment already
        constants.HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]
