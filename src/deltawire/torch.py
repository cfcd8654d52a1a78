"""Follow a bucket with a plain `torch.nn.Module` in this process: a transformers model used for evaluation, say."""

from collections.abc import Iterable
from pathlib import Path

try:
    import torch
    from torch import nn
except ImportError:
    raise ImportError("following with a module needs torch: pip install 'deltawire[torch]'") from None

import msgspec

from deltawire.errors import EngineError, NotFound, recorded_error
from deltawire.follow.loop import FollowLoop
from deltawire.follow.options import FollowOptions
from deltawire.live.transforms import AfterLoading
from deltawire.live.worker import LiveWorker
from deltawire.prepare.names import NameMap
from deltawire.read.seen import given
from deltawire.runlog.records import Position


def follow(
    model: nn.Module,
    bucket: str,
    *,
    names: NameMap | None = None,
    base: Path | str | None = None,
    trusted: Iterable[str | Path] = (),
    state: Path | str | None = None,
    run: str | None = None,
) -> "ModelFollower":
    """A follower of `bucket` for `model`, whose parameters and buffers have the checkpoint's names, or those that
    `names` leads to them: `name_map(model)` of `deltawire.trainers.conversion` for a transformers model. Tensors that
    the run never changes need not be there. On a GPU a block of memory for updates is taken beside it, as large as
    `DELTAWIRE_ARENA` says (256 MiB).

    Weights are patched in place, in the dtype the run ships. They may be fp32 where it ships bf16, or bf16 while all
    that it ships as F32 fits. `base` is a folder with the run's base checkpoint, where it starts from one by reference.
    `trusted` are public keys, or files of them, one of which must have signed every record; going back then takes
    `step(version)`. `state` is a file that remembers the newest signed version across restarts. `run` names the only
    run that is followed, beside those that continue it.

    Raises BucketError, FormatError, ChainError, and EngineUnsupported naming the tensors of the run that the model does
    not hold.
    """
    return ModelFollower(model, bucket, names, FollowOptions(base=base, trusted=trusted, state=state, run=run))


class ModelFollower(FollowLoop[Position]):
    """Keeps a module at a version of one bucket; between calls of `step` nothing changes, unless `run` runs."""

    def __init__(
        self,
        model: nn.Module,
        bucket: str,
        names: NameMap | None = None,
        options: FollowOptions | None = None,
    ) -> None:
        options = options or FollowOptions()
        super().__init__(bucket, options, server="model", state=given(options.state), any_run=True)
        self._worker = LiveWorker(_ByName(model, names), loading=AfterLoading())
        self._attach()

    @property
    def position(self) -> Position | None:
        """The version the module holds, None while that is no committed one."""
        return self._worker.position

    def step(self, version: int | None = None) -> Position:
        """Bring the module to a version, older or newer; by default the newest. Verified before anything is written.

        Raises BucketError, FormatError, ChainError, ApplyError; the module then holds what it held.
        """
        position = self._step(self.options.pin if version is None else version)
        if position is None:
            raise NotFound(self.health.waiting) if self.health.waiting else EngineError("this follower is closed")
        return position

    def _greet(self) -> None:
        self.source.refresh()  # what was taken back is seen
        self._attach()

    def _advance(self, target: Position) -> Position:
        self._worker.commit({"bucket": self.bucket.url, "version": target.version})
        self._check()
        self._worker.confirm()
        position = self._worker.position
        assert position is not None
        self.health.is_current(position)
        return position

    def _ask_server(self) -> Position | None:
        return self.position

    def _let_go_of_server(self) -> None:
        self._worker.close()

    def _attach(self) -> None:
        self._worker.attach(self.bucket.url, self.source.trust.keys, self.source.base)
        self._check()
        status = self._worker.status()
        self.beats.codecs, self.beats.cuts = status.codecs, status.cuts

    def _check(self) -> None:
        if (problem := self._worker.status().error) is not None:
            raise recorded_error(msgspec.to_builtins(problem))


class _ByName(nn.Module):  # type: ignore[misc]
    """A module with the loader that a server's have: here every tensor goes where its name says."""

    def __init__(self, model: nn.Module, names: NameMap | None) -> None:
        super().__init__()
        self.model, self._names = model, names

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self.model.state_dict().items()
        held = dict(own if self._names is None else self._names(own))
        for name, tensor in weights:
            if name in held:  # else it is for `Coverage` to say whether the run can do without
                held[name].copy_(tensor)
