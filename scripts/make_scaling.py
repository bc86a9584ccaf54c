"""Write the tables of docs/scaling.md, from the formulas beside this file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts.scaling_formulas import (  # noqa: E402
    Model,
    Work,
    added,
    carried,
    chunked_head,
    num_parameters,
    passing_bytes,
    plain_flops,
    uses,
    workspace,
)
from scripts.scaling_network import (  # noqa: E402
    exact_natural,
    fold_bytes,
    fsdp_bytes,
    gathered,
    largest_share,
    merged,
    num_gathers,
)

from proxstep.isopo.plan import FLOPS_PER_BYTE, Needs  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
BASELINES = ROOT / "benchmarks" / "baselines"
GB = 1e9

MODELS = (
    Model("Qwen3-0.6B", 1024, 28, 16, 8, 128, 3072, 151_936, True, True),
    Model("Qwen3-1.7B", 2048, 28, 16, 8, 128, 6144, 151_936, True, True),
    Model("Qwen3-8B", 4096, 36, 32, 8, 128, 12_288, 151_936, False, True),
    Model("Llama-3-70B", 8192, 80, 64, 8, 128, 28_672, 128_256, False, False),
)
SOURCES = {
    "Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    "Qwen3-1.7B": "Qwen/Qwen3-1.7B",
    "Qwen3-8B": "Qwen/Qwen3-8B",
    "Llama-3-70B": "meta-llama/Meta-Llama-3-70B",
}
"""Repositories whose config.json has the sizes."""

RANKS = (8, 64, 256, 1024)
SHORT = Work(num_sequences=8, length=1024, scored=768)
LONG = Work(num_sequences=2, length=8192, scored=7168)
DEFAULT = replace(SHORT, num_samples=32)
"""With today's number of positions; the others have the paper's 250."""
RULES = {
    "isopo": Needs(fisher=True),
    "isopo-npg, isopo-figure4": Needs(fisher=True, norm=True),
    "isopo-euclidean": Needs(norm=True),
    "isopo-natural": Needs(ntk=True),
}
ISOPO = ("sample_sq", "fisher_sq")
"""The moments whose trailing means `isopo` keeps; see `isometric_moments` and `measure_sample`."""

# One H100 SXM of 80 GB and its share of a DGX H100's network (NVIDIA's data sheets).
NARROW, WIDE, TF32 = 989e12, 67e12, 494e12  # FLOP/s: bfloat16, float32, float32 as TF32
HBM = 3.35e12  # bytes/s
NODE, NVLINK = 8, 450e9  # GPUs, and bytes/s each way between them
ADAPTER = 50e9  # bytes/s each way: 400 Gb/s for every GPU
HELD = 16  # bytes per parameter of weights, gradients and Adam's two moments in float32


def slower(model: Model, work: Work, needs: Needs, wide: float = WIDE) -> float:
    """Return a rule's additional time at the peaks of an H100, over the plain arithmetic's."""
    cost = added(model, work, needs)
    seconds = cost.narrow / NARROW + cost.wide / wide + cost.moved / HBM
    return seconds * NARROW / plain_flops(model, work)


def models_table() -> list[str]:
    """Return the models' sizes."""
    rows = [
        [
            f"[{m.name}](https://huggingface.co/{SOURCES[m.name]}/blob/main/config.json)",
            m.hidden_size,
            m.num_hidden_layers,
            f"{m.num_attention_heads} / {m.num_key_value_heads}",
            m.intermediate_size,
            m.vocab_size,
            "yes" if m.tie_word_embeddings else "no",
            f"{num_parameters(m) / GB:.2f} G",
        ]
        for m in MODELS
    ]
    head = "model, hidden_size, layers, heads / KV, intermediate_size, vocab_size, tied, parameters"
    return _table(head.split(", "), rows)


def arithmetic_table() -> list[str]:
    """Return each rule's additional arithmetic, and time at peak, over the plain step's."""
    rows = []
    for model, (name, needs) in product(MODELS, RULES.items()):
        if name != "isopo-euclidean":  # the control
            cells = []
            for work in (SHORT, LONG):
                flops = added(model, work, needs).flops / plain_flops(model, work)
                cells += [_percent(flops), _percent(slower(model, work, needs))]
            rows.append([model.name, name, *cells])
    head = ["model", "rule", "8 x 1,024: arithmetic", "time", "2 x 8,192: arithmetic", "time"]
    return _table(head, rows)


