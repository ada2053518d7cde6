"""The main job as users run it: processes, environment, signals, exit codes, console lines, and the topic read back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from brokers import HOST, ApacheKafka, Tansu, audit, create_topic, event_id, partition_of, read_all, wait_until
from brokers import free_port as unused_port
from conftest import (
    EMBEDDED,
    ROOT,
    SETTINGS,
    Broker,
    MakeApache,
    RunScript,
    Script,
    clean_environment,
    listens,
    require_apache,
)
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

sys.path.insert(0, str(ROOT))

from random_event_producer import BadConfiguration, Settings

PRODUCER, SAMPLES = "random_event_producer.py", "test_random_producer.py"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (DEBUG|INFO|WARNING|ERROR) - (.+)")
EVENT_LINE = re.compile(r"Event sent - User: (\d+), Type: (\w+), Metadata: (\{.*\}), Partition: (\d+)")
NUMBERS = ("sent", "failed", "unconfirmed", "sent again", "skipped")
FIELDS = {
    "add_to_cart": ["product_id", "quantity", "price", "session_length", "page"],
    "bounce": ["page", "session_length", "referrer", "device"],
    "product_view": ["product_id", "category", "price", "view_duration", "page", "device"],
}
SIGNALS = [pytest.param(signal.SIGINT, id="SIGINT"), pytest.param(signal.SIGTERM, id="SIGTERM")]


def events(records: list[Any]) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in records]


def instant(event: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(event["timestamp"]).replace(tzinfo=UTC)


def messages(script: Script) -> list[tuple[str, str]]:
    """(level, message) of each line; all of them must be in the format."""
    found = [LINE.fullmatch(line) for line in script.stderr_lines]
    assert all(found), script.tail()
    return [(match[1], match[2]) for match in found if match]


def summary(script: Script) -> dict[str, int]:
    """The numbers of the last line."""
    last = script.stderr_lines[-1]
    assert "Stopped: " in last, script.tail()
    found = {name: re.search(rf"\b{name} (\d+)", last) for name in NUMBERS}
    assert all(found.values()), last
    return {name: int(match[1]) for name, match in found.items() if match}


def stopped(script: Script, **expected: int) -> None:
    """`expected`: what differs from 0 in the summary."""
    assert summary(script) == {**dict.fromkeys(NUMBERS, 0), **expected}


def nothing_there() -> str:
    return f"{HOST}:{unused_port()}"


@contextlib.contextmanager
def silent_port() -> Iterator[tuple[str, Callable[[], bool]]]:
    """A port that accepts and never answers, and whether anybody has come."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        listener.setblocking(False)

        def visited() -> bool:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                return False
            return True

        yield f"{HOST}:{listener.getsockname()[1]}", visited


# ----------------------------------------------------------------------------------------------------- the events


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", params=["tansu", "apache"])
def feed(request: pytest.FixtureRequest, home: Path) -> list[Any]:
    """The records of one run: 600 events over five partitions."""
    broker: Broker = request.getfixturevalue(request.param)
    create_topic(broker.direct, "feed", 5)
    settings = clean_environment(
        KAFKA_BROKER=broker.bootstrap, KAFKA_TOPIC="feed", INTERVAL_SECONDS=0, MAX_EVENTS=600, SEED="feed"
    )
    command = [sys.executable, str(ROOT / PRODUCER)]
    subprocess.run(command, env=settings, cwd=home, check=True, capture_output=True, timeout=60)
    return read_all(broker.direct, "feed")


@pytest.fixture(scope="module")
def schema() -> Any:
    command = [sys.executable, str(ROOT / PRODUCER), "--schema"]
    output = subprocess.run(command, env=clean_environment(), check=True, capture_output=True, timeout=60).stdout
    described = json.loads(output)
    Draft7Validator.check_schema(described)
    assert described["$schema"] == "http://json-schema.org/draft-07/schema#"
    return Draft7Validator(described)


def test_all_events_are_there_once_and_in_order(feed: list[Any]) -> None:
    checked = audit(feed, 5)
    assert checked.clean
    assert (checked.events, checked.without_id, len(checked.runs)) == (600, 0, 1)


def test_a_user_stays_in_the_partition_of_murmur2(feed: list[Any]) -> None:
    assert {record.partition for record in feed} == set(range(5))
    for record in feed:
        assert record.partition == partition_of(record.key, 5)


def test_keys_headers_and_times(feed: list[Any]) -> None:
    runs = set()
    for record, event in zip(feed, events(feed), strict=True):
        assert record.key == str(event["user_id"]).encode()
        assert [name for name, _ in record.headers] == ["event_id"]
        assert re.fullmatch(rb"[0-9a-f]{16}:[1-9][0-9]*", record.headers[0][1])
        runs.add(record.headers[0][1][:16])
        assert record.timestamp_type == 0, "not CreateTime"
        assert record.timestamp == (instant(event) - datetime.fromtimestamp(0, UTC)) // timedelta(milliseconds=1)
    assert len(runs) == 1
    by_sequence = sorted(feed, key=lambda record: event_id(record) or ("", 0))
    times = [instant(event) for event in events(by_sequence)]
    assert times == sorted(times)
    assert abs(times[-1] - datetime.now(UTC)) < timedelta(minutes=10), "not UTC"


