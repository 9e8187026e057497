"""``make bench-gpu``: what an edit and a benchmark cost at Llama-2-7B's exact shape, in bfloat16 on one GPU.

Time and memory depend on shapes, so the weights are random and nothing gated is needed; the vocabulary has the
model's size and is learned from the Wikipedia sample. Whether the edits mean anything is not asked here.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pandas as pd
import torch
from bench.bench import resident
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

import kedit
from kedit import KeditError
from kedit.analysis.readme import markdown
from kedit.data import facts
from kedit.data.corpus import corpus
from kedit.editors.second_moments import SecondMoments
from kedit.evaluation import benchmarks
from kedit.evaluation.harness import SharedPrefixLM, evaluate
from kedit.model.forward import hooked
from kedit.model.journal import EditFailed
from kedit.model.lm import LM, SEPARATOR
from kedit.store import write_atomic
from kedit.study.run import machine, versions
from kedit.workers import log_to_stderr

log = logging.getLogger(__name__)

NAME = "meta-llama/Llama-2-7b-hf"
METHODS = ("rome", "memit", "pmet", "kn", "grace", "ft-l")
EDITS, PROMPTS = 20, 200
BENCHMARK = "mmlu"


def llama2_7b() -> LlamaConfig:
    """The shape of Llama-2-7B; LlamaConfig's own defaults but for the positions and the norm's epsilon."""
    return LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0)


def random_model(config: PretrainedConfig, device: str, dtype: torch.dtype) -> LM:
    """A model of this shape with seeded random weights, and a tokenizer of at most as many pieces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus("wikipedia-sample"), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SEPARATOR, pad_token=SEPARATOR)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LM(model, tokenizer, NAME)


class Meter:
    """Seconds and megabytes, of a GPU where there is one, else of this process."""

    def __init__(self, lm: LM):
        self.gpu = lm.device.type == "cuda"

    def now(self) -> float:
        """The clock, once the GPU has done what it was asked."""
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset(self) -> None:
        """Measure the peak anew."""
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> float:
        """Megabytes in use."""
        return torch.cuda.memory_allocated() / 1e6 if self.gpu else resident()

    def peak(self) -> float:
        """Megabytes in use at most since ``reset``; off the GPU those in use now."""
        return torch.cuda.max_memory_allocated() / 1e6 if self.gpu else resident()


def edits(lm: LM, method: str, statistics: SecondMoments, count: int = EDITS, **hparams: Any) -> dict[str, Any]:
    """Seconds and memory of sequential edits by a method, and whether the last cost what the first did."""
    editor, meter = kedit.editor(method, lm, hparams=hparams, statistics=statistics), Meter(lm)
    start = meter.now()
    editor.prepare()
    once = meter.now() - start
    meter.reset()
    seconds, memory, failed = [], [], 0
    for request in facts.bundled("edit")[:count]:
        start = meter.now()
        try:
            editor.apply(request)
        except EditFailed as error:
            failed += 1
            log.info("%s failed at %s: %s", method, request.id, error)
        seconds.append(meter.now() - start)
        memory.append(meter.memory())
    lm.journal.reset()
    part = max(1, count // 4)
    return {
        "what": f"{method}, {count} edits",
        "once_s": once,
        "median_s": median(seconds),
        "first_s": median(seconds[:part]),
        "last_s": median(seconds[-part:]),
        "first_mb": memory[part - 1],
        "last_mb": memory[-1],
        "peak_mb": meter.peak(),
        "failed": failed,
    }


def reading(lm: LM, benchmark: str = BENCHMARK, prompts: int = PROMPTS) -> dict[str, Any]:
    """Seconds, tokens and memory of one pass over the first items of a benchmark.

    ``tokens`` are those of the distinct prompts, ``tokens_read`` those that went through the model.
    """
    benchmarks.tasks(benchmark)
    asked: set[tuple[int, ...]] = set()
    answer, read = SharedPrefixLM._loglikelihood_tokens, [0]

    def noted(self: SharedPrefixLM, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        asked.update(tuple(context) for _, context, _ in requests)
        return answer(self, requests, *args, **kwargs)

    def count(module: Any, args: tuple, output: torch.Tensor) -> None:
        read[0] += output.shape[:-1].numel()

    meter, hooks = Meter(lm), hooked({lm.model.get_input_embeddings(): count})
    meter.reset()
    start = meter.now()
    with hooks, mock.patch.object(SharedPrefixLM, "_loglikelihood_tokens", noted):
        items = evaluate(lm, benchmark, prompts)
    seconds = meter.now() - start
    tokens = sum(map(len, asked))
    return {
        "what": f"{benchmark}, {len(items)} prompts",
        "median_s": seconds,
        "tokens": tokens,
        "tokens_read": read[0],
        "tokens_per_s": tokens / seconds,
        "tokens_read_per_s": read[0] / seconds,
        "peak_mb": meter.peak(),
    }


def bench_gpu() -> list[Path]:
    """Measure, and write ``figures/bench/gpu.*``.

    Raises:
        KeditError: there is no GPU, or the benchmark's data cannot be had.
    """
    if not torch.cuda.is_available():
        raise KeditError("make bench-gpu needs a CUDA GPU with 40 GB and a torch that sees it; there is none here.")
    benchmarks.reach(BENCHMARK)
    lm = random_model(llama2_7b(), "cuda", torch.bfloat16)
    rows = [reading(lm)]
    for method in METHODS:
        rows.append(edits(lm, method, SecondMoments(lm)))
        log.info("%s", rows[-1])
    frame = pd.DataFrame(rows)
    manifest = {"gpu": torch.cuda.get_device_name(), "machine": machine(), "versions": versions()}
    files = {
        "gpu.csv": frame.to_csv(index=False, float_format="%.5g", lineterminator="\n"),
        "gpu.md": markdown(frame.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)) + "\n",
        "gpu.json": json.dumps(manifest, indent=1) + "\n",
    }
    folder = kedit.ROOT / "figures" / "bench"
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in files]


if __name__ == "__main__":
    log_to_stderr()
    bench_gpu()
