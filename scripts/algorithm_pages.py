"""The generated parts of docs/algorithms: what declarations, code and committed rows say.

A page per algorithm: its prose is written in the page, outside the two marked blocks. An algorithm
that has no page yet gets one with the blocks and a place for the prose.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from experiments.objectives import ROWS, markdown_of
from scripts.algorithm_figures import objective_figure, rule_figure
from scripts.algorithm_metrics import geometry_metrics, objective_metrics

from proxstep.algorithms import ADVANTAGES, ALGORITHMS, Algorithm
from proxstep.config.explain import describe_keys
from proxstep.config.geometry import GeometrySection
from proxstep.config.loading import resolve
from proxstep.config.unread import GEOMETRY
from proxstep.engines.verl.seams import config_name, find_obstacle, loss_mode
from proxstep.isopo import (
    PRESETS,
    IntraProjectingRule,
    IsometricRule,
    NaturalRule,
    ProjectingRule,
    Rule,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RULES = {name: rule for name, rule in PRESETS.items() if name != "reinforce"}
ABOUT_RULES = {
    "isopo": "Each sequence's gradient at equal length in the Fisher metric (arXiv 2512.23353).",
    "isopo-npg": "Each sequence at the multiple nearest to its natural gradient (arXiv "
    "2512.23353).",
    "isopo-figure4": "The powers of ISOPO's validation curve (arXiv 2512.23353).",
    "isopo-euclidean": "ISOPO's control: each sequence's gradient at equal Euclidean length (arXiv "
    "2512.23353).",
    "isopo-natural": "A microbatch's sequences mixed through the inverse kernel (arXiv "
    "2512.23353).",
    "proma": "The accumulated gradient without its part in the span of the next microbatch (arXiv "
    "2601.10498).",
    "proma-intra": "A microbatch's gradient without its part between a layer's main directions "
    "(arXiv 2601.10498).",
}
BLOCKS = ("equation", "reference")
SKELETON = """\
# {name}

{about}

<!-- equation: make reference -->
<!-- end of the equation -->

## When to take it, and when not

Not written yet.

<!-- reference: make reference -->
<!-- end of the reference -->
"""


def pages() -> Iterator[tuple[str, str]]:
    """Yield (path under docs, text) of every algorithm's page and picture."""
    for name, algorithm in ALGORITHMS.items():
        figure = objective_figure(algorithm)
        yield f"figures/algorithms/{name}.svg", figure
        yield f"algorithms/{name}.md", objective_page(algorithm)
    for name, rule in RULES.items():
        figure = rule_figure(name, rule)
        if figure is not None:
            yield f"figures/algorithms/{name}.svg", figure
        yield f"algorithms/{name}.md", rule_page(name, rule)


def overview() -> str:
    """Return the rows of docs/algorithms.md's table of all algorithms."""
    lines = ["| algorithm | level | what it is | page |", "|---|---|---|---|"]
    for algorithm in ALGORITHMS.values():
        lines.append(_overview_row(algorithm.name, algorithm.level, algorithm.about))
    for name in RULES:
        lines.append(_overview_row(name, "rule", ABOUT_RULES[name]))
    return "\n".join(lines)


def _overview_row(name: str, level: str, about: str) -> str:
    return f"| `{name}` | {level} | {about} | [{name}](algorithms/{name}.md) |"


def objective_page(algorithm: Algorithm) -> str:
    """Return the page of an objective with its blocks made anew."""
    text = _page(algorithm.name, algorithm.about)
    text = filled(text, "equation", _equation(algorithm))
    parts = [_keys(algorithm), _metrics(objective_metrics(algorithm), "objective/")]
    parts += [_measured(algorithm.name, _CAPTION), _engines(algorithm)]
    return filled(text, "reference", "\n\n".join(parts))


def rule_page(name: str, rule: Rule) -> str:
    """Return the page of a rule with its blocks made anew."""
    text = filled(_page(name, ABOUT_RULES[name]), "equation", _rule_equation(rule))
    parts = [_rule_keys(name, rule), _metrics(geometry_metrics(rule), "geometry/")]
    caption = _NATURAL_CAPTION if isinstance(rule, NaturalRule) else _RULE_CAPTION
    parts += [_measured(name, caption), _rule_engines(name, rule)]
    return filled(text, "reference", "\n\n".join(parts))


def _page(name: str, about: str) -> str:
    path = DOCS / "algorithms" / f"{name}.md"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return SKELETON.format(name=name, about=about)


def filled(text: str, block: str, content: str) -> str:
    """Return a page with one of its blocks replaced; an error where it has none."""
    begin, end = f"<!-- {block}: make reference -->", f"<!-- end of the {block} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def _doc(function: Callable[..., Any] | type) -> str:
    return inspect.getdoc(getattr(function, "func", function)) or ""


def formula(doc: str, start: str) -> list[str]:
    """Return a docstring's lines from the one that begins so to the next empty one."""
    found = re.search(rf"^{re.escape(start)}.*(?:\n\S.*)*", doc, re.MULTILINE)
    return found.group().split("\n") if found else []


