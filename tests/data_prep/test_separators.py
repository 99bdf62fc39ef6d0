"""The class table and the class of each vocabulary entry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.separators import ALL, CLASSES, MAX_CLASSES, PAPER, SPLIT_OFF, as_known, class_numbers, classify
from data_prep.tokenizers import load_tokenizer
from sepllm_train.base.errors import UserError

NAMES = {entry.number: entry.name for entry in CLASSES} | {0: "none"}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (".", "period"), (",", "comma"), ("?", "question"), ("!", "exclamation"), (";", "semicolon"),
        (":", "colon"), (" ", "space"), ("\t", "tab"), ("\n", "newline"),
        ("::", "clause_merged"), (" ,", "clause_merged"), ("...", "sentence_merged"), (" .", "sentence_merged"),
        (".,", "sentence_merged"), ("?!", "sentence_merged"), ("\n    ", "line_merged"), (".\n", "line_merged"),
        ("\r\n", "line_merged"), ("\r", "line_merged"), ("\n\n", "paragraph_merged"), ("\r\n\r\n", "paragraph_merged"),
        ("\n \n", "paragraph_merged"), ("\u2029", "paragraph_merged"), ("  ", "space_run"), ("\t\t", "space_run"),
        ("\u3000", "space_run"), ("\xa0", "space_run"),
        ("),", "comma_mixed"), (");", "comma_mixed"), ('":', "colon_mixed"), ('":",', "comma_mixed"),
        ('."', "sentence_mixed"), ('," —.', "sentence_mixed"), (");\n", "line_mixed"),
        ("}\n\n", "paragraph_mixed"),
        ("，", "fullwidth_clause"), ("、", "fullwidth_clause"), ("。", "fullwidth_sentence"),
        ("？」", "fullwidth_sentence"), ("，。", "fullwidth_sentence"), ("،", "other_clause"), ("؟", "other_sentence"),
        ("…", "other_sentence"), ("।", "other_sentence"),
        ("a", "none"), (".a", "none"), (" the", "none"), ("1.", "none"), ("(", "none"), ("—", "none"), ("", "none"),
        ("\x1c", "none"), (" (", "none"), ("\u0301.", "none"), ("²:", "none"),
    ],
)  # fmt: skip
def test_class_of_a_string(text: str, name: str) -> None:
    assert NAMES[classify([text.encode("utf8")])[0]] == name


def test_special_and_incomplete_entries_are_no_separators() -> None:
    assert classify([None, b"\xe3\x80", b"\xff"]).tolist() == [0, 0, 0]
    assert classify([None]).dtype == np.uint8


def test_the_table_is_stable() -> None:
    assert [entry.number for entry in CLASSES] == list(range(1, len(CLASSES) + 1))
    assert len(CLASSES) < MAX_CLASSES
    assert len({entry.name for entry in CLASSES}) == len(CLASSES)
    assert [(entry.number, entry.name) for entry in CLASSES if entry.number in (1, 9, 13, 19, 22)] == [
        (1, "period"),
        (9, "newline"),
        (13, "paragraph_merged"),
        (19, "fullwidth_clause"),
        (22, "other_sentence"),
    ]


def test_the_papers_nine_on_neox(shared_data: Path) -> None:
    table = load_tokenizer(shared_data / "tokenizers" / "20B_tokenizer.json").token_bytes()
    classes = classify(table)
    assert [np.flatnonzero(classes == number).tolist() for number in PAPER] == [
        [15], [13], [32], [2], [28], [27], [209], [186], [187]
    ]  # fmt: skip
    merged = [
        index
        for index, entry in enumerate(table)
        if entry and not entry.strip(b".,?!;: \t\n") and classes[index] not in PAPER
    ]
    assert len(merged) == 315
    assert {NAMES[classes[index]] for index in merged} == {
        "clause_merged", "sentence_merged", "line_merged", "paragraph_merged", "space_run"
    }  # fmt: skip
    assert NAMES[classes[535]] == "paragraph_merged"
    assert all(NAMES[number] == "space_run" for number in classes[50254:50277])


def test_sentencepiece_marks_and_byte_pieces(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "mistral_v1_tokenizer.model")
    classes = classify(tokenizer.token_bytes())
    [ids] = tokenizer.encode_batch(["end.\nNext, 2   words"])
    assert {NAMES[classes[index]] for index in ids} == {"none", "period", "newline", "comma", "space", "space_run"}


def test_choosing_classes() -> None:
    assert class_numbers("paper") == PAPER == tuple(range(1, 10))
    assert class_numbers("all") == ALL
    assert class_numbers("newline, period") == (1, 9)
    assert class_numbers(["paper", "paragraph_merged"]) == (*PAPER, 13)
    assert class_numbers("clause_mixed") == (15, 23)
    with pytest.raises(UserError, match=r"'dot': choose among paper, all, clause_mixed, period, comma"):
        class_numbers("dot")


def test_a_split_class_counts_as_the_older_one_where_it_is_not_known() -> None:
    classes = np.arange(len(CLASSES) + 1, dtype=np.uint8)
    assert np.array_equal(as_known(classes, set(ALL)), classes)
    before = set(ALL) - set(SPLIT_OFF)
    assert as_known(classes, before).tolist() == [SPLIT_OFF.get(number, number) for number in range(len(CLASSES) + 1)]
    assert all(number in ALL and older in before for number, older in SPLIT_OFF.items())
