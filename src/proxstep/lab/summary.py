"""Each algorithm's figures over its seeds, as a table for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from rich import box
from rich.table import Table
from rich.text import Text

from proxstep.runs.reading import MISSING, Run, Spread, by_algorithm, entropy_field

_LAST_STEPS = 5


@dataclass(frozen=True)
class AlgorithmSummary:
    """Statistics of one algorithm, each over its runs; None where no run measured it.

    Attributes:
        algorithm: The algorithm's name.
        num_seeds: Number of distinct seeds.
        start_score: Greedy score before training (step 0).
        final_score: Greedy score at the last evaluation after step 0, of the runs that have one.
        gain: Final minus start score, run by run.
        kl_policy_initial: Last KL(policy || initial), in nats per token.
        kl_initial_policy: Last KL(initial || policy), in nats per token.
        entropy: Last entropy, in nats per token.
        reward: Mean over the last 5 steps that measured it.
        grad_norm: Mean over the last 5 steps that measured it.
        grad_response_efficiency: Mean over the last 5 steps that measured it.
        seconds_per_step: Median over the training steps.
    """

    algorithm: str
    num_seeds: int
    start_score: Spread | None
    final_score: Spread | None
    gain: Spread | None
    kl_policy_initial: Spread | None
    kl_initial_policy: Spread | None
    entropy: Spread | None
    reward: Spread | None
    grad_norm: Spread | None
    grad_response_efficiency: Spread | None
    seconds_per_step: Spread | None


def summarize(runs: Iterable[Run]) -> list[AlgorithmSummary]:
    """Return the statistics of each algorithm, in order of first appearance."""
    runs = list(runs)
    entropy = entropy_field(runs)
    groups = by_algorithm(runs)
    return [_summarize(algorithm, members, entropy) for algorithm, members in groups.items()]


def comparison_table(summaries: Sequence[AlgorithmSummary]) -> Table:
    """Return the comparison as a table for a terminal of 100 columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, caption_justify="left")
    table.caption = Text(
        "Means over seeds, gain with [min, max]; KL and entropy in nats per token."
    )
    columns = [column for column in COLUMNS if column.in_terminal]
    for column in columns:
        table.add_column(
            Text(column.header),
            justify="left" if column is columns[0] else "right",
            overflow="fold",
            vertical="bottom",
        )
    for summary in summaries:
        table.add_row(*(Text(column.cell(summary)) for column in columns))
    return table


def _summarize(algorithm: str, runs: Sequence[Run], entropy: str) -> AlgorithmSummary:
    def over_runs(statistic: Callable[[Run], float | None]) -> Spread | None:
        values = [value for run in runs if (value := statistic(run)) is not None]
        return Spread.of(values) if values else None

    def last(name: str, num_steps: int = 1) -> Spread | None:
        return over_runs(lambda run: _mean(_trained(run, name)[-num_steps:]))

    return AlgorithmSummary(
        algorithm=algorithm,
        num_seeds=len({run.seed for run in runs}),
        start_score=over_runs(_start_score),
        final_score=over_runs(_final_score),
        gain=over_runs(_gain),
        kl_policy_initial=last("kl_policy_initial"),
        kl_initial_policy=last("kl_initial_policy"),
        entropy=last(entropy),
        reward=last("reward", _LAST_STEPS),
        grad_norm=last("grad_norm", _LAST_STEPS),
        grad_response_efficiency=last("grad_response_efficiency", _LAST_STEPS),
        seconds_per_step=over_runs(_seconds_per_step),
    )


def _trained(run: Run, name: str) -> list[float]:
    """Return a field's values after step 0."""
    return [value for step, value in zip(*run.series(name), strict=True) if step > 0]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _start_score(run: Run) -> float | None:
    return dict(zip(*run.series("score"), strict=True)).get(0)


def _final_score(run: Run) -> float | None:
    scores = [record.get("score") for record in run.evaluations if record["step"] > 0]
    return scores[-1] if scores else None


def _gain(run: Run) -> float | None:
    start, final = _start_score(run), _final_score(run)
    return None if start is None or final is None else final - start


def _seconds_per_step(run: Run) -> float | None:
    seconds = _trained(run, "seconds_step")
    return median(seconds) if seconds else None


def _number(spread: Spread | None) -> str:
    """Return the mean to three significant digits.

    >>> [_number(Spread.of([value])) for value in (0.5, 123.4, 1234.0)]
    ['0.500', '123', '1.23e+03']
    """
    return f"{spread.mean:#.3g}".rstrip(".") if spread else MISSING


def _score(spread: Spread | None) -> str:
    return f"{spread.mean:.3f}" if spread else MISSING


def _signed_range(spread: Spread | None, num_seeds: int) -> str:
    if spread is None:
        return MISSING
    seeds = f" [{spread.low:.3f}, {spread.high:.3f}]" if num_seeds > 1 else ""
    return f"{spread.mean:+.3f}{seeds}"


@dataclass(frozen=True)
class Column:
    """One column of the table: its header, what the page says of it, and its cell."""

    header: str
    meaning: str
    cell: Callable[[AlgorithmSummary], str]
    in_terminal: bool = True


COLUMNS = (
    Column("algorithm", "As named in the recipe.", lambda s: s.algorithm),
    Column("seeds", "Number of distinct seeds.", lambda s: str(s.num_seeds)),
    Column("start", "Greedy validation score before training.", lambda s: _score(s.start_score)),
    Column("final", "Greedy score at the last evaluation.", lambda s: _score(s.final_score)),
    Column(
        "gain",
        "Final minus start score: mean over seeds, [min, max].",
        lambda s: _signed_range(s.gain, s.num_seeds),
    ),
    Column(
        "reward",
        "Mean reward of the sampled completions over the last 5 steps.",
        lambda s: _score(s.reward),
        in_terminal=False,
    ),
    Column(
        "KL(policy\n‖ initial)",
        "Drift on the policy's own samples at the last measurement, in nats per token.",
        lambda s: _number(s.kl_policy_initial),
    ),
    Column(
        "KL(initial\n‖ policy)",
        "Drift on the initial policy's samples at the last measurement, in nats per token.",
        lambda s: _number(s.kl_initial_policy),
    ),
    Column(
        "entropy",
        "Policy entropy at the last measurement, in nats per token.",
        lambda s: _number(s.entropy),
    ),
    Column(
        "grad\nnorm",
        "Gradient norm before clipping, mean over the last 5 steps.",
        lambda s: _number(s.grad_norm),
    ),
    Column(
        "gradient\nresponse",
        "Gradient norm per unit of advantage signal: grad norm over half the advantage range, "
        "mean over the last 5 steps.",
        lambda s: _number(s.grad_response_efficiency),
        in_terminal=False,
    ),
    Column(
        "s/step",
        "Seconds per training step, median over steps.",
        lambda s: _number(s.seconds_per_step),
    ),
)
