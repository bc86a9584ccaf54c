"""What is measured between steps: the greedy validation score and how far the policy has drifted.

Legend for shape suffixes: B sequences, T token positions.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from proxstep.config.recipe import Recipe
from proxstep.logprobs.evaluating import evaluating
from proxstep.logprobs.tokens import entropy, kl_divergence, kl_estimate, widest_dtype
from proxstep.rewards import Narrowness, narrowness
from proxstep.rewards.pass_at_k import sampled_scores
from proxstep.runs.waiting import UNSEEN, Waits
from proxstep.training.generation import sample
from proxstep.training.prompts import Prompts
from proxstep.training.remembered import memory_of, recall, remember
from proxstep.training.rollout import (
    BY_TOKENS,
    Completions,
    Cut,
    Head,
    by_chunks,
    completion_log_probs,
    initial_policy,
    response_logits,
)
from proxstep.typing import Float, Tensor


@dataclass(frozen=True)
class GreedyResult:
    """Greedy completions of the validation prompts.

    Attributes:
        score: Mean of the first reward function.
        mean_length: Of the completions, in tokens.
        completions: Their texts.
        rewards: Each one's first reward; None where the function gave none.
        truncated: Whether each was cut off at the length limit.
        narrowness: How often the most frequent answer is given.
    """

    score: float
    mean_length: float
    completions: list[str]
    rewards: list[float | None]
    truncated: list[bool]
    narrowness: Narrowness

    @property
    def standard_error(self) -> float:
        """Of the score; NaN where fewer than two rewards are given, or one is not finite."""
        given = [reward for reward in self.rewards if reward is not None]
        if len(given) < 2 or not all(map(math.isfinite, given)):
            return math.nan
        return statistics.stdev(given) / len(given) ** 0.5

    @property
    def clipped_ratio(self) -> float:
        """Share of the completions cut off at the length limit."""
        return sum(self.truncated) / len(self.truncated)

    def metrics(self) -> dict[str, float]:
        """Return what a step's record holds of it."""
        return {
            "score": self.score,
            "score_standard_error": self.standard_error,
            "score_mean_length": self.mean_length,
            "score_clipped_ratio": self.clipped_ratio,
            "score_top_answer_share": self.narrowness.share,
            "score_no_answer_share": self.narrowness.without,
        }

    def rows(self, prompts: Prompts) -> list[dict[str, Any]]:
        """Return each completion with its prompt, answer and reward."""
        return [
            {
                "prompt": example.prompt,
                "completion": completion,
                "answer": example.answer,
                "reward": reward,
            }
            for example, completion, reward in zip(
                prompts.examples, self.completions, self.rewards, strict=True
            )
        ]


def truncation_note(clipped_ratio: float, limit: int) -> str | None:
    """Return what to say where more than half of the completions were cut off, else None."""
    if clipped_ratio <= 0.5:
        return None
    return (
        f"{clipped_ratio:.0%} of the completions were cut off at rollout.max_completion_length "
        f"{limit}, and what was cut off seldom has an answer: raise it, or ask for shorter answers "
        "(task.instruction)"
    )


def greedy_score(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    memory: Path | None = None,
    waits: Waits = UNSEEN,
) -> GreedyResult:
    """Complete every prompt greedily and grade the completions.

    `memory` is a file in which the completions may be kept, or will be; None for no such file.
    """
    rows = range(len(prompts))
    kept = recall(memory, len(prompts)) if memory else None
    texts, lengths, truncated = kept or _completed(
        *(model, tokenizer, prompts, rows, "greedy evaluation", waits, batch_size),
        max_new_tokens=max_new_tokens,
        greedy=True,
        stop=stop,
    )
    if memory and not kept:
        remember(memory, texts, lengths, truncated)
    rewards = _first_rewards(model, prompts, rows, texts, truncated)
    given = [reward for reward in rewards if reward is not None]
    score = sum(given) / len(given) if given else float("nan")
    narrow = narrowness(texts, [example.answer for example in prompts.examples], truncated)
    return GreedyResult(score, sum(lengths) / len(lengths), texts, rewards, truncated, narrow)


