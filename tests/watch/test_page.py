"""The page in headless Chromium: what is drawn, what follows without a reload, and that nothing leaves the machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from benchmarks.chromium import Chromium, programs
from sepllm_train.compare.plots import COLOURS
from sepllm_train.metrics.flops import CONVENTIONS
from tests.compare.run_records import COMPARABLE, evaluation, training
from tests.support.waiting import HANG_SECONDS, wait_until
from tests.watch.conftest import Client, GrowingRun

NewRun = Callable[..., GrowingRun]
Serving = Callable[..., Client]

LABELS = "return [...document.querySelectorAll('.plot canvas[role=img]')].map((c) => c.getAttribute('aria-label'))"
ROWS = "return [...document.querySelector('#runs').rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
# Pixels of a canvas, read from a copy: Chromium warns of canvases that are read often.
READ = """
const read = (canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  return copy.getImageData(0, 0, canvas.width, canvas.height).data;
};
"""
# Pixels of each chart that have a colour, within 3 of 255 in each part: those of bold curves are opaque.
PIXELS = (
    READ
    + """
const wanted = [1, 3, 5].map((at) => parseInt(args[0].slice(at, at + 2), 16));
return [...document.querySelectorAll('.plot canvas[role=img]')].map((canvas) => {
  const pixels = read(canvas);
  let count = 0;
  for (let at = 0; at < pixels.length; at += 4)
    count += pixels[at + 3] > 250 && wanted.every((value, part) => Math.abs(pixels[at + part] - value) <= 3);
  return count;
});
"""
)
# Pixels that the pointer has drawn above each chart.
ABOVE = (
    READ
    + """
return [...document.querySelectorAll('.plot canvas[aria-hidden]')]
  .map((canvas) => read(canvas).filter((value) => value > 0).length);
"""
)
SELECT = "const s = document.getElementById(args[0]); s.value = args[1]; s.dispatchEvent(new Event('change'));"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests."""
    if programs() is None:
        pytest.skip("chromium and chromedriver are not installed")
    with Chromium() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Chromium) -> Iterator[Chromium]:
    """The browser with a tall light window; afterwards no error was told and nothing beyond loopback was asked for."""
    chromium.emulate(height=1700)
    chromium.console(), chromium.requested()
    yield chromium
    asked = [url for url in chromium.requested() if not url.startswith(("chrome:", "data:"))]
    assert asked and all(url.startswith("http://127.0.0.1:") for url in asked), asked
    assert chromium.console() == []


def shown(browser: Chromium, client: Client) -> None:
    """Open the page and wait until it has drawn all records."""
    browser.open(client.url)
    browser.await_true(
        "return document.querySelector('#runs').rows.length > 0 && document.querySelector('#progress').hidden"
    )
    browser.await_true("return performance.getEntriesByName('frame').length > 0")


@pytest.fixture
def two(new_run: NewRun, serving: Serving) -> tuple[GrowingRun, GrowingRun, Client]:
    """A running and a finished run, and their server."""
    dense, sep = new_run("dense"), new_run("sep", status="finished", steps=40)
    dense.train(1, 30, **{"train/mfu": 0.387})
    sep.train(1, 40, loss=4.5)
    # The last records count as written just now, however long the browser takes.
    for run in (dense, sep):
        os.utime(run.log.path, (time.time() + HANG_SECONDS, time.time() + HANG_SECONDS))
    return dense, sep, serving(dense, sep)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_and_table(browser: Chromium, two: Any, scheme: str, tmp_path: Path) -> None:
    browser.emulate(scheme=scheme, height=1700)
    shown(browser, two[2])
    rows = browser.run(ROWS)
    assert rows[0][:9] == ["dense", "running", "30/100", "4.7000", "4.8000", "500", "25.0%", "38.7%", "2m20s"]
    assert rows[1][:9] == ["sep", "finished", "40/40", "4.1000", "4.2000", "500", "25.0%", "-", "-"]
    assert all(row[9] == "0s ago" for row in rows)
    labels = browser.run(LABELS)
    assert labels == [
        f"Loss against FLOPs: 4 curves, 77 points, over training MFLOPs (flops/model: {CONVENTIONS['model'].label})",
        "Loss against time: 4 curves, 77 points, over training time, seconds (validation and checkpoints left out)",
        "Loss against tokens: 4 curves, 77 points, over training tokens, thousands",
        "Throughput: 2 curves, 70 points, over training tokens, thousands",
        "Attended share of causal pairs: 2 curves, 70 points, over training tokens, thousands",
    ]
    for colour in COLOURS[:2]:
        assert min(browser.run(PIXELS, colour)[:3]) > 50
    assert max(browser.run(PIXELS, COLOURS[2])) == 0
    browser.screenshot(tmp_path / "page.png")
    picture = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    ground = picture[5, 5].mean()
    assert ground > 0.98 if scheme == "light" else ground < 0.12
    for colour in COLOURS[:2]:
        assert np.count_nonzero(np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.015) > 500


