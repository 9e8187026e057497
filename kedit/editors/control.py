"""The control: an editor that edits nothing.

It goes through the same trajectory, journal and evaluation as every method, so whatever its curve
shows is the pipeline's doing, not an edit's.
"""

from typing import Any

from kedit.data.requests import EditRequest
from kedit.editors.cost import Cost, Shape
from kedit.editors.protocol import Editor
from kedit.model.journal import Edit


class Control(Editor):
    """Does nothing, and says so in the journal."""

    name = "control"
    label = "control (no edit)"
    style = ("#7f7f7f", "x", "-")
    edits = False

    @classmethod
    def cost(cls, shape: Shape, hparams: Any, tokens: int) -> Cost:
        """Nothing."""
        return Cost(journal_bytes=0)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        pass
