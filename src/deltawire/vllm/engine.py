"""The weight transfer engine that vLLM creates in each worker: vLLM's names for what a LiveWorker does."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from deltawire.format.codecs import gap, subset
from deltawire.live.worker import LiveWorker
from deltawire.vllm.hooks import LOADING
from deltawire.weights import kernels


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine: what `live.messages.Attach` holds; the
    bucket is optional."""

    request: dict[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: which version of which bucket, and what a follower found it to lead to. `lease` is the
    asker's."""

    bucket: str
    version: int
    root: str | None = None
    lease: str | None = None


class DeltaWireEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Patches this worker's live weights in place, in O(changed). Its calls never raise: ask `deltawire_status`."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kernels.warm_up()  # nothing compiles inside a pause
        gap.warm_up()
        subset.warm_up()
        self.worker = LiveWorker(
            self.model,
            loading=getattr(self.model, LOADING, None),
            workers=self.parallel_config.world_size,
            copies=self.parallel_config.data_parallel_size,
            compiled=not self.model_config.enforce_eager,
            on_thread=self._use_device,
        )

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        """What was asked, as it is: parsing must not raise here."""
        return InitInfo(init_dict if isinstance(init_dict, dict) else {})

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Begin to attach to a bucket, if one is named: probe placement, digest live weights, find the version."""
        if init_info.request.get("bucket") is not None:
            self.worker.begin_attach(init_info.request)

    def start_weight_update(self) -> None:
        """Nothing to prepare: staging has its own call, and needs no session."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Write version `version` of bucket `bucket`, staged before or staged now."""
        self.worker.update(update_info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """vLLM's inner half of update_weights, which this engine overrides whole."""
        self.worker.update(asdict(update_info))

    def finish_weight_update(self) -> None:
        """The update stays: what it replaced is forgotten."""
        self.worker.confirm()

    def shutdown(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        self.worker.close()

    def _use_device(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device)
