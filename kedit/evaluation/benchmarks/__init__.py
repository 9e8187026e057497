"""Suites of benchmarks. A benchmark is an lm-eval task, or several; a suite is a folder of task files.

Folders of other packages come by the entry points ``kedit.suites``, whose value ``module:attribute`` names one.
The suite ``paper`` is lm-eval's own tasks with the study's settings (``paper.yaml``; differences in ``paper.md``).

The ``metadata`` of a task file say what the rest of kedit must know of a benchmark:

- ``benchmark`` of the study that it is or stands for; ``metric`` that a cell keeps, its ``chance``, and lm-eval's
  ``filter`` where there are several
- ``reading``, what it costs: how many ``items``; tokens of exemplars that they share (in all ``tasks`` together, where
  they are several), and for each item its own and those generated, as SmolLM2 counts them
- ``aspect`` of ability that it shows (the study's Figure 5), none for those of safety
- ``two_way``: all items have the same two choices, so a commoner answer can be told
- ``items``: the benchmark whose items it asks about, where they are not its own
- ``chat``: asked in the model's chat template; ``keep``: what the task says of an answer, kept in place of its text

and what the graded score needs that the task does not say:

- ``reference``, of a generated answer: template of the text that the model is expected to write right after the
  prompt, whose probability a token is the score; no graded score without it
- ``graded``: the task's metric that is the graded score, where that is not the probability of the right choice; its
  ``graded_chance``, if another
- ``openings`` of a ``refusing`` and of a ``complying`` answer, none the beginning of another
"""

import contextlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import yaml
from pydantic import Field

from kedit import KeditError
from kedit.evaluation.benchmarks import stock
from kedit.registry import checked, load_object, registered, unknown
from kedit.store import digest
from kedit.workers import quiet_libraries

HERE = Path(__file__).parent
PAPER: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "paper.yaml").read_text())

Asked = tuple[dict[str, Any], dict[str, Any]]
"""What is said of a benchmark (see above), and its lm-eval task objects by name."""
Tokens = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass
class _Reading:
    items: Annotated[int, Field(ge=1)]
    shared: Tokens
    own: Tokens
    generated: Tokens


@dataclass
class _About:
    """What ``metadata`` must hold (see above), and of what types the other keys are."""

    benchmark: str
    metric: str
    chance: Annotated[float, Field(ge=0, lt=1)]
    reading: _Reading
    aspect: str | None = None
    filter: str | None = None
    reference: str | None = None
    graded: str | None = None
    graded_chance: Annotated[float, Field(ge=0, lt=1)] | None = None
    two_way: bool | None = None
    chat: bool | None = None
    items: str | None = None
    keep: list[str] | None = None
    openings: dict[str, list[str]] | None = None


class _Loader(yaml.CSafeLoader):
    """Reads lm-eval's YAML without running what its !function tags name."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


def _read(path: Path) -> dict[str, Any]:
    """A task file with what it includes.

    Raises:
        KeditError: one of them cannot be read, or is no mapping.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        return (_read(path.parent / config.pop("include")) if "include" in config else {}) | config
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise KeditError(f"task file {path} cannot be read ({reason}); it must be a mapping in YAML.") from error


def folders() -> dict[str, Path]:
    """Suite -> the folder of its task files; those of other packages first, kedit's names cannot be taken by them."""
    others = {name: Path(load_object(where)) for name, where in registered("suites", {}).items()}
    return others | {name: HERE / name for name in ("mini", "pico", "safety")}


@cache
def suites() -> dict[str, dict[str, Path]]:
    """Suite -> benchmark -> its file; those that stand for the study's in the study's order."""

    def order(path: Path) -> tuple[int, str]:
        last = path.stem.rpartition("_")[2]
        return list(PAPER).index(last) if last in PAPER else len(PAPER), path.stem

    found = {name: {p.stem: p for p in sorted(folder.glob("*.yaml"), key=order)} for name, folder in folders().items()}
    return found | {"paper": dict.fromkeys(PAPER, HERE / "paper.yaml")}


