"""ISOPO on two ranks against one process, and against other ways to spread the same sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.distributed import Ranks
from tests.isopo.rules import paper
from tests.isopo.spreads import WRAPPERS, Outcome, Run, Spread, build, microbatch, train
from tests.selection import slow
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from proxstep.errors import ProxstepError
from proxstep.isopo import IntraProjectingRule, IsometricRule, Rule
from proxstep.isopo.means import TrailingMeans
from proxstep.isopo.plan import Rows
from proxstep.isopo.sampling import SampleStore
from proxstep.isopo.vector import VectorGradients

ACCUMULATED: Spread = (((0, 1), (4,)), ((2, 3), (5, 6)))
EVEN: Spread = (((0, 1, 4),), ((2, 3, 5, 6),))
UNEVEN: Spread = (((6,),), ((5, 0, 3, 1, 2, 4),))
RESHUFFLED: Spread = (((6,), (0,)), ((5, 3), (1, 2, 4)))

DAMPED = IsometricRule(-1.0, -0.5, -2.0, damping=1.0, scale="preserved")
EVERY_POSITION = {"num_overlap_positions": None}
DDP, FSDP = "ddp(isopo)", "isopo(fsdp)"


_OUTCOMES: dict[str, Outcome] = {}


def one_process(run: Run) -> Outcome:
    """Train here, once for all tests."""
    if repr(run) not in _OUTCOMES:
        _OUTCOMES[repr(run)] = train(run)
    return _OUTCOMES[repr(run)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = torch.linalg.vector_norm(found[name].double() - value.double())
        assert error <= tolerance * torch.linalg.vector_norm(value.double()), name


def check_same(outcomes: list[Outcome], expected: Outcome, tolerance: float = 1e-10) -> None:
    """Every rank has the gradients and the trailing means of the other, and those expected."""
    for outcome in outcomes:
        for found, gradient in zip(outcome.gradients, expected.gradients, strict=True):
            check(found, gradient, tolerance)
        check(outcome.state["trailing"], expected.state["trailing"], tolerance)
        assert outcome.norms == pytest.approx(expected.norms, rel=tolerance)
        for name, mean in outcome.state["trailing"].items():
            assert torch.equal(mean, outcomes[0].state["trailing"][name])


# -- DDP and FSDP2 against one process that accumulates all microbatches ---------------------------


RULES = [
    (paper("isopo"), "gpt2"),
    (paper("isopo-figure4"), "qwen3-untied"),
    (paper("isopo-natural"), "qwen3-tied"),
    (DAMPED, "qwen3-tied"),
    (IntraProjectingRule(rank=2), "qwen3-tied"),
]
CASES = [
    pytest.param(
        *(rule, family, wrapper),
        # The order of wrapping is tried with one rule, and the rules with one order and model.
        marks=()
        if rule is DAMPED or (wrapper == FSDP and family == "qwen3-tied")
        else pytest.mark.slow,
    )
    for rule, family in RULES
    for wrapper in WRAPPERS
]


@pytest.mark.parametrize(("rule", "family", "wrapper"), CASES)
def test_ranks_train_as_one_process(ranks: Ranks, rule: str | Rule, family: str, wrapper) -> None:
    """Three steps of AdamW, with gradients accumulated over two microbatches."""
    run = Run((ACCUMULATED,) * 3, rule, family, wrapper, options=EVERY_POSITION)
    expected, outcomes = one_process(run.alone()), ranks.run(train, run)
    check_same(outcomes, expected)
    check(outcomes[0].parameters, expected.parameters, 1e-8)


VARIATIONS: dict[str, dict[str, Any]] = {
    "static graph": {
        "wrapper": DDP,
        "wrapping": {"static_graph": True},
        "spreads": (EVEN, UNEVEN),  # DDP itself cannot start one with an unsynchronized backward
    },
    "unused parameters looked for": {"wrapper": DDP, "wrapping": {"find_unused_parameters": True}},
    "views of buckets": {
        "wrapper": DDP,
        "wrapping": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    },
    "resharded": {"wrapper": FSDP, "wrapping": {"reshard_after_forward": True}},
    "not resharded": {"wrapper": FSDP, "wrapping": {"reshard_after_forward": False}},
    "layers sharded first": {"wrapper": FSDP, "leaves": True, "family": "qwen3-untied"},
    "layers sharded last": {"wrapper": "fsdp(isopo)", "leaves": True, "family": "qwen3-untied"},
}
for _wrapper, _name in ((DDP, "DDP"), (FSDP, "FSDP2")):
    VARIATIONS |= {
        f"{_name}, checkpointed": {"wrapper": _wrapper, "checkpointing": "transformers"},
        f"{_name}, checkpointed by torch": {"wrapper": _wrapper, "checkpointing": "torch"},
        f"{_name}, clipped": {"wrapper": _wrapper, "clip": 0.1},
        f"{_name}, forwards in between": {"wrapper": _wrapper, "evaluating": True},
        f"{_name}, group by name": {"wrapper": _wrapper, "group": "all"},
        f"{_name}, others frozen": {
            "wrapper": _wrapper,
            "options": EVERY_POSITION | {"other_parameters": "freeze"},
        },
    }


FAST = {
    *("static graph", "resharded", "layers sharded last"),
    *("DDP, checkpointed", "DDP, clipped", "DDP, group by name"),
    *("FSDP2, checkpointed by torch", "FSDP2, forwards in between", "FSDP2, others frozen"),
}
"""Each kind of variation once, under DDP or under FSDP2."""


@pytest.mark.parametrize("name", [n if n in FAST else slow(n)[0] for n in VARIATIONS])
def test_variations_train_as_one_process(ranks: Ranks, name: str) -> None:
    run = Run((ACCUMULATED,) * 2, DAMPED, options=EVERY_POSITION).but(**VARIATIONS[name])
    check_same(ranks.run(train, run), one_process(run.alone()))


@pytest.mark.parametrize("wrapper", [FSDP, *slow(DDP)])
def test_single_precision(ranks: Ranks, wrapper: str) -> None:
    run = Run((ACCUMULATED,), DAMPED, "gpt2", wrapper, dtype=torch.float32)
    check_same(ranks.run(train, run), one_process(run.alone()), 1e-5)


def test_parameters_sharded_in_single_and_used_in_half_precision(ranks: Ranks) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    run = Run((EVEN,), paper("isopo"), wrapper=FSDP, options=EVERY_POSITION, dtype=torch.float32)
    outcomes = ranks.run(train, run.but(wrapping={"mp_policy": policy}))
    check_same(outcomes, one_process(run.alone().but(dtype=torch.bfloat16)), 0.01)


# -- what does not depend on the spread ------------------------------------------------------------


def test_with_its_own_positions_a_microbatch_depends_on_the_spread() -> None:
    run = Run((EVEN,), paper("isopo"), options={"num_overlap_positions": 9})
    gradient, other = (one_process(r).gradients[0] for r in (run.alone(), run.whole()))
    assert not torch.allclose(gradient["model.norm.weight"], other["model.norm.weight"], rtol=0.01)


RANKS = {"overlap_source": "ranks"}


@pytest.mark.parametrize(
    ("rule", "options", "filled", "wrapper"),
    [
        (paper("isopo"), {"num_overlap_positions": 9}, False, DDP),
        (paper("isopo"), {"num_overlap_positions": 2}, True, FSDP),
        (DAMPED, {"num_overlap_positions": 9, "fisher_denominator": "trailing"}, False, DDP),
        *slow(
            (
                paper("isopo"),
                {"num_overlap_positions": 5, "overlap_positions": "completion"},
                True,
                DDP,
            ),
            (paper("isopo-npg"), {"num_overlap_positions": None}, False, DDP),
            (paper("isopo-figure4"), {"num_overlap_positions": 9}, False, FSDP),
            (DAMPED, {"num_overlap_positions": 9}, False, DDP),
            (DAMPED, {"num_overlap_positions": None}, False, FSDP),
        ),
    ],
)
def test_samples_of_all_ranks_make_the_spread_over_ranks_irrelevant(
    ranks: Ranks, rule: str | Rule, options: dict[str, Any], filled: bool, wrapper: str
) -> None:
    """The first step included: there, what is damped by or filled in is a mean over the ranks."""
    run = Run((EVEN, EVEN), rule, wrapper=wrapper, options=RANKS | options)
    expected = one_process(run.whole())
    assert (expected.scalars[0]["frac_filled_fisher"] > 0) == filled
    for spreads in ((EVEN, EVEN), (UNEVEN, EVEN)):
        check_same(ranks.run(train, run.but(spreads=spreads)), expected)


@pytest.mark.parametrize(
    ("rule", "num_positions", "wrapper"),
    [
        (paper("isopo"), 9, DDP),
        *slow((paper("isopo-figure4"), 2, FSDP), (DAMPED, 100, FSDP)),
    ],
)
def test_samples_of_the_previous_step_make_the_spread_irrelevant(
    ranks: Ranks, rule: str | Rule, num_positions: int, wrapper: str
) -> None:
    options = {"num_overlap_positions": num_positions, "overlap_source": "previous_step"}
    run = Run((ACCUMULATED, EVEN, UNEVEN), rule, wrapper=wrapper, options=options)
    first = run.alone().spreads[0]
    expected = one_process(run.whole().but(spreads=(first, *run.whole().spreads[1:])))
    others = [one_process(run.but(spreads=(ACCUMULATED, RESHUFFLED, RESHUFFLED)).alone())]
    for spreads in (run.spreads, (ACCUMULATED, RESHUFFLED, ACCUMULATED)):
        others += ranks.run(train, run.but(spreads=spreads))
    for outcome in others:
        check_same([outcome], expected)
        samples = outcome.state["samples"]
        check(_flat(samples), _flat(expected.state["samples"]), 1e-10)
        for key, fields in expected.state["samples"].items():
            assert _rows(samples[key]) == _rows(fields) <= min(50, num_positions), key


def _flat(samples: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return what was kept of each parameter, in the order of priorities.

    Where a parameter has no gradient (a query's norm at a sequence's first position, which attends
    to itself alone), |G_t|^2 is a rounding error or 0, and so is its priority's inverse: such
    positions are drawn last, in any order, and are left out.
    """
    flat = {}
    for key, fields in samples.items():
        values = {name: value for name, value in fields.items() if name not in ("kind", "rows")}
        values |= dict(zip(Rows._fields, fields["rows"], strict=True))
        found_K = values["weight_K"] > 1e-24 * values["weight_K"].max()
        assert found_K.tolist() == sorted(found_K.tolist(), reverse=True), key
        for name, value in values.items():
            every = isinstance(value, Tensor)
            flat[f"{key}.{name}"] = value[found_K] if every else torch.as_tensor(value)
    return flat


