import pytest

from kedit.store import Store, digest, write_atomic


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
    "damage", [lambda data: data[:-1], lambda data: data[:70] + b"X" + data[71:], lambda data: b""]
)
def test_a_damaged_file_counts_as_absent(tmp_path, damage, caplog):
    store = Store(tmp_path)
    store.put(digest("k"), b"payload that matters")
    path = store.path(digest("k"))
    path.write_bytes(damage(path.read_bytes()))
    assert store.get(digest("k")) is None
    assert "damaged" in caplog.text


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "file", b"data")
    assert list(tmp_path.iterdir()) == []
