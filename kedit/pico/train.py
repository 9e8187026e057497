"""Train the pico family: GPT-NeoX models of four sizes on the same text, and a tuned twin of one.

As in Pythia every size reads the same sequences in the same order. One process and one thread a model,
so that the result does not depend on how work is shared; sizes train side by side on several cores.
"""

import hashlib
import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from itertools import count, islice, repeat
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from kedit import workers
from kedit.pico import world
from kedit.store import runs_folder, write_atomic

WEIGHTS = Path(__file__).parent / "weights"
BATCH = 8
"""Sequences in a batch."""
WARMUP = 100
"""Steps over which the learning rate rises."""
IGNORED = -100
"""Label of a token that is not learned."""


FAMILY: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("family.yaml").read_text())
RECIPES: dict[str, dict[str, Any]] = FAMILY["models"]
"""The models, each with its ``shape``, peak learning rate ``lr``, ``tokens`` it reads and ``start``, if it is tuned."""
LENGTH: int = FAMILY["shared"]["max_position_embeddings"]
"""Tokens in a sequence, begin token included; the longest that the models know."""


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level and lower-case: words, numbers, punctuation and line ends, in the order of their first use."""
    split = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    pieces = [piece for piece, _ in split.pre_tokenize_str(world.vocabulary_text().lower())]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([world.SEPARATOR, "<unk>", *pieces]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = split
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), world.SEPARATOR) | {"unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False, **special)


def sequences(tuning: bool = False) -> Iterator[tuple[list[int], list[int]]]:
    """Sequences of 128 tokens and their labels, endless.

    Each begins with the separator and a whole document, so that texts read alone look as they did in
    training; documents follow with a separator between them, the last is cut. Tuning learns answers alone.
    """
    mix, name = (world.TUNING, "tuning") if tuning else (world.BASE, "base")
    encode, separator = partial(tokenizer().encode, add_special_tokens=False), tokenizer().bos_token_id
    ids, labels = [separator], [IGNORED]
    for document in world.documents(mix, name):
        cut = max((document.find(cue) + len(cue) for cue in ("Answer:", "This is") if cue in document), default=0)
        question, answer = encode(document[:cut]), encode(document[cut:])
        ids += [*question, *answer, separator]
        labels += [*([IGNORED] * len(question) if tuning else question), *answer, separator]
        if len(ids) >= LENGTH:
            yield ids[:LENGTH], labels[:LENGTH]
            ids, labels = [separator], [IGNORED]


def configuration(recipe: Mapping[str, Any]) -> GPTNeoXConfig:
    """A model's configuration."""
    words, separator = len(tokenizer()), tokenizer().bos_token_id
    shape = FAMILY["shared"] | recipe["shape"]
    return GPTNeoXConfig(vocab_size=words, bos_token_id=separator, eos_token_id=separator, **shape)


def train(
    name: str, stop: int | None = None, folder: Path = WEIGHTS, bar: int = 0
) -> tuple[GPTNeoXForCausalLM, list[float]]:
    """Train a model on one thread, 8 x 128 tokens a step; returns it and the loss of each step.

    AdamW, biases and norms without weight decay; a linear warm-up, then a cosine to zero.

    Args:
        stop: steps, if not all.
        folder: where the model that this one is tuned from lies.
        bar: line of the progress bar.
    """
    torch.set_num_threads(1)
    torch.manual_seed(world.SEED)
    recipe = RECIPES[name]
    if recipe["start"]:
        model = GPTNeoXForCausalLM.from_pretrained(folder / recipe["start"], dtype=torch.float32)
    else:
        model = GPTNeoXForCausalLM(configuration(recipe))
    model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe["lr"], betas=(0.9, 0.98))
    steps = recipe["tokens"] // (BATCH * LENGTH)
    schedule = LambdaLR(optimiser, lambda i: min((i + 1) / WARMUP, (1 + math.cos(math.pi * i / steps)) / 2))
    losses, texts = [], sequences(tuning=bool(recipe["start"]))
    progress = tqdm(range(min(stop or steps, steps)), desc=f"{name:<18}", position=bar, mininterval=1)
    for _ in progress:
        ids, labels = (torch.tensor(part) for part in zip(*islice(texts, BATCH), strict=True))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix_str(f"loss {losses[-1]:.2f}", refresh=False)
    return model.eval(), losses


def _train_and_save(name: str, folder: Path, bar: int) -> dict[str, Any]:
    """Train a model, save it as half-precision safetensors; returns the manifest's entry."""
    model, losses = train(name, folder=folder, bar=bar)
    model.half().save_pretrained(folder / name)
    tokenizer().save_pretrained(folder / name)
    files = sorted((folder / name).iterdir())
    return {
        "parameters": model.num_parameters(),
        **RECIPES[name],
        "first_losses": [round(loss, 5) for loss in losses[:20]],
        "losses": [round(fmean(losses[i : i + 50]), 4) for i in range(0, len(losses), 50)],
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }


def make() -> list[Path]:
    """Train the family anew, then replace the committed weights and their manifest."""
    folder = runs_folder() / "pico"
    shutil.rmtree(folder, ignore_errors=True)
    entries: dict[str, dict[str, Any]] = {}
    with workers.pool(workers.cores()) as (pool, _):
        for tuned in (False, True):  # what others are tuned from comes first, and of those the largest
            names = [name for name in reversed(RECIPES) if bool(RECIPES[name]["start"]) == tuned]
            entries |= zip(names, pool.map(_train_and_save, names, repeat(folder), count()), strict=True)
    about = {
        "command": "make pico",
        "seed": world.SEED,
        "sequence": LENGTH,
        "batch": BATCH,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "machine": platform.machine(),
        "models": {name: entries[name] for name in RECIPES},
    }
    shutil.rmtree(WEIGHTS, ignore_errors=True)
    shutil.copytree(folder, WEIGHTS)
    write_atomic(WEIGHTS / "manifest.json", (json.dumps(about, indent=1) + "\n").encode())
    return [WEIGHTS / "manifest.json", *(WEIGHTS / name for name in RECIPES)]
