"""Does ISOPO's estimate of the Fisher norm rank sequences as the exact norm does?

    python experiments/fisher_estimate.py

The embedded arithmetic model writes three kinds of text, each at temperature 1, so that every
sequence is on-policy: its answers; and, after a short lesson, long texts that repeat a group of
digits (after sums) or are random digits (after differences, as a control for the length). For every
parameter and sequence the script compares the exact F_b^2 (`exact_fisher`) with the paper's
estimate from position-wise gradients (equations 3 to 6), with the sequence-level empirical Fisher
(equation 2), and with |G_b|^2, which knows nothing of the Fisher metric and is the one to beat.

It writes results.json and correlation.png. Two metrics serve as the truth: "given", over the
prefixes of the microbatch itself, and "others", over those of the other sequences of the batch of
32, which do not depend on the gradient that is measured.

Legend for shape suffixes: B sequences, T token positions of all of them, L parameters.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.exact_fisher import exact_fisher_terms, sequence_gradients
from experiments.shared import stamp

from proxstep.config.loading import load_recipe
from proxstep.isopo import Isopo
from proxstep.isopo.hooks import PositionGradients
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.plan import Memory
from proxstep.logprobs.tokens import entropy, token_log_probs
from proxstep.tasks import Example, arithmetic_task
from proxstep.training.demo_model import solution_loss
from proxstep.training.generation import sample
from proxstep.training.models import load_model, load_tokenizer, quiet_transformers
from proxstep.training.prompts import encode_prompt
from proxstep.training.rollout import Completions, response_logits
from proxstep.training.source import model_source

RECIPE = Path(__file__).parents[1] / "recipes" / "arithmetic.yaml"
FOLDER = Path(__file__).with_suffix("")
TEXTS = {
    "answers": "answers to sums",
    "random": "random digits, long",
    "repetitive": "repeated groups, long",
}
NUM_PROMPTS, NUM_GENERATIONS = 8, 4  # of a batch, which is cut into microbatches of
MICROBATCHES = (8, 32)
NUM_SAMPLED = (16, 64, 250, None)  # K of equations 3 to 6; None for all positions
NUM_DRAWS = 8  # of the K positions, over which a correlation is averaged
LONG = 20  # tokens of the long texts
KINDS = {
    "attention": tuple(f"{name}_proj.weight" for name in "qkvo"),
    "mlp": ("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    "norms": ("norm.weight",),
    "embedding": ("embed_tokens.weight",),
    "head": ("lm_head.weight",),
}
"""How the names of the parameters of each kind end."""


# -- the policies and their texts ------------------------------------------------------------------


def lesson(problem: Example, rng: random.Random) -> Example:
    """Return the problem with a long text as its solution: repetitive after a sum, else random."""
    num_digits = rng.choice((1, 2)) if "+" in str(problem.prompt) else LONG
    group = "".join(rng.choice("0123456789") for _ in range(num_digits))
    return replace(problem, solution=(group * LONG)[:LONG])


def taught(policy: nn.Module, tokenizer: Any, num_steps: int = 250) -> nn.Module:
    """Return a copy of the policy that writes the long texts."""
    pupil, rng, problems = copy.deepcopy(policy), random.Random(0), arithmetic_task(4).train
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=2e-3)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20, 4 * (num_steps - step) / num_steps)
        examples = [lesson(problems[step * 32 + i], rng) for i in range(32)]
        optimizer.zero_grad()
        solution_loss(pupil, tokenizer, examples).backward()
        optimizer.step()
    return pupil.eval()


def untied(policy: Any) -> nn.Module:
    """Give the head a parameter of its own: estimates treat the two uses of a tied one apart."""
    policy.lm_head.weight = nn.Parameter(policy.lm_head.weight.detach().clone())
    return policy.eval()


def batches(policy: nn.Module, tokenizer: Any, text: str, num: int) -> Iterator[Completions]:
    """Sample batches of 8 prompts with 4 completions each."""
    difficulty, operator = (3, "+") if text == "answers" else (4, "-" if text == "random" else "+")
    problems = arithmetic_task(difficulty).train
    last_first = (str(problem.prompt) for problem in reversed(problems))  # lessons take the first
    chosen = (prompt for prompt in last_first if operator in prompt)
    for _ in range(num):
        prompts = [encode_prompt(tokenizer, next(chosen)) for _ in range(NUM_PROMPTS)]
        repeated = [prompt for prompt in prompts for _ in range(NUM_GENERATIONS)]
        yield sample(policy, tokenizer, repeated, max_new_tokens=LONG + 1)


class Products(NamedTuple):
    """Inner products of one parameter's position-wise gradients: <g_t, G_b> and |g_t|^2."""

    cross_TB: Tensor
    square_T: Tensor


