"""A run whose tensors have several dtypes, on servers that hold them in those, in wider ones or in narrower ones."""

import pytest
import small
import torch
from runs import publishing
from safetensors.torch import save_file
from small import Fused, make_weights
from torch import nn

import deltawire as dw
from deltawire.errors import DtypeMismatch
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker

pytestmark = pytest.mark.usefixtures("held_on")


class Server:
    """A model of which `v` is held in a dtype, and its worker."""

    def __init__(self, weights, dtype):
        self.model = Fused(weights)
        self.model.v = nn.Parameter(weights["v"].to(small.DEVICE, dtype, copy=True), requires_grad=False)
        self.worker = LiveWorker(self.model, loading=AfterLoading())

    def bring(self, url, version, base=None):
        """The version then served, and the error."""
        self.worker.attach(url, base=base)
        self.worker.commit({"bucket": url, "version": version})
        self.worker.confirm()
        position = self.worker.position
        return position and position.version, self.worker.status().error


def publish(publisher, weights):
    publisher.publish(weights)
    return publisher.flush(10).version


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_an_fp32_tensor_of_the_run_is_served_exactly_in_either_dtype_while_bf16_can_hold_it(held, tmp_path):
    url, weights = (tmp_path / "bucket").as_uri(), make_weights()
    weights["v"] = weights["v"].bfloat16().float()
    with publishing(dw.open_bucket(url, create=True), dtype={"v": "F32"}) as publisher:
        publish(publisher, weights)
        server = Server(weights, held)
        assert server.bring(url, 0) == (0, None)
        for step in (1, 2, 3):  # in place, in a few elements and in all
            weights["v"][: 4**step] = torch.randn(16)[: 4**step].bfloat16().float()
            weights["a"][0] += 1
            version = publish(publisher, weights)
            assert server.bring(url, version) == (version, None)
            assert torch.equal(server.model.v.float().cpu(), weights["v"])
        assert server.worker.live.audit(None).drifted == []
        before = server.model.v.clone()
        weights["v"][3] = 1 + 2**-20
        version = publish(publisher, weights)
        served, error = server.bring(url, version)
        if held == torch.float32:
            assert (served, error, float(server.model.v[3])) == (version, None, 1 + 2**-20)
            return
        assert (served, error.kind) == (version - 1, DtypeMismatch.__name__)
        assert error.message.startswith("v: 1 values need more than the 16 bits that the server holds")
        assert torch.equal(server.model.v, before)
        weights["v"][3] = 0.5
        assert server.bring(url, publish(publisher, weights)) == (version + 1, None)
        server.model.v.data[5] = 42.0
        assert server.worker.live.audit(None).drifted == ["v"]


def test_a_base_in_fp32_is_followed_in_bf16_from_the_first_version_that_a_pattern_rounds(tmp_path):
    url, weights = (tmp_path / "bucket").as_uri(), make_weights()
    (tmp_path / "base").mkdir()
    base = {"a": weights["a"].bfloat16(), "b": weights["b"].bfloat16(), "v": weights["v"]}
    save_file(base, tmp_path / "base" / "model.safetensors")
    bucket = dw.open_bucket(url, create=True)
    with publishing(bucket, base=tmp_path / "base", dtype={"v": "BF16"}) as publisher:
        for version in range(1, 4):  # version 0 is the base, of which a server in bf16 holds a rounded copy
            assert publish(publisher, weights) == version
            weights["v"][version] += 1
        server = Server(base, torch.bfloat16)
        assert server.bring(url, 1, tmp_path / "base") == (1, None)
        for version in (3, 2):
            assert server.bring(url, version) == (version, None)
        served, error = server.bring(url, 0)
        assert (served, error.kind) == (2, DtypeMismatch.__name__)
