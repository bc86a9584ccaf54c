"""`external_lib`: an algorithm that a user's file declares is a recipe's, wherever it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from proxstep.algorithms import ALGORITHMS, SEQ_MEAN_TOKEN_MEAN, reinforce
from proxstep.config.loading import dump_recipe, load_recipe, resolve, with_absolute_paths
from proxstep.config.names import check_names
from proxstep.config.reading import read_recipe
from proxstep.errors import ProxstepError

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_objective.py"
RECIPE = "external_lib: mine.py\nalgorithm: hinge-of-tests\nobjective: {margin: 0.25}\n"


@pytest.fixture(autouse=True)
def same_algorithms() -> Iterator[None]:
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the example's file, under another name of its algorithm, and a recipe."""
    text = EXAMPLE.read_text().replace('"hinge"', '"hinge-of-tests"')
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_its_algorithm_is_a_recipe_s(folder: Path) -> None:
    """The file is found beside the recipe, and from the run folder's copy of it."""
    recipe = load_recipe(folder / "recipe.yaml", [("update.num_iterations", "2")])
    assert recipe.objective.options() == {"margin": 0.25}
    check_names(*read_recipe(folder / "recipe.yaml"))
    copy = folder / "elsewhere.yaml"
    copy.write_text(dump_recipe(with_absolute_paths(recipe)))
    assert load_recipe(copy).external_lib == str(folder / "mine.py")
    composed = load_recipe(folder / "recipe.yaml", [("algorithm", "isopo+hinge-of-tests")])
    assert composed.geometry.rule == "isopo"


def test_mistakes(folder: Path) -> None:
    path = folder / "recipe.yaml"
    with pytest.raises(ProxstepError, match=r"unknown key objective\.margn; did you mean margin"):
        load_recipe(path, [("objective.margn", "1.0")])
    with pytest.raises(ProxstepError, match=r"objective\.margin: .* greater than 0"):
        load_recipe(path, [("objective.margin", "0.0")])
    for library, complaint in (
        ("none.py", r"^test: external_lib none\.py: the file none\.py does not exist"),
        ("no such module", r"^test: external_lib no such module: .* not a module's name"),
        ("no_such_module_xyz", r"^test: external_lib .*cannot import 'no_such_module_xyz'"),
    ):
        with pytest.raises(ProxstepError, match=complaint):
            resolve({"algorithm": "grpo"}, {"external_lib": library}, "test")
    part = {"per_algorithm": {"grpo": {"external_lib": "mine.py"}}}
    with pytest.raises(ProxstepError, match=r"per_algorithm\.grpo cannot change the external_lib"):
        resolve({"algorithm": "grpo", **part}, {}, "test")


def test_a_name_that_the_package_has_is_refused(folder: Path) -> None:
    (folder / "mine.py").write_text(EXAMPLE.read_text().replace('"hinge"', '"opo"'))
    with pytest.raises(ProxstepError, match="algorithm opo: the name is taken"):
        load_recipe(folder / "recipe.yaml")


def test_the_example_s_loss_is_reinforce_up_to_its_margin(folder: Path) -> None:
    load_recipe(folder / "recipe.yaml")
    hinge = ALGORITHMS["hinge-of-tests"].loss
    old = torch.randn(4, 3, dtype=torch.float64)
    mask, advantages = torch.ones(4, 3).bool(), torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    moved = torch.tensor([0.1, -0.1, 0.3, -0.3], dtype=torch.float64)  # 0.3 to 0.9 nats of 3 tokens

    def gradient(loss) -> torch.Tensor:
        log_probs = (old + moved[:, None]).requires_grad_()
        value, _ = loss(log_probs, old, advantages, mask)
        return torch.autograd.grad(value, log_probs)[0]

    plain = gradient(lambda *inputs: reinforce(*inputs, aggregation=SEQ_MEAN_TOKEN_MEAN))
    found = gradient(lambda *inputs: hinge(*inputs, margin=0.5))
    assert found[:2].abs().min() > 0
    torch.testing.assert_close(found[:2] / found[0, 0], plain[:2] / plain[0, 0])
    assert torch.equal(found[2:], torch.zeros_like(found[2:]))
