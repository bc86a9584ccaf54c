"""docs/scaling.md is made of formulas that count what the code does."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from scripts.scaling_formulas import (
    Model,
    Work,
    added,
    buffer_bytes,
    carried,
    chunked_head,
    num_parameters,
    passing_bytes,
    plain_flops,
    plan_of,
    uses,
)
from scripts.scaling_network import (
    fold_bytes,
    fsdp_bytes,
    gathered,
    largest_share,
    merged,
    num_gathers,
)
from tests.distributed import Ranks
from tests.scaling_case import (
    SMALL,
    WORK,
    Peak,
    backward,
    build,
    counter,
    give_past,
    reductions,
    scored,
    tokens,
    traffic,
)
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from proxstep.isopo import Isopo
from proxstep.isopo.head import head_log_probs
from proxstep.isopo.plan import Needs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_scaling", ROOT / "scripts/make_scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    module, text = script(), PAGE.read_text()
    assert text == module.scaling_page(text), "run scripts/make_scaling.py"
    for name in module.TABLES:
        assert text.count(f"<!-- made: {name} -->\n\n") == 1


def test_the_launchers_take_their_commands() -> None:
    """What torchrun and accelerate would reject ends the test."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "train.py" in line]
    torchrun, accelerate = (words for words in lines if words[0] in ("torchrun", "accelerate"))
    parsed = get_args_parser().parse_args(torchrun[1:])
    assert (parsed.nnodes, parsed.nproc_per_node) == ("2", "8")
    assert parsed.training_script == "train.py"
    parsed = launch_command_parser().parse_args(accelerate[2:])
    assert (parsed.num_machines, parsed.num_processes) == (2, 16)
    assert parsed.training_script == "train.py"


# -- arithmetic ------------------------------------------------------------------------------------


def test_parameters_are_those_of_transformers() -> None:
    *qwen, llama = script().MODELS
    with torch.device("meta"):
        built = [build(model) for model in (SMALL, *qwen)]
        sizes = {
            name: value for name, value in vars(llama).items() if name not in ("name", "qk_norm")
        }
        built.append(LlamaForCausalLM(LlamaConfig(**sizes)))
    for model, network in zip((SMALL, *qwen, llama), built, strict=True):
        assert num_parameters(model) == sum(p.numel() for p in network.parameters()), model.name


SEEDS = range(3)
EACH_SEED = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[1:])]


def draw_case(seed: int) -> tuple[Model, Work]:
    """Return a model and a microbatch of random sizes."""
    draw = np.random.default_rng(seed)
    heads, narrow, width = (
        int(draw.integers(2, 5)),
        int(draw.integers(1, 3)),
        2 * int(draw.integers(2, 9)),
    )
    hidden, feed = int(draw.integers(8, 40)), int(draw.integers(8, 60))
    vocab = int(draw.choice([2, 6])) * hidden  # a head that leaves prompts out, or not
    sizes = (hidden, 2, heads * narrow, narrow, width, feed, vocab)
    model = Model("drawn", *sizes, bool(draw.integers(2)), True)
    work = Work(int(draw.integers(2, 6)), int(draw.integers(10, 90)), 6, int(draw.integers(1, 40)))
    return model, replace(work, itemsize=4, device="cpu", attention=1.0, checkpointing=False)


@pytest.fixture(params=EACH_SEED)
def drawn(request: pytest.FixtureRequest) -> tuple[Model, Work]:
    return draw_case(request.param)


def test_a_plain_step_is_counted(drawn: tuple[Model, Work]) -> None:
    model, work = drawn
    network, token_BT = build(model), tokens(model, work, 0)
    with FlopCounterMode(display=False) as count:
        scored(network, token_BT, work).sum().backward()
    assert count.get_total_flops() == plain_flops(model, work)