def position_products(policy: nn.Module, texts: Completions) -> dict[str, Products]:
    """Return the inner products of every parameter at every position that is not padding."""
    kept: dict[str, PositionGradients] = {}
    isopo = Isopo(policy, "reinforce")
    with isopo.microbatch(texts.sequence_ids(), torch.ones(len(texts))) as microbatch:
        reduce, layout = microbatch.reduce, microbatch.layout

        def keep(key: str, gradients: PositionGradients) -> Tensor:
            kept[key] = gradients
            return reduce(key, gradients)

        microbatch.reduce = keep
        log_prob_BT = token_log_probs(response_logits(policy, texts, 1.0), texts.token_BT[:, 1:])
        microbatch.objective(log_prob_BT, texts.response_BT[:, 1:]).backward()
    isopo.remove()
    policy.zero_grad()
    used_T, found = texts.attention_BT.flatten(), {}
    for name, gradients in kept.items():
        if isinstance(gradients, OuterGradients):
            cross_TB = gradients.cross(gradients, layout, Memory()).detach()
        else:
            cross_TB = gradients.sums(layout).cross(gradients)  # type: ignore[arg-type]
        found[name] = Products(cross_TB[used_T], gradients.squares().detach()[used_T])
    return found


# -- the estimates and the truth -------------------------------------------------------------------


class Estimate(NamedTuple):
    """One way to estimate F_b^2: equations 3 to 6 from K positions, or another quantity by name."""

    name: str
    positions: str = ""
    num_sampled: int | None = None


@dataclass(frozen=True)
class Measured:
    """All that a batch yields.

    Attributes:
        terms: Exact Fisher terms (sequence whose gradient it is, sequence whose prefixes).
        products: The position-wise gradients' inner products.
        sequence_T: Each position's sequence.
        sampled_from: By name, which positions K of them may be drawn from: "all", those whose token
            belongs to a completion, or those whose logits predict one (a position earlier).
    """

    terms: dict[str, Tensor]
    products: dict[str, Products]
    sequence_T: Tensor
    sampled_from: dict[str, Tensor]


def measure(policy: nn.Module, texts: Completions) -> Measured:
    """Return a batch's exact terms and inner products, having checked one against the other."""
    logits_of = partial(response_logits, completions=texts, temperature=1.0)
    response_BT = texts.response_BT[:, 1:]
    gradients = sequence_gradients(policy, logits_of, texts.token_BT[:, 1:], response_BT)
    terms = exact_fisher_terms(policy, logits_of, response_BT, gradients)
    products = position_products(policy, texts)
    used_BT = texts.attention_BT
    sequence_T = texts.sequence_ids()[used_BT]
    for name, gradient in gradients.items():
        zeros_BB = torch.zeros(len(texts), len(texts))
        found_B = zeros_BB.index_add(0, sequence_T, products[name].cross_TB).diagonal()
        expected_B = gradient.flatten(1).square().sum(1)
        torch.testing.assert_close(found_B, expected_B, rtol=1e-3, atol=1e-5)
    masks = {"all": used_BT, "completion": texts.response_BT}
    masks["predicting"] = texts.response_BT.roll(-1, dims=1)  # column 0 is never a completion's
    sampled_from = {positions: mask_BT[used_BT] for positions, mask_BT in masks.items()}
    return Measured(terms, {name: products[name] for name in terms}, sequence_T, sampled_from)


def truths(measured: Measured, members: range) -> dict[str, Tensor]:
    """Return the exact F_b^2 of a microbatch's sequences, (parameters, sequences), by prefixes."""
    index = list(members)
    terms_LBB = torch.stack(list(measured.terms.values()))
    own_LB = terms_LBB.diagonal(dim1=1, dim2=2)
    others_LB = (terms_LBB.sum(2) - own_LB) / (terms_LBB.shape[2] - 1)
    return {"given": terms_LBB[:, index][:, :, index].mean(2), "others": others_LB[:, index]}


