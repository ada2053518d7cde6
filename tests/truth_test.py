"""What is said is so: what counts as sent is there, what counts as sent again was, and OK means that something is."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from auditor_test import OTHER, cart, document, of_run, outcome, record, records, topic_with, write
from brokers import ApacheKafka, create_topic, event_id, leader, led_by, partition_of, read_all, wait_until
from cluster_test import NO_CREATION, Confirmations, numbers, stop
from conftest import ROOT, MakeApache, RunScript, Script, clean_environment
from faults_test import Lab, Summary, sequences
from proxy import PRODUCE, Proxy

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

TOOL = "random_event_producer.py"
AUDITOR = "test_random_consumer.py"
PATIENCE = 30.0

# ----------------------------------------------------------------------------------- another cluster, and back again


@dataclass
class Clusters:
    """Two that know nothing of each other behind one address, as in a trial of a disaster recovery; each hands out
    producer ids from 0."""

    both: tuple[ApacheKafka, ApacheKafka]
    proxy: Proxy

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.proxy.port}"

    def turn(self, to: int, unanswered: bool = False) -> None:
        """Traffic goes to the other one from now on. `unanswered`: a batch has just left, and nobody has it."""
        if unanswered:
            self.proxy.hang()
            wait_until(lambda: self.proxy.unanswered(PRODUCE), 10, "a batch is on its way", 0.01)
        self.proxy.target_port = self.both[to].port("FRONT")
        self.proxy.cut()
        self.proxy.passthrough()

    def create_topic(self, topic: str, partitions: int = 1) -> None:
        for kafka in self.both:
            create_topic(kafka.direct, topic, partitions, config={"retention.ms": "-1"})

    def records(self, topic: str) -> list[Any]:
        """Of both."""
        return [record for kafka in self.both for record in read_all(kafka.direct, topic)]


@pytest.fixture
def clusters(make_apache: MakeApache) -> Iterator[Clusters]:
    both = tuple(make_apache(properties=NO_CREATION, listeners={"FRONT": "PLAINTEXT"}) for _ in range(2))
    with Proxy(both[0].port("FRONT")) as proxy:
        for kafka in both:
            kafka.advertise(proxy.port, "FRONT")
            kafka.start()
        yield Clusters((both[0], both[1]), proxy)


def test_back_on_the_first_cluster_while_a_batch_is_unanswered(
    clusters: Clusters, run_script: RunScript, topic: str
) -> None:
    """The batch carries a number that the first cluster has seen from this producer id: a duplicate, says Kafka."""
    clusters.create_topic(topic)
    settings = {"KAFKA_BROKER": clusters.address, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.3}
    script = run_script(TOOL, LOG_FORMAT="json", **settings)
    confirmed = Confirmations(script)
    confirmed.wait(10, 20)
    for to, count, unanswered in ((1, 7, False), (0, 7, True)):
        line = len(script.lines)
        clusters.turn(to, unanswered)
        confirmed.wait(count, 15, line)
    summary = stop(script)
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    assert confirmed.after() == set(range(1, summary.sent + 1))
    assert confirmed.after() - numbers(clusters.records(topic)) == set(), "confirmed, and in neither cluster"


def test_there_and_back_and_there_again(clusters: Clusters, run_script: RunScript, topic: str) -> None:
    """Whenever it happens, also while a batch is unanswered: what is called sent is in one of the two. The auditor that
    reads live calls repeated only what does stand there more than once."""
    clusters.create_topic(topic, 2)
    lab = Lab(clusters.both[0], clusters.proxy, topic, run_script)
    settings = {"KAFKA_BROKER": clusters.address, "KAFKA_TOPIC": topic}
    auditor = run_script(AUDITOR, "--json", **settings, TIMEOUT_SECONDS=5)
    auditor.wait_for("Reading topic")
    script = lab.produce("50/s", "FRONT")
    lab.watch.wait_sent(60)
    for turn in range(1, 5):
        clusters.turn(turn % 2, unanswered=turn in (2, 3))
        lab.watch.wait_sent(lab.watch.sent + 60)
    summary = stop(script)
    lab.watch.close()
    there = clusters.records(topic)
    present = numbers(there)
    assert summary.failed == 0
    sent = set(range(1, summary.made + 1)) - sequences(summary.ranges)
    assert sent - present == set(), "sent, and in neither cluster"
    _, report = outcome(auditor, 20)
    (run,) = report["runs"]
    copies = len([one for one in there if event_id(one)]) - len(present)
    assert run["repeated"] <= copies, f"there are {copies} repeats in both together"


def test_the_auditor_comes_back_to_a_cluster_that_it_has_read(
    clusters: Clusters, run_script: RunScript, topic: str
) -> None:
    clusters.create_topic(topic)
    first, second = (kafka.direct for kafka in clusters.both)
    write(first, topic, records(range(1, 41)))
    write(second, topic, records(range(1, 21), run=OTHER))
    settings = {"KAFKA_BROKER": clusters.address, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 6}
    auditor = run_script(AUDITOR, "--json", **settings)
    auditor.wait_for("Events read: 40")
    clusters.turn(1)
    auditor.wait_for("Events read: 60")
    clusters.turn(0)
    write(first, topic, records(range(41, 51)))
    runs = [of_run(last=50, events=50), of_run(OTHER, last=20, events=20)]
    assert outcome(auditor) == (0, document(topic, 70, cart(70), *runs))


# ------------------------------------------------------------------------------------------------------- sent again


@pytest.fixture
def lab(make_apache: MakeApache, topic: str, run_script: RunScript) -> Iterator[Lab]:
    kafka = make_apache(properties=NO_CREATION, listeners={"FRONT": "PLAINTEXT"})
    with Proxy(kafka.port("FRONT")) as proxy:
        kafka.advertise(proxy.port, "FRONT")
        kafka.start()
        made = Lab(kafka, proxy, topic, run_script)
        yield made
        for watch in made.watches:
            watch.close()


@pytest.mark.parametrize("interval", [0.3, 0.02], ids=["one to a batch", "several to a batch"])
def test_sent_again_counts_what_a_broker_was_handed_more_than_once(lab: Lab, interval: float) -> None:
    """An event is handed to a broker when the request with it has been written to a connection, whatever the broker
    does with it; `sent again` is how many events that has happened to more than once.

    The proxy sees all that is written: it cuts only while the one batch of the one partition is unanswered, so that no
    other is on its way to it. What was queued, but never written, does not count.
    """
    create_topic(lab.kafka.direct, lab.topic)
    lab.proxy.recording = True
    script = lab.produce(interval, "FRONT")
    lab.watch.wait_sent(3)
    lab.proxy.answer_late(0.3)
    for _ in range(6):
        time.sleep(1.1)
        lab.proxy.cut(unanswered=PRODUCE)
    lab.proxy.passthrough()
    lab.watch.wait_sent(lab.watch.sent + 5)
    summary = stop(script)
    handed = lab.proxy.handed_over()
    assert set(handed) == {f"{summary.run}:{number}" for number in range(1, summary.made + 1)}
    again = sum(times > 1 for times in handed.values())
    assert again >= 5, "the cuts have hit nothing"
    assert summary.sent_again == again


def test_nothing_is_called_sent_again_that_was_merely_waiting(lab: Lab) -> None:
    """While nobody listens, no request is written."""
    create_topic(lab.kafka.direct, lab.topic)
    lab.proxy.recording = True
    script = lab.produce(0.3, "FRONT")
    lab.watch.wait_sent(3)
    wait_until(lambda: not lab.proxy.unanswered(PRODUCE), 5, "nothing is on its way", 0.01)
    lab.proxy.refuse()
    time.sleep(3)
    lab.proxy.passthrough()
    lab.watch.wait_sent(lab.watch.sent + 5)
    summary = stop(script)
    assert summary.sent_again == sum(times > 1 for times in lab.proxy.handed_over().values())


# ------------------------------------------------------------------------------------------------------------ --print

COUNTING = """
import sys
sys.path.insert(0, {root!r})
import random_event_producer as tool

