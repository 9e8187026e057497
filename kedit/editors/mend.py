"""MEND: a hyper-network turns the gradient of one edit into a better update.

Mitchell et al., "Fast Model Editing at Scale", 2022. The gradient of a projection W (out, in) is a sum
of rank-one terms, sum_t g_t x_t^T over the tokens t of the edit text: x is its input, g the gradient of
its output. Small networks, one for each shape of W, map each pair (x, g) to (x~, g~), and W gains
rate * sum_t g~_t x~_t^T (section 3.1). They are trained once, on single edits of the unedited model.
Neither a dense gradient nor an edited copy of W is ever formed, here or in training, and blocks below
the lowest edited one run once a text.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from kedit import KeditError
from kedit.data import facts
from kedit.data.facts import bundled
from kedit.data.requests import EditRequest, spaced
from kedit.editors.protocol import Editor, committed
from kedit.model.anatomy import matrix
from kedit.model.forward import capture, pad, skip_blocks, stop_after
from kedit.model.journal import Edit, EditFailed, LowRank, Restore
from kedit.model.lm import LM
from kedit.store import cache_folder, write_atomic

log = logging.getLogger(__name__)

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

    layers: tuple[int, ...]
    rank: int = 1920
    edit_lr: float = 1e-4
    accumulate_edits: bool = True
    steps: int = 10_000
    lr: float = 1e-6
    lr_lr: float = 1e-4
    cedit: float = 0.1
    cloc: float = 1.0
    accumulate: int = 10
    clip: float = 100.0
    validate: int = 100
    seed: int = 42


BATCH = 32
"""Texts read together."""

# The model under edit -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Token ids, of which those from ``start`` on are scored."""

    ids: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, lm: LM, prompt: str, target: str, whole: bool = False) -> "Text":
        """A prompt and its target, joined as ids; the target is scored, or the ``whole`` text."""
        head = (*lm.begin, *lm.encode(prompt))
        return cls((*head, *lm.encode(spaced(target, prompt))), max(1, len(lm.begin)) if whole else len(head))


