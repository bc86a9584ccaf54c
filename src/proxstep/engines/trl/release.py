"""What the installed release of TRL has; other files ask here, and none for its number."""

from __future__ import annotations

import inspect
from typing import Any

from trl.trainer import utils
from trl.trainer.grpo_trainer import GRPOTrainer

FusedOutput: Any = getattr(utils, "FusedCausalLMOutput", None)
"""What TRL's fused output layer returns.

None in 1.14, which has no such layer: log-probabilities are computed from the logits of the model's
own forward. Since 1.15 the forward is called with labels and returns them itself.
"""

_scoring: Any = GRPOTrainer._get_per_token_logps_and_entropies
_scoring = getattr(GRPOTrainer, "_full_logits_logps", _scoring)  # 1.14 passes on what it is given

SCORING_INPUTS = frozenset(inspect.signature(_scoring).parameters)
"""Arguments of the scoring of completions, an image's among them, as a batch has them."""
