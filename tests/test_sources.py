"""What our sources never do, so that nothing that is read can become code."""

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
MODULES = {
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
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load"),
    *("os.system", "os.popen", "os.spawnl", "os.spawnv", "os.posix_spawn", "subprocess.getoutput"),
    *("pty.spawn", "runpy.run_path", "runpy.run_module"),
}
ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle", "weights_only"}


def dangers(source: str) -> Iterator[str]:
    """What of a source could make code, or a shell's command, of data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & CALLS
            yield from names | (
                {node.module or ""} if (node.module or "").partition(".")[0] in MODULES else set()
            )
        elif isinstance(node, ast.Call):
            yield from ({ast.unparse(node.func)} & (BUILTINS | CALLS))
            yield from (each.arg for each in node.keywords if each.arg in ARGUMENTS)
        elif isinstance(node, ast.Constant) and node.value in ARGUMENTS:
            yield str(node.value)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_makes_code_of_data(path: Path) -> None:
    assert list(dangers(path.read_text(encoding="utf-8"))) == []


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
def test_each_of_these_would_be_found(source: str) -> None:
    assert list(dangers(source))


def test_the_sources_are_all_there() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert {
        "__main__.py",
        "models/chat/sandbox_main.py",
        "engine/server/app.py",
        "tools/bench/runners/transformers.py",
    } < names
