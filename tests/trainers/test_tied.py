"""One storage under several names is one tensor, in the files of a checkpoint and in memory, on every path."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from peft import LoraConfig, get_peft_model
from runs import PATIENCE
from safetensors.torch import load_file, save_file
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import deltawire as dw
from deltawire.errors import CopiesDiffer, EngineUnsupported, FormatError
from deltawire.format.checkpoint import INDEX
from deltawire.publish.ties import in_file
from deltawire.runlog import keys, records
from deltawire.runlog.records import Derived, Payload
from deltawire.torch import follow
from deltawire.trainers.conversion import name_map
from deltawire.upkeep.compactor import Compactor
from deltawire.weights.tensors import as_bits

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
WORDS = torch.arange(40).reshape(2, 20)


def model(seed=0, *, tied=True):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=tied)).eval()


def in_bf16(trained):
    return copy.deepcopy(trained).bfloat16()


def saved(trained, folder: Path, *, head=True, tied=True, max_shard_size="1GB"):
    """The model's checkpoint in bf16; with the head beside the embedding, as the file of Qwen3-0.6B has it."""
    in_bf16(trained).save_pretrained(folder, max_shard_size=max_shard_size)
    if head:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, HEAD: weights[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    if not tied:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def step(trained, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1e-2 * torch.randn_like(parameter))


def published(folder: Path, trained, *, give=lambda trained: trained.named_parameters(), steps=2, **options):
    """A bucket with version 0 and as many more as there were steps."""
    bucket = dw.open_bucket((folder / "bucket").as_uri(), create=True)
    with dw.Publisher(bucket, **options) as publisher:
        for number in range(steps + 1):
            if number:
                step(trained, number)
            publisher.publish(give(trained))
            publisher.flush(PATIENCE)
    return bucket


def near(folder: Path) -> Path | None:
    """The base that a test's run starts from, if it does: readers name it."""
    return next((folder / name for name in ("base", "files") if (folder / name).is_dir()), None)


def run_of(bucket):
    with dw.Subscriber(bucket) as subscriber:
        return subscriber.run


def assert_loads(folder: Path, trained, caplog, *, tied=True):
    """transformers reads from a folder what it reads from `save_pretrained`'s: the same bits, tied or not, the same
    logits, and no complaint."""
    in_bf16(trained).save_pretrained(folder.parent / "right")
    right = Qwen3ForCausalLM.from_pretrained(folder.parent / "right", dtype=torch.bfloat16).eval()
    with caplog.at_level(logging.WARNING, "transformers"):
        caplog.clear()
        loaded = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert dw.equal(loaded.state_dict(), in_bf16(trained).state_dict())
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
    assert torch.equal(loaded(WORDS).logits, right(WORDS).logits)
    assert not tied or not caplog.records


def test_a_head_that_a_file_repeats_moves_with_its_embedding_on_every_path(tmp_path, caplog):
    base = saved(model(), tmp_path / "base")
    trained = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    bucket = published(tmp_path, trained, base=base, steps=3)
    run = run_of(bucket)
    assert run.format == 3
    assert [(entry.name, entry.aliases) for entry in run.table if entry.aliases] == [(EMBEDDING, (HEAD,))]
    assert HEAD not in {entry.name for entry in run.table}
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")
    assert_loads(tmp_path / "out", trained, caplog)
    dw.materialize(bucket, tmp_path / "walked", 1, base=near(tmp_path))
    dw.materialize(bucket, tmp_path / "walked", base=near(tmp_path))
    assert_loads(tmp_path / "walked", trained, caplog)
    dw.materialize(bucket, tmp_path / "start", 0, base=near(tmp_path))
    assert_loads(tmp_path / "start", Qwen3ForCausalLM.from_pretrained(base), caplog)
    report = dw.verify(bucket, base=near(tmp_path))
    assert (report.deltas, report.position.version) == (3, 3)
    with Compactor(bucket, tmp_path / "mirror", anchors=1, base=near(tmp_path)) as compactor:
        assert [made.version for made in compactor.step() if made.parent is None] == [3]
    with dw.Subscriber(bucket, base=near(tmp_path)) as subscriber:
        (anchor,) = [update.anchor for update in subscriber.updates(until=3) if update.anchor is not None]
        assert HEAD not in anchor
    dw.materialize(bucket, tmp_path / "late", base=near(tmp_path))
    assert_loads(tmp_path / "late", trained, caplog)
    assert dw.verify(bucket, base=near(tmp_path)).anchors == 2
    followed = model(1).bfloat16()
    with follow(followed, bucket.url, base=near(tmp_path)) as follower:
        assert follower.step().version == 3
    assert dw.equal(followed.state_dict(), in_bf16(trained).state_dict())
    with dw.Publisher(bucket, base=base) as publisher:  # a restarted trainer, which names both
        step(trained, 9)
        publisher.publish(trained.state_dict())
        publisher.flush(PATIENCE)
    dw.materialize(bucket, tmp_path / "late", base=near(tmp_path))
    assert_loads(tmp_path / "late", trained, caplog)


GIVES = {
    "both names": lambda trained: trained.state_dict(),
    "both names, one after the other": lambda trained: ((n, t.detach()) for n, t in trained.state_dict().items()),
    "the head's name alone": lambda trained: [
        (HEAD if name == EMBEDDING else name, tensor) for name, tensor in trained.named_parameters()
    ],
    "the head first": lambda trained: dict(reversed(trained.state_dict().items())),
    "copies, as numpy": lambda trained: {n: t.float().numpy().copy() for n, t in trained.state_dict().items()},
    "first one name and then both": None,
}


@pytest.mark.parametrize("how", GIVES)
def test_however_a_tied_tensor_is_named_it_is_one(tmp_path, how, caplog):
    trained = model()
    base = saved(trained, tmp_path / "base")
    calls = iter(range(9))
    give = GIVES[how] or (lambda trained: trained.state_dict() if next(calls) else trained.named_parameters())
    bucket = published(tmp_path, trained, give=give, base=base)
    assert run_of(bucket).format == 3
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert_loads(tmp_path / "out", trained, caplog)


@pytest.mark.parametrize("options", ["a base without the head", "assets", "nothing"])
def test_a_state_dict_that_names_both_is_published_once(tmp_path, options, caplog):
    trained = model()
    files = saved(trained, tmp_path / "files", head=False)
    chosen = {"a base without the head": {"base": files}, "assets": {"assets": files}, "nothing": {}}[options]
    bucket = published(tmp_path, trained, give=lambda trained: trained.state_dict(), **chosen)
    assert {entry.name: entry.aliases for entry in run_of(bucket).table}[EMBEDDING] == (HEAD,)
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    in_bf16(trained).config.save_pretrained(tmp_path / "out")
    assert_loads(tmp_path / "out", trained, caplog)
    followed = model(1).bfloat16()
    with follow(followed, bucket.url, base=near(tmp_path)) as follower:
        follower.step()
    assert dw.equal(followed.state_dict(), in_bf16(trained).state_dict())


def test_a_shard_that_holds_nothing_but_the_head_is_no_part_of_a_copy(tmp_path, caplog):
    trained = model()
    base = saved(trained, tmp_path / "base", head=False, max_shard_size="10KB")
    index = json.loads((base / INDEX).read_text())
    shards = {name: load_file(base / name) for name in sorted({*index["weight_map"].values()})}
    save_file({HEAD: shards[index["weight_map"][EMBEDDING]][EMBEDDING]}, base / "head.safetensors", {"format": "pt"})
    index["weight_map"][HEAD] = "head.safetensors"
    (base / INDEX).write_text(json.dumps(index))
    bucket = published(tmp_path, trained, base=base)
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == shards.keys()
    copied = json.loads((tmp_path / "out" / INDEX).read_text())
    assert HEAD not in copied["weight_map"]
    assert copied["metadata"]["total_size"] == sum(
        tensor.nbytes for held in shards.values() for tensor in held.values()
    )
    assert_loads(tmp_path / "out", trained, caplog)


def test_equal_bits_alone_tie_nothing(tmp_path, caplog):
    """Two norms of ones, and a head that a config calls a tensor of its own: each moves by itself."""
    trained = model(tied=False)
    with torch.no_grad():
        trained.lm_head.weight.copy_(trained.model.embed_tokens.weight)
    base = saved(trained, tmp_path / "base", head=False, tied=False)
    bucket = published(tmp_path, trained, base=base)
    assert run_of(bucket).format == 3
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert_loads(tmp_path / "out", trained, caplog, tied=False)


def test_a_head_whose_bits_differ_is_a_tensor_of_its_own_whatever_the_config_says(tmp_path, caplog):
    trained = model()
    base = saved(trained, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[HEAD][0, 0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    trained = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert trained.lm_head.weight is not trained.model.embed_tokens.weight  # as transformers loads such a file
    bucket = published(tmp_path, trained, base=base)
    assert run_of(bucket).format == 3
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert_loads(tmp_path / "out", trained, caplog, tied=False)


def test_a_buffer_that_is_filled_again_is_not_one_tensor(tmp_path):
    weights = {"a.norm.weight": torch.ones(8), "b.norm.weight": torch.ones(8)}
    buffer = torch.empty(8)

    def gathered():
        for name, tensor in weights.items():
            yield name, buffer.copy_(tensor)

    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    with dw.Publisher(bucket) as publisher:
        publisher.publish(gathered())
        weights["b.norm.weight"] += 1
        publisher.publish(gathered())
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert dw.equal(load_file(tmp_path / "out" / "model.safetensors"), {n: t.bfloat16() for n, t in weights.items()})


def untied_by_hand(trained):
    trained.lm_head.weight = torch.nn.Parameter(trained.lm_head.weight.detach().clone())
    return trained


def untied_by_peft(trained):
    adapted = get_peft_model(trained, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    return adapted.merge_and_unload()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("untie", [untied_by_hand, untied_by_peft])
@pytest.mark.parametrize("has_base", [False, True])
def test_a_head_that_was_untied_in_memory_is_a_tensor_of_its_own_though_the_config_ties_it(
    untie, has_base, tmp_path, caplog
):
    files = saved(model(), tmp_path / "files")
    trained = untie(model())
    assert trained.config.tie_word_embeddings or untie is untied_by_peft  # PEFT unties the config of the model it wraps
    names = name_map(trained)
    in_bf16(trained).save_pretrained(tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert dw.equal(dict(names(in_bf16(trained).state_dict().items())), written)
    bucket = published(
        tmp_path,
        trained,
        give=lambda trained: trained.state_dict(),
        prepare=[names],
        **({"base": files} if has_base else {"assets": files}),
    )
    assert run_of(bucket).format == 3
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert_loads(tmp_path / "out", trained, caplog, tied=False)
    with pytest.raises(EngineUnsupported, match="ties what are two tensors in the run"):
        follow(model(1).bfloat16(), bucket.url)


def test_a_head_tied_by_hand_against_its_config_is_shipped_under_both_names(tmp_path):
    """A server of that config holds two tensors. `save_pretrained` would leave out the head, and lose it."""
    trained = model(tied=False)
    files = saved(trained, tmp_path / "files", head=False)
    trained.lm_head.weight = trained.model.embed_tokens.weight
    names = name_map(trained)
    bucket = published(tmp_path, trained, give=lambda trained: trained.state_dict(), assets=files, prepare=[names])
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert dw.equal(loaded.state_dict(), in_bf16(trained).state_dict())


def test_a_head_that_is_untied_in_the_middle_of_a_run_is_refused_and_nothing_is_lost(tmp_path, caplog):
    trained = model()
    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    with dw.Publisher(bucket, base=saved(trained, tmp_path / "base")) as publisher:
        publisher.publish(trained.state_dict())
        untied_by_hand(trained)
        step(trained, 1)
        with pytest.raises(CopiesDiffer, match=r"lm_head\.weight is another name of model\.embed_tokens\.weight"):
            publisher.publish(trained.state_dict())
        trained.tie_weights()
        publisher.publish(trained.state_dict())
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert_loads(tmp_path / "out", trained, caplog)


def test_a_tensor_named_by_a_publish_that_broke_off_may_come_by_its_other_name_next(tmp_path, caplog):
    trained = model()

    def breaking():
        yield EMBEDDING, trained.model.embed_tokens.weight
        raise RuntimeError("the gather timed out")

    bucket = dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    with dw.Publisher(bucket, base=saved(trained, tmp_path / "base")) as publisher:
        step(trained, 1)
        with pytest.raises(RuntimeError, match="timed out"):
            publisher.publish(breaking())
        step(trained, 2)
        publisher.publish(GIVES["the head's name alone"](trained))
    dw.materialize(bucket, tmp_path / "out", base=near(tmp_path))
    assert_loads(tmp_path / "out", trained, caplog)


def test_an_untied_server_has_both_of_its_tensors_patched_from_the_one(tmp_path):
    trained = model()
    bucket = published(tmp_path, trained, base=saved(trained, tmp_path / "base"), steps=1)
    followed = model(1, tied=False).bfloat16()
    with follow(followed, bucket.url, base=near(tmp_path)) as follower:
        assert follower.step().version == 1
    assert dw.equal(followed.state_dict(), in_bf16(trained).state_dict())


def test_an_untied_server_whose_head_is_of_another_version_is_at_none(tmp_path):
    trained = model()
    bucket = published(tmp_path, trained, base=saved(trained, tmp_path / "base"), steps=1)
    followed = model(1, tied=False).bfloat16()
    followed.load_state_dict(in_bf16(trained).state_dict())
    with torch.no_grad():
        followed.lm_head.weight.zero_()
    with follow(followed, bucket.url, base=near(tmp_path)) as follower:
        assert follower.position is None
        assert follower.step().version == 1
    assert dw.equal(followed.state_dict(), in_bf16(trained).state_dict())


def test_an_anchor_that_holds_a_tensor_under_both_names_is_refused(tmp_path):
    """As a writer would leave it that copied a base whole: its second copy would be a version behind at the next."""
    trained = model()
    base = saved(trained, tmp_path / "base")
    bucket = published(tmp_path, trained, base=base, steps=1)
    step(trained, 2)
    files = {path.name: path.read_bytes() for path in saved(trained, tmp_path / "both").iterdir()}
    hashes = {name: blake3(data).hexdigest() for name, data in files.items()}
    prefix = keys.anchor_prefix(1, keys.anchor_hash(hashes))
    with dw.Subscriber(bucket) as subscriber:
        commit, run = subscriber.chain.commit(1), subscriber.run.run
        payloads = tuple(Payload(f"{prefix}/{name}", len(files[name]), hashes[name]) for name in sorted(files))
        digests = {name: f"{value:016x}" for name, value in subscriber.digests_at(1).items()}
        record = Derived(run, 1, None, commit.record.root, digests, payloads, commit.hash)
    for payload in payloads:
        bucket.put(f"runs/{run}/{payload.key}", files[payload.key.rpartition("/")[2]])
    bucket.put(keys.derived_key(run, None, 1, payloads), records.write(record))
    with pytest.raises(FormatError, match=r"holds 'model.embed_tokens.weight' again as its alias 'lm_head.weight'"):
        dw.verify(bucket, base=near(tmp_path))


SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
SILENT = {
    "Gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, num_attention_heads=2, num_key_value_heads=1)),
    "T5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
}


@pytest.mark.parametrize("family", SILENT)
def test_where_a_config_is_silent_transformers_says_what_is_tied(family, tmp_path):
    trained = SILENT[family]()
    in_bf16(trained).save_pretrained(tmp_path)
    saved_words = json.loads((tmp_path / "config.json").read_text())
    saved_words.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(saved_words))
    weights = {name: as_bits(tensor) for name, tensor in in_bf16(trained).state_dict().items()}
    assert in_file(tmp_path, weights, dw.digest(weights)) == trained.all_tied_weights_keys
    assert trained.all_tied_weights_keys
