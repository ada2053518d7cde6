"""Does the auditor find what is wrong in a topic, and nothing else?

Faults of every kind, written by a plain producer to a real broker; the document is compared as a whole.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from brokers import (
    ApacheKafka,
    add_partitions,
    create_topic,
    delete_topic,
    partition_of,
)
from conftest import ROOT, Broker, MakeApache, RunScript, Script
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"
START_MS = 1_705_314_600_123  # 2024-01-15T10:30:00.123
CART = {"product_id": "PROD-0042", "quantity": 2, "price": 45.99, "session_length": 12.5, "page": "/products"}
BOUNCE = {"page": "/home", "session_length": 0.4, "referrer": "google", "device": "mobile"}
VIEW = {
    "product_id": "PROD-0042",
    "category": "books",
    "price": 45.99,
    "view_duration": 30.5,
    "page": "/product-detail",
    "device": "desktop",
}
METADATA = {"add_to_cart": CART, "bounce": BOUNCE, "product_view": VIEW}
SENT = ("key", "value", "headers", "partition", "timestamp_ms")
Record = dict[str, Any]
Start = Callable[..., Script]


def record(sequence: int, user: int = 123, event_type: str = "add_to_cart", **changes: Any) -> Record:
    """What a producer sends, `at` so many ms (default: its sequence) after START_MS.

    `changes` to fields of the event, to what is SENT beside it, or `run`.
    """
    milliseconds = START_MS + changes.pop("at", sequence)
    run = changes.pop("run", RUN)
    sent = {name: changes.pop(name) for name in SENT if name in changes}
    second = datetime.fromtimestamp(milliseconds // 1000, UTC)
    event = {
        "user_id": user,
        "event_type": event_type,
        "timestamp": f"{second:%Y-%m-%dT%H:%M:%S}.{milliseconds % 1000:03}456",
        "metadata": METADATA.get(event_type),
        **changes,
    }
    return {
        "key": str(user).encode(),
        "value": json.dumps(event, separators=(",", ":")).encode(),
        "headers": [("event_id", f"{run}:{sequence}".encode())],
        "timestamp_ms": milliseconds,
        **sent,
    }


def records(sequences: Iterable[int], **changes: Any) -> list[Record]:
    return [record(sequence, user=sequence % 7 + 1, **changes) for sequence in sequences]


def user_of(partition: int, partitions: int) -> int:
    return next(user for user in range(1, 1000) if partition_of(str(user).encode(), partitions) == partition)


def write(bootstrap: str, topic: str, wanted: Iterable[Record], **options: Any) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap.split(","), **options)
    try:
        for future in [producer.send(topic, **each) for each in wanted]:
            future.get(30)
    finally:
        producer.close(5)


def topic_with(
    apache: Broker,
    topic: str,
    wanted: Iterable[Record],
    partitions: int = 1,
    config: Mapping[str, str] | None = None,
) -> None:
    create_topic(apache.bootstrap, topic, partitions, config={"retention.ms": "-1", **(config or {})})
    write(apache.bootstrap, topic, wanted)


def of_run(run: str = RUN, **changes: Any) -> dict[str, Any]:
    fields = {"run": run, "first": 1, "last": 0, "events": 0, "missing": [], "repeated": 0, "reordered": 0}
    return {**fields, "truncated_before": None, **changes}


def document(topic: str, events: int, by_type: Mapping[str, int], *runs: Any, **changes: Any) -> dict[str, Any]:
    """In the fixed order of its fields."""
    fields = {"topic": topic, "events": events, "by_type": dict(by_type), "without_id": 0, "invalid": 0}
    return {**fields, "misplaced": 0, "ok": True, "notes": [], **changes, "runs": list(runs)}


@pytest.fixture
def start(run_script: RunScript, topic: str) -> Start:
    """start(broker, MAX_EVENTS=3) -> the auditor at work on `topic`; as_json=False: what people see."""

    def start(broker: Broker, as_json: bool = True, **settings: object) -> Script:
        given = {"KAFKA_BROKER": broker.bootstrap, "KAFKA_TOPIC": topic, **settings}
        return run_script("test_random_consumer.py", *(["--json"] if as_json else []), **given)

    return start


def outcome(script: Script, timeout: float = 60) -> tuple[int, dict[str, Any]]:
    """Exit code and document; there is nothing else on standard output."""
    code = script.wait(timeout)
    assert len(script.stdout_lines) == 1, f"{code}: {script.tail()}"
    found: dict[str, Any] = json.loads(script.stdout)
    return code, found


def cart(sequences: int) -> dict[str, int]:
    return {"add_to_cart": sequences}


FAULTLESS: dict[str, tuple[list[Record], dict[str, int], list[Any], dict[str, Any]]] = {
    "each type": (
        [record(1), record(2, event_type="bounce"), record(3, event_type="product_view")],
        {"add_to_cart": 1, "bounce": 1, "product_view": 1},
        [of_run(last=3, events=3)],
        {},
    ),
    "a type of one's own": (
        [record(1, event_type="checkout", metadata={"total": 1}), record(2)],
        {"add_to_cart": 1, "checkout": 1},
        [of_run(last=2, events=2)],
        {},
    ),
    "two runs": (
        [record(1), record(1, run=OTHER), record(2), record(2, run=OTHER), record(3)],
        cart(5),
        [of_run(last=3, events=3), of_run(OTHER, last=2, events=2)],
        {},
    ),
    "without id": (
        [record(1), record(2, headers=[]), record(3, headers=[], value=b"hello", key=None)],
        cart(2),
        [of_run(last=1, events=1)],
        {"without_id": 2},
    ),
    "order between users": (
        [record(2, user=2), record(1, user=1)],
        cart(2),
        [of_run(last=2, events=2)],
        {},
    ),
}
FAULTS: dict[str, tuple[list[Record], dict[str, int], list[Any], dict[str, Any]]] = {
    "missing": (
        records([2, 3, 5, 9, 10]),
        cart(5),
        [of_run(first=2, last=10, events=5, missing=[[1, 1], [4, 4], [6, 8]])],
        {},
    ),
    "repeated": (
        records([1, 2, 1, 2, 2, 3]),
        cart(6),
        [of_run(last=3, events=6, repeated=3)],
        {},
    ),
    "reordered": (
        [record(1), record(4), record(2), record(3), record(5)],
        cart(5),
        [of_run(last=5, events=5, reordered=2)],
        {},
    ),
    "a wrong key": (
        [record(1), record(2, key=b"124"), record(3, key=None), record(4, key=b" 123")],
        cart(4),
        [of_run(last=4, events=4)],
        {"misplaced": 3},
    ),
    "no sequence": (
        [record(1), record(2, headers=[("event_id", b"0123456789abcdef")])],
        cart(1),
        [of_run(last=1, events=1)],
        {"invalid": 1},
    ),
    "one run of two": (
        [record(1), record(1, run=OTHER), record(3, run=OTHER)],
        cart(3),
        [of_run(last=1, events=1), of_run(OTHER, last=3, events=2, missing=[[2, 2]])],
        {},
    ),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in FAULTLESS.items()])
def test_nothing_wrong(apache: ApacheKafka, topic: str, start: Start, case: Any) -> None:
    wanted, by_type, runs, changes = case
    topic_with(apache, topic, wanted)
    code, found = outcome(start(apache, MAX_EVENTS=len(wanted)))
    expected = document(topic, len(wanted), by_type, *runs, **changes)
    assert (code, found) == (0, expected)
    assert list(found) == list(expected), "the order of the fields"
    assert list(found["runs"][0]) == list(of_run())


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in FAULTS.items()])
def test_faults(apache: ApacheKafka, topic: str, start: Start, case: Any) -> None:
    wanted, by_type, runs, changes = case
    topic_with(apache, topic, wanted)
    expected = document(topic, len(wanted), by_type, *runs, **{"ok": False, **changes})
    assert outcome(start(apache, MAX_EVENTS=len(wanted))) == (1, expected)


INVALID: dict[str, dict[str, Any]] = {
    "not JSON": {"value": b"not json"},
    "no value": {"value": None},
    "an array": {"value": b"[]"},
    "user 0": {"user": 0},
    "user 1001": {"user": 1001},
    "user as text": {"user_id": "123"},
    "a fifth field": {"more": 1},
    "metadata of another type": {"metadata": BOUNCE},
    "no metadata": {"metadata": {}},
    "quantity 6": {"metadata": {**CART, "quantity": 6}},
    "a third decimal": {"metadata": {**CART, "price": 45.991}},
    "a product of three digits": {"metadata": {**CART, "product_id": "PROD-042"}},
    "no price": {"metadata": {name: CART[name] for name in CART if name != "price"}},
    "a long bounce": {"event_type": "bounce", "metadata": {**BOUNCE, "session_length": 2.0}},
    "an unknown device": {"event_type": "bounce", "metadata": {**BOUNCE, "device": "watch"}},
    "another page of a view": {"event_type": "product_view", "metadata": {**VIEW, "page": "/home"}},
    "three decimals of a second": {"timestamp": "2024-01-15T10:30:00.123"},
    "with an offset": {"timestamp": "2024-01-15T10:30:00.123456Z"},
    "no such day": {"timestamp": "2024-02-30T10:30:00.123456"},
    "another CreateTime": {"timestamp_ms": START_MS - 1},
}


def test_every_kind_of_invalid(apache: ApacheKafka, topic: str, start: Start) -> None:
    """Each is read, counts for its run, and is shown with what is wrong."""
    count = len(INVALID)
    topic_with(apache, topic, [record(number, **how) for number, how in enumerate(INVALID.values(), 1)])
    code, found = outcome(start(apache, MAX_EVENTS=count))
    run = of_run(last=count, events=count)
    assert (code, found) == (1, document(topic, count, {}, run, invalid=count, ok=False))
    people = start(apache, as_json=False, MAX_EVENTS=count)
    assert people.wait() == 1
    shown = dict(zip(INVALID, people.stdout_lines, strict=False))
    assert [name for name, line in shown.items() if "  <- invalid: " not in line] == []


def test_the_time_of_the_broker_is_no_fault(apache: ApacheKafka, topic: str, start: Start) -> None:
    topic_with(apache, topic, [record(1)], config={"message.timestamp.type": "LogAppendTime"})
    assert outcome(start(apache, MAX_EVENTS=1)) == (0, document(topic, 1, cart(1), of_run(last=1, events=1)))


def test_a_wrong_partition(apache: ApacheKafka, topic: str, start: Start) -> None:
    wrong = (partition_of(b"123", 3) + 1) % 3
    topic_with(apache, topic, [record(1), record(2, partition=wrong), record(3)], partitions=3)
    expected = document(topic, 3, cart(3), of_run(last=3, events=3), misplaced=1, ok=False)
    assert outcome(start(apache, MAX_EVENTS=3)) == (1, expected)


def test_enlarged_before_the_audit(apache: ApacheKafka, topic: str, start: Start) -> None:
    topic_with(apache, topic, records(range(1, 8)))
    add_partitions(apache.bootstrap, topic, 4)
    script = start(apache, as_json=False, MAX_EVENTS=7)
    assert script.wait() == 1
    misplaced = sum(partition_of(str(user).encode(), 4) != 0 for user in range(1, 8))
    assert f"misplaced {misplaced}," in script.stdout_lines[-1]
    assert "in the right place for 1 partitions" in script.stdout_lines[-2]


def delete_before(bootstrap: str, topic: str, partition: int, offset: int) -> None:
    """As retention does."""
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    admin.delete_records({TopicPartition(topic, partition): offset})
    admin.close()


def test_the_beginning_deleted(apache: ApacheKafka, topic: str, start: Start) -> None:
    """One of two partitions has lost 2, 4, 6 and 8: what is missing can be told from 10 on only."""
    numbers = [number for number in range(1, 21) if number not in (7, 15)]
    topic_with(apache, topic, [record(number, user_of(number % 2, 2)) for number in numbers], partitions=2)
    delete_before(apache.bootstrap, topic, 0, 4)
    run = of_run(last=20, events=14, missing=[[15, 15]], truncated_before=10)
    assert outcome(start(apache, TIMEOUT_SECONDS=2)) == (1, document(topic, 14, cart(14), run, ok=False))


def test_a_run_that_began_after_what_is_deleted(apache: ApacheKafka, topic: str, start: Start) -> None:
    """The first record left in the partition is older than the run, so all of the run must be there."""
    left, right = user_of(0, 2), user_of(1, 2)
    old = [record(number, left, run=OTHER) for number in (1, 2, 3)]
    new = [record(1, right, at=50), record(2, right, at=51), record(4, left, at=53)]
    topic_with(apache, topic, [*old, *new], partitions=2)
    delete_before(apache.bootstrap, topic, 0, 1)
    code, found = outcome(start(apache, TIMEOUT_SECONDS=2))
    assert code == 1
    assert sorted(found["runs"], key=lambda run: str(run["run"])) == [
        of_run(last=4, events=3, missing=[[3, 3]]),
        of_run(OTHER, first=2, last=3, events=2, truncated_before=2),
    ]


def test_an_aborted_transaction(apache: ApacheKafka, topic: str, start: Start) -> None:
    topic_with(apache, topic, records([1, 2]))
    producer = KafkaProducer(bootstrap_servers=apache.bootstrap, transactional_id=topic)
    producer.init_transactions()
    for sequences, end in (([3, 4], producer.abort_transaction), ([5], producer.commit_transaction)):
        producer.begin_transaction()
        for each in records(sequences):
            producer.send(topic, **each)
        producer.flush()
        end()
    producer.close()
    expected = document(topic, 3, cart(3), of_run(last=5, events=3, missing=[[3, 4]]), ok=False)
    assert outcome(start(apache, TIMEOUT_SECONDS=2)) == (1, expected)


def test_fewer_than_max_events(apache: ApacheKafka, topic: str, start: Start) -> None:
    topic_with(apache, topic, records([1, 2]))
    expected = document(topic, 2, cart(2), of_run(last=2, events=2))
    assert outcome(start(apache, MAX_EVENTS=3, TIMEOUT_SECONDS=1)) == (1, expected)


def test_partitions_read_up_to_different_points(apache: ApacheKafka, topic: str, start: Start) -> None:
    """With MAX_EVENTS the others are read on only to see that nothing is missing."""
    topic_with(apache, topic, records(range(1, 2001)), partitions=4)
    code, found = outcome(start(apache, MAX_EVENTS=700))
    assert (code, found["events"], found["ok"]) == (0, 700, True)
    assert found["runs"][0]["missing"] == []
    assert found["runs"][0]["last"] > 700


def test_ctrl_c_gives_the_report(broker: Broker, topic: str, start: Start) -> None:
    create_topic(broker.bootstrap, topic, 2)
    write(broker.bootstrap, topic, records([1, 2, 3]))
    script = start(broker)
    script.wait_for("Events read: 3")
    script.signal(signal.SIGINT)
    assert outcome(script) == (0, document(topic, 3, cart(3), of_run(last=3, events=3)))


def test_start_latest(broker: Broker, topic: str, start: Start) -> None:
    """Only what comes from now on; of a run that was at work before, the beginning is not missed."""
    create_topic(broker.bootstrap, topic, 2)
    write(broker.bootstrap, topic, records(range(1, 12)))
    script = start(broker, START="latest", MAX_EVENTS=15)
    script.wait_for("Reading topic")
    later = int(time.time() * 1000) - START_MS + 1000
    fresh = [record(number, user=number, run=OTHER, at=later) for number in (1, 2, 4, 5, 6, 7)]
    write(broker.bootstrap, topic, [*records(range(12, 21)), *fresh])
    code, found = outcome(script)
    assert (code, found["events"], len(found["runs"])) == (1, 15, 2)
    old, new = sorted(found["runs"], key=lambda run: str(run["run"]))
    assert (old["first"], old["last"], old["missing"]) == (12, 20, [])
    assert old["truncated_before"] in range(12, 21)
    assert new == of_run(OTHER, last=7, events=6, missing=[[3, 3]])


def test_deleted_before_it_was_read(apache: ApacheKafka, topic: str, start: Start) -> None:
    """An auditor too slow for the topic's retention: it goes on with what is left."""
    topic_with(apache, topic, records([1, 2]))
    script = start(apache, TIMEOUT_SECONDS=4)
    script.wait_for("Events read: 2")
    script.signal(signal.SIGSTOP)
    for sequence in range(3, 10):  # the first goes to the request that waits already, if one does
        write(apache.bootstrap, topic, records([sequence]))
    delete_before(apache.bootstrap, topic, 0, 8)
    script.signal(signal.SIGCONT)
    script.wait_for("ERROR - Partition 0 now begins at 8")
    code, found = outcome(script)
    first = found["runs"][0]["missing"][0][0]
    assert first in (3, 4)
    assert (code, found["runs"]) == (1, [of_run(last=9, events=first, missing=[[first, 8]])])


