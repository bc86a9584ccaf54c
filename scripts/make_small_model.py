"""Make a small Qwen3-architecture model and its tokenizer from local data.

    python scripts/make_small_model.py gsm8k_train.jsonl --output small-gsm8k --steps 600

The tokenizer (byte-level BPE, with a chat template) is trained on the task's prompts and solutions,
the weights on its solutions for a few steps, so that completions have the right form and are now
and then correct. It is for trying the real data path end to end without a download, and for tests;
it does not know mathematics.
"""

from __future__ import annotations

import argparse
import time

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from proxstep.tasks import Example, gsm8k_task
from proxstep.training.demo_model import solution_loss
from proxstep.training.models import quiet_transformers

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int
) -> Qwen3ForCausalLM:
    """Return a random model that fits the tokenizer."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    return Qwen3ForCausalLM(config)


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example], steps: int
) -> None:
    """Take supervised steps on the reference solutions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30) * max(0.05, 1 - step / steps)
        rows = torch.randint(len(examples), (16,)).tolist()
        loss = solution_loss(model, tokenizer, [examples[row] for row in rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {loss.item():.3f} nats per token, {seconds:.0f} s")


def main() -> None:
    """Make the model and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", help="a JSONL or Parquet file with GSM8K's columns, question and answer"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=300, help="supervised steps (default: 300)")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=4)
    arguments = parser.parse_args()
    quiet_transformers()
    torch.manual_seed(0)
    examples = list(gsm8k_task(arguments.data, chat=True, num_validation=1).train)
    texts = [f"{example.prompt[0]['content']}\n{example.solution}" for example in examples]
    tokenizer = make_tokenizer(texts, arguments.vocab_size)
    model = make_model(tokenizer, arguments.hidden_size, arguments.num_layers)
    train(model, tokenizer, examples, arguments.steps)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {arguments.output}")


if __name__ == "__main__":
    main()
