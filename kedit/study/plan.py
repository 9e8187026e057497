"""What a run would do, before it starts: cells, edits, what is stored, hours, memory, disk, access.

No model is loaded and nothing is fetched. Hours are estimates from shapes: floating-point operations
(2 a parameter and token read, as much again for each half of a backward pass that is needed) and, where few
tokens go through at once, reading the weights; whichever takes longer on a machine whose sustained speed
is assumed in ``MACHINES`` and printed. Expect them to be right within a factor of three.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kedit
from kedit import KeditError
from kedit.data import corpus, facts, hub
from kedit.editors import kind_of, make_hparams
from kedit.editors.protocol import Editor, committed
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation import benchmarks
from kedit.model.journal import FORMAT
from kedit.store import Store, digest, runs_folder
from kedit.study.params import DTYPES, Method, Params
from kedit.study.run import _planned, _units
from kedit.workers import free_memory

WEIGHT = 4
"""Bytes of a float32: of edits, of edited matrices, and of a model's weights unless ``dtype`` says otherwise."""
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """An architecture: width, blocks, inner width and number of matrices of its MLP, keys' width, vocabulary."""

    d: int
    layers: int
    m: int
    mlp: int
    kv: int
    vocabulary: int
    parameters: int
    window: int
    gated: bool = False
    weight: int = WEIGHT

    @property
    def bytes(self) -> int:
        """Of the weights in memory."""
        return self.parameters * self.weight


_LLAMA = Shape(4096, 32, 11008, 3, 4096, 32000, 6_738_415_616, 4096, gated=True)
_MISTRAL = Shape(4096, 32, 14336, 3, 1024, 32000, 7_241_732_096, 32768, gated=True)
_GPT2_XL = Shape(1600, 48, 6400, 2, 1600, 50257, 1_557_611_200, 1024)
_SMOLLM2 = Shape(576, 30, 1536, 3, 192, 49152, 134_515_008, 8192)
_PICO = Shape(144, 5, 576, 2, 144, 691, 1_353_312, 128)
SHAPES = {
    "smollm2-135m-instruct": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
    "gpt2-xl": _GPT2_XL,
    "openai-community/gpt2-xl": _GPT2_XL,
    "EleutherAI/pythia-160m": Shape(768, 12, 3072, 2, 768, 50304, 162_322_944, 2048),
    "EleutherAI/pythia-410m": Shape(1024, 24, 4096, 2, 1024, 50304, 405_334_016, 2048),
    "EleutherAI/pythia-1b": Shape(2048, 16, 8192, 2, 2048, 50304, 1_011_781_632, 2048),
    "EleutherAI/pythia-2.8b": Shape(2560, 32, 10240, 2, 2560, 50304, 2_775_208_960, 2048),
    "EleutherAI/pythia-6.9b": Shape(4096, 32, 16384, 2, 4096, 50432, 6_857_302_016, 2048),
    "EleutherAI/pythia-12b": Shape(5120, 36, 20480, 2, 5120, 50688, 11_846_072_320, 2048),
    "pico-0.1m": Shape(48, 3, 192, 2, 48, 691, 118_080, 128),
    "pico-0.4m": Shape(80, 4, 320, 2, 80, 691, 366_800, 128),
    "pico-1.5m": _PICO,
    "pico-1.5m-instruct": _PICO,
    "pico-5m": Shape(248, 6, 992, 2, 248, 691, 4_619_496, 128),
    "meta-llama/Llama-2-7b-hf": _LLAMA,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA,
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL,
}
"""Known models; a test builds each from its configuration and counts."""


def shape_of(params: Params, model: str) -> Shape | None:
    """A model's shape in the precision that a grid asks for, if it is known."""
    return replace(SHAPES[model], weight=DTYPES[params.dtype]) if model in SHAPES else None