class Upper:
    """The model from the lowest edited block up; what enters that block is read once a text, and kept."""

    def __init__(self, lm: LM, layers: Sequence[int]):
        if min(layers) < 1:
            raise KeditError("hyper-parameters of mend: layers must be 1 or above.")
        self.lm, self.below = lm, min(layers) - 1
        parts = [part for n in sorted(layers) for part in (lm.anatomy.gate(n), lm.anatomy.up(n), lm.anatomy.down(n))]
        self.modules: list[nn.Module] = [part for part in parts if part is not None]
        self._states: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def read(self, texts: Sequence[Text]) -> None:
        """Run the blocks below on texts not yet read, those of like length together."""
        missing = sorted({text.ids for text in texts} - self._states.keys(), key=lambda ids: (len(ids), ids))
        block = self.lm.anatomy.blocks[self.below]
        starts = range(0, len(missing), BATCH)
        for start in tqdm(starts, desc="reading MEND's texts", unit="batch", disable=len(starts) < 10):
            some = missing[start : start + BATCH]
            ids, mask = pad(some, self.lm.device)
            with capture(self.lm, {"block": block}, inputs=False) as seen, stop_after(block):
                self.lm.anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False)
            self._states |= {one: s[: len(one)].clone() for one, s in zip(some, seen["block"], strict=True)}

    def say(self, texts: Sequence[Text], updates: Factors = ()) -> Tensor:
        """Log-probabilities (N, vocabulary) where the texts' N scored tokens are predicted.

        With updates for B edits, text i is read by the model with update i modulo B.
        """
        self.read(texts)
        ids, mask = pad([text.ids for text in texts], self.lm.device)
        with self._updated(updates, len(texts)), skip_blocks(self.lm.anatomy.blocks, self.below) as injected:
            injected.states = nn.utils.rnn.pad_sequence([self._states[text.ids] for text in texts], batch_first=True)
            hidden = self.lm.anatomy.base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = [i for i, text in enumerate(texts) for _ in text.ids[text.start :]]
        places = [place for text in texts for place in range(text.start - 1, len(text.ids) - 1)]
        return self.lm.logits(hidden[rows, places]).log_softmax(-1)

    @contextmanager
    def _updated(self, updates: Factors, texts: int) -> Iterator[None]:
        """Within the block, projections compute with W + sum_t g~_t x~_t^T, each text with its own sum."""

        def adding(module: nn.Module, right: Tensor, left: Tensor):
            place = next(module.parameters()).device
            right, left = (factor.repeat(texts // len(factor), 1, 1).to(place) for factor in (right, left))
            return lambda module, args, output: output + (args[0].float() @ right.mT @ left).to(output)

        with ExitStack() as stack:
            for module, (right, left) in zip(self.modules, updates, strict=False):
                stack.callback(module.register_forward_hook(adding(module, right, left)).remove)
            yield

    def factors(self, texts: Sequence[Text]) -> tuple[Factors, Tensor]:
        """The projections' inputs x and output gradients g, for each text's mean NLL; and those losses (B,).

        For each text the gradient of W is sum_t g_t x_t^T; padding has g = 0.
        """
        seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def record(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if not output.requires_grad:  # the lowest projections: the graph begins here
                output.requires_grad_()
            seen[module] = args[0].detach(), output

        with ExitStack() as stack, torch.enable_grad():
            for module in self.modules:
                stack.callback(module.register_forward_hook(record).remove)
            losses = nll(self.say(texts), texts)
            inputs, outputs = zip(*(seen[module] for module in self.modules), strict=True)
            gradients = torch.autograd.grad(losses.sum(), outputs)
        factors = [
            tuple(one.to(self.lm.device).float() for one in pair) for pair in zip(inputs, gradients, strict=True)
        ]
        return factors, losses.detach()


def text_means(values: Tensor, texts: Sequence[Text]) -> Tensor:
    """Mean over each text's scored tokens: (N,) -> (B,)."""
    return torch.stack([part.mean() for part in values.split([len(text.ids) - text.start for text in texts])])


def nll(said: Tensor, texts: Sequence[Text]) -> Tensor:
    """Mean negative log-likelihood of each text's scored tokens: (N, vocabulary) -> (B,)."""
    labels = torch.tensor([token for text in texts for token in text.ids[text.start :]], device=said.device)
    return text_means(-said.gather(1, labels[:, None])[:, 0], texts)


def divergence(before: Tensor, after: Tensor, texts: Sequence[Text]) -> Tensor:
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
    def observe(self, rows: Tensor) -> None:
        """Merge rows (N, in + out) into the running moments (Chan's form of Welford's)."""
        rows, before = rows.double(), self.count.clone()
        self.count += len(rows)
        away = rows.mean(0) - self.mean
        self.mean += away * len(rows) / self.count
        self.squares += (rows - rows.mean(0)).square().sum(0) + away.square() * before * len(rows) / self.count

    def forward(self, rows: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Raw rows (N, in + out) -> x~ (N, in), g~ (N, out)."""
        deviation = (self.squares / (self.count - 1).clamp(min=1)).sqrt() + 1e-7
        z = ((rows - self.mean) / deviation).float()
        for layer in self.layers:
            z = layer(z, index)
        return z.split(self.widths, -1)


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
        self.uses = [(f"{o}x{i}", shapes[:n].count((o, i))) for n, (o, i) in enumerate(shapes)]

    def forward(self, factors: Factors, observe: bool = False) -> Factors:
        """(x, g) -> (x~, rate * g~); rows where x or g is all zero give none. ``observe`` updates the moments."""
        live = [((x != 0).any(-1) & (g != 0).any(-1)).nonzero(as_tuple=True) for x, g in factors]
        rows = [torch.cat([x[where], g[where]], -1) for (x, g), where in zip(factors, live, strict=True)]
        if observe:
            for (shape, _), some in zip(self.uses, rows, strict=True):
                self.transforms[shape].observe(some)
        updates = []
        for (x, g), where, some, (shape, index), rate in zip(factors, live, rows, self.uses, self.rates, strict=True):
            right, left = self.transforms[shape](some, index)
            updates.append(
                (torch.zeros_like(x).index_put(where, right), torch.zeros_like(g).index_put(where, rate * left))
            )
        return updates


# Training -------------------------------------------------------------------------------------------


Drawn = tuple[Text, Text, Text]
"""An edit, a way to ask for it, and a text to be left alone."""


class Draws:
    """Training examples drawn from records.

    The edit is asked for by its own prompt, three times in four, or a paraphrase: neighbours share the
    prompt's words, so trained on paraphrases alone it succeeds on them and not on its prompt. What is
    to be left alone is, half the time, the answer to a neighbour (same relation, same old object),
    otherwise a fact of another relation, scored throughout.
    """

    def __init__(self, lm: LM, records: Sequence[EditRequest]):
        self.records = records
        self.edits = [Text.of(lm, r.text, r.target_new) for r in records]
        self.outers = [[Text.of(lm, prompt, r.target_new) for prompt in r.paraphrases] for r in records]
        self.neighbours = [[Text.of(lm, *pair) for pair in r.neighbours] for r in records]
        self.facts = [Text.of(lm, r.text, r.target_true, whole=True) for r in records]

    def texts(self) -> list[Text]:
        """Every text that can be drawn."""
        return [*self.edits, *self.facts, *(text for texts in (*self.outers, *self.neighbours) for text in texts)]

    def draw(self, rng: random.Random) -> Drawn:
        """One example."""
        index = rng.randrange(len(self.records))
        edit = self.edits[index]
        outer = edit if rng.random() < 0.75 else rng.choice(self.outers[index])
        if rng.random() < 0.5:
            local = rng.choice(self.neighbours[index])
        else:
            own = self.records[index].relation
            local = self.facts[rng.choice([n for n, record in enumerate(self.records) if record.relation != own])]
        return edit, outer, local


def objective(upper: Upper, network: HyperNetwork, drawn: Sequence[Drawn], hparams: Hparams) -> Tensor:
    """cedit * NLL(asked after the edit) + cloc * KL(before || after), mean over draws (eq. 4)."""
    edits, outers, others = zip(*drawn, strict=True)
    updates = network(upper.factors(edits)[0], observe=True)
    with torch.no_grad():
        before = upper.say(others)
    after = upper.say([*outers, *others], updates)
    said, now = after.split([len(after) - len(before), len(before)])
    return (hparams.cedit * nll(said, outers) + hparams.cloc * divergence(before, now, others)).mean()


@torch.no_grad()
def validate(upper: Upper, network: HyperNetwork, hparams: Hparams) -> dict[str, float]:
    """Single edits of the validation split: loss, and how many succeed.

    The loss is that of training, on the prompt, one paraphrase and the answer to one neighbour; success
    there is that of kedit/success.py, teacher-forced.
    """
    records = bundled("validation")
    asked = [(r.text, r.paraphrases[0], r.neighbours[0][0]) for r in records]
    said = [(r.target_new, r.target_true) for r in records]
    # (record, said, asked)
    texts = [
        [[Text.of(upper.lm, prompt, target) for prompt in prompts] for target in targets]
        for prompts, targets in zip(asked, said, strict=True)
    ]
    upper.read([text for record in texts for row in record for text in row])
    losses, successes = [], []
    for start in range(0, len(records), hparams.accumulate):
        some = texts[start : start + hparams.accumulate]
        every = [record[target][prompt] for target in range(2) for prompt in range(3) for record in some]
        neighbours = every[-len(some) :]
        updates = network(upper.factors(every[: len(some)])[0])
        before, after = upper.say(neighbours), upper.say(every, updates)
        new, true = nll(after, every).view(2, 3, -1)
        kl = divergence(before, after[-len(before) :], neighbours)
        losses.append(hparams.cedit * (new[0] + new[1]) / 2 + hparams.cloc * kl)
        successes.append(new < true)
    reliability, generalisation, broken = torch.cat(successes, 1).double().mean(1).tolist()
    return {
        "loss": torch.cat(losses).mean().item(),
        "reliability": reliability,
        "generalisation": generalisation,
        "locality": 1 - broken,
    }


def settings(hparams: Hparams) -> str:
    """Hash of what training depends on besides the model: its settings and the facts."""
    values = {name: value for name, value in asdict(hparams).items() if name != "accumulate_edits"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode() + facts.BUNDLED.read_bytes()).hexdigest()[:16]


def identity(lm: LM, hparams: Hparams) -> dict[str, str]:
    """What a trained network is known by."""
    return {"model": lm.fingerprint, "settings": settings(hparams)}


def _folder(lm: LM, hparams: Hparams) -> Path:
    return cache_folder().joinpath("mend", *identity(lm, hparams).values())


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # one key of metadata: safetensors writes several in any order, and the same training must give the same bytes
    write_atomic(path, safetensors.torch.save(tensors, {"mend": json.dumps(about, sort_keys=True)}))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["mend"])  # noqa: SIM118


class Run:
    """Training under way: all that a checkpoint holds."""

    def __init__(self, upper: Upper, hparams: Hparams):
        self.network = HyperNetwork(upper.modules, hparams).to(upper.lm.device)
        rest = [parameter for name, parameter in self.network.named_parameters() if name != "rates"]
        # one Adam with two groups is an Adam for the networks and another for the rates
        groups = [{"params": rest, "lr": hparams.lr}, {"params": [self.network.rates], "lr": hparams.lr_lr}]
        self.optimiser = torch.optim.Adam(groups)
        self.best: dict[str, Tensor] = {}
        self.step, self.least = 0, float("inf")

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam/{index}/{name}": tensor for name, tensor in moments.items()}
        _save(path, tensors, {"step": self.step, "least": self.least})

    def load(self, path: Path) -> None:
        """Go on from the checkpoint."""
        tensors, about = _load(path)
        self.step, self.least = about["step"], about["least"]
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.rpartition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.network.load_state_dict(parts.pop("network"))
        self.best = parts.pop("best", {})
        state = {int(part.removeprefix("adam/")): moments for part, moments in parts.items()}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})


def train(lm: LM, hparams: Hparams, *, artefact: Path | None = None, fresh: bool = False) -> HyperNetwork:
    """Train a hyper-network on the bundled facts; killed and started again, it goes on to the same result.

    A step's examples depend on the seed and its number alone. What is returned is the state with the
    least validation loss (``validate``), also kept in the cache by model and settings.

    Args:
        artefact: write the result to this file as well.
        fresh: begin anew, whatever the cache holds.

    Raises:
        RuntimeError: the model has edits; MEND is trained on the unedited model.
        KeditError: the training diverged.
    """
    if lm.journal.edits:
        raise RuntimeError("MEND is trained on the unedited model; undo the edits first")
    checkpoint = _folder(lm, hparams) / "checkpoint.safetensors"
    upper, draws = Upper(lm, hparams.layers), Draws(lm, bundled("train"))
    run = Run(upper, hparams)
    if checkpoint.exists() and not fresh:
        run.load(checkpoint)
    if run.step < hparams.steps:
        upper.read(draws.texts())  # all at once: the last bits depend on which texts are read together
    with tqdm(total=hparams.steps, initial=run.step, desc="training MEND", unit="step", mininterval=1) as bar:
        while run.step < hparams.steps:
            rng = random.Random(f"{hparams.seed}/{run.step}")
            drawn = [draws.draw(rng) for _ in range(hparams.accumulate)]
            for group, rate in zip(run.optimiser.param_groups, (hparams.lr, hparams.lr_lr), strict=True):
                group["lr"] = rate * (1 - run.step / hparams.steps)
            run.optimiser.zero_grad()
            loss = objective(upper, run.network, drawn, hparams)
            loss.backward()
            nn.utils.clip_grad_norm_(run.network.parameters(), hparams.clip)
            run.optimiser.step()
            run.step += 1
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
            if run.step % hparams.validate == 0 or run.step == hparams.steps:
                found = validate(upper, run.network, hparams)
                log.info("MEND, step %d, validation: %s", run.step, json.dumps(found))
                if found["loss"] < run.least:
                    run.least = found["loss"]
                    run.best = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
                run.save(checkpoint)
    if not run.best:
        raise KeditError("training MEND diverged; lower lr and lr_lr in params/methods/mend.yaml.")
    run.network.load_state_dict(run.best)
    for path in filter(None, (checkpoint.with_name("network.safetensors"), artefact)):
        _save(path, run.best, identity(lm, hparams))
    return run.network


def artefact_path(lm: LM) -> Path:
    """Where a model's committed hyper-network is, if it has one."""
    return committed("mend", lm.name)


def trained(lm: LM, hparams: Hparams) -> HyperNetwork:
    """The hyper-network for a model and settings: committed, or in the cache, or trained now."""
    for path in (artefact_path(lm), _folder(lm, hparams) / "network.safetensors"):
        if path.exists():
            tensors, about = _load(path)
            if about == identity(lm, hparams):
                network = HyperNetwork(Upper(lm, hparams.layers).modules, hparams).to(lm.device)
                network.load_state_dict(tensors)
                return network
            log.warning("%s was trained for another model, other settings or other facts", path)
    return train(lm, hparams)


# The editor -----------------------------------------------------------------------------------------


class MEND(Editor):
    """W gains rate * sum_t g~_t x~_t^T in the MLP projections of some blocks, from one gradient."""

    name = "mend"
    trained = True
    Hparams = Hparams

    def key(self) -> dict[str, Any]:
        """What the edits depend on, the facts trained on included."""
        return {**super().key(), "training": settings(self.hparams)}

    def _prepare(self) -> None:
        self.network = trained(self.lm, self.hparams)

    def _apply(self, request: EditRequest, edit: Edit) -> None:
        lm = self.lm
        upper = Upper(lm, self.hparams.layers)
        names = [lm.anatomy.name(module) for module in upper.modules]
        if not self.hparams.accumulate_edits and lm.journal.edits:
            for name in names:
                edit.write(Restore(name))
        factors, losses = upper.factors([Text.of(lm, request.text, request.target_new)])
        with torch.no_grad():
            updates = self.network(factors)
        changes, sizes = [], []
        for name, module, (right, left) in zip(names, upper.modules, updates, strict=True):
            live = (right[0] != 0).any(-1)
            left, right = left[0, live].T.contiguous(), right[0, live].T.contiguous()
            changes.append(LowRank(name, left, right))
            # |left right^T| from the small Gram matrices
            size = ((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt()
            sizes.append((size / matrix(module).norm().to(size)).item())
        edit.info |= {"loss": losses.item(), "relative_change": max(sizes)}
        if not torch.tensor([losses.item(), *sizes]).isfinite().all():
            raise EditFailed("the update is not finite")
        for change in changes:
            edit.write(change)
