"""Loads a pico task's items from the JSONL file beside its YAML."""

import json
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **_: Any) -> datasets.DatasetDict:
    """Return the items of `file` as the only split, `test` (lm-eval passes its metadata too)."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return datasets.DatasetDict(test=datasets.Dataset.from_list([json.loads(line) for line in lines]))
