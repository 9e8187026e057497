"""``make bench``: what the fast paths buy, as ratios of two things measured in one process.

Each row times a plain way and kedit's way alternately, on two threads, and gives the medians, the ratio
and how far the results are apart. The plain versions are those that the tests compare with
(tests/plain.py), lm-eval's own ``hf`` model, or editing from scratch for each number of edits. Beside the
times stand the floating-point operations counted in an extra pass, and the rate they amount to as a
share of what a large matrix product reaches here. Torch counts no factorisations, so solves have none.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import lm_eval.tasks
import pandas as pd
import plain
import torch
from lm_eval.models.huggingface import HFLM
from torch.utils.flop_counter import FlopCounterMode

import kedit
from kedit.analysis.readme import markdown as as_markdown
from kedit.data import facts
from kedit.data.requests import EditRequest, spaced
from kedit.editors import value_search
from kedit.editors.kn import attributions
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation import benchmarks
from kedit.evaluation.harness import SharedPrefixLM, evaluate
from kedit.evaluation.success import measure
from kedit.model.forward import activations, lookup_text, lookup_texts
from kedit.model.journal import EditFailed
from kedit.model.lm import LM
from kedit.registry import unknown
from kedit.store import write_atomic
from kedit.study.params import Params
from kedit.study.run import machine, versions
from kedit.workers import log_to_stderr

log = logging.getLogger(__name__)

Run = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What is measured on, and how much of it.

    Attributes:
        hparams: by method, for a model that params/methods knows not.
        steps: updates of each search; parameter files say 19 or 24, over which what is done once weighs less.
        points: of the integral of KN.
        repeats: timed runs of each side; long ones are run once.
        edits: by method, in the sequences whose first and last ones are compared.
        items: of MMLU and GSM8K.
    """

    lm: LM
    statistics: SecondMoments
    requests: Sequence[EditRequest]
    hparams: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steps: int = 4
    points: int = 2
    repeats: int = 3
    edits: Mapping[str, int] = field(default_factory=lambda: {"rome": 90, "serac": 300})
    items: Mapping[str, int] = field(default_factory=lambda: {"mmlu": 12, "gsm8k": 20})

    def editor(self, name: str, **hparams: Any) -> Editor:
        """An editor ready to edit."""
        given = {**self.hparams.get(name, {}), **hparams}
        editor = kedit.editor(name, self.lm, hparams=given, statistics=self.statistics)
        editor.prepare()
        return editor

    @property
    def request(self) -> EditRequest:
        """The middle one of all requests ordered by their tokens from the subject's last one on, then by length."""

        def order(request: EditRequest) -> tuple[int, int]:
            text = lookup_text(self.lm, request.prompt, request.subject)
            return len(text.ids) - text.lookup, len(text.ids)

        return sorted(self.requests, key=order)[len(self.requests) // 2]


@dataclass(frozen=True)
class Case:
    """Two ways to the same result, and how far apart two results are.

    Long ones are repeated once. Where an extra pass of the plain way would take too long, ``count`` estimates
    its floating-point operations; with ``counted`` off there are none.
    """

    section: str
    what: str
    against: str
    plain: Run
    fast: Run
    apart: Callable[[Any, Any], float] | None = None
    bar: float | None = None
    repeats: int | None = None
    count: Callable[[], int] | None = None
    counted: bool = True


@cache
def flops(run: Run) -> tuple[Any, int]:
    """A result and the floating-point operations that torch counts on the way to it."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def every_step(run: Callable[[int], Any], steps: int) -> int:
    """Operations of a run of so many steps, from those of one step and of two: all later ones cost the same."""
    one, two = (flops(partial(run, count))[1] for count in (1, 2))
    return one + (steps - 1) * (two - one)


def seconds(run: Run) -> float:
    """Wall time of a run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(size: int = 1024, repeats: int = 10) -> float:
    """Operations a second in a large float32 matrix product, the best of some."""
    left, right = torch.randn(2, size, size)
    return 2 * size**3 / min(seconds(lambda: left @ right) for _ in range(repeats))


def relative(plain: torch.Tensor, fast: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((fast - plain).norm() / plain.norm()).item()


def measured(case: Case, repeats: int, best: float) -> dict[str, Any]:
    """One row of the table."""
    repeats = case.repeats or repeats
    operations = {"plain": 0, "fast": 0}
    if case.counted:  # these passes warm up, too
        operations["fast"] = flops(case.fast)[1]
        operations["plain"] = case.count() if case.count else flops(case.plain)[1]
    times: dict[str, list[float]] = {"plain": [], "fast": []}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for side, run in (("plain", case.plain), ("fast", case.fast)):
            start = time.perf_counter()
            results[side] = run()
            times[side].append(time.perf_counter() - start)
    slow, quick = median(times["plain"]), median(times["fast"])
    return {
        "section": case.section,
        "what": case.what,
        "against": case.against,
        "unit": "s",
        "plain": slow,
        "fast": quick,
        "ratio": slow / quick,
        "bar": case.bar,
        "repeats": repeats,
        "plain_gflop": operations["plain"] / 1e9 or None,
        "fast_gflop": operations["fast"] / 1e9 or None,
        "plain_share_of_peak": operations["plain"] / slow / best or None,
        "fast_share_of_peak": operations["fast"] / quick / best or None,
        "apart": case.apart(results["plain"], results["fast"]) if case.apart else None,
    }


# Searches, solves, neurons ----------------------------------------------------------------------------


def searches(setting: Setting) -> Iterator[Case]:
    """v* of ROME and z of MEMIT with 21 templates, and v* with as many as the parameter file says."""
    lm, request = setting.lm, setting.request
    many = {"context_lengths": ((5, 10), (10, 10))}
    cases = (("rome", "value", many, 4.0), ("memit", "block", many, 4.0), ("rome", "value", {}, None))
    for name, at, contexts, bar in cases:
        editor = setting.editor(name, **contexts)
        settings, layer = replace(editor.hparams, steps=setting.steps), editor.hparams.layers[-1]
        texts = lookup_texts(lm, request, editor.contexts)
        target = lm.encode(spaced(request.target_new, request.prompt))
        start = activations(lm, texts[:1], [layer], at)[layer][0]
        given = (lm, texts, lookup_text(lm, "{} is a", request.subject), target, layer)
        yield Case(
            "search",
            f"{name.upper()}, {len(texts)} templates, {setting.steps} steps",
            "every row in full",
            lambda given=(*given, start, settings): plain.search(*given)[0],
            lambda given=given, start=start, settings=settings: value_search.search(
                value_search.Objective(*given), start, settings
            )[0],
            relative,
            bar=bar,
            repeats=None if bar else 1,
            count=lambda given=(*given, start), settings=settings: every_step(
                lambda steps: plain.search(*given, replace(settings, steps=steps)), settings.steps
            ),
        )


def solves(setting: Setting) -> Iterator[Case]:
    """The linear algebra of one layer of one edit: MEMIT's (and PMET's), and AlphaEdit's after fifty edits."""
    statistics = setting.statistics
    generator = torch.Generator().manual_seed(0)
    memit, alphaedit = setting.editor("memit"), setting.editor("alphaedit")
    layer = memit.hparams.layers[0]
    weight, moment = memit.hparams.mom2_weight, statistics.moment(layer)
    root = torch.linalg.cholesky(moment)  # keys drawn with the second moment C
    key = root @ torch.randn(len(moment), 1, generator=generator, dtype=torch.float64)
    memit._gain(layer, key)  # the factor is there once for a model and layer
    yield Case(
        "solves",
        f"MEMIT and PMET, one layer, m = {len(moment)}: Cholesky and Woodbury",
        "dense solve",
        lambda: plain.ridge(moment, weight, key),
        lambda: memit._gain(layer, key),
        relative,
        counted=False,
    )
    layer, l2 = alphaedit.hparams.layers[0], alphaedit.hparams.l2
    basis = alphaedit.basis(layer)
    old = root @ torch.randn(len(moment), 50, generator=generator, dtype=torch.float64)
    held = old @ old.T
    for one in old.T:
        alphaedit.memory.add({"keys": one.expand(len(alphaedit.hparams.layers), -1)})
    projection = basis @ basis.T
    yield Case(
        "solves",
        f"AlphaEdit, one layer, r = {basis.shape[1]}: in the null space's basis",
        "dense solve",
        lambda: plain.null_space(projection, held, l2, key),
        lambda: alphaedit._gain(layer, key),
        relative,
        counted=False,
    )
    alphaedit.memory.clear()


def neurons(setting: Setting) -> Iterator[Case]:
    """KN's attributions of one token."""
    lm, request = setting.lm, setting.request
    ids = [*lm.begin, *lm.encode(request.text)]
    given = (lm, ids, lm.encode(spaced(request.target_true, request.prompt))[0], setting.points)
    yield Case(
        "neurons",
        f"KN, {lm.layers} layers, {setting.points} points",
        "one scaled copy after another",
        lambda: plain.attributions(*given),
        lambda: attributions(*given),
        relative,
        repeats=1,
    )


# Evaluation -------------------------------------------------------------------------------------------

REAL = {
    "mmlu": ("mmlu_high_school_geography", 5, "MMLU (one subject), 5-shot", 4.0),
    "gsm8k": ("gsm8k_cot", 8, "GSM8K, 8-shot", 5.0),
}
"""Task, shots, label and bar."""
MINI = {"mmlu": ("mini_mmlu", None, "mini_mmlu", None), "gsm8k": ("mini_gsm8k", None, "mini_gsm8k", None)}
"""What stands in for them where KEDIT_MIRROR is not set."""


def _task(name: str, shots: int | None) -> Any:
    """An lm-eval task, its data from the mini suite or from KEDIT_MIRROR."""
    stock = Path(lm_eval.tasks.__file__).parent / name.partition("_")[0]
    # one folder only: indexing all of lm-eval's tasks takes minutes
    manager = lm_eval.tasks.TaskManager(
        include_path=str(benchmarks.HERE / "mini" if shots is None else stock), include_defaults=False
    )
    with contextlib.chdir(os.environ.get("KEDIT_MIRROR", ".")):
        task = manager.load([name])["tasks"][name]
    if shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    return task


def _answers(model: Any, name: str, task: Any, items: Sequence[int]) -> list[Any]:
    """Each item's log-likelihoods or text; lm-eval's own progress bars are kept quiet."""
    with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
        answered = lm_eval.evaluate(
            lm=model,
            task_dict={name: task},
            samples={name: list(items)},
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    samples = {sample["doc_id"]: sample["resps"] for sample in answered["samples"][name]}
    return [
        [answer if isinstance(answer, str) else answer[0] for (answer,) in samples[index]] for index in sorted(samples)
    ]


def differing(plain: list[Any], fast: list[Any]) -> float:
    """Share of items answered differently: another text, or another choice preferred."""

    def pick(answers: list[Any]) -> Any:
        return answers if isinstance(answers[0], str) else answers.index(max(answers))

    return sum(pick(one) != pick(other) for one, other in zip(plain, fast, strict=True)) / len(plain)


def evaluations(setting: Setting) -> Iterator[Case]:
    """lm-eval's hf model against shared prefixes."""
    lm = setting.lm
    ours = SharedPrefixLM(lm)
    real = bool(os.environ.get("KEDIT_MIRROR"))
    if not real:
        log.info("KEDIT_MIRROR is not set: mini benchmarks take the place of MMLU and GSM8K")
    for which, limit in setting.items.items():
        name, shots, label, bar = (REAL if real else MINI)[which]
        task = _task(name, shots)
        # lm-eval adds the begin token only to what a tokenizer says that it has loaded itself
        tokenizer = lm.tokenizer.name_or_path
        harness = HFLM(pretrained=lm.model, tokenizer=tokenizer, backend="causal", batch_size=1, add_bos_token=True)
        theirs = partial(_answers, harness, name, task)

        def fresh(name: str = name, task: Any = task, limit: int = limit) -> list[Any]:
            return _answers(ours, name, task, range(limit))

        yield Case(
            "evaluation",
            f"{label}, {limit} items",
            "lm-eval hf, batch size 1",  # its default
            partial(theirs, range(limit)),
            fresh,
            differing,
            bar,
            repeats=1,
            count=lambda theirs=theirs, limit=limit: flops(partial(theirs, range(1)))[1] * limit,  # items cost it alike
            counted=which != "gsm8k",  # it would take too long, and memory is what limits generated texts
        )


# Sequences ----------------------------------------------------------------------------------------------


def resident() -> float:
    """Megabytes of this process that are in memory now; not a number where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return float("nan")


FLAT: dict[str, dict[str, Any]] = {"rome": {"steps": 1, "context_lengths": ()}, "grace": {"steps": 2}, "serac": {}}
"""The cheapest settings of the methods whose cost is followed over many edits: one of weights, one with a memory."""


def flat(setting: Setting, name: str, part: int = 6) -> list[dict[str, Any]]:
    """Time and memory of an edit on top of many against one on the unedited model.

    The last sixth of the requests is timed in turn, one here, one there: a machine has slow minutes.
    """
    lm, editor = setting.lm, setting.editor(name, **FLAT[name])
    edits = setting.edits[name]
    some = (list(setting.requests) * (1 + edits // len(setting.requests)))[:edits]
    count = max(1, len(some) // part)
    times: dict[str, list[float]] = {"first": [], "last": []}
    memory = []

    def edit(request: EditRequest) -> None:
        with contextlib.suppress(EditFailed):
            editor.apply(request)

    for index, request in enumerate(some[:-count]):
        edit(request)
        if index == count:  # by now caches are warm
            memory.append(resident())
    memory.append(resident())
    made = list(lm.journal.edits)
    for index, request in enumerate(some[-count:]):
        # each request once, after no edits or after all: what is kept of its text would help the other
        after = ("first", "last")[index % 2]
        lm.journal.reset()
        for one in made if after == "last" else ():
            lm.journal.replay(one)
        times[after].append(seconds(partial(edit, request)))
    lm.journal.reset()
    what, against = f"{name.upper()}, edits after {len(made)}", "first edits"
    shared = {"section": "flat", "what": what, "against": against, "bar": 0.9}
    rows = (("s", *map(median, times.values()), count // 2), ("MB", memory[0], memory[-1], 1))
    return [
        {**shared, "unit": unit, "plain": first, "fast": last, "ratio": first / last, "repeats": repeats}
        for unit, first, last, repeats in rows
    ]


def trajectory(setting: Setting) -> Iterator[Case]:
    """The RQ1 smoke grid, a quarter of its items, without control: one trajectory, or each number of edits anew."""
    params = Params.read(kedit.ROOT / "params" / "rq1" / "smoke.yaml")
    lm, requests = setting.lm, params.requests(0)
    editors = [setting.editor(method.method) for method in params.methods if method.method != "control"]

    def grid(from_scratch: bool) -> list[Any]:
        asked = []
        for editor in editors:
            lm.journal.reset()
            for count in (count for count in params.edits if count):
                if from_scratch:
                    lm.journal.reset()
                while len(lm.journal.edits) < count:
                    editor.apply(requests[len(lm.journal.edits)])
                asked.append(measure(lm, requests[:count]))
                asked += [evaluate(lm, name, params.limit // 4) for name in params.benchmarks]
        lm.journal.reset()
        return asked

    yield Case(
        "trajectory",
        "RQ1 smoke grid without control, a quarter of its items, one trajectory",
        "from scratch for each number of edits",
        lambda: grid(True),
        lambda: grid(False),
        lambda plain, fast: float(plain != fast),
        repeats=1,
        counted=False,
    )


# The table ------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "search": searches,
    "solves": solves,
    "neurons": neurons,
    "evaluation": evaluations,
    "trajectory": trajectory,
}


def table(setting: Setting, sections: Sequence[str]) -> tuple[pd.DataFrame, float]:
    """All rows of some sections, and the peak they are compared with.

    Raises:
        KeditError: no such section.
    """
    known = [*SECTIONS, "flat"]
    if strangers := [name for name in sections if name not in known]:
        raise unknown("section", strangers[0], known)
    best, rows = peak(), []
    if "flat" in sections:  # first: what is left in memory by others would hide what grows
        for name in setting.edits:
            rows += flat(setting, name)
    for name in (name for name in SECTIONS if name in sections):
        for case in SECTIONS[name](setting):
            rows.append(measured(case, setting.repeats, best))
            log.info("%s", {key: value for key, value in rows[-1].items() if value is not None})
    return pd.DataFrame(rows), best


def markdown(frame: pd.DataFrame) -> str:
    """The table for readers."""

    def number(value: Any, form: str) -> str:
        return "" if value is None or pd.isna(value) else form.format(value)

    def pair(line: Mapping[str, Any], name: str, form: str) -> str:
        values = [number(line.get(f"{side}_{name}"), form) for side in ("plain", "fast")]
        return " / ".join(values) if all(values) else ""

    lines = [
        {
            "what": line["what"],
            "against": line["against"],
            "before": number(line["plain"], "{:.3g} ") + line["unit"],
            "now": number(line["fast"], "{:.3g} ") + line["unit"],
            "ratio": number(line["ratio"], "{:.2f}"),
            "bar": number(line["bar"], "{:.1f}"),
            "GFLOP": pair(line, "gflop", "{:.3g}"),
            "share of peak": pair(line, "share_of_peak", "{:.0%}"),
            "apart": number(line.get("apart"), "{:.1e}"),
            "repeats": line["repeats"],
        }
        for line in frame.to_dict("records")
    ]
    return as_markdown(pd.DataFrame(lines))


NOTE = """One process, two threads; medians of repeats taken alternately. *Apart*: relative difference of the results,
or share of items answered differently. Peak: a float32 product of 1024 x 1024 matrices, {peak:.0f} GFLOP/s here.
"""


def bench(sections: Sequence[str] = (), edits: int | None = None) -> list[Path]:
    """Measure on SmolLM2; a full bench is written to figures/bench, single sections are only shown.

    Args:
        sections: all, if none is named.
        edits: length of the sequences of section ``flat``.
    """
    torch.set_num_threads(2)
    started = time.time()
    lm = kedit.load("smollm2-135m-instruct")
    setting = Setting(lm, SecondMoments(lm), facts.bundled("edit"))
    if edits:
        setting = replace(setting, edits=dict.fromkeys(setting.edits, edits))
    frame, best = table(setting, sections or [*SECTIONS, "flat"])
    shown = markdown(frame)
    log.info("%s", shown)
    if sections:
        return []
    manifest = {"peak_gflops": round(best / 1e9, 1), "seconds": round(time.time() - started, 1)}
    manifest |= {"machine": machine(), "versions": versions()}
    folder = kedit.ROOT / "figures" / "bench"
    files = {
        "table.csv": frame.to_csv(index=False, float_format="%.5g", lineterminator="\n"),
        "table.md": f"{shown}\n\n{NOTE.format(peak=best / 1e9)}",
        "manifest.json": json.dumps(manifest, indent=1) + "\n",
    }
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in files]


if __name__ == "__main__":
    log_to_stderr()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help="only these, shown and not written")
    parser.add_argument("--edits", type=int, help="length of the sequences of the section flat")
    options = parser.parse_args()
    bench(options.sections, options.edits)
