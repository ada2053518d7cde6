"""Fixtures: real brokers, and the project's scripts run as a user runs them."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from brokers import HOST, ApacheKafka, NoApacheKafkaError, Tansu, apache_jars, java, wait_until

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = re.compile(
    r"(KAFKA|INTERVAL|MAX|DURATION|CONNECT|SHARD|METRICS|LOG|TIMEOUT|START|END|FAULT|LATE)_.*|SEED|START|SPEED|USERS"
    r"|STREAM|FAULTS|ARRIVALS|VERDICTS",
    re.IGNORECASE,
)
PATIENCE = 30.0
EMBEDDED = f"{HOST}:9092"  # where the embedded broker is

Broker = ApacheKafka | Tansu
RunScript = Callable[..., "Script"]
MakeApache = Callable[..., ApacheKafka]


def clean_environment(**settings: object) -> dict[str, str]:
    """What this process inherited, less the project's settings, plus `settings`."""
    inherited = {name: value for name, value in os.environ.items() if not SETTINGS.fullmatch(name)}
    return {**inherited, **{name: str(value) for name, value in settings.items()}}


class Script:
    """A running script of the project; its output can be read while it runs."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        self.lines: list[str] = []  # both streams, as they came
        self.stdout_lines: list[str] = []
        self.stderr_lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._readers = [
            self._reader(self.process.stdout, self.stdout_lines),
            self._reader(self.process.stderr, self.stderr_lines),
        ]

    @property
    def stdout(self) -> str:
        return "".join(f"{line}\n" for line in self.stdout_lines)

    @property
    def stderr(self) -> str:
        return "".join(f"{line}\n" for line in self.stderr_lines)

    def wait_for(self, regex: str, timeout: float = PATIENCE, after: int = 0) -> re.Match[str]:
        """The first line of either stream that has `regex` in it, from line number `after` on.

        For "from now on", take `after=len(script.lines)` before the deed. AssertionError when the script ends
        or `timeout` seconds pass without one.
        """
        pattern = re.compile(regex)
        deadline = time.monotonic() + timeout
        while True:
            ended = not any(reader.is_alive() for reader in self._readers)  # before the look: nothing comes after
            with self._news:
                for line in self.lines[after:]:
                    if found := pattern.search(line):
                        return found
                after = max(after, len(self.lines))
                if ended or time.monotonic() > deadline:
                    why = "the script ended" if ended else f"{timeout:g} s passed"
                    raise AssertionError(f"{why} without {regex!r}:\n{self.tail()}")
                self._news.wait(0.1)

    def signal(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code; AssertionError when the script goes on, or when a traceback is in its output."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:g} s:\n{self.tail()}") from None
        for reader in self._readers:
            reader.join(5)
        self.check()
        return code

    def check(self) -> None:
        assert "Traceback" not in self.stdout + self.stderr, self.tail(60)

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.lines[-lines:])

    def kill(self) -> None:
        """Ends it for certain; no complaint when it has ended."""
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(5)

    def _reader(self, stream: IO[str] | None, lines: list[str]) -> threading.Thread:
        assert stream is not None
        thread = threading.Thread(target=self._read, args=(stream, lines), daemon=True)
        thread.start()
        return thread

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for line in stream:
                with self._news:
                    lines.append(line.rstrip("\n"))
                    self.lines.append(lines[-1])
                    self._news.notify_all()


@pytest.fixture
def run_script(tmp_path: Path) -> Iterator[RunScript]:
    """run_script("random_event_producer.py", "--help", cwd=None, KAFKA_BROKER="…", MAX_EVENTS=3) -> Script."""
    running: list[Script] = []

    def run(name: str, *arguments: str, cwd: Path | None = None, **settings: object) -> Script:
        command = [sys.executable, str(ROOT / name), *arguments]
        running.append(Script(command, clean_environment(**settings), cwd or tmp_path))
        return running[-1]

    yield run
    for script in running:
        script.kill()
    for script in running:
        script.check()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if sys.platform != "linux" and item.get_closest_marker("linux"):
        pytest.skip("needs what only Linux has")


def require_apache() -> None:
    """Skips where Apache Kafka cannot be had; fails there when REQUIRE_APACHE_KAFKA=1 (the project's CI)."""
    try:
        java()
        apache_jars()
    except NoApacheKafkaError as error:
        if os.environ.get("REQUIRE_APACHE_KAFKA") == "1":
            pytest.fail(f"REQUIRE_APACHE_KAFKA=1, but {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def apache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """One node for all tests that leave it as it is; faults belong to one from `make_apache`."""
    require_apache()
    with ApacheKafka(tmp_path_factory.mktemp("apache")) as kafka:
        yield kafka


@pytest.fixture(scope="session")
def tansu() -> Iterator[Tansu]:
    with Tansu() as broker:
        yield broker


@pytest.fixture(params=["tansu", "apache"])
def broker(request: pytest.FixtureRequest) -> Broker:
    """Each in turn, with `.bootstrap`."""
    chosen: Broker = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture
def make_apache(tmp_path: Path) -> Iterator[MakeApache]:
    """make_apache(nodes=3, …) -> an ApacheKafka of the test's own, not yet started, closed at the end."""
    require_apache()
    made: list[ApacheKafka] = []

    def make(**options: Any) -> ApacheKafka:
        made.append(ApacheKafka(tmp_path / f"kafka-{len(made)}", **options))
        return made[-1]

    yield make
    for kafka in made:
        kafka.close()


@pytest.fixture
def topic() -> str:
    """A name that was never used (the brokers make topics when asked for them)."""
    return f"events-{secrets.token_hex(6)}"


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) == 0


@pytest.fixture
def own_port() -> Iterator[None]:
    """The embedded broker's port, one test at a time; others on this machine may use it too."""
    with (Path(tempfile.gettempdir()) / "random-event-producer-9092.lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            wait_until(lambda: not listens(EMBEDDED), 20, f"{EMBEDDED} is free")
        except TimeoutError:
            if os.environ.get("REQUIRE_APACHE_KAFKA") == "1":
                pytest.fail(f"{EMBEDDED}, where the embedded broker has to be, is taken on this machine")
            pytest.skip(f"{EMBEDDED} is taken on this machine")
        yield
