"""The slow, obvious ISOPO: one sequence at a time, every trainable parameter copied once per token
position, plain autograd.

Nothing here is shared with `proxstep.isopo`, except that the sampled positions are handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Sequence:
    """One unpadded sequence: its tokens and which of them are completion."""

    tokens: list[int]
    num_prompt: int


def log_prob_of_completion(model: nn.Module, sequence: Sequence) -> Tensor:
    """log pi(completion | prompt) of one sequence, alone in its batch."""
    token = torch.tensor([sequence.tokens])
    logits = model(input_ids=token).logits[0]
    log_prob = logits.log_softmax(-1)
    completion = range(sequence.num_prompt, len(sequence.tokens))
    return torch.stack([log_prob[t - 1, sequence.tokens[t]] for t in completion]).sum()


def random_sequences(seed: int, num: int = 4, vocab: int = 19) -> list[Sequence]:
    """Sequences of random tokens, prompts of 2 to 4 of them and completions of 1 to 6."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sequences = []
    for _ in range(num):
        num_prompt, num_completion = draw(2, 5), draw(1, 7)
        tokens = [draw(0, vocab) for _ in range(num_prompt + num_completion)]
        sequences.append(Sequence(tokens, num_prompt))
    return sequences


def position_gradients(model: nn.Module, sequence: Sequence) -> dict[str, Tensor]:
    """d log pi / d theta^(t) for every use of a trainable parameter and token position t: shape
    (tokens, *parameter).

    The parameter is copied for each position, so that each copy's gradient is that position's
    contribution. A key is the name of the module that uses it and its name there.
    """
    num_tokens = len(sequence.tokens)
    copies: dict[str, Tensor] = {}

    def copy(key: str, parameter: Tensor) -> Tensor:
        repeated = parameter.detach().expand(num_tokens, *parameter.shape).clone()
        if parameter.requires_grad:
            if key in copies:
                raise ValueError(f"{key} is used twice in one forward: the oracle would lose one")
            copies[key] = repeated.requires_grad_(True)
        return repeated

    _check_covered(model)
    longer = _input_shapes(model, sequence.tokens + sequence.tokens[:1])
    patched = []
    for name, module in model.named_modules():
        forward = _forward_of(module)
        if forward is not None:
            module.forward = partial(forward, module, Use(name, copy, longer.get(name, ())))
            patched.append(module)
    try:
        value = log_prob_of_completion(model, sequence)
    finally:
        for module in patched:
            del module.forward
    gradients = torch.autograd.grad(value, list(copies.values()))
    return dict(zip(copies, gradients, strict=True))


