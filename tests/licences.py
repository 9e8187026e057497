"""Write LICENSES.md: every package that `make` installs, with its licence as the package itself names it."""

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Licences of what `make` installs

Made by `make licences` from what the packages say of themselves. None of it is part of this repository. What torch brings
along for a GPU is not listed; the model and the texts have licences of their own (README, *Where the numbers come from*).

| package | version | licence |
| --- | --- | --- |
"""


def pinned() -> list[tuple[str, str]]:
    """Name and version of every pin, in alphabetical order."""
    texts = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-model.txt")]
    lines = [
        line.split()[0].split("==")
        for text in texts
        for line in text.splitlines()
        if "==" in line and line[0] not in "# "
    ]
    return sorted(((name, version) for name, version in lines), key=lambda pin: pin[0].lower())


def licence(name: str) -> str:
    """What the installed package says of its licence: the expression, else one line of text, else the classifiers."""
    about = metadata.metadata(name)
    text = about.get("License-Expression") or about.get("License") or ""
    if not text or "\n" in text or len(text) > 60 or text == "UNKNOWN":
        found = [
            line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License ::")
        ]
        text = ", ".join(found) or text.strip().partition("\n")[0]
    return text or "not stated"


if __name__ == "__main__":
    rows = [f"| {name} | {version} | {licence(name)} |\n" for name, version in pinned()]
    (ROOT / "LICENSES.md").write_text(HEAD + "".join(rows))
