"""ISOPO on a model of transformers, in a loop of one's own: sampling, reward, gradient, step.

    python examples/transformers_loop.py

It needs transformers beside torch. The model is made from a small configuration, without a
download; with a model of the hub only `make_policy` changes. Prompts have different lengths, so
that there is padding on the left, and completions end at an end token. The reward is the share of
even tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from proxstep import Isopo, completion_log_probs, sequence_ids

PAD, END, VOCAB = 0, 1, 16
PROMPTS, GENERATIONS, LENGTH = 8, 8, 6
SAMPLING = GenerationConfig(
    do_sample=True, max_new_tokens=LENGTH, eos_token_id=END, pad_token_id=PAD, top_k=0
)


def make_policy() -> Qwen3ForCausalLM:
    """Return a small random model."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=VOCAB, max_position_embeddings=32, **sizes, **heads)
    return Qwen3ForCausalLM(config)


def draw_prompts() -> Tensor:
    """Return padded prompts of two to four tokens, each repeated for its completions."""
    prompts = torch.randint(2, VOCAB, (PROMPTS, 4))
    num_padding = torch.randint(0, 3, (PROMPTS, 1))
    prompts[torch.arange(4) < num_padding] = PAD
    return prompts.repeat_interleave(GENERATIONS, dim=0)


def masks_of(tokens: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
    """Return where there is no padding, and where the policy chose: up to the end token."""
    ended = (tokens[:, prompt_length:] == END).cumsum(dim=1)
    chosen = torch.zeros_like(tokens).bool()
    chosen[:, prompt_length:] = (ended == 0) | ((ended == 1) & (tokens[:, prompt_length:] == END))
    attention_mask = chosen.clone()
    attention_mask[:, :prompt_length] = tokens[:, :prompt_length] != PAD
    return attention_mask, chosen


def main() -> None:
    """Train, and print the reward as it rises."""
    torch.manual_seed(0)
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    isopo = Isopo(policy, rule="isopo")
    for step in range(31):
        prompts = draw_prompts()
        tokens = policy.generate(prompts, attention_mask=prompts != PAD, generation_config=SAMPLING)
        attention_mask, completion_mask = masks_of(tokens, prompts.shape[1])
        reward = ((tokens % 2 == 0) & completion_mask).sum(dim=1) / LENGTH
        if step % 10 == 0:
            print(f"step {step}: reward {reward.mean():.3f}")
        group = reward.view(PROMPTS, GENERATIONS)
        advantages = (group - group.mean(dim=1, keepdim=True)).flatten()
        optimizer.zero_grad()
        ids = sequence_ids(attention_mask)
        with isopo.microbatch(ids, advantages / len(advantages)) as microbatch:
            logits = policy(tokens, attention_mask=attention_mask.long()).logits
            log_probs = completion_log_probs(logits, tokens, completion_mask)
            microbatch.objective(log_probs).backward()
        optimizer.step()
        isopo.step()


if __name__ == "__main__":
    main()
