"""The sources use no pickle, eval, shell or similar, so that data cannot become code."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
SOURCES = [
    *sorted(ROOT.glob("*.py")),
    *(
        path
        for floor in ("kernels", "models", "engine", "tools")
        for path in sorted((ROOT / floor).rglob("*.py"))
    ),
]
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "code",
}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"),
    *("os.system", "os.popen", "os.spawnl", "os.spawnv", "os.posix_spawn", "subprocess.getoutput"),
    *("pty.spawn", "runpy.run_path", "runpy.run_module"),
}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle", "weights_only"}


def find_dangerous_calls(source: str) -> Iterator[str]:
    """Imports, calls and arguments in a source that could execute data as code or shell commands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN_MODULES
            )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_CALLS
            yield from names | (
                {node.module or ""} if (node.module or "").partition(".")[0] in FORBIDDEN_MODULES else set()
            )
        elif isinstance(node, ast.Call):
            yield from ({ast.unparse(node.func)} & (FORBIDDEN_BUILTINS | FORBIDDEN_CALLS))
            yield from (each.arg for each in node.keywords if each.arg in FORBIDDEN_ARGUMENTS)
        elif isinstance(node, ast.Constant) and node.value in FORBIDDEN_ARGUMENTS:
            yield str(node.value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_data_as_code(path: Path) -> None:
    assert list(find_dangerous_calls(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.numpy_pickle as p",
        "from pickle import loads",
        "from torch import load",
        "torch.load('x')",
        "torch.load('x', weights_only=True)",
        "eval('1')",
        "exec(open('x').read())",
        "compile('1', '', 'eval')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', **{'trust_remote_code': True})",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_the_check_detects_each_dangerous_example(source: str) -> None:
    assert list(find_dangerous_calls(source))


def test_the_check_covers_every_source_folder() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {
        "__main__.py",
        "models/chat/sandbox_main.py",
        "engine/server/app.py",
        "tools/bench/runners/transformers.py",
    } < names