def said(doc: str, what: str) -> str:
    """Return what a docstring says after "Source:" or "Differs:", in one line; else ""."""
    pattern = rf"^{what}: (.*?)(?=^Source:|^Differs:|^Attributes:|^$|\Z)"
    found = re.search(pattern, doc, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def _linked(path: Path) -> str:
    place = path.relative_to(ROOT)
    return f"[`{place}`](../../{place})"


def _code(function: Callable[..., Any] | type) -> str:
    found = getattr(function, "func", function)
    return f"`{found.__name__}` in {_linked(Path(sys.modules[found.__module__].__file__ or ''))}"


def _equation(algorithm: Algorithm) -> str:
    loss, advantage = _doc(algorithm.loss), ADVANTAGES[algorithm.advantage]
    lines = [*formula(loss, "L = "), *formula(_doc(advantage), "A_b = ")]
    rows = {
        "Source": algorithm.source or said(loss, "Source"),
        "Differs": said(loss, "Differs"),
        "Level": f"{algorithm.level}. {_LEVELS[algorithm.level]}",
        "Advantage": f"`{algorithm.advantage}`. {said(_doc(advantage), 'Source')}",
        "Aggregation": f"`{algorithm.default_loss_agg_mode}`.",
        "Code": f"{_code(algorithm.loss)}; {_code(advantage)}.",
    }
    return _listed(lines, rows)


_LEVELS = {
    "sequence": "One coefficient per sequence, so a rule of ISOPO can act on it.",
    "token": "The tokens of a sequence have different coefficients, so rules of ISOPO refuse it.",
}


def _rule_equation(rule: Rule) -> str:
    kind = type(rule)
    doc, module = _doc(kind), inspect.getdoc(inspect.getmodule(kind)) or ""
    lines = formula(doc, "weight_b = ") or formula(doc, "weight = ")
    lines = lines or re.findall(r"^ {4}(M <- .*)", f"{doc}\n{module}", re.MULTILINE)[:1]
    values = [f"`{f.name}` {getattr(rule, f.name)}" for f in dataclasses.fields(rule)]
    rows = {
        "Source": said(doc, "Source"),
        "Differs": said(doc, "Differs"),
        "Values": f"{', '.join(values)}.",
        "Code": f"{_code(kind)}.",
    }
    return _listed(lines, rows)


def _listed(lines: list[str], rows: Mapping[str, str]) -> str:
    """Return a formula, and below it what is said of it."""
    formula = "\n".join(f"    {line}" for line in lines)
    return f"{formula}\n\n" + "\n".join(f"- **{k}**: {text}" for k, text in rows.items() if text)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in escaped)])


_HEAD = ["key", "type", "default", "limits", "what it is"]
_SIGNS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}


def _keys(algorithm: Algorithm) -> str:
    rows = []
    for key, kind, default, text in describe_keys():
        name = key.removeprefix("objective.").removesuffix(f" ({algorithm.name})")
        if key.endswith(f" ({algorithm.name})") and name in algorithm.keys:
            limits = [_SIGNS[k].format(v) for k, v in algorithm.keys[name].bounds.items()]
            rows.append([f"`objective.{name}`", kind, f"`{default}`", ", ".join(limits), text])
    table = _table(_HEAD, rows) if rows else "None of its own."
    return (
        f"## Keys\n\n{table}\n\nEvery objective also has `objective.advantage` and "
        "`objective.loss_agg_mode`: [their values](../advantages-and-kl.md)."
    )


_EVERYWHERE = ("other_parameters", "memory_mib", "diagnose_every")


def _rule_keys(name: str, rule: Rule) -> str:
    section = GeometrySection(rule=name)
    own = {field.name for field in dataclasses.fields(rule)}
    rows = []
    for key, kind, default, text in describe_keys():
        short = key.removeprefix("geometry.")
        if not key.startswith("geometry.") or short == "rule":
            continue
        read = GEOMETRY[short][0](section) if short in GEOMETRY else short in own | {*_EVERYWHERE}
        if read:
            shown = getattr(rule, short) if short in own else default
            limits = _limits(GeometrySection.model_fields[short])
            rows.append([f"`{key}`", kind.removesuffix(" | null"), f"`{shown}`", limits, text])
    return "## Keys\n\n" + _table(_HEAD, rows)


def _limits(field: Any) -> str:
    parts = list(field.metadata)
    for option in get_args(field.annotation):  # such as "a positive number, or null"
        parts += getattr(option, "__metadata__", ())
    parts += [inner for part in parts for inner in getattr(part, "metadata", ())]
    kinds = {type(part).__name__.lower(): part for part in parts}
    return ", ".join(sign.format(getattr(kinds[k], k)) for k, sign in _SIGNS.items() if k in kinds)


def _metrics(found: Mapping[str, tuple[str, str]], prefix: str) -> str:
    head = "## Metrics\n\n"
    if not found:
        return f"{head}None of its own."
    rows = [[f"`{prefix}{name}`", when, text] for name, (when, text) in found.items()]
    return head + _table(["field", "written", "what it is"], rows)


