"""How many positions, drawn how, give the Fisher norms and the gradient that all positions give?

    python experiments/sampled_positions.py MODEL_FOLDER --json experiments/sampled_positions.json

A policy writes 4 completions to each of the prompts. The first half of them is the step before, of
whose positions K are drawn; the second half is measured on them, as `overlap_source: previous_step`
does, and weighted by p = -1 with random centered coefficients. Ways to draw: "even"; "stratified",
the same number of each sequence's positions; "shared", with probabilities in proportion to the mean
over parameters of a position's share of sum |G_t|^2; and "weighted", for each parameter in
proportion to its own |G_t|^2, which is the library's. The last two use the weights of priority
sampling. Reported per way and K, averaged over parameters and draws: |gradient - that from all
positions| over the latter's length, and the standard deviation over sequences of log(F / F_all).

Legend for shape suffixes: B sequences, T token positions, K sampled ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.shared import stamp

from proxstep.isopo import Isopo
from proxstep.isopo.hooks import PositionGradients
from proxstep.isopo.linear import OuterGradients
from proxstep.isopo.plan import Memory, make_layout
from proxstep.logprobs.tokens import token_log_probs
from proxstep.tasks import arithmetic_task

STORIES = (
    "Tom has 3 apples and buys 4 bags of 5. Ann eats 2 of them. How many apples are left?",
    "Tom has 12 apples and buys 2 bags of 6. His brother eats 7 of them. How many apples are left?",
    "Tom has 8 apples and buys 3 bags of 3. A horse eats 4 of them. How many apples are left?",
    "Tom has 5 apples and buys 5 bags of 4. Maria eats 9 of them. How many apples are left?",
)
WAYS = ("even", "stratified", "shared", "weighted")
SIZES = (8, 16, 24, 32, 48, 64, 128, 250)
NUM_GENERATIONS, NUM_COEFFICIENTS = 4, 4


class Products(NamedTuple):
    """One parameter's <G_t, G_b> with t of the first half or the second, |G_t|^2 of the first."""

    before_TB: Tensor
    own_TB: Tensor
    square_T: Tensor


class Batch(NamedTuple):
    """All of it, and the sequence of each position of either half, -1 for none."""

    products: dict[str, Products]
    before_T: Tensor
    own_T: Tensor


def products_of(policy: nn.Module, tokenizer: Any, prompts: list[str], num_tokens: int) -> Batch:
    """Sample completions, and return all inner products, of one backward pass."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.chat_template:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    repeated = [prompt for prompt in prompts for _ in range(NUM_GENERATIONS)]
    inputs = tokenizer(repeated, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        token_BT = policy.generate(**inputs, do_sample=True, max_new_tokens=num_tokens)  # type: ignore[operator]
    width = inputs["input_ids"].shape[1]
    ended_BT = (token_BT[:, width:] == tokenizer.eos_token_id).cumsum(1)
    response_BT = torch.zeros_like(token_BT).bool()
    response_BT[:, width:] = ended_BT.cumsum(1) <= 1
    used_BT = response_BT.clone()
    used_BT[:, :width] = inputs["attention_mask"].bool()
    ids_BT = torch.arange(len(used_BT))[:, None].expand_as(token_BT).masked_fill(~used_BT, -1)
    half = len(token_BT) // 2
    own_BT = torch.where(ids_BT[half:] < 0, -1, ids_BT[half:] - half)
    found = _inner_products(policy, token_BT, response_BT, ids_BT, own_BT)
    return Batch(found, ids_BT[:half].reshape(-1), own_BT.reshape(-1))


def _inner_products(
    policy: nn.Module, token_BT: Tensor, response_BT: Tensor, ids_BT: Tensor, own_BT: Tensor
) -> dict[str, Products]:
    layout, found = make_layout(own_BT, len(own_BT)), {}
    isopo, used_BT = Isopo(policy, "reinforce"), ids_BT >= 0
    with isopo.microbatch(ids_BT, torch.ones(len(ids_BT))) as microbatch:

        def keep(key: str, every: PositionGradients) -> Tensor:
            first_T, second_T = torch.arange(every.num_rows).chunk(2)
            before, own = every.at(first_T), every.at(second_T)
            if isinstance(own, OuterGradients):
                assert isinstance(before, OuterGradients)
                cross = [own.cross(part, layout, Memory()) for part in (before, own)]
            else:
                sums = own.sums(layout)
                cross = [sums.cross(part) for part in (before, own)]
            found[key] = Products(cross[0].detach(), cross[1].detach(), before.squares().detach())
            return every.contract(torch.zeros(every.num_rows))

        microbatch.reduce = keep
        position_BT = (used_BT.long().cumsum(1) - 1).clamp(min=0)
        out = policy(
            input_ids=token_BT,
            attention_mask=used_BT.long(),
            position_ids=position_BT,
            use_cache=False,
        )
        log_prob_BT = token_log_probs(out.logits[:, :-1], token_BT[:, 1:])
        microbatch.objective(log_prob_BT, response_BT[:, 1:]).backward()
    isopo.remove()
    return found


def draw(
    way: str, weight_T: Tensor, sequence_T: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return K positions, and how many each of them stands for."""
    candidate_T = (sequence_T >= 0).nonzero().squeeze(1)
    random_T = torch.rand(len(sequence_T), generator=generator, dtype=torch.float64)
    if way in ("even", "stratified"):
        if way == "stratified":
            for sequence in range(int(sequence_T.max()) + 1):
                at = (sequence_T == sequence).nonzero().squeeze(1)
                place = torch.randperm(len(at), generator=generator)
                random_T[at] = (place + random_T[at[0]]) / len(at)
        order = random_T[candidate_T].argsort()[:count]
        return candidate_T[order], torch.ones(len(order))
    weight_T = weight_T[candidate_T].double() + 1e-300
    priority, index = (random_T[candidate_T] / weight_T).topk(
        min(count, len(candidate_T)), largest=False
    )
    stands_K = (weight_T[index] * priority[-1]).clamp(max=1).reciprocal()
    stands_K[-1] = 0.0
    return candidate_T[index], stands_K.float()


