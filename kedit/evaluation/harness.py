"""Benchmarks on the live edited model, through lm-eval's own API, item by item.

No reloading and no saving: lm-eval is handed the very model that was edited. Prompts, few-shot
exemplars, chat templates, filters and metrics are lm-eval's; only the forward passes are ours
(kedit/model/scoring.py), with the same answers as lm-eval's ``hf`` model (tests/test_evaluate.py).
"""

import contextlib
import io
import math
from functools import cache
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from kedit import KeditError
from kedit.evaluation import benchmarks
from kedit.evaluation.records import Item
from kedit.model.lm import LM
from kedit.model.scoring import Drafts, loglikelihoods, read


class SharedPrefixLM(HFLM):
    """lm-eval's ``hf`` model with kedit's forward passes: what prompts have in common is read once.

    Args:
        guesses: the ``drafts`` of ``kedit.model.scoring.read``.
    """

    def __init__(self, lm: LM, guesses: Drafts | None = None):
        super().__init__(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=1)
        self.lm, self.guesses = lm, guesses
        self.encode = cache(lm.encode)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; texts start with one begin token unless special tokens are declined."""
        ids, begin = self.encode(string), self.lm.begin
        return list(ids) if add_special_tokens is False or ids[: len(begin)] == begin else [*begin, *ids]

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        # what does not fit into the model's window is cut off at the left, as lm-eval does
        room = self.max_length + 1
        return loglikelihoods(
            self.lm, [(context[max(0, len(context) + len(more) - room) :], more) for _, context, more in requests]
        )

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy generation up to a stop string, by the settings that the requests of a task share."""
        settings = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        if settings.get("do_sample") or settings.get("temperature"):
            raise NotImplementedError("kedit evaluates by greedy generation only")
        end = self.eot_token_id
        stops = handle_stop_sequences(settings["until"], eos=self.tok_decode([end], skip_special_tokens=False))

        def finished(_: int, tokens: list[int]) -> bool:
            # a stop string shows in the last few tokens as soon as it is there
            return any(stop in self.tok_decode(tokens[-16:], skip_special_tokens=False) for stop in stops)

        # lm-eval refuses to generate more than the window holds; half of it stays for the prompt here
        longest = settings["max_gen_toks"]
        if longest >= self.max_length:
            longest = self.max_length // 2
        contexts = [self.tok_encode(request.args[0])[longest - self.max_length :] for request in requests]
        _, generated = read(self.lm, [], contexts, longest, finished, self.guesses)
        answers = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in generated]
        return [postprocess_generated_text(self.tok_decode(tokens), stops, None) for tokens in answers]


def _item(sample: dict[str, Any], about: dict[str, Any], name: str) -> Item:
    """One item's outcome: its value, and what was answered or what the task keeps of it."""
    if "keep" in about:
        return {"id": name} | {key: sample[key] for key in about["keep"]}
    item: Item = {"id": name, "value": float(sample[about["metric"]])}
    first = sample["filtered_resps"][0]
    if isinstance(first, str):
        item["text"] = sample["resps"][0][0]
        item["parsed"] = first.strip() not in ("", "[invalid]")
    else:
        item["lp"] = [round(float(lp), 4) for lp, _ in sample["filtered_resps"]]
        item["parsed"] = all(math.isfinite(lp) for lp in item["lp"])
        item["target"] = np.asarray(sample["target"]).tolist()  # ToxiGen's are numpy's integers
    return item


@torch.inference_mode()
def evaluate(lm: LM, name: str, limit: int | None = None, guesses: Drafts | None = None) -> list[Item]:
    """Outcomes of one benchmark on the model as it is now, in the order of its tasks and their items.

    Each item holds ``id``, ``value`` (its share of the benchmark's metric), ``parsed`` and either the
    choices' log-likelihoods ``lp`` with the ``target`` (index of the right choice, or indices) or the
    generated ``text``; or what the task's metadata says to ``keep``. Where a benchmark is several
    tasks, an id names the task too.

    Args:
        limit: how many items, in all; None for all there are.
        guesses: see ``SharedPrefixLM``.

    Raises:
        KeditError: no such benchmark, its data cannot be had, or it wants a chat template and the model has none.
    """
    about, tasks = benchmarks.metadata(name), benchmarks.tasks(name)
    chat = about.get("chat", False)
    if chat and not lm.tokenizer.chat_template:
        raise KeditError(f"model {lm.name} has no chat template; ask {name} of an instruction-tuned model.")
    reader, items = SharedPrefixLM(lm, guesses), []
    for subtask, count in benchmarks.shares(name, limit).items():
        if not count:
            continue
        # one task at a time: its items share their exemplars. lm-eval draws progress bars of its own, one for
        # each of many short steps.
        task = {subtask: tasks[subtask]}
        with contextlib.redirect_stderr(io.StringIO()):
            results = lm_eval.evaluate(reader, task, limit=count, apply_chat_template=chat, bootstrap_iters=0)
        samples = [s for s in results["samples"][subtask] if s["filter"] == about.get("filter", s["filter"])]
        for sample in sorted(samples, key=lambda s: s["doc_id"]):
            number = str(sample["doc"].get("id", sample["doc_id"]))
            items.append(_item(sample, about, number if len(tasks) == 1 else f"{subtask}/{number}"))
    return items
