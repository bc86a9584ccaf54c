"""A KL budget in a loop of one's own: a learning rate 30 times too large, with it and without.

    python examples/kl_budget_loop.py

The loss is an ordinary one here (REINFORCE); the budget takes any. What it adds is marked. What is
printed is measured on other completions, where a step has the budget's size in the median, and some
are larger.
"""

from __future__ import annotations

import torch
from plain_loop import Policy, advantage_of, reward_of, sample
from torch import Tensor

from proxstep import KlBudget, completion_log_probs

LEARNING_RATE, TOO_LARGE, NATS, STEPS = 3e-3, 30, 0.03, 60


def score(policy: Policy, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the completions' tokens, and which tokens count."""
    mask = torch.ones_like(tokens).bool()
    mask[:, 0] = False
    return completion_log_probs(policy(tokens), tokens, mask), mask[:, 1:]


@torch.no_grad()
def divergence(before: Policy, after: Policy, tokens: Tensor) -> float:
    """Return KL(before || after) in nats per completion: exact over each next token."""
    old, new = (policy(tokens[:, :-1]).log_softmax(-1) for policy in (before, after))
    return (old.exp() * (old - new)).sum(-1).sum(-1).mean().item()


def train(learning_rate: float, nats: float | None) -> tuple[float, float, float]:
    """Return the last reward, and the median and the largest KL divergence of a step, in nats."""
    torch.manual_seed(0)
    policy, before = Policy(), Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    if nats is not None:
        optimizer = KlBudget(optimizer, policy, nats=nats, note=print)  # the budget
    moved = []
    for _ in range(STEPS):
        tokens = sample(policy)
        before.load_state_dict(policy.state_dict())
        optimizer.zero_grad()
        loss = -(advantage_of(reward_of(tokens)) @ score(policy, tokens)[0].sum(dim=1))
        (loss / len(tokens)).backward()
        if nats is None:
            optimizer.step()
        else:
            optimizer.step(lambda tokens=tokens: score(policy, tokens))  # the budget
        moved.append(divergence(before, policy, sample(before)))
    step_nats = torch.tensor(moved)
    return reward_of(sample(policy)).mean().item(), step_nats.median().item(), max(moved)


def main() -> None:
    """Compare the three."""
    for name, learning_rate, nats in (
        ("tuned learning rate, no budget", LEARNING_RATE, None),
        (f"{TOO_LARGE} times larger, no budget", TOO_LARGE * LEARNING_RATE, None),
        (f"{TOO_LARGE} times larger, {NATS} nats", TOO_LARGE * LEARNING_RATE, NATS),
    ):
        reward, median, largest = train(learning_rate, nats)
        print(f"{name}: reward {reward:.3f}; nats a step: median {median:.3f}, most {largest:.3f}")


if __name__ == "__main__":
    main()
