"""Any torch loop publishes after each optimizer step, accelerate's prepared one included."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from learners import samples, small_model
from runs import PATIENCE, commits, fresh, publishing, read_weights, served
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import deltawire as dw
from deltawire.errors import DtypeMismatch, MissingTensor
from deltawire.trainers.hook import publish_after_step
from deltawire.trainers.state import checkpoint_tensors
from deltawire.weights.tensors import as_bits

COMPILES = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
"""torch 2.13's own, when its compiler is imported"""


def loss_of(model):
    ids = torch.tensor([sample["input_ids"] for sample in samples(2)])
    return model(input_ids=ids, labels=ids).loss


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def test_every_step_of_a_plain_optimizer_is_a_version_until_the_hook_is_removed():
    bucket, model = fresh(), small_model()
    optimizer = adamw(model)
    with publishing(bucket) as publisher:
        handle = publish_after_step(publisher, model, optimizer, step=10)
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
        policy = served(dict(model.named_parameters()))
        handle.remove()
        optimizer.step()
        publisher.flush(PATIENCE)
    assert [commit.step for commit in commits(bucket)] == [10, 11, 12]
    assert dw.equal(read_weights(bucket), policy)


def test_a_buffer_of_the_checkpoint_is_published_and_one_that_is_made_anew_is_not():
    bucket, model = fresh(), small_model()
    model.register_buffer("bias", torch.zeros(3))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    optimizer = adamw(model)
    with publishing(bucket) as publisher:
        publish_after_step(publisher, model, optimizer)
        model.bias += 1
        optimizer.step()
        publisher.flush(PATIENCE)
    held = served(dict(model.named_parameters())) | {"bias": as_bits(torch.ones(3))}  # in its own dtype
    assert dw.equal(read_weights(bucket), held)


def test_a_buffer_without_bits_can_be_left_out():
    bucket, model = fresh(), small_model()
    model.register_buffer("phases", torch.zeros(3, dtype=torch.complex64))
    with publishing(bucket) as publisher, pytest.raises(DtypeMismatch, match=r"phases.*complex64"):
        publish_after_step(publisher, model, adamw(model))

    def without(pairs):
        return ((name, tensor) for name, tensor in pairs if name != "phases")

    with publishing(bucket, prepare=[without]) as publisher:
        publish_after_step(publisher, model, adamw(model))
    assert read_weights(bucket).keys() == dict(model.named_parameters()).keys()


def test_an_optimizer_that_accelerate_prepared_publishes_only_when_gradients_are_complete():
    for shared in (AcceleratorState, GradientState):  # of the whole process: another test's would hold here
        shared._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bucket, model = fresh(), small_model()
    wrapped, optimizer = accelerator.prepare(model, adamw(model))
    with publishing(bucket) as publisher:
        publish_after_step(publisher, model, optimizer)
        for _ in range(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped))
                optimizer.step()
                optimizer.zero_grad()
        publisher.flush(PATIENCE)
    assert [commit.step for commit in commits(bucket)] == [0, 1, 2]
    assert dw.equal(read_weights(bucket), served(dict(model.named_parameters())))


def test_one_of_several_optimizers_is_refused_and_the_plain_call_after_the_last_works():
    bucket, model = fresh(), small_model()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    both = [torch.optim.SGD(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=1e-3)]
    with publishing(bucket) as publisher:
        with pytest.raises(MissingTensor, match=r"AdamW does not step \d+ of the .*publisher\.publish"):
            publish_after_step(publisher, model, both[1])
        with pytest.raises(MissingTensor, match="list does not step"):
            publish_after_step(publisher, model, both)
        assert publisher.flush(PATIENCE) is None
        loss_of(model).backward()
        for optimizer in both:
            optimizer.step()
        publisher.publish(model.named_parameters(), step=1)
    assert dw.equal(read_weights(bucket), served(dict(model.named_parameters())))


def test_frozen_weights_need_no_optimizer():
    bucket, model = fresh(), small_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    with publishing(bucket) as publisher:
        publish_after_step(publisher, model, optimizer)
        loss_of(model).backward()
        optimizer.step()
    assert dw.equal(read_weights(bucket), served(dict(model.named_parameters())))


@pytest.mark.parametrize("mark", ["ds_id", "_fsdp_flattened"])  # of DeepSpeed and FSDP1
def test_sharded_weights_are_refused_before_anything_is_published(mark):
    bucket, model = fresh(), small_model()
    setattr(model.model.norm.weight, mark, 1)
    with publishing(bucket) as publisher:
        with pytest.raises(DtypeMismatch, match=r"norm\.weight is sharded over processes"):
            publish_after_step(publisher, model, adamw(model))
        assert publisher.flush(PATIENCE) is None


@COMPILES
def test_a_compiled_step_publishes_and_so_does_a_compiled_model_under_the_checkpoints_names():
    bucket, model = fresh(), small_model()
    names = dict(model.named_parameters()).keys()
    model.model.norm = checkpoint_wrapper(model.model.norm)
    whole = torch.compile(model, backend="eager")
    optimizer = adamw(whole)
    step = torch.compile(optimizer.step, backend="eager")
    with publishing(bucket) as publisher:
        publish_after_step(publisher, whole, optimizer)
        for _ in range(2):
            loss_of(model).backward()
            step()
        publisher.flush(PATIENCE)
    assert [commit.step for commit in commits(bucket)] == [0, 1, 2]
    policy = dict(zip(names, model.parameters(), strict=True))
    assert dw.equal(read_weights(bucket), served(policy))


@COMPILES
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_what_a_wrapper_calls_the_weights_is_never_published(wrap):
    model = torch.nn.ModuleDict({"module": torch.nn.BatchNorm1d(3), "head": torch.compile(torch.nn.Linear(3, 2))})
    assert dict(checkpoint_tensors(wrap(model))).keys() == {
        *("module.weight", "module.bias", "module.running_mean", "module.running_var", "module.num_batches_tracked"),
        *("head.weight", "head.bias"),
    }
