"""What a comparison runs: every algorithm at every varied value with every seed.

A plan is pure: it says which cells there are and what its file holds, and starts nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, zip_longest
from math import inf
from pathlib import Path
from typing import Any

from proxstep.config.loading import load_recipe, with_absolute_paths
from proxstep.config.recipe import Recipe
from proxstep.config.yamlfile import dump_yaml, parse_yaml, read_yaml
from proxstep.errors import ProxstepError
from proxstep.lab.arms import Design
from proxstep.runs.durable import write_file
from proxstep.runs.reading import as_text, flatten

PLAN = "plan.yaml"
NOT_VARIED = {
    "algorithm": "--algorithms",
    "seed": "--seeds",
    "output_dir": "--output",
    "per_algorithm": "the recipe for it",
    "label": "compare.arms in the recipe",
}
"""Keys of a recipe that compare sets itself, and what to use in their place."""
CHOOSING = 1000
"""The first of the seeds that only choose values, with a budget; they are never reported."""
_TASK_SECTIONS = ("task.", "model.")
_ALIKE = ("model", "task", "steps", "rollout.num_prompts", "rollout.num_generations")
_HEADING = """\
# What `proxstep compare` runs here: every algorithm at every varied value with seeds from 0 on,
# a run folder each. The same command goes on with it. `recipes` has what an algorithm's runs share.
"""

Values = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """An algorithm, or an arm, at one choice of the varied values.

    Attributes:
        algorithm: Its name, or the arm's.
        values: The varied keys with their values, none where nothing varies.
        recipe: The resolved recipe.
    """

    algorithm: str
    values: Values
    recipe: Recipe

    @property
    def name(self) -> str:
        """The name that its run folders begin with."""
        pairs = short_keys(self.values).items()
        return "-".join([self.algorithm, *(describe(*pair, sep="=") for pair in pairs)])

    @property
    def tuned(self) -> str:
        """Its values of what is tuned, as text."""
        return label(self.values, of_task=False)


@dataclass(frozen=True)
class Cell:
    """One run of a plan.

    Attributes:
        variant: The algorithm and the varied values.
        seed: Its seed.
    """

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"{self.variant.name}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """All of a comparison.

    Attributes:
        variants: Every algorithm at every choice of values; the algorithms of a choice together.
        vary: The varied keys with all their values.
        seeds: Number of seeds.
        halving: Whether values are chosen by successive halving, with a budget.
        engine: What runs the training, local or trl.
        own_vary: Values of varied keys that are an arm's own, by its name.
        against: The algorithm that every other one is compared with; None for all pairs.
    """

    variants: tuple[Variant, ...]
    vary: dict[str, list[Any]]
    seeds: int
    halving: bool = False
    engine: str = "local"
    own_vary: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    against: str | None = None

    @classmethod
    def of(
        cls,
        recipe: str | Path,
        overrides: Sequence[tuple[str, str]],
        algorithms: Sequence[str],
        vary: Mapping[str, Sequence[Any]],
        seeds: int,
        *,
        halving: bool = False,
        engine: str = "local",
        design: Design | None = None,
    ) -> Plan:
        """Return the plan that a command line describes.

        Args:
            recipe: The recipe file, or the name of one of ours.
            overrides: Pairs of a dotted key and a YAML value.
            algorithms: Names of algorithms, and of the design's arms.
            vary: Keys with their values.
            seeds: Number of seeds.
            halving: Whether values are chosen by successive halving, with a budget.
            engine: What runs the training.
            design: What the recipe file says of arms.

        Raises:
            ProxstepError: If a recipe of it is wrong, or two of its algorithms are to have
                different prompts, policies or numbers of rollouts.
        """
        for key in [*dict(overrides), *vary]:
            if key in NOT_VARIED:
                raise ProxstepError(f"--{key} does not go with compare: use {NOT_VARIED[key]}")
        design = design or Design()
        own_vary = {name: own for name in algorithms if (own := design.own_vary(name))}

        def variant(name: str, values: tuple[Any, ...]) -> Variant:
            chosen = dict(zip(vary, values, strict=True))
            on_top = [*overrides, *((key, json.dumps(value)) for key, value in chosen.items())]
            return Variant(name, chosen, load_recipe(recipe, on_top, design.part(name)))

        choices = [product(*{**vary, **own_vary.get(name, {})}.values()) for name in algorithms]
        variants = [
            variant(name, values)
            for alike in zip_longest(*choices)
            for name, values in zip(algorithms, alike, strict=True)
            if values is not None
        ]
        names = [variant.name for variant in variants]
        if len(set(names)) < len(names):
            raise ProxstepError("--vary gives two runs one name: let its values differ clearly")
        _check_alike(variants, {key for own in own_vary.values() for key in own})
        held = {key: list(values) for key, values in vary.items()}
        against = design.reference(algorithms)
        return cls(tuple(variants), held, seeds, halving, engine, own_vary, against)

    @property
    def algorithms(self) -> list[str]:
        """Their names, in order."""
        return list(dict.fromkeys(variant.algorithm for variant in self.variants))

    def distinct_models(self) -> list[Recipe]:
        """Return one recipe for each initial policy."""
        found = {
            json.dumps([v.recipe.model.model_dump(), v.recipe.task.model_dump()]): v.recipe
            for v in self.variants
        }
        return list(found.values())

    def tuned(self) -> dict[str, list[str]]:
        """Return the tuned values of each algorithm, as text."""
        found: dict[str, dict[str, None]] = {}
        for variant in self.variants:
            found.setdefault(variant.algorithm, {})[variant.tuned] = None
        return {algorithm: list(values) for algorithm, values in found.items()}

    def cells(self) -> list[Cell]:
        """Return all runs, seed by seed, so that everything is seen early."""
        return [Cell(variant, seed) for seed in range(self.seeds) for variant in self.variants]

    def content(self) -> dict[str, Any]:
        """Return what its file holds."""
        first = {variant.algorithm: variant.recipe for variant in reversed(self.variants)}
        left_out = {"seed", "output_dir", "label", *self.vary}
        if not any(variant.recipe.label for variant in self.variants):
            left_out.add("algorithm")
        return {
            "algorithms": self.algorithms,
            "vary": self.vary,
            **({"own_vary": self.own_vary} if self.own_vary else {}),
            **({"against": self.against} if self.against else {}),
            "seeds": self.seeds,
            "halving": self.halving,
            "engine": self.engine,
            "recipes": {
                algorithm: _without(with_absolute_paths(first[algorithm]).model_dump(), left_out)
                for algorithm in self.algorithms
            },
        }

    def write(self, folder: Path) -> None:
        """Write the plan's file, all or nothing."""
        write_file(folder / PLAN, (_HEADING + dump_yaml(self.content())).encode())

    def continuing(self, folder: Path) -> Plan:
        """Return this plan with at least the seeds of the one in the folder, where there is one.

        The one in the folder may have fewer seeds, algorithms or values, nothing else.

        Raises:
            ProxstepError: If it is another plan, with what differs.
        """
        path = folder / PLAN
        if not path.exists():
            return self
        held = read_yaml(path)
        if difference := next(_differences(held, self.content()), None):
            raise ProxstepError(
                f"output {folder} holds another plan, {path}: {difference}. Choose another folder, "
                "or delete its runs with --overwrite"
            )
        return replace(self, seeds=max(self.seeds, held["seeds"]))


