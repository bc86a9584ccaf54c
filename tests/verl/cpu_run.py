"""A small run of verl's own main program on the CPU, and the processes that belong to it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from tests.verl.cpu_settings import cpu_environment, cpu_overrides

from proxstep.tasks import arithmetic_task
from proxstep.training.demo_model import build_embedded_model

_MARK = "PROXSTEP_TEST_RUN"
_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return len(set(solution_str) & set(ground_truth)) / len(set(ground_truth))
"""
_NUMBER = re.compile(r"([\w/@-]+):(?:np\.\w+\()?([-+.e\d]+)")


@dataclass
class Run:
    """One main_ppo process; its Ray processes are known by an environment variable.

    Args:
        folder: Holds model, data, reward function, checkpoints and the log.
        overrides: Besides those of every run here.
    """

    folder: Path
    overrides: list[str]
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> None:
        """Begin, with a temporary folder whose name is too long for a socket's."""
        long = self.folder / ("long" * 30)
        long.mkdir(exist_ok=True)
        given = {**os.environ, **cpu_environment(), "TMPDIR": str(long), _MARK: self.mark}
        command = [sys.executable, "-m", "verl.trainer.main_ppo", *cpu_overrides()]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *_common(self.folder), *self.overrides],
                env={k: v for k, v in given.items() if k not in ("RAY_ADDRESS", "VERL_PLATFORM")},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )

    def finish(self, seconds: float) -> list[dict[str, float]]:
        """Wait for the end; each step's metrics."""
        code = self._process.wait(timeout=seconds)
        text = self.log.read_text()
        assert code == 0, text[-6000:]
        return [dict(_numbers(line)) for line in re.findall(r"step:\d+ - .*", text)]

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until the log holds the text."""
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self._process.poll() is None, self.log.read_text()[-6000:]
            assert time.monotonic() < end, self.log.read_text()[-6000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """End the main process at once, without a word to the others."""
        self._process.kill()
        self._process.wait()

    @property
    def log(self) -> Path:
        return self.folder / f"{self.mark}.log"

    def left(self) -> list[str]:
        """The run's processes that are still there."""
        return [" ".join(process.cmdline()) for process in self.processes()]

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark:
                    found.append(process)
            except psutil.Error:  # ended, or somebody else's
                continue
        return found

    def none_left(self, seconds: float) -> bool:
        """Whether all of its processes end in the time given."""
        end = time.monotonic() + seconds
        while self.left():
            if time.monotonic() > end:
                return False
            time.sleep(0.5)
        return True


def prepared(folder: Path) -> Path:
    """The folder, with a model, problems and a reward function in it."""
    tokenizer, model = build_embedded_model()
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "model")
    problems = arithmetic_task(1).train
    rows = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": str(problems[i].prompt)}],
            "reward_model": {"style": "rule", "ground_truth": problems[i].answer},
            "extra_info": {"index": i},
        }
        for i in range(24)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "problems.parquet")
    (folder / "reward.py").write_text(_REWARD)
    return folder


def _common(folder: Path) -> list[str]:
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return [
        f"data.train_files={folder}/problems.parquet",
        f"data.val_files={folder}/problems.parquet",
        "data.train_batch_size=8",
        "data.max_prompt_length=8",
        "data.max_response_length=4",
        "data.seed=1",
        f"actor_rollout_ref.model.path={folder}/model",
        f"actor_rollout_ref.model.custom_chat_template='{template}'",
        f"{actor}.ppo_mini_batch_size=8",
        f"{actor}.ppo_micro_batch_size_per_gpu=4",
        f"{actor}.optim.lr=1e-3",
        f"{rollout}.n=4",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=16",
        "algorithm.adv_estimator=grpo",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "trainer.logger=[console]",
        "trainer.val_before_train=false",
        f"trainer.default_local_dir={folder}/checkpoints",
        f"hydra.run.dir={folder}/hydra",
    ]


def _numbers(line: str) -> list[tuple[str, Any]]:
    return [(name, float(value)) for name, value in _NUMBER.findall(line)]
