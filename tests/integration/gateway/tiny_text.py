"""A tiny real tokenizer: every byte a token, three special tokens, a chat template."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('this model knows no tools') }}{% endif %}"
    "{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer: ids 0-255 are bytes in GPT-2's order, 256 BOS, 257 EOS, 258 padding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (BOS, EOS, "<|pad|>")])
    return tokenizer


def tiny_files(*, template: str | None = TEMPLATE) -> dict[str, bytes]:
    """Return the small files of a tiny model."""
    config = {"bos_token": BOS, "eos_token": EOS} | ({"chat_template": template} if template else {})
    return {
        "tokenizer.json": tiny_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [257], "top_k": 40}).encode(),
        "config.json": json.dumps({"architectures": ["TinyForCausalLM"]}).encode(),
    }
