import errno
import fcntl
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest

from kedit import KeditError, store
from kedit.store import Store, claim, digest, is_whole, read, seal, write, write_atomic


def test_what_is_put_is_got(tmp_path):
    store = Store(tmp_path)
    key = digest("a", {"b": 1})
    assert store.get(key) is None
    store.put(key, b"line\nline")
    assert store.get(key) == b"line\nline"
    store.put_json(key, {"x": [1, None]})
    assert store.get_json(key) == {"x": [1, None]}


def test_keys_follow_content_not_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest("ab", "c") != digest("a", "bc")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:75] + b"X" + data[76:], lambda data: b"", lambda data: b"x"]
)
def test_a_damaged_file_counts_as_absent_and_is_set_aside(tmp_path, damage, caplog):
    store = Store(tmp_path)
    store.put(digest("k"), b"payload that matters")
    path = store.path(digest("k"))
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert store.get(digest("k")) is None
    assert "is damaged" in caplog.text
    assert str(path) in caplog.text
    assert not path.exists()
    assert path.with_name(f"{path.name}.damaged").read_bytes() == damaged
    store.put(digest("k"), b"made anew")
    assert store.get(digest("k")) == b"made anew"


def test_no_single_bit_can_change_unnoticed(tmp_path):
    path = tmp_path / "file"
    write(path, "key", bytes(range(256)))
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert read(path, "key") is None, bit
        path.with_name("file.damaged").unlink()
    path.write_bytes(data)
    assert read(path, "key") == bytes(range(256))


def test_the_files_of_two_keys_cannot_be_swapped(tmp_path, caplog):
    store, (one, two) = Store(tmp_path), (digest("one"), digest("two"))
    store.put(one, b"first")
    store.put(two, b"second")
    first, second = store.path(one).read_bytes(), store.path(two).read_bytes()
    store.path(one).write_bytes(second)
    store.path(two).write_bytes(first)
    assert store.get(one) is store.get(two) is None
    assert len(caplog.records) == 2


def test_damage_that_only_the_user_can_mend_is_one_sentence(tmp_path):
    write(tmp_path / "file", "key", b"payload")
    with pytest.raises(KeditError, match=r"file is damaged; do this\.$"):
        read(tmp_path / "file", "other", "do this")
    assert read(tmp_path / "file", "key", "do this") == b"payload"  # it stays where it is


@pytest.mark.parametrize("change", ["bit", "absent", "another", "sums", "key", "unsealed"])
def test_a_sealed_folder_is_whole_or_not(tmp_path, change):
    (tmp_path / "part").mkdir()
    for name in ("weights", "part/config"):
        (tmp_path / name).write_bytes(random.Random(name).randbytes(3_000_000))
    seal(tmp_path, "model")
    assert is_whole(tmp_path, "model")
    if change == "bit":
        data = bytearray((tmp_path / "weights").read_bytes())
        data[2_500_000] ^= 4
        (tmp_path / "weights").write_bytes(data)
    elif change == "absent":
        (tmp_path / "part" / "config").unlink()
    elif change == "another":
        (tmp_path / "more").touch()
    elif change == "sums":
        (tmp_path / "sums").write_bytes(b"{}")
    elif change == "unsealed":
        (tmp_path / "sums").unlink()
    assert not is_whole(tmp_path, "another model" if change == "key" else "model")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.replace"])
def test_what_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, where, number):
    with monkeypatch.context() as patch:
        patch.setattr(where, lambda *_, **__: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.raises(KeditError, match=f"folder/file cannot be written .*{os.strerror(number)}.*KEDIT_RUNS"):
            write_atomic(tmp_path / "folder" / "file", b"data")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write_atomic(tmp_path / "folder" / "file", b"data")


def test_a_folder_where_a_file_should_be_is_one_sentence(tmp_path):
    (tmp_path / "file" / "in").mkdir(parents=True)
    with pytest.raises(KeditError, match="file cannot be written or read"):
        read(tmp_path / "file", "key")
    (tmp_path / "no-folder").touch()
    with pytest.raises(KeditError, match="file cannot be written or read"):
        write(tmp_path / "no-folder" / "file", "key", b"")


def _hold(path, ready):
    with claim(path) as held:
        assert held
        ready.set()
        time.sleep(60)


def test_a_claim_is_one_workers_until_it_ends_however_that_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "unit", ready))
    holder.start()
    assert ready.wait(60)
    with claim(tmp_path / "unit") as held:
        assert not held
    with claim(tmp_path / "other") as held:
        assert held
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with claim(tmp_path / "unit") as held:
        assert held
        with claim(tmp_path / "unit") as again:
            assert not again
    assert not list(tmp_path.iterdir())


def test_those_who_wait_for_a_claim_have_it_one_after_another(tmp_path):
    inside, most = [], []

    def work():
        with claim(tmp_path / "unit", wait=True) as held:
            assert held
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 20


def test_where_locks_are_not_to_be_had_all_go_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(store.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    with claim(tmp_path / "unit") as one, claim(tmp_path / "unit") as two:
        assert one
        assert two


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_is_let_be(tmp_path):
    left = tmp_path / f".file.{'0' * 32}"
    for living in (False, True):
        left.write_bytes(b"half")
        os.utime(left, (1, 1))
        with left.open("rb") as writer:
            if living:
                fcntl.flock(writer, fcntl.LOCK_EX)
            write_atomic(tmp_path / "file", b"data")
            assert left.exists() == living
    assert (tmp_path / "file").read_bytes() == b"data"
