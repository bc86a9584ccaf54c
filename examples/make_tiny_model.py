"""A language model without a download: 0.1 million random weights over characters.

    python examples/make_tiny_model.py tiny-model

The folder can stand wherever a model's name can (`--model.name ./tiny-model`). It knows nothing,
so it is for trying a reward, a table or a script, and for tests.
"""

from __future__ import annotations

import string
import sys

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ALPHABET = string.digits + string.ascii_lowercase + " +-*=.,:?"


def tiny_model() -> tuple[PreTrainedTokenizerFast, Qwen3ForCausalLM]:
    """Return a tokenizer of characters and a random model of its vocabulary."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", "<other>", *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<other>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary["<end>"],
        pad_token_id=vocabulary["<pad>"],
        **sizes,
        **heads,
    )
    torch.manual_seed(0)
    return tokenizer, Qwen3ForCausalLM(config)


def main() -> None:
    """Write the model's folder."""
    folder = sys.argv[1]
    for part in tiny_model():
        part.save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
