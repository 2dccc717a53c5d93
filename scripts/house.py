"""How the code is kept: what a reader of it stumbles over, counted, each with its goal and with the bound that is held.

    python scripts/house.py            # the table
    python scripts/house.py --places   # and where, row by row
    python scripts/house.py --json
    python scripts/house.py --check    # exit code 1 when a bound is passed

`BOUNDS` is the one place to tighten; tests/test_house.py holds those of the rows that are counted, not timed.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "outlierq"
sys.path.insert(0, str(ROOT))  # what is measured is the tree that this script stands in, whatever is installed

MANY_ARGUMENTS = 8
VAGUE = {"Any", "object"}
# Values with a shape, by the last name of their annotation.
TENSORS = {"Tensor", "ndarray", "InputStats", "BlockStats", "QuantTensor", "LogitSample", "Grid", "Move"}
# A shape in a docstring: [out, in], [n], [..., K], [] - or words for it.
SHAPE = re.compile(r"\[[\w\s.,<>=*/+^()-]*\]|\b(same shape|any shape|shapes? of|scalar|0-d|1-d|2-d)\b")
# What a format, a checkpoint or a decoded linear is called where it is asked for what it may lack.
PROBED = {"form", "format", "exporter", "checkpoint", "plain", "original", "original_of", "source", "linear"}
REPEATS = 5  # of what is timed; the best counts


@dataclass(frozen=True)
class Bound:
    """goal: where the row should be. held: what is checked now. at_least: more is better."""

    goal: float
    held: float
    unit: str = ""
    at_least: bool = False


BOUNDS = {
    "circles between files": Bound(0, 0),
    "files in the largest folder": Bound(15, 15),
    "functions with 8 or more arguments": Bound(8, 8),
    "functions that return Any or object": Bound(5, 5),
    "probes of formats and checkpoints": Bound(0, 0),
    "docstrings with shapes where there are tensors": Bound(90, 90, "%", at_least=True),
    "outlierq --help": Bound(0.4, 0.4, "s"),
    "import outlierq": Bound(0.1, 0.1, "s"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. places: where it could be better, "path:line name"."""

    name: str
    value: float
    places: tuple[str, ...] = ()

    @property
    def bound(self) -> Bound:
        """What is asked of it."""
        return BOUNDS[self.name]

    @property
    def holds(self) -> bool:
        """Whether the bound is kept that is held now."""
        return self.value >= self.bound.held if self.bound.at_least else self.value <= self.bound.held


@dataclass(frozen=True)
class Function:
    """A function somewhere in the package. owners: the classes and functions around it, outermost first."""

    path: Path
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owners: tuple[ast.AST, ...]

    @property
    def place(self) -> str:
        """Where it stands, below the folder of the package."""
        return f"{self.path.as_posix()}:{self.node.lineno} {self.node.name}"

    @property
    def arguments(self) -> list[ast.arg]:
        """All of them, but not the object that a method belongs to."""
        listed = self.node.args
        method = bool(self.owners) and isinstance(self.owners[-1], ast.ClassDef)
        static = any(isinstance(word, ast.Name) and word.id == "staticmethod" for word in self.node.decorator_list)
        positional = [*listed.posonlyargs, *listed.args][1 if method and not static else 0 :]
        return [*positional, *listed.kwonlyargs, *filter(None, (listed.vararg, listed.kwarg))]

    @property
    def public(self) -> bool:
        """Whether others may call it: neither it nor its class is private, and it is inside no function."""
        names = [self.node.name, *(getattr(owner, "name", "") for owner in self.owners)]
        return all(isinstance(o, ast.ClassDef) for o in self.owners) and not any(n.startswith("_") for n in names)

    @property
    def has_tensors(self) -> bool:
        """Whether an argument, or what is returned, is annotated as something with a shape."""
        return any(names_of(part) & TENSORS for part in [*(a.annotation for a in self.arguments), self.node.returns])

    @property
    def says_shapes(self) -> bool:
        """Whether its docstring gives a shape, or that of its class does."""
        return any(SHAPE.search(ast.get_docstring(node) or "") for node in (self.node, *self.owners))