def _rows(fields: Mapping[str, Any]) -> int:
    return max(len(value) for value in fields.values() if isinstance(value, Tensor))


def test_no_more_rows_are_kept_than_asked_for_and_nothing_that_they_are_part_of() -> None:
    store = SampleStore(3)
    for start in range(0, 40, 10):
        priority = torch.arange(start, start + 10, dtype=torch.float64)
        rows = Rows(priority.flip(0), torch.arange(10), torch.arange(10), torch.ones(10))
        store.add("weight", rows, VectorGradients(torch.rand(10, 2)))
    store.fold(None)
    kept = store.state_dict()["weight"]["grad_TD"]
    assert kept.shape == (3, 2)
    assert kept.untyped_storage().nbytes() == kept.nbytes


@pytest.mark.parametrize("source", ["ranks", *slow("previous_step", "microbatch")])
def test_a_group_of_one_rank_knows_nothing_of_the_other(ranks: Ranks, source: str) -> None:
    options = {"num_overlap_positions": 9, "overlap_source": source}
    run = Run((EVEN, UNEVEN), DAMPED, options=options, group="each")
    for rank, outcome in enumerate(ranks.run(train, run)):
        alone = tuple((spread[rank],) for spread in run.spreads)
        check_same([outcome], one_process(run.but(spreads=alone, group="")))


