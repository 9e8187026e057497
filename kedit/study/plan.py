"""What a run would do, before it starts: cells, edits, what is stored, hours, memory, disk, access.

No model is loaded and nothing is fetched. Hours are those of committed runs (figures/*/*/manifest.json), of the models
nearest in size, in proportion to parameters and to tokens read, or to the contexts and steps of a search: right within
a factor of three or so. They count nothing as stored and leave out other measures; once: second moments, and training
that is not committed. Memory is the least: weights, originals of edited matrices, second moments; texts that are being
generated come on top. Disk: half-precision weights and second moments; edits come on top.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import isnan, log, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from huggingface_hub import get_token

from kedit import ROOT, KeditError
from kedit.data import corpus, facts, hub
from kedit.editors import check_layers, kind_of, make_hparams
from kedit.editors.protocol import Editor, committed
from kedit.editors.second_moments import key_of
from kedit.evaluation import benchmarks
from kedit.model.shapes import KNOWN, Shape, shape_of
from kedit.store import Store, runs_folder
from kedit.study.params import DTYPES, Method, Params
from kedit.study.run import planned, units
from kedit.study.trajectory import Line, states_of
from kedit.workers import free_memory

logger = logging.getLogger(__name__)

GB = 1e9
LIBRARIES = 1_500_000_000
"""Bytes that the libraries take, on either side."""
GPU = 400
"""CPU cores that one GPU is taken to be worth: an A100's 2 TB/s and some 25 Tflop/s, to 5 GB/s and 70 Gflop/s."""
GENERATED = 16
"""Tokens read in the time of one generated, for which all weights are fetched to serve a few texts."""
SUCCESS = 240
"""Tokens of all that edit success asks of an edit."""


def _editors(params: Params, model: str) -> Iterator[tuple[Method, type[Editor], Any]]:
    """Each method of a grid, its class, and its hyper-parameters on a model."""
    for method in params.methods:
        kind = kind_of(method.method)
        yield method, kind, make_hparams(kind, model, method.hparams)


# Memory -------------------------------------------------------------------------------------------


def available() -> tuple[str, int, int]:
    """(device, bytes on it, bytes of the host) here: all GPUs together, if there are any."""
    host = free_memory()
    if count := torch.cuda.device_count():
        return "GPU", sum(torch.cuda.get_device_properties(n).total_memory for n in range(count)), host
    return "CPU", host, host


def memory(shape: Shape, dtype: str, device: str, kind: type[Editor] = Editor, hparams: Any = None) -> tuple[int, int]:
    """(bytes where the model is, bytes of the host) that a method needs at least.

    Weights; the originals of edited matrices in float32; second moments and their factors in float64.
    """
    weights, square, moments = shape.parameters * DTYPES[dtype], 8 * shape.m**2, len(kind.moments_at(hparams))
    edited = len(getattr(hparams, "layers", [0] * hasattr(hparams, "layer")))
    there = LIBRARIES + weights + 4 * shape.d * shape.m * edited + square * (moments + bool(moments))
    return there, LIBRARIES + weights * (device == "GPU") + 2 * square * moments


def check_memory(params: Params, here: tuple[str, int, int] | None = None) -> None:
    """Refuse a run that cannot fit, before anything is loaded; models of unknown shape pass.

    Args:
        here: (device, bytes on it, bytes of the host); by default this machine's.

    Raises:
        KeditError: naming model, method, what it needs and what there is, and what would fit.
    """
    device, *limits = here or available()
    for model in params.models:
        for method, kind, hparams in _editors(params, model) if (shape := shape_of(model)) else ():
            needs = memory(shape, params.dtype, device, kind, hparams)
            for need, there, place in zip(needs, limits, (device, "host"), strict=True):
                if need > there:
                    remedy = _remedy(shape, params.dtype, device, kind, hparams, limits)
                    raise KeditError(
                        f"{params.rq}/{params.name}: {method} on {model} needs {need / GB:.0f} GB of {place} memory "
                        f"and there are {there / GB:.0f} GB; {remedy}, or a machine with more."
                    )


