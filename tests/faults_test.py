"""Delivery under faults: what the tool says it sent is in Apache Kafka, each event once and in order per user.

Every scenario is judged twice: by the independent reader and auditor in brokers.py, and by the project's own
consumer. A table of all of them is printed at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import pytest
from brokers import (
    ApacheKafka,
    add_partitions,
    audit,
    create_topic,
    event_id,
    free_port,
    leader,
    partition_of,
    read_all,
    set_topic_config,
    wait_until,
)
from conftest import ROOT, RunScript, Script, require_apache
from proxy import Proxy

PRODUCER = "random_event_producer.py"
CONSUMER = "test_random_consumer.py"
PACES = {"50/s": 0.02, "full speed": 0}
# So many more events confirmed after a fault: at full speed more than can have waited through it.
ENOUGH = {"50/s": 50, "full speed": 20_000}
MOST_UNCONFIRMED = 10_000
MOST_MEMORY = 150_000_000  # bytes
SLOWEST_AUDIT = 2_000  # events a second: at full speed there are as many as the machine can make
STOP_SECONDS = 10.0
PATIENCE = 60.0
SUMMARY = re.compile(
    r"Stopped: sent (\d+), failed (\d+), unconfirmed (\d+)(?: \(sequences ([^)]*)\))?, "
    r"sent again (\d+), skipped (\d+) .* run ([0-9a-f]{16})$"
)
LOST = "Kafka has confirmed nothing for"
BACK = "Kafka confirms again"


# --- what a run looks like from outside ---


class Summary(NamedTuple):
    sent: int
    failed: int
    unconfirmed: int
    ranges: str
    sent_again: int
    skipped: int
    run: str

    @property
    def made(self) -> int:
        return self.sent + self.failed + self.unconfirmed

    @classmethod
    def of(cls, script: Script) -> Summary:
        return cls.of_line(script.lines[-1], script.tail())

    @classmethod
    def of_line(cls, last: str, context: str = "") -> Summary:
        """The last one of a run, as text or JSON."""
        found = SUMMARY.search(json.loads(last)["message"] if last.startswith("{") else last)
        assert found, f"the last line is no summary:\n{context or last}"
        sent, failed, unconfirmed, ranges, again, skipped, run = found.groups()
        return cls(int(sent), int(failed), int(unconfirmed), ranges or "", int(again), int(skipped), run)


class Sample(NamedTuple):
    at: float
    sent: int
    waiting: int
    memory: int
    cpu: float


class Watch:
    """Looks at a running producer five times a second: its metrics, its memory, its processor time."""

    def __init__(self, script: Script, port: int) -> None:
        self.samples: list[Sample] = []
        self._script = script
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    @property
    def sent(self) -> int:
        return self.samples[-1].sent if self.samples else 0

    def wait_sent(self, count: int, timeout: float = PATIENCE) -> None:
        """Until so many are confirmed. AssertionError when the script ends, or time runs out, before that."""

        def reached() -> bool:
            assert self._script.process.poll() is None, f"the script ended:\n{self._script.tail()}"
            return self.sent >= count

        try:
            wait_until(reached, timeout, f"{count} events confirmed")
        except TimeoutError as error:
            raise AssertionError(f"{error}, but {self.sent}:\n{self._script.tail()}") from None

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def pause(self) -> float:
        """The longest time in which no confirmation came, the start included, in seconds (to 0.2 s)."""
        steps = [self._began]
        steps += [after.at for before, after in itertools.pairwise(self.samples) if after.sent > before.sent]
        steps += [sample.at for sample in self.samples[-1:]]
        return max((after - before for before, after in itertools.pairwise(steps)), default=0.0)

    @property
    def memory(self) -> int:
        return max((sample.memory for sample in self.samples), default=0)

    @property
    def waiting(self) -> int:
        return max((sample.waiting for sample in self.samples), default=0)

    def cpu_waiting(self) -> float | None:
        """Share of a core used in the longest time without a confirmation, less its first and last second."""
        spans = [list(span) for _, span in itertools.groupby(self.samples, key=lambda sample: sample.sent)]
        longest = max(spans, key=lambda span: span[-1].at - span[0].at, default=[])
        calm = [sample for sample in longest if longest[0].at + 1 <= sample.at <= longest[-1].at - 1]
        if len(calm) < 10:
            return None
        return (calm[-1].cpu - calm[0].cpu) / (calm[-1].at - calm[0].at)

    def _look_on(self) -> None:
        process = psutil.Process(self._script.process.pid)
        with contextlib.suppress(psutil.Error):
            while not self._ended.wait(0.2):
                with contextlib.suppress(OSError):
                    self._look(process)

    def _look(self, process: Any) -> None:
        with urllib.request.urlopen(self._url, timeout=2) as answer:  # noqa: S310 (our own address)
            text = answer.read().decode()
        sent, waiting = (_metric(text, name) for name in ("events_sent_total", "unacknowledged_events"))
        cpu = process.cpu_times()
        memory = process.memory_info().rss
        self.samples.append(Sample(time.monotonic(), sent, waiting, memory, cpu.user + cpu.system))


def _metric(text: str, name: str) -> int:
    """The sum over all labels."""
    return int(sum(map(float, re.findall(rf"(?m)^\w+_{name}\S* (\S+)$", text))))


class Row(NamedTuple):
    """A line of the table: `pause` in seconds, `memory` in bytes, `cpu` as a share of one core."""

    name: str
    pace: str
    made: int
    confirmed: int
    failed: int
    missing: int
    repeated: int
    reordered: int
    pause: float
    memory: int
    cpu: float | None

    def __str__(self) -> str:
        cpu = "" if self.cpu is None else f"{100 * self.cpu:.0f} %"
        counts = " | ".join(f"{number:,}" for number in self[2:8])
        return f"| {self.name} | {self.pace} | {counts} | {self.pause:.1f} s | {self.memory / 1e6:.0f} MB | {cpu} |"


HEAD = (
    "| scenario | pace | made | confirmed | failed | missing | repeated | reordered | longest pause | memory "
    "| CPU waiting |"
)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Rows put in here are printed when the module is through."""
    rows: list[Row] = []
    yield rows
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", HEAD, "|---" * HEAD.count(" | ") + "|---|", *rows, sep="\n")


