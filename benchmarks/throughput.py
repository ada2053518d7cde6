#!/usr/bin/env python3
"""How fast is the tool, against the client library alone and against a newcomer's loop, on one broker in one run.

    python benchmarks/throughput.py [EVENTS]        (default 200,000 a run; needs requirements-dev.txt and Java 17)
    python benchmarks/throughput.py [EVENTS] pace | compression | shards

The machine may be shared and noisy: read the ratios, not the rates. Every rate is counted by what the broker holds.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import random_event_producer as tool

from brokers import ApacheKafka, create_topic, read_all
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

ROUNDS = 3
BEST = {
    "acks": "all",
    "enable_idempotence": True,
    "batch_size": 262_144,
    "linger_ms": tool.FULL_SPEED_LINGER_MS,
    "delivery_timeout_ms": float("inf"),
}


def client_alone(bootstrap: str, topic: str, events: int) -> None:
    """kafka-python with a constant value of 200 bytes, key and header, each confirmation looked at."""
    producer = KafkaProducer(bootstrap_servers=bootstrap, **BEST)
    producer.partitions_for(topic)
    partition = tool.key_hash(b"123") % len(producer.partitions_for(topic))
    value, headers, pending, confirmed = b"x" * 200, [("event_id", b"0123456789abcdef:123456")], deque[Any](), 0
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    for number in range(events):
        pending.append(producer.send(topic, value, b"123", headers, partition, 1_700_000_000_000 + number))
        if number % tool.BURST_EVENTS == 0:
            if len(pending) >= tool.MAX_UNCONFIRMED:
                pending[0].get(10)
            while pending and pending[0].is_done:
                confirmed += pending.popleft().value.offset >= 0
    while pending:
        confirmed += pending.popleft().get(30).offset >= 0
    assert confirmed == events


def newcomer(bootstrap: str, topic: str, events: int) -> None:
    """As one writes it first: dict, random.choice, json.dumps, default settings."""
    producer = KafkaProducer(
        bootstrap_servers=bootstrap,
        key_serializer=str.encode,
        value_serializer=lambda event: json.dumps(event).encode(),
    )
    for _ in range(events):
        event = {
            "user_id": random.randint(1, 1000),
            "event_type": random.choice(["add_to_cart", "bounce", "product_view"]),
            "timestamp": datetime.now(UTC).isoformat(),
            "metadata": {
                "product_id": f"PROD-{random.randint(1, 1000):04}",
                "price": round(random.uniform(5, 500), 2),
                "session_length": round(random.uniform(1, 60), 1),
                "page": random.choice(tool.PAGES),
            },
        }
        producer.send(topic, key=str(event["user_id"]), value=event)
    producer.flush()


def the_tool(bootstrap: str, topic: str, events: int) -> None:
    os.environ.update(KAFKA_BROKER=bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS="0", LOG_LEVEL="ERROR")
    os.environ["MAX_EVENTS"] = str(events)
    sys.argv[1:] = []
    assert tool.main() == 0


CONTENDERS: dict[str, Callable[[str, str, int], None]] = {
    "kafka-python alone": client_alone,
    "the tool": the_tool,
    "a newcomer's loop": newcomer,
}


def child(name: str, bootstrap: str, topic: str, events: int) -> None:
    """In a process of its own: seconds of making and confirming (not of start), CPU seconds, peak memory."""
    CONTENDERS[name](bootstrap, topic + "-warm", 2_000)
    wall, cpu = time.perf_counter(), time.process_time()
    CONTENDERS[name](bootstrap, topic, events)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak]))


def measure(name: str, bootstrap: str, topic: str, events: int) -> tuple[float, float, float]:
    """Events a second, CPU microseconds an event, MiB."""
    for each in (topic, topic + "-warm"):
        create_topic(bootstrap, each)
    command = [sys.executable, __file__, "child", name, bootstrap, topic, str(events)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    seconds, cpu, peak = json.loads(output.splitlines()[-1])
    assert stored(bootstrap, topic) == events
    return events / seconds, 1e6 * cpu / events, peak


def stored(bootstrap: str, topic: str) -> int:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap)
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    total = sum(consumer.end_offsets(partitions).values())
    consumer.close()
    return int(total)


def throughput(bootstrap: str, events: int) -> Iterator[str]:
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONTENDERS}
    for turn in range(ROUNDS):
        for number, name in enumerate(CONTENDERS):
            results[name].append(measure(name, bootstrap, f"round-{turn}-{number}", events))
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    base = middle["kafka-python alone"]
    yield f"{'':20} {'events/s':>10} {'ratio':>6} {'CPU us/event':>13} {'ratio':>6} {'MiB':>5}"
    for name, (rate, cpu, peak) in middle.items():
        yield f"{name:20} {rate:10,.0f} {rate / base[0]:6.2f} {cpu:13.1f} {base[1] / cpu:6.2f} {peak:5.0f}"
    making = min(generation() for _ in range(5))
    yield f"making an event, without sending it: {making:.1f} us"


def generation(events: int = 100_000) -> float:
    make = tool.RandomEventProducer().generate_event
    start = time.process_time()
    for _ in range(events):
        make(0.0)
    return 1e6 * (time.process_time() - start) / events


def run_tool(bootstrap: str, topic: str, **environment: str) -> tuple[dict[str, float], float]:
    """The numbers of the summary, and the process's CPU seconds in all."""
    settings = {"KAFKA_BROKER": bootstrap, "KAFKA_TOPIC": topic, "LOG_FORMAT": "json", **environment}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "random_event_producer.py")]
    log = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True).stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(log.splitlines()[-1]), cpu