def summed_by_parameter(model: nn.Module, per_use: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the uses of each parameter: the keys become those of `named_parameters`."""
    modules = dict(model.named_modules())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    total: dict[str, Tensor] = {}
    for key, gradient in per_use.items():
        module, parameter = key.partition("@")[0].rsplit(".", 1)
        name = names[id(getattr(modules[module], parameter))]
        total[name] = total[name] + gradient if name in total else gradient
    return total


@dataclass
class Use:
    """One module's place in the model, and how it gets its parameters' copies.

    Attributes:
        name: The module's name.
        copy: Repeats a parameter over the token positions, by its full name.
        longer: The shape of the module's input where the sequence has one token more.
    """

    name: str
    copy: Callable[[str, Tensor], Tensor]
    longer: tuple[int, ...]

    def __call__(self, parameter: str, value: Tensor) -> Tensor:
        return self.copy(f"{self.name}.{parameter}", value)

    def over(self, x: Tensor, parameter: str, value: Tensor) -> Tensor:
        """A vector's copies, (tokens, features), to be broadcast against x.

        x is (1, tokens, features), or has an axis of heads before or after that of the tokens: the
        tokens' axis is the one that grows with them.
        """
        repeated = self(parameter, value)
        if x.dim() == 3:
            return repeated
        (axis,) = (a for a in range(x.dim()) if x.shape[a] != self.longer[a])
        return repeated[:, None] if axis == 1 else repeated


def _input_shapes(model: nn.Module, tokens: list[int]) -> dict[str, tuple[int, ...]]:
    """The shape of what each module is called with."""
    shapes, handles = {}, []
    for name, module in model.named_modules():

        def note(module: nn.Module, args: tuple, name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                shapes[name] = tuple(args[0].shape)

        handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return shapes


def _check_covered(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and _forward_of(module) is None:
                raise ValueError(
                    f"the oracle has no forward with copies of {name}.{parameter_name}"
                )


def _forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    kind = type(module).__name__
    if kind in _HOMEMADE:
        return _HOMEMADE[kind]
    if kind.endswith("TopKRouter"):
        return _router
    if kind.endswith("Experts"):
        return _experts
    if isinstance(module, nn.Linear):
        return partial(_linear, equation="toi,bti->bto")
    if kind == "Conv1D":
        return partial(_linear, equation="tio,bti->bto")
    if isinstance(module, nn.Embedding):
        return _embedding
    if isinstance(module, nn.LayerNorm):
        return _layer_norm
    if kind.endswith("RMSNorm"):
        return _rms_norm
    if kind == "DoraLinearLayer":
        return _dora
    return None


def _linear(module: Any, use: Use, x: Tensor, equation: str) -> Tensor:
    y = torch.einsum(equation, use("weight", module.weight), x)
    return y if module.bias is None else y + use("bias", module.bias)


def _embedding(module: Any, use: Use, token: Tensor) -> Tensor:
    table = use("weight", module.weight)
    rows = [table[t, token[0, t]] for t in range(token.shape[1])]
    if module.padding_idx is not None:
        rows = [
            row.detach() if token[0, t] == module.padding_idx else row for t, row in enumerate(rows)
        ]
    scale = float(module.embed_scale) if hasattr(module, "embed_scale") else 1.0
    return torch.stack(rows)[None] * scale


def _layer_norm(module: nn.LayerNorm, use: Use, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    y = (x - mean) / (variance + module.eps).sqrt() * use.over(x, "weight", module.weight)
    return y if module.bias is None else y + use.over(x, "bias", module.bias)


def _rms_norm(module: Any, use: Use, x: Tensor) -> Tensor:
    gemma = "Gemma" in type(module).__name__
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    weight = use.over(x, "weight", module.weight)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1 if gemma else weight)


def _dora(
    module: Any,
    use: Use,
    x: Tensor,
    *,
    lora_A: nn.Linear,
    lora_B: nn.Linear,
    scaling: float,
    base_layer: nn.Linear,
    **_: object,
) -> Tensor:
    """What DoRA adds to the base layer's output W x + bias, so that the sum is
    m / |W + s B A| * (W + s B A) x + bias, with the rows' norms |.| held constant.
    """
    weight = base_layer.weight.detach()
    norm = (weight + scaling * lora_B.weight.detach() @ lora_A.weight.detach()).norm(dim=1)
    scale = use("weight", module.weight) / norm
    return (scale - 1) * (x @ weight.mT) + scale * scaling * lora_B(lora_A(x))


def _router(module: Any, use: Use, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.einsum("teh,th->te", use("weight", module.weight), x)
    value, index = logits.softmax(-1).topk(module.top_k)
    return logits, value / value.sum(-1, keepdim=True), index


def _experts(module: Any, use: Use, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
    up, down = use("gate_up_proj", module.gate_up_proj), use("down_proj", module.down_proj)
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for expert, part in zip(index[t], share[t], strict=True):
            gate, linear = (up[t, expert] @ x[t]).chunk(2)
            row = row + part * (down[t, expert] @ (module.act_fn(gate) * linear))
        rows.append(row)
    return torch.stack(rows)


def _plain_norm(module: Any, use: Use, x: Tensor) -> Tensor:
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    y = y * use("weight", module.weight)
    return y if module.bias is None else y + use("bias", module.bias)


def _gamma_norm(module: Any, use: Use, x: Tensor) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y * (1 + use("gamma", module.gamma)) + use("beta", module.beta)


def _head_norm(module: Any, use: Use, x: Tensor) -> Tensor:
    variance = x.var(-1, keepdim=True, correction=0)
    y = (x - x.mean(-1, keepdim=True)) / (variance + module.variance_epsilon).sqrt()
    return y * use("weight", module.weight)


def _scaled_linear(module: Any, use: Use, x: Tensor) -> Tensor:
    return 0.7 * _linear(module, use, x, "toi,bti->bto")


def _attention(module: Any, use: Use, x: Tensor, *_: Tensor, attn_mask: Tensor, **__: Any) -> Any:
    packed = torch.einsum("toi,bti->bto", use("in_proj_weight", module.in_proj_weight), x)
    packed = packed + use("in_proj_bias", module.in_proj_bias)
    query, key, value = packed.unflatten(-1, (3, module.num_heads, -1)).unbind(2)
    score = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weight = score[0].masked_fill(attn_mask, -torch.inf).softmax(-1)
    mixed = torch.einsum("hqk,bkhd->bqhd", weight, value).flatten(2)
    return module.out_proj(mixed), None


def _nano_gpt(module: Any, use: Use, input_ids: Tensor) -> Any:
    table = module.wte(input_ids) + module.wpe(torch.arange(input_ids.shape[1])[None])
    x = module.norm(module.run(table, None))
    head = use.copy("wte.weight@head", module.wte.weight)
    return SimpleNamespace(logits=torch.einsum("tvi,bti->btv", head, x))


def _homemade(module: Any, use: Use, input_ids: Tensor) -> Any:
    positions, shift = use("positions", module.positions), use("shift", module.shift)
    rows = torch.stack([positions[t, 0, t] for t in range(input_ids.shape[1])])
    x = module.run(module.table(input_ids) + rows + shift, None)
    return SimpleNamespace(logits=module.head(x))


_HOMEMADE: dict[str, Callable[..., Any]] = {
    "PlainLayerNorm": _plain_norm,
    "GammaNorm": _gamma_norm,
    "HeadNorm": _head_norm,
    "ScaledLinear": _scaled_linear,
    "MultiheadAttention": _attention,
    "NanoGpt": _nano_gpt,
    "Homemade": _homemade,
}


@dataclass
class Formula:
    """The rule, as plain numbers."""

    powers: tuple[float, float, float] | None  # p, q, r; None for the natural rule
    damping: float = 0.0
    relative: bool = False
    preserved: bool = False


def isopo_gradient(
    per_sequence: list[dict[str, Tensor]],
    sampled: list[tuple[int, int]],
    coefficients: list[float],
    formula: Formula,
    trailing: dict[str, dict[str, float]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """The ISOPO gradient of every parameter use, and the means that an optimizer step would fold
    in.

    Args:
        per_sequence: `position_gradients` of each sequence.
        sampled: (sequence, position) of the positions that estimate the Fisher norm.
        coefficients: One per sequence.
        formula: The rule.
        trailing: E[x^2] per use; None in the first step, which averages over the batch itself.
    """
    gradient, measured = {}, {}
    for key in per_sequence[0]:
        whole = [sequence[key].sum(0) for sequence in per_sequence]
        positions = [per_sequence[b][key][t] for b, t in sampled]
        past = (trailing or {}).get(key, {})
        if formula.powers is None:
            weights, measured[key] = _natural(whole, coefficients, formula, past)
        else:
            weights, measured[key] = _isometric(whole, positions, coefficients, formula, past)
        gradient[key] = -sum(w * g for w, g in zip(weights, whole, strict=True))
    return gradient, measured


def _isometric(whole, positions, coefficients, formula, past):
    scale_of_samples = sum((g * g).sum() for g in positions)
    fisher_sq = [
        float(sum((v * g).sum() ** 2 for g in positions) / scale_of_samples)
        if scale_of_samples > 0
        else 0.0
        for v in whole
    ]
    if any(fisher_sq) or "fisher_sq" in past:
        mean_of_rest = past.get("fisher_sq", sum(fisher_sq) / sum(f != 0 for f in fisher_sq))
        fisher_sq = [f if f != 0 else mean_of_rest for f in fisher_sq]
    norm_sq = [float((v * v).sum()) for v in whole]
    relative_sq = [f / n if n > 0 else 0.0 for f, n in zip(fisher_sq, norm_sq, strict=True)]
    weights = list(coefficients)
    p, q, r = formula.powers
    measured = {}
    for name, squares, power in (
        ("fisher_sq", fisher_sq, p),
        ("norm_sq", norm_sq, q),
        ("relative_fisher_sq", relative_sq, r),
    ):
        mean = past.get(name, sum(squares) / len(squares))
        measured[name] = sum(squares) / len(squares)

        def reg2(square: float, mean: float = mean) -> float:
            if formula.relative:
                return (square / (formula.damping * mean + 1e-8) + 1) ** 0.5
            return (square + formula.damping * mean + 1e-8) ** 0.5

        for b, square in enumerate(squares):
            weights[b] *= reg2(square) ** power
            if formula.preserved:
                weights[b] /= reg2(mean) ** power
    return weights, measured


def _natural(whole, coefficients, formula, past):
    flat = torch.stack([g.flatten() for g in whole])
    kernel = flat @ flat.T
    mean = float(kernel.trace()) / len(whole)
    expectation = past.get("eigenvalue", mean)
    c = formula.damping * expectation
    if c == 0:
        return [0.0] * len(whole), {"eigenvalue": mean}
    identity = torch.eye(len(whole), dtype=kernel.dtype)
    coefficient = torch.tensor(coefficients, dtype=kernel.dtype)
    weights = torch.linalg.inv(kernel + c * identity) @ coefficient
    if formula.relative:
        weights = weights * c
    elif formula.preserved:
        weights = weights * (expectation + c)
    return weights.tolist(), {"eigenvalue": mean}
