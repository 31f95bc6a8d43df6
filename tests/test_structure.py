"""The budgets and promises of the source tree itself."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "nibble").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_NESTING = 3
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_file_is_short(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_functions_are_short_and_flat(path):
    for function in _functions(path):
        start = function.body[0].end_lineno if ast.get_docstring(function) else function.lineno
        assert function.end_lineno - start <= MAX_FUNCTION_LINES, function.name
        assert _depth(function) <= MAX_NESTING, function.name


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_functions_take_few_parameters(path):
    for function in _functions(path):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        counted = [argument for argument in named if argument.arg not in ("self", "cls", "ctx")]
        is_command = path.parent.name == "commands"
        assert is_command or len(counted) <= MAX_PARAMETERS, function.name


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_modules_and_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_nothing_is_unpickled_and_no_shell_is_used():
    banned = {"pickle", "joblib", "dill", "shelve", "marshal"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name for alias in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                assert (owner, node.func.attr) != ("torch", "load"), path
                assert all(keyword.arg != "shell" for keyword in node.keywords), path


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from nibble.commands.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names_are_exact_and_exist():
    nibble = importlib.import_module("nibble")
    assert nibble.__all__ == sorted(nibble.__all__)
    for name in nibble.__all__:
        assert callable(getattr(nibble, name)), name


def test_train_is_callable_whatever_is_imported_first():
    code = (
        "import nibble.train.loss, nibble\n"
        "from nibble.errors import UsageError\n"
        "try:\n    nibble.train(nibble.load_config())\n"
        "except UsageError as error:\n    assert 'model.name' in str(error)\n"
        "else:\n    raise SystemExit(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def _functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTIONS)]


def _depth(node: ast.AST) -> int:
    """Nested blocks inside a function; an elif does not nest."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            continue
        own = isinstance(child, BLOCKS) and not _is_elif(node, child)
        deepest = max(deepest, own + _depth(child))
    return deepest


def _is_elif(parent: ast.AST, child: ast.AST) -> bool:
    return isinstance(parent, ast.If) and isinstance(child, ast.If) and parent.orelse == [child]
