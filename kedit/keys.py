"""Which key? Where the subject ends in a text, the key there, and the second moment of all keys.

A key is the input of an MLP's second projection (m numbers) at one token; see methods section 0 of
Meng et al., "Locating and Editing Factual Associations in GPT" (ROME, 2022).
"""

import bz2
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

import kedit
from kedit import KeditError
from kedit.facts import EditRequest
from kedit.models import LM
from kedit.store import write_atomic

log = logging.getLogger(__name__)


# Texts and positions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A tokenised text and the index of the subject's last token in it."""

    ids: tuple[int, ...]
    subject: int


def row(lm: LM, prompt: str, subject: str, template: str = "{}") -> Row:
    """Fill a context template with a prompt and the prompt with its subject, and find the subject.

    The whole text is tokenised once; the subject's last token is the one whose character span covers
    the subject's last character, so nothing depends on how pieces would be tokenised alone.

    Raises:
        KeditError: the subject's last token reaches into what follows it ("New York" in "New Yorkers").
    """
    frame = template.replace("{}", prompt, 1)
    head, _, tail = frame.partition("{}")
    end = len(head) + len(subject)
    encoded = lm.tokenizer(head + subject + tail, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    index = max(i for i, (start, stop) in enumerate(spans) if start < end <= stop)
    if spans[index][1] > end:
        raise KeditError(f"in {head + subject + tail!r} the subject {subject!r} merges with what follows it.")
    return Row((*lm.begin, *encoded["input_ids"]), index + len(lm.begin))


def rows(lm: LM, request: EditRequest, contexts: Sequence[str]) -> list[Row]:
    """A request's prompt in each context template; the first template is the bare ``{}``."""
    return [row(lm, request.prompt, request.subject, template) for template in contexts]


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad token sequences: ids (B, T) and mask (B, T)."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        mask[i, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


# Reading activations -------------------------------------------------------------------------------


class _Enough(Exception):
    """Raised by a hook when nothing above it is needed."""


@contextmanager
def capture(lm: LM, modules: dict[str, nn.Module], inputs: bool) -> Iterator[dict[str, Tensor]]:
    """Within the block, every forward records the modules' inputs or outputs by name, on the model's first device."""
    seen: dict[str, Tensor] = {}

    def hook(name):
        def record(module, args, output):
            seen[name] = (args[0] if inputs else output).to(lm.device)

        return record

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield seen


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """Within the block, a forward ends quietly once ``module`` has run; nothing above it is computed."""

    def enough(*_):
        raise _Enough

    handle = module.register_forward_hook(enough)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def activations(lm: LM, texts: Sequence[Row], layers: Sequence[int], at: str) -> dict[int, Tensor]:
    """Activations at each row's subject token, layer -> (rows, width).

    ``at`` is "key" (input of the second MLP projection, m wide), "value" (its output, d), "attention"
    (output of the attention's projection, d), "hidden" (output of the MLP's first projection, its gate
    where there is one, m) or "block" (the block's output, d). Rows are cut after the subject and the
    forward stops after the last layer: causal attention makes what follows irrelevant.
    """
    anatomy = lm.anatomy
    find = {
        "key": anatomy.down,
        "value": anatomy.down,
        "attention": anatomy.attn_out,
        "hidden": anatomy.inner,
        "block": anatomy.blocks.__getitem__,
    }[at]
    sites = {str(layer): find(layer) for layer in layers}
    ids, mask = pad([text.ids[: text.subject + 1] for text in texts], lm.device)
    with capture(lm, sites, inputs=at == "key") as seen, stop_after(anatomy.blocks[max(layers)]):
        anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False)
    which = torch.arange(len(texts), device=lm.device)
    where = torch.tensor([text.subject for text in texts], device=lm.device)
    return {layer: seen[str(layer)][which, where] for layer in layers}


# Context templates ---------------------------------------------------------------------------------

_SEEDS = ("The", "Therefore", "Because", "I", "You")


