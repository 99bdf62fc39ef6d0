"""Versions that the project runs with, compared with what is installed, without importing any of it.

setup.py holds the ranges. The file is valid for Python 3.7, so that an old interpreter gets a sentence and no
SyntaxError, and it stands alone: scripts/check_environment.py loads it by its path.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

PROJECT = "sepllm-train"
PACKAGE = "sepllm_train"
# Set to 1, it lets versions outside the ranges be tried.
ANY_VERSION = "SEPLLM_ANY_VERSION"


class Declared(NamedTuple):
    """Range of Python versions and requirements without extras, as setup.py writes them."""

    python: str
    packages: list[str]


class Unmet(NamedTuple):
    """A requirement and the version that is installed in its place, None where the package is missing."""

    requirement: str
    name: str
    installed: str | None
    wanted: str

    def sentence(self) -> str:
        """One sentence with what to do."""
        if self.installed is None:
            return f"{self.name} is missing: pip install '{self.requirement}'."
        return f"{self.name} {self.installed} is not {self.wanted}: pip install '{self.requirement}'."


def checkout_of(package: Path) -> Path | None:
    """Root of the checkout that holds the folder `package`; None for a package that was installed from a wheel."""
    root = package.resolve().parent
    return root if (root / "setup.py").is_file() and (root / "scripts" / "pretrain.py").is_file() else None


def declared() -> Declared | None:
    """Ranges of the checkout, else of the installed wheel's metadata; None where there is neither.

    Metadata of an editable install are as old as its `pip install`: setup.py may have changed since.
    """
    root = checkout_of(Path(__file__).parent)
    if root is not None:
        try:
            return read_setup(root / "setup.py")
        except (OSError, SyntaxError, ValueError, KeyError, StopIteration):
            pass  # in the middle of an edit or a merge: what was installed is the next best
    from importlib import metadata

    try:
        found = metadata.metadata(PROJECT)
    except metadata.PackageNotFoundError:
        return None
    lines = found.get_all("Requires-Dist") or []
    return Declared(found["Requires-Python"] or "", [line for line in lines if "extra ==" not in line])


def read_setup(path: Path) -> Declared:
    """Ranges in a setup.py, which is parsed and not run. Raises SyntaxError, KeyError or ValueError."""
    call = next(
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    return Declared(ast.literal_eval(keywords["python_requires"]), list(ast.literal_eval(keywords["install_requires"])))


def python_problem(version: tuple[int, ...], wanted: str) -> str | None:
    """One sentence on a Python `version` outside of the range `wanted`, such as ">=3.11,<3.14"; None within it."""
    bounds = re.search(r">=\s*3\.(\d+).*<\s*3\.(\d+)|<\s*3\.(\d+).*>=\s*3\.(\d+)", wanted)
    if bounds is None:
        return None
    first, end = (int(bounds[1]), int(bounds[2])) if bounds[1] else (int(bounds[4]), int(bounds[3]))
    use = f"use 3.{first} to 3.{end - 1}"
    if tuple(version[:2]) >= (3, end):
        return f"Python {version[0]}.{version[1]} is not tested yet: {use}."
    if tuple(version[:2]) < (3, first):
        return f"Python {'.'.join(map(str, version[:3]))} is too old: {use}."
    return None


def unmet(requirements: list[str]) -> list[Unmet]:
    """Those of the `requirements` that this environment does not meet.

    A build before a release, as those of GPU vendors' containers are, counts as that release.
    """
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    found = []
    for line in requirements:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        asked = f"{wanted.name}{wanted.specifier}"
        try:
            version = metadata.version(wanted.name)
            met = wanted.specifier.contains(Version(version).base_version, prereleases=True)
        except metadata.PackageNotFoundError:
            found.append(Unmet(asked, wanted.name, None, str(wanted.specifier)))
        except (InvalidVersion, TypeError):
            # A half-removed package has metadata without a version.
            found.append(Unmet(asked, wanted.name, "of an unreadable version", str(wanted.specifier)))
        else:
            if not met:
                found.append(Unmet(asked, wanted.name, version, str(wanted.specifier)))
    return found


def other_checkout(root: Path) -> str | None:
    """One sentence where a program of the checkout `root` would import no package, or that of another checkout."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return (
            f"{PROJECT} is not installed for {sys.executable}: run `make install` in {root} and use "
            f"{root / '.venv' / 'bin' / 'python'}, or run `{sys.executable} -m pip install -e {root}`."
        )
    other = checkout_of(Path(spec.origin).parent)
    if other is None or other == root.resolve():
        return None
    return (
        f"the environment of {sys.executable} has the checkout {other} installed, and this program is of {root}: use "
        f"the programs of the former, or run `{sys.executable} -m pip install -e {root}`."
    )


def problem(root: Path | None = None) -> str | None:
    """One sentence on the first thing for which no program can run here: interpreter, checkout, packages.

    `root` is the checkout whose script is running; None for an installed program.
    """
    ranges = declared()
    wrong = None if ranges is None else python_problem(sys.version_info[:3], ranges.python)
    if wrong is not None:
        return wrong
    if root is not None:
        wrong = other_checkout(root)
        if wrong is not None:
            return wrong
    if ranges is None or os.environ.get(ANY_VERSION) == "1":
        return None
    try:
        missed = unmet(ranges.packages)
    except ImportError as error:
        return f"{error.name} is missing: install {PROJECT} with its requirements (`make install`, or pip)."
    if not missed:
        return None
    more = (
        f" {len(missed) - 1} more: `python -m sepllm_train env` lists them."
        if len(missed) > 1 and root is not None
        else ""
    )
    override = f" {ANY_VERSION}=1 tries it as it is." if missed[0].installed is not None else ""
    return f"{missed[0].sentence()}{override}{more}"


def end_if_unsound(root: Path | None = None) -> None:
    """End the process with a sentence and exit code 2 where no program can run here."""
    wrong = problem(root)
    if wrong is None:
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {wrong}", file=sys.stderr, flush=True)
    sys.exit(2)
