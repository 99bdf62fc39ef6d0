"""The corpus command: density and gaps of every separator class in each domain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_prep.density import STRENGTHS
from data_prep.indexed import token_chunks
from data_prep.inputs import kind
from data_prep.readers import Corpus, Document
from data_prep.separators import ALL, CLASSES, NAMED_SETS, class_numbers, classify
from data_prep.sidecar import check_known, dataset_prefix, open_classes, read_header
from data_prep.stats import Gaps
from data_prep.tokenizers import Tokenizer, load_tokenizer
from sepllm_train.analysis import plots
from sepllm_train.analysis.output import check_output, progress, write_report
from sepllm_train.base.errors import UserError
from sepllm_train.compare.tables import Table

CHUNK = 1 << 20
# Documents of a domain are gathered to so many tokens before they are counted.
BATCH = 1 << 16
# `space` is a class too, so the level of blanks has another name.
LEVELS = {"blank" if level == "space" else level: names for level, names in STRENGTHS.items()}


def selections() -> dict[str, tuple[int, ...]]:
    """Name -> class numbers of every selection that is measured: each class, each level, `paper` and `all`."""
    single = {entry.name: (entry.number,) for entry in CLASSES}
    levels = {level: class_numbers(names) for level, names in LEVELS.items()}
    return single | levels | {name: NAMED_SETS[name] for name in ("paper", "all")}


@dataclass
class Domain:
    """Counts of one domain; its tokens are those of its documents one after the other, each with its end token."""

    name: str
    tokenizer: str
    tokenizer_sha256: str
    tokens: int = 0
    documents: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    gaps: dict[str, Gaps] = field(default_factory=lambda: {name: Gaps() for name in selections()})
    _waiting: list[NDArray[np.uint8]] = field(default_factory=list)

    def add(self, classes: NDArray[np.uint8], *, documents: int = 0) -> None:
        """Go on with the classes of the next tokens, u8 [tokens]."""
        self.tokens += len(classes)
        self.documents += documents
        self._waiting.append(classes)
        if sum(map(len, self._waiting)) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Count what has been gathered."""
        if not self._waiting:
            return
        classes = np.concatenate(self._waiting)
        self._waiting = []
        self.counts += np.bincount(classes, minlength=256)
        for name, numbers in selections().items():
            member = np.zeros(256, dtype=bool)
            member[list(numbers)] = True
            self.gaps[name].add(member[classes])

    def result(self) -> dict[str, Any]:
        """Share of the tokens and gaps of every selection."""
        self.flush()
        rows = []
        for name, numbers in selections().items():
            count = int(self.counts[list(numbers)].sum())
            distances = self.gaps[name].distances()
            gaps = None if distances is None else {**asdict(distances), "beyond": _beyond(self.gaps[name].histogram)}
            rows.append({"separators": name, "count": count, "density": count / self.tokens, "gaps": gaps})
        return {
            "domain": self.name,
            "tokenizer": self.tokenizer,
            "tokenizer_sha256": self.tokenizer_sha256,
            "tokens": self.tokens,
            "documents": self.documents,
            "rows": rows,
        }


def corpus_command(
    inputs: Sequence[str], output: Path, *, tokenizer: str | None = None, unwrap: bool = False
) -> dict[str, Any]:
    """Measure the separators of datasets and text files, write the report to `output` and give the result.

    Raises UserError for input that is neither, text without a tokenizer, and an output that cannot be written.
    """
    check_output(output)
    files = [Path(name) for name in inputs if _is_text(name)]
    if files and tokenizer is None:
        raise UserError(f"{files[0]} is text: name the tokenizer to read it with by --tokenizer FILE.")
    prefixes = _each_once([str(dataset_prefix(name)) for name in inputs if not _is_text(name)])
    for prefix in prefixes:  # all of them are looked at before the first is counted
        check_known(prefix, read_header(prefix), [number in ALL for number in range(256)], "`all`")
    domains = [_read_dataset(prefix) for prefix in prefixes]
    if tokenizer is not None and files:
        domains += _read_texts(Corpus(files, unwrap=unwrap, label_field="source"), load_tokenizer(tokenizer))
    if not any(domain.tokens for domain in domains):
        raise UserError(f"{', '.join(map(str, inputs))}: there is no text there.")
    result = {"inputs": list(inputs), "unwrap": unwrap, "domains": [domain.result() for domain in domains]}
    write_report(output, "corpus", result, markdown(result), figures(result))
    return result


def _is_text(name: str) -> bool:
    return kind(Path(name)) is not None