def settings_table() -> list[str]:
    """Return what settings make of the additional time, where it is not small."""
    cases = (
        (0, SHORT, "isopo"),
        (0, SHORT, "isopo-npg, isopo-figure4"),
        (0, SHORT, "isopo-natural"),
        (2, LONG, "isopo-npg, isopo-figure4"),
        (3, LONG, "isopo-npg, isopo-figure4"),
    )
    rows = []
    for place, work, rule in cases:
        model, needs = MODELS[place], RULES[rule]
        more, fewer = replace(work, budget=2**31), replace(work, num_samples=64)
        cells = [
            slower(model, work, needs),
            slower(model, work, needs, TF32),
            slower(model, fewer, needs) if needs.fisher else None,
            slower(model, more, needs),
            slower(model, more, needs, TF32),
        ]
        sizes = f"{work.num_sequences} x {work.length:,}"
        shown = ["" if cell is None else _percent(cell) for cell in cells]
        rows.append([model.name, sizes, rule.replace("isopo-npg, ", ""), *shown])
    head = ["model", "B x L", "rule", "as it is", "TF32", "K = 64", "memory_mib: 2048", "and TF32"]
    return _table(head, rows)


def memory_table() -> list[str]:
    """Return what is added on one GPU, whatever the number of GPUs, in GB."""
    rows = []
    for model in MODELS:
        head = uses(model)[0]
        figure4, natural = RULES["isopo-npg, isopo-figure4"], RULES["isopo-natural"]
        rows.append(
            [
                model.name,
                *(_gb(workspace(model, work, figure4)) for work in (SHORT, LONG)),
                *(_gb(workspace(model, work, natural)) for work in (SHORT, LONG)),
                *(_gb(passing_bytes(head, work, figure4)) for work in (SHORT, LONG)),
                _gb(chunked_head(model, SHORT)),
                _gb(carried(model, SHORT)),
                _gb(carried(model, DEFAULT)),
            ]
        )
    titles = ["layers: figure4, 8 x 1,024", "2 x 8,192", "natural, 8 x 1,024", "2 x 8,192"]
    titles += ["full head, 8 x 1,024", "2 x 8,192", "chunked head", "`previous_step`", "K = 32"]
    return _table(["model", *titles], rows)


def network_table() -> list[str]:
    """Return what crosses the network, plain and with the options that exchange something."""
    rows = []
    for model in MODELS:
        if model.name == "Qwen3-1.7B":  # between its neighbors
            continue
        entry = fold_bytes(model, len(ISOPO))
        for ranks in RANKS:
            share = largest_share(SHORT.num_samples, ranks)
            plain = fsdp_bytes(model, ranks)
            own = gathered(model, SHORT, ranks, share)
            state = HELD * num_parameters(model) / ranks
            rows.append(
                [
                    model.name,
                    f"{ranks:,}",
                    _gb(state) + ("" if state < 72 * GB else " (too much)"),
                    _gb(plain),
                    _percent(_network_seconds(plain, ranks) * NARROW / plain_flops(model, SHORT)),
                    f"{entry * ranks / 1e6:.1f}",
                    f"{_gb(own)} ({_percent(own / plain)})",
                    f"{share} ({share * ranks:,})",
                    _gb(merged(model, SHORT, ranks, share)),
                    _gb(merged(model, DEFAULT, ranks, largest_share(DEFAULT.num_samples, ranks))),
                ]
            )
    head = ["model", "GPUs", "state", "FSDP2", "its time", "`fold`, MB", "`ranks`"]
    head += ["rows (all)", "`previous_step`", "K = 32"]
    return _table(head, rows)


def exact_table() -> list[str]:
    """Return what the natural rule would cost if it mixed all ranks' sequences."""
    rows = []
    model = MODELS[-1]
    for ranks in RANKS:
        cells: list[Any] = [f"{ranks:,}", f"{ranks * SHORT.num_sequences:,}"]
        for work in (SHORT, LONG):
            sent, flops = exact_natural(model, work, ranks)
            plain = plain_flops(model, work)
            cells += [
                f"{sent / fsdp_bytes(model, ranks):.1f}",
                f"{flops / plain:.2f}",
                f"{flops / WIDE * NARROW / plain:.1f}",
            ]
        rows.append(cells)
    head = ["GPUs", "sequences at B = 8"]
    head += ["8 x 1,024: bytes", "arithmetic", "time", "2 x 8,192: bytes", "arithmetic", "time"]
    return _table(head, rows)


