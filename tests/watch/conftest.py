"""Run folders that grow as the trainer makes them grow, and servers that show them."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sepllm_train.base.files import write_whole
from sepllm_train.metrics.log import MetricsLog
from sepllm_train.watch.follow import CURVES, SCORED
from sepllm_train.watch.server import Server
from sepllm_train.watch.watch import Watch
from tests.compare.run_records import COMPARABLE, training, validation
from tests.support.waiting import HANG_SECONDS


class GrowingRun:
    """A run folder written with the trainer's own log."""

    def __init__(self, folder: Path, **info: Any) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.log = MetricsLog(folder / "metrics.jsonl")
        self.info = {"name": folder.name, "steps": 100, "comparable": COMPARABLE, "status": "running"} | info
        self.tell()

    def tell(self, **info: Any) -> None:
        """Write run.json with changes."""
        self.info |= info
        write_whole(self.folder / "run.json", json.dumps(self.info).encode())

    def train(self, first: int, last: int, loss: float = 5.0, **more: Any) -> None:
        """Records of steps, whose loss falls by 0.01 a step; every tenth step is validated as well."""
        for step in range(first, last + 1):
            self.log.write(training(step, loss - step / 100) | {"train/attended_share": 0.25} | more)
            if step % 10 == 0:
                self.log.write(validation(step, loss + 0.1 - step / 100))

    def write(self, text: str) -> None:
        """Append text as it is."""
        with open(self.log.path, "a", encoding="utf8") as stream:
            stream.write(text)


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., GrowingRun]:
    """Makes a run folder from its name and changes to run.json."""
    return lambda name, /, **info: GrowingRun(tmp_path / name, **info)


@dataclass(frozen=True)
class Answer:
    """An answer of the server."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def header(self) -> dict[str, Any]:
        """JSON at the head of a state."""
        return json.loads(self.content[4 : 4 + int.from_bytes(self.content[:4], "little")])

    @property
    def curves(self) -> list[dict[str, dict[str, list[float]]]]:
        """Of each run whose curves are in the state: curve -> column -> values."""
        offset = 4 + int.from_bytes(self.content[:4], "little")
        runs = []
        for facts in self.header["runs"]:
            if "curves" not in facts:
                continue
            run: dict[str, dict[str, list[float]]] = {}
            for name, points in facts["curves"].items():
                columns = CURVES[name][1] if name in CURVES else SCORED
                width = len(columns) + 2
                block = np.frombuffer(self.content, "<f4", points * width, offset).reshape(width, points)
                offset += block.nbytes
                run[name] = {c: block[row].tolist() for row, c in enumerate((*columns, "value", "mean"))}
            runs.append(run)
        assert offset == len(self.content)
        return runs


class Client:
    """Asks a server for paths exactly as they are given."""

    def __init__(self, port: int, watch: Watch) -> None:
        self.port = port
        self.watch = watch
        self.url = f"http://127.0.0.1:{port}/"

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """An answer to one request; underscores in names of headers stand for dashes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, headers=named)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def state(self, scale: str = "linear", since: str = "") -> Answer:
        """The state of the runs."""
        answer = self.ask(f"/state?scale={scale}&since={since}")
        assert answer.status == 200
        return answer


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Starts a server for runs (or folders) that has read what they hold."""
    servers = []

    def start(*runs: GrowingRun | Path) -> Client:
        watch = Watch([run if isinstance(run, Path) else run.folder for run in runs])
        watch.load(lambda size: None, threading.Event())
        server = Server(watch, "127.0.0.1", 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return Client(server.server_port, watch)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
