"""What a store's refusal means: worth another try later, or final, and then what to do about it.

"Later" is no answer, 408, 409 (a conflicting write is under way), 425, 429 and 5xx but 501 and 507. All else is final.
"""

import re
from typing import NamedTuple

from obstore import exceptions

from deltawire.buckets.atomic import file_system_error
from deltawire.errors import AccessRefused, BucketError, NotFound, NotOffered, OutOfSpace, Unavailable


class Said(NamedTuple):
    """What an error text of obstore tells of the answer: its status (0: none came) and S3's code for the reason."""

    status: int
    code: str


class _Meaning(NamedTuple):
    """What a code means, whatever the status, or a status whose code says nothing more."""

    codes: tuple[str, ...]
    statuses: tuple[int, ...]
    kind: type[BucketError]
    says: str


_REGION = "the bucket is in another region, or at another endpoint: set AWS_REGION (and AWS_ENDPOINT_URL) to its own"
_MEANINGS = (
    _Meaning(
        (
            "RequestTimeout",
            "SlowDown",
            "InternalError",
            "ServiceUnavailable",
            "OperationAborted",
            "NoSuchUpload",
            "ConditionalRequestConflict",
            "ServerBusy",
            "OperationTimedOut",
        ),
        (),
        Unavailable,
        "try again later",
    ),
    _Meaning(
        ("RequestTimeTooSkewed", "RequestExpired"),
        (),
        AccessRefused,
        "this host's clock is off; set it, by NTP for instance, and try again",
    ),
    _Meaning(
        (
            "AuthorizationHeaderMalformed",
            "PermanentRedirect",
            "TemporaryRedirect",
            "IncorrectEndpoint",
            "IllegalLocationConstraintException",
        ),
        (301, 302, 307, 308),
        BucketError,
        _REGION,
    ),
    _Meaning(
        (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "InvalidToken",
            "ExpiredToken",
            "TokenRefreshRequired",
            "ExpiredTokenException",
            "InvalidClientTokenId",
            "AuthenticationFailed",
        ),
        (401,),
        AccessRefused,
        "the store does not accept these credentials: they are wrong, or expired",
    ),
    _Meaning(
        ("QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"),
        (507,),
        OutOfSpace,
        "the store has no space left, or its quota is used up",
    ),
    _Meaning(
        ("EntityTooLarge", "RequestBodyTooLarge", "MaxMessageLengthExceeded"),
        (413,),
        BucketError,
        "the store takes no object of this size",
    ),
    _Meaning(("AccessDenied",), (403,), AccessRefused, "these credentials are known, and may not do this here"),
    _Meaning(("NoSuchBucket",), (), NotFound, "no such bucket"),
    _Meaning(("NoSuchKey",), (404,), NotFound, "no such object (or no such bucket)"),
    _Meaning((), (407,), BucketError, "the proxy wants a name and a password, in the variable that names it"),
    _Meaning(("NotImplemented",), (501,), NotOffered, "this store has no such operation"),
    _Meaning((), (400,), BucketError, "most often an expired token or another region"),
)
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_METADATA = re.compile(r"http://(169\.254\.169\.254|169\.254\.170\.\d+|\[?fd00:ec2)|metadata\.google\.internal")
_NOBODY = re.compile(r"credential provider|InstanceMetadata|Unable to open service account|Missing credentials", re.I)
_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; profiles and SSO are read where boto3 is installed "
    "(pip install 'deltawire[s3]'; AWS_PROFILE chooses one)",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to a service account's file, or run "
    "`gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or run `az login` with AZURE_USE_AZURE_CLI=true",
}
"""what gives a store credentials, by the scheme of its address"""


def is_later(status: int) -> bool:
    """Whether an HTTP status says that the same request may succeed later."""
    return status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 507))


def what_was_said(text: str) -> Said:
    """The status and the code in an error text. obstore gives them nowhere else."""
    status, code = _STATUS.search(text), _CODE.search(text)
    return Said(int(status[1]) if status else 0, code[1] if code else "")


def from_status(where: str, said: Said, text: str) -> BucketError:
    """The error for an answer that is no success. `text` is what else is known of it."""
    by_code = (meaning for meaning in _MEANINGS if said.code in meaning.codes)
    by_status = (meaning for meaning in _MEANINGS if said.status in meaning.statuses)
    if meaning := next(by_code, None) or next(by_status, None):
        return meaning.kind(f"{where}: HTTP {said.status}: {meaning.says} ({text})")
    return (Unavailable if is_later(said.status) else BucketError)(f"{where}: {text}")


def from_obstore(where: str, error: Exception, *, scheme: str, through: str) -> BucketError:
    """What obstore raised, as the BucketError that says the same of `where`; `through` names a proxy in the way."""
    text = first_line(error)
    said = what_was_said(text)
    if _METADATA.search(text) or _NOBODY.search(text):  # asked last, when nothing else gave credentials
        return AccessRefused(f"{where}: no credentials were found: {_KEYS.get(scheme, '')} ({text})")
    if said.status:
        return from_status(where, said, text + (through if is_later(said.status) or said.status == 407 else ""))
    if "redirect without LOCATION" in text:
        return BucketError(f"{where}: HTTP 301: {_REGION}")
    if isinstance(error, NotImplementedError | exceptions.NotSupportedError):
        return NotOffered(f"{where}: {text}")
    # obstore has no class for "no answer": where none came, or half of one, it is the general one.
    kind = Unavailable if isinstance(error, exceptions.GenericError | OSError) else BucketError
    return kind(f"{where}: {text}{through if kind is Unavailable else ''}")


def from_anything(where: str, error: Exception) -> BucketError:
    """An error that a store's client lets through untyped: Unavailable, for clients in trouble raise what nobody
    expects; BucketError where no other try can help (a wrong call, a missing package). For a file of this host, what
    the file system said of it."""
    if isinstance(error, OSError) and error.filename is not None:
        return of_this_host(f"{where}: {error.filename} (TMPDIR moves the folder of temporary files)", error)
    hopeless = isinstance(error, TypeError | NotImplementedError | NameError | ImportError | AssertionError)
    kind = BucketError if hopeless else Unavailable
    return kind(f"{where}: the store's client failed with {type(error).__name__}: {first_line(error)}")


def of_this_host(what: str, error: OSError) -> BucketError:
    """What the file system said of a file that is not the bucket's: never NotFound, which is for objects."""
    refusal = file_system_error(what, error, hint="")
    return BucketError(str(refusal)) if isinstance(refusal, NotFound) else refusal


def first_line(error: Exception) -> str:
    """The message in a line, without the query of any address in it: that of a presigned one is a credential."""
    return re.sub(r"\?\S+", "?…", str(error).strip().split("\n", 1)[0])
