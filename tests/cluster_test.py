"""A cluster, or a topic, that is not the one it was: what is confirmed is there, and nothing waits for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from brokers import ApacheKafka, audit, create_topic, delete_topic, event_id, read_all, wait_until
from conftest import MakeApache, RunScript, Script
from faults_test import PACES, STOP_SECONDS, Lab, Summary, agree, judge
from kafka import KafkaProducer
from proxy import Proxy

BACK_SECONDS = 15.0  # from the cluster's return to the first confirmation
NO_CREATION = {"auto.create.topics.enable": "false"}


@pytest.fixture
def lab(make_apache: MakeApache, topic: str, run_script: RunScript) -> Iterator[Lab]:
    """A cluster of the test's own, with nobody's producer id handed out yet, and a proxy before PROXIED."""
    kafka = make_apache(properties=NO_CREATION, listeners={"PROXIED": "PLAINTEXT"})
    with Proxy(kafka.port("PROXIED")) as proxy:
        kafka.advertise(proxy.port, "PROXIED")
        kafka.start()
        made = Lab(kafka, proxy, topic, run_script)
        yield made
        for watch in made.watches:
            watch.close()


def numbers(records: list[Any]) -> set[int]:
    """The sequences that stand there."""
    return {identity[1] for record in records if (identity := event_id(record))}


@dataclass
class Confirmations:
    """What a producer with LOG_FORMAT=json has said is confirmed."""

    script: Script

    def after(self, line: int = 0) -> set[int]:
        events = (json.loads(text) for text in self.script.lines[line:] if '"event_id"' in text)
        return {int(event["event_id"].partition(":")[2]) for event in events}

    def wait(self, count: int, timeout: float, after: int = 0) -> None:
        try:
            wait_until(lambda: len(self.after(after)) >= count, timeout, f"{count} events confirmed")
        except TimeoutError as error:
            raise AssertionError(f"{error}, but {len(self.after(after))}:\n{self.script.tail()}") from None


def stop(script: Script) -> Summary:
    """Ends a run that has lost nothing."""
    script.signal()
    assert script.wait(STOP_SECONDS) == 0, script.tail()
    return Summary.of(script)


# --- new addresses ---


def moved(kafka: ApacheKafka, front: Proxy) -> float:
    """All brokers go, and come back at other addresses; the name in front leads to them. Returns when they are back."""
    nodes = range(len(kafka.direct.split(",")))
    for node in nodes:  # the last of three would wait for the others to be told that it goes
        kafka.stop(node) if len(nodes) == 1 else kafka.kill(node)
    for node in nodes:
        kafka.move(node)
        kafka.start_node(node, wait=False)
    front.target_port = kafka.port()
    for node in nodes:
        kafka.wait_ready(node)
    return time.monotonic()


@pytest.mark.parametrize("pace", PACES)
def test_all_brokers_come_back_under_new_addresses(pace: str, lab: Lab) -> None:
    """As Pods and containers do. KAFKA_BROKER is a name that stays: a Service, a load balancer."""
    create_topic(lab.kafka.direct, lab.topic, 2)
    with Proxy(lab.kafka.port()) as front:
        stable = f"127.0.0.1:{front.port}"
        script = lab.produce(pace, KAFKA_BROKER=stable)
        auditor = lab.consume(KAFKA_BROKER=stable, TIMEOUT_SECONDS=30)
        auditor.wait_for("Reading topic")
        lab.watch.wait_sent(25)
        returned = moved(lab.kafka, front)
        confirmed = lab.watch.sent
        lab.watch.wait_sent(confirmed + 1, BACK_SECONDS)
        assert time.monotonic() - returned < BACK_SECONDS
        lab.watch.wait_sent(confirmed + 100)
        summary = stop(script)
        assert (summary.failed, summary.unconfirmed) == (0, 0)
        verdict = judge(lab, summary, 2)
        assert (verdict.gaps, len(verdict.present)) == (set(), summary.sent)
        agree(auditor, verdict, summary.sent)


@pytest.mark.slow
def test_three_brokers_come_back_under_new_addresses(
    make_apache: MakeApache, run_script: RunScript, topic: str
) -> None:
    kafka = make_apache(nodes=3, properties=NO_CREATION)
    kafka.start()
    create_topic(kafka.direct, topic, 2, 3)
    with Proxy(kafka.port()) as front:
        lab = Lab(kafka, front, topic, run_script)
        script = lab.produce("50/s", KAFKA_BROKER=f"127.0.0.1:{front.port}")
        lab.watch.wait_sent(25)
        moved(kafka, front)
        lab.watch.wait_sent(lab.watch.sent + 50, BACK_SECONDS + 5)
        summary = stop(script)
        lab.watch.close()
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    assert judge(lab, summary, 2).gaps == set()


def test_the_auditor_follows_to_new_addresses(lab: Lab) -> None:
    """It has read everything when the brokers go; what comes after that it reads at the new addresses."""
    create_topic(lab.kafka.direct, lab.topic, 2)
    with Proxy(lab.kafka.port()) as front:
        settings = {"KAFKA_BROKER": lab.kafka.direct, "KAFKA_TOPIC": lab.topic, "INTERVAL_SECONDS": 0}
        assert lab.run_script("random_event_producer.py", **settings, MAX_EVENTS=50).wait() == 0
        auditor = lab.consume(KAFKA_BROKER=f"127.0.0.1:{front.port}", MAX_EVENTS=100, TIMEOUT_SECONDS="")
        auditor.wait_for("Reading topic")
        moved(lab.kafka, front)
        settings["KAFKA_BROKER"] = lab.kafka.direct
        assert lab.run_script("random_event_producer.py", **settings, MAX_EVENTS=50).wait() == 0
        assert auditor.wait(BACK_SECONDS) == 0, auditor.tail()
    report = json.loads(auditor.stdout)
    assert (report["events"], report["ok"]) == (100, True)


# --- another topic of the same name ---


def remade(lab: Lab, partitions: int) -> list[Any]:
    """Deletes the topic while nothing reaches it, and makes it again; returns what stood in the old one."""
    lab.proxy.hang()
    time.sleep(0.5)  # what the broker has taken already is written
    old = read_all(lab.kafka.direct, lab.topic)
    delete_topic(lab.kafka.direct, lab.topic)
    create_topic(lab.kafka.direct, lab.topic, partitions)
    lab.proxy.passthrough()
    return old


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 2)], ids=["4 to 2 partitions", "2 to 2"])
def test_the_topic_is_made_again(pace: str, before: int, after: int, lab: Lab) -> None:
    """What was queued for a partition that is gone goes where its key belongs now; the run ends where it should."""
    create_topic(lab.kafka.direct, lab.topic, before)
    made = {"50/s": 400, "full speed": 60_000}[pace]
    script = lab.produce(pace, "PROXIED", MAX_EVENTS=made)
    lab.watch.wait_sent(100)
    old = remade(lab, after)
    assert script.wait(40) == 0, script.tail()
    summary = Summary.of(script)
    assert (summary.sent, summary.failed, summary.unconfirmed) == (made, 0, 0)
    new = read_all(lab.kafka.direct, lab.topic)
    found = audit(new, after)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    assert numbers(old) | numbers(new) == set(range(1, made + 1))


def test_what_is_confirmed_after_the_topic_is_made_again_is_in_the_new_one(lab: Lab) -> None:
    create_topic(lab.kafka.direct, lab.topic, 2)
    script = lab.produce(0.1, LOG_FORMAT="json")
    confirmed = Confirmations(script)
    confirmed.wait(10, 10)
    for _ in range(2):
        delete_topic(lab.kafka.direct, lab.topic)
        before = len(script.lines)
        time.sleep(1)
        create_topic(lab.kafka.direct, lab.topic, 2)
        confirmed.wait(30, BACK_SECONDS, before)
    stop(script)
    found = audit(records := read_all(lab.kafka.direct, lab.topic), 2)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    # A confirmation may be on its way when the topic goes; those of a second later are not.
    assert confirmed.after(before + 5) <= numbers(records)


# --- another cluster at the same address ---


@pytest.mark.parametrize("foreign", [3, 60], ids=["as many batches", "many more batches"])
def test_a_wiped_cluster_hands_out_the_same_producer_id_again(foreign: int, lab: Lab) -> None:
    """Another producer has it now, and has used the sequences that ours comes to next: Kafka takes ours for repeats.

    A batch of ours is on its way when Kafka goes; it has the same number as one of the other's last five, by which
    Kafka tells a repeat. What Kafka wiped is gone; but what is called confirmed after that is in the log.
    """
    create_topic(lab.kafka.direct, lab.topic)
    script = lab.produce(0.5, "PROXIED", LOG_FORMAT="json")
    confirmed = Confirmations(script)
    confirmed.wait(4, 10)
    lab.proxy.hang()
    time.sleep(1.5)
    before, line = confirmed.after(), len(script.lines)
    lab.kafka.kill()
    lab.proxy.refuse()
    lab.kafka.wipe()
    lab.kafka.start()
    create_topic(lab.kafka.direct, lab.topic)
    write_as_somebody_else(lab, len(before) + foreign)
    lab.proxy.passthrough()
    confirmed.wait(10, 30, line)
    summary = stop(script)
    records = [record for record in read_all(lab.kafka.direct, lab.topic) if event_id(record)]
    there, told = numbers(records), confirmed.after(line)
    assert told - there == set(), "confirmed, but not in the log"
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    assert before | there >= set(range(1, summary.sent + 1))
    found = audit(records)
    assert (found.repeated, found.reordered) == (0, 0)


def write_as_somebody_else(lab: Lab, count: int) -> None:
    """So many batches of one record, from the first producer of the new cluster."""
    producer = KafkaProducer(bootstrap_servers=lab.kafka.direct, acks="all", enable_idempotence=True)
    try:
        for _ in range(count):
            producer.send(lab.topic, b"{}", b"1").get(10)
        identity = producer._transaction_manager.producer_id_and_epoch
        assert (identity.producer_id, identity.epoch) == (0, 0), (
            "the producer id of the other cluster is not used again"
        )
    finally:
        producer.close()


def test_a_wiped_cluster_at_full_speed(lab: Lab) -> None:
    """Nobody else writes: what was unconfirmed goes to the new cluster, from the first of it on, each once."""
    create_topic(lab.kafka.direct, lab.topic, 2)
    script = lab.produce("full speed")
    lab.watch.wait_sent(1000)
    lab.kafka.stop()
    time.sleep(1)  # what was confirmed before the stop may be counted a moment later
    confirmed = lab.watch.sent
    lab.kafka.wipe()
    lab.kafka.start()
    create_topic(lab.kafka.direct, lab.topic, 2)
    lab.watch.wait_sent(confirmed + 20_000, 30)
    summary = stop(script)
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    found = audit(read_all(lab.kafka.direct, lab.topic), 2)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    (run,) = found.runs.values()
    assert (run.last, len(run.missing)) == (summary.made, confirmed), "not just what the old cluster had confirmed"