class Counting(tool.RandomEventProducer):
    made = 0
    def next_event(self):
        Counting.made += 1
        return super().next_event()

code = tool.main(Counting)
print("made", Counting.made, file=sys.stderr)
raise SystemExit(code)
"""
PRINTED = {"a burst": 0, "100/s": 0.01}


def printed(tmp_path: Path, pipe: str, **settings: object) -> tuple[int, str, list[str], Summary, int]:
    """Exit code of --print (not of what it is piped into), standard output, the other lines, the summary, and how many
    events were made."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(root=str(ROOT)))
    done = subprocess.run(
        ["bash", "-c", f'"$@" {pipe}; exit "${{PIPESTATUS[0]}}"', "bash", sys.executable, str(script), "--print"],
        env=clean_environment(**settings),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    *lines, last, made = done.stderr.splitlines()
    told = Summary.of_line(last)
    return done.returncode, done.stdout, lines, told, int(made.removeprefix("made "))


@pytest.mark.parametrize("pace", PRINTED)
def test_print_to_a_full_disk(tmp_path: Path, pace: str) -> None:
    """What was made, and could not be written, is in the summary."""
    settings = {"INTERVAL_SECONDS": PRINTED[pace], "MAX_EVENTS": 100}
    code, _, lines, summary, made = printed(tmp_path, "> /dev/full", **settings)
    errors = [line for line in lines if "INFO" not in line]
    assert (code, len(errors)) == (1, 1), lines
    assert re.search("ERROR - standard output cannot be written to: No space left on device", errors[0])
    assert (summary.sent, summary.made) == (0, made)
    assert made > 0


@pytest.mark.parametrize("pace", PRINTED)
def test_print_to_a_reader_that_goes(tmp_path: Path, pace: str) -> None:
    """What the pipe took is sent, and what it did not is unconfirmed."""
    settings = {"INTERVAL_SECONDS": PRINTED[pace]}
    _, output, lines, summary, made = printed(tmp_path, "| head -n 3", **settings)
    assert len(output.splitlines()) == 3
    assert not re.search("Traceback|WARNING|ERROR", "\n".join(lines)), lines
    assert summary.made == made
    assert summary.sent >= 3
    assert (summary.failed, summary.unconfirmed > 0) == (0, True)


# ---------------------------------------------------------------------------------------------------- OK for nothing


def audit(run_script: RunScript, kafka: ApacheKafka, topic: str, *flags: str, **settings: object) -> Script:
    given = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 1, **settings}
    return run_script(AUDITOR, *flags, **given)


