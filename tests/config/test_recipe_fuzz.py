"""Anything at all resolves, or is refused with a message."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.config.recipe_case import COMPOSED, LEAVES, nested

from proxstep.config.loading import dump_recipe, load_recipe, resolve
from proxstep.config.recipe import Recipe, algorithm_names
from proxstep.errors import ProxstepError

KEYS = sorted(
    {part for _, key in LEAVES for part in key.split(".")} | {"algorithm", "per_algorithm", "lora"}
)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=5)
    | st.sampled_from(
        [*algorithm_names(), *COMPOSED, "none", "isopo+grpo", "table", "sgd", "natural"]
    )
    | st.dates()
    | st.binary(max_size=3)
)


NAMES = st.sampled_from(KEYS) | st.text(max_size=4) | st.integers(-1, 1) | st.none()


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


QUICK = settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def resolves_or_says_why(data: Any, changes: Any) -> None:
    try:
        recipe = resolve(data, changes, "fuzz")
    except ProxstepError as error:
        message = str(error)
    else:
        message = "fuzz: none"
        yaml.safe_load(dump_recipe(recipe))
    assert message.startswith("fuzz: ")


@QUICK
@given(data=st.dictionaries(NAMES, VALUES, max_size=6), changes=st.dictionaries(NAMES, VALUES))
def test_any_mapping_resolves_or_says_why(data: dict[Any, Any], changes: dict[Any, Any]) -> None:
    resolves_or_says_why(data, changes)


@QUICK
@given(
    algorithm=st.sampled_from([*algorithm_names(), *COMPOSED]),
    key=st.sampled_from(sorted({key for _, key in LEAVES} | {"per_algorithm", "model.lora"})),
    value=VALUES,
    extra=NAMES,
)
def test_a_recipe_with_one_odd_value_resolves_or_says_why(
    algorithm: str, key: str, value: Any, extra: Any
) -> None:
    resolves_or_says_why({"algorithm": algorithm}, nested(key, value))
    section = key.split(".")[0]
    resolves_or_says_why({"algorithm": algorithm, section: {extra: value}}, {})


@QUICK
@given(
    key=st.sampled_from(sorted({key for _, key in LEAVES})) | st.text(max_size=8),
    text=st.text(max_size=12)
    | st.text("[]{}:,&*!|>'\"#%@`-? \n\tae01.", max_size=8)
    | st.floats().map(str),
)
def test_any_override_is_applied_or_refused(
    key: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text("algorithm: grpo\n")
    try:
        recipe = load_recipe(path, [(key, text)])
    except ProxstepError:
        return
    assert isinstance(recipe, Recipe)
