"""The helpers of a loop of one's own, against slow forms."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from proxstep import completion_log_probs, packed_sequence_ids, sequence_ids
from proxstep.errors import ProxstepError


def test_log_probs_equal_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 7, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(7, (3, 6))
    mask = torch.rand(3, 6) < 0.5
    mask[:, 0] = False
    found = completion_log_probs(logits, tokens, mask.long(), temperature=0.7)
    assert found.shape == (3, 5)
    for row in range(3):
        for t in range(1, 6):
            distribution = torch.softmax(logits[row, t - 1] / 0.7, -1)
            expected = distribution[tokens[row, t]].log() if mask[row, t] else torch.tensor(0.0)
            torch.testing.assert_close(found[row, t - 1], expected.double(), rtol=1e-12, atol=0)
    found.sum().backward()
    predicts = mask[:, 1:]
    assert torch.equal(logits.grad[:, :-1].abs().sum(-1) > 0, predicts)
    assert not logits.grad[:, -1].any()


def test_logits_that_predict_no_completion_do_not_reach_the_log_probs() -> None:
    logits = torch.full((1, 3, 4), float("nan"))
    logits[0, 1] = 0.0
    logits.requires_grad_()
    found = completion_log_probs(logits, torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]]))
    assert torch.equal(found[:, 0], torch.zeros(1))
    assert torch.isfinite(found).all()


def test_labels_may_stand_for_tokens_where_none_counts() -> None:
    logits, tokens = torch.randn(1, 3, 4), torch.tensor([[-100, -100, 3]])
    found = completion_log_probs(logits, tokens, torch.tensor([[0, 0, 1]]))
    assert torch.equal(found, completion_log_probs(logits, tokens.clamp(min=0), tokens > 0))


def test_a_packed_row_gives_what_its_sequences_give_alone() -> None:
    torch.manual_seed(1)
    logits, tokens = torch.randn(1, 7, 5), torch.randint(5, (1, 7))
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0]])
    packed = completion_log_probs(logits, tokens, mask)
    alone = [
        completion_log_probs(logits[:, part], tokens[:, part], mask[:, part]).sum()
        for part in (slice(0, 4), slice(4, 6))
    ]
    ids = packed_sequence_ids(torch.tensor([4, 2]), 7)[:, 1:]
    for number, value in enumerate(alone):
        torch.testing.assert_close(packed[ids == number].sum(), value)


def test_ids_of_padded_rows_and_of_lengths() -> None:
    mask = torch.tensor([[False, True, True], [True, True, False]])
    assert sequence_ids(mask).tolist() == [[-1, 0, 0], [1, 1, -1]]
    assert packed_sequence_ids([1, 0, 2]).tolist() == [[0, 2, 2]]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: packed_sequence_ids([3, 2], 4), "sum, 5, above num_tokens 4"),
        (lambda: packed_sequence_ids([3, -1]), "negative"),
        (lambda: log_probs(mask=[[1, 0, 0]]), "first token"),
        (lambda: log_probs(mask=[[0, 1]]), "must agree"),
        (lambda: log_probs(temperature=0.0), "temperature must be positive, got 0.0"),
        (
            lambda: completion_log_probs(SimpleNamespace(), torch.zeros(1, 1), torch.zeros(1, 1)),
            r"logits is SimpleNamespace.*\.logits",
        ),
    ],
)
def test_mistakes_are_named(call, reason: str) -> None:
    with pytest.raises(ProxstepError, match=reason):
        call()


def log_probs(mask=((0, 0, 1),), temperature: float = 1.0) -> torch.Tensor:
    logits, tokens = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.long)
    return completion_log_probs(logits, tokens, torch.tensor(mask), temperature)