def estimates(measured: Measured, members: range, seed: int) -> Iterator[tuple[Estimate, Tensor]]:
    """Yield every estimate of F_b^2, (parameters, sequences), one for each draw of positions."""
    index, generator = list(members), torch.Generator().manual_seed(seed)
    inside_T = torch.isin(measured.sequence_T, torch.tensor(index))
    products = measured.products.values()
    cross_LTB = torch.stack([p.cross_TB[inside_T][:, index] for p in products])
    square_LT = torch.stack([p.square_T[inside_T] for p in products])
    owner_TB = nn.functional.one_hot(measured.sequence_T[inside_T] - members.start, len(index))
    kernel_LBB = owner_TB.float().mT @ cross_LTB
    yield Estimate("norm"), kernel_LBB.diagonal(dim1=1, dim2=2)
    yield Estimate("constant"), torch.ones(len(cross_LTB), len(index))
    yield Estimate("equation 2"), kernel_LBB.square().mean(1)
    for positions, allowed_T in measured.sampled_from.items():
        candidate_T = allowed_T[inside_T].nonzero().squeeze(1)
        for num_sampled in NUM_SAMPLED:
            for _ in range(NUM_DRAWS if num_sampled and num_sampled < len(candidate_T) else 1):
                order = torch.randperm(len(candidate_T), generator=generator)
                sample_K = candidate_T[order[:num_sampled]]
                total_L1 = square_LT[:, sample_K].sum(1, keepdim=True)
                square_LB = cross_LTB[:, sample_K].square().sum(1) / total_L1.clamp(min=1e-30)
                yield Estimate("equations 3 to 6", positions, num_sampled), square_LB


def rank_correlation(x_LB: Tensor, y_LB: Tensor) -> Tensor:
    """Return Spearman's correlation over sequences, by parameter; 0 where one does not vary."""
    centered = []
    for value_LB in (x_LB, y_LB):
        less = (value_LB[:, :, None] > value_LB[:, None, :]).sum(2)
        same = (value_LB[:, :, None] == value_LB[:, None, :]).sum(2)
        rank_LB = less + (same - 1) / 2
        centered.append(nn.functional.normalize(rank_LB - rank_LB.mean(1, keepdim=True), dim=1))
    return (centered[0] * centered[1]).sum(1)


def log_spread(estimate_LB: Tensor, exact_LB: Tensor) -> Tensor:
    """Return the standard deviation over sequences of log(F_estimate / F_exact), by parameter.

    It is by how much the weights of `isopo` (p = -1) miss, up to a factor common to all. An
    estimate of 0 counts as the mean of the others, as the library has it.
    """
    present_LB = estimate_LB > 0
    mean_L1 = estimate_LB.sum(1, keepdim=True) / present_LB.sum(1, keepdim=True).clamp(min=1)
    filled_LB = torch.where(present_LB, estimate_LB, mean_L1).clamp(min=1e-30)
    return (filled_LB.log() - exact_LB.clamp(min=1e-30).log()).std(1) / 2


def agreement(measured: Measured, members: range, seed: int) -> dict[tuple[str, Estimate], Tensor]:
    """Return, for each truth and estimate, (3 measures, parameters), averaged over the draws.

    The measures are the rank correlation of F, that of F / |G| (what `isopo-npg` divides by; the
    constant's shows how much of it comes from the common divisor), and the log spread of F.
    """
    exact = truths(measured, members)
    found: dict[tuple[str, Estimate], list[Tensor]] = defaultdict(list)
    norm_LB = torch.ones(())
    for estimate, square_LB in estimates(measured, members, seed):
        if estimate.name == "norm":
            norm_LB = square_LB
        for truth, exact_LB in exact.items():
            ranks = rank_correlation(square_LB, exact_LB)
            relative = rank_correlation(square_LB / norm_LB, exact_LB / norm_LB)
            spread = log_spread(square_LB, exact_LB)
            found[truth, estimate].append(torch.stack([ranks, relative, spread]))
    return {key: torch.stack(values).mean(0) for key, values in found.items()}


