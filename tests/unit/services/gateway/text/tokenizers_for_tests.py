"""Small real tokenizers of the two families: byte-level BPE and sentencepiece-like BPE with byte fallback."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

EOS = "<|end|>"


def byte_level(*, merges: bool = True) -> Tokenizer:
    """Return a byte-level tokenizer with a few merges and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©")] if merges else []
    names = alphabet + [left + right for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False, normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Return a tokenizer as Llama 2 has it: U+2581 for spaces, `<0xNN>` for unknown bytes."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", *"abcdehlorw", "▁h", "el", "lo", "▁hel", "▁hello", "�"]
    pairs = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁h", "el"), ("▁hel", "lo")]
    names = ["<unk>", *byte_tokens, *letters]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=pairs,
            unk_token="<unk>",  # noqa: S106 - a name in a vocabulary
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return tokenizer
