#!/usr/bin/env python3
"""How fast is the tool, beside the client library alone, other clients and a newcomer's loop, on one Apache Kafka.

    pip install -r requirements-dev.txt aiokafka==0.14.0 confluent-kafka==2.16.1        (and Java 17, on Linux)
    python benchmarks/throughput.py [EVENTS] [throughput] [partitions] [long] [pace] [compression] [shards]

Without a part: throughput. EVENTS is for one run of one contender: 200,000, but 10,000,000 in the part `long`. aiokafka
and confluent-kafka (librdkafka) are needed here only; a contender whose package is not installed is left out.

Contenders take turns, and their numbers are medians of three rounds. Each run is a process of its own that has already
sent a few events; its time is that from making a client to closing it. CPU is user and system time of all threads,
memory the most that was resident. Ratios are to kafka-python alone, and above 1 is better. The machine may be shared
and noisy: read the ratios, not the rates. Every rate is counted by what the broker holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import random_event_producer as tool

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

CHILD = sys.argv[1:2] == ["child"]
if not CHILD:  # a contender's memory is measured, and these take 17 MiB
    import psutil  # type: ignore[import-untyped]
    from brokers import ApacheKafka, create_topic, read_all

ROUNDS = 3
WARM_UP_EVENTS = 2_000
SAMPLE_SECONDS = 0.1
BATCH_BYTES = 262_144
RDKAFKA_QUEUE = 100_000  # messages; its default: with MAX_UNCONFIRMED it takes half the memory and is a quarter slower


# ----------------------------------------------------------------------------------------------------- contenders


def client_alone(bootstrap: str, topic: str, events: int) -> None:
    """kafka-python with a constant value of 200 bytes, the tool's keys, a header, each confirmation looked at."""
    producer = KafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        enable_idempotence=True,
        batch_size=BATCH_BYTES,
        linger_ms=tool.FULL_SPEED_LINGER_MS,
        delivery_timeout_ms=float("inf"),
    )
    partitions = len(producer.partitions_for(topic))
    keys = [b"%d" % user_id for user_id in range(1, 1001)]
    places = itertools.cycle([(key, tool.key_hash(key) % partitions) for key in keys])
    value, headers, now = b"x" * 200, [("event_id", b"0123456789abcdef:123456")], time.time_ns() // 1_000_000
    pending, confirmed = deque[Any](), 0
    for number, (key, partition) in zip(range(events), places, strict=False):
        pending.append(producer.send(topic, value, key, headers, partition, now + number // 100))
        if number % tool.BURST_EVENTS == 0:
            if len(pending) >= tool.MAX_UNCONFIRMED:
                pending[0].get(60)
            while pending and pending[0].is_done:
                confirmed += pending.popleft().value.offset >= 0
    while pending:
        confirmed += pending.popleft().get(60).offset >= 0
    producer.close()
    assert confirmed == events


def the_tool(bootstrap: str, topic: str, events: int) -> None:
    os.environ.update(KAFKA_BROKER=bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS="0", LOG_LEVEL="ERROR")
    os.environ["MAX_EVENTS"] = str(events)
    sys.argv[1:] = []
    assert tool.main() == 0


def generated(events: int) -> Iterator[tool.Event]:
    """So many of the tool's own events: what other clients are handed is no cheaper to make."""
    return itertools.islice(iter(tool.RandomEventProducer().generate_event, None), events)


async def aiokafka_send(bootstrap: str, topic: str, events: int) -> None:
    """As aiokafka is mostly used, a future for each event, but the partition is not left to its slow murmur2."""
    from aiokafka import AIOKafkaProducer

    settings = {"enable_idempotence": True, "max_batch_size": BATCH_BYTES, "linger_ms": tool.FULL_SPEED_LINGER_MS}
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", **settings) as producer:
        partitions = len(await producer.partitions_for(topic))
        pending, confirmed = deque[Any](), 0
        for number, event in enumerate(generated(events)):
            partition, headers = tool.key_hash(event.key) % partitions, [("event_id", event.event_id.encode())]
            future = await producer.send(topic, event.value, event.key, partition, event.timestamp_ms, headers)
            pending.append(future)
            if number % tool.BURST_EVENTS == 0:
                if len(pending) >= tool.MAX_UNCONFIRMED:
                    await pending[0]
                while pending and pending[0].done():
                    confirmed += pending.popleft().result().offset >= 0
        while pending:
            confirmed += (await pending.popleft()).offset >= 0
        assert confirmed == events


async def aiokafka_batches(bootstrap: str, topic: str, events: int) -> None:
    """As aiokafka is fastest: batches filled by hand. Of one that is refused the events are no longer known."""
    from aiokafka import AIOKafkaProducer

    settings = {"enable_idempotence": True, "max_batch_size": BATCH_BYTES}
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", **settings) as producer:
        partitions = len(await producer.partitions_for(topic))
        batches, pending, confirmed = defaultdict[int, Any](producer.create_batch), deque[tuple[Any, int]](), 0

        async def send(partition: int) -> None:
            nonlocal confirmed
            batch = batches.pop(partition)
            pending.append((await producer.send_batch(batch, topic, partition=partition), batch.record_count()))
            while pending and pending[0][0].done():
                future, count = pending.popleft()
                confirmed += count * (future.result().offset >= 0)

        for event in generated(events):
            partition = tool.key_hash(event.key) % partitions
            headers = [("event_id", event.event_id.encode())]
            record = {"timestamp": event.timestamp_ms, "key": event.key, "value": event.value, "headers": headers}
            if batches[partition].append(**record) is None:  # full
                await send(partition)
                batches[partition].append(**record)
        for partition in list(batches):
            await send(partition)
        for future, count in pending:
            confirmed += count * ((await future).offset >= 0)
        assert confirmed == events


def rdkafka(bootstrap: str, topic: str, events: int) -> None:
    """librdkafka by confluent-kafka, with a delivery callback for each event."""
    from confluent_kafka import Producer

    settings = {"acks": "all", "enable.idempotence": True, "partitioner": "murmur2_random"}
    settings |= {"linger.ms": tool.FULL_SPEED_LINGER_MS, "batch.size": 1_000_000}
    producer = Producer({"bootstrap.servers": bootstrap, **settings})
    confirmed = 0

    def delivered(error: object, message: Any) -> None:
        nonlocal confirmed
        confirmed += error is None and message.offset() >= 0

    for number, event in enumerate(generated(events)):
        headers, timestamp = [("event_id", event.event_id.encode())], event.timestamp_ms
        producer.produce(topic, event.value, event.key, timestamp=timestamp, headers=headers, on_delivery=delivered)
        if number % tool.BURST_EVENTS == 0:
            producer.poll(0)
            while len(producer) > RDKAFKA_QUEUE - tool.BURST_EVENTS:
                producer.poll(0.1)
    producer.flush()
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
    producer.close()


class Contender(NamedTuple):
    run: Callable[[str, str, int], Any]  # bootstrap, topic, events; a coroutine is awaited
    package: str
    rare_collections: bool = True  # of the garbage collector, as the tool has them


CONTENDERS = {
    "kafka-python alone": Contender(client_alone, "kafka-python"),
    "the tool": Contender(the_tool, "kafka-python", False),
    "aiokafka, send()": Contender(aiokafka_send, "aiokafka"),
    "aiokafka, own batches": Contender(aiokafka_batches, "aiokafka"),
    "librdkafka": Contender(rdkafka, "confluent-kafka"),
    "a newcomer's loop": Contender(newcomer, "kafka-python", False),
}
OURS = ("kafka-python alone", "the tool")


def child(name: str, bootstrap: str, topic: str, events: int) -> None:
    """In a process of its own: prints seconds, CPU seconds, MiB."""
    contender = CONTENDERS[name]
    if contender.rare_collections:
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 100)
    for count in (WARM_UP_EVENTS, events):
        wall, cpu = time.perf_counter(), time.process_time()
        if work := contender.run(bootstrap, topic, count):
            asyncio.run(work)
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak_mebibytes()]))


