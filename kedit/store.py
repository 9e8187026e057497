"""Crash-safe, content-addressed results: a key is the hash of everything a result depends on.

A file holds its payload's checksum and the payload, and appears under its name only when complete, so
a run can be killed at any moment and two runs can share a store.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from kedit import ROOT

log = logging.getLogger(__name__)

VERSION = 2
"""Part of every key; raise it when a change to the code changes results."""


def runs_folder() -> Path:
    """Where runs keep what they have finished: ``KEDIT_RUNS``, or ``runs/`` of the checkout."""
    return Path(os.environ.get("KEDIT_RUNS") or ROOT / "runs").absolute()


def cache_folder() -> Path:
    """Converted models and second moments, safe to delete: ``KEDIT_CACHE``, or ``cache/`` among the runs."""
    return Path(os.environ.get("KEDIT_CACHE") or runs_folder() / "cache").absolute()


def digest(*parts: Any) -> str:
    """Hash of JSON-able values, dictionaries in any order."""
    text = json.dumps([VERSION, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Store:
    """A folder of results by key; by default that of all runs."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or runs_folder() / "store"

    def path(self, key: str) -> Path:
        """Where a key's file is or would be."""
        return self.folder / key[:2] / key

    def put(self, key: str, payload: bytes) -> None:
        """Keep a payload."""
        write_atomic(self.path(key), hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)

    def get(self, key: str) -> bytes | None:
        """The payload, or None if there is none or it is damaged (which is logged)."""
        try:
            checksum, _, payload = self.path(key).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(payload).hexdigest().encode() != checksum:
            log.warning("%s is damaged and will be computed again", self.path(key))
            return None
        return payload

    def put_json(self, key: str, value: Any) -> None:
        """Keep a JSON-able value."""
        self.put(key, json.dumps(value, ensure_ascii=False).encode())

    def get_json(self, key: str) -> Any:
        """The value, or None."""
        payload = self.get(key)
        return None if payload is None else json.loads(payload)
