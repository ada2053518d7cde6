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

__doc__ = """Send the events of users who visit, slow down, leave and sometimes come back; --labels says who has left.

Events are sent live, one every INTERVAL_SECONDS. With START_TIME they are a backfill of past events. With SPEED they
follow the model's own clock: from START_TIME to now, and then in real time. A second start with the same SEED and
START_TIME continues where the topic ends. --labels prints the truth about the run that the variables describe, and the
best score that any model can reach. docs/churn.md explains all of it.
"""

import contextlib
import functools
import hashlib
import itertools
import math
import os
import random
import secrets
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from statistics import NormalDist
from typing import Annotated, Any, Self

sys.path[:0] = [os.path.dirname(os.path.realpath(__file__))]  # which `python -I` leaves out

import random_event_producer as tool
from random_event_producer import DEVICES, PAGES, PRODUCTS, REFERRERS, RandomEventProducer, Settings, log

import orjson
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, KafkaAdminClient
from kafka.errors import AuthorizationError, KafkaError, TopicAlreadyExistsError, TopicAuthorizationFailedError
from pydantic import BeforeValidator

# Instants are whole microseconds since 1970, UTC; waits are in model days; what is inside a visit is in seconds.
SECOND, HOUR, DAY = 1_000_000, 3_600_000_000, 86_400_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MONDAY = 978_307_200 * SECOND  # 2001-01-01: a live run's clock starts here, and weeks are counted from it
PAUSE, MONTH = 1800 * SECOND, 30 * DAY  # the silence that ends a visit, and the silence that the labels ask for

# A process that was killed may have a request on its way, and followers may take so long to copy what a topic got last.
STILL_SECONDS = 1.0
TAIL_RECORDS = 1000  # of each partition, to begin with
OTHERS_SECONDS = 3.0  # what still comes in then is another process's
READ_RECORDS, READ_MS = 5000, 100  # of one poll, at most

# The model, as docs/churn.md describes it. Another model makes other runs: count VERSION up.
VERSION = 1
MODELLED = ("add_to_cart", "bounce", "product_view")
ENGAGED, DRIFTING, GONE = "engaged", "drifting", "gone"
BOUNCE = {ENGAGED: 0.20, DRIFTING: 0.45}  # chance that a visit is one
CART = {ENGAGED: 0.30, DRIFTING: 0.15}  # chance of a cart after a view
ABSENCE, RETURN = 60.0, 90.0  # model days: who is gone stays away so long at least; the mean of the wait from then on
MORE_VIEWS, OWN_DEVICE, ADDED_TYPE = 0.65, 0.8, 0.2  # chances, whatever the state
# Of each class of users: visits per model day while engaged (a) and while drifting (b); after a visit the chance of an
# engaged user to become drifting (p), and of a drifting one to be gone (q).
_RATES = [0.2 * math.exp(1.2 * NormalDist().inv_cdf((k - 0.5) / 16)) for k in range(1, 17)]
CLASSES = [(a, 0.6 * a, 1 / (1 + 90 * a), 1 / (1 + 21 * 0.6 * a)) for a in _RATES]

_shuffle = random.Random("products by rank").random  # the same order for every seed
BY_RANK = sorted(PRODUCTS, key=lambda _: _shuffle())  # the favourite first

# Model days in each hour of the week from Monday on, and before it; the week's end, 7, is no sum that could be rounded.
HOURS = (50, 30, 20, 15, 15, 25, 45, 70, 90, 100, 110, 115, 120, 115, 110, 110, 115, 130, 160, 190, 200, 180, 130, 85)
DAYS = (104, 104, 102, 102, 102, 82, 104)
_SPEEDS = [7 * hour * day / (sum(HOURS) * sum(DAYS)) for day in DAYS for hour in HOURS]
_PASSED = [*itertools.accumulate(_SPEEDS[:-1], initial=0.0)]


def model_days(at: int) -> float:
    """The model's time at an instant: model days since MONDAY."""
    hours = (at - MONDAY) / HOUR
    week, hour = divmod(math.floor(hours), 168)
    return 7 * week + _PASSED[hour] + _SPEEDS[hour] * (hours % 1)


def instant_of(days: float) -> int:
    """The reverse of `model_days`."""
    week, days = divmod(days, 7)
    hour = bisect_right(_PASSED, days) - 1
    return MONDAY + round((168 * week + hour + (days - _PASSED[hour]) / _SPEEDS[hour]) * HOUR)


