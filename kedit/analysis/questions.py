"""The questions of the study: what belongs to each, in one entry."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kedit.registry import load_object

if TYPE_CHECKING:
    from kedit.analysis.plots import Picture
    from kedit.study.results import Results


@dataclass(frozen=True)
class Question:
    """A question, its ``notebook`` without suffix, and the parameter file that is run by ``default``.

    ``drawn_by`` names the function that draws: by name, so that a list of the questions does not wait for matplotlib.
    """

    notebook: str
    default: str
    drawn_by: str

    def figures(self, results: "Results") -> "dict[str, Picture]":
        """The figures of a run, by file name; ``figure`` is the main one."""
        return load_object(self.drawn_by)(results)


QUESTIONS = {
    "rq1": Question("rq1_number_of_edits", "smollm2-135m", "kedit.analysis.plots:rq1"),
    "rq2": Question("rq2_instruction_tuning", "pico", "kedit.analysis.plots:rq2"),
    "rq3": Question("rq3_model_scale", "pico", "kedit.analysis.plots:rq3"),
    "rq4": Question("rq4_ability_aspects", "smollm2-135m", "kedit.analysis.plots:rq4"),
    "rq5": Question("rq5_safety", "smollm2-135m", "kedit.analysis.plots:rq5"),
    "discussion": Question("structure_damage", "smollm2-135m", "kedit.analysis.plots:discussion"),
    "audit": Question("audit", "pico", "kedit.analysis.audit:figures"),
}
"""Folder of parameters and figures -> the question."""