@cache
def known() -> dict[str, Path]:
    """Every benchmark -> its file."""
    return {name: path for suite in suites().values() for name, path in suite.items()}


@cache
def _config(name: str) -> dict[str, Any]:
    if name not in known():
        raise unknown("benchmark", name, known())
    if name in PAPER:
        return PAPER[name]
    config = _read(known()[name])
    try:
        about = config.get("metadata") or {}
        checked(_About, {field.name: about.get(field.name) for field in fields(_About)})
    except (AttributeError, ValueError) as error:
        raise KeditError(f"task file {known()[name]}: metadata: {error}.") from error
    return config


def metadata(name: str) -> dict[str, Any]:
    """What is said of a benchmark (see above).

    Raises:
        KeditError: no such benchmark, or its task file is wrong.
    """
    return _config(name)["metadata"]


@cache
def fingerprint(name: str) -> str:
    """Hash of everything that defines a benchmark: its YAML, its items and what they share, its functions and texts.

    Lm-eval's version is in it. Of the paper suite: our settings, every item and the exemplars, from wherever they came.
    """
    config = _config(name)
    parts = [version("lm-eval")]
    if name in PAPER:
        for subtask, task in tasks(name).items():
            shown = islice(task.fewshot_docs() or (), task.config.num_fewshot)
            parts += [subtask, list(shown), list(task.eval_docs)]
    else:
        file = config.get("dataset_kwargs", {}).get("file")
        paths = [
            *([_located(file)] if file else []),
            *(p for p in sorted(known()[name].parent.iterdir()) if p.suffix in (".py", ".txt")),
        ]
        parts += [path.read_text(encoding="utf-8") for path in paths]
    return digest(config, *parts)[:16]


@cache
def tasks(name: str) -> dict[str, Any]:
    """The lm-eval task objects of a benchmark by name, built once; MMLU has 57 of them, BBH 27, the others one.

    Raises:
        KeditError: no such benchmark, its data cannot be had (``kedit.data.hub``), or its files are wrong.
    """
    about = metadata(name)
    quiet_libraries()
    if name in PAPER:
        return stock.tasks(PAPER[name])
    from lm_eval.tasks import TaskManager  # seconds, which runs that only replay and figures do not wait for

    with stock.as_a_sentence(
        f"benchmark {name!r} cannot be asked", f"put its task file {known()[name]} or its items right"
    ):
        built = dict(TaskManager(include_path=str(known()[name].parent), include_defaults=False).load([name])["tasks"])
        for task in built.values() if _from_outside(name) else ():
            _rehearse(about, task)
    return built


def _from_outside(name: str) -> bool:
    """Whether it is a benchmark of another package, whose files nobody has tested here."""
    return not known()[name].is_relative_to(HERE)


def _rehearse(about: dict[str, Any], task: Any) -> None:
    """Put every item into words and score an answer, as a run will.

    Raises:
        Exception: what does not work.
    """
    from lm_eval.utils import env

    if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
        raise ValueError(f"output_type is {task.OUTPUT_TYPE}; it must be multiple_choice or generate_until")
    if about["metric"] not in task.aggregation() and about["metric"] not in about.get("keep", ()):
        raise ValueError(f"metric {about['metric']} is none of the task's")
    docs = list(task.eval_docs)
    ids = [str(doc.get("id", number)) for number, doc in enumerate(docs)]
    if not docs or len(set(ids)) < len(ids):
        raise ValueError("there are no items, or two of one id")
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests()
    for number, doc in zip(ids, docs, strict=True):
        env.from_string(about.get("reference") or "").render(**doc)
        if task.OUTPUT_TYPE == "generate_until":
            float(task.process_results(doc, [""])[about["metric"]])
            continue
        choices, target = task.doc_to_choice(doc), task.doc_to_target(doc)
        right = target if isinstance(target, list) and target not in choices else [target]
        places = [choices.index(one) if one in choices else one for one in right]
        inside = all(isinstance(place, int) and 0 <= place < len(choices) for place in places)
        if not all(isinstance(choice, str) for choice in choices) or not inside or not places:
            raise ValueError(f"item {number}: choices {choices!r}, of which {target!r} is right")