def test_values_are_compact_and_in_field_order(feed: list[Any]) -> None:
    for record, event in zip(feed, events(feed), strict=True):
        assert record.value == json.dumps(event, separators=(",", ":")).encode()
        assert list(event) == ["user_id", "event_type", "timestamp", "metadata"]
        assert list(event["metadata"]) == FIELDS[event["event_type"]]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", event["timestamp"])
    assert {event["event_type"] for event in events(feed)} == set(FIELDS)


def test_values_are_within_range(feed: list[Any]) -> None:
    products: dict[str, set[Any]] = {}
    for event in events(feed):
        metadata = event["metadata"]
        assert type(event["user_id"]) is int
        assert 1 <= event["user_id"] <= 1000
        for name, decimals in (("price", 2), ("session_length", 1), ("view_duration", 1)):
            if name in metadata:
                assert metadata[name] == round(metadata[name], decimals) >= 0
        if event["event_type"] == "bounce":
            assert metadata["session_length"] < 2
        if "product_id" in metadata:
            assert re.fullmatch(r"PROD-\d{4}", metadata["product_id"])
            products.setdefault(metadata["product_id"], set()).add(metadata["price"])
    assert all(len(prices) == 1 for prices in products.values())


def test_the_schema_accepts_every_event(schema: Any, feed: list[Any]) -> None:
    for event in events(feed):
        schema.validate(event)


VALID: dict[str, Any] = {
    "user_id": 123,
    "event_type": "bounce",
    "timestamp": "2024-01-15T10:30:00.123456",
    "metadata": {"page": "/home", "session_length": 0.4, "referrer": "google", "device": "mobile"},
}


@pytest.mark.parametrize(
    "event",
    [
        pytest.param({**VALID, "user_id": 0}, id="user-0"),
        pytest.param({**VALID, "user_id": 1001}, id="user-1001"),
        pytest.param({**VALID, "user_id": "123"}, id="user-as-text"),
        pytest.param({**VALID, "user_id": 1.5}, id="half-a-user"),
        pytest.param({**VALID, "timestamp": "2024-01-15T10:30:00"}, id="no-fraction"),
        pytest.param({**VALID, "timestamp": "2024-01-15T10:30:00.123456Z"}, id="offset"),
        pytest.param({**VALID, "extra": 1}, id="fifth-field"),
        pytest.param({name: VALID[name] for name in list(VALID)[:3]}, id="no-metadata"),
        pytest.param({**VALID, "metadata": {}}, id="empty-metadata"),
        pytest.param({**VALID, "metadata": {**VALID["metadata"], "session_length": 2}}, id="long-bounce"),
        pytest.param({**VALID, "metadata": {**VALID["metadata"], "device": "watch"}}, id="unknown-device"),
        pytest.param({**VALID, "metadata": {**VALID["metadata"], "extra": 1}}, id="extra-metadata"),
        pytest.param({**VALID, "event_type": "add_to_cart"}, id="metadata-of-another-type"),
        pytest.param({**VALID, "event_type": "purchase", "metadata": {}}, id="own-type-without-metadata"),
        pytest.param([VALID], id="list"),
    ],
)
def test_the_schema_rejects(schema: Any, event: Any) -> None:
    assert schema.is_valid(VALID)
    assert schema.is_valid({**VALID, "event_type": "purchase", "metadata": {"total": 1}})
    assert not schema.is_valid(event)


