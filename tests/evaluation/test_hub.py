"""The hub is asked once whether it is there."""

from __future__ import annotations

import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from sepllm_train.evaluation.hub import offline_unless_reachable


def asked(monkeypatch: pytest.MonkeyPatch, port: int, before: str | None = None) -> str | None:
    """HF_HUB_OFFLINE after the question, to a hub at `port` of this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", before or "")
    if before is None:
        monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    offline_unless_reachable()
    return os.environ.get("HF_HUB_OFFLINE")


def test_offline_is_set_where_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any answer is one: this server knows no HEAD. What the user has set stays."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        assert asked(monkeypatch, port) is None
        server.shutdown()
    assert asked(monkeypatch, port) == "1"
    assert asked(monkeypatch, port, before="0") == "0"