def parse_budget(text: str) -> float:
    """Return seconds.

    >>> parse_budget("2h"), parse_budget("1.5m"), parse_budget("30s")
    (7200.0, 90.0, 30.0)

    Raises:
        ProxstepError: If it is no positive number of h, m or s.
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([hms])", text.strip())
    seconds = float(found[1]) * {"h": 3600, "m": 60, "s": 1}[found[2]] if found else 0.0
    if not 0 < seconds < inf:
        raise ProxstepError(f"--budget {text!r} must be a time such as 2h, 90m or 30s")
    return seconds


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Return keys with their values.

    >>> parse_vary(["optimizer.learning_rate=1e-5,3e-5", "advantage.name=rloo"])
    {'optimizer.learning_rate': [1e-05, 3e-05], 'advantage.name': ['rloo']}

    Raises:
        ProxstepError: If one is not KEY=VALUE,VALUE.
    """
    vary: dict[str, list[Any]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        values = parse_yaml(f"[{listed}]", f"--vary {key}")
        if not key or not values or not isinstance(values, list):
            raise ProxstepError(f"--vary {text!r} must be KEY=VALUE,VALUE,...")
        if key in vary or any(values.count(value) > 1 for value in values):
            raise ProxstepError(f"--vary {key} is given twice, or a value of it is")
        vary[key] = values
    return vary


def is_of_task(key: str) -> bool:
    """Whether a varied key makes another task, over which results are averaged; else it is tuned.

    >>> is_of_task("task.difficulty"), is_of_task("optimizer.learning_rate")
    (True, False)
    """
    return key.startswith(_TASK_SECTIONS)


def label(values: Mapping[str, Any], *, of_task: bool) -> str:
    """Return the varied values of the task, or those that are tuned, as text.

    >>> label({"optimizer.learning_rate": 1e-5, "task.difficulty": 3}, of_task=False)
    'learning_rate 1e-05'
    """
    own = {key: value for key, value in values.items() if is_of_task(key) == of_task}
    return ", ".join(describe(*pair) for pair in short_keys(own).items())


def short_keys(values: Mapping[str, Any]) -> Values:
    """Return the mapping with the last part of each key alone, where no two are equal.

    >>> short_keys({"optimizer.learning_rate": 0.1, "objective.alpha": 1})
    {'learning_rate': 0.1, 'alpha': 1}
    """
    last = [key.rpartition(".")[2] for key in values]
    return dict(zip(last if len(set(last)) == len(last) else values, values.values(), strict=True))


def describe(key: str, value: Any, sep: str = " ") -> str:
    """Return a varied key with its value, with nothing in it that a file's name cannot have.

    >>> describe("learning_rate", 3e-5), describe("name", "my/model", sep="=")
    ('learning_rate 3e-05', 'name=my_model')
    """
    text = f"{value:g}" if isinstance(value, float) else as_text(value)
    return key + sep + re.sub(r"[^\w.+-]+", "_", text)


def _check_alike(variants: Sequence[Variant], own: Collection[str]) -> None:
    """Refuse algorithms with different prompts, initial policies or numbers of rollouts.

    Args:
        variants: All of them.
        own: Keys of which an arm has its own values.
    """

    def shared(variant: Variant) -> Values:
        return {key: value for key, value in variant.values.items() if key not in own}

    for variant in variants:
        first = next(other for other in variants if shared(other) == shared(variant))
        for key in _ALIKE:
            one, other = _at(first.recipe, key), _at(variant.recipe, key)
            if one != other:
                raise ProxstepError(
                    f"{first.algorithm} and {variant.algorithm} would have different {key}, which "
                    "a comparison needs alike: take it out of per_algorithm"
                )


def _at(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _without(tree: dict[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in keys
    }


def _vary_of(content: Mapping[str, Any], name: str) -> dict[str, list[Any]]:
    """Return the varied keys of an algorithm with its values."""
    return {**content["vary"], **content.get("own_vary", {}).get(name, {})}


def _differences(held: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps one plan from being a beginning of another."""
    if not {"algorithms", "vary", "seeds", "recipes"} <= held.keys():
        yield "it is damaged"
        return
    if held.get("halving") != new["halving"]:
        yield f"it has {'a' if held.get('halving') else 'no'} --budget"
    if (engine := held.get("engine", "local")) != new["engine"]:
        yield f"its engine is {engine}"
    for algorithm in held["algorithms"]:
        if algorithm not in new["algorithms"]:
            yield f"it has the algorithm {algorithm}"
    if list(held["vary"]) != list(new["vary"]):
        yield f"it varies {', '.join(held['vary']) or 'nothing'}"
        return
    for name in held["algorithms"]:
        now = _vary_of(new, name)
        for key, values in _vary_of(held, name).items():
            if missing := [value for value in values if value not in now[key]]:
                yield f"it has {key} {as_text(missing[0])} for {name}"
    for algorithm, recipe in held["recipes"].items():
        before = dict(flatten(recipe))
        now = dict(flatten(new["recipes"].get(algorithm, {})))
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                yield f"its {key} of {algorithm} is {as_text(before.get(key))}"
