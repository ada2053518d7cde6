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
# ]
# ///
from __future__ import annotations

__doc__ = """Send events with faults whose truth is known: late, repeated, dropped, misplaced, ahead of time, malformed.

A header `fault` marks each fault. So test_random_consumer.py can tell faults made on purpose from all others, and score
a consumer that looks for faults. --faults prints the answer key of the run that the variables describe. docs/faults.md
has an example.
"""

# In the order of an event: settings -> stream -> faults -> pace; then the tool.

import itertools
import os
import random
import secrets
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from heapq import heappop, heappush
from typing import Annotated, Any, Literal, Self

sys.path[:0] = [os.path.dirname(os.path.realpath(__file__))]  # which `python -I` leaves out

import random_event_producer as tool
from random_churn_producer import DAY, ChurnSettings, RandomChurnProducer, instant_of, model_days
from random_event_producer import Clash, Event, RandomEventProducer, Settings, log, setting, varint

import orjson
from pydantic import AfterValidator

Draw = Callable[[], float]  # 0 to 1, 1 excluded

STREAMS: dict[str, type[RandomEventProducer]] = {"random": RandomEventProducer, "churn": RandomChurnProducer}
ONE_BY_ONE = 1_000_000  # skipped due times that are drawn one by one; of more, the expected number is taken

# -------------------------------------------------------------------------------------------------------- faults
# The tables are in the order of the dice. An event suffers one fault at most.

TOMBSTONE = b"null"  # as --print shows a record without a value


def _json(event: dict[str, Any]) -> bytes:
    return b"%b" % orjson.dumps(event)  # a copy: dumps() keeps kilobytes of room behind it


def _changed(value: bytes, **fields: object) -> bytes:
    return _json(orjson.loads(value) | fields)


def _without_a_field(value: bytes, draw: Draw) -> bytes:
    event = orjson.loads(value)
    del event[list(event)[int(4 * draw())]]
    return _json(event)


MALFORMED: dict[str, Callable[[bytes, Draw], bytes]] = {  # the value, made of what it was
    "truncated": lambda value, draw: value[: 1 + int((len(value) - 1) * draw())],
    "encoding": lambda value, _: value.replace(b'"event_type":"', b'"event_type":"\xff', 1),  # not UTF-8
    "wrong_type": lambda value, _: _changed(value, user_id=str(orjson.loads(value)["user_id"])),
    "missing_field": _without_a_field,
    "extra_field": lambda value, _: _changed(value, extra=True),
    "unknown_type": lambda value, _: _changed(value, event_type="unknown"),
    "tombstone": lambda *_: TOMBSTONE,
}
KINDS = ("late", "duplicate", "dropped", "misplaced", "future", "malformed")
DICE = (*KINDS[:-1], *MALFORMED)


@dataclass(slots=True)
class FaultyEvent(Event):
    """The record of an event, with marks: a fault, or events that were dropped just before it."""

    marks: Sequence[str]
    event: Event  # as it was

    def told(self) -> dict[str, Any]:
        return {**self.event.told(), "fault": self.marks}

    def record(self, milliseconds: int, offset: int) -> bytes:
        key, value, event_id = self.key, self.value, f"{self.run}:{self.sequence}".encode()
        size, value = (varint(-1), b"") if value == TOMBSTONE else (varint(len(value)), value)
        start = b"\0", varint(milliseconds), varint(offset), varint(len(key)), key, size, value
        headers = [varint(1 + len(self.marks)), b"\x10event_id", varint(len(event_id)), event_id]
        for mark in self.marks:
            headers += b"\x0afault", varint(len(mark)), mark.encode()  # ASCII
        body = b"".join((*start, *headers))
        return varint(len(body)) + body


def _misplaced(event: Event, draw: Draw) -> tuple[str, Event]:
    right, wrong = int(event.key), 1 + int(999 * draw())
    return f"misplaced:{right}", replace(event, key=b"%d" % (wrong + (wrong >= right)))