@pytest.mark.parametrize(("seeds", "same"), [(("7", "7"), True), (("7", "8"), False)], ids=["same", "other"])
def test_seed(run_script: RunScript, tansu: Tansu, topic: str, seeds: tuple[str, str], same: bool) -> None:
    topics = [f"{topic}-{number}" for number in range(2)]
    for name, seed in zip(topics, seeds, strict=True):
        create_topic(tansu.direct, name)
        settings = {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": name, "SEED": seed}
        script = run_script(PRODUCER, INTERVAL_SECONDS=0, MAX_EVENTS=100, **settings)
        assert script.wait() == 0, script.tail()
    one, other = (
        [(event["user_id"], event["event_type"], event["metadata"]) for event in events(read_all(tansu.direct, name))]
        for name in topics
    )
    assert len(one) == len(other) == 100
    assert (one == other) is same


def test_two_shards_share_all_users(run_script: RunScript, tansu: Tansu, topic: str) -> None:
    """Into one topic: each user's events come from one shard, all users are there, and the shards draw apart."""
    create_topic(tansu.direct, topic)
    settings = {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0, "MAX_EVENTS": 6000}
    scripts = [run_script(PRODUCER, SHARD_INDEX=index, SHARD_COUNT=2, SEED="s", **settings) for index in range(2)]
    for script in scripts:
        assert script.wait() == 0, script.tail()
    users: dict[str, set[int]] = {}
    types: dict[str, list[str]] = {}
    for record in read_all(tansu.direct, topic):
        run = (event_id(record) or ("", 0))[0]
        event = json.loads(record.value)
        users.setdefault(run, set()).add(event["user_id"])
        types.setdefault(run, []).append(event["event_type"])
    assert sorted(users.values(), key=min) == [set(range(1, 1001, 2)), set(range(2, 1001, 2))]
    one, other = types.values()
    assert one != other, "both shards draw the same stream"


# ------------------------------------------------------------------------------------------- at the default pace


def test_three_events_three_seconds_apart(run_script: RunScript, tansu: Tansu, topic: str) -> None:
    """With nothing set but where to send: the timestamps, and every line of the console."""
    create_topic(tansu.direct, topic)
    script = run_script(PRODUCER, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, MAX_EVENTS=3)
    assert script.wait() == 0, script.tail()
    assert script.stdout == ""
    records = read_all(tansu.direct, topic)
    times = [instant(event) for event in events(records)]
    for number, moment in enumerate(times):
        assert abs((moment - times[0]).total_seconds() - 3 * number) < 0.5

    lines = messages(script)
    assert {level for level, _ in lines} == {"INFO"}
    texts = [text for _, text in lines]
    sent = [match.groups() for text in texts if (match := EVENT_LINE.fullmatch(text))]
    assert sent == [
        (str(e["user_id"]), e["event_type"], json.dumps(e["metadata"], separators=(",", ":")), "0")
        for e in events(records)
    ]
    totals = [text for text in texts if text.startswith("Total")]
    counts = [int(text.rpartition(" ")[2]) for text in totals]  # every 3 s at most: one may fall between two events
    assert counts == sorted(set(counts))
    assert counts[-1] == 3
    assert re.fullmatch(
        r"Stopped: sent 3, failed 0, unconfirmed 0, sent again 0, skipped 0 in \d+\.\d s, .*p50 .*p99 .*"
        rf"run {(event_id(records[0]) or [''])[0]}",
        texts[-1],
    )
    assert len(texts) == len(sent) + len(totals) + 2, "and one line that says what is sent where"


@pytest.mark.parametrize(
    ("interval", "level", "shown"),
    [
        pytest.param(0.1, "INFO", {"INFO"}, id="slow-enough"),
        pytest.param(0.05, "INFO", set(), id="too-fast"),
        pytest.param(0.05, "DEBUG", {"DEBUG"}, id="too-fast-but-asked-for"),
        pytest.param(0.1, "WARNING", set(), id="quiet"),
    ],
)
def test_level_of_event_lines(
    run_script: RunScript, tansu: Tansu, topic: str, interval: float, level: str, shown: set[str]
) -> None:
    script = run_script(
        PRODUCER,
        KAFKA_BROKER=tansu.bootstrap,
        KAFKA_TOPIC=topic,
        INTERVAL_SECONDS=interval,
        MAX_EVENTS=3,
        LOG_LEVEL=level,
    )
    assert script.wait() == 0
    lines = messages(script) if level != "DEBUG" else [m.groups() for m in map(LINE.fullmatch, script.lines) if m]
    assert {level for level, text in lines if EVENT_LINE.fullmatch(text)} == shown
    if level == "WARNING":
        assert lines == []
    elif level == "INFO":
        assert sum(text.startswith("Total events sent: 3") for _, text in lines) == 1
        assert all(re.match("Event|Total|Sending|Stopped", text) for _, text in lines), "lines of the client's"
    else:
        assert any("kafka" in text.lower() for _, text in lines), "no lines of the client's"


def test_log_in_json(run_script: RunScript, tansu: Tansu, topic: str) -> None:
    script = run_script(
        PRODUCER,
        KAFKA_BROKER=tansu.bootstrap,
        KAFKA_TOPIC=topic,
        INTERVAL_SECONDS=0.2,
        MAX_EVENTS=3,
        LOG_FORMAT="json",
    )
    assert script.wait() == 0
    lines = [json.loads(line) for line in script.stderr_lines]
    assert all(list(line)[:3] == ["time", "level", "message"] for line in lines)
    records = sorted(read_all(tansu.direct, topic), key=lambda record: event_id(record) or ("", 0))
    assert [
        {name: value for name, value in line.items() if name not in ("time", "level", "message")}
        for line in lines
        if line["message"].startswith("Event sent")
    ] == [
        {
            **{name: event[name] for name in ("user_id", "event_type", "metadata")},
            "partition": record.partition,
            "offset": record.offset,
            "event_id": ":".join(map(str, event_id(record) or ())),
        }
        for record, event in zip(records, events(records), strict=True)
    ]
    numbers = {"sent": 3, "failed": 0, "unconfirmed": 0, "sent_again": 0, "skipped": 0}
    assert numbers.items() <= lines[-1].items()
    assert lines[-1]["message"].startswith("Stopped: ")


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        pytest.param({"MAX_EVENTS": 4, "INTERVAL_SECONDS": 0.1}, 4, id="count"),
        pytest.param({"DURATION_SECONDS": 0.9, "INTERVAL_SECONDS": 0.25}, 4, id="duration"),
        pytest.param({"DURATION_SECONDS": 60, "MAX_EVENTS": 2, "INTERVAL_SECONDS": 0.1}, 2, id="count-comes-first"),
        pytest.param({"DURATION_SECONDS": 0.1, "MAX_EVENTS": 9, "INTERVAL_SECONDS": 60}, 1, id="duration-comes-first"),
        pytest.param({"MAX_EVENTS": 2500, "INTERVAL_SECONDS": 0}, 2500, id="count-at-full-speed"),
    ],
)
def test_limits(run_script: RunScript, tansu: Tansu, topic: str, settings: dict[str, Any], slots: int) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, **settings)
    assert script.wait() == 0, script.tail()
    numbers = summary(script)
    assert numbers["sent"] + numbers["skipped"] * ("DURATION_SECONDS" in settings) == slots
    assert len(read_all(tansu.direct, topic)) == numbers["sent"]


