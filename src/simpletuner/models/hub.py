"""Files of a hub repository: from the local cache if it has them, else only those that are asked for.

The library behind it honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and the proxy variables by itself. It is
imported only when a repository is named.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simpletuner.problems import ExitCode, ModelError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

_RESERVE_BYTES = 256 << 20  # left free on the disk beside a download
_TELL_EVERY_S = 0.25
_BYTES_BAR = "huggingface_hub.snapshot_download"  # the library's name for its bar of bytes on disk


@dataclass(frozen=True, kw_only=True)
class Hub:
    """How to reach the hub. None leaves a setting to the library and its environment variables."""

    endpoint: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RepoRef:
    """A repository at a revision (branch, tag or commit; None: the default branch), and the option that named it."""

    name: str
    revision: str | None
    option: str


@dataclass(frozen=True, kw_only=True)
class Download:
    """How far a download is: first told with `done_bytes` 0, then a few times a second from worker threads in turn."""

    repo: str
    num_files: int
    size_bytes: int
    done_bytes: int


OnDownload = Callable[[Download], None]
OnBytes = Callable[[int], None]


def cached_snapshot(hub: Hub, repo: RepoRef, patterns: Sequence[str]) -> Path | None:
    """Folder of the repository's snapshot in the local cache; None if there is none, or without these files.

    A snapshot made by another program may lack files without the cache knowing it: check for those you need.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _explained(hub, repo):
        try:
            folder = snapshot_download(
                repo.name,
                revision=repo.revision,
                cache_dir=hub.cache_dir,
                allow_patterns=list(patterns),
                local_files_only=True,
            )
        except LocalEntryNotFoundError:
            return None
    return Path(folder)


def fetch(hub: Hub, repo: RepoRef, patterns: Sequence[str], *, on_bytes: OnBytes | None = None) -> Path:
    """Download the files that match `patterns` and are not in the cache yet; return the snapshot's folder.

    The folder's name is the commit. A pattern that matches nothing is no error. `on_bytes` is told of every piece
    that is on disk, from worker threads.

    Raises:
        ModelError: E-HUB-..., exit code HUB: no such repository or revision, no access, no network, no disk space.
    """
    from huggingface_hub import snapshot_download

    with _explained(hub, repo):
        folder = snapshot_download(
            repo.name,
            revision=repo.revision,
            endpoint=hub.endpoint,
            cache_dir=hub.cache_dir,
            library_name="simpletuner",
            allow_patterns=list(patterns),
            tqdm_class=_bar_class(on_bytes),
        )
    return Path(folder)


def fetch_large(hub: Hub, repo: RepoRef, patterns: Sequence[str], on_download: OnDownload | None = None) -> Path:
    """`fetch`, but first ask for the sizes, make sure that the disk has room for them, and announce them."""
    from huggingface_hub import snapshot_download

    with _explained(hub, repo):
        files = snapshot_download(
            repo.name,
            revision=repo.revision,
            endpoint=hub.endpoint,
            cache_dir=hub.cache_dir,
            library_name="simpletuner",
            allow_patterns=list(patterns),
            dry_run=True,
            tqdm_class=_bar_class(None),
        )
    sizes_bytes = [file.file_size or 0 for file in files if file.will_download]
    if not sizes_bytes:
        return fetch(hub, repo, patterns)
    download = Download(repo=repo.name, num_files=len(sizes_bytes), size_bytes=sum(sizes_bytes), done_bytes=0)
    _check_space(hub, repo, download.size_bytes)
    if on_download is None:
        return fetch(hub, repo, patterns)
    on_download(download)
    return fetch(hub, repo, patterns, on_bytes=_Progress(download, on_download).add)


def file_names(hub: Hub, repo: RepoRef) -> tuple[str, ...]:
    """Every file of the repository, for a message that says what there is."""
    from huggingface_hub import HfApi

    with _explained(hub, repo):
        return tuple(HfApi(endpoint=hub.endpoint).list_repo_files(repo.name, revision=repo.revision))


class _Progress:
    """Adds up what worker threads report and passes it on, one at a time and not too often."""

    def __init__(self, download: Download, on_download: OnDownload) -> None:
        self._download = download
        self._on_download = on_download
        self._lock = threading.Lock()
        self._told_at = time.monotonic()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            done_bytes = min(self._download.done_bytes + num_bytes, self._download.size_bytes)
            self._download = replace(self._download, done_bytes=done_bytes)
            now = time.monotonic()
            if now - self._told_at >= _TELL_EVERY_S or done_bytes == self._download.size_bytes:
                self._told_at = now
                self._on_download(self._download)


def _bar_class(on_bytes: OnBytes | None) -> type[Any]:
    """A progress bar for the library that draws nothing and, if it is the one of bytes, reports them."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._report = on_bytes if kwargs.get("name") == _BYTES_BAR else None
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._report is not None and n:
                self._report(int(n))

    return Bar


def _check_space(hub: Hub, repo: RepoRef, needed_bytes: int) -> None:
    folder = _cache_dir(hub)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes + _RESERVE_BYTES:
        raise _problem("E-HUB-DISK", repo, folder=folder, needed=_gigabytes(needed_bytes), free=_gigabytes(free_bytes))


@contextmanager
def _explained(hub: Hub, repo: RepoRef) -> Iterator[None]:
    """Turn the library's errors into problems with a fix."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    endpoint = hub.endpoint or constants.ENDPOINT
    # Of whichever http library this version of the hub library uses.
    http_error = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    try:
        yield
    except GatedRepoError as error:
        raise _problem("E-HUB-GATED", repo, endpoint=endpoint) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _problem("E-HUB-NOT-FOUND", repo, endpoint=endpoint) from error
    except RevisionNotFoundError as error:
        raise _problem("E-HUB-REVISION", repo, revision=repo.revision or "main") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error.__cause__ or error, OfflineModeIsEnabled):
            raise _problem("E-HUB-OFFLINE", repo) from error
        status = _status(error.__cause__)
        if status is not None:
            raise _status_problem(status, repo, endpoint) from error
        raise _problem("E-HUB-UNREACHABLE", repo, endpoint=endpoint) from error
    except HfHubHTTPError as error:
        raise _status_problem(_status(error), repo, endpoint) from error
    except http_error as error:
        raise _problem("E-HUB-UNREACHABLE", repo, endpoint=endpoint) from error
    except OSError as error:
        folder = _cache_dir(hub)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = _gigabytes(shutil.disk_usage(folder).free)
            raise _problem("E-HUB-DISK", repo, folder=folder, needed="?", free=free) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise _problem("E-HUB-CACHE", repo, folder=folder, reason=error.strerror) from error
        raise


def _status(error: BaseException | None) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _status_problem(status: int | None, repo: RepoRef, endpoint: str) -> ModelError:
    code = "E-HUB-DENIED" if status in (401, 403) else "E-HUB-FAILED"
    return _problem(code, repo, endpoint=endpoint, status=status)


def _problem(code: str, repo: RepoRef, **params: object) -> ModelError:
    problem = Problem(code=code, params={"repo": repo.name, **params}, path=f"/{repo.option}")
    return ModelError(problem, ExitCode.HUB)


def _cache_dir(hub: Hub) -> Path:
    from huggingface_hub import constants

    return hub.cache_dir or Path(constants.HF_HUB_CACHE)


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f}"
