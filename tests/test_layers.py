"""The laws of the code: who may import whom, and what must not be written at all. Read from the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "medseg"

# A module imports from its own place in this list and from the places above it.
ORDER = (
    "errors",
    "artefacts",
    "machine",
    "progress",
    "records",
    "imaging",
    "dataset",
    "planning",
    "preparation",
    "networks",
    "training",
    "inference",
    "evaluation",
    "reporting",
    "interop",
    "cluster",
    "pipeline",
    "cli",
)
TORCH = {"networks", "training", "inference", "interop", "pipeline", "cli"}
LAZY = {"monai"}  # only inside the functions that need it
NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "extractall"}
ROOT_FILES = {"__init__", "__main__"}  # the version, and `python -m medseg`


def violations(package: Path) -> list[str]:
    """Every broken law of a tree, as ``path:line what``; the tree's folder name is the package's name."""
    return [
        f"{path.relative_to(package.parent)}:{line} {what}"
        for path in sorted(package.rglob("*.py"))
        for line, what in (*file_violations(path, package), *name_violations(path))
    ]


def name_violations(path: Path) -> Iterator[tuple[int, str]]:
    if path.stem in {"utils", "util", "helpers", "misc", "common"}:
        yield 1, f"a module called {path.stem} names nothing"


def file_violations(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    parts = path.relative_to(package).with_suffix("").parts
    place = parts[0]
    if place not in ORDER and place not in ROOT_FILES:
        yield 1, f"{place} has no place in the order of the layers"
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    dotted = (package.name, *parts)
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        for module in imported(node, dotted, package):
            yield from import_violations(node, module, place, package.name, lazy=id(node) in inside)
        yield from code_violations(node, place)


def imported(node: ast.AST, importer: tuple[str, ...], package: Path) -> list[str]:
    """Dotted names that a node imports, relative imports resolved, ``from medseg import x`` as ``medseg.x``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            folder = importer[: len(importer) - node.level] if importer[-1] != "__init__" else importer[: -node.level]
            base = ".".join((*folder, *([base] if base else [])))
        return [f"{base}.{alias.name}" for alias in node.names] if base == package.name else [base]
    if isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"} and node.args:
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) and isinstance(name.value, str) else ["<computed>"]
    return []


def import_violations(node: ast.AST, module: str, place: str, package: str, *, lazy: bool) -> Iterator[tuple[int, str]]:
    top, _, rest = module.partition(".")
    if module == "<computed>":
        yield node.lineno, "imports a module by a computed name"
    if top in NEVER:
        yield node.lineno, f"imports {top}"
    if top == "torch" and place not in TORCH:
        yield node.lineno, f"{place} imports torch"
    if top in LAZY and not lazy:
        yield node.lineno, f"imports {top} outside a function"
    target = rest.partition(".")[0]
    if top == package and target in ORDER and place in ORDER and ORDER.index(target) > ORDER.index(place):
        yield node.lineno, f"{place} imports {target}, which stands below it"


def code_violations(node: ast.AST, place: str) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"} and place != "cli":
        yield node.lineno, f"uses os.{node.attr}"
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        for alias in node.names:
            if alias.name in {"environ", "environb", "getenv", "putenv"}:
                yield node.lineno, f"uses os.{alias.name}"
    if isinstance(node, ast.Call):
        name = called(node)
        if name == "print" and isinstance(node.func, ast.Name) and place != "cli":
            yield node.lineno, "prints outside cli"
        # `.eval()` is a method of torch modules; only the built-in function is meant
        if name in FORBIDDEN_CALLS and (isinstance(node.func, ast.Name) or name == "extractall"):
            yield node.lineno, f"calls {name}"
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "shell" and value is not False:
                yield node.lineno, "calls a shell"
            if keyword.arg == "weights_only" and value is not True:
                yield node.lineno, "loads with weights_only that is not True"
            if keyword.arg == "allow_pickle" and value is not False:
                yield node.lineno, "allows pickles"


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def test_the_package_keeps_its_layers_and_writes_nothing_forbidden():
    assert (PACKAGE / "errors.py").exists()
    assert violations(PACKAGE) == []


def test_every_folder_of_the_package_has_a_place_in_the_order():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert {"records", "imaging", "dataset", "planning", "training", "cli"} <= folders
    assert folders <= set(ORDER)


def tree(folder: Path, **files: str) -> Path:
    package = folder / "medseg"
    for name, text in files.items():
        path = package / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_a_tree_that_keeps_the_laws_has_no_violations(tmp_path):
    clean = tree(
        tmp_path,
        errors="import os\nfrom pathlib import Path",
        records__grid="from medseg.errors import MedsegError\nfrom .task import Task",
        networks__unet="import torch\ndef f(net):\n    import monai.networks\n    return net.eval()",
        pipeline__run="import torch\nfrom medseg.reporting import figures\nfrom medseg import errors",
        cli__main="def f():\n    import torch\n    print('result')\n",
    )
    assert violations(clean) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("records__grid", "from medseg.imaging.crop import nonzero_box", "records imports imaging"),
        ("records__grid", "from medseg import imaging", "records imports imaging"),
        ("records__grid", "from ..imaging import crop", "records imports imaging"),
        ("records__grid", "import medseg.cli.main as m", "records imports cli"),
        ("records__grid", "def f():\n    from medseg.imaging import crop", "records imports imaging"),
        ("records__grid", "import importlib\nimportlib.import_module('medseg.imaging')", "records imports imaging"),
        ("records__grid", "from importlib import import_module\nimport_module(x)", "computed name"),
        ("errors", "from medseg.artefacts import commit", "errors imports artefacts"),
        ("reporting__figures", "from medseg.pipeline import run", "reporting imports pipeline"),
        ("evaluation__scores", "import torch.nn.functional as F", "evaluation imports torch"),
        ("preparation__store", "from torch import nn", "preparation imports torch"),
        ("preparation__store", "def f():\n    import torch", "preparation imports torch"),
        ("networks__unet", "import monai", "imports monai outside a function"),
        ("networks__unet", "from monai.networks import nets", "imports monai outside a function"),
        ("networks__utils", "x = 1", "called utils"),
        ("helpers__grid", "x = 1", "no place"),
        ("imaging__crop", "import os\nx = os.environ['HOME']", "os.environ"),
        ("imaging__crop", "from os import environ", "os.environ"),
        ("imaging__crop", "import os\nx = os.getenv('HOME')", "os.getenv"),
        ("imaging__crop", "print('here')", "prints outside cli"),
        ("imaging__crop", "import pickle", "imports pickle"),
        ("imaging__crop", "x = eval('1')", "calls eval"),
        ("imaging__crop", "exec('x = 1')", "calls exec"),
        ("imaging__crop", "archive.extractall(path)", "calls extractall"),
        ("imaging__crop", "import subprocess\nsubprocess.run('ls', shell=True)", "calls a shell"),
        ("training__loop", "import torch\ntorch.load(p, weights_only=False)", "weights_only"),
        ("imaging__crop", "import numpy as np\nnp.load(p, allow_pickle=True)", "allows pickles"),
    ],
)
def test_each_broken_law_is_found(tmp_path, name, text, expected):
    (found,) = violations(tree(tmp_path, **{name: text}))
    assert expected in found
    assert name.replace("__", "/") in found
