"""What to edit: the bundled fact set, and readers for CounterFact and ZsRE."""

import hashlib
import json
import logging
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from kedit import KeditError
from kedit.data import hub
from kedit.data.requests import EditRequest, NoTarget, Untrimmed
from kedit.registry import load_object, registered, unknown

log = logging.getLogger(__name__)

_SOURCES = yaml.safe_load(Path(__file__).with_name("edit_sets.yaml").read_text())
SETS = registered("edit_sets", _SOURCES["packaged"])
"""Edit sets of packages: functions of a split. Other packages add their own."""
PUBLISHED: dict[str, dict[str, Any]] = _SOURCES["published"]
"""Edit sets that are published as files: their names, where they are on the hub, how their records are read."""
SPLITS = ("train", "validation", "edit")
BUNDLED = Path(__file__).with_name("facts.json")
RELATIONS: dict[str, dict[str, Any]] = json.loads(BUNDLED.read_text())["relations"]
NEIGHBOURS = 5
"""Neighbours of a bundled record."""
LARGE = 100
"""Records from which on a set is not refused because of some whose subject has white space around it."""


# The bundled set ---------------------------------------------------------------------------------


def _rank(*parts: str) -> str:
    """A fixed pseudo-random sort key: independent of Python's seed and of file order."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


def _split_subjects(relation: str, target: str, subjects: list[str]) -> dict[str, list[str]]:
    """Split one object's subjects. Neighbours come from train alone, so no run ever edits a neighbour."""
    ranked = sorted(subjects, key=partial(_rank, relation, target))
    train = max(NEIGHBOURS + 1, len(ranked) // 2)
    validation = train + max(1, (len(ranked) - train) // 4)
    return dict(zip(SPLITS, (ranked[:train], ranked[train:validation], ranked[validation:]), strict=True))


@cache
def bundled(split: str = "edit") -> tuple[EditRequest, ...]:
    """The bundled real-world facts of one split, in a fixed shuffled order.

    target_new is another object of the same relation; neighbours share relation and old object.
    """
    records = []
    for relation, entry in RELATIONS.items():
        for true, subjects in entry["objects"].items():
            parts = _split_subjects(relation, true, subjects)
            for subject in parts[split]:
                new = min(entry["objects"].keys() - {true}, key=partial(_rank, "new", relation, subject))
                near = sorted({*parts["train"]} - {subject}, key=partial(_rank, "near", subject))[:NEIGHBOURS]
                records.append(EditRequest.stated(relation, entry, subject, new, true, near))
    return tuple(sorted(records, key=lambda record: _rank("order", record.id)))


@cache
def bundled_zsre(split: str = "edit") -> tuple[EditRequest, ...]:
    """The bundled facts in ZsRE's form: a question as prompt, locality on one unrelated question."""
    asks = {relation: f"Question: {entry['question']} Answer:" for relation, entry in RELATIONS.items()}

    def question(record: EditRequest) -> EditRequest:
        unrelated = (other for other in bundled("train") if other.relation != record.relation)
        other = min(unrelated, key=lambda other: _rank("far", record.id, other.id))
        neighbour = (asks[other.relation].replace("{}", other.subject), other.target_true)
        return replace(record, prompt=asks[record.relation], neighbours=(neighbour,))

    return tuple(map(question, bundled(split)))


# Published edit sets -----------------------------------------------------------------------------


def _request(raw: Mapping[str, Any], schemas: Sequence[Mapping[str, list[str | int]]]) -> EditRequest:
    """A record as the first of the schemas whose prompt it holds reads it."""
    schema = next((schema for schema in schemas if schema["prompt"][0] in raw), schemas[-1])
    fields = {field: reduce(getitem, path, raw) for field, path in schema.items()}
    for field in ("paraphrases", "neighbours", "generation"):
        prompts = fields.get(field, ())
        if not isinstance(prompts, str | list | tuple):
            raise TypeError(f"{field} are {prompts!r}; they must be a text or a list of texts")
        fields[field] = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    answer = fields.pop("answer")
    fields["neighbours"] = tuple((prompt, answer) for prompt in fields["neighbours"])
    if "{}" not in fields["prompt"]:  # the subject's last place, where it stands more than once
        fields["prompt"] = "{}".join(fields["prompt"].rsplit(fields["subject"], 1))
    return EditRequest(**fields | {"id": str(fields["id"])})


def _requests(name: str, raws: Collection[Any], where: str | Path) -> tuple[EditRequest, ...]:
    """Records of a published set, in order; those with nothing to edit are left out, logged.

    So are, of a ``LARGE`` set, those whose subject has white space around it.
    """
    records, unusable, untrimmed = [], [], []
    for index, raw in enumerate(raws):
        try:
            records.append(_request(raw, PUBLISHED[name]["schemas"]))
        except NoTarget:
            unusable.append(index)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, Untrimmed) and len(raws) >= LARGE:
                untrimmed.append(index)
                continue
            reason = f"key {error} is missing" if isinstance(error, KeyError) else error
            raise KeditError(f"{where}, record {index}: {reason}.") from error
    reasons = {"new object is empty or the old one": unusable, "subject has white space around it": untrimmed}
    for reason, left_out in reasons.items():
        if left_out:
            log.warning("%s: left out %d records whose %s: %s", where, len(left_out), reason, left_out)
    return tuple(records)


def _from_file(name: str, path: str | Path) -> tuple[EditRequest, ...]:
    try:
        raws = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise KeditError(f"edit set {path} cannot be read ({reason}); give its JSON file.") from error
    if not isinstance(raws, list):
        raise KeditError(f"edit set {path} holds a {type(raws).__name__}; it must be a JSON list of records.")
    return _requests(name, raws, path)


@cache
def _from_hub(name: str) -> tuple[EditRequest, ...]:
    import datasets  # a second, which edit sets of a package and of files do not wait for

    source = hub.dataset(PUBLISHED[name]["hub"])
    try:
        rows = datasets.load_dataset(source, split="train")
    except (OSError, ValueError) as error:
        raise KeditError(f"edit set {name!r} cannot be read from the hub's {source} ({error}).") from error
    return _requests(name, rows, source)


def located(name: str) -> Path | None:
    """A published set's file in ``edits`` within or beside the folder that ``KEDIT_MIRROR`` names, None if unset.

    Raises:
        KeditError: there is a mirror, and the set is not there.
    """
    if (mirror := hub.mirror()) is None:
        return None
    files = PUBLISHED[name]["files"]
    folders = (mirror / "edits", mirror.parent / "edits")
    if found := [path for folder in folders for pattern in files for path in sorted(folder.glob(pattern))]:
        return found[0]
    raise KeditError(
        f"edit set {name!r}: KEDIT_MIRROR has no edits/{files[0]} within or beside it; put the file there, or give "
        "edit_set.path."
    )


# By name ------------------------------------------------------------------------------------------


def at_hand(name: str, path: str | None = None) -> bool:
    """Whether a set can be read without network: in a package, given by path, or in the mirror.

    Raises:
        KeditError: there is a mirror, and the set is not there.
    """
    return name not in PUBLISHED or path is not None or located(name) is not None


def load(name: str, split: str = "edit", path: str | Path | None = None) -> tuple[EditRequest, ...]:
    """An edit set by name: a split of it, or of the published ones the file at ``path``, in file order.

    Without a path a published set comes from ``KEDIT_MIRROR``, else from the hub where it is there. CounterFact may be
    in its original schema or in EasyEdit's flat one, ZsRE is as MEND prepared it (``edit_sets.yaml``).

    Raises:
        KeditError: no such set or split, it cannot be had or read, or a record is malformed (named by its index).
    """
    if name not in SETS and name not in PUBLISHED:
        raise unknown("edit set", name, [*SETS, *PUBLISHED])
    if split not in SPLITS:
        raise unknown(f"edit set {name!r}: split", split, SPLITS)
    if name not in PUBLISHED:
        return load_object(SETS[name])(split)
    if path or (path := located(name)):
        return _from_file(name, path)
    if "hub" not in PUBLISHED[name]:
        raise KeditError(f"edit set {name!r} is not on the hub; give edit_set.path, or set KEDIT_MIRROR.")
    return _from_hub(name)


def ordered(requests: Iterable[EditRequest], order: int) -> list[EditRequest]:
    """Requests in one of many orders: 0 is the order of the set, any other number a seeded shuffle."""
    requests = list(requests)
    if order:
        random.Random(order).shuffle(requests)
    return requests
