"""What a training step costs on one GPU, and what ISOPO adds to it: arithmetic and memory.

Both follow the plan that `proxstep.isopo.plan.choose` takes for each layer, so that they are what
the code does; the tests count operations with torch's FlopCounterMode, and live tensors.

B sequences of L positions make the T positions of one microbatch on one GPU; K of them are sampled.
A matrix has O x I numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from proxstep.isopo.plan import MEMORY_BUDGET, Needs, Plan, Shape, choose, held

WIDE = 4
"""Bytes of a number that sums are kept in: float32."""
HEAD = "head"
"""The `Use.source` of the output layer."""
ROW_NUMBERS = 4
"""What goes with a carried position's gradient, 8 bytes each: priority, sequence's key, group,
importance."""


@dataclass(frozen=True)
class Model:
    """A decoder's sizes, by the names of its config.json."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    qk_norm: bool


@dataclass(frozen=True)
class Use:
    """A parameter as one layer uses it.

    Attributes:
        key: Its name.
        kind: "matrix", "vector" or "lookup".
        out_features: O, or the number of a vector's features, or of an embedding's.
        in_features: I, of a matrix.
        source: What a matrix's input is; layers with the same one share its Grams.
        scored_only: Whether the other positions have no gradient: in the head, and in the last
            layer, but for keys and values.
    """

    key: str
    kind: str
    out_features: int
    in_features: int = 0
    source: str = ""
    scored_only: bool = False

    @property
    def row(self) -> int:
        """Numbers of one position's gradient: g and a."""
        return self.out_features + self.in_features


@dataclass(frozen=True)
class Work:
    """One microbatch on one GPU.

    Attributes:
        num_sequences: B.
        length: L.
        scored: Positions of each sequence with a log-probability.
        num_samples: K.
        itemsize: Bytes of an activation.
        budget: `memory_budget`.
        device: Type of the device, for the cost model.
        attention: Share of the L x L attention that is computed: about a half where it is causal.
        checkpointing: Whether the forward is computed again in backward.
        distinct_tokens: Of the microbatch; None for as many as there can be.
        distinct_pairs: Of a token and a sequence; None for as many as there can be.
    """

    num_sequences: int
    length: int
    scored: int
    num_samples: int = 250
    itemsize: int = 2
    budget: int = MEMORY_BUDGET
    device: str = "cuda"
    attention: float = 0.5
    checkpointing: bool = True
    distinct_tokens: int | None = None
    distinct_pairs: int | None = None

    @property
    def positions(self) -> int:
        """T."""
        return self.num_sequences * self.length


@dataclass(frozen=True)
class Cost:
    """What is added to a step.

    Attributes:
        narrow: Floating-point operations of matrix products in the activations' precision.
        wide: The same in float32.
        moved: Bytes through the GPU's memory, beyond what the products themselves stream.
    """

    narrow: float = 0.0
    wide: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.narrow + other.narrow, self.wide + other.wide, self.moved + other.moved)

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.narrow + self.wide


@cache
def uses(model: Model) -> tuple[Use, ...]:
    """Return every use of a parameter, in the order of backward."""
    return tuple(_uses(model))


def _uses(model: Model) -> Iterator[Use]:
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim
    narrow = model.num_key_value_heads * model.head_dim
    yield Use("lm_head.weight", "matrix", model.vocab_size, hidden, HEAD, scored_only=True)
    yield Use("model.norm.weight", "vector", hidden)
    for layer in reversed(range(model.num_hidden_layers)):
        at, last = f"model.layers.{layer}.", layer == model.num_hidden_layers - 1
        feed = (at + "mlp.down_proj", hidden, model.intermediate_size, at + "act")
        gates = [
            (at + f"mlp.{name}_proj", model.intermediate_size, hidden, at + "feed")
            for name in ("up", "gate")
        ]
        inputs = [
            (at + f"self_attn.{name}_proj", size, hidden, at + "attend")
            for name, size in (("v", narrow), ("k", narrow), ("q", width))
        ]
        result = (at + "self_attn.o_proj", hidden, width, at + "attended")
        for key, num_out, num_in, source in (feed, *gates, result, *inputs):
            late = last and not key.endswith(("k_proj", "v_proj"))
            yield Use(key + ".weight", "matrix", num_out, num_in, source, late)
        for name in ("post_attention_layernorm", "input_layernorm"):
            yield Use(at + name + ".weight", "vector", hidden)
        for name in ("q_norm", "k_norm") if model.qk_norm else ():
            yield Use(at + f"self_attn.{name}.weight", "vector", model.head_dim)
    yield Use("model.embed_tokens.weight", "lookup", hidden)


