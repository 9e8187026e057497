"""``python -m kedit``: run a parameter file, draw, measure tables, tune and train.

User errors end with one sentence and exit code 2. Every command imports what it needs: ``list`` must not wait for
torch.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kedit
from kedit import KeditError
from kedit.analysis.questions import QUESTIONS
from kedit.registry import unknown
from kedit.store import disk, runs_folder, write_atomic
from kedit.workers import log_to_stderr

if TYPE_CHECKING:
    from kedit.study.params import Params


def parameter_files() -> list[Path]:
    """Every committed parameter file of a run, question by question."""
    return [path for rq in QUESTIONS for path in sorted((kedit.ROOT / "params" / rq).glob("*.yaml"))]


def _made(*paths: Path) -> None:
    for path in paths:
        print("made", os.path.relpath(path))


def _params(args: argparse.Namespace) -> "Params":
    """The run that a command names: a file; or a question and a name, ``question/name``, or a question's default."""
    from kedit.study.notebook import changed
    from kedit.study.params import Params

    if args.run.endswith(".yaml"):
        file = Params.read(args.run)
    else:
        names = args.name or args.run
        rq, name = names.split("/", 1) if "/" in names else (args.run, args.name)
        if rq not in QUESTIONS:
            raise unknown("question", rq, QUESTIONS)
        file = Params.find(rq, name or QUESTIONS[rq].default)
    if file.rq not in QUESTIONS:
        raise unknown(f"{args.run} stands in no question's folder: question", file.rq, QUESTIONS)
    return changed(file, {key: value for key, value in vars(args).items() if key in ("edits", "limit", "orders")})


def _run(args: argparse.Namespace) -> "Params":
    """run a parameter file, or what is left of it"""
    from kedit.study.plan import check
    from kedit.study.run import run

    if args.workers is not None and args.workers < 1:
        raise KeditError(f"--workers is {args.workers}; it must be a number of processes from 1 up.")
    params = _params(args)
    check(params)
    run(params, args.workers, args.dask)
    return params


KERNEL = (
    "from ipykernel import kernelapp; thread = kernelapp.IOPubThread; "
    "kernelapp.IOPubThread = lambda socket, pipe, **more: thread(socket, **more); kernelapp.launch_new_instance()"
)
"""Starts a notebook's kernel without the port at which ipykernel's takes what other processes print."""


