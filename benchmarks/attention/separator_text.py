"""Positions of the separators in real text, which the benchmarks and the counted model run on.

    python -m benchmarks.attention.separator_text                  # what the file beside this one holds
    python -m benchmarks.attention.separator_text --text PREFIX    # write it anew from a prepared data set

The file holds one bit a token, nothing of the text: the first tokens of the sample corpus (documentation of Python's
standard library, a SentencePiece vocabulary of 4096), with the paper's nine exact marks as separators.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import exit_with
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_whole

POSITIONS_FILE = Path(__file__).resolve().parent / "separators.npz"
# Numbers of the nine exact single-character classes in a side-car.
PAPER_CLASSES = range(1, 10)
INITIAL_TOKENS = 3


def load_separators(text: str | None = None) -> NDArray[np.bool_]:
    """Mask of the separators of a text, bool [tokens].

    `text` is the prefix of a prepared data set (the paper's classes count), a .npy file of tiers (above 0 counts), or
    None for the file that ships. Raises UserError when there is no such file.
    """
    if text is None:
        return _unpack(POSITIONS_FILE)
    if text.endswith(".npz"):
        return _unpack(Path(text))
    path = Path(text if text.endswith(".npy") else f"{text}.sep.bin")
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the prefix of a prepared data set, or a .npy file of tiers.")
    if path.suffix == ".npy":
        return np.load(path).reshape(-1) > 0
    return np.isin(np.fromfile(path, dtype=np.uint8), np.array(PAPER_CLASSES, dtype=np.uint8))


def text_rows(separators: NDArray[np.bool_], length: int, rows: int) -> NDArray[np.bool_]:
    """Special tokens of `rows` sequences of `length` tokens, bool [rows, length], evenly spread over the text.

    They overlap where the text is short. The initial tokens count as special. Raises UserError for a text of fewer
    than `length` tokens.
    """
    spare = len(separators) - length
    if spare < 0:
        raise UserError(f"The text has {len(separators)} tokens, {length} are needed: give a longer one to --text.")
    starts = np.linspace(0, spare, rows).astype(int)
    return _with_initial(np.stack([separators[start : start + length] for start in starts]))


def random_rows(density: float, length: int, rows: int) -> NDArray[np.bool_]:
    """As `text_rows`, with each token a separator by chance."""
    return _with_initial(np.random.default_rng(0).random((rows, length)) < density)


def _with_initial(special: NDArray[np.bool_]) -> NDArray[np.bool_]:
    special[:, :INITIAL_TOKENS] = True
    return special


def _unpack(path: Path) -> NDArray[np.bool_]:
    try:
        with np.load(path) as content:
            return np.unpackbits(content["bits"], count=int(content["tokens"])).astype(bool)
    except (OSError, KeyError, ValueError):
        raise UserError(
            f"{path} is missing or holds no bits of separators: see --help of {Path(__file__).name}."
        ) from None


def write_positions(path: Path, separators: NDArray[np.bool_]) -> None:
    """Write positions as `load_separators` reads them."""
    content = io.BytesIO()
    np.savez_compressed(content, bits=np.packbits(separators), tokens=np.int64(len(separators)))
    write_whole(path, content.getvalue())


def main() -> int:
    """Describe the file of positions, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="PREFIX", help="prepared data set to take the positions from")
    parser.add_argument("--tokens", type=int, default=1 << 18, help="tokens to take (%(default)s)")
    parser.add_argument("--output", type=Path, default=POSITIONS_FILE, help="file to write (%(default)s)")
    options = parser.parse_args()
    if options.text is not None:
        write_positions(options.output, load_separators(options.text)[: options.tokens])
    separators = load_separators(str(options.output))
    print(f"{options.output}: {len(separators)} tokens, {separators.mean():.2%} of them separators")
    return 0


if __name__ == "__main__":
    exit_with(main)
