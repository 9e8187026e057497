"""What a run covers: a parameter file, checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from kedit import KeditError
from kedit.data import facts
from kedit.editors import EDITORS, kind_of, make_hparams
from kedit.evaluation import benchmarks
from kedit.store import digest

DTYPES = {"float32": 4, "bfloat16": 2}
"""Precisions that a model may be loaded in -> bytes of a weight; edited matrices are kept in float32 beside it."""


# Parameters ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A method of the grid; ``variant`` names a run with other hyper-parameters than the file's."""

    method: str
    variant: str = "default"
    hparams: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Params:
    """What one run covers; the fields are the keys of ``params/rqN/<name>.yaml``."""

    rq: str
    name: str
    models: list[str]
    methods: list[Method]
    edits: list[int]
    benchmarks: list[str]
    measures: list[str] = field(default_factory=list)
    edit_set: Mapping[str, Any] = field(default_factory=lambda: {"name": "bundled", "split": "edit"})
    orders: list[int] = field(default_factory=lambda: [0])
    limit: int | None = None
    dtype: str = "float32"
    statistics: Mapping[str, Any] = field(default_factory=lambda: {"text": "wikipedia-sample", "tokens": 98_304})

    @classmethod
    def read(cls, path: str | Path) -> "Params":
        """Read a parameter file; its folder is the question, its stem the name of the run."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text())
        except OSError as error:
            available = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
            raise KeditError(f"{path}: there is no such parameter file; there are: {available}.") from error
        except yaml.YAMLError as error:
            raise KeditError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(values, dict):
            raise KeditError(f"{path}: must be a mapping of keys to values.")
        return cls.make(path.parent.name, path.stem, values, where=str(path))

    @classmethod
    def make(cls, rq: str, name: str, values: Mapping[str, Any], where: str = "parameters") -> "Params":
        """Check values and build the parameters.

        Raises:
            KeditError: naming the file, the key and the remedy.
        """
        allowed = [f.name for f in fields(cls) if f.name not in ("rq", "name")]
        for key in values:
            if key not in allowed:
                hint = get_close_matches(str(key), allowed, 1)
                remedy = f"did you mean {hint[0]!r}?" if hint else f"the keys are {', '.join(allowed)}."
                raise KeditError(f"{where}: unknown key {key!r}; {remedy}")
        for key in ("models", "methods", "edits", "benchmarks"):
            if key not in values:
                raise KeditError(f"{where}: key {key!r} is missing; add it as a list.")
        for key in ("models", "methods", "edits", "benchmarks", "orders"):
            if key in values and (not isinstance(values[key], list) or not values[key]):
                raise KeditError(f"{where}: {key} must be a list with at least one entry.")
        for key in ("edits", "orders"):
            for number in values.get(key, ()):
                if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                    raise KeditError(f"{where}: {key} holds {number!r}; use whole numbers from 0 up.")
        for key in ("models", "edits", "benchmarks", "measures", "orders"):
            if len(set(map(str, values.get(key, ())))) < len(values.get(key, ())):
                raise KeditError(f"{where}: {key} names something twice; list each once.")
        limit = values.get("limit")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise KeditError(f"{where}: limit is {limit!r}; use a number of items from 1 up, or null for all.")
        if values.get("dtype", "float32") not in DTYPES:
            raise KeditError(f"{where}: dtype is {values['dtype']!r}; use one of {', '.join(DTYPES)}.")
        for name_ in values["benchmarks"]:
            if name_ not in benchmarks.KNOWN:
                raise KeditError(
                    f"{where}: benchmarks names {name_!r}, which does not exist; use some of "
                    f"{', '.join(benchmarks.KNOWN)}."
                )
        for name_ in values.get("measures", ()):
            if name_ not in MEASURES:
                raise KeditError(
                    f"{where}: measures names {name_!r}, which does not exist; use some of {', '.join(MEASURES)}."
                )
        values = dict(values)
        values["methods"] = [_method(entry, values["models"], where) for entry in values["methods"]]
        values["edits"] = sorted({0, *values["edits"]})
        for key in ("edit_set", "statistics"):
            if key in values and not isinstance(values[key], dict):
                raise KeditError(f"{where}: {key} must be a mapping, such as the one in params/rq1/smoke.yaml.")
        params = cls(rq, name, **values)
        _check_mapping(params.statistics, {"text": str, "tokens": int}, "statistics", where)
        _check_mapping(params.edit_set, {"name": str, "split": str, "path": str}, "edit_set", where)
        if params.statistics.get("tokens", 1) < 1:
            raise KeditError(f"{where}: statistics.tokens must be 1 or more.")
        params.check_edit_set(where)
        return params

    def check_edit_set(self, where: str = "parameters") -> None:
        """Read the edit set if that needs no network; what is to be fetched first is checked by a run."""

        try:
            wait = self.edit_set.get("name") in facts.SETS and not facts.at_hand(**self.edit_set)
        except KeditError:  # a mirror without the set: a run will say so
            wait = True
        if not wait:
            self.requests(0, where)

    def requests(self, order: int, where: str = "parameters") -> list:
        """The edits of one order, as many as the grid needs."""

        if "name" not in self.edit_set:
            raise KeditError(f"{where}: edit_set.name is missing; use one of {', '.join(facts.SETS)}.")
        try:
            records = facts.load(**self.edit_set)
        except KeditError as error:
            raise KeditError(f"{where}: edit_set: {error}") from error
        wanted = max(self.edits)
        if wanted > len(records):
            raise KeditError(f"{where}: edits asks for {wanted}, but the edit set holds {len(records)} records.")
        return facts.ordered(records, order)[:wanted]

    @property
    def asked(self) -> list[str]:
        """Everything that is asked at a checkpoint: edit success, the benchmarks, other measures."""
        return ["edit", *self.benchmarks, *self.measures]

    @property
    def edit_set_name(self) -> str:
        """The edit set as the table shows it."""
        return self.edit_set["name"]

    def fingerprint(self) -> str:
        """Hash of the grid, the hyper-parameters that stand in params/methods included."""
        return digest(asdict(self), self.hparams())[:16]

    def hparams(self) -> dict[str, dict[str, Any]]:
        """Every method's hyper-parameters on every model, as they stand."""

        return {
            f"{method.method} ({method.variant}) on {model}": asdict(
                make_hparams(kind_of(method.method), model, method.hparams)
            )
            for model in self.models
            for method in self.methods
        }


