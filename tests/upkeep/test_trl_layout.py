"""Runs as folders in the layout of TRL's post and back, and delta files applied by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from runs import chain_of_four, commits, publishing, read_weights
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from verbs import records, say

import deltawire as dw
from deltawire.errors import AlreadyExists, FormatError, Gap, NeedsBase, NotFound
from deltawire.format.checkpoint import Checkpoint
from deltawire.upkeep.applying import apply_files
from deltawire.upkeep.trl_layout import export_trl


@pytest.fixture
def trl_folder(tmp_path):
    """What the post's trainer writes: an anchor at step 10, two deltas, an anchor at 13, a delta; the last weights."""
    folder = tmp_path / "trl"
    rng = np.random.default_rng(0)
    weights = {
        "a.weight": rng.normal(size=(20, 5)).astype(np.float16),
        "b.weight": rng.normal(size=7).astype(np.float16),
    }
    for kind in ("anchors", "deltas"):
        (folder / kind).mkdir(parents=True)
    for step in range(10, 15):
        moved = weights["a.weight"].ravel()
        places = rng.choice(moved.size, 4, replace=False)
        moved[places] += np.float16(1)
        if step in (10, 13):
            save_file(
                weights,
                folder / f"anchors/step_{step:06d}.safetensors",
                {"sparse": "False", "model_version": str(step)},
            )
            continue
        places.sort()
        delta = {"a.weight.indices": places.astype(np.int32), "a.weight.values": moved[places]}
        told = {"sparse": "True", "model_version": str(step), "changed_params": '["a.weight"]'}
        save_file(delta, folder / f"deltas/step_{step:06d}.safetensors", told)
    return folder, weights


def test_a_folder_in_trls_layout_becomes_a_run_bit_for_bit(trl_folder, tmp_path):
    folder, last = trl_folder
    (report,) = records("import", folder, tmp_path / "bucket")
    assert (report["files"], report["position"]["version"]) == (5, 4)
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri())
    assert [commit.step for commit in commits(bucket)] == [10, 11, 12, 13, 14]
    held = read_weights(bucket)
    assert {name: bits.data.tolist() for name, bits in held.items()} == {
        name: tensor.ravel().view(np.uint16).tolist() for name, tensor in last.items()
    }


def test_a_folder_is_not_imported_onto_another_run(trl_folder, tmp_path):
    say("import", trl_folder[0], tmp_path / "bucket")
    with pytest.raises(AlreadyExists, match="bucket of its own"):
        say("import", trl_folder[0], tmp_path / "bucket")
    assert len(commits(dw.open_bucket((tmp_path / "bucket").as_uri()))) == 5


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda folder: (folder / "deltas/step_000011.safetensors").unlink(), Gap, "continues step 11.* of step 10"),
        (lambda folder: [path.unlink() for path in (folder / "anchors").iterdir()], NotFound, "TRL's layout"),
        (lambda folder: (folder / "deltas/step_000011.safetensors").write_bytes(b"x"), FormatError, "safetensors"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(trl_folder, tmp_path, spoil, error, said):
    folder, _ = trl_folder
    spoil(folder)
    with pytest.raises(error, match=said):
        say("import", folder, tmp_path / "bucket")


def test_a_run_becomes_a_folder_that_the_posts_reader_reads(tmp_path):
    bucket, weights = chain_of_four()
    with dw.Subscriber(bucket) as subscriber:
        report = export_trl(subscriber, tmp_path / "out", anchor_every=3)
    assert (report.first, report.last, report.anchors, report.deltas) == (0, 3, 2, 2)
    held = _as_the_post_reads(tmp_path / "out", [0, 1, 2])
    assert {name: tensor.ravel().tolist() for name, tensor in held.items()} == {
        name: bits.data.tolist() for name, bits in weights[2].items()
    }


def _as_the_post_reads(folder: Path, steps: list[int]) -> dict[str, np.ndarray]:
    """An anchor, then indices and values over it; bf16 as its bits."""
    import torch

    held: dict[str, torch.Tensor] = {}
    for step in steps:
        (path,) = folder.glob(f"*/step_{step:06d}.safetensors")
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            assert told["model_version"] == str(step)
            if told["sparse"] == "False":
                held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                continue
            for name in json.loads(told["changed_params"]):
                held[name].view(-1)[file.get_tensor(f"{name}.indices").long()] = file.get_tensor(f"{name}.values")
    return {name: tensor.contiguous().view(torch.uint16).numpy() for name, tensor in held.items()}


def test_there_and_back_is_the_same_run(tmp_path):
    bucket, weights = chain_of_four()
    url = (tmp_path / "again").as_uri()
    with dw.Subscriber(bucket) as subscriber:
        export_trl(subscriber, tmp_path / "out", anchor_every=2)
    say("import", tmp_path / "out", url)
    again = dw.open_bucket(url)
    assert [commit.root for commit in commits(again)] == [commit.root for commit in commits(bucket)]
    assert dw.equal(read_weights(again), weights[-1])
    say("export", url, tmp_path / "more", "--version", 1)
    with pytest.raises(AlreadyExists):
        say("export", url, tmp_path / "more")


@pytest.fixture
def published(tmp_path):
    """A folder bucket of four versions, version 0 and 3 as checkpoints, and the delta files between."""
    url = (tmp_path / "bucket").as_uri()
    weights = {"w": np.arange(100, dtype=np.float16)}
    with publishing(dw.open_bucket(url, create=True)) as publisher:
        for step in range(4):
            weights["w"][step] += 1
            publisher.publish(weights, step=step)
            publisher.flush(20)
    for version in (0, 3):
        say("materialize", url, tmp_path / str(version), "--version", version)
    return tmp_path, sorted((tmp_path / "bucket").glob("runs/*/deltas/*.safetensors"))


def test_delta_files_are_applied_in_order_and_taken_back(published):
    folder, deltas = published
    said = say("apply", folder / "0", *deltas, "--out", folder / "there")
    assert said.startswith("3 files applied: 3 changes")
    there = load_file(folder / "there" / "model.safetensors")
    assert (there["w"] == load_file(folder / "3" / "model.safetensors")["w"]).all()
    say("apply", folder / "3", *reversed(deltas), "--out", folder / "back", "--undo")
    back = load_file(folder / "back" / "model.safetensors")
    assert (back["w"] == load_file(folder / "0" / "model.safetensors")["w"]).all()


def test_a_file_that_does_not_continue_is_refused_and_nothing_is_left(published):
    folder, (first, second, _) = published
    for start, files in ((folder / "0", [second]), (folder / "3", [first])):
        with pytest.raises(Gap, match="and these weights are"):
            apply_files(start, files, folder / "out")
    absolute = dw.encode(dw.decode(first.read_bytes()), codec="raw", base=Checkpoint(folder / "0"))
    (folder / "raw").write_bytes(absolute)
    with pytest.raises(NeedsBase, match="cannot be taken back"):
        apply_files(folder / "0", [folder / "raw"], folder / "out", undo=True)
    assert not [path for path in folder.iterdir() if path.name.startswith((".out", "out"))]
    with pytest.raises(AlreadyExists):
        apply_files(folder / "0", [first], folder / "3")


def test_import_needs_no_deltas(tmp_path):
    (tmp_path / "trl/anchors").mkdir(parents=True)
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "trl/anchors/step_000007.safetensors")
    (report,) = records("import", tmp_path / "trl", (tmp_path / "bucket").as_uri())
    assert report["files"] == 1
