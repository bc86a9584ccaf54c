"""A step's diagnostics: what is missing or degenerate, what is refused, and the ways out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tests.isopo.steps import DIMENSIONS, SIZES, layer, random_step, without

from proxstep.errors import ProxstepError
from proxstep.isopo.diagnostics.records import LayerRecord
from proxstep.isopo.diagnostics.step import (
    GradientNoise,
    LayerDiagnostics,
    Quantiles,
    StepDiagnostics,
    diagnose,
)


def test_counts_and_order() -> None:
    found = diagnose(random_step(0).records)
    assert (found.num_sequences, found.num_microbatches, found.num_kernels) == (8, 2, 3)
    assert [use.name for use in found.layers] == list(DIMENSIONS)


def test_constant_or_few_lengths_have_no_correlation() -> None:
    step = random_step(0)
    ones = {
        name: [
            dataclasses.replace(record, fisher_sq_B=torch.full_like(record.weight_B, 0.1))
            for record in row
        ]
        for name, row in step.records.items()
    }
    assert diagnose(ones).fisher_norm_correlation is None
    lengths = torch.tensor([1.0, 2.0, 5.0])
    for size, correlation in ((2, None), (3, 1.0)):
        square = lengths[:size]
        own = one_use(LayerRecord(square, square, fisher_sq_B=square**2, norm_sq_B=square))
        assert own.fisher_norm_correlation == pytest.approx(correlation)


def test_reinforce_has_no_spread_and_its_own_direction() -> None:
    step = random_step(1)
    plain = {
        name: [dataclasses.replace(record, weight_B=record.coefficient_B) for record in row]
        for name, row in step.records.items()
    }
    found = diagnose(plain)
    assert found.weight_spread == 0
    assert found.cosine_to_reinforce == pytest.approx(1)


def test_final_norms_replace_the_kernels_for_the_shares() -> None:
    step = random_step(0)
    norms = {"up": 3.0, "head": 1.0, "frozen_elsewhere": 4.0}
    for records in (step.records, without(step, "ntk_BB")):
        found = diagnose(records, norms)
        shares = [use.grad_share for use in found.layers]
        assert shares == [pytest.approx(3 / 8), None, pytest.approx(1 / 8)]


@pytest.mark.parametrize(
    ("norms", "words"), [({"up": -1.0}, "grad_norm_sq\\['up'\\]"), ({"other": 1.0}, "'up'")]
)
def test_final_norms_that_cannot_be_right_are_refused(norms: dict, words: str) -> None:
    with pytest.raises(ProxstepError, match=words):
        diagnose(random_step(0).records, norms)


def test_without_groups_sequences_are_the_units() -> None:
    step = random_step(0)
    found = diagnose(without(step, "group_B"))
    assert not found.noise_between_groups
    assert found.noise is not None
    assert found.group_conflict is None
    assert found.opposed_coefficients is None


def test_microbatches_that_do_not_correspond_have_no_whole() -> None:
    step = random_step(0)
    step.records["up"] = step.records["up"][1:]
    found = diagnose(step.records)
    assert found.noise is None
    assert found.group_conflict is None
    assert layer(found, "up").noise is not None
    assert found.cosine_to_reinforce is not None


# -- what is missing or degenerate -----------------------------------------------------------------

FROM_KERNELS = {
    "cosine_to_reinforce",
    "grad_share",
    "ntk_eigenvalue_min",
    "ntk_eigenvalue_max",
    "ntk_condition",
    "ntk_effective_rank",
    "ntk_off_diagonal",
    "noise",
    "group_conflict",
}


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ((), set()),
        (("fisher_sq_B",), {"fisher", "fisher_norm_correlation"}),
        (("filled_B",), {"frac_filled_fisher"}),
        (("norm_sq_B",), set()),
        (("ntk_BB",), FROM_KERNELS),
        (
            ("ntk_BB", "norm_sq_B"),
            FROM_KERNELS
            | {"norm", "fisher_norm_correlation", "max_contribution_share"}
            | {"norm_length_correlation"},
        ),
        (("length_B",), {"weight_length_correlation", "norm_length_correlation"}),
        (("group_B",), {"group_conflict"}),
    ],
)
def test_only_what_needs_a_missing_statistic_is_unknown(missing: tuple, unknown: set) -> None:
    step = random_step(3)
    complete, found = diagnose(step.records), diagnose(without(step, *missing))
    for all_known, use in zip(complete.layers, found.layers, strict=True):
        assert {name for name, value in vars(use).items() if value is None} == unknown
        for name in set(vars(use)) - unknown - {"noise", "fisher", "fisher_norm_correlation"}:
            value = getattr(use, name)
            expected = getattr(all_known, name)
            if isinstance(value, float):
                assert value == pytest.approx(expected)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_use_without_statistics_leaves_the_others_alone() -> None:
    step = random_step(0)
    bare = [LayerRecord(c, c) for c in step.coefficients]
    found = diagnose({"bare": bare, **step.records})
    alone = diagnose(step.records)
    for use, expected in zip(found.layers[1:], alone.layers, strict=True):
        assert numbers(use) == pytest.approx(numbers(expected), nan_ok=True)
    for name in ("num_kernels", "noise.variance", "group_conflict", "cosine_to_reinforce"):
        assert numbers(found)[name] == pytest.approx(numbers(alone)[name])


def numbers(figures: StepDiagnostics | LayerDiagnostics) -> dict[str, float]:
    """A record's numbers by name, NaN for None."""
    found: dict[str, float] = {}
    for name, value in dataclasses.asdict(figures).items():
        if isinstance(value, dict):
            found |= {f"{name}.{part}": number for part, number in value.items()}
        elif not isinstance(value, str | list | tuple):
            found[name] = math.nan if value is None else value
    return found


