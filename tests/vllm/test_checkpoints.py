"""Checkpoints as they are, on real vLLM servers: tensors that a server never loads, and a few in fp32 beside bf16."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import START_SECONDS, Server, build, save_checkpoint, tiny_qwen3
from test_models import LAYOUTS

import deltawire as dw
from deltawire.follow.follower import Follower
from deltawire.trainers.conversion import name_map
from deltawire.trainers.state import checkpoint_tensors
from deltawire.vllm.client import EngineClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2 * START_SECONDS)]
STEPS = 3


def replace_tensors(folder, tensors):
    """Put more tensors into a checkpoint's only file, or others in place of those it has."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def nudge(model, seed):
    """A step of training that moves some elements in bf16."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4 * torch.randn(parameter.shape, generator=random))


def walk(model, base, url, server, frozen, **options):
    """Publish steps of a model on a base, have a server serve each, and go back to the first of them."""
    with (
        dw.Publisher(dw.open_bucket(url, create=True), base=base, prepare=[name_map(model)], **options) as publisher,
        Follower(url, EngineClient(server.url), base=base) as follower,
        EngineClient(server.url) as engine,
    ):
        for step in range(STEPS):
            nudge(model, step)
            publisher.publish(checkpoint_tensors(model))
            version = publisher.flush(30).version
            assert follower.step().version == version
            audit = engine.audit()
            assert (audit.position.version, audit.mismatched, set(audit.frozen)) == (version, [], frozen)
        with Follower(url, EngineClient(server.url), pin=1) as pinned:
            assert pinned.step().version == 1
        assert [set(worker.frozen) for worker in engine.placement()] == [frozen] * audit.workers
        assert (engine.audit().position.version, engine.audit().mismatched) == (1, [])


def test_what_a_server_derives_or_rounds_of_its_base_does_not_keep_it_from_the_run(server, tmp_path):
    base, model = tmp_path / "base", tiny_qwen3()
    save_checkpoint(base)
    head = {"lm_head.weight": torch.randn(model.lm_head.weight.shape).bfloat16()}  # a tied server makes its own
    norm = {"model.norm.weight": model.model.norm.weight.detach() + 2**-20}  # vLLM holds it in bf16
    replace_tensors(base, {**head, **norm})
    url = (tmp_path / "bucket").as_uri()
    walk(model, base, url, server, {"lm_head.weight"}, dtype={"model.norm.weight": "BF16"})


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_a_run_on_a_base_with_next_token_layers_is_served_without_them(layout, tmp_path):
    base, model = tmp_path / "base", build("glm4-moe")
    model.config.num_nextn_predict_layers = 1
    save_checkpoint(base, model)
    layer = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if ".layers.1." in name}
    extra = {
        name.replace(".1.", ".2.", 1): torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in layer.items()
    }
    for name, shape in (("enorm", (64,)), ("hnorm", (64,)), ("eh_proj", (64, 128)), ("shared_head.norm", (64,))):
        extra[f"model.layers.2.{name}.weight"] = torch.randn(shape).bfloat16()
    replace_tensors(base, extra)
    options, environ = LAYOUTS[layout]
    server = Server(base, tmp_path / "vllm.log", options=options, **environ)
    try:
        walk(model, base, (tmp_path / "bucket").as_uri(), server.wait(), set(extra))
    finally:
        server.stop()