def test_new_rows_appear_without_a_reload(browser: Chromium, two: Any) -> None:
    dense, _, client = two
    shown(browser, client)
    browser.run("window.same = true")
    before = browser.run(PIXELS, COLOURS[0])
    dense.train(31, 60)
    dense.tell(status="finished")
    browser.await_true("return document.querySelector('#runs').rows[0].cells[2].textContent === '60/100'")
    assert browser.run(ROWS)[0][1] == "finished"
    assert browser.run(LABELS)[2].startswith("Loss against tokens: 4 curves, 110 points")
    assert browser.run(PIXELS, COLOURS[0]) != before
    assert browser.run("return window.same")
    # A resumed run goes back.
    dense.log.rewind(20)
    dense.tell(status="running")
    browser.await_true("return document.querySelector('#runs').rows[0].cells[2].textContent === '20/100'")
    assert browser.run(LABELS)[2].startswith("Loss against tokens: 4 curves, 66 points")


def test_scores_have_charts_of_their_own(browser: Chromium, two: Any) -> None:
    """One appears when a run is first evaluated, over FLOPs, and holds every run that has the score."""
    dense, sep, client = two
    sep.log.write(evaluation(40, 0.5))
    # Low on the page, where charts are drawn as they come into sight.
    browser.emulate(height=3000)
    shown(browser, client)
    titles = "return [...document.querySelectorAll('figcaption span')].map((title) => title.textContent)"
    scores = ["piqa acc_norm against FLOPs", "piqa acc against FLOPs", "wikitext word_perplexity against FLOPs"]
    assert browser.run(titles)[5:] == scores
    dense.train(31, 40)
    for step in (20, 40):
        dense.log.write(evaluation(40 + step, step / 80))
    browser.await_true("return document.querySelector('#runs').rows[0].cells[2].textContent === '80/100'")
    browser.await_true(f"return ({LABELS.removeprefix('return ')})[6].startsWith('{scores[1]}: 2 curves, 3 points')")
    assert "MFLOPs (flops/model" in browser.run(LABELS)[6]
    assert browser.run(titles)[5:] == scores


