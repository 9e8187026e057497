"""The shape of the house: what may import what, where imports stand, and how much code there is."""

import ast
import io
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import kedit

PACKAGE = kedit.ROOT / "kedit"
FLOORS = (
    ("kedit", "registry", "store", "workers"),
    ("data",),
    ("model",),
    ("editors", "evaluation"),
    ("study",),
    ("analysis",),
    ("__main__",),
)
"""From the ground up: a file may import from the floors below its own, and from its own room."""
PICO = (*FLOORS[0], "data", "pico")
"""What the pico family may import; only the command line imports it (all else through the registry)."""
LAZY = {
    "datasets": "seconds to import, and only benchmarks are read with it",
    "lm_eval": "seconds to import, and only asking benchmarks needs it",
    "distributed": "optional: only there for DASK=",
    "papermill": "seconds to import, and only `python -m kedit reproduce` needs it",
    "nbconvert": "seconds to import, and only `python -m kedit report` needs it",
    "nbformat": "as nbconvert",
    "traitlets": "as papermill",
    "transformers": "as torch",
    "huggingface_hub": "as torch",
    "torch": "drawing figures and listing must not wait for it (workers.py; elsewhere it is at the top)",
}
"""Libraries that a function may import, and why."""
LAZY_FILES = {
    "kedit.__main__": "each command imports what it needs: `python -m kedit list` must not wait for torch",
    "kedit.evaluation": "the Examiner needs lm_eval; whoever only looks up MEASURES or a benchmark's metadata does not",
}
"""Files whose functions may import anything, and why."""

Import = tuple[str, bool]
"""What is imported, and whether at the top of the file."""


def name(path: Path) -> str:
    """Dotted name of a file of the package."""
    return ".".join(path.relative_to(kedit.ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def statements(node: ast.AST, top: bool = True) -> Iterator[tuple[ast.stmt, bool]]:
    """Import statements below a node, those for type checkers apart."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top
        yield from statements(child, top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def imports(module: str) -> list[Import]:
    """Modules that a file imports; names of kedit's are cut to the file they are in."""
    found = []
    for statement, top in statements(TREES[module]):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            assert not statement.level, f"{module}: relative import"
            whole = [f"{statement.module}.{alias.name}" for alias in statement.names]
            names = [full if full in FILES else statement.module for full in whole]
        found += [(imported, top) for imported in names]
    return found


def room(module: str) -> str:
    """The package, or the file on the ground, that a module is or is in."""
    return module.split(".")[1] if "." in module else module


def lines(module: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, not a comment, not a docstring."""
    text, tree = FILES[module].read_text(), TREES[module]
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    documented = {n for node in strings for n in range(node.lineno, node.end_lineno + 1)}
    layout = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = [token for token in tokens if tokenize.tok_name[token.type] not in layout]
    return {n for token in code for n in range(token.start[0], token.end[0] + 1)} - documented


def test_imports_only_point_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for module in FILES:
        for imported in {imported for imported, _ in imports(module) if imported.split(".")[0] == "kedit"}:
            here, there = room(module), room(imported)
            if here == "pico":
                allowed = there in PICO
            elif there == "pico":
                allowed = here == "__main__"
            else:
                allowed = here == there or floor[there] < floor[here] or floor[here] == floor[there] == 0
            if not allowed:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_two_files_import_each_other():
    graph = {module: {other for other, _ in imports(module) if other in FILES} for module in FILES}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_imports_stand_at_the_top_but_for_heavy_libraries():
    wrong = []
    for module in FILES:
        for imported in [imported for imported, top in imports(module) if not top]:
            library = imported.split(".")[0]
            if library not in LAZY and module not in LAZY_FILES:
                wrong.append(f"{module} imports {imported} in a function")
    assert not wrong, "\n".join(wrong)


def test_every_function_fits_on_a_screen():
    wrong = []
    for module, tree in TREES.items():
        code = lines(module)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = len(code & set(range(node.lineno, node.end_lineno + 1)))
                if length > 50:
                    wrong.append(f"{module}.{node.name}: {length}")
    assert not wrong, "\n".join(wrong)


def test_the_package_does_not_grow():
    """The goal is 5,000 lines of code; whoever comes below lowers the bar here."""
    assert sum(len(lines(module)) for module in FILES) <= 8242
