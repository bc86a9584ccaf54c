"""What single steps of a method and an optimizer are worth, measured at a fixed policy.

    python experiments/directions.py               # what is missing, then the page
    python experiments/directions.py products      # one policy alone

At each of `PLACES`, a policy that does not change, chains of batches are sampled; each method's
gradients of a chain, clipped at 1, go through each optimizer, whose step is taken back each time.
The last step of a chain, Delta, is then held against three things:

- <grad J, Delta>, the reward that it gains to first order, with grad J the mean of REINFORCE's
  gradients over the batches of all other chains;
- its KL divergence on completions that had no part in it, 1/2 mean_b sum_t <grad log pi_bt,
  Delta>^2, exact by forward-mode derivatives;
- the same on the batch that made it, which is what a KL budget sees.

What chains have in common is signal, the rest is their batches' luck: the common share of the
divergence is the mean product of two chains' directions, in the Fisher metric, over the mean
square. Intervals are by the jackknife, over chains, which grad J is made of too, and over the
prompts on which divergences are measured.

Legend for shape suffixes: C chains, P prompts that were held out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import log, nan, sqrt
from pathlib import Path
from statistics import pvariance
from typing import Any

import matplotlib
import torch
from rich.console import Console
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.direction_steps import CROSSED, PLACES, ROOT, SUMS, crossed, measured
from experiments.shared import stamp, write_between

from proxstep.lab.statistics import Estimate, share_saved
from proxstep.runs.durable import write_file
from proxstep.typing import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "findings" / "directions.md"
FIGURE = ROOT / "docs" / "figures" / "findings" / "directions.svg"
BEGIN, END = "<!-- results: python experiments/directions.py -->", "<!-- end of the results -->"


@dataclass(frozen=True)
class Row:
    """What the directions of a method and an optimizer were measured to be.

    Attributes:
        gains_CC: The reward gained by a chain's direction, with grad J from another chain.
        grams_PCC: Products of the chains' directions on a prompt's completions, half of them; the
            diagonal is KL divergence, in nats a completion.
        own_C: KL divergence on the batch that made a direction.
    """

    gains_CC: Tensor
    grams_PCC: Tensor
    own_C: Tensor

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Row:
        """Return a row of the results."""
        names = ("gains", "grams", "own")
        return cls(*(torch.tensor(row[name], dtype=torch.float64) for name in names))

    def without(self, chain: int | None = None, prompt: int | None = None) -> Row:
        """Return the same without a chain, or without a prompt."""
        c, p = (
            [i for i in range(size) if i != left_out]
            for size, left_out in ((len(self.own_C), chain), (len(self.grams_PCC), prompt))
        )
        return Row(self.gains_CC[c][:, c], self.grams_PCC[p][:, c][:, :, c], self.own_C[c])

    @property
    def kl(self) -> float:
        """Mean KL divergence elsewhere, in nats a completion."""
        return float(self.grams_PCC.mean(0).diagonal().mean())

    @property
    def efficiency(self) -> float:
        """Reward gained by a step of 1 nat a completion, to first order."""
        return _off_diagonal(self.gains_CC) / self.kl**0.5

    @property
    def common(self) -> float:
        """The share of the divergence that chains have in common."""
        return _off_diagonal(self.grams_PCC.mean(0)) / self.kl

    @property
    def own(self) -> float:
        """KL divergence on its own batch over that elsewhere."""
        return float(self.own_C.mean()) / self.kl


def _off_diagonal(matrix_CC: Tensor) -> float:
    number = len(matrix_CC)
    return float(matrix_CC.sum() - matrix_CC.diagonal().sum()) / (number * (number - 1))


def jackknifed(statistic: Callable[..., float], *rows: Row) -> Estimate:
    """Return a statistic of rows with its 95 % interval, over chains and over prompts."""
    chains, prompts = len(rows[0].own_C), len(rows[0].grams_PCC)
    by_chain = [statistic(*(row.without(chain=c) for row in rows)) for c in range(chains)]
    by_prompt = [statistic(*(row.without(prompt=p) for row in rows)) for p in range(prompts)]
    error = sqrt(sum((len(v) - 1) * pvariance(v) for v in (by_chain, by_prompt)))
    half = float(t.ppf(0.975, chains - 1)) * error
    value = statistic(*rows)
    return Estimate(value, value - half, value + half, error)


def _twice_log_ratio(row: Row, other: Row) -> float:
    ratio = row.efficiency / other.efficiency
    return 2 * log(ratio) if ratio > 0 else nan


def lines(rows: Mapping[str, Any], names: Mapping[str, str], plain: str) -> Iterator[str]:
    """Yield a table of directions.

    Args:
        rows: The directions.
        names: Those to show, with their headings.
        plain: The one that the others are compared with.
    """
    yield (
        f"| | reward of a step of 1 nat | less {names[plain]} | less KL for as much reward "
        "| the chains' common part of the KL | KL on its own batch, over that elsewhere |"
    )
    yield "|---|---|---|---|---|---|"
    other = Row.of(rows[plain])
    for name, heading in names.items():
        own = Row.of(rows[name])
        cells = [heading, jackknifed(lambda row: row.efficiency, own).text(), "", ""]
        if name != plain:
            more = jackknifed(lambda row, other: row.efficiency - other.efficiency, own, other)
            saved = share_saved(jackknifed(_twice_log_ratio, own, other))
            cells[2:] = [more.text("+"), saved.percent()]
        cells += [jackknifed(lambda row: row.common, own).text()]
        cells += [jackknifed(lambda row: row.own, own).text()]
        yield f"| {' | '.join(cells)} |"


def tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was run, and the tables of all policies."""
    made = {key: place for key, place in PLACES.items() if key in results}
    for machine, date in sorted({(results[key]["machine"], results[key]["date"]) for key in made}):
        yield f"{machine}; {date}."
    for key, place in made.items():
        names = {
            f"{method}, {name}": f"{method}, {name}"
            for name, method in itertools.product(place.optimizers, place.methods)
        }
        yield f"{place.title}, batch {place.length} of each of {place.chains} chains:"
        yield "\n".join(lines(results[key]["rows"], names, "reinforce, adamw"))
    for key, place in made.items():
        if "crossed" in results[key]:
            names = {
                f"{first}, {second}": f"{first} over the root of {second}'s squares"
                for first, second in itertools.product(CROSSED, repeat=2)
            }
            yield f"{place.title}, AdamW's two averages apart:"
            yield "\n".join(lines(results[key]["crossed"], names, "reinforce, reinforce"))


