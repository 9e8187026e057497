"""Hyper-parameters for a model that nobody has tuned: found on the validation split, by one rule for every method.

1. ``trials`` settings: the one that the method's file gives or borrows, the *default*, and others spread evenly over
   the method's ``space`` (a scrambled Halton sequence, so that more trials are the same ones and more).
2. All are tried on the first third of the records; the default and the best quarter of the others on all of them
   (successive halving, Jamieson and Talwalkar 2016, in one step).
3. The best of these is the one with the largest harmonic mean of reliability, generalisation and locality, every edit
   alone and undone; of equals, that with the larger plain mean, then the one drawn first, the default before all.

Every edit is in the store under all that it depends on, so a search can be stopped, and repeated at no cost.
"""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import ceil
from statistics import fmean, harmonic_mean
from textwrap import fill, indent
from typing import Any, NamedTuple

import pandas as pd
import yaml
from scipy.stats import qmc

from kedit import KeditError
from kedit.data import facts
from kedit.data.requests import EditRequest
from kedit.editors import check_layers, kind_of, make_hparams
from kedit.editors.bounds import stated
from kedit.editors.protocol import Editor
from kedit.editors.second_moments import SecondMoments
from kedit.editors.space import Options
from kedit.evaluation.success import METRICS
from kedit.model.lm import LM, load
from kedit.registry import unknown
from kedit.study.single import costs, single_edits, successes

log = logging.getLogger(__name__)

DRAWS = 64
"""Points of the sequence for each trial, of which those that were drawn before are passed over."""


class Trial(NamedTuple):
    """A setting and what its edits came to: each metric's mean over questions, and its standard error over records."""

    hparams: Any
    means: list[float]
    errors: list[float]

    @property
    def score(self) -> tuple[float, float]:
        """What is maximised."""
        return harmonic_mean(self.means), fmean(self.means)

    def __str__(self) -> str:
        found = zip(METRICS, self.means, self.errors, strict=True)
        return ", ".join(f"{metric} {mean:.2f} ({error:.2f})" for metric, mean, error in found)


def space_of(kind: type[Editor], settings: Sequence[str]) -> Mapping[str, Options]:
    """What is tried: the settings given, such as ``layer=[3,5,7]``, or what the method declares.

    Raises:
        KeditError: a setting that is not ``name=[values]``; nothing given and nothing declared.
    """
    space: dict[str, Options] = {}
    for setting in settings:
        key, _, values = setting.partition("=")
        try:
            space[key] = yaml.safe_load(values)
        except yaml.YAMLError:
            space[key] = []
        if not isinstance(space[key], list) or not space[key]:
            raise KeditError(f"tune: {setting!r} is not a list of values; write such as layer=[3,5,7].")
    if not (space or kind.space):
        raise KeditError(f"method {kind.name!r} declares nothing to tune; say what to try, such as layer=[3,5,7].")
    return space or kind.space


def drawn(kind: type[Editor], lm: LM, space: Mapping[str, Options], trials: int, seed: int) -> list[Any]:
    """The default and so many distinct settings after it, fewer where the space has no more.

    Raises:
        KeditError: a hyper-parameter that the method does not have, or a value that is out of bounds.
    """
    settings = [make_hparams(kind, lm.name, None, lm.model.config)]
    options = {key: some(lm.layers) if callable(some) else some for key, some in space.items()}
    for point in qmc.Halton(len(options), rng=seed).random(DRAWS * trials):
        if len(settings) == trials:
            break
        values = {key: some[int(x * len(some))] for x, (key, some) in zip(point, options.items(), strict=True)}
        hparams = make_hparams(kind, lm.name, asdict(settings[0]) | values)
        if hparams not in settings:
            check_layers(kind, hparams, lm.layers)
            settings.append(hparams)
    return settings


