"""Imports point one way: the folder list is the data's way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import keelweight

ROOT = Path(keelweight.__file__).parent
ORDER = [
    "errors",
    "files",
    "measure",
    "progress",
    "interrupts",
    "inputs",
    "objectives",
    "scores",
    "selection",
    "evaluation",
    "tuning",
    "report",
    "demo",
    "cli",
    "__main__",
]


def imported(path: Path) -> set[str]:
    """Our top-level modules and folders that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("keelweight.")}
    return found


def test_imports_point_up_the_list_only():
    for path in ROOT.rglob("*.py"):
        home = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        later = {name for name in imported(path) if ORDER.index(name) > ORDER.index(home)}
        assert not later, f"{path.relative_to(ROOT)} imports {later}"


def test_every_module_has_its_place():
    homes = {path.name.removesuffix(".py") for path in ROOT.iterdir() if not path.name.startswith(("__", "."))}
    assert homes - {"py.typed"} <= set(ORDER)


def test_help_needs_no_torch():
    code = "import sys, keelweight.cli; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_exist():
    assert all(getattr(keelweight, name) is not None for name in keelweight.__all__)
