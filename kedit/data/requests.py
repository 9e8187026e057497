"""What one edit is asked to do."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from kedit.registry import checked


class NoTarget(ValueError):
    """The new object is empty, or the old one: there is nothing to edit."""


class Untrimmed(ValueError):
    """White space around the subject, whose tokens are then not those that it has in other texts."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to rewrite.

    Attributes:
        prompt: text with one ``{}`` where the subject goes; the target follows it.
        subject: what the fact is about.
        target_new: what the model should say; one space is put before it where the prompt ends in none.
        target_true: what it says now; needed by the success metrics.
        paraphrases: other full prompts for the same fact (generalisation).
        neighbours: (full prompt, right answer) pairs that the edit must leave alone (locality).
        generation: full prompts for free generation about the subject.
        id, relation: labels that travel into the results.

    Raises:
        ValueError: a field of another type, not exactly one ``{}``, an empty subject or target, white space around
            the subject, or target_new equal to target_true.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    generation: tuple[str, ...] = ()
    id: str = ""
    relation: str = field(default="", compare=False)

    def __post_init__(self):
        checked(EditRequest, vars(self))
        if self.prompt.count("{}") != 1:
            raise ValueError(f"prompt {self.prompt!r} must hold {{}}, for {self.subject!r}, exactly once")
        for name, error in (("subject", ValueError), ("target_new", NoTarget)):
            if not getattr(self, name).strip():
                raise error(f"{name} is empty")
        if self.subject != self.subject.strip():
            raise Untrimmed(f"subject {self.subject!r} begins or ends in white space")
        if self.target_new.strip() == self.target_true.strip():
            raise NoTarget(f"target_new equals target_true ({self.target_true!r})")

    def __repr__(self) -> str:
        return f"<EditRequest {self.text!r}: {self.target_true.strip() or '?'} -> {self.target_new.strip()}>"

    @classmethod
    def stated(
        cls, relation: str, templates: Mapping[str, Any], subject: str, new: str, true: str, near: Iterable[str]
    ) -> Self:
        """The request to change a fact, in the words that its relation has for all subjects.

        Args:
            templates: the relation's ``prompt``, ``paraphrases`` and ``generation``, each with a ``{}``.
            new, true: objects.
            near: subjects whose object is ``true`` as well.
        """
        paraphrases = tuple(template.replace("{}", subject) for template in templates["paraphrases"])
        neighbours = tuple((templates["prompt"].replace("{}", other), true) for other in near)
        generation = (templates["generation"].replace("{}", subject),)
        name = f"{relation}/{subject}"
        return cls(templates["prompt"], subject, new, true, paraphrases, neighbours, generation, name, relation)

    @property
    def text(self) -> str:
        """The prompt with the subject in place."""
        return self.prompt.replace("{}", self.subject)

    def key(self) -> dict[str, Any]:
        """Everything that defines the request, for hashing."""
        return asdict(self)


def spaced(target: str, prompt: str) -> str:
    """The target as it continues a prompt: one space before it unless the prompt ends in white space."""
    return target.strip() if prompt[-1:].isspace() else " " + target.strip()
