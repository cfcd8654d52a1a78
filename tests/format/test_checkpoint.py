"""Hugging Face checkpoints: what others write we read, what we write others read, and a hostile folder is refused."""

import errno
import json
import mmap
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import model, served, table
from safetensors.torch import load_file, save_file
from strategies import versions

from deltawire.errors import AccessRefused, FormatError, NotFound, OutOfSpace, TooLarge, Truncated
from deltawire.format import checkpoint
from deltawire.format.checkpoint import INDEX, SINGLE, Checkpoint
from deltawire.weights.bits import Bits, zeros
from deltawire.weights.tensors import as_torch, equal


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@given(versions(1), st.sampled_from([1, 100, 1 << 40]))
def test_weights_of_every_dtype_come_back_from_any_number_of_shards(tmp_path_factory, chain, shard_bytes):
    folder, weights = tmp_path_factory.mktemp("checkpoint"), chain[0]
    written = checkpoint.write(folder, table(weights), weights, shard_bytes=shard_bytes)
    assert sorted(written) == sorted(folder.iterdir())
    assert equal(dict(Checkpoint(folder)), weights)


@pytest.mark.parametrize("shard_bytes", [300, 1 << 40])
def test_safetensors_reads_what_we_write(tmp_path, shard_bytes):
    weights = served(model())
    checkpoint.write(tmp_path, table(weights), weights, shard_bytes=shard_bytes)
    loaded = {}
    for name in checkpoint.shard_names(tmp_path):
        loaded |= load_file(tmp_path / name)
    assert (len(checkpoint.shard_names(tmp_path)) > 1) == (shard_bytes == 300)
    assert equal(loaded, weights)


def test_we_read_what_safetensors_writes(tmp_path):
    weights = {name: as_torch(bits) for name, bits in served(model()).items()}
    save_file(weights, tmp_path / SINGLE)
    assert equal(dict(Checkpoint(tmp_path)), weights)


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
def test_we_read_what_transformers_writes_and_transformers_what_we_write(tmp_path, shard_size):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    weights = Checkpoint(tmp_path / "theirs")
    assert equal(dict(weights), dict(theirs.named_parameters()))
    (tmp_path / "ours").mkdir()
    checkpoint.copy_assets(tmp_path / "theirs", tmp_path / "ours")
    checkpoint.write(
        tmp_path / "ours", table(weights), weights, shard_bytes=10_000 if shard_size == "20KB" else 1 << 40
    )
    ours = Qwen3ForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_writing_a_tensor_of_a_writable_checkpoint_writes_the_file(tmp_path):
    weights = served(model())
    checkpoint.write(tmp_path, table(weights), weights, shard_bytes=300)
    opened = Checkpoint(tmp_path, writable=True)
    opened["norm"].data[3] = 0xABCD
    opened.flush()
    assert Checkpoint(tmp_path)["norm"].data[3] == 0xABCD
    with pytest.raises(ValueError, match="read-only"):
        Checkpoint(tmp_path)["norm"].data[3] = 0


def test_a_checkpoint_without_tensors_is_one_file(tmp_path):
    assert checkpoint.write(tmp_path, (), {}) == [tmp_path / SINGLE]
    assert len(Checkpoint(tmp_path)) == 0


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(NotFound, match="not a safetensors checkpoint"):
        Checkpoint(tmp_path)
    with pytest.raises(NotFound, match="not a safetensors checkpoint"):
        Checkpoint(tmp_path / "missing")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/dir.safetensors",
        "a\\b.safetensors",
        "nul\0.safetensors",
        "..",
        "",
        "weights.bin",
        "model.safetensors.py",
        "x" * 300 + ".safetensors",
    ],
)
def test_an_index_that_names_anything_but_a_shard_in_its_folder_is_refused(tmp_path, name):
    write_index(tmp_path, {"w": name})
    with pytest.raises(FormatError, match="outside the folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": {"w": 1}}',
        b'{"weight_map": {"w": 1, "v": "x.safetensors"}}',
        b'{"weight_map": {"w": ["x.safetensors"]}}',
        b'{"weight_map": {}}',
        b'{"weight_map": "\xff"}',
        b'{"weight_map": ' + b"[" * 200_000,
        b'{"weight_map": {"w": ' + b"9" * 5000 + b"}}",
    ],
    ids=lambda text: text[:40].decode(errors="replace"),
)
def test_a_malformed_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(FormatError, match=INDEX):
        Checkpoint(tmp_path)


