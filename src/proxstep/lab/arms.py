"""What a comparison compares: algorithms, or arms, which are named settings of a recipe file.

A recipe file's section `compare` holds the arms, and what else a plan is made of; an arm's own
`vary` takes the place of the plan's for it:

    compare:
      arms:
        plain: {algorithm: reinforce}
        many-positions: {algorithm: isopo, geometry: {num_overlap_positions: 250}}
        sgd:
          {algorithm: isopo, optimizer: {name: sgd}, vary: {optimizer.learning_rate: [0.1, 0.3]}}
      against: plain
      vary: {optimizer.learning_rate: [3e-5, 1e-4]}
      seeds: 5
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxstep.errors import ProxstepError, did_you_mean

Part = dict[str, Any]


@dataclass(frozen=True)
class Design:
    """What a recipe file says of a comparison; everything may be left out.

    Attributes:
        arms: Each arm's part of a recipe, which names its algorithm, by the arm's name; `vary` in
            it holds the values of the varied keys that are the arm's own.
        against: The arm, or algorithm, that every other one is compared with; None for all pairs.
        vary: Keys with their values.
        seeds: Number of seeds.
    """

    arms: Mapping[str, Part] = field(default_factory=dict)
    against: str | None = None
    vary: Mapping[str, list[Any]] = field(default_factory=dict)
    seeds: int = 1

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str) -> Design:
        """Return what a recipe file says.

        Args:
            data: The file's content.
            source: Its name, for messages.

        Raises:
            ProxstepError: If its section `compare` holds anything else.
        """
        section = data.get("compare") or {}
        place = f"{source}: compare"
        if not isinstance(section, Mapping):
            raise ProxstepError(f"{place} must map arms, against, vary and seeds, got {section!r}")
        known = list(cls.__dataclass_fields__)
        for key in section:
            if key not in known:
                guess = did_you_mean(str(key), known)
                raise ProxstepError(f"{place}.{key} is not known{guess}; it has {', '.join(known)}")
        found = cls(**{key: value for key, value in section.items() if value is not None})
        _check_arms(found.arms, place)
        seeds = found.seeds
        if not isinstance(seeds, int) or isinstance(seeds, bool) or seeds < 1:
            raise ProxstepError(f"{place}.seeds must be at least 1, got {found.seeds!r}")
        _check_vary(found.vary, f"{place}.vary")
        for name in found.arms:
            own = found.own_vary(name)
            _check_vary(own, f"{place}.arms.{name}.vary")
            for key in own:
                if key not in found.vary:
                    raise ProxstepError(
                        f"{place}.arms.{name}.vary.{key} is not among {place}.vary, of which it "
                        "is the arm's own values: put it there for the others"
                    )
        return found

    def part(self, name: str) -> Part:
        """Return an arm's part of a recipe, with the arm's name; an algorithm's is the algorithm.

        >>> Design({"slow": {"algorithm": "opo", "steps": 9}}).part("slow")
        {'algorithm': 'opo', 'steps': 9, 'label': 'slow'}
        """
        if name not in self.arms:
            return {"algorithm": name}
        own = {key: value for key, value in self.arms[name].items() if key != "vary"}
        return {**own, "label": name}

    def own_vary(self, name: str) -> dict[str, list[Any]]:
        """Return the values of varied keys that are an arm's own."""
        return dict(self.arms.get(name, {}).get("vary") or {})

    def names(self, listed: str | None) -> list[str]:
        """Return the arms and algorithms that are compared.

        Args:
            listed: As typed, separated by commas; None for all arms.

        Raises:
            ProxstepError: If there are none, or one is listed twice.
        """
        if listed is None:
            if not self.arms:
                raise ProxstepError(
                    "compare what? Give --algorithms a,b, or a recipe with compare.arms"
                )
            return list(self.arms)
        names = [name.strip() for name in listed.split(",") if name.strip()]
        if not names or len(set(names)) < len(names):
            raise ProxstepError("--algorithms needs distinct names, separated by commas")
        return names

    def reference(self, names: Sequence[str]) -> str | None:
        """Return the one that all others are compared with, None for all pairs.

        It is None, too, where `--algorithms` leaves the arm out.

        Raises:
            ProxstepError: If it is no arm, nor among the algorithms that are compared.
        """
        if self.against is None or self.against in names:
            return self.against
        if self.against not in self.arms:
            raise ProxstepError(
                f"compare.against {self.against} is not compared{did_you_mean(self.against, names)}"
                f"; choose one of {', '.join(names)}"
            )
        return None


def _check_arms(arms: Any, place: str) -> None:
    if not isinstance(arms, Mapping):
        raise ProxstepError(f"{place}.arms must map names to parts of a recipe, got {arms!r}")
    for name, part in arms.items():
        if not isinstance(part, Mapping) or not isinstance(part.get("algorithm"), str):
            raise ProxstepError(f"{place}.arms.{name} must be a part of a recipe with an algorithm")
        if not re.fullmatch(r"[\w.+-]+", str(name)):
            raise ProxstepError(
                f"{place}.arms: {name!r} becomes a folder's name: use letters, digits and -_.+"
            )
        for key in ("label", "seed", "output_dir", "per_algorithm"):
            if key in part:
                raise ProxstepError(f"{place}.arms.{name} cannot change {key}: leave it out")


def _check_vary(vary: Any, place: str) -> None:
    if not isinstance(vary, Mapping):
        raise ProxstepError(f"{place} must map keys to lists of values, got {vary!r}")
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise ProxstepError(f"{place}.{key} must be a list of values, got {values!r}")
        if any(values.count(value) > 1 for value in values):
            raise ProxstepError(f"{place}.{key} has a value twice")
