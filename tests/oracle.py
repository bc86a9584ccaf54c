"""The slow, obvious ISOPO: one sequence at a time, every parameter copied once per token position,
plain autograd.

Nothing here is shared with `proxstep.isopo`, except that the sampled positions are handed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    return sum(
        log_prob[t - 1, sequence.tokens[t]]
        for t in range(sequence.num_prompt, len(sequence.tokens))
    )


def position_gradients(model: nn.Module, sequence: Sequence) -> dict[str, Tensor]:
    """d log pi / d theta^(t) for every parameter use and token position t: shape (tokens,
    *parameter).

    The parameter is copied for each position, so that each copy's gradient is that position's
    contribution.
    """
    num_tokens = len(sequence.tokens)
    copies: dict[str, Tensor] = {}

    def copy(key: str, parameter: Tensor) -> Tensor:
        shape = (num_tokens, *parameter.shape)
        copies[key] = parameter.detach().expand(shape).clone().requires_grad_(True)
        return copies[key]

    originals = []
    for name, module in model.named_modules():
        forward = _position_forward(module, name, copy)
        if forward is not None:
            originals.append(module)
            module.forward = forward
    try:
        value = log_prob_of_completion(model, sequence)
    finally:
        for module in originals:
            del module.forward
    gradients = torch.autograd.grad(value, list(copies.values()))
    return dict(zip(copies, gradients, strict=True))


def _position_forward(module: nn.Module, name: str, copy: Callable) -> Callable | None:
    kind = type(module).__name__
    if kind in {"Linear", "Conv1D"}:
        equation = "toi,bti->bto" if kind == "Linear" else "tio,bti->bto"

        def forward(x: Tensor) -> Tensor:
            y = torch.einsum(equation, copy(f"{name}.weight", module.weight), x)
            if getattr(module, "bias", None) is not None:
                y = y + copy(f"{name}.bias", module.bias)
            return y

        return forward
    if kind == "Embedding":

        def forward(token: Tensor) -> Tensor:
            table = copy(f"{name}.weight", module.weight)
            rows = [table[t, token[0, t]] for t in range(token.shape[1])]
            if module.padding_idx is not None:
                rows = [
                    row.detach() if token[0, t] == module.padding_idx else row
                    for t, row in enumerate(rows)
                ]
            return torch.stack(rows)[None]

        return forward
    if kind == "LayerNorm":

        def forward(x: Tensor) -> Tensor:
            mean = x.mean(-1, keepdim=True)
            variance = (x - mean).square().mean(-1, keepdim=True)
            normal = (x - mean) / (variance + module.eps).sqrt()
            y = normal * copy(f"{name}.weight", module.weight)
            return y + copy(f"{name}.bias", module.bias) if module.bias is not None else y

        return forward
    if kind.endswith("RMSNorm"):

        def forward(x: Tensor) -> Tensor:
            weight = copy(f"{name}.weight", module.weight)
            if x.dim() == 4:  # (batch, tokens, heads, features)
                weight = weight[:, None]
            return weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

        return forward
    return None


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
    if any(fisher_sq):
        mean_of_rest = sum(fisher_sq) / sum(f != 0 for f in fisher_sq)
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