_CAPTION = (
    "Left: the gradient -dL / d log pi of a completion of one token, by its ratio to the old "
    "policy (which gave it 0.3), for an advantage of 1 (solid) and of -1 (dashed) in a group of "
    "two; REINFORCE's in gray."
)
_RULE_CAPTION = (
    "Left: the factor on a sequence's gradient, by the gradient's length, both relative to an "
    "average sequence."
)
_NATURAL_CAPTION = (
    "The factor on the coefficients along one direction of the kernel, by its eigenvalue, both "
    "relative to an average direction."
)
_RUNS = " Right: where the five runs of the table below ended, among all runs of that experiment."


@cache
def _rows() -> tuple[dict[str, Any], list[str]]:
    report = json.loads(ROWS.read_text(encoding="utf-8"))
    return report, markdown_of(report["rows"]).split("\n")


def _measured(name: str, caption: str) -> str:
    report, lines = _rows()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    own = [row for row in rows if name in (row.partition(",")[0], *row.split("+"))]
    parts = ["## Measured"]
    told = caption + _RUNS if own else caption.removeprefix("Left: ")
    projects = isinstance(RULES.get(name), ProjectingRule | IntraProjectingRule)
    told = _RUNS.removeprefix(" Right: ") if projects else told
    told = f"{told[0].upper()}{told[1:]}"
    if own or not projects:
        parts += [f"![{name}](../figures/algorithms/{name}.svg)", told]
    if not own:
        parts.append(
            "No runs in [the five-seed table](../algorithms.md#all-of-them-on-arithmetic)."
        )
        return "\n\n".join(parts)
    shown = dict.fromkeys([*own, "reinforce", "grpo"])
    table = "\n".join([*lines[:2], *(rows[row] for row in shown)])
    about = (
        "[`experiments/objectives.py`](../../experiments/objectives.py), "
        f"{report['date']}, {report['machine'].partition(',')[0].replace('(R)', '')}: three-digit "
        "sums, 30 steps, five seeds, one learning rate for all, tuned for none. "
        "[What the columns are](../algorithms.md#all-of-them-on-arithmetic)."
    )
    return "\n\n".join([*parts, table, about])


def _engines(algorithm: Algorithm) -> str:
    name, lines = algorithm.name, ["## Through TRL and verl", ""]
    kind, options = _trl_loss(name)
    told = ", ".join(f"{key}={_python(value)}" for key, value in options.items())
    lines.append(f"- **TRL**: supported, as `{kind}Trainer` with `{kind}Config({told})`.")
    if algorithm.ratio_to_sampler:
        lines[-1] += " `rollout.top_p` and `rollout.top_k` are refused there."
    obstacle = find_obstacle(algorithm, algorithm.defaults)
    if obstacle is not None:
        lines.append(f"- **verl**: refused. {obstacle.reason}.")
    else:
        mode = loss_mode(algorithm)
        lines.append(
            f"- **verl**: supported, as `loss_mode` and `adv_estimator` `{mode}`, keys in "
            f"`proxstep.engines.verl.{config_name(algorithm)}`."
        )
        if refused := list(_refused_in_verl(algorithm)):
            lines[-1] += f" Refused there: {', '.join(refused)}."
    if algorithm.level == "sequence":
        rule = f"`isopo+{name}`" if name != "reinforce" else "`isopo`"
        lines.append(f"- **With a rule of ISOPO**: {rule}, and likewise every other rule.")
    return "\n".join(lines)


def _refused_in_verl(algorithm: Algorithm) -> Iterator[str]:
    for key, default in algorithm.defaults.items():
        choices = list(algorithm.keys[key].choices) + ["auto"] * (
            "auto" in str(algorithm.types[key])
        )
        for value in [True, *choices] if default is False else choices:
            options = algorithm.defaults | {key: value}
            if value != default and find_obstacle(algorithm, options) is not None:
                yield f"`objective.{key}: {str(value).lower()}`"


def _trl_loss(algorithm: str) -> tuple[str, dict[str, Any]]:
    from proxstep.engines.trl.translation import _loss  # which takes seconds to import

    return _loss(resolve({"algorithm": algorithm}, {}, "docs"))


def _python(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _rule_engines(name: str, rule: Rule) -> str:
    kind, options = _trl_loss(name)
    told = f'rule="{options["rule"]}", loss_type="{options["loss_type"]}"'
    alone = " On one rank only." if rule.needs.along else ""
    tokens = (
        " `update.microbatch_tokens` is refused." if not isinstance(rule, IsometricRule) else ""
    )
    return "\n".join(
        [
            "## Through TRL and verl",
            "",
            f"- **TRL**: supported, as `{kind}Trainer` with `{kind}Config({told})`.{alone}",
            f"- **verl**: supported, as an FSDP2 engine: `strategy=isopo`, `geometry.rule={name}`."
            f"{alone}{tokens}",
            "- **On another objective**: any whose [level](../algorithms.md) is sequence, as "
            f"`{name}+opo`.",
        ]
    )
