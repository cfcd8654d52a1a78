"""A bucket that a stranger wrote to: forged commits and payloads are refused, and say which object it was."""

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from runs import (
    chain_of_four,
    commits,
    fresh,
    model,
    payload_key,
    position,
    publish_all,
    read_weights,
    replace_commit,
    served,
    table,
    updates,
)

from deltawire import Subscriber
from deltawire.errors import (
    BadDigest,
    Forked,
    FormatError,
    ShapeMismatch,
    TooLarge,
    Truncated,
    UnknownTensor,
    UnknownVersion,
)
from deltawire.format import checkpoint, container, delta_file
from deltawire.runlog.keys import commit_key, delta_key
from deltawire.runlog.records import Payload, write
from deltawire.weights.bits import Bits, zeros
from deltawire.weights.delta import Delta, TensorDelta
from deltawire.weights.digest import root
from deltawire.weights.tensors import equal


@pytest.fixture
def chain():
    return chain_of_four()


@pytest.mark.parametrize("parent", [0, None])
def test_two_commits_with_one_parent_are_a_fork(chain, parent):
    bucket, _ = chain
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, parent=parent))
    with pytest.raises(Forked, match=f"continues version {parent}, but the one before it is 1"):
        updates(bucket)


def altered_digest(commit):
    name = min(commit.digests)
    return msgspec.structs.replace(commit, digests=commit.digests | {name: "0" * 16})


ALTERED = {
    "an altered digest": altered_digest,
    "a digest left out": lambda commit: msgspec.structs.replace(
        commit, digests={name: value for name, value in commit.digests.items() if name != min(commit.digests)}
    ),
    "an altered root": lambda commit: msgspec.structs.replace(commit, root="0" * 64),
}


@pytest.mark.parametrize("how", ALTERED)
@pytest.mark.parametrize("version", [0, 2])
def test_an_altered_commit_does_not_make_its_root(chain, how, version):
    bucket, _ = chain
    replace_commit(bucket, version, ALTERED[how])
    with pytest.raises(BadDigest, match="damaged or altered"):
        updates(bucket)


def test_a_commit_that_names_a_tensor_outside_the_table_is_refused(chain):
    bucket, _ = chain
    replace_commit(bucket, 1, lambda commit: msgspec.structs.replace(commit, digests={"intruder": "0" * 16}))
    with pytest.raises(UnknownTensor, match="'intruder', which is not in the run's tensor table"):
        updates(bucket)


@pytest.mark.parametrize("version", [0, 2])
@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), BadDigest),
        (lambda data: data[:-1], Truncated),
        (lambda data: b"", Truncated),
        (lambda data: data + b"\0", TooLarge),
    ],
    ids=["a flipped bit", "a byte short", "empty", "a byte long"],
)
def test_a_damaged_payload_is_refused(chain, version, damage, kind):
    bucket, _ = chain
    key = payload_key(bucket, version)
    bucket.put(key, damage(bucket.get(key, limit=1 << 20)))
    with pytest.raises(kind, match=key):
        updates(bucket)


def test_the_payload_of_another_version_is_refused_though_its_hash_is_right(chain):
    bucket, _ = chain
    other = commits(bucket)[1].payloads
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, payloads=other))
    with pytest.raises(FormatError, match=r"says .*:0→1, not what its commit says"):
        updates(bucket)


def with_delta(bucket, version, delta):
    """Put a commit on the chain whose payload is `delta`, its hashes right and its digests made up."""
    last = commits(bucket)[-1]
    data = delta_file.encode(delta, run=last.run, parent=last.version, version=version)
    key = delta_key(version, blake3(data).hexdigest())
    bucket.put(f"runs/{last.run}/{key}", data)
    with Subscriber(bucket) as subscriber:
        known = subscriber.digests_at(last.version)
        new = {name: (known[name] + 1) % 2**64 for name in delta if name in known}
        forged = msgspec.structs.replace(
            last,
            version=version,
            parent=last.version,
            parent_hash=None,
            root=root(subscriber.run.table, known | new),
            digests={name: f"{value:016x}" for name, value in new.items()},
            payloads=(Payload(key, len(data), blake3(data).hexdigest()),),
        )
    bucket.put(commit_key(last.run, version), write(forged))
    return last.position


def change_of(shape, dtype="BF16"):
    after = zeros(dtype, shape)
    after.data[0] = 1
    return Delta.between({"x": zeros(dtype, shape)}, {"x": after})["x"]


@pytest.mark.parametrize("change", [change_of((9,)), change_of((8,), "F32"), change_of((2, 4))])
def test_a_delta_of_another_shape_or_dtype_is_refused(chain, change):
    bucket, _ = chain
    since = with_delta(bucket, 4, Delta({"norm": change}))
    with pytest.raises(ShapeMismatch, match=r"norm is .*not as in the run's table"):
        updates(bucket, since)


def test_a_delta_that_names_a_tensor_outside_the_table_is_refused(chain):
    bucket, _ = chain
    since = with_delta(bucket, 4, Delta({"norm": change_of((8,)), "intruder": change_of((8,))}))
    with pytest.raises(UnknownTensor, match="'intruder', which the run does not train"):
        updates(bucket, since)