def main() -> int:
    """Print the table; 1 when a bound is passed and `--check` asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--places", action="store_true", help="say where")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bound is passed")
    options = parser.parse_args()
    rows = [*counted_rows(), *timed_rows()]
    if options.json:
        print(json.dumps([asdict(row) | asdict(row.bound) | {"holds": row.holds} for row in rows], indent=1))
    else:
        print("\n".join(line for row in rows for line in lines_of(row, places=options.places)))
    return int(options.check and not all(row.holds for row in rows))


def lines_of(row: Row, *, places: bool) -> list[str]:
    """A row as text: value, goal, bound, and the places below it."""
    bound, sign = row.bound, "at least" if row.bound.at_least else "at most"
    head = f"{row.name:48} {row.value:g} {bound.unit}".ljust(60)
    held = "" if bound.held == bound.goal else f"; held: {bound.held:g}"
    line = f"{head} goal: {sign} {bound.goal:g}{held}{'' if row.holds else '  NOT HELD'}"
    return [line, *(f"    {place}" for place in row.places if places)]


def counted_rows(package: Path = PACKAGE) -> list[Row]:
    """The rows that need nothing to be run, of the package in this folder."""
    trees = {path.relative_to(package.parent): ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    functions = [function for path, tree in trees.items() for function in functions_in(path, tree)]
    circles = circles_in(package.name)
    largest, files = Counter(path.parent for path in trees if path.name != "__init__.py").most_common(1)[0]
    return [
        Row("circles between files", len(circles), tuple(" ".join(sorted(circle)) for circle in circles)),
        Row("files in the largest folder", files, (largest.as_posix(),)),
        count("functions with 8 or more arguments", functions, has_many_arguments),
        count("functions that return Any or object", functions, is_vague),
        probes(trees),
        shapes(functions),
    ]


def timed_rows() -> list[Row]:
    """What a user waits for. Seconds, the best of some runs: of a whole process, and inside one of the import alone."""
    clock = "import time; start = time.perf_counter(); import outlierq; end = time.perf_counter()"
    no_torch = "import sys; assert 'torch' not in sys.modules, 'import outlierq loads torch'"
    answers = [python("-c", f"{clock}; {no_torch}; print(end - start)") for _ in range(REPEATS)]
    waits = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        python("-m", "outlierq", "--help")
        waits.append(time.perf_counter() - start)
    imports = [float(answer) for answer in answers]
    return [Row("outlierq --help", round(min(waits), 3)), Row("import outlierq", round(min(imports), 3))]


def python(*words: str) -> str:
    """What a fresh interpreter prints, run in the tree that is measured."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def circles_in(package: str) -> list[frozenset[str]]:
    """The groups of modules that import each other, imports inside functions counted, those for annotations not.

    That a submodule loads the packages above it does not count: Python does that by itself.
    """
    import grimp

    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    circles = set()
    for module in graph.modules:
        circle = graph.find_upstream_modules(module) & graph.find_downstream_modules(module)
        if circle - {module}:
            circles.add(frozenset(circle | {module}))
    return sorted(circles, key=sorted)


def functions_in(path: Path, tree: ast.AST, owners: tuple[ast.AST, ...] = ()) -> Iterator[Function]:
    """Every function below a node of a file, nested ones too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Function(path, node, owners)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from functions_in(path, node, (*owners, node) if inside else owners)


def count(name: str, functions: list[Function], wrong: Callable[[Function], bool]) -> Row:
    """How many functions something is wrong with."""
    places = tuple(function.place for function in functions if wrong(function))
    return Row(name, len(places), places)


def has_many_arguments(function: Function) -> bool:
    """Eight or more; what a user may say, in a command or to a public function, is a list and stands aside."""
    said_by_users = "commands" in function.path.parts or function.path.as_posix() == "outlierq/api.py"
    return not said_by_users and len(function.arguments) >= MANY_ARGUMENTS


def is_vague(function: Function) -> bool:
    """Whether it says of what it returns only that it is something (or something or None)."""
    returns = function.node.returns
    parts = ast.unparse(returns).split(" | ") if returns is not None else []
    return any(part.removeprefix("typing.") in VAGUE for part in parts)


def probes(trees: dict[Path, ast.Module]) -> Row:
    """`hasattr(x, ...)` and `getattr(x, ..., default)` where x is, by its name, a format, a checkpoint or a linear."""
    places = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            asks = (node.func.id, len(node.args)) in {("hasattr", 2), ("getattr", 3)}
            if asks and last_name(node.args[0]).lstrip("_") in PROBED:
                places.append(f"{path.as_posix()}:{node.lineno} {ast.unparse(node)}")
    return Row("probes of formats and checkpoints", len(places), tuple(places))


def shapes(functions: list[Function]) -> Row:
    """Percent of the public functions with tensors whose docstring, or that of their class, says which shapes."""
    asked = [function for function in functions if function.public and function.has_tensors]
    silent = tuple(function.place for function in asked if not function.says_shapes)
    share = 100 * (1 - len(silent) / len(asked)) if asked else 100
    return Row("docstrings with shapes where there are tensors", round(share, 1), silent)


def last_name(node: ast.AST) -> str:
    """`form` of `self.form`, `exporter` of `exporter(name)`; "" of anything else."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def names_of(annotation: ast.AST | None) -> set[str]:
    """Every name in an annotation, `Tensor` of `torch.Tensor`."""
    return {last_name(node) for node in ast.walk(annotation)} if annotation is not None else set()


if __name__ == "__main__":
    sys.exit(main())
