"""A run on a local cluster of three nodes of which something breaks again and again, by a seed.

Whatever breaks, the same command is started again when it has ended, until it has done its work;
what it leaves must be the bytes of a run that nobody disturbed. ``tests/test_chaos.py`` is the
short form, ``tests/benchmarks/chaos.py`` the long one.
"""

import contextlib
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

FAULTY = Path(__file__).parent / "faulty"
NODES = 3
# Kind of fault → its share.
SHARES = {
    "worker killed": 4,
    "worker suspended": 3,
    "worker slowed": 2,
    "worker out of memory": 1,
    "node killed": 2,
    "file truncated": 2,
    "file removed": 2,
    "writes fail": 1,
    "store full": 1,
    "driver killed": 2,
}
_KINDS = ("pieces", "errors", "stats", "gradients", "hidden", "reductions", "scratch")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["moesaic.orchestrator.cli", "moesaic.orchestrator.run"])


@dataclass(frozen=True)
class Pace:
    """Seconds.

    Attributes:
        between: faults, at most and on average half of that.
        suspended: how long a worker sleeps, or is slow, at most.
        unwritable: how long writes fail; a store is full until the run has stopped.
        straggler, deadline, first, grace: what takes the place of the pool's own bounds.
        slow: of every write.
        cut: how long a node is off the network, at most.
    """

    between: float = 2.0
    suspended: float = 6.0
    unwritable: float = 2.0
    straggler: float = 2.0
    deadline: float = 10.0
    first: float = 20.0
    grace: float = 4.0
    slow: float = 0.05
    cut: float = 20.0


@dataclass
class Outcome:
    """What happened.

    Attributes:
        faults: (seconds since the start, kind, what).
        endings: how every driver but the last one ended: its last line, or that it was killed.
        seconds: from the first start to the last end.
    """

    faults: list[tuple[float, str, str]] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def counts(self) -> Counter[str]:
        """How often each kind of fault was there."""
        return Counter(kind for _, kind, _ in self.faults)


def faults_of(seed: int, count: int, more: Mapping[str, int] | None = None) -> list[str]:
    """Kinds of faults in their order; every kind has its share, whatever the seed.

    Args:
        more: shares of other kinds.
    """
    generator = random.Random(seed)
    shares = {**SHARES, **(more or {})}
    bag = [kind for kind, share in shares.items() for _ in range(share)]
    order: list[str] = []
    while len(order) < count:
        generator.shuffle(bag)
        order += bag
    return order[:count]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process, and of those that it starts, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _drive(arguments: Sequence[str], log: Path, pace: Pace, variables: Mapping[str, str]) -> None:
    """In a process of its own: one command."""
    os.environ.update(variables)  # it may be forked from a process that was there before
    from moesaic.orchestrator import cli, deadlines, placing

    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.path.insert(0, str(FAULTY))
    import sitecustomize  # noqa: F401

    deadlines.STRAGGLER_SECONDS, deadlines.DEADLINE_SECONDS = pace.straggler, pace.deadline
    deadlines.FIRST_SECONDS, placing._GRACE_SECONDS = pace.first, pace.grace
    deadlines.UNKNOWN_SECONDS = pace.first / 2
    sys.argv = ["moesaic", *arguments]
    cli.main()


