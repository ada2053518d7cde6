"""Faults made on purpose: the dice, the order and the marks against a second reading of the rules; every kind on real
Kafka, in every kind of run; each mark broken by hand; and the score of the consumer in docs/faults.md."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
import re
import signal
import subprocess
import sys
import urllib.request
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from auditor_test import (
    BOUNCE,
    RUN,
    START_MS,
    Record,
    delete_before,
    document,
    of_run,
    outcome,
    record,
    topic_with,
    user_of,
)
from brokers import ApacheKafka, create_topic, delete_topic, event_id, free_port, partition_of, read_all, wait_until
from conftest import ROOT, MakeApache, RunScript, Script, clean_environment
from kafka import TopicPartition
from kafka.record.memory_records import MemoryRecordsBuilder

sys.path.insert(0, str(ROOT))

import random_churn_producer as churn
import random_event_producer as tool
import random_faulty_producer as faulty
import test_random_consumer as auditor
from random_faulty_producer import KINDS, MALFORMED, DrawnPace, FaultyEvent, FaultySettings, RandomFaultyProducer

SCRIPT, AUDITOR = "random_faulty_producer.py", "test_random_consumer.py"
MIX = "late=0.1,duplicate=0.08,dropped=0.07,misplaced=0.05,future=0.04,malformed=0.14"
WEEK: dict[str, Any] = {
    "STREAM": "churn",
    "SEED": "week",
    "START_TIME": "2026-05-04",
    "END_TIME": "2026-05-11",
    "INTERVAL_SECONDS": 0,
}
PATIENCE = 60.0


def finish(*flags: str, script: str | Path = SCRIPT, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    """A run to its end, whatever its exit code."""
    environment = clean_environment(PYTHONPATH=str(ROOT), **settings)
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE, check=False)


def printed(*script: str, **settings: Any) -> list[bytes]:
    """The values, in order."""
    done = finish("--print", script=script[0] if script else SCRIPT, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(b"\n")[:-1]


Row = tuple[str, str, str, str]  # record, sequence, fault, detail


def answer_key(**settings: Any) -> list[Row]:
    done = finish("--faults", **settings)
    assert done.returncode == 0, done.stderr
    header, *rows = csv.reader(io.StringIO(done.stdout.decode()))
    assert header == ["record", "sequence", "fault", "detail"]
    return [(row[0], row[1], row[2], row[3]) for row in rows]


def counts(rows: Iterable[Row]) -> dict[str, int]:
    made = Counter(row[2] for row in rows)
    return {kind: made[kind] for kind in KINDS if made[kind]}


# ------------------------------------------------------------------------- the rules, read a second time and otherwise


def compact(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


def spoilt(kind: str, value: bytes, v: Callable[[], float]) -> bytes:
    event = json.loads(value)
    if kind == "truncated":
        return value[: 1 + int((len(value) - 1) * v())]
    if kind == "encoding":
        return value.replace(event["event_type"].encode(), b"\xff" + event["event_type"].encode(), 1)
    if kind == "wrong_type":
        return compact({**event, "user_id": str(event["user_id"])})
    if kind == "missing_field":
        missing = ("user_id", "event_type", "timestamp", "metadata")[int(4 * v())]
        return compact({name: field for name, field in event.items() if name != missing})
    if kind == "extra_field":
        return compact({**event, "extra": True})
    if kind == "unknown_type":
        return compact({**event, "event_type": "unknown"})
    return b"null"


def expected(values: list[bytes], seed: str, mix: dict[str, float], distance: int) -> tuple[list[bytes], list[Row]]:
    """The values of the records in their order, and the answer key, of a stream with these values."""
    v = random.Random(seed).random
    kinds = [kind for kind in (*KINDS[:-1], *MALFORMED) if mix.get(kind)]
    sums = list(itertools.accumulate(mix[kind] for kind in kinds))
    # Behind which sequence, 0 for an event in its place, its own sequence; value, kind, detail.
    made: list[tuple[int, int, int, bytes, str, str]] = []
    for s, value in enumerate(values, 1):
        kind = [*kinds, ""][bisect_right(sums, v())]
        detail, becomes = "", value
        if kind in ("late", "duplicate"):
            k = int((distance + 1) ** v())
            made.append((s + k, 1, s, value, kind, str(k)))
            kind = "held back" if kind == "late" else ""
        elif kind == "dropped":
            detail = str(s)
        elif kind == "misplaced":
            v()
            detail = str(json.loads(value)["user_id"])
        elif kind == "future":
            n = int(1801 ** v())
            event = json.loads(value)
            ahead = datetime.fromisoformat(event["timestamp"]) + timedelta(seconds=n)
            detail, becomes = str(n), compact({**event, "timestamp": f"{ahead:%Y-%m-%dT%H:%M:%S.%f}"})
        elif kind in MALFORMED:
            becomes, detail, kind = spoilt(kind, value, v), kind, "malformed"
        if kind != "held back":
            made.append((s, 0, s, becomes, kind, detail))
    lines: list[bytes] = []
    key: list[Row] = []
    away: list[Row] = []
    for _, _, s, value, kind, detail in sorted(made):
        if kind == "dropped":
            away.append(("", str(s), kind, ""))
            continue
        lines.append(value)
        key += [(str(len(lines)), str(s), kind, detail)] if kind else []
        key += away
        away = []
    return lines, key


def evenly(mix: str) -> dict[str, float]:
    """Shares by what the dice may show."""
    shares = {kind: float(share) for kind, share in (part.split("=") for part in mix.split(","))}
    each = shares.pop("malformed", 0.0) / 7
    return {**shares, **{kind: shares.get(kind, 0.0) + each for kind in MALFORMED}}


@pytest.fixture(scope="module")
def week() -> list[bytes]:
    """The churn stream without faults."""
    of_churn = {name: value for name, value in WEEK.items() if name != "STREAM"}
    return printed("random_churn_producer.py", **of_churn)


def test_records_and_answer_key_are_as_the_rules_say(week: list[bytes]) -> None:
    """Byte for byte: a backfill has the same timestamps each time."""
    settings = {**WEEK, "FAULTS": MIX, "FAULT_DISTANCE": 70}
    lines, key = expected(week, "week/0/1/faults", evenly(MIX), 70)
    assert printed(**settings) == lines
    assert answer_key(**settings) == key
    assert counts(key).keys() == set(KINDS)


@pytest.mark.parametrize("distance", [1, 1000, 1_000_000])
@pytest.mark.parametrize("mix", [MIX, "late=1", "duplicate=1", "malformed=1", "dropped=0.9,late=0.1", faulty.MIX])
def test_so_they_are_with_any_mix(week: list[bytes], mix: str, distance: int) -> None:
    given = {name.lower(): value for name, value in WEEK.items()}
    records = handed_on(producer(**given, faults=mix, fault_distance=distance))
    lines, key = expected(week, "week/0/1/faults", evenly(mix), distance)
    assert [one.value for one in records] == lines
    made = [mark.split(":") for one in records for mark in marks(one)]
    assert [int(number) for number, _, _ in made] == list(range(1, len(key) + 1))
    assert [kind for _, kind, _ in made] == [row[2] for row in key]


def producer(**settings: Any) -> RandomFaultyProducer:
    return RandomFaultyProducer.from_settings(FaultySettings(**settings))


def handed_on(events: RandomFaultyProducer) -> list[tool.Event]:
    return list(iter(lambda: events.generate_event(1.0), None))


def test_what_is_held_back_when_a_run_is_stopped() -> None:
    """At any moment: all late ones come, in their order, and nothing a second time."""
    settings = {"seed": "rest", "faults": MIX, "fault_distance": 50, "interval_seconds": 0}
    for count in range(1, 200, 7):
        events = producer(**settings)
        records = [*events.generate_events([1.0] * count), *events.rest(2.0)]
        assert [one.due for one in records[count:]] == [2.0] * (len(records) - count)
        late = [(one.sequence + int(mark.split(":")[2]), one.sequence) for one in records[count:] for mark in own(one)]
        assert late == sorted(late)
        dropped = {int(mark.split(":")[2]) for one in records for mark in marks(one) if ":dropped:" in mark}
        last = max(one.sequence for one in records)
        assert {one.sequence for one in records} == set(range(1, last + 1)) - dropped
        repeated = [one.sequence for one in records if any(":duplicate:" in mark for mark in marks(one))]
        assert len(records) == len({one.sequence for one in records}) + len(repeated)
        assert not any(":duplicate:" in mark for one in records[count:] for mark in marks(one))
        numbers = [int(mark.partition(":")[0]) for one in records for mark in marks(one)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert sum(events.faults.values()) == len(numbers)


def test_a_sequence_that_is_sent_twice_is_named_once() -> None:
    """Among those that are unconfirmed at the end."""
    assert tool.ranges_of([7, 2, 3, 2, 1, 8, 7]) == [(1, 3), (7, 8)]


def marks(record: tool.Event) -> list[str]:
    return list(getattr(record, "marks", ()))


def own(record: tool.Event) -> list[str]:
    return [mark for mark in marks(record) if ":dropped:" not in mark]


def test_without_faults_the_values_are_the_streams(week: list[bytes]) -> None:
    assert printed(**WEEK, FAULTS="none") == printed(**WEEK, FAULTS="late=0") == week
    live = {"SEED": "x", "MAX_EVENTS": 500, "INTERVAL_SECONDS": 0}
    plain = printed("random_event_producer.py", **live)
    assert len(plain) == 500
    assert untimed(printed(**live, FAULTS="none")) == untimed(plain)


def untimed(values: list[bytes]) -> list[bytes]:
    return [re.sub(rb'"timestamp":"[^"]+"', b"", value) for value in values]


def test_the_same_variables_give_the_same_records_at_any_pace() -> None:
    live = {"SEED": "pace", "MAX_EVENTS": 200, "FAULTS": MIX.replace("malformed", "extra_field")}
    fast = printed(**live, INTERVAL_SECONDS=0)
    assert untimed(printed(**live, INTERVAL_SECONDS=0.005, ARRIVALS="bursty")) == untimed(fast)
    assert len(answer_key(**live)) > 50
    assert answer_key(**live, INTERVAL_SECONDS=7, ARRIVALS="daily") == answer_key(**live)
    assert answer_key(**{**live, "SEED": "other"}) != answer_key(**live)
    shards = [answer_key(**live, SHARD_COUNT=2, SHARD_INDEX=index) for index in range(2)]
    assert [row[:3] for row in shards[0]] != [row[:3] for row in shards[1]]


def test_max_events_counts_events_of_the_stream() -> None:
    """With what comes late or twice, and without what is dropped: all of them are accounted for."""
    settings = {"SEED": "max", "MAX_EVENTS": 400, "INTERVAL_SECONDS": 0, "FAULTS": MIX}
    key = counts(answer_key(**settings))
    assert len(printed(**settings)) in {400 + key["duplicate"] - key["dropped"] - n for n in range(3)}


def test_a_seed_that_was_drawn_is_said_and_gives_the_answer_key() -> None:
    done = finish(
        "--print", MAX_EVENTS=300, INTERVAL_SECONDS=0, FAULTS=" late = 0.2, tombstone=.1 ,dropped=0.1", FAULT_DISTANCE=9
    )
    said = dict(re.findall(r"([A-Z_]+)=(\S+)", done.stderr.decode()))
    assert said.pop("FAULTS") == "late=0.2,tombstone=.1,dropped=0.1"
    assert said.pop("FAULT_DISTANCE") == "9"
    key = answer_key(SEED=said["SEED"], MAX_EVENTS=300, FAULTS="late=0.2,tombstone=0.1,dropped=0.1", FAULT_DISTANCE=9)
    told = ", ".join(f"{kind} {count}" for kind, count in counts(key).items())
    assert f"Faults made on purpose: {told}\n" in done.stderr.decode()
    nulls = [number for number, line in enumerate(done.stdout.splitlines(), 1) if line == b"null"]
    assert nulls == [int(row[0]) for row in key if row[3] == "tombstone"]


def test_malformed_is_its_seven_kinds_beside_each() -> None:
    shares = faulty.shares_of("malformed=0.7,tombstone=0.1")
    assert list(shares) == list(MALFORMED)
    assert shares == pytest.approx({**dict.fromkeys(MALFORMED, 0.1), "tombstone": 0.2})


# ----------------------------------------------------------------------------------------------------------- bytes


def test_a_record_is_byte_for_byte_the_clients() -> None:
    """Several headers, no value, and lengths where a varint gets longer; also beside plain events."""
    chance = random.Random(1)
    sizes = [1, 62, 63, 64, 65, 126, 127, 128, 129, 8_190, 8_191, 8_192, 8_193]
    events: list[tool.Event] = []
    for size in sizes:
        plain = tool.Event(
            "0123456789abcdef", size, "bounce", b"7", chance.randbytes(size), 1_700_000_000_000 + size, 0.0
        )
        marks = [f"{number}:dropped:{chance.randrange(10**9)}" for number in range(1, chance.choice([2, 3, 70]))]
        given = plain.run, plain.sequence, plain.event_type, plain.key
        events += [plain, FaultyEvent(*given, plain.value, plain.timestamp_ms, 0.0, marks, plain)]
        events.append(FaultyEvent(*given, faulty.TOMBSTONE, plain.timestamp_ms, 0.0, ["1:malformed:tombstone"], plain))
    batch = tool.Batch(TopicPartition("events", 0), MemoryRecordsBuilder(2, 0, 1 << 20))
    assert batch.take(events) == len(events)
    clients = MemoryRecordsBuilder(2, 0, 1 << 20)
    for one in events:
        headers = [("event_id", one.event_id.encode())]
        headers += [("fault", mark.encode()) for mark in getattr(one, "marks", ())]
        value = None if one.value == faulty.TOMBSTONE else one.value
        assert clients.append(one.timestamp_ms, one.key, value, headers)
    assert closed(batch.records) == closed(clients)


def closed(records: Any) -> bytes:
    records.set_producer_state(4_711, 3, 17, False)
    records.close()
    return bytes(records.buffer())


@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_value_is_not_as_the_schema_says(how: str) -> None:
    """But for an unknown type: the schema is open for types of one's own, a consumer may not be."""
    events, draw = tool.RandomEventProducer("x"), random.Random(how).random
    for event in (events.generate_event() for _ in range(300)):
        assert event
        value = MALFORMED[how](event.value, draw)
        given = None if value == faulty.TOMBSTONE else value
        if how == "unknown_type":
            assert auditor.parse_event(value)["event_type"] == "unknown"
        else:
            with pytest.raises(ValueError, match=r".+"):
                auditor.parse_event(given)
        assert [kind for kind in MALFORMED if auditor.is_malformed(given, event.key, kind)] == [how]
        assert how not in auditor.MENDED or not auditor.is_malformed(given, b"1001", how)
        assert not any(auditor.is_malformed(event.value, event.key, kind) for kind in MALFORMED)


