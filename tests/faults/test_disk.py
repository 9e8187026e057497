"""A disk that is full, read-only, broken or not ours: one sentence, nothing half-written, and the run goes on afterwards."""

import builtins
import ctypes
import errno
import io
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from pprint import pformat

import pytest
import tiny
from record import FULL, record

pytestmark = pytest.mark.slow

PLACES = {
    "parameters": r"tiny\.yaml",
    "converted model": r"/models/",
    "second moments": r"/moments/",
    "edits and cells": r"/store/",
    "results": r"cells\.jsonl",
    "manifest": r"manifest\.json",
}
ERRORS = ("ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT") if FULL else ("ENOSPC",)
AFTER = {"edits and cells": (0, 1, 5, 17) if FULL else (5,)}
"""How many of these writes are let through first."""


class _Full(io.BufferedWriter):
    """A file into which nothing more can be written."""

    def __init__(self, path, error: OSError):
        super().__init__(io.FileIO(path, "w"))
        self.error = error

    def write(self, data):
        raise self.error


def break_disk(operation: str, error: str, place: str, after: int) -> None:
    """From now on an operation of this process and its forks on matching paths fails, the first few apart."""
    number, seen = getattr(errno, error), [0]

    def fails(*paths) -> OSError | None:
        paths = [
            Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else os.fspath(path) for path in paths
        ]
        if not any(re.search(place, str(path)) for path in paths):
            return None
        seen[0] += 1
        return OSError(number, os.strerror(number), str(paths[0])) if seen[0] > after else None

    def refusing(function, paths):
        def refuse(*args, **options):
            if error := fails(*args[:paths]):
                raise error
            return function(*args, **options)

        return refuse

    open_file = io.open

    def opened(path, mode="r", *args, **options):
        wanted = not isinstance(path, int) and set(mode) & set("wax+")
        if not wanted or not (error := fails(path)):
            return open_file(path, mode, *args, **options)
        if operation == "open":
            raise error
        return _Full(path, error)

    if operation in ("open", "write"):
        io.open = builtins.open = opened
    else:
        setattr(os, operation, refusing(getattr(os, operation), 2 if operation == "replace" else 1))
        if operation == "replace":
            os.rename = refusing(os.rename, 2)


def broken(function: Callable[[], int], *how) -> int:
    """A function on such a disk."""
    break_disk(*how)
    return function()


CASES = [
    (operation, error, place, after)
    for operation, error, place in product(("open", "write", "fsync", "replace", "mkdir"), ERRORS, PLACES)
    for after in AFTER.get(place, (0,))
]
CASES = [case for number, case in enumerate(CASES) if case[1] == "ENOSPC" or number % 4 == 0]
"""A full disk in every way and place, the other errors, which are told from it nowhere, in a fourth of them."""


def wrong_after(world, whole, runs, code, printed):
    """What is not as it should be after a run met a disk that refused something, or was not in its way."""
    wrong = []
    if code and not tiny.sentence(code, printed):
        wrong.append(f"no sentence but {code}: {printed[-2000:]}")
    wrong += [f"left behind: {name}" for name in tiny.leftovers(runs)]
    code, printed = world.fork(runs).wait()
    if code:
        wrong.append(f"cannot be resumed: {printed[-2000:]}")
    elif tiny.results(runs) != tiny.results(whole):
        wrong.append("other results")
    return wrong


