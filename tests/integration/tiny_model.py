"""A tiny random Llama with a real tokenizer and chat template: small enough to load in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = (
    "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs! "
    "how vexingly quick daft zebras jump? 0123456789 à la carte, naïve façade — 你好 🙂\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END_TOKEN = "<|end|>"  # noqa: S105 - a token of the vocabulary
SPECIAL_TOKENS = ("<|bos|>", END_TOKEN, "<|system|>", "<|user|>", "<|assistant|>")


def make_tiny_model(  # noqa: PLR0913 - a builder: every part of a model has a default
    path: Path,
    *,
    vocab: int = 384,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    context_tokens: int = 512,
    tie_embeddings: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a Llama with random weights to `path` and return it; an existing one is kept.

    Args:
        path: Folder to write, as `save_pretrained` lays it out.
        vocab: Most tokens; the tokenizer is a byte-level BPE trained on a few sentences.
        hidden: Width; divisible by `heads`.
        layers: Decoder layers.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        context_tokens: Longest context.
        tie_embeddings: Whether the head is the embedding.
        dtype: Of the weights, torch's name.
        seed: Of the weights.
        **config: Further fields of `LlamaConfig`.
    """
    if (path / "config.json").exists():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(vocab)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context_tokens,
            tie_word_embeddings=tie_embeddings,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.3,  # wide, so that greedy choices are no near-ties
            **config,
        )
    ).to(getattr(torch, dtype))
    staged = path.with_name(path.name + ".part")
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    staged.rename(path)
    return path


def _tokenizer(vocab: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIAL_TOKENS[0], eos_token=END_TOKEN, pad_token=END_TOKEN
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