def _utc(value: object) -> object:
    try:
        instant = datetime.fromisoformat(str(value))
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("not a time that can be read") from None


Time = Annotated[datetime, BeforeValidator(_utc)]
TimeOrNow = Annotated[datetime, BeforeValidator(lambda value: datetime.now(UTC) if value == "now" else _utc(value))]
ISO_8601 = "ISO 8601, like 2026-05-04 or 2026-05-04T12:00:00Z; UTC without an offset"


class ChurnSettings(Settings):
    start_time: Time | None = tool.setting(None, "the model's clock starts here; none: live", ISO_8601)
    end_time: TimeOrNow | None = tool.setting(
        None, "the model's clock ends here; none: now, with SPEED never", f"{ISO_8601}; or now"
    )
    speed: float | None = tool.setting(
        None,
        "how many times as fast the model's clock runs, until it has caught up; inf: at once",
        "a number from 1 up, or inf",
        ge=1,
    )
    users: int = tool.setting(1000, "how many users there are", "1 to 1000", ge=1, le=1000)

    def clashes(self) -> Iterator[tool.Clash]:
        yield from super().clashes()
        start, end, now = self.start_time, self.end_time, datetime.now(UTC)
        if start and not EPOCH <= start < now:
            yield tool.Clash("start_time", "not from 1970 on and before now")
        if end and not (start and start < end <= now):
            yield tool.Clash("end_time", "not after START_TIME (which must be set), or after now", "start_time")
        if self.speed and "interval_seconds" in self.model_fields_set:
            yield tool.Clash("interval_seconds", "no use with SPEED, which sets the pace: unset one of them", "speed")
        if (self.speed or 1) > 1 and not start:
            why = "the model's clock cannot run ahead of the real one: set START_TIME to where it starts"
            yield tool.Clash("speed", why, "start_time")
        if self.shard_count > self.users:
            yield tool.Clash("shard_count", f"more than USERS={self.users}", "users")


class User:
    """Who a user is, in which state, and when the next visit has its first event."""

    def __init__(self, user_id: int, seed: str, start: int) -> None:
        self.user_id = user_id
        self.random = random.Random(f"{seed}/{user_id}")
        self._a, self._b, self._p, self._q = self.random.choice(CLASSES)
        self.device = self.random.choice(DEVICES)
        self.state = ENGAGED
        self._wait(start)

    def leave(self, last: int) -> None:
        """What follows a visit whose last event was then."""
        if self.random.random() < (self._p if self.state is ENGAGED else self._q):
            self.state = DRIFTING if self.state is ENGAGED else GONE
        self._wait(last + PAUSE)

    def _wait(self, since: int) -> None:
        if self.state is GONE:
            days = ABSENCE + self.random.expovariate(1 / RETURN)
        else:
            days = self.random.expovariate(self._a if self.state is ENGAGED else self._b)
        self.next_visit = max(since, instant_of(model_days(since) + days))  # rounding may be a microsecond early


Moment = tuple[int, int, str, dict[str, Any], str]  # instant, user_id, event_type, metadata, the state after it
Clock = Callable[[], int]  # nanoseconds since 1970