def test_duration_at_full_speed(run_script: RunScript, tansu: Tansu, topic: str) -> None:
    script = run_script(
        PRODUCER, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0, DURATION_SECONDS=0.3
    )
    assert script.wait() == 0, script.tail()
    stopped(script, sent=len(read_all(tansu.direct, topic)))


# ---------------------------------------------------------------------------------------------------- Kafka away


def test_kafka_comes_late_and_goes_away_in_between(run_script: RunScript, make_apache: MakeApache, topic: str) -> None:
    """Started some seconds before Kafka; then Kafka is stopped until the script has missed it for 5 s."""
    kafka = make_apache()
    script = run_script(PRODUCER, KAFKA_BROKER=kafka.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.2)
    said = script.wait_for("WARNING - Kafka is not there yet: .*nothing listens")
    assert "docker compose up -d kafka" in said.string
    assert "KAFKA_BROKER=embedded" in said.string
    kafka.start()
    ready = datetime.now(UTC)
    script.wait_for("Event sent")
    assert len([line for line in script.lines if "not there yet" in line]) < 8, "ever more rarely"

    kafka.stop()
    script.wait_for("WARNING - Kafka has confirmed nothing for 5 s")
    seen = len(script.lines)
    assert not any("Event sent" in line for line in script.lines[seen:])
    kafka.start_node()
    script.wait_for("confirms again", after=seen)
    script.signal()
    assert script.wait() == 0, script.tail()
    records = read_all(kafka.direct, topic)
    end = summary(script)
    stopped(script, sent=len(records), **{name: end[name] for name in ("skipped", "sent again")})
    assert audit(records, 1).clean
    assert instant(events(records)[0]) - ready < timedelta(seconds=3)


@pytest.mark.parametrize("script_name", [PRODUCER, SAMPLES])
def test_connect_timeout(run_script: RunScript, script_name: str) -> None:
    script = run_script(script_name, KAFKA_BROKER=nothing_there(), CONNECT_TIMEOUT_SECONDS=0.5)
    assert script.wait() == 1
    assert re.search("ERROR - Kafka not reached in 0.5 s: nothing listens at", script.stderr)
    if script_name == SAMPLES:
        assert script.stdout_lines == ["0 of 10 events confirmed"]
    else:
        stopped(script)


def test_connect_timeout_on_a_port_that_is_silent(run_script: RunScript) -> None:
    with silent_port() as (address, _):
        script = run_script(PRODUCER, KAFKA_BROKER=address, CONNECT_TIMEOUT_SECONDS=1)
        assert script.wait() == 1
    assert re.search("ERROR - Kafka not reached in 1 s: .* has not answered yet", script.stderr)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """A broker that makes no topics of its own accord."""
    require_apache()
    with ApacheKafka(tmp_path_factory.mktemp("strict"), properties={"auto.create.topics.enable": "false"}) as kafka:
        yield kafka


def test_topic_missing_then_created(run_script: RunScript, strict: ApacheKafka, topic: str) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=strict.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.1, MAX_EVENTS=3)
    script.wait_for(f"WARNING - Topic {topic} does not exist.*kafka-topics.sh .*--create --topic {topic}")
    create_topic(strict.direct, topic, 3)
    assert script.wait() == 0, script.tail()
    stopped(script, sent=3)
    assert audit(read_all(strict.direct, topic), 3).clean