def one_use(record: LayerRecord) -> LayerDiagnostics:
    return diagnose({"use": [record]}).layers[0]


def test_one_sequence() -> None:
    four, one = torch.tensor([[4.0]]), torch.ones(1)
    own = one_use(LayerRecord(one, 0.5 * one, one, one < 0, 4 * one, four, one.long()))
    assert own.fisher == Quantiles(1.0, 1.0, 1.0, 1.0, 1.0)
    assert own.norm == Quantiles(2.0, 2.0, 2.0, 2.0, 2.0)
    assert (own.weight_spread, own.max_weight_share, own.max_contribution_share) == (0, 1, 1)
    assert (own.cosine_to_reinforce, own.grad_share) == (1, 1)
    assert (own.ntk_condition, own.ntk_effective_rank, own.ntk_off_diagonal) == (1, 1, 0)
    assert (own.noise, own.group_conflict, own.fisher_norm_correlation) == (None, None, None)


def test_a_sequence_without_coefficient_has_no_factor() -> None:
    """The natural rule gives it a weight all the same."""
    coefficient, weight = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.3, 2.0, -4.0])
    own = one_use(LayerRecord(coefficient, weight))
    assert own.weight_spread == pytest.approx(1 / 3)
    assert own.max_weight_share == pytest.approx(4 / 6.3)


def test_zero_coefficients() -> None:
    record = random_step(0).records["up"][0]
    zeros = torch.zeros_like(record.weight_B)
    own = one_use(dataclasses.replace(record, coefficient_B=zeros, weight_B=zeros))
    for name in ("weight_spread", "max_weight_share", "max_contribution_share", "grad_share"):
        assert getattr(own, name) is None
    assert own.cosine_to_reinforce is None
    assert own.noise == GradientNoise(0.0, 0.0, None)
    assert own.group_conflict is None
    assert own.norm is not None
    assert own.ntk_condition is not None