def sampled(
    recipe: Recipe, model: nn.Module, tokenizer: Any, prompts: Prompts, waits: Waits = UNSEEN
) -> dict[str, float]:
    """Return avg@n and pass@k of as many samples as a recipe asks for; nothing for none.

    The samples follow from the recipe's seed and `evaluation.batch_size`; torch's generator is set.
    """
    section = recipe.evaluation
    n = section.num_samples
    if n == 0:
        return {}
    torch.manual_seed(recipe.seed)
    rows = [row for row in range(len(prompts)) for _ in range(n)]
    texts, _, truncated = _completed(
        *(model, tokenizer, prompts, rows, f"{n} samples a prompt", waits, section.batch_size),
        max_new_tokens=recipe.rollout.max_completion_length,
        temperature=section.temperature,
        stop=recipe.rollout.stop or (),
    )
    rewards = _first_rewards(model, prompts, rows, texts, truncated)
    return sampled_scores([rewards[i : i + n] for i in range(0, len(rewards), n)])


def _first_rewards(
    model: nn.Module,
    prompts: Prompts,
    rows: Sequence[int],
    texts: Sequence[str],
    truncated: Sequence[bool],
) -> list[float | None]:
    """Return the first reward function's rewards, which compute as they always do."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        table = prompts.grade(rows, texts, truncated)
    return next(iter(table.per_function.values()))


def _completed(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    rows: Sequence[int],
    what: str,
    waits: Waits,
    batch_size: int,
    **options: Any,
) -> tuple[list[str], list[int], list[bool]]:
    """Complete prompts as `sample` does with the options, `batch_size` at a time.

    Returns:
        The texts, their lengths in tokens, and which were cut off at the length limit.
    """
    texts: list[str] = []
    lengths: list[int] = []
    truncated: list[bool] = []
    limit = options["max_new_tokens"]
    with waits.wait(what, len(rows), "completions") as wait:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            with _forwards(model, lambda n, s=start, p=part: wait.advance(s + len(p) * n / limit)):
                prompt_tokens = [prompts.tokens(i) for i in part]
                completions = sample(model, tokenizer, prompt_tokens, **options)
            texts += completions.texts(tokenizer)
            lengths += completions.lengths().tolist()
            truncated += completions.truncated_B.tolist()
            wait.advance(len(texts))
    return texts, lengths, truncated


@contextmanager
def _forwards(model: nn.Module, tell: Callable[[int], None]) -> Iterator[None]:
    """Tell how many forward passes were made inside, one for each new token of a batch."""
    passes = itertools.count(1)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda *_: tell(next(passes)))
    try:
        yield
    finally:
        handle.remove()


def evaluate(
    recipe: Recipe,
    model: nn.Module,
    initial: nn.Module | None,
    tokenizer: Any,
    validation: Prompts,
    probe: Probe | None,
    waits: Waits = UNSEEN,
) -> tuple[dict[str, float], list[dict[str, Any]], Probe]:
    """Measure a policy as a recipe says; torch's generator starts at the recipe's seed.

    `initial` is the initial policy, or None for a model whose adapters can be switched off; `probe`
    is what it sampled, or None where the policy is still the initial one.

    Returns:
        The metrics, the completions to keep (their step left out), and the probe.
    """
    section, limit = recipe.evaluation, recipe.rollout.max_completion_length
    stop = recipe.rollout.stop or ()
    count = min(section.num_probe_prompts, len(validation))
    prompts = [validation.tokens(row) for row in range(count)]
    head, cut = recipe.model.head, Cut.of(recipe.update)
    torch.manual_seed(recipe.seed)
    memory = None
    if probe is None:
        with waits.wait("sampling the initial policy's probe"):
            probe = Probe.draw(model, tokenizer, prompts, limit, head, cut, stop)
        if section.remember_first:
            memory = memory_of(model, tokenizer, validation, limit, section.batch_size, stop)
    greedy = greedy_score(
        *(model, tokenizer, validation),
        max_new_tokens=limit,
        batch_size=section.batch_size,
        stop=stop,
        memory=memory,
        waits=waits,
    )
    measured = {
        **greedy.metrics(),
        "kl_initial_policy": probe.kl(model, head, cut),
    }
    if section.kl_policy_initial:
        drift = drift_from_initial(
            model,
            initial,
            tokenizer,
            prompts,
            limit,
            cut if head == "full" else Cut(size=1),
            stop=stop,
        )
        measured |= drift._asdict()
    scores = sampled(recipe, model, tokenizer, validation, waits)
    measured |= {f"score_{name}": value for name, value in scores.items()}
    return measured, greedy.rows(validation)[: recipe.logging.num_samples], probe


@dataclass(frozen=True)
class Probe:
    """Completions that the initial policy sampled once, with their log-probabilities under it.

    Measures KL(initial || policy) with one forward pass and without the initial weights.
    """

    completions: Completions
    initial_log_prob_BT: Float[Tensor, "batch tokens"]

    @classmethod
    def draw(
        cls,
        model: nn.Module,
        tokenizer: Any,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        head: Head = "full",
        cut: Cut = BY_TOKENS,
        stop: Sequence[str] = (),
    ) -> Probe:
        """Sample one completion for each prompt at temperature 1."""
        completions = sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop=stop)
        log_prob_BT = completion_log_probs(model, completions, 1.0, cut, head)
        return cls(completions, log_prob_BT)

    def kl(self, model: nn.Module, head: Head = "full", cut: Cut = BY_TOKENS) -> float:
        """Return KL(initial || policy) in nats per token."""
        log_prob_BT = completion_log_probs(model, self.completions, 1.0, cut, head)
        kl_BT = kl_estimate(self.initial_log_prob_BT, log_prob_BT, "k3")
        return kl_BT[self.completions.response_BT[:, 1:]].mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors."""
        tensors = {k: v for k, v in vars(self.completions).items() if v is not None}
        return {**tensors, "initial_log_prob_BT": self.initial_log_prob_BT}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device) -> Probe:
        """Return the probe that `state_dict` described."""
        moved = {name: value.to(device) for name, value in state.items()}
        initial_log_prob_BT = moved.pop("initial_log_prob_BT")
        return cls(Completions(**moved), initial_log_prob_BT)