@pytest.mark.parametrize("how", MALFORMED)
@pytest.mark.parametrize("text", ["}}}", '"}{\\', "\u00e9\u2028", '{"extra":true}', '"event_type":"unknown"'])
def test_so_it_is_with_any_text_in_metadata(how: str, text: str) -> None:
    """Of types of one's own, also where the text looks like the value around it; cut at each of its bytes."""
    metadata = {"text": text, "event_type": "unknown", "of": [{"extra": True}], "extra": True}
    event = {"user_id": 7, "event_type": "search", "timestamp": "2026-05-04T12:00:00.000000", "metadata": metadata}
    value = json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()
    assert auditor.parse_event(value)
    for place in range(len(value) - 1):
        made = MALFORMED[how](value, lambda place=place: (place + 0.5) / (len(value) - 1))  # type: ignore[misc]
        given = None if made == faulty.TOMBSTONE else made
        assert [kind for kind in MALFORMED if auditor.is_malformed(given, b"7", kind)] == [how], made
    assert not any(auditor.is_malformed(value, b"7", kind) for kind in MALFORMED)


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"FAULTS": "lat=0.1"}, "FAULTS: 'lat=0.1', 'lat' is no kind of fault"),
        ({"FAULTS": "late=0.1,"}, "FAULTS: 'late=0.1,', '' is no kind of fault"),
        ({"FAULTS": "none,late=0.1"}, "FAULTS: 'none,late=0.1', 'none' is no kind of fault"),
        ({"FAULTS": "late=0.1,late=0.2"}, "FAULTS: 'late=0.1,late=0.2', late is there twice"),
        ({"FAULTS": "late"}, "FAULTS: 'late', late has no share, like late=0.01"),
        ({"FAULTS": "late=2"}, "FAULTS: 'late=2', late=2 is no share from 0 to 1"),
        ({"FAULTS": "late=-0.1"}, "FAULTS: 'late=-0.1', late=-0.1 is no share from 0 to 1"),
        ({"FAULTS": "late=nan"}, "FAULTS: 'late=nan', late=nan is no share from 0 to 1"),
        ({"FAULTS": "late=inf"}, "FAULTS: 'late=inf', late=inf is no share from 0 to 1"),
        ({"FAULTS": "late=much"}, "FAULTS: 'late=much', late=much is no share from 0 to 1"),
        ({"FAULTS": "late=.7,tombstone=.7"}, "FAULTS: 'late=.7,tombstone=.7', the shares add up to 1.4, more than 1"),
        ({"FAULTS": "dropped=1"}, "FAULTS: 'dropped=1', dropped=1 is more than 0.9: next to nothing would be sent"),
        ({"FAULT_DISTANCE": "0"}, "FAULT_DISTANCE: '0'; allowed: 1 to 1000000"),
        ({"FAULT_DISTANCE": "1000001"}, "FAULT_DISTANCE: '1000001'; allowed: 1 to 1000000"),
        ({"STREAM": "other"}, "STREAM: 'other'; allowed: random, churn"),
        ({"ARRIVALS": "weekly"}, "ARRIVALS: 'weekly'; allowed: even, poisson, bursty, daily"),
        (
            {"ARRIVALS": "poisson", "INTERVAL_SECONDS": "0"},
            "ARRIVALS: 'poisson', no use with INTERVAL_SECONDS=0; allowed: even, poisson, bursty, daily",
        ),
        ({"START_TIME": "2026-05-04"}, "no use with STREAM=random: set STREAM=churn, or unset it"),
        ({"END_TIME": "2026-05-04"}, "no use with STREAM=random: set STREAM=churn, or unset it"),
        ({"SPEED": "60"}, "SPEED: '60.0', no use with faults, which change the order: set INTERVAL_SECONDS"),
        ({"USERS": "10"}, "USERS: '10', no use with STREAM=random: set STREAM=churn, or unset it; allowed: 1 to 1000"),
        (
            {"SPEED": "60", "STREAM": "churn"},
            "SPEED: '60.0', no use with faults, which change the order: set INTERVAL_SECONDS",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_named(settings: dict[str, str], line: str) -> None:
    done = finish("--print", **settings)
    (said,) = done.stderr.decode().splitlines()
    assert line in said
    assert (done.returncode, done.stdout) == (2, b"")


def test_all_that_makes_no_sense_is_named_at_once() -> None:
    done = finish("--print", FAULTS="lat=0.1", ARRIVALS="never", END_TIME="2026-05-04", STREAM="churn", MAX_EVENTS=0)
    named = [line.partition(":")[0] for line in done.stderr.decode().splitlines()]
    assert (done.returncode, sorted(named)) == (2, ["ARRIVALS", "END_TIME", "FAULTS", "MAX_EVENTS"])


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({}, ["SEED: not set; --faults needs it", "MAX_EVENTS or END_TIME: not set; --faults needs it"]),
        ({"SEED": "x"}, ["MAX_EVENTS or END_TIME: not set; --faults needs it"]),
        ({"MAX_EVENTS": 1}, ["SEED: not set; --faults needs it"]),
    ],
    ids=["both", "an end", "a seed"],
)
def test_an_answer_key_needs_a_seed_and_an_end(settings: dict[str, Any], missing: list[str]) -> None:
    done = finish("--faults", **settings)
    assert (done.returncode, done.stdout, done.stderr.decode().splitlines()) == (2, b"", missing)


