"""kedit: what sequential knowledge editing does to the general abilities of language models.

The five lines most people need::

    import kedit
    lm = kedit.load("smollm2-135m-instruct")
    editor = kedit.editor("rome", lm)
    edit = editor.apply(kedit.EditRequest("The capital of {} is", "France", "Rome", "Paris"))
    edit.undo()
"""

import warnings
from importlib import import_module
from pathlib import Path

# tqdm asks for ipywidgets in notebooks; its plain bar will do, and the warning would carry local paths.
warnings.filterwarnings("ignore", message="IProgress not found")

ROOT = Path(__file__).resolve().parent.parent


class KeditError(Exception):
    """Something the user can put right; the message is one sentence that says how."""


# Imported on first use: drawing figures from committed cells must not wait for torch.
_LAZY = {
    "load": "kedit.model.lm",
    "LM": "kedit.model.lm",
    "EditRequest": "kedit.data.requests",
    "editor": "kedit.editors",
}
__all__ = ["LM", "ROOT", "EditRequest", "KeditError", "editor", "load"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'kedit' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