@pytest.mark.parametrize(
    ("source", "wrapper"),
    [
        ("previous_step", DDP),
        *slow(("microbatch", FSDP), ("ranks", DDP), ("previous_step", FSDP)),
    ],
)
def test_a_restart_changes_nothing(ranks: Ranks, source: str, wrapper: str) -> None:
    options = {"num_overlap_positions": 9, "overlap_source": source}
    run = Run((EVEN, UNEVEN, EVEN), DAMPED, wrapper=wrapper, options=options)
    outcomes = ranks.run(train, run)
    check_same(ranks.run(train, run.but(restart=2)), outcomes[0], 0.0)


# -- what is refused -------------------------------------------------------------------------------


def refusal(attempt: Callable[[], object]) -> str:
    """Return the message of the mistake that the attempt makes."""
    with pytest.raises(ProxstepError) as caught:
        attempt()
    return str(caught.value)


def without_keys(source: str) -> str:
    isopo = build(Run((), options={"overlap_source": source})).isopo
    ids = torch.tensor([[0, 0, 1, 1]])
    return refusal(isopo.microbatch(ids, torch.ones(2)).__enter__)


def same_keys(run: Run) -> str:
    """Both ranks take sequence 3."""
    parts, rank = build(run), dist.get_rank()

    def attempt() -> None:
        microbatch(run, parts, 0, (3, 5) if rank else (2, 3))
        parts.isopo.step()

    return refusal(attempt)


