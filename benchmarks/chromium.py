"""A headless Chromium, driven through chromedriver's own HTTP protocol (W3C WebDriver)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


# A browser that does nothing for so long is taken to hang; a busy machine can make it wait for a minute.
PATIENCE_SECONDS = 300.0


def programs() -> tuple[str, str] | None:
    """Paths of chromium and chromedriver; None unless both are installed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


class Chromium:
    """A browser with a profile of its own; a context manager. Raises RuntimeError for what the driver refuses."""

    def __init__(self, width: int = 1400, height: int = 1000) -> None:
        found = programs()
        if found is None:
            raise RuntimeError("chromium and chromedriver are not installed")
        self._profile = tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._base = f"http://127.0.0.1:{free.getsockname()[1]}"
            port = free.getsockname()[1]
        # Its caches go to the home folder, whatever the profile.
        home = {**os.environ, "HOME": self._profile.name}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": home}
        self._driver = subprocess.Popen([found[1], f"--port={port}"], **quiet)  # type: ignore[call-overload]
        arguments = [*FLAGS, f"--user-data-dir={self._profile.name}/profile", f"--window-size={width},{height}"]
        options = {"binary": found[0], "args": arguments}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        try:
            self._await_driver()
            session = self._call("POST", "/session", {"capabilities": wanted})["sessionId"]
        except BaseException:
            self._end()
            raise
        self._base += f"/session/{session}"
        self._call("POST", "/timeouts", {"script": round(1000 * PATIENCE_SECONDS)})

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._end()

    def _end(self) -> None:
        self._driver.terminate()
        self._driver.wait()
        self._profile.cleanup()

    def _await_driver(self) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self._call("GET", "/status")
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def _call(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=2 * PATIENCE_SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Value that JavaScript returns; it may use await."""
        wrapped = (
            "const done = arguments[arguments.length - 1]; const given = [...arguments].slice(0, -1);"
            f"(async (...args) => {{ {script} }})(...given).then(done, (error) => done({{failed: String(error)}}));"
        )
        value = self._call("POST", "/execute/async", {"script": wrapped, "args": list(arguments)})
        if isinstance(value, dict) and "failed" in value:
            raise RuntimeError(value["failed"])
        return value

    def await_true(self, script: str, *arguments: Any, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until JavaScript returns what is true. Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not self.run(script, *arguments):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds:g} s: {script}")
            time.sleep(0.1)

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": arguments})

    def emulate(self, *, scheme: str = "light", width: int = 1400, height: int = 1000, phone: bool = False) -> None:
        """Colour scheme that the system prefers, and the size of the page in CSS pixels."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a place of the viewport, in CSS pixels."""
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def processes(self) -> list[psutil.Process]:
        """The browser's own processes, the driver left out."""
        return psutil.Process(self._driver.pid).children(recursive=True)

    def console(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
