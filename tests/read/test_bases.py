"""The checkpoint a run starts from: a folder by its path, a Hub repository by its commit, and every way to lack it."""

import errno
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from httpx2 import ConnectError, Request, Response
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from runs import fresh

from deltawire import Publisher, Subscriber
from deltawire.errors import AccessRefused, BucketError, FormatError, NotFound, OutOfSpace, Unavailable
from deltawire.read.bases import base_of, open_base, require_public, resolve_base
from deltawire.runlog.records import BaseCheckpoint, Run


def answer(kind, status):
    return kind("the Hub's words", response=Response(status, request=Request("GET", "https://hub.test/api")))


HUB_ERRORS = [
    (answer(RepositoryNotFoundError, 401), NotFound, "hf auth login"),
    (answer(RevisionNotFoundError, 404), NotFound, "check the name"),
    (HFValidationError("Repo id must be …"), NotFound, "no folder here|me/base"),
    (answer(GatedRepoError, 403), AccessRefused, "accept its terms"),
    (answer(HfHubHTTPError, 403), AccessRefused, "HTTP 403"),
    (answer(HfHubHTTPError, 503), Unavailable, "HTTP 503"),
    (answer(HfHubHTTPError, 501), BucketError, "HTTP 501"),
    (answer(HfHubHTTPError, 400), BucketError, "HTTP 400"),
    (OSError("I/O error: Not a directory (os error 20)"), BucketError, "HF_HOME|HF_XET_CACHE"),
    (RuntimeError("Task error: no answer"), Unavailable, "pass base="),
    (ConnectError("no route"), Unavailable, "pass base="),
    (OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), Unavailable, "HF_HUB_OFFLINE"),
    (LocalEntryNotFoundError("not in the cache"), Unavailable, "pass base="),
    (OSError(errno.ENOSPC, "No space left on device"), OutOfSpace, "me/base"),
]


@pytest.mark.parametrize(("raised", "kind", "says"), HUB_ERRORS, ids=lambda value: type(value).__name__)
def test_what_the_hub_refuses_is_a_typed_error_that_says_what_to_do(monkeypatch, raised, kind, says):
    def refuse(*arguments, **options):
        raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=says) as resolving:
        resolve_base("me/base")
    with pytest.raises(kind, match=says) as opening:
        open_base(BaseCheckpoint("me/base", "0" * 40))
    assert resolving.value.__cause__ is opening.value.__cause__ is raised
    with pytest.raises(kind):
        Publisher(fresh(), base="me/base")


def test_a_hub_repository_is_pinned_and_opened_at_its_commit(tmp_path, monkeypatch):
    class Info:
        sha = "c" * 40

    asked = []

    def download(source, **options):
        asked.append((source, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, source: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    base = resolve_base("me/base")
    assert base == BaseCheckpoint("me/base", "c" * 40)
    assert open_base(base) == tmp_path
    ((source, options),) = asked
    assert (source, options["revision"]) == ("me/base", "c" * 40)
    assert not any(pattern.endswith((".bin", ".py", ".pt", "*")) for pattern in options["allow_patterns"])


def test_a_folder_is_pinned_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_base("base") == BaseCheckpoint(str((tmp_path / "base").resolve()))
    assert open_base(resolve_base("base")) == (tmp_path / "base").resolve()


def test_a_folder_that_is_elsewhere_is_asked_for():
    with pytest.raises(NotFound, match="pass base=, a folder that holds it"):
        open_base(BaseCheckpoint("/no/such/folder"))


def test_a_run_without_a_base_has_none_to_open():
    with pytest.raises(FormatError, match="names no base"):
        base_of(Run("0" * 16, (), 0.0))


@pytest.mark.parametrize(
    ("source", "revision"),
    [("../../etc", "c" * 40), ("me/base/x", "c" * 40), ("me/base", "../../refs"), ("me/base", "main"), ("", "c" * 40)],
)
def test_what_a_bucket_names_must_be_a_repository_at_a_commit(monkeypatch, source, revision):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **options: pytest.fail("asked"))
    with pytest.raises(FormatError, match="no Hub repository at a commit"):
        base_of(Run("0" * 16, (), 0.0, BaseCheckpoint(source, revision)))


def test_a_folder_that_only_a_bucket_names_is_not_opened(tmp_path):
    with pytest.raises(NotFound, match="--base FOLDER"):
        base_of(Run("0" * 16, (), 0.0, BaseCheckpoint(str(tmp_path))))


@pytest.mark.parametrize(
    ("private", "gated", "public"), [(False, False, True), (True, False, False), (False, "auto", False)]
)
def test_only_a_public_base_goes_from_the_hub_into_a_bucket_unnamed(monkeypatch, private, gated, public):
    asked = []

    def info(self, source, *, revision):
        asked.append((self.token, source, revision))
        return SimpleNamespace(private=private, gated=gated)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    base = BaseCheckpoint("me/base", "c" * 40)
    if public:
        require_public(base)
    else:
        with pytest.raises(AccessRefused, match=r"hf download me/base --revision c{40}"):
            require_public(base)
    assert asked == [(False, "me/base", "c" * 40)]


@pytest.mark.parametrize(("status", "kind"), [(401, AccessRefused), (404, AccessRefused), (503, Unavailable)])
def test_a_base_that_nobody_may_read_without_a_token_is_not_public(monkeypatch, status, kind):
    def refuse(*arguments, **options):
        raise answer(RepositoryNotFoundError if status < 500 else HfHubHTTPError, status)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(kind):
        require_public(BaseCheckpoint("me/base", "c" * 40))


def test_without_huggingface_hub_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'deltawire\[hub\]'"):
        resolve_base("me/base")


def test_a_reader_of_a_base_that_is_no_checkpoint_is_told_which_folder(tmp_path):
    with Subscriber(fresh(), base=tmp_path) as subscriber, pytest.raises(NotFound):
        subscriber.latest()
