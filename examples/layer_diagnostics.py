"""What ISOPO did in each layer of a step, as a table and in words.

    python examples/layer_diagnostics.py

docs/diagnostics.md says what the figures mean.
"""

from __future__ import annotations

import torch
from plain_loop import GENERATIONS, PROMPTS, Policy, advantage_of, reward_of, sample

from proxstep import Isopo, completion_log_probs, sequence_ids
from proxstep.isopo.diagnostics.step import StepDiagnostics
from proxstep.isopo.diagnostics.summary import summary


def measured_step() -> StepDiagnostics:
    """Take a few steps, measure the last one, and return what was measured."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    isopo = Isopo(policy, rule="isopo")
    groups = torch.arange(PROMPTS).repeat_interleave(GENERATIONS)  # each completion's prompt
    for step in range(10):
        isopo.diagnose = step == 9  # it costs as much as the natural rule
        tokens = sample(policy)
        completion_mask = torch.ones_like(tokens).bool()
        completion_mask[:, 0] = False
        ids, coefficients = sequence_ids(torch.ones_like(tokens)), advantage_of(reward_of(tokens))
        optimizer.zero_grad()
        with isopo.microbatch(ids, coefficients / len(tokens), groups=groups) as microbatch:
            log_probs = completion_log_probs(policy(tokens), tokens, completion_mask)
            microbatch.objective(log_probs).backward()
        optimizer.step()
        isopo.step()
    assert isopo.diagnostics is not None
    return isopo.diagnostics


def main() -> None:
    """Print a line for each layer, and the summary."""
    step = measured_step()
    print(f"{'layer':18}{'share of gradient':>18}{'cosine to REINFORCE':>21}{'weight spread':>15}")
    for layer in step.layers:  # a figure that could not be measured is None
        figures = (layer.grad_share, layer.cosine_to_reinforce, layer.weight_spread)
        share, cosine, spread = ("-" if x is None else f"{x:.3f}" for x in figures)
        print(f"{layer.name:18}{share:>18}{cosine:>21}{spread:>15}")
    print()
    print(summary(step))


if __name__ == "__main__":
    main()
