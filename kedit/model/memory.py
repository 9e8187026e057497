"""Memory-based editing: what is remembered, and who answers.

SERAC, GRACE and IKE leave the weights alone and remember each edit instead. A method's memory hangs
on the model, is filled by the journal (so undo and replay hold for it too), and is asked by
kedit/model/scoring.py: for every prompt it may name another reader or another text (SERAC, IKE), or change
the hidden state at the prompt's last token (GRACE). Whatever it leaves alone is read as if it were not
there. It is asked by kedit's own reading only, not by a bare ``lm.model(...)``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit.model.lm import LM


@dataclass(frozen=True)
class Route:
    """Who reads a prompt instead: a model, the token ids given to it, and its weight in the answer.

    With ``weight`` below 1 the answer is the mixture (1 - weight) p(unrouted) + weight p(routed).
    ``group`` names prompts worth reading together because they begin alike.
    """

    lm: "LM"
    ids: tuple[int, ...]
    weight: float = 1.0
    group: int = 0


class Memory:
    """Entries in the order of the edits. Methods override what they need."""

    linked = False
    """Whether entries refer to earlier ones, so that none can be taken away but the last."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    @property
    def answers(self) -> bool:
        """Whether some prompt may be answered because of what is remembered, of which the weights know nothing."""
        kind = type(self)
        return bool(self.entries) and (kind.routes, kind.answering) != (Memory.routes, Memory.answering)

    def add(self, entry: dict[str, Any]) -> None:
        """Remember one edit."""
        self.entries.append(entry)

    def clear(self) -> None:
        """Forget all."""
        self.entries.clear()

    def routes(self, prompts: Sequence[tuple[int, ...]]) -> list[Route | None]:
        """Who reads each prompt (token ids), None where the edited model itself does."""
        return [None] * len(prompts)

    @contextmanager
    def answering(self, ends: Sequence[int]) -> Iterator[None]:
        """Within the block, prompts end at these indices of the one sequence that the model reads."""
        yield


def routes(lm: "LM", prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Route]:
    """The prompts that a memory of the model takes over, and their routes; the first memory decides."""
    routed: dict[tuple[int, ...], Route] = {}
    for memory in lm.memories.values():
        if memory.entries:
            answers = zip(prompts, memory.routes(prompts), strict=True)
            routed = {prompt: route for prompt, route in answers if route is not None} | routed
    return routed
