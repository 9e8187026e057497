"""Train the pico family: GPT-NeoX models of four sizes on the same text, and a tuned twin of one, from several seeds.

As in Pythia every size reads the same sequences in the same order. A seed draws the first weights and that order; the
world is one. Twins of every seed are tuned from the base of seed 0. One process and one thread a model, so that the
result does not depend on how work is shared; models train side by side on several cores.
"""

import hashlib
import json
import math
import platform
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from itertools import count, islice
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
from kedit.registry import unknown
from kedit.store import cache_folder, claim, disk

WEIGHTS = Path(__file__).parent / "weights"
"""Where the models of seed 0 are, which are committed. Those of other seeds are in the cache."""
BATCH = 8
"""Sequences in a batch."""
DECAY = 0.0004
"""By how much of itself a matrix shrinks in a step at the peak learning rate, at every size."""
WARMUP = 100
"""Steps over which the learning rate rises."""
IGNORED = -100
"""Label of a token that is not learned."""


FAMILY: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("family.yaml").read_text())
RECIPES: dict[str, dict[str, Any]] = FAMILY["models"]
"""The models, each with its ``shape``, peak learning rate ``lr``, ``tokens`` it reads and ``start``, if it is tuned."""
NAMES = [f"{name}-seed{seed}" if seed else name for seed in range(FAMILY["seeds"]) for name in RECIPES]
"""All models: those of seed 0 bear the plain names."""
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


def recipe(name: str) -> dict[str, Any]:
    """A model's recipe, its ``seed`` among the rest."""
    plain, _, seed = name.partition("-seed")
    return RECIPES[plain] | {"seed": int(seed or 0)}


def home(name: str) -> Path:
    """The folder of a model: beside this file, or in the cache, by what it is made from.

    Raises:
        KeditError: there is no such model in the family.
    """
    if name not in NAMES:
        raise unknown("pico model", name, NAMES)
    if not (made := recipe(name))["seed"]:
        return WEIGHTS / name
    texts = [list(islice(world.documents(mix, "digest"), 1000)) for mix in (world.BASE, world.TUNING)]
    everything = repr([FAMILY["shared"], made, RECIPES.get(made["start"]), texts])
    return cache_folder() / "pico" / hashlib.sha256(everything.encode()).hexdigest()[:12] / name


def sequences(tuning: bool = False, seed: int = 0) -> Iterator[tuple[list[int], list[int]]]:
    """Sequences of 128 tokens and their labels, endless.

    Each begins with the separator and a whole document, so that texts read alone look as they did in
    training; documents follow with a separator between them, the last is cut. Tuning learns answers alone.
    """
    mix, name = (world.TUNING, "tuning") if tuning else (world.BASE, "base")
    name += f" {seed}" * (seed > 0)
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


def configuration(shape: Mapping[str, Any]) -> GPTNeoXConfig:
    """A model's configuration."""
    words, separator = len(tokenizer()), tokenizer().bos_token_id
    shape = FAMILY["shared"] | shape
    return GPTNeoXConfig(vocab_size=words, bos_token_id=separator, eos_token_id=separator, **shape)


def train(name: str, stop: int | None = None, bar: int = 0) -> tuple[GPTNeoXForCausalLM, list[float]]:
    """Train a model on one thread, 8 x 128 tokens a step; returns it and the loss of each step.

    AdamW, biases and norms without weight decay; a linear warm-up, then a cosine to zero.

    Args:
        stop: steps, if not all.
        bar: line of the progress bar.
    """
    torch.set_num_threads(1)
    made = recipe(name)
    torch.manual_seed(made["seed"])
    if made["start"]:
        model = GPTNeoXForCausalLM.from_pretrained(home(made["start"]), dtype=torch.float32)
    else:
        model = GPTNeoXForCausalLM(configuration(made["shape"]))
    model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY / made["lr"]}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=made["lr"], betas=(0.9, 0.98))
    steps = made["tokens"] // (BATCH * LENGTH)
    schedule = LambdaLR(optimiser, lambda i: min((i + 1) / WARMUP, (1 + math.cos(math.pi * i / steps)) / 2))
    losses, texts = [], sequences(bool(made["start"]), made["seed"])
    progress = tqdm(range(min(stop or steps, steps)), desc=f"{name:<24}", position=bar, mininterval=1)
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


def train_and_save(name: str, bar: int = 0) -> Path:
    """Train a model that is not there yet; its folder: half-precision safetensors, tokenizer and a manifest.

    Raises:
        KeditError: the disk refuses it.
    """
    folder = home(name)
    with disk(folder), claim(folder, wait=True):
        if folder.is_dir():  # made by somebody else meanwhile
            return folder
        model, losses = train(name, bar=bar)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            made = Path(temporary) / name
            model.half().save_pretrained(made)
            tokenizer().save_pretrained(made)
            about = {
                "command": "make pico",
                "parameters": model.num_parameters(),
                **recipe(name),
                "sequence": LENGTH,
                "batch": BATCH,
                "versions": {"python": platform.python_version()}
                | {library: version(library) for library in ("torch", "transformers", "tokenizers")},
                "machine": platform.machine(),
                "first_losses": [round(loss, 5) for loss in losses[:20]],
                "losses": [round(fmean(losses[i : i + 50]), 4) for i in range(0, len(losses), 50)],
                "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(made.iterdir())},
            }
            (made / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")
            made.rename(folder)
    return folder


def make() -> list[Path]:
    """Train those of the family that are not there: at first all but the committed ones of seed 0."""
    with workers.pool(workers.cores()) as (pool, _):
        for tuned in (False, True):  # what others are tuned from comes first, and of those the largest
            missing = [n for n in reversed(NAMES) if bool(recipe(n)["start"]) == tuned and not home(n).is_dir()]
            list(pool.map(train_and_save, missing, count()))
    return [home(name) for name in NAMES]