class RandomChurnProducer(RandomEventProducer):
    """Makes the events of users who may leave. `self.random` belongs to the user whose event is made."""

    settings_type = ChurnSettings

    def __init__(
        self, seed: str | None = None, shard_index: int = 0, shard_count: int = 1, clock: Clock = time.time_ns
    ) -> None:
        self.seed = secrets.token_hex(8) if seed is None else seed
        super().__init__(self.seed, shard_index, shard_count, clock)
        self.live, self.start, self.end = True, MONDAY, sys.maxsize
        self.resumed_at: int | None = None  # when the last event was that is left out
        self._is_new_topic = False
        self._wall_clock, self._moments = clock, self.moments()
        self._product, self._device = BY_RANK[0], DEVICES[0]  # of the event that is made
        self._seconds = self._first = self._stay = 0.0  # since the visit began; until its first event; on this page

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        generator = super().from_settings(settings)
        generator.users = [user_id for user_id in generator.users if user_id <= settings.users]
        if settings.start_time or settings.speed:
            now = datetime.now(UTC)
            generator.backfill(settings.start_time or now, settings.end_time or (None if settings.speed else now))
        return generator

    def backfill(self, start: datetime, end: datetime | None) -> None:
        """Stamp with the model's own clock: from `start` on and before `end`.

        What the run's events depend on makes its id, so that it is the same run each time.
        """
        self.live = False
        self.start = (start - EPOCH) // timedelta(microseconds=1)
        self.end = (end - EPOCH) // timedelta(microseconds=1) if end else sys.maxsize
        told = repr((VERSION, self.seed, self.start, self.users, self.event_types))
        digits = hashlib.sha256(told.encode()).hexdigest()
        # A letter first, and not e: Kafka Connect takes digits, and digits with an e in between, for numbers.
        self.run = "abcdf"[int(digits[0], 16) % 5] + digits[1:16]

    def pace(self, settings: Any) -> tool.Pace:
        if settings.speed is None:
            return super().pace(settings)
        return ClockPace(self, settings.speed, settings.duration_seconds)

    def prepare(self, settings: Any, stop: tool.Stop, with_kafka: bool) -> None:
        """Say what makes the same run again; of the past, how long it takes and whether Kafka will keep it."""
        times = () if self.live else (("START_TIME", self.start), ("END_TIME", self.end))
        known = [f" {name}={tool.iso_format(at).decode()}Z" for name, at in times if at != sys.maxsize]
        log.info("SEED=%s%s", self.seed, "".join(known))
        if settings.speed and not (settings.seed and settings.start_time):
            log.info("To continue this run after a restart, set SEED and START_TIME to these values")
        if settings.start_time is None:
            return
        if settings.shard_count > 1:
            log.warning("%s", SHARDS_DIFFER)
        same = type(self).from_settings(settings.model_copy(update={"seed": self.seed}))
        if settings.interval_seconds:
            run = itertools.takewhile(lambda moment: moment[0] < self.end and not stop.requested, same.moments())
            events = sum(1 for _ in itertools.islice(run, settings.max_events))
            duration = timedelta(seconds=round(events * settings.interval_seconds))
            if not stop.requested:
                log.info("The backfill has %d events and takes %s; INTERVAL_SECONDS=0 is faster", events, duration)
        look = threading.Thread(target=self._keep_topic, args=(settings, next(same.moments())[0]), daemon=True)
        if with_kafka:
            look.start()
        while look.is_alive() and not stop.requested:  # the Kafka client's own waits cannot be cut short
            look.join(0.1)

    def _keep_topic(self, settings: Settings, first: int) -> None:
        self._is_new_topic = keep_topic(settings, first)

    def resume(self, settings: Any, stop: tool.Stop, tell: tool.Tell) -> int:
        """With SEED and START_TIME: leave out what the topic has of this run."""
        if self._is_new_topic or settings.seed is None or settings.start_time is None:
            return 0
        topic = settings.kafka_topic
        try:
            past = PastReader(settings, self.run, stop, tell).read()
        except AuthorizationError as error:
            former, self.run = self.run, RandomEventProducer().run
            log.warning(
                f"Topic {topic} cannot be read ({type(error).__name__}), so its events of run {former} are not known: "
                f"all events are sent, as run {self.run}. To resume, grant this user Read"
            )
            return 0
        if stop.requested:
            return 0
        if not past.top:
            log.info("Topic %s has no event of run %s: the run starts at its first event", topic, self.run)
            return 0
        if emptied := past.emptied():
            which = tool.partitions_text(emptied)
            log.warning(
                "In %s no event of run %s is left; all events up to number %d count as sent", which, self.run, past.top
            )
        return self._leave_out(past, settings, stop)

    def _leave_out(self, past: Past, settings: Any, stop: tool.Stop) -> int:
        """How many events of the run, up to MAX_EVENTS, are left out. Raises GiveUp when the topic has another one."""
        topic, most, kept, left_out = settings.kafka_topic, settings.max_events, list[tuple[int, Moment]](), 0
        bounds, values = past.bounds(self.users), past.values
        for sequence, moment in zip(range(1, past.top + 1), self._moments, strict=False):
            if stop.requested:
                return 0
            if (value := values.get(sequence)) and not _tells(value, moment):
                raise tool.GiveUp(
                    f"event {self.run}:{sequence} in topic {topic} is not what these settings make: another version, "
                    "subclass or machine made it. Set another KAFKA_TOPIC, or another SEED"
                )
            if sequence > bounds[moment[1]]:
                kept.append((sequence, moment))
            else:
                left_out += most is None or sequence <= most
                self.resumed_at = moment[0]
        self._sequences = itertools.chain([sequence for sequence, _ in kept], itertools.count(past.top + 1))
        following = [*(moment for _, moment in kept), next(self._moments)]
        self._moments = itertools.chain(following, self._moments)
        log.info("Topic %s has %d events of run %s, up to number %d", topic, left_out, self.run, past.top)
        if following[0][0] >= self.end or left_out == most:
            log.info("No event of the run is left to be sent. To send all events again, set another KAFKA_TOPIC")
        return left_out

    def stamps(self) -> Iterator[int]:
        """When the coming events are, by the model's clock, and the end of the stream; takes none of them away."""
        self._moments, ahead = itertools.tee(self._moments)
        return (min(moment[0], self.end) for moment in ahead)

    def next_event(self) -> tuple[int, str, dict[str, Any], int] | None:
        at, user_id, event_type, metadata, _ = next(self._moments)
        if self.live:
            at = self._wall_clock() // 1000
        return (user_id, event_type, metadata, at) if at < self.end else None

    def moments(self) -> Iterator[Moment]:
        """The model's events in the order of its clock, from the start on and without end; each call begins anew."""
        users = [User(user_id, self.seed, self.start) for user_id in self.users]
        self._added = [event_type for event_type in self.event_types if event_type not in MODELLED]
        made: list[Moment] = []
        for midnight in itertools.count(self.start + DAY, DAY):
            for user in users:
                while user.next_visit < midnight:
                    made += self._visit(user)
            made.sort()
            today = bisect_left(made, (midnight,))
            yield from made[:today]
            del made[:today]  # the rest belongs to visits that go on after midnight

    def _visit(self, user: User) -> list[Moment]:
        """All events of the user's next visit."""
        self.random, draw = user.random, user.random.random
        user.state = ENGAGED if user.state is GONE else user.state
        self._device = user.device if draw() < OWN_DEVICE else DEVICES[int(len(DEVICES) * draw())]
        if draw() < BOUNCE[user.state]:
            self._first = self._seconds = min(user.random.expovariate(1 / 25), 115.0)
            visit = [self._moment(user, "bounce")]
        else:
            visit = self._views(user)
        user.leave(visit[-1][0])
        visit[-1] = (*visit[-1][:4], user.state)  # it changes with the last event of a visit only
        return visit

    def _views(self, user: User) -> list[Moment]:
        """Pages, each told of when it is left, and what was done there."""
        draw, exponential, visit = user.random.random, user.random.expovariate, []
        self._first = self._seconds = self._stay = 3 + exponential(1 / 40)
        while True:
            self._product = BY_RANK[int(1001 ** draw()) - 1]
            visit.append(self._moment(user, "product_view"))
            if draw() < CART[user.state]:
                self._seconds += 2 + 8 * draw()
                visit.append(self._moment(user, "add_to_cart"))
            if self._added and draw() < ADDED_TYPE:
                self._seconds += 2 + 8 * draw()
                visit.append(self._moment(user, self._added[int(len(self._added) * draw())]))
            if draw() >= MORE_VIEWS:
                return visit
            self._stay = 3 + exponential(1 / 40)
            self._seconds += self._stay

    def _moment(self, user: User, event_type: str) -> Moment:
        at = user.next_visit + round((self._seconds - self._first) * SECOND)
        return at, user.user_id, event_type, self._generate_metadata(event_type), user.state

    def _generate_metadata(self, event_type: str) -> dict[str, Any]:
        product_id, category, price = self._product
        if event_type == "product_view":
            return {
                "product_id": product_id,
                "category": category,
                "price": price,
                "view_duration": round(10 * self._stay) / 10,
                "page": "/product-detail",
                "device": self._device,
            }
        draw, minutes = self.random.random, round(self._seconds / 6) / 10
        page = PAGES[int(len(PAGES) * draw())]
        if event_type == "add_to_cart":
            n = 1 + int(5 * draw())
            return {"product_id": product_id, "quantity": n, "price": price, "session_length": minutes, "page": page}
        if event_type == "bounce":
            referrer = REFERRERS[int(len(REFERRERS) * draw())]
            return {"page": page, "session_length": minutes, "referrer": referrer, "device": self._device}
        return super()._generate_metadata(event_type)