# --- the place where it happens ---


@dataclass
class Lab:
    """One cluster, a topic of its own for each test, and the proxy before the listener PROXIED."""

    kafka: ApacheKafka
    proxy: Proxy
    topic: str
    run_script: RunScript
    watches: list[Watch] = field(default_factory=list)

    def produce(self, pace: str | float, listener: str = "PLAINTEXT", script: str = PRODUCER, **more: object) -> Script:
        """Starts the producer, watched."""
        port = free_port()
        settings = {
            "KAFKA_BROKER": self.kafka.address(listener),
            "KAFKA_TOPIC": self.topic,
            "INTERVAL_SECONDS": PACES[pace] if isinstance(pace, str) else pace,
            "METRICS_PORT": port,
            "SEED": "faults",
        }
        running = self.run_script(script, **{**settings, **more})
        self.watches.append(Watch(running, port))
        return running

    @property
    def watch(self) -> Watch:
        return self.watches[-1]

    def consume(self, **more: object) -> Script:
        settings = {"KAFKA_BROKER": self.kafka.direct, "KAFKA_TOPIC": self.topic, "TIMEOUT_SECONDS": 2}
        return self.run_script(CONSUMER, "--json", **{**settings, **more})

    def close(self) -> None:
        """The cluster as it was, whatever a test has left."""
        for watch in self.watches:
            watch.close()
        self.proxy.passthrough()
        for node in range(len(self.kafka.direct.split(","))):
            self.kafka.thaw(node)
            try:
                self.kafka.wait_ready(node)
            except (RuntimeError, AssertionError):  # it has ended
                self.kafka.start_node(node)


Cluster = tuple[ApacheKafka, Proxy]


