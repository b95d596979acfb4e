"""Claims about GGUF: weights, configuration, tokenizer and chat template come over through transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.checkpoint.convert import convert
from stoker.errors import AlreadyExists, CheckpointInvalid, InvalidRequest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "Ċ"]
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
EMBEDDING = np.arange(8 * 32, dtype=np.float32).reshape(8, 32)


def write_gguf(path: Path) -> Path:
    """Write a Llama of one layer and eight tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(2)
    shapes = {
        "blk.0.attn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.ffn_gate.weight": (32, 32),
        "blk.0.ffn_up.weight": (32, 32),
        "blk.0.ffn_down.weight": (32, 32),
        "output_norm.weight": (32,),
    }
    writer.add_tensor("token_embd.weight", EMBEDDING)
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted GGUF."""
    root = tmp_path_factory.mktemp("gguf")
    return convert(write_gguf(root / "tiny.gguf"), root / "dst").path


def test_the_folder_has_all_that_a_model_needs(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    generation = json.loads((converted / "generation_config.json").read_text())

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (converted / "chat_template.jinja").read_text() == TEMPLATE


def test_the_tokenizer_is_the_ggufs(converted: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)

    assert tokenizer.eos_token_id == TOKENS.index("<|im_end|>")
    assert tokenizer.encode("<|im_start|>ab<|im_end|>", add_special_tokens=False) == [1, 5, 2]


def test_the_weights_are_the_ggufs(converted: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)

    assert not info["missing_keys"]
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), EMBEDDING)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_folder_with_one_gguf_is_that_gguf_and_nothing_is_converted_twice(
    converted: Path, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "copy.gguf").rename(tmp_path / "tiny.gguf")

    index = convert(tmp_path, converted)

    assert index.path == converted
    with pytest.raises(AlreadyExists):
        convert(tmp_path, converted, dtype="bfloat16")


def test_a_folder_with_several_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")

    with pytest.raises(InvalidRequest, match=r"a\.gguf, b\.gguf"):
        convert(tmp_path, tmp_path / "dst")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_damaged_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)

    with pytest.raises(CheckpointInvalid, match="GGUF"):
        convert(tmp_path / "x.gguf", tmp_path / "dst")
