"""The house rules: imports go down only, nothing heavy happens at import, and no file outgrows its room."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

FLOORS = ["kernels", "engine", "convert", "tools"]
SOURCES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


def imported_modules(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """Dotted names inside the package that `path` imports: anywhere in it, or only when it is imported itself."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            yield from (name.removeprefix("auricle.") for name in names if name.startswith("auricle."))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).parts[:-1]
                module = ".".join((*package[: len(package) - node.level + 1], node.module or "")).strip(".")
            elif (node.module or "").startswith("auricle"):
                module = node.module.removeprefix("auricle").strip(".")
            else:
                continue
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The module file that the dotted import `name` reaches."""
    for candidate in (name, name.rpartition(".")[0]):
        path = ROOT / candidate.replace(".", "/")
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return candidate
    return None


def edges(*, at_import: bool = False) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        targets = {module_of(imported) for imported in imported_modules(path, at_import=at_import)}
        graph[name] = targets - {None, name}
    return graph


def test_the_walk_sees_imports() -> None:
    graph = edges()
    assert "engine.graph" in graph["engine.plan"]
    assert "kernels.formats" in graph["engine.gguf_header"]
    assert "engine.session" in graph["engine"]


def test_imports_go_down_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, targets in edges().items()
        for target in targets
        if FLOORS.index(target.split(".")[0]) > FLOORS.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_cycles() -> None:
    graph, state = edges(at_import=True), {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"cycle: {' -> '.join((*trail, name))}"
        if name not in state:
            state[name] = "open"
            for target in graph.get(name, ()):
                visit(target, (*trail, name))
            state[name] = "done"

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "a file of more than 400 lines wants to be two"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is {node.end_lineno - node.lineno + 1} lines"


def test_importing_the_engine_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import auricle.engine; "
        "print(time.perf_counter() - start); "
        "print(sorted({'torch', 'numba', 'transformers', 'tokenizers', 'soundfile'} & set(sys.modules)))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, loaded = min(float(r.stdout.split("\n")[0]) for r in runs), runs[0].stdout.split("\n")[1]
    assert loaded == "[]"
    assert seconds < 1.0, "the aim is 0.3 s; more than three times that is a new import, not a slow machine"
