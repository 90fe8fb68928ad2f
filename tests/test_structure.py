"""Architecture checks: imports go down the layers, without cycles; folder sizes and packaging."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .conftest import SMOKE

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "models", "engine", "tools")
"""The layers from the bottom up: each may import itself and those before it."""
MAX_ENTRIES = 16
LARGER_FOLDERS: dict[str, str] = {}
"""Folders with more entries than MAX_ENTRIES, and the reason."""
ANYWHERE = {"tools/bench/runners/trimtab.py"}
"""Programs for another environment, which import the `trimtab` installed there; not checked."""


def module_name(path: Path) -> str:
    """The dotted name of a source file within the package; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for path in [
        *(ROOT / "__init__.py", ROOT / "__main__.py"),
        *(path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))),
    ]
}
FOLDERS = sorted({path.parent for path in SOURCES.values()} - {ROOT})


def imported_modules(module: str) -> set[str]:
    """The modules of this package that `module` imports, including type-only and local imports."""
    path, names = SOURCES[module], set[str]()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [part for part in package if part][: len(package) - node.level + 1]
            elif node.module and node.module.split(".")[0] == "trimtab":
                base = []
            else:
                continue
            target = [*base, *(node.module or "").removeprefix("trimtab").strip(".").split(".")]
            source = ".".join(part for part in target if part)
            for alias in node.names:
                full = f"{source}.{alias.name}".strip(".")
                names.add(full if full in SOURCES else source)
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("trimtab.") for alias in node.names} & SOURCES.keys()
    return names - {module}


IMPORTS = {
    module: imported_modules(module)
    for module, path in SOURCES.items()
    if path.relative_to(ROOT).as_posix() not in ANYWHERE
}


def test_all_imports_are_of_modules_that_exist() -> None:
    missing = {(module, name) for module, names in IMPORTS.items() for name in names if name not in SOURCES}
    assert not missing


def test_imports_go_downward_only() -> None:
    """A layer imports only itself and those below it; none imports the top-level package."""
    order = {floor: index for index, floor in enumerate(FLOORS)}
    upward = [
        (module, name)
        for module, names in IMPORTS.items()
        if module.partition(".")[0] in order
        for name in names
        if not name or order[name.partition(".")[0]] > order[module.partition(".")[0]]
    ]
    assert not upward


def test_modules_have_no_import_cycle() -> None:
    assert len(list(TopologicalSorter(IMPORTS).static_order())) >= len(IMPORTS)


def test_folders_have_no_import_cycle() -> None:
    """A folder is one node; in a folder with subfolders, each file is a node."""
    parents = {folder.parent for folder in FOLDERS} | {ROOT / floor for floor in FLOORS}

    def node(module: str) -> str:
        folder = SOURCES[module].parent
        return module if folder in parents or folder == ROOT else folder.relative_to(ROOT).as_posix()

    graph = defaultdict[str, set[str]](set)
    for module, names in IMPORTS.items():
        graph[node(module)] |= {node(name) for name in names} - {node(module)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"folders import each other: {' -> '.join(error.args[1])}")


def test_an_import_cycle_is_detected() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_folder_has_at_most_sixteen_entries(folder: Path) -> None:
    """Unless LARGER_FOLDERS lists it."""
    name = folder.relative_to(ROOT).as_posix()
    entries = [entry for entry in folder.iterdir() if entry.name != "__pycache__"]
    assert (len(entries) > MAX_ENTRIES) == (name in LARGER_FOLDERS), sorted(entry.name for entry in entries)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_a_folder_has_a_package_docstring(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring) > 20


def test_every_package_is_installed() -> None:
    """pyproject.toml lists each folder: discovery fails where the repository root is the package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = set(ast.literal_eval(text[text.index("packages = [") + 11 :].split("]")[0] + "]"))
    assert listed == {
        "trimtab",
        *(f"trimtab.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in FOLDERS),
    }


def test_the_smoke_test_files_exist() -> None:
    assert [path for path in sorted(SMOKE) if not (ROOT / "tests" / path).is_file()] == []
