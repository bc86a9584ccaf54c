"""Check the statistics of `proxstep compare` against synthetic data with known answers.

    python scripts/check_statistics.py coverage     # 95 % intervals over 1,000 draws
    python scripts/check_statistics.py pairs        # differences of runs that share a seed's luck
    python scripts/check_statistics.py power        # seeds needed, against simulated tests
    python scripts/check_statistics.py grid         # the best of a grid, chosen on other seeds
    python scripts/check_statistics.py rliable      # needs `pip install rliable`

What came out is in experiments/LOG.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from proxstep.lab import statistics as ours
from proxstep.lab.choosing import Chosen
from proxstep.lab.comparison import redraw_both
from proxstep.lab.outcomes import Outcome
from proxstep.runs.reading import Run

_DRAWS = 1000
SHAPES = {
    "normal": lambda rng, size: rng.normal(0.6, 0.05, size),
    "skewed": lambda rng, size: rng.beta(8, 2, size),
    "heavy tails": lambda rng, size: 0.6 + 0.05 * rng.standard_t(3, size),
}


GRIDS = (
    (0.6, 0.6),
    (0.6, 0.6, 0.6),
    (0.6, 0.62, 0.55),
    (0.6, 0.6, 0.6, 0.6, 0.6),
    (0.6, 0.75, 0.5),
)
"""True means of the values, with a standard deviation over seeds of 0.05."""


def coverage(draws: int, numbers: list[int]) -> None:
    """Print how often an interval holds the truth, for each number of runs."""
    print("| runs | scores | one algorithm | bare percentiles | difference of two | P(a > b) |")
    print("|---|---|---|---|---|---|")
    for runs in numbers:
        for name, draw in SHAPES.items():
            rng = np.random.default_rng(runs)
            # What an interquartile mean of so many runs is on average, and that of all.
            truth = ours.interquartile_mean(draw(rng, (200_000, runs))).mean()
            hits = np.zeros(4)
            for _ in range(draws):
                first, second = draw(rng, runs), draw(rng, runs)
                one = ours.estimate(ours.interquartile_mean, [first])
                bare = ours.estimate(ours.interquartile_mean, [first], widened=False)
                two = ours.estimate(ours.difference(1), [first, second])
                better = ours.improvement_estimate([first], [second])
                pairs = ((one, truth), (bare, truth), (two, 0.0), (better, 0.5))
                hits += [found.low <= true <= found.high for found, true in pairs]
            shares = " | ".join(f"{share:.3f}" for share in hits / draws)
            print(f"| {runs} | {name} | {shares} |", flush=True)


CORRELATIONS = (0.0, 0.5, 0.8)
"""Of the scores of two algorithms over seeds."""


def pairs(draws: int, numbers: list[int]) -> None:
    """Print coverage and width of intervals for a difference, with runs paired by seed and not.

    Of single values, and of grids of three equal ones from which the other seeds choose.
    """
    print("| runs | correlation | values | paired | mean width | not paired | width |")
    print("|---|---|---|---|---|---|---|")
    for runs in numbers:
        for correlation in CORRELATIONS:
            for values in (1, 3):
                rng = np.random.default_rng(runs)
                hits, widths = np.zeros(2), np.zeros(2)
                for _ in range(draws):
                    luck = correlation**0.5 * rng.normal(size=(runs, 1))
                    first, second = (
                        _chosen(luck + (1 - correlation) ** 0.5 * rng.normal(size=(runs, values)))
                        for _ in range(2)
                    )
                    samples = [*first.samples(_final), *second.samples(_final)]
                    redraw = redraw_both(first, second, _final)
                    for place, paired in enumerate((True, False)):
                        found = ours.estimate(
                            ours.difference(1), samples, redraw=redraw, paired=paired
                        )
                        hits[place] += found.low <= 0.0 <= found.high
                        widths[place] += (found.high - found.low) / draws
                cells = [
                    f"{hit / draws:.3f} | {width:.2f}"
                    for hit, width in zip(hits, widths, strict=True)
                ]
                name = "one" if values == 1 else f"best of {values}"
                row = " | ".join([str(runs), str(correlation), name, *cells])
                print(f"| {row} |", flush=True)


def power(draws: int) -> None:
    """Print estimates of the seeds needed, and how often about so many tell two algorithms apart.

    The estimate is right within 20 % if four of five comparisons (0.8) lies between the last two.
    """
    print(
        "| difference | estimate, spread known | from 5 runs: median | power | at / 1.2 | x 1.2 |"
    )
    print("|---|---|---|---|---|---|")
    for effect in (1.0, 1.5, 2.0):
        rng = np.random.default_rng(0)
        spread = float(ours.interquartile_mean(rng.normal(0, 1, (100_000, 20))).std() * 20**0.5)
        known = ours.seeds_needed(effect, spread * (2 / 5) ** 0.5, 5)
        guesses = []
        for _ in range(draws):
            pair = [rng.normal(effect, 1, 5), rng.normal(0, 1, 5)]
            found = ours.estimate(ours.difference(1), pair)
            guesses.append(ours.seeds_needed(found.value, found.error, 5))
        shares = []
        for runs in (known, round(known / 1.2), round(known * 1.2)):
            told = [
                ours.estimate(
                    ours.difference(1), [rng.normal(effect, 1, runs), rng.normal(0, 1, runs)]
                ).is_certain
                for _ in range(draws)
            ]
            shares.append(f"{np.mean(told):.3f} at {runs}")
        print(
            f"| {effect} | {known} | {np.median(guesses):.0f} | {' | '.join(shares)} |", flush=True
        )


def grid(draws: int, numbers: list[int]) -> None:
    """Print coverage of intervals for the best of a grid, chosen for each seed by the others.

    The truth is what is reported on average. "Fixed choice" is the interval that takes the reported
    runs for independent of each other.
    """
    print("| runs | true means | mean reported | coverage | mean width | fixed choice | width |")
    print("|---|---|---|---|---|---|---|")
    for runs in numbers:
        for means in GRIDS:
            rng = np.random.default_rng(0)
            tables = rng.normal(means, 0.05, (5000, runs, len(means)))
            chosen = [_chosen(table) for table in tables]
            truth = float(np.mean([one.samples(_final)[0].mean() for one in chosen]))
            cells = []
            for again in (True, False):
                found = [
                    ours.estimate(
                        ours.interquartile_mean,
                        one.samples(_final),
                        redraw=one.redraw(_final) if again else None,
                    )
                    for one in chosen[:draws]
                ]
                hits = np.mean([one.low <= truth <= one.high for one in found])
                width = np.mean([one.high - one.low for one in found])
                cells.append(f"{hits:.3f} | {width:.3f}")
            print(f"| {runs} | {means} | {truth:.4f} | {' | '.join(cells)} |", flush=True)


def _final(outcome: Outcome) -> float:
    return outcome.final


def _chosen(table: np.ndarray) -> Chosen:
    """Return the runs of a table of (seed, value)."""
    return Chosen(
        [
            Outcome(Run(Path(), "a", n, {}, {}, []), str(v), "", score, score, score, [], [], [])
            for n, row in enumerate(table)
            for v, score in enumerate(row)
        ]
    )


def rliable() -> None:
    """Print our figures beside rliable's, on three tasks with ten runs each."""
    from rliable import library, metrics

    rng = np.random.default_rng(3)
    first, second = rng.beta(8, 2, (10, 3)), rng.beta(7, 3, (10, 3))
    scores = {"a": first, "a,b": (first, second)}
    theirs, their_ends = library.get_interval_estimates(
        {"a": first}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=20_000
    )
    better, better_ends = library.get_interval_estimates(
        {"a,b": scores["a,b"]}, metrics.probability_of_improvement, reps=5_000
    )
    columns = [list(first.T), [*first.T, *second.T]]
    iqm = ours.estimate(ours.interquartile_mean, columns[0], widened=False)
    prob = ours.estimate(ours.improvement(3), columns[1], widened=False)
    print("| | rliable | here, bare percentiles |")
    print("|---|---|---|")
    for name, one, ends, here in (
        ("interquartile mean", theirs["a"], their_ends["a"], iqm),
        ("probability of improvement", better["a,b"], better_ends["a,b"], prob),
    ):
        low, high = np.ravel(ends)
        print(
            f"| {name} | {float(np.ravel(one)[0]):.6f} [{low:.4f}, {high:.4f}] "
            f"| {here.value:.6f} [{here.low:.4f}, {here.high:.4f}] |"
        )


def main() -> None:
    """Run one of the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("check", choices=["coverage", "pairs", "power", "grid", "rliable"])
    parser.add_argument("--draws", type=int, default=_DRAWS)
    parser.add_argument("--runs", type=int, nargs="+", default=[3, 4, 5, 10, 20])
    arguments = parser.parse_args()
    if arguments.check == "rliable":
        rliable()
    elif arguments.check == "power":
        power(arguments.draws)
    else:
        check = {"coverage": coverage, "pairs": pairs, "grid": grid}[arguments.check]
        check(arguments.draws, arguments.runs)


if __name__ == "__main__":
    sys.exit(main())
