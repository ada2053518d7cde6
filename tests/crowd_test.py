"""Who opens METRICS_PORT and asks nothing, or half, costs neither the probes their answer nor the run its files."""

from __future__ import annotations

import contextlib
import http.client
import re
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from brokers import HOST, Tansu, create_topic, free_port, wait_until
from conftest import ROOT, Script, clean_environment
from field_test import TOOL

CROWD, FILES = 300, 256
PATIENCE = 1.0  # seconds, of a probe: what Kubernetes takes where nothing is said
LASTS = 8.0  # seconds, more than the server waits for a request
THREADS, OPEN = 50, 60  # of the process, at most, beside those that it has without the crowd
HALF = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"
WHOLE = HALF + b"\r\n"


class Crowded:
    """The tool under `ulimit -n 256`, and its HTTP port."""

    def __init__(self, script: Script, port: int) -> None:
        self.script, self.port = script, port
        self._process = Path(f"/proc/{script.process.pid}")

    def get(self, path: str, timeout: float) -> int:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/readyz", 5) == 200
        return False

    def files(self) -> int:
        return len(list((self._process / "fd").iterdir()))

    def threads(self) -> int:
        return len(list((self._process / "task").iterdir()))

    def sent(self) -> int:
        return max([0, *map(int, re.findall(r"Total events sent: (\d+)", self.script.stderr))])


@pytest.fixture
def crowded(tansu: Tansu, topic: str, tmp_path: Path) -> Iterator[Crowded]:
    create_topic(tansu.direct, topic)
    port = free_port()
    kafka = {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.05}
    command = ["sh", "-c", f'ulimit -n {FILES} && exec "$@"', "sh", sys.executable, str(ROOT / TOOL)]
    script = Script(command, clean_environment(METRICS_PORT=port, **kafka), tmp_path)
    made = Crowded(script, port)
    try:
        wait_until(made.ready, 20, "the tool is ready")
        yield made
    finally:
        script.kill()


@pytest.fixture
def many_files() -> Iterator[None]:
    """The crowd is in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4 * CROWD, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def come(port: int) -> socket.socket:
    """At once, whether or not it is let in."""
    client = socket.socket()
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        client.connect((HOST, port))
    return client


def come_all(port: int) -> list[socket.socket]:
    """One after the other, so that all are let in."""
    clients = []
    for _ in range(CROWD):
        clients.append(come(port))
        time.sleep(0.005)
    return clients


def say(client: socket.socket, words: bytes) -> None:
    with contextlib.suppress(OSError):  # it was shown out, or not let in yet
        client.send(words)


def at_once(port: int, over: threading.Event) -> Iterator[socket.socket]:
    """They come together, and say nothing."""
    yield from [come(port) for _ in range(CROWD)]
    over.wait()


def mute(port: int, over: threading.Event) -> Iterator[socket.socket]:
    """They say nothing."""
    yield from come_all(port)
    over.wait()


def half(port: int, over: threading.Event) -> Iterator[socket.socket]:
    """They stop in the middle of a request."""
    for client in (clients := come_all(port)):
        say(client, HALF)
    yield from clients
    over.wait()


def dripping(port: int, over: threading.Event) -> Iterator[socket.socket]:
    """They send a byte now and then: no pause is long."""
    yield from (clients := come_all(port))
    for byte in HALF * 10:
        for client in clients:
            say(client, bytes([byte]))
        if over.wait(0.5):
            return


def deaf(port: int, over: threading.Event) -> Iterator[socket.socket]:
    """They ask for everything, and read nothing."""
    yield from (clients := come_all(port))
    while not over.wait(0.5):
        for client in clients:
            say(client, WHOLE)


def rush(port: int, over: threading.Event) -> Iterator[socket.socket]:
    """They come one after the other, without an end, and say nothing; who was there longest goes."""
    clients: list[socket.socket] = []
    while not over.wait(0.01):
        clients.append(come(port))
        yield clients[-1]
        if len(clients) > CROWD:
            clients.pop(0).close()


@contextlib.contextmanager
def crowd(kind: Callable[[int, threading.Event], Iterator[socket.socket]], port: int) -> Iterator[list[socket.socket]]:
    over, clients = threading.Event(), list[socket.socket]()
    thread = threading.Thread(target=lambda: clients.extend(kind(port, over)))
    thread.start()
    try:
        yield clients
    finally:
        over.set()
        thread.join()
        for client in clients:
            client.close()


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize("kind", [at_once, mute, half, dripping, deaf, rush])
def test_a_crowd_at_the_metrics_port(crowded: Crowded, kind: Callable[..., Iterator[socket.socket]]) -> None:
    files, threads, sent = crowded.files(), crowded.threads(), crowded.sent()
    with crowd(kind, crowded.port):
        ends, most_files, most_threads = time.monotonic() + LASTS, 0, 0
        while time.monotonic() < ends:
            for path in ("/healthz", "/readyz", "/metrics"):
                assert crowded.get(path, PATIENCE) == 200
            most_files, most_threads = max(most_files, crowded.files()), max(most_threads, crowded.threads())
            time.sleep(0.1)
        assert most_threads <= threads + THREADS
        assert most_files <= files + OPEN
        wait_until(lambda: crowded.sent() > sent, 20, "events are confirmed")
    wait_until(lambda: crowded.files() <= files + 2, 20, "the files are given back")
    crowded.script.signal()
    assert crowded.script.wait() == 0, crowded.script.tail()
    assert " - WARNING - " not in crowded.script.stderr, crowded.script.tail()
    crowded.script.wait_for(r"Stopped: sent \d+, failed 0, unconfirmed 0")
