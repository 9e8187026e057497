"""What is asked of an edited model."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from kedit import KeditError
from kedit.evaluation import benchmarks
from kedit.evaluation.records import Item

if TYPE_CHECKING:
    from kedit.data.requests import EditRequest
    from kedit.model.lm import LM

MEASURES = {"structure": 1, "refusal": 2, "readings": 1}
"""What can be asked at a checkpoint besides edit success and benchmarks -> version of its definition."""
OF_EDITS = ("edit", "readings")
"""What asks about the edits themselves, and so depends on which they are."""
BENCHMARKS = 2
"""Version of what is kept of a benchmark's items, and of which of them a limit draws."""


class Evaluation(NamedTuple):
    """What a model did on a benchmark.

    Attributes:
        score: by the metric, over all items: their mean, or what lm-eval makes of them where that is another thing.
        items: an outcome each: its ``value`` by the metric, and what was answered.
    """

    benchmark: str
    metric: str
    score: float
    items: list[Item]

    def __repr__(self) -> str:
        return f"<Evaluation {self.benchmark}: {self.metric} {self.score:.3f}, {len(self.items)} items>"


def evaluate(lm: "LM", name: str, limit: int | None = None, num_fewshot: int | None = None) -> Evaluation:
    """Ask the model, as it is edited now, a benchmark: a bundled one, the study's, or any of lm-eval's.

    Args:
        name: such as ``mini_mmlu`` (bundled), ``mmlu`` (the study's, with its settings), or what ``lm_eval`` calls its
            own tasks and groups, such as ``arc_easy``.
        limit: items in all; None for all there are.
        num_fewshot: exemplars shown; None for as many as the benchmark says.

    Raises:
        KeditError: there is no such benchmark, its data cannot be had, it has fewer exemplars, or the model has no chat
            template.
    """
    from kedit.evaluation import harness

    for what, number, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if number is not None and not (type(number) is int and number >= least):
            raise KeditError(f"{what} is {number!r}; it must be a whole number from {least} up, or None.")
    about, tasks = asked = benchmarks.find(name, num_fewshot)
    try:
        items = harness.evaluate(lm, name, limit, asked=asked)
    except (ValueError, AssertionError) as error:
        if num_fewshot is None:
            raise
        raise KeditError(f"{name} cannot be asked with {num_fewshot} exemplars ({error}); ask for fewer.") from error
    values = [item["value"] for item in items]
    first = next(iter(tasks.values()))
    metric = about.get("metric") or next(iter(first.aggregation()))
    score = fmean(values) if about or len(tasks) > 1 else first.aggregation()[metric](values)
    return Evaluation(name, metric, float(score), items)


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
            requests: what edit success and ``readings`` ask about.
            limit: items of a benchmark, None for all.
            text, tokens: what second moments are taken over; ``structure`` reads the text that comes after.

        Raises:
            KeditError: no such benchmark, its data cannot be had, or the model has no chat template.
        """
        from kedit.evaluation import damage, harness, readings, success

        if name == "edit":
            return success.measure(self.lm, requests, self.guesses)
        if name == "readings":
            return readings.measure(self.lm, requests, self.guesses)
        if name == "structure":
            return damage.measure(self.lm, text, tokens, unedited=self._unedited)
        return harness.evaluate(self.lm, name, None if name in MEASURES else limit, self.guesses)