# -------------------------------------------------------------------------------------------------------- arrivals


def drawn(arrivals: str, interval: float, start: float = 0.0, duration: float | None = None) -> DrawnPace:
    """With its first second on Monday 2026-05-04, whatever the day is."""
    given: dict[str, Any] = {"arrivals": arrivals, "interval_seconds": interval, "duration_seconds": duration}
    monday = int(datetime(2026, 5, 4, tzinfo=UTC).timestamp()) * 1_000_000_000
    pace = DrawnPace(FaultySettings(**given), "x/0/1/arrivals", lambda: monday)
    pace.begin(start)
    return pace


def dues(pace: DrawnPace, count: int) -> list[float]:
    return [due for _ in range(count) for due in pace.take(math.inf, 1)]


def test_poisson_and_bursty_are_drawn_in_advance() -> None:
    chance, now, expect = random.Random("x/0/1/arrivals"), 100.0, list[float]()
    for _ in range(1000):
        now += chance.expovariate(1 / 0.5)
        expect.append(now)
    assert dues(drawn("poisson", 0.5, 100.0), 1000) == pytest.approx(expect)
    chance, now, expect = random.Random("x/0/1/arrivals"), 100.0, []
    for _ in range(1000):
        wait = chance.expovariate(1 / 0.5)
        now += 10 * wait if chance.random() < 0.1 else 0.0
        expect.append(now)
    assert dues(drawn("bursty", 0.5, 100.0), 1000) == pytest.approx(expect)


@pytest.mark.parametrize(("arrivals", "spread"), [("poisson", 1.0), ("bursty", 4.4), ("daily", 1.0)])
def test_they_are_the_interval_apart_on_average(arrivals: str, spread: float) -> None:
    """Over four weeks, within four standard deviations."""
    weeks = 28 * 86_400
    count = sum(1 for _ in itertools.takewhile(lambda due: due < weeks, dues(drawn(arrivals, 60.0), 60_000)))
    assert abs(count - weeks / 60) < 4 * spread * math.sqrt(weeks / 60)


