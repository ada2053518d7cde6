#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "kafka-python[crc32c]==3.0.12",
#   "pydantic==2.14.4",
#   "python-dotenv==1.2.4",
#   "orjson==3.13.0",
#   "prometheus-client==0.26.0",
#   "tqdm==4.70.1",
#   "python-snappy==0.7.3",
#   "lz4==4.4.5",
#   "zstandard==0.25.0",
#   "fastjsonschema==2.22.3",
#   "pyroaring==1.2.0",
# ]
# ///
from __future__ import annotations

__doc__ = """Read the topic, show every event, and say what is missing, repeated, reordered, misplaced or invalid.

It reads without a consumer group and leaves nothing on the broker. It ends at Ctrl+C, after MAX_EVENTS, or after
TIMEOUT_SECONDS without a new event. Faults that are marked as made on purpose (docs/faults.md) are not errors; VERDICTS
scores the faults that a consumer has found. Exit code 0: all is well; 1: it is not, something could not be judged, or
fewer than MAX_EVENTS came; 2: the settings are wrong.
"""

# In the order of a record: settings -> reading -> the event -> audit -> the report.

import functools
import itertools
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

try:
    import fastjsonschema
    from pyroaring import BitMap64
except ImportError as missing:
    print(f"{missing}. Install the packages: pip install -r requirements.txt, or start with uv run", file=sys.stderr)
    raise SystemExit(2) from None

sys.path[:0] = [os.path.dirname(os.path.realpath(__file__))]  # which `python -I` leaves out

import random_event_producer as tool
from random_event_producer import GiveUp, Stop, key_hash, log, setting

import orjson
from kafka import KafkaConsumer, TopicPartition, errors
from kafka.admin import ConfigResource, KafkaAdminClient
from kafka.consumer.fetcher import Fetcher
from kafka.errors import KafkaError
from pydantic import BeforeValidator, Field

BATCH = 1000  # records between two looks at signals
POLL_MS = 100
READY_SECONDS = 3.0  # for each partition to have a leader; then the others are read
LOOK_SECONDS = 0.2  # between two looks at the topic and the connections
AWAY_SECONDS = 1.0  # without a connection: Kafka counts as away
SILENT_SECONDS = 1.0  # without a record: a partition that has more is not read on for a reason
ANSWER_MS = 10_000  # for Kafka to answer a question about the topic
READ_TRIES = 5  # of what cannot be unpacked, and may have come to harm on its way
TOTAL_SECONDS = 3.0  # between two lines about how many were read
CLOSING_SECONDS = 3.0  # at the end, for events that are still on their way
CREATE_TIME = 0  # a record's timestamp_type when the producer has set its time
UNKNOWN_POLICY = (
    "Kafka does not tell if the topic is compacted, which would explain what is missing: grant DescribeConfigs"
)
COMPACTED = "the topic is compacted, which removes all but the last event of a user: what is missing is not judged"

Ranges = list[tuple[int, int]]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Start = Annotated[Literal["earliest", "latest"], tool.Lower]
Verdicts = defaultdict[str, Counter[str]]  # kind of fault -> event ids
VerdictsFile = Annotated[Any, BeforeValidator(lambda path: read_verdicts(Path(path)))]


class ConsumerSettings(tool.Settings):
    connect_timeout_seconds: Seconds = setting(30, "seconds to wait for Kafka", "a number above 0")
    timeout_seconds: Seconds | None = setting(
        None, "stop this many seconds after the last new event; none: go on", "a number above 0"
    )
    start: Start = setting("earliest", "where in the topic to begin", "earliest or latest")
    verdicts: VerdictsFile | None = setting(
        None,
        "score the faults that a consumer has found",
        "a file with lines `event_id,fault`, or with such JSON objects",
    )
    late_seconds: float = setting(
        0, "a late event must be found if it is later than this", "0 or more", ge=0, allow_inf_nan=False
    )


# ------------------------------------------------------------------------------------- kafka-python, repaired
# What reaches into the consumer's private parts (3.0.12); the tool has a section of this name for the connections.


