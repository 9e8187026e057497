"""Suites of benchmarks. A benchmark is an lm-eval task; ours are YAML and JSONL in ``mini/``."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kedit import KeditError

MINI = Path(__file__).parent / "mini"
SUITES = {
    "mini": (
        "mini_mmlu",
        "mini_bbh",
        "mini_gsm8k",
        "mini_csqa",
        "mini_triviaqa",
        "mini_truthfulqa",
        "mini_toxigen",
    ),
    "safety": ("mini_truthfulqa_mc",),
}
KNOWN = [name for suite in SUITES.values() for name in suite]


@cache
def metadata(name: str) -> dict[str, Any]:
    """What a task's YAML says of itself: ``benchmark``, ``metric``, ``chance`` and, if any, ``filter`` and ``items``.

    ``items`` names the benchmark whose items it asks about, where they are not its own.

    Raises:
        KeditError: no such benchmark.
    """
    if name not in KNOWN:
        raise KeditError(f"benchmark {name!r} does not exist; use some of {', '.join(KNOWN)}.")

    class Loader(yaml.CSafeLoader):
        """Reads lm-eval's YAML without running what its !function tags name."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load((MINI / f"{name}.yaml").read_text(), Loader)["metadata"]


@cache
def fingerprint(name: str) -> str:
    """Hash of everything that defines a benchmark: its YAML, its items and what they share."""
    stems = (name, metadata(name).get("items", name), "_mini_yaml", "utils")
    digest = hashlib.sha256()
    for path in sorted(MINI.iterdir()):
        if path.stem in stems and path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def task(name: str) -> Any:
    """The lm-eval task object, built once."""
    from lm_eval.tasks import TaskManager

    metadata(name)
    manager = TaskManager(include_path=str(MINI), include_defaults=False)
    return manager.load([name])["tasks"][name]
