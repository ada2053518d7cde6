"""Refused records, lost logs and lost responses together: what is refused fails alone, and nothing is sent for nothing.

Judged by the independent reader of brokers.py, event by event.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from brokers import (
    AUTHORIZER,
    ApacheKafka,
    NoApacheKafkaError,
    OldKafka,
    apache_jars,
    audit,
    create_topic,
    grant,
    read_all,
    set_topic_config,
    wait_until,
)
from cluster_test import Confirmations, numbers
from conftest import ROOT, MakeApache, RunScript, Script, require_apache
from faults_test import PATIENCE, REFUSED, STOP_SECONDS, Lab, Summary
from proxy import Proxy

TOOL = "random_event_producer.py"
PASSWORD = "c0rrect-horse"
LARGE = {"max.message.bytes": "20000"}
# Every `every`th event is too large. Those made at the start, to see whether each type can be, do not count.
TOO_LARGE = """
import sys
sys.path.insert(0, {root!r})
import random_event_producer as tool

class Large(tool.RandomEventProducer):
    made = 0

    def check_event_types(self):
        super().check_event_types()
        self.made = 0

    def _generate_metadata(self, event_type):
        self.made += 1
        metadata = super()._generate_metadata(event_type)
        return metadata | {{"page": "/" + "x" * 30_000}} if self.made % {every} == 0 else metadata

