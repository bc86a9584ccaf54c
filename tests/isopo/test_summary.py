"""The summary says what was measured, leaves out what was not, and fits a terminal."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.isopo.steps import random_step, without

from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.isopo.diagnostics.step import (
    GradientNoise,
    LayerDiagnostics,
    StepDiagnostics,
    diagnose,
)
from proxstep.isopo.diagnostics.summary import WIDTH, summary

LABELS = ["Measured", "Update", "Direction", "Weights", "Fisher", "Kernels", "Noise", "Conflict"]


def labels(text: str) -> list[str]:
    """The words at the beginnings of lines, above the table."""
    lines = text.split("\n\n")[0].splitlines()
    return [line.split()[0] for line in lines if not line.startswith(" ")]


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.split("\n\n")[1].splitlines()]


def sentences(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def with_noise(scale: float, between_groups: bool = True) -> StepDiagnostics:
    noise = GradientNoise(1.0 if math.isfinite(scale) else -1.0, scale, scale)
    found = diagnose(random_step(0).records)
    return dataclasses.replace(found, noise=noise, noise_between_groups=between_groups)


def test_a_complete_step_has_every_paragraph() -> None:
    text = summary(diagnose(random_step(0).records))
    assert labels(text) == LABELS
    assert text.isascii()


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (("fisher_sq_B", "filled_B"), {"Fisher"}),
        (("ntk_BB",), {"Update", "Direction", "Kernels", "Noise", "Conflict"}),
        (("group_B",), {"Conflict"}),
        (
            ("fisher_sq_B", "filled_B", "norm_sq_B", "ntk_BB", "group_B"),
            {"Update", "Direction", "Fisher", "Kernels", "Noise", "Conflict"},
        ),
    ],
)
def test_what_is_unknown_is_left_out(missing: tuple[str, ...], gone: set[str]) -> None:
    text = summary(diagnose(without(random_step(0), *missing)))
    assert labels(text) == [label for label in LABELS if label not in gone]
    assert "None" not in text
    assert "nan" not in text


def test_nothing_measured() -> None:
    assert summary(diagnose({})) == "No parameter was measured in this step."
    one = random_step(0).coefficients[0][:1]
    bare = summary(diagnose({"use": [LayerRecord(0 * one, 0 * one)]}))
    assert labels(bare) == ["Measured"]


@given(
    st.integers(0, 2**31),
    st.lists(st.text("abcdefgh.0123456789_", min_size=1, max_size=150), min_size=3, unique=True),
    st.sampled_from([(), ("ntk_BB",), ("fisher_sq_B", "group_B")]),
)
@settings(deadline=None, max_examples=40)
def test_lines_fit_whatever_the_parameters_are_called(
    seed: int, names: list[str], missing: tuple[str, ...]
) -> None:
    records = without(random_step(seed), *missing)
    renamed = dict(zip(names, records.values(), strict=False))
    lines = summary(diagnose(renamed)).splitlines()
    words = {word for line in lines for word in line.split() if len(word) > WIDTH - 12}
    assert all(len(line) <= WIDTH for line in lines if not words & set(line.split()))
    assert all(len(line) <= WIDTH for line in lines[-4:])


def test_the_table_ranks_uses_by_their_share() -> None:
    found = diagnose(random_step(0).records)
    by_share = sorted(found.layers, key=lambda use: -(use.grad_share or 0))
    header, *rows = table(summary(found, top=2))
    assert [row[0] for row in rows] == [use.name for use in by_share[:2]]
    assert header[2:4] == ["share", "cosine"]
    assert rows[0][1] == f"{by_share[0].grad_share:.1%}"
    leader = f"{by_share[0].name} carries {by_share[0].grad_share:.1%} of the squared gradient"
    assert leader in sentences(summary(found))


def test_the_table_has_known_columns_only() -> None:
    found = diagnose(without(random_step(0), "ntk_BB"))
    header, *rows = table(summary(found))
    assert " ".join(header) == "parameter use spread top seq"
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)


def named(use: LayerDiagnostics, name: str) -> LayerDiagnostics:
    return dataclasses.replace(use, name=name)


def test_a_long_name_keeps_the_layer_in_the_table() -> None:
    found = diagnose(random_step(0).records)
    long = "base_model.model.model.layers.17.self_attn.q_proj.lora_A.default.weight"
    renamed = dataclasses.replace(found, layers=(named(found.layers[0], long),))
    name = table(summary(renamed))[1][0]
    assert name == "..layers.17.self_attn.q_proj.lora_A.default"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (300.0, "The noise scale is 300 sequences: in a batch of that size noise and gradient"),
        (300.0, "This step measured 8: a larger batch would pay."),
        (2.0, "This step measured 8: a larger batch would gain little."),
        (math.inf, "The noise hides the gradient"),
    ],
)
def test_noise_in_words(scale: float, words: str) -> None:
    assert words in sentences(summary(with_noise(scale)))


def test_sequences_as_units_come_with_a_warning() -> None:
    warning = "where they share a prompt, there is more noise"
    assert warning in sentences(summary(with_noise(5.0, between_groups=False)))
    assert warning not in sentences(summary(with_noise(5.0)))


def test_singular_kernels_are_counted() -> None:
    assert "1 of 3 kernels is singular." in sentences(summary(diagnose(random_step(0).records)))


def test_reinforce_is_recognized() -> None:
    plain = {
        name: [dataclasses.replace(record, weight_B=2 * record.coefficient_B) for record in row]
        for name, row in random_step(0).records.items()
    }
    text = sentences(summary(diagnose(plain)))
    assert "The rule gives all sequences of a use the same factor." in text
    assert "Of all uses together it is 1.000" in text


def test_few_kernels_are_announced() -> None:
    step = random_step(0)
    step.records["up"] = [dataclasses.replace(r, ntk_BB=None) for r in step.records["up"]]
    text = sentences(summary(diagnose(step.records)))
    assert "8 sequences in 2 microbatches, 3 parameter uses." in text
    assert "What needs kernels is about the 2 uses that have one." in text