def errors(
    batch: Batch, way: str | None, count: int, generator: torch.Generator
) -> tuple[float, float]:
    """Return the gradient's and the norms' error; without a way those of plain REINFORCE."""
    used_T = batch.before_T >= 0
    shared_T = torch.stack(
        [p.square_T / p.square_T[used_T].sum().clamp(min=1e-30) for p in batch.products.values()]
    ).mean(0)
    shared = draw(way, shared_T, batch.before_T, count, generator) if way else None
    gradient, norms = [], []
    for p in batch.products.values():
        num = p.own_TB.shape[1]
        owner_TB = nn.functional.one_hot(batch.own_T.where(batch.own_T >= 0, num), num + 1)
        kernel_BB = owner_TB[:, :num].float().mT @ p.own_TB
        all_B = p.before_TB[used_T].square().sum(0) / p.square_T[used_T].sum().clamp(min=1e-30)
        exact_B = all_B.clamp(min=1e-30)
        found_B = None
        if way is not None and shared is not None:
            own = way == "weighted"
            index_K, stands_K = (
                draw(way, p.square_T, batch.before_T, count, generator) if own else shared
            )
            total = (stands_K * p.square_T[index_K]).sum().clamp(min=1e-30)
            found_B = (stands_K @ p.before_TB[index_K].square()) / total
            missing_B = found_B == 0
            mean = found_B.sum() / (~missing_B).sum().clamp(min=1)
            found_B = torch.where(missing_B, mean, found_B).clamp(min=1e-30)
            norms.append(((found_B / exact_B).log() / 2).std().item())
        for _ in range(NUM_COEFFICIENTS):
            coefficient_B = torch.randn(num, generator=generator)
            coefficient_B -= coefficient_B.mean()
            wanted_B = coefficient_B * (exact_B / exact_B.mean()).rsqrt()
            given_B = coefficient_B
            if found_B is not None:
                given_B = coefficient_B * (found_B / found_B.mean()).rsqrt()
            apart_B = given_B - wanted_B
            squares = [v @ kernel_BB @ v for v in (apart_B, wanted_B)]
            gradient.append((squares[0] / squares[1].clamp(min=1e-30)).clamp(min=0).sqrt().item())
    return sum(gradient) / len(gradient), sum(norms) / max(len(norms), 1)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder that from_pretrained loads")
    parser.add_argument("--name", help="what the rows call it; by default its folder's name")
    parser.add_argument("--json", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=56, help="of a completion, at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    start = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    policy = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    prompts = list(STORIES)
    if not tokenizer.chat_template:
        prompts = [str(problem.prompt) for problem in arithmetic_task(3).train[:32]]
    batch = products_of(policy, tokenizer, prompts, arguments.tokens)
    generator = torch.Generator().manual_seed(0)
    common = {
        "model": arguments.name or Path(arguments.model).name,
        "positions": int((batch.before_T >= 0).sum()),
        "sequences": int(batch.own_T.max()) + 1,
        "parameters": len(batch.products),
        "draws": arguments.draws,
    }
    rows, console = [], Console()
    for way, count in [(None, 0), *((way, count) for count in SIZES for way in WAYS)]:
        found = [errors(batch, way, count, generator) for _ in range(arguments.draws if way else 1)]
        gradient, norms = (sum(values) / len(values) for values in zip(*found, strict=True))
        rows.append(
            {
                **common,
                "way": way or "no scaling (REINFORCE)",
                "num_sampled": count,
                "gradient": round(gradient, 4),
                "log_fisher": round(norms, 4),
            }
        )
        console.print(rows[-1]["way"], count, rows[-1]["gradient"], rows[-1]["log_fisher"])
    before = json.loads(arguments.json.read_text())["rows"] if arguments.json.exists() else []
    kept = [row for row in before if row["model"] != common["model"]]
    report = {
        **stamp(),
        "rows": [*kept, *rows],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"{time.process_time() - start:.0f} s of processor time")


if __name__ == "__main__":
    main()
