"""Crash-safe, content-addressed results, and the one way in which every derived file is written and read.

A key is the hash of everything a result depends on. A file begins with a line, its format and the SHA-256 of key and
payload; the payload follows. It appears under its name only when complete, so a run can be killed at any moment and
two runs can share a store. A file whose line does not fit, because a bit of it is another now or because it belongs
to another key, is as good as none: it is set aside as ``<name>.damaged``, to be looked at, and made anew.

Files that other programs read, as those of a converted model, stay as they are; the sums of such a folder lie among
them in a file of this kind (``seal``, ``is_whole``).
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

from kedit import INSTALLED, ROOT, KeditError

log = logging.getLogger(__name__)

VERSION = 2
"""Part of every key; raise it when a change to the code changes results."""
FORMAT = "kedit-1"
"""How a derived file is written."""
_NAMES = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EEXIST", "ENOTDIR", "EISDIR", "EFBIG")
REFUSALS = {getattr(errno, name) for name in _NAMES}
"""Errors by which a disk refuses something."""
SUMS = "sums"
"""The file with the sums of a folder's other files."""

for _name in ("KEDIT_RUNS", "KEDIT_CACHE", "KEDIT_MIRROR"):  # which notebooks read elsewhere than the command
    if os.environ.get(_name):
        os.environ[_name] = str(Path(os.environ[_name]).expanduser().absolute())


def runs_folder() -> Path:
    """Where runs keep what they have finished: ``KEDIT_RUNS``, or ``runs/`` of the checkout.

    Of an installed package, which has no checkout, it is ``runs/`` in the working directory.
    """
    return Path(os.environ.get("KEDIT_RUNS") or (Path() if INSTALLED else ROOT) / "runs").absolute()


def cache_folder() -> Path:
    """Converted models and second moments, safe to delete: ``KEDIT_CACHE``, or ``cache/`` among the runs."""
    return Path(os.environ.get("KEDIT_CACHE") or runs_folder() / "cache").absolute()


def digest(*parts: Any) -> str:
    """Hash of JSON-able values, dictionaries in any order."""
    text = json.dumps([VERSION, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# Files --------------------------------------------------------------------------------------------


@contextmanager
def disk(path: Path | None = None) -> Iterator[None]:
    """Within the block, what the disk refuses is one sentence.

    Args:
        path: what is written or read there; by default what the error names.

    Raises:
        KeditError: the disk is full or broken, or the folder or file is not for us.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise KeditError(
            f"{path or error.filename or runs_folder()} cannot be written or read ({error.strerror}); free some space, "
            "let its folder be used or set KEDIT_RUNS and KEDIT_CACHE to others, and run the same command again, it "
            "goes on where it was."
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    Raises:
        KeditError: the disk refuses it.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 32}"):  # by a writer that was killed?
            with suppress(OSError), left.open("r+b") as file:
                if left.stat().st_mtime < time.time() - 0.1:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
                    left.unlink()
        try:
            with temporary.open("wb") as file:
                with suppress(OSError):  # a folder without locks, where such files stay
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _line(key: str, payload: bytes) -> bytes:
    checksum = hashlib.sha256(f"{key}\n".encode())
    checksum.update(payload)
    return f"{FORMAT} {checksum.hexdigest()}".encode()


def write(path: Path, key: str, payload: bytes) -> None:
    """Write a derived file.

    Raises:
        KeditError: the disk refuses it.
    """
    write_atomic(path, _line(key, payload) + b"\n" + payload)


def read(path: Path, key: str, remedy: str = "") -> bytes | None:
    """The payload of a derived file; None if there is none, or none any more because it was damaged.

    Args:
        remedy: what the user must do about a damaged file that is not derived here, such as a committed one.

    Raises:
        KeditError: the disk refuses it, or it is damaged and there is a remedy.
    """
    with disk(path):
        try:
            line, _, payload = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
    if line == _line(key, payload):
        return payload
    if remedy:
        raise KeditError(f"{path} is damaged; {remedy}.")
    set_aside(path)
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged file or folder, so that it can be looked at and made anew.

    Raises:
        KeditError: the disk refuses it.
    """
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{uuid4().hex[:8]}")
    log.warning("%s is damaged, or not of this key or format: set aside as %s, to be made anew", path, aside.name)
    with disk(path), suppress(FileNotFoundError):  # somebody else was faster
        path.rename(aside)


def _sums(folder: Path) -> dict[str, int]:
    """CRC-32 of every file in a folder, a third of a second where SHA-256 takes one; its own name apart."""
    sums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            sums[name] = 0
            while piece := file.read(1 << 20):
                sums[name] = zlib.crc32(piece, sums[name])
    return sums


def seal(folder: Path, key: str) -> None:
    """Write down the sums of a folder's files, by which ``is_whole`` knows them."""
    write(folder / SUMS, key, json.dumps(_sums(folder)).encode())


def is_whole(folder: Path, key: str) -> bool:
    """Whether a folder holds the very files that were sealed."""
    with disk(folder):
        return (sealed := read(folder / SUMS, key)) is not None and json.loads(sealed) == _sums(folder)


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a claim to what is made at a path; whether it was to be had is what the block gets.

    A claim is a lock on the file ``.<name>.lock``. The system gives it up when its process ends, however that ends: at
    once on one machine, on a shared folder when the server has noticed that a machine is gone (NFS: 90 seconds).

    Args:
        wait: until whoever has it is done.

    Raises:
        KeditError: the disk refuses it.
    """
    lock = path.with_name(f".{path.name}.lock")
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    with disk(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("wb")
    with file:
        try:
            fcntl.flock(file, how)
            held = os.fstat(file.fileno()).st_nlink > 0  # else its holder has removed it since
        except BlockingIOError:
            held = False
        except OSError:  # a folder without locks: two may do the same, and find the same
            held = True
        if wait and not held:
            with claim(path, wait) as held:
                yield held
            return
        try:
            yield held
        finally:
            if held:
                lock.unlink(missing_ok=True)


class Store:
    """A folder of results by key; by default that of all runs."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or runs_folder() / "store"

    def path(self, key: str) -> Path:
        """Where a key's file is or would be."""
        return self.folder / key[:2] / key

    def put(self, key: str, payload: bytes) -> None:
        """Keep a payload."""
        write(self.path(key), key, payload)

    def get(self, key: str) -> bytes | None:
        """The payload, or None if there is none or it is damaged (which is logged)."""
        return read(self.path(key), key)

    def put_json(self, key: str, value: Any) -> None:
        """Keep a JSON-able value."""
        self.put(key, json.dumps(value, ensure_ascii=False).encode())

    def get_json(self, key: str) -> Any:
        """The value, or None."""
        payload = self.get(key)
        return None if payload is None else json.loads(payload)