def peak_mebibytes() -> float:
    """Of this process: getrusage() would tell the parent's peak, where that was higher."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


# ----------------------------------------------------------------------------------------------------- comparisons


def measure(name: str, bootstrap: str, topic: str, events: int) -> tuple[float, float, float]:
    """Events a second, CPU microseconds an event, MiB."""
    command = [sys.executable, "-W", "ignore", __file__, "child", name, bootstrap, topic, str(events)]
    with counting(bootstrap, topic) as stored:
        before = stored()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        assert stored() - before == WARM_UP_EVENTS + events
    seconds, cpu, peak = json.loads(output.splitlines()[-1])
    return events / seconds, 1e6 * cpu / events, peak


@contextlib.contextmanager
def counting(bootstrap: str, topic: str) -> Iterator[Callable[[], int]]:
    """What is given tells how many records the broker holds."""
    with contextlib.closing(KafkaConsumer(bootstrap_servers=bootstrap)) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
        yield lambda: sum(consumer.end_offsets(partitions).values())


def compare(names: Iterable[str], bootstrap: str, topic: str, events: int) -> Iterator[str]:
    present = [name for name in names if version(CONTENDERS[name].package)]
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in present}
    for _ in range(ROUNDS):
        for name in present:
            results[name].append(measure(name, bootstrap, topic, events))
    middle = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}
    base = middle["kafka-python alone"]
    yield f"{topic:22} {'events/s':>10} {'ratio':>6} {'CPU us/event':>13} {'ratio':>6} {'MiB':>5}"
    for name, (rate, cpu, peak) in middle.items():
        yield f"{name:22} {rate:10,.0f} {rate / base[0]:6.2f} {cpu:13.2f} {base[1] / cpu:6.2f} {peak:5.0f}"
    for name in names:
        if name not in present:
            yield f"{name:22} is left out: {CONTENDERS[name].package} is not installed"


def version(package: str) -> str:
    """Empty when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def throughput(bootstrap: str, events: int) -> Iterator[str]:
    create_topic(bootstrap, "throughput")
    yield from compare(CONTENDERS, bootstrap, "throughput", events)
    making = min(generation() for _ in range(5))
    yield f"making an event, without sending it: {making:.1f} us"


