"""What is asked of an edited model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kedit.evaluation.records import Item

if TYPE_CHECKING:
    from kedit.data.requests import EditRequest
    from kedit.model.lm import LM

MEASURES = {"structure": 1, "refusal": 2}
"""What can be asked at a checkpoint besides edit success and benchmarks -> version of its definition."""
BENCHMARKS = 2
"""Version of what is kept of a benchmark's items, and of which of them a limit draws."""


class Examiner:
    """Asks a model, as it is at the time, whatever a checkpoint is asked; keeps what no edit changes.

    Attributes:
        guesses: what the model may generate, prompt -> tokens (``drafts`` of ``kedit.model.scoring.read``):
            they change what asking costs and nothing else. Updated with what is generated.
    """

    def __init__(self, lm: "LM"):
        # torch and lm-eval, which nobody needs who draws figures from committed cells
        from kedit.evaluation.damage import Unedited

        self.lm = lm
        self.guesses: dict[tuple[int, ...], list[int]] = {}
        self._unedited = Unedited(lm)

    def ask(
        self, name: str, *, requests: Sequence["EditRequest"], limit: int | None, text: str, tokens: int
    ) -> list[Item]:
        """Outcomes of edit success (``edit``), of one of the ``MEASURES``, or else of a benchmark.

        Args:
            requests: what edit success asks about.
            limit: items of a benchmark, None for all.
            text, tokens: what second moments are taken over; ``structure`` reads the text that comes after.

        Raises:
            KeditError: no such benchmark, its data cannot be had, or the model has no chat template.
        """
        from kedit.evaluation import damage, harness, success

        if name == "edit":
            return success.measure(self.lm, requests, self.guesses)
        if name == "structure":
            return damage.measure(self.lm, text, tokens, unedited=self._unedited)
        return harness.evaluate(self.lm, name, None if name in MEASURES else limit, self.guesses)
