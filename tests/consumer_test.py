"""test_random_consumer.py as people use it: what it prints, how it ends, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from brokers import ApacheKafka, create_topic, delete_topic, grant, revoke, wait_until
from conftest import ROOT, Broker, MakeApache, RunScript, Script, clean_environment
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

SCRIPT = "test_random_consumer.py"
# 2024-01-15T10:30:00.123456 in UTC
TIMESTAMP_MS = 1_705_314_600_123
VALUE = (
    '{"user_id":123,"event_type":"add_to_cart","timestamp":"2024-01-15T10:30:00.123456","metadata":'
    '{"product_id":"PROD-0042","quantity":2,"price":45.99,"session_length":12.5,"page":"/products"}}'
)
Consume = Callable[..., Script]


@pytest.fixture
def consume(run_script: RunScript, topic: str) -> Consume:
    def consume(broker: Broker, *arguments: str, **settings: object) -> Script:
        given = {"KAFKA_BROKER": broker.bootstrap, "KAFKA_TOPIC": topic, **settings}
        return run_script(SCRIPT, *arguments, **given)

    return consume


def write(broker: Broker, topic: str, *sequences: int, value: str = VALUE) -> None:
    producer = KafkaProducer(bootstrap_servers=broker.bootstrap)
    for sequence in sequences:
        header = ("event_id", f"0123456789abcdef:{sequence}".encode())
        producer.send(topic, value.encode(), b"123", [header], timestamp_ms=TIMESTAMP_MS)
    producer.close(10)


def make_topic(broker: Broker, topic: str) -> None:
    create_topic(broker.bootstrap, topic, config={"retention.ms": "-1"})


def test_prints_events_and_summary(broker: Broker, topic: str, consume: Consume) -> None:
    make_topic(broker, topic)
    write(broker, topic, 1, 2, 4)
    script = consume(broker, TIMEOUT_SECONDS=1)
    assert script.wait() == 1
    assert script.stdout_lines == [
        f"partition 0, offset 0, key 123: {VALUE}",
        f"partition 0, offset 1, key 123: {VALUE}",
        f"partition 0, offset 2, key 123: {VALUE}",
        f"3 events read from topic {topic}",
        "  add_to_cart: 3",
        "Run 0123456789abcdef: 3 events, sequences 1 to 4, missing 1 (3), repeated 0, reordered 0",
        "NOT OK: missing 1, repeated 0, reordered 0, misplaced 0, invalid 0",
    ]


def test_says_what_is_wrong_with_an_event(apache: ApacheKafka, topic: str, consume: Consume) -> None:
    make_topic(apache, topic)
    write(apache, topic, 1, 2, 1)
    write(apache, topic, 3, value="\x1b[2Jno event\n")
    script = consume(apache, MAX_EVENTS=4)
    assert script.wait() == 1
    assert script.stdout_lines[2] == f"partition 0, offset 2, key 123: {VALUE}  <- repeated"
    assert script.stdout_lines[3].startswith(
        r"partition 0, offset 3, key 123: \x1b[2Jno event\n  <- invalid: not JSON: "
    )
    assert script.stdout_lines[-1] == "NOT OK: missing 0, repeated 1, reordered 0, misplaced 0, invalid 1"


def test_what_the_tool_sends_is_fine(broker: Broker, run_script: RunScript, topic: str, consume: Consume) -> None:
    create_topic(broker.bootstrap, topic, 3)
    given = {"KAFKA_BROKER": broker.bootstrap, "KAFKA_TOPIC": topic, "MAX_EVENTS": 2000, "INTERVAL_SECONDS": 0}
    assert run_script("random_event_producer.py", **given).wait() == 0
    script = consume(broker, "--json", MAX_EVENTS=2000)
    assert script.wait() == 0, script.tail()
    found = json.loads(script.stdout)
    assert (found["events"], found["ok"], sum(found["by_type"].values())) == (2000, True, 2000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_summary(broker: Broker, topic: str, consume: Consume, number: int) -> None:
    make_topic(broker, topic)
    write(broker, topic, 1)
    script = consume(broker)
    script.wait_for("offset 0")
    script.signal(number)
    assert script.wait(10) == 0
    assert script.stdout_lines[-1] == "OK: missing 0, repeated 0, reordered 0, misplaced 0, invalid 0"


def test_an_empty_topic(broker: Broker, topic: str, consume: Consume) -> None:
    make_topic(broker, topic)
    script = consume(broker, TIMEOUT_SECONDS=0.5)
    assert script.wait() == 1
    assert script.stdout_lines[0] == f"0 events read from topic {topic}"


BAD = {
    "TIMEOUT_SECONDS": ["0", "-1", "soon", "inf", "nan"],
    "START": ["middle"],
    "CONNECT_TIMEOUT_SECONDS": ["0"],
    "MAX_EVENTS": ["0", "1.5"],
    "KAFKA_BROKER": ["no where"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_settings(run_script: RunScript, name: str, value: str) -> None:
    script = run_script(SCRIPT, **{name: value})
    assert script.wait() == 2
    assert script.stdout == ""
    assert len(script.stderr_lines) == 1
    assert script.stderr.startswith(f"{name}: '{value}'")


def test_all_problems_together(run_script: RunScript) -> None:
    script = run_script(SCRIPT, START="x", TIMEOUT_SECONDS="x")
    assert script.wait() == 2
    assert [line.partition(":")[0] for line in script.stderr_lines] == ["TIMEOUT_SECONDS", "START"]


def test_an_unknown_argument(run_script: RunScript) -> None:
    script = run_script(SCRIPT, "--yaml")
    assert (script.wait(), script.stdout) == (2, "")


def test_help_tells_its_own_settings(run_script: RunScript) -> None:
    script = run_script(SCRIPT, "--help")
    assert script.wait() == 0
    for expected in ("--json", "TIMEOUT_SECONDS", "START", "CONNECT_TIMEOUT_SECONDS +30 "):
        assert re.search(f"^  {expected}", script.stdout, re.MULTILINE), expected


def test_no_kafka(run_script: RunScript, topic: str) -> None:
    script = run_script(SCRIPT, "--json", KAFKA_BROKER="127.0.0.1:9", KAFKA_TOPIC=topic, CONNECT_TIMEOUT_SECONDS=1)
    assert script.wait(10) == 1
    assert json.loads(script.stdout)["ok"] is False
    assert "ERROR - Kafka not reached in 1 s" in script.stderr


def test_no_topic(broker: Broker, topic: str, consume: Consume) -> None:
    """It says so, waits, gives up, and has not created it (the brokers do, for whoever asks carelessly)."""
    script = consume(broker, CONNECT_TIMEOUT_SECONDS=2)
    assert script.wait(15) == 1
    assert f"WARNING - Topic {topic} does not exist" in script.stderr
    assert f"ERROR - topic {topic} does not exist after 2 s" in script.stderr
    assert topic not in topics(broker)


def test_a_topic_that_comes_later(apache: ApacheKafka, topic: str, consume: Consume) -> None:
    script = consume(apache, MAX_EVENTS=1)
    script.wait_for("does not exist, .* Waiting")
    make_topic(apache, topic)
    write(apache, topic, 1)
    assert script.wait() == 0


def test_a_deleted_topic_is_not_brought_back(apache: ApacheKafka, topic: str, consume: Consume) -> None:
    make_topic(apache, topic)
    write(apache, topic, 1)
    script = consume(apache, TIMEOUT_SECONDS=5)
    script.wait_for("offset 0")
    delete_topic(apache.bootstrap, topic)
    script.wait_for("WARNING - Topic .* is gone")
    assert script.wait() == 0
    assert topic not in topics(apache)


@pytest.mark.slow
def test_leaves_nothing_on_the_broker(make_apache: MakeApache, topic: str, consume: Consume) -> None:
    kafka = make_apache()
    kafka.start()
    make_topic(kafka, topic)
    write(kafka, topic, 1)
    assert consume(kafka, MAX_EVENTS=1).wait() == 0
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    folders = {path.name for path in kafka.folder.glob("node-0/data/*-0")}
    groups = admin.list_groups()
    admin.close()
    assert not groups
    assert folders == {f"{topic}-0", "__cluster_metadata-0"}


def topics(broker: Broker) -> list[str]:
    admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
    try:
        return list(admin.list_topics())
    finally:
        admin.close()


def test_a_pipe_that_closes(apache: ApacheKafka, topic: str, tmp_path: Path) -> None:
    """`| head -1`: it stops, without a complaint."""
    make_topic(apache, topic)
    write(apache, topic, *range(1, 3001))
    environment = clean_environment(KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic)
    script = subprocess.Popen(
        [sys.executable, str(ROOT / SCRIPT)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    assert script.stderr is not None
    assert script.stdout.readline().startswith("partition 0, offset 0")
    script.stdout.close()
    try:
        assert script.wait(20) == 0
        complaints = [line for line in script.stderr if "INFO" not in line]
    finally:
        script.kill()
    assert complaints == []


@pytest.mark.slow
def test_a_user_who_may_not_read(make_apache: MakeApache, topic: str, consume: Consume) -> None:
    kafka = make_apache(
        properties={"authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer"},
        listeners={"SASL": "SASL_PLAINTEXT"},
        users={"reader": "secret"},
    )
    kafka.start()
    make_topic(kafka, topic)
    write(kafka, topic, 1)
    login = {
        "KAFKA_BROKER": kafka.address("SASL"),
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "reader",
        "KAFKA_SASL_PASSWORD": "secret",
    }
    refused = "ERROR - not authorised for topic .*: grant this user Read and Describe"
    script = consume(kafka, CONNECT_TIMEOUT_SECONDS=5, **login)
    assert script.wait() == 1
    script.wait_for(refused)
    grant(kafka.bootstrap, "reader", topic, "DESCRIBE")
    script = consume(kafka, **login)
    assert script.wait() == 1
    script.wait_for(refused)
    grant(kafka.bootstrap, "reader", topic, "READ")
    script = consume(kafka, **login)
    script.wait_for("offset 0")
    revoke(kafka.bootstrap, "reader", topic)
    assert script.wait() == 1
    assert script.stdout_lines[-1].startswith("NOT OK: missing 0"), "what was read is reported all the same"
    assert "Note: the audit ended early: not authorised" in script.stdout


def test_a_second_ctrl_c_ends_it_at_once(apache: ApacheKafka, topic: str, consume: Consume) -> None:
    """It looks for what is missing, for three seconds: the second one does not wait for that."""
    make_topic(apache, topic)
    write(apache, topic, 1, 3)
    script = consume(apache)
    script.wait_for("offset 1")
    script.signal(signal.SIGINT)
    script.wait_for("Looking for 1 events")

    def once_more() -> bool:  # the same one twice within 0.2 s counts once
        script.signal(signal.SIGINT)
        return script.process.poll() is not None

    wait_until(once_more, 2, "it ends", 0.3)
    assert script.wait() == 130