def test_an_unchanged_state_is_not_sent_again(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    browser.run("performance.clearResourceTimings()")
    told = "return performance.getEntriesByType('resource').filter((entry) => entry.name.includes('/state'))"
    browser.await_true(f"{told}.length > 0")
    assert browser.run(f"{told}.map((entry) => [entry.responseStatus, entry.decodedBodySize])")[0] == [304, 0]


def test_the_convention_is_on_the_axis(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    for key, convention in CONVENTIONS.items():
        browser.run(SELECT, "convention", key)
        assert browser.run(LABELS)[0].endswith(f"FLOPs (flops/{key}: {convention.label})")


def test_axes_and_training_curves_are_chosen(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    linear = browser.run(PIXELS, COLOURS[0])
    browser.run(SELECT, "across", "log")
    browser.await_true(
        "return performance.getEntriesByType('resource').some((entry) => entry.name.includes('scale=log'))"
    )

    def drawn_anew() -> bool:
        pixels = browser.run(PIXELS, COLOURS[0])
        return pixels != linear and min(pixels[:3]) > 50

    wait_until(drawn_anew, "curves over a logarithmic axis")
    browser.run(SELECT, "up", "log")
    browser.run(SELECT, "training", "none")
    assert browser.run(LABELS)[1].startswith("Loss against time: 2 curves, 7 points")


def test_the_legend_hides_runs(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    browser.run("document.querySelectorAll('#legend button')[1].click()")
    assert browser.run(LABELS)[0].startswith("Loss against FLOPs: 2 curves, 33 points")
    assert max(browser.run(PIXELS, COLOURS[1])) == 0
    pressed = "return [...document.querySelectorAll('#legend button')].map((b) => b.getAttribute('aria-pressed'))"
    assert browser.run(pressed) == ["true", "false"]
    browser.run("document.querySelectorAll('#legend button')[1].click()")
    assert browser.run(LABELS)[0].startswith("Loss against FLOPs: 4 curves")


def test_the_pointer_marks_one_point_in_all_charts(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    assert browser.run(ABOVE) == [0] * 5
    box = browser.run(
        "const b = document.querySelectorAll('.plot')[2].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
    )
    browser.point(box[0] + box[2] / 2, box[1] + box[3] / 2)
    browser.await_true("return !document.querySelectorAll('.tip')[2].hidden")
    tips = browser.run("return [...document.querySelectorAll('.tip')].map((tip) => tip.hidden ? '' : tip.textContent)")
    assert "loss" in tips[2] and "thousand tokens" in tips[2] and ("dense" in tips[2] or "sep" in tips[2])
    assert [bool(tip) for tip in tips] == [False, False, True, False, False]
    assert min(browser.run(ABOVE)) > 100
    browser.point(5, 5)
    browser.await_true("return document.querySelectorAll('.tip')[2].hidden")
    assert browser.run(ABOVE) == [0] * 5


def test_dragging_zooms(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    before = browser.run(PIXELS, COLOURS[0])
    x, y, width, height = browser.run(
        "const b = document.querySelectorAll('.plot')[1].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]"
    )
    for kind, place in (("mousePressed", 0.3), ("mouseMoved", 0.5), ("mouseReleased", 0.5)):
        at = {"x": x + place * width, "y": y + height / 2, "button": "left", "buttons": 1, "clickCount": 1}
        browser.command("Input.dispatchMouseEvent", type=kind, **at)
    back = "document.querySelectorAll('figcaption button')[1]"
    browser.await_true(f"return !{back}.hidden")
    assert browser.run(PIXELS, COLOURS[0])[1] != before[1]
    browser.run(f"{back}.click()")
    browser.point(5, 5)
    assert browser.run(PIXELS, COLOURS[0]) == before


def test_the_theme_can_be_chosen(browser: Chromium, two: Any) -> None:
    shown(browser, two[2])
    ground = "return getComputedStyle(document.body).backgroundColor"
    seen = []
    for _ in range(3):
        seen.append((browser.run("return document.querySelector('#theme').textContent"), browser.run(ground)))
        browser.run("document.querySelector('#theme').click()")
    light, dark = "rgb(255, 255, 255)", "rgb(21, 23, 26)"
    assert seen == [("Theme: system", light), ("Theme: light", light), ("Theme: dark", dark)]


def test_a_phone_is_wide_enough(browser: Chromium, two: Any, new_run: NewRun) -> None:
    browser.emulate(width=360, height=800, phone=True)
    shown(browser, two[2])
    assert browser.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    told = browser.run(
        "const c = document.querySelector('#runs').rows[0].cells[3]; return getComputedStyle(c, '::before').content"
    )
    assert told == '"Training loss "'


def test_silent_waiting_and_foreign_runs(browser: Chromium, new_run: NewRun, serving: Serving) -> None:
    """Names are text: what looks like HTML stays what it is."""
    silent, hostile = new_run("silent"), new_run("hostile", name="<img src=x onerror=alert(1)>&amp;")
    foreign = new_run("foreign", comparable={**COMPARABLE, "vocabulary": 7})
    silent.train(1, 5)
    silent.write("<b>oops</b>\n")
    silent.log.write(training(6, float("nan")))
    ago = time.time() - 12.5 * 3600
    os.utime(silent.log.path, (ago, ago))
    shown(browser, serving(silent, hostile, foreign))
    rows = browser.run(ROWS)
    assert rows[0][1] == "no record for 12h" and rows[0][9] == "12h ago" and rows[0][3] == "-"
    assert rows[1][:3] == ["<img src=x onerror=alert(1)>&amp;", "waiting", "-"]
    notes = browser.run("return [...document.querySelectorAll('#notes li')].map((note) => note.textContent)")
    assert notes[0].startswith(
        "Losses of foreign do not compare with those of silent: they used different vocabularies"
    )
    assert notes[1] == "silent: Line 6 of metrics.jsonl is not JSON: it is skipped."


def test_a_server_that_is_gone_is_told(chromium: Chromium, two: Any) -> None:
    shown(chromium, two[2])
    chromium.run("window.fetch = async () => { throw new TypeError('gone'); };")
    chromium.await_true(
        "return document.querySelector('#state').textContent.startsWith('no answer from the server for')"
    )