@dataclass(frozen=True)
class Machine:
    """Sustained speed: float32 operations and bytes of weights read, a second."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, flops: float, read: float) -> float:
        """For so many operations, while so many bytes of weights are read."""
        return max(flops / self.flops, read / self.bandwidth)


MACHINES = {
    "GPU": Machine("one GPU of 10 Tflop/s in float32 and 1 TB/s, sustained (half an A100's)", 1e13, 1e12),
    "CPU": Machine("one CPU core of 70 Gflop/s and 5 GB/s, sustained", 7e10, 5e9),
}


@dataclass(frozen=True)
class Reading:
    """What a benchmark makes a model read: items; tokens of exemplars that items share (in all tasks
    together); and for each item its own tokens and those generated, until it stops or is stopped."""

    items: int
    shared: int
    own: int
    generated: int = 0


READING = {
    "mmlu": Reading(14042, 30588, 109),
    "bbh": Reading(6511, 23428, 98, 530),
    "gsm8k": Reading(1319, 730, 63, 75),
    "csqa": Reading(1221, 337, 47),
    "triviaqa": Reading(17944, 2, 18, 2),
    "truthfulqa": Reading(817, 172, 75),
    "truthfulqa_mc2": Reading(817, 172, 98),
    "toxigen": Reading(940, 18, 25),
    "mini_mmlu": Reading(120, 86, 20),
    "mini_bbh": Reading(120, 51, 19),
    "mini_gsm8k": Reading(120, 424, 29, 16),
    "mini_csqa": Reading(100, 118, 18),
    "mini_triviaqa": Reading(112, 2, 13, 6),
    "mini_truthfulqa": Reading(102, 107, 19),
    "mini_truthfulqa_mc": Reading(102, 107, 38),
    "mini_toxigen": Reading(120, 75, 15),
    "pico_mmlu": Reading(120, 1, 16),
    "pico_bbh": Reading(120, 1, 19),
    "pico_gsm8k": Reading(120, 1, 22, 6),
    "pico_csqa": Reading(120, 1, 16),
    "pico_triviaqa": Reading(120, 1, 12, 6),
    "pico_truthfulqa": Reading(120, 1, 8),
    "pico_toxigen": Reading(120, 1, 13),
}
"""Tokens as SmolLM2 counts them, on real items. Items as on the hub (a mirror may hold others)."""
TASKS = {"mmlu": 57, "bbh": 27}
"""How many tasks a benchmark is, where it is several: each has exemplars of its own."""
PACK, ROWS = 384, 16  # kedit/model/scoring.py: tokens read and texts generated at a time
PROMPT, TARGET, SUCCESS = 20, 3, 240  # tokens of an edit's prompt, of its target, of all that success asks of an edit


def _read_cost(shape: Shape, tokens: float, at_once: float) -> tuple[float, float]:
    """(operations, bytes of weights read) for reading so many tokens, so many at once."""
    return 2 * shape.parameters * tokens, shape.bytes * tokens / at_once


def _plus(*costs: tuple[float, float]) -> tuple[float, float]:
    return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)


def _times(cost: tuple[float, float], factor: float) -> tuple[float, float]:
    return cost[0] * factor, cost[1] * factor


def benchmark_cost(shape: Shape, name: str, limit: int | None) -> tuple[float, float]:
    """(operations, bytes of weights read) of one cell."""
    about = READING[name]
    items = min(limit or about.items, about.items)
    shared = about.shared * min(1, items / TASKS.get(name, 1))
    return _plus(_read_cost(shape, shared + items * about.own, PACK), _read_cost(shape, items * about.generated, ROWS))


def _layers(hparams: Any) -> list[int]:
    return list(getattr(hparams, "layers", ())) or [getattr(hparams, "layer", 0)]


def edit_cost(shape: Shape, method: str, hparams: Any) -> tuple[float, float]:
    """(operations, bytes of weights read) of one edit.

    A search runs its steps forward and backward (by activations: as much again) through the blocks above the
    layer, over each context's tokens from the subject on; keys take one reading of the contexts. Steps
    that stop early are not foreseen.
    """
    above = 1 - (max(_layers(hparams)) / shape.layers)
    steps = getattr(hparams, "steps", 0)
    tail = TARGET + PROMPT / 4
    if hasattr(hparams, "contexts"):  # ROME, MEMIT and their kin
        rows = 2 + sum(count for _, count in hparams.contexts)  # the bare prompt, and that of the KL term
        search = _times(_read_cost(shape, rows * tail, rows * tail), 2 * steps * above)
        keys = _read_cost(shape, rows * (PROMPT + 10), rows * (PROMPT + 10))
        return _plus(search, _times(keys, len(_layers(hparams))), (4 * shape.m**2 * len(_layers(hparams)), 0))
    if method == "kn":  # one token through the blocks above each layer, for each point of the integral
        points = shape.layers * steps
        return _times(_read_cost(shape, points, ROWS), 2 * 0.5)
    if method == "mend":
        return _times(_read_cost(shape, PROMPT + TARGET, PROMPT + TARGET), 2)
    if method in ("grace", "ft-l", "ft-m"):
        return _times(_read_cost(shape, tail, tail), 2 * steps * above)
    return 0.0, 0.0


def once_cost(shape: Shape, method: str, hparams: Any, tokens: int) -> tuple[float, float]:
    """(operations, bytes of weights read) of what a method needs before its first edit, if nothing is stored."""
    if hasattr(hparams, "contexts"):
        layers = _layers(hparams)
        passes = _times(_read_cost(shape, tokens, 512), (max(layers) + 1) / shape.layers)
        products = (2 * tokens * shape.m**2 * len(layers), 0)
        factors = (shape.m**3 / 3 * len(layers) * (30 if method == "alphaedit" else 1), 0)
        return _plus(passes, products, factors)
    if method == "mend":  # each step: the edit, its outcome and its locality, forward and backward
        examples = hparams.steps * hparams.accumulate
        return _times(_read_cost(shape, 4 * (PROMPT + TARGET), 4 * (PROMPT + TARGET)), 3 * examples)
    if method == "serac":
        return _times(_read_cost(shape, 2 * PROMPT * hparams.batch, 2 * PROMPT * hparams.batch), 3 * hparams.steps)
    return 0.0, 0.0


def edit_bytes(shape: Shape, method: str, hparams: Any) -> int:
    """What the store keeps of an edit: factors of its updates; whole matrices for fine-tuning."""
    pair = (shape.d + shape.m) * WEIGHT
    if hasattr(hparams, "contexts"):
        return 2 * pair * len(_layers(hparams))
    return {
        "kn": 70 * shape.d * WEIGHT,  # columns found in SmolLM2
        "mend": 7 * pair * 3 * shape.mlp,  # as many factors as the text has tokens
        "ft-l": shape.d * shape.m * WEIGHT,
        "ft-m": shape.d * shape.m * WEIGHT,
        "grace": pair,
        "control": 0,
    }.get(method, 4000)


def memory(shape: Shape, method: str, hparams: Any, device: str = "GPU") -> tuple[int, int]:
    """(bytes where the model is, bytes of the host) that a method needs at least.

    The weights; the original bits of what it edits; second moments while they are summed (float64, on the
    model's side) and their factors (float64, on the host). Texts being generated come on top.
    """
    libraries = 1_500_000_000
    near, host = shape.bytes + libraries, libraries + (shape.bytes if device == "GPU" else 0)
    square = 8 * shape.m**2
    if hasattr(hparams, "contexts"):
        near += len(_layers(hparams)) * (square + WEIGHT * shape.d * shape.m) + square
        host += len(_layers(hparams)) * square * (3 if method == "alphaedit" else 2)
    elif method in ("ft-l", "ft-m"):
        near += 5 * WEIGHT * shape.d * shape.m
    elif method == "mend":
        near += 3 * shape.mlp * 2 * WEIGHT * shape.d * shape.m
        rank = getattr(hparams, "rank", 0)
        near += 4 * WEIGHT * rank * 4 * (shape.d + shape.m)  # its networks, their gradients and Adam's moments
    return near, host


def generating(shape: Shape, names: list[str]) -> int:
    """Bytes of keys and values while texts are generated side by side, at the lengths in ``READING``."""
    a_token = 2 * shape.layers * shape.kv * shape.weight
    longest = max((READING[n].own + READING[n].generated for n in names if READING[n].generated), default=0)
    return 2 * ROWS * longest * a_token


def _each(params: Params, model: str) -> dict[str, tuple[Method, Any]]:
    """Methods of a grid by the name shown, with their hyper-parameters on a model."""

    return {
        method.method if method.variant == "default" else f"{method.method} {method.variant}": (
            method,
            make_hparams(kind_of(method.method), model, method.hparams),
        )
        for method in params.methods
    }


# Refusals -----------------------------------------------------------------------------------------


def available() -> tuple[str, int, int]:
    """(device, bytes on it, bytes of the host) here: all GPUs together, if there are any."""
    import torch

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
    device, near, host = here or available()
    for model in params.models:
        if (shape := shape_of(params, model)) is None:
            continue
        for name, (method, hparams) in _each(params, model).items():
            needs = memory(shape, method.method, hparams, device)
            for need, there, where in ((needs[0], near, f"{device} memory"), (needs[1], host, "host memory")):
                if need <= there:
                    continue
                others = {other: replace(shape_, weight=shape.weight) for other, shape_ in SHAPES.items()}
                fitting = [
                    other
                    for other, shape_ in others.items()
                    if shape_.bytes < shape.bytes and memory(shape_, "control", None, device)[0] <= near * 0.8
                ]
                smaller = max(fitting, key=lambda other: SHAPES[other].bytes, default=None)
                light = memory(shape, "control", None, device)[0] <= near
                remedy = "leave this method out" if light and where != "host memory" else f"use {smaller}"
                halved = memory(replace(shape, weight=DTYPES["bfloat16"]), method.method, hparams, device)
                if params.dtype != "bfloat16" and halved[0] <= near and halved[1] <= host:
                    smaller, remedy = model, "set dtype: bfloat16"
                raise KeditError(
                    f"{params.rq}/{params.name}: {name} on {model} needs {need / GB:.0f} GB of {where} and there are "
                    f"{there / GB:.0f} GB; {remedy if smaller or light else 'no known model fits'}, or a machine with "
                    "more."
                )


def check(params: Params) -> None:
    """What a run should ask before it loads a model: memory, edits, the benchmarks' data, the statistics' text.

    Raises:
        KeditError: one sentence on what is missing.
    """

    check_memory(params)
    params.requests(0, f"params/{params.rq}/{params.name}.yaml")
    for name in params.benchmarks:
        benchmarks.reach(name)
    if params.statistics.get("text") == "wikipedia":
        hub.dataset(corpus.WIKIPEDIA[0])


# What is there already ----------------------------------------------------------------------------


def fingerprints(dtype: str = "float32") -> dict[str, str]:
    """Fingerprints of models in a precision, as the manifests of earlier runs tell them, those of this machine last."""
    found: dict[str, str] = {}
    for top in (kedit.ROOT / "figures", runs_folder()):
        for path in sorted(top.glob("rq*/*/manifest.json"), key=lambda path: path.stat().st_mtime):
            try:
                manifest = json.loads(path.read_text())
                models = manifest["models"] if manifest["params"]["dtype"] == dtype else {}
            except (OSError, ValueError, KeyError):
                continue
            found |= {model: about["fingerprint"] for model, about in models.items()}
    return found


def stored(params: Params, model: str, fingerprint: str, store: Store) -> tuple[int, int, bool]:
    """(edits, cells) of a model's part of a grid that a store holds, and whether all cells were looked up.

    Cells of the paper suite are keyed by their data, which is not read here.
    """

    lm: Any = SimpleNamespace(name=model, fingerprint=fingerprint)
    states: dict[tuple[int, int], list[str]] = {}
    for position, (method, hparams) in enumerate(_each(params, model).values()):
        editor = object.__new__(kind_of(method.method))  # without what its own __init__ does to a model
        Editor.__init__(editor, lm, hparams, SecondMoments(lm, **params.statistics))
        recipe = editor.key()
        for order in params.orders:
            own = states[position, order] = [digest("model", fingerprint)]
            for request in params.requests(order):
                own.append(digest(FORMAT, own[-1], recipe, request.key()))
    cheap = [name for name in params.benchmarks if name not in benchmarks.PAPER]
    known = Params(**{**params.__dict__, "benchmarks": cheap})
    units = [unit for unit in _units(known, model, states) if store.path(unit.key).exists()]
    cells = sum(unit.kind == "cell" for unit in units)
    return len(units) - cells, cells, len(cheap) == len(params.benchmarks)


# The page -----------------------------------------------------------------------------------------


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h" if hours >= 0.1 else f"{seconds:,.0f} s"


def _size(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 else f"{size / 1e6:,.0f} MB"


def plan(params: Params) -> str:
    """The whole answer as text, a line a fact."""

    where = f"params/{params.rq}/{params.name}.yaml"
    planned = _planned(params)
    edits = sum(count for kind, count in planned.items() if kind != "cell")
    trajectories = len(params.models) * len(params.methods) * len(params.orders)
    lines = [
        f"{where}: {trajectories} trajectories of {max(params.edits)} edits: {edits:,} edits; "
        f"{planned['cell']:,} cells at {len(params.edits)} checkpoints ({len(params.asked)} kinds: "
        f"edit success, {len(params.benchmarks)} benchmarks, {len(params.measures)} other measures).",
        *_access(params),
        *_found(params),
        "",
        f"{'model':<36} {'method':<14} {'edits':>9} {'cells':>9} {'once':>9} | {'edits':>9} {'cells':>9} {'once':>9} "
        f"{'memory':>9} {'host':>9} {'disk':>9}",
        f"{'':<36} {'':<14} {'-- GPU --':>29} | {'-- CPU, one core --':>29} {'GPU':>9}",
    ]
    total = dict.fromkeys(MACHINES, 0.0)
    disk = 0.0
    for model in params.models:
        if (shape := shape_of(params, model)) is None:
            lines.append(f"{model:<36} shape unknown: add it to SHAPES in kedit/plan.py for hours and memory")
            continue
        disk += shape.bytes / 2
        made: set[int] = set()
        for name, (method, hparams) in _each(params, model).items():
            columns: list[str] = []
            orders = len(params.orders)
            checkpoints = [count for count in params.edits if count]
            if not made:
                checkpoints = [0, *checkpoints]
            trained = not method.hparams and committed(method.method, model).exists()
            fresh = not (trained or (hasattr(hparams, "contexts") and set(_layers(hparams)) <= made))
            for machine in MACHINES:
                clock = MACHINES[machine].seconds
                one = clock(*edit_cost(shape, method.method, hparams)) * max(params.edits) * orders
                cells = orders * sum(
                    clock(*_read_cost(shape, SUCCESS * (count or max(params.edits)), PACK))
                    + sum(clock(*benchmark_cost(shape, b, params.limit)) for b in params.benchmarks)
                    for count in checkpoints
                )
                once = clock(*once_cost(shape, method.method, hparams, params.statistics.get("tokens", 98_304)))
                once = once if fresh else 0.0
                total[machine] += one + cells + once
                columns += [_hours(one), _hours(cells), _hours(once)]
            near, host = memory(shape, method.method, hparams)
            near += generating(shape, params.benchmarks)
            kept = edit_bytes(shape, method.method, hparams) * max(params.edits) * orders
            if hasattr(hparams, "contexts"):
                kept += WEIGHT * shape.m**2 * len(set(_layers(hparams)) - made)
                made |= set(_layers(hparams))
            made.add(-1)
            disk += kept
            lines.append(
                f"{model:<36} {name:<14} {columns[0]:>9} {columns[1]:>9} {columns[2]:>9} | {columns[3]:>9} "
                f"{columns[4]:>9} {columns[5]:>9} {_size(near):>9} {_size(host):>9} {_size(kept):>9}"
            )
    lines += [
        "",
        f"In all about {_hours(total['GPU'])} on a GPU or {_hours(total['CPU'])} on one CPU core (workers divide it), "
        f"and {_size(disk)} of disk (half-precision weights, second moments, edits).",
        *(f"Assumed: {machine.name}." for machine in MACHINES.values()),
        "Hours count nothing as stored, searches to their last step, and leave out other measures; once: second "
        f"moments, training that is not committed. Memory: {params.dtype} weights, and keys and values of texts "
        "generated side by side.",
    ]
    return "\n".join(lines)


def _access(params: Params) -> list[str]:
    from huggingface_hub import get_token

    lines = []
    if gated := [model for model in params.models if model in SHAPES and SHAPES[model].gated]:
        token = "a token is set" if get_token() else "no token is set: ask on its page, then set HF_TOKEN"
        lines.append(f"Gated, needs access: {', '.join(gated)}; {token}.")
    sources = sorted({source for name in params.benchmarks for source in benchmarks.sources(name)})
    if params.statistics.get("text") == "wikipedia":
        sources.append(corpus.WIKIPEDIA[0])
    try:
        mirror = hub.mirror()
        missing = [source for source in sources if mirror and not (mirror / source).is_dir()]
    except KeditError as error:
        return [*lines, str(error)]
    if sources:
        state = "all in KEDIT_MIRROR" if mirror else "from the hub (KEDIT_MIRROR is not set), none known to be gated"
        state = f"KEDIT_MIRROR lacks {', '.join(missing)}" if missing else state
        lines.append(f"Data sets: {', '.join(sources)}: {state}.")
    name = params.edit_set["name"]
    if name in facts.FILES:
        try:
            path = params.edit_set.get("path") or facts.located(name)
            hub_id = facts.HUB.get(name)
            source = f"hub {hub_id}, whose order is not the study's" if hub_id else "needs KEDIT_MIRROR"
            lines.append(f"Edit set {name}: {Path(path).name if path else source}.")
        except KeditError as error:
            lines.append(str(error))
    return lines


def _found(params: Params) -> list[str]:
    lines, known = [], fingerprints(params.dtype)
    store = Store(runs_folder() / "store")
    readable = params.edit_set["name"] not in facts.FILES
    if not readable:
        try:
            readable = facts.at_hand(**params.edit_set)
        except KeditError:
            readable = False
    for model in params.models:
        if model not in known:
            lines.append(f"In the store, {model}: not known before the model is loaded once.")
        elif not readable:
            lines.append(f"In the store, {model}: not known without the edit set.")
        else:
            edits, cells, all_cells = stored(params, model, known[model], store)
            rest = "" if all_cells else "; cells of the paper suite were not looked up"
            lines.append(f"In the store, {model}: {edits:,} edits and {cells:,} cells{rest}.")
    return lines
