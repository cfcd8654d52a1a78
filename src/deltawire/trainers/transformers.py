"""A `transformers.Trainer` publishes each policy it makes: a version after every optimizer step.

    from deltawire.trainers.transformers import DeltaWeightSyncCallback
    trainer.add_callback(DeltaWeightSyncCallback("hf://buckets/me/run"))

Gradient accumulation is respected: batches that do not step the optimizer publish nothing.
"""

import atexit
import inspect
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from torch import nn

from deltawire.buckets import open_bucket
from deltawire.buckets.atomic import file_system_errors
from deltawire.errors import DeltaWireError
from deltawire.publish.publisher import Publisher
from deltawire.publish.reports import PublishReport
from deltawire.trainers.hook import require_whole
from deltawire.trainers.logs import IntoLogs
from deltawire.trainers.rounding import RoundingWatch
from deltawire.trainers.state import checkpoint_tensors

try:
    from transformers import TrainerCallback, TrainerState, TrainingArguments
except ImportError:
    raise ImportError("the Trainer callback needs transformers: pip install 'deltawire[transformers]'") from None


class DeltaWeightSyncCallback(TrainerCallback):
    """Publishes the starting weights when training begins and the new ones after each optimizer step.

    `publisher` is the URL of a bucket or a Publisher. For a URL the callback opens a Publisher when training begins,
    with `options` as its keywords, and closes it when training ends; without `base` or `assets`, the anchor gets the
    model's config and the tokenizer of the trainer. A Publisher of yours is flushed when training ends; you close it.

    A version's `step` is the trainer's `global_step`. The numbers in the trainer's logs that `metrics` names go into
    the next commit. A trainer logs a step only after it ended, so `logged_step` says which step they belong to. Where
    16-bit weights lose most of an update to rounding, a warning says so once. `rounding_lost` is then among the numbers
    of the commits it was measured for (`trainers.rounding`).

    What each publish reports goes into the trainer's own logs as `deltawire/…`, and so to W&B, Trackio, TensorBoard or
    whatever it reports to.

    With `train(resume_from_checkpoint=…)` the run goes on: the checkpoint's weights become the next version, even where
    versions published later than that checkpoint stand before it. In a job of several processes the first publishes.

    A trainer whose `train()` raises calls no callback. Use the callback as a context manager around `train()` to send
    what was captured; otherwise that is tried when the process exits, for as long as a Publisher does.

    `patience`: seconds to wait at the end of training for the upload. Raises what `Publisher` and `publish` raise;
    BadUrl and TypeError for misspelt arguments; Unavailable when patience runs out; DtypeMismatch for a model whose
    weights are sharded.
    """

    def __init__(
        self,
        publisher: Publisher | str,
        *,
        metrics: Iterable[str] = ("loss", "reward"),
        patience: float = 600.0,
        **options: Any,
    ) -> None:
        if isinstance(publisher, Publisher) and options:
            raise TypeError(f"give {', '.join(options)} to the Publisher itself")
        if not isinstance(publisher, Publisher | str):
            kind = type(publisher).__name__
            raise TypeError(f"{kind} is neither the address of a bucket, as file:///folder, nor a Publisher")
        if isinstance(metrics, str):
            raise TypeError(f"metrics={metrics!r}: a list of names, [{metrics!r}]")
        if isinstance(publisher, str):  # what is misspelt is said now, not when training begins
            open_bucket(publisher)
            inspect.signature(Publisher).bind("bucket", **options)
        self.report: PublishReport | None = None
        """what the newest publish captured"""
        self._owner = os.getpid()
        self._url = publisher if isinstance(publisher, str) else None
        self._publisher = publisher if isinstance(publisher, Publisher) else None
        self._options, self._patience, self._names = options, patience, tuple(metrics)
        self._logged: dict[str, float] = {}
        self._rounding = RoundingWatch()
        self._assets: str | None = None

    @property
    def publisher(self) -> Publisher | None:
        """The Publisher in use; None while a callback that opens its own has none open."""
        return self._publisher

    def __enter__(self) -> "DeltaWeightSyncCallback":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if (publisher := self._let_go()) is not None:
            publisher.__exit__(kind, error, trace)

    def close(self, timeout: float | None = None) -> None:
        """Send what was captured and close the Publisher, if the callback opened one. Raises what `Publisher.close`
        raises."""
        if (publisher := self._let_go()) is not None:
            publisher.close(timeout)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        require_whole(kwargs["model"])
        IntoLogs.ahead_of_others(lambda: self.report)
        if not state.is_world_process_zero:
            return
        if self._publisher is None:
            self._publisher = self._open(kwargs["model"], kwargs.get("processing_class"))
        self._publish(kwargs["model"], state, self._logged)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            lost = self._rounding.after_step(kwargs["optimizer"])
            self._publish(kwargs["model"], state, self._logged | lost)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs: Mapping[str, Any] = kwargs.get("logs") or {}
        numbers = {name: float(logs[name]) for name in self._names if isinstance(logs.get(name), int | float)}
        if numbers:
            self._logged = {**numbers, "logged_step": float(state.global_step)}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self._publisher is None:
            return
        if args.load_best_model_at_end:  # the trainer has put other weights in since the last step
            self._publish(kwargs["model"], state, self._logged)
        self._publisher.flush(self._patience)
        self.close(self._patience)

    def _open(self, model: nn.Module, tokenizer: Any) -> Publisher:
        assert self._url is not None
        options = dict(self._options)
        try:
            if options.get("base") is None and options.get("assets") is None:
                with file_system_errors("the folder of temporary files (TMPDIR chooses another)"):
                    self._assets = tempfile.mkdtemp(prefix="deltawire-")
                    atexit.register(_remove, self._assets, os.getpid())
                    _save_assets(self._assets, model, tokenizer)
                options["assets"] = self._assets
            return Publisher(open_bucket(self._url, create=True), **options)
        except BaseException:
            self._let_go()
            raise

    def _publish(self, model: nn.Module, state: TrainerState, metrics: Mapping[str, float]) -> None:
        if self._publisher is None:
            raise DeltaWireError(
                f"{self._url}: this callback was closed, by you or by another training that ended meanwhile; give each "
                "trainer a callback of its own"
            )
        weights = dict(checkpoint_tensors(model))  # a mapping: on a device many tensors are compared at once
        self.report = self._publisher.publish(weights, step=state.global_step, metrics=metrics)

    def _let_go(self) -> Publisher | None:
        """The open Publisher if it is ours, which from here on is the caller's to close."""
        if self._url is None:
            return None
        if self._assets is not None:
            _remove(self._assets, self._owner)
            self._assets = None
        publisher, self._publisher = self._publisher, None
        return publisher


def _remove(folder: str, owner: int) -> None:
    """Remove a temporary folder; a forked child leaves its parent's alone."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _save_assets(folder: str, model: nn.Module, tokenizer: Any) -> None:
    """Write the small files that a checkpoint has beside its weights, as far as the trainer has them."""
    for source in (getattr(model, "config", None), getattr(model, "generation_config", None), tokenizer):
        if source is not None:
            source.save_pretrained(folder)
