"""Tiny runs of TRL's trainers: a model of a thousand weights, prompts of a few characters."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tests import models
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOConfig

from proxstep.training.demo_model import build_embedded_model

PROMPTS = ["1+2=", "30+4=", "5+60=", "7+8=", "12+34=", "9+9=", "2+3=", "44+5="] * 2
SIZES: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_generations": 4,
    "max_completion_length": 5,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def text_reward(completions: Sequence[str], **columns: Any) -> list[float]:
    """A number that differs between most completions."""
    del columns
    return [sum(ord(letter) for letter in text) % 7 / 3 for text in completions]


def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def tiny(
    seed: int = 1, *, tied: bool = True, lora: bool = False, exact: bool = False
) -> tuple[Any, nn.Module]:
    """A tokenizer of characters and a model of its vocabulary, in float32, or all in float64."""
    tokenizer, embedded = build_embedded_model()
    torch.manual_seed(seed)
    model = models.qwen3(tied, embedded.config.vocab_size)
    with torch.no_grad():  # so that completions end early, at different lengths
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 1.5
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model = models.with_adapters(model) if lora else model
    dtype = torch.float64 if exact else torch.float32
    return tokenizer, models.finish(model, dtype, exact)


@dataclass
class Watch(TrainerCallback):
    """What a run did: its microbatches, gradients before and weights after an optimizer step."""

    microbatches: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    model: Any = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append(gradients_of(self.model))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append({k: v.clone() for k, v in self.model.state_dict().items()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def made(
    trainer_class: Any, folder: Path, model: nn.Module, tokenizer: Any, **options: Any
) -> tuple[Any, Watch]:
    """A trainer that is watched; options are its configuration's, or the trainer's own."""
    rewards = options.pop("rewards", text_reward)
    own = {name: options.pop(name) for name in ("eval_dataset", "peft_config") if name in options}
    with quiet():
        config_class = getattr(trainer_class, "config_class", GRPOConfig)
        config = config_class(str(folder), **(SIZES | options))
        trainer = trainer_class(
            model, rewards, config, dataset(), processing_class=tokenizer, **own
        )
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name:  # TRL's reference is a copy; its divergence would be 0
            parameter.data.add_(0.1 * torch.ones_like(parameter))
    watch = Watch(model=trainer.model)
    trainer.add_callback(watch)
    compute_loss = trainer._compute_loss

    def watched(model: Any, inputs: Any) -> Tensor:
        if model.training:
            watch.microbatches.append(dict(inputs))
        return compute_loss(model, inputs)

    trainer._compute_loss = watched
    return trainer, watch


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that TRL and transformers give of their own defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(trainer: Any, **options: Any) -> None:
    with quiet():
        trainer.train(**options)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def environment(*first: str) -> dict[str, str]:
    """A process's, which finds this TRL, and before it what lies in the folders given."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([*first, root, os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
