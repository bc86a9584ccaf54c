"""One or two sentences that say what a comparison has shown."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from proxstep.lab.comparison import Comparison, Pair, Setting
from proxstep.lab.statistics import MOST_SEEDS, Estimate


def verdict(comparison: Comparison) -> str:
    """Return what is shown of the final scores, and of the KL where that can be told.

    With more than two algorithms a difference counts where it is told from chance in view of all
    pairs (Bonferroni).
    """
    setting = comparison.settings[0]
    if len(setting.standings) < 2:
        return f"{setting.standings[0].algorithm} alone was run: there is nothing to compare it to."
    if names := comparison.repeated:
        return (
            f"No verdict: {_listed(names)} has several runs of one seed, which are different "
            "settings or the same one twice. Report one of them, or give each setting a label."
        )
    against = comparison.against
    scored = [row.algorithm for row in setting.standings if not isnan(row.final.value)]
    if against is not None and against not in scored:
        return f"No verdict: {against}, which the others are compared with, has no score."
    if not setting.pairs:
        return "No verdict: fewer than two algorithms have a score."
    if any(pair.seeds < 2 for pair in setting.pairs):
        return (
            "No verdict from one seed: what differs may be chance. Add seeds with --add-seeds 4 to "
            "the same command."
        )
    text = _of_scores(setting) if against is None else _of_reference(setting, against)
    saved = _of_kl(setting.pairs)
    if any(chosen.is_tuned for chosen in comparison.chosen.values()):
        text = f"Each at its best {comparison.tuned}, chosen on other seeds: {text}"
        saved = f"{saved}, both at the same {comparison.tuned}" if saved else ""
    return f"{text}; {saved}." if saved else f"{text}."


def _of_scores(setting: Setting) -> str:
    pairs = setting.pairs
    leader = pairs[0].first
    own = [pair for pair in pairs if pair.first == leader]
    if not any(pair.adjusted for pair in own):
        others = [pair for pair in pairs if pair.adjusted]
        text = f"{_listed([leader, *(pair.second for pair in own)])} cannot be told apart "
        if others:
            text = f"{leader} cannot be told apart from {_listed([p.second for p in own])} "
        return text + _at_seeds(own)
    above = [pair for pair in own if pair.adjusted]
    text = f"{leader} ends " + " and ".join(
        f"{pair.final.text()} above {pair.second}" for pair in above
    )
    seeds = min(pair.seeds for pair in own)
    if unclear := [pair for pair in own if not pair.adjusted]:
        names = _listed([pair.second for pair in unclear])
        return f"{text}; it cannot be told apart from {names} {_at_seeds(unclear)}"
    return f"{text} ({seeds} seeds)"


def _of_reference(setting: Setting, against: str) -> str:
    """Return which of the others end above or below the one that they are compared with."""
    texts, unclear = [], []
    for pair in setting.pairs:
        final = pair.final
        if not pair.adjusted:
            unclear.append(pair)
        elif final.value > 0:
            texts.append(f"{pair.first} ends {final.text()} above {against}")
        else:
            below = Estimate(-final.value, -final.high, -final.low)
            texts.append(f"{pair.first} ends {below.text()} below {against}")
    if unclear:
        names = _listed([pair.first for pair in unclear])
        texts.append(f"{names} cannot be told apart from {against} {_at_seeds(unclear)}")
    return "; ".join(texts)


def _at_seeds(pairs: Sequence[Pair]) -> str:
    seeds = min(pair.seeds for pair in pairs)
    easiest = min(pairs, key=lambda pair: pair.seeds_needed - pair.seeds)
    if easiest.seeds_needed >= MOST_SEEDS:
        more = f"more than {MOST_SEEDS - easiest.seeds} more"
    else:
        more = f"{max(easiest.seeds_needed - easiest.seeds, 1)} more"
    which = f" for {easiest.first} against {easiest.second}" if len(pairs) > 1 else ""
    return f"at {seeds} seeds: {more} would be needed{which}"


def _of_kl(pairs: Sequence[Pair]) -> str:
    """Return the largest clear saving of KL at equal score, nothing where none is clear."""
    clear = [pair for pair in pairs if pair.kl_adjusted]
    if not clear:
        return ""
    pair = max(clear, key=lambda pair: max(pair.kl_saved.value, pair.kl_saved_by_second.value))
    first, second, saved = pair.first, pair.second, pair.kl_saved
    if saved.value < 0:
        first, second, saved = pair.second, pair.first, pair.kl_saved_by_second
    against = f" than {second}" if len(pairs) > 1 else ""
    return f"{first} spends {saved.percent()} less KL{against} at equal score"


def _listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    >>> _listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
