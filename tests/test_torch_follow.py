"""A plain module follows a bucket in its own process."""

import pytest
import torch
from runs import PATIENCE
from transformers import Qwen3Config, Qwen3ForCausalLM

import deltawire as dw
from deltawire.errors import EngineUnsupported, Gap
from deltawire.torch import follow


def model(seed, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, tie_word_embeddings=True, **options)).eval()


@pytest.fixture
def run(tmp_path):
    trained, url = model(0), (tmp_path / "bucket").as_uri()
    with dw.Publisher(dw.open_bucket(url, create=True)) as publisher:
        answers = []

        def publish():
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter.add_(1e-3 * torch.randn_like(parameter))
            publisher.publish(trained.named_parameters())
            publisher.flush(PATIENCE)
            answers.append({name: tensor.detach().bfloat16() for name, tensor in trained.named_parameters()})

        publish()
        yield url, publish, answers


def holds(followed, weights, dtype):
    return dw.equal(dict(followed.named_parameters()), {name: tensor.to(dtype) for name, tensor in weights.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_transformers_model_goes_from_version_to_version_in_place_and_back(run, dtype):
    url, publish, versions = run
    followed = model(1).to(dtype)
    addresses = [parameter.data_ptr() for parameter in followed.parameters()]
    with follow(followed, url) as follower:
        assert follower.position is None
        assert follower.step().version == 0
        assert holds(followed, versions[0], dtype)
        for _ in range(3):
            publish()
        assert follower.step().version == 3
        assert holds(followed, versions[3], dtype)
        assert follower.step(1).version == 1
        assert holds(followed, versions[1], dtype)
        with pytest.raises(Gap):
            follower.step(9)
        assert holds(followed, versions[1], dtype)
        assert follower.position.version == 1
    assert addresses == [parameter.data_ptr() for parameter in followed.parameters()]


def test_weights_that_somebody_trained_on_are_made_right_again(run):
    url, publish, versions = run
    followed = model(1).float()
    with follow(followed, url) as follower:
        follower.step()
        with torch.no_grad():
            for parameter in followed.parameters():
                parameter.add_(1e-5)
        publish()
        with pytest.raises(dw.DeltaWireError, match="something else wrote to"):
            follower.step()
        assert follower.position is None
        assert follower.step().version == 1
        assert holds(followed, versions[1], torch.float32)


def test_a_model_of_another_shape_or_without_a_tensor_is_refused(run):
    url, _, _ = run
    with pytest.raises(EngineUnsupported, match="is the run of the model"):
        follow(torch.nn.Linear(3, 3), url)
    with pytest.raises(EngineUnsupported, match=r"holds torch\.float16, the run ships torch\.bfloat16"):
        follow(model(1).half(), url)