def with_interval(value_M: Tensor) -> list[float]:
    """Return the mean over microbatches and its 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(len(value_M), (2000, len(value_M)), generator=generator)
    bounds = value_M[draw].mean(1).quantile(torch.tensor([0.025, 0.975]))
    return [round(float(v), 3) for v in (value_M.mean(), *bounds)]


def rows_of(
    text: str, num_sequences: int, parameters: list[str], found: dict[tuple, list[Tensor]]
) -> Iterator[dict[str, Any]]:
    """Yield one row for each truth and estimate, over microbatches of one text and size."""
    members = {"every": list(range(len(parameters)))}
    for kind, ends in KINDS.items():
        members[kind] = [i for i, name in enumerate(parameters) if name.endswith(ends)]
    for (truth, estimate), values in found.items():
        value_M3L = torch.stack(values)
        row = {"text": text, "num_sequences": num_sequences, "truth": truth, **estimate._asdict()}
        for i, name in enumerate(("rank", "relative_rank", "log_spread")):
            kinds = members if name == "rank" else {"every": members["every"]}
            row[name] = {k: with_interval(value_M3L[:, i, at].mean(1)) for k, at in kinds.items()}
        row["rank_by_parameter"] = [round(v, 2) for v in value_M3L[:, 0].mean(0).tolist()]
        yield row


# -- the figure and the run ------------------------------------------------------------------------

COLORS = dict(zip(KINDS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444"), strict=True))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rank correlation against K: texts from left to right, microbatches downwards."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(10.5, 6.4), layout="constrained")
        grid = figure.subplots(len(MICROBATCHES), len(TEXTS), sharex=True, sharey=True)
        for m, axes_of_row in zip(MICROBATCHES, grid, strict=True):
            for (text, title), axes in zip(TEXTS.items(), axes_of_row, strict=True):
                panel = (text, m, "given")
                here = [r for r in rows if (r["text"], r["num_sequences"], r["truth"]) == panel]
                _draw_panel(axes, here)
                axes.set_title(f"{title}; m = {m}", loc="left")
            axes_of_row[0].set_ylabel("rank correlation with exact F")
        figure.supxlabel("K positions (equations 3 to 6), or another quantity", fontsize=9)
        legend = {"loc": "outside upper center", "ncols": 7, "frameon": False, "fontsize": 8}
        figure.legend(*grid[0, 0].get_legend_handles_labels(), **legend)
        figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    axes.set_ylim(0, 1.02)
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_xticks(range(6), ["16", "64", "250", "all", "eq. 2", "|G|"])
    for place, (kind, color) in enumerate(COLORS.items()):
        points = [r["rank"][kind] for r in rows if r["positions"] == "all"]
        for name in ("equation 2", "norm"):
            points += [r["rank"][kind] for r in rows if r["name"] == name]
        x = [i + 0.07 * (place - 2) for i in range(len(points))]
        mean, low, high = zip(*points, strict=True)
        axes.vlines(x, low, high, color=color, linewidth=1)
        axes.plot(x[:-2], mean[:-2], color=color, marker=".", label=kind)
        axes.plot(x[-2:], mean[-2:], "D", color=color, markersize=4)
    for positions, dash in (("completion", ":"), ("predicting", "--")):
        line = [r["rank"]["every"][0] for r in rows if r["positions"] == positions]
        label = f"{positions} positions, every kind"
        axes.plot(range(len(line)), line, dash, color="#777777", label=label)


def main() -> None:
    """Sample, measure, compare, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--num-batches", type=int, default=3, help="batches of 32 of each text")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)
    quiet_transformers()
    source = model_source(load_recipe(RECIPE), console.print)
    started = time.process_time()
    tokenizer = load_tokenizer(source)
    policy = load_model(source, "float32", torch.device("cpu"))
    torch.manual_seed(0)
    pupil = untied(taught(policy, tokenizer))
    policies = {"answers": untied(policy), "random": pupil, "repetitive": pupil}
    rows, texts_of = [], {}
    for text, writer in policies.items():
        found: dict[int, dict[tuple, list[Tensor]]] = {m: defaultdict(list) for m in MICROBATCHES}
        for texts in batches(writer, tokenizer, text, arguments.num_batches):
            measured = measure(writer, texts)
            texts_of.setdefault(text, describe(writer, tokenizer, texts))
            for m in MICROBATCHES:
                for start in range(0, len(texts), m):
                    members = range(start, start + m)
                    for key, value in agreement(measured, members, seed=start).items():
                        found[m][key].append(value)
            console.print(f"{time.process_time() - started:.0f} s: a batch of {text}")
        parameters = list(measured.products)
        for m in MICROBATCHES:
            rows.extend(rows_of(text, m, parameters, found[m]))
    FOLDER.mkdir(exist_ok=True)
    report = {
        **stamp(),
        "torch": torch.__version__,
        "cpu_seconds": round(time.process_time() - started),
        "num_batches": arguments.num_batches,
        "texts": texts_of,
        "parameters": parameters,
    }
    head = json.dumps(report, indent=1)[:-2]
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    (FOLDER / "results.json").write_text(f'{head},\n "rows": [\n{body}\n]}}\n')
    draw(rows, FOLDER / "correlation.png")


def describe(policy: nn.Module, tokenizer: Any, texts: Completions) -> dict[str, Any]:
    """Return what a batch looks like."""
    with torch.no_grad():
        entropy_BT = entropy(response_logits(policy, texts, 1.0))
    return {
        "entropy_per_token": round(float(entropy_BT[texts.response_BT[:, 1:]].mean()), 3),
        "mean_length": float(texts.lengths().float().mean()),
        "num_positions": int(texts.attention_BT.sum()),
        "examples": texts.texts(tokenizer)[:4],
    }


if __name__ == "__main__":
    main()
