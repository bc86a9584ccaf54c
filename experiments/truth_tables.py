"""The tables of an experiment's page; see truth.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import comb, isnan, nan
from statistics import fmean

from proxstep.lab.choosing import Chosen
from proxstep.lab.comparison import Comparison, compare_runs, contrast
from proxstep.lab.outcomes import Outcome
from proxstep.lab.statistics import Estimate, difference, interquartile_mean, mean_interval
from proxstep.runs.reading import MISSING, Run

SPENT = (1, 2, 4, 8, 16, 32, 64, 128)
"""Milli-nats a token, at which scores are compared on the way."""
BEST_OF = {"isopo-figures": 3}
"""Experiments whose figure in the paper shows the best of so many runs."""
PARTED = {"optimizers": "reinforce"}
"""Experiments of arms METHOD-OPTIMIZER: each is compared with this method under its optimizer."""


def parts_of(comparison: Comparison, name: str) -> list[Comparison]:
    """Return the comparisons that an experiment's page is made of, mostly the whole one."""
    if name not in PARTED:
        return [comparison]
    runs: dict[str, list[Run]] = {}
    for arm, chosen in comparison.chosen.items():
        runs.setdefault(arm.rpartition("-")[2], []).extend(outcome.run for outcome in chosen.pool)
    return [compare_runs(own, f"{PARTED[name]}-{part}") for part, own in runs.items()]


def tables(comparison: Comparison, parts: Sequence[Comparison], name: str) -> Iterator[str]:
    """Yield the tables of an experiment's page."""
    yield scores(parts)
    if number := BEST_OF.get(name):
        yield best_of_table(comparison, number)
    for part in parts:
        if len(part.settings) > 1:
            yield at_equal_values(part)
            yield from saved_at_equal_values(part)
            yield from on_the_way(part)
    yield training(comparison)


def reference(parts: Sequence[Comparison]) -> str:
    """Return whose figures the others' are compared with, in the genitive; empty for nobody's."""
    names = [part.against for part in parts if part.against]
    return "reinforce's of its optimizer" if len(names) > 1 else "".join(f"{n}'s" for n in names)


def scores(parts: Sequence[Comparison]) -> str:
    """Return each arm at its best values, and against the one that it is compared with."""
    whose, tuned = reference(parts), parts[0].tuned
    columns = ["", *([tuned.replace("_", " ")] if tuned else []), "seeds"]
    columns += ["final score", "KL(policy ‖ initial), mnat a token"]
    if whose:
        columns += [f"its KL - {whose}", f"score - {whose}", "less KL at equal score"]
    rows = [cells for part in parts for cells in _score_rows(part)]
    note = (
        "Interquartile means with 95 % intervals over seeds; KL and its difference, seed by seed: "
        "means, intervals by Student's t."
    )
    if tuned:
        note += (
            " Each seed is reported at the value that the other seeds chose (in brackets, how many "
            "chose it; edge: the smallest or largest that was tried)."
        )
    if whose:
        note += " Intervals are for one pair at a time."
        if tuned:
            note += (
                f" Less KL at equal score: both at the same {tuned.replace('_', ' ')}, geometric "
                "mean over those that both have."
            )
    return f"{_table(columns, rows)}\n\n{note}"


def _score_rows(comparison: Comparison) -> list[list[str]]:
    setting, against = comparison.settings[0], comparison.against
    pairs = {pair.first: pair for pair in setting.pairs if pair.second == against}
    rows = []
    for row in setting.standings:
        chosen = comparison.chosen[row.algorithm]
        cells = [row.algorithm]
        if comparison.tuned:
            cells.append(", ".join(_votes(chosen)))
        kl = [drift for outcome in chosen.outcomes if not isnan(drift := _drift(outcome))]
        cells += [str(row.seeds), row.final.text(), _text(mean_interval(kl)) if kl else MISSING]
        if against:
            cells += [""] * 3
            if pair := pairs.get(row.algorithm):
                further = _drifts_further(chosen, comparison.chosen[against])
                cells[-3:] = [further, pair.final.text("+"), pair.kl_saved.percent()]
        rows.append(cells)
    return rows


