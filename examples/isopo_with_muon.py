"""ISOPO's gradient under two optimizers: Muon for the hidden matrices, AdamW for the rest.

    python examples/isopo_with_muon.py

The rule is in the gradient, so that any optimizer can follow. Muon needs torch 2.9 or newer.
"""

from __future__ import annotations

import torch
from plain_loop import Policy, advantage_of, reward_of, sample

from proxstep import Isopo, completion_log_probs, sequence_ids


def main() -> None:
    """Train, and print the reward as it rises."""
    torch.manual_seed(0)
    policy = Policy()
    matrices = [policy.hidden.weight]  # of hidden layers: not embeddings, not the output layer
    others = [p for p in policy.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-2, adjust_lr_fn="match_rms_adamw"),  # in AdamW's units
        torch.optim.AdamW(others, lr=3e-3),
    ]
    isopo = Isopo(policy, rule="isopo")
    for step in range(61):
        tokens = sample(policy)
        reward = reward_of(tokens)
        if step % 20 == 0:
            print(f"step {step}: reward {reward.mean():.3f}")
        completion_mask = torch.ones_like(tokens).bool()
        completion_mask[:, 0] = False
        coefficients = advantage_of(reward) / len(tokens)
        with isopo.microbatch(sequence_ids(torch.ones_like(tokens)), coefficients) as microbatch:
            log_probs = completion_log_probs(policy(tokens), tokens, completion_mask)
            microbatch.objective(log_probs).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        isopo.step()


if __name__ == "__main__":
    main()