BUDGETS = (2**27, 2**15, 2**12)
RULES = {
    "isopo": (Needs(fisher=True), {}),
    "isopo-npg": (Needs(fisher=True, norm=True), {}),
    "isopo-euclidean": (Needs(norm=True), {}),
    "isopo-natural": (Needs(ntk=True), {}),
    "isopo-figure4": (Needs(norm=True, ntk=True), {"fisher": "sequences"}),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_adds_is_counted(drawn: tuple[Model, Work], rule: str, budget: int) -> None:
    """To the last operation, whatever plan the cost model takes, once the run has a past."""
    model, work = drawn
    token_BT = tokens(model, work, 1)
    pairs = sum(len(row_T.unique()) for row_T in token_BT)
    tokens_found = len(token_BT.unique())
    work = replace(work, budget=budget, distinct_tokens=tokens_found, distinct_pairs=pairs)
    needs, options = RULES[rule]
    network, found = build(model), []
    isopo = Isopo(
        network,
        rule,
        num_overlap_positions=work.num_samples,
        overlap_source="microbatch",
        memory_budget=budget,
        **options,
    )
    give_past(network, isopo, token_BT, work)

    def around(*_: object) -> FlopCounterMode:
        found.append(counter())
        return found[-1]

    with reductions(around):
        backward(network, isopo, token_BT, work)
    plain = sum(2 * work.positions * u.out_features * u.in_features for u in uses(model))
    total = sum(count.get_total_flops() for count in found)
    assert total - plain == pytest.approx(added(model, work, needs).flops, rel=1e-12)


def test_every_plan_was_counted() -> None:
    """The sizes and budgets above lead to all forms of a reduction."""
    plans = {
        (plan.gradients, plan.ghost_fisher or not needs.fisher)
        for model, work in map(draw_case, SEEDS)
        for budget in BUDGETS
        for needs, _ in RULES.values()
        for use in uses(model)
        if use.kind == "matrix"
        for plan in [plan_of(use, replace(work, budget=budget), needs)]
    }
    forms = ("none", "sequences", "blocks")
    assert plans == {(form, ghost) for form in forms for ghost in (True, False)} - {("none", False)}


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS[:2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("seed", "longest"), [(0, 160), pytest.param(1, 160, marks=pytest.mark.slow), (2, 50)]
)
def test_a_layer_takes_the_memory_that_it_is_said_to(
    seed: int, longest: int, rule: str, budget: int
) -> None:
    """At most, and not much less: its moments of most memory need not coincide.

    The run has a past: without trailing means a rule cannot weigh a part of the sequences alone.
    """
    draw = np.random.default_rng(seed)
    hidden, length = int(draw.integers(60, 200)), int(draw.integers(longest // 4, longest))
    model = Model(
        "drawn", hidden, 1, 4, 2, 24, 2 * hidden, int(draw.choice([2, 6])) * hidden, False, True
    )
    work = replace(WORK, num_sequences=4, length=length, scored=10, itemsize=4, budget=budget)
    work = replace(work, num_samples=int(draw.integers(20, 120)))
    needs, options = RULES[rule]
    network, peaks, token_BT = build(model), {}, tokens(model, work, seed)
    isopo = Isopo(
        network,
        rule,
        num_overlap_positions=work.num_samples,
        overlap_source="microbatch",
        memory_budget=budget,
        **options,
    )
    give_past(network, isopo, token_BT, work)

    def around(key: str, gradients: object) -> Peak:
        inside = [v for v in vars(gradients).values() if isinstance(v, torch.Tensor)]
        return peaks.setdefault(key, Peak(inside))

    with reductions(around, afresh=True):
        backward(network, isopo, token_BT, work)
    for use in uses(model):
        if use.kind == "matrix":
            summed = plan_of(use, work, needs).gradients == "sequences"  # it is the result here
            result = 4 * use.out_features * use.in_features * (not summed)
            said = buffer_bytes(use, work, needs) + passing_bytes(use, work, needs) + result
            assert 0.6 * said <= peaks[use.key].most <= 1.02 * said, use.key


def test_the_chunked_head_takes_the_memory_that_it_is_said_to() -> None:
    """In a step whose trailing means are known, with sequences of more than one chunk."""
    model = replace(SMALL, hidden_size=64, vocab_size=900)
    work = replace(WORK, num_sequences=3, length=40, scored=40, num_samples=10, itemsize=4)
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 900, bias=False)
    hidden_ND = torch.randn(120, 64, requires_grad=True)
    position_N, token_N = torch.arange(120), torch.randint(900, (120,))

    def peak(add: Callable[[torch.Tensor], torch.Tensor]) -> int:
        total = add(head_log_probs(head, hidden_ND, token_N, position_N, chunk_size=8))
        with Peak([]) as found:
            total.backward()
        return found.most

    plain = peak(torch.sum)
    isopo = Isopo(head, num_overlap_positions=10)
    for _ in range(2):
        with isopo.microbatch(position_N.reshape(3, 40) // 40, torch.ones(3)) as microbatch:
            transformed = peak(microbatch.objective)
        isopo.step()
    assert transformed - plain == pytest.approx(chunked_head(model, work), rel=0.03)


# -- the network -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


HALF = replace(WORK, itemsize=2)
FOLDED = 2 * fold_bytes(SMALL, 2)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_a_step_exchanges_only_its_means(ranks: Ranks, sharded: bool) -> None:
    """And under FSDP2 what FSDP2 exchanges anyway."""
    for count in ranks.run(traffic, "microbatch", sharded, 0):
        assert count["all_gather_object"] == FOLDED
        assert count["all_gather_object calls"] == 1
        assert "all_gather" not in count
        assert "all_reduce" not in count
        if sharded:
            plain = count["all_gather_single"] + count["reduce_scatter_single"]
            assert plain == 2 * fsdp_bytes(SMALL, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_samples_from_all_ranks_are_gathered(ranks: Ranks, seed: int) -> None:
    counts = ranks.run(traffic, "ranks", False, seed)
    assert sum(count["own rows"] for count in counts) == 10
    for count in counts:
        assert count["rows"] == max(count["own rows"] for count in counts)
        assert count["all rows"] == 10
        assert count["all_gather"] == gathered(SMALL, HALF, 2, count["rows"])
        assert count["all_gather calls"] == num_gathers(SMALL) + 2
        assert count["all_gather_object calls"] == 2
        assert "all_reduce" not in count
        assert count["first all_reduce calls"] == 2 * len(uses(SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_samples_of_the_previous_step_are_merged_once(ranks: Ranks, seed: int) -> None:
    for count in ranks.run(traffic, "previous_step", False, seed):
        keys = sorted(use.key for use in uses(SMALL))  # the order in which they are merged
        rows = {key: count[f"rows {i}"] for i, key in enumerate(keys)}
        assert count["all_gather"] == merged(SMALL, HALF, 2, rows)
        assert count["carried"] == carried(SMALL, HALF)


def test_the_largest_share_is_the_median_of_drawn_ones() -> None:
    draw = np.random.default_rng(0)
    for count, num_ranks in ((250, 8), (250, 64), (250, 256), (250, 1024), (64, 16)):
        part = draw.multinomial(count, np.full(num_ranks, 1 / num_ranks), size=400).max(axis=1)
        assert abs(largest_share(count, num_ranks) - np.median(part)) <= 0.03 * np.median(part)
