"""Training a small lossless SentencePiece tokenizer."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from sepllm_train.base.errors import UserError
from sepllm_train.base.files import write_whole

_LONGEST_SENTENCE = 2048
_SMALLEST_VOCABULARY = 300
_SEED = 0


def train_tokenizer(
    texts: Iterable[str],
    output: str | Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    sentences: int = 1_000_000,
    workers: int = 1,
    overwrite: bool = False,
) -> None:
    """Train a SentencePiece model on `texts` and write it to `output` (a `.model` file).

    Lossless: decode(encode(x)) == x for every text. Nothing is normalised, no whitespace is removed or added, unknown
    characters fall back to bytes, newline and tab are pieces of their own. Ids: 0 `<unk>`, 1 `</s>` (ends documents),
    2 newline, 3 tab, then the 256 bytes. At most `sentences` lines, sampled evenly with a fixed seed, are held in
    memory. Raises UserError for an empty corpus, a vocabulary that does not fit the text, or an existing output.
    """
    import sentencepiece

    output = Path(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already: choose another name or pass --overwrite.")
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(f"A vocabulary of {vocab_size} is too small: at least {_SMALLEST_VOCABULARY} (256 are bytes).")
    sample = sample_lines(texts, sentences)
    if not sample:
        raise UserError("The corpus is empty: no line with text was found to train a tokenizer on.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9995,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=8 * _LONGEST_SENTENCE,
            num_threads=workers,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip().rstrip(".")
        raise UserError(f"No vocabulary of {vocab_size} can be made from this text: {reason}.") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, model.getvalue())


def sample_lines(texts: Iterable[str], limit: int) -> list[str]:
    """An even sample of at most `limit` non-empty lines, in a reproducible order (reservoir sampling, fixed seed)."""
    generator = random.Random(_SEED)
    sample: list[str] = []
    for seen, line in enumerate(_lines(texts)):
        if seen < limit:
            sample.append(line)
        elif (place := generator.randrange(seen + 1)) < limit:
            sample[place] = line
    return sample


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their breaks, long ones in parts; NUL ends a sentence inside the trainer, so it is left out."""
    for text in texts:
        for line in text.replace("\0", "").split("\n"):
            for start in range(0, len(line), _LONGEST_SENTENCE):
                yield line[start : start + _LONGEST_SENTENCE]
