"""A batch is byte for byte what the client's own builder writes, and knows its events."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT
from kafka import TopicPartition
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

PLACE = TopicPartition("events", 0)
EDGES = [0, 1, 2, 62, 63, 64, 65, 126, 127, 128, 129, 8_190, 8_191, 8_192, 8_193]  # where a varint gets longer
CODECS = {"none": 0, "lz4": 3, "zstd": 4}  # gzip has the time of day in its header


def event(chance: random.Random, milliseconds: int, size: int) -> tool.Event:
    run = chance.choice(["", "a", "0123456789abcdef", "läuft", "x" * 200])
    sequence = chance.choice([1, 9, 10, 123_456_789, 10**18])
    key = chance.randbytes(chance.choice([0, 1, 3, 63, 64, 200]))
    return tool.Event(run, sequence, "bounce", key, chance.randbytes(size), milliseconds, 0.0)


def stream(seed: int) -> Iterator[tool.Event]:
    """Times that stand still, go on, go back, and are far away; sizes at the edges and in between."""
    chance = random.Random(seed)
    milliseconds = chance.choice([0, 1, 1_700_000_000_000])
    for _ in range(chance.choice([1, 2, 70, 300])):
        milliseconds += chance.choice([0, 0, 1, 7, -1, -90_000_000, 64, 8_192, 3_000_000_000, -(2**40), 2**40])
        yield event(chance, max(0, milliseconds), chance.choice([*EDGES, chance.randrange(20_000)]))


def expected(events: list[tool.Event], codec: int, size: int) -> list[bytes]:
    """By the client's own builder, a new batch where one is full."""
    done: list[MemoryRecordsBuilder] = [MemoryRecordsBuilder(2, codec, size)]
    for one in events:
        record = (one.timestamp_ms, one.key, one.value, [("event_id", one.event_id.encode())])
        if done[-1].append(*record) is None:
            done.append(MemoryRecordsBuilder(2, codec, size))
            assert done[-1].append(*record)
    return [closed(builder) for builder in done]


def closed(records: Any) -> bytes:
    records.set_producer_state(4_711, 3, 17, False)
    records.close()
    return bytes(records.buffer())


def batches(events: list[tool.Event], codec: int, size: int, chance: random.Random) -> list[tool.Batch]:
    """As the tool hands them over: in bursts of any length."""
    made: list[tool.Batch] = []
    while events:
        burst = events[: chance.randrange(1, 100)]
        events = events[len(burst) :]
        while burst:
            taken = made[-1].take(burst) if made else 0
            burst = burst[taken:]
            if burst:
                made.append(tool.Batch(PLACE, MemoryRecordsBuilder(2, codec, size)))
    return made


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("size", [100, 2_000, 16_384, 262_144])
def test_byte_for_byte(size: int, codec: int) -> None:
    for seed in range(40):
        events = list(stream(seed))
        made = batches(events, codec, size, random.Random(seed))
        assert [one for batch in made for one in batch.events] == events
        assert [batch.record_count for batch in made] == [len(batch.events) for batch in made]
        assert [closed(batch.records) for batch in made] == expected(events, codec, size), f"seed {seed}"


def test_a_closed_batch_takes_nothing() -> None:
    events = list(stream(1))
    batch = tool.Batch(PLACE, MemoryRecordsBuilder(2, 0, 262_144))
    assert batch.take(events[:1]) == 1
    closed(batch.records)
    assert batch.take(events[1:2] or events[:1]) == 0
    assert len(batch.events) == 1


def test_what_is_read_back() -> None:
    """Key, value, header and time of each record, by the client's own reader."""
    events = list(stream(2))
    batch = tool.Batch(PLACE, MemoryRecordsBuilder(2, 0, 1 << 30))
    assert batch.take(events) == len(events)
    (read,) = MemoryRecords(closed(batch.records))
    assert [(record.timestamp, record.key, record.value, record.headers) for record in read] == [
        (one.timestamp_ms, one.key, one.value, [("event_id", one.event_id.encode())]) for one in events
    ]