def _future(event: Event, draw: Draw) -> tuple[str, Event]:
    seconds = int(1801 ** draw())  # Kafka refuses what is more than an hour ahead
    ahead = datetime.fromisoformat(orjson.loads(event.value)["timestamp"]) + timedelta(seconds=seconds)
    value = _changed(event.value, timestamp=ahead.isoformat(timespec="microseconds"))
    return f"future:{seconds}", replace(event, value=value, timestamp_ms=event.timestamp_ms + 1000 * seconds)


IN_PLACE: dict[str, Callable[[Event, Draw], tuple[str, Event]]] = {  # the fault, and what the event becomes
    "misplaced": _misplaced,
    "future": _future,
}


# ------------------------------------------------------------------------------------------------------ settings

MIX = "late=0.02,duplicate=0.01,dropped=0.005,misplaced=0.005,future=0.001,malformed=0.007"
MOST_DROPPED = 0.9  # with more, whole stretches of the stream would stand in one record's headers


def shares_of(mix: str) -> dict[str, float]:
    """`late=0.02,malformed=0.007` as shares of what is in DICE, but for those that are 0. Raises ValueError."""
    given: dict[str, float] = {}
    for part in [] if mix == "none" else mix.split(","):
        kind, _, share = (text.strip() for text in part.partition("="))
        if kind not in KINDS and kind not in MALFORMED:
            raise ValueError(f"{kind!r} is no kind of fault")
        if kind in given:
            raise ValueError(f"{kind} is there twice")
        given[kind] = _share(kind, share)
    if (total := round(sum(given.values()), 9)) > 1:
        raise ValueError(f"the shares add up to {total:g}, more than 1")
    of_each = given.get("malformed", 0) / len(MALFORMED)
    shares = {kind: given.get(kind, 0) + of_each * (kind in MALFORMED) for kind in DICE}
    return {kind: share for kind, share in shares.items() if share}


def _share(kind: str, text: str) -> float:
    if not text:
        raise ValueError(f"{kind} has no share, like {kind}=0.01")
    try:
        share = float(text)
    except ValueError:
        share = -1
    if not 0 <= share <= 1:
        raise ValueError(f"{kind}={text} is no share from 0 to 1")
    if kind == "dropped" and share > MOST_DROPPED:
        raise ValueError(f"dropped={text} is more than {MOST_DROPPED}: next to nothing would be sent")
    return share


def _mix(text: str) -> str:
    """Without spaces. Raises ValueError."""
    return "".join(text.split()) if shares_of(text.strip()) else "none"


Mix = Annotated[str, tool.Lower, AfterValidator(_mix)]
Stream = Annotated[Literal["random", "churn"], tool.Lower]
Arrivals = Annotated[Literal["even", "poisson", "bursty", "daily"], tool.Lower]
OF_CHURN = ChurnSettings.model_fields.keys() - Settings.model_fields.keys()


class FaultySettings(ChurnSettings):
    stream: Stream = setting("random", "source of the events: random_event_producer.py or random_churn_producer.py")
    faults: Mix = setting(MIX, "share of the events that get each fault", "none, or kind=share with commas")
    fault_distance: int = setting(
        1000, "late events and duplicates come at most this many events later", "1 to 1000000", ge=1, le=1_000_000
    )
    arrivals: Arrivals = setting("even", "when events are due, INTERVAL_SECONDS apart on average")

    def clashes(self) -> Iterator[Clash]:
        if self.arrivals != "even" and not self.interval_seconds:
            yield Clash("arrivals", "no use with INTERVAL_SECONDS=0", "interval_seconds")
        if self.speed:
            yield Clash("speed", "no use with faults, which change the order: set INTERVAL_SECONDS")
        for name in sorted(OF_CHURN & self.model_fields_set if self.stream == "random" else ()):
            yield Clash(name, "no use with STREAM=random: set STREAM=churn, or unset it", "stream")
        yield from super().clashes()  # of what is said of a variable, the first counts


# --------------------------------------------------------------------------------------------------------- stream


