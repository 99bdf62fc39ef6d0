"""Folders that export and import write: when they may be overwritten, and the mark of an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sepllm_train.base.errors import UserError, first_line
from sepllm_train.base.files import hash_file, restore_folder, write_json
from sepllm_train.base.parsing import read_json_if_any

# Holds the SHA-256 of every other file of an exported model. A file of its own, since what is in config.json goes along
# when transformers saves a model that was trained further.
MARK = "sepllm_export.json"


def refuse_existing(output: Path, foreign: Callable[[Path], str | None], *, overwrite: bool) -> None:
    """Raise UserError when `output` is there, unless it may be overwritten: `foreign` gives the reason why it is not
    what the program wrote, or None.

    Before that, what a killed overwriting has left is repaired.
    """
    try:
        restore_folder(output)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror or first_line(error)}).") from None
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{output} exists already: choose another name or pass --overwrite.")
    why = foreign(output)
    if why is not None:
        raise UserError(f"{output} is not overwritten, since {why}: choose another name, or remove it yourself.")


def write_mark(folder: Path) -> None:
    """Write the hashes by which `altered_export` knows what the program wrote."""
    content = {"format": 1, "files": _hashes(folder)}
    write_json(folder / MARK, content)


def altered_export(folder: Path) -> str | None:
    """Reason why a folder is not an export as it was written, or None. Raises UserError when it cannot be read."""
    expected = read_json_if_any(folder / MARK).get("files")
    if not isinstance(expected, dict):
        return f"it has no {MARK} of this program's"
    found = _hashes(folder)
    changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"its {changed[0]} is not as this program wrote it" if changed else None


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder but the mark, by its path in there."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir() and path != folder / MARK]
    return {path.relative_to(folder).as_posix(): hash_file(path).sha256 for path in files}