@torch.no_grad()
def context_templates(lm: LM, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[str]:
    """The bare ``{}`` and sampled prefixes: for each (tokens, count), that many ``"<text>. {}"``.

    Texts are sampled from the model itself (top-5) from fixed first words; a length includes the
    first word. Seeded, so the same model gives the same templates (ROME and MEMIT, appendix on
    hyper-parameters).
    """
    generator = torch.Generator().manual_seed(seed)
    templates = ["{}"]
    for tokens, count in lengths:
        for index in range(count):
            ids = [*lm.begin, *lm.encode(_SEEDS[index % len(_SEEDS)])]
            end = len(lm.begin) + tokens
            while len(ids) < end:
                logits = lm.model(torch.tensor([ids], device=lm.device), use_cache=False).logits[0, -1]
                top = logits.float().topk(5)
                pick = torch.multinomial(top.values.softmax(-1).cpu(), 1, generator=generator)
                ids.append(int(top.indices[pick]))
            text = lm.tokenizer.decode(ids[len(lm.begin) :], skip_special_tokens=True)
            templates.append(" ".join(text.replace("{", " ").replace("}", " ").split()) + ". {}")
    return templates


# Second moments -----------------------------------------------------------------------------------

SEQUENCE = 512
"""Tokens in one sequence of the text that second moments are taken over; fewer where a model knows fewer."""


def _wikipedia_sample() -> list[str]:
    """The 107 English Wikipedia articles that the gensim wheel carries for its own tests, as plain text."""
    import gensim
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    folder = Path(gensim.__file__).parent / "test" / "test_data"
    (dump,) = folder.glob("enwiki-latest-pages-articles*-shortened.bz2")
    articles = []
    with bz2.open(dump) as file:
        for _, text, _ in extract_pages(file, filter_namespaces=("0",)):
            if not text.lstrip().lower().startswith("#redirect"):
                plain = filter_wiki(text, promote_remaining=True, simplify_links=True)
                plain = re.sub(r"'{2,}|^=+|=+$", "", plain, flags=re.MULTILINE)
                articles.append(re.sub(r"\s*\n\s*", "\n", plain).strip())
    return articles


WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en")
"""Hub id and snapshot of ``wikipedia``; the study's 20200501.en is no longer offered without remote code."""


def _wikipedia(lm: LM, wanted: int) -> Iterator[list[int]]:
    """One sequence from the beginning of each long enough article, shuffled by a fixed seed, streamed."""
    import datasets

    from kedit import hub

    source = hub.dataset(WIKIPEDIA[0])
    body, found = SEQUENCE - len(lm.begin), 0
    for article in datasets.load_dataset(source, WIKIPEDIA[1], split="train", streaming=True).shuffle(
        seed=1, buffer_size=10_000
    ):
        ids = lm.encode(article["text"][: 16 * SEQUENCE])[:body]
        if len(ids) == body:
            yield [*lm.begin, *ids]
            found += 1
            if found == wanted:
                return
    raise KeditError(f"statistics text 'wikipedia' has {found} articles of {SEQUENCE} tokens, fewer than {wanted}.")


def corpus(name: str) -> list[str]:
    """Documents of a text: ``wikipedia-sample``, ``pico`` (the pico models' world), or the path of a UTF-8 file."""
    if name == "wikipedia-sample":
        return _wikipedia_sample()
    if name == "pico":
        from kedit.pico.world import sample

        return [sample()]
    try:
        return [Path(name).read_text(encoding="utf-8")]
    except OSError as error:
        raise KeditError(
            f"statistics text {name!r} cannot be read ({error.strerror}); give a text file, wikipedia-sample or pico."
        ) from error


def sequence_length(lm: LM) -> int:
    """Tokens in one sequence for a model: 512, or all the positions it was trained with."""
    return min(SEQUENCE, lm.model.config.max_position_embeddings)


def sequences(lm: LM, name: str, tokens: int) -> Iterable[list[int]]:
    """Cut a text into sequences of 512 tokens (or the model's length), begin token included, documents in turn.

    Of ``wikipedia``, which is streamed from the hub, each article gives one.

    Raises:
        KeditError: the text holds fewer tokens than asked for.
    """
    if name == "wikipedia":
        return _wikipedia(lm, -(-tokens // SEQUENCE))
    length = sequence_length(lm)
    body = length - len(lm.begin)
    documents = [lm.encode(document) for document in corpus(name)]
    pieces = [
        (start, index, document[start : start + body])
        for index, document in enumerate(documents)
        for start in range(0, len(document) - body + 1, body)
    ]
    wanted = -(-tokens // length)
    if len(pieces) < wanted:
        raise KeditError(
            f"statistics text {name!r} has {len(pieces) * length} tokens in full sequences, fewer than {tokens}."
        )
    return [[*lm.begin, *piece] for _, _, piece in sorted(pieces, key=lambda p: p[:2])[:wanted]]


class Statistics:
    """Second moments of a model's keys, C = mean of k k^T over a text, one (m, m) matrix a layer.

    Computed on the unedited model in one pass for all layers asked for, and kept on disk by the
    fingerprint of model and text. So are its Cholesky factor and its eigenvectors, in float64: what costs
    m^3 is paid once for a model and a layer, not once an edit or a process. A ready-made set of matrices
    can be given instead (``moments``), to compare with another implementation on identical inputs.
    """

    def __init__(
        self,
        lm: LM,
        text: str | None = None,
        tokens: int = 98_304,
        moments: dict[int, Tensor] | None = None,
    ):
        # the pico models know the words of their own world only
        self.text = text or ("pico" if lm.name.startswith("pico-") else "wikipedia-sample")
        self.lm, self.tokens = lm, tokens
        self._given = moments is not None
        self._moments: dict[int, Tensor] = dict(moments or {})
        self._factors: dict[int, Tensor] = {}

    @cached_property
    def key(self) -> dict[str, object]:
        """What the matrices depend on, for hashing."""
        if self._given:
            digest = hashlib.sha256()
            for layer, moment in sorted(self._moments.items()):
                digest.update(f"{layer}".encode() + moment.double().numpy().tobytes())
            return {"given": digest.hexdigest()[:16]}
        return {"model": self.lm.fingerprint, "text": self.text, "tokens": self.tokens, "hash": self._text_hash}

    @cached_property
    def _text_hash(self) -> str:
        if self.text == "wikipedia":
            return "-".join(WIKIPEDIA).replace("/", "-")
        if self.text == "wikipedia-sample":
            import importlib.metadata

            return f"gensim-{importlib.metadata.version('gensim')}"
        return hashlib.sha256("\x1e".join(corpus(self.text)).encode()).hexdigest()[:16]

    def _path(self, layer: int, kind: str = "") -> Path:
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", Path(self.text).name)
        folder = kedit.CACHE / "moments" / self.lm.fingerprint / f"{name}-{self._text_hash}-{self.tokens}"
        return folder / f"{layer}{kind and '-' + kind}.safetensors"

    def prepare(self, layers: Sequence[int]) -> None:
        """Have the second moments of these layers ready, from disk or by one pass over the text."""
        for layer in layers:
            if layer not in self._moments and not self._given and self._path(layer).exists():
                self._moments[layer] = safetensors.torch.load_file(self._path(layer))["moment"]
        if missing := [layer for layer in layers if layer not in self._moments]:
            if self._given:
                raise KeditError(f"the statistics given hold no second moment for layer {missing[0]}.")
            self._collect(missing)

    @torch.no_grad()
    def _collect(self, layers: Sequence[int]) -> None:
        lm = self.lm
        texts, read = sequences(lm, self.text, self.tokens), 0
        sums = dict.fromkeys(layers, 0.0)
        sites = {str(layer): lm.anatomy.down(layer) for layer in layers}
        last = lm.anatomy.blocks[max(layers)]
        with lm.journal.unedited():
            for text in tqdm(texts, desc=f"second moments, layers {list(layers)}", unit="seq", mininterval=1):
                with capture(lm, sites, inputs=True) as seen, stop_after(last):
                    lm.anatomy.base(input_ids=torch.tensor([text], device=lm.device), use_cache=False)
                read += len(text)
                for layer in layers:
                    keys = seen[str(layer)][0].float()
                    sums[layer] += (keys.T @ keys).double()
        for layer in layers:
            moment = (sums[layer] / read).float().cpu()
            self._moments[layer] = moment
            write_atomic(self._path(layer), safetensors.torch.save({"moment": moment}))

    def moment(self, layer: int) -> Tensor:
        """C of a layer, (m, m) float64."""
        self.prepare([layer])
        return self._moments[layer].double()

    def _derived(self, layer: int, kind: str, compute: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What costs m^3 and depends on C alone: from disk, or computed now and put there."""
        path = None if self._given else self._path(layer, kind)
        if path and path.exists():
            return safetensors.torch.load_file(path, device=str(self.lm.device))
        found = compute(self.moment(layer).to(self.lm.device))
        if path:
            write_atomic(path, safetensors.torch.save(found))
        return found

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """C^-1 K in float64 by the layer's Cholesky factor; keys (m, n) -> (m, n).

        Raises:
            KeditError: C is singular, because the text has too few tokens for m.
        """

        def factorise(moment: Tensor) -> dict[str, Tensor]:
            factor, info = torch.linalg.cholesky_ex(moment)
            if info:
                raise KeditError(
                    f"the second moment of layer {layer} is singular: {self.tokens} tokens of {self.text} are too few; "
                    "raise statistics.tokens."
                )
            return {"factor": factor.contiguous()}

        if layer not in self._factors:
            self._factors[layer] = self._derived(layer, "cholesky", factorise)["factor"]
        # cholesky_solve would copy the factor each time
        lower = self._factors[layer]
        half = torch.linalg.solve_triangular(lower, keys.double(), upper=False)
        return torch.linalg.solve_triangular(lower.T, half, upper=True)

    def spectrum(self, layer: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) of C, the smallest first, and its eigenvectors as columns (m, m), float64."""

        def decompose(moment: Tensor) -> dict[str, Tensor]:
            values, vectors = torch.linalg.eigh(moment)
            return {"values": values, "vectors": vectors.contiguous()}

        found = self._derived(layer, "spectrum", decompose)
        return found["values"], found["vectors"]
