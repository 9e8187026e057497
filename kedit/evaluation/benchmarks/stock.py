"""lm-eval's own tasks with settings of ours, on data from the hub or from the folder that ``KEDIT_MIRROR`` names."""

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kedit import KeditError
from kedit.data import hub
from kedit.store import cache_folder

log = logging.getLogger(__name__)


def tasks(about: Mapping[str, Any]) -> dict[str, Any]:
    """The tasks of a benchmark by name.

    Args:
        about: ``folder`` of lm-eval's task files, which ``tasks`` of it (default all), ``settings`` over theirs.

    Raises:
        KeditError: the data cannot be had or read.
    """
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / about["folder"]
    index = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    names = about.get("tasks") or sorted(index.all_subtasks)
    return {name: _task(index.task_index[name].yaml_path, about["settings"]) for name in names}


def _task(path: Path, settings: Mapping[str, Any]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = {key: value for key, value in (load_yaml(path) | settings).items() if key not in ("tag", "group")}
    source = config["dataset_path"]
    config["dataset_path"], more = located(source)
    config["dataset_kwargs"] = (config.get("dataset_kwargs") or {}) | more
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise KeditError(
            f"data set {source} cannot be read ({reason}); lm-eval's task {config['task']} needs it: put it into "
            "KEDIT_MIRROR as the hub has it, or unset that to use the hub."
        ) from error


@cache
def located(source: str) -> tuple[str, dict[str, str]]:
    """Where a data set is, and what ``datasets.load_dataset`` must be told besides.

    In a mirror that is a folder of its own for what ``datasets`` makes of the files: it does not notice that a
    local file has changed, and would go on serving what it made of the old one.
    """
    path = hub.dataset(source)
    if not hub.mirror():
        return path, {}
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    about = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return path, {
        "cache_dir": str(cache_folder() / "datasets" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16])
    }