class RandomFaultyProducer(RandomEventProducer):
    """Hands on the events of another stream, and lets some of them suffer a fault.

    Its dice are its own: what happens to which event depends neither on the events nor on the pace.
    """

    settings_type = FaultySettings

    def __init__(self, settings: FaultySettings) -> None:
        """`settings` with a seed."""
        super().__init__()
        self.stream = STREAMS[settings.stream].from_settings(settings)
        self.stream.run, self.event_types = self.run, self.stream.event_types
        self._seed, shares = settings.seed, shares_of(settings.faults)
        self._shard_seed = f"{settings.seed}/{settings.shard_index or 0}/{settings.shard_count}"
        self._kinds, self._sums = [*shares, ""], [*itertools.accumulate(shares.values())]
        self._distance, self._last = settings.fault_distance, settings.max_events or sys.maxsize
        self._sequence = 0  # of the stream's last event so far
        self._held: list[tuple[int, int, Event, str]] = []  # a heap: the sequence it comes behind, its own, its fault
        self._dropped: list[str] = []  # the faults of events dropped since the last record
        self._numbers = itertools.count(1)
        self.faults = dict.fromkeys(("malformed" if kind in MALFORMED else kind for kind in shares), 0)
        self._records = self._hand_on_all()

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        return cls(settings.model_copy(update={"seed": settings.seed or secrets.token_hex(8)}))

    def prepare(self, settings: Any, stop: tool.Stop, with_kafka: bool) -> None:
        """Say what makes the same run again."""
        if settings.stream == "random":  # the churn stream says it itself
            log.info("SEED=%s", self._seed)
        self.stream.prepare(settings, stop, with_kafka)
        log.info("FAULTS=%s FAULT_DISTANCE=%d", settings.faults, self._distance)

    def check_event_types(self) -> None:
        self.stream.check_event_types()

    def pace(self, settings: Any) -> tool.Pace:
        even = settings.arrivals == "even"
        return super().pace(settings) if even else DrawnPace(settings, f"{self._shard_seed}/arrivals")

    def most(self, settings: Settings) -> int:  # noqa: ARG002
        """MAX_EVENTS counts the events of the stream: the same ones as without faults."""
        return sys.maxsize

    @property
    def ended(self) -> bool:
        return self._sequence >= self._last and not self._held

    def generate_events(self, dues: Sequence[float]) -> list[Event]:
        """The next records; fewer when the stream has ended, and all that was held back is handed on."""
        return _due(itertools.islice(self._records, len(dues)), dues)

    def generate_event(self, due: float = 0.0) -> Event | None:
        return next(iter(self.generate_events([due])), None)

    def rest(self, due: float) -> list[Event]:
        """The late events, in their order; duplicates that are still to come are left out."""
        late = (self._hand_on(event, fault) for *_, event, fault in sorted(self._held) if fault.startswith("late"))
        return _due(late, itertools.repeat(due))

    def _hand_on_all(self) -> Iterator[Event]:
        make, draw = self.stream.generate_event, random.Random(f"{self._shard_seed}/faults").random
        held, dropped, busy_from, total = self._held, self._dropped, 0, max(self._sums, default=0.0)
        while self._sequence < self._last and (event := make()):
            chance = draw()
            if chance >= total and event.sequence < busy_from and not dropped:  # most of them, and nothing to be done
                yield event
                continue
            self._sequence = event.sequence
            yield from self._suffer(event, self._kinds[bisect_right(self._sums, chance)], draw)
            while held and held[0][0] <= event.sequence:
                yield self._hand_on(*heappop(held)[2:])
            busy_from = min(self._last, held[0][0]) if held else self._last
        self._last = self._sequence
        while held:
            yield self._hand_on(*heappop(held)[2:])

    def _suffer(self, event: Event, kind: str, draw: Draw) -> Iterator[Event]:
        """What comes in the place of an event."""
        if kind == "dropped":
            self._dropped.append(f"dropped:{event.sequence}")
        elif kind in IN_PLACE:
            yield self._hand_on(event, *IN_PLACE[kind](event, draw))
        elif kind in MALFORMED:
            yield self._hand_on(event, f"malformed:{kind}", replace(event, value=MALFORMED[kind](event.value, draw)))
        elif kind:
            k = int((self._distance + 1) ** draw())
            heappush(self._held, (event.sequence + k, event.sequence, event, f"{kind}:{k}"))
        if kind in ("", "duplicate"):
            yield self._hand_on(event)

    def _hand_on(self, event: Event, fault: str = "", becomes: Event | None = None) -> Event:
        """The record of an event, with its mark and those of the events dropped just before it, if there are any."""
        faults = [fault] * bool(fault) + self._dropped
        if not faults:
            return event
        self._dropped.clear()
        for each in faults:
            self.faults[each[: each.index(":")]] += 1
        marks, it = [f"{next(self._numbers)}:{each}" for each in faults], becomes or event
        return FaultyEvent(it.run, it.sequence, it.event_type, it.key, it.value, it.timestamp_ms, 0.0, marks, event)