@pytest.mark.slow
def test_partitions_added_while_it_runs(apache: ApacheKafka, topic: str, start: Start) -> None:
    topic_with(apache, topic, records(range(1, 8)))
    script = start(apache, MAX_EVENTS=14)
    script.wait_for("Reading topic")
    add_partitions(apache.bootstrap, topic, 3)
    write(apache.bootstrap, topic, records(range(8, 15)))
    expected = document(topic, 14, cart(14), of_run(last=14, events=14))
    assert outcome(script) == (0, expected)


@pytest.mark.slow
def test_a_broker_restarted(make_apache: MakeApache, topic: str, start: Start) -> None:
    kafka = make_apache()
    kafka.start()
    topic_with(kafka, topic, records(range(1, 8)), partitions=2)
    script = start(kafka, MAX_EVENTS=14)
    script.wait_for("Events read: 7")
    kafka.stop()
    script.wait_for("WARNING - Kafka is away")
    kafka.start_node()
    script.wait_for("INFO - Kafka is back")
    write(kafka.bootstrap, topic, records(range(8, 15)))
    assert outcome(script) == (0, document(topic, 14, cart(14), of_run(last=14, events=14)))
    assert sum("Kafka is away" in line for line in script.stderr_lines) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("longer", [False, True], ids=["shorter", "longer"])
