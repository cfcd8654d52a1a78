"""Follow a bucket with a plain `torch.nn.Module` in this process: a transformers model used for evaluation, say."""

from collections.abc import Iterable
from pathlib import Path

try:
    import torch
    from torch import nn
except ImportError:
    raise ImportError("following with a module needs torch: pip install 'deltawire[torch]'") from None

from deltawire.buckets import open_bucket
from deltawire.errors import named_error
from deltawire.live.post_load import AfterLoading
from deltawire.live.worker import Replica
from deltawire.prepare.names import NameMap
from deltawire.read.seen import Seen, given
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.runlog.signing import trust


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
    the run never changes need not be there.

    Weights are patched in place, in the dtype the run ships, or in fp32 where it ships bf16, or in bf16 while all that
    it ships as F32 fits. `base` is a folder with the run's base checkpoint, where it starts from one by reference.
    `trusted` are public keys, or files of them, one of which must have signed every record; going back then takes
    `step(version)`. `state` is a file that remembers the newest signed version across restarts. `run` names the only
    run that is followed, beside those that continue it.

    Raises BucketError, FormatError, ChainError, and EngineUnsupported naming the tensors of the run that the model does
    not hold.
    """
    return ModelFollower(model, bucket, names, trusted, base=base, seen=Seen(given(state), run=run))


class ModelFollower:
    """Keeps a module at a version of one bucket; between calls of `step` nothing changes."""

    def __init__(
        self,
        model: nn.Module,
        bucket: str,
        names: NameMap | None = None,
        trusted: Iterable[str | Path] = (),
        *,
        base: Path | str | None = None,
        seen: Seen | None = None,
    ) -> None:
        self._bucket, self._trust, self._base = bucket, trust(trusted), base
        self._seen = seen or Seen()
        self._replica = Replica(_ByName(model, names), loading=AfterLoading())
        self._attach()

    def __enter__(self) -> "ModelFollower":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the bucket; the weights stay as they are."""
        self._replica.close()

    @property
    def position(self) -> Position | None:
        """The version the module holds, None while that is no committed one."""
        return self._replica.position

    def step(self, version: int | None = None) -> Position:
        """Bring the module to a version, older or newer; by default the newest. Verified before anything is written.

        Raises BucketError, FormatError, ChainError, ApplyError; the module then holds what it held.
        """
        self._attach()
        with self._subscriber() as subscriber:
            newest = subscriber.latest()
            self._seen.admit(subscriber, newest, pinned=version is not None)
        version = newest.version if version is None else version
        self._replica.commit({"bucket": self._bucket, "version": version})
        self._check()
        self._replica.confirm()
        position = self._replica.position
        assert position is not None
        return position

    def _subscriber(self) -> Subscriber:
        return Subscriber(open_bucket(self._bucket), trusted=self._trust)

    def _attach(self) -> None:
        self._replica.attach(self._bucket, self._trust.keys, self._base)
        self._check()

    def _check(self) -> None:
        if (problem := self._replica.answer_status({})["error"]) is not None:
            raise named_error(problem)


class _ByName(nn.Module):  # type: ignore[misc]
    """A module with the loader that vLLM's have: here every tensor goes where its name says."""

    def __init__(self, model: nn.Module, names: NameMap | None) -> None:
        super().__init__()
        self.model, self._names = model, names

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self.model.state_dict().items()
        held = dict(own if self._names is None else self._names(own))
        for name, tensor in weights:
            if name in held:  # else it is for `Union` to say whether the run can do without
                held[name].copy_(tensor)
