"""One rank of a TRL run under torchrun: what it saw, and the gradient that it ended with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tests.engines.trl_case import made, tiny, trained

from proxstep.engines.trl import IsopoTrainer, OpoTrainer


def main(folder: Path, case: str) -> None:
    """Groups of four lie on two ranks of three completions, over two microbatches."""
    torch.set_num_threads(1)
    tokenizer, model = tiny(lora="kl" in case)
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    options = sizes | {"num_generations": 4, "ddp_find_unused_parameters": False}
    if case == "opo":
        trainer_class, options = OpoTrainer, options | {"kl_budget": 1e-6}
    else:
        trainer_class, options = IsopoTrainer, options | {"num_overlap_positions": None}
    if "kl" in case:
        options["beta"] = 0.1
    trainer, watch = made(trainer_class, folder / "run", model, tokenizer, **options)
    trained(trainer)
    found = {
        "gradients": watch.gradients[0],
        "trailing": {} if case == "opo" else trainer.isopo.state_dict()["trailing"],
        "microbatches": watch.microbatches,
        "weights": watch.weights[-1],
        "scale": trainer._budget.optimizer.measured["scale"] if case == "opo" else None,
    }
    torch.save(found, folder / f"rank{trainer.args.process_index}.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