def _each_once(names: list[str]) -> list[str]:
    """The names. Raises UserError for one that was given twice."""
    twice = [name for name, count in Counter(str(Path(name).resolve()) for name in names).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]} was given twice: name each dataset once.")
    return names


def _read_dataset(prefix: str) -> Domain:
    """The domain that is a dataset."""
    header = read_header(prefix)
    domain = Domain(Path(prefix).name, header.tokenizer.file, header.tokenizer.sha256)
    with progress(header.tokens, "token") as bar:
        for chunk in token_chunks(open_classes(prefix), CHUNK):
            domain.add(chunk)
            bar.update(len(chunk))
    domain.documents = header.documents
    return domain


def _read_texts(corpus: Corpus, tokenizer: Tokenizer) -> list[Domain]:
    """The domains of text files, in the order in which they first come."""
    class_of_token = classify(tokenizer.token_bytes())
    domains: dict[str, Domain] = {}
    with progress(corpus.size, "B") as bar:
        for document in corpus:
            name = document.label or _stem(document)
            domain = domains.setdefault(name, Domain(name, tokenizer.path.name, tokenizer.sha256))
            ids = [token for piece in tokenizer.encode_batch(tokenizer.split(document.text)) for token in piece]
            domain.add(class_of_token[[*ids, tokenizer.eod]], documents=1)
            bar.update(document.position - bar.n)
    return list(domains.values())


def _stem(document: Document) -> str:
    """Name of the file that a document is from, without folder and suffixes."""
    return Path(document.source.rpartition(":")[0] or document.source).name.split(".")[0]


def _beyond(histogram: Counter[int]) -> dict[int, float]:
    """Share of the gaps that are longer than 1, 2, 4, ... tokens, as far as there are any."""
    total = sum(histogram.values())
    result = {}
    length = 1
    while any(gap > length for gap in histogram):
        result[length] = sum(count for gap, count in histogram.items() if gap > length) / total
        length *= 2
    return result


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    domains = result["domains"]
    tokenizers = {domain["tokenizer_sha256"]: domain["tokenizer"] for domain in domains}
    several = " Densities of different tokenizers do not compare." if len(tokenizers) > 1 else ""
    used = [row["separators"] for row in domains[0]["rows"]]
    used = [name for name in used if any(_row(domain, name)["count"] for domain in domains)]
    return "\n".join(
        [
            "# Separators by domain\n",
            f"Tokenizer {', '.join(tokenizers.values())}.{several} Density is the share of all tokens, end-of-document "
            "tokens included. A gap is the distance in tokens from one such separator to the next (1: side by side), "
            "over the documents of a domain one after the other.\n",
            _table("Density", domains, used, lambda row: f"{row['density']:.3%}", total=True).markdown(),
            _table("Mean gap", domains, used, lambda row: _gap(row, "mean")).markdown(),
            _table("Median, 95th percentile and longest gap", domains, used, _spread).markdown(),
        ]
    )


def _table(title: str, domains: list[dict[str, Any]], names: list[str], show: Any, *, total: bool = False) -> Table:
    """One row per selection and one column per domain."""
    rows = [[name, *(show(_row(domain, name)) for domain in domains)] for name in names]
    if total:
        rows.append(["tokens", *(f"{domain['tokens']:,}" for domain in domains)])
        rows.append(["documents", *(f"{domain['documents']:,}" for domain in domains)])
    return Table(title, ["separators", *(domain["domain"] for domain in domains)], rows)


def _row(domain: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in domain["rows"] if row["separators"] == name)


def _gap(row: dict[str, Any], key: str) -> str:
    return "-" if row["gaps"] is None else f"{row['gaps'][key]:,.1f}"


def _spread(row: dict[str, Any]) -> str:
    return "-" if row["gaps"] is None else " / ".join(f"{row['gaps'][key]:,}" for key in ("p50", "p95", "max"))


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Density by class, and how long gaps get, of every domain."""
    domains = result["domains"]
    names = [e.name for e in CLASSES if any(_row(domain, e.name)["count"] for domain in domains)]
    density = {domain["domain"]: [100 * _row(domain, name)["density"] for name in names] for domain in domains}
    curves: list[plots.Curve] = []
    for domain in domains:
        gaps = _row(domain, "paper")["gaps"]
        if gaps is not None and gaps["beyond"]:
            curves.append((domain["domain"], list(gaps["beyond"]), list(gaps["beyond"].values()), {}))
    found = {"density": plots.bars("Separators by class", names, density, "percent of all tokens")}
    if curves:
        found["gaps"] = plots.lines(
            "Gaps between the paper's separators",
            curves,
            "tokens from one to the next",
            "share of gaps that are longer",
            log_x=True,
            log_y=True,
        )
    return found