def measured_table() -> list[str]:
    """Return the formulas beside what was measured on a CPU."""
    files = {
        (512, 128): "overhead-cpu",
        (512, 256): "overhead-cpu",
        (1024, 128): "overhead-cpu-1024-128",
        (1024, 256): "overhead-cpu-1024-256",
    }
    rules = {"isopo-npg": RULES["isopo-npg, isopo-figure4"]}
    rules |= {name: RULES[name] for name in ("isopo", "isopo-euclidean", "isopo-natural")}
    rows = []
    for name in ("isopo", "isopo-npg", "isopo-euclidean", "isopo-natural"):
        cells = []
        for (hidden, length), file in files.items():
            report = json.loads((BASELINES / f"{file}.json").read_text(encoding="utf-8"))
            ratio = _measured(report["rows"], name, hidden, length)
            model, work = _benchmarked(report["settings"], hidden, length)
            cost = added(model, work, rules[name])
            plain = plain_flops(model, work)
            moved = FLOPS_PER_BYTE["cpu"] * cost.moved
            found = (1 + cost.flops / plain, 1 + (cost.flops + moved) / plain, ratio)
            cells.append(" / ".join(f"{value:.3f}" for value in found))
        rows.append([name, *cells])
    return _table(["", *(f"d = {hidden}, L = {length}" for hidden, length in files)], rows)


def _measured(rows: Iterable[dict[str, Any]], name: str, hidden: int, length: int) -> float:
    wanted = (name, hidden, length)
    return next(
        row["ratio"]
        for row in rows
        if (row["row"], row["hidden_size"], row["length"]) == wanted
        and row["num_samples"] in (64, None)
    )


def _benchmarked(settings: dict[str, Any], hidden: int, length: int) -> tuple[Model, Work]:
    """Return the benchmark's model and microbatch; see `benchmarks.workload`."""
    heads, halves = hidden // 64, length // 2
    sizes = (hidden, settings["num_layers"], heads, heads // 2, 64, 3 * hidden)
    model = Model("", *sizes, settings["vocab_size"], True, True)
    work = Work(settings["num_sequences"], length, halves, num_samples=64, itemsize=4)
    return model, replace(work, device="cpu", attention=1.0, checkpointing=False)


def facts() -> list[str]:
    """Return the small figures that the text needs."""
    biggest = MODELS[-1]
    entries = len(ISOPO) * len(uses(biggest))
    times = ", ".join(f"{plain_flops(m, SHORT) / NARROW:.2f} s ({m.name})" for m in MODELS)
    return [
        f"At peak the plain microbatch of 8 x 1,024 takes {times}.",
        f"At 70B `fold` gathers {entries:,} entries, "
        f"{fold_bytes(biggest, len(ISOPO)) / 1e3:.0f} kB, from every rank; "
        f'`overlap_source="ranks"` runs {num_gathers(biggest):,} collectives in each backward.',
    ]


def _network_seconds(received: float, ranks: int) -> float:
    """Return the time on NVLink in one node; else on the adapters, which share what comes in."""
    if ranks <= NODE:
        return received / NVLINK
    outside = received * ranks / (ranks - 1) * (ranks - NODE) / ranks
    return outside / (NODE * ADAPTER)


def _gb(value: float) -> str:
    return f"{value / GB:.2f}" if value < 10 * GB else f"{value / GB:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"


def _table(head: list[str], rows: Iterable[Iterable[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


TABLES: dict[str, Callable[[], list[str]]] = {
    "models": models_table,
    "arithmetic": arithmetic_table,
    "settings": settings_table,
    "memory": memory_table,
    "network": network_table,
    "facts": facts,
    "exact": exact_table,
    "measured": measured_table,
}


def scaling_page(text: str) -> str:
    """Return the page with what is between its markers made anew.

    Raises:
        KeyError: If a marker names no table.
    """

    def made(match: re.Match[str]) -> str:
        return "\n".join([match[1], "", *TABLES[match[2]](), "", match[3]])

    pattern = r"(<!-- made: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def main() -> None:
    """Write the page."""
    PAGE.write_text(scaling_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