def generation(events: int = 100_000) -> float:
    make = tool.RandomEventProducer().generate_event
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)  # as in a run
    start = time.process_time()
    for _ in range(events):
        make(0.0)
    return 1e6 * (time.process_time() - start) / events


def partitions(bootstrap: str, events: int) -> Iterator[str]:
    for count in (1, 4, 64, 1_000):
        create_topic(bootstrap, topic := f"partitions-{count}", count)
        yield from compare(OURS, bootstrap, topic, events)


# ----------------------------------------------------------------------------------------------------- the tool alone


def start_tool(bootstrap: str, topic: str, **environment: str) -> subprocess.Popen[str]:
    settings = {"KAFKA_BROKER": bootstrap, "KAFKA_TOPIC": topic, "LOG_FORMAT": "json", **environment}
    command = [sys.executable, str(ROOT / "random_event_producer.py")]
    return subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True)


def run_tool(bootstrap: str, topic: str, shards: int = 1, **settings: str) -> tuple[list[dict[str, Any]], float]:
    """The fields of each shard's summary, and the CPU seconds of all."""
    settings["SHARD_COUNT"] = str(shards)
    before = children_cpu()
    processes = [start_tool(bootstrap, topic, **settings, SHARD_INDEX=str(index)) for index in range(shards)]
    logs = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), logs
    return [json.loads(log.splitlines()[-1]) for log in logs], children_cpu() - before


