"""ISOPO in a plain PyTorch loop, on a small module of one's own; it needs torch alone.

    python examples/plain_loop.py

A prompt is a digit, and the policy is to count on from it: 7 should continue with 8 9 0 1. It
knows nothing at first. What a loop without ISOPO would not have is marked.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from proxstep import Isopo, completion_log_probs, sequence_ids

DIGITS, LENGTH = 10, 4
PROMPTS, GENERATIONS = 16, 8


class Policy(nn.Module):
    """A network that sees the last token only: (rows, tokens) to logits of the next one."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, width)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, DIGITS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(torch.relu(self.hidden(self.norm(self.embedding(tokens)))))


@torch.no_grad()
def sample(policy: nn.Module) -> Tensor:
    """Return prompts with completions, (prompts * generations, 1 + LENGTH)."""
    tokens = torch.randint(DIGITS, (PROMPTS, 1)).repeat_interleave(GENERATIONS, dim=0)
    for _ in range(LENGTH):
        probabilities = policy(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1)], dim=1)
    return tokens


def reward_of(tokens: Tensor) -> Tensor:
    """Return the share of each completion's digits that count on from the prompt."""
    right = (tokens[:, :1] + torch.arange(1, LENGTH + 1)) % DIGITS
    return (tokens[:, 1:] == right).float().mean(dim=1)


def advantage_of(reward: Tensor) -> Tensor:
    """Return each reward minus the mean of its prompt's completions."""
    group = reward.view(PROMPTS, GENERATIONS)
    return (group - group.mean(dim=1, keepdim=True)).flatten()


def main() -> None:
    """Train, and print the reward as it rises."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    isopo = Isopo(policy, rule="isopo")  # ISOPO
    for step in range(61):
        tokens = sample(policy)
        reward = reward_of(tokens)
        if step % 20 == 0:
            print(f"step {step}: reward {reward.mean():.3f}")
        advantages = advantage_of(reward)
        ids = sequence_ids(torch.ones_like(tokens))  # ISOPO: whose each position is
        completion_mask = torch.ones_like(tokens).bool()
        completion_mask[:, 0] = False  # the prompt
        optimizer.zero_grad()
        with isopo.microbatch(ids, advantages / len(advantages)) as microbatch:  # ISOPO
            log_probs = completion_log_probs(policy(tokens), tokens, completion_mask)
            microbatch.objective(log_probs).backward()  # without it: (-advantages @ ...).backward()
        optimizer.step()
        isopo.step()  # ISOPO


if __name__ == "__main__":
    main()
