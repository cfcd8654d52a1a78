"""One rank of a sharded job whose names are not a checkpoint's, for test_sharded_experts.py; called as sharded_job.py.

Each scenario trains a tiny real model sharded by FSDP2 by seeded edits, publishes through a `NameMap`, and leaves what
`save_pretrained` writes of the whole model in FOLDER/saved-VERSION.
"""

import copy
import sys

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from sharded_job import PATIENCE, as_base, check_that_a_gather_would_be_seen, expect, follow, main, publish, step, tiny
from sharded_job import whole as whole_bits
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import deltawire as dw
from deltawire.errors import DtypeMismatch, ShapeMismatch, UnknownTensor
from deltawire.prepare.fp8 import Fp8
from deltawire.prepare.names import NameMap, View
from deltawire.trainers.conversion import name_map
from deltawire.weights.tensors import cast

EXPERTS = 5
"""so that two ranks hold three and two"""


def build():
    """A small model with fused experts and a tied head, fp32 as trainers hold it, the same on every rank."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, max_position_embeddings=16, num_experts=EXPERTS, moe_intermediate_size=6,
        num_experts_per_tok=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def save_pretrained(model, plain, folder):
    """What a checkpoint of the whole model is. Gathers, so never inside a publish."""
    state = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if dist.get_rank() == 0:
        plain.load_state_dict(state)
        copy.deepcopy(plain).bfloat16().save_pretrained(folder)
    dist.barrier()


def train(folder, pairs, model, plain, steps, **options):
    """Publish some steps, each a commit of its own."""
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, process_group=dist.group.WORLD, prepare=[name_map(model)], **options) as pub:
        for number in steps:
            step(pairs, number)
            report = publish(pub, iter(pairs), step=number)
            save_pretrained(model, plain, folder / f"saved-{report.version}")
            pub.flush(timeout=PATIENCE)


def experts(folder):
    """Whole experts on each rank, unevenly many; the run begins from a checkpoint, and a second job continues it."""
    model, plain = build(), build()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pairs = [*model.named_parameters()]
    fused = dict(pairs)["model.layers.0.mlp.experts.gate_up_proj"]
    assert fused.to_local().shape == (3 - dist.get_rank(), 12, 8)
    check_that_a_gather_would_be_seen(fused)
    save_pretrained(model, plain, folder / "base")
    train(folder, pairs, model, plain, (1, 2, 3), base=folder / "base")
    train(folder, pairs, model, plain, (4,), base=folder / "base")
    # what computes on tensors has to gather them itself
    parts = dict(name_map(model)(pairs))
    gathered = {name: cast(part.full_tensor(), "BF16") for name, part in parts.items()}
    assert dw.equal(gathered, load_file(folder / "saved-4/model.safetensors"))
    of_experts = [(name, part) for name, part in parts.items() if "mlp.experts" in name]
    expect(DtypeMismatch, "process_group", lambda: list(Fp8()(of_experts)))


def halves(folder):
    """All gates on one rank and all ups on the other, from zeros: of half of its names a rank holds nothing. The tied
    head is named twice."""
    model, plain = build(), build()
    fused = {parameter for parameter in model.parameters() if parameter.dim() == 3}
    fully_shard(
        model, mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda p: Shard(1) if p in fused else Shard(0)
    )
    given = model.state_dict()
    pairs = [*given.items()]
    assert len(pairs) == len([*model.named_parameters()]) + 1
    assert given["model.layers.0.mlp.experts.gate_up_proj"].to_local().shape == (EXPERTS, 6, 8)
    untied = given | {"lm_head.weight": given["lm_head.weight"] * 1}
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, process_group=dist.group.WORLD, prepare=[name_map(model)]) as pub:
        expect(UnknownTensor, "are tied", lambda: publish(pub, untied))
    train(folder, pairs, model, plain, (1, 2), assets=folder.parent / "experts/base")


def copies(folder):
    """Every rank has all experts, as the ranks that replicate have in HSDP."""
    model, plain = build(), build()
    fully_shard(
        model, mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    )
    pairs = [*model.named_parameters()]
    train(folder, pairs, model, plain, (1, 2), base=folder.parent / "experts/base")


def compiled(folder):
    """A plain model whose layers and whole torch.compile has wrapped: the prefixes are no part of the names."""
    model = tiny()
    base = as_base(folder, whole_bits([*model.named_parameters(), ("scale", model.scale)]))
    mesh = init_device_mesh("cpu", (2,))
    model.up = torch.compile(fully_shard(model.up, mesh=mesh), backend="eager")
    wrapped = torch.compile(fully_shard(model, mesh=mesh), backend="eager")
    pairs = [*wrapped.named_parameters(), ("_orig_mod.scale", model.scale)]
    assert "_orig_mod.up._orig_mod.weight" in dict(pairs)
    follow(dw.open_bucket(f"file://{folder}/bucket"), folder, pairs, (1, 2, 3), base=base, prepare=[NameMap()])


def scalars(folder):
    """A tensor's elements, each a tensor without dimensions: only where every rank has all of them."""
    values = torch.arange(4.0)
    sharded = distribute_tensor(values, init_device_mesh("cpu", (2,)), [Shard(0)])
    names = NameMap({"scales": tuple(View(f"{at}.scale", ((at, at + 1),)) for at in range(4))})
    bucket = dw.open_bucket(f"file://{folder}/bucket")
    with dw.Publisher(bucket, process_group=dist.group.WORLD, prepare=[names]) as pub:
        expect(ShapeMismatch, "has no dimensions", lambda: publish(pub, {"scales": sharded}))
        assert publish(pub, {"scales": values}).version == 0


SCENARIOS = {scenario.__name__: scenario for scenario in (experts, halves, copies, compiled, scalars)}

if __name__ == "__main__":
    main(SCENARIOS, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