def children_cpu() -> float:
    """Seconds, of all that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def idle_cpu(bootstrap: str) -> float:
    """CPU seconds that a process takes for its start and end: those of a run of one event."""
    return run_tool(bootstrap, "idle", MAX_EVENTS="1", INTERVAL_SECONDS="0.001")[1]


class Sample(NamedTuple):
    time: float
    stored: int
    cpu: float
    mebibytes: float


def long(bootstrap: str, events: int) -> Iterator[str]:
    """One run, looked at from outside: what each tenth of the events took, and the most memory in it."""
    create_topic(bootstrap, "long")
    process, log, samples = start_tool(bootstrap, "long", INTERVAL_SECONDS="0", MAX_EVENTS=str(events)), "", []
    with counting(bootstrap, "long") as stored:
        while not log:
            samples.append(sample(process, stored()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                log = process.communicate(timeout=SAMPLE_SECONDS)[1]
    yield f"{'events so far':>14} {'events/s':>10} {'CPU us/event':>13} {'MiB':>5}"
    ends = [[each for each in samples if each.stored <= events * tenth / 10][-1] for tenth in range(11)]
    for first, last in itertools.pairwise(dict.fromkeys(ends)):
        count = last.stored - first.stored
        rate, cpu = count / (last.time - first.time), 1e6 * (last.cpu - first.cpu) / count
        most = max(each.mebibytes for each in samples if first.time <= each.time <= last.time)
        yield f"{last.stored:14,} {rate:10,.0f} {cpu:13.2f} {most:5.0f}"
    yield json.loads(log.splitlines()[-1])["message"]


def sample(process: subprocess.Popen[str], stored: int) -> Sample:
    watched = psutil.Process(process.pid)
    cpu = watched.cpu_times()
    return Sample(time.monotonic(), stored, cpu.user + cpu.system, watched.memory_info().rss / 2**20)


def pace(bootstrap: str, _events: int) -> Iterator[str]:
    """Rate over 10 s, gaps between timestamps, confirmation latency, CPU (less that for start and end)."""
    yield (
        f"{'asked/s':>8} {'reached':>10} {'error':>7} {'gaps p1 p50 p99, ms':>22} {'latency p50 p99, ms':>20} "
        f"{'skipped':>8} {'% of a core':>12}"
    )
    idle = idle_cpu(bootstrap)
    for rate in (1, 10, 100, 1_000, 10_000, 20_000):
        topic = f"pace-{rate}"
        create_topic(bootstrap, topic)
        [summary], cpu = run_tool(bootstrap, topic, INTERVAL_SECONDS=repr(1 / rate), DURATION_SECONDS="10")
        times = [datetime.fromisoformat(json.loads(record.value)["timestamp"]) for record in read_all(bootstrap, topic)]
        gaps = sorted((b - a).total_seconds() * 1000 for a, b in itertools.pairwise(times))
        low, mid, high = (gaps[int(share * (len(gaps) - 1))] for share in (0.01, 0.5, 0.99))
        reached, half, most = summary["rate"], 1000 * summary["latency_p50"], 1000 * summary["latency_p99"]
        yield (
            f"{rate:8,} {reached:10,.1f} {100 * (reached / rate - 1):+6.2f}% {low:8.2f} {mid:6.2f} {high:6.2f} "
            f"{half:13.1f} {most:6.1f} {summary['skipped']:8,} {100 * (cpu - idle) / 10:12.1f}"
        )


def compression(bootstrap: str, events: int) -> Iterator[str]:
    yield f"{'':8} {'events/s':>10} {'ratio':>6} {'bytes on disk/event':>20} {'ratio':>6}"
    base: tuple[float, float] | None = None
    for codec in ("none", "gzip", "snappy", "lz4", "zstd"):
        topic = f"codec-{codec}"
        create_topic(bootstrap, topic)
        most = str(events)
        [summary], _ = run_tool(bootstrap, topic, INTERVAL_SECONDS="0", MAX_EVENTS=most, KAFKA_COMPRESSION=codec)
        rate, size = summary["rate"], log_bytes(topic) / events
        base = base or (rate, size)
        yield f"{codec:8} {rate:10,.0f} {rate / base[0]:6.2f} {size:20.1f} {size / base[1]:6.2f}"


def log_bytes(topic: str) -> int:
    """A batch is stored as it was sent: the log segment's size is what went over the wire."""
    return sum(path.stat().st_size for path in FOLDER.rglob(f"{topic}-0/*.log"))


def shards(bootstrap: str, _events: int) -> Iterator[str]:
    """Processes side by side for 10 s; CPU less that for start and end."""
    idle, first = idle_cpu(bootstrap), 0.0
    for count in (1, 2):
        topic = f"shards-{count}"
        create_topic(bootstrap, topic, partitions=4)
        summaries, cpu = run_tool(bootstrap, topic, count, INTERVAL_SECONDS="0", DURATION_SECONDS="10")
        rate = sum(summary["rate"] for summary in summaries)
        first = first or rate
        per_event = 1e6 * (cpu - count * idle) / sum(summary["sent"] for summary in summaries)
        audit = subprocess.run(
            [sys.executable, str(ROOT / "test_random_consumer.py"), "--json"],
            env=os.environ | {"KAFKA_BROKER": bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": "3"},
            capture_output=True,
            text=True,
        ).stdout
        yield (
            f"{count} process(es): {rate:,.0f}/s, x {rate / first:.2f}, CPU {per_event:.2f} us/event, "
            f"audit ok: {json.loads(audit)['ok']}"
        )


PARTS: dict[str, tuple[Callable[[str, int], Iterator[str]], int]] = {  # and how many events, unless given
    "throughput": (throughput, 200_000),
    "partitions": (partitions, 200_000),
    "long": (long, 10_000_000),
    "pace": (pace, 0),
    "compression": (compression, 200_000),
    "shards": (shards, 0),
}


def main() -> None:
    numbers = [int(argument) for argument in sys.argv[1:] if re.fullmatch(r"\d+", argument)]
    names = [argument for argument in sys.argv[1:] if argument in PARTS] or ["throughput"]
    packages = dict.fromkeys(contender.package for contender in CONTENDERS.values())
    clients = [f"{package} {version(package)}" for package in packages if version(package)]
    print(f"Python {platform.python_version()}", f"{os.cpu_count()} cores", *clients, sep=", ")
    global FOLDER
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        with ApacheKafka(FOLDER) as kafka:
            for part, usual in map(PARTS.__getitem__, names):
                for line in part(kafka.bootstrap, numbers[0] if numbers else usual):
                    print(line, flush=True)


FOLDER = Path()

if __name__ == "__main__":
    if CHILD:
        child(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