def cluster(folder: Path, nodes: int) -> Iterator[Cluster]:
    require_apache()
    properties = {"auto.create.topics.enable": "false"}
    kafka = ApacheKafka(folder, nodes, properties, {"PROXIED": "PLAINTEXT"})
    with Proxy(kafka.port("PROXIED")) as proxy:
        kafka.advertise(proxy.port, "PROXIED")
        with kafka:
            yield kafka, proxy


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from cluster(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from cluster(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture
def lab(one_node: Cluster, topic: str, run_script: RunScript) -> Iterator[Lab]:
    made = Lab(*one_node, topic, run_script)
    yield made
    made.close()


@pytest.fixture
def lab3(three_nodes: Cluster, topic: str, run_script: RunScript) -> Iterator[Lab]:
    made = Lab(*three_nodes, topic, run_script)
    yield made
    made.close()


# --- the judges ---


class Verdict(NamedTuple):
    """What the independent auditor found; `gaps` are the sequences made and not there."""

    present: set[int]
    gaps: set[int]
    repeated: int
    reordered: int


def judge(lab: Lab, summary: Summary, partitions: int | None, auditor: Script | None = None) -> Verdict:
    """Both auditors agree that everything is as the summary says; returns what they found.

    `partitions`: how many the topic has, None when they became four of one. `auditor`: the project's consumer, if it is
    running already.
    """
    records = read_all(lab.kafka.direct, lab.topic)
    found = audit(records, partitions)
    assert (found.without_id, found.misplaced) == (0, 0)
    if partitions is None:
        assert all(record.partition in (0, partition_of(record.key, 4)) for record in records)
        assert {record.partition for record in records} == {0, 1, 2, 3}, "the new partitions stay empty"
    assert set(found.runs) == ({summary.run} if records else set())
    present = {identity[1] for record in records if (identity := event_id(record))}
    gaps = set(range(1, summary.made + 1)) - present
    assert max(present, default=0) <= summary.made, "there are events the summary does not know of"
    verdict = Verdict(present, gaps, found.repeated, found.reordered)
    agree(auditor or lab.consume(), verdict, len(records))
    assert (found.repeated, found.reordered) == (0, 0)
    return verdict


def agree(auditor: Script, verdict: Verdict, records: int) -> None:
    """The project's consumer reports just what the independent auditor has found."""
    code = auditor.wait(PATIENCE + records / SLOWEST_AUDIT)
    assert auditor.stdout, auditor.tail()
    report = json.loads(auditor.stdout)
    assert (report["events"], report["without_id"], report["invalid"], report["misplaced"]) == (records, 0, 0, 0)
    runs = report["runs"]
    assert len(runs) == bool(records)
    last = max(verdict.present, default=0)
    missing = {number for run in runs for first, end in run["missing"] for number in range(first, end + 1)}
    assert missing == {number for number in verdict.gaps if number < last}
    assert [(run["events"], run["last"]) for run in runs] == [(records, last)] * len(runs)
    assert sum(run["repeated"] for run in runs) == verdict.repeated
    assert sum(run["reordered"] for run in runs) == verdict.reordered
    assert report["ok"] == (not (missing or verdict.repeated or verdict.reordered))
    assert code == (0 if report["ok"] else 1)


def note(table: list[Row], name: str, pace: str, lab: Lab, summary: Summary, verdict: Verdict) -> None:
    """Into the table; memory and what waits are bounded in every scenario."""
    watch = lab.watch
    watch.close()
    missing = summary.sent - len(verdict.present & confirmed_sequences(summary, verdict))
    counts = (summary.made, summary.sent, summary.failed, missing, verdict.repeated, verdict.reordered)
    table.append(Row(name, pace, *counts, watch.pause, watch.memory, watch.cpu_waiting()))
    assert watch.waiting <= MOST_UNCONFIRMED
    assert watch.memory < MOST_MEMORY


def sequences(ranges: str) -> set[int]:
    """`1-3, 7` as {1, 2, 3, 7}."""
    pairs = (text.split("-") for text in ranges.split(", ") if text)
    return {number for pair in pairs for number in range(int(pair[0]), int(pair[-1]) + 1)}


def confirmed_sequences(summary: Summary, verdict: Verdict) -> set[int]:
    """Those the summary calls sent: all but the unconfirmed it names, and the failed, which nothing names."""
    left = set(range(1, summary.made + 1)) - sequences(summary.ranges)
    return left - set(sorted(left & verdict.gaps)[: summary.failed])


# --- one node: every event is confirmed, in the end ---


def killed(lab: Lab) -> None:
    lab.kafka.kill()
    lab.kafka.start_node()


def frozen(seconds: float) -> Callable[[Lab], None]:
    def fault(lab: Lab) -> None:
        lab.kafka.freeze()
        time.sleep(seconds)
        lab.kafka.thaw()
        lab.kafka.wait_ready()

    return fault


def stopped(lab: Lab) -> None:
    lab.kafka.stop()
    time.sleep(5)
    last = lab.watch.samples[-1]  # what was confirmed before the stop may be counted a moment later
    assert all(sample.sent == last.sent for sample in lab.watch.samples if sample.at > last.at - 3), "not stopped"
    lab.kafka.start_node()


def started_late(lab: Lab) -> None:
    time.sleep(5)
    lab.kafka.start_node()


def topic_late(lab: Lab) -> None:
    time.sleep(3)
    create_topic(lab.kafka.direct, lab.topic, partitions=2)


def enlarged(lab: Lab) -> None:
    """For longer than the producer takes to notice (metadata are asked for every 10 s)."""
    add_partitions(lab.kafka.direct, lab.topic, 4)
    time.sleep(12)


def proxied(seconds: float, change: Callable[[Proxy], None]) -> Callable[[Lab], None]:
    def fault(lab: Lab) -> None:
        change(lab.proxy)
        time.sleep(seconds)
        lab.proxy.passthrough()

    return fault


@dataclass(frozen=True)
class Scenario:
    """`fault` returns when it is over. `outage`: so many seconds at least without any confirmation."""

    name: str
    fault: Callable[[Lab], None]
    end: str = "SIGTERM"
    listener: str = "PLAINTEXT"
    partitions: int = 2
    outage: float = 0
    from_start: bool = False
    paces: tuple[str, ...] = tuple(PACES)
    slow: bool = True

    def parameters(self) -> Iterator[Any]:
        for pace in self.paces:
            yield pytest.param(self, pace, id=f"{self.name}, {pace}", marks=[pytest.mark.slow] if self.slow else [])


PROXIED: dict[str, Any] = {"listener": "PROXIED"}
SCENARIOS = (
    Scenario("killed and restarted", killed),
    Scenario("frozen 15 s", frozen(15), outage=15, paces=("50/s",)),
    Scenario("frozen 40 s", frozen(40), outage=40, paces=("full speed",)),
    Scenario("clean stop for 5 s", stopped, end="MAX_EVENTS"),
    Scenario("absent at the start", started_late, end="SIGINT", from_start=True),
    Scenario("topic created late", topic_late, from_start=True, partitions=0, slow=False),
    Scenario("partitions 1 to 4", enlarged, partitions=1),
    Scenario("responses lost, 30 %", proxied(6, lambda proxy: proxy.drop_responses(0.3)), **PROXIED),
    Scenario("cut every 0.5 s", proxied(6, lambda proxy: proxy.cut_every(0.5)), end="SIGINT", **PROXIED),
    Scenario("black hole 12 s", proxied(12, Proxy.hang), outage=12, **PROXIED),
    Scenario("slow link", proxied(8, lambda proxy: proxy.slow(200_000)), end="SIGINT", **PROXIED),
    Scenario("accepted and closed at once", proxied(4, Proxy.accept_and_close), slow=False, **PROXIED),
)
MAX_EVENTS = {"50/s": 800, "full speed": 50_000}


@pytest.mark.parametrize(("scenario", "pace"), [row for scenario in SCENARIOS for row in scenario.parameters()])
def test_everything_arrives(scenario: Scenario, pace: str, lab: Lab, table: list[Row]) -> None:
    prepare(scenario, lab)
    auditor = lab.consume(TIMEOUT_SECONDS=6) if scenario.name == "partitions 1 to 4" else None
    if auditor:
        auditor.wait_for("Reading topic")
    limit = MAX_EVENTS[pace] if scenario.end == "MAX_EVENTS" else ""
    script = lab.produce(pace, scenario.listener, MAX_EVENTS=limit)
    if not scenario.from_start:
        lab.watch.wait_sent(25)
    scenario.fault(lab)
    assert scenario.end == "MAX_EVENTS" or script.process.poll() is None, script.tail()
    assert finish(lab, script, scenario.end, pace) == 0, script.tail()
    summary = Summary.of(script)
    assert (summary.failed, summary.unconfirmed) == (0, 0)
    verdict = judge(lab, summary, None if auditor else 2, auditor)
    note(table, scenario.name, pace, lab, summary, verdict)
    assert (verdict.gaps, len(verdict.present)) == (set(), summary.sent)
    if limit:
        assert summary.sent == limit
    check_lines(script, scenario.outage)


def prepare(scenario: Scenario, lab: Lab) -> None:
    if scenario.partitions:
        create_topic(lab.kafka.direct, lab.topic, scenario.partitions)
    if scenario.name == "absent at the start":
        lab.kafka.stop()


def finish(lab: Lab, script: Script, end: str, pace: str) -> int:
    """The exit code, after the run has got going again."""
    if end == "MAX_EVENTS":
        return script.wait(PATIENCE)
    lab.watch.wait_sent(lab.watch.sent + ENOUGH[pace])
    script.signal(signal.Signals[end])
    return script.wait(STOP_SECONDS)


def check_lines(script: Script, outage: float) -> None:
    """One line on losing Kafka, then at most one every 30 s, and one on its coming back."""
    lost, back = ([line for line in script.lines if text in line] for text in (LOST, BACK))
    assert len(back) <= len(lost)
    if outage:
        assert len(lost) == 1 + max(0, outage - 5) // 30, script.tail()
        assert len(back) == 1, script.tail()


# --- three nodes ---


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
def test_leader_killed_then_two_of_three(pace: str, lab3: Lab, table: list[Row]) -> None:
    create_topic(lab3.kafka.direct, lab3.topic, 1, 3)
    script = lab3.produce(pace)
    lab3.watch.wait_sent(25)
    first = leader(lab3.kafka.direct, lab3.topic)
    lab3.kafka.kill(first)
    lab3.watch.wait_sent(lab3.watch.sent + ENOUGH[pace])
    second = leader(lab3.kafka.direct, lab3.topic)
    lab3.kafka.kill(second)
    script.wait_for(LOST)
    for node in (first, second):
        lab3.kafka.start_node(node, wait=False)
    script.wait_for(BACK, PATIENCE)
    assert finish(lab3, script, "SIGTERM", pace) == 0, script.tail()
    summary = Summary.of(script)
    verdict = judge(lab3, summary, 1)
    note(table, "leader killed, then two of three", pace, lab3, summary, verdict)
    assert (summary.failed, summary.unconfirmed, verdict.gaps) == (0, 0, set())


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
def test_not_enough_replicas(pace: str, lab3: Lab, table: list[Row]) -> None:
    create_topic(lab3.kafka.direct, lab3.topic, 1, 3, {"min.insync.replicas": "3"})
    script = lab3.produce(pace)
    lab3.watch.wait_sent(25)
    follower = (leader(lab3.kafka.direct, lab3.topic) + 1) % 3
    lab3.kafka.kill(follower)
    script.wait_for(LOST)
    lab3.kafka.start_node(follower)
    assert finish(lab3, script, "SIGINT", pace) == 0, script.tail()
    summary = Summary.of(script)
    verdict = judge(lab3, summary, 1)
    note(table, "not enough replicas", pace, lab3, summary, verdict)
    assert (summary.failed, summary.unconfirmed, verdict.gaps) == (0, 0, set())


# --- refusals ---

LARGE_EVENTS = """
import sys
sys.path.insert(0, {root!r})
import random_event_producer as tool

class Large(tool.RandomEventProducer):
    made = 0
    def _generate_metadata(self, event_type):
        self.made += 1
        metadata = super()._generate_metadata(event_type)
        return metadata | {{"page": "/" + "x" * 400_000}} if self.made % 3000 == 0 else metadata

raise SystemExit(tool.main(Large))
"""


REFUSED = "(?i)refuse.*MessageSizeTooLargeError.*max.message.bytes"


def test_refused_among_others(lab: Lab, table: list[Row]) -> None:
    """One record in a batch; a limit comes in mid-run and refuses the longest tenth of this seed's events."""
    create_topic(lab.kafka.direct, lab.topic, 2)
    script = lab.produce(0.1)
    lab.watch.wait_sent(5)
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "325"})
    script.wait_for(REFUSED)
    lab.watch.wait_sent(lab.watch.sent + 20)
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "1000000"})
    lab.watch.wait_sent(lab.watch.sent + 20)
    script.signal(signal.SIGTERM)
    judge_refusals(lab, script, "too large, one to a batch", "10/s", table)


