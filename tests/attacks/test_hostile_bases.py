"""A bucket that names a folder of the reader's host gets nothing from it."""

import json

import pytest
from runs import edit, fresh, model, publish_all, read_weights, served, table

from attacks.hostile import add, begin, continued
from deltawire import materialize, open_bucket, torch, verify
from deltawire.errors import DeltaWireError, FormatError, NotFound
from deltawire.format import checkpoint
from deltawire.runlog.records import BaseCheckpoint
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import equal


@pytest.fixture
def host(tmp_path):
    """A folder of the reader's: a checkpoint, its config, and what is nobody's business."""
    folder = tmp_path / "host"
    folder.mkdir()
    weights = served(model())
    checkpoint.write(folder, table(weights), weights)
    for name in ("config.json", "tokenizer.json", "merges.txt", "passwords.txt", "id_rsa"):
        (folder / name).write_text(json.dumps({"name": name}))
    return folder


def compact(bucket, tmp_path, **options):
    with Compactor(bucket, tmp_path / "mirror", anchors=1, **options) as compactor:
        return compactor.step()


READERS = {
    "compact": compact,
    "materialize": lambda bucket, tmp_path: materialize(bucket, tmp_path / "out"),
    "verify": lambda bucket, tmp_path: verify(bucket),
    "updates": lambda bucket, tmp_path: read_weights(bucket),
    "resume": lambda bucket, tmp_path: publish_all(bucket, model(1)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("named", ["with an empty table", "with its table"])
def test_a_folder_that_only_the_bucket_names_is_not_opened(host, tmp_path, reader, named):
    bucket, weights = fresh(), served(model())
    entries = table(weights) if named == "with its table" else ()
    first = begin(bucket, entries, base=BaseCheckpoint(str(host)), weights=weights if entries else {})
    add(bucket, continued(first))
    before = [stat.key for stat in bucket.list()]
    with pytest.raises(NotFound if entries else FormatError, match="--base FOLDER" if entries else "table is empty"):
        READERS[reader](bucket, tmp_path)
    assert [stat.key for stat in bucket.list()] == before


def test_of_a_base_that_was_named_weights_config_and_tokenizer_go_into_an_anchor(host, tmp_path):
    links = tmp_path / "links"  # as the Hub's cache holds a snapshot
    links.mkdir()
    for path in host.iterdir():
        (links / path.name).symlink_to(path)
    (links / "loop.json").symlink_to(links / "loop.json")
    bucket, weights = fresh(), model()
    edit(weights, 1)
    publish_all(bucket, weights, base=host)
    edit(weights, 2)
    publish_all(bucket, weights, base=host)
    compact(bucket, tmp_path, base=links)
    held = {stat.key.rpartition("/")[2] for stat in bucket.list("runs/") if "/anchors/" in stat.key}
    assert held == {"model.safetensors", "config.json", "tokenizer.json", "merges.txt"}
    assert equal(read_weights(bucket, base=host), served(weights))


def test_a_private_repository_is_not_copied_into_a_bucket_that_names_it(host, tmp_path, monkeypatch):
    import huggingface_hub
    from httpx2 import Request, Response
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(self, source, **options):
        assert self.token is False
        raise RepositoryNotFoundError("?", response=Response(401, request=Request("GET", "https://hub.test")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: str(host))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    bucket, weights = fresh(), served(model())
    first = begin(bucket, table(weights), base=BaseCheckpoint("reader/private", "c" * 40), weights=weights)
    add(bucket, continued(first))
    with pytest.raises(DeltaWireError, match="is not public"):
        compact(bucket, tmp_path)
    assert not [stat.key for stat in bucket.list(f"runs/{first.run}/anchors/")]
    assert compact(bucket, tmp_path, base=host)


def test_every_reader_takes_the_folder_it_is_given(host, tmp_path):
    import torch as pytorch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(pytorch.zeros(4, 2, dtype=pytorch.bfloat16))

    start = {"weight": pytorch.ones(4, 2, dtype=pytorch.bfloat16)}
    folder = tmp_path / "small"
    folder.mkdir()
    bits = served({"weight": start["weight"].float().numpy()})
    checkpoint.write(folder, table(bits), bits)
    url = (tmp_path / "bucket").as_uri()
    publish_all(open_bucket(url, create=True), {"weight": start["weight"] + 1}, base=folder)
    followed = Plain()
    with torch.follow(followed, url) as follower, pytest.raises(NotFound, match="--base FOLDER"):
        follower.step()
    with torch.follow(followed, url, base=folder) as follower:
        assert follower.step().version == 1
    assert pytorch.equal(followed.weight, start["weight"] + 1)