class UnreadableError(Exception):
    """What the broker has sent of a partition, from offset `first` to before `end`, cannot be unpacked."""

    def __init__(self, partition: TopicPartition, first: int, end: int, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.partition, self.first, self.end = partition, first, end


class _Batches:
    """The batches of an answer, and the one that was unpacked last."""

    def __init__(self, records: Any) -> None:
        self.last: Any = None
        self._records = records

    def next_batch(self) -> Any:
        self.last = self._records.next_batch()
        return self.last


class _PartitionRecords(Fetcher.PartitionRecords):
    def _unpack_records(self, partition: TopicPartition, records: Any, *deserializers: Any) -> Iterator[Any]:
        """An exception left a dead iterator behind, which poll() asked again and again, deaf to every signal."""
        batches = _Batches(records)
        try:
            yield from super()._unpack_records(partition, batches, *deserializers)
        except Exception as error:
            self.drain()
            first = max(self.fetch_offset, self.next_fetch_offset)
            end = max(first + 1, getattr(batches.last, "next_offset", 0))  # a batch that cannot be told has none
            raise UnreadableError(partition, first, end, error) from error


class Consumer(KafkaConsumer):
    """A consumer without a group that knows how far each partition is read, and what holds it up."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._fetcher.PartitionRecords = _PartitionRecords
        self._parse, self._fetcher._parse_fetched_data = self._fetcher._parse_fetched_data, self._noting_stable_end
        self._stable_ends: dict[TopicPartition, int] = {}

    def _noting_stable_end(self, answer: Any) -> Any:
        """An answer says where the first open transaction begins (-1: nothing); the client did not keep that."""
        self._stable_ends[answer.topic_partition] = answer.partition_data.last_stable_offset
        return self._parse(answer)

    def positions(self) -> dict[TopicPartition, int]:
        """Where each partition is read to; position() asks the broker, and waits for it."""
        assigned = dict(self._subscription.assignment)
        return {partition: state.position.offset for partition, state in assigned.items() if state.position}

    def ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends, as the last answer said; where none has come yet, for ever further on."""
        known = {partition: self.highwater(partition) for partition in self.positions()}
        return {partition: sys.maxsize if end is None else end for partition, end in known.items()}

    def behind(self) -> dict[TopicPartition, int]:
        """The partitions not read to their end, and where they are read to."""
        ends = self.ends()
        return {partition: offset for partition, offset in self.positions().items() if offset < ends[partition]}

    def held_up(self) -> dict[TopicPartition, int]:
        """Those behind, read to where an open transaction begins: nothing more is handed out."""
        stable = self._stable_ends
        return {at: offset for at, offset in self.behind().items() if 0 <= stable.get(at, -1) <= offset}


# ------------------------------------------------------------------------------------------------------- reading


class Reader:
    """Reads all partitions without a group, and follows the topic: new partitions, a new topic, outages."""

    def __init__(self, settings: ConsumerSettings, stop: Stop, audit: Audit) -> None:
        self._settings, self._stop, self._audit = settings, stop, audit
        self._topic, self._began = settings.kafka_topic, time.monotonic()
        self._network = tool.Network(settings, writes=False)
        self.consumer = Consumer(
            **tool.client_options(settings, self._network),
            auto_offset_reset="none",
            enable_auto_commit=False,
            isolation_level="read_committed",
        )
        self._cluster = self._network.cluster  # the client's picture of it; asks nobody
        self._unreadable: Counter[tuple[TopicPartition, int]] = Counter()  # partition and offset -> tries
        self._begins: dict[TopicPartition, int] = {}
        self._leaderless: list[TopicPartition] = []
        self._question: tool.Question | None = None  # where the partitions begin
        self._read_to: dict[TopicPartition, int] = {}  # what was handed out, up to before there
        self._left_at: dict[object, dict[TopicPartition, int]] = {}  # the same of topics that were left for another
        self._identity: object = None  # of the topic that is read
        self._gone = False
        self._next_look = self._news_at = 0.0
        self._throttled_at = -math.inf
        self._away_since: float | None = None

    def open(self) -> bool:
        """Wait for Kafka and the topic, go to the start. False when a stop is asked for. Raises GiveUp."""
        self._cluster.set_topics([self._topic])
        if not tool.await_topic(self._ready, self._network, self._settings, self._stop.asked, self._began):
            return False
        self._identity = self._identity_now()
        self._audit.counts.append(len(self._begins))
        self.consumer.assign(list(self._begins))
        self._seek(self._begins)
        self._audit.cut = {partition.partition: None for partition, offset in self._begins.items() if offset > 0}
        if self._settings.start == "latest":
            self._go_to_end()
        log.info("Reading topic %s, partitions %d, from %s on", self._topic, len(self._begins), self._settings.start)
        return not self._stop.requested

    def poll(self, most: int = BATCH) -> list[Any]:
        """The next records, at most so many; none after a tenth of a second. Raises GiveUp."""
        lost: dict[TopicPartition, int] = {}
        try:
            if (now := time.monotonic()) >= self._next_look:
                self._next_look = now + LOOK_SECONDS
                self._follow_topic()
                self._watch_connections(now)
            batches = self.consumer.poll(timeout_ms=POLL_MS, max_records=min(most, BATCH))
            if batches and not self._recreated():
                self._news_at = now
                self._read_to |= {partition: records[-1].offset + 1 for partition, records in batches.items()}
                return [record for batch in batches.values() for record in batch]
            if batches:  # read of the new topic, from where the old one was read to
                self._next_look = 0.0
        except errors.LogTruncationError as error:
            lost = {partition: at.offset if at else sys.maxsize for partition, at in error.divergent_offsets.items()}
        except errors.OffsetOutOfRangeError as error:
            lost = error.args[0]
        except UnreadableError as error:
            self._read_again(error)
        except KafkaError as error:
            self._complain(error)
        if lost:
            self._recover(lost)
        return []

    def reached(self, ends: dict[TopicPartition, int]) -> bool:
        """Whether the partitions are read so far, but for those of which Kafka hands out no more."""
        positions, held = self.consumer.positions(), self.consumer.held_up()
        return all(positions.get(partition, end) >= end or partition in held for partition, end in ends.items())

    def unsettled(self) -> bool:
        """Whether a transaction is open somewhere, or a partition has not been heard of yet."""
        return bool(self.consumer.held_up()) or sys.maxsize in self.consumer.ends().values()

    def throttled(self) -> bool:
        """Whether a quota slows the reading down, with pauses in between."""
        return time.monotonic() - self._throttled_at < CLOSING_SECONDS

    def unread(self) -> dict[int, str]:
        """The partitions that were not read to their end, though they could have been, and why."""
        away = self._unreached() if self._away_since is not None else set()
        cause = self._network.leaderless(away) or self._network.recent_cause() or "it is not connected"
        why = dict.fromkeys(away, f"its leader is not reached ({cause})")
        silent = time.monotonic() - self._news_at >= SILENT_SECONDS  # else there was no time to read on
        held = self.consumer.held_up()
        for partition in held | (self.consumer.behind() if silent or self.throttled() else {}):
            quota = "a quota slows this client down" if self.throttled() else ""
            slow = quota or self._network.slow() or "the broker hands out no more"
            what = "a transaction of another producer is open there" if partition in held else slow
            why.setdefault(partition.partition, what)
        positions = {partition.partition: offset for partition, offset in self.consumer.positions().items()}
        return {
            number: f"partition {number} is judged up to offset {positions.get(number, 0)} only: {reason}"
            for number, reason in sorted(why.items())
        }

    def close(self) -> None:
        self.consumer.close(autocommit=False, timeout_ms=1000)

    # -- the topic, as the client knows it

    def _partitions(self) -> list[TopicPartition]:
        """In order; none while the topic is not known. Raises TopicAuthorizationFailedError."""
        if self._topic in self._cluster.unauthorized_topics:
            raise errors.TopicAuthorizationFailedError(self._topic)
        numbers = self._cluster.partitions_for_topic(self._topic) or ()
        return [TopicPartition(self._topic, number) for number in sorted(numbers)]

    def _identity_now(self) -> tuple[object, object]:
        """The ids of cluster and topic: another one is another topic, whatever its name (None before Kafka 2.8)."""
        return self._cluster.cluster_id, self._cluster.topic_id(self._topic)

    def _unreached(self) -> set[int]:
        """The partitions without a connection to their leader."""
        return self._network.unreached(self._cluster.partitions_for_topic(self._topic) or ())

    # --

    def _ready(self) -> bool:
        """The topic is there, and the leaders of its partitions say where they begin."""
        try:
            partitions = self._partitions()
        except errors.AuthorizationError as error:
            self._complain(error)
        if partitions:
            return self._ask_where_they_begin(partitions)
        if self._cluster.brokers():  # a broker has said what there is
            limit = min(self._settings.connect_timeout_seconds, self._settings.timeout_seconds or sys.maxsize)
            if time.monotonic() >= self._began + limit:
                raise GiveUp(f"topic {self._topic} does not exist after {limit:g} s: create it, or set KAFKA_TOPIC")
            log.warning("%s", self._network.topic_does_not_exist())
        return False

    def _ask_where_they_begin(self, partitions: list[TopicPartition]) -> bool:
        """A partition without a leader is waited for for a moment; then it is read if it gets one."""
        led = [at for at in partitions if self._cluster.leader_for_partition(at) not in (None, -1)]
        self._leaderless = [at for at in partitions if at not in led]
        if self._leaderless and time.monotonic() < self._began + READY_SECONDS:
            return False
        if self._question is None:
            timeout = 1000 * tool.REQUEST_SECONDS
            self._question = tool.Question(lambda: self.consumer.beginning_offsets(led, timeout_ms=timeout))
        if not self._question.answered:
            return False
        try:
            self._begins = {**dict.fromkeys(partitions, 0), **self._question.wait(self._stop.asked)}
            return True
        except errors.AuthorizationError as error:
            self._complain(error)
        except (KafkaError, KeyError):  # the topic has changed in between
            self._question = None
        return False

    def _go_to_end(self) -> None:
        """By the high watermarks: the embedded broker tells the end offsets wrong."""
        deadline = time.monotonic() + self._settings.connect_timeout_seconds
        while None in (ends := {partition: self.consumer.highwater(partition) for partition in self._begins}).values():
            self.poll()
            if self._stop.requested:
                return
            if time.monotonic() >= deadline:
                cause = self._network.recent_cause() or "the leader of a partition does not answer"
                raise GiveUp(f"Kafka does not tell where topic {self._topic} ends: {cause}")
        self._seek(ends)
        self._audit.cut = dict.fromkeys((partition.partition for partition in ends), time.time_ns() // 1_000_000)

    def _seek(self, offsets: dict[TopicPartition, int]) -> None:
        for partition, offset in offsets.items():
            self.consumer.seek(partition, offset)

    def _complain(self, error: Exception) -> None:
        if isinstance(error, errors.AuthorizationError):
            raise GiveUp(f"not authorised for topic {self._topic}: grant this user Read and Describe") from None
        log.warning("Reading topic %s fails: %r. Trying again", self._topic, error)
        time.sleep(POLL_MS / 1000)

    def _recreated(self) -> bool:
        return bool(self._partitions()) and self._identity_now() != self._identity

    def _follow_topic(self) -> None:
        partitions = self._partitions()
        if not partitions:
            if not self._gone:
                log.warning("Topic %s is gone; waiting for it to come back", self._topic)
            self._gone = True
            return
        known = self._audit.counts[-1]
        again = self._recreated() or len(partitions) < known
        if again:
            self._left_at[self._identity] = self._read_to
            self._read_to = self._left_at.get(self._identity_now(), {})
            where = "where it was read to" if self._read_to else "its beginning"
            log.warning("Topic %s is another one, or was made again: reading on at %s", self._topic, where)
        elif len(partitions) != known:
            log.info("Topic %s has %d partitions now", self._topic, len(partitions))
        elif self._gone:
            log.info("Topic %s is back", self._topic)
        if again or len(partitions) != known:
            self.consumer.assign(partitions)
            self._seek(
                {partition: self._read_to.get(partition, 0) for partition in partitions[0 if again else known :]}
            )
            self._audit.counts.append(len(partitions))
        self._identity, self._gone = self._identity_now(), False

    def _watch_connections(self, now: float) -> None:
        """The client says nothing while Kafka is away."""
        away = 0.0 if self._away_since is None else now - self._away_since
        if unreached := self._unreached():
            self._away_since = now - away
            if away > AWAY_SECONDS:
                leaderless = self._network.leaderless(unreached)
                cause = leaderless or self._network.recent_cause() or "a partition's leader is not reached"
                what = f"Some of topic {self._topic} cannot be read" if leaderless else "Kafka is away"
                log.warning("%s: %s. Reading goes on when it is back", what, cause)
        elif self._away_since is not None:
            if away > AWAY_SECONDS:
                log.info("Kafka is back after %.1f s", away)
            self._away_since = None
        elif slow := self._network.slow():
            log.warning("Reading is slow: %s", slow)
        if self._network.throttled():
            self._throttled_at = now

    def _read_again(self, error: UnreadableError) -> None:
        """What cannot be unpacked is read again, and after some tries stepped over."""
        place = error.partition, error.first
        self._unreadable[place] += 1
        if self._unreadable[place] < READ_TRIES:
            return
        self._unreadable.clear()
        end = min(error.end, max(error.first + 1, self.consumer.highwater(error.partition) or error.end))
        self._seek({error.partition: end})
        self._audit.note_unreadable(error.partition.partition, error.first, end - 1, str(error))

    def _recover(self, lost: dict[TopicPartition, int]) -> None:
        """Where we were to read on (partition -> offset) is not in the log any more."""
        asked, deadline = self._cluster.request_update(), time.monotonic() + ANSWER_MS / 1000
        while not asked.is_done and time.monotonic() < deadline:
            time.sleep(0.01)
        partitions = self._partitions()
        if not partitions or self._recreated():
            return  # a new topic: followed at the next look
        asks = (self.consumer.beginning_offsets, self.consumer.end_offsets)
        question = tool.Question(lambda: [ask(partitions, timeout_ms=ANSWER_MS) for ask in asks])
        try:
            begins, ends = question.wait(self._stop.asked) or ({}, {})
        except (KafkaError, KeyError) as error:  # the next poll finds it again
            self._complain(error)
            return
        if not begins:
            return
        for partition, offset in lost.items():
            begin, position = begins[partition], self.consumer.positions().get(partition, 0)
            target = max(begin, min(offset, ends[partition]))
            if partition in self._leaderless and position == 0:  # it was not there to say where it begins
                self._audit.cut[partition.partition] = None
            elif begin <= position <= target:  # it is there: this was about the topic before, or about nothing certain
                target = position
            else:
                what = "has lost records it had" if offset >= begin else f"now begins at {begin}: this was too slow"
                log.error("Partition %d %s. Reading goes on at offset %d", partition.partition, what, target)
            self._seek({partition: target})


# ----------------------------------------------------------------------------------------------------- the event

EVENT_ID = re.compile(r"([0-9a-f]{16}):([1-9][0-9]{0,17})")
DECIMALS = {"quantity": 0, "price": 2, "session_length": 1, "view_duration": 1}


def _validator(event: dict[str, Any]) -> Callable[[Any], Any]:
    """For one branch of the schema, which says what is wrong where the whole says that no branch fits.

    It is chosen by the event's type, which is not compared again: a `not` would cost as much as half of the rest.
    """
    fields = {**event["properties"], "event_type": {"type": "string", "minLength": 1}}
    validator: Callable[[Any], Any] = fastjsonschema.compile({**event, "properties": fields})
    return validator


_VALIDATORS = {  # by event type; None: of any other
    event["properties"]["event_type"].get("const"): _validator(event) for event in tool.SCHEMA["definitions"].values()
}


def parse_event(value: bytes | None) -> dict[str, Any]:
    """The event in a record's value. Raises ValueError that says which field is not as described."""
    try:
        event: dict[str, Any] = orjson.loads(value or b"")
        event_type = event.get("event_type") if isinstance(event, dict) else None
        _VALIDATORS.get(str(event_type), _VALIDATORS[None])(event)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except fastjsonschema.JsonSchemaValueException as error:
        raise ValueError(_in_words(error)) from None
    _check_numbers(event)
    try:
        _seconds(event["timestamp"][:19])
    except ValueError as error:
        raise ValueError(f"timestamp: {error}") from None
    return event


def _in_words(error: fastjsonschema.JsonSchemaValueException) -> str:
    """`metadata.price: must be number`"""
    path, rule, definition, given = error.path[1:], error.rule, error.definition, error.value
    message = error.message.removeprefix(str(error.name)).strip()
    if rule == "required":
        path.append(next(name for name in definition["required"] if name not in given))
        message = "is missing"
    elif rule == "additionalProperties":
        path.append(next(name for name in given if name not in definition["properties"]))
        message = "is not part of such an event"
    elif rule == "maxLength":
        message = f"must match pattern {definition['pattern']}"
    return f"{'.'.join(path) or 'event'}: {message}"


def _check_numbers(event: dict[str, Any]) -> None:
    """What a schema cannot say, or says in floats: 1.0 is an integer to it, and 237.0 no multiple of 0.1."""
    if type(event["user_id"]) is not int:
        raise ValueError("user_id: must be a whole number")
    if event["event_type"] not in tool.METADATA:
        return
    for name, value in event["metadata"].items():
        places = DECIMALS.get(name)
        if places == 0 and type(value) is not int:
            raise ValueError(f"metadata.{name}: must be a whole number")
        if places and round(value, places) != value:
            raise ValueError(f"metadata.{name}: more than {places} decimals")


@functools.lru_cache(maxsize=64)
def _seconds(text: str) -> int:
    """Since 1970, of a time without fraction. Raises ValueError for a day that does not exist."""
    return int(datetime.fromisoformat(f"{text}+00:00").timestamp())


def event_id_of(record: Any) -> str | None:
    """The `run:sequence` that a record carries, None without the header."""
    for name, value in record.headers:
        if name == "event_id" and value is not None:
            return bytes(value).decode(errors="replace")
    return None


def _milliseconds(timestamp: str) -> int:
    return 1000 * _seconds(timestamp[:19]) + int(timestamp[20:23])


def _check_header(record: Any, timestamp: str, event_id: str, identity: re.Match[str] | None) -> None:
    if not identity:
        raise ValueError(f"the header event_id is {event_id!r}, not run:sequence")
    created = _milliseconds(timestamp)
    if record.timestamp_type == CREATE_TIME and record.timestamp != created:
        raise ValueError(f"the record's time is {record.timestamp} ms, the event's {created} ms")


# --------------------------------------------------------------------------------------------------------- audit


def gaps(sequences: BitMap64, first: int, last: int) -> Ranges:
    """Closed ranges of what is not there between two sequences."""
    begins, ends = sequences - sequences.shift(1), sequences - sequences.shift(-1)  # of what is there without a gap
    between = zip(itertools.chain([0], ends), itertools.chain(begins, [last + 1]), strict=True)
    ranges = ((max(end + 1, first), min(begin - 1, last)) for end, begin in between)
    return [(low, high) for low, high in ranges if low <= high]


class Run:
    """What was read of one start of the producer."""

    def __init__(self) -> None:
        self.first, self.last = sys.maxsize, 0
        self.events = self.repeated = self.reordered = 0
        self.faults = Faults(self)
        self._sequences = BitMap64()
        self._began: int | None = None  # the time of sequence 1, in ms
        self._firsts: dict[int, int] = {}  # partition -> the first sequence there
        self._lasts: dict[int, tuple[int, int]] = {}  # partition -> sequence and time (ms) of the last event there
        self._latest: dict[tuple[int, int], int] = {}  # partition and user -> the latest sequence

    def add(self, sequence: int, record: Any, user_id: int | None, excused: bool = False) -> str:
        """Take in an event; "", "repeated" or "reordered". `excused`: it is late or repeated on purpose."""
        self.events += 1
        if sequence > self.last:
            self.last = sequence
        if sequence < self.first:
            self.first = sequence
        if not self.mark(sequence, record, not excused) and not excused:
            self.repeated += 1
            return "repeated"
        if user_id is None or excused:
            return ""
        place = record.partition, user_id
        if sequence < self._latest.get(place, 0):
            self.reordered += 1
            return "reordered"
        self._latest[place] = sequence
        return ""

    def mark(self, sequence: int, record: Any, in_place: bool = True) -> bool:
        """Note that a sequence is there; False when it was known. `in_place`: it tells where its partition begins."""
        if in_place:
            self._firsts.setdefault(record.partition, sequence)
            self._lasts[record.partition] = sequence, record.timestamp
        if sequence == 1:
            self._began = record.timestamp
        try:
            self._sequences.add_checked(sequence)
        except KeyError:
            return False
        return True

    def judged(self, cut: dict[int, int | None], held: Iterable[int]) -> tuple[int, int]:
        """The first and the last of the sequences that must be there (see Audit.cut and Audit.held)."""
        bounds = [
            min(self._firsts.get(partition, sys.maxsize), self.last + 1)
            for partition, since in cut.items()
            if since is None or self._began is None or since >= self._began
        ]
        return max([1, *bounds]), min([self.last, *(self._lasts.get(partition, (0, 0))[0] for partition in held)])

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def latest(self, partition: int) -> int:
        """The time (ms) of the last event there that is in its place."""
        return self._lasts.get(partition, (0, 0))[1]

    def _accounted(self) -> BitMap64:
        """What is there, and what was dropped on purpose."""
        return self._sequences | self.faults.dropped if self.faults.dropped else self._sequences

    def dropped(self) -> BitMap64:
        """On purpose: marked, and not there."""
        return self.faults.dropped - self._sequences

    def absent(self, partitions: Iterable[int]) -> list[int]:
        """Those of the partitions that hold nothing of this run."""
        return [partition for partition in partitions if partition not in self._firsts]

    def count_missing(self, first: int, last: int) -> int:
        return last - first + 1 - self._accounted().range_cardinality(first, last + 1) if first <= last else 0

    def missing(self, first: int, last: int) -> Ranges:
        return gaps(self._accounted(), first, last) if self.count_missing(first, last) else []

    def holed(self) -> bool:
        """Whether anything is not there between the first and the last one read."""
        return self.count_missing(self.first, self.last) > 0


def _partitions(numbers: Iterable[int]) -> str:
    """`partition 3`, `partitions 1, 3`"""
    texts = [str(number) for number in sorted(numbers)]
    return f"partition{'s' * (len(texts) > 1)} {', '.join(texts)}"


class Audit:
    """Judges records in the order they are read. Its memory grows with runs and gaps, not with events."""

    def __init__(self, topic: str, score: Score | None = None) -> None:
        self.topic = topic
        self.events = self.without_id = self.invalid = self.invalid_without_id = 0
        self.by_type: Counter[str] = Counter()
        self.runs: defaultdict[str, Run] = defaultdict(Run)
        self.counts: list[int] = []  # numbers of partitions the topic has had while it was read
        # Partitions that lack their beginning -> the time in ms from which on they are there; None: not known yet.
        self.cut: dict[int, int | None] = {}
        self.held: dict[int, str] = {}  # partitions that could not be read to their end, and why
        self.compacted = False
        self.notes: list[str] = []  # on what was left out of judgement
        self.score = score
        self._wrong_keys = 0
        self._strays: Counter[tuple[int, int]] = Counter()  # (hash of the key, partition)

    def add(self, record: Any) -> str:
        """Take in a record; what is not as it should be, "" when all is."""
        self.events += 1
        if self.cut.get(record.partition, 0) is None and record.timestamp >= 0:
            self.cut[record.partition] = record.timestamp
        event_id = event_id_of(record)
        identity = EVENT_ID.fullmatch(event_id or "")
        fault, kind, said, event, problem, order = NO_FAULT, "", "", None, "", ""
        if len(record.headers) > 1 and identity and (marks := marks_of(record)):
            fault, said = self.runs[identity[1]].faults.judge(record, int(identity[2]), marks, self.cut)
            kind = fault.kind
        try:
            if kind == "malformed":
                problem = self._place_problem(record, None)
            else:
                event = parse_event(record.value)
                if event_id is not None:
                    _check_header(record, event["timestamp"], event_id, identity)
                    problem = self._place_problem(record, None if kind == "misplaced" else event["user_id"])
                self.by_type[event["event_type"]] += 1
        except ValueError as error:
            event, problem = None, f"invalid: {error}"
            self.invalid += event_id is not None
            self.invalid_without_id += event_id is None
        self.without_id += event_id is None
        if kind == "future":
            record = record._replace(timestamp=record.timestamp - _ahead(fault, record))
        if identity:
            user_id = event["user_id"] if event else None
            order = self.runs[identity[1]].add(int(identity[2]), record, user_id, kind in OUT_OF_PLACE)
        if self.score and (kind or not (problem or order)):
            self.score.add(record.partition, event_id or "", event, fault)
        return "; ".join(filter(None, (said, problem, order))) if said or problem or order else ""

    def mark(self, record: Any) -> None:
        """Note that an event of a known run is there, up to the last one read; nothing is counted."""
        identity = EVENT_ID.fullmatch(event_id_of(record) or "")
        if identity and (run := self.runs.get(identity[1])):
            marks = marks_of(record)
            run.faults.read_on(marks)
            if int(identity[2]) <= run.last:
                run.mark(int(identity[2]), record, all(mark.kind not in OUT_OF_PLACE for mark in marks))

    def note_unreadable(self, partition: int, first: int, last: int, cause: str) -> None:
        place = f"offset {first}" if first == last else f"offsets {first} to {last}"
        self.notes.append(f"partition {partition}, {place}: cannot be read ({cause})")
        log.error("Records skipped: %s. Reading continues after them", self.notes[-1])

    def missing(self) -> int:
        """How many sequences are missing in all runs."""
        if self.compacted:
            return 0
        return sum(run.count_missing(*run.judged(self.cut, self.held)) for run in self.runs.values())

    def sought(self) -> int:
        """How many records would make the audit complete: missing events, and lost faults."""
        lost = (last - first + 1 for run in self.runs.values() for first, last in self._lost_faults(run) or ())
        return self.missing() + sum(lost)

    def report(self) -> dict[str, Any]:
        """The document that --json prints."""
        runs = [self._run_report(name, run) for name, run in self.runs.items()]
        misplaced = self._wrong_keys + sum(self._misplaced().values())
        mismarked = sum(run.faults.mismarked(self.compacted) for run in self.runs.values())
        dropped = (f"{name}:{sequence}" for name, run in self.runs.items() for sequence in run.dropped())
        faults = (run.get(fault) for run in runs for fault in ("missing", "repeated", "reordered", "lost_faults"))
        unjudged = [*self.notes, *self.held.values(), *self._excused()]
        if not (self.runs or unjudged):
            unjudged = ["no event of a run (with an event_id) was read, so nothing was judged"]
        return {
            "topic": self.topic,
            "events": self.events,
            "by_type": dict(sorted(self.by_type.items())),
            "without_id": self.without_id,
            "invalid": self.invalid,
            "misplaced": misplaced,
            "ok": not (self.invalid or misplaced or mismarked or any(faults) or unjudged),
            "notes": [COMPACTED] * self.compacted + unjudged,
            "runs": runs,
            **({"mismarked": mismarked} if mismarked or any("faults" in run for run in runs) else {}),
            **({"scores": self.score.report(dropped)} if self.score else {}),
        }

    def enlarged_from(self) -> int | None:
        """A smaller number of partitions by which all that is misplaced is in its place."""
        counts = range(1, self.counts[-1]) if (strays := self._misplaced()) else ()
        return next((count for count in counts if all(key % count == place for key, place in strays)), None)

    def _run_report(self, name: str, run: Run) -> dict[str, Any]:
        first, last = run.judged(self.cut, self.held)
        return {
            "run": name,
            "first": run.first,
            "last": run.last,
            "events": run.events,
            "missing": None if self.compacted else run.missing(first, last),
            "repeated": run.repeated,
            "reordered": run.reordered,
            "truncated_before": first if first > 1 and not self.compacted else None,
            **({"faults": run.faults.made(), "lost_faults": self._lost_faults(run)} if run.faults.marked else {}),
        }

    def _lost_faults(self, run: Run) -> Ranges | None:
        """Their numbers; None where a beginning or an end is missing, too."""
        if self.compacted or self.held or run.judged(self.cut, ())[0] > 1:
            return None
        numbers = run.faults.numbers
        return gaps(numbers, 1, numbers.max()) if numbers else []

    def _excused(self) -> Iterator[str]:
        """Where deletion, or the start of the audit, has left nothing to judge by."""
        if not self.events and None in self.cut.values():
            yield f"nothing was read: all records of {_partitions(self.cut)} are deleted"
        for name, run in self.runs.items():
            if not self.compacted and run.holed() and run.judged(self.cut, ())[0] > run.last:
                where = _partitions(run.absent(self.cut))
                yield f"run {name} has gaps that cannot be judged: it has no event in {where}, not read from the start"

    def _place_problem(self, record: Any, user_id: int | None) -> str:
        """`user_id`: whose key it must have; None: anybody's."""
        if user_id is not None and record.key != b"%d" % user_id:
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


# ---------------------------------------------------------------------------------------- faults made on purpose
# random_faulty_producer.py says in a record's header `fault` what was done to it (docs/faults.md). A mark that is right
# excuses one thing; whatever else is wrong counts as always.

KINDS = ("late", "duplicate", "dropped", "misplaced", "future", "malformed")
OUT_OF_PLACE = ("late", "duplicate")  # such records do not tell where their run begins or ends in a partition
MARK = re.compile(
    r"([1-9][0-9]{0,17}):((?:late|duplicate|dropped|misplaced|future):[1-9][0-9]{0,17}|malformed:[a-z_]+)"
)
MISSING_FIELD = {f"{name}: is missing" for name in ("user_id", "event_type", "timestamp", "metadata")}
TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"?')  # in JSON; the last one may be cut off
MENDED = {  # how a value is malformed -> what to replace, and by what, to make it valid
    "encoding": (rb'^({"user_id":\d+,"event_type":")\xff', rb"\1"),
    "wrong_type": (rb'^{"user_id":"(\d+)"', rb'{"user_id":\1'),
    "extra_field": (rb',"extra":true}$', b"}"),
    "unknown_type": (rb'^({"user_id":\d+,"event_type":")unknown"', rb'\1known"'),
}
SET_BACK_MS = 500  # by which a clock may be set back


class Mark(NamedTuple):
    number: int  # 0: it cannot be read
    kind: str
    detail: str


NO_FAULT = Mark(0, "", "")


def marks_of(record: Any) -> list[Mark]:
    """Its own, if it has one, and those of the events that were dropped before it."""
    texts = (bytes(value or b"").decode(errors="replace") for name, value in record.headers if name == "fault")
    found = ((MARK.fullmatch(text), text) for text in texts)
    return [Mark(int(mark[1]), *mark[2].split(":")) if mark else Mark(0, "", text) for mark, text in found]


def _ahead(mark: Mark, record: Any) -> int:
    """How far a record's time is ahead, in ms: the broker's own never is."""
    return 1000 * int(mark.detail) if record.timestamp_type == CREATE_TIME else 0


def is_malformed(value: bytes | None, key: bytes, how: str) -> bool:
    """Whether a value is malformed just so; `key`: the user_id that it should have."""
    if value is None or how == "tombstone":
        return value is None and how == "tombstone"
    start = b'{"user_id":%b,' % key
    if how == "truncated":
        bare = TEXT.sub(b"", value)
        return start.startswith(value[: len(start)]) and bare.count(b"{") > bare.count(b"}")
    if how == "missing_field":
        return _problem(value) in MISSING_FIELD
    mended = re.sub(*MENDED[how], value) if how in MENDED else value
    return mended != value and mended.startswith(start) and not _problem(mended)


def _problem(value: bytes) -> str:
    try:
        parse_event(value)
    except ValueError as error:
        return str(error)
    return ""


class Faults:
    """Judges the marks of one run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.numbers, self.dropped = BitMap64(), BitMap64()  # of faults; sequences
        self._right: Counter[str] = Counter()  # by kind; whether an event was dropped shows at the end
        self._wrong: Counter[str] = Counter()

    def judge(self, record: Any, sequence: int, marks: list[Mark], cut: Container[int]) -> tuple[Mark, str]:
        """Take in a record's marks: the one that excuses something, and what is to be said of them (see Audit.cut)."""
        own = next((mark for mark in marks if mark.kind != "dropped"), NO_FAULT)  # an event suffers one fault at most
        fault, said = NO_FAULT, list[str]()
        for mark in marks:
            fits = mark.number not in self.numbers and (mark is own or mark.kind == "dropped")
            right = fits and self._is_right(mark, record, sequence, cut)
            if mark.number:
                self.numbers.add(mark.number)
            if right and mark.kind == "dropped":
                self.dropped.add(int(mark.detail))
            elif right or mark.kind == "duplicate":
                fault = mark
            self._right[mark.kind] += right
            self._wrong[mark.kind] += not right
            said.append(f"{'on purpose' if right else 'not as marked'}: {':'.join(filter(None, mark[1:]))}")
        return fault, "; ".join(said)

    def _is_right(self, mark: Mark, record: Any, sequence: int, cut: Container[int]) -> bool:
        """Whether what a mark says of its record is so."""
        run, key, value, detail = self._run, record.key or b"", record.value or b"", mark.detail.encode()
        match mark.kind:
            case "late":
                return sequence not in run
            case "duplicate":
                return sequence in run or record.partition in cut
            case "dropped":  # so far
                return int(mark.detail) not in run
            case "misplaced":
                return key not in (b"", detail) and value.startswith(b'{"user_id":%b,' % detail)
            case "future":
                return bool(record.timestamp - _ahead(mark, record) >= run.latest(record.partition) - SET_BACK_MS)
            case "malformed":
                return bool(key) and is_malformed(record.value, key, mark.detail)
        return False

    def read_on(self, marks: Iterable[Mark]) -> None:
        """Take in what fills a gap, and only that."""
        for mark in marks:
            if self.numbers and 0 < mark.number <= self.numbers.max():
                self.numbers.add(mark.number)
            if mark.kind == "dropped" and int(mark.detail) <= self._run.last:
                self.dropped.add(int(mark.detail))

    def mismarked(self, compacted: bool) -> int:
        """How many marks are not right. In a compacted topic what a duplicate repeats may be gone."""
        there = len(self.dropped) - len(self._run.dropped())
        return self._wrong.total() + there - compacted * self._wrong["duplicate"]

    @property
    def marked(self) -> bool:
        return bool(self.numbers or self.dropped)

    def made(self) -> dict[str, int]:
        """How many there are, by kind."""
        counts = {**self._right, "dropped": len(self._run.dropped())}
        return {kind: counts[kind] for kind in KINDS if counts.get(kind)}


# ---------------------------------------------------------------------------------------- the score of a consumer

MOST_IDS = 20
COUNTS, RATIOS = ("made", "found", "missed", "false"), ("precision", "recall")


def read_verdicts(path: Path) -> Verdicts:
    """What a consumer has found. Raises ValueError with the line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', error)}") from None
    verdicts: Verdicts = defaultdict(Counter)
    for number, line in enumerate(map(str.strip, lines), 1):
        if line not in ("", "event_id,fault"):
            try:
                event_id, kind = _verdict(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no verdict ({error})") from None
            verdicts[kind][event_id] += 1
    return verdicts


def _verdict(line: str) -> tuple[str, str]:
    event_id, _, kind = (text.strip() for text in line.partition(","))
    if line.startswith("{"):
        event_id, kind = map(orjson.loads(line).get, ("event_id", "fault"))
    if not EVENT_ID.fullmatch(str(event_id)):
        raise ValueError(f"{event_id!r} is no event id")
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of fault")
    return event_id, kind


class Score:
    """What a consumer has found of the faults, and what it has accused falsely."""

    def __init__(self, verdicts: Verdicts, late_seconds: float) -> None:
        self._verdicts, self._late_ms = verdicts, 1000 * late_seconds
        self._made: Verdicts = defaultdict(Counter)
        self._details: dict[str, str] = {}  # event id -> how it is malformed
        self._may_be_late: set[str] = set()  # event ids
        self._latest: dict[int, int] = {}  # partition -> the latest time of an event without a fault, in ms

    def add(self, partition: int, event_id: str, event: dict[str, Any] | None, fault: Mark) -> None:
        """Take in a record that has no fault, or one made on purpose.

        Late events that are hardly late, and duplicates, may be called late; they need not be.
        """
        time = _milliseconds(event["timestamp"]) if event else sys.maxsize
        latest = self._latest.get(partition, 0)
        if not fault.kind:
            self._latest[partition] = max(latest, time)
            return
        must = fault.kind != "late" or latest - time > self._late_ms
        if must:
            self._made[fault.kind][event_id] += 1
        if fault.kind == "duplicate" or not must:
            self._may_be_late.add(event_id)
        if fault.kind == "malformed":
            self._details[event_id] = fault.detail

    def report(self, dropped: Iterable[str]) -> dict[str, Any]:
        """By kind; `dropped`: event ids."""
        self._made["dropped"].update(dropped)
        return {kind: self._of_kind(kind) for kind in KINDS}

    def _of_kind(self, kind: str) -> dict[str, Any]:
        made, told = self._made[kind], self._verdicts[kind]
        found, missed = (made & told).total(), list((made - told).elements())
        excused = self._may_be_late if kind == "late" else ()
        false = [event_id for event_id in (told - made).elements() if event_id not in excused]
        score: dict[str, Any] = {
            **dict(zip(COUNTS, (made.total(), found, len(missed), len(false)), strict=True)),
            "precision": round(found / (found + len(false)), 4) if found or false else None,
            "recall": round(found / made.total(), 4) if made else None,
            "missed_ids": missed[:MOST_IDS],
            "false_ids": false[:MOST_IDS],
        }
        if kind == "malformed":
            score["missed_by_detail"] = Counter(self._details[event_id] for event_id in missed)
        return score


def score_table(scores: dict[str, dict[str, Any]]) -> list[str]:
    """For people."""
    lines = [f"{'Verdicts':10}" + "".join(f"{name:>9}" for name in COUNTS) + "".join(f"{name:>11}" for name in RATIOS)]
    for kind, score in scores.items():
        ratios = ["-" if score[name] is None else f"{score[name]:.3f}" for name in RATIOS]
        lines.append(f"{kind:10}{''.join(f'{score[name]:9}' for name in COUNTS)}{''.join(f'{r:>11}' for r in ratios)}")
    return lines


# ---------------------------------------------------------------------------------------------------- the report


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


def read_on(reader: Reader, audit: Audit, settings: ConsumerSettings, stop: Stop, enough: bool) -> None:
    """Partitions are read up to different points: look on for what was merely not read yet, or is on its way.

    `enough`: MAX_EVENTS were read, and what is behind them matters only if it fills a gap.
    """
    policy = tool.Question(lambda: cleanup_policy(settings)).wait(stop.asked)
    audit.compacted = "compact" in (policy or "")
    if missing := audit.sought():
        log.info("Looking for %d events further on in the topic (Ctrl+C: end at once)", missing)
    ends, deadline = reader.consumer.ends(), time.monotonic() + CLOSING_SECONDS
    while audit.sought() or (not enough and reader.unsettled()):
        behind = not reader.reached(ends)
        for record in (records := reader.poll()):
            audit.mark(record)
        if behind and records and not reader.throttled():
            deadline = time.monotonic() + CLOSING_SECONDS
        elif time.monotonic() > deadline:
            break
    if audit.sought() or not enough:
        audit.held = reader.unread()
    if policy is None and audit.missing():
        audit.notes.append(UNKNOWN_POLICY)


def cleanup_policy(settings: ConsumerSettings) -> str | None:
    """The topic's; None when Kafka does not tell, which to this user may mean a topic without settings."""
    client = tool.client_options(settings) | {"bootstrap_timeout_ms": ANSWER_MS, "request_timeout_ms": ANSWER_MS}
    try:
        with KafkaAdminClient(**client) as admin:
            told = admin.describe_configs([ConfigResource("TOPIC", settings.kafka_topic)], config_filter="all")
    except KafkaError:
        return None
    options = told["topic"][settings.kafka_topic]
    return str(options.get("cleanup.policy", {}).get("value")) if options else None  # none at all: a refusal


def _line(record: Any, problem: str) -> str:
    key, value = ("none" if part is None else part.decode(errors="replace") for part in (record.key, record.value))
    note = f"  <- {problem}" if problem else ""
    return _printable(f"partition {record.partition}, offset {record.offset}, key {key}: {value}{note}")


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def summary(report: dict[str, Any], audit: Audit) -> str:
    """The audit for people."""
    lines = [f"{report['events']} events read from topic {report['topic']}"]
    lines += [f"  {_printable(name)}: {count}" for name, count in report["by_type"].items()]
    if audit.without_id:
        lines.append(f"Without event_id: {audit.without_id}, {audit.invalid_without_id} of them invalid; not judged")
    lines += map(_run_line, report["runs"])
    lines += [_printable(f"Note: {note}") for note in report["notes"]]
    if count := audit.enlarged_from():
        lines.append(f"Misplaced records are in the right place for {count} partitions: was the topic enlarged since?")
    faults: dict[str, object] = {"missing": "not judged" if audit.compacted else audit.missing()}
    faults |= {name: sum(run[name] for run in report["runs"]) for name in ("repeated", "reordered")}
    faults |= {name: report[name] for name in ("misplaced", "invalid", "mismarked") if name in report}
    counts = ", ".join(f"{name} {count}" for name, count in faults.items())
    lines += score_table(report["scores"]) if "scores" in report else []
    return "\n".join([*lines, f"{'OK' if report['ok'] else 'NOT OK'}: {counts}"])


def _run_line(run: dict[str, Any]) -> str:
    missing = sum(last - first + 1 for first, last in run["missing"] or ())
    which = f" ({tool.format_ranges(run['missing'])})" if missing else ""
    cut = f"; judged from {bound} on, the topic does not go back further" if (bound := run["truncated_before"]) else ""
    told = (
        f"Run {run['run']}: {run['events']} events, sequences {run['first']} to {run['last']}, missing "
        f"{'not judged' if run['missing'] is None else missing}{which}, repeated {run['repeated']}, "
        f"reordered {run['reordered']}{cut}"
    )
    return f"{told}\n  {_fault_line(run)}" if "faults" in run else told


def _fault_line(run: dict[str, Any]) -> str:
    made = ", ".join(f"{kind} {count}" for kind, count in run["faults"].items()) or "nothing as marked"
    lost = run["lost_faults"]
    which = "; lost: not judged" if lost is None else f"; lost: faults {tool.format_ranges(lost)}" if lost else ""
    return f"made on purpose: {made}{which}"


def audit_topic(script: tool.Script) -> int:
    settings, stop, as_json = script.settings, script.stop, "--json" in script.flags
    found = settings.verdicts
    audit = Audit(settings.kafka_topic, None if found is None else Score(found, settings.late_seconds))
    reader = Reader(settings, stop, audit)
    gave_up = False
    try:
        if reader.open():
            read(reader, audit, settings, stop, show=not as_json)
            read_on(reader, audit, settings, stop, enough=audit.events >= (settings.max_events or sys.maxsize))
        else:
            audit.notes.append("nothing was read: a stop came before the topic was reached")
    except GiveUp as reason:
        log.error("%s", reason)
        gave_up = True
        audit.notes.append(f"the audit ended early: {reason}")
    finally:
        reader.close()
    report = audit.report()
    tool.show(orjson.dumps(report) if as_json else summary(report, audit), stop)
    return int(gave_up or not report["ok"] or audit.events < (settings.max_events or 0))


if __name__ == "__main__":
    flags = {"--json": "print the audit only, as one JSON document; all else goes to standard error"}
    raise SystemExit(tool.run_script(__doc__, ConsumerSettings, audit_topic, flags))