def _remedy(shape: Shape, dtype: str, device: str, kind: type[Editor], hparams: Any, limits: Sequence[int]) -> str:
    """What would fit instead of a method on a model: half precision, other methods, a smaller model."""

    def fits(*needs: Any) -> bool:
        return all(need <= there for need, there in zip(memory(*needs), limits, strict=True))

    if dtype != "bfloat16" and fits(shape, "bfloat16", device, kind, hparams):
        return "set dtype: bfloat16"
    if fits(shape, dtype, device):
        return "leave this method out"
    fitting = {shape_of(name).parameters: name for name in KNOWN if fits(shape_of(name), dtype, device)}
    return f"use {fitting[max(fitting)]}" if fitting else "no known model fits"


def check(params: Params) -> None:
    """What a run should ask before it loads a model: layers, memory, edits, the benchmarks' data, the statistics' text.

    Terms of use that a model has of its own are told.

    Raises:
        KeditError: one sentence on what is missing.
    """
    for model in params.models:
        if terms := KNOWN.get(model, {}).get("terms"):
            logger.info("%s", terms)
    try:
        for model in params.models:
            for _, kind, hparams in _editors(params, model) if (shape := shape_of(model)) else ():
                check_layers(kind, hparams, shape.layers)
        params.requests(0)
    except KeditError as error:
        raise KeditError(f"params/{params.rq}/{params.name}.yaml: {error}") from error
    check_memory(params)
    for name in params.benchmarks:
        benchmarks.reach(name)
    if params.statistics.text == "wikipedia":
        hub.dataset(corpus.WIKIPEDIA[0])


# What is there already ----------------------------------------------------------------------------


def _runs(top: Path) -> Iterator[dict[str, Any]]:
    """Manifests of the runs in a folder, the latest last."""
    for path in sorted(top.glob("*/*/manifest.json"), key=lambda path: path.stat().st_mtime):
        with suppress(OSError, ValueError):
            yield json.loads(path.read_text())


def fingerprints(dtype: str = "float32") -> dict[str, str]:
    """Fingerprints of models in a precision, as the manifests of earlier runs tell them, those of this machine last."""
    runs = [run for top in (ROOT / "figures", runs_folder()) for run in _runs(top) if run["params"]["dtype"] == dtype]
    return {model: about["fingerprint"] for run in runs for model, about in run["models"].items()}


def stored(params: Params, model: str, fingerprint: str, store: Store) -> tuple[int, int, bool]:
    """(edits, cells) of a model's part of a grid that a store holds, and whether all cells were looked up.

    Cells of the paper suite are keyed by their data, which is not read here.
    """
    states: dict[Line, dict[int, str]] = {}
    for position, (method, kind, hparams) in enumerate(_editors(params, model)):
        needed = kind.moments_at(hparams)
        moments = key_of(model, fingerprint, params.statistics.text, params.statistics.tokens) if needed else {}
        recipe, steps = kind.recipe(hparams, moments) | kind.artefact(model, fingerprint, hparams), params.steps(method)
        for order in params.orders:
            states[Line(position, order)] = states_of(fingerprint, recipe, params.requests(order), steps)
    at_hand = [name for name in params.benchmarks if not benchmarks.sources(name)]
    wanted = units(params.model_copy(update={"benchmarks": at_hand}), model, states)
    held = [unit.is_cell for unit in wanted if store.path(unit.key).exists()]
    return len(held) - sum(held), sum(held), at_hand == params.benchmarks


def _held(params: Params, model: str) -> str:
    """What the store holds of a model's part of a grid, in words."""
    if (fingerprint := fingerprints(params.dtype).get(model)) is None:
        return "not known before the model is loaded once"
    try:
        readable = facts.at_hand(params.edit_set.name, params.edit_set.path)
    except KeditError:  # there is a mirror, without the edit set
        readable = False
    if not readable:
        return "not known without the edit set"
    edits, cells, complete = stored(params, model, fingerprint, Store())
    return f"{edits:,} edits and {cells:,} cells{'' if complete else '; cells of the paper suite were not looked up'}"