def find(name: str, num_fewshot: int | None = None) -> Asked:
    """A benchmark by name, with so many exemplars; or one of lm-eval's own tasks or groups, of which nothing is said.

    Raises:
        KeditError: there is none, or its data cannot be had.
    """
    if name in known():
        about, built = metadata(name), (tasks if num_fewshot is None else tasks.__wrapped__)(name)
    else:
        quiet_libraries()
        about, built = {}, stock.loaded(name)
    for task in built.values() if num_fewshot is not None else ():
        task.set_config("num_fewshot", num_fewshot)
    return about, built


def _located(file: str) -> Path:
    """A file by its path from the folder in which its suite's folder lies."""
    paths = [folder.parent / file for folder in folders().values()]
    return next((path for path in paths if path.exists()), HERE / file)


def items(file: str, **_: Any) -> Any:
    """For a task's ``custom_dataset``: items of a JSONL file, ``<suite>/<name>.jsonl``, as the one split, ``test``.

    Raises:
        KeditError: a line is no mapping in JSON, or lacks something that the first line has.
    """
    import datasets

    records = []
    for number, line in enumerate(_located(file).read_text(encoding="utf-8").split("\n"), 1):
        try:
            records += [{**json.loads(line)}] if line.strip() else []
            if lacking := [key for key in records[0] if records[-1].get(key) is None]:
                raise ValueError(f"{lacking[0]} is missing")
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise KeditError(f"{file}, line {number}: {error}.") from error
    return datasets.DatasetDict(test=datasets.Dataset.from_list(records))


def sources(name: str) -> list[str]:
    """Hub ids of the data that a benchmark needs; the suites in folders carry their own."""
    return [PAPER[name]["data"]] if name in PAPER else []


def reach(name: str) -> None:
    """Ask within seconds whether a benchmark's data can be had.

    Raises:
        KeditError: it cannot (``kedit.data.hub``), or the files of another package are wrong.
    """
    for source in sources(name):
        stock.located(source)
    if _from_outside(name):
        tasks(name)


def draw(name: str, limit: int | None, asked: Asked | None = None) -> dict[str, list[int]]:
    """Indices of the items that each task of a benchmark gives: all, or ``limit`` in all.

    A limited draw is stratified, so that the score of a part estimates that of the whole: by task, and by the right
    answer where all items have the same two choices, else by what items say of their ``kind`` or ``subject``. The
    members of a stratum, in random order, are spread evenly over one sequence, each stratum from a start of its own;
    the draw is the beginning of the sequence. So it is the same for every model, and part of every larger one.

    Args:
        asked: the benchmark as ``find`` has it.
    """
    about, built = asked or (metadata(name), tasks(name))
    if limit is None:
        return {subtask: list(range(len(task.eval_docs))) for subtask, task in built.items()}
    strata: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    for subtask, task in built.items():
        for index, doc in enumerate(task.eval_docs):
            kind = task.doc_to_target(doc) if about.get("two_way") else doc.get("kind", doc.get("subject"))
            strata[subtask, str(kind)].append((subtask, index))
    rng, groups = Random(f"draw {about.get('items', name)}"), list(strata.values())
    rng.shuffle(groups)
    places = []
    for number, group in enumerate(groups):
        rng.shuffle(group)
        start = (number + 0.5) / len(groups)
        places += [((rank + start) / len(group), item) for rank, item in enumerate(group)]
    drawn = {item for _, item in sorted(places)[:limit]}
    return {name: [i for i in range(len(task.eval_docs)) if (name, i) in drawn] for name, task in built.items()}
