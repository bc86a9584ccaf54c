"""metrics.jsonl holds every field of the schema in every line, and trackers get the numbers."""

from __future__ import annotations

import json
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from tests.engine import Silent, tiny_recipe

from proxstep.errors import ProxstepError
from proxstep.runs.schema import FIELDS
from proxstep.runs.tracking import MetricsLog, Tracker, check_tracker, drop_later_steps
from proxstep.training import lifecycle
from proxstep.training.trainer import Trainer


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


# metrics.jsonl


def test_every_line_has_every_field_in_the_schemas_order(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"step": 0, "score": 0.5})
    log.write({"reward": 1.0, "step": 1, "rewards/exact_match": 0.25, "objective/ratio": 1.0})
    log.write({"step": 2, "geometry/weight_spread": None})
    log.close()
    first, second, third = lines(path)
    for line in (first, second, third):
        assert list(line)[: len(FIELDS)] == list(FIELDS)
    assert {name for name, value in first.items() if value is not None} == {"step", "score"}
    assert set(second) == {*FIELDS, "rewards/exact_match", "objective/ratio"}
    assert (second["reward"], second["rewards/exact_match"], second["score"]) == (1.0, 0.25, None)
    assert third["geometry/weight_spread"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(path: Path, value: float) -> None:
    log = MetricsLog(path)
    log.write({"step": 1, "loss": value, "rewards/mine": value, "reward": 0.0})
    log.close()
    (line,) = lines(path)
    assert (line["loss"], line["rewards/mine"], line["reward"]) == (None, None, 0.0)


@pytest.mark.parametrize("name", ["speed", "Reward", "rewards", "objectives/ratio", ""])
def test_a_field_that_the_schema_lacks_is_refused_and_nothing_written(
    path: Path, name: str
) -> None:
    log = MetricsLog(path)
    with pytest.raises(KeyError, match=f"not in proxstep.runs.schema: {name}"):
        log.write({"step": 1, name: 1.0})
    log.close()
    assert path.read_text() == ""


def test_a_line_is_on_disk_as_soon_as_it_is_written(path: Path) -> None:
    log = MetricsLog(path)
    log.write({"step": 1})
    assert [line["step"] for line in lines(path)] == [1]
    log.close()


def test_writing_does_not_change_the_record(path: Path) -> None:
    record = {"step": 1, "loss": math.nan}
    log = MetricsLog(path)
    log.write(record)
    log.close()
    assert list(record) == ["step", "loss"]
    assert math.isnan(record["loss"])


def test_a_log_is_continued(path: Path) -> None:
    for step in (0, 1):
        log = MetricsLog(path)
        log.write({"step": step})
        log.close()
    assert [line["step"] for line in lines(path)] == [0, 1]


@pytest.mark.parametrize(
    "tail",
    ["", '{"step": 3, "rew', '{"step": 1, "rew', "{", "\0\0\0", '{"reward": 1.0}\n', "\n"],
)
def test_resuming_drops_later_steps_and_what_a_kill_cut_off(path: Path, tail: str) -> None:
    log = MetricsLog(path)
    for step in range(5):
        log.write({"step": step, "reward": step / 2})
    log.close()
    kept = path.read_text().splitlines()[:3]
    with path.open("a") as file:
        file.write(tail)
    drop_later_steps(path, 2)
    assert path.read_text().splitlines() == kept
    log = MetricsLog(path)
    log.write({"step": 3})
    log.close()
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3]
    assert [child.name for child in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [b"", b'{"step": 1, "rew', b"\xff\xfe", b'{"step": 9}', b"[]"])
def test_a_damaged_line_before_the_last_kept_one_is_named(path: Path, damage: bytes) -> None:
    rows = [json.dumps({"step": step}).encode() for step in range(4)]
    path.write_bytes(b"\n".join([rows[0], damage, *rows[2:], b""]))
    with pytest.raises(ProxstepError, match=r"metrics\.jsonl, line 2 is damaged: mend it, or move"):
        drop_later_steps(path, 2)
    assert damage in path.read_bytes()


def test_resuming_without_a_log_begins_one(path: Path) -> None:
    drop_later_steps(path, 3)
    assert not path.exists()
    log = MetricsLog(path)
    log.write({"step": 4})
    log.close()
    assert [line["step"] for line in lines(path)] == [4]


