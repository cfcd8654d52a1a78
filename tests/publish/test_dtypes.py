"""Each tensor ships in the dtype the server holds: by its base, by a rule, and never rounded in silence."""

import warnings

import numpy as np
import pytest
import torch
from runs import fresh, publishing, read_weights
from safetensors.torch import save_file

import deltawire as dw
from deltawire.errors import DtypeMismatch
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import as_bits, cast, marked

RULE = {"*.A_log": "F32", "*": "BF16"}
A_LOG = torch.tensor([1.0, 1.00390625 + 2**-12, -0.3])
NAMES = ("embed.weight", "layers.0.A_log", "layers.1.A_log", "norm")


def mixed(dtype=torch.bfloat16):
    """A model's weights with two that its checkpoint has in fp32."""
    weights = {name: torch.linspace(-1, 1, 24, dtype=torch.float32) for name in NAMES}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return weights | {"layers.0.A_log": A_LOG.clone(), "layers.1.A_log": 2 * A_LOG}


def as_base(folder, weights):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def published(bucket, weights, **options):
    """What a reader gets of one publish."""
    with publishing(bucket, **options) as publisher:
        publisher.publish(weights)
        publisher.flush(10)
    return read_weights(bucket, base=options.get("base"))


def dtypes(bucket):
    with dw.Subscriber(bucket) as subscriber:
        return {entry.name: entry.dtype for entry in subscriber.run.table}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_that_a_pattern_names_ships_in_its_dtype_and_the_others_in_theirs(dtype):
    bucket, weights = fresh(), mixed(dtype)
    with publishing(bucket, dtype=RULE) as publisher:
        for version in range(3):
            weights["layers.0.A_log"] = A_LOG * (1 + version * 2**-20)
            publisher.publish(weights)
            publisher.flush(10)
            read = read_weights(bucket)
            assert all(read[f"layers.{n}.A_log"] == as_bits(weights[f"layers.{n}.A_log"]) for n in (0, 1))
            assert all(read[name] == cast(weights[name], "BF16") for name in ("embed.weight", "norm"))
    with publishing(bucket, dtype=RULE) as publisher:  # a run that is continued
        weights["layers.1.A_log"] = A_LOG
        publisher.publish(weights)
    assert read_weights(bucket)["layers.1.A_log"] == as_bits(A_LOG)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"*.A_log": "F32"}, ["BF16", "F32", "F32", "BF16"]),
        ({"layers.0.*": "F16", "layers.*": "F32", "*": "F16"}, ["F16", "F16", "F32", "F16"]),
        ({"*": "F16"}, ["F16"] * 4),
        ("F16", ["F16"] * 4),
        ("F32", ["F32"] * 4),
        ({"layers.?.A_log": "F32", "*": "F32"}, ["F32"] * 4),
    ],
)
def test_the_first_pattern_that_fits_rules_and_bf16_where_none_does(rule, expected):
    bucket = fresh()
    published(bucket, mixed(torch.float32), dtype=rule)
    assert [dtypes(bucket)[name] for name in NAMES] == expected


@pytest.mark.parametrize("on_base", [False, True])
def test_a_pattern_that_fits_no_tensor_is_named_before_anything_is_published(tmp_path, on_base):
    bucket = fresh()
    base = as_base(tmp_path / "base", mixed()) if on_base else None
    with publishing(bucket, base=base, dtype={"*.A_log": "F32", "*.Alog": "F32"}) as publisher:
        with pytest.raises(DtypeMismatch, match=r"dtype= has '\*\.Alog', which fits no tensor.*'embed.weight'"):
            publisher.publish(mixed())
        assert publisher.position is None
        weights = {**mixed(), "layers.1.Alog": torch.ones(3)}
        if not on_base:
            publisher.publish(weights)
            assert publisher.flush(10).version == 0


@pytest.mark.parametrize("rule", ["FP32", "F8_E4M3", {"*.A_log": "float32"}, {"*": "I32"}])
def test_a_dtype_that_is_no_float_is_refused_at_once(rule):
    with pytest.raises(ValueError, match="is not one of F64, F32, F16, BF16"):
        dw.Publisher(fresh(), dtype=rule)
    with pytest.raises(TypeError, match="a dtype, or a mapping"):
        dw.Publisher(fresh(), dtype=["F32"])


def test_fp32_beside_16_bit_tensors_is_not_rounded_in_silence():
    with pytest.warns(
        UserWarning, match=r"^2 tensors .*rounded to 16 bits: layers\.\*\.A_log\. .*\"layers.\*.A_log\": \"F32"
    ):
        published(fresh(), mixed())
    with pytest.warns(UserWarning, match="layers"):
        published(fresh(), dict(reversed(mixed().items())))  # in whatever order
    for asked in ({"layers.*": "BF16"}, {"layers.*": "F32"}):
        published(fresh(), mixed(), dtype=asked)
    published(fresh(), mixed(torch.float32))  # masters that are all fp32 are cast, as ever
    as_they_are = {name: as_bits(tensor) for name, tensor in mixed().items()}
    assert published(fresh(), as_they_are) == as_they_are
    with warnings.catch_warnings(record=True) as caught, publishing(fresh()) as publisher:
        warnings.simplefilter("always")
        for _ in range(3):
            publisher.publish(mixed())
    assert len(caught) == 1


def test_what_the_base_has_in_fp32_ships_so_and_what_it_has_in_bf16_is_not_rounded_in_silence(tmp_path):
    bucket = fresh()
    base = as_base(tmp_path / "base", mixed())
    trained = mixed() | {"layers.0.A_log": A_LOG * 1.0001, "layers.1.A_log": A_LOG.bfloat16()}
    read = published(bucket, trained, base=base)
    assert read["layers.0.A_log"] == as_bits(trained["layers.0.A_log"])
    assert read["layers.1.A_log"] == as_bits(trained["layers.1.A_log"].float())
    in_bf16 = as_base(tmp_path / "bf16", {name: tensor.bfloat16() for name, tensor in mixed().items()})
    with pytest.warns(UserWarning, match="rounded to 16 bits"):
        published(fresh(), mixed(), base=in_bf16)
    with pytest.raises(DtypeMismatch, match=r"A_log: dtype= asks for F32, and this run has it in BF16, as its base"):
        published(fresh(), mixed(), base=in_bf16, dtype=RULE)


def test_a_pattern_may_have_values_rounded_to_fewer_bits_than_the_base_has(tmp_path):
    base = as_base(tmp_path / "base", mixed())
    read = published(fresh(), mixed(), base=base, dtype={"layers.0.*": "BF16"})
    assert read["layers.0.A_log"] == as_bits(A_LOG.bfloat16().float())
    assert read["layers.1.A_log"] == as_bits(2 * A_LOG)


def test_a_pattern_reaches_floats_alone_and_what_is_marked_or_bits_stays_as_it_is_without_one():
    scale = Bits("F32", (2,), np.array([1, 2], np.uint32))
    weights = mixed() | {
        "layers.0.A_log": marked(A_LOG, "kept"),
        "layers.1.A_log": marked(A_LOG.bfloat16(), "kept"),
        "layers.2.scale": scale,
        "layers.2.count": torch.tensor([7]),
    }
    assert published(fresh(), weights)["layers.0.A_log"] == as_bits(A_LOG)
    bucket = fresh()
    published(bucket, weights, dtype={"layers.0.*": "BF16", "layers.2.*": "F16"})
    assert [dtypes(bucket)[f"layers.{name}"] for name in ("0.A_log", "1.A_log", "2.scale", "2.count")] == [
        *("BF16", "BF16", "F16", "I64")
    ]