def test_daily_is_the_rhythm_of_the_churn_stream() -> None:
    hours = Counter(int(due // 3600) % 24 for due in dues(drawn("daily", 20.0), 7 * 4320))
    total = sum(hours.values())
    for hour, weight in enumerate(churn.HOURS):
        share = weight / sum(churn.HOURS)
        assert abs(hours[hour] - share * total) < 4.5 * math.sqrt(share * total), hour


@pytest.mark.parametrize("arrivals", ["poisson", "bursty", "daily"])
def test_taken_and_skipped_are_all_that_was_due(arrivals: str) -> None:
    dice, pace, now, taken = random.Random(arrivals), drawn(arrivals, 0.05, 50.0, 300.0), 50.0, list[float]()
    while not pace.finished(now):
        now += dice.choice([0.001, 0.01, 0.2, 0.9, 1.1, 5.0])
        pace.skip(now)
        while late := pace.take(now, 7):
            assert now - late[0] <= tool.CATCH_UP_SECONDS
            assert late[-1] <= now
            taken += late
    everything = list(itertools.takewhile(lambda due: due < 350.0, dues(drawn(arrivals, 0.05, 50.0), 20_000)))
    assert set(taken) <= set(everything)
    assert len(taken) + pace.skipped == len(everything)
    assert 100 < pace.skipped < len(everything)


@pytest.mark.parametrize(("arrivals", "share"), [("poisson", 1.0), ("bursty", 1.0), ("daily", 1.04)])
def test_a_long_gap_holds_nothing_up(arrivals: str, share: float) -> None:
    """One by one it would take longer than a test may. A Monday has 4 % more than the average day."""
    pace = drawn(arrivals, 0.0001)
    assert pace.skip(86_400.0) == pytest.approx(share * 864_000_000, rel=0.001)
    assert 86_399 <= pace.due() < 86_399.1


@pytest.mark.parametrize("arrivals", ["poisson", "bursty", "daily"])
def test_a_pace_that_nothing_keeps_is_given_up_too(arrivals: str) -> None:
    """Waits far shorter than a microsecond add up all the same."""
    pace = drawn(arrivals, 1e-10)
    assert pace.skip(2.0) > 5e9
    assert 1.0 <= pace.due() < 1.1


def test_bursts_come_at_once_and_the_rate_is_what_was_reached(run_script: RunScript) -> None:
    script = run_script(SCRIPT, "--print", ARRIVALS="bursty", INTERVAL_SECONDS=0.01, DURATION_SECONDS=2, SEED="b")
    assert script.wait(PATIENCE) == 0
    found = re.search(r"sent (\d+), .* skipped (\d+) in ([\d.]+) s, ([\d.]+)/s of 100/s asked", script.stderr)
    assert found
    sent, skipped, seconds, rate = map(float, found.groups())
    assert sent == len(script.stdout_lines)
    assert rate == pytest.approx(sent / seconds, rel=0.1)
    assert skipped == 0 or seconds > 2


# ---------------------------------------------------------------------------------------------------- runs on Kafka


def audited(run_script: RunScript, kafka: ApacheKafka, topic: str, **settings: Any) -> tuple[int, dict[str, Any]]:
    given = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 2}
    return outcome(run_script(AUDITOR, "--json", **{**given, **settings}))


def last_line(script: Script) -> dict[str, Any]:
    """The summary of a run with LOG_FORMAT=json."""
    found: dict[str, Any] = json.loads(script.stderr_lines[-1])
    return found


def marks_in(records: Iterable[Any]) -> dict[str, list[str]]:
    """Of each run, in the order of their numbers."""
    marks: dict[str, list[str]] = defaultdict(list)
    for one in records:
        identity = event_id(one)
        assert identity
        assert one.headers[0][0] == "event_id"
        marks[identity[0]] += [value.decode() for name, value in one.headers[1:] if name == "fault"]
    return {run: sorted(texts, key=lambda text: int(text.partition(":")[0])) for run, texts in marks.items()}


def marks_of_key(rows: Iterable[Row]) -> list[str]:
    return [f"{number}:{row[2]}:{row[3] or row[1]}" for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("stream", ["random", "churn"])
@pytest.mark.parametrize(("interval", "events"), [(0, 5000), (0.004, 500)], ids=["full speed", "250/s"])
def test_all_kinds_at_once(
    run_script: RunScript, apache: ApacheKafka, topic: str, stream: str, interval: float, events: int
) -> None:
    """What is marked is in Kafka, is what the answer key says, and is all that the auditor finds."""
    create_topic(apache.bootstrap, topic, 3, config={"retention.ms": "-1"})
    run = {"STREAM": stream, "SEED": topic, "FAULTS": MIX, "FAULT_DISTANCE": 150, "MAX_EVENTS": events}
    run |= {"INTERVAL_SECONDS": interval}
    script = run_script(SCRIPT, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, LOG_FORMAT="json", **run)
    assert script.wait(PATIENCE) == 0
    key, summary, records = answer_key(**run), last_line(script), read_all(apache.bootstrap, topic)
    assert marks_in(records) == {summary["run"]: marks_of_key(key)}
    assert summary["faults"] == counts(key)
    assert summary["sent"] == len(records)
    assert {one.partition for one in records if one.partition != partition_of(one.key, 3)} == set()
    code, report = audited(run_script, apache, topic)
    assert (code, report["ok"], report["mismarked"], report["invalid"], report["misplaced"]) == (0, True, 0, 0, 0)
    (of_it,) = report["runs"]
    assert (of_it["missing"], of_it["repeated"], of_it["reordered"], of_it["lost_faults"]) == ([], 0, 0, [])
    assert of_it["faults"] == counts(key)
    assert report["by_type"].keys() <= {"add_to_cart", "bounce", "product_view"}
    assert sum(report["by_type"].values()) == len(records) - counts(key)["malformed"]


def test_what_the_log_says_at_a_slow_pace(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    """Each event as it was, with its marks; the run ends with its last record, not a slot later."""
    create_topic(apache.bootstrap, topic, 2)
    run = {"SEED": "slow", "FAULTS": "late=.2,duplicate=.2,dropped=.2,misplaced=.2,tombstone=.2", "FAULT_DISTANCE": 4}
    run |= {"MAX_EVENTS": 15}
    script = run_script(SCRIPT, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.5, **run)
    assert script.wait(PATIENCE) == 0
    plain = [
        json.loads(value)
        for value in printed("random_event_producer.py", SEED="slow", MAX_EVENTS=15, INTERVAL_SECONDS=0)
    ]
    lines = [line.partition(" - INFO - ")[2] for line in script.stderr_lines]
    told = [re.fullmatch(r"Event sent - (.*), Partition: \d(?:, Fault: (.+))?", line) for line in lines]
    events, marks = zip(*(found.groups() for found in told if found), strict=True)
    assert [mark for text in marks for mark in (text or "").split(", ") if mark] == marks_of_key(answer_key(**run))
    of_all = {
        f"User: {one['user_id']}, Type: {one['event_type']}, Metadata: {compact(one['metadata']).decode()}"
        for one in plain
    }
    assert set(events) <= of_all
    assert lines[0] == "SEED=slow"
    assert lines[1] == "FAULTS=late=.2,duplicate=.2,dropped=.2,misplaced=.2,tombstone=.2 FAULT_DISTANCE=4"
    assert lines[2].startswith("Sending to topic")
    assert lines[-2].startswith("Faults made on purpose: late ")
    assert ", 2/s of 2/s asked, " in lines[-1]  # a slot for each record, and none for what is held back or dropped


def test_shards_have_dice_of_their_own(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.bootstrap, topic, 4)
    run = {"SEED": topic, "FAULTS": MIX, "MAX_EVENTS": 1500, "INTERVAL_SECONDS": 0, "SHARD_COUNT": 2}
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "LOG_FORMAT": "json"}
    shards = [run_script(SCRIPT, **where, **run, SHARD_INDEX=index) for index in range(2)]
    assert [shard.wait(PATIENCE) for shard in shards] == [0, 0]
    keys = {last_line(shard)["run"]: answer_key(**run, SHARD_INDEX=index) for index, shard in enumerate(shards)}
    assert marks_in(read_all(apache.bootstrap, topic)) == {name: marks_of_key(key) for name, key in keys.items()}
    code, report = audited(run_script, apache, topic)
    assert (code, report["mismarked"]) == (0, 0)
    assert {one["run"]: one["faults"] for one in report["runs"]} == {name: counts(key) for name, key in keys.items()}


STOPS: dict[str, tuple[dict[str, Any], int | None, int]] = {  # settings, signal, exit code
    "Ctrl+C": ({}, signal.SIGINT, 0),
    "SIGTERM, full speed": ({"INTERVAL_SECONDS": 0}, signal.SIGTERM, 0),
    "SIGTERM before MAX_EVENTS": ({"MAX_EVENTS": 1_000_000}, signal.SIGTERM, 1),
    "DURATION_SECONDS": ({"DURATION_SECONDS": 1.5}, None, 0),
    "DURATION_SECONDS before MAX_EVENTS": ({"DURATION_SECONDS": 1.5, "MAX_EVENTS": 1_000_000}, None, 0),
    "END_TIME": (
        {"STREAM": "churn", "START_TIME": "2026-05-04", "END_TIME": "2026-05-05", "INTERVAL_SECONDS": 0},
        None,
        0,
    ),
    "SIGTERM, all of it late": ({"FAULTS": "late=1", "FAULT_DISTANCE": 100_000}, signal.SIGTERM, 0),
}


@pytest.mark.parametrize("how", STOPS)
def test_a_run_that_is_stopped_loses_nothing(run_script: RunScript, apache: ApacheKafka, topic: str, how: str) -> None:
    """What was held back comes at once, so that no event but the dropped ones is missing."""
    settings, number, code = STOPS[how]
    create_topic(apache.bootstrap, topic, 3, config={"retention.ms": "-1"})
    run = {"INTERVAL_SECONDS": 0.003, "FAULTS": MIX, "FAULT_DISTANCE": 300, "LOG_FORMAT": "json", **settings}
    port = free_port()
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "METRICS_PORT": port}
    script = run_script(SCRIPT, **where, **run)
    if number:
        await_sent(port, random.randrange(50, 300))
        script.signal(number)
    assert script.wait(PATIENCE) == code
    summary, records = last_line(script), read_all(apache.bootstrap, topic)
    assert (summary["sent"], summary["failed"], summary["unconfirmed"]) == (len(records), 0, 0)
    (marks,) = marks_in(records).values()
    assert [int(mark.partition(":")[0]) for mark in marks] == list(range(1, len(marks) + 1))
    assert sum(summary["faults"].values()) == len(marks)
    result, report = audited(run_script, apache, topic)
    assert (result, report["runs"][0]["missing"], report["mismarked"]) == (0, [], 0), report
    assert report["runs"][0]["faults"] == summary["faults"]


def sent_so_far(port: int) -> int:
    try:
        return int(sum(float(line.split()[-1]) for line in metrics(port) if "events_sent_total{" in line))
    except OSError:
        return 0


def await_sent(port: int, count: int) -> None:
    wait_until(lambda: sent_so_far(port) > count, PATIENCE, f"more than {count} events are confirmed")


def metrics(port: int) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return list(answer.read().decode().splitlines())


def test_faults_are_counted_in_the_metrics(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    """By the six kinds; without faults there is no such metric."""
    seen = {}
    for faults, script in ((MIX, SCRIPT), ("none", SCRIPT), (MIX, "random_event_producer.py")):
        port = free_port()
        where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "METRICS_PORT": port}
        running = run_script(script, **where, FAULTS=faults, INTERVAL_SECONDS=0.005, LOG_FORMAT="json")
        await_sent(port, 200)
        line = len(running.stderr_lines)
        seen[faults, script] = {line for line in metrics(port) if "fault" in line}
        running.signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
        assert line < len(running.stderr_lines)
    found = [
        re.fullmatch(r'random_event_producer_faults_total\{fault="(\w+)"\} (\d+)\.0', one)
        for one in seen.pop((MIX, SCRIPT))
    ]
    assert {one[1] for one in found if one and int(one[2])} == set(KINDS)
    assert list(seen.values()) == [set(), set()]


def test_a_broker_that_is_killed_changes_nothing(run_script: RunScript, make_apache: MakeApache, topic: str) -> None:
    kafka = make_apache(properties={"auto.create.topics.enable": "false"})
    kafka.start()
    create_topic(kafka.direct, topic, 3, config={"retention.ms": "-1"})
    port = free_port()
    where = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "METRICS_PORT": port}
    script = run_script(SCRIPT, **where, INTERVAL_SECONDS=0.005, FAULTS=MIX, FAULT_DISTANCE=200, LOG_FORMAT="json")
    await_sent(port, 300)
    kafka.kill()
    kafka.start_node()
    await_sent(port, sent_so_far(port) + 500)
    script.signal(signal.SIGTERM)
    assert script.wait(PATIENCE) == 0
    code, report = audited(run_script, kafka, topic)
    assert (code, report["mismarked"]) == (0, 0), report
    assert report["runs"][0]["faults"] == last_line(script)["faults"]
    # A stop while it is away: what was held back is made, is not confirmed, and is named.
    late = {"FAULTS": "late=1", "FAULT_DISTANCE": 1_000_000, "INTERVAL_SECONDS": 1, "LOG_FORMAT": "json"}
    script = run_script(SCRIPT, **where, **late)
    await_sent(port, 1)
    kafka.kill()
    script.signal(signal.SIGTERM)
    assert script.wait(PATIENCE) == 1
    summary = last_line(script)
    assert summary["unconfirmed"] >= summary["faults"]["late"] - summary["sent"] > 0
    assert summary["unconfirmed_sequences"]


