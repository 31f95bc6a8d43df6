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


# What could run code that a file holds, or let a wrong input through under `python -O`.
DANGEROUS = {
    "unpickling": "import pickle",
    "objects between ranks": "dist.broadcast_object_list(values)",
    "objects of all ranks": "torch.distributed.all_gather_object(found, value)",
    "unpickling below": "import os, pickle.x",
    "unpickling by name": "from joblib import load",
    "another name": "import dill as json",
    "torch.load": "torch.load(path, weights_only=True)",
    "loading by name": "from torch import load",
    "numpy's pickles": "np.load(path)",
    "numpy by its name": "numpy.load(path, allow_pickle=True)",
    "allowed pickles": "read(path, allow_pickle=True)",
    "DCP": "import torch.distributed.checkpoint",
    "eval": "eval(text)",
    "exec": "exec(text)",
    "compile": "compile(text, '', 'exec')",
    "import by text": "__import__(name)",
    "a shell": "subprocess.run(command, shell=True)",
    "a shell of os": "os.system(command)",
    "a pipe of os": "os.popen(command)",
    "code of a model": "load(path, trust_remote_code=True)",
    "code of a model, if so": "load(path, trust_remote_code=allowed)",
    "unsafe YAML": "yaml.load(text)",
    "a bare template": "jinja2.Template(text)",
    "a bare environment": "jinja2.Environment()",
    "assert on an input": "assert rank > 0",
}
HARMLESS = (
    "model.eval()", "re.compile(text)", "assert x is not None", "subprocess.run(['cc'])",
    "load(path, trust_remote_code=False)", "yaml.safe_load(text)", "json.load(file)",
    "Environment()", "import pickled_things", "import torch.distributed as dist",
    "dist.all_gather(found, tensor)",
)  # fmt: skip
_MODULES = {"pickle", "joblib", "dill", "shelve", "marshal", "cloudpickle"}
_MODULES |= {"torch.distributed.checkpoint"}
# What ranks say to each other is JSON: torch's own way with objects unpickles them.
_PICKLED_BETWEEN_RANKS = (
    "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
    "send_object_list", "recv_object_list",
)  # fmt: skip
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_CALLS = {
    "torch.load", "np.load", "numpy.load", "os.system", "os.popen", "yaml.load", "yaml.full_load",
    "yaml.unsafe_load", "jinja2.Template", "jinja2.Environment",
}  # fmt: skip
GLOBAL_DRAWS = (
    "import random\nrandom.shuffle(order)", "from random import shuffle", "np.random.rand(3)",
    "np.random.seed(0)", "numpy.random.permutation(3)", "import random\nrandom.seed(1)",
)  # fmt: skip
OWN_DRAWS = (
    "import random\nrandom.Random(seed).shuffle(order)", "np.random.default_rng(0)",
    "torch.random.fork_rng()",
    "rng: random.Random = x", "np.random.RandomState(3)", "from random import Random",
)  # fmt: skip
_OWN_GENERATORS = {"Random", "RandomState", "default_rng", "Generator"}


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_nothing_is_unpickled_and_no_text_is_run(path):
    assert not [found for node in ast.walk(ast.parse(path.read_text())) for found in _danger(node)]


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_nothing_draws_from_a_global_generator(path):
    assert not _draws(ast.parse(path.read_text()))


@pytest.mark.parametrize("code", [*DANGEROUS.values(), *HARMLESS])
def test_what_is_dangerous_is_seen(code):
    found = [one for node in ast.walk(ast.parse(code)) for one in _danger(node)]
    assert bool(found) == (code in DANGEROUS.values())


@pytest.mark.parametrize("code", [*GLOBAL_DRAWS, *OWN_DRAWS])
def test_global_draws_are_seen(code):
    assert bool(_draws(ast.parse(code))) == (code in GLOBAL_DRAWS)


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


def _danger(node: ast.AST) -> list[str]:
    """What in this node could run what a file holds."""
    if isinstance(node, ast.Assert):
        is_narrowing = isinstance(node.test, ast.Compare) and isinstance(
            node.test.ops[0], ast.IsNot
        )
        return [] if is_narrowing else ["assert"]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [name for name in _imported(node) if name in {*_MODULES, *_CALLS}]
    if not isinstance(node, ast.Call):
        return []
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    trust = named.get("trust_remote_code")
    found = [name for name in ("shell", "allow_pickle") if name in named]
    if trust is not None and not (isinstance(trust, ast.Constant) and trust.value is False):
        found.append("trust_remote_code")
    called = ast.unparse(node.func)
    if called.rpartition(".")[2] in _PICKLED_BETWEEN_RANKS:
        return [*found, called]
    return [*found, called] if called in {*_BUILTINS, *_CALLS} else found


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    """Every module that is imported with those above it, and every name out of one."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
    parts = [name.split(".") for name in names]
    return {".".join(part[:size]) for part in parts for size in range(1, len(part) + 1)}


def _draws(tree: ast.AST) -> list[str]:
    """Draws from the generators that `random` and numpy share with everybody."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    owners = {"np.random", "numpy.random"}
    owners |= {"random"} if any("random" in _imported(node) for node in imports) else set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in owners:
            found.append(node.attr)
    return [name for name in found if name not in _OWN_GENERATORS]
