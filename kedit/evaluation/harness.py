"""Benchmarks on the live edited model, through lm-eval's own API, item by item.

No reloading and no saving: lm-eval is handed the very model that was edited. Prompts, few-shot
exemplars, filters and metrics are lm-eval's; only the forward passes are ours (kedit/model/scoring.py),
with the same answers as lm-eval's ``hf`` model (tests/test_evaluate.py).
"""

import contextlib
import io
import logging
import math
from functools import cache
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from kedit.evaluation import benchmarks
from kedit.evaluation.records import Item
from kedit.model.lm import LM
from kedit.model.scoring import Drafts, loglikelihoods, read

for noisy in ("lm_eval", "datasets"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


class SharedPrefixLM(HFLM):
    """lm-eval's ``hf`` model with kedit's forward passes: what prompts have in common is read once."""

    def __init__(self, lm: LM, guesses: Drafts | None = None):
        super().__init__(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=1)
        self.lm, self.guesses = lm, guesses
        self.encode = cache(lm.encode)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; texts start with the begin token unless special tokens are declined."""
        return [*([] if add_special_tokens is False else self.lm.begin), *self.encode(string)]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        if self.lm.begin or all(context for _, context, _ in requests):
            # what does not fit into the model's window is cut off at the left, as lm-eval does
            room = self.max_length + 1
            return loglikelihoods(
                self.lm, [(context[max(0, len(context) + len(t) - room) :], t) for _, context, t in requests]
            )
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy generation up to a stop string, by the settings of each request."""
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for indices in groups.values():
            settings = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
            if settings.get("do_sample") or settings.get("temperature"):
                raise NotImplementedError("kedit evaluates by greedy generation only")
            stops = handle_stop_sequences(
                settings["until"], eos=self.tok_decode([self.eot_token_id], skip_special_tokens=False)
            )

            def finished(_: int, tokens: list[int], stops: list[str] = stops) -> bool:
                # a stop string shows in the last few tokens as soon as it is there
                return any(stop in self.tok_decode(tokens[-16:], skip_special_tokens=False) for stop in stops)

            # lm-eval refuses to generate more than the window holds; half of it stays for the prompt here
            longest = settings["max_gen_toks"]
            if longest >= self.max_length:
                longest = self.max_length // 2
            room = self.max_length - longest
            contexts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            _, generated = read(self.lm, [], contexts, longest, finished, self.guesses)
            for index, tokens in zip(indices, generated, strict=True):
                if self.eot_token_id in tokens:
                    tokens = tokens[: tokens.index(self.eot_token_id)]
                texts[index] = postprocess_generated_text(self.tok_decode(tokens), stops, None)
        return [texts[index] for index in range(len(requests))]


def _item(sample: dict[str, Any], metric: str, name: str) -> Item:
    """One item's outcome: its value, and what was answered."""
    item: Item = {"id": name, "value": float(sample[metric])}
    first = sample["filtered_resps"][0]
    if isinstance(first, str):
        item["text"] = sample["resps"][0][0]
        item["parsed"] = first.strip() not in ("", "[invalid]")
    else:
        item["lp"] = [round(float(lp), 4) for lp, _ in sample["filtered_resps"]]
        item["parsed"] = all(math.isfinite(lp) for lp in item["lp"])
        item["target"] = np.asarray(sample["target"]).tolist()  # ToxiGen's are numpy's integers
    return item


def evaluate(lm: LM, name: str, limit: int | None = None, guesses: Drafts | None = None) -> list[Item]:
    """Outcomes of one benchmark on the model as it is now, in the order of its tasks and their items.

    Each item holds ``id``, ``value`` (its share of the benchmark's metric), ``parsed`` and either the
    choices' log-likelihoods ``lp`` with the ``target`` (place of the right choice, or places) or the
    generated ``text``. Where a benchmark is several tasks, an id names the task too.
    """
    about, tasks = benchmarks.metadata(name), benchmarks.tasks(name)
    reader = SharedPrefixLM(lm, guesses)
    items = []
    for subtask, count in benchmarks.shares(name, limit).items():
        if not count:
            continue
        # one task at a time: its items share their exemplars. lm-eval draws progress bars of its own, one for
        # each of many short steps.
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):
            results = lm_eval.evaluate(
                lm=reader,
                task_dict={subtask: tasks[subtask]},
                limit=count,
                log_samples=True,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        samples = [s for s in results["samples"][subtask] if s["filter"] == about.get("filter", s["filter"])]
        for sample in sorted(samples, key=lambda s: s["doc_id"]):
            place = str(sample["doc"].get("id", sample["doc_id"]))
            items.append(_item(sample, about["metric"], place if len(tasks) == 1 else f"{subtask}/{place}"))
    return items
