"""What is kept on disk: folders named by a digest of everything they depend on, made once and published by rename."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from . import env

_CHUNK_BYTES = 1 << 22


def digest_of_file(path: os.PathLike[str] | str) -> str:
    """SHA-256 of a file's contents, hexadecimal (100 MB take about 0.1 s)."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each with its length before it, so that no two lists run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield


def find(kind: str, key: str) -> pathlib.Path | None:
    """The published folder `kind/key`, or None."""
    folder = env.cache_dir() / kind / key
    return folder if folder.is_dir() else None


def published_folder(kind: str, key: str, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The folder `kind/key` of the cache; `make(folder)` fills it if it is not there yet.

    One process at a time makes a key; others wait for it. A folder appears under its name only when `make` has returned, so a
    crash leaves nothing that looks finished. `key` must name the contents (a digest), never a path or a time.
    """
    parent = env.cache_dir() / kind
    folder = parent / key
    if folder.is_dir():
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent / f"{key}.lock"):
        if folder.is_dir():
            return folder
        for stale in parent.glob(f"{key}.tmp-*"):  # of a process that died: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=parent))
        try:
            make(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder
