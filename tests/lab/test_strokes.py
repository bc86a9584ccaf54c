import itertools

import numpy as np
import pytest

from proxstep.algorithms import ALGORITHMS
from proxstep.config.recipe import algorithm_names
from proxstep.lab.bandit import METHODS
from proxstep.lab.saturation import make_curves
from proxstep.lab.strokes import COLORS, COLORS_ON_DARK, strokes

# What an eye without one kind of cones sees of linear RGB (Machado, Oliveira, Fernandes 2009).
EYES = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB under D65, in which a difference of 2.3 is just seen."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("colors", [COLORS, COLORS_ON_DARK], ids=["light", "dark"])
@pytest.mark.parametrize("eye", EYES)
def test_every_eye_tells_the_colors_apart(colors, eye):
    seen = [lab(np.array(EYES[eye]) @ linear(color)) for color in colors]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 5 * 2.3


@pytest.mark.parametrize(("colors", "ground"), [(COLORS, "#ffffff"), (COLORS_ON_DARK, "#1c2025")])
def test_colors_stand_out_from_the_ground(colors, ground):
    luminance = [linear(color) @ [0.2126, 0.7152, 0.0722] for color in (ground, *colors)]
    for other in luminance[1:]:
        low, high = sorted((luminance[0], other))
        assert (high + 0.05) / (low + 0.05) > 2


def test_another_objective_changes_no_stroke(monkeypatch):
    before = strokes(algorithm_names())
    monkeypatch.setitem(ALGORITHMS, "next", ALGORITHMS["grpo"])
    after = strokes(algorithm_names())
    assert {name: after[name] for name in before} == before


def test_no_two_algorithms_of_the_library_are_drawn_alike():
    names = [*algorithm_names(), "isopo+opo"]
    assert len(set(strokes(names).values())) == len(names)


@pytest.mark.parametrize("name", [*algorithm_names(), "my-own", "natural gradient"])
def test_an_algorithm_is_drawn_alike_whatever_it_is_compared_with(name):
    alone = strokes([name])[name]
    assert strokes([*algorithm_names(), name])[name] == alone or name == "my-own"
    assert strokes(["opo", "isopo", name])[name] == alone


@pytest.mark.parametrize("names", [list(METHODS), [curve.name for curve in make_curves()]])
def test_the_toys_draw_what_the_reports_draw(names):
    looks = strokes(names)
    assert len(set(looks.values())) == len(names)
    for name in names:
        family = name.partition(",")[0].partition(" ")[0]
        if family in algorithm_names():
            assert looks[name].color == strokes([family])[family].color, name


def test_names_that_nobody_knows_differ_too():
    names = [f"algorithm-{i}" for i in range(30)]
    assert len(set(strokes(names).values())) == 30
    assert len(strokes(f"algorithm-{i}" for i in range(60))) == 60
