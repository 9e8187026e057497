"""Files that are not what was written: made anew, or refused, never believed."""

import gzip
import random
import shutil
from pathlib import Path
from pprint import pformat

import pytest
import tiny
from record import FULL, record

import kedit
from kedit import KeditError
from kedit.editors import training
from kedit.editors.second_moments import SecondMoments
from kedit.model.lm import load
from kedit.store import Store
from kedit.study.params import Params
from kedit.study.results import Results

pytestmark = pytest.mark.slow


def flipped(data: bytes, dice: random.Random) -> bytes:
    """One bit is another."""
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def zeroed(data: bytes, dice: random.Random) -> bytes:
    """A block is zeros, as after a crash of the machine."""
    begin = dice.randrange(len(data))
    end = min(len(data), begin + 512)
    return data[:begin] + b"\0" * (end - begin) + data[end:]


DAMAGES = {
    "bit flip": flipped,
    "truncation": lambda data, dice: data[: dice.randrange(len(data))],
    "empty file": lambda data, dice: b"",
    "zeros": zeroed,
    "more at the end": lambda data, dice: data + dice.randbytes(dice.randrange(1, 64)),
}


def is_cell(path: Path) -> bool:
    return b'"items"' in path.read_bytes()


def _of_store(runs, cells):
    return [path for path in tiny.units(runs) if is_cell(path) == cells]


KINDS = {
    "cell": lambda runs: _of_store(runs, True),
    "edit": lambda runs: _of_store(runs, False),
    "second moment": lambda runs: [path for path in runs.glob("cache/moments/*/*/*") if path.name.isdigit()],
    "factor": lambda runs: sorted(runs.glob("cache/moments/*/*/*cholesky*")),
    "weights": lambda runs: [runs / "cache" / "models" / tiny.MODEL / "model.safetensors"],
    "tokenizer": lambda runs: sorted((runs / "cache" / "models" / tiny.MODEL).glob("tokenizer*")),
    "configuration": lambda runs: sorted((runs / "cache" / "models" / tiny.MODEL).glob("*config.json")),
}