@pytest.mark.slow
def test_refused_among_others_at_full_speed(lab: Lab, table: list[Row], tmp_path: Path) -> None:
    large = tmp_path / "large.py"
    large.write_text(LARGE_EVENTS.format(root=str(ROOT)))
    create_topic(lab.kafka.direct, lab.topic, 2, config={"max.message.bytes": "300000"})
    script = lab.produce("full speed", script=str(large), MAX_EVENTS=30_000)
    judge_refusals(lab, script, "too large, among others", "full speed", table)


def judge_refusals(lab: Lab, script: Script, name: str, pace: str, table: list[Row]) -> None:
    """Failed are exactly the events that are not there; the ones after them are."""
    assert script.wait(PATIENCE) == 1, script.tail()
    summary = Summary.of(script)
    verdict = judge(lab, summary, 2)
    note(table, name, pace, lab, summary, verdict)
    assert re.search(REFUSED, script.stderr), script.tail()
    assert summary.failed == len(verdict.gaps) > 0
    assert (summary.unconfirmed, summary.sent) == (0, len(verdict.present))
    assert max(verdict.present) > max(verdict.gaps) or pace == "full speed"


def test_limit_below_the_batch_size(lab: Lab, table: list[Row]) -> None:
    """Batches are refused, the events in them are not: they go out in smaller ones."""
    create_topic(lab.kafka.direct, lab.topic, 2)
    script = lab.produce("full speed")
    lab.watch.wait_sent(25)
    set_topic_config(lab.kafka.direct, lab.topic, {"max.message.bytes": "60000"})
    assert finish(lab, script, "SIGINT", "full speed") == 0, script.tail()
    summary = Summary.of(script)
    verdict = judge(lab, summary, 2)
    note(table, "limit below the batch size", "full speed", lab, summary, verdict)
    assert (summary.failed, summary.unconfirmed, verdict.gaps) == (0, 0, set())


