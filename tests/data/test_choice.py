"""separators=auto over the headers of data, and side-cars of before a class was split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.separators import CLASSES, class_numbers
from data_prep.sidecar import open_classes, read_header
from data_prep.stats import statistics
from data_prep.verify import verify
from sepllm_train.base.errors import UserError
from sepllm_train.base.files import hash_file
from sepllm_train.config.schema import AttentionConfig, Config, DataConfig
from sepllm_train.data.choice import settle_separators
from sepllm_train.data.corpus import open_corpus
from sepllm_train.model.pattern import resolve_pattern
from tests.support.datasets import copy_dataset, edit_header

NUMBER = {entry.name: entry.number for entry in CLASSES}


def settled(entries: list[Any], **attention: Any) -> Any:
    """Configuration and choice of a run over `entries`."""
    config = Config(
        data=DataConfig(source="prefixes", prefixes=entries),
        attention=AttentionConfig(**{"separators": "auto", **attention}),
    )
    return settle_separators(config, open_corpus(config.data))


def test_auto_becomes_names_within_the_budget(prefixes: tuple[str, str]) -> None:
    config, choice = settled([prefixes[0]])
    chosen = class_numbers(config.attention.separators)
    measured = np.isin(open_classes(prefixes[0]), chosen).mean()
    assert 0.08 <= measured <= 0.16 and choice.density == pytest.approx(measured)
    assert resolve_pattern(config.attention, 1).tier_of_class.nonzero()[0].tolist() == list(chosen)
    assert settled([prefixes[0]]) == (config, choice)
    assert str(choice).startswith(f"separators: auto took {', '.join(choice.names)} | {measured:.1%} of the tokens")
    assert "warning" not in str(choice)
    occurring = {entry.name for entry in read_header(prefixes[0]).classes if entry.count}
    assert occurring == {*choice.names, *choice.left_out}


def test_blend_counts_by_weight(prefixes: tuple[str, str]) -> None:
    config, choice = settled([{"path": prefixes[0], "weight": 3}, {"path": prefixes[1], "weight": 1}])
    chosen = class_numbers(config.attention.separators)
    shares = [np.isin(open_classes(prefix), chosen).mean() for prefix in prefixes]
    assert choice.density == pytest.approx(0.75 * shares[0] + 0.25 * shares[1])


def test_other_settings_stay_as_they_are(prefixes: tuple[str, str]) -> None:
    for attention in ({"separators": "paper"}, {"pattern": "dense"}, {"pattern": "fixed", "interval": 8}):
        config, choice = settled([prefixes[0]], **attention)
        assert choice is None and config.attention == AttentionConfig(**{"separators": "auto", **attention})


def test_budgets_that_cannot_be_met(prefixes: tuple[str, str]) -> None:
    everything = statistics(prefixes[0], separators="all", length=64).density
    _, choice = settled([prefixes[0]], density_budget=[0.9, 0.95])
    assert choice.density == pytest.approx(everything) and not choice.left_out
    assert "warning: the separator classes of this data cannot reach 90.0%" in str(choice)
    assert f"| {everything:.1%} of the tokens" in str(choice)
    with pytest.raises(
        UserError, match="no separator class of the data has at most 0.0% of its tokens.*density_budget"
    ):
        settled([prefixes[0]], density_budget=[0.0, 1e-6])


@pytest.fixture
def old(prefixes: tuple[str, str], tmp_path: Path) -> str:
    """A dataset as it was prepared before colons with other symbols had a class of their own."""
    new, prefix = prefixes[1], str(tmp_path / "old")
    header = read_header(new)
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).write_bytes(Path(new + suffix).read_bytes())
    name = Path(header.tokenizer.file)
    (tmp_path / name).write_bytes((Path(new).parent / name).read_bytes())
    classes = np.array(open_classes(new))
    assert (classes == NUMBER["colon_mixed"]).any()
    classes[classes == NUMBER["colon_mixed"]] = NUMBER["comma_mixed"]
    Path(prefix + ".sep.bin").write_bytes(classes.tobytes())
    content = json.loads(Path(new + ".sep.json").read_text(encoding="utf8"))
    split = content["classes"].pop(NUMBER["colon_mixed"] - 1)
    whole = content["classes"][NUMBER["comma_mixed"] - 1]
    whole.update(name="clause_mixed", description="a clause mark with other symbols, such as ),")
    for key in ("ids", "strings", "count", "density"):
        whole[key] += split[key]
    info = hash_file(Path(prefix + ".sep.bin"))
    content["files"][".sep.bin"] = {"size": info.size, "sha256": info.sha256}
    Path(prefix + ".sep.json").write_text(json.dumps(content), encoding="utf8")
    return prefix


def test_an_old_side_car_stays_valid_and_means_the_same(prefixes: tuple[str, str], old: str) -> None:
    assert verify(old).tokens == read_header(prefixes[1]).tokens
    for separators in ("all", "paper", "clause_mixed"):
        numbers = list(class_numbers(separators))
        assert np.array_equal(np.isin(open_classes(old), numbers), np.isin(open_classes(prefixes[1]), numbers))
        assert settled([old], separators=separators)[1] is None


def test_what_an_old_side_car_cannot_tell_is_refused(prefixes: tuple[str, str], old: str) -> None:
    with pytest.raises(UserError, match=r"tells comma_mixed from colon_mixed.*old counts as one.*annotate .*old --tok"):
        settled([prefixes[0], old], separators=["comma_mixed"])
    config, _ = settled([prefixes[1]], separators=["comma_mixed"])
    assert config.attention.separators == ["comma_mixed"]


def test_a_class_that_came_after_the_side_car_is_refused(prefixes: tuple[str, str], tmp_path: Path) -> None:
    """In training by name, in `all` and where another dataset of the blend has it for auto, and in stats."""
    old = str(copy_dataset(prefixes[0], tmp_path, "old"))
    number = NUMBER["other_sentence"]
    edit_header(old, lambda header: header.update(classes=[c for c in header["classes"] if c["number"] != number]))
    words = r"names other_sentence, a class that the side-car of .*old does not know: make .*annotate .*old --tok"
    for separators in ("all", ["paper", "other_sentence"]):
        with pytest.raises(UserError, match=words):
            settled([old], separators=separators)
        with pytest.raises(UserError, match=words):
            statistics(old, separators=",".join([separators] if separators == "all" else separators), length=64)
    with pytest.raises(UserError, match=words):
        settled([prefixes[1], old], separators="all")
    assert settled([old], separators="paper")[1] is None


def test_auto_on_data_without_separators(prefixes: tuple[str, str], tmp_path: Path) -> None:
    bare = str(copy_dataset(prefixes[0], tmp_path, "bare"))
    edit_header(bare, lambda header: [entry.update(count=0, density=0.0) for entry in header["classes"]])
    with pytest.raises(
        UserError, match="attention.separators=auto: the data has no separators.*attention=dense"
    ) as got:
        settled([bare], density_budget=[0.1, 0.2])
    assert "rarest" not in str(got.value)


def test_auto_takes_what_an_old_side_car_holds_as_one(prefixes: tuple[str, str], old: str) -> None:
    for entries in ([old], [prefixes[0], old]):
        config, choice = settled(entries, density_budget=[0.5, 0.9])
        assert "clause_mixed" in config.attention.separators
        assert not {"comma_mixed", "colon_mixed"} & set(config.attention.separators)
        chosen = class_numbers(config.attention.separators)
        counts = [np.isin(open_classes(e), chosen).sum() for e in entries]
        assert choice.density == pytest.approx(sum(counts) / sum(len(open_classes(e)) for e in entries))