def _votes(chosen: Chosen) -> Iterator[str]:
    """Yield the values at which runs are reported, how many are, and which end the arm's grid."""
    edges = {chosen.values[0], chosen.values[-1]}
    for value, number in chosen.votes.items():
        yield f"{_value(value)} ({number}{', edge' if value in edges else ''})"


def _drift(outcome: Outcome) -> float:
    return 1000 * outcome.kl[-1] if outcome.kl else nan


def _drifts_further(chosen: Chosen, other: Chosen) -> str:
    ours, theirs = ({o.run.seed: _drift(o) for o in each.outcomes} for each in (chosen, other))
    more = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    known = [value for value in more if not isnan(value)]
    return _text(mean_interval(known), "+") if known else MISSING


def at_equal_values(comparison: Comparison) -> str:
    """Return every arm's final score at every value, less that of the one all are compared with."""
    found: dict[str, dict[str, str]] = {}
    for setting in comparison.settings[1:]:
        less = {pair.first: pair.final.text("+") for pair in setting.pairs}
        for row in setting.standings:
            text = row.final.text()
            if row.algorithm in less and comparison.against:
                text = f"{row.final.value:.3f}: {less[row.algorithm]}"
            found.setdefault(row.algorithm, {})[setting.name] = text
    title = f"Final score at each {comparison.tuned.replace('_', ' ')}"
    if comparison.against:
        title += f", and after a colon what it is more than {comparison.against}'s"
    return _by_value(comparison, title, found)


def saved_at_equal_values(comparison: Comparison) -> Iterator[str]:
    """Yield what every arm spends less for an equal score where both have the same value."""
    found: dict[str, dict[str, str]] = {}
    for setting in comparison.settings[1:]:
        for pair in setting.pairs:
            if pair.second == comparison.against:
                found.setdefault(pair.first, {})[setting.name] = pair.kl_saved.percent()
    if found:
        title = f"Less KL at equal score, both at the same {comparison.tuned.replace('_', ' ')}"
        yield _by_value(comparison, title, found)