def test_topic_missing_and_no_patience(run_script: RunScript, strict: ApacheKafka, topic: str) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=strict.bootstrap, KAFKA_TOPIC=topic, CONNECT_TIMEOUT_SECONDS=1)
    assert script.wait() == 1
    assert re.search(rf"ERROR - .*\b{topic}\b", script.stderr)
    stopped(script)


# ------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("refused", [True, False], ids=["port-closed", "port-silent"])
def test_signal_while_connecting(run_script: RunScript, number: int, refused: bool) -> None:
    """Nothing was made, so all is well."""
    with silent_port() as (address, visited):
        script = run_script(PRODUCER, KAFKA_BROKER=nothing_there() if refused else address)
        if refused:
            script.wait_for("not there yet")
        else:
            wait_until(visited, 30, "the script connects")
        script.signal(number)
        assert script.wait(10) == 0
    stopped(script)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_while_waiting_for_the_topic(
    run_script: RunScript, strict: ApacheKafka, topic: str, number: int
) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=strict.bootstrap, KAFKA_TOPIC=topic)
    script.wait_for("does not exist")
    script.signal(number)
    assert script.wait(10) == 0
    stopped(script)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_between_two_events(run_script: RunScript, tansu: Tansu, topic: str, number: int) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=3600)
    script.wait_for("Event sent")
    script.signal(number)
    assert script.wait(10) == 0
    stopped(script, sent=1)
    assert len(read_all(tansu.direct, topic)) == 1


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_at_full_speed(run_script: RunScript, tansu: Tansu, topic: str, number: int) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0)
    script.wait_for("Total events sent: [1-9]")
    script.signal(number)
    assert script.wait(10) == 0, script.tail()
    records = read_all(tansu.direct, topic)
    assert audit(records).clean
    stopped(script, sent=len(records))


def test_signals_while_kafka_is_gone(run_script: RunScript, topic: str) -> None:
    """The first signal waits some seconds for what is on its way, here in vain; a second Ctrl+C does not wait.

    Three scripts in one test, since each has to miss Kafka for 5 s first.
    """
    ways = ("SIGINT", "SIGTERM", "SIGINT twice")
    with Tansu() as broker:
        scripts = {
            way: run_script(PRODUCER, KAFKA_BROKER=broker.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.5)
            for way in ways
        }
        for script in scripts.values():
            script.wait_for("Event sent")
    for script in scripts.values():
        script.wait_for("Kafka has confirmed nothing for 5 s: nothing listens at")
    impatient = scripts.pop("SIGINT twice")

    def once_more() -> bool:
        impatient.signal(signal.SIGINT)
        return impatient.process.poll() is not None

    wait_until(once_more, 5, "the script ends", 0.2)
    assert impatient.wait() == 130
    for way, script in scripts.items():
        script.signal(signal.Signals[way])
    for script in scripts.values():
        assert script.wait(10) == 1, script.tail()
        numbers = summary(script)
        assert numbers["unconfirmed"] > 0
        assert re.search(rf"unconfirmed {numbers['unconfirmed']} \(sequences {numbers['sent'] + 1}\b", script.stderr)


def run_into_pipe(command: str, **settings: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=clean_environment(PYTHON=sys.executable, ROOT=ROOT, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "first"),
    [
        pytest.param(f"$PYTHON $ROOT/{PRODUCER} 2>&1 | head -n 1", LINE.pattern, id="producer"),
        pytest.param(f"$PYTHON $ROOT/{SAMPLES} | head -n 1", "partition .*", id="samples"),
        pytest.param(f"$PYTHON $ROOT/{PRODUCER} --schema | head -n 1", r"\{", id="schema"),
    ],
)
def test_the_reader_of_the_output_goes_away(tansu: Tansu, topic: str, command: str, first: str) -> None:
    ended = run_into_pipe(command, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.1)
    assert re.fullmatch(first, ended.stdout.rstrip("\n"))
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


# ------------------------------------------------------------------------------------------------- configuration

WRONG = {
    "KAFKA_BROKER": "localhost:",
    "KAFKA_TOPIC": "user events",
    "INTERVAL_SECONDS": "-1",
    "MAX_EVENTS": "0",
    "DURATION_SECONDS": "nan",
    "CONNECT_TIMEOUT_SECONDS": "soon",
    "SHARD_COUNT": "0",
    "SHARD_INDEX": "-1",
    "KAFKA_COMPRESSION": "zip",
    "KAFKA_SECURITY_PROTOCOL": "FOO",
    "KAFKA_SASL_MECHANISM": "GSSAPI",
    "KAFKA_SSL_CAFILE": "/nowhere/ca.pem",
    "METRICS_PORT": "70000",
    "LOG_LEVEL": "LOUD",
    "LOG_FORMAT": "xml",
}