def _kernels() -> type:
    """What starts kernels, all by this Python."""
    from jupyter_client import AsyncKernelManager

    class Kernels(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
            return [sys.executable, "-P", "-c", KERNEL, "-f", self.connection_file, *(extra_arguments or ())]

    return Kernels


def _reproduce(args: argparse.Namespace) -> None:
    """run, and execute the question's notebook: the whole way to a figure"""
    import nbformat
    import papermill
    from traitlets.config import Config

    from kedit.study.notebook import folder_of

    params = _run(args)
    notebook = f"{QUESTIONS[params.rq].notebook}.ipynb"
    folder = folder_of(params, "run")
    try:
        executed = papermill.execute_notebook(
            kedit.ROOT / "notebooks" / notebook,
            None,
            parameters={**params.values(), "name": params.name, "source": "run"},
            kernel_name="python3",
            cwd=Path.cwd(),  # from where relative paths of the parameter file are meant
            progress_bar=False,
            config=Config(
                {
                    "KernelManager": {"transport": "ipc"},  # through files: no port, no loopback needed
                    "NotebookClient": {
                        "kernel_manager_class": _kernels(),
                        "extra_arguments": ["--log-level=CRITICAL"],  # a stopped one has no last words
                    },
                }
            ),
        )
    except (papermill.exceptions.PapermillExecutionError, RuntimeError) as error:  # a cell raised; the kernel died
        reason = getattr(error, "evalue", error)
        raise KeditError(f"{notebook} was not executed to its end ({reason}); run the same command again.") from error
    for part in (executed, *executed.cells):  # paths and times of this machine, which are no result
        part.metadata.pop("papermill", None)
        part.metadata.pop("execution", None)
    for cell in executed.cells:  # papermill's own has a random one
        cell.id = "given" if "injected-parameters" in cell.metadata.get("tags", ()) else cell.id
    write_atomic(folder / notebook, nbformat.writes(executed).encode())
    _made(*sorted(folder.iterdir()))


def _plan(args: argparse.Namespace) -> None:
    """say what a run would do, cost and need"""
    from kedit.analysis.power import sentence
    from kedit.study.plan import plan

    params = _params(args)
    print(plan(params), sentence(params), sep="\n")


def _verify(args: argparse.Namespace) -> None:
    """compare a fresh run with the committed reference"""
    from kedit.analysis.report import verify

    print(verify(_params(args)))


def _publish(args: argparse.Namespace) -> None:
    """make the last run the reference under figures/"""
    from kedit.analysis.report import commit

    _made(*commit(_params(args)))


def _list(args: argparse.Namespace) -> None:
    """list the parameter files"""
    for path in parameter_files():
        first = path.read_text().splitlines()[0].lstrip("# ")
        print(f"make {path.parent.name} PARAMS={path.stem:<20} {first}")


def _figures(args: argparse.Namespace) -> None:
    """redraw all from committed cells"""
    from kedit.analysis.report import redraw

    _made(*redraw())


def _report(args: argparse.Namespace) -> None:
    """render the committed notebooks, and a page of all figures and verdicts, as HTML"""
    from kedit.analysis.report import html

    _made(*html(runs_folder() / "report"))


def _tables(args: argparse.Namespace) -> None:
    """measure the README's tables and write them into it"""
    from kedit.analysis import readme

    readme.update_readme(args.names or list(readme.TABLES))


def _tune(args: argparse.Namespace) -> None:
    """find a method's hyper-parameters for a model, on the validation split: the block for params/methods"""
    from kedit.study.tune import tune

    print(tune(args.method, args.model, args.settings, args.trials, args.records, args.set, args.seed))


def _train(args: argparse.Namespace) -> None:
    """train a method that needs it, and write what it learned to kedit/data"""
    from kedit.editors import kind_of, make_hparams
    from kedit.editors.protocol import committed

    kind = kind_of(args.method)
    if not kind.trained:
        raise KeditError(f"method {kind.name!r} needs no training.")
    lm = kedit.load(args.model)
    path = committed(kind.name, lm.name)
    kind.train(lm, make_hparams(kind, args.model), artefact=path)
    _made(path)


def _pico(args: argparse.Namespace) -> None:
    """train the pico models that are not there yet"""
    from kedit.pico.train import make

    _made(*make())


def _number(text: str) -> int | str | None:
    """A number, or what the check of the parameters will refuse by name."""
    return None if text == "null" else int(text) if text.isdecimal() else text


def _numbers(text: str) -> list[int | str | None]:
    return [_number(part.strip()) for part in text.split(",")]


NOT_GIVEN = {"default": argparse.SUPPRESS}
RUN = {
    "run": {"help": "a parameter file, a question such as rq1, or rq1/name"},
    "name": {"nargs": "?", "help": "of the question's parameter file; by default its default"},
    "--edits": {"type": _numbers, "help": "such as 0,5: instead of what the file says, as are"} | NOT_GIVEN,
    "--limit": {"type": _number, "help": "items of each benchmark, null for all, and"} | NOT_GIVEN,
    "--orders": {"type": _numbers, "help": "such as 0,1"} | NOT_GIVEN,
}
WORKERS = {
    "--workers": {"type": int, "help": "processes at once; by default one a core"},
    "--dask": {"metavar": "ADDRESS", "help": "have the workers of this Dask scheduler do it"},
}
COMMANDS: dict[Any, dict[str, dict[str, Any]]] = {
    _run: RUN | WORKERS,
    _reproduce: RUN | WORKERS,
    _plan: RUN,
    _verify: RUN,
    _publish: RUN,
    _list: {},
    _figures: {},
    _report: {},
    _tables: {"names": {"nargs": "*"}},
    _tune: {
        "method": {"help": "such as memit"},
        "model": {"help": "its name, hub id or folder"},
        "settings": {"nargs": "*", "help": "such as layer=[3,5,7]: what to try, instead of what the method declares"},
        "--trials": {"type": int, "default": 16, "help": "settings that are tried, the default among them"},
        "--records": {"type": int, "default": 60, "help": "for the best settings; a third of them for the rest"},
        "--set": {"help": "the edit set; by default the bundled one, or for pico models theirs"},
        "--seed": {"type": int, "default": 0, "help": "of the settings drawn"},
    },
    _train: {"method": {"help": "such as mend"}, "--model": {"default": "smollm2-135m-instruct"}},
    _pico: {},
}
"""Each command's function, named as it is and helped by its docstring, with its arguments."""
OF_THE_REPOSITORY = (_figures, _publish, _tables, _train)
"""Those that write to it."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kedit", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function, arguments in COMMANDS.items():
        command = commands.add_parser(function.__name__.strip("_"), help=function.__doc__)
        for name, options in arguments.items():
            command.add_argument(name, **options)
        command.set_defaults(function=function)
    args = parser.parse_args(argv)
    log_to_stderr()
    try:
        if kedit.INSTALLED and args.function in OF_THE_REPOSITORY:
            raise KeditError("this command writes to kedit's repository; run it in a checkout.")
        with disk():  # what writes figures and notebooks
            args.function(args)
    except KeditError as error:
        print(f"kedit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("kedit: stopped; run the same command again, it goes on where it was.", file=sys.stderr)
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    return 0


def _stop(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
