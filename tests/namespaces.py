"""Nodes of a local Ray cluster in network namespaces of their own, which can be cut off; for root.

    driver, head 10.77.0.1 ── bridge ── veth ── namespace, node 10.77.0.2
                                 └───── veth ── namespace, node 10.77.0.3

Files are those of the one machine: what is cut is Ray's network, not the storage.
"""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import psutil

from tests.chaos import Chaos

_NETWORK = "10.77.0"
_START = 'import sys; from ray.scripts.scripts import main; sys.argv[0] = "ray"; main()'


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass(eq=False)
class Netted:
    """A node in a namespace.

    Attributes:
        number: of its address, and in the names of its namespace and its link.
        process: ``ray start``, which ends with the node.
        ends_at: when its cut ends; 0 while it is not cut off.
    """

    number: int
    process: subprocess.Popen[bytes]
    ends_at: float = 0.0

    def raylet(self) -> psutil.Process | None:
        """Its raylet, while it lives."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.name() == "raylet":
                        return child
        return None


class NettedChaos(Chaos):
    """As :class:`Chaos`, with nodes that can also be cut off by the network."""

    head_address = f"{_NETWORK}.1"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.nodes: list[Netted] = []
        self.links = f"mo{os.getpid() % 10000}"

    def __enter__(self) -> "NettedChaos":
        try:
            _ip("link", "add", self.links, "type", "bridge")
            _ip("addr", "add", f"{self.head_address}/24", "dev", self.links)
            _ip("link", "set", self.links, "up")
            super().__enter__()
        except BaseException:
            self._remove_links()
            raise
        return self

    def _name(self, number: int) -> str:
        return f"{self.links}n{number}"

    def _add_node(self) -> Netted:
        used = {node.number for node in self.nodes}
        number = next(n for n in range(2, 250) if n not in used)
        name, inner = self._name(number), f"{self.links}i{number}"
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", name)
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", name)
        _ip("link", "set", name, "master", self.links, "up")
        _ip("-n", name, "addr", "add", f"{_NETWORK}.{number}/24", "dev", inner)
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        command = ["ip", "netns", "exec", name, sys.executable, "-c", _START, "start", "--block"]
        command += [f"--address={self.address}", f"--node-ip-address={_NETWORK}.{number}"]
        command += ["--num-cpus=1", f"--object-store-memory={150 << 20}"]
        log = (self.folder / f"node-{number}.log").open("ab")
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(Netted(number, process))
        return self.nodes[-1]

    def _raylets(self) -> list[psutil.Process]:
        own = [found for node in self.nodes if (found := node.raylet()) is not None]
        return [*super()._raylets(), *own]

    def _kill_node(self) -> str:
        node = self.random.choice(self.nodes)
        raylet = node.raylet()
        if node.ends_at or raylet is None:
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            raylet.kill()
        self._forget(node)
        new = self._add_node()
        return f"{_NETWORK}.{node.number}, then {_NETWORK}.{new.number} joined"

    def _cut(self) -> str:
        """Takes a node off the network for a while."""
        whole = [node for node in self.nodes if not node.ends_at and node.raylet() is not None]
        if not whole or not self._workers():
            return ""
        node = self.random.choice(whole)
        seconds = self.random.uniform(0.2, 1.0) * self.pace.cut
        _ip("link", "set", self._name(node.number), "down")
        node.ends_at = time.monotonic() + seconds
        return f"{_NETWORK}.{node.number} for {seconds:.1f} s"

    def _wake(self, now: float) -> None:
        super()._wake(now)
        for node in list(self.nodes):
            if node.ends_at and node.ends_at <= now:
                node.ends_at = 0.0
                _ip("link", "set", self._name(node.number), "up")
            if not node.ends_at and node.process.poll() is not None:
                self._forget(node)  # Ray took it for dead, so it ended itself
                self._add_node()

    def _forget(self, node: Netted) -> None:
        """Ends what is left of a node, and its namespace."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(node.process.pid)
            for process in [*own.children(recursive=True), own]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        node.process.wait()
        self.nodes.remove(node)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self._name(node.number))
            _ip("link", "del", self._name(node.number))

    def _end(self) -> None:
        try:
            for node in list(self.nodes):
                self._forget(node)
            super()._end()
        finally:
            self._remove_links()

    def _remove_links(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self.links)