@pytest.mark.parametrize("script_name", [PRODUCER, SAMPLES])
def test_all_problems_are_told_at_once(run_script: RunScript, script_name: str) -> None:
    script = run_script(script_name, **WRONG)
    assert script.wait() == 2
    assert script.stdout == ""
    assert sorted(line.partition(":")[0] for line in script.stderr_lines) == sorted(WRONG)
    for line in script.stderr_lines:
        name = line.partition(":")[0]
        assert f"'{WRONG[name]}'" in line, "what was given"
        assert re.search(r"; allowed: .+", line), "what is allowed"


def test_nothing_is_sent_with_a_bad_configuration(run_script: RunScript) -> None:
    with silent_port() as (address, visited):
        script = run_script(PRODUCER, KAFKA_BROKER=address, INTERVAL_SECONDS="often")
        assert script.wait() == 2
        assert not visited()


def rows(name: str, *values: str) -> list[Any]:
    return [pytest.param({name: value}, name, id=f"{name}={value}") for value in values]


LOGIN = {"KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USERNAME": "me", "KAFKA_SASL_PASSWORD": "hunter2"}


@pytest.mark.parametrize(
    ("environment", "culprit"),
    [
        *rows(
            "KAFKA_BROKER",
            "host:",
            ":9092",
            "host:0",
            "host:65536",
            "host:port",
            "a:1,b:",
            "a:1,",
            "http://a:1",
            "[::1]:",
        ),
        *rows("KAFKA_TOPIC", "a b", "..", ".", "t" * 250, "käse", "a/b"),
        *rows("INTERVAL_SECONDS", "-0.1", "nan", "inf", "3s", "1,5"),
        *rows("MAX_EVENTS", "0", "-3", "1.5", "many"),
        *rows("DURATION_SECONDS", "0", "-1", "inf", "1h"),
        *rows("CONNECT_TIMEOUT_SECONDS", "0", "-1", "nan"),
        *rows("SHARD_COUNT", "0", "1001", "two"),
        *rows("SHARD_INDEX", "-1", "1", "x"),
        *rows("KAFKA_COMPRESSION", "zip", "gz"),
        *rows("KAFKA_SECURITY_PROTOCOL", "TLS", "FOO"),
        *rows("KAFKA_SSL_CAFILE", "/nowhere", str(ROOT)),
        *rows("METRICS_PORT", "0", "65536", "http"),
        *rows("LOG_LEVEL", "LOUD", "5"),
        *rows("LOG_FORMAT", "xml"),
        pytest.param({"SHARD_INDEX": "3", "SHARD_COUNT": "3"}, "SHARD_INDEX", id="index-not-below-count"),
        pytest.param({**LOGIN}, "KAFKA_SASL_PASSWORD", id="login-without-sasl"),
        pytest.param(
            {**LOGIN, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_PASSWORD": ""},
            "KAFKA_SASL_PASSWORD",
            id="no-password",
        ),
        pytest.param(
            {**LOGIN, "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_MECHANISM": "FOO"},
            "KAFKA_SASL_MECHANISM",
            id="unknown-mechanism",
        ),
    ],
)
def test_a_bad_value(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], culprit: str) -> None:
    for name in filter(SETTINGS.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadConfiguration, match=rf"(?m)^{culprit}: .*; allowed: .+") as caught:
        Settings.load()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "field", "value"),
    [
        pytest.param({}, "kafka_broker", "localhost:9092", id="default-broker"),
        pytest.param({}, "kafka_topic", "user-events", id="default-topic"),
        pytest.param({}, "interval_seconds", 3, id="default-interval"),
        pytest.param({"INTERVAL_SECONDS": "0.01"}, "interval_seconds", 0.01, id="fraction"),
        pytest.param({"INTERVAL_SECONDS": "0"}, "interval_seconds", 0, id="full-speed"),
        pytest.param({"MAX_EVENTS": ""}, "max_events", None, id="empty-is-unset"),
        pytest.param({"KAFKA_BROKER": "a:1, b:2"}, "bootstrap_servers", ["a:1", "b:2"], id="several-brokers"),
        pytest.param({"KAFKA_BROKER": "[::1]:9093"}, "bootstrap_servers", ["[::1]:9093"], id="ipv6"),
        pytest.param({"KAFKA_BROKER": "[::1]"}, "bootstrap_servers", ["[::1]:9092"], id="ipv6-without-port"),
        pytest.param({"KAFKA_BROKER": "localhost"}, "bootstrap_servers", ["localhost:9092"], id="host-alone"),
        pytest.param({"KAFKA_BROKER": "a, b:2"}, "bootstrap_servers", ["a:9092", "b:2"], id="hosts-alone"),
        pytest.param({"KAFKA_PORT": "tcp://10.0.0.1:9092"}, "kafka_topic", "user-events", id="foreign-variable"),
        pytest.param({"log_level": "debug"}, "log_level", "DEBUG", id="any-case"),
        pytest.param({"KAFKA_COMPRESSION": "ZSTD"}, "kafka_compression", "zstd", id="any-case-of-values"),
    ],
)
def test_a_good_value(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], field: str, value: Any) -> None:
    for name in filter(SETTINGS.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert getattr(Settings.load(), field) == value


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The scripts in a folder of their own."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in (PRODUCER, SAMPLES):
        shutil.copy(ROOT / name, folder)
    return folder


def test_dotenv_beside_the_script(run_script: RunScript, copy: Path, tansu: Tansu, topic: str) -> None:
    """Read from anywhere; the environment goes before it; what it does not know it leaves alone."""
    (copy / ".env").write_text(
        f"# ours\nKAFKA_BROKER={tansu.bootstrap}\nKAFKA_TOPIC='{topic}'\nMAX_EVENTS=1\nINTERVAL_SECONDS=0\nOTHER=1\n"
    )
    script = run_script(str(copy / PRODUCER), MAX_EVENTS=2)
    assert script.wait() == 0, script.tail()
    assert len(read_all(tansu.direct, topic)) == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"MAX_EVENTS=none\n", "MAX_EVENTS: 'none'; allowed: ", id="bad-value"),
        pytest.param(b"KAFKA_TOPIC=caf\xe9\n", "settings cannot be read", id="not-utf-8"),
    ],
)
def test_bad_dotenv(run_script: RunScript, copy: Path, content: bytes, told: str) -> None:
    (copy / ".env").write_bytes(content)
    script = run_script(str(copy / PRODUCER))
    assert script.wait() == 2
    assert told in script.stderr