def wrong_after(world, whole, runs):
    code, printed = world.fork(runs).wait()
    if code:
        return [] if tiny.sentence(code, printed) else [f"no sentence but {code}: {printed[-2000:]}"]
    return [] if tiny.results(runs) == tiny.results(whole) else ["other results"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_not_believe_a_damaged_file(kind, world, whole, tmp_path):
    dice, wrong = random.Random(kind), {}
    for case in range(12 if FULL else 1):
        name = list(DAMAGES)[case % len(DAMAGES)]
        runs = tmp_path / "runs"
        shutil.copytree(whole, runs)
        paths = KINDS[kind](runs)
        assert paths, "there is no such file"
        path = dice.choice(paths)
        damaged = DAMAGES[name](path.read_bytes(), dice)
        changed = damaged != path.read_bytes()
        path.write_bytes(damaged)
        if kind not in ("cell", "edit"):  # else nothing would read it
            shutil.rmtree(runs / "store")
        found = wrong_after(world, whole, runs) if changed else []
        record(f"{kind}: {name}", found)
        if found:
            wrong[case, path.name] = found
        shutil.rmtree(runs)
    assert not wrong, pformat(wrong)


@pytest.mark.parametrize("kind", ["cell", "edit"])
def test_a_run_does_not_believe_files_that_were_exchanged(kind, world, whole, tmp_path):
    dice, wrong = random.Random(kind), {}
    for case in range(6 if FULL else 1):
        runs = tmp_path / "runs"
        shutil.copytree(whole, runs)
        one, other = dice.sample(sorted(KINDS[kind](runs)), 2)
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        found = wrong_after(world, whole, runs)
        record(f"{kind}: exchanged with another", found)
        if found:
            wrong[case] = found
        shutil.rmtree(runs)
    assert not wrong, pformat(wrong)


def test_the_store_gives_back_what_was_put_or_nothing(whole, tmp_path):
    dice, store = random.Random(0), Store(tmp_path)
    paths = sorted(tiny.units(whole))
    payloads = {path.name: Store(whole / "store").get(path.name) for path in paths}
    assert None not in payloads.values()
    for case in range(300 if FULL else 50):
        name = list(DAMAGES)[case % len(DAMAGES)]
        path = dice.choice(paths)
        there = store.path(path.name)
        there.parent.mkdir(exist_ok=True)
        there.write_bytes(DAMAGES[name](path.read_bytes(), dice))
        good = store.get(path.name) in (None, payloads[path.name])
        record(f"store: {name}", [] if good else [path.name])
        assert good, (name, path.name)
        there.unlink(missing_ok=True)


@pytest.mark.parametrize("file", ["cells.jsonl.gz", "manifest.json"])
def test_results_are_what_was_saved_or_are_refused(file, world, whole, tmp_path, monkeypatch):
    dice, place = random.Random(file), whole / "rq1" / "tiny"
    monkeypatch.chdir(world.folder)
    params = Params.read("rq1/tiny.yaml")
    good = Results.load(params, place)
    shutil.copytree(place, tmp_path / "tiny")
    for case in range(300 if FULL else 50):
        name = list(DAMAGES)[case % len(DAMAGES)]
        (tmp_path / "tiny" / file).write_bytes(DAMAGES[name]((place / file).read_bytes(), dice))
        try:
            found = Results.load(params, tmp_path / "tiny")
            fine = (found.cells, found.edits) == (good.cells, good.edits)
            fine &= {key: found.manifest.get(key) for key in good.manifest} == good.manifest
        except KeditError:
            fine = True
        record(f"{file}: {name}", [] if fine else [str(case)])
        assert fine, (case, name)


def test_cells_of_another_run_are_refused(world, whole, tmp_path):
    """Two runs of one parameter file, their cells exchanged: both whole, but not of one run."""
    place, params = whole / "rq1" / "tiny", Params.read(world.folder / "rq1" / "tiny.yaml")
    shutil.copytree(place, tmp_path / "tiny")
    text = gzip.decompress((place / "cells.jsonl.gz").read_bytes()).replace(b'"right": 1', b'"right": 0')
    text = (
        text if text != gzip.decompress((place / "cells.jsonl.gz").read_bytes()) else b"\n".join(text.splitlines()[1:])
    )
    (tmp_path / "tiny" / "cells.jsonl.gz").write_bytes(gzip.compress(text))
    with pytest.raises(KeditError, match="not of one run"):
        Results.load(params, tmp_path / "tiny")
    record("cells.jsonl.gz: of another run")


@pytest.fixture
def model(world, tmp_path, monkeypatch):
    """The tiny model as a run loads it, with a cache of its own."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(world.folder / "wheel"))
    return load(tiny.MODEL)


def test_second_moments_of_another_layer_are_not_taken(model, world):
    def moments():
        return SecondMoments(model, str(world.folder / "text.txt"), 2048)

    first = moments()
    first.prepare([1, 2])
    one, other = sorted(path for path in kedit.store.cache_folder().glob("moments/*/*/[12]*") if path.is_file())
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    again = moments()
    again.prepare([1, 2])
    assert all(again.moment(layer).equal(first.moment(layer)) for layer in (1, 2))
    record("second moment: exchanged with another layer's")


@pytest.mark.parametrize("method", ["mend", "serac"])
def test_a_damaged_artefact_is_refused(method, tmp_path):
    """What training made is committed; it cannot be made anew in passing."""
    dice = random.Random(method)
    (path,) = (kedit.ROOT / "kedit" / "data").glob(f"{method}-smollm2-135m-instruct.*")
    data = path.read_bytes()
    for case in range(20 if FULL else 5):
        name = list(DAMAGES)[case % len(DAMAGES)]
        (tmp_path / path.name).write_bytes(DAMAGES[name](data, dice))
        with pytest.raises(KeditError, match=r"damaged"):
            training.load(tmp_path / path.name, method, "get it again")
        record(f"artefact: {name}")