def _due(records: Iterable[Event], dues: Iterable[float]) -> list[Event]:
    """Each is due when its slot is, whenever its event was made."""
    made = list(records)
    for record, due in zip(made, dues, strict=False):
        record.due = due
    return made


# ----------------------------------------------------------------------------------------------------------- pace


class DrawnPace(tool.Pace):
    """Due times that are drawn in advance, `interval` apart on average, however long a send takes."""

    def __init__(self, settings: FaultySettings, seed: str, clock: Callable[[], int] = time.time_ns) -> None:
        """`clock` gives nanoseconds since 1970, UTC."""
        self._arrivals, self._seed, self._clock = settings.arrivals, seed, clock
        super().__init__(settings.interval_seconds, time.monotonic(), settings.duration_seconds)

    def begin(self, start: float) -> None:
        super().begin(start)
        self._chance, self._zero, self._waits = random.Random(self._seed), self._clock() // 1000, 0.0
        self._draw()

    def _draw(self) -> None:
        """Find when the next one is due, in seconds since the start."""
        wait = self._chance.expovariate(1 / self.interval)
        if self._arrivals == "bursty":
            wait = 10 * wait if self._chance.random() < 1 / 10 else 0.0
        self._waits += wait
        self._due = self._waits
        if self._arrivals == "daily":  # by the churn model's clock, fast in the evening and slow at night
            days = model_days(self._zero) + self._waits * 1e6 / DAY
            self._due = (instant_of(days) - self._zero) / 1e6

    def due(self) -> float:
        return self.start + self._due

    def skip(self, now: float) -> int:
        """Give up what is more than CATCH_UP_SECONDS late; how many that were."""
        until, missed = min(now - tool.CATCH_UP_SECONDS, self.end) - self.start, 0
        while self._due < until:
            left = int((until - self._due) / self.interval)
            many = left // 10 if left > ONE_BY_ONE else 0  # not all at once: `daily` is up to 8 times as slow
            self._waits += many * self.interval
            self._draw()
            missed += many + 1
        self.skipped += missed
        return missed

    def take(self, now: float, most: int) -> Sequence[float]:
        dues: list[float] = []
        while len(dues) < most and self.due() <= now and not self.finished(now):
            dues.append(self.due())
            self._draw()
        return dues

    def finished(self, now: float) -> bool:  # noqa: ARG002
        return self.due() >= self.end


# ----------------------------------------------------------------------------------------------------- answer key


def print_faults(producer: RandomFaultyProducer, script: tool.Script) -> int:
    settings = script.settings
    needed = {"SEED": settings.seed, "MAX_EVENTS or END_TIME": settings.max_events or settings.end_time}
    if missing := [f"{name}: not set; --faults needs it" for name, value in needed.items() if value is None]:
        raise tool.BadConfiguration("\n".join(missing))
    lines = ["record,sequence,fault,detail"]
    for number, record in enumerate(iter(producer.generate_event, None), 1):
        for mark in getattr(record, "marks", ()):
            _, kind, detail = mark.split(":")
            lines.append(f",{detail},dropped," if kind == "dropped" else f"{number},{record.sequence},{kind},{detail}")
        if script.stop.requested:
            log.warning("Stopped before the answer key was made")
            return 1
    tool.show("\n".join(lines), script.stop)
    return 0


print_faults.__doc__ = "print the answer key, as CSV"  # also where Python leaves out docstrings


def main() -> int:
    """Run the producer; returns the exit code. A stream of one's own: STREAMS["random"] = WithSearches, before."""
    return tool.main(RandomFaultyProducer, __doc__, faults=print_faults)


if __name__ == "__main__":
    raise SystemExit(main())