def test_the_topic_recreated(apache: ApacheKafka, topic: str, start: Start, longer: bool) -> None:
    topic_with(apache, topic, records(range(1, 8)))
    again = records(range(1, 21 if longer else 4), run=OTHER)
    script = start(apache, MAX_EVENTS=7 + len(again))
    script.wait_for("Events read: 7")
    delete_topic(apache.bootstrap, topic)
    script.wait_for("is gone")
    topic_with(apache, topic, again, partitions=2)
    script.wait_for("another one, or was made again: reading on at its beginning")
    runs = [of_run(last=7, events=7), of_run(OTHER, last=len(again), events=len(again))]
    total = 7 + len(again)
    assert outcome(script) == (0, document(topic, total, cart(total), *runs))


@pytest.mark.slow
@pytest.mark.linux  # VmHWM
def test_ten_million_sequences_in_little_memory() -> None:
    """In order, and 2 million with 1,999 gaps; most of it is the interpreter and the client."""
    program = """
import re
from pathlib import Path
from types import SimpleNamespace
from test_random_consumer import Run
def most():  # KB; getrusage would count what pytest had before this program took its place
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = most()
whole, holed, record = Run(), Run(), SimpleNamespace(partition=0, timestamp=0)
for sequence in range(1, 10_000_001):
    whole.mark(sequence, record)
for sequence in range(1, 2_000_001):
    if sequence % 1000:
        holed.mark(sequence, record)
after = most()
gaps = holed.missing(1, 1_999_999)
print(whole.missing(1, 10_000_000), len(gaps), gaps[1], after - before, after)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    *_, grown, whole = done.stdout.split()
    assert done.stdout.startswith("[] 1999 (2000, 2000) ")
    assert int(grown) < 10_000, "KB"
    assert int(whole) < 100_000, "KB"