def test_zero_gradients() -> None:
    record = random_step(0).records["up"][0]
    zeros = torch.zeros_like(record.weight_B)
    own = one_use(
        dataclasses.replace(
            record, fisher_sq_B=zeros, filled_B=zeros == 0, norm_sq_B=zeros, ntk_BB=zeros.diag()
        )
    )
    assert own.norm == Quantiles(0.0, 0.0, 0.0, 0.0, 0.0)
    assert own.frac_filled_fisher == 1
    assert (own.ntk_eigenvalue_min, own.ntk_eigenvalue_max) == (0, 0)
    for name in ("fisher", "cosine_to_reinforce", "grad_share", "ntk_condition"):
        assert getattr(own, name) is None
    for name in ("ntk_effective_rank", "ntk_off_diagonal", "group_conflict"):
        assert getattr(own, name) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kernel_that_is_not_finite_is_unknown(value: float) -> None:
    step = random_step(0)
    step.records["up"] = [
        dataclasses.replace(record, ntk_BB=torch.full((size, size), value))
        for size, record in zip(SIZES, step.records["up"], strict=True)
    ]
    found = diagnose(step.records)
    assert layer(found, "up").ntk_condition is None
    assert layer(found, "up").cosine_to_reinforce is None
    assert found.num_kernels == 2
    json.dumps(found.to_dict(), allow_nan=False)


def test_no_records() -> None:
    for records in ({}, {"up": []}):
        found = diagnose(records)
        assert found.layers == ()
        assert found.scalars() == {}
        json.dumps(found.to_dict(), allow_nan=False)


# -- the ways out ----------------------------------------------------------------------------------


def test_to_dict_has_every_field_and_only_finite_numbers() -> None:
    found = diagnose(random_step(0).records)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(plain) == {field.name for field in dataclasses.fields(StepDiagnostics)}
    for use, entry in zip(found.layers, plain["layers"], strict=True):
        assert set(entry) == {field.name for field in dataclasses.fields(LayerDiagnostics)}
        assert entry["weight_spread"] == use.weight_spread
    assert plain["layers"][1]["ntk_condition"] is None
    assert plain["layers"][1]["ntk_eigenvalue_max"] > 0


def test_hidden_gradient_is_none_in_json_and_absent_from_scalars() -> None:
    g = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    ones = torch.ones(2)
    found = diagnose({"use": [LayerRecord(ones, ones, ntk_BB=g @ g.mT)]})
    assert found.noise is not None
    assert found.noise.scale == math.inf
    assert found.to_dict()["noise"]["scale"] is None
    assert found.to_dict()["noise"]["squared_gradient"] < 0
    assert "noise_scale" not in found.scalars()
    assert found.scalars()["noise_variance"] > 0


def test_scalars_are_the_whole_models_known_figures() -> None:
    step = random_step(0)
    found = diagnose(step.records)
    scalars = found.scalars()
    assert all(isinstance(value, float) and math.isfinite(value) for value in scalars.values())
    assert scalars["group_conflict"] == found.group_conflict
    assert found.noise is not None
    assert scalars["noise_squared_gradient"] == found.noise.squared_gradient
    without_kernels = diagnose(without(step, "ntk_BB")).scalars()
    assert set(scalars) - set(without_kernels) >= {"cosine_to_reinforce", "group_conflict"}
    assert without_kernels["weight_spread"] == scalars["weight_spread"]


def test_half_precision_and_any_group_labels_change_nothing() -> None:
    step = random_step(0)
    exact = {
        name: [
            dataclasses.replace(record, weight_B=record.weight_B.bfloat16().double())
            for record in row
        ]
        for name, row in step.records.items()
    }
    labels = [-7 * group + 3 for group in step.groups]
    mixed = {
        name: [
            dataclasses.replace(record, weight_B=record.weight_B.bfloat16(), group_B=label)
            for record, label in zip(row, labels, strict=True)
        ]
        for name, row in exact.items()
    }
    assert diagnose(exact) == diagnose(mixed)


def test_every_figure_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text()
    scalars = diagnose(random_step(0).records).scalars()
    names = {
        field.name
        for record in (StepDiagnostics, LayerDiagnostics, GradientNoise)
        for field in dataclasses.fields(record)
    }
    undocumented = {name for name in names | set(scalars) if f"`{name}`" not in page}
    assert not undocumented