raise SystemExit(tool.main(Large))
"""


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApacheKafka, Proxy]]:
    """With a user who must be granted what it may; whoever comes without a name may do everything."""
    require_apache()
    kafka = ApacheKafka(
        tmp_path_factory.mktemp("refusal"),
        properties={"auto.create.topics.enable": "false", "authorizer.class.name": AUTHORIZER},
        listeners={"PROXIED": "PLAINTEXT", "SASL": "SASL_PLAINTEXT"},
        users={"alice": PASSWORD},
    )
    with Proxy(kafka.port("PROXIED")) as proxy:
        kafka.advertise(proxy.port, "PROXIED")
        with kafka:
            yield kafka, proxy


@pytest.fixture
def lab(secured: tuple[ApacheKafka, Proxy], topic: str, run_script: RunScript) -> Iterator[Lab]:
    made = Lab(*secured, topic, run_script)
    yield made
    made.close()


def too_large(folder: Path, every: int) -> str:
    script = folder / f"every-{every}.py"
    script.write_text(TOO_LARGE.format(root=str(ROOT), every=every))
    return str(script)


def check_refused(lab: Lab, summary: Summary, refused: set[int]) -> None:
    """Just those, and all others are there, once each and in order."""
    found = audit(records := read_all(lab.kafka.direct, lab.topic), 2)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    assert numbers(records) == set(range(1, summary.made + 1)) - refused
    assert (summary.sent, summary.failed, summary.unconfirmed) == (len(records), len(refused), 0)


# --- refused among others ---


@pytest.mark.parametrize(("loss", "made"), [(0.0, 30_000), (0.15, 10_000)], ids=["", "responses lost"])
def test_refused_at_full_speed(lab: Lab, tmp_path: Path, loss: float, made: int) -> None:
    """Responses lost, batches sent again, and refusals among them: still just the bad ones are missing."""
    create_topic(lab.kafka.direct, lab.topic, 2, config=LARGE)
    lab.proxy.drop_responses(loss, seed=1)
    script = lab.produce("full speed", "PROXIED", too_large(tmp_path, 1000), MAX_EVENTS=made)
    assert script.wait(PATIENCE) == 1, script.tail()
    check_refused(lab, Summary.of(script), set(range(1000, made + 1, 1000)))
    assert re.search(REFUSED, script.stderr), script.tail()
    if loss:
        assert lab.proxy.dropped > 3, "hardly a response was lost"


def test_many_refused_cost_nothing(lab: Lab, tmp_path: Path) -> None:
    """A third of 150 events: no new client, a few seconds; what stands beside a refused one is handed over again."""
    create_topic(lab.kafka.direct, lab.topic, 2, config=LARGE)
    began = time.monotonic()
    script = lab.produce("full speed", script=too_large(tmp_path, 3), MAX_EVENTS=150)
    assert script.wait(PATIENCE) == 1, script.tail()
    summary = Summary.of(script)
    check_refused(lab, summary, set(range(3, 151, 3)))
    assert summary.sent_again > 0
    assert time.monotonic() - began < 8


def test_all_of_a_limited_run_refused(lab: Lab) -> None:
    """It ends by itself, each event counted once."""
    create_topic(lab.kafka.direct, lab.topic, 2, config={"max.message.bytes": "100"})
    script = lab.produce("full speed", MAX_EVENTS=3000)
    assert script.wait(PATIENCE) == 1, script.tail()
    summary = Summary.of(script)
    assert summary.sent == 0
    assert summary.failed + summary.unconfirmed == summary.made <= 3000
    assert summary.failed > 0
    assert read_all(lab.kafka.direct, lab.topic) == []


def test_write_and_describe_are_enough_after_a_refusal(lab: Lab, tmp_path: Path) -> None:
    """The log is not read back: no Read, and nothing of the cluster."""
    create_topic(lab.kafka.direct, lab.topic, 2, config=LARGE)
    grant(lab.kafka.direct, "alice", lab.topic, "WRITE", "DESCRIBE")
    login = {
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
        "KAFKA_SASL_USERNAME": "alice",
        "KAFKA_SASL_PASSWORD": PASSWORD,
    }
    script = lab.produce(0.02, "SASL", too_large(tmp_path, 20), MAX_EVENTS=100, **login)
    assert script.wait(PATIENCE) == 1, script.tail()
    check_refused(lab, Summary.of(script), {20, 40, 60, 80, 100})
    assert not re.search("not authorised|Authorization|[Gg]rant", script.stderr), script.tail()


def test_refused_at_the_second_try(lab: Lab) -> None:
    """A limit comes while the broker cannot be reached: what waits is refused then, or goes through."""
    create_topic(lab.kafka.direct, lab.topic, 2)
    script = lab.produce(0.1, "PROXIED", LOG_FORMAT="json")
    confirmed = Confirmations(script)
    confirmed.wait(10, 10)
    lab.proxy.refuse()
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "325"})  # the longest tenth is longer
    time.sleep(3)
    lab.proxy.passthrough()
    script.wait_for(REFUSED, 20)
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "1000000"})
    summary = judge_second_tries(lab, script, confirmed)
    assert summary.failed <= summary.made // 5


def test_refused_although_it_is_stored(lab: Lab) -> None:
    """A batch is in the log, its confirmation was lost, and at the second try the limit is too low for it.

    Its sequence belongs to it all the same: given to the next event, Kafka would take that for a repeat, confirm and
    drop it.
    """
    create_topic(lab.kafka.direct, lab.topic)
    script = lab.produce(0.5, "PROXIED", LOG_FORMAT="json")
    confirmed = Confirmations(script)
    confirmed.wait(3, 10)
    before = len(read_all(lab.kafka.direct, lab.topic))
    lab.proxy.drop_responses(1.0)
    wait_until(lambda: len(read_all(lab.kafka.direct, lab.topic)) > before, 10, "an event is stored", 0.2)
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "100"})
    lab.proxy.passthrough()
    script.wait_for(REFUSED, 20)
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "1000000"})
    judge_second_tries(lab, script, confirmed)


def judge_second_tries(lab: Lab, script: Script, confirmed: Confirmations) -> Summary:
    """What is called confirmed is there, once and in order; nobody can know whether what was refused at last is."""
    confirmed.wait(5, 20, len(script.lines))
    script.signal()
    assert script.wait(STOP_SECONDS) == 1, script.tail()
    summary = Summary.of(script)
    records = read_all(lab.kafka.direct, lab.topic)
    found, there = audit(records), numbers(records)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    assert confirmed.after() - there == set(), "confirmed, but not in the log"
    assert (summary.sent, summary.unconfirmed) == (len(confirmed.after()), 0)
    assert summary.made - len(there) <= summary.failed
    return summary


# --- a log that was lost ---


@pytest.mark.parametrize("interval", [0.1, 0.01])
def test_a_power_cut(make_apache: MakeApache, run_script: RunScript, topic: str, interval: float) -> None:
    """One broker, its page cache lost: what was confirmed may be gone, and only that. The run goes on by itself."""
    kafka = make_apache(properties={"auto.create.topics.enable": "false"})
    with Proxy(kafka.port()) as unused:
        kafka.start()
        create_topic(kafka.direct, topic, 2)
        lab = Lab(kafka, unused, topic, run_script)
        script = lab.produce(interval, LOG_FORMAT="json", LOG_LEVEL="DEBUG" if interval < 0.1 else "INFO")
        confirmed = Confirmations(script)
        confirmed.wait(40, 20)
        kafka.kill()
        time.sleep(0.5)  # what was confirmed is told
        before, line = confirmed.after(), len(script.lines)
        kafka.lose_tail(topic, 0.3)
        kafka.start_node()
        confirmed.wait(40, 20, line)
        script.signal()
        assert script.wait(STOP_SECONDS) == 0, script.tail()
        summary = Summary.of(script)
        lab.watch.close()
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    found = audit(records := read_all(kafka.direct, topic), 2)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    missing = set(range(1, summary.made + 1)) - numbers(records)
    assert missing, "nothing was cut off"
    assert missing <= before, "more is missing than what was confirmed and then cut off"
    assert summary.sent_again > 0


def test_a_power_cut_at_full_speed(make_apache: MakeApache, run_script: RunScript, topic: str) -> None:
    kafka = make_apache(properties={"auto.create.topics.enable": "false"})
    with Proxy(kafka.port()) as unused:
        kafka.start()
        create_topic(kafka.direct, topic, 2)
        lab = Lab(kafka, unused, topic, run_script)
        script = lab.produce("full speed")
        lab.watch.wait_sent(30_000)
        kafka.kill()
        time.sleep(1)
        confirmed = lab.watch.sent
        kafka.lose_tail(topic, 0.3)
        kafka.start_node()
        lab.watch.wait_sent(confirmed + 20_000)
        script.signal()
        assert script.wait(STOP_SECONDS) == 0, script.tail()
        summary = Summary.of(script)
        lab.watch.close()
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    found = audit(read_all(kafka.direct, topic), 2)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    (run,) = found.runs.values()
    assert run.last == summary.made
    assert 0 < len(run.missing) <= confirmed
    assert summary.sent_again > 0


# --- an older Kafka ---


def old_kafka(folder: Path, version: str) -> OldKafka:
    require_apache()
    try:
        apache_jars((f"org.apache.kafka:kafka_2.13:{version}", "org.slf4j:slf4j-log4j12:1.7.30"))
    except NoApacheKafkaError as error:
        pytest.skip(str(error))
    return OldKafka(folder / "kafka", version, {"alice": PASSWORD})


def as_alice(kafka: OldKafka, topic: str, **more: object) -> dict[str, object]:
    login = {
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "alice",
        "KAFKA_SASL_PASSWORD": PASSWORD,
    }
    return {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, **login, **more}


@pytest.mark.slow
def test_refused_by_kafka_2_8(tmp_path: Path, run_script: RunScript, topic: str) -> None:
    with old_kafka(tmp_path, "2.8.2") as kafka:
        create_topic(kafka.direct, topic, 2, config=LARGE)
        grant(kafka.direct, "alice", topic, "WRITE", "DESCRIBE")
        settings = as_alice(kafka, topic, INTERVAL_SECONDS=0, MAX_EVENTS=5000)
        script = run_script(too_large(tmp_path, 1000), **settings)
        assert script.wait(PATIENCE) == 1, script.tail()
        summary = Summary.of(script)
        records = read_all(kafka.direct, topic)
    found = audit(records, 2)
    assert (found.repeated, found.reordered, found.misplaced) == (0, 0, 0)
    assert numbers(records) == set(range(1, 5001)) - set(range(1000, 5001, 1000))
    assert (summary.sent, summary.failed) == (4995, 5)


@pytest.mark.slow
def test_the_right_that_kafka_2_7_asks_for(tmp_path: Path, run_script: RunScript, topic: str) -> None:
    """Before 2.8 an idempotent producer needs IdempotentWrite on the cluster; Write on the topic it has."""
    with old_kafka(tmp_path, "2.7.2") as kafka:
        create_topic(kafka.direct, topic)
        grant(kafka.direct, "alice", topic, "WRITE", "DESCRIBE")
        script = run_script(TOOL, **as_alice(kafka, topic, MAX_EVENTS=3))
        assert script.wait(PATIENCE) == 1, script.tail()
    script.wait_for("(WARNING|ERROR) - .*IdempotentWrite")