def _by_value(comparison: Comparison, title: str, found: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table of arms by values, from each arm's texts by the value's name."""
    values = [setting.name for setting in comparison.settings[1:]]
    rows = [[name, *(own.get(value, "") for value in values)] for name, own in found.items()]
    return f"{title}:\n\n{_table(['', *map(_value, values)], rows)}"


def on_the_way(comparison: Comparison) -> Iterator[str]:
    """Yield every arm's score when so much KL was first spent, at the value that is best for it.

    At a KL only the values count at which all runs got as far, of an arm and of the one it is
    compared with, and had not gone further at their first evaluation: score and KL between two
    evaluations are interpolated, and before the first a shorter step has more score for its KL
    than a longer one, whatever made it.
    """
    rows: dict[str, list[str]] = {name: [] for name in comparison.chosen}
    against = comparison.against
    ours = comparison.chosen.get(against or "")
    levels = [mnat for mnat in SPENT if ours and _measured_at(ours, mnat)]
    for mnat in levels:
        for name, chosen in comparison.chosen.items():
            rows[name].append(_score_on_the_way(chosen, ours, mnat) if ours else MISSING)
    if levels:
        title = (
            "Score when so much KL(policy ‖ initial) was first spent, in mnat a token, at the "
            f"{comparison.tuned.replace('_', ' ')} that is best for it, of those at which all runs "
            "were measured before and after, both arms', and after a colon what it is more than "
            f"{against}'s"
        )
        cells = [[name, *own] for name, own in rows.items()]
        yield f"{title}:\n\n{_table(['', *map(str, levels)], cells)}"


def _score_on_the_way(chosen: Chosen, other: Chosen, mnat: float) -> str:
    """Return a score at a KL and what it is more than another's; the other's own stands alone."""
    shared = _measured_at(chosen, mnat) & _measured_at(other, mnat)
    if not shared:
        return MISSING
    ours, theirs = (
        Chosen(
            [replace(o, final=o.score_at_kl(mnat / 1000)) for o in each.pool if o.tuned in shared]
        )
        for each in (chosen, other)
    )
    middle = f"{interquartile_mean(*ours.samples(_final)):.3f}"
    if chosen is other:
        return middle
    return f"{middle}: {contrast(difference, ours, theirs, _final).text('+')}"


def _measured_at(chosen: Chosen, mnat: float) -> set[str]:
    """Return the values at which every run had a first evaluation before a KL, and reached it."""
    kl = mnat / 1000
    missed = {o.tuned for o in chosen.pool if len(o.kl) < 2 or not o.kl[1] <= kl <= max(o.kl)}
    return set(chosen.values) - missed


def _final(outcome: Outcome) -> float:
    return outcome.final


def best_of(values: Sequence[float], number: int) -> float:
    """Return the mean, over all choices of so many of the values, of the largest.

    >>> best_of([1.0, 2.0, 3.0], 2)  # 2, 3 and 3
    2.6666666666666665
    """
    ways = comb(len(values), number)
    return sum(x * comb(below, number - 1) for below, x in enumerate(sorted(values))) / ways


def best_of_table(comparison: Comparison, number: int) -> str:
    """Return what the best of so many runs would show, beside the mean."""
    rows = []
    for name, chosen in comparison.chosen.items():
        finals = [o.final for o in chosen.outcomes if not isnan(o.final)]
        if len(finals) >= number:
            mean, best = mean_interval(finals), best_of(finals, number)
            rows.append([name, mean.text(), f"{best:.3f}", f"{best - mean.value:+.3f}"])
    note = f"The best of {number}: averaged over all choices of {number} of the seeds."
    return f"{_table(['', 'mean', f'best of {number}', 'difference'], rows)}\n\n{note}"


FIGURES = {
    "evaluation_entropy": ("entropy, nats a token", 3),
    "grad_norm": ("gradient norm", 3),
    "grad_response_efficiency": ("norm by advantage", 3),
    "completions_mean_length": ("tokens", 3),
    "geometry/weight_spread": ("spread of the weights", 2),
    "geometry/weight_length_correlation": ("weight ~ length", 2),
    "geometry/norm_length_correlation": ("norm ~ length", 2),
    "geometry/fisher_norm_correlation": ("F ~ norm", 2),
    "geometry/mean_cosine_to_reinforce": ("cosine to REINFORCE", 2),
}
"""What the last table has: field, heading, significant digits. ~ is a correlation of logarithms."""


def training(comparison: Comparison) -> str:
    """Return what the steps of the reported runs were like, means over steps and runs."""
    named = {name: chosen.outcomes for name, chosen in comparison.chosen.items()}
    rows, known = (
        [],
        [
            field
            for field in FIGURES
            if any(o.run.series(field)[1] for outcomes in named.values() for o in outcomes)
        ],
    )
    for name, outcomes in named.items():
        cells = [name]
        for field in known:
            values = [fmean(own) for o in outcomes if (own := o.run.series(field)[1])]
            cells.append(f"{fmean(values):.{FIGURES[field][1]}g}" if values else MISSING)
        rows.append(cells)
    note = (
        "Means over the steps that measured them, and runs. ~: correlation, over a step's "
        "sequences, of logarithms; means over parameters."
    )
    return f"{_table(['', *(FIGURES[field][0] for field in known)], rows)}\n\n{note}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(text: str) -> str:
    """Return a tuned value without its key: "learning_rate 3e-05" is "3e-5"."""
    return re.sub(r"e-0(\d)", r"e-\1", re.sub(r"^(learning_rate|kl_budget) ", "", text))


def _text(found: Estimate, sign: str = "") -> str:
    if isnan(found.value):
        return MISSING
    ends = "" if isnan(found.low) else f" [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"
    return f"{found.value:{sign}.1f}{ends}"
