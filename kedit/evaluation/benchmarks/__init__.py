"""Suites of benchmarks. A benchmark is an lm-eval task, or several; ours are YAML and JSONL in a folder a suite.

The paper suite is lm-eval's own tasks with the study's shots (``paper.yaml``; differences in ``paper.md``), on data
from the hub or from ``KEDIT_MIRROR``.
"""

import contextlib
import hashlib
import io
import json
import logging
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from kedit import KeditError
from kedit.data import hub
from kedit.store import cache_folder

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
PAPER: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "paper.yaml").read_text())
_ABILITIES = ("mmlu", "bbh", "gsm8k", "csqa", "triviaqa", "truthfulqa", "toxigen")
SUITES = {
    **{suite: tuple(f"{suite}_{ability}" for ability in _ABILITIES) for suite in ("mini", "pico")},
    "safety": ("mini_truthfulqa_mc",),
    "paper": tuple(PAPER),
}
KNOWN = [name for suite in SUITES.values() for name in suite]


def folder(name: str) -> Path:
    """Where a benchmark's suite keeps its files."""
    return HERE / name.partition("_")[0]


@cache
def metadata(name: str) -> dict[str, Any]:
    """What is said of a benchmark: ``benchmark``, ``metric``, ``chance`` and, if any, ``filter`` and ``items``.

    ``items`` names the benchmark whose items it asks about, where they are not its own.

    Raises:
        KeditError: no such benchmark.
    """
    if name not in KNOWN:
        raise KeditError(f"benchmark {name!r} does not exist; use some of {', '.join(KNOWN)}.")
    if name in PAPER:
        return PAPER[name]["metadata"]

    class Loader(yaml.CSafeLoader):
        """Reads lm-eval's YAML without running what its !function tags name."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load((folder(name) / f"{name}.yaml").read_text(), Loader)["metadata"]


@cache
def fingerprint(name: str) -> str:
    """Hash of everything that defines a benchmark: its YAML, its items and what they share.

    Of the paper suite: lm-eval's version, our settings, every item and the exemplars, wherever they came from.
    """
    metadata(name)
    digest = hashlib.sha256()
    if name in PAPER:
        digest.update(json.dumps([version("lm-eval"), PAPER[name]], sort_keys=True).encode())
        for subtask, task in tasks(name).items():
            shown = islice(task.fewshot_docs() or (), task.config.num_fewshot)
            digest.update(json.dumps([subtask, list(shown), list(task.eval_docs)], sort_keys=True).encode())
        return digest.hexdigest()[:16]
    stems = (name, metadata(name).get("items", name), f"_{folder(name).name}_yaml", "utils")
    for path in sorted(folder(name).iterdir()):
        if path.stem in stems and path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def tasks(name: str) -> dict[str, Any]:
    """The lm-eval task objects of a benchmark by name, built once; MMLU has 57 of them, BBH 27, the others one.

    Raises:
        KeditError: the data cannot be had (``kedit.hub``).
    """
    from lm_eval.tasks import TaskManager

    metadata(name)
    if name not in PAPER:
        manager = TaskManager(include_path=str(folder(name)), include_defaults=False)
        return dict(manager.load([name])["tasks"])

    import lm_eval.tasks

    about = PAPER[name]
    stock = Path(lm_eval.tasks.__file__).parent / about["folder"]
    manager = TaskManager(include_path=str(stock), include_defaults=False)
    names = about.get("tasks") or sorted(manager.all_subtasks)
    return {subtask: _stock(manager.task_index[subtask].yaml_path, about["settings"]) for subtask in names}


def sources(name: str) -> list[str]:
    """Hub ids of the data that a benchmark needs; the mini suite carries its own."""
    return [PAPER[name]["data"]] if name in PAPER else []


def reach(name: str) -> None:
    """Ask within seconds whether a benchmark's data can be had.

    Raises:
        KeditError: it cannot (``kedit.hub``).
    """
    for source in sources(name):
        _located(source)


def _stock(path: Path, settings: dict[str, Any]) -> Any:
    """One of lm-eval's own tasks with settings of ours."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = {**load_yaml(path), **settings}
    for key in ("tag", "group"):
        config.pop(key, None)
    source = config["dataset_path"]
    config["dataset_path"], cache_dir = _located(source)
    if cache_dir:
        config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "cache_dir": cache_dir}
    datasets.disable_progress_bars()
    try:
        if hub.mirror() and config.get("test_split"):
            # the annotated ToxiGen that circulates has its train split only
            splits = datasets.get_dataset_split_names(config["dataset_path"], config.get("dataset_name"))
            if config["test_split"] not in splits and "train" in splits:
                log.warning("%s has no %s split here: its train split is used", source, config["test_split"])
                config["test_split"] = "train"
        with contextlib.redirect_stderr(io.StringIO()):
            return ConfigurableTask(config=config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise KeditError(
            f"data set {source} cannot be read ({reason}); lm-eval's task {config['task']} needs it: put it into "
            "KEDIT_MIRROR as the hub has it, or unset that to use the hub."
        ) from error


@cache
def _located(source: str) -> tuple[str, str | None]:
    """Where a data set is, and, in a mirror, a folder for what ``datasets`` makes of it.

    ``datasets`` does not notice that a local file has changed and would go on serving what it made of the
    old one, so the folder's name says which files these are.
    """

    place = hub.dataset(source)
    if not hub.mirror():
        return place, None
    files = sorted(path for path in Path(place).rglob("*") if path.is_file())
    about = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return place, str(cache_folder() / "datasets" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16])


def shares(name: str, limit: int | None) -> dict[str, int]:
    """How many items each task of a benchmark gives: all, or ``limit`` in all, in proportion to size.

    So the score of a part estimates the score of the whole (every item counts once, as in lm-eval's own
    group scores). Each task gives its first items, as with lm-eval's ``--limit``.
    """
    sizes = {subtask: len(task.eval_docs) for subtask, task in tasks(name).items()}
    total, seen, found = sum(sizes.values()), 0, {}
    limit = min(limit or total, total)
    for subtask, size in sizes.items():
        found[subtask] = (seen + size) * limit // total - seen * limit // total
        seen += size
    return found
