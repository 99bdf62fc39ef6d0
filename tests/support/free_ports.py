"""Ports for servers of tests, which a client of another test cannot take before they listen."""

from __future__ import annotations

import os
import random
import socket

# Below those that the kernel gives to clients (net.ipv4.ip_local_port_range): one that was free a moment ago and is
# of that range may be a client's by now.
PORTS = range(10_000, 30_000)
_chance = random.Random(os.getpid())


def free_port() -> int:
    """A port that nothing listens on, another one at nearly every call in any process."""
    while True:
        port = _chance.choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
        return port
