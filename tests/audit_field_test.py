"""What other people's topics hold: does the audit judge it right, say what it could not judge, and end?

Nothing here is made up by a stand-in: real Kafka, with the settings, the transactions and the broken bytes named.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from auditor_test import (
    OTHER,
    RUN,
    Record,
    cart,
    delete_before,
    document,
    of_run,
    outcome,
    record,
    records,
    topic_with,
    user_of,
    write,
)
from brokers import AUTHORIZER, ApacheKafka, create_topic, delete_topic, grant, wait_until
from conftest import MakeApache, RunScript, Script
from kafka import KafkaProducer
from proxy import Proxy

AUDITOR = "test_random_consumer.py"
COMPACTED = "the topic is compacted, which removes all but the last event of a user: what is missing is not judged"
Audit = Callable[..., Script]


@pytest.fixture
def audit(run_script: RunScript, topic: str, apache: ApacheKafka) -> Audit:
    """audit(MAX_EVENTS=3) -> the auditor at work on `topic`; as_json=False: what people see."""

    def audit(as_json: bool = True, **settings: object) -> Script:
        given = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 1.5, **settings}
        return run_script(AUDITOR, *(["--json"] if as_json else []), **given)

    return audit


def foreign(value: bytes | None = b"\xff not an event", **more: Any) -> Record:
    return {"key": None, "value": value, **more}


class Raw(str):
    """A header's name as its very bytes."""

    def encode(self, *_: object) -> bytes:
        return bytes.fromhex(self)


# ------------------------------------------------------------------------------------- topics that lose events by right


@pytest.mark.parametrize("policy", ["compact", "compact,delete"])
def test_compacted(apache: ApacheKafka, topic: str, audit: Audit, policy: str) -> None:
    """What is missing is not judged; all else is."""
    wanted = [*records([2, 3, 7, 9]), foreign(None, key=b"1")]
    topic_with(apache, topic, wanted, config={"cleanup.policy": policy})
    run = of_run(first=2, last=9, events=4, missing=None)
    expected = document(topic, 5, cart(4), run, without_id=1, notes=[COMPACTED])
    assert outcome(audit()) == (0, expected)
    write(apache.bootstrap, topic, records([9]))
    run.update(events=5, repeated=1)
    assert outcome(audit()) == (1, document(topic, 6, cart(5), run, without_id=1, notes=[COMPACTED], ok=False))
    people = audit(as_json=False)
    assert people.wait() == 1
    assert people.stdout_lines[-2:] == [
        f"Note: {COMPACTED}",
        "NOT OK: missing not judged, repeated 1, reordered 0, misplaced 0, invalid 0",
    ]


@pytest.mark.slow
def test_a_user_who_may_not_see_the_settings(make_apache: MakeApache, topic: str, run_script: RunScript) -> None:
    """Said only where it matters: when something is missing."""
    kafka = make_apache(
        properties={"authorizer.class.name": AUTHORIZER},
        listeners={"SASL": "SASL_PLAINTEXT"},
        users={"reader": "secret"},
    )
    kafka.start()
    topic_with(kafka, topic, records([1, 2]), config={"cleanup.policy": "compact"})
    grant(kafka.bootstrap, "reader", topic, "READ", "DESCRIBE")
    given = {
        "KAFKA_BROKER": kafka.address("SASL"),
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "reader",
        "KAFKA_SASL_PASSWORD": "secret",
        "KAFKA_TOPIC": topic,
        "TIMEOUT_SECONDS": 1,
    }
    assert outcome(run_script(AUDITOR, "--json", **given)) == (0, document(topic, 2, cart(2), of_run(last=2, events=2)))
    write(kafka.bootstrap, topic, records([4]))
    code, found = outcome(run_script(AUDITOR, "--json", **given))
    assert (code, found["ok"], found["runs"][0]["missing"]) == (1, False, [[3, 3]])
    assert len(found["notes"]) == 1
    assert "DescribeConfigs" in found["notes"][0]
    grant(kafka.bootstrap, "reader", topic, "DESCRIBE_CONFIGS")
    code, found = outcome(run_script(AUDITOR, "--json", **given))
    assert (code, found["notes"], found["runs"][0]["missing"]) == (0, [COMPACTED], None)