@pytest.mark.parametrize("pace", PACES)
def test_everything_refused(pace: str, lab: Lab) -> None:
    create_topic(lab.kafka.direct, lab.topic, config={"max.message.bytes": "100"})
    script = lab.produce(pace)
    assert script.wait(PATIENCE) == 1, script.tail()
    summary = Summary.of(script)
    assert (summary.sent, summary.failed > 0) == (0, True)
    assert re.search(REFUSED, script.stderr), script.tail()
    assert read_all(lab.kafka.direct, lab.topic) == []


# --- a stop while Kafka is away ---

AWAY: Mapping[str, Callable[[ApacheKafka], None]] = {"killed": ApacheKafka.kill, "frozen": ApacheKafka.freeze}


@pytest.mark.slow
@pytest.mark.parametrize("fault", AWAY)
def test_stop_while_away(fault: str, one_node: Cluster, run_script: RunScript, topic: str, table: list[Row]) -> None:
    """Two producers in one outage, one for each signal and pace."""
    labs = {pace: Lab(*one_node, f"{topic}-{number}", run_script) for number, pace in enumerate(PACES)}
    with contextlib.ExitStack() as stack:
        for lab in labs.values():
            stack.callback(lab.close)
            create_topic(lab.kafka.direct, lab.topic, 2)
        scripts = {pace: lab.produce(pace) for pace, lab in labs.items()}
        for lab in labs.values():
            lab.watch.wait_sent(25)
        AWAY[fault](one_node[0])
        for number, script in zip((signal.SIGINT, signal.SIGTERM), scripts.values(), strict=True):
            script.wait_for(LOST)
            script.signal(number)
        codes = [script.wait(STOP_SECONDS) for script in scripts.values()]
        assert codes == [1, 1], [script.tail(5) for script in scripts.values()]
        for lab in labs.values():
            lab.close()
        for pace, lab in labs.items():
            judge_stopped(fault, pace, lab, Summary.of(scripts[pace]), table)


def judge_stopped(fault: str, pace: str, lab: Lab, summary: Summary, table: list[Row]) -> None:
    """What is not there is among the sequences that the summary names as unconfirmed."""
    unconfirmed = sequences(summary.ranges)
    assert summary.failed == 0
    assert len(unconfirmed) == summary.unconfirmed > 0
    verdict = judge(lab, summary, 2)
    note(table, f"stopped while {fault}", pace, lab, summary, verdict)
    assert verdict.gaps <= unconfirmed
