"""Any version as a checkpoint folder: bit for bit, loadable by others, there whole or not there at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc

import numpy as np
import pytest
import torch
from programs import program
from runs import (
    PATIENCE,
    chain_of_four,
    edit,
    fresh,
    model,
    payload_key,
    position,
    publish_all,
    publishing,
    served,
    table,
)
from safetensors.torch import load_file

from deltawire import materialize, open_bucket
from deltawire.errors import AlreadyExists, BadDigest, Gap, NotFound, OutOfSpace
from deltawire.format import checkpoint
from deltawire.format.checkpoint import SINGLE, Checkpoint
from deltawire.read.mirror import MARKER, held
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import equal


@pytest.fixture
def chain():
    return chain_of_four()


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("server", ["BF16", "F16"])
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_masters_of_fp32_and_bf16_arrive_as_the_server_casts_them(master, server, tmp_path):
    bucket, weights = fresh(), {name: torch.from_numpy(tensor).to(master) for name, tensor in model().items()}
    holds = {"BF16": torch.bfloat16, "F16": torch.float16}[server]
    with publishing(bucket, dtype=server) as publisher:
        for version in range(3):
            publisher.publish(weights)
            publisher.flush(PATIENCE)
            materialize(bucket, tmp_path / "out")
            files = load_file(tmp_path / "out" / SINGLE)
            assert equal(files, {name: tensor.to(holds) for name, tensor in weights.items()})
            torch.manual_seed(version)
            weights = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in weights.items()}
    assert equal(dict(Checkpoint(tmp_path / "out")), files)


@pytest.mark.parametrize("version", [0, 1, 2, 3, None])
def test_every_version_is_written_bit_for_bit(chain, tmp_path, version):
    bucket, expected = chain
    report = materialize(bucket, tmp_path / "out", version)
    assert equal(dict(Checkpoint(tmp_path / "out")), expected[3 if version is None else version])
    assert equal(load_file(tmp_path / "out" / SINGLE), expected[3 if version is None else version])
    assert report.position == position(bucket, 3 if version is None else version)
    assert report.deltas == report.position.version
    assert report.fetched_bytes >= report.deltas > -1
    assert held(tmp_path / "out") == report.position
    assert leftovers(tmp_path) == ["out"]


def test_an_older_version_is_not_built_on_a_newer_anchor(chain, tmp_path):
    bucket, expected = chain
    with Compactor(bucket, tmp_path / "mirror", anchors=1) as compactor:
        assert [report.version for report in compactor.step()] == [3]
    for version in (0, 1, 2, 3):
        materialize(bucket, tmp_path / f"v{version}", version)
        assert equal(dict(Checkpoint(tmp_path / f"v{version}")), expected[version])


def test_torch_loads_what_was_trained(tmp_path):
    bucket, layer = fresh(), torch.nn.Linear(8, 4)
    with publishing(bucket) as pub:
        for _ in range(3):
            with torch.no_grad():
                layer.weight += 0.01
            pub.publish(layer.named_parameters())
            pub.flush(timeout=PATIENCE)
    materialize(bucket, str(tmp_path / "out"))
    loaded = load_file(tmp_path / "out" / SINGLE)
    assert equal(loaded, {name: tensor.to(torch.bfloat16) for name, tensor in layer.named_parameters()})


def test_transformers_loads_a_materialized_version_of_a_run_on_a_sharded_base(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    policy = Qwen3ForCausalLM(config).to(torch.bfloat16)
    policy.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(b"the same weights again, in another layout")
    bucket = fresh()
    with publishing(bucket, base=tmp_path / "base") as pub:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        pub.publish(policy.named_parameters())
    materialize(bucket, tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert equal(dict(loaded.named_parameters()), dict(policy.named_parameters()))
    policy.save_pretrained(tmp_path / "straight")
    straight = Qwen3ForCausalLM.from_pretrained(tmp_path / "straight", dtype=torch.bfloat16)
    tokens = torch.arange(10).reshape(1, 10)
    assert torch.equal(loaded(tokens).logits, straight(tokens).logits)


def test_the_base_itself_is_never_written(tmp_path):
    weights, bucket = model(), fresh()
    (tmp_path / "base").mkdir()
    (file,) = checkpoint.write(tmp_path / "base", table(served(weights)), served(weights))
    file.chmod(0o444)
    before = file.read_bytes()
    edit(weights, 1)
    publish_all(bucket, weights, base=tmp_path / "base")
    materialize(bucket, tmp_path / "out", base=tmp_path / "base")
    assert file.read_bytes() == before
    assert equal(dict(Checkpoint(tmp_path / "out")), served(weights))


def test_a_folder_that_holds_the_version_is_left_as_it_is(chain, tmp_path):
    bucket, _ = chain
    materialize(bucket, tmp_path / "out")
    bucket.delete(payload_key(bucket, 0))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = materialize(bucket, tmp_path / "out")
    assert (again.deltas, again.fetched_bytes) == (0, 0)
    assert again.position == position(bucket, 3)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_that_holds_anything_else_is_refused_and_left_alone(chain, tmp_path):
    bucket, _ = chain
    other, _ = chain_of_four()
    materialize(other, tmp_path / "older", 1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("older", "foreign", "file"):
        with pytest.raises(AlreadyExists, match=f"{name} exists and does not hold .*:3; name another folder"):
            materialize(bucket, tmp_path / name)
    assert held(tmp_path / "older") == position(other, 1)
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert leftovers(tmp_path) == ["file", "foreign", "older"]


def test_a_folder_that_holds_another_version_of_the_run_is_moved_either_way_by_the_deltas_between(chain, tmp_path):
    bucket, expected = chain
    materialize(bucket, tmp_path / "out", 1)
    anchor = payload_key(bucket, 0)
    whole = bucket.get(anchor, limit=1 << 30)
    bucket.delete(anchor)  # it is not needed
    for version, deltas in ((3, 2), (0, 3), (2, 2)):
        report = materialize(bucket, tmp_path / "out", version)
        assert equal({name: Checkpoint(tmp_path / "out")[name] for name in expected[0]}, expected[version])
        assert (report.position, report.deltas) == (position(bucket, version), deltas)
        assert held(tmp_path / "out") == report.position
    bucket.put(anchor, whole)
    (tmp_path / "out" / SINGLE).write_bytes((tmp_path / "out" / SINGLE).read_bytes()[:-1] + b"?")
    with pytest.raises(BadDigest, match="remove it, and it is made again"):
        materialize(bucket, tmp_path / "out", 3)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"run": "x"}', '{"run": 1, "version": "2", "root": []}'])
def test_a_marker_that_makes_no_sense_is_a_foreign_folder(chain, tmp_path, text):
    bucket, _ = chain
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(text)
    with pytest.raises(AlreadyExists):
        materialize(bucket, tmp_path / "out")


def test_an_empty_folder_is_taken_and_missing_parents_are_made(chain, tmp_path):
    bucket, expected = chain
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        materialize(bucket, out)
        assert equal(dict(Checkpoint(out)), expected[3])
        assert out.stat().st_mode & 0o055 == 0o055


def test_a_version_that_was_never_committed_is_refused(chain, tmp_path):
    bucket, _ = chain
    for version in (-1, 4):
        with pytest.raises(Gap, match=f"version {version} was never committed; committed are 0 to 3"):
            materialize(bucket, tmp_path / "out", version)
    assert leftovers(tmp_path) == []


def test_an_empty_bucket_materializes_nothing(tmp_path):
    with pytest.raises(NotFound, match="nothing is published"):
        materialize(fresh(), tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("version", [0, 1, 3])
def test_an_error_at_any_update_leaves_no_folder(chain, tmp_path, version):
    bucket, expected = chain

    def interrupt(update):
        if update.position.version == version:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialize(bucket, tmp_path / "out", on_update=interrupt)
    assert leftovers(tmp_path) == []
    materialize(bucket, tmp_path / "out")
    assert equal(dict(Checkpoint(tmp_path / "out")), expected[3])


@pytest.mark.parametrize("version", [0, 2])
def test_a_process_killed_in_the_middle_leaves_no_folder_of_that_name(tmp_path, version):
    url = f"file://{tmp_path}/bucket"
    bucket = open_bucket(url)
    publish_all(bucket, model(0), model(1), model(2))
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, program("materialize_killed"), url, str(out), str(version)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    materialize(bucket, out)
    assert equal(dict(Checkpoint(out)), served(model(2)))


def test_weights_that_do_not_match_the_commit_never_appear(tmp_path):
    weights, bucket = model(), fresh()
    (tmp_path / "base").mkdir()
    checkpoint.write(tmp_path / "base", table(served(weights)), served(weights))
    edit(weights, 1, "norm", share=1.0)
    publish_all(bucket, weights, base=tmp_path / "base")
    other = served(model()) | {"embed.weight": served(model(5))["embed.weight"]}
    checkpoint.write(tmp_path / "base", table(other), other)
    with pytest.raises(BadDigest, match=r"1 tensors differ from the commit: embed\.weight"):
        materialize(bucket, tmp_path / "out", base=tmp_path / "base")
    assert leftovers(tmp_path) == ["base"]


def test_verifying_names_every_tensor_that_differs(tmp_path):
    weights = served(model())
    checkpoint.write(tmp_path, table(weights), weights)
    right = dict.fromkeys(weights, 0)
    with pytest.raises(BadDigest, match=f"policy: {len(weights)} tensors differ"):
        Checkpoint(tmp_path).require_digests(right, where="policy")


def full(*anything, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "call",
    [
        "deltawire.format.checkpoint.shutil.copyfile",
        "numpy.memmap.flush",
        "pathlib.Path.write_text",
        "tempfile.mkdtemp",
    ],
)
def test_a_disk_that_fills_up_at_any_step_is_out_of_space_and_leaves_nothing(chain, tmp_path, monkeypatch, call):
    bucket, _ = chain
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(OutOfSpace, match="No space left on device"):
            materialize(bucket, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("full_is", ["the target", "the temporary folder"])
def test_a_full_disk_is_out_of_space_by_name_and_the_same_call_succeeds_elsewhere(
    tmp_path, small_disk, monkeypatch, full_is
):
    weights = {"w": np.zeros((1500, 1000), np.float32)}
    bucket = fresh()
    publish_all(bucket, weights)
    out = small_disk / "out" if full_is == "the target" else tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path if full_is == "the target" else small_disk))
        with pytest.raises(OutOfSpace, match=f"{small_disk}.*No space left on device"):
            materialize(bucket, out)
    assert leftovers(small_disk) == []
    materialize(bucket, tmp_path / "elsewhere")
    assert equal(dict(Checkpoint(tmp_path / "elsewhere")), served(weights))


def test_a_full_disk_under_the_publisher_is_out_of_space_and_loses_nothing(small_disk, tmp_path, monkeypatch):
    weights = {"w": np.zeros((1500, 1000), np.float32)}
    bucket = fresh()
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with publishing(bucket) as pub:
        (small_disk / "ballast").write_bytes(b"\0" * 1_000_000)
        with pytest.raises(OutOfSpace, match=str(small_disk)):
            pub.publish({"w": weights["w"][:700]})
        (small_disk / "ballast").unlink()
        pub.publish({"w": weights["w"][:700]})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    materialize(bucket, tmp_path / "out")


def test_materializing_costs_one_delta_of_memory_however_large_the_model(tmp_path):
    """16 tensors of 500,000 bf16 elements, 16 MB, three updates of 0.1 %, 80 kB each; files are copied by the MB."""
    rng = np.random.default_rng(0)
    weights = {f"layer.{n}": Bits("BF16", (500_000,), rng.integers(0, 1 << 16, 500_000, np.uint16)) for n in range(16)}
    bucket = open_bucket(f"file://{tmp_path}/bucket")
    with publishing(bucket) as pub:
        for _ in range(4):
            pub.publish(weights)
            pub.flush(timeout=PATIENCE)
            for bits in weights.values():
                bits.data[::1000] += 1
    materialize(bucket, tmp_path / "warm")
    sizes = []
    tracemalloc.start()
    materialize(
        bucket, tmp_path / "out", on_update=lambda update: sizes.append(update.delta.nbytes if update.delta else 0)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    allowed = max(sizes) + 2_500_000
    assert peak < allowed, f"{peak:,} bytes at the peak; a delta is {max(sizes):,}, allowed are {allowed:,}"


def test_a_materialized_folder_says_what_it_holds(chain, tmp_path):
    bucket, _ = chain
    materialize(bucket, tmp_path / "out", 2)
    here = position(bucket, 2)
    assert json.loads((tmp_path / "out" / MARKER).read_text()) == {"run": here.run, "version": 2, "root": here.root}
    assert held(tmp_path) is None


def test_a_run_may_hold_every_dtype(tmp_path):
    weights = {"b": torch.tensor([True, False]), "i": torch.arange(3), "f": torch.ones(2), "s": torch.tensor(1.5)}
    bucket = fresh()
    publish_all(bucket, weights, weights | {"i": torch.arange(3) * 7, "b": torch.tensor([False, True])})
    materialize(bucket, tmp_path / "out")
    loaded = load_file(tmp_path / "out" / SINGLE)
    assert loaded["i"].tolist() == [0, 7, 14]
    assert loaded["b"].tolist() == [False, True]
    assert loaded["s"].dtype == torch.bfloat16