def plot(results: Mapping[str, Any]) -> None:
    """Draw what a step's direction is worth, by optimizer and method."""
    made = [(results[key]["rows"], place) for key, place in PLACES.items() if key in results]
    widths = [len(place.optimizers) for _, place in made]
    figure, panels = plt.subplots(
        *(1, len(made)), figsize=(11, 3.6), layout="constrained", width_ratios=widths, squeeze=False
    )
    looks = dict(zip(SUMS.methods, ("#6b7280", "#0072b2", "#d55e00"), strict=True))
    for panel, (rows, place) in zip(panels[0], made, strict=True):
        for number, method in enumerate(place.methods):
            found = [
                jackknifed(lambda row: row.efficiency, Row.of(rows[f"{method}, {name}"]))
                for name in place.optimizers
            ]
            at = [column + 0.2 * (number - 1) for column in range(len(found))]
            errors = [[m.value - m.low for m in found], [m.high - m.value for m in found]]
            panel.errorbar(
                at, [m.value for m in found], errors, fmt="o", color=looks[method], label=method
            )
        labels = [name.replace(" with", "\nwith") for name in place.optimizers]
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_title(place.short, fontsize=10)
        panel.set(xlim=(-0.6, len(labels) - 0.4), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set(ylabel="reward of a step of 1 nat a completion")
    panels[0, 0].legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})


def read() -> dict[str, Any]:
    """Return what was measured so far, by the policy."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main() -> None:
    """Measure what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", nargs="*", help=f"of {', '.join(PLACES)}; all of them if none")
    options = parser.parse_args()
    if unknown := set(options.place) - set(PLACES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(PLACES)}")
    torch.set_num_threads(1)
    for key in options.place or PLACES:
        place = PLACES[key]
        found = read().get(key, {})
        if found.get("settings") != place.settings():
            found = {}
        parts = {"rows": measured} | ({"crossed": crossed} if place.crossed else {})
        for part, measure in parts.items():
            if part not in found:
                start = time.process_time()
                with tempfile.TemporaryDirectory() as name:
                    found[part] = measure(place, Path(name))
                found |= {**stamp(), "settings": place.settings()}
                found[f"seconds_{part}"] = round(time.process_time() - start, 1)
                write_file(RESULTS, (json.dumps(read() | {key: found}) + "\n").encode())
    results = read()
    text = "\n\n".join(tables(results))
    write_between(PAGE, BEGIN, END, text)
    with matplotlib.rc_context({"svg.hashsalt": "proxstep"}):
        plot(results)
    Console().out(text, highlight=False)


if __name__ == "__main__":
    main()