def same_keys_later(run: Run) -> str:
    """A rank takes sequence 3 in its second microbatch, the other in its first."""
    parts, rank = build(run), dist.get_rank()
    microbatch(run, parts, 0, (4, 5) if rank else (2, 3))
    return refusal(lambda: microbatch(run, parts, 0, (3, 6) if rank else (0, 1)))


def without_step(run: Run) -> str:
    parts = build(run)
    microbatch(run, parts, 0, (dist.get_rank(),))
    parts.optimizer.step()
    return refusal(lambda: microbatch(run, parts, 1, (dist.get_rank(),)))


def with_a_bypassed_head(run: Run) -> str:
    parts = build(run)
    head: Any = parts.bare.lm_head
    head.forward = lambda hidden: hidden @ head.weight.mT
    return refusal(lambda: microbatch(run, parts, 0, (dist.get_rank(),)))


def freezing(run: Run) -> str:
    return refusal(lambda: build(run))


def samples_of_different_parameters() -> str:
    store = SampleStore(3)
    key = f"layer.{dist.get_rank()}"
    rows = Rows(torch.rand(4).double(), torch.arange(4), torch.arange(4), torch.ones(4))
    store.add(key, rows, VectorGradients(torch.rand(4, 2)))
    return refusal(lambda: store.fold(None))


@pytest.mark.parametrize("source", ["ranks"])
def test_missing_keys_are_refused(ranks: Ranks, source: str) -> None:
    for message in ranks.run(without_keys, source):
        assert f'overlap_source="{source}" needs sequence_keys' in message


@pytest.mark.parametrize("options", [RANKS, {"overlap_source": "previous_step"}])
def test_keys_that_two_ranks_share_are_refused_on_both(ranks: Ranks, options) -> None:
    for message in ranks.run(same_keys, Run((), options=options)):
        assert "sequence_keys" in message
    if options == RANKS:
        for message in ranks.run(same_keys_later, Run((), options=options)):
            assert "103 was seen before in this optimizer step" in message


@pytest.mark.parametrize("wrapper", [DDP, FSDP])
def test_a_forgotten_step_and_a_bypassed_head_are_refused(ranks: Ranks, wrapper: str) -> None:
    for message in ranks.run(without_step, Run((), DAMPED, wrapper=wrapper)):
        assert "isopo.step() was not called" in message
    for message in ranks.run(with_a_bypassed_head, Run((), wrapper=wrapper)):
        assert "lm_head.weight is used past its layer's forward" in message


def test_freezing_what_ddp_waits_for_is_refused(ranks: Ranks) -> None:
    run = Run((), wrapper="isopo(ddp)", options={"other_parameters": "freeze"})
    for message in ranks.run(freezing, run):
        assert "wrap the model in it after Isopo" in message


def test_samples_of_different_parameters_are_refused_by_name(ranks: Ranks) -> None:
    for message in ranks.run(samples_of_different_parameters):
        assert "layer.0 received a gradient on some ranks alone" in message


# -- trailing means --------------------------------------------------------------------------------


def fold_what_differs() -> list[dict[str, Tensor]]:
    """In the first step rank 0 measures more often and more, in the second nothing."""
    trailing, rank, states = TrailingMeans(0.5), dist.get_rank(), []
    for step in (1, 2):
        trailing.add("both", {"norm_sq": torch.tensor([6.0 * step])} if rank else {})
        if rank == 0 and step == 1:
            trailing.add("both", {"norm_sq": torch.tensor([1.0, 2.0])})
            trailing.add("one", {"fisher_sq": torch.tensor([5.0], dtype=torch.float64)})
        trailing.fold()
        states.append(trailing.state_dict())
    return states


def test_ranks_may_measure_different_numbers_of_different_parameters(ranks: Ranks) -> None:
    for first, second in ranks.run(fold_what_differs):
        assert list(first) == list(second) == ["both/norm_sq", "one/fisher_sq"]
        assert [float(value) for value in first.values()] == [3.0, 5.0]
        assert [float(value) for value in second.values()] == [7.5, 5.0]
        assert second["one/fisher_sq"].dtype == torch.float64
