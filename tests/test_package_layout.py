"""The shape of the source: layers, sizes, what is documented, what is never written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import structure
from helpers.structure import ROOT, SRC, modules

MODULES = modules()
FILE_LINES, FUNCTION_LINES = 300, 50
PICKLES = ("pickle", "cloudpickle", "dill", "marshal", "shelve")

# What is longer, and why. File: "path"; function: "path:function", as printed by the tests.
LONGER: dict[str, str] = {}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_imports_point_down() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_and_functions_are_short() -> None:
    found: dict[str, int] = {}
    for path in MODULES:
        source = path.read_text()
        name = str(path.relative_to(SRC))
        if (lines := len(source.splitlines())) > FILE_LINES:
            found[name] = lines
        for function in functions(ast.parse(source)):
            if (lines := (function.end_lineno or function.lineno) - function.lineno + 1) > FUNCTION_LINES:
                found[f"{name}:{function.name}"] = lines
    assert {name: lines for name, lines in found.items() if name not in LONGER} == {}
    assert sorted(set(LONGER) - set(found)) == [], "no longer too long: take them off the list"


def test_no_assert_and_no_pickle() -> None:
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Assert) or any(name.partition(".")[0] in PICKLES for name in names):
                found.append(f"{path.relative_to(SRC)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_every_module_says_what_it_is_for() -> None:
    assert [str(path.relative_to(SRC)) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_structure_names_every_module_and_nothing_else() -> None:
    page = structure.PAGE.read_text()
    assert re.findall(r"^\| `(checkpoint_engine[\w.]*)` \|", page, re.MULTILINE) != []
    assert page == structure.render(), "run `make format`"
    for path in MODULES:
        sentence = structure.first_sentence(path)
        assert sentence.endswith("."), f"{path.relative_to(SRC)}: its docstring begins with no sentence"
        assert len(sentence) < 180, f"{path.relative_to(SRC)}: too long to be read in a table"
