"""The weight transfer engine that vLLM creates in each worker: vLLM's names for what a replica does."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from deltawire import kernels
from deltawire.codecs import gap
from deltawire.vllm.hooks import LOADING
from deltawire.vllm.replica import Replica


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine: the bucket to stand on, optional, and the public keys to trust."""

    bucket: str | None = None
    trusted: tuple[str, ...] = ()


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights: which version of which bucket, and what a follower found it to lead to."""

    bucket: str
    version: int
    root: str | None = None


class DeltaWireEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Patches this worker's live weights in place, in O(changed). Its calls never raise: ask `deltawire_status`."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kernels.warm_up()  # nothing compiles inside a pause
        gap.warm_up()
        self.replica = Replica(
            self.model,
            loading=getattr(self.model, LOADING, None),
            workers=self.parallel_config.world_size,
            copies=self.parallel_config.data_parallel_size,
            compiled=not self.model_config.enforce_eager,
            synchronize=self._synchronize,
        )

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        """The bucket and the keys, if named; anything else is ignored, because parsing must not raise here."""
        named = init_dict if isinstance(init_dict, dict) else {}
        bucket, keys = named.get("bucket"), named.get("trusted")
        return InitInfo(
            None if bucket is None else str(bucket), tuple(map(str, keys)) if isinstance(keys, list) else ()
        )

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Attach to a bucket: probe placement, digest live weights, find the version they are."""
        if init_info.bucket is not None:
            self.replica.attach(init_info.bucket, init_info.trusted)

    def start_weight_update(self) -> None:
        """Nothing to prepare: staging has its own call, and needs no session."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Write version `version` of bucket `bucket`, staged before or staged now."""
        self.replica.commit(update_info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """vLLM's inner half of update_weights, which this engine overrides whole."""
        self.replica.commit(asdict(update_info))

    def finish_weight_update(self) -> None:
        """The update stays: what it replaced is forgotten."""
        self.replica.confirm()

    def shutdown(self) -> None:
        """Forget the bucket and its downloads; the weights stay as they are."""
        self.replica.close()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