def test_a_disk_that_refuses_is_one_sentence(world, whole, tmp_path):
    wrong, cases = {}, CASES if FULL else CASES[:: len(CASES) // 8]
    for operation, error, place, after in cases:
        runs = tmp_path / "runs"
        code, printed = world.fork(runs, partial(broken, tiny.command, operation, error, PLACES[place], after)).wait()
        found = wrong_after(world, whole, runs, code, printed)
        if code or found:
            record(f"{error} when {place} are written", found)
        if found:
            wrong[operation, error, place, after] = found
        shutil.rmtree(runs)
    assert not wrong, pformat(wrong)


def test_a_publication_that_the_disk_refuses_is_one_sentence(world, whole, tmp_path):
    from kedit.__main__ import main
    from kedit.analysis import report
    from kedit.study.notebook import folder_of
    from kedit.study.params import Params
    from kedit.study.results import Results

    def publish():
        def function(args):
            params = Params.find("rq1", "tiny")
            report.publish(Results.load(params, folder_of(params, "run"), "run"))

        report.redraw, redraw = lambda: function(None) or [], report.redraw
        try:
            return main(["figures"])
        finally:
            report.redraw = redraw

    shutil.copytree(whole, tmp_path / "good")
    code, printed = world.fork(tmp_path / "good", publish).wait()
    assert code == 0, printed
    good, wrong = tiny.results(tmp_path / "good"), {}
    names = (
        ("table.csv", "figure.png", "figure.pdf", "cells.jsonl", "manifest") if FULL else ("table.csv", "figure.pdf")
    )
    ways = list(product(("open", "write", "replace"), ERRORS, names))
    for operation, error, name in [way for number, way in enumerate(ways) if way[1] == "ENOSPC" or number % 4 == 0]:
        runs = tmp_path / "runs"
        shutil.copytree(whole, runs)
        code, printed = world.fork(runs, partial(broken, publish, operation, error, re.escape(name), 0)).wait()
        found = [] if tiny.sentence(code, printed) else [f"no sentence but {code}: {printed[-2000:]}"]
        found += [f"left behind: {name}" for name in tiny.leftovers(runs)]
        found += [f"another {name}" for name, data in tiny.results(runs).items() if data != good[name]]
        if world.fork(runs, publish).wait()[0] or tiny.results(runs) != good:
            found.append("cannot be published afterwards")
        record(f"{error} when a figure or table is written", found)
        if found:
            wrong[operation, error, name] = found
        shutil.rmtree(runs)
    assert not wrong, pformat(wrong)


def _mount(options: str, kind: str, folder: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")


PRIVATE, REMOUNT, READ_ONLY, NEW_NAMESPACE = 1 << 18 | 1 << 14, 32, 1, 0x20000


def on_a_small_disk(folder: Path, kilobytes: int, read_only: bool, out: Path) -> int:
    """Run on a file system of so many kilobytes that this process alone sees; then, enlarged, to the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_NAMESPACE) or libc.mount(b"none", b"/", None, PRIVATE, None):
        return 77  # not allowed here
    folder.mkdir(exist_ok=True)
    _mount(f"size={kilobytes}k", "tmpfs", folder, 0)
    if read_only:
        _mount("", "tmpfs", folder, REMOUNT | READ_ONLY)
    os.environ["KEDIT_RUNS"] = str(folder)
    first = tiny.command()
    left = tiny.leftovers(folder)
    print(f"\nfirst {first}, left behind {left}", flush=True)
    _mount("size=64m", "tmpfs", folder, REMOUNT)
    second = tiny.command()
    print(f"second {second}", flush=True)
    shutil.copytree(folder / "rq1", out)
    return 0


def test_a_full_or_read_only_file_system_is_one_sentence(world, whole, tmp_path):
    sizes = list(range(8, 480, 32)) if FULL else [8, 200]
    wrong = {}
    for kilobytes in [0, *sizes]:
        runs = tmp_path / f"{kilobytes}"
        size = kilobytes or 64_000
        small = partial(on_a_small_disk, runs / "disk", size, not kilobytes, runs / "out" / "rq1")
        code, printed = world.fork(runs, small).wait()
        if code == 77:
            pytest.skip("this user may not mount a file system")
        first, _, rest = printed.partition("\nfirst ")
        found = []
        if not rest.startswith("0,") and not tiny.sentence(int(rest[:1] or 1), first):
            found.append(f"no sentence but {printed[-2500:]}")
        if "left behind []" not in rest:
            found.append(rest.splitlines()[0] if rest else "nothing said")
        if "second 0" not in rest or tiny.results(runs / "out") != tiny.results(whole):
            found.append(f"not the same afterwards: {rest[-2000:]}")
        record("a full file system" if kilobytes else "a read-only file system", found)
        if found:
            wrong[kilobytes] = found
    assert not wrong, pformat(wrong)
