"""Time of one ISOPO microbatch (forward and backward) over one of plain REINFORCE, in the same run.

    python benchmarks/overhead.py --json benchmarks/baselines/overhead-cpu.json

Both run on the same tied Qwen3-architecture model with random weights, interleaved; a row is the
median of the paired ratios with their quartiles. The forms are the simplest exact ones; making them
cheap is work that is still to come.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from proxstep import PRESETS, Isopo
from proxstep.metrics import token_log_probs
from proxstep.runfolder import describe_machine


def build(arguments: argparse.Namespace) -> nn.Module:
    """Return a tied model with random weights."""
    torch.manual_seed(0)
    size = arguments.hidden_size
    config = Qwen3Config(
        vocab_size=arguments.vocab_size,
        hidden_size=size,
        intermediate_size=3 * size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=size // 64,
        num_key_value_heads=max(size // 128, 1),
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).to(arguments.device)


def summed_log_probs(model: nn.Module, token: torch.Tensor) -> torch.Tensor:
    """Return the sum of the second half's log-probabilities: the first half is the prompt."""
    logits = model(input_ids=token, use_cache=False).logits
    log_prob = token_log_probs(logits[:, :-1], token[:, 1:])
    return log_prob[:, token.shape[1] // 2 :].sum()


def timed(step, device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return each preset's ratios."""
    device = torch.device(arguments.device)
    plain = build(arguments)
    shape = (arguments.num_sequences, arguments.length)
    token = torch.randint(arguments.vocab_size, shape, device=device)
    ids = torch.arange(shape[0], device=device)[:, None].expand(shape)
    coefficient = torch.randn(shape[0], device=device)

    def reinforce() -> None:
        plain.zero_grad()
        logits = plain(input_ids=token, use_cache=False).logits
        log_prob = token_log_probs(logits[:, :-1], token[:, 1:])[:, shape[1] // 2 :]
        (-coefficient[:, None] * log_prob).sum().backward()

    rows = {}
    for rule in PRESETS:
        model = copy.deepcopy(plain)
        isopo = Isopo(model, rule, num_overlap_positions=arguments.num_overlap_positions)

        def transformed(model: nn.Module = model, isopo: Isopo = isopo) -> None:
            model.zero_grad()
            with isopo.microbatch(ids, coefficient):
                summed_log_probs(model, token).backward()
            isopo.step()

        reinforce()
        transformed()
        pairs = [
            (timed(transformed, device), timed(reinforce, device)) for _ in range(arguments.repeats)
        ]
        ratios = [ours / theirs for ours, theirs in pairs]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[rule] = {
            "ratio": median,
            "lower_quartile": low,
            "upper_quartile": high,
            "reinforce_seconds": statistics.median(theirs for _, theirs in pairs),
        }
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--num-sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--num-overlap-positions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments)
    table = Table(title="forward + backward, ISOPO / REINFORCE", box=None)
    for heading in ("rule", "ratio", "quartiles"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for rule, row in rows.items():
        quartiles = f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}"
        table.add_row(rule, f"{row['ratio']:.2f}", quartiles)
    Console().print(table)
    if arguments.json:
        setting = {name: value for name, value in vars(arguments).items() if name != "json"}
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(torch.device(arguments.device)),
            "torch": torch.__version__,
            "setting": setting,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
