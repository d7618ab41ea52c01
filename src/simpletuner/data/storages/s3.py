"""Objects below a prefix of a bucket: Amazon S3 and everything that speaks its language, through s3fs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from simpletuner.data.hashing import stable_hash
from simpletuner.data.storage import (
    CAPTION_EXTENSION,
    EXTENSIONS,
    ChangedFileError,
    FileInfo,
    Listing,
    OtherFiles,
    ranged,
)
from simpletuner.data.storages.errors import StorageError
from simpletuner.data.storages.lazy import Lazy
from simpletuner.data.storages.patience import Patience, TransientError, patiently

if TYPE_CHECKING:
    from s3fs import S3FileSystem

_REFUSED = frozenset(
    (
        "403",
        "AccessDenied",
        "AccountProblem",
        "AllAccessDisabled",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "InvalidToken",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    )
)
_PASSING = frozenset(("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"))
_GONE = frozenset(("404", "412", "NoSuchKey", "PreconditionFailed"))


@dataclass(frozen=True, kw_only=True)
class S3Storage:
    """The objects of `bucket` whose keys begin with `prefix`/. Without keys, those of the environment are used, of a
    profile, or of the machine, as boto finds them."""

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region_name: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    max_pool_connections: int = 16
    patience: Patience = field(default_factory=Patience)
    _files: Lazy[S3FileSystem] = field(default_factory=Lazy, init=False, repr=False, compare=False)

    @property
    def id(self) -> str:
        """s3://bucket/prefix, with the server where it is not Amazon's."""
        place = f"s3://{self.bucket}/{self.prefix.strip('/')}".rstrip("/")
        return f"{place} ({_without_user(self.endpoint_url)})" if self.endpoint_url else place

    @property
    def listed_as(self) -> str:
        """The same."""
        return self.id

    @property
    def is_remote(self) -> bool:
        """Yes."""
        return True

    def list_files(self) -> Listing:
        """List the bucket, a thousand objects per request. Raises StorageError."""
        images: list[FileInfo] = []
        texts: dict[str, FileInfo] = {}
        others: Counter[str] = Counter()
        for found in self._objects():
            key = str(found["Key"])[len(self._start) :]
            if not key or key.endswith("/") or any(part.startswith(".") for part in key.split("/")):
                continue
            file = FileInfo(key=key, size_bytes=int(found["Size"]), version=str(found["ETag"]).strip('"'))
            extension = PurePosixPath(key).suffix.lower()
            if extension in EXTENSIONS:
                images.append(file)
                continue
            others[extension] += 1
            if extension == CAPTION_EXTENSION:
                texts[key] = file
        return Listing(
            images=tuple(sorted(images, key=lambda file: file.key)),
            texts=texts,
            others=tuple(OtherFiles(extension=name, count=count) for name, count in others.most_common()),
        )

    def read(self, file: FileInfo) -> bytes:
        """The whole object. Raises ChangedFileError if it is not the one that was listed, StorageError."""
        return self._get(file)

    def open(self, file: FileInfo) -> BinaryIO:
        """A stream over requests for parts of the object."""
        if file.size_bytes == 0:
            return BytesIO()
        return ranged(lambda start, length: self._get(file, f"bytes={start}-{start + length - 1}"), file.size_bytes)

    def content_of(self, file: FileInfo) -> str | None:
        """The object with its ETag: a hash of the bytes for some ways to upload, and another one for other bytes for
        all. Spares reading every object twice."""
        return stable_hash("s3 object 1", self.id, file.key, file.version, file.size_bytes)

    def is_settled(self, file: FileInfo) -> bool:
        """Yes: ETags do not depend on a clock."""
        return True

    def shown(self, key: str) -> str:
        """s3://bucket/prefix/key."""
        return f"s3://{self.bucket}/{self._start}{key}"

    @property
    def _start(self) -> str:
        prefix = self.prefix.strip("/")
        return f"{prefix}/" if prefix else ""

    def _objects(self) -> Iterator[Mapping[str, Any]]:
        more: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", place=self.id, Bucket=self.bucket, Prefix=self._start, **more)
            yield from page.get("Contents", ())
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _get(self, file: FileInfo, part: str | None = None) -> bytes:
        import fsspec.asyn

        files = self._opened()

        async def fetch(**wanted: str) -> bytes:
            answer = await files._call_s3("get_object", **wanted)
            async with answer["Body"] as body:
                return bytes(await body.read())

        wanted = {"Bucket": self.bucket, "Key": self._start + file.key, "IfMatch": f'"{file.version}"'}
        if part is not None:
            wanted["Range"] = part
        place = self.shown(file.key)

        def attempt() -> bytes:
            with _explained(place):
                data: bytes = fsspec.asyn.sync(files.loop, fetch, **wanted)
            return data

        return patiently(attempt, patience=self.patience, place=place)

    def _call(self, method: str, *, place: str, **wanted: str) -> Mapping[str, Any]:
        files = self._opened()

        def attempt() -> Mapping[str, Any]:
            with _explained(place):
                answer: Mapping[str, Any] = files.call_s3(method, **wanted)
            return answer

        return patiently(attempt, patience=self.patience, place=place)

    def _opened(self) -> S3FileSystem:
        return self._files.get(self._open)

    def _open(self) -> S3FileSystem:
        import s3fs

        files = s3fs.S3FileSystem(
            key=self.access_key_id,
            secret=self.secret_access_key,
            token=self.session_token,
            endpoint_url=self.endpoint_url,
            client_kwargs={"region_name": self.region_name} if self.region_name else {},
            config_kwargs={
                "connect_timeout": self.patience.timeout_s,
                "read_timeout": self.patience.timeout_s,
                "max_pool_connections": self.max_pool_connections,
                "retries": {"total_max_attempts": 1},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        files.retries = 1  # One place counts attempts: `patiently`.
        return files


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Say what an error of the libraries means: it may pass (TransientError), or what has to be mended."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    missing = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.ProfileNotFound,
        boto.CredentialRetrievalError,
    )
    passing = (
        boto.ConnectionError,
        boto.HTTPClientError,
        boto.IncompleteReadError,
        ResponseParserError,
        FSTimeoutError,
    )
    try:
        yield
    except missing as error:
        raise StorageError("E-STORAGE-CREDENTIALS", place=place, reason=str(error)) from error
    except (*passing, aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
        raise TransientError(_text(error)) from error
    except (boto.BotoCoreError, ValueError) as error:
        raise StorageError("E-STORAGE-ANSWER", place=place, reason=_text(error)) from error
    except OSError as error:
        raise _answered(error, place) from error


def _answered(error: OSError, place: str) -> Exception:
    """The meaning of an answer that the service gave with an error code of its own."""
    answer = getattr(error.__cause__ or error, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    reason = f"{code}: {error.strerror or error}" if code else _text(error)
    if code == "NoSuchBucket":
        return StorageError("E-STORAGE-BUCKET", place=place, reason=reason)
    if code in _GONE:
        return ChangedFileError(0, "it changed after it was listed", place)
    if code in _PASSING or status >= 500 or status == 429:
        return TransientError(reason)
    if code in _REFUSED or isinstance(error, PermissionError) or status in (401, 403):
        return StorageError("E-STORAGE-REFUSED", place=place, reason=reason)
    return StorageError("E-STORAGE-ANSWER", place=place, reason=reason)


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