class Chaos:
    """Three nodes, a driver, and what disturbs them; a context manager.

    Args:
        folder: for logs and Ray's files; its path must be short (Ray's sockets lie below it).
        store: of the recipe.
        seed: of the faults.

    Attributes:
        head_address: of the first node; empty for whatever Ray takes.
    """

    head_address = ""

    def __init__(self, folder: Path, store: Path, seed: int, pace: Pace) -> None:
        self.folder, self.store, self.pace = folder, store, pace
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self.asleep: dict[psutil.Process, float] = {}
        self.slow: dict[psutil.Process, float] = {}
        self.over_at: dict[str, float] = {}  # name of a file in the folder → when it is taken away
        self.driver: BaseProcess | None = None

    def __enter__(self) -> "Chaos":
        from ray.cluster_utils import Cluster

        here = str(Path(__file__).parents[1])
        self._stack = contextlib.ExitStack()
        self.variables = {
            "RAY_USAGE_STATS_ENABLED": "0",
            # This process may have started a Ray before, and Ray reads this once.
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(self.folder),
            # A node that is silent is dead within seconds; Ray's own bounds are for real networks.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
            "PYTHONPATH": os.pathsep.join([str(FAULTY), here]),
            "FAULTY_STORAGE": str(self.folder),
            "FAULTY_SECONDS": str(self.pace.slow),
        }
        self._stack.enter_context(environment(self.variables))
        self._stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        self._stack.callback(self._end)
        self.cluster: Any = None
        try:
            head = {"num_cpus": 1, "include_dashboard": False}
            if self.head_address:
                head["node_ip_address"] = self.head_address
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            for _ in range(NODES - 1):
                self._add_node()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _add_node(self) -> Any:
        return self.cluster.add_node(num_cpus=1)

    def _end(self) -> None:
        for process in (*self.asleep, *self.slow):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        if self.driver is not None:
            self.driver.kill()
            self.driver.join()
        if self.cluster is not None:
            self.cluster.shutdown()

    @property
    def address(self) -> str:
        """Of the cluster, for the recipe."""
        return str(self.cluster.address)

    # The run

    def run(
        self, commands: Sequence[Sequence[str]], faults: Sequence[str], limit: float
    ) -> Outcome:
        """Runs the commands one after another, each until it has done its work.

        Args:
            faults: kinds, in their order; those that are left when the last command has done its
                work happen between its end and another start of it.
            limit: seconds for all of it.

        Raises:
            AssertionError: a command failed otherwise than with one clear line, or too much time
                has passed.
        """
        started = time.monotonic()
        left, number = list(faults), 0
        due = started + 1.0
        self._start(commands[0])
        while number < len(commands):
            now = time.monotonic()
            assert now - started < limit, (
                f"not done after {limit} s: {self.outcome}: {self._said()}"
            )
            self._wake(now)
            if left and now >= due:
                # Some need something that is not there at the moment.
                kind = next((kind for kind in left if self._happens(kind, started)), None)
                if kind is None:
                    due = now + 0.1
                    continue
                left.remove(kind)
                due = now + self.random.uniform(0.2, self.pace.between)
            if self.driver is not None and not self.driver.is_alive():
                done = self._ended()
                if done and not (left and number + 1 == len(commands)):
                    number += 1
                if number < len(commands):
                    self._start(commands[number])
            time.sleep(0.02)
        self.outcome.seconds = time.monotonic() - started
        return self.outcome

    def _start(self, command: Sequence[str]) -> None:
        self.log = self.folder / f"driver-{len(self.outcome.endings)}.log"
        driver = FORKED.Process(target=_drive, args=(command, self.log, self.pace, self.variables))
        driver.start()
        self.driver = driver

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def _ended(self) -> bool:
        """Whether the driver has done its work; else it was killed, or said why not in one line."""
        assert self.driver is not None
        if "full" in self.over_at:
            self.over_at["full"] = 0.0
            self._wake(time.monotonic())
        code, said = self.driver.exitcode, self._said()
        print(f"          driver ended: {code} {said.splitlines()[-1:]}", flush=True)
        assert "Traceback" not in said, said
        if code == 0:
            return True
        if code == -signal.SIGKILL:
            self.outcome.endings.append("killed")
            return False
        # Ray may tell of a dead worker, or in many indented lines of a dead node, when we have said
        # why we stop.
        ours = [
            line
            for line in said.splitlines()
            if "(raylet)" not in line and line.strip() and not line.startswith("    ")
        ]
        assert code == 1 and ours and ours[-1].startswith("failed: "), f"exit status {code}: {said}"
        self.outcome.endings.append(ours[-1])
        return False

    # What breaks

    def _happens(self, kind: str, started: float) -> bool:
        """Lets it happen, if there is something it can happen to."""
        happened = {
            "worker killed": self._kill_worker,
            "worker suspended": self._suspend_worker,
            "node killed": self._kill_node,
            "file truncated": self._truncate,
            "file removed": self._remove,
            "worker slowed": self._slow_worker,
            "worker out of memory": self._take_memory,
            "writes fail": lambda: self._fail_writes("no-writes"),
            "store full": lambda: self._fail_writes("full"),
            "driver killed": self._kill_driver,
            "node cut off": self._cut,
        }[kind]()
        if happened:
            seconds = time.monotonic() - started
            self.outcome.faults.append((seconds, kind, happened))
            print(f"{seconds:6.1f} s  {kind}: {happened}", flush=True)
        return bool(happened)

    def _workers(self) -> list[psutil.Process]:
        """Processes of actors, on all nodes."""
        found = []
        for raylet in self._raylets():
            with contextlib.suppress(psutil.Error):
                for child in raylet.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if " ".join(child.cmdline()).startswith("ray::Worker"):
                            found.append(child)
        return sorted(found, key=lambda process: process.pid)

    def _raylets(self) -> list[psutil.Process]:
        """Ray's own processes, one for every node."""
        found = []
        for node in (self.cluster.head_node, *self.cluster.worker_nodes):
            for raylet in node.all_processes.get("raylet", ()):
                with contextlib.suppress(psutil.Error):
                    found.append(psutil.Process(raylet.process.pid))
        return found

    def _cut(self) -> str:
        """Needs nodes in namespaces: see :mod:`tests.namespaces`."""
        raise NotImplementedError

    def _awake(self) -> psutil.Process | None:
        left = [process for process in self._workers() if process not in self.asleep]
        found = [process for process in left if process not in self.slow]
        return self.random.choice(found) if found else None

    def _kill_worker(self) -> str:
        process = self._awake()
        if process is None:
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        return f"pid {process.pid}"

    def _suspend_worker(self) -> str:
        process = self._awake()
        if process is None:
            return ""
        seconds = self.random.uniform(0.3, 1.0) * self.pace.suspended
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
        self.asleep[process] = time.monotonic() + seconds
        return f"pid {process.pid} for {seconds:.1f} s"

    def _slow_worker(self) -> str:
        process = self._awake()
        if process is None:
            return ""
        seconds = self.random.uniform(0.3, 1.0) * self.pace.suspended
        self.slow[process] = time.monotonic() + seconds
        return f"pid {process.pid} for {seconds:.1f} s"

    def _take_memory(self) -> str:
        if (self.folder / "no-memory").exists() or not self._workers():
            return ""
        (self.folder / "no-memory").touch()
        return "the next that writes"

    def _wake(self, now: float) -> None:
        for process in [p for p, until in self.asleep.items() if until <= now]:
            del self.asleep[process]
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        for process, until in list(self.slow.items()):
            # Awake for a tenth of the time.
            awake = until <= now or now % 0.4 < 0.04
            if until <= now:
                del self.slow[process]
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume() if awake else process.suspend()
        for name in [name for name, until in self.over_at.items() if until <= now]:
            del self.over_at[name]
            (self.folder / name).unlink()

    def _kill_node(self) -> str:
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)
        node = self.random.choice(nodes)
        (raylet,) = node.all_processes["raylet"]
        psutil.Process(raylet.process.pid).kill()
        self.cluster.remove_node(node, allow_graceful=False)
        new = self._add_node()
        return f"{node.node_id[:8]}, then {new.node_id[:8]} joined"

    def _entry(self) -> Path | None:
        """A finished entry, or a file of unfinished work."""
        found = [
            path
            for kind in (
                "pieces",
                "errors",
                "stats",
                "gradients",
                "hidden",
                "reductions",
                "scratch",
            )
            for path in self.store.glob(f"{kind}/*/*")
            if ".tmp" not in path.name
        ]
        return self.random.choice(sorted(found)) if found else None

    def _truncate(self) -> str:
        path = self._entry()
        if path is None:
            return ""
        try:
            size = path.stat().st_size
            os.truncate(path, self.random.randrange(size) if size else 0)
        except FileNotFoundError:
            return ""
        return str(path.relative_to(self.store))

    def _remove(self) -> str:
        path = self._entry()
        if path is None:
            return ""
        path.unlink(missing_ok=True)
        return str(path.relative_to(self.store))

    def _fail_writes(self, how: str) -> str:
        if self.over_at or not self._workers():
            return ""
        # Of a full disk a run is told at the next write, and stops; it is free again for the next.
        seconds = math.inf if how == "full" else self.pace.unwritable
        (self.folder / how).touch()
        self.over_at[how] = time.monotonic() + seconds
        return f"for {seconds:.1f} s"

    def _kill_driver(self) -> str:
        if self.driver is None or not self.driver.is_alive() or not self._workers():
            return ""
        self.driver.kill()
        self.driver.join()
        return f"pid {self.driver.pid}"