def tried(kind: type[Editor], lm: LM, hparams: Any, requests: Sequence[EditRequest]) -> Trial:
    """Edit by each request alone, from the store where that was done.

    Raises:
        KeditError: a metric has no questions.
    """
    records = list(single_edits(lm, kind.name, requests, asdict(hparams)))
    items, means, errors = successes(records), list[float](), list[float]()
    for metric in METRICS:
        if not items[metric]:
            raise KeditError(
                f"tune: {metric} cannot be measured on {len(requests)} records, of which {lm.name} knows none (a "
                "neighbour's answer, for locality); give more --records, or another --set."
            )
        values = pd.DataFrame(items[metric])
        means.append(float(values.value.mean()))
        errors.append(float(values.groupby("id").value.mean().sem()))
    trial = Trial(hparams, means, errors)
    about = "%d records: %s; %d failed, %.2f s an edit; %s"
    cost = costs(records)
    log.info(about, len(requests), trial, cost["failed"], cost["seconds"], stated(hparams))
    return trial


def tune(
    method: str, model: str, settings: Sequence[str], trials: int, records: int, edit_set: str | None, seed: int
) -> str:  # fmt: skip
    """Search, and give the block for ``params/methods/<method>.yaml`` with its evidence.

    Args:
        settings: what to try instead of the method's space.
        trials: settings tried in all, the default among them.
        records: of the validation split, for the settings that are tried on all of them.
        edit_set: one with a validation split; by default the bundled one, or for the pico models their own.

    Raises:
        KeditError: unknown method, model or set; a budget that cannot be had; what the others here raise.
    """
    kind, edit_set = kind_of(method), edit_set or ("pico" if model.startswith("pico-") else "bundled")
    if edit_set not in facts.SETS:
        raise unknown("edit set with a validation split", edit_set, facts.SETS)
    requests, space = facts.load(edit_set, "validation"), space_of(kind, settings)
    for name, value, least in (("trials", trials, 1), ("records", records, 3), ("seed", seed, 0)):
        if value < least:
            raise KeditError(f"--{name} is {value}; it must be a whole number from {least} up.")
    if records > len(requests):
        raise KeditError(f"--records is {records}; the validation split of {edit_set} has {len(requests)}.")
    lm, few = load(model), ceil(records / 3)
    hparams = drawn(kind, lm, space, trials, seed)
    SecondMoments(lm).prepare(sorted({layer for one in hparams for layer in kind.moments_at(one)}))  # in one pass
    first = [tried(kind, lm, one, requests[:few]) for one in hparams]
    ranked = sorted(first[1:], key=lambda trial: trial.score, reverse=True)
    going_on = [first[0].hparams, *(trial.hparams for trial in ranked[: ceil(len(ranked) / 4)])]
    last = [tried(kind, lm, one, requests[:records]) for one in hparams if one in going_on]
    best = max(last, key=lambda trial: trial.score)
    given = {"--trials": trials, "--records": records, "--set": edit_set, "--seed": seed}
    options = [str(part) for option in given.items() for part in option]
    command = shlex.join(["python", "-m", "kedit", "tune", method, model, *settings, *options])
    default = "none was better than the default" if best is last[0] else f"the default: {last[0]}"
    return block(
        lm, best.hparams,
        f"`{command}` on the model {lm.fingerprint[:12]}: of {len(hparams)} trials of {few} records of the validation "
        f"split, the default and the best others, {len(last)} in all, went on to {records}. Every edit alone, means "
        f"(standard errors over records): {best}; harmonic mean {best.score[0]:.2f}; {default}.",
    )  # fmt: skip


def block(lm: LM, hparams: Any, source: str) -> str:
    """A block of ``params/methods``."""

    def flow(value: Any) -> str:
        return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, default_flow_style=True, width=110)

    told = fill(source, 112, break_long_words=False, break_on_hyphens=False)
    parts = f"  - models: {flow([lm.name])}", "    hparams:\n", indent(flow(stated(hparams)), " " * 6)
    return "".join((*parts, "    source: >\n", indent(told, " " * 6)))
