#!/usr/bin/env python3
"""Read the topic, show every event, and audit what was delivered: missing, repeated, reordered, misplaced, invalid.

Reads without a consumer group and leaves nothing on the broker. Ends at Ctrl+C, after MAX_EVENTS, or after
TIMEOUT_SECONDS without a new event. With --json only the audit goes to standard output, as one JSON document.
Exit code 0 when all is well, 1 when not (or when fewer than MAX_EVENTS came), 2 for bad settings.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

import orjson
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import AuthorizationError, KafkaError, LogTruncationError, OffsetOutOfRangeError
from pydantic import BeforeValidator, Field

import random_event_producer as tool
from random_event_producer import GiveUp, Stop, event_id_of, key_hash, log

BATCH = 1000  # records between two looks at signals
POLL_MS = 100
LOOK_SECONDS = 0.2  # between two looks at the topic and the connections
AWAY_SECONDS = 1.0  # without a connection: Kafka counts as away
TOTAL_SECONDS = 3.0  # between two lines about how many were read
CLOSING_SECONDS = 3.0  # at the end, for events that are still on their way
CREATE_TIME = 0  # a record's timestamp_type when the producer has set its time

CHUNK = 65_536  # sequences
COMPLETE = b"\xff" * (CHUNK // 8)
EVENT_ID = re.compile(r"([0-9a-f]{16}):([1-9][0-9]{0,17})")

Ranges = list[tuple[int, int]]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Start = Annotated[Literal["earliest", "latest"], BeforeValidator(str.lower)]


class ConsumerSettings(tool.Settings):
    connect_timeout_seconds: Seconds = Field(
        30, title="a number above 0", description="give up when Kafka is not reached in time"
    )
    timeout_seconds: Seconds | None = Field(
        None, title="a number above 0", description="stop so long after the last new event; none: go on"
    )
    start: Start = Field("earliest", title="earliest or latest", description="where in the topic to begin")


# --------------------------------------------------------------------------------------------------------- audit


class Sequences:
    """A set of sequences: 8 KB for 65,536 of them, and nothing once these are complete."""

    def __init__(self) -> None:
        self.count = 0
        self._chunks: dict[int, bytes | bytearray] = {}

    def add(self, sequence: int) -> bool:
        """False when it is there already."""
        number, place = divmod(sequence - 1, CHUNK)
        index, bit = place >> 3, 1 << (place & 7)
        bits = self._chunks.get(number)
        if bits is None:
            bits = self._chunks[number] = bytearray(CHUNK // 8)
        if bits[index] & bit:
            return False
        bits[index] |= bit  # type: ignore[index]  # COMPLETE has no bit left to set
        self.count += 1
        if bits[index] == 0xFF and bits == COMPLETE:
            self._chunks[number] = COMPLETE
        return True

    def gaps(self, first: int) -> Ranges:
        """Closed ranges of what is not there, from `first` to the last one there."""
        ranges, expected = [], first
        for begin, end in self._present():
            if begin > expected:
                ranges.append((expected, begin - 1))
            expected = max(expected, end + 1)
        return ranges

    def _present(self) -> Iterator[tuple[int, int]]:
        for number, bits in sorted(self._chunks.items()):
            text = f"{int.from_bytes(bits, 'little'):b}"[::-1] if bits is not COMPLETE else ""
            base = number * CHUNK + 1
            yield from ((base + ones.start(), base + ones.end() - 1) for ones in re.finditer("1+", text))
            if not text:
                yield base, base + CHUNK - 1


class Run:
    """What was read of one start of the producer."""

    def __init__(self) -> None:
        self.first, self.last = sys.maxsize, 0
        self.events = self.repeated = self.reordered = 0
        self._sequences = Sequences()
        self._began: int | None = None  # the time of sequence 1, in ms
        self._firsts: dict[int, int] = {}  # partition -> the first sequence there
        self._latest: dict[int, int] = {}  # partition and user -> the latest sequence

    def add(self, sequence: int, record: Any, user_id: int | None) -> str:
        """Take in an event; "", "repeated" or "reordered"."""
        self.events += 1
        if sequence > self.last:
            self.last = sequence
        if sequence < self.first:
            self.first = sequence
        if not self.mark(sequence, record):
            self.repeated += 1
            return "repeated"
        place = record.partition << 10 | (user_id or 0)
        if user_id and sequence < self._latest.get(place, 0):
            self.reordered += 1
            return "reordered"
        self._latest[place] = sequence
        return ""

    def mark(self, sequence: int, record: Any) -> bool:
        """Note that a sequence is there; False when it was known."""
        self._firsts.setdefault(record.partition, sequence)
        if sequence == 1:
            self._began = record.timestamp
        return self._sequences.add(sequence)

    def missing(self, cut: dict[int, int | None]) -> Ranges:
        return [] if self._sequences.count == self.last else self._sequences.gaps(self.truncated_before(cut) or 1)

    def truncated_before(self, cut: dict[int, int | None]) -> int | None:
        """The first sequence that must be there, if not 1, when partitions have lost their beginning (see Audit)."""
        bounds = [
            min(self._firsts.get(partition, sys.maxsize), self.last + 1)
            for partition, since in cut.items()
            if since is None or self._began is None or since >= self._began
        ]
        return max(bounds) if bounds and max(bounds) > 1 else None

    def report(self, cut: dict[int, int | None]) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("first", "last", "events")}
        faults = {"missing": self.missing(cut), "repeated": self.repeated, "reordered": self.reordered}
        return {**counts, **faults, "truncated_before": self.truncated_before(cut)}


class Audit:
    """Judges records in the order they are read. Its memory grows with runs and gaps, not with events."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.events = self.without_id = self.invalid = self.invalid_without_id = 0
        self.by_type: Counter[str] = Counter()
        self.runs: defaultdict[str, Run] = defaultdict(Run)
        self.counts: list[int] = []  # numbers of partitions the topic has had while it was read
        # Partitions that lack their beginning -> the time in ms from which on they are there; None: not known yet.
        self.cut: dict[int, int | None] = {}
        self._wrong_keys = 0
        self._strays: Counter[tuple[int, int]] = Counter()  # (hash of the key, partition)

    def add(self, record: Any) -> str:
        """Take in a record; what is not as it should be, "" when all is."""
        self.events += 1
        if self.cut.get(record.partition, 0) is None:
            self.cut[record.partition] = record.timestamp
        event_id = event_id_of(record)
        identity = EVENT_ID.fullmatch(event_id or "")
        user_id, problem = None, ""
        try:
            event = tool.parse_event(record.value)
            if event_id is not None:
                _check_header(record, event["timestamp"], event_id, identity)
                user_id = event["user_id"]
                problem = self._place_problem(record, user_id)
            self.by_type[event["event_type"]] += 1
        except ValueError as error:
            problem = f"invalid: {error}"
            self.invalid += event_id is not None
            self.invalid_without_id += event_id is None
        self.without_id += event_id is None
        if identity and (order := self.runs[identity[1]].add(int(identity[2]), record, user_id)):
            problem = f"{problem}; {order}" if problem else order
        return problem

    def mark(self, record: Any) -> None:
        """Note that an event of a known run is there, up to the last one read; nothing is counted."""
        identity = EVENT_ID.fullmatch(event_id_of(record) or "")
        if identity and (run := self.runs.get(identity[1])) and int(identity[2]) <= run.last:
            run.mark(int(identity[2]), record)

    def missing(self) -> int:
        """How many sequences are missing in all runs."""
        return sum(_total(run.missing(self.cut)) for run in self.runs.values())

    def report(self) -> dict[str, Any]:
        """The document that --json prints."""
        runs = [{"run": name, **run.report(self.cut)} for name, run in self.runs.items()]
        misplaced = self._wrong_keys + sum(self._misplaced().values())
        faults = (run[fault] for run in runs for fault in ("missing", "repeated", "reordered"))
        return {
            "topic": self.topic,
            "events": self.events,
            "by_type": dict(sorted(self.by_type.items())),
            "without_id": self.without_id,
            "invalid": self.invalid,
            "misplaced": misplaced,
            "ok": not (self.invalid or misplaced or any(faults)),
            "runs": runs,
        }

    def enlarged_from(self) -> int | None:
        """A smaller number of partitions by which all that is misplaced is in its place."""
        counts = range(1, self.counts[-1]) if (strays := self._misplaced()) else ()
        return next((count for count in counts if all(key % count == place for key, place in strays)), None)

    def _place_problem(self, record: Any, user_id: int) -> str:
        if record.key != b"%d" % user_id:
            self._wrong_keys += 1
            return "misplaced: the key is not the user_id"
        key = key_hash(record.key)
        if key % self.counts[-1] == record.partition:
            return ""
        self._strays[key, record.partition] += 1  # judged at the end: the producer may know of new partitions first
        right = any(key % count == record.partition for count in self.counts)
        return "" if right else f"misplaced: the key's partition is {key % self.counts[-1]}"

    def _misplaced(self) -> dict[tuple[int, int], int]:
        return {
            (key, place): times
            for (key, place), times in self._strays.items()
            if all(key % count != place for count in self.counts)
        }


