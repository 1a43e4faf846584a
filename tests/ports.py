"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket

# Below those that systems give to connections that go out, of which the tests beside make many: one of these may take a
# port between the moment it is found free and that in which a server of Java listens.
PORTS = range(20_000, 32_000)


def free_ports(n: int) -> list[int]:
    found: list[int] = []
    # Not by a seed, which processes that run tests beside one another may share.
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == n:
            return found
    raise OSError(f"fewer than {n} free ports from {PORTS.start} to {PORTS.stop - 1}")