class ClockPace(tool.Pace):
    """Events are due when the model's clock shows their time.

    It runs `speed` times as fast as the real one, and is the real one from where it has caught up with it. No event is
    skipped: what is late comes late.
    """

    goal = "by the model's clock"

    def __init__(self, generator: RandomChurnProducer, speed: float, duration: float | None) -> None:
        super().__init__(0.0, time.monotonic(), duration)
        self._generator, self._speed = generator, speed
        self._at: int | None = None  # when the next event is, by the model's clock
        self._from = 0  # where the clock starts
        self._is_now = False

    @functools.cached_property
    def _stamps(self) -> Iterator[int]:
        """Made at first use: by then the run knows where it goes on."""
        self._from = self._generator.resumed_at or self._generator.start
        lag = timedelta(seconds=max(0, time.time_ns() // 1000 - self._from) // SECOND)
        if lag and self._speed == 1:
            log.info("At SPEED=1 the model's clock stays %s behind the real one; SPEED=inf sends that at once", lag)
        elif lag and self._speed < math.inf:
            until = timedelta(seconds=round(lag / timedelta(seconds=self._speed - 1)))
            told = "The model's clock is %s behind the real one; at SPEED=%g it catches up in %s"
            log.info(told, lag, self._speed, until)
        return self._generator.stamps()

    def _ahead(self, wall: float) -> float:
        """How many seconds ahead of the real clock, which shows `wall` seconds since 1970, the next event is."""
        if self._at is None:
            self._at = next(self._stamps)
        return self._at / SECOND - wall

    def _due(self, now: float, wall: float) -> float:
        """When the next event is (monotonic)."""
        real = now + self._ahead(wall)
        due = max(real, self.start + ((self._at or 0) - self._from) / SECOND / self._speed)
        return due if due > self.start else now  # what is past when the clock starts is due at once

    def due(self) -> float:
        return self._due(time.monotonic(), time.time())

    def behind(self, now: float) -> float:
        return max(0.0, now - self._due(now, time.time()))

    def skip(self, now: float) -> int:  # noqa: ARG002
        return 0

    def take(self, now: float, most: int) -> Sequence[float]:
        dues, wall = list[float](), time.time()
        while len(dues) < most and (due := self._due(now, wall)) <= now < self.end:
            dues.append(due)
            self._at = None
        if not self._is_now and (ahead := self._ahead(wall)) > 0:
            self._is_now = True
            log.info("From now on the model's clock is the real one; the next event comes in %.0f s", ahead)
        return dues


SHARDS_DIFFER = (
    "Each shard sends the past at its own speed, so times in a partition can go back by days, and Kafka Streams drops "
    "late events. Set SHARD_COUNT=1: one process sends 90 days in seconds, in order"
)


class Past:
    """What a topic has of a run.

    Each partition is written in order, so that the run has sent all that comes before its last event there.
    """

    def __init__(self, run: str, ends: dict[int, int]) -> None:
        """`ends`: where each partition ends."""
        self._prefix, self._ends = f"{run}:".encode(), ends
        self._begins: dict[int, int] = {}  # partition -> the first offset there
        self._lasts: dict[int, tuple[int, bytes]] = {}  # partition -> sequence and value of the run's last event
        self._of_users: dict[bytes, int] = {}  # key -> its last sequence, wherever: topics are enlarged

    def add(self, record: Any) -> bool:
        """Take in a record; whether it is of the run."""
        self._begins.setdefault(record.partition, record.offset)
        event_id = next((value for name, value in record.headers if name == "event_id"), None) or b""
        if not event_id.startswith(self._prefix):
            return False
        sequence = int(event_id[len(self._prefix) :])
        self._of_users[record.key] = max(sequence, self._of_users.get(record.key, 0))
        if sequence > self._lasts.get(record.partition, (0, b""))[0]:
            self._lasts[record.partition] = sequence, record.value
        return True

    @property
    def top(self) -> int:
        """The last sequence of all; 0 when there is none."""
        return max((sequence for sequence, _ in self._lasts.values()), default=0)

    @property
    def values(self) -> dict[int, bytes]:
        """Sequence -> value, of the run's last event in each partition."""
        return dict(self._lasts.values())

    def is_in_all(self) -> bool:
        """Whether each partition has an event of the run."""
        return self._lasts.keys() == self._ends.keys()

    def emptied(self) -> list[int]:
        """The partitions without an event of the run that have lost their beginning, and so may have had some."""
        begins = {number: self._begins.get(number, end) for number, end in self._ends.items()}
        return [number for number, begin in begins.items() if begin and number not in self._lasts]

    def bounds(self, users: Iterable[int]) -> dict[int, int]:
        """user_id -> the sequence up to which all of the user's events are sent."""
        sent = {number: sequence for number, (sequence, _) in self._lasts.items()}
        sent |= dict.fromkeys(self.emptied(), self.top)  # there is no telling: rather nothing twice
        keys = {user_id: b"%d" % user_id for user_id in users}
        return {
            user_id: max(self._of_users.get(key, 0), sent.get(tool.key_hash(key) % len(self._ends), 0))
            for user_id, key in keys.items()
        }


def _tells(value: bytes, moment: Moment) -> bool:
    """Whether an event's value is of that moment."""
    at, user_id, event_type, *_ = moment
    try:
        event = orjson.loads(value)
    except ValueError:
        return False
    expected = {"user_id": user_id, "event_type": event_type, "timestamp": tool.iso_format(at).decode()}
    return isinstance(event, dict) and expected.items() <= event.items()


class PastReader:
    """Reads what a topic has of a run: without a group, and nothing stays behind on the broker."""

    def __init__(self, settings: Settings, run: str, stop: tool.Stop, tell: tool.Tell) -> None:
        """`tell` hears what is waited for."""
        self._settings, self._run, self._stop, self._tell = settings, run, stop, tell
        self._topic, self._network = settings.kafka_topic, tool.Network(settings)
        self._read, self._told_at = 0, time.monotonic()  # records
        self._consumer = KafkaConsumer(
            **tool.client_options(settings, self._network),
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=READ_MS,
        )

    def read(self) -> Past:
        """May lack some after a stop. Raises AuthorizationError without the right to read, or GiveUp."""
        consumer = self._consumer
        try:
            consumer.assign(self._partitions())
            past = self._read_backwards()
        except (AuthorizationError, tool.GiveUp):
            raise
        except Exception as error:  # the client must not be asked again: it may hang then
            raise tool.GiveUp(
                f"topic {self._topic} cannot be read, so its events of run {self._run} are not known: {error!r}. Set "
                "another KAFKA_TOPIC, or another SEED"
            ) from error
        finally:
            consumer.close(autocommit=False, timeout_ms=1000)
        if self._network.another_topic:
            return PastReader(self._settings, self._run, self._stop, self._tell).read()
        return past

    def _partitions(self) -> list[TopicPartition]:
        """Of the topic, which is there; none after a stop."""
        cluster, began = self._network.cluster, time.monotonic()
        cluster.set_topics([self._topic])
        known = functools.partial(cluster.partitions_for_topic, self._topic)
        tool.await_topic(known, self._network, self._settings, self._stop.asked, began, self._tell)
        return [TopicPartition(self._topic, number) for number in known() or ()]

    def _read_backwards(self) -> Past:
        """Ever longer tails of the partitions, until each has shown the run, or all that there is."""
        window, ends = TAIL_RECORDS, dict[TopicPartition, int]()
        while not (ends or self._stop.requested):
            self._poll()
            ends = self._ends()
        while True:
            past = Past(self._run, {place.partition: end for place, end in ends.items()})
            for place, end in ends.items():
                self._consumer.seek(place, max(0, end - window))  # or to where the partition begins
            self._read_to_end(past)
            if self._stop.requested or past.is_in_all() or window >= max(ends.values()):
                return past
            window *= 10

    def _read_to_end(self, past: Past) -> None:
        """Until nothing of the run has come in for STILL_SECONDS, and then to where the partitions ended."""
        news, ends, others = time.monotonic(), dict[TopicPartition, int](), math.inf
        while not self._stop.requested:
            records, ends_now, now = self._poll(), self._ends(), time.monotonic()
            if sum(map(past.add, records)):
                news, ends = now, {}
                if now > others:
                    log.warning(
                        "Another process sends run %s to topic %s: waiting until it ends", self._run, self._topic
                    )
            elif now - news >= STILL_SECONDS and self._is_read(ends := ends or ends_now):
                return
            if others == math.inf and self._is_read(ends_now):
                others = now + OTHERS_SECONDS

    def _poll(self) -> list[Any]:
        """The next records, in each partition's order."""
        records = [*itertools.chain(*self._consumer.poll(READ_MS, READ_RECORDS).values())]
        self._read += len(records)
        self._tell(f"looking for run {self._run} in topic {self._topic}")
        if (now := time.monotonic()) - self._told_at >= tool.TOTAL_SECONDS:
            self._told_at = now
            if not records and (cause := self._network.recent_cause() or self._network.slow()):
                log.warning("Topic %s cannot be read yet: %s. Waiting for it", self._topic, cause)
            else:
                log.info("Looking for run %s in topic %s: %d events read", self._run, self._topic, self._read)
        return records

    def _ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends, as the last answer said; nothing until each has told."""
        ends = {place: self._consumer.highwater(place) for place in self._consumer.assignment()}
        return {} if None in ends.values() else ends

    def _is_read(self, ends: dict[TopicPartition, int]) -> bool:
        positions = ((self._consumer.position(place, READ_MS) or 0, end) for place, end in ends.items())
        return bool(ends) and all(position >= end for position, end in positions)


def keep_topic(settings: Settings, first: int) -> bool:
    """Make a topic that keeps a backfill whose first event is of then, or warn of one that does not.

    Whether the topic is new: made by this very process.
    """
    topic, server, age = settings.kafka_topic, settings.bootstrap_servers[0], (time.time_ns() // 1000 - first) / DAY
    try:
        with contextlib.closing(KafkaAdminClient(**tool.client_options(settings))) as admin:
            if topic not in admin.list_topics():
                admin.create_topics({topic: {"configs": {"retention.ms": "-1"}}})
                log.info("Created topic %s with retention.ms=-1: it keeps events of any age", topic)
                return True
            # All of its settings: asked for some by name, the embedded broker closes the connection.
            told = admin.describe_configs([ConfigResource("TOPIC", topic)], config_filter="all")["topic"][topic]
        if "retention.ms" not in told:  # Kafka's answer to who may not DescribeConfigs
            raise TopicAuthorizationFailedError
        kept = int(told["retention.ms"]["value"]) * 1000 / DAY
        keeps, deletes = f"is {kept:.1f} days", kept >= 0 and "delete" in str(told.get("cleanup.policy", "delete"))
    except TopicAlreadyExistsError:  # another shard was quicker
        return False
    except KafkaError as error:  # not authorised, an old broker: whether the run can go on, the tool finds out
        keeps, kept, deletes = f"cannot be read ({type(error).__name__})", 0.0, True
    if deletes and kept < age:  # Kafka goes by the events' own time
        log.warning(
            f"The first event is {age:.1f} days old, and the retention of topic {topic} {keeps}: Kafka deletes older "
            f"events within minutes. To keep them: kafka-configs.sh --bootstrap-server {server} --alter "
            f"--topic {topic} --add-config retention.ms=-1"
        )
    return False


class Record:
    """One user's events of a run, and what they say of class and state: the forward algorithm, as in docs/churn.md."""

    def __init__(self, start: int) -> None:
        self.events, self.sequence, self.last, self.state, self.heard_after = 0, 0, "", ENGAGED, False
        self._weights = [(1 / 16, 0.0, 0.0)] * 16  # of engaged, drifting and gone, for each class
        self._since = start  # what the next wait counts from: 30 minutes after the last event
        self._wait = 0.0  # before the visit under way
        self._types: list[str] = []  # of its events

    def add(self, sequence: int, at: int, event_type: str, state: str) -> None:
        self.events, self.sequence, self.state = self.events + 1, sequence, state
        self.last = tool.iso_format(at).decode()
        if at >= self._since:
            self._end_visit()
            self._wait = model_days(at) - model_days(self._since)
        self._types.append(event_type)
        self._since = at + PAUSE

    def chances(self, end: int) -> tuple[float, float]:
        """Step 3: p_gone and p_silent_30d. A visit under way counts as over."""
        self._end_visit()
        waits = (max(0.0, model_days(until) - model_days(self._since)) for until in (end, end + MONTH))
        now, later = map(self._waited, waits)
        return sum(gone for _, _, gone in now) / sum(map(sum, now)), sum(map(sum, later)) / sum(map(sum, now))

    def _waited(self, g: float) -> list[tuple[float, float, float]]:
        """Step 1: the weights after a wait without a visit."""
        away = math.exp(-max(0.0, g - ABSENCE) / RETURN)
        return [
            (engaged * math.exp(-a * g), drifting * math.exp(-b * g), gone * away)
            for (engaged, drifting, gone), (a, b, _, _) in zip(self._weights, CLASSES, strict=True)
        ]

    def _end_visit(self) -> None:
        """Step 2: the weights after the wait and the visit."""
        if not self._types:
            return
        back = 1 / RETURN if self._wait > ABSENCE else 0.0
        views, carts = self._types.count("product_view"), self._types.count("add_to_cart")
        if_engaged, if_drifting = (
            (1 - BOUNCE[it]) * CART[it] ** carts * (1 - CART[it]) ** (views - carts) if views else BOUNCE[it]
            for it in (ENGAGED, DRIFTING)
        )
        weights = []
        for (engaged, drifting, gone), (a, b, p, q) in zip(self._waited(self._wait), CLASSES, strict=True):
            e = (engaged * a + gone * back) * if_engaged
            d = drifting * b * if_drifting
            weights.append((e * (1 - p), e * p + d * (1 - q), d * q))
        total = sum(map(sum, weights))
        self._weights = [(engaged / total, drifting / total, gone / total) for engaged, drifting, gone in weights]
        self._types = []


def observe(generator: RandomChurnProducer, most: int, stop: tool.Stop) -> tuple[dict[int, Record], int]:
    """Each user's record, and when the run ended: with event number `most`, or at the generator's end."""
    records = {user_id: Record(generator.start) for user_id in generator.users}
    end = generator.end
    for sequence, (at, user_id, event_type, _, state) in enumerate(generator.moments(), 1):
        if stop.requested or at >= end + MONTH:
            break
        if at >= end:
            records[user_id].heard_after = True
        else:
            records[user_id].add(sequence, at, event_type, state)
            end = at if sequence == most else end
    return records, end


def print_labels(generator: RandomChurnProducer, script: tool.Script) -> int:
    settings, stop = script.settings, script.stop
    needed = {"SEED": settings.seed, "MAX_EVENTS or END_TIME": settings.max_events or settings.end_time}
    needed |= {"START_TIME": settings.start_time} if settings.speed else {}
    if missing := [f"{name}: not set; --labels needs it" for name, value in needed.items() if value is None]:
        raise tool.BadConfiguration("\n".join(missing))
    records, end = observe(generator, settings.max_events or sys.maxsize, stop)
    lines, scores = ["user_id,events,last_sequence,last_event_at,state,p_gone,silent_30d,p_silent_30d"], []
    for user_id, record in records.items():
        p_gone, p_silent = record.chances(end)
        history = f"{user_id},{record.events},{record.sequence},{'' if generator.live else record.last},{record.state}"
        lines.append(f"{history},{p_gone:.6f},{int(not record.heard_after)},{p_silent:.6f}")
        scores.append(p_gone)
    if stop.requested:
        log.warning("Stopped before the labels were made")
        return 1
    tool.show("\n".join(lines), stop)
    gone = [record.state is GONE for record in records.values()]
    script.console.line(f"{len(gone)} users, {sum(gone)} gone; {best_possible(scores, gone)}")
    return 0


# Assigned, so that --help has it under `python -OO`, too.
print_labels.__doc__ = "print who has left, as CSV, and the best score that a model can reach"


def best_possible(scores: Sequence[float], gone: Sequence[bool]) -> str:
    """AUC, ties as a half, and log loss of p_gone against the truth."""
    left, here = (sorted(s for s, g in zip(scores, gone, strict=True) if g is which) for which in (True, False))
    won = sum(bisect_left(here, score) + bisect_right(here, score) for score in left) / 2
    auc = f"{won / (len(left) * len(here)):.4f}" if left and here else "none"
    loss = sum(-math.log(max(chance, 1e-15)) for chance in [*left, *(1 - score for score in here)]) / len(scores)
    return f"best possible AUC {auc}, log loss {loss:.4f}"


def main(generator: type[RandomChurnProducer] = RandomChurnProducer) -> int:
    """Run the producer with this generator, which may be a subclass; returns the exit code."""
    return tool.main(generator, __doc__, labels=print_labels)


if __name__ == "__main__":
    raise SystemExit(main())
