"""What to edit: the bundled fact set, and readers for CounterFact and ZsRE."""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from kedit import KeditError
from kedit.data import hub
from kedit.data.requests import EditRequest, Unchanged
from kedit.registry import load_object, registered, unknown

log = logging.getLogger(__name__)

SETS = registered(
    "edit_sets",
    {
        "pico": "kedit.pico.world:edits",
        "bundled": "kedit.data.facts:bundled",
        "bundled-zsre": "kedit.data.facts:bundled_zsre",
        "counterfact": "kedit.data.facts:counterfact",
        "zsre": "kedit.data.facts:zsre",
    },
)
"""Edit sets: functions of a split, the published ones of the path of a file. Other packages add their own."""
FILES = {
    # as the study's toolkit names them (its edit split first), then as the original release does
    "counterfact": ("counterfact-edit*.json", "counterfact.json"),
    "zsre": ("zsre_mend_eval*.json",),
}
"""File names of published sets in a mirror's ``edits`` folder."""
HUB = {"counterfact": "azhx/counterfact"}
"""Published sets on the hub: CounterFact in its original schema, split train, whose order is not the study's."""
SPLITS = ("train", "validation", "edit")
BUNDLED = Path(__file__).parent / "facts.json"
NEIGHBOURS = 5
"""Neighbours of a bundled record."""


# The bundled set ---------------------------------------------------------------------------------