@pytest.mark.parametrize("script_name", [PRODUCER, SAMPLES])
@pytest.mark.parametrize("argument", ["--topic=x", "user-events", "--schemata"])
def test_unknown_argument(run_script: RunScript, script_name: str, argument: str) -> None:
    script = run_script(script_name, argument)
    assert script.wait() == 2
    assert script.stdout == ""
    assert len(script.stderr_lines) == 1
    assert repr(argument) in script.stderr
    assert "--help" in script.stderr


@pytest.mark.parametrize("script_name", [PRODUCER, SAMPLES])
def test_help_and_version(run_script: RunScript, script_name: str) -> None:
    """Whatever the environment says."""
    script = run_script(script_name, "--help", **WRONG)
    assert script.wait() == 0
    assert script.stdout.startswith(f"Usage: python {script_name} ")
    assert script.stderr == ""
    for name in WRONG:
        assert re.search(rf"^ *{name} ", script.stdout, re.MULTILINE)
    defaults = {"KAFKA_BROKER": "localhost:9092", "KAFKA_TOPIC": "user-events", "KAFKA_COMPRESSION": "none"}
    defaults |= {"INTERVAL_SECONDS": "3"} if script_name == PRODUCER else {"MAX_EVENTS": "10"}
    for name, value in defaults.items():
        assert re.search(rf"^ *{name} +{value} ", script.stdout, re.MULTILINE)
    script = run_script(script_name, "--version", **WRONG)
    assert script.wait() == 0
    assert re.fullmatch(rf"{script_name} \d+\.\d+\.\d+\n", script.stdout)


# --------------------------------------------------------------------------------------------- types of one's own

OWN_TYPE = """\
from random_event_producer import RandomEventProducer, main
class Shop(RandomEventProducer):
    def __init__(self, *args): super().__init__(*args); self.event_types.append("purchase")
    def _generate_metadata(self, name): return {metadata} if name == "purchase" else super()._generate_metadata(name)
raise SystemExit(main(Shop))
"""


def test_own_type_in_five_lines(run_script: RunScript, schema: Any, tmp_path: Path, tansu: Tansu, topic: str) -> None:
    shop = tmp_path / "shop.py"
    shop.write_text(OWN_TYPE.replace("{metadata}", '{"total": self.random.randint(1, 9)}'))
    script = run_script(
        str(shop),
        PYTHONPATH=ROOT,
        KAFKA_BROKER=tansu.bootstrap,
        KAFKA_TOPIC=topic,
        INTERVAL_SECONDS=0,
        MAX_EVENTS=200,
        SEED="own",
    )
    assert script.wait() == 0, script.tail()
    made = events(read_all(tansu.direct, topic))
    assert {event["event_type"] for event in made} == {*FIELDS, "purchase"}
    for event in made:
        schema.validate(event)
        if event["event_type"] == "purchase":
            assert 1 <= event["metadata"]["total"] <= 9


