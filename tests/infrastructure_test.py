"""Do the parts the other tests stand on really do what they say?"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from brokers import (
    AUTHORIZER,
    ApacheKafka,
    Certificates,
    add_partitions,
    audit,
    brokers_known,
    create_topic,
    delete_topic,
    grant,
    partition_of,
    read_all,
    set_topic_config,
)
from conftest import Broker, MakeApache, Script, clean_environment, require_apache
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.partitioner import murmur2
from proxy import Proxy, _Frames

Proxied = tuple[ApacheKafka, Proxy]
PATIENT: dict[str, Any] = {
    "acks": "all",
    "enable_idempotence": True,
    "delivery_timeout_ms": float("inf"),
    "request_timeout_ms": 10_000,
    "reconnect_backoff_max_ms": 500,
}


def event(sequence: int, run: str = "a" * 16) -> dict[str, Any]:
    user = sequence % 7 + 1
    return {
        "key": str(user).encode(),
        "value": json.dumps({"user_id": user}).encode(),
        "headers": [("event_id", f"{run}:{sequence}".encode())],
    }


def send(bootstrap: str, topic: str, sequences: Iterable[int], **options: Any) -> None:
    """Until all are confirmed; raises what the client raises."""
    producer = KafkaProducer(bootstrap_servers=bootstrap.split(","), **{**PATIENT, **options})
    try:
        for future in [producer.send(topic, **event(sequence)) for sequence in sequences]:
            future.get(30)
    finally:
        producer.close(5)


def can_connect(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[Proxied]:
    """A broker with every kind of listener; the plain one is reached through the proxy."""
    require_apache()
    kafka = ApacheKafka(
        tmp_path_factory.mktemp("proxied"),
        users={"alice": "alice-secret", "bob": "bob-secret"},
        certificates=certificates,
        listeners={"SSL": "SSL", "MTLS": "SSL", "SASL": "SASL_PLAINTEXT", "SASL_SSL": "SASL_SSL"},
        properties={"authorizer.class.name": AUTHORIZER, "listener.name.mtls.ssl.client.auth": "required"},
    )
    with Proxy(kafka.port()) as proxy:
        kafka.advertise(proxy.port)
        with kafka:
            yield kafka, proxy


# --- the auditor ---


def record(sequence: int, user: int = 1, partition: int = 0, **changes: Any) -> Any:
    made = event(sequence)
    made.update(key=str(user).encode(), value=json.dumps({"user_id": user}).encode(), partition=partition)
    return SimpleNamespace(**{**made, **changes})


def test_auditor_finds_each_fault() -> None:
    repeat, late, foreign, nameless = record(2), record(3), record(9, key=b"8"), record(9, headers=[])
    found = audit([record(1), record(2), repeat, record(5), record(4, user=2), late, foreign, nameless])
    run = found.runs["a" * 16]
    assert (run.first, run.last, run.count, run.missing) == (1, 9, 7, {6, 7, 8})
    assert (found.repeated, found.reordered, found.misplaced, found.without_id, found.clean) == (1, 1, 1, 1, False)


def test_auditor_passes_what_is_right() -> None:
    events = [record(n, user, partition_of(b"%d" % user, 4)) for n, user in enumerate(range(1, 50), 1)]
    assert audit(events, partitions=4).clean
    assert audit([record(1, user=1, partition=partition_of(b"1", 4) ^ 1)], partitions=4).misplaced == 1


def test_partitions_are_the_clients() -> None:
    keys = [b"x" * length for length in range(1, 20)] + [b"%d" % user for user in range(1, 1001)]
    assert [partition_of(key, 12) for key in keys] == [(murmur2(key) & 0x7FFFFFFF) % 12 for key in keys]


# --- brokers ---


def test_what_is_sent_is_read_back(broker: Broker, topic: str) -> None:
    create_topic(broker.bootstrap, topic, partitions=4)
    assert read_all(broker.bootstrap, topic) == []
    send(broker.bootstrap, topic, range(1, 1001))
    found = audit(read_all(broker.bootstrap, topic), partitions=4)
    assert (found.events, found.clean) == (1000, True)


def test_topics_change(apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.bootstrap, topic, config={"max.message.bytes": "1000"})
    add_partitions(apache.bootstrap, topic, 3)
    set_topic_config(apache.bootstrap, topic, {"max.message.bytes": "2000"})
    send(apache.bootstrap, topic, range(1, 101))
    assert {record.partition for record in read_all(apache.bootstrap, topic)} > {0}
    delete_topic(apache.bootstrap, topic)
    create_topic(apache.bootstrap, topic)
    assert read_all(apache.bootstrap, topic) == []


def test_broker_dies_and_comes_back(proxied: Proxied, topic: str) -> None:
    kafka, _ = proxied
    send(kafka.bootstrap, topic, range(1, 101))
    kafka.kill()
    assert not can_connect(kafka.port())
    kafka.start_node()
    send(kafka.bootstrap, topic, range(101, 201))
    kafka.freeze()
    assert can_connect(kafka.port())
    assert brokers_known(kafka.port(), 0.5) == []
    kafka.thaw()
    found = audit(read_all(kafka.direct, topic), partitions=1)
    assert (found.events, found.clean) == (200, True)


def test_three_nodes_survive_one(make_apache: MakeApache, topic: str) -> None:
    kafka = make_apache(nodes=3)
    kafka.start()
    assert sorted(brokers_known(kafka.port(node=2))) == [1, 2, 3]
    create_topic(kafka.bootstrap, topic, partitions=3, replication=3)
    kafka.kill(1)
    send(kafka.bootstrap, topic, range(1, 101))
    assert audit(read_all(kafka.direct, topic), partitions=3).clean
    kafka.stop(2)
    assert not can_connect(kafka.port(node=2))


def test_start_that_fails_says_why(make_apache: MakeApache) -> None:
    kafka = make_apache(properties={"log.retention.bytes": "much"})
    with pytest.raises(RuntimeError, match="Invalid value much"):
        kafka.start()


# --- security ---


def sasl(mechanism: str, user: str, password: str) -> dict[str, str]:
    return {"sasl_mechanism": mechanism, "sasl_plain_username": user, "sasl_plain_password": password}


def test_listeners_with_login_tls_and_acls(proxied: Proxied, certificates: Certificates, topic: str) -> None:
    kafka, _ = proxied
    create_topic(kafka.direct, topic)
    for user in ("alice", "CN=client", "ANONYMOUS"):
        grant(kafka.direct, user, topic, "WRITE", "DESCRIBE")
    tls = {"ssl_cafile": str(certificates.ca)}
    own = {"ssl_certfile": str(certificates.client), "ssl_keyfile": str(certificates.client_key)}
    plain, scram = sasl("PLAIN", "alice", "alice-secret"), sasl("SCRAM-SHA-256", "alice", "alice-secret")
    scram_512 = sasl("SCRAM-SHA-512", "alice", "alice-secret")
    ways: list[tuple[str, str, dict[str, str]]] = [
        ("SSL", "SSL", tls),
        ("MTLS", "SSL", tls | own),
        ("SASL", "SASL_PLAINTEXT", plain),
        ("SASL", "SASL_PLAINTEXT", scram),
        ("SASL_SSL", "SASL_SSL", tls | scram_512),
    ]
    for number, (listener, protocol, options) in enumerate(ways, 1):
        send(kafka.address(listener), topic, [number], security_protocol=protocol, **options)
    assert len(read_all(kafka.direct, topic)) == len(ways)

    def refused(listener: str, protocol: str, options: dict[str, str], error: type[KafkaError], words: str) -> None:
        with pytest.raises(error, match=words):
            send(kafka.address(listener), topic, [9], security_protocol=protocol, bootstrap_timeout_ms=1500, **options)

    refused("SASL", "SASL_PLAINTEXT", sasl("PLAIN", "alice", "wrong"), KafkaTimeoutError, "bootstrap")
    refused("MTLS", "SSL", tls, KafkaTimeoutError, "bootstrap")
    refused("SASL", "SASL_PLAINTEXT", sasl("PLAIN", "bob", "bob-secret"), KafkaError, "Authorization")


# --- the proxy ---


def test_lost_responses_make_no_repeats_with_idempotence(proxied: Proxied, topic: str) -> None:
    kafka, proxy = proxied
    assert kafka.bootstrap == f"127.0.0.1:{proxy.port}"
    create_topic(kafka.direct, topic)
    proxy.drop_responses(0.2)
    before = proxy.dropped
    try:
        send(kafka.bootstrap, topic, range(1, 2001), linger_ms=1, batch_size=2000)
    finally:
        proxy.passthrough()
    assert proxy.dropped - before > 5
    found = audit(read_all(kafka.direct, topic), partitions=1)
    assert (found.events, found.clean) == (2000, True)


def test_proxy_refuses_closes_and_hangs(proxied: Proxied) -> None:
    _, proxy = proxied
    assert brokers_known(proxy.port) == [1]
    proxy.refuse()
    assert not can_connect(proxy.port)
    proxy.accept_and_close()
    assert can_connect(proxy.port)
    assert brokers_known(proxy.port, 0.5) == []
    proxy.hang()
    assert can_connect(proxy.port)
    assert brokers_known(proxy.port, 0.5) == []
    proxy.passthrough()
    assert brokers_known(proxy.port) == [1]


def test_proxy_delays_and_slows(proxied: Proxied) -> None:
    _, proxy = proxied
    seconds = {"none": timed(proxy.port)}
    proxy.delay(0.2)
    seconds["delay"] = timed(proxy.port)
    proxy.slow(100)
    seconds["slow"] = timed(proxy.port)
    proxy.passthrough()
    assert seconds["none"] < 0.2
    assert 0.4 <= seconds["delay"] < 0.8
    assert 0.3 <= seconds["slow"] < 3


def timed(port: int) -> float:
    start = time.monotonic()
    assert brokers_known(port) == [1]
    return time.monotonic() - start


def test_proxy_cuts(proxied: Proxied, topic: str) -> None:
    kafka, proxy = proxied
    before = proxy.connections
    proxy.cut_every(0.2)
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap, **PATIENT)
    try:
        for sequence in range(1, 21):
            producer.send(topic, **event(sequence)).get(20)
            time.sleep(0.05)
    finally:
        proxy.passthrough()
        producer.close(5)
    assert proxy.connections - before > 3
    assert audit(read_all(kafka.direct, topic)).clean


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_frames_begin_where_they_begin_however_they_come(size: int) -> None:
    stream = b"".join(len(body).to_bytes(4) + body for body in (b"a" * 5, b"", b"b" * 300, b"c"))
    frames = _Frames()
    found = [at + start for at in range(0, len(stream), size) for start in frames.starts(stream[at : at + size])]
    assert found == [0, 9, 13, 317]


# --- scripts ---


def script(tmp_path: Path, source: str) -> Script:
    (tmp_path / "script.py").write_text(source)
    return Script([sys.executable, "-u", "script.py"], clean_environment(), tmp_path)


def test_script_is_followed_and_stopped(tmp_path: Path) -> None:
    running = script(tmp_path, "import sys, time\nprint('out')\nprint('n: 5', file=sys.stderr)\ntime.sleep(60)")
    assert running.wait_for(r"n: (\d)")[1] == "5"
    running.wait_for("out")
    running.signal(signal.SIGTERM)
    assert running.wait() == -signal.SIGTERM
    assert (running.stdout_lines, running.stderr) == (["out"], "n: 5\n")
    with pytest.raises(AssertionError, match="the script ended without 'more'"):
        running.wait_for("more")


def test_traceback_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        script(tmp_path, "1 / 0").wait()


def test_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAFKA_BROKER", "kafka_topic", "SEED", "METRICS_PORT", "START"):
        monkeypatch.setenv(name, "foreign")
    assert "foreign" not in clean_environment(SEED=7).values()
    assert clean_environment(SEED=7)["SEED"] == "7"