def test_an_index_beyond_the_bound_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(checkpoint.MAX_INDEX + 1)
    with pytest.raises(TooLarge, match="67,108,865 bytes"):
        Checkpoint(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path):
    weights = served(model())
    checkpoint.write(tmp_path, table(weights), weights)
    write_index(tmp_path, {"norm": SINGLE, "lost": SINGLE})
    with pytest.raises(FormatError, match="lacks 'lost'"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, {"w": "model-00001-of-00002.safetensors"})
    with pytest.raises(NotFound, match=r"model-00001-of-00002.*download the checkpoint again"):
        Checkpoint(tmp_path)


def test_a_name_in_two_shards_is_refused(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(3), "v": torch.zeros(3)}, tmp_path / "b.safetensors")
    write_index(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"})
    with pytest.raises(FormatError, match="'w' stands in two shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(("keep", "kind"), [(0, Truncated), (5, Truncated), (100, Truncated), (-1, Truncated)])
def test_a_damaged_shard_is_named(tmp_path, keep, kind):
    weights = served(model())
    checkpoint.write(tmp_path, table(weights), weights)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:keep])
    with pytest.raises(kind, match=str(tmp_path / SINGLE)):
        Checkpoint(tmp_path)


def test_a_shard_whose_tensors_are_not_aligned_is_read_and_written_in_place(tmp_path):
    entry = {"dtype": "BF16", "shape": [5], "data_offsets": [1, 11]}
    header = json.dumps({"odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": entry}).encode()
    header += b" " * (len(header) % 2)
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\7" + bytes(range(10)))
    opened = Checkpoint(tmp_path, writable=True)
    assert not opened["w"].data.flags.aligned
    assert opened["w"].data.tolist() == [0x0100, 0x0302, 0x0504, 0x0706, 0x0908]
    opened["w"].data[0] = 1
    opened.flush()
    assert Checkpoint(tmp_path)["w"] == Bits("BF16", (5,), np.array([1, 0x0302, 0x0504, 0x0706, 0x0908], np.uint16))


def test_only_weights_and_assets_belong_to_a_checkpoint(tmp_path):
    weights = served(model())
    checkpoint.write(tmp_path, table(weights), weights, shard_bytes=300)
    own = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "folder.json").mkdir()
    for name in ("config.json", "pytorch_model.bin", "consolidated.safetensors", "optimizer.pt", ".x.json", "run.py"):
        (tmp_path / name).write_text("{}")
    assert {path.name for path in checkpoint.files(tmp_path)} == own | {"config.json"}


def test_copies_of_read_only_files_can_be_written(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "copies"
    for path in (source, folder):
        path.mkdir()
    (source / "config.json").write_text("{}")
    (source / "config.json").chmod(0o444)
    (copied,) = checkpoint.copy_assets(source, folder)
    assert copied.stat().st_mode & 0o200


def test_a_full_disk_is_out_of_space_and_names_the_file(tmp_path, monkeypatch):
    weights = served(model())

    def full(*anything, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.container, "header_bytes", full)
        with pytest.raises(OutOfSpace, match=r"model\.safetensors: No space left on device; free some space"):
            checkpoint.write(tmp_path, table(weights), weights)
    checkpoint.write(tmp_path, table(weights), weights)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "copyfile", full)
        with pytest.raises(OutOfSpace, match=r"model\.safetensors"):
            checkpoint.copy(checkpoint.files(tmp_path), tmp_path)
    opened = Checkpoint(tmp_path, writable=True)
    with monkeypatch.context() as patch:
        patch.setattr(np.memmap, "flush", full)
        with pytest.raises(OutOfSpace, match=r"model\.safetensors"):
            opened.flush()


def test_a_folder_that_refuses_us_is_access_refused(tmp_path, monkeypatch):
    def refuse(*anything, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    checkpoint.write(tmp_path, table({}), {})
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(AccessRefused, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_opening_a_checkpoint_reads_no_tensor(tmp_path):
    """A sparse file of 64 GB opens at once."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 36], "data_offsets": [0, 1 << 36]}}).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 36))
    bits = Checkpoint(tmp_path)["w"]
    assert bits.data[1 << 35] == 0
    assert zeros("U8", (4,)).data.tolist() == bits.data[-4:].tolist()
