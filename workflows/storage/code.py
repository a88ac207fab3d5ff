"""The hash of the code that a stage runs, which is part of the stage's key."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE = "mmdistill_core"


@cache
def code_version(*parts: str, modules: tuple[str, ...] = ()) -> str:
    """A hash of source files: of `parts` (files or folders, relative to the root), and of the import closure of `modules`."""
    files = {str(file.relative_to(ROOT)): file for part in parts for file in _files(ROOT / part)}
    digest = hashlib.sha256()
    for name, file in sorted((files | closure(*modules)).items()):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@cache
def closure(*modules: str) -> dict[str, Path]:
    """The files that `modules` run, by module name: their own, and what they import from mmdistill_core and from their own
    packages. Imports within functions count. A package's __init__ counts only if something is imported from it.
    """
    packages = {module.partition(".")[0] for module in modules} | {CORE}
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module.partition(".")[0] not in packages:
            continue
        file = _file_of(module)
        if file is not None:
            found[module] = file
            waiting += _imported(module, file)
    return found


@cache
def _file_of(module: str) -> Path | None:
    """A module's file; None if there is no such module, or it is not written in Python."""
    if module.partition(".")[0] == CORE:  # by path, as find_spec would import its packages
        path = ROOT / module.replace(".", "/")
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imported(module: str, file: Path) -> Iterator[str]:
    """The modules that a file imports. Names imported from a package count if they are modules, else the package does."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in _executed(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            modules = [name for name in names if _file_of(name) is not None]
            yield from modules
            if len(modules) < len(names):
                yield base


def _executed(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of a module, without the branches that only a type checker takes."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.If) and isinstance(node.test, ast.UnaryOp) and _is_type_checking(node.test.operand):
            waiting += node.body  # if not TYPE_CHECKING
        else:
            waiting += ast.iter_child_nodes(node)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, (ast.Name, ast.Attribute)) and ast.unparse(test).rpartition(".")[2] == "TYPE_CHECKING"


def git_commit() -> str:
    """The commit of this source tree, with "+" if it has changes. Outside a checkout: MMDISTILL_COMMIT, which is set for jobs, or
    "unknown".
    """
    import subprocess

    def git(*words: str) -> str:
        out = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
        return out.stdout.strip() if out.returncode == 0 else ""

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git("rev-parse", "--show-toplevel") == str(ROOT) and (commit := git("rev-parse", "HEAD")):
            return commit + ("+" if git("status", "--porcelain") else "")
    return os.environ.get("MMDISTILL_COMMIT") or "unknown"