def not_ok(run_script: RunScript, kafka: ApacheKafka, topic: str, words: str, **settings: object) -> dict[str, Any]:
    """The report, which says by itself that it is not OK, and why; so does what people see."""
    people = audit(run_script, kafka, topic, **settings)
    code, report = outcome(audit(run_script, kafka, topic, "--json", **settings), PATIENCE)
    assert (code, report["ok"]) == (1, False)
    (note,) = report["notes"]
    assert re.search(words, note), note
    assert people.wait(PATIENCE) == 1
    assert people.stdout_lines[-1].startswith("NOT OK: missing 0")
    assert f"Note: {note}" in people.stdout_lines
    return report


NOTHING = "(nothing|no event|no record).*(read|judged)"


def test_an_empty_topic_is_not_ok(apache: ApacheKafka, run_script: RunScript, topic: str) -> None:
    create_topic(apache.direct, topic)
    not_ok(run_script, apache, topic, NOTHING)


def test_what_others_have_written_is_not_ok(apache: ApacheKafka, run_script: RunScript, topic: str) -> None:
    """Nothing of a run is there, and an OK is about runs."""
    topic_with(apache, topic, [record(1, headers=[]), {"key": None, "value": b"hello"}])
    report = not_ok(run_script, apache, topic, f"{NOTHING}|event_id")
    assert (report["events"], report["without_id"], report["runs"]) == (2, 2, [])


def test_nothing_new_is_not_ok(apache: ApacheKafka, run_script: RunScript, topic: str) -> None:
    topic_with(apache, topic, records([1, 2, 3]))
    assert not_ok(run_script, apache, topic, NOTHING, START="latest")["events"] == 0


def test_a_stop_before_anything_was_read_is_not_ok(apache: ApacheKafka, run_script: RunScript, topic: str) -> None:
    create_topic(apache.direct, topic)
    script = audit(run_script, apache, topic, "--json", TIMEOUT_SECONDS="")
    script.wait_for("Reading topic")
    script.signal()
    code, report = outcome(script, 10)
    assert (code, report["ok"], len(report["notes"])) == (1, False, 1)


def test_a_document_without_kafka(run_script: RunScript, topic: str) -> None:
    """For who reads standard output only: it says what the last line of the log does."""
    settings = {"KAFKA_BROKER": "127.0.0.1:9", "KAFKA_TOPIC": topic, "CONNECT_TIMEOUT_SECONDS": 1}
    script = run_script(AUDITOR, "--json", **settings)
    code, report = outcome(script, 15)
    assert (code, report) == (1, document(topic, 0, {}, ok=False, notes=report["notes"]))
    (note,) = report["notes"]
    assert re.search("Kafka not reached in 1 s: nothing listens at 127.0.0.1:9", note), note
    script.wait_for("ERROR - Kafka not reached in 1 s")


