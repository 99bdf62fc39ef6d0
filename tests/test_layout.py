"""The structure of the code: few packages, few imports between them, names that are used once.

The order of the packages is held by the contracts in pyproject.toml (`make lint`).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parents[1]
# Folders of shipped code, by the folder that is their import root.
SOURCES = {"sepllm_train": REPOSITORY, "data_prep": REPOSITORY, "sep_attention": REPOSITORY / "kernels"}
QUESTIONS = ("What", "Whether", "How", "Which", "Where", "Why", "Who", "When")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)


def modules() -> list[Path]:
    """Python files of the shipped packages."""
    return sorted(path for package, root in SOURCES.items() for path in (root / package).rglob("*.py"))


@cache
def graph() -> grimp.ImportGraph:
    """Imports between the modules, those inside functions too."""
    return grimp.build_graph(*SOURCES)


def package_of(module: str) -> str:
    """The package that holds a module; of a package itself, that package."""
    return module if graph().find_children(module) else module.rpartition(".")[0]


def edges() -> set[tuple[str, str]]:
    """Pairs of packages of which the first imports from the second."""
    found = {
        (package_of(module), package_of(imported))
        for module in graph().modules
        for imported in graph().find_modules_directly_imported_by(module)
    }
    return {(importer, imported) for importer, imported in found if importer != imported}


def test_there_are_few_packages_and_imports_between_them() -> None:
    packages = {str(path.parent) for path in modules()}
    assert len(packages) <= 24, sorted(packages)
    assert len(edges()) <= 127, sorted(edges())


def test_no_package_imports_what_imports_it() -> None:
    """A package with subpackages counts as one, and the modules at the top are entries to all of them."""

    def area(package: str) -> str:
        return ".".join(package.split(".")[: 2 if package.startswith("sepllm_train") else 1])

    pairs = {(area(importer), area(imported)) for importer, imported in edges()}
    both = {pair for pair in pairs if pair[0] != pair[1] and pair[::-1] in pairs and "sepllm_train" not in pair}
    assert not both


def definitions() -> Iterator[tuple[Path, ast.AST]]:
    """Modules, classes and functions of the shipped code with their files."""
    for path in [
        *modules(),
        *sorted((REPOSITORY / "scripts").glob("*.py")),
        *sorted((REPOSITORY / "benchmarks").rglob("*.py")),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, DEFINITIONS):
                yield path, node


def test_class_names_are_used_once() -> None:
    names = Counter(
        node.name
        for path, node in definitions()
        if isinstance(node, ast.ClassDef) and path.is_relative_to(REPOSITORY / "sepllm_train")
    )
    assert {name for name, count in names.items() if count > 1} == set()


def test_docstrings_do_not_open_with_a_question() -> None:
    opening = re.compile(rf"({'|'.join(QUESTIONS)})\b")
    found = [
        f"{path.relative_to(REPOSITORY)}: {text.splitlines()[0]}"
        for path, node in definitions()
        if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node)) and opening.match(text)
    ]
    assert not found, "\n".join(found)


def test_modules_are_not_called_like_one_another() -> None:
    """`report` and `cli` say nothing without their package: one each, or a package whose name says it."""
    names = Counter(path.stem for path in modules())
    assert names["cli"] <= 2  # data_prep's, which needs nothing of sepllm_train.cli
    assert names["report"] <= 3
