"""Pace, tally and generator on a clock of the test's own; what is bounded by count; what goes over the wire."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import sys
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from brokers import ApacheKafka, audit, read_all, wait_until
from brokers import free_port as unused_port
from conftest import ROOT, Broker, MakeApache, RunScript

sys.path.insert(0, str(ROOT))

from random_event_producer import (
    CATCH_UP_SECONDS,
    MAX_UNCONFIRMED,
    PRODUCTS,
    Event,
    Pace,
    RandomEventProducer,
    Settings,
    Tally,
)
from test_random_consumer import parse_event

PRODUCER = "random_event_producer.py"
NANOSECONDS = 1_000_000_000
JANUARY = 1_705_314_600 * NANOSECONDS  # 2024-01-15T10:30:00
TICK = 1e-6  # seconds that any real clock has gone on between two looks
CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}  # the low bits of a batch's attributes


# ---------------------------------------------------------------------------------------------------------- pace


@pytest.mark.parametrize(
    ("interval", "start"),
    [
        pytest.param(3.0, 0.0, id="default"),
        pytest.param(0.01, 12345.678, id="100-per-second"),
        pytest.param(1 / 3, 98765.4321, id="a-third-of-a-second"),
        pytest.param(0.00005, 1e6 + 0.1, id="20000-per-second-after-12-days-up"),
        pytest.param(3600.0, 0.7, id="one-per-hour"),
    ],
)
def test_deadlines_are_exact_after_a_million_slots(interval: float, start: float) -> None:
    pace, slots = Pace(interval, start), 1_000_000
    took = 0
    while took < slots:
        now = start + (took + 0.5) * interval
        dues = pace.take(now + 900 * interval, 1000)
        assert list(dues) == [start + slot * interval for slot in range(took, took + len(dues))]
        took += len(dues)
    assert pace.due() == start + took * interval
    assert pace.skipped == 0


@pytest.mark.parametrize("interval", [0.05, 0.003, 0.0007], ids=str)
def test_no_slot_is_early_and_short_delays_are_caught_up(interval: float) -> None:
    """Sends that take anything up to a second shift nothing: no slot lost, none early, none twice."""
    dice, pace, now = random.Random(1), Pace(interval, 100.0), 100.0
    taken: list[float] = []
    while now < 160.0:
        assert pace.skip(now) == 0
        dues = pace.take(now, 250)
        assert all(due <= now + 1e-9 for due in dues)
        taken += dues
        caught_up = pace.due() > now
        now = max(now, pace.due()) + dice.uniform(0, 0.9 if caught_up and dice.random() < 0.1 else interval)
    assert taken == [100.0 + slot * interval for slot in range(len(taken))]
    assert pace.behind(now) < CATCH_UP_SECONDS + interval


@pytest.mark.parametrize(
    ("interval", "late", "skipped"),
    [
        pytest.param(0.25, 0.75, 0, id="short-delay-is-caught-up"),
        pytest.param(0.25, 1.0, 0, id="exactly-the-limit"),
        pytest.param(0.25, 1.25, 5, id="just-over-the-limit"),
        pytest.param(0.25, 1000.0, 4000, id="long"),
        pytest.param(0.0001, 10.0, 100_000, id="long-and-fast"),
        pytest.param(2.0, 1.5, 0, id="late-by-less-than-an-interval"),
        pytest.param(2.0, 7.0, 3, id="slow-pace"),
        pytest.param(0.0, 50.0, 0, id="full-speed-has-no-schedule"),
    ],
)
def test_skipped_slots(interval: float, late: float, skipped: int) -> None:
    pace = Pace(interval, 64.0)
    assert pace.skip(64.0 + late) == pytest.approx(skipped, abs=1 if interval == 0.0001 else 0)
    missed = pace.skipped
    assert pace.slot == missed
    if interval:
        dues = pace.take(64.0 + late, sys.maxsize)
        assert list(dues) == [64.0 + slot * interval for slot in range(missed, int(late / interval + 1e-6) + 1)]
    assert pace.skip(64.0 + late) == 0, "skipped twice"


@pytest.mark.parametrize(
    ("interval", "duration", "events"),
    [
        pytest.param(3.0, 9.0, 3, id="whole-multiple"),
        pytest.param(3.0, 9.5, 4, id="and-a-bit"),
        pytest.param(3.0, 0.1, 1, id="shorter-than-an-interval"),
        pytest.param(0.25, 60.0, 240, id="minute"),
        pytest.param(0.1, 1.0, 10, id="binary-fractions"),
        pytest.param(0.01, 10.0, 1000, id="ten-seconds-of-100-per-second"),
    ],
)
@pytest.mark.parametrize("start", [0.0, 4096.0, 98765.4321], ids=str)
def test_duration_is_a_number_of_slots(interval: float, duration: float, events: int, start: float) -> None:
    pace, now, taken = Pace(interval, start, duration), start, 0
    while not pace.finished(now):
        taken += len(pace.take(now, 100))
        now = max(now, pace.due()) + TICK
        assert taken <= events + 1
    assert taken == events


@pytest.mark.parametrize("late", [0.5, 5.0, 5000.0], ids=str)
def test_duration_ends_a_run_that_is_late(late: float) -> None:
    pace = Pace(0.25, 0.0, 10.0)
    made = len(pace.take(0.0, 10))
    now, rounds = late, 0
    while not pace.finished(now):
        pace.skip(now)
        dues = pace.take(now, 10)
        assert all(due < 10.0 for due in dues)
        made += len(dues)
        now, rounds = max(now, pace.due()) + TICK, rounds + 1
        assert rounds < 100
    assert made + pace.skipped == 40


@pytest.mark.parametrize("seed", range(5))
def test_made_and_skipped_are_all_slots(seed: int) -> None:
    dice, pace, now, made = random.Random(seed), Pace(0.01, 0.0), 0.0, 0
    for _ in range(20_000):
        pace.skip(now)
        made += len(pace.take(now, 250))
        assert made + pace.skipped == pace.slot
        now += dice.choice([0.001, 0.01, 0.02, 0.5, 3.0])
    assert pace.skipped > 0
    assert pace.slot == pytest.approx(now / 0.01, abs=400)


def test_full_speed_takes_what_there_is_room_for() -> None:
    pace = Pace(0.0, 10.0, 5.0)
    assert [len(pace.take(now, 250)) for now in (10.0, 14.9, 15.0, 16.0)] == [250, 250, 0, 0]
    assert [pace.finished(now) for now in (10.0, 14.9, 15.0)] == [False, False, True]
    assert pace.behind(14.0) == 0


@pytest.mark.parametrize(("interval", "duration"), [(0.7, 2.1), (0.1, 0.3), (0.01, 1.13), (3, 9)])
def test_it_is_finished_when_there_is_nothing_to_take(interval: float, duration: float) -> None:
    """However start + n * interval is rounded: else the run would never end."""
    for number in range(2000):
        pace = Pace(interval, 10 + number * 0.04567, duration)
        assert not pace.finished(pace.start)
        pace.take(pace.end, 1000)
        assert pace.finished(pace.end)
        assert pace.slot in (round(duration / interval), round(duration / interval) + 1)


# --------------------------------------------------------------------------------------------------------- tally


def event(event_type: str = "bounce", due: float = 0.0) -> Event:
    return Event("0123456789abcdef", 7, event_type, b"1", b"{}", 0, due)


def make(generator: RandomEventProducer) -> Event:
    made = generator.generate_event()
    assert made, "the stream has ended"
    return made


@pytest.mark.parametrize(
    "latencies",
    [
        pytest.param([0.004], id="one"),
        pytest.param([0.001] * 99 + [2.0], id="one-late"),
        pytest.param([0.001] * 50 + [0.5] * 50, id="two-humps"),
        pytest.param([random.Random(1).expovariate(100) + 1e-4 for _ in range(10_000)], id="exponential"),
        pytest.param([random.Random(2).lognormvariate(-3, 2) + 1e-4 for _ in range(10_000)], id="long-tail"),
        pytest.param([0.0] * 10, id="nothing-at-all"),
    ],
)
def test_quantiles_are_right_to_five_percent(latencies: list[float]) -> None:
    tally = Tally(["bounce"])
    for latency in latencies:
        tally.confirmed([event(due=1000.0 - latency)], 1000.0)
    ordered = sorted(latencies)
    for share in (0.5, 0.9, 0.99, 1.0):
        exact = ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        assert tally.quantile(share) == pytest.approx(exact, rel=0.051, abs=1e-4)
        assert tally.quantile(share) <= tally.latency_max
    assert tally.latency_max == pytest.approx(ordered[-1], abs=1e-9)
    assert tally.latency_sum == pytest.approx(sum(ordered), abs=1e-6)
    assert sum(tally.latency) == len(ordered), "an event outside the histogram"


def test_a_tally_with_nothing_in_it() -> None:
    tally = Tally(["bounce"])
    assert (tally.quantile(0.5), tally.quantile(0.99), tally.total_sent, tally.total_failed) == (0, 0, 0, 0)
    assert tally.sent == {"bounce": 0}, "a type with no event yet shows as 0 in the metrics"


def test_types_are_counted_apart() -> None:
    tally = Tally(["bounce", "add_to_cart"])
    tally.confirmed([event("bounce"), event("add_to_cart"), event("bounce")], 1.0)
    assert tally.sent == {"bounce": 2, "add_to_cart": 1}
    assert tally.total_sent == 3


def test_more_events_cost_no_more_memory() -> None:
    tally = Tally(["bounce"])
    size = len(tally.latency)
    for seconds in (0.0, 1e-9, 1.0, 1e3, 1e6, 1e9):
        tally.confirmed([event(due=-seconds)], 0.0)
    assert len(tally.latency) == size
    assert tally.quantile(1.0) == 1e9


# ----------------------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        pytest.param(0, "1970-01-01T00:00:00.000000", id="epoch"),
        pytest.param(JANUARY + 123_456_789, "2024-01-15T10:30:00.123456", id="cut-not-rounded"),
        pytest.param(JANUARY + 7_000, "2024-01-15T10:30:00.000007", id="leading-zeros"),
        pytest.param(JANUARY + 999_999_999, "2024-01-15T10:30:00.999999", id="last-microsecond"),
        pytest.param(1_709_251_199_999_999_999, "2024-02-29T23:59:59.999999", id="leap-day"),
        pytest.param(1_709_251_200_000_000_000, "2024-03-01T00:00:00.000000", id="after-leap-day"),
    ],
)
def test_timestamp(nanoseconds: int, text: str) -> None:
    made = make(RandomEventProducer(clock=lambda: nanoseconds))
    assert parse_event(made.value)["timestamp"] == text
    assert made.timestamp_ms == nanoseconds // 1_000_000


def test_the_clock_is_read_for_each_event() -> None:
    """Steps of all sizes, a second's and a millisecond's edge among them, and back."""
    steps = [0, 1_000, 999_000, 1_000_000, 998_999_000, 1, -5_000_000_000, 250_000]
    moments = [JANUARY + passed for passed in itertools.accumulate(steps * 50)]
    clock = iter(moments)
    generator = RandomEventProducer(clock=lambda: next(clock))
    for moment in moments:
        made = make(generator)
        whole, fraction = divmod(moment // 1000, 1_000_000)
        assert parse_event(made.value)["timestamp"].endswith(f":{whole % 60:02}.{fraction:06}")
        assert made.timestamp_ms == moment // 1_000_000


def test_every_event_is_valid_and_the_whole_range_is_used() -> None:
    """What interface.md allows is what comes, to both ends of each range, and not one step further."""
    generator = RandomEventProducer("ranges")
    seen: defaultdict[str, set[Any]] = defaultdict(set)
    for _ in range(20_000):
        made = make(generator)
        parsed = parse_event(made.value)
        assert made.key == str(parsed["user_id"]).encode()
        assert made.event_type == parsed["event_type"]
        seen["user"].add(parsed["user_id"])
        for name, value in parsed["metadata"].items():
            seen[f"{made.event_type}.{name}"].add(value)
    assert seen["user"] == set(range(1, 1001))
    assert seen["add_to_cart.quantity"] == {1, 2, 3, 4, 5}
    assert seen["product_view.page"] == {"/product-detail"}
    assert seen["product_view.device"] == seen["bounce.device"] == {"desktop", "mobile", "tablet"}
    assert seen["bounce.referrer"] == {"google", "facebook", "twitter", "email", "direct"}
    assert 0 < min(seen["bounce.session_length"]) < max(seen["bounce.session_length"]) < 2
    assert len(seen["add_to_cart.product_id"]) == len(PRODUCTS)
    assert len(seen["add_to_cart.page"]) > 1


def test_types_and_users_are_evenly_spread() -> None:
    generator = RandomEventProducer("evenly")
    users: Counter[bytes] = Counter()
    types: Counter[str] = Counter()
    for _ in range(100_000):
        made = make(generator)
        users[made.key] += 1
        types[made.event_type] += 1
    assert all(count == pytest.approx(100_000 / 3, rel=0.03) for count in types.values())
    assert all(50 <= count <= 150 for count in users.values())  # 100 on average, five standard deviations


def test_the_catalogue_is_consistent() -> None:
    """One product, one category, one price: over many events, in every run, whatever the seed."""
    category, price = defaultdict(set), defaultdict(set)
    for seed in ("a", "b", None):
        generator = RandomEventProducer(seed)
        for _ in range(10_000):
            metadata = json.loads(make(generator).value)["metadata"]
            if "price" in metadata:
                price[metadata["product_id"]].add(metadata["price"])
            if "category" in metadata:
                category[metadata["product_id"]].add(metadata["category"])
    assert len(price) > 900
    assert all(len(found) == 1 for found in (*category.values(), *price.values()))
    assert all(amount == round(amount, 2) > 0 for amounts in price.values() for amount in amounts)


def test_sequences_have_no_gap_and_runs_no_twin() -> None:
    generators = [RandomEventProducer("same seed") for _ in range(5)]
    assert len({generator.run for generator in generators}) == 5
    for generator in generators:
        assert re.fullmatch("[0-9a-f]{16}", generator.run)
        event_ids = [make(generator).event_id for _ in range(1000)]
        assert event_ids == [f"{generator.run}:{number}" for number in range(1, 1001)]


def stream(generator: RandomEventProducer, count: int = 500) -> list[tuple[Any, ...]]:
    events = [json.loads(make(generator).value) for _ in range(count)]
    return [(made["user_id"], made["event_type"], made["metadata"]) for made in events]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        pytest.param(("7", 0, 1), ("7", 0, 1), True, id="same-seed"),
        pytest.param(("7", 0, 1), ("8", 0, 1), False, id="other-seed"),
        pytest.param((None, 0, 1), (None, 0, 1), False, id="no-seed"),
        pytest.param(("7", 0, 2), ("7", 1, 2), False, id="other-shard"),
        pytest.param(("7", 0, 2), ("7", 0, 2), True, id="same-shard"),
    ],
)
def test_seeds(one: tuple[Any, ...], other: tuple[Any, ...], same: bool) -> None:
    first, second = RandomEventProducer(*one), RandomEventProducer(*other)
    second.check_event_types()  # takes nothing from the stream
    left, right = stream(first), stream(second)
    assert (left == right) is same
    assert ([event[1] for event in left] == [event[1] for event in right]) is same, "only the users differ"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_shards_share_the_users(count: int) -> None:
    seen: list[int] = []
    for index in range(count):
        generator = RandomEventProducer("s", index, count)
        mine = {int(make(generator).key) for _ in range(20 * 1000 // count)}
        assert {user % count for user in mine} == {index}
        seen += mine
    assert sorted(seen) == list(range(1, 1001))


# ------------------------------------------------------------------------------------------------------- the wire


def codecs_in(log: Path) -> set[int]:
    """The compression of each batch in a log segment (record batch format 2: attributes follow the checksum)."""
    data, at, found = log.read_bytes(), 0, set()
    while at + 23 <= len(data) and (size := int.from_bytes(data[at + 8 : at + 12])):
        found.add(int.from_bytes(data[at + 21 : at + 23]) & 7)
        at += 12 + size
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_compression_round_trip(run_script: RunScript, broker: Broker, topic: str, codec: str) -> None:
    script = run_script(
        PRODUCER,
        KAFKA_BROKER=broker.bootstrap,
        KAFKA_TOPIC=topic,
        KAFKA_COMPRESSION=codec,
        INTERVAL_SECONDS=0,
        MAX_EVENTS=2000,
    )
    assert script.wait() == 0, script.tail()
    records = read_all(broker.direct, topic)
    assert len(records) == 2000
    for record in records:
        parse_event(record.value)
    assert audit(records).clean
    if isinstance(broker, ApacheKafka):
        segment = broker.folder / "node-0" / "data" / f"{topic}-0" / f"{0:020}.log"
        assert codecs_in(segment) == {CODECS[codec]}


def test_default_is_no_compression() -> None:
    assert Settings.model_fields["kafka_compression"].default == "none"


# ------------------------------------------------------------------------------------------------------- bounds


def metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(rf"^random_event_producer_{name} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_a_frozen_broker_bounds_what_is_unconfirmed(run_script: RunScript, make_apache: MakeApache, topic: str) -> None:
    """Full speed and a fast schedule against one broker that stops answering: memory is bounded by count; what a
    schedule lost meanwhile is skipped and said, never sent in a burst; nothing is lost.
    """
    kafka = make_apache()
    kafka.start()
    intervals = {"full speed": 0, "scheduled": 0.0005}
    ports = {name: unused_port() for name in intervals}
    scripts = {
        name: run_script(
            PRODUCER,
            KAFKA_BROKER=kafka.bootstrap,
            KAFKA_TOPIC=topic,
            INTERVAL_SECONDS=interval,
            METRICS_PORT=ports[name],
            LOG_FORMAT="json",
        )
        for name, interval in intervals.items()
    }
    for script in scripts.values():
        script.wait_for("Total events sent: [1-9]")

    def unconfirmed() -> set[float]:
        counts = {metric(port, "unacknowledged_events") for port in ports.values()}
        assert max(counts) <= MAX_UNCONFIRMED
        return counts

    kafka.freeze()
    try:
        wait_until(lambda: unconfirmed() == {MAX_UNCONFIRMED}, 60, "both are full")
        wait_until(lambda: metric(ports["scheduled"], "behind_seconds") > 1, 10, "behind the schedule", 0.2)
        assert unconfirmed() == {MAX_UNCONFIRMED}
    finally:
        kafka.thaw()
    wait_until(lambda: MAX_UNCONFIRMED not in unconfirmed(), 30, "Kafka confirms again")
    wait_until(lambda: metric(ports["scheduled"], "events_skipped_total") > 0, 10, "slots were given up")
    for script in scripts.values():
        script.signal()
        assert script.wait() == 0, script.tail()
    summaries = {name: json.loads(script.lines[-1]) for name, script in scripts.items()}
    assert summaries["full speed"]["skipped"] == 0
    scheduled = summaries["scheduled"]
    assert scheduled["skipped"] > 0
    assert scheduled["sent"] + scheduled["skipped"] <= scheduled["seconds"] / intervals["scheduled"] + 1
    scripts["scheduled"].wait_for(r"\d+ events skipped")
    checked = audit(read_all(kafka.direct, topic), 1)
    assert checked.clean
    assert checked.events == sum(summary["sent"] for summary in summaries.values())
