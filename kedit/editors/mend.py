"""MEND: a hyper-network turns the gradient of one edit into a better update.

Mitchell et al., "Fast Model Editing at Scale", 2022. The gradient of a projection W (out, in) is a sum
of rank-one terms, sum_t g_t x_t^T over the tokens t of the edit text: x is its input, g the gradient of
its output. Small networks, one for each shape of W, map each pair (x, g) to (x~, g~), and W gains
rate * sum_t g~_t x~_t^T (section 3.1). They are trained once, on single edits of the unedited model.
Neither a dense gradient nor an edited copy of W is ever formed, here or in training, and blocks below
the lowest edited one run once a text.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from kedit.data.facts import bundled
from kedit.data.requests import EditRequest
from kedit.editors.bounds import Count, Natural, NotNegative, Positive
from kedit.editors.training import ScoredText, TrainedEditor, Training, scored
from kedit.model.anatomy import matrix
from kedit.model.forward import Hook, LookupText, Tail, hooked
from kedit.model.journal import Edit, EditFailed, LowRank, Restore
from kedit.model.lm import LM

Factors = list[tuple[Tensor, Tensor]]
"""For each edited projection (B, T, in) and (B, T, out): a pair of rows for each token of each text."""


@dataclass(frozen=True)
class Hparams:
    """Settings of MEND and of its training.

    Attributes:
        layers: blocks whose MLP projections are edited; not block 0.
        rank: of the networks' matrices.
        edit_lr: the rates' initial size. They start negative, so that the untrained editor descends;
            the published code starts them positive and leaves it to training to turn them round.
        accumulate_edits: False for what the study's released code did: updates are always made to the
            original weights, so each edit replaces the one before it.
        steps: updates of the networks, each by the mean gradient of ``accumulate`` examples.
        lr, lr_lr: Adam's first learning rates, of the networks and of the rates; both fall linearly to
            zero (the published training, many times longer, keeps them).
        cedit, cloc: weights of the edit loss and the locality loss.
        clip: largest norm of the gradient.
        validate: steps between validations.
    """

    layers: Annotated[tuple[Count, ...], Field(min_length=1)]
    rank: Count = 1920
    edit_lr: Positive = 1e-4
    accumulate_edits: bool = True
    steps: Count = 10_000
    lr: Positive = 1e-6
    lr_lr: Positive = 1e-4
    cedit: NotNegative = 0.1
    cloc: NotNegative = 1.0
    accumulate: Count = 10
    clip: Positive = 100.0
    validate: Count = 100
    seed: Natural = 42


BATCH = 32
"""Texts read together."""

# The model under edit -------------------------------------------------------------------------------


def projections(lm: LM, layers: Sequence[int]) -> list[nn.Module]:
    """The MLP projections of some blocks, from the lowest up."""
    parts = [part for n in sorted(layers) for part in (lm.anatomy.gate(n), lm.anatomy.up(n), lm.anatomy.down(n))]
    return [part for part in parts if part is not None]


class UpperBlocks:
    """The model from the lowest edited block up; what enters that block is computed once a text, and kept.

    The tail that is run on from there is the whole text.
    """

    def __init__(self, lm: LM, layers: Sequence[int]):
        self.lm, self.modules, self.below = lm, projections(lm, layers), min(layers) - 1
        self._states: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def read(self, texts: Sequence[ScoredText]) -> None:
        """Run the blocks below on texts not yet read, those of like length together."""
        missing = sorted({text.ids for text in texts} - self._states.keys(), key=lambda ids: (len(ids), ids))
        starts = range(0, len(missing), BATCH)
        for start in tqdm(starts, desc="reading MEND's texts", unit="batch", disable=len(starts) < 10):
            batch = missing[start : start + BATCH]
            states = Tail(self.lm, [LookupText(ids, 0) for ids in batch], [self.below]).states[self.below]
            self._states |= {ids: some[: len(ids)].clone() for ids, some in zip(batch, states, strict=True)}

    def logprobs(self, texts: Sequence[ScoredText], updates: Factors = ()) -> Tensor:
        """Log-probabilities (N, vocabulary) where the texts' N scored tokens are predicted.

        With updates for B edits, text i is read by the model with update i modulo B.
        """
        self.read(texts)
        tail = Tail(self.lm, [LookupText(text.ids, 0) for text in texts], [])
        states = nn.utils.rnn.pad_sequence([self._states[text.ids] for text in texts], batch_first=True)
        with hooked({m: _adding(*pair, len(texts)) for m, pair in zip(self.modules, updates, strict=False)}):
            hidden = tail.run(self.below, states)
        rows, positions, _ = scored(texts)
        return self.lm.logits(hidden[rows, positions]).log_softmax(-1)

    def factors(self, texts: Sequence[ScoredText]) -> tuple[Factors, Tensor]:
        """The projections' inputs x and output gradients g, for each text's mean NLL; and those losses (B,).

        For each text the gradient of W is sum_t g_t x_t^T; padding has g = 0.
        """
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            # at the lowest projections the graph begins
            seen[module] = args[0].detach().to(self.lm.device).float(), output.requires_grad_()

        with hooked(dict.fromkeys(self.modules, record)), torch.enable_grad():
            losses = nll(self.logprobs(texts), texts)
            inputs, outputs = zip(*(seen[module] for module in self.modules), strict=True)
            gradients = torch.autograd.grad(losses.sum(), outputs)
        return [(x, g.to(x)) for x, g in zip(inputs, gradients, strict=True)], losses.detach()


def _adding(right: Tensor, left: Tensor, texts: int) -> Hook:
    """A hook by which a projection computes with W + sum_t g~_t x~_t^T, each text with its edit's sum."""

    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x, g = (factor.repeat(texts // len(factor), 1, 1).to(output.device) for factor in (right, left))
        return output + (args[0].float() @ x.mT @ g).to(output)

    return add


def text_means(values: Tensor, texts: Sequence[ScoredText]) -> Tensor:
    """Mean over each text's scored tokens: (N,) -> (B,)."""
    return torch.stack([part.mean() for part in values.split([len(text.ids) - text.start for text in texts])])


def nll(logprobs: Tensor, texts: Sequence[ScoredText]) -> Tensor:
    """Mean negative log-likelihood of each text's scored tokens: (N, vocabulary) -> (B,)."""
    labels = torch.tensor(scored(texts)[2], device=logprobs.device)
    return text_means(-logprobs.gather(1, labels[:, None])[:, 0], texts)


def divergence(before: Tensor, after: Tensor, texts: Sequence[ScoredText]) -> Tensor:
    """Mean KL(before || after) over each text's scored tokens: two (N, vocabulary) -> (B,)."""
    return text_means((before.exp() * (before - after)).sum(-1), texts)


# The hyper-network ----------------------------------------------------------------------------------


class Layer(nn.Module):
    """z + max(0, scale * (U V z + b) + shift), the identity at first; each projection has its scale and shift."""

    def __init__(self, width: int, rank: int, projections: int, generator: torch.Generator):
        super().__init__()
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(projections, width))
        self.shift = nn.Parameter(torch.zeros(projections, width))

    def forward(self, z: Tensor, index: int) -> Tensor:
        """Rows (N, width) of the projection that is number ``index`` of its shape."""
        # clamp, not relu: at 0, where everything starts, its gradient is 1
        return z + (self.scale[index] * (z @ self.v.T @ self.u.T + self.bias) + self.shift[index]).clamp(min=0)


def live_rows(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows (B, T) have neither x nor g all zero, as padding has; those rows (N, in + out)."""
    live = (x != 0).any(-1) & (g != 0).any(-1)
    return live, torch.cat([x[live], g[live]], -1)


class Transform(nn.Module):
    """(x, g) -> (x~, g~) for the projections of one shape: normalised, then two layers (section 3.2)."""

    def __init__(self, inputs: int, outputs: int, rank: int, projections: int, generator: torch.Generator):
        super().__init__()
        self.widths, width = (inputs, outputs), inputs + outputs
        self.layers = nn.ModuleList(Layer(width, min(rank, width), projections, generator) for _ in range(2))
        # running moments: count, mean, sum of squared deviations
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, x: Tensor, g: Tensor) -> None:
        """Merge the live rows of a projection's factors into the running moments (Chan's form of Welford's)."""
        rows, before = live_rows(x, g)[1].double(), self.count.clone()
        self.count += len(rows)
        away = rows.mean(0) - self.mean
        self.mean += away * len(rows) / self.count
        self.squares += (rows - rows.mean(0)).square().sum(0) + away.square() * before * len(rows) / self.count

    def forward(self, x: Tensor, g: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Factors (B, T, in), (B, T, out) -> x~, g~ of the same shapes, zero where a row is not live."""
        live, rows = live_rows(x, g)
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt() + 1e-7
        z = ((rows - self.mean) / deviation).float()
        for layer in self.layers:
            z = layer(z, index)
        right, left = z.split(self.widths, -1)
        return torch.zeros_like(x).index_put((live,), right), torch.zeros_like(g).index_put((live,), left)


class HyperNetwork(nn.Module):
    """A transform for each shape of projection, and a rate for each projection."""

    def __init__(self, modules: Sequence[nn.Module], hparams: Hparams):
        super().__init__()
        shapes = [tuple(matrix(module).shape) for module in modules]
        generator = torch.Generator().manual_seed(hparams.seed)
        self.transforms = nn.ModuleDict(
            {f"{o}x{i}": Transform(i, o, hparams.rank, shapes.count((o, i)), generator) for o, i in sorted(set(shapes))}
        )
        self.rates = nn.Parameter(torch.full((len(shapes),), -hparams.edit_lr))
        # each projection's transform, and its number among those of its shape
        self.uses = [(self.transforms[f"{o}x{i}"], shapes[:n].count((o, i))) for n, (o, i) in enumerate(shapes)]

    def forward(self, factors: Factors, observe: bool = False) -> Factors:
        """(x, g) -> (x~, rate * g~); ``observe``, in training, updates the moments on the way.

        As published: text by text, and of each text projection by projection, each transformed with the moments as they
        are once its own rows are counted. Those of one shape share moments, so that what comes first sees fewer rows.
        """
        if observe and len(factors[0][0]) > 1:
            texts = range(len(factors[0][0]))
            each = [self([(x[n : n + 1], g[n : n + 1]) for x, g in factors], observe=True) for n in texts]
            return [tuple(map(torch.cat, zip(*pairs, strict=True))) for pairs in zip(*each, strict=True)]
        updates = []
        for (transform, index), pair, rate in zip(self.uses, factors, self.rates, strict=True):
            if observe:
                transform.observe(*pair)
            right, left = transform(*pair, index)
            updates.append((right, rate * left))
        return updates


# Training -------------------------------------------------------------------------------------------


Example = tuple[ScoredText, ScoredText, ScoredText]
"""An edit, a way to ask for it, and a text to be left alone."""


def draw(lm: LM, records: Sequence[EditRequest], rng: random.Random) -> Example:
    """One training example.

    The edit is asked for by its own prompt, three times in four, or a paraphrase: neighbours share the
    prompt's words, so trained on paraphrases alone it succeeds on them and not on its prompt. What is
    to be left alone is, half the time, the answer to a neighbour (same relation, same old object),
    otherwise a fact of another relation, scored throughout.
    """
    record = rng.choice(records)
    prompt = record.text if rng.random() < 0.75 else rng.choice(record.paraphrases)
    edit, asked = (ScoredText.of(lm, text, record.target_new) for text in (record.text, prompt))
    if rng.random() < 0.5:
        return edit, asked, ScoredText.of(lm, *rng.choice(record.neighbours))
    other = rng.choice([other for other in records if other.relation != record.relation])
    return edit, asked, ScoredText.of(lm, other.text, other.target_true, whole=True)


def drawable(lm: LM, record: EditRequest) -> list[ScoredText]:
    """Every text of a record that can be drawn."""
    edits = [(prompt, record.target_new) for prompt in (record.text, *record.paraphrases)]
    return [ScoredText.of(lm, *pair) for pair in (*edits, *record.neighbours, (record.text, record.target_true))]


def objective(upper: UpperBlocks, network: HyperNetwork, examples: Sequence[Example], hparams: Hparams) -> Tensor:
    """cedit * NLL(asked after the edit) + cloc * KL(before || after), mean over examples (eq. 4)."""
    edits, outers, locals_ = zip(*examples, strict=True)
    updates = network(upper.factors(edits)[0], observe=True)
    with torch.no_grad():
        before = upper.logprobs(locals_)
    after = upper.logprobs([*outers, *locals_], updates)
    asked, after = after.split([len(after) - len(before), len(before)])
    return (hparams.cedit * nll(asked, outers) + hparams.cloc * divergence(before, after, locals_)).mean()


def outcomes(lm: LM, record: EditRequest) -> list[ScoredText]:
    """The new object after the prompt, a paraphrase and a neighbour's prompt, then the true one after each."""
    prompts = record.text, record.paraphrases[0], record.neighbours[0][0]
    return [ScoredText.of(lm, prompt, o) for o in (record.target_new, record.target_true) for prompt in prompts]


@torch.no_grad()
def validate(upper: UpperBlocks, network: HyperNetwork, hparams: Hparams) -> dict[str, float]:
    """Single edits of the validation split: loss, and how many succeed.

    The loss is that of training, on the prompt, one paraphrase and the answer to one neighbour; success
    there is that of kedit/evaluation/success.py, teacher-forced.
    """
    texts = [outcomes(upper.lm, record) for record in bundled("validation")]
    upper.read([text for record in texts for text in record])
    losses, successes = [], []
    for start in range(0, len(texts), hparams.accumulate):
        columns = list(zip(*texts[start : start + hparams.accumulate], strict=True))
        updates = network(upper.factors(columns[0])[0])
        every, neighbours = [text for column in columns for text in column], columns[-1]
        before, after = upper.logprobs(neighbours), upper.logprobs(every, updates)
        new, true = nll(after, every).view(2, 3, -1)
        kl = divergence(before, after[-len(before) :], neighbours)
        losses.append(hparams.cedit * (new[0] + new[1]) / 2 + hparams.cloc * kl)
        successes.append(new < true)
    reliability, generalisation, broken = torch.cat(successes, 1).double().mean(1).tolist()
    loss = torch.cat(losses).mean().item()
    return {"loss": loss, "reliability": reliability, "generalisation": generalisation, "locality": 1 - broken}


# The editor -----------------------------------------------------------------------------------------


class MEND(TrainedEditor):
    """W gains rate * sum_t g~_t x~_t^T in the MLP projections of some blocks, from one gradient."""

    name = "mend"
    needs = ("down",)
    style = ("#cc79a7", "v", "-")
    Hparams = Hparams
    edit_hparams = ("accumulate_edits",)

    @classmethod
    def training(cls, lm: LM, hparams: Hparams) -> Training:
        """Single edits of the train split, ``accumulate`` a step, and single edits of the validation split."""
        upper, records = UpperBlocks(lm, hparams.layers), bundled("train")
        network = HyperNetwork(upper.modules, hparams).to(lm.device)

        def loss(rng: random.Random) -> Tensor:
            return objective(upper, network, [draw(lm, records, rng) for _ in range(hparams.accumulate)], hparams)

        return Training(
            tensors=network.state_dict(keep_vars=True),
            lr={name: hparams.lr_lr if name == "rates" else hparams.lr for name, _ in network.named_parameters()},
            loss=loss,
            # at once: last bits depend on which are read together
            begin=lambda: upper.read([text for record in records for text in drawable(lm, record)]),
            every=hparams.validate,
            clip=hparams.clip,
            validate=lambda: validate(upper, network, hparams),
        )

    def _prepare(self) -> None:
        self.network = HyperNetwork(projections(self.lm, self.hparams.layers), self.hparams).to(self.lm.device)
        self.network.load_state_dict(self.tensors(self.lm, self.hparams))

    @torch.no_grad()
    def _apply(self, request: EditRequest, edit: Edit) -> None:
        upper = UpperBlocks(self.lm, self.hparams.layers)
        names = [self.lm.anatomy.name(module) for module in upper.modules]
        if not self.hparams.accumulate_edits and self.lm.journal.edits:
            for name in names:
                edit.write(Restore(name))
        factors, losses = upper.factors([ScoredText.of(self.lm, request.text, request.target_new)])
        sizes = []
        for name, module, (right, left) in zip(names, upper.modules, self.network(factors), strict=True):
            live = (right[0] != 0).any(-1)
            left, right = left[0, live].T.contiguous(), right[0, live].T.contiguous()
            # |left right^T| from the small Gram matrices
            size = ((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt()
            sizes.append((size / matrix(module).norm().to(size)).item())
            edit.write(LowRank(name, left, right))
        edit.info |= {"loss": losses.item(), "relative_change": max(sizes)}
        if not torch.tensor([losses.item(), *sizes]).isfinite().all():
            raise EditFailed("the update is not finite")
