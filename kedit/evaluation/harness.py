"""Benchmarks on the live edited model, through lm-eval's own API, item by item.

No reloading and no saving: lm-eval is handed the very model that was edited. Prompts, few-shot
exemplars, chat templates, filters and metrics are lm-eval's; only the forward passes are ours
(kedit/model/scoring.py), with the same answers as lm-eval's ``hf`` model (tests/test_evaluate.py).

Beside right or wrong stands a *graded* score, on the same scale from 0 to 1 and with the same chance. Where
there are choices it is the probability of the right one among them, by the log-likelihoods that the metric
compares; of several right ones, their sum. Where the answer is generated it is the probability a token
(geometric mean) of a reference answer after the same prompt, as a further branch of the tree that is read
anyway. Of refusals it is, in place of that, the log-odds of how the answer begins: log P(one of the refusing
openings) - log P(one of the complying ones); no opening is the beginning of another, so probabilities add up.
"""

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import lm_eval
import lm_eval.utils
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from kedit import KeditError
from kedit.evaluation import benchmarks
from kedit.evaluation.records import Item
from kedit.model.lm import LM
from kedit.model.scoring import Drafts, loglikelihoods, read

LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}
"""Metric -> what lm-eval divides a choice's log-likelihood by, where it does."""
Scored = tuple[float, int]
"""Of a text, the sum of its tokens' log-probabilities, and their number."""


class SharedPrefixLM(HFLM):
    """lm-eval's ``hf`` model with kedit's forward passes: what prompts have in common is read once.

    Args:
        guesses: the ``drafts`` of ``kedit.model.scoring.read``.
        expected: templates, filled with an item's fields, of texts whose log-probability after each prompt to
            generate from is wanted.

    Attributes:
        scored: of the expected texts, as far as the model may generate, for each answer that was generated.
    """

    def __init__(self, lm: LM, guesses: Drafts | None = None, expected: Sequence[str] = ()):
        super().__init__(pretrained=lm.model, tokenizer=lm.tokenizer, backend="causal", batch_size=1)
        self.lm, self.guesses = lm, guesses
        self.encode = cache(lm.encode)
        self.expected = [lm_eval.utils.env.from_string(template).render for template in expected]
        self.scored: list[list[Scored]] = []

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
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        contexts = [ids[longest - self.max_length :] for ids in prompts]
        pairs = [
            (context, self.tok_encode(request.args[0] + render(**request.doc))[len(ids) :][:longest])
            for request, ids, context in zip(requests, prompts, contexts, strict=True)
            for render in self.expected
        ]
        totals, generated = read(self.lm, pairs, contexts, longest, finished, self.guesses)
        sums = iter([(total, len(more)) for (total, _), (_, more) in zip(totals, pairs, strict=True)])
        self.scored += [[next(sums) for _ in self.expected] for _ in requests]
        answers = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in generated]
        return [postprocess_generated_text(self.tok_decode(tokens), stops, None) for tokens in answers]


def _item(sample: dict[str, Any], about: dict[str, Any], name: str, task: Any, scored: Sequence[Scored]) -> Item:
    """One item's outcome: its value, and what was answered or what the task keeps of it."""
    if openings := about.get("openings"):
        totals, first = torch.tensor([total for total, _ in scored]), len(openings["refusing"])
        sample["log_odds"] = round(float(totals[:first].logsumexp(0) - totals[first:].logsumexp(0)), 4)
    if "keep" in about:
        return {"id": name} | {key: sample[key] for key in about["keep"]}
    item: Item = {"id": name, "value": float(sample[about["metric"]])}
    first, graded = sample["filtered_resps"][0], None
    if isinstance(first, str):
        item["text"] = sample["resps"][0][0]
        item["parsed"] = first.strip() not in ("", "[invalid]")
        if "reference" in about:
            ((total, count),) = scored
            graded = math.exp(total / count)
    else:
        item["lp"] = [round(float(lp), 4) for lp, _ in sample["filtered_resps"]]
        item["parsed"] = all(math.isfinite(lp) for lp in item["lp"])
        choices, target = task.doc_to_choice(sample["doc"]), sample["target"]
        # the study's CommonsenseQA names the choice; ToxiGen's are numpy's integers
        item["target"] = choices.index(target) if target in choices else np.asarray(target).tolist()
        lengths = torch.tensor([LENGTHS.get(about["metric"], lambda _: 1)(choice) for choice in choices])
        logprobs = torch.tensor([lp for lp, _ in sample["filtered_resps"]], dtype=torch.float64)
        share = (logprobs / lengths).softmax(0)[item["target"]].sum()
        graded = float(sample[about["graded"]] if "graded" in about else share)
    if graded is not None:  # 0 from a model so broken that it has no probabilities
        item["graded"] = round(graded, 6) if math.isfinite(graded) else 0.0
    return item


