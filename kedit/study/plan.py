"""What a run would do, before it starts: cells, edits, what is stored, hours, memory, disk, access.

No model is loaded and nothing is fetched. Hours are estimates from shapes (``kedit.editors.cost``): operations and,
where few tokens go through at once, reading the weights; whichever takes longer on a machine whose sustained speed
is assumed in ``MACHINES`` and printed. Expect them to be right within a factor of three.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import yaml
from huggingface_hub import get_token
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kedit import ROOT, KeditError
from kedit.data import corpus, facts, hub
from kedit.editors import kind_of, make_hparams
from kedit.editors.cost import FLOAT, Cost, Shape, Work, reading
from kedit.editors.protocol import committed
from kedit.editors.second_moments import key_of
from kedit.evaluation import benchmarks
from kedit.model.anatomy import Anatomy, matrix
from kedit.store import Store, runs_folder
from kedit.study.params import DTYPES, Method, Params
from kedit.study.run import planned, units
from kedit.study.trajectory import Line, states_of
from kedit.workers import free_memory

GB = 1e9
LIBRARIES = 1_500_000_000
"""Bytes that the libraries take, on either side."""
PACK, TEXTS = 384, 16  # kedit/model/scoring.py: tokens read and texts generated at a time
SUCCESS = 240  # tokens of all that edit success asks of an edit

# Shapes and machines ------------------------------------------------------------------------------


@cache
def known_shapes() -> dict[str, Shape]:
    """Model -> its shape, of models.yaml; a test builds each from its configuration and counts."""
    blocks = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
    return {name: Shape(**block["shape"]) for block in blocks for name in block["names"]}


@cache
def _configured(model: str) -> Shape | None:
    """The shape of a model whose configuration is a folder's or in the hub's cache."""
    try:
        return shape_from(AutoConfig.from_pretrained(model, local_files_only=True))
    except (OSError, ValueError):
        return None


def shape_from(config: PretrainedConfig) -> Shape:
    """The shape of a configuration's model, which is built without weights.

    Raises:
        KeditError: an architecture that kedit does not know.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    anatomy = Anatomy(model)
    d, m = matrix(anatomy.down(0)).shape
    heads = config.num_attention_heads
    kv = (getattr(config, "head_dim", None) or d // heads) * (getattr(config, "num_key_value_heads", None) or heads)
    return Shape(
        d, len(anatomy.blocks), m, 3 if anatomy.gate(0) else 2, kv, config.vocab_size,
        sum(weight.numel() for weight in model.parameters()), config.max_position_embeddings,
    )  # fmt: skip


def shape_of(params: Params, model: str) -> Shape | None:
    """A model's shape in the precision that a grid asks for, if it is known."""
    shape = known_shapes().get(model) or _configured(model)
    return shape and replace(shape, weight=DTYPES[params.dtype])


@dataclass(frozen=True)
class Machine:
    """Sustained speed: float32 operations and bytes of weights read, a second."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """That so much work takes."""
        return max(work.flops / self.flops, work.read / self.bandwidth)


MACHINES = {
    "GPU": Machine("one GPU of 10 Tflop/s in float32 and 1 TB/s, sustained (half an A100's)", 1e13, 1e12),
    "CPU": Machine("one CPU core of 70 Gflop/s and 5 GB/s, sustained", 7e10, 5e9),
}

# Costs --------------------------------------------------------------------------------------------


def benchmark_work(shape: Shape, name: str, limit: int | None) -> Work:
    """Of one cell, from what the task's metadata says that it makes a model read (``reading``).

    ``shared`` tokens of exemplars are read once a task, each item's ``own``, and those ``generated`` until it stops.
    """
    about = benchmarks.metadata(name)
    read = about["reading"]
    items = min(limit or read["items"], read["items"])
    shared = read["shared"] * min(1, items / about.get("tasks", 1))
    return reading(shape, shared + items * read["own"], PACK) + reading(shape, items * read["generated"], TEXTS)


def generating(shape: Shape, names: list[str]) -> int:
    """Bytes of keys and values while texts are generated side by side, at the lengths that tasks say."""
    read = [benchmarks.metadata(name)["reading"] for name in names]
    longest = max((about["own"] + about["generated"] for about in read if about["generated"]), default=0)
    return 2 * TEXTS * longest * 2 * shape.layers * shape.kv * shape.weight


def memory(shape: Shape, cost: Cost, device: str = "GPU") -> tuple[int, int]:
    """(bytes where the model is, bytes of the host) that a method needs at least; texts being generated come on top."""
    on_host = LIBRARIES + (shape.bytes if device == "GPU" else 0)
    return shape.bytes + LIBRARIES + cost.device_bytes, on_host + cost.host_bytes


def _costs(params: Params, model: str, shape: Shape) -> Iterator[tuple[Method, Sequence[int], Cost]]:
    """Each method of a grid, the layers whose second moments it needs, and what it costs on a model."""
    for method in params.methods:
        kind = kind_of(method.method)
        hparams = make_hparams(kind, model, method.hparams)
        yield method, kind.moments_at(hparams), kind.cost(shape, hparams, params.statistics.tokens)


# Refusals -----------------------------------------------------------------------------------------


def available() -> tuple[str, int, int]:
    """(device, bytes on it, bytes of the host) here: all GPUs together, if there are any."""
    host = free_memory()
    if count := torch.cuda.device_count():
        return "GPU", sum(torch.cuda.get_device_properties(n).total_memory for n in range(count)), host
    return "CPU", host, host


def check_memory(params: Params, here: tuple[str, int, int] | None = None) -> None:
    """Refuse a run that cannot fit, before anything is loaded; models of unknown shape pass.

    Args:
        here: (device, bytes on it, bytes of the host); by default this machine's.

    Raises:
        KeditError: naming model, method, what it needs and what there is, and what would fit.
    """
    device, *limits = here or available()
    for model in params.models:
        shape = shape_of(params, model)
        for method, _, cost in _costs(params, model, shape) if shape else ():
            for need, there, place in zip(memory(shape, cost, device), limits, (device, "host"), strict=True):
                if need > there:
                    raise KeditError(
                        f"{params.rq}/{params.name}: {method} on {model} needs {need / GB:.0f} GB of {place} memory "
                        f"and there are {there / GB:.0f} GB; {_remedy(shape, cost, device, limits, place)}, or a "
                        "machine with more."
                    )


def _remedy(shape: Shape, cost: Cost, device: str, limits: Sequence[int], place: str) -> str:
    """What would fit instead of a method on a model: half precision, other methods, a smaller model."""
    half = replace(shape, weight=DTYPES["bfloat16"])
    if shape != half and all(need <= there for need, there in zip(memory(half, cost, device), limits, strict=True)):
        return "set dtype: bfloat16"
    if memory(shape, Cost(), device)[0] <= limits[0] and place != "host":
        return "leave this method out"
    others = {name: replace(other, weight=shape.weight) for name, other in known_shapes().items()}
    bytes_of = {name: other.bytes for name, other in others.items() if other.bytes < shape.bytes}
    fitting = [name for name in bytes_of if memory(others[name], Cost(), device)[0] <= limits[0] * 0.8]
    return f"use {max(fitting, key=bytes_of.__getitem__)}" if fitting else "no known model fits"


def check(params: Params) -> None:
    """What a run should ask before it loads a model: memory, edits, the benchmarks' data, the statistics' text.

    Raises:
        KeditError: one sentence on what is missing.
    """
    check_memory(params)
    try:
        params.requests(0)
    except KeditError as error:
        raise KeditError(f"params/{params.rq}/{params.name}.yaml: {error}") from error
    for name in params.benchmarks:
        benchmarks.reach(name)
    if params.statistics.text == "wikipedia":
        hub.dataset(corpus.WIKIPEDIA[0])


# What is there already ----------------------------------------------------------------------------


def fingerprints(dtype: str = "float32") -> dict[str, str]:
    """Fingerprints of models in a precision, as the manifests of earlier runs tell them, those of this machine last."""
    known: dict[str, str] = {}
    for top in (ROOT / "figures", runs_folder()):
        for path in sorted(top.glob("*/*/manifest.json"), key=lambda path: path.stat().st_mtime):
            try:
                manifest = json.loads(path.read_text())
                models = manifest["models"] if manifest["params"]["dtype"] == dtype else {}
            except (OSError, ValueError, KeyError):
                continue
            known |= {model: about["fingerprint"] for model, about in models.items()}
    return known


def stored(params: Params, model: str, fingerprint: str, store: Store) -> tuple[int, int, bool]:
    """(edits, cells) of a model's part of a grid that a store holds, and whether all cells were looked up.

    Cells of the paper suite are keyed by their data, which is not read here.
    """
    states: dict[Line, list[str]] = {}
    for position, method in enumerate(params.methods):
        kind = kind_of(method.method)
        hparams = make_hparams(kind, model, method.hparams)
        needed = kind.moments_at(hparams)
        moments = key_of(model, fingerprint, params.statistics.text, params.statistics.tokens) if needed else {}
        for order in params.orders:
            recipe = kind.recipe(hparams, moments)
            states[Line(position, order)] = states_of(fingerprint, recipe, params.requests(order))
    at_hand = [name for name in params.benchmarks if not benchmarks.sources(name)]
    wanted = units(params.model_copy(update={"benchmarks": at_hand}), model, states)
    held = [unit for unit in wanted if store.path(unit.key).exists()]
    cells = sum(unit.is_cell for unit in held)
    return len(held) - cells, cells, at_hand == params.benchmarks


def _stored_lines(params: Params) -> Iterator[str]:
    known, store = fingerprints(params.dtype), Store(runs_folder() / "store")
    try:
        readable = facts.at_hand(params.edit_set.name, params.edit_set.path)
    except KeditError:
        readable = False
    for model in params.models:
        if model not in known:
            yield f"In the store, {model}: not known before the model is loaded once."
        elif not readable:
            yield f"In the store, {model}: not known without the edit set."
        else:
            edits, cells, all_cells = stored(params, model, known[model], store)
            rest = "" if all_cells else "; cells of the paper suite were not looked up"
            yield f"In the store, {model}: {edits:,} edits and {cells:,} cells{rest}."


def _access_lines(params: Params) -> Iterator[str]:
    if gated := [model for model in params.models if (shape := known_shapes().get(model)) and shape.gated]:
        token = "a token is set" if get_token() else "no token is set: ask on its page, then set HF_TOKEN"
        yield f"Gated, needs access: {', '.join(gated)}; {token}."
    sources = sorted({source for name in params.benchmarks for source in benchmarks.sources(name)})
    if params.statistics.text == "wikipedia":
        sources.append(corpus.WIKIPEDIA[0])
    try:
        if sources:
            yield f"Data sets: {', '.join(sources)}: {_state(sources)}."
        if params.edit_set.name in facts.PUBLISHED:
            path = params.edit_set.path or facts.located(params.edit_set.name)
            hub_id = facts.PUBLISHED[params.edit_set.name].get("hub")
            elsewhere = f"hub {hub_id}, whose order is not the study's" if hub_id else "needs KEDIT_MIRROR"
            yield f"Edit set {params.edit_set.name}: {Path(path).name if path else elsewhere}."
    except KeditError as error:
        yield str(error)


def _state(sources: list[str]) -> str:
    """Where data sets would come from."""
    if (mirror := hub.mirror()) is None:
        return "from the hub (KEDIT_MIRROR is not set), none known to be gated"
    missing = [source for source in sources if not (mirror / source).is_dir()]
    return f"KEDIT_MIRROR lacks {', '.join(missing)}" if missing else "all in KEDIT_MIRROR"


# The page -----------------------------------------------------------------------------------------


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 0.1 else f"{seconds:,.0f} s"


def _size(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.0f} MB"


def _works(params: Params, model: str, shape: Shape) -> Iterator[tuple[Method, Cost, tuple[list[Work], ...], int]]:
    """Each method with its cost, its work (of the edits, of the cells, and once; a piece each) and bytes on disk.

    The first has the unedited model's cells as well, and second moments count where they are first needed.
    """
    made: set[int] = set()
    edits = max(params.edits) * len(params.orders)
    asking = [benchmark_work(shape, name, params.limit) for name in params.benchmarks]
    for index, (method, layers, cost) in enumerate(_costs(params, model, shape)):
        cells = []
        for count in params.edits[bool(index) :] * len(params.orders):
            cells += [reading(shape, SUCCESS * (count or max(params.edits)), PACK), *asking]
        trained = not method.hparams and committed(method.method, model).exists()
        ready = trained or (layers and made.issuperset(layers))
        disk = cost.journal_bytes * edits + FLOAT * shape.m**2 * len(set(layers) - made)
        made |= set(layers)
        yield method, cost, ([cost.edit] * edits, cells, [] if ready else [cost.once]), disk


def _table(params: Params) -> tuple[list[str], dict[str, float], float]:
    """Lines of the page, a method on a model each; seconds in all, by machine; bytes on disk."""
    lines, total, disk = [], dict.fromkeys(MACHINES, 0.0), 0.0
    for model in params.models:
        if (shape := shape_of(params, model)) is None:
            lines.append(f"{model:<36} shape unknown: add it to kedit/study/models.yaml for hours and memory")
            continue
        disk += shape.bytes / 2
        for method, cost, works, more in _works(params, model, shape):
            times = []
            for name, machine in MACHINES.items():
                seconds = [sum(map(machine.seconds, pieces)) for pieces in works]
                times.append(" ".join(f"{_hours(each):>9}" for each in seconds))
                total[name] += sum(seconds)
            device, host = memory(shape, cost)
            sizes = [f"{_size(size):>9}" for size in (device + generating(shape, params.benchmarks), host, more)]
            lines.append(f"{model:<36} {method!s:<14} {' | '.join(times)} {' '.join(sizes)}")
            disk += more
    return lines, total, disk


def plan(params: Params) -> str:
    """The whole answer as text, a line a fact."""
    counts = planned(params)
    cells = counts.pop("cell")
    trajectories = len(params.models) * len(params.methods) * len(params.orders)
    table, total, disk = _table(params)
    lines = [
        f"params/{params.rq}/{params.name}.yaml: {trajectories} trajectories of {max(params.edits)} edits: "
        f"{sum(counts.values()):,} edits; {cells:,} cells at {len(params.edits)} checkpoints "
        f"({len(params.asked)} kinds: edit success, {len(params.benchmarks)} benchmarks, "
        f"{len(params.measures)} other measures).",
        *_access_lines(params),
        *_stored_lines(params),
        "",
        f"{'model':<36} {'method':<14} {'edits':>9} {'cells':>9} {'once':>9} | {'edits':>9} {'cells':>9} {'once':>9} "
        f"{'memory':>9} {'host':>9} {'disk':>9}",
        f"{'':<36} {'':<14} {'-- GPU --':>29} | {'-- CPU, one core --':>29} {'GPU':>9}",
        *table,
        "",
        f"In all about {_hours(total['GPU'])} on a GPU or {_hours(total['CPU'])} on one CPU core (workers divide it), "
        f"and {_size(disk)} of disk (half-precision weights, second moments, edits).",
        *(f"Assumed: {machine.name}." for machine in MACHINES.values()),
        "Hours count nothing as stored, searches to their last step, and leave out other measures; once: second "
        f"moments, training that is not committed. Memory: {params.dtype} weights, and keys and values of texts "
        "generated side by side.",
    ]
    return "\n".join(lines)