def test_a_topic_that_is_made_again_has_no_duplicate_before_its_first(
    run_script: RunScript, make_apache: MakeApache, topic: str
) -> None:
    """Each event comes twice; what is unconfirmed is sent again in the order of sequences."""
    kafka = make_apache(properties={"auto.create.topics.enable": "false"})
    kafka.start()
    create_topic(kafka.direct, topic, 2)
    port, twice = free_port(), {"FAULTS": "duplicate=1", "FAULT_DISTANCE": 1, "INTERVAL_SECONDS": 0.005}
    script = run_script(SCRIPT, KAFKA_BROKER=kafka.bootstrap, KAFKA_TOPIC=topic, METRICS_PORT=port, **twice)
    await_sent(port, 100)
    delete_topic(kafka.direct, topic)
    script.wait_for("events wait")
    create_topic(kafka.direct, topic, 2)
    await_sent(port, sent_so_far(port) + 300)
    script.signal(signal.SIGTERM)
    assert script.wait(PATIENCE) == 0
    copies: defaultdict[tuple[str, int] | None, list[bool]] = defaultdict(list)
    for one in read_all(kafka.direct, topic):
        copies[event_id(one)].append(len(one.headers) > 1)
    there = Counter(map(tuple, copies.values()))
    assert there[True, False] == 0, there
    assert there[False, True] > 100


def test_what_waits_for_a_topic_is_sent_again_behind_what_the_client_has() -> None:
    """They may be the same event, the second time as a duplicate."""
    first, second = (tool.Event("0123456789abcdef", 1, "bounce", b"7", b"{}", 0, due) for due in (1.0, 2.0))
    delivery = tool.Delivery(tool.Settings(), tool.Tally([]), tool.Stop())
    batch = tool.Batch(TopicPartition("events", 0), MemoryRecordsBuilder(2, 0, 1 << 20))
    batch.take([first])
    delivery._on_their_way[0].append(batch)
    delivery._waiting.append(second)
    assert list(delivery._unconfirmed_events()) == [first, second]


