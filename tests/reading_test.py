"""The snippets of docs/reading.md that need seconds, run as they stand there but for addresses and the topic's name."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from brokers import JARS, ApacheKafka, apache_jars, create_topic, free_port, java, partition_of, read_all, wait_until
from conftest import ROOT, RunScript, clean_environment
from docs_test import FENCE, text

SCRIPT = "random_churn_producer.py"
WEEK = {"SEED": "reading", "START_TIME": "2026-05-04", "END_TIME": "2026-05-11", "INTERVAL_SECONDS": 0}
CONNECT = ("org.apache.kafka:connect-file:4.3.1", "jakarta.ws.rs:jakarta.ws.rs-api:3.1.0")
DUCKDB = """
import duckdb, json, sys
for statement in sys.stdin.read().split(";\\n")[:-1]:
    print(json.dumps(duckdb.sql(statement).fetchall()))
"""

Connect = Callable[..., None]


def snippets(heading: str) -> list[str]:
    """The fenced code under a heading, up to the next one."""
    found: list[str] = []
    under = ""
    for title, _, code in re.findall(rf"^#+ ([^\n]+)$|{FENCE.pattern}", text("docs/reading.md"), FENCE.flags):
        under = title or under
        found += [code] if under == heading and code else []
    return found


def python(code: str, cwd: Path, given: str = "") -> list[str]:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def printed() -> str:
    command, environment = [sys.executable, str(ROOT / SCRIPT), "--print"], clean_environment(**WEEK)
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60).stdout


def instant(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["timestamp"]).replace(tzinfo=UTC)


def visits(events: list[dict[str, Any]]) -> int:
    times = defaultdict(list)
    for event in events:
        times[event["user_id"]].append(instant(event))
    gaps = (later - earlier for each in times.values() for earlier, later in itertools.pairwise(each))
    return len(times) + sum(gap >= timedelta(minutes=30) for gap in gaps)


def test_duckdb(printed: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(printed)
    events = [*map(json.loads, printed.splitlines())]
    _, types, counted = map(json.loads, python(DUCKDB, tmp_path, "".join(snippets("DuckDB"))))
    prices = defaultdict(list)
    for event in events:
        prices[event["event_type"]].append(event["metadata"].get("price", math.nan))
    means = [
        [name, len(each), None if name == "bounce" else pytest.approx(mean(each))] for name, each in prices.items()
    ]
    assert types == sorted(means)
    assert counted == [[visits(events)]]


def test_librdkafka(apache: ApacheKafka, topic: str, tmp_path: Path) -> None:
    """Where its own partitioner, which goes by CRC-32, would have another partition."""
    count = next(n for n in itertools.count(3) if zlib.crc32(b"123") % n != partition_of(b"123", n))
    create_topic(apache.bootstrap, topic, count)
    python(snippets("librdkafka")[0].replace("localhost:9092", apache.bootstrap).replace("scores", topic), tmp_path)
    assert [(r.key, r.partition) for r in read_all(apache.direct, topic)] == [(b"123", partition_of(b"123", count))]


@pytest.fixture
def connect(apache: ApacheKafka, topic: str, tmp_path: Path) -> Iterator[Connect]:
    """connect(sink, …) -> a worker in `tmp_path` with these sinks on `topic`, until the test ends."""
    jars = apache_jars([*JARS, *CONNECT]).split(os.pathsep)
    plugin = next(Path(jar) for jar in jars if "connect-file" in jar)
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / plugin.name).symlink_to(plugin)
    class_path = os.pathsep.join(jar for jar in jars if Path(jar) != plugin)
    running: list[subprocess.Popen[bytes]] = []

    def connect(*sinks: str) -> None:
        worker = snippets("Kafka Connect")[0].replace("localhost:9092", apache.bootstrap)
        worker += f"listeners=http://127.0.0.1:{free_port()}\nplugin.discovery=service_load\n"  # the latter is faster
        files = [tmp_path / f"{number}.properties" for number in range(1 + len(sinks))]
        for file, properties in zip(files, [worker, *sinks], strict=True):
            file.write_text(properties.replace("user-events", topic))
        options = ["-Xmx256m", "-XX:TieredStopAtLevel=1", "-Duser.timezone=UTC", "-cp", class_path]
        command = [java(), *options, "org.apache.kafka.connect.cli.ConnectStandalone", *map(str, files)]
        with (tmp_path / "connect.log").open("wb") as log:
            running.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))

    yield connect
    for process in running:
        process.kill()
        process.wait()


def test_connect(
    apache: ApacheKafka, run_script: RunScript, topic: str, tmp_path: Path, printed: str, connect: Connect
) -> None:
    """Without and with a schema; the event's time is in milliseconds then, or as Java's text of a date."""
    create_topic(apache.bootstrap, topic, 3, config={"retention.ms": "-1"})
    script = run_script(SCRIPT, **WEEK, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic)
    assert script.wait() == 0, script.tail()
    _, sink, schema = snippets("Kafka Connect")
    connect(sink, sink.replace("=events", "=typed") + schema)
    events = [*map(json.loads, printed.splitlines())]

    def read(name: str) -> list[tuple[str, ...]]:
        """user_id and event_time in each line."""
        file = tmp_path / name
        lines = file.read_text().splitlines() if file.exists() else []
        values = (dict(re.findall(r"\b(user_id|event_time)=(.+?)[,}]", line)) for line in lines)
        return sorted((told["user_id"], told["event_time"]) for told in values if len(told) == 2)

    wait_until(lambda: min(len(read(name)) for name in ("events.out", "typed.out")) >= len(events), 90, "all is there")
    epoch, millisecond = datetime.fromtimestamp(0, UTC), timedelta(milliseconds=1)
    assert read("events.out") == sorted((str(e["user_id"]), str((instant(e) - epoch) // millisecond)) for e in events)
    assert read("typed.out") == sorted((str(e["user_id"]), f"{instant(e):%a %b %d %H:%M:%S UTC %Y}") for e in events)
