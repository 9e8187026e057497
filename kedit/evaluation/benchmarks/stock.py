"""lm-eval's own tasks with settings of ours, on data from the hub or from the folder that ``KEDIT_MIRROR`` names."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kedit import KeditError
from kedit.data import hub
from kedit.store import cache_folder, digest

log = logging.getLogger(__name__)


@contextlib.contextmanager
def as_a_sentence(what: str, remedy: str) -> Iterator[None]:
    """Within the block, whatever lm-eval, a library or a task's own code stumbles over is one sentence.

    Raises:
        KeditError: it stumbled.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise KeditError(f"{what} ({reason}); {remedy}.") from error


def tasks(about: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks of a benchmark by name.

    Args:
        about: ``folder`` of lm-eval's task files, which ``tasks`` of it (default all), ``data`` that they ask the hub
            for, and ``settings`` over theirs.

    Raises:
        KeditError: the data cannot be had or read.
    """
    import datasets
    import lm_eval.tasks

    remedy = "put it into KEDIT_MIRROR as the hub has it, or unset that to use the hub"
    folder = Path(lm_eval.tasks.__file__).parent / about["folder"]
    index = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    settings = about["settings"] | located(about["data"])
    datasets.disable_progress_bars()
    built = {}
    for name in about.get("tasks") or sorted(index.all_subtasks):
        with as_a_sentence(f"data set {about['data']} cannot be read", f"lm-eval's task {name} needs it: {remedy}"):
            built[name] = _task(index.task_index[name].yaml_path, settings)
    return built


def loaded(name: str) -> dict[str, Any]:
    """The tasks that lm-eval itself knows by a name, of a task, a group or a tag, with its own settings.

    Raises:
        KeditError: it knows none, or the data cannot be had or read.
    """
    from lm_eval.tasks import TaskManager

    remedy = (
        "it must be one of kedit's or of lm-eval's (lm_eval ls tasks), with its data on a hub within reach or in "
        "KEDIT_MIRROR"
    )
    quiet, mirror = contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(hub.mirror() or Path())
    with as_a_sentence(f"benchmark {name!r} cannot be asked", remedy), quiet, mirror:
        return dict(TaskManager().load([name])["tasks"])


def _task(path: Path, settings: Mapping[str, Any]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = {key: value for key, value in (load_yaml(path) | settings).items() if key not in ("tag", "group")}
    if hub.mirror() and "test_split" in config:
        # the annotated ToxiGen that circulates has its train split only
        splits = datasets.get_dataset_split_names(config["dataset_path"], config.get("dataset_name"))
        if config["test_split"] not in splits and "train" in splits:
            log.warning("%s has no %s split here: its train split is used", config["task"], config["test_split"])
            config["test_split"] = "train"
    with contextlib.redirect_stderr(io.StringIO()):
        return ConfigurableTask(config=config)


@cache
def located(source: str) -> dict[str, Any]:
    """What a task's configuration must say so that it reads a data set from where that is.

    In a mirror that is also a folder of its own for what ``datasets`` makes of the files: it does not notice that a
    local file has changed, and would go on serving what it made of the old one.
    """
    found: dict[str, Any] = {"dataset_path": hub.dataset(source)}
    if hub.mirror():
        files = sorted(file for file in Path(found["dataset_path"]).rglob("*") if file.is_file())
        about = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        found["dataset_kwargs"] = {"cache_dir": str(cache_folder() / "datasets" / digest(about)[:16])}
    return found