def _access(params: Params) -> Iterator[str]:
    """Lines on gated models, data sets and the edit set: where each would come from."""
    if gated := [model for model in params.models if KNOWN.get(model, {}).get("gated")]:
        token = "a token is set" if get_token() else "no token is set: ask on its page, then set HF_TOKEN"
        yield f"Gated, needs access: {', '.join(gated)}; {token}."
    sources = sorted({source for name in params.benchmarks for source in benchmarks.sources(name)})
    sources += [corpus.WIKIPEDIA[0]] * (params.statistics.text == "wikipedia")
    try:
        if sources:
            where = "from the hub (KEDIT_MIRROR is not set), none known to be gated"
            if mirror := hub.mirror():
                missing = ", ".join(source for source in sources if not (mirror / source).is_dir())
                where = f"KEDIT_MIRROR lacks {missing}" if missing else "all in KEDIT_MIRROR"
            yield f"Data sets: {', '.join(sources)}: {where}."
        if published := facts.PUBLISHED.get(params.edit_set.name):
            path = params.edit_set.path or facts.located(params.edit_set.name)
            elsewhere = f"hub {published['hub']}, in its own order" if "hub" in published else "needs KEDIT_MIRROR"
            yield f"Edit set {params.edit_set.name}: {Path(path).name if path else elsewhere}."
    except KeditError as error:
        yield str(error)


# Hours --------------------------------------------------------------------------------------------


def measured(parameters: int, seconds: Callable[[dict[str, Any]], float]) -> float:
    """Seconds on one CPU core, as committed runs took, in proportion to parameters; nan if none did it.

    Of the runs of models nearest in size it is the fastest, whose machine had least else to do.

    Args:
        seconds: from a run's manifest, how long it took; nan if it did not do it.
    """
    taken = []
    for run in _runs(ROOT / "figures"):
        size = fmean(about["parameters"] for about in run["models"].values())
        cores = GPU if run["machine"]["accelerator"] else 1
        taken.append((abs(log(size / parameters)), seconds(run) * cores * parameters / size))
    return min((one for one in taken if not isnan(one[1])), default=(0, nan))[1]


def edit_seconds(shape: Shape, kind: type[Editor], hparams: Any) -> float:
    """Of an edit on one CPU core, in proportion to what a search reads as well; nan if never timed."""

    def search(values: Mapping[str, Any]) -> int:
        """Texts (two beside the sampled contexts) times forwards; a trained method's steps are not those of an edit."""
        texts = 2 + sum(count for _, count in values.get("context_lengths", ()))
        return texts * (1 + values.get("steps", 0) * (not kind.trained))

    def seconds(run: dict[str, Any]) -> float:
        then = [values for name, values in run["hparams"].items() if name.startswith(f"{kind.name} (")]
        return run["edits"]["median_seconds"][kind.name] / search(then[0]) if then else nan

    return measured(shape.parameters, seconds) * search(asdict(hparams))


def _tokens(grid: Mapping[str, Any], first: bool) -> float:
    """Tokens that a method's cells read, of the metadata's ``reading``; the first has the unedited model's as well.

    ``shared`` tokens of exemplars are read once a task, each item's ``own``, and those ``generated`` until it stops.
    """
    every, orders = 0.0, len(grid["orders"])
    for about in map(benchmarks.metadata, grid["benchmarks"]):
        reading = about["reading"]
        items = min(grid["limit"] or reading["items"], reading["items"])
        every += reading["shared"] * min(1, items / about.get("tasks", 1))
        every += (reading["own"] + GENERATED * reading["generated"]) * items
    edited = sum(every + SUCCESS * count for count in grid["edits"] if count) * orders
    return edited + first * (every + SUCCESS * max(grid["edits"]) * orders)


def token_seconds(shape: Shape) -> float:
    """Of a token read, on one CPU core: committed runs' work but for their edits, over the tokens of their cells."""

    def seconds(run: dict[str, Any]) -> float:
        grid, each = run["params"], run["edits"]["median_seconds"]
        edits = sum(each[method["method"]] for method in grid["methods"]) * max(grid["edits"]) * len(grid["orders"])
        tokens = _tokens(grid, first=True) + (len(grid["methods"]) - 1) * _tokens(grid, first=False)
        return (run["work_seconds"] / len(run["models"]) - edits) / tokens

    return measured(shape.parameters, seconds)


