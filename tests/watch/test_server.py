"""The server over HTTP: what it tells of runs that grow, what an unchanged state costs, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sepllm_train.watch.server import Handler
from tests.compare.run_records import COMPARABLE, evaluation, training
from tests.support.waiting import HANG_SECONDS, wait_until
from tests.watch.conftest import Client, GrowingRun

# Connections at once, as in watch/connections.py.
MOST = 64
NewRun = Callable[..., GrowingRun]
Serving = Callable[..., Client]


def test_new_rows_are_in_the_next_state(new_run: NewRun, serving: Serving) -> None:
    one, two = new_run("one"), new_run("two")
    one.train(1, 20)
    client = serving(one, two)
    state = client.state()
    assert [(run["label"], run["status"], run["step"]) for run in state.header["runs"]] == [
        ("one", "running", 20),
        ("two", "waiting", 0),
    ]
    assert not state.header["loading"] and state.header["read"] == state.header["total"] > 0
    loss = state.curves[0]["loss"]
    assert loss["step"] == list(range(1, 21)) and loss["tokens"] == [1000.0 * step for step in range(1, 21)]
    assert loss["flops/model"] == pytest.approx([4e6 * step for step in range(1, 21)])
    assert loss["value"] == pytest.approx([5 - step / 100 for step in range(1, 21)])
    assert state.curves[0]["validation"]["step"] == [10, 20] and state.curves[1]["loss"]["value"] == []
    two.train(1, 3)
    later = client.state(since=state.header["tag"])
    assert [run["step"] for run in later.header["runs"]] == [20, 3]
    (changed,) = later.curves
    assert changed["loss"]["step"] == [1, 2, 3] and changed["share"]["value"] == [0.25] * 3


def test_a_resumed_run_replaces_what_it_abandoned(new_run: NewRun, serving: Serving) -> None:
    run = new_run("one")
    run.train(1, 30)
    client = serving(run)
    run.log.rewind(12)
    run.train(13, 18, loss=9.0)
    loss = client.state().curves[0]["loss"]
    assert loss["step"] == list(range(1, 19)) and loss["value"][11:13] == pytest.approx([4.88, 8.87])


def test_an_unchanged_state_costs_nothing(new_run: NewRun, serving: Serving) -> None:
    run = new_run("one")
    run.train(1, 20)
    client = serving(run)
    tag = client.state().headers["ETag"]
    same = client.ask("/state?scale=linear", If_None_Match=tag)
    assert (same.status, same.content, same.headers["ETag"]) == (304, b"", tag)
    assert client.ask("/state?scale=log", If_None_Match=tag).status == 200
    run.write('{"step": 21')
    assert client.ask("/state?scale=linear", If_None_Match=tag).status == 304
    run.tell(status="finished")
    changed = client.ask(f"/state?scale=linear&since={tag.strip(chr(34))}", If_None_Match=tag)
    assert changed.status == 200 and changed.header["runs"][0]["status"] == "finished" and changed.curves == []
    assert not changed.header["loading"]


@pytest.mark.parametrize("since", ["", "x", "abc-linear-1", "-", "linear", "%00", "9" * 5000])
def test_a_tag_of_elsewhere_gets_everything(new_run: NewRun, serving: Serving, since: str) -> None:
    run = new_run("one")
    run.train(1, 5)
    assert len(serving(run).state(since=since).curves) == 1


def test_what_is_wrong_is_told(new_run: NewRun, serving: Serving, tmp_path: Path) -> None:
    one = new_run("one")
    other = new_run("other", comparable={**COMPARABLE, "tokenizer": "e" * 64})
    seeded = new_run("seeded", comparable={**COMPARABLE, "seed_of_data_order": 7})
    (tmp_path / "bare").mkdir()
    one.train(1, 2)
    one.write("oops\n")
    header = serving(one, other, seeded, tmp_path / "bare").state().header
    (note,) = header["notes"]
    assert note.startswith("Losses of other do not compare with those of one: they used different tokenizers: ")
    assert header["runs"][0]["notes"] == ["Line 3 of metrics.jsonl is not JSON: it is skipped."]
    assert (header["runs"][3]["label"], header["runs"][3]["status"]) == ("bare", "waiting")


def test_runs_of_one_name_are_told_apart(new_run: NewRun, serving: Serving) -> None:
    one, two = new_run("seed1", name="sep"), new_run("seed2", name="sep")
    labels = [run["label"] for run in serving(one, two).state().header["runs"]]
    assert labels == [f"sep ({one.folder})", f"sep ({two.folder})"]


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/../secret.txt",
        "/page/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "//etc/passwd",
        "/etc/passwd",
        "/one/run.json",
        "/run.json",
        "/page.html",
        "/page.js/",
        "/page.js?x=1",
        "/server.py",
        "http://127.0.0.1/../secret.txt",
        "http://127.0.0.1//state",
        "/state/../secret.txt",
        "/\0",
        "//[",
        "//[/state",
    ],
)
def test_no_path_reaches_the_filesystem(new_run: NewRun, serving: Serving, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    run = new_run("one")
    with socket.create_connection(("127.0.0.1", serving(run).port), timeout=HANG_SECONDS) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1] in (b"400", b"404") and b"secret" not in answer


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9999", "127.0.0.1:80", "[::1]:8765", "127.8.0.1", "LOCALHOST"]
)
def test_names_of_this_machine_are_served(new_run: NewRun, serving: Serving, host: str) -> None:
    assert serving(new_run("one")).ask("/state", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "[", "@"],
)
@pytest.mark.parametrize("path", ["/", "/state", "/settings"])
def test_other_host_names_are_refused(new_run: NewRun, serving: Serving, host: str, path: str) -> None:
    """A page of a foreign name that is made to resolve to this machine (DNS rebinding) reads nothing."""
    answer = serving(new_run("one")).ask(path, Host=host)
    assert answer.status == 403 and b"one" not in answer.content.replace(b"localhost", b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_only_get_is_served(new_run: NewRun, serving: Serving, method: str) -> None:
    answer = serving(new_run("one")).ask("/state", method)
    assert answer.status == 405 and answer.headers["Allow"] == "GET"
    assert (answer.content == b"") == (method == "HEAD")


def test_unknown_scales_and_methods_are_refused(new_run: NewRun, serving: Serving) -> None:
    client = serving(new_run("one"))
    assert client.ask("/state?scale=cubic").status == 400
    assert client.ask("/", "BREW").status == 501


def test_the_page_may_only_talk_to_its_server(new_run: NewRun, serving: Serving) -> None:
    client = serving(new_run("one"))
    page = client.ask("/")
    assert page.status == 200 and page.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "Access-Control-Allow-Origin" not in page.headers and page.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("page.css", "page.js", "chart.js", "pointer.js", "scale.js", "table.js", "format.js"):
        assert client.ask(f"/{name}").status == 200
    settings = json.loads(client.ask("/settings").content)
    assert set(settings["conventions"]) == {"model", "dense", "paper"} and settings["flops"] == "model"


def test_scores_are_curves_of_their_own(new_run: NewRun, serving: Serving) -> None:
    """By their keys, behind the others; a resumed run abandons later ones, and no other key makes a curve."""
    run = new_run("one")
    run.train(1, 20)
    for step, score in ((10, 0.5), (20, 0.75), (15, 0.625)):
        run.log.write(evaluation(step, score) | {"eval/no score/x": 1.0, "eval/piqa/text": None})
    client = serving(run, new_run("two"))
    one, two = client.state().curves
    assert list(one)[4:] == ["eval/piqa/acc_norm", "eval/piqa/acc", "eval/wikitext/word_perplexity", "eval/piqa/text"]
    assert one["eval/piqa/acc"]["step"] == [10, 15] and one["eval/piqa/acc"]["value"] == [0.5, 0.625]
    assert one["eval/piqa/acc"]["flops/model"] == [4e7, 6e7] and len(two) == 4
    assert json.loads(client.ask("/settings").content)["scored"][-2:] == ["value", "mean"]


def test_many_browsers_at_once(new_run: NewRun, serving: Serving) -> None:
    """Requests while rows come, from several threads: every state is whole and none goes back."""
    from concurrent.futures import ThreadPoolExecutor

    run = new_run("one")
    client = serving(run)

    def watch(_: int) -> list[int]:
        states = [client.state() for _ in range(15)]
        assert all(
            state.curves[0]["loss"]["step"] == list(range(1, state.header["runs"][0]["step"] + 1)) for state in states
        )
        return [state.header["runs"][0]["step"] for state in states]

    with ThreadPoolExecutor(6) as pool:
        watching = pool.map(watch, range(6))
        for step in range(1, 60):
            run.train(step, step)
        seen = list(watching)
    assert all(steps == sorted(steps) for steps in seen)


def opened(client: Client, sent: bytes = b"") -> socket.socket:
    """A connection of somebody who then says no more."""
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=HANG_SECONDS)
    connection.sendall(sent)
    return connection


@pytest.mark.parametrize("sent", [b"", b"GET /state HTTP/1.1\r\nHost: localhost\r\nX-Slow: "], ids=["silent", "slow"])
def test_connections_that_are_held_open_keep_nobody_out(new_run: NewRun, serving: Serving, sent: bytes) -> None:
    """Those that wait longest make room; the threads are no more than the connections."""
    client = serving(new_run("one"))
    before = threading.active_count()
    held = [opened(client, sent) for _ in range(3 * MOST)]
    assert client.state().header["runs"][0]["label"] == "one"
    closed = [connection for connection in held[:MOST] if connection.recv(1) == b""]
    assert len(closed) == MOST
    wait_until(lambda: threading.active_count() - before <= MOST, "threads of closed connections end")
    for connection in held:
        connection.close()


def test_a_browser_that_asks_is_not_closed_for_those_that_do_not(new_run: NewRun, serving: Serving) -> None:
    client = serving(new_run("one"))
    browser = http.client.HTTPConnection("127.0.0.1", client.port, timeout=HANG_SECONDS)
    held = []
    for _ in range(3):
        browser.request("GET", "/settings")
        assert browser.getresponse().read()
        own = browser.sock
        held += [opened(client) for _ in range(MOST - 1)]
        # All of these have been accepted when this is answered.
        client.ask("/settings")
        browser.request("GET", "/settings")
        assert browser.getresponse().read() and browser.sock is own
    for connection in [browser, *held]:
        connection.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /" + b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * (1 << 18),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + (b"X: " + b"x" * 60_000 + b"\r\n") * 90 + b"\r\n",
        b"\r\n" * (1 << 20),
    ],
    ids=["line", "header", "headers", "bomb", "empty"],
)
def test_heads_have_a_largest_size(new_run: NewRun, serving: Serving, sent: bytes) -> None:
    client = serving(new_run("one"))
    with socket.create_connection(("127.0.0.1", client.port), timeout=HANG_SECONDS) as connection:
        try:
            connection.sendall(sent)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            # Closed with bytes that were not read.
            answer = b"HTTP/1.1 431"
    assert answer[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"HTTP/1.1 414", b"")
    assert client.state().header["runs"][0]["label"] == "one"


def test_a_head_in_single_bytes_has_an_end(new_run: NewRun, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "head_seconds", 0.3)
    client = serving(new_run("one"))
    with opened(client, b"GET /state HTTP/1.1\r\nHost: localhost\r\nX: ") as connection, pytest.raises(ConnectionError):
        while True:
            connection.sendall(b"x")
            time.sleep(0.01)


def test_what_follows_a_request_is_no_request(new_run: NewRun, serving: Serving) -> None:
    client = serving(new_run("one"))
    inner = b"GET /settings HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner)
    with opened(client, head + inner) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_tag_of_many_digits_gets_everything(new_run: NewRun, serving: Serving) -> None:
    run = new_run("one")
    run.train(1, 5)
    client = serving(run)
    prefix = client.state().header["tag"].rpartition("-")[0]
    assert len(client.state(since=f"{prefix}-{'9' * 5000}").curves) == 1


def changed(number: int, /, **more: Any) -> str:
    return json.dumps(training(number, 5.0) | {"train/attended_share": 0.25} | more) + "\n"


BAD_LINES = {
    "seconds": changed(3, seconds=1e308) + changed(4, seconds=-1e308),
    "losses": changed(3, **{"train/loss": 1e308}) + changed(4, **{"train/loss": -1e308, "train/mfu": 1e308}),
    "digits": changed(3, step=10**400) + changed(4).replace("4", "4" * 9000),
    "steps": changed(2**63) + changed(10**25),
    "types": changed(3, step="3") + changed(4, seconds=[1]) + changed(5, tokens={}) + "[]\n3\n",
    "depth": "[" * 200_000 + "\n" + '{"a":' * 200_000 + "\n",
    "bytes": "\x00\n\ud800\n",
    "infinite": changed(3, seconds=float("inf")) + changed(4, step=float("nan")) + '{"step": 1e999}\n',
}
BAD_INFO: dict[str, dict[str, Any]] = {
    "steps": {"steps": 10**400},
    "many steps": {"steps": 2**63, "status": "running"},
    "types": {"steps": "many", "name": ["a"], "status": {"a": [1]}, "comparable": [1]},
    "name": {"name": "\ud800" * 1000},
    "long": {"name": "x" * 500_000, "status": "y" * 500_000},
    "settings": {"comparable": COMPARABLE | {str(n): {"a": n} for n in range(20_000)}},
    "value": {"comparable": COMPARABLE | {"data": ["x" * 800_000]}},
}


@pytest.mark.parametrize(
    ("lines", "info"),
    [*((lines, {}) for lines in BAD_LINES.values()), *(("", info) for info in BAD_INFO.values())],
    ids=[*BAD_LINES, *(f"run.json {name}" for name in BAD_INFO)],
)
def test_a_bad_run_hides_no_other(new_run: NewRun, serving: Serving, lines: str, info: dict[str, Any]) -> None:
    good, bad, last = new_run("good"), new_run("bad"), new_run("last")
    for run in (good, bad, last):
        run.train(1, 2)
    with open(bad.log.path, "ab") as stream:
        stream.write(lines.encode("utf8", "surrogatepass"))
    (bad.folder / "run.json").write_text(json.dumps(bad.info | info))
    client = serving(good, bad, last)
    bad.train(11, 12)
    for scale in ("linear", "log"):
        state = client.state(scale)
        assert len(state.content) < 1 << 20
        assert [run["step"] for run in state.header["runs"][::2]] == [2, 2]
        assert [curves["loss"]["step"] for curves in (state.curves[0], state.curves[2])] == [[1, 2]] * 2
    facts = state.header["runs"][1]
    assert facts["step"] == 12
    if lines and lines not in (BAD_LINES["losses"], BAD_LINES["steps"]):
        assert any("of metrics.jsonl" in note for note in facts["notes"])
    if info is BAD_INFO["steps"]:
        assert any("run.json" in note for note in facts["notes"])
