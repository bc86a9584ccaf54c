from __future__ import annotations

import pytest
import torch

from proxstep.logprobs.tokens import entropy, kl_divergence, token_log_probs


@pytest.mark.parametrize("seed", range(5))
def test_against_torch_distributions(seed: int) -> None:
    torch.manual_seed(seed)
    p, q = torch.randn(2, 3, 4, 7) * 3
    token = torch.randint(7, (3, 4))
    ours = torch.distributions.Categorical(logits=p)
    other = torch.distributions.Categorical(logits=q)
    assert torch.allclose(token_log_probs(p, token), ours.log_prob(token), atol=1e-5)
    assert torch.allclose(entropy(p), ours.entropy(), atol=1e-5)
    expected = torch.distributions.kl_divergence(ours, other)
    assert torch.allclose(kl_divergence(p, q), expected, atol=1e-4)


def test_bfloat16_logits_are_widened() -> None:
    logits = torch.randn(2, 3, 50).bfloat16()
    token = torch.randint(50, (2, 3))
    expected = token_log_probs(logits.float(), token)
    assert token_log_probs(logits, token).dtype == torch.float32
    assert torch.equal(token_log_probs(logits, token), expected)