def test_several_lines_of_a_step_stay_together(path: Path) -> None:
    kept = "".join(f'{{"step": {step}, "prompt": "{n}"}}\n' for step in (0, 2) for n in range(3))
    path.write_text(kept + '{"step": 3, "prompt": "ø\u2028"}\n{"step": 3}\n', encoding="utf-8")
    drop_later_steps(path, 2)
    assert path.read_text(encoding="utf-8") == kept


def test_a_killed_run_that_goes_on_repeats_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"steps": 5, "logging": {"checkpoint_every": 2}}
    changes["evaluation"] = {"every": 1}
    recipe = tiny_recipe(tmp_path / "killed", **changes)
    train_step = Trainer._train_step

    def kill(self: Trainer) -> dict[str, Any]:
        record = train_step(self)
        if self.step == 4:
            raise RuntimeError("killed")
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", kill)
        with pytest.raises(RuntimeError, match="killed"):
            lifecycle.train(recipe, Silent())
    assert [line["step"] for line in lines(tmp_path / "killed/metrics.jsonl")] == [0, 1, 2, 3]
    (tmp_path / "killed/checkpoints/step-000003.incomplete").mkdir()
    assert lifecycle.resume(tmp_path / "killed", Silent()) == "finished"
    assert [line["step"] for line in lines(tmp_path / "killed/metrics.jsonl")] == list(range(6))
    held = sorted(path.name for path in (tmp_path / "killed/checkpoints").iterdir())
    assert held == ["step-000004", "step-000005"]

    lifecycle.train(tiny_recipe(tmp_path / "whole", **changes), Silent())
    samples = lines(tmp_path / "killed/samples.jsonl")
    assert [sample["step"] for sample in samples] == [step for step in range(6) for _ in range(4)]
    assert samples == lines(tmp_path / "whole/samples.jsonl")


# Trackers


def test_no_tracker_takes_anything(tmp_path: Path) -> None:
    with Tracker("none", "project", tmp_path / "run", {}) as tracker:
        tracker.log({"step": 1, "reward": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    with Tracker("tensorboard", "project", tmp_path, {"seed": 0}) as tracker:
        tracker.log({"step": 0, "score": 0.25, "reward": None})
        tracker.log({"step": 7, "score": 0.5, "rewards/mine": 2, "loss": -1.5})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path))
        events.Reload()
        found = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
    assert found == {
        "score": [(0, 0.25), (7, 0.5)],
        "rewards/mine": [(7, 2.0)],
        "loss": [(7, -1.5)],
    }


class Recorder(types.ModuleType):
    """Stands in for a tracker's module and writes its calls down."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for call in ("init", "log", "finish"):
            setattr(self, call, self._recorder(call))

    def _recorder(self, call: str) -> Any:
        return lambda *arguments, **options: self.calls.append((call, arguments, options))


@pytest.fixture(params=["trackio", "wandb"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_a_tracker_is_begun_fed_and_finished(recorder: Recorder, tmp_path: Path) -> None:
    recipe = {"algorithm": "opo", "optimizer": {"learning_rate": 1e-6}}
    check_tracker(recorder.__name__)
    assert recorder.calls == []
    with Tracker(recorder.__name__, "arithmetic", tmp_path / "opo-seed0", recipe) as tracker:
        tracker.log({"step": 3, "reward": 0.5, "num_updates": 4, "score": None, "note": "text"})
    assert recorder.calls == [
        ("init", (), {"project": "arithmetic", "name": "opo-seed0", "config": recipe}),
        ("log", ({"reward": 0.5, "num_updates": 4},), {"step": 3}),
        ("finish", (), {}),
    ]


def test_a_tracker_is_finished_after_an_error_too(recorder: Recorder, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="boom"),
        Tracker(recorder.__name__, "project", tmp_path, {}),
    ):
        raise RuntimeError("boom")
    assert [call for call, _, _ in recorder.calls] == ["init", "finish"]


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_missing_package_is_named_with_its_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    expected = (
        f"logging.tracker {name} is not installed: pip install {name}, or set logging.tracker "
        "to none"
    )
    with pytest.raises(ProxstepError) as caught:
        check_tracker(name)
    assert str(caught.value) == expected
    with pytest.raises(ProxstepError, match="is not installed"):
        Tracker(name, "project", tmp_path, {})


def test_no_tracker_needs_no_package() -> None:
    check_tracker("none")
