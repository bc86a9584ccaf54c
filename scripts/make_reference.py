"""Write the reference pages of docs/ from the code, so that the two cannot disagree."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import LlamaConfig, Qwen3Config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from scripts.algorithm_pages import filled, overview, pages  # noqa: E402

from proxstep.algorithms import ALGORITHMS  # noqa: E402
from proxstep.config.explain import describe_keys  # noqa: E402
from proxstep.config.loading import load_recipe  # noqa: E402
from proxstep.config.names import KEYS_FILE  # noqa: E402
from proxstep.runs.schema import FIELDS, PREFIXES  # noqa: E402
from proxstep.training.memory import MemoryEstimate, config_of, estimate_memory  # noqa: E402

DOCS = ROOT / "docs"
RECIPES = sorted((DOCS.parent / "recipes").glob("*.yaml"))

_QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
CONFIGS = {
    "Qwen/Qwen3-0.6B": Qwen3Config(hidden_size=1024, intermediate_size=3072, **_QWEN3),
    "Qwen/Qwen3-1.7B": Qwen3Config(hidden_size=2048, intermediate_size=6144, **_QWEN3),
    "smollm2": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
}
"""The recipes' models, as their config.json have them."""


def recipe_page() -> str:
    """Return the page of a recipe's keys."""
    lines = [
        "# Keys of a recipe",
        "",
        "Made by `make reference` from the code; `proxstep train --keys` prints the same list.",
        "",
        "`algorithm` stands for `objective.name` and `geometry.rule`. `per_algorithm` maps",
        "algorithms to parts of a recipe that hold for them alone. Only",
        "[`proxstep compare`](compare.md#arms) reads the section `compare`.",
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    for key, kind, default, text in describe_keys():
        cells = [f"`{key}`", kind, f"`{default}`", text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def keys_file() -> str:
    """Return the keys, a line each, as the command line reads them before it imports torch."""
    return "[\n" + ",\n".join(json.dumps(row) for row in describe_keys()) + "\n]\n"


def metrics_page() -> str:
    """Return the page of the metrics."""
    lines = [
        "# Fields of metrics.jsonl",
        "",
        "Made by `make reference` from `proxstep/runs/schema.py`. Each step is one line, a JSON",
        "object. Every field is in every line, null where it was not measured. The file only",
        "grows, except that resuming a run drops the steps after its checkpoint and repeats them.",
        "The page of each [algorithm](algorithms.md) lists its own `objective/` and `geometry/`",
        "fields.",
        "",
        "| field | |",
        "|---|---|",
        *(f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in FIELDS.items()),
        "",
        "Fields whose names depend on the run:",
        "",
        "| prefix | |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in PREFIXES.items()),
    ]
    return "\n".join(lines) + "\n"


def algorithms_page() -> str:
    """Return docs/algorithms.md with its table made anew from the declarations."""
    text = (DOCS / "algorithms.md").read_text(encoding="utf-8")
    return filled(text, "overview", overview())


def losses_page() -> str:
    """Return docs/reference/algorithms.md with its list of losses made anew."""
    found = [inspect.unwrap(getattr(a.loss, "func", a.loss)) for a in ALGORITHMS.values()]
    lines = [
        f"::: {loss.__module__}.{loss.__name__}\n    options: {{heading_level: 3}}"
        for loss in dict.fromkeys(found)
    ]
    text = (DOCS / "reference" / "algorithms.md").read_text(encoding="utf-8")
    return filled(text, "losses", "\n".join(lines))


def recipe_estimates() -> Iterator[tuple[str, str, float, str, MemoryEstimate]]:
    """Yield each recipe and algorithm of its head: file, card, its bytes, algorithm, estimate."""
    for path in RECIPES:
        head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
        assert head, path
        card = re.search(r"Runs on (.*? with (\d+) GB)", head.group())
        assert card, f"{path}: its head does not say what it runs on"
        named = ",".join(re.findall(r"--algorithms? (\S+)", head.group())).split(",")
        names = dict.fromkeys([load_recipe(path, []).algorithm, *filter(None, named)])
        for name in names:
            recipe = load_recipe(path, [("algorithm", name)])
            config = CONFIGS.get(recipe.model.name) or config_of(recipe)
            estimate = estimate_memory(recipe, config)
            yield path.name, card[1], float(card[2]) * 1e9, name, estimate


PARTS = ("weights", "gradients", "optimizer", "initial", "activations", "logits", "rollout", "peak")


def runs_page() -> str:
    """Return docs/runs.md with the table of memory made anew."""
    rows = {}
    for file, card, _, name, estimate in recipe_estimates():
        before = rows.get(file)
        if before is None or estimate.peak > before[0]:
            sizes = [f"{getattr(estimate, part) / 1e9:.1f}" for part in PARTS]
            rows[file] = (estimate.peak, [f"`{file}`", card, f"`{name}`", *sizes])
    head = ["recipe", "runs on", "algorithm that takes most", *PARTS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cells) + " |" for _, cells in rows.values()]
    text = (DOCS / "runs.md").read_text(encoding="utf-8")
    before, rest = text.split(MEMORY)
    return before + MEMORY + "\n".join(["", *lines, ""]) + END_MEMORY + rest.split(END_MEMORY)[1]


MEMORY, END_MEMORY = "<!-- memory: make reference -->", "<!-- end of the memory -->"


def reference() -> Iterator[tuple[str, str]]:
    """Yield (path under docs, text) of every page that is made here, or of which a part is."""
    yield "recipe.md", recipe_page()
    yield "metrics.md", metrics_page()
    yield "algorithms.md", algorithms_page()
    yield "runs.md", runs_page()
    yield "reference/algorithms.md", losses_page()
    yield from pages()


def main() -> None:
    """Write every page, and the keys."""
    KEYS_FILE.write_text(keys_file(), encoding="utf-8")
    for name, text in reference():
        path = DOCS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
