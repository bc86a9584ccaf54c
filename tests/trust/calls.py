"""Wrong arguments, in a process without the tests' own checks of shapes and types.

python -m tests.trust.calls    # prints what was tried, and what passed in silence
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from proxstep import IsometricRule, Isopo, NaturalRule, ProxstepError
from proxstep.algorithms import (
    ADVANTAGES,
    ALGORITHMS,
    Aggregation,
    find_algorithm,
    sequence_coefficients,
)
from proxstep.isopo.proma import IntraProjectingRule, ProjectingRule
from tests.trust.library import COEFFICIENTS, IDS, Tiny, World

NAN, INF = float("nan"), float("inf")
Call = tuple[str, str, Callable[[], Any]]
"""What is tried, the argument that the message must name, and the call."""


def arguments() -> Iterator[Call]:
    """Of `Isopo.microbatch`."""
    wrong: dict[str, list[Any]] = {
        "sequence_ids": [
            IDS.double(),
            IDS.bool(),
            IDS[0],
            IDS[None],
            IDS + 1,
            IDS.T,
            IDS.clamp(min=0)[:1],
            torch.zeros_like(IDS),
            -torch.ones_like(IDS),
            torch.where(IDS < 0, -100, IDS),
            IDS - 1,
            2 * IDS,
            IDS[:, :0],
            torch.empty(0, 5, dtype=torch.long),
            IDS.to("meta"),
            IDS.to(torch.complex64),
            IDS.double().tolist(),
            [[0, 0], [1]],
            "0011",
            [["0", "1"]],
            None,
            0,
            np.array([["a", "b"]]),
            np.array([[0.0, 1.0]]),
            IDS.to_sparse(),
        ],
        "coefficients": [
            COEFFICIENTS[:1],
            torch.ones(3),
            COEFFICIENTS[:, None],
            torch.tensor(0.5),
            COEFFICIENTS.to(torch.complex64),
            torch.tensor([True, False]),
            torch.tensor([NAN, 1.0]),
            torch.tensor([INF, 1.0]),
            torch.tensor([1.0, -INF]),
            COEFFICIENTS.to("meta"),
            torch.empty(0),
            [0.5, None],
            [0.5, "1"],
            [[0.5, 1.0]],
            [0.5],
            [NAN, 1.0],
            [10**400, 1],
            0.5,
            None,
            "ab",
            np.array([0.5, NAN]),
            np.array([0.5, None]),
            {"a": 0.5},
        ],
        "completion_mask": [
            (IDS >= 0).double(),
            (IDS >= 0)[:, 1:],
            (IDS >= 0)[0],
            (IDS >= 0)[:1],
            (IDS >= 0).T,
            "mask",
            [[True]],
            [1.0, 0.0],
            3,
        ],
        "groups": [
            torch.tensor([0]),
            torch.tensor([0, 1, 2]),
            torch.tensor([[0, 1]]),
            torch.tensor([0.5, 1.0]),
            torch.tensor([True, False]),
            [0],
            ["a", "b"],
            "ab",
            7,
        ],
        "sequence_keys": [
            torch.tensor([4]),
            torch.tensor([4, 4]),
            torch.tensor([[4, 7]]),
            torch.tensor([0.5, 1.0]),
            [4, 4],
            [4],
            ["a", "b"],
            [2**70, 1],
            5,
        ],
        "fisher_squares": [
            {"head.wieght": torch.ones(2)},
            {"head.weight": torch.ones(3)},
            {"head.weight": torch.ones(1, 2)},
            {"head.weight": torch.tensor([1.0, NAN])},
            {"head.weight": torch.tensor([1.0, -1.0])},
            {"head.weight": [1.0, None]},
            {"head.weight": "ab"},
            [1.0, 2.0],
            "head.weight",
        ],
    }
    for name, values in wrong.items():
        for number, value in enumerate(values):
            given = {"sequence_ids": IDS, "coefficients": COEFFICIENTS, name: value}
            named = {"coefficients": "coefficient", "sequence_ids": "sequence"}.get(name, name)

            def call(given: dict[str, Any] = given) -> None:
                world = World("isopo", {"overlap_source": "previous_step"})
                world.backward(given.pop("sequence_ids"), given.pop("coefficients"), **given)

            yield f"microbatch({name} {number})", named, call


def options() -> Iterator[Call]:
    """Of `Isopo` and of the rules."""
    wrong: dict[str, list[Any]] = {
        "rule": ["isopo-nat", "", "ISOPO", None, 3, IsometricRule, ["isopo"], torch.nn.Linear],
        "other_parameters": ["skip", "", None, True, "Transform"],
        "fisher": ["position", None, 0],
        "num_overlap_positions": [0, -1, 2.5, "250", True, NAN],
        "overlap_positions": ["completions", None],
        "overlap_source": ["microbatches", 3],
        "fisher_denominator": ["mean", None],
        "decay": [-0.1, 1.0, 1.5, NAN, "0.9", None],
        "seed": [0.5, "a", None, [1]],
        "memory_budget": [0, -1, NAN, "1GB", None],
    }
    for name, values in wrong.items():
        for value in values:
            yield (
                f"Isopo({name}={value!r})",
                name,
                lambda name=name, value=value: Isopo(Tiny(), **{name: value}),
            )
    for value in (None, Tiny, [Tiny()], Tiny().state_dict(), lambda x: x, 3):
        yield f"Isopo({type(value).__name__})", "model", lambda value=value: Isopo(value)
    frozen = Tiny().requires_grad_(False)
    yield "Isopo(frozen)", "trainable", lambda: Isopo(frozen)
    rules: list[tuple[Any, str, list[Any]]] = [
        (IsometricRule, "fisher_power", [NAN, INF, "1", None]),
        (IsometricRule, "norm_power", [NAN, -INF, [1]]),
        (IsometricRule, "relative_fisher_power", [NAN, "a"]),
        (IsometricRule, "damping", [-1.0, NAN, INF, None, "0"]),
        (IsometricRule, "damping_form", ["add", None, "Additive", "relative"]),
        (IsometricRule, "scale", ["papr", None, 1]),
        (NaturalRule, "ntk_damping", [0.0, -1.0, NAN, INF, None, "1"]),
        (NaturalRule, "damping_form", ["add", None, "relative"]),
        (NaturalRule, "scale", ["papr", None]),
        (NaturalRule, "interact", ["groups", None]),
        (ProjectingRule, "ridge", [-1.0, NAN, INF, None, "0"]),
        (IntraProjectingRule, "rank", [-1, 2.5, None, "10"]),
        (IntraProjectingRule, "shrinkage", [-0.1, 1.1, NAN, None, "1"]),
    ]
    for rule, name, values in rules:
        for value in values:
            yield (
                f"{rule.__name__}({name}={value!r})",
                name,
                lambda rule=rule, name=name, value=value: rule(**{name: value}),
            )


def objectives() -> Iterator[Call]:
    """Of every algorithm's loss, and of its coefficients."""
    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(4, 3, generator=generator)
    right = {
        "log_probs": log_prob,
        "old_log_probs": log_prob.clone(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "response_mask": torch.ones(4, 3, dtype=torch.bool),
    }
    wrong: dict[str, list[Any]] = {
        "log_probs": [log_prob[0], log_prob[None], log_prob.long(), log_prob.tolist(), None],
        "old_log_probs": [log_prob[:2], log_prob.T, log_prob.numpy(), log_prob.sum(1), 1.0],
        "advantages": [
            right["advantages"][:3],
            right["advantages"][:, None],
            log_prob,
            torch.tensor([1, -1, 0, 0]),
            [1.0, -1.0, 0.5, -0.5],
            None,
        ],
        "response_mask": [
            right["response_mask"].long(),
            right["response_mask"].float(),
            right["response_mask"][:, :2],
            right["response_mask"][0],
            right["response_mask"].tolist(),
            None,
        ],
    }
    for name, algorithm in ALGORITHMS.items():
        for argument, values in wrong.items():
            for number, value in enumerate(values):
                given = [*(right | {argument: value}).values()]
                what = f"{name}({argument} {number})"
                yield what, argument, lambda a=algorithm, given=given: a.loss(*given)
        if algorithm.level == "token":
            yield (
                f"sequence_coefficients({name})",
                "token-level",
                lambda a=algorithm: sequence_coefficients(a, *right.values()),
            )
        for key, bounds in algorithm.keys.items():
            if "gt" in bounds.bounds and key in inspect.signature(algorithm.loss).parameters:
                below = bounds.bounds["gt"]
                yield (
                    f"{name}({key}={below})",
                    key,
                    lambda a=algorithm, key=key, below=below: a.loss(
                        *right.values(), **{key: below}
                    ),
                )
    for mode in ("mean", "", None, "token_mean"):
        yield f"Aggregation({mode})", "loss_agg_mode", lambda mode=mode: Aggregation(mode)
    for count in (0, -1):
        for name in ("num_sequences", "num_tokens", "max_length"):
            yield (
                f"Aggregation({name}={count})",
                name,
                lambda name=name, count=count: Aggregation("token-mean", **{name: count}),
            )
    for name in ("grop", "", None, 3, "isopo+opo"):
        yield f"find_algorithm({name})", "algorithm", lambda name=name: find_algorithm(name)


def advantages() -> Iterator[Call]:
    """Of every kind of advantage."""
    reward, group = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([0, 0, 1, 1])
    wrong = [
        (reward[:3], group),
        (reward, group[:3]),
        (reward[None], group[None]),
        (reward.long(), group),
        (reward[:0], group[:0]),
        (torch.tensor([1.0, NAN, 0.0, 0.0]), group),
        (torch.tensor([1.0, INF, 0.0, 0.0]), group),
        (torch.tensor([1.0, -INF, 0.0, 0.0]), group),
        (reward.tolist(), group),
        (reward, group.tolist()),
        (reward.numpy(), group.numpy()),
        (None, group),
        (reward, None),
        (reward, group + 0.5),
        ("1010", group),
    ]
    for name, function in ADVANTAGES.items():
        for number, given in enumerate(wrong):
            yield f"{name}({number})", "_B", lambda f=function, given=given: f(*given)


def outcome(named: str, call: Callable[[], Any]) -> str:
    try:
        call()
    except ProxstepError as error:
        return "" if named in str(error) else f"does not name {named}: {error}"
    except (TypeError, ValueError) as error:
        return "" if named in str(error) else f"{type(error).__name__} without {named}: {error}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "silent"


if __name__ == "__main__":
    every = [*arguments(), *options(), *objectives(), *advantages()]
    found = {what: outcome(named, call) for what, named, call in every}
    lost = {what: text[:200] for what, text in found.items() if text}
    print(json.dumps({"tried": len(every), "lost": lost}))
