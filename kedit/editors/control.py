"""The control: an editor that edits nothing.

It goes through the same trajectory, journal and evaluation as every method, so whatever its curve
shows is the pipeline's doing, not an edit's.
"""

from kedit.data.requests import EditRequest
from kedit.editors.protocol import Editor
from kedit.model.journal import Edit


class Control(Editor):
    """Does nothing, and says so in the journal."""

    name = "control"
    label = "control (no edit)"
    style = ("#7f7f7f", "x", "-")
    edits = False

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        pass
