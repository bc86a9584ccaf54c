"""A script that trains with TRL's GRPOTrainer, turned into ISOPO: two names are others.

    pip install -e ".[trl]"   # in a checkout
    python examples/trl_script.py

The model has random weights, so that nothing is downloaded; give TRL a name of the hub instead,
and no processing_class. The reward is the share of digits in a completion.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from make_tiny_model import tiny_model

from proxstep.engines.trl import IsopoConfig, IsopoTrainer  # GRPOConfig, GRPOTrainer from trl


def share_of_digits(completions: list[str], **columns: Any) -> list[float]:
    """Return TRL's rewards, one for each completion."""
    del columns
    return [sum(letter.isdigit() for letter in text) / 8 for text in completions]


def main() -> None:
    """Train, and print the reward of the first steps and of the last."""
    tokenizer, model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        arguments = IsopoConfig(  # GRPOConfig(
            output_dir=folder,
            rule="isopo",  # without this line
            learning_rate=3e-3,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=8,
            max_steps=20,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = IsopoTrainer(  # GRPOTrainer(
            model=model,
            reward_funcs=share_of_digits,
            args=arguments,
            train_dataset=Dataset.from_dict(
                {"prompt": ["a number: ", "two numbers: ", "a digit, please: ", "how many? "] * 20}
            ),
            processing_class=tokenizer,
        )
        trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    print(f"first five steps: reward {rewards[0]:.3f}; last five: {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