def _check_mapping(values: Mapping[str, Any], kinds: Mapping[str, type], key: str, where: str) -> None:
    for name, value in values.items():
        if name not in kinds:
            hint = get_close_matches(str(name), kinds, 1)
            remedy = f"did you mean {hint[0]!r}?" if hint else f"the keys are {', '.join(kinds)}."
            raise KeditError(f"{where}: unknown key '{key}.{name}'; {remedy}")
        if not isinstance(value, kinds[name]):
            raise KeditError(f"{where}: {key}.{name} is {value!r}; it must be a {kinds[name].__name__}.")


def _method(entry: Any, models: list[str], where: str) -> Method:

    if isinstance(entry, str):
        entry = {"method": entry}
    if not isinstance(entry, dict) or "method" not in entry:
        raise KeditError(f"{where}: methods holds {entry!r}; give a name, or method, variant and hparams.")
    for key in entry:
        if key not in ("method", "variant", "hparams"):
            raise KeditError(f"{where}: unknown key 'methods.{key}'; a method has method, variant and hparams.")
    if entry["method"] not in EDITORS:
        hint = get_close_matches(str(entry["method"]), EDITORS, 1)
        remedy = f"did you mean {hint[0]!r}?" if hint else f"use some of {', '.join(EDITORS)}."
        raise KeditError(f"{where}: methods names {entry['method']!r}, which does not exist; {remedy}")
    method = Method(**entry)
    if method.hparams and method.variant == "default":
        raise KeditError(f"{where}: methods changes hparams of {method.method}; name the variant.")
    for model in models:
        try:
            make_hparams(kind_of(method.method), model, method.hparams)
        except KeditError as error:
            raise KeditError(f"{where}: methods: {error}") from error
    return method


MEASURES = {"structure": 1, "refusal": 1}
"""What can be measured at a checkpoint besides edit success and benchmarks, each with the version of its definition."""