class Drift(NamedTuple):
    """What a policy's own samples say of it; nats per token, exact over the vocabulary.

    Attributes:
        kl_policy_initial: KL(policy || initial).
        evaluation_entropy: The policy's entropy.
    """

    kl_policy_initial: float
    evaluation_entropy: float


@torch.no_grad()
def drift_from_initial(
    model: nn.Module,
    initial: nn.Module | None,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    cut: Cut = BY_TOKENS,
    stop: Sequence[str] = (),
) -> Drift:
    """Return how far a policy is from the initial one, and its entropy.

    The policy samples one completion for each prompt at temperature 1; the logits of one microbatch
    of the cut exist at a time, of both policies. `initial` is as for `evaluate`.
    """
    completions = sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop=stop)
    kl = spread = 0.0
    with evaluating(model):
        for _, part in cut.parts(completions):
            first = part.first_column()
            logits = response_logits(model, part, 1.0, first)
            with initial_policy(model, initial) as policy:
                initial_logits = response_logits(policy, part, 1.0, first)
            counts_BT = part.response_BT[:, first:]
            kl_BT = by_chunks(kl_divergence, logits, initial_logits)
            digits = widest_dtype(kl_BT.device)
            kl += kl_BT[counts_BT].to(digits).sum().item()
            spread += by_chunks(entropy, logits)[counts_BT].to(digits).sum().item()
    num_tokens = int(completions.response_BT.sum())
    return Drift(kl / num_tokens, spread / num_tokens)