def test_a_partition_emptied(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """What is missing may have been there: neither a fault nor excused in silence."""
    wanted = [record(number, user_of(number % 2, 2)) for number in range(1, 11) if number != 5]
    topic_with(apache, topic, wanted, partitions=2)
    delete_before(apache.bootstrap, topic, 0, 5)
    code, found = outcome(audit())
    assert (code, found["events"], found["ok"]) == (1, 4, False)
    assert found["runs"] == [of_run(last=9, events=4, truncated_before=10)]
    assert found["notes"] == [
        f"run {RUN} has gaps that cannot be judged: it has no event in partition 0, not read from the start"
    ]
    people = audit(as_json=False)
    assert people.wait() == 1
    assert people.stdout_lines[-2] == f"Note: {found['notes'][0]}"
    delete_before(apache.bootstrap, topic, 1, 4)
    code, found = outcome(audit())
    assert (code, found) == (
        1,
        document(topic, 0, {}, ok=False, notes=["nothing was read: all records of partitions 0, 1 are deleted"]),
    )


def test_a_partition_emptied_that_makes_no_difference(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """All that was made is there."""
    topic_with(apache, topic, [foreign(partition=0)], partitions=2)
    delete_before(apache.bootstrap, topic, 0, 1)
    write(apache.bootstrap, topic, [record(number, user_of(1, 2)) for number in (1, 2, 3)])
    code, found = outcome(audit())
    assert (code, found["ok"], found["notes"], found["runs"][0]["missing"]) == (0, True, [], [])


def test_a_gap_after_the_start_at_the_end(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """START=latest: a partition in which nothing came since excuses nothing in silence."""
    users = [user_of(number, 2) for number in (0, 1)]
    topic_with(apache, topic, [record(number, users[number % 2]) for number in range(1, 9)], partitions=2)
    script = audit(START="latest", TIMEOUT_SECONDS=3)
    script.wait_for("Reading topic")
    write(apache.bootstrap, topic, [record(number, users[1]) for number in (9, 11, 13)])
    code, found = outcome(script)
    assert (code, found["events"], found["ok"]) == (1, 3, False)
    assert f"run {RUN} has gaps that cannot be judged" in found["notes"][0]


def test_without_a_time(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """A record without a time says nothing about when its partition begins; it is no event of ours either."""
    wanted = [record(number, user_of(number % 2, 2)) for number in range(1, 9)]
    wanted.insert(2, foreign(partition=0, timestamp_ms=-1))
    topic_with(apache, topic, wanted, partitions=2)
    delete_before(apache.bootstrap, topic, 0, 1)  # all but sequence 2
    code, found = outcome(audit())
    assert (code, found["runs"], found["without_id"]) == (0, [of_run(last=8, events=7, truncated_before=4)], 1)


# ----------------------------------------------------------------------------------------- transactions of other people


@contextlib.contextmanager
def open_transaction(apache: ApacheKafka, topic: str, partition: int = 0) -> Iterator[Any]:
    """A record of somebody else, neither committed nor aborted."""
    producer = KafkaProducer(bootstrap_servers=apache.bootstrap, transactional_id=f"{topic}-{partition}")
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(topic, b"theirs", partition=partition).get(10)
    try:
        yield producer
    finally:
        producer.close(5)


def held(partition: int, offset: int) -> str:
    return (
        f"partition {partition} is judged up to offset {offset} only: a transaction of another producer is open there"
    )


def test_an_open_transaction(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """Our events behind it are not missing, and what is missing before it is."""
    users = [user_of(number, 2) for number in (0, 1)]
    before = [record(number, users[number % 2]) for number in (1, 2, 3, 5, 6)]
    after = [record(number, users[number % 2]) for number in range(7, 13)]
    topic_with(apache, topic, before, partitions=2)
    with open_transaction(apache, topic) as theirs:
        write(apache.bootstrap, topic, after)
        code, found = outcome(audit())
        run = of_run(last=11, events=8, missing=[[4, 4]])
        assert (code, found) == (1, document(topic, 8, cart(8), run, ok=False, notes=[held(0, 2)]))
        theirs.abort_transaction()
    run = of_run(last=12, events=11, missing=[[4, 4]])
    assert outcome(audit()) == (1, document(topic, 11, cart(11), run, ok=False))


def test_an_open_transaction_and_a_deleted_beginning(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """Neither end is left to judge by."""
    users = [user_of(number, 2) for number in (0, 1)]
    create_topic(apache.bootstrap, topic, 2, config={"retention.ms": "-1"})
    with open_transaction(apache, topic, 1):
        write(apache.bootstrap, topic, [record(number, users[number % 2]) for number in range(1, 9)])
        delete_before(apache.bootstrap, topic, 0, 2)
        code, found = outcome(audit())
    run = of_run(first=6, last=8, events=2, truncated_before=6)
    assert (code, found) == (1, document(topic, 2, cart(2), run, ok=False, notes=[held(1, 0)]))


def test_nothing_but_an_open_transaction(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """ "0 events, OK" is no answer; nor when it is Ctrl+C that ends the audit."""
    create_topic(apache.bootstrap, topic)
    with open_transaction(apache, topic) as theirs:
        write(apache.bootstrap, topic, records([1, 2]))
        expected = document(topic, 0, {}, ok=False, notes=[held(0, 0)])
        assert outcome(audit()) == (1, expected)
        script = audit(TIMEOUT_SECONDS=60)
        script.wait_for("Reading topic")
        time.sleep(1)
        script.signal(signal.SIGINT)
        assert outcome(script) == (1, expected)
        theirs.commit_transaction()
    assert outcome(audit(TIMEOUT_SECONDS=1))[1]["runs"] == [of_run(last=2, events=2)]


def test_an_open_transaction_beside_traffic(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """Ctrl+C while other partitions go on: there is no silence to tell it by."""
    user = user_of(1, 2)
    create_topic(apache.bootstrap, topic, 2, config={"retention.ms": "-1"})
    with open_transaction(apache, topic):
        script = audit(TIMEOUT_SECONDS=60)
        script.wait_for("Reading topic")
        for number in range(1, 200):
            write(apache.bootstrap, topic, [record(number, user)])
            if number == 20:
                script.signal(signal.SIGINT)
            if script.process.poll() is not None:
                break
        code, found = outcome(script)
    assert (code, found["notes"], found["runs"][0]["missing"]) == (1, [held(0, 0)], [])


def test_the_count_that_was_asked_for_stands_before_a_transaction(
    apache: ApacheKafka, topic: str, audit: Audit
) -> None:
    topic_with(apache, topic, records([1, 2, 3]))
    with open_transaction(apache, topic):
        assert outcome(audit(MAX_EVENTS=3)) == (0, document(topic, 3, cart(3), of_run(last=3, events=3)))


# -------------------------------------------------------------------------------------------------------- broken bytes


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_header_name_that_is_no_text(apache: ApacheKafka, topic: str, audit: Audit, compression: str | None) -> None:
    """It costs the batch that it is in, which is never one of ours; that is said, and the others are read."""
    create_topic(apache.bootstrap, topic)
    write(apache.bootstrap, topic, [record(1)])
    bad = foreign(headers=[(Raw("c328"), b"1")])
    write(apache.bootstrap, topic, [bad, foreign()], linger_ms=500, compression_type=compression)
    write(apache.bootstrap, topic, [record(2), record(3)])
    code, report = outcome(audit(MAX_EVENTS=3), 15)
    assert (code, report["ok"], report["events"], report["runs"]) == (1, False, 3, [of_run(last=3, events=3)])
    (note,) = report["notes"]
    assert re.match(r"partition 0, offsets 1 to 2: cannot be read \(.*UnicodeDecodeError", note), note


@pytest.mark.slow
def test_a_wrong_byte_on_the_way(make_apache: MakeApache, topic: str, run_script: RunScript) -> None:
    """It is read again: 20 answers damaged, each in another place, and nothing is missing."""
    kafka = make_apache(listeners={"FRONT": "PLAINTEXT"})
    with Proxy(kafka.port("FRONT")) as proxy:
        kafka.advertise(proxy.port, "FRONT")
        kafka.start()
        create_topic(kafka.direct, topic, config={"retention.ms": "-1"})
        given = {"KAFKA_BROKER": kafka.address("FRONT"), "KAFKA_TOPIC": topic, "MAX_EVENTS": 1000}
        script = run_script(AUDITOR, "--json", **given)
        script.wait_for("Reading topic")

        def damaged(number: int) -> bool:
            return proxy.flipped > number

        for number in range(20):
            proxy.flip(1, seed=number)
            write(kafka.direct, topic, records(range(50 * number + 1, 50 * number + 51)), linger_ms=50)
            wait_until(partial(damaged, number), 10, "an answer is damaged")
        assert outcome(script) == (0, document(topic, 1000, cart(1000), of_run(last=1000, events=1000)))


@pytest.mark.slow
def test_a_batch_that_cannot_be_read(make_apache: MakeApache, topic: str, run_script: RunScript) -> None:
    """A bad disk: it is stepped over and named, what stands behind it is read, and it counts as not judged."""
    kafka = make_apache()
    kafka.start()
    create_topic(kafka.bootstrap, topic, config={"retention.ms": "-1"})
    for sequences in ([1, 2], [3, 4, 5], [6]):
        write(kafka.bootstrap, topic, records(sequences), linger_ms=300)
    kafka.stop()
    log = kafka.log_file(topic)
    log.write_bytes(log.read_bytes().replace(f"{RUN}:4".encode(), f"?{RUN[1:]}:4".encode()))
    kafka.start_node()
    given = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 2}
    script = run_script(AUDITOR, "--json", **given)
    code, found = outcome(script, 20)
    note = found["notes"][0]
    run = of_run(last=6, events=3, missing=[[3, 5]])
    assert (code, found) == (1, document(topic, 3, cart(3), run, ok=False, notes=[note]))
    assert note.startswith("partition 0, offsets 2 to 4: cannot be read (CorruptRecordError")
    script.wait_for("ERROR - Records skipped: partition 0, offsets 2 to 4")
    script = run_script(AUDITOR, "--json", **{**given, "TIMEOUT_SECONDS": 60})
    script.wait_for("ERROR - Records skipped: ")
    script.signal(signal.SIGTERM)
    assert script.wait(10) == 1, "it hears signals all the while"


@pytest.mark.slow
def test_a_log_that_the_broker_cannot_read(make_apache: MakeApache, topic: str, run_script: RunScript) -> None:
    """It answers with an error for ever, of which the client says nothing."""
    kafka = make_apache()
    kafka.start()
    create_topic(kafka.bootstrap, topic, 2, config={"retention.ms": "-1"})
    users = [user_of(number, 2) for number in (0, 1)]
    for sequences in ([1, 2, 3, 4], [5, 6, 7, 8]):
        write(kafka.bootstrap, topic, [record(number, users[number % 2]) for number in sequences], linger_ms=300)
    with kafka.log_file(topic, 1).open("r+b") as log:  # the length of the second batch
        log.seek(12 + int.from_bytes(log.read(12)[8:]) + 8)
        log.write(bytes(4))
    given = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 2}
    code, found = outcome(run_script(AUDITOR, "--json", **given), 20)
    assert (code, found["runs"]) == (1, [of_run(last=8, events=6)])
    assert found["notes"] == ["partition 1 is judged up to offset 2 only: the broker hands out no more"]


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}]
)
def test_any_bytes_in_any_terminal(apache: ApacheKafka, topic: str, audit: Audit, environment: dict[str, str]) -> None:
    create_topic(apache.bootstrap, topic)
    event_type = "größe\u202e"
    strange = [
        foreign(bytes(range(256)), key=bytes(range(128, 256)), headers=[("événement", b"\xff")]),
        foreign('{"é": "\u202e"}'.encode(), key="ключ".encode()),
        foreign(b"", key=b""),
        foreign(b"[" * 100_000),
        record(1, event_type=event_type, metadata={"é": 1}),
        record(2, headers=[("event_id", b"\xff\xfe:\x00")]),
    ]
    write(apache.bootstrap, topic, strange)
    code, found = outcome(audit(MAX_EVENTS=6, **environment))
    run = of_run(last=1, events=1)
    assert (code, found) == (1, document(topic, 6, {event_type: 1}, run, without_id=4, invalid=1, ok=False))
    people = audit(as_json=False, MAX_EVENTS=6, **environment)
    assert people.wait() == 1
    assert len(people.stdout_lines) == 6 + 5
    assert all(line.isascii() and line.isprintable() for line in people.stdout_lines)
    assert people.stdout_lines[1].startswith(r"partition 0, offset 1, key \u043a\u043b\u044e\u0447: {")
    assert people.stdout_lines[7] == r"  gr\xf6\xdfe\u202e: 1"


def test_a_record_larger_than_a_fetch(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    config = {"max.message.bytes": "8000000"}
    create_topic(apache.bootstrap, topic, config=config)
    write(
        apache.bootstrap,
        topic,
        [record(1), foreign(os.urandom(6_000_000)), record(2)],
        max_request_size=8_000_000,
    )
    assert outcome(audit(MAX_EVENTS=3)) == (0, document(topic, 3, cart(2), of_run(last=2, events=2), without_id=1))


# ---------------------------------------------------------------------------------------- OK only for what was judged


def test_a_count_of_which_nothing_could_be_judged(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    topic_with(apache, topic, [record(1, headers=[]), foreign()])
    note = "no event of a run (with an event_id) was read, so nothing was judged"
    expected = document(topic, 2, cart(1), without_id=2, ok=False, notes=[note])
    assert outcome(audit(MAX_EVENTS=2)) == (1, expected)


def test_a_count_of_which_nothing_came(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    create_topic(apache.bootstrap, topic)
    code, found = outcome(audit(MAX_EVENTS=2))
    assert (code, found["ok"], len(found["notes"])) == (1, False, 1)


@pytest.mark.slow
def test_kafka_is_away_at_the_end(make_apache: MakeApache, topic: str, run_script: RunScript) -> None:
    kafka = make_apache()
    kafka.start()
    topic_with(kafka, topic, records([1, 2, 3]))
    script = run_script(AUDITOR, "--json", KAFKA_BROKER=kafka.bootstrap, KAFKA_TOPIC=topic, TIMEOUT_SECONDS=4)
    script.wait_for("Events read: 3")
    kafka.kill()
    code, found = outcome(script)
    assert (code, found["ok"], found["runs"]) == (1, False, [of_run(last=3, events=3)])
    assert found["notes"][0].startswith("partition 0 is judged up to offset 3 only: its leader is not reached")


@pytest.mark.slow
def test_the_topic_is_made_again_with_fewer_partitions(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    topic_with(apache, topic, records(range(1, 15)), partitions=4)
    script = audit(MAX_EVENTS=24, TIMEOUT_SECONDS=20)
    script.wait_for("Events read: 14")
    delete_topic(apache.bootstrap, topic)
    topic_with(apache, topic, records(range(1, 11), run=OTHER), partitions=2)
    runs = [of_run(last=14, events=14), of_run(OTHER, last=10, events=10)]
    code, found = outcome(script)
    assert (code, found) == (0, document(topic, 24, cart(24), *runs))


def test_an_earlier_transaction_leaves_nothing_open(apache: ApacheKafka, topic: str, audit: Audit) -> None:
    """The markers of transactions take offsets, and are no records that wait to be read."""
    topic_with(apache, topic, records([1, 2]))
    for end in ("commit_transaction", "abort_transaction"):
        with open_transaction(apache, topic) as theirs:
            getattr(theirs, end)()
    found = outcome(audit())
    assert found == (0, document(topic, 3, cart(2), of_run(last=2, events=2), without_id=1))