def test_a_delta_that_touches_a_frozen_tensor_is_refused(tmp_path):
    weights, bucket = model(), fresh()
    checkpoint.write(tmp_path, table(served(weights)), served(weights))
    publish_all(bucket, {"norm": weights["norm"]}, base=tmp_path)
    since = with_delta(bucket, 1, Delta({"scale": TensorDelta("BF16", (), None, np.array([1], np.uint16))}))
    with pytest.raises(UnknownTensor, match="'scale', which the run does not train"):
        updates(bucket, since)


def test_a_delta_that_changes_more_than_its_commit_lists_is_refused(chain):
    bucket, _ = chain
    since = with_delta(bucket, 4, Delta({"norm": change_of((8,)), "layer.0.bias": change_of((16,))}))
    with Subscriber(bucket) as subscriber:
        known = subscriber.digests_at(3)
        run_table = subscriber.run.table
    value = (known["norm"] + 1) % 2**64

    def without_bias(commit):
        return msgspec.structs.replace(
            commit, digests={"norm": f"{value:016x}"}, root=root(run_table, known | {"norm": value})
        )

    replace_commit(bucket, 4, without_bias)
    with pytest.raises(FormatError, match="changes other tensors than the commit lists"):
        updates(bucket, since)


def test_an_import_in_the_layout_of_trls_post_is_no_payload(chain):
    bucket, _ = chain
    commit = commits(bucket)[2]
    streams = {"norm.indices": Bits("I32", (1,), np.array([0], np.uint32)), "norm.values": zeros("BF16", (1,))}
    data = bytes(container.write(streams, {}))
    key = "deltas/import.safetensors"
    bucket.put(f"runs/{commit.run}/{key}", data)
    listed = (Payload(key, len(data), blake3(data).hexdigest()),)
    replace_commit(bucket, 2, lambda commit: msgspec.structs.replace(commit, payloads=listed))
    with pytest.raises(FormatError, match="says None:None→None"):
        updates(bucket)


def anchored(bucket, weights):
    """Put other weights in place of the anchor, every hash of the commit right."""
    data = bytes(container.write(weights, {}))
    run = commits(bucket)[0].run
    key = "anchors/forged/model.safetensors"
    bucket.put(f"runs/{run}/{key}", data)
    listed = (Payload(key, len(data), blake3(data).hexdigest()),)
    replace_commit(bucket, 0, lambda commit: msgspec.structs.replace(commit, payloads=listed))


def in_parts(bucket, parts, **stated):
    """Put changes from all-zero bits in place of the anchor, as the ranks of a sharded job write them."""
    run = commits(bucket)[0].run
    listed = []
    for rank, part in enumerate(parts):
        data = part if isinstance(part, bytes) else delta_file.encode(part, **({"run": run, "version": 0} | stated))
        bucket.put(f"runs/{run}/anchors/forged/r{rank:03d}.safetensors", data)
        listed.append(Payload(f"anchors/forged/r{rank:03d}.safetensors", len(data), blake3(data).hexdigest()))
    replace_commit(bucket, 0, lambda commit: msgspec.structs.replace(commit, payloads=tuple(listed)))


def test_an_anchor_in_parts_is_what_they_add_up_to_and_is_held_to_the_runs_table(chain):
    bucket, expected = chain
    whole = Delta.between({name: zeros(bits.dtype, bits.shape) for name, bits in expected[0].items()}, expected[0])
    half = {name: change for number, (name, change) in enumerate(whole.items()) if number % 2}
    rest = {name: change for name, change in whole.items() if name not in half}
    in_parts(bucket, [Delta(half), Delta(rest)])
    assert equal(read_weights(bucket), expected[3])
    in_parts(bucket, [Delta(half), Delta(rest)], run="f" * 16)
    with pytest.raises(FormatError, match=r"r000\.safetensors is of f"):
        updates(bucket)
    in_parts(bucket, [Delta({"foreign": TensorDelta("BF16", (2,), None, np.ones(2, np.uint16))})])
    with pytest.raises(UnknownTensor, match="foreign"):
        updates(bucket)
    huge = TensorDelta("BF16", (1 << 40,), np.array([5]), np.ones(1, np.uint16))
    in_parts(bucket, [Delta({"norm": huge})])
    with pytest.raises(ShapeMismatch, match="norm is BF16"):
        updates(bucket)
    in_parts(bucket, [bytes(container.write(expected[0], {})), whole])
    with pytest.raises(FormatError, match="both a checkpoint and changes"):
        updates(bucket)


def test_an_anchor_that_lacks_a_tensor_or_has_another_shape_is_refused(chain):
    bucket, expected = chain
    anchored(bucket, {name: bits for name, bits in expected[0].items() if name != "norm"})
    with pytest.raises(FormatError, match="lacks tensor 'norm'"):
        updates(bucket)
    anchored(bucket, expected[0] | {"norm": zeros("BF16", (9,))})
    with pytest.raises(ShapeMismatch, match="norm is BF16"):
        updates(bucket)


def test_an_anchor_of_other_weights_is_refused_by_its_digests(chain):
    bucket, _ = chain
    anchored(bucket, served(model(5)))
    with pytest.raises(BadDigest, match=r"anchor .*:0: 5 tensors differ"):
        updates(bucket)


def test_a_record_of_a_later_format_says_upgrade(chain):
    bucket, _ = chain
    key = commit_key(position(bucket, 0).run, 3)
    bucket.put(key, bucket.get(key, limit=1 << 20).replace(b'"format":1', b'"format":2'))
    with pytest.raises(UnknownVersion, match=r"commits/000003\.json: format 2.*upgrade"):
        updates(bucket)