def pace(bootstrap: str, _events: int) -> Iterator[str]:
    """Rate over 10 s, gaps between timestamps, CPU (less what a run of one event takes for start and end)."""
    yield f"{'asked/s':>8} {'reached':>10} {'error':>7} {'gaps p1 p50 p99, ms':>22} {'skipped':>8} {'% of a core':>12}"
    _, idle = run_tool(bootstrap, "pace-none", MAX_EVENTS="1", INTERVAL_SECONDS="0.001")
    for rate in (1, 10, 100, 1_000, 10_000, 20_000):
        topic = f"pace-{rate}"
        create_topic(bootstrap, topic)
        summary, cpu = run_tool(bootstrap, topic, INTERVAL_SECONDS=repr(1 / rate), DURATION_SECONDS="10")
        times = [datetime.fromisoformat(json.loads(record.value)["timestamp"]) for record in read_all(bootstrap, topic)]
        gaps = sorted((b - a).total_seconds() * 1000 for a, b in itertools.pairwise(times))
        low, mid, high = (gaps[int(share * (len(gaps) - 1))] for share in (0.01, 0.5, 0.99))
        reached = summary["rate"]
        yield (
            f"{rate:8,} {reached:10,.1f} {100 * (reached / rate - 1):+6.2f}% {low:8.2f} {mid:6.2f} {high:6.2f} "
            f"{summary['skipped']:8,.0f} {100 * (cpu - idle) / 10:12.1f}"
        )


def compression(bootstrap: str, events: int) -> Iterator[str]:
    yield f"{'':8} {'events/s':>10} {'ratio':>6} {'bytes on disk/event':>20} {'ratio':>6}"
    base: tuple[float, float] | None = None
    for codec in ("none", "gzip", "snappy", "lz4", "zstd"):
        topic = f"codec-{codec}"
        create_topic(bootstrap, topic)
        settings = {"INTERVAL_SECONDS": "0", "MAX_EVENTS": str(events), "KAFKA_COMPRESSION": codec}
        rate = run_tool(bootstrap, topic, **settings)[0]["rate"]
        size = log_bytes(topic) / events
        base = base or (rate, size)
        yield f"{codec:8} {rate:10,.0f} {rate / base[0]:6.2f} {size:20.1f} {size / base[1]:6.2f}"


def log_bytes(topic: str) -> int:
    """A batch is stored as it was sent: the log segment's size is what went over the wire."""
    return sum(path.stat().st_size for path in FOLDER.rglob(f"{topic}-0/*.log"))


def shards(bootstrap: str, _events: int) -> Iterator[str]:
    first = 0.0
    for count in (1, 2):
        topic = f"shards-{count}"
        create_topic(bootstrap, topic, partitions=4)
        settings = {"KAFKA_BROKER": bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": "0", "LOG_FORMAT": "json"}
        settings |= {"DURATION_SECONDS": "10", "SHARD_COUNT": str(count)}
        processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "random_event_producer.py")],
                env=os.environ | settings | {"SHARD_INDEX": str(index)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        rate = sum(json.loads(process.communicate()[1].splitlines()[-1])["rate"] for process in processes)
        first = first or rate
        audit = subprocess.run(
            [sys.executable, str(ROOT / "test_random_consumer.py"), "--json"],
            env=os.environ | {"KAFKA_BROKER": bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": "3"},
            capture_output=True,
            text=True,
        ).stdout
        yield f"{count} process(es): {rate:,.0f}/s, x {rate / first:.2f}, audit ok: {json.loads(audit)['ok']}"


PARTS = {"throughput": throughput, "pace": pace, "compression": compression, "shards": shards}


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:] if re.fullmatch(r"\d+", argument)]
    parts = [PARTS[argument] for argument in sys.argv[1:] if argument in PARTS] or [throughput]
    global FOLDER
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        with ApacheKafka(FOLDER) as kafka:
            for part in parts:
                for line in part(kafka.bootstrap, numbers[0] if numbers else 200_000):
                    print(line, flush=True)


FOLDER = Path()

if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