def _check_header(record: Any, timestamp: str, event_id: str, identity: re.Match[str] | None) -> None:
    if not identity:
        raise ValueError(f"the header event_id is {event_id!r}, not run:sequence")
    created = 1000 * _seconds(timestamp[:19]) + int(timestamp[20:23])
    if record.timestamp_type == CREATE_TIME and record.timestamp != created:
        raise ValueError(f"the record's time is {record.timestamp} ms, the event's {created} ms")


@functools.lru_cache(maxsize=64)
def _seconds(text: str) -> int:
    return int(datetime.fromisoformat(f"{text}+00:00").timestamp())


def _total(ranges: Ranges) -> int:
    return sum(last - first + 1 for first, last in ranges)


# -------------------------------------------------------------------------------------------------------- reading


class Reader:
    """Reads all partitions without a group, and follows the topic: new partitions, a new topic, outages."""

    def __init__(self, settings: ConsumerSettings, stop: Stop, audit: Audit) -> None:
        self._settings, self._stop, self._audit = settings, stop, audit
        self._topic = settings.kafka_topic
        self._consumer: Any = None
        self._cluster: Any = None  # the client's picture of the topic
        self._topic_id: object = None
        self._gone = False
        self._next_look = 0.0
        self._away_since: float | None = None
        self._trouble = tool.Trouble()

    def open(self) -> bool:
        """Connect, wait for the topic, go to the start. False when a stop is asked for. Raises GiveUp."""
        options = {"auto_offset_reset": "none", "enable_auto_commit": False, "isolation_level": "read_committed"}
        self._consumer = tool.connect(KafkaConsumer, self._settings, self._stop.over, **options)
        if self._consumer is None or not self._await_topic():
            return False
        self._consumer.assign(self._partitions)
        begins = self._offsets(self._consumer.beginning_offsets)
        self._seek(begins)
        self._audit.cut = {partition.partition: None for partition, offset in begins.items() if offset > 0}
        if self._settings.start == "latest":
            self._go_to_end()
        log.info("Reading topic %s, partitions %d, from %s on", self._topic, len(begins), self._settings.start)
        return not self._stop.requested

    def poll(self, most: int = BATCH) -> list[Any]:
        """The next records, at most so many; none after a tenth of a second. Raises GiveUp."""
        if (now := time.monotonic()) >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._follow_topic()
            self._watch_connections(now)
        try:
            batches = self._consumer.poll(timeout_ms=POLL_MS, max_records=min(most, BATCH))
            if self._recreated():  # read of the new topic, from where the old one was read to
                self._next_look = 0.0
                return []
            return [record for batch in batches.values() for record in batch]
        except LogTruncationError as error:
            offsets = {partition: place.offset for partition, place in error.divergent_offsets.items() if place}
            self._recover(dict.fromkeys(error.divergent_offsets, sys.maxsize) | offsets)
        except OffsetOutOfRangeError as error:
            self._recover(error.args[0])
        except KafkaError as error:
            self._complain(error)
        return []

    def ends(self) -> dict[Any, int]:
        """Where the partitions end now; nothing when Kafka does not say."""
        try:
            ends = self._consumer.end_offsets(self._partitions, timeout_ms=2000)
        except (KafkaError, KeyError):
            return {}
        # The embedded broker tells the end of its log wrong, the high watermark right.
        return {partition: max(end, self._consumer.highwater(partition) or 0) for partition, end in ends.items()}

    def reached(self, ends: dict[Any, int]) -> bool:
        return all(self._consumer.position(partition, timeout_ms=POLL_MS) >= end for partition, end in ends.items())

    def close(self) -> None:
        if self._consumer:
            self._consumer.close(autocommit=False, timeout_ms=1000)

    @property
    def _partitions(self) -> list[Any]:
        numbers = self._cluster.partitions_for_topic(self._topic) or ()
        return [TopicPartition(self._topic, number) for number in sorted(numbers)]

    def _await_topic(self) -> bool:
        self._cluster = self._consumer._client.cluster
        self._cluster.config["allow_auto_create_topics"] = False  # the client (3.0.12) does not pass it on
        asked = self._cluster.set_topics([self._topic])
        limit = min(self._settings.connect_timeout_seconds, self._settings.timeout_seconds or sys.maxsize)
        deadline = time.monotonic() + limit
        while not self._stop.requested and not self._partitions:
            if self._topic in self._cluster.unauthorized_topics:
                self._complain(AuthorizationError())
            if time.monotonic() >= deadline:
                raise GiveUp(f"topic {self._topic} does not exist after {limit:g} s: create it, or set KAFKA_TOPIC")
            if asked.is_done:
                self._trouble.say(f"Topic {self._topic} does not exist; waiting for it")
            time.sleep(0.05)
        self._topic_id = self._cluster.topic_id(self._topic)
        self._audit.counts.append(len(self._partitions))
        return not self._stop.requested

    def _offsets(self, ask: Callable[..., dict[Any, int]]) -> dict[Any, int]:
        """Beginning or end offsets, asked for until they come; none once a stop is asked for."""
        deadline = time.monotonic() + self._settings.connect_timeout_seconds
        while not self._stop.requested:
            try:
                return ask(self._partitions, timeout_ms=1000)
            except (KafkaError, KeyError) as error:
                if time.monotonic() >= deadline:
                    raise GiveUp(f"Kafka does not tell the offsets of topic {self._topic}: {error!r}") from None
                self._complain(error)
        return {}

    def _seek(self, offsets: dict[Any, int]) -> None:
        for partition, offset in offsets.items():
            self._consumer.seek(partition, offset)

    def _go_to_end(self) -> None:
        self._seek(self._offsets(self._consumer.end_offsets))
        deadline = time.monotonic() + CLOSING_SECONDS
        while any(self._consumer.highwater(partition) is None for partition in self._partitions):
            self.poll()
            if self._stop.requested or time.monotonic() > deadline:
                break
        self._seek(ends := self.ends())
        self._audit.cut = dict.fromkeys((partition.partition for partition in ends), time.time_ns() // 1_000_000)

    def _complain(self, error: Exception) -> None:
        if isinstance(error, AuthorizationError):
            raise GiveUp(f"not authorised for topic {self._topic}: grant this user Read and Describe") from None
        self._trouble.say(f"Reading topic {self._topic} fails: {error!r}. Trying again")
        time.sleep(POLL_MS / 1000)

    def _recreated(self) -> bool:
        return bool(self._partitions) and self._cluster.topic_id(self._topic) != self._topic_id

    def _follow_topic(self) -> None:
        partitions = self._partitions
        if not partitions:
            if not self._gone:
                log.warning("Topic %s is gone; waiting for it to come back", self._topic)
            self._gone = True
            return
        known, again = self._audit.counts[-1], self._recreated()
        if again:
            log.warning("Topic %s was deleted and created again: starting over at its beginning", self._topic)
        elif len(partitions) != known:
            log.info("Topic %s has %d partitions now", self._topic, len(partitions))
        elif self._gone:
            log.info("Topic %s is back", self._topic)
        if again or len(partitions) != known:
            self._consumer.assign(partitions)
            self._seek(dict.fromkeys(partitions[0 if again else known :], 0))
            self._audit.counts.append(len(partitions))
        self._topic_id, self._gone = self._cluster.topic_id(self._topic), False

    def _watch_connections(self, now: float) -> None:
        """The client says nothing while Kafka is away."""
        leaders = {self._cluster.leader_for_partition(partition) for partition in self._partitions}
        away = 0.0 if self._away_since is None else now - self._away_since
        if not all(map(self._consumer._client.connected, leaders)):
            self._away_since = now - away
            if away > AWAY_SECONDS:
                self._trouble.say("Kafka is away: a partition's leader is not reached. Reading goes on when it is back")
        elif self._away_since is not None:
            if away > AWAY_SECONDS:
                log.info("Kafka is back after %.1f s", away)
            self._away_since, self._trouble = None, tool.Trouble()

    def _recover(self, lost: dict[Any, int]) -> None:
        """Where we were to read on (partition -> offset) is not in the log any more."""
        refreshed = self._cluster.request_update()
        deadline = time.monotonic() + 2
        while not refreshed.is_done and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self._partitions or self._recreated():
            return  # a new topic: followed at the next look
        begins, ends = self._offsets(self._consumer.beginning_offsets), self.ends()
        for partition, offset in lost.items():
            begin = begins.get(partition, 0)
            what = "has lost records it had" if offset >= begin else f"now begins at {begin}: this was too slow"
            target = max(begin, min(offset, ends.get(partition, begin)))
            log.error("Partition %d %s. Reading goes on at offset %d", partition.partition, what, target)
            self._seek({partition: target})


def read(reader: Reader, audit: Audit, settings: ConsumerSettings, stop: Stop, show: bool) -> None:
    """Read until a stop, MAX_EVENTS or TIMEOUT_SECONDS."""
    most, patience = settings.max_events or sys.maxsize, settings.timeout_seconds or sys.maxsize
    news, told, told_at = time.monotonic(), 0, 0.0
    while not stop.requested and audit.events < most:
        records = reader.poll(most - audit.events)
        problems = [audit.add(record) for record in records]
        now = time.monotonic()
        if records and show:
            tool.show("\n".join(map(_line, records, problems)), stop)
        elif not show and audit.events != told and now - told_at >= TOTAL_SECONDS:
            log.info("Events read: %d", audit.events)
            told, told_at = audit.events, now
        news = now if records else news
        if now - news >= patience:
            break


def read_on(reader: Reader, audit: Audit) -> None:
    """Partitions are read up to different points: look on for what was merely not read yet, or is on its way."""
    if not (missing := audit.missing()):
        return
    log.info("Looking for %d events further on in the topic (Ctrl+C: end at once)", missing)
    ends, deadline = reader.ends(), time.monotonic() + CLOSING_SECONDS
    while audit.missing() and time.monotonic() < deadline:
        behind = not reader.reached(ends)
        for record in (records := reader.poll()):
            audit.mark(record)
        if behind and records:
            deadline = time.monotonic() + CLOSING_SECONDS


# --------------------------------------------------------------------------------------------------------- output


def _line(record: Any, problem: str) -> str:
    key, value = ("none" if part is None else part.decode(errors="replace") for part in (record.key, record.value))
    note = f"  <- {problem}" if problem else ""
    line = f"partition {record.partition}, offset {record.offset}, key {key}: {value}{note}"
    return line if line.isprintable() else ascii(line)[1:-1]


def summary(report: dict[str, Any], audit: Audit) -> str:
    """The audit for people."""
    runs = report["runs"]
    lines = [f"{report['events']} events read from topic {report['topic']}"]
    lines += [f"  {name if name.isprintable() else ascii(name)}: {count}" for name, count in report["by_type"].items()]
    if audit.without_id:
        lines.append(f"Without event_id: {audit.without_id}, {audit.invalid_without_id} of them invalid; not judged")
    lines += map(_run_line, runs)
    if count := audit.enlarged_from():
        lines.append(f"What is misplaced is right for {count} partitions: was the topic enlarged since?")
    faults = {"missing": sum(_total(run["missing"]) for run in runs)}
    faults |= {name: sum(run[name] for run in runs) for name in ("repeated", "reordered")}
    faults |= {name: report[name] for name in ("misplaced", "invalid")}
    counts = ", ".join(f"{name} {count}" for name, count in faults.items())
    return "\n".join([*lines, f"{'OK' if report['ok'] else 'NOT OK'}: {counts}"])


def _run_line(run: dict[str, Any]) -> str:
    missing = f" ({tool.format_ranges(run['missing'])})" if run["missing"] else ""
    cut = f"; judged from {bound} on, the topic does not go back further" if (bound := run["truncated_before"]) else ""
    return (
        f"Run {run['run']}: {run['events']} events, sequences {run['first']} to {run['last']}, missing "
        f"{_total(run['missing'])}{missing}, repeated {run['repeated']}, reordered {run['reordered']}{cut}"
    )


def audit_topic(settings: ConsumerSettings, stop: Stop) -> int:
    as_json = "--json" in sys.argv[1:]
    audit = Audit(settings.kafka_topic)
    reader = Reader(settings, stop, audit)
    gave_up = False
    try:
        if reader.open():
            read(reader, audit, settings, stop, show=not as_json)
            read_on(reader, audit)
    except GiveUp as reason:
        if not audit.events:
            raise
        log.error("%s", reason)
        gave_up = True
    finally:
        reader.close()
    report = audit.report()
    tool.show(orjson.dumps(report).decode() if as_json else summary(report, audit), stop)
    return int(gave_up or not report["ok"] or audit.events < (settings.max_events or 0))


if __name__ == "__main__":
    raise SystemExit(tool.run_script(str(__doc__), ConsumerSettings, audit_topic, ["--json"]))
