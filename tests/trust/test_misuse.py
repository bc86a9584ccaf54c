"""Wrong uses of the library: each is an error that says what is wrong, or exactly right."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from proxstep import PRESETS, Isopo
from tests.trust.library import COEFFICIENTS, FORMULAS, IDS, MASK, TOKENS, Tiny, World, log_probs

Use = Callable[[World], Any]
ERRORS = (TypeError, ValueError)
"""`ProxstepError` is a ValueError."""


def announced(world: World, change: Callable[[Any], Any], mask: Any = None) -> None:
    """Back-propagate the objective of something that is made of log-probabilities."""
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(change(log_probs(world.model)), mask).backward()


def own(world: World, loss: Callable[[Any], Any]) -> None:
    """Back-propagate a loss of one's own inside the block."""
    with world.isopo.microbatch(IDS, COEFFICIENTS):
        loss(log_probs(world.model)).backward()


def beside(world: World, change: Callable[[Any, Any], Any]) -> None:
    """Back-propagate what the objective and its log-probabilities are combined to."""
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        log_prob = log_probs(world.model)
        change(microbatch.objective(log_prob, MASK), log_prob).backward()


LOSSES: dict[str, Use] = {
    f"own: {name}": lambda world, loss=loss: own(world, loss)
    for name, loss in {
        "-sum": lambda x: -x.sum(),
        "sum": lambda x: x.sum(),
        "mean": lambda x: x.mean(),
        "-mean": lambda x: -x.mean(),
        "REINFORCE": lambda x: -(COEFFICIENTS[:, None] * x).sum(),
        "masked mean": lambda x: -(x * MASK).sum() / MASK.sum(),
        "ratio": lambda x: -((x - x.detach()).exp() * COEFFICIENTS[:, None]).sum(),
        "k3": lambda x: ((x.detach() - x).exp() - 1 + x).sum(),
        "PPO": lambda x: (
            -torch.min(
                (x - x.detach()).exp() * COEFFICIENTS[:, None],
                (x - x.detach()).exp().clamp(0.8, 1.2) * COEFFICIENTS[:, None],
            ).mean()
        ),
        "DPO": lambda x: -nn.functional.logsigmoid(x[0].sum() - x[1].sum()),
    }.items()
}
GIVEN: dict[str, Use] = {
    f"objective of {name}": lambda world, change=change: announced(world, change)
    for name, change in {
        "advantages inside": lambda x: COEFFICIENTS[:, None] * x,
        "-log_prob": lambda x: -x,
        "the mean": lambda x: x.mean(),
        "means of sequences": lambda x: x.mean(1),
        "the sum / 2": lambda x: x.sum() / 2,
        "ratios with advantages": lambda x: (x - x.detach()).exp() * COEFFICIENTS[:, None],
        "probabilities": lambda x: x.exp(),
        "squares": lambda x: x.square(),
        "temperature afterwards": lambda x: x / 0.7,
        "weights per token": lambda x: x * torch.linspace(0.1, 1, 4, dtype=torch.float64),
        "twice itself": lambda x: x + x,
        "clamped advantages": lambda x: (COEFFICIENTS[:, None] * x).clamp(min=-1),
        "detached": lambda x: x.detach(),
        "integers": lambda x: x.long(),
        "a list": lambda x: [x],
        "a number": lambda x: 1.0,
        "complex numbers": lambda x: x.to(torch.complex128),
        "None": lambda x: None,
    }.items()
}
COMBINED: dict[str, Use] = {
    f"combined: {name}": lambda world, change=change: beside(world, change)
    for name, change in {
        "x 2": lambda total, x: 2 * total,
        "negated": lambda total, x: -total,
        "/ accumulation": lambda total, x: total / 4,
        "scaler": lambda total, x: total * 65536.0,
        "advantage outside": lambda total, x: (total * COEFFICIENTS).sum(),
        "+ entropy": lambda total, x: total + 0.1 * (x * x.exp()).sum(),
        "entropy +": lambda total, x: 0.1 * x.square().sum() + total,
        "- KL": lambda total, x: total - 0.1 * ((x - x.detach()).exp() - x).mean(),
        "stacked": lambda total, x: torch.stack([total, x.square().sum()]).sum(),
        "sum()": lambda total, x: sum([total, x.mean()]),
        "in place": lambda total, x: total.add_(x.mean()),
        "squared": lambda total, x: total.square(),
        "exp": lambda total, x: total.exp(),
        "product": lambda total, x: total * x.mean(),
    }.items()
}