def _rank(*parts: str) -> str:
    """A fixed pseudo-random sort key: independent of Python's seed and of file order."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


@cache
def _relations() -> dict[str, dict]:
    return json.loads(BUNDLED.read_text())["relations"]


def _split_subjects(relation: str, target: str, subjects: list[str]) -> dict[str, list[str]]:
    """Split one object's subjects. Neighbours come from train alone, so no run ever edits a neighbour."""
    ranked = sorted(subjects, key=lambda subject: _rank(relation, target, subject))
    kept = max(NEIGHBOURS + 1, len(ranked) // 2)
    validation = max(1, (len(ranked) - kept) // 4)
    return {
        "train": ranked[:kept],
        "validation": ranked[kept : kept + validation],
        "edit": ranked[kept + validation :],
    }


def _record(relation: str, target: str, subject: str, train: list[str]) -> EditRequest:
    entry = _relations()[relation]
    others = sorted(o for o in entry["objects"] if o != target)
    neighbours = sorted((s for s in train if s != subject), key=lambda s: _rank("near", subject, s))
    return EditRequest(
        prompt=entry["prompt"],
        subject=subject,
        target_new=min(others, key=lambda other: _rank("new", relation, subject, other)),
        target_true=target,
        paraphrases=tuple(p.replace("{}", subject) for p in entry["paraphrases"]),
        neighbours=tuple((entry["prompt"].replace("{}", n), target) for n in neighbours[:NEIGHBOURS]),
        generation=(entry["generation"].replace("{}", subject),),
        id=f"{relation}/{subject}",
        relation=relation,
    )


@cache
def bundled(split: str = "edit") -> tuple[EditRequest, ...]:
    """The bundled real-world facts of one split, in a fixed shuffled order.

    target_new is another object of the same relation; neighbours share relation and old object.
    """
    records = []
    for relation, entry in _relations().items():
        for target, subjects in entry["objects"].items():
            parts = _split_subjects(relation, target, subjects)
            records += [_record(relation, target, subject, parts["train"]) for subject in parts[split]]
    return tuple(sorted(records, key=lambda record: _rank("order", record.id)))


@cache
def bundled_zsre(split: str = "edit") -> tuple[EditRequest, ...]:
    """The bundled facts in ZsRE's form: a question as prompt, locality on one unrelated question."""
    unrelated = bundled("train")

    def ask(record: EditRequest) -> str:
        return f"Question: {_relations()[record.relation]['question']} Answer:"

    def question(record: EditRequest) -> EditRequest:
        others = (other for other in unrelated if other.relation != record.relation)
        other = min(others, key=lambda other: _rank("far", record.id, other.id))
        neighbour = (ask(other).replace("{}", other.subject), other.target_true)
        return replace(record, prompt=ask(record), neighbours=(neighbour,))

    return tuple(map(question, bundled(split)))


# Published edit sets -----------------------------------------------------------------------------


def _template(text: str, subject: str) -> str:
    """Put ``{}`` where the subject stands; its last occurrence when it stands more than once."""
    head, found, tail = text.rpartition(subject)
    if not found:
        raise ValueError(f"subject {subject!r} does not stand in the prompt {text!r}")
    return f"{head}{{}}{tail}"


def _counterfact(raw: dict[str, Any]) -> EditRequest:
    if "requested_rewrite" in raw:  # the schema of the original release
        rewrite = raw["requested_rewrite"]
        true = rewrite["target_true"]["str"]
        return EditRequest(
            prompt=rewrite["prompt"],
            subject=rewrite["subject"],
            target_new=rewrite["target_new"]["str"],
            target_true=true,
            paraphrases=tuple(raw["paraphrase_prompts"]),
            neighbours=tuple((prompt, true) for prompt in raw["neighborhood_prompts"]),
            generation=tuple(raw["generation_prompts"]),
            id=str(raw["case_id"]),
            relation=rewrite.get("relation_id", ""),
        )
    return EditRequest(  # the flat schema of EasyEdit
        prompt=_template(raw["prompt"], raw["subject"]),
        subject=raw["subject"],
        target_new=raw["target_new"],
        target_true=raw["ground_truth"],
        paraphrases=(raw["rephrase_prompt"],),
        neighbours=((raw["locality_prompt"], raw["locality_ground_truth"]),),
        id=str(raw["case_id"]),
    )


def _zsre(raw: dict[str, Any]) -> EditRequest:
    return EditRequest(
        prompt=_template(raw["src"], raw["subject"]),
        subject=raw["subject"],
        target_new=raw["alt"],
        target_true=raw["answers"][0],
        paraphrases=(raw["rephrase"],),
        neighbours=((raw["loc"], raw["loc_ans"]),),
        id=raw["src"],
    )


def _read(path: str | Path, convert: Callable[[dict], EditRequest]) -> tuple[EditRequest, ...]:
    """The records of a JSON file."""
    try:
        raws = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KeditError(f"edit set {path} cannot be read ({error.strerror}); give its JSON file.") from error
    except json.JSONDecodeError as error:
        raise KeditError(f"edit set {path} is not JSON ({error}).") from error
    if not isinstance(raws, list):
        raise KeditError(f"edit set {path} holds a {type(raws).__name__}; it must be a JSON list of records.")
    return _converted(raws, str(path), convert)


def _converted(raws: Iterable[Any], where: str, convert: Callable[[dict], EditRequest]) -> tuple[EditRequest, ...]:
    records, unusable = [], []
    for index, raw in enumerate(raws):
        try:
            records.append(convert(raw))
        except Unchanged:
            unusable.append(index)
        except KeyError as error:
            raise KeditError(f"{where}, record {index}: key {error} is missing.") from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise KeditError(f"{where}, record {index}: {error}.") from error
    if unusable:
        log.warning("%s: left out records whose new object is the old one: %s", where, unusable)
    return tuple(records)


def counterfact(path: str | Path) -> tuple[EditRequest, ...]:
    """Read CounterFact in the original nested schema or in EasyEdit's flat one, in file order.

    The flat schema carries one rephrase and one neighbour a record.

    Raises:
        KeditError: a file that cannot be read, or a malformed record, named by file and index.
    """
    return _read(path, _counterfact)


def zsre(path: str | Path) -> tuple[EditRequest, ...]:
    """Read ZsRE as MEND prepared it (``src``, ``rephrase``, ``alt``, ``loc``), in file order.

    The published files hold some records whose new answer is the old one; they are left out, logged.

    Raises:
        KeditError: as for ``counterfact``.
    """
    return _read(path, _zsre)


# By name ------------------------------------------------------------------------------------------


def located(name: str) -> Path | None:
    """A published set's file in ``edits`` within or beside the folder that ``KEDIT_MIRROR`` names, None if unset.

    Raises:
        KeditError: there is a mirror, and the set is not there.
    """
    if (mirror := hub.mirror()) is None:
        return None
    for folder in (mirror / "edits", mirror.parent / "edits"):
        for pattern in FILES[name]:
            if found := sorted(folder.glob(pattern)):
                return found[0]
    raise KeditError(
        f"edit set {name!r}: KEDIT_MIRROR has no edits/{FILES[name][0]} within or beside it; put the file there, or "
        "give edit_set.path."
    )


def at_hand(name: str, path: str | None = None) -> bool:
    """Whether a set can be read without network: in a package, given by path, or in the mirror.

    Raises:
        KeditError: there is a mirror, and the set is not there.
    """
    return name not in FILES or path is not None or located(name) is not None


def load(name: str, split: str = "edit", path: str | None = None) -> tuple[EditRequest, ...]:
    """An edit set by name: a split of it, or of the published ones the file at ``path``.

    Without a path a published set comes from ``KEDIT_MIRROR``, else from the hub where it is there.

    Raises:
        KeditError: no such set or split, or it cannot be had or read.
    """
    if name not in SETS:
        raise unknown("edit set", name, SETS)
    if split not in SPLITS:
        raise unknown(f"edit set {name!r}: split", split, SPLITS)
    read = load_object(SETS[name])
    if name not in FILES:
        return read(split)
    if path or (path := located(name)):
        return read(path)
    if name not in HUB:
        raise KeditError(f"edit set {name!r} is not on the hub; give edit_set.path, or set KEDIT_MIRROR.")
    return _from_hub(name)


@cache
def _from_hub(name: str) -> tuple[EditRequest, ...]:
    import datasets  # a second, which edit sets of a package and of files do not wait for

    source = hub.dataset(HUB[name])
    try:
        rows = datasets.load_dataset(source, split="train")
    except (OSError, ValueError) as error:
        raise KeditError(f"edit set {name!r} cannot be read from the hub's {source} ({error}).") from error
    return _converted(rows, source, _counterfact)


def ordered(requests: Iterable[EditRequest], order: int) -> list[EditRequest]:
    """Requests in one of many orders: 0 is the order of the set, any other number a seeded shuffle."""
    requests = list(requests)
    if order:
        random.Random(order).shuffle(requests)
    return requests