def test_a_document_without_a_topic(make_apache: MakeApache, run_script: RunScript, topic: str) -> None:
    kafka = make_apache(properties=NO_CREATION)
    kafka.start()
    script = audit(run_script, kafka, topic, "--json", CONNECT_TIMEOUT_SECONDS=2)
    code, report = outcome(script, 15)
    assert (code, report) == (1, document(topic, 0, {}, ok=False, notes=report["notes"]))
    (note,) = report["notes"]
    assert re.search(f"topic {topic} (does not exist|is not there)", note), note


# ------------------------------------------------------------------------------------------ one broker of three dead

MOST_WARNINGS, MOST_CHARACTERS = 5, 300
OF_ALL = re.compile(r"confirmed nothing for (\d+) s")
SLACK = 1.0  # second: rounded numbers, and lines that are written a moment after what they tell


@pytest.fixture
def three_nodes(make_apache: MakeApache) -> ApacheKafka:
    kafka = make_apache(nodes=3, properties=NO_CREATION)
    kafka.start()
    return kafka


def logged(script: Script) -> list[dict[str, Any]]:
    return [json.loads(line) for line in list(script.lines)]


def when(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()


def warned(script: Script) -> list[str]:
    """The warnings of a JSON log; what they say of all partitions is true of all."""
    lines = logged(script)
    sent = [when(line) for line in lines if "event_id" in line]
    warnings = [line for line in lines if line["level"] == "WARNING"]
    for line in warnings:
        if seconds := OF_ALL.search(line["message"]):
            others = [at for at in sent if when(line) - int(seconds[1]) + SLACK < at < when(line)]
            assert not others, f"{len(others)} events were confirmed in these {seconds[1]} s: {line['message']}"
    return [line["message"] for line in warnings]


@pytest.mark.parametrize("replication", [1, 3], ids=["a third has no leader", "leaders change"])
def test_few_lines_about_a_dead_broker(
    three_nodes: ApacheKafka, run_script: RunScript, topic: str, replication: int
) -> None:
    """Lists of partitions get longer all the time: that is one trouble, told in a line."""
    kafka = three_nodes
    create_topic(kafka.direct, topic, 60, replication, {"min.insync.replicas": "1"})
    settings = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.1, "LOG_FORMAT": "json"}
    script = run_script(TOOL, **settings)
    Confirmations(script).wait(20, 20)
    kafka.kill(leader(kafka.direct, topic))
    time.sleep(25)
    told = warned(script)
    script.signal()
    script.wait(15)
    assert len(told) <= MOST_WARNINGS, "\n".join(told)
    assert max(map(len, told), default=0) < MOST_CHARACTERS, "\n".join(told)
    if replication == 1:
        assert re.search("leader", "\n".join(told)), told


def seed_for(dead: set[int], pattern: str) -> str:
    """One with which event n goes to a partition among `dead` where the pattern has `x`, elsewhere where it has `.`,
    and anywhere where it has `?`."""
    kinds = [".x"[partition_of(str(user).encode(), 60) in dead] for user in range(1001)]

    def fits(seed: str) -> bool:
        events = iter(tool.RandomEventProducer(seed).next_event, None)
        return all(wanted in ("?", kinds[user]) for wanted, (user, *_) in zip(pattern, events, strict=False))

    return next(seed for seed in map(str, itertools.count()) if fits(seed))


def test_what_is_said_of_all_partitions_is_true_of_all(
    three_nodes: ApacheKafka, run_script: RunScript, topic: str
) -> None:
    """By chance some events in a row belong where no leader is, long after the first one that waits for that."""
    kafka = three_nodes
    create_topic(kafka.direct, topic, 60)
    dead = leader(kafka.direct, topic)
    seed = seed_for(led_by(kafka.direct, topic, dead), "????xx??.?.?.?.xxxxxx")
    settings = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 1, "LOG_FORMAT": "json"}
    script = run_script(TOOL, SEED=seed, **settings)
    Confirmations(script).wait(3, 20)
    kafka.kill(dead)
    time.sleep(23)
    told = warned(script)
    script.signal()
    script.wait(15)
    assert told