def _plain(sample: dict[str, Any], name: str, task: Any) -> Item:
    """One item's outcome of a task of which nothing is said: all its metrics, the first as the value; the answer."""
    answer = sample["filtered_resps"][0]
    said = {"text": sample["resps"][0][0]} if isinstance(answer, str) else {"lp": sample["filtered_resps"]}
    metrics = {metric: sample[metric] for metric in sample["metrics"]}
    return {"id": name, "value": metrics[next(iter(task.aggregation()))]} | said | metrics


@torch.inference_mode()
def evaluate(
    lm: LM, name: str, limit: int | None = None, guesses: Drafts | None = None, asked: benchmarks.Asked | None = None
) -> list[Item]:
    """Outcomes of one benchmark on the model as it is now, in the order of its tasks and their items.

    Each item holds ``id``, ``value`` (its share of the benchmark's metric), ``parsed`` and either the
    choices' log-likelihoods ``lp`` with the ``target`` (index of the right choice, or indices) or the
    generated ``text``, and ``graded`` (see above); or what the task's metadata says to ``keep``. Where a
    benchmark is several tasks, an id names the task too.

    Args:
        limit: how many items, in all (``benchmarks.draw``); None for all there are.
        guesses: see ``SharedPrefixLM``.
        asked: the benchmark as ``benchmarks.find`` has it. If it is not ours, items hold all metrics, and the first as
            ``value``.

    Raises:
        KeditError: no such benchmark, its data cannot be had, or it wants a chat template and the model has none.
    """
    about, tasks = asked or (benchmarks.metadata(name), benchmarks.tasks(name))
    chat = about.get("chat", False)
    if chat and not lm.tokenizer.chat_template:
        raise KeditError(f"model {lm.name} has no chat template; ask {name} of an instruction-tuned model.")
    expected = [about["reference"]] if "reference" in about else list(chain(*about.get("openings", {}).values()))
    reader, items = SharedPrefixLM(lm, guesses, expected), []
    for subtask, drawn in benchmarks.draw(name, limit, asked).items():
        if not drawn:
            continue
        # one task at a time: its items share their exemplars. lm-eval draws progress bars of its own, one for
        # each of many short steps.
        task = tasks[subtask]
        with contextlib.redirect_stderr(io.StringIO()):
            which = None if limit is None else {subtask: drawn}
            try:
                results = lm_eval.evaluate(
                    reader, {subtask: task}, samples=which, apply_chat_template=chat, bootstrap_iters=0
                )
            except TemplateError as error:
                raise KeditError(f"benchmark {name!r}: an item lacks what task {subtask} needs ({error}).") from error
        samples = results["samples"][subtask]
        wanted = about.get("filter", None if about else samples[0]["filter"])
        samples = [sample for sample in samples if sample["filter"] == (wanted or sample["filter"])]
        scored = reader.scored[len(items) :] if expected else [[]] * len(samples)
        for sample, texts in zip(sorted(samples, key=lambda s: s["doc_id"]), scored, strict=True):
            number = str(sample["doc"].get("id", sample["doc_id"]))
            place = number if len(tasks) == 1 else f"{subtask}/{number}"
            items.append(_item(sample, about, place, task, texts) if about else _plain(sample, place, task))
    return items