def on_copy(world: World, clone: Callable[[Any], Any], later: bool = False) -> None:
    twin = clone(world.model)
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(twin), MASK)
        if not later:
            total.backward()
    if later:
        total.backward()
        world.isopo.step()


def forgotten_step(world: World, change: Callable[[nn.Module], None]) -> None:
    world.backward()
    change(world.model)
    world.backward()


def adam(model: nn.Module, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, **options)
    optimizer.step()
    optimizer.zero_grad()


def sgd_of_head(model: Any) -> None:
    torch.optim.SGD(model.head.parameters(), 0.01).step()


@torch.no_grad()
def by_hand(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter -= 0.1 * parameter.grad


def under(world: World, mode: Any) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch, mode:
        microbatch.objective(log_probs(world.model)).backward()


def nested(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS):
        world.backward()


def off_inside(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS), world.isopo.off():
        pass


def entropy_of_the_same_forward(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS):
        log_prob = log_probs(world.model)
    with world.isopo.off():
        log_prob.square().sum().backward()


def exchanged(world: World) -> None:
    world.model.head = nn.Linear(6, 11).double()
    world.backward()


def grown(world: World) -> None:
    world.model.more = nn.Linear(6, 6).double()
    world.backward()


def frozen(world: World) -> None:
    world.model.requires_grad_(False)
    world.backward()


def twice(world: World, *, retain: bool) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(world.model), MASK)
        total.backward(retain_graph=True)
        again = total if retain else microbatch.objective(log_probs(world.model), MASK)
        again.backward()


def after_step(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(world.model), MASK)
    world.isopo.step()
    total.backward()


def late_coefficients(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(world.model), MASK).backward()
        microbatch.set_coefficients(COEFFICIENTS)


def measuring_late(world: World) -> None:
    world.backward()
    with world.isopo.measuring():
        pass
    if world.rule in ("reinforce", "proma-intra"):
        raise ValueError("nothing is measured")


ORDER: dict[str, Use] = {
    "a deep copy": lambda world: on_copy(world, copy.deepcopy),
    "an unpickled copy": lambda world: on_copy(world, lambda m: pickle.loads(pickle.dumps(m))),
    "another model": lambda world: on_copy(world, lambda _: Tiny()),
    "a deep copy, backward later": lambda world: on_copy(world, copy.deepcopy, later=True),
    "another Isopo's model": lambda world: on_copy(world, lambda _: ELSEWHERE.model),
    "a forgotten step, AdamW": lambda world: forgotten_step(world, adam),
    "a forgotten step, one by one": lambda world: forgotten_step(
        world, lambda model: adam(model, foreach=False)
    ),
    "a forgotten step, fused": lambda world: forgotten_step(
        world, lambda model: adam(model, fused=True)
    ),
    "a forgotten step, by hand": lambda world: forgotten_step(world, by_hand),
    "a forgotten step, the head alone": lambda world: forgotten_step(world, sgd_of_head),
    "no_grad": lambda world: under(world, torch.no_grad()),
    "inference_mode": lambda world: under(world, torch.inference_mode()),
    "set_grad_enabled(False)": lambda world: under(world, torch.set_grad_enabled(False)),
    "nested": nested,
    "off() inside": off_inside,
    "an entropy of the same forward": entropy_of_the_same_forward,
    "an exchanged layer": exchanged,
    "a new layer": grown,
    "everything frozen": frozen,
    "one graph twice": lambda world: twice(world, retain=True),
    "two forwards": lambda world: twice(world, retain=False),
    "backward after the step": after_step,
    "coefficients after backward": late_coefficients,
    "backward outside": lambda world: log_probs(world.model).sum().backward(),
    "two Isopos": lambda world: Isopo(world.model),
    "fewer positions": lambda world: with_tokens(world, TOKENS[:, :4]),
    "more rows": lambda world: with_tokens(world, TOKENS.repeat(2, 1)),
    "rows one after another": lambda world: with_tokens(world, TOKENS[:, :3].reshape(1, 6)),
    "a float mask": lambda world: announced(world, lambda x: x, MASK.double()),
    "a mask one too wide": lambda world: announced(world, lambda x: x, IDS >= 0),
    "a mask of one row": lambda world: announced(world, lambda x: x, MASK[0]),
    "a mask that repeats": lambda world: announced(world, lambda x: x[:, :1], MASK),
}


