"""Tensors of a run's base that its trainer never publishes, and of which a server may load nothing."""

import pytest
import torch
from safetensors.torch import save_file
from small import Fused, Shard, make_weights
from stub_engine import StubEngine
from typer.testing import CliRunner

import deltawire as dw
from deltawire.cli import app
from deltawire.errors import EngineUnsupported
from deltawire.follow.follower import Follower
from deltawire.live.coverage import Coverage
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.torch import follow
from deltawire.upkeep import retention
from deltawire.upkeep.compactor import Compactor
from deltawire.vllm.client import EngineClient
from deltawire.weights.boxes import Box

LEFT = {"mtp.norm": torch.arange(6.0).bfloat16(), "mtp.empty": torch.zeros(0).bfloat16()}


def without_mtp(weights):
    return ((name, tensor) for name, tensor in weights if not name.startswith("mtp"))


class Text(Fused):
    """A server's model that loads no tensor of the base's next-token layers, as vLLM's do."""

    def load_weights(self, weights):
        super().load_weights(without_mtp(weights))


class TextShard(Shard):
    def load_weights(self, weights):
        super().load_weights(without_mtp(weights))


class Run:
    """A run on a base of which the trainer publishes `trained`; `served[n]` is what a server holds of version n."""

    def __init__(self, folder, trained=("a", "b", "v")):
        self.url = (folder / "bucket").as_uri()
        self.weights, self.trained = make_weights(), trained
        self.base = {**{name: tensor.bfloat16() for name, tensor in self.weights.items()}, **LEFT}
        (folder / "base").mkdir()
        save_file(self.base, folder / "base" / "model.safetensors")
        self.folder = folder / "base"
        self.publisher = dw.Publisher(dw.open_bucket(self.url, create=True), base=self.folder)
        self.served = []
        self.publish()

    def publish(self):
        if self.served:
            for name in self.trained:
                self.weights[name][0] += 1
        named = {**self.weights, **{name: tensor.float() for name, tensor in LEFT.items()}}
        self.publisher.publish({name: named[name] for name in self.trained})
        self.publisher.flush(10)
        self.served.append({name: tensor.bfloat16() for name, tensor in self.weights.items()})


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    run.publisher.close(10)


@pytest.mark.parametrize("workers", [1, 2])
def test_frozen_tensors_that_no_worker_loads_count_as_the_base_has_them(run, workers):
    models = [Text(run.base)] if workers == 1 else [TextShard(run.base, rank) for rank in range(2)]
    with (
        StubEngine(*models) as engine,
        Follower(run.url, EngineClient(engine.url), base=run.folder) as follower,
        EngineClient(engine.url) as client,
    ):
        assert follower.step() is None  # the base is version 0, and found to be
        for version in (1, 2):
            run.publish()
            report = follower.step()
            assert (report.version, report.from_version) == (version, version - 1)
        models[0].v.data[0] = 42.0  # an update that starts from an anchor stages all that there is
        run.publish()
        with pytest.raises(dw.DeltaWireError, match="something else wrote to"):
            follower.step()
        assert (follower.step().version, follower.step()) == (3, None)
        held = models[0].served() if workers == 1 else Shard.served(models)
        assert dw.equal(held, run.served[3])
        audit = client.audit()
        assert (audit.position.version, audit.mismatched, sorted(audit.frozen)) == (3, [], sorted(LEFT))
        assert audit.digests == {name: f"{value:016x}" for name, value in dw.digest(held).items()}
        assert [sorted(worker.frozen) for worker in client.placement()] == [sorted(LEFT)] * workers
        said = CliRunner().invoke(app, ["audit", "--engine", engine.url]).output
        assert "3 tensors, all equal; 2 that the run never changes are not loaded by this server" in said
        said = CliRunner().invoke(app, ["inspect", "--engine", engine.url]).output
        assert said.count("not loaded here") == 2 * workers
        models[-1].v.data[3] = 42.0
        assert client.audit().mismatched == ["v"]


def test_a_run_that_was_pruned_to_an_anchor_still_says_what_its_frozen_tensors_are(run, tmp_path):
    for _ in range(3):
        run.publish()
    bucket, name = run.publisher.bucket, run.publisher.position.run
    with Compactor(bucket, tmp_path / "mirror", anchors=1, base=run.folder) as compactor:
        compactor.step()
    retention.carry_out(bucket, retention.find_prunable(bucket, name, retention.Policy(1, -1.0)))
    with dw.Subscriber(bucket) as subscriber:
        assert subscriber.commits()[0].version > 0
    worker = LiveWorker(Text(run.served[3]), loading=AfterLoading())
    worker.attach(run.url)
    assert worker.position.version == 3


@pytest.mark.parametrize("trained", [("a", "b", "v", "mtp.norm"), ("mtp.norm",)])
def test_a_tensor_that_is_trained_and_that_no_worker_loads_is_refused(tmp_path, trained):
    run = Run(tmp_path, trained)
    worker = LiveWorker(Text(run.base), loading=AfterLoading())
    worker.attach(run.url)
    error = worker.status().error
    assert error.kind == EngineUnsupported.__name__
    assert error.message.startswith("1 tensors cannot be patched in place on this server: mtp.norm (the model does")
    run.publisher.close(10)


def test_a_plain_module_may_do_without_what_the_run_never_changes(run):
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(shape), requires_grad=False) for name, shape in
                                    (("a", (8, 100)), ("b", (8, 100)), ("v", (16,)))})  # fmt: skip
    run.publish()
    with follow(model, run.url, base=run.folder) as follower:
        assert follower.step().version == 1
        assert dw.equal(dict(model.named_parameters()), {name: t.float() for name, t in run.served[1].items()})
    del model["v"]
    with pytest.raises(EngineUnsupported, match=r"^1 tensors .*: v \(the model does not load it"):
        follow(model, run.url)


WHOLE = [Box(0, (4,), (1,))]


def test_of_a_frozen_tensor_that_some_worker_loads_every_element_must_be_somewhere():
    half = [Box(0, (2,), (1,))]
    assert Coverage({"x": 4}, [{}, {}], frozen={"x": 7}).digests([{}, {}]) == ({"x": 7}, [])
    coverage = Coverage({"x": 4}, [{}, {"x": WHOLE}], frozen={"x": 7})
    assert (coverage.digests([{}, {"x": [9]}]), coverage.left_out) == (({"x": 9}, []), [])
    with pytest.raises(EngineUnsupported, match="2 of its 4 elements arrive"):
        Coverage({"x": 4}, [{}, {"x": half}], frozen={"x": 7})
    with pytest.raises(EngineUnsupported, match="does not load it"):
        Coverage({"x": 4, "y": 4}, [{"x": WHOLE}], frozen={"x": 7})
