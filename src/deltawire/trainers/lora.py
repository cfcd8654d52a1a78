"""A PEFT adapter as a run of its own: the tensors each publish gives, and the config that makes its anchor an adapter.

    publisher = dw.Publisher(bucket, assets=lora.save_config(model, "adapter"))
    publisher.publish(lora.adapter_tensors(model), step=step)

Every version then materialises as a PEFT adapter folder, and `deltawire follow --adapter NAME` has vLLM load it.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltawire.buckets.atomic import file_system_errors
from deltawire.errors import UnknownTensor
from deltawire.format.checkpoint import ADAPTER_CONFIG
from deltawire.publish.fsdp import reshard

try:
    import peft
except ImportError:
    raise ImportError("publishing adapters needs peft: pip install 'deltawire[trl]'") from None


def adapter_tensors(model: Any, *, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """The tensors of one adapter of a PeftModel, (name, tensor), under the names and in the dtypes PEFT saves them in:
    LoRA matrices, biases and modules trained whole. Nothing of the base model.

    A Publisher casts them to its `dtype`, "BF16" by default: what vLLM holds of an adapter beside a bf16 model.
    Raises UnknownTensor for an adapter the model does not have.
    """
    _require(model, adapter)
    reshard(model)
    # not "auto": it asks the Hub whether the vocabulary was resized, at every publish
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    yield from state.items()


def save_config(model: Any, folder: str | Path, *, adapter: str = "default") -> Path:
    """Write an adapter's adapter_config.json into a folder, made if need be; the folder, for `assets=`.

    Raises UnknownTensor for an adapter the model does not have, OutOfSpace, BucketError.
    """
    _require(model, adapter)
    config = copy.copy(model.peft_config[adapter])
    config.inference_mode = True  # as PEFT saves it, for those who load it to serve it
    with file_system_errors(str(Path(folder) / ADAPTER_CONFIG)):
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
    return Path(folder)


def _require(model: Any, adapter: str) -> None:
    if not hasattr(model, "peft_config"):
        raise UnknownTensor(f"{type(model).__name__} has no adapter: pass what peft.get_peft_model returned")
    if adapter not in model.peft_config:
        raise UnknownTensor(f"the model has no adapter {adapter!r}; it has {', '.join(sorted(model.peft_config))}")