def rows(params: Params, model: str, shape: Shape) -> Iterator[tuple[str, list[float], list[int]]]:
    """For each method its name and the model's, seconds on one CPU core and bytes.

    Seconds are of edits, of cells, and once (nan: not timed), which is what second moments read where they are first
    needed, up to the deepest layer; and training, whose time no manifest has. Bytes are of memory where the model is,
    of the host's, and on disk.
    """
    made: set[int] = set()
    edits, token = max(params.edits) * len(params.orders), token_seconds(shape)
    for index, (method, kind, hparams) in enumerate(_editors(params, model)):
        missing = set(kind.moments_at(hparams)) - made
        made |= missing
        untrained = kind.trained and (method.hparams or not committed(method.method, model).exists())
        once = nan if untrained else token * params.statistics.tokens * (max(missing, default=-1) + 1) / shape.layers
        cells = token * _tokens(params.model_dump(), first=index == 0)
        seconds = [edit_seconds(shape, kind, hparams) * edits, cells, once]
        needs = memory(shape, params.dtype, "GPU", kind, hparams)
        yield f"{model:<36} {method}", seconds, [*needs, 4 * shape.m**2 * len(missing)]


# The page -----------------------------------------------------------------------------------------

HEAD = f"""
{"-- GPU --":>84} | {"-- CPU, one core --":>33}{"-- GB --":>25}
{"model":<36} {"method":<14}{"edits":>11}{"cells":>11}{"once":>11} | {"edits":>11}{"cells":>11}{"once":>11} \
{"GPU":>8}{"host":>8}{"disk":>8}"""


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return "not timed" if isnan(hours) else f"{hours:,.{int(hours < 10)}f} h" if hours >= 0.1 else f"{seconds:,.0f} s"


def _line(name: str, seconds: Sequence[float], sizes: Sequence[int]) -> str:
    times = " | ".join("".join(f"{_hours(each / cores):>11}" for each in seconds) for cores in (GPU, 1))
    return f"{name:<51}{times} {''.join(f'{size / GB:>8.1f}' for size in sizes)}"


def plan(params: Params) -> str:
    """The whole answer as text, a line a fact."""
    counts, shapes = planned(params), {model: shape_of(model) for model in params.models}
    cells, most = sum(counts[name] for name in params.asked), max(params.edits)
    paths = len(params.models) * len(params.methods) * len(params.orders)
    table = [row for model, shape in shapes.items() if shape for row in rows(params, model, shape)]
    unknown = [model for model, shape in shapes.items() if shape is None]
    without = [*unknown, *(" ".join(name.split()) for name, seconds, _ in table if any(map(isnan, seconds)))]
    total = sum(each for _, seconds, _ in table for each in seconds if not isnan(each))
    disk = sum(2 * shape.parameters for shape in shapes.values() if shape) + sum(sizes[-1] for *_, sizes in table)
    about = f"about {_hours(total / GPU)} on a GPU or {_hours(total)} on one CPU core (workers divide it)"
    about = about if total else "not known"
    lines = [
        f"params/{params.rq}/{params.name}.yaml: {paths} trajectories of {most} edits: {paths * most:,} edits; "
        f"{cells:,} cells at {len(params.edits)} checkpoints ({len(params.asked)} kinds: edit success, "
        f"{len(params.benchmarks)} benchmarks, {len(params.measures)} other measures).",
        *_access(params),
        *(f"In the store, {model}: {_held(params, model)}." for model in params.models),
        HEAD,
        *(_line(*row) for row in table),
        *(f"{model:<36} shape unknown: its configuration is not on this machine" for model in unknown),
        f"\nIn all {about}"
        f"{', without what is not timed of ' * bool(without)}{', '.join(without)}; {disk / GB:,.1f} GB of disk.",
        f"Assumed: a token generated takes as long as {GENERATED} read; a GPU is {GPU} CPU cores.",
        __doc__.partition("\n\n")[2].strip(),
    ]
    return "\n".join(lines)