def test_larger_than_the_client_takes(run_script: RunScript, tmp_path: Path, tansu: Tansu, topic: str) -> None:
    """The client refuses it itself (max_request_size); it counts as failed and the others get through."""
    shop = tmp_path / "shop.py"
    shop.write_text(OWN_TYPE.replace("{metadata}", '{"text": "x" * 1_100_000}'))
    settings = {"PYTHONPATH": ROOT, "KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "SEED": "large"}
    script = run_script(str(shop), INTERVAL_SECONDS=0, MAX_EVENTS=40, **settings)
    assert script.wait() == 1, script.tail()
    sent = len(read_all(tansu.direct, topic))
    assert 0 < sent < 40
    assert re.search(rf"Stopped: sent {sent}, failed {40 - sent}, unconfirmed 0, sent again 0,", script.tail())
    assert re.search("Kafka refuses event .*: MessageSizeTooLargeError, .*It counts as failed", script.stderr)


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param("super()._generate_metadata(name)", id="no-branch"),
        pytest.param("None", id="none"),
        pytest.param("{}", id="empty"),
        pytest.param('{"what": object()}', id="no-json"),
        pytest.param("1 / 0", id="raises"),
    ],
)
def test_a_type_without_metadata(run_script: RunScript, tmp_path: Path, metadata: str) -> None:
    shop = tmp_path / "shop.py"
    shop.write_text(OWN_TYPE.replace("{metadata}", metadata))
    with silent_port() as (address, visited):
        script = run_script(str(shop), PYTHONPATH=ROOT, KAFKA_BROKER=address)
        assert script.wait() == 2
        assert not visited()
    assert "'purchase'" in script.stderr
    assert len(script.stderr_lines) == 1


# ---------------------------------------------------------------------------------------------- the sample events


@pytest.mark.parametrize(("settings", "count"), [({}, 10), ({"MAX_EVENTS": 3}, 3)], ids=["default", "three"])
def test_samples(run_script: RunScript, broker: Broker, topic: str, settings: dict[str, Any], count: int) -> None:
    create_topic(broker.direct, topic, 3)
    script = run_script(SAMPLES, KAFKA_BROKER=broker.bootstrap, KAFKA_TOPIC=topic, **settings)
    assert script.wait() == 0, script.tail()
    assert script.stdout_lines[-1] == f"{count} of {count} events confirmed"
    records = read_all(broker.direct, topic)
    assert {event["event_type"] for event in events(records)} == set(FIELDS)
    assert audit(records, 3).clean
    told = {
        f"partition {record.partition}, offset {record.offset}, key {record.key.decode()}: {record.value.decode()}"
        for record in records
    }
    assert len(told) == count
    assert set(script.stdout_lines[:-1]) == told


def test_samples_fewer_than_types(run_script: RunScript, tansu: Tansu) -> None:
    script = run_script(SAMPLES, KAFKA_BROKER=tansu.bootstrap, MAX_EVENTS=2)
    assert script.wait() == 2
    assert script.stderr.startswith("MAX_EVENTS: 2")


def test_samples_interrupted(run_script: RunScript) -> None:
    script = run_script(SAMPLES, KAFKA_BROKER=nothing_there())
    script.wait_for("not there yet")
    script.signal()
    assert script.wait(10) == 1
    assert script.stdout_lines == ["0 of 10 events confirmed"]


# ------------------------------------------------------------------------------------------- the embedded broker


@pytest.mark.usefixtures("own_port")
def test_embedded_end_to_end(run_script: RunScript) -> None:
    """The samples in a second terminal find it under their defaults; Ctrl+C ends script and broker."""
    script = run_script(PRODUCER, KAFKA_BROKER="embedded", INTERVAL_SECONDS=0.2)
    script.wait_for("Event sent")
    samples = run_script(SAMPLES)
    assert samples.wait() == 0, samples.tail()
    assert samples.stdout_lines[-1] == "10 of 10 events confirmed"
    records = read_all(EMBEDDED, "user-events")
    assert audit(records).clean
    assert len(audit(records).runs) == 2
    script.signal()
    assert script.wait(10) == 0, script.tail()
    assert summary(script)["unconfirmed"] == 0
    assert sum("trial" in line for line in script.lines) == 1
    assert not listens(EMBEDDED)


def test_embedded_port_taken(run_script: RunScript) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # then somebody else has it
            other.bind((HOST, 9092))
            other.listen()
        script = run_script(PRODUCER, KAFKA_BROKER="embedded")
        assert script.wait() == 2
    assert script.stdout == ""
    assert re.search(r"^KAFKA_BROKER\b.*\bembedded\b.*\b9092\b.*taken", script.stderr, re.MULTILINE)
    assert len(script.stderr_lines) == 1


def test_the_clock_of_events_is_the_wall_clock(run_script: RunScript, tansu: Tansu, topic: str) -> None:
    before = time.time()
    script = run_script(PRODUCER, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, MAX_EVENTS=1, TZ="Asia/Tokyo")
    assert script.wait() == 0
    (record,) = read_all(tansu.direct, topic)
    assert before - 1 <= instant(json.loads(record.value)).timestamp() <= time.time() + 1
