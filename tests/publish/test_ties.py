"""Names of one tensor: in a file where its config ties them and their bits are equal, in memory where that is one."""

import json

import numpy as np
import pytest
import torch

from deltawire.publish import ties
from deltawire.publish.ties import Given, head_of, in_file, settle, ties_words
from deltawire.weights.bits import Bits
from deltawire.weights.digest import digest

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, None),
        ({"tie_word_embeddings": None, "text_config": 7}, None),
        ({"tie_word_embeddings": "yes"}, None),
        ({"tie_word_embeddings": [True]}, None),
        ({}, None),
    ],
)
def test_what_a_config_says_of_word_embeddings(tmp_path, fields, said):
    assert ties_words(config(tmp_path, **fields)) is said


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none_says_nothing(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    assert ties_words(tmp_path) is None
    assert ties_words(tmp_path / "nowhere") is None
    assert ties_words(None) is None


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        ([HEAD, EMBEDDING, "model.norm.weight"], {HEAD: EMBEDDING}),
        (["language_model.lm_head.weight", "language_model.model.embed_tokens.weight"], "as they stand"),
        ([HEAD, "transformer.wte.weight"], "as they stand"),
        ([HEAD], {}),
        ([EMBEDDING], {}),
        ([HEAD, EMBEDDING, "mtp.embed_tokens.weight"], {}),
        (["my_lm_head.weight", EMBEDDING], {}),
    ],
)
def test_the_head_and_the_embedding_are_told_by_name_where_there_is_one_of_each(names, pair):
    assert head_of(names) == ({names[0]: names[1]} if pair == "as they stand" else pair)


def found(folder, **weights):
    bits = {name: Bits("BF16", array.shape, array.reshape(-1)) for name, array in weights.items()}
    return in_file(folder, bits, digest(bits))


def test_a_name_in_a_file_is_an_alias_where_the_config_ties_it_and_its_bits_are_equal(tmp_path):
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    tied = {EMBEDDING: rows, HEAD: rows.copy(), "a.weight": np.ones((4, 3), np.uint16)}
    tied["b.weight"] = tied["a.weight"].copy()
    assert found(config(tmp_path, tie_word_embeddings=True), **tied) == {HEAD: EMBEDDING}
    assert found(config(tmp_path, tie_word_embeddings=False), **tied) == {}
    assert found(config(tmp_path), **tied) == {}
    other = {**tied, HEAD: rows + np.uint16(1)}
    assert found(config(tmp_path, tie_word_embeddings=True), **other) == {}
    shorter = {**tied, HEAD: rows[:3]}
    assert found(config(tmp_path, tie_word_embeddings=True), **shorter) == {}


def test_equal_digests_are_not_taken_for_equal_bits(tmp_path):
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    bits = {
        name: Bits("BF16", (4, 3), (rows + n).astype(np.uint16).reshape(-1)) for n, name in enumerate((EMBEDDING, HEAD))
    }
    assert in_file(config(tmp_path, tie_word_embeddings=True), bits, {EMBEDDING: 7, HEAD: 7}) == {}


def test_memory_tells_one_tensor_from_two():
    given, tensor = Given(), torch.ones(4, 3)
    other = torch.ones(4, 3)
    assert given.note("a", tensor) is None
    assert given.note("b", tensor.detach()) == "a"
    assert given.note("c", other) is None
    assert given.note("turned", tensor.t()) is None
    assert given.are_one("a", "b")
    assert given.are_two("b", "c")
    assert not given.are_two("a", "b")
    assert not given.are_two("a", "never given")


def test_memory_that_was_let_go_of_or_written_to_tells_nothing():
    given, buffer = Given(), torch.ones(4)
    given.note("gone", torch.ones(4))
    given.note("a", buffer)
    assert given.note("b", buffer.add_(1)) is None
    assert not given.are_one("a", "b")
    assert not given.are_two("gone", "a")
    with torch.inference_mode():
        kept = torch.ones(4)  # whose writes torch does not count
        assert [given.note(name, kept) for name in "xy"] == [None, None]
    assert [given.note(name, np.ones(4)) for name in "xy"] == [None, None]


class Wrapping(torch.Tensor):
    """As torchao's, over another tensor and with no storage of its own."""

    def untyped_storage(self):
        raise NotImplementedError("no storage")


def test_a_tensor_without_storage_of_its_own_tells_nothing():
    given, tensor = Given(), torch.ones(4).as_subclass(Wrapping)
    assert [given.note(name, tensor) for name in "xy"] == [None, None]


def always(one, other):
    return True


def test_what_a_config_ties_is_one_unless_memory_or_bits_say_otherwise():
    one, other = torch.ones(4, 3), torch.ones(4, 3)
    tied, apart, unknown = Given(), Given(), Given()
    for given, head in ((tied, one), (apart, other)):
        given.note(EMBEDDING, one)
        given.note(HEAD, head)
    both, declared = (EMBEDDING, HEAD), {HEAD: EMBEDDING}
    assert settle(declared, tied, both, both, always) == declared
    assert settle(declared, apart, both, both, always) == {}
    assert settle(declared, unknown, both, both, always) == declared
    assert settle(declared, unknown, both, both, lambda one, other: False) == {}
    assert settle(declared, apart, [EMBEDDING], both, always) == declared


def test_what_memory_ties_is_one_unless_the_base_has_two():
    given, tensor = Given(), torch.ones(4, 3)
    for name in (HEAD, EMBEDDING, "third"):
        given.note(name, tensor)
    names = [HEAD, EMBEDDING, "third"]
    assert settle({}, given, names, (), always) == {EMBEDDING: HEAD, "third": HEAD}
    assert settle({HEAD: EMBEDDING}, given, names, (), always) == {HEAD: EMBEDDING, "third": EMBEDDING}
    assert settle({}, given, names, names, always) == {}
    assert settle({}, given, names, [HEAD], always) == {EMBEDDING: HEAD, "third": HEAD}
    assert settle({}, given, names[1:], (), always) == {}


def test_transformers_is_never_imported_for_it(monkeypatch, tmp_path):
    monkeypatch.delitem(ties.sys.modules, "transformers", raising=False)
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    assert found(config(tmp_path, model_type="gemma"), **{EMBEDDING: rows, HEAD: rows.copy()}) == {}
    assert "transformers" not in ties.sys.modules
