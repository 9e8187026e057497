"""kedit: what sequential knowledge editing does to the general abilities of language models.

The five lines most people need::

    import kedit
    lm = kedit.load("smollm2-135m-instruct")
    editor = kedit.editor("rome", lm)
    edit = editor.apply(kedit.EditRequest("The capital of {} is", "France", target_new="Rome", target_true="Paris"))
    edit.undo()
"""

import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # tqdm asks for ipywidgets in notebooks; its plain bar will do, and the warning would carry local paths
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401 - asked once, before any library asks again

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "params").is_dir()
"""Whether this came in a wheel, which has params/, notebooks/ and figures/ inside; in a checkout they stand beside."""
ROOT = PACKAGE if INSTALLED else PACKAGE.parent
"""Where params/, notebooks/ and figures/ are."""


class KeditError(Exception):
    """Something the user can put right; the message is one sentence that says how."""


# Imported on first use: what does not need torch must not wait for it.
_LAZY = {
    "LM": "kedit.model.lm:LM",
    "EditRequest": "kedit.data.requests:EditRequest",
    "check_editor": "kedit.editors.check:check_editor",
    "editor": "kedit.editors:editor",
    "evaluate": "kedit.evaluation:evaluate",
    "load": "kedit.model.lm:load",
    "load_facts": "kedit.data.facts:load",
    "run": "kedit.study.notebook:run_named",
}
__all__ = ["LM", "ROOT", "EditRequest", "KeditError", "check_editor", "editor", "evaluate", "load", "load_facts", "run"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("kedit")
    if name not in _LAZY:
        raise AttributeError(f"module 'kedit' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