def with_tokens(world: World, token: Any) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(world.model, token)).backward()


ELSEWHERE = World("reinforce")
USES = LOSSES | GIVEN | COMBINED | ORDER


@pytest.mark.parametrize("rule", PRESETS)
def test_a_wrong_use_is_an_error(rule: str, counted: Callable[..., None]) -> None:
    silent = []
    for name, use in USES.items():
        world = World(rule)
        try:
            use(world)
        except ERRORS as error:
            if len(str(error)) <= 20:
                silent.append(name)
        else:
            silent.append(name)
    counted("misuse of the library: refused", len(USES), len(silent))
    assert not silent


def legal(**arguments: Any) -> Use:
    return lambda world: world.backward(**arguments)


def accumulate(world: World) -> None:
    """Two microbatches of one step, each with half of the coefficients."""
    for _ in range(2):
        world.backward(coefficients=COEFFICIENTS / 2)


def evaluated_inside(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        with torch.no_grad():
            log_probs(world.model)
            assert float(microbatch.objective(log_probs(world.model))) < 0
        microbatch.objective(log_probs(world.model), MASK).backward()


def never_back_propagated(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(world.model), MASK)
    world.isopo.step()
    world.backward()


def failed_before(world: World) -> None:
    """The same sequences again, after an error in the block."""
    for broken in (True, False):
        try:
            with world.isopo.microbatch(
                IDS, COEFFICIENTS, sequence_keys=torch.tensor([4, 7])
            ) as microbatch:
                total = microbatch.objective(log_probs(world.model), MASK)
                if broken:
                    raise KeyError("the user's own")
                total.backward()
        except KeyError:
            continue


def failed_in_backward(world: World) -> None:
    try:
        with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            (3 * microbatch.objective(log_probs(world.model), MASK)).backward()
    except ValueError:
        world.backward()


def beside_off(world: World) -> None:
    world.backward()
    before = {name: grad.clone() for name, grad in world.gradients().items() if grad is not None}
    with world.isopo.off():
        log_probs(world.model).square().sum().backward()
    for name, parameter in world.model.named_parameters():
        parameter.grad = before[name]


def wrapped(world: World) -> None:
    model = nn.ModuleDict({"policy": world.model})
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        microbatch.objective(log_probs(model["policy"]), MASK).backward()


def with_log_prob(score: Callable[[Any, Any], Any]) -> Use:
    """Other ways to compute log-probabilities."""

    def use(world: World) -> None:
        with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
            logits = world.model(input_ids=TOKENS).logits[:, :-1]
            microbatch.objective(score(logits, TOKENS[:, 1:]), MASK).backward()

    return use


def by_sequence(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        log_prob = log_probs(world.model)
        parts = [microbatch.objective(log_prob[b], MASK[b]) for b in range(2)]
        sum(parts).backward()  # type: ignore[union-attr]


def set_later(world: World) -> None:
    with world.isopo.microbatch(IDS, [0, 0]) as microbatch:
        log_prob = log_probs(world.model)
        microbatch.set_coefficients(COEFFICIENTS.tolist())
        microbatch.objective(log_prob, MASK).backward()


def reference_copy(world: World) -> None:
    twin = copy.deepcopy(world.model)
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        with torch.no_grad():
            log_probs(twin)
        microbatch.objective(log_probs(world.model), MASK).backward()


def outside_the_block(world: World) -> None:
    with world.isopo.microbatch(IDS, COEFFICIENTS) as microbatch:
        total = microbatch.objective(log_probs(world.model), MASK)
    total.backward()


RIGHT: dict[str, Use] = {
    "tensors": legal(),
    "lists": legal(ids=IDS.tolist(), coefficients=COEFFICIENTS.tolist()),
    "tuples": legal(coefficients=tuple(COEFFICIENTS.tolist())),
    "arrays": legal(ids=IDS.numpy(), coefficients=COEFFICIENTS.numpy()),
    "int32 ids": legal(ids=IDS.int()),
    "int8 ids": legal(ids=IDS.to(torch.int8)),
    "int16 array": legal(ids=IDS.numpy().astype(np.int16)),
    "float32 coefficients": legal(coefficients=COEFFICIENTS.float()),
    "coefficients with a graph": legal(coefficients=COEFFICIENTS.clone().requires_grad_()),
    "a mask": legal(completion_mask=IDS >= 0),
    "a mask of integers": legal(completion_mask=(IDS >= 0).long()),
    "a mask in lists": legal(completion_mask=(IDS >= 0).tolist()),
    "a mask as an array": legal(completion_mask=(IDS >= 0).numpy()),
    "keys in a list": legal(sequence_keys=[4, 7]),
    "groups in a list": legal(groups=[3, 3]),
    "keys as an array": legal(sequence_keys=np.array([4, 7])),
    "accumulation": accumulate,
    "evaluation inside": evaluated_inside,
    "no backward": never_back_propagated,
    "an error before": failed_before,
    "an error in backward": failed_in_backward,
    "another loss in off()": beside_off,
    "a wrapped model": wrapped,
    "a reference copy inside": reference_copy,
    "backward outside the block": outside_the_block,
    "one objective a sequence": by_sequence,
    "coefficients later": set_later,
    "logsumexp": with_log_prob(
        lambda z, y: z.gather(-1, y[..., None]).squeeze(-1) - z.logsumexp(-1)
    ),
    "cross entropy": with_log_prob(
        lambda z, y: -nn.functional.cross_entropy(z.transpose(1, 2), y, reduction="none")
    ),
    "Categorical": with_log_prob(
        lambda z, y: torch.distributions.Categorical(logits=z).log_prob(y)
    ),
    "row by row": with_log_prob(
        lambda z, y: torch.stack(
            [a.log_softmax(-1).gather(-1, b[:, None])[:, 0] for a, b in zip(z, y, strict=True)]
        )
    ),
    "indexed": with_log_prob(
        lambda z, y: z.log_softmax(-1)[torch.arange(2)[:, None], torch.arange(4), y]
    ),
    "one hot": with_log_prob(
        lambda z, y: (z.log_softmax(-1) * nn.functional.one_hot(y, 11)).sum(-1)
    ),
}


@pytest.mark.parametrize("rule", FORMULAS)
def test_a_legal_use_is_right(rule: str, counted: Callable[..., None]) -> None:
    wrong = []
    for name, use in RIGHT.items():
        if rule == "proma" and use is accumulate:
            continue  # its second microbatch is projected, by definition
        world = World(rule)
        use(world)
        if not world.is_right():
            wrong.append(name)
    counted("legal uses of the library: the oracle's gradient", len(RIGHT), len(wrong))
    assert not wrong


def test_wrong_arguments_are_errors_that_name_them(counted: Callable[..., None]) -> None:
    """In a process of its own: here the tests' checks of shapes would refuse them first."""
    command = [sys.executable, "-m", "tests.trust.calls"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    counted("misuse of the library: wrong arguments", found["tried"], len(found["lost"]))
    assert not found["lost"]
