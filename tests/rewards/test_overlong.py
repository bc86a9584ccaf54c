"""The soft punishment for length against the equation of the paper, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxstep.errors import ProxstepError
from proxstep.rewards import overlong_punishment


def equation_13(length: int, longest: int, cache: int) -> float:
    """arXiv 2503.14476, as printed."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@given(
    longest=st.integers(1, 300),
    share=st.floats(0, 1),
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=30),
    penalty=st.floats(0, 5),
)
def test_it_is_the_equation_times_the_penalty(
    longest: int, share: float, lengths: list[int], penalty: float
) -> None:
    cache = max(1, round(share * longest))
    found = overlong_punishment(lengths, max_length=longest, buffer=cache, penalty=penalty)
    expected = [penalty * equation_13(length, longest, cache) for length in lengths]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_paper_s_own_numbers() -> None:
    lengths = [100, 16_384, 18_432, 20_480]
    found = overlong_punishment(lengths, max_length=20_480, buffer=4_096)
    assert found == [0.0, 0.0, -0.5, -1.0]


@pytest.mark.parametrize("buffer", [0, -1, 9])
def test_a_buffer_outside_the_completion_is_refused(buffer: int) -> None:
    with pytest.raises(ProxstepError, match=rf"buffer is {buffer} tokens; it must be 1 to 8"):
        overlong_punishment([3], max_length=8, buffer=buffer)
