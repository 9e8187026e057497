"""``python -m kedit``: run a parameter file, draw, measure tables, scan and train.

User errors end with one sentence and exit code 2.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

import kedit
from kedit import KeditError
from kedit.store import runs_folder
from kedit.workers import quiet_libraries


def _run(args: argparse.Namespace) -> None:
    from kedit.study.params import Params
    from kedit.study.plan import check
    from kedit.study.run import run

    params = Params.read(args.params)
    check(params)
    run(params, workers=args.workers, scheduler=args.dask).save(runs_folder() / params.rq / params.name)


def _notebook(args: argparse.Namespace) -> None:
    import papermill
    import yaml
    from traitlets.config import Config

    from kedit.analysis.questions import QUESTIONS
    from kedit.study.params import Params

    params = Params.read(args.params)
    notebook = kedit.ROOT / "notebooks" / f"{QUESTIONS[params.rq]}.ipynb"
    if not notebook.exists():
        raise KeditError(f"the notebook {notebook.name} is not written yet; the results are in runs/{params.rq}.")
    executed = runs_folder() / params.rq / params.name / notebook.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    if os.name == "posix":  # talk to the kernel through files: no port, no loopback interface needed
        config.KernelManager.transport = "ipc"
    papermill.execute_notebook(
        notebook,
        executed,
        parameters={**yaml.safe_load(args.params.read_text()), "name": params.name, "source": "run"},
        kernel_name="python3",
        cwd=kedit.ROOT / "notebooks",
        progress_bar=False,
        config=config,
    )
    for path in (executed, *sorted((kedit.ROOT / "figures" / params.rq / params.name).iterdir())):
        print("made", os.path.relpath(path, kedit.ROOT))


def parameter_files() -> list[Path]:
    """Every committed parameter file of a run, question by question."""
    from kedit.analysis.questions import QUESTIONS

    return [path for rq in QUESTIONS for path in sorted((kedit.ROOT / "params" / rq).glob("*.yaml"))]


def _plan(args: argparse.Namespace) -> None:
    from kedit.study.params import Params
    from kedit.study.plan import plan

    print(plan(Params.read(args.params)))


def _list(args: argparse.Namespace) -> None:
    for path in parameter_files():
        first = path.read_text().splitlines()[0].lstrip("# ")
        print(f"make {path.parent.name} PARAMS={path.stem:<20} {first}")


def _tables(args: argparse.Namespace) -> None:
    from kedit.analysis import tables as report

    readme = (kedit.ROOT / "README.md").read_text()
    report.update_readme(args.names or [name for name in report.TABLES if f"<!-- table {name} -->" in readme])


def _scan(args: argparse.Namespace) -> None:
    from kedit.analysis import single

    print(single.scan(args.method, args.settings, args.records, args.model).to_string(index=False))


def _train(args: argparse.Namespace) -> None:
    from kedit.editors import kind_of, make_hparams
    from kedit.editors.protocol import committed

    kind = kind_of(args.method)
    if not kind.trained:
        raise KeditError(f"method {kind.name!r} needs no training.")
    lm = kedit.load(args.model)
    path = committed(kind.name, lm.name)
    kind.train(lm, make_hparams(kind, args.model), artefact=path)
    print("made", os.path.relpath(path, kedit.ROOT))


def _pico(args: argparse.Namespace) -> None:
    from kedit.pico.train import make

    for path in make(args.names):
        print("made", os.path.relpath(path, kedit.ROOT))


def _figures(args: argparse.Namespace) -> None:
    from kedit.analysis.report import redraw

    for path in redraw():
        print(path.relative_to(kedit.ROOT))


def _report(args: argparse.Namespace) -> None:
    from kedit.analysis.report import html

    for path in html(runs_folder() / "report"):
        print("made", os.path.relpath(path, kedit.ROOT))


def _verify(args: argparse.Namespace) -> None:
    from kedit.analysis.report import differences
    from kedit.study.params import Params
    from kedit.study.results import Results

    params = Params.read(args.params)
    fresh, committed = (
        Results.load(params, top / params.rq / params.name) for top in (runs_folder(), kedit.ROOT / "figures")
    )
    if lines := differences(fresh, committed):
        raise KeditError(f"{len(lines)} rows differ from the committed reference, first: {lines[0]}")
    print(f"{params.rq}/{params.name}: the fresh run agrees with the committed reference.")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="kedit", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function, text in (
        ("run", _run, "run a parameter file, or what is left of it"),
        ("plan", _plan, "say what a run would do, cost and need"),
        ("notebook", _notebook, "execute the question's notebook on a finished run, and draw"),
        ("verify", _verify, "compare a fresh run with the committed reference"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("params", type=Path)
        if name == "run":
            command.add_argument("--workers", type=int, help="processes at once; by default one a core")
            command.add_argument("--dask", metavar="ADDRESS", help="have the workers of this Dask scheduler do it")
        command.set_defaults(function=function)
    commands.add_parser("list", help="list the parameter files").set_defaults(function=_list)
    commands.add_parser("figures", help="redraw all from committed cells").set_defaults(function=_figures)
    commands.add_parser(
        "report", help="render the committed notebooks, and a page of all figures and verdicts, as HTML"
    ).set_defaults(function=_report)
    command = commands.add_parser("tables", help="measure the README's tables and write them into it")
    command.add_argument("names", nargs="*")
    command.set_defaults(function=_tables)
    command = commands.add_parser("scan", help="try hyper-parameters on the validation split")
    command.add_argument("method")
    command.add_argument("settings", nargs="*", help="such as layer=[3,5,7]")
    command.add_argument("--records", type=int, default=20)
    command.add_argument("--model", default="smollm2-135m-instruct")
    command.set_defaults(function=_scan)
    command = commands.add_parser("train", help="train a method that needs it, and write what it learned to kedit/data")
    command.add_argument("method", help="such as mend")
    command.add_argument("--model", default="smollm2-135m-instruct")
    command.set_defaults(function=_train)
    command = commands.add_parser("pico", help="train the pico models anew")
    command.add_argument("names", nargs="*")
    command.set_defaults(function=_pico)
    args = parser.parse_args(argv)

    quiet_libraries()
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        args.function(args)
    except KeditError as error:
        print(f"kedit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kedit: interrupted; run the same command again to go on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