def num_parameters(model: Model) -> int:
    """Return the number of parameters, a tied weight once."""
    matrices = sum(u.out_features * max(u.in_features, 1) for u in uses(model))
    table = model.vocab_size * model.hidden_size
    return matrices - model.hidden_size + table * (not model.tie_word_embeddings)


# -- arithmetic ------------------------------------------------------------------------------------


def plain_flops(model: Model, work: Work) -> float:
    """Return the matrix products' operations of a plain forward and backward."""
    linear = sum(2.0 * work.positions * u.out_features * u.in_features for u in uses(model))
    width = model.num_attention_heads * model.head_dim
    pairs = work.num_sequences * work.length**2 * work.attention
    attention = 4.0 * model.num_hidden_layers * width * pairs
    return (3 + work.checkpointing) * (linear + attention)


def added(model: Model, work: Work, needs: Needs) -> Cost:
    """Return what a rule adds to `plain_flops`, given that its trailing means are known."""
    total, last = Cost(), {"cross": "", "norm": ""}
    for use in uses(model):
        if use.kind == "matrix":
            total += _matrix(use, work, needs, last)
        else:
            total += _sums(use, work, needs)
    return total


def _matrix(use: Use, work: Work, needs: Needs, last: dict[str, str]) -> Cost:
    shape, lengths = layer_shape(use, work, needs)
    num_out, num_in, num = use.out_features, use.in_features, work.num_samples
    positions, batch = sum(lengths), len(lengths)
    plan = plan_of(use, work, needs)
    spared = Cost(-2.0 * (work.positions - positions) * shape.area)  # a head's prompts
    cost = Cost(moved=2.0 * work.itemsize * positions * min(num_out, num_in))  # the scaled copy
    if plan.gradients == "sequences":
        cost = Cost(0, 2.0 * batch * shape.area, 3.0 * WIDE * batch * shape.area)
    elif plan.gradients == "blocks":
        moved = 2.0 * WIDE * batch * shape.area
        cost += Cost(2.0 * positions * shape.area, 0, moved)
    if needs.fisher and plan.ghost_fisher:
        trimmed = positions < work.positions  # then one sequence at a time, and no Gram is kept
        fits = num <= max(1, work.budget // (2 * WIDE * max(positions, 1)))
        known = fits and not trimmed and last["cross"] == use.source
        if not trimmed:
            last["cross"] = use.source if fits else ""
        grams = 2.0 * num * positions * (num_out + num_in * (not known))
        summed = 2.0 * num * positions * (not trimmed)
        cost += Cost(grams, summed, (6 - known) * WIDE * num * positions)
    elif needs.fisher:
        cost += Cost(0, 2.0 * num * batch * shape.area, WIDE * num * batch * num_out * 4.0)
    if needs.ntk and plan.gradients != "none":
        cost += Cost(0, 2.0 * batch**2 * shape.area)
    squares = sum(length**2 for length in lengths)
    if plan.gradients == "none" and needs.norm:
        known = WIDE * squares <= work.budget and last["norm"] == use.source
        last["norm"] = use.source if WIDE * squares <= work.budget else ""
        cost += Cost(2.0 * squares * (num_out + num_in * (not known)), 0, 5.0 * WIDE * squares)
    if plan.gradients == "none" and needs.ntk:
        pairs = (positions**2 + squares) / 2
        cost += Cost(2.0 * pairs * (num_out + num_in), 0, 5.0 * WIDE * pairs)
    return cost + spared


def _sums(use: Use, work: Work, needs: Needs) -> Cost:
    """Return the cost of a vector, or of an embedding, which forms no gradients for F_b alone."""
    batch, features, positions = work.num_sequences, use.out_features, work.positions
    moved = 2.0 * WIDE * positions * features
    samples = work.num_samples * needs.fisher
    if use.kind == "vector":
        rows = 1 + samples + batch * needs.ntk
        return Cost(0, 2.0 * features * (positions + batch * rows), moved)
    if needs == Needs(fisher=True) and work.itemsize >= WIDE:
        return Cost(0, 2.0 * samples * positions * (features + 1), 2 * moved)
    tokens = positions if work.distinct_tokens is None else work.distinct_tokens
    pairs = positions if work.distinct_pairs is None else work.distinct_pairs
    kernel = 2.0 * batch**2 * features * 256 * math.ceil(tokens / 256) * needs.ntk
    return Cost(0, kernel + 2.0 * samples * pairs * features, 2 * moved)


def layer_shape(use: Use, work: Work, needs: Needs) -> tuple[Shape, tuple[int, ...]]:
    """Return a matrix's reduction as the cost model sees it, and the sequences' lengths in it."""
    left_out = use.out_features >= 4 * use.in_features and work.scored <= 0.9 * work.length
    length = work.scored if use.scored_only and left_out else work.length
    lengths = (length,) * work.num_sequences
    samples = work.num_samples if needs.fisher else 0
    shape = Shape(use.out_features, use.in_features, lengths, samples, WIDE, work.device)
    return shape, lengths


def plan_of(use: Use, work: Work, needs: Needs) -> Plan:
    """Return how the code reduces a matrix."""
    shape, _ = layer_shape(use, work, needs)
    return _chosen(shape, needs, work.budget)


@cache
def _chosen(shape: Shape, needs: Needs, budget: int) -> Plan:
    return choose(shape, needs, separable=not needs.ntk, memory_budget=budget)


# -- memory on one GPU -----------------------------------------------------------------------------


def workspace(model: Model, work: Work, needs: Needs) -> float:
    """Return the most bytes that a layer but the head takes on top of an ordinary backward.

    The buffer is the largest of any layer's, the head included, until the microbatch ends.
    """
    matrices = [use for use in uses(model) if use.kind == "matrix"]
    layers = [use for use in matrices if use.source != HEAD]
    kept = max(buffer_bytes(use, work, needs) for use in matrices)
    return kept + max(passing_bytes(use, work, needs) for use in layers)


def buffer_bytes(use: Use, work: Work, needs: Needs) -> float:
    """Return the bytes of the sequences' gradients of a matrix, where they are formed."""
    shape, _ = layer_shape(use, work, needs)
    plan = plan_of(use, work, needs)
    return float(held(shape, needs, plan)) if plan.gradients != "none" else 0.0


def passing_bytes(use: Use, work: Work, needs: Needs) -> float:
    """Return the bytes that a matrix's reduction takes beside: sample, Grams, the copies it makes.

    The Grams of the input are kept for the layers that share it, where they fit the budget.
    """
    shape, lengths = layer_shape(use, work, needs)
    plan, positions = plan_of(use, work, needs), sum(lengths)
    always = WIDE * work.positions * work.num_sequences  # which position is whose
    if positions < work.positions:
        always += work.itemsize * positions * use.row  # without the unscored positions
    moments = [0]
    if needs.fisher:
        always += work.itemsize * work.num_samples * use.row
        moments.append(WIDE * work.num_samples * max(use.out_features, use.in_features))
        if plan.ghost_fisher:
            gram = WIDE * work.num_samples * positions
            always += gram * (2 * gram <= work.budget)
            moments.append(min(2 * gram, work.budget))
        else:
            features = plan.size if plan.gradients == "blocks" else use.out_features
            moments.append(2 * WIDE * work.num_sequences * work.num_samples * features)
    if plan.gradients == "none" and (needs.norm or needs.ntk):
        pairs = WIDE * sum(length**2 for length in lengths)
        always += pairs * (pairs <= work.budget) * needs.norm
        moments.append(3 * WIDE * max(lengths) ** 2)
    if plan.gradients == "sequences":
        moments.append(WIDE * shape.area)  # the sum, before it is narrowed
    else:
        moments.append(work.itemsize * positions * min(use.out_features, use.in_features))
    return float(always + max(moments))


def chunked_head(model: Model, work: Work) -> float:
    """Return what `head_log_probs` adds under an isometric rule that needs F_b.

    One sequence's gradient, beside the sum that the plain chunked head keeps as well, where a
    sequence has more rows than a chunk; and the sample's gradients.
    """
    table = model.vocab_size * model.hidden_size
    rows = work.num_samples * (model.vocab_size + model.hidden_size)
    return float(WIDE * table + work.itemsize * rows)


def carried(model: Model, work: Work) -> float:
    """Return what overlap_source="previous_step" keeps: the last step's rows, and this one's."""
    rows = 2.0 * work.num_samples
    return rows * sum(row_bytes(use, work) + 8 * ROW_NUMBERS for use in uses(model))


def row_bytes(use: Use, work: Work) -> int:
    """Return the bytes of one position's gradient; an embedding has its token as well."""
    return use.row * work.itemsize + 8 * (use.kind == "lookup")
