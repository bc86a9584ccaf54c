"""A step's diagnostics as text for a terminal: sentences, and a table of the largest layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator

from proxstep.isopo.diagnostics.statistics import RESOLUTION
from proxstep.isopo.diagnostics.step import LayerDiagnostics, StepDiagnostics

WIDTH = 100
"""Columns of the text."""


def summary(diagnostics: StepDiagnostics, top: int = 5) -> str:
    """Return what a person should know of a step, in 100 columns; what is unknown is left out.

    Args:
        diagnostics: What `diagnose` returned.
        top: Number of parameter uses in the table.
    """
    if not diagnostics.layers:
        return "No parameter was measured in this step."
    paragraphs = {
        "Measured": _measured,
        "Update": _update,
        "Direction": _direction,
        "Weights": _weights,
        "Fisher": _fisher,
        "Kernels": _kernels,
        "Noise": _noise,
        "Conflict": _conflict,
    }
    indent = max(len(label) for label in paragraphs) + 2
    lines = [
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=label.ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for label, write in paragraphs.items()
        if (text := " ".join(write(diagnostics)))
    ]
    return "\n".join([*lines, "", *_table(diagnostics, top)])


def _measured(step: StepDiagnostics) -> Iterator[str]:
    num_uses = len(step.layers)
    yield (
        f"{_count(step.num_sequences, 'sequence')} in "
        f"{_count(step.num_microbatches, 'microbatch')}, {_count(num_uses, 'parameter use')}."
    )
    if 0 < step.num_kernels < num_uses:
        yield f"What needs kernels is about the {step.num_kernels} uses that have one."


def _update(step: StepDiagnostics) -> Iterator[str]:
    known = _sorted(step, lambda layer: layer.grad_share)
    if known:
        share, name = known[0]
        yield f"{name} carries {share:.1%} of the squared gradient."
        half, count = 0.0, 0
        while half < 0.5 and count < len(known):
            half, count = half + known[count][0], count + 1
        if count > 1:
            yield f"{count} of {_count(len(step.layers), 'use')} carry half of it."


def _direction(step: StepDiagnostics) -> Iterator[str]:
    if step.mean_cosine_to_reinforce is not None:
        least, name = _sorted(step, lambda layer: layer.cosine_to_reinforce)[-1]
        yield (
            f"The cosine to REINFORCE's gradient is {step.mean_cosine_to_reinforce:.3f} within an "
            f"average use, least in {name}: {least:.3f}."
        )
    if step.cosine_to_reinforce is not None:
        yield (
            f"Of all uses together it is {step.cosine_to_reinforce:.3f}; in this the uses' lengths "
            "count as well, which an optimizer such as AdamW evens out."
        )


def _weights(step: StepDiagnostics) -> Iterator[str]:
    spreads = _sorted(step, lambda layer: layer.weight_spread)
    if step.weight_spread is not None and spreads[0][0] < RESOLUTION:
        yield "The rule gives all sequences of a use the same factor."
    elif step.weight_spread is not None:
        yield (
            "The factors that the rule gives the sequences spread by "
            f"{step.weight_spread:.3g} times their mean, most in {spreads[0][1]}: "
            f"{spreads[0][0]:.3g} times."
        )
    if step.weight_length_correlation is not None:
        yield (
            "The logarithms of a sequence's factor and of its length correlate by "
            f"{step.weight_length_correlation:.2f}."
        )
    shares = _sorted(step, _top_share)
    if shares:
        share, name = shares[0]
        yield (
            f"One sequence contributes up to {share:.1%} of a use's update, in {name}; equal parts "
            f"would be {1 / step.num_sequences:.1%}."
        )


def _fisher(step: StepDiagnostics) -> Iterator[str]:
    medians = _sorted(step, lambda layer: layer.fisher and layer.fisher.median)
    if medians:
        (most, long), (least, short) = medians[0], medians[-1]
        yield f"The median of F goes from {least:.2g} in {short} to {most:.2g} in {long}."
    if step.frac_filled_fisher:
        yield (
            f"{step.frac_filled_fisher:.1%} of the Fisher estimates were exactly zero and were "
            "filled in."
        )
    if step.fisher_norm_correlation is not None:
        yield f"log F and log |G| correlate by {step.fisher_norm_correlation:.2f}."


def _kernels(step: StepDiagnostics) -> Iterator[str]:
    known = _sorted(step, lambda layer: layer.ntk_condition)
    if known:
        num_singular = sum(math.isinf(condition) for condition, _ in known)
        regular = known[num_singular:]
        if regular:
            yield (
                f"Condition numbers go from {regular[-1][0]:.3g} to {regular[0][0]:.3g} in "
                f"{regular[0][1]}."
            )
        if num_singular:
            verb = "is" if num_singular == 1 else "are"
            yield f"{num_singular} of {_count(len(known), 'kernel')} {verb} singular."
    if step.ntk_effective_rank is not None:
        size = step.num_sequences / step.num_microbatches
        yield f"The effective rank is {step.ntk_effective_rank:.1f} of {size:.3g}."
    if step.ntk_off_diagonal is not None:
        yield f"{step.ntk_off_diagonal:.1%} of |K| is off the diagonal."


def _noise(step: StepDiagnostics) -> Iterator[str]:
    noise = step.noise
    if noise is None or noise.scale is None:
        return
    if math.isinf(noise.scale):
        yield (
            "The noise hides the gradient: the estimate of its squared length is not positive, so "
            "that this step alone suggests no batch size."
        )
    else:
        yield (
            f"The noise scale is {_integer(noise.scale)} sequences: in a batch of that size noise "
            "and gradient are equally long."
        )
        pays = "would pay" if noise.scale > step.num_sequences else "would gain little"
        yield f"This step measured {step.num_sequences}: a larger batch {pays}."
    if step.noise_split is not None:
        yield step.noise_split.sentence()
    if not step.noise_between_groups:
        yield "Sequences were taken as independent: where they share a prompt, there is more noise."


def _conflict(step: StepDiagnostics) -> Iterator[str]:
    if step.group_conflict is None:
        return
    yield (
        f"In a prompt's group {step.group_conflict:.1%} of the pairs of sequences pull against "
        "each other."
    )
    if step.opposed_coefficients is not None:
        yield (
            f"It would be {step.opposed_coefficients:.1%} if the group's gradients all pointed the "
            "same way, and 50% if they were unrelated."
        )


_COLUMNS: dict[str, Callable[[LayerDiagnostics], str | None]] = {
    "share": lambda layer: _percent(layer.grad_share),
    "cosine": lambda layer: _number(layer.cosine_to_reinforce, ".3f"),
    "spread": lambda layer: _number(layer.weight_spread, ".3g"),
    "top seq": lambda layer: _percent(_top_share(layer)),
    "cond.": lambda layer: _number(layer.ntk_condition, ".2g"),
    "noise": lambda layer: layer.noise and _integer(layer.noise.scale),
    "conflict": lambda layer: _percent(layer.group_conflict),
}
"""Heading and cell of each column; None for an unknown figure."""


def _table(step: StepDiagnostics, top: int) -> list[str]:
    """Return the table of the uses with the largest share or, unknown, the most uneven parts."""
    ranked = sorted(
        step.layers,
        key=lambda layer: (layer.grad_share or 0.0, _top_share(layer) or 0.0),
        reverse=True,
    )[:top]
    cells = {heading: [cell(layer) for layer in ranked] for heading, cell in _COLUMNS.items()}
    columns = {
        heading: [heading, *(cell or "-" for cell in column)]
        for heading, column in cells.items()
        if any(column)
    }
    widths = {heading: max(map(len, column)) for heading, column in columns.items()}
    room = WIDTH - sum(width + 2 for width in widths.values())
    names = ["parameter use", *(_shortened(layer.name, room) for layer in ranked)]
    name_width = max(map(len, names))
    return [
        name.ljust(name_width)
        + "".join("  " + column[i].rjust(widths[heading]) for heading, column in columns.items())
        for i, name in enumerate(names)
    ]


def _top_share(layer: LayerDiagnostics) -> float | None:
    known = layer.max_contribution_share is not None
    return layer.max_contribution_share if known else layer.max_weight_share


def _sorted(
    step: StepDiagnostics, figure: Callable[[LayerDiagnostics], float | None]
) -> list[tuple[float, str]]:
    """Return the known values of a figure with the names of their uses, largest first."""
    pairs = [(value, layer.name) for layer in step.layers if (value := figure(layer)) is not None]
    return sorted(pairs, key=lambda pair: -pair[0])


def _shortened(name: str, width: int) -> str:
    """Return a name without its first parts where it is too long: the last tell layers apart."""
    if len(name) > width:
        name = name.removesuffix(".weight")
    parts = name.split(".")
    while len(name) > width and len(parts) > 1:
        parts = parts[1:]
        name = ".." + ".".join(parts)
    return name[-width:]


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number} {noun if number == 1 else plural}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _integer(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2g}"
