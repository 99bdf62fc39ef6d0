"""Densities and gaps by domain against counts of the tokens themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.separators import ALL, CLASSES, classify
from data_prep.sidecar import open_classes, read_header
from data_prep.tokenizers import load_tokenizer
from sepllm_train.analysis import corpus
from sepllm_train.analysis.corpus import LEVELS, selections
from tests.support.command import command

main = command("analyze")


@pytest.fixture(scope="module")
def tokenizer_file(sample_prefix: Path) -> Path:
    """The tokenizer of the sample corpus."""
    return sample_prefix.parent / read_header(sample_prefix).tokenizer.file


@pytest.fixture(scope="module")
def texts(sample_prefix: Path, tokenizer_file: Path) -> list[str]:
    """Thirty documents of the sample corpus."""
    store = IndexedDataset(str(sample_prefix), multimodal=False, mmap=True)
    tokenizer = load_tokenizer(tokenizer_file)
    return [tokenizer.decode(store[n][:-1].astype(np.int64).tolist()) for n in range(30)]


def check(domain: dict, classes: np.ndarray) -> None:
    """Every row of a domain's result against its classes, u8 [tokens]."""
    assert domain["tokens"] == len(classes)
    rows = {row["separators"]: row for row in domain["rows"]}
    assert rows.keys() == selections().keys()
    for name, numbers in selections().items():
        places = np.flatnonzero(np.isin(classes, numbers))
        assert (rows[name]["count"], rows[name]["density"]) == (len(places), len(places) / len(classes))
        gaps = np.diff(places)
        if not len(gaps):
            assert rows[name]["gaps"] is None
            continue
        found = rows[name]["gaps"]
        assert found["mean"] == pytest.approx(gaps.mean())
        assert [found["p50"], found["p95"]] == list(np.percentile(gaps, [50, 95], method="inverted_cdf"))
        assert found["max"] == gaps.max()
        for length, share in found["beyond"].items():
            assert share == pytest.approx((gaps > int(length)).mean()) and share > 0
        assert int(max(found["beyond"], key=int, default=0)) * 2 >= gaps.max() or gaps.max() == 1


def test_dataset_is_a_domain(sample_prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK", 1000)
    monkeypatch.setattr(corpus, "BATCH", 2500)
    assert main(["corpus", str(sample_prefix), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "corpus.json").read_text())
    (domain,) = result["domains"]
    check(domain, np.asarray(open_classes(sample_prefix)))
    header = read_header(sample_prefix)
    assert {row["separators"]: row["count"] for row in domain["rows"]}.items() >= {
        e.name: e.count for e in header.classes
    }.items()
    assert domain["documents"] == header.documents
    assert result["environment"]["packages"]["numpy"] == np.__version__
    markdown = (tmp_path / "out" / "corpus.md").read_text()
    for entry in header.classes:
        assert (f"{entry.density:.3%}" in markdown) or not entry.count
    files = {"corpus.json", "corpus.md", "density.svg", "gaps.svg"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


def test_sources_of_jsonl_are_domains(texts: list[str], tokenizer_file: Path, tmp_path: Path) -> None:
    """Two sources in turns, records without one, and a .txt file."""
    records = [{"text": text, "source": "prose" if n % 2 else "notes"} for n, text in enumerate(texts[:20])]
    records += [{"text": text} for text in texts[20:29]]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "alone.txt").write_text(texts[29])
    inputs = [str(tmp_path / "mixed.jsonl"), str(tmp_path / "alone.txt")]
    assert main(["corpus", *inputs, "--tokenizer", str(tokenizer_file), "--output", str(tmp_path / "out")]) == 0
    tokenizer = load_tokenizer(tokenizer_file)
    class_of_token = classify(tokenizer.token_bytes())
    expected = {"notes": texts[0:20:2], "prose": texts[1:20:2], "mixed": texts[20:29], "alone": texts[29:]}
    domains = json.loads((tmp_path / "out" / "corpus.json").read_text())["domains"]
    assert [domain["domain"] for domain in domains] == list(expected)
    for domain, documents in zip(domains, expected.values(), strict=True):
        ids = [[*tokenizer.encode_batch([text])[0], tokenizer.eod] for text in documents]
        assert domain["documents"] == len(documents)
        check(domain, class_of_token[np.concatenate(ids)])


def test_levels_hold_every_class_once() -> None:
    named = [name for names in LEVELS.values() for name in names]
    assert sorted(named) == sorted(entry.name for entry in CLASSES) and len(ALL) == len(named)