def test_a_refused_record_is_a_lost_fault(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    """A topic that takes nothing from the future; an event that is there all the same is not one of them."""
    config = {"retention.ms": "-1", "message.timestamp.after.max.ms": "1"}
    create_topic(apache.bootstrap, topic, 2, config=config)
    run = {"SEED": "refused", "MAX_EVENTS": 400, "INTERVAL_SECONDS": 0, "FAULTS": "future=0.1,late=0.1"}
    script = run_script(SCRIPT, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, LOG_FORMAT="json", **run)
    assert script.wait(PATIENCE) == 1
    code, report = audited(run_script, apache, topic)
    (of_it,) = report["runs"]
    assert (code, report["ok"], report["mismarked"]) == (1, False, 0)
    lost = {number for first, last in of_it["lost_faults"] for number in range(first, last + 1)}
    assert last_line(script)["failed"] == len(lost) > 10
    rows = [row for number, row in enumerate(answer_key(**run), 1) if number in lost]
    assert {row[2] for row in rows} == {"future"}
    gone = {int(row[1]) for row in rows}
    assert {number for first, last in of_it["missing"] for number in range(first, last + 1)} == gone
    people = run_script(AUDITOR, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, TIMEOUT_SECONDS=2)
    assert people.wait(PATIENCE) == 1
    assert re.search(r"^  made on purpose: late \d+(, future \d+)?; lost: faults \d", people.stdout, re.MULTILINE)
    assert people.stdout_lines[-1].endswith(", mismarked 0")


OWN = """
import sys
sys.path.insert(0, {root!r})
from random_event_producer import RandomEventProducer
from random_faulty_producer import STREAMS, main

class WithSearches(RandomEventProducer):
    def __init__(self, *args):
        super().__init__(*args)
        self.event_types.append("search")

    def _generate_metadata(self, event_type):
        if event_type == "search":
            return {{"query": self.random.choice(["shoes", "lamp", "tent"]), "page": "/search"}}
        return super()._generate_metadata(event_type)

STREAMS["random"] = WithSearches
raise SystemExit(main())
"""


def test_a_type_of_ones_own_suffers_all_kinds(
    run_script: RunScript, apache: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    path = tmp_path / "searches.py"
    path.write_text(OWN.format(root=str(ROOT)))
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic}
    script = run_script(str(path), **where, INTERVAL_SECONDS=0, MAX_EVENTS=2000, FAULTS=MIX, LOG_FORMAT="json")
    assert script.wait(PATIENCE) == 0
    code, report = audited(run_script, apache, topic)
    assert (code, report["mismarked"]) == (0, 0)
    assert report["by_type"]["search"] > 300
    assert report["runs"][0]["faults"] == last_line(script)["faults"]


# ------------------------------------------------------------------------------------------ marks, right and by hand

ILL_CODED = record(10)["value"].replace(b'"event_type":"', b'"event_type":"\xff')


def marked(sequence: int, *marks: str, **changes: Any) -> Record:
    """As auditor_test.record, with these in headers `fault`."""
    made = record(sequence, **changes)
    return {**made, "headers": [*made["headers"], *(("fault", mark.encode()) for mark in marks)]}


def without(field: str) -> bytes:
    event = json.loads(record(12)["value"])
    del event[field]
    return compact(event)


def each_kind() -> dict[str, Record]:
    """One of each, all of one user, so that what is out of order is seen; by name, in the order of the topic."""
    return {
        "first": record(1),
        "third": record(3),
        "late": marked(2, "1:late:1"),
        "fourth": record(4),
        "sixth": marked(6, "2:dropped:5"),
        "duplicate": marked(4, "3:duplicate:2"),
        "misplaced": marked(7, "4:misplaced:123", key=b"77"),
        "future": marked(8, "5:future:100", at=100_008),
        "truncated": marked(9, "6:malformed:truncated", value=record(9)["value"][:40]),
        "encoding": marked(10, "7:malformed:encoding", value=ILL_CODED),
        "wrong_type": marked(11, "8:malformed:wrong_type", user_id="123"),
        "missing_field": marked(12, "9:malformed:missing_field", value=without("metadata")),
        "extra_field": marked(13, "10:malformed:extra_field", extra=True),
        "unknown_type": marked(14, "11:malformed:unknown_type", event_type="unknown", metadata=BOUNCE),
        "tombstone": marked(15, "12:malformed:tombstone", value=None),
        "last": marked(18, "13:dropped:16", "14:dropped:17"),
    }


ALL_KINDS = {"late": 1, "duplicate": 1, "dropped": 3, "misplaced": 1, "future": 1, "malformed": 7}


def test_each_kind_is_excused(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    topic_with(apache, topic, each_kind().values())
    code, report = audited(run_script, apache, topic)
    run = of_run(last=18, events=16, faults=ALL_KINDS, lost_faults=[])
    assert (code, report) == (0, {**document(topic, 16, {"add_to_cart": 9}, run), "mismarked": 0})


def test_what_people_see_of_it(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    topic_with(apache, topic, each_kind().values())
    script = run_script(AUDITOR, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, TIMEOUT_SECONDS=1)
    assert script.wait(PATIENCE) == 0
    *records, _, _, run, made, verdict = script.stdout_lines
    notes = [line.partition("  <- ")[2] for line in records]
    assert notes == [
        "; ".join(f"on purpose: {mark.decode().partition(':')[2]}" for _, mark in one["headers"][1:])
        for one in each_kind().values()
    ]
    assert run.endswith("missing 0, repeated 0, reordered 0")
    assert made == "  made on purpose: late 1, duplicate 1, dropped 3, misplaced 1, future 1, malformed 7"
    assert verdict == "OK: missing 0, repeated 0, reordered 0, misplaced 0, invalid 0, mismarked 0"


Change = Callable[[dict[str, Record]], Any]
Verdict = dict[str, Any]  # what is not as in each_kind()


def becomes(**changed: Record) -> Change:
    return lambda made: made.update(changed)


def gone(name: str) -> Change:
    return lambda made: made.pop(name)


def behind(name: str, other: Record) -> Change:
    """At the end of the topic."""
    return lambda made: made.update({f"{name} again": other})


BY_HAND: dict[str, tuple[Change, Verdict]] = {
    "late, without its mark": (becomes(late=record(2)), {"reordered": 1, "lost_faults": [[1, 1]]}),
    "late, and repeated": (behind("late", marked(2, "15:late:9")), {"repeated": 1, "mismarked": 1}),
    "late, lost": (gone("late"), {"missing": [[2, 2]], "lost_faults": [[1, 1]]}),
    "duplicate, without its mark": (becomes(duplicate=record(4)), {"repeated": 1, "lost_faults": [[3, 3]]}),
    "duplicate, alone": (gone("fourth"), {"mismarked": 1}),
    "duplicate, twice": (behind("duplicate", marked(4, "3:duplicate:2")), {"mismarked": 1}),
    "duplicate, lost": (gone("duplicate"), {"lost_faults": [[3, 3]]}),
    "dropped, without its mark": (becomes(sixth=record(6)), {"missing": [[5, 5]], "lost_faults": [[2, 2]]}),
    "dropped, of another": (becomes(sixth=marked(6, "2:dropped:4")), {"missing": [[5, 5]], "mismarked": 1}),
    "dropped, and there": (behind("fifth", record(5, user=9)), {"mismarked": 1}),
    "dropped, and there before": (
        becomes(third=record(5, user=9), duplicate=record(3)),
        {"mismarked": 1, "reordered": 1, "lost_faults": [[3, 3]]},
    ),
    "misplaced, without its mark": (
        becomes(misplaced=record(7, key=b"77")),
        {"misplaced": 1, "lost_faults": [[4, 4]]},
    ),
    "misplaced, of another user": (
        becomes(misplaced=marked(7, "4:misplaced:9", key=b"77")),
        {"misplaced": 1, "mismarked": 1},
    ),
    "misplaced, and in its place": (becomes(misplaced=marked(7, "4:misplaced:123")), {"mismarked": 1}),
    "misplaced, without a key": (
        becomes(misplaced=marked(7, "4:misplaced:123", key=None)),
        {"misplaced": 1, "mismarked": 1},
    ),
    "future, not ahead": (becomes(future=marked(8, "5:future:100")), {"mismarked": 1}),
    "future, less than it says": (becomes(future=marked(8, "5:future:100", at=50_008)), {"mismarked": 1}),
    "future, in the value only": (
        becomes(future=marked(8, "5:future:100", at=100_008, timestamp_ms=START_MS + 8)),
        {"invalid": 1, "mismarked": 1},
    ),
    "malformed, and valid": (becomes(truncated=marked(9, "6:malformed:truncated")), {"mismarked": 1}),
    "malformed, and a tombstone": (
        becomes(truncated=marked(9, "6:malformed:truncated", value=None)),
        {"mismarked": 1, "invalid": 1},
    ),
    "tombstone, with a value": (becomes(tombstone=marked(15, "12:malformed:tombstone")), {"mismarked": 1}),
    "malformed, in another way": (
        becomes(truncated=marked(9, "6:malformed:truncated", value=ILL_CODED)),
        {"mismarked": 1, "invalid": 1},
    ),
    "malformed, in no way there is": (becomes(encoding=marked(10, "7:malformed:odd")), {"mismarked": 1}),
    "malformed, and repeated": (
        behind("tombstone", marked(15, "15:malformed:tombstone", value=None)),
        {"repeated": 1},
    ),
    "malformed, without its mark": (
        becomes(tombstone=record(15, value=None)),
        {"invalid": 1, "lost_faults": [[12, 12]]},
    ),
    "a number twice": (
        becomes(future=marked(8, "4:future:100", at=100_008)),
        {"mismarked": 1, "lost_faults": [[5, 5]]},
    ),
    "no mark": (becomes(third=marked(3, "of somebody else's")), {"mismarked": 1}),
    "no mark, as text": (becomes(third=marked(3, "0:late:1")), {"mismarked": 1}),
    "two at once": (becomes(late=marked(2, "1:late:1", "15:future:9")), {"mismarked": 1}),
    "the last numbers": (becomes(last=marked(18, "20:dropped:16", "21:dropped:17")), {"lost_faults": [[13, 19]]}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_mark_that_is_not_right_is_noticed(apache: ApacheKafka, topic: str, case: str) -> None:
    """And what it does not excuse counts as always."""
    change, wrong = BY_HAND[case]
    made = each_kind()
    change(made)
    topic_with(apache, topic, made.values())
    audit = auditor.Audit(topic)
    audit.counts.append(1)
    said = [audit.add(one) for one in read_all(apache.bootstrap, topic)]
    report = json.loads(json.dumps(audit.report()))
    (run,) = report["runs"]
    found = {name: report[name] for name in ("mismarked", "misplaced", "invalid", "without_id")}
    found |= {name: run[name] for name in ("missing", "repeated", "reordered", "lost_faults")}
    assert {name: number for name, number in found.items() if number} == wrong
    assert not report["ok"]
    if case != "dropped, and there":  # which shows after its mark was read
        assert sum("not as marked" in text for text in said) == report["mismarked"]


def test_a_misplaced_record_must_be_where_its_key_says(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    wrong = user_of(1, 2)
    made = [record(1), marked(2, "1:misplaced:123", key=b"%d" % wrong, partition=0)]
    made.append(marked(3, "2:malformed:tombstone", user=wrong, value=None, partition=0))
    topic_with(apache, topic, made, partitions=2)
    code, report = audited(run_script, apache, topic)
    assert (code, report["misplaced"], report["mismarked"]) == (1, 2, 0)


def test_a_header_of_that_name_without_an_event_id_is_somebody_elses(
    run_script: RunScript, apache: ApacheKafka, topic: str
) -> None:
    headers = [("trace", b"1"), ("fault", b"1:late:1")]
    topic_with(apache, topic, [record(1), {**record(9), "headers": headers}])
    code, report = audited(run_script, apache, topic)
    assert (code, report) == (0, document(topic, 2, {"add_to_cart": 2}, of_run(last=1, events=1), without_id=1))


def test_what_stands_in_a_part_that_is_read_on_excuses_too(
    run_script: RunScript, apache: ApacheKafka, topic: str
) -> None:
    """MAX_EVENTS ends the reading before the mark of a gap, and before a number that is missing so far."""
    first, second = user_of(0, 2), user_of(1, 2)
    made = [record(1, first), record(4, first), marked(5, "3:misplaced:7", user=7, key=b"%d" % first), record(6, first)]
    rest = [marked(3, "1:dropped:2", user=second), marked(3, "2:duplicate:1", user=second)]
    topic_with(apache, topic, [*made, *rest], partitions=2)
    for most in range(1, 7):
        code, report = audited(run_script, apache, topic, MAX_EVENTS=most)
        (run,) = report["runs"]
        assert (code, run["missing"], run["lost_faults"] if "faults" in run else []) == (0, [], []), most


def test_what_retention_has_cut_is_not_judged(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    """The marks that are there are right all the same: what came before them is gone."""
    topic_with(apache, topic, each_kind().values())
    delete_before(apache.bootstrap, topic, 0, 5)  # the first that is left is the duplicate
    code, report = audited(run_script, apache, topic)
    (run,) = report["runs"]
    assert (code, report["mismarked"], run["lost_faults"]) == (0, 0, None)
    assert (run["missing"], run["truncated_before"]) == ([], 7)
    assert run["faults"] == {"duplicate": 1, "dropped": 2, "misplaced": 1, "future": 1, "malformed": 7}


@pytest.mark.parametrize(
    "config", [{"cleanup.policy": "compact"}, {"message.timestamp.type": "LogAppendTime"}], ids=str
)
def test_topics_of_other_kinds(run_script: RunScript, apache: ApacheKafka, topic: str, config: dict[str, str]) -> None:
    create_topic(apache.bootstrap, topic, 2, config=config)
    run = {"FAULTS": MIX, "MAX_EVENTS": 1000, "INTERVAL_SECONDS": 0, "FAULT_DISTANCE": 50}
    script = run_script(SCRIPT, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, LOG_FORMAT="json", **run)
    assert script.wait(PATIENCE) == 0
    code, report = audited(run_script, apache, topic)
    (of_it,) = report["runs"]
    assert (code, report["mismarked"]) == (0, 0)
    assert of_it["faults"] == last_line(script)["faults"]
    assert of_it["lost_faults"] == (None if "cleanup.policy" in config else [])


def test_what_compaction_may_have_removed(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    """Of two with the same key it keeps the later one: a duplicate alone, behind events that came after its first."""
    made = [record(6), marked(4, "2:duplicate:2"), marked(7, "3:future:9", at=9007)]
    topic_with(apache, topic, made, config={"cleanup.policy": "compact"})
    code, report = audited(run_script, apache, topic)
    (run,) = report["runs"]
    assert (code, report["ok"], report["mismarked"], run["reordered"]) == (0, True, 0, 0)
    assert (run["faults"], run["lost_faults"]) == ({"future": 1}, None)


def test_runs_with_and_without_faults_are_judged_apart(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.bootstrap, topic, 2, config={"retention.ms": "-1"})
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0, "MAX_EVENTS": 500}
    for script, settings in (
        (SCRIPT, {"FAULTS": MIX}),
        ("random_event_producer.py", {}),
        (SCRIPT, {"FAULTS": MIX, "STREAM": "churn", "START_TIME": "2026-05-04", "SEED": "the same"}),
        (SCRIPT, {"FAULTS": MIX, "STREAM": "churn", "START_TIME": "2026-05-04", "SEED": "the same"}),
    ):
        assert run_script(script, **where, **settings).wait(PATIENCE) == 0
    code, report = audited(run_script, apache, topic)
    assert (code, report["mismarked"]) == (0, 0)
    assert ["faults" in run for run in report["runs"]] == [True, False, True, True]


def test_from_now_on(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    """START=latest in the midst of a run: what was held back, or sent before, comes without what it belongs to."""
    create_topic(apache.bootstrap, topic, 2, config={"retention.ms": "-1"})
    port = free_port()
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic}
    run = {"FAULTS": MIX, "FAULT_DISTANCE": 100, "INTERVAL_SECONDS": 0.003}
    script = run_script(SCRIPT, **where, **run, METRICS_PORT=port)
    await_sent(port, 300)
    reader = run_script(AUDITOR, "--json", **where, START="latest", TIMEOUT_SECONDS=5)
    reader.wait_for("Reading topic")
    await_sent(port, sent_so_far(port) + 700)
    script.signal(signal.SIGTERM)
    assert script.wait(PATIENCE) == 0
    code, report = outcome(reader)
    (of_it,) = report["runs"]
    assert (code, report["mismarked"], of_it["lost_faults"], of_it["missing"]) == (0, 0, None, [])
    assert of_it["faults"].keys() == set(KINDS)


# ------------------------------------------------------------------------------------------------- a consumer's score


def scored(run_script: RunScript, kafka: ApacheKafka, topic: str, verdicts: Path, **settings: Any) -> dict[str, Any]:
    code, report = audited(run_script, kafka, topic, VERDICTS=verdicts, **settings)
    assert (code, report["ok"]) == (0, True), report
    scores: dict[str, Any] = report["scores"]
    assert list(scores) == list(KINDS)
    return scores


def score(made: int, found: int, missed: Iterable[str] = (), false: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    missed, false = list(missed), list(false)
    return {
        "made": made,
        "found": found,
        "missed": len(missed),
        "false": len(false),
        "precision": round(found / (found + len(false)), 4) if found + len(false) else None,
        "recall": round(found / made, 4) if made else None,
        "missed_ids": missed[:20],
        "false_ids": false[:20],
        **more,
    }


def of(*sequences: int) -> list[str]:
    return [f"{RUN}:{sequence}" for sequence in sequences]


FOUND = f"""\ufeffevent_id,fault
{RUN}:2,late

{RUN}:4 , duplicate
  {{"event_id": "{RUN}:5", "fault": "dropped", "why": "a line\u2028of two"}}
{RUN}:16,dropped
{RUN}:18,dropped
{RUN}:7,misplaced
{RUN}:7,misplaced
{RUN}:10,malformed
{RUN}:9,malformed
{RUN}:1,malformed
ffffffffffffffff:9,malformed
"""


def test_found_missed_and_accused_falsely(
    run_script: RunScript, apache: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    (tmp_path / "found.csv").write_text(FOUND, encoding="utf-8")
    topic_with(apache, topic, each_kind().values())
    missed = {"wrong_type": 1, "missing_field": 1, "extra_field": 1, "unknown_type": 1, "tombstone": 1}
    assert scored(run_script, apache, topic, tmp_path / "found.csv") == {
        "late": score(1, 1),
        "duplicate": score(1, 1),
        "dropped": score(3, 2, of(17), of(18)),
        "misplaced": score(1, 1, (), of(7)),  # said twice
        "future": score(1, 0, of(8)),
        "malformed": score(7, 2, of(11, 12, 13, 14, 15), [*of(1), "ffffffffffffffff:9"], missed_by_detail=missed),
    }


def test_what_people_see_of_a_score(run_script: RunScript, apache: ApacheKafka, topic: str, tmp_path: Path) -> None:
    (tmp_path / "found.csv").write_text(FOUND, encoding="utf-8")
    topic_with(apache, topic, each_kind().values())
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 1}
    script = run_script(AUDITOR, **where, VERDICTS=tmp_path / "found.csv")
    assert script.wait(PATIENCE) == 0
    assert script.stdout_lines[-8:-1] == [
        "Verdicts       made    found   missed    false  precision     recall",
        "late              1        1        0        0      1.000      1.000",
        "duplicate         1        1        0        0      1.000      1.000",
        "dropped           3        2        1        1      0.667      0.667",
        "misplaced         1        1        0        1      0.500      1.000",
        "future            1        0        1        0          -      0.000",
        "malformed         7        2        5        2      0.500      0.286",
    ]


@pytest.mark.parametrize("created_by", ["CreateTime", "LogAppendTime"])
def test_late_is_what_a_consumer_can_see(
    run_script: RunScript, apache: ApacheKafka, topic: str, tmp_path: Path, created_by: str
) -> None:
    """By how much the time is behind those without a fault before it in its partition."""
    first, second = user_of(0, 2), user_of(1, 2)
    made = [
        record(1, first, at=1000),
        record(4, first, at=9000),
        marked(2, "1:late:9", user=first, at=4000),  # 5 s behind
        marked(3, "2:late:9", user=first, at=8000),  # 1 s behind
        marked(1, "3:duplicate:9", user=first, at=1000),
        marked(5, "4:future:100", user=second, at=110_000),
        marked(6, "5:late:1", user=second, at=10_000),  # behind one from the future only
        marked(7, "6:late:1", user=first, at=20_000),  # behind nothing
        marked(9, "7:dropped:8", user=first, at=30_000),  # has no fault itself: what is dropped is another
        marked(10, "8:late:1", user=first, at=26_000),  # 4 s behind it
    ]
    topic_with(apache, topic, made, partitions=2, config={"message.timestamp.type": created_by})
    called = tmp_path / "found.csv"
    called.write_text("".join(f"{event_id},late\n" for event_id in of(1, 2, 3, 4, 5, 6, 7, 9, 10)))
    for seconds, must in ((0, (2, 3, 10)), (1, (2, 10)), (5, ())):
        found = scored(run_script, apache, topic, called, LATE_SECONDS=seconds)["late"]
        assert found == score(len(must), len(must), (), of(4, 5, 9)), seconds
    called.write_text("")
    assert scored(run_script, apache, topic, called)["late"] == score(3, 0, of(2, 3, 10))


def test_what_is_invalid_by_itself_has_no_time(
    run_script: RunScript, apache: ApacheKafka, topic: str, tmp_path: Path
) -> None:
    (tmp_path / "found.csv").write_text("")
    made = [record(1), record(2, value=b"{}"), record(3, value=None), marked(4, "1:late:1")]
    made.append(marked(5, "2:late:1", value=None))
    topic_with(apache, topic, made, config={"message.timestamp.type": "LogAppendTime"})
    code, report = audited(run_script, apache, topic, VERDICTS=tmp_path / "found.csv")
    assert (code, report["invalid"], report["mismarked"], report["scores"]["late"]) == (1, 3, 0, score(0, 0))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        ("\n\nfound 17\n", "line 3 is no verdict ('found 17' is no event id)"),
        (f"{RUN}:1,late\n{RUN}:0,late\n", f"line 2 is no verdict ('{RUN}:0' is no event id)"),
        (f"{RUN}:1\n", "line 1 is no verdict ('' is no kind of fault)"),
        (f"event_id,fault\n{RUN}:1,tombstone\n", "line 2 is no verdict ('tombstone' is no kind of fault)"),
        (f'{{"event_id": "{RUN}:1"}}\n', "line 1 is no verdict (None is no kind of fault)"),
        ('{"event_id": 17, "fault": "late"}\n', "line 1 is no verdict (17 is no event id)"),
        ('{"event_id": ["x"], "fault": ["late"]}\n', "line 1 is no verdict (['x'] is no event id)"),
        ("{late}\n", "line 1 is no verdict ("),
    ],
    ids=["no file", "no verdict", "no event id", "no kind", "no such kind", "no field", "no text", "lists", "no JSON"],
)
def test_verdicts_that_cannot_be_read(tmp_path: Path, text: str | None, why: str) -> None:
    """At the start, before Kafka is looked for."""
    path = tmp_path / "found.csv"
    if text is not None:
        path.write_text(text)
    done = finish(script=AUDITOR, VERDICTS=path, KAFKA_BROKER="127.0.0.1:1")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"VERDICTS: '{path}', {why}")
    assert done.returncode == 2


def test_the_consumer_of_the_page(run_script: RunScript, apache: ApacheKafka, topic: str, tmp_path: Path) -> None:
    """It is scored as the page says, as it is and in both ways that it may be changed."""
    page = (ROOT / "docs" / "faults.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (guard,) = re.findall(r"^    (    if time > .*\n)    (    +return .*\n)", page, re.MULTILINE)
    create_topic(apache.bootstrap, topic, 3, config={"retention.ms": "-1"})
    where = {"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic}
    month = {"STREAM": "churn", "SEED": "demo", "START_TIME": "2026-05-04", "END_TIME": "2026-06-04"}
    producer = run_script(SCRIPT, **where, **month, INTERVAL_SECONDS=0)
    assert producer.wait(PATIENCE) == 0

    def score_of(changed: str, late_seconds: int) -> dict[str, Any]:
        (tmp_path / "consumer.py").write_text(changed)
        done = finish(script=tmp_path / "consumer.py", **where)
        assert done.returncode == 0, done.stderr
        (tmp_path / "found.csv").write_bytes(done.stdout)
        return scored(run_script, apache, topic, tmp_path / "found.csv", LATE_SECONDS=late_seconds)

    scores = score_of(code, 3600)
    said = re.findall(r"^    (\w+) +(\d+) +(\d+) +(\d+) +(\d+) +[\d.-]+ +[\d.]+$", page, re.MULTILINE)
    assert [tuple(map(str, (kind, *(scores[kind][name] for name in auditor.COUNTS)))) for kind in KINDS] == said
    code = code.replace("=5000", "=1000")
    late = score_of(code.replace("timedelta(hours=1)", "timedelta(0)"), 0)["late"]
    assert f"finds all {late['found']} late\nevents and accuses {late['false']} others" in page
    scores = score_of(code.replace("    watermark = ", f"{''.join(guard)}    watermark = "), 3600)
    future, late = scores["future"], scores["late"]
    assert f"finds {future['found']} of the {future['made']}, and accuses {future['false']:,} others" in page
    assert f"misses {late['missed']} of the {late['made']} late" in page
