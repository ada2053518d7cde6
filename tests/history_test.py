"""The churn stream over time: history that goes on live, restarts that resume, the model's clock at a chosen speed."""

from __future__ import annotations

import itertools
import json
import re
import secrets
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from audit_field_test import Raw, open_transaction
from auditor_test import delete_before, write
from brokers import (
    AUTHORIZER,
    ApacheKafka,
    add_partitions,
    audit,
    create_topic,
    delete_topic,
    event_id,
    free_port,
    grant,
    partition_of,
    read_all,
    wait_until,
)
from churn_test import QUARTER, SCRIPT, WEEK, finish, labelled, printed, time_of, warnings
from conftest import ROOT, Broker, MakeApache, RunScript, Script
from kafka import KafkaConsumer, TopicPartition

sys.path.insert(0, str(ROOT))

import random_churn_producer as churn
from random_churn_producer import ChurnSettings, PastReader, RandomChurnProducer
from random_event_producer import Stop

Start = Callable[..., Script]
NOTHING_LEFT = "No event of the run is left to be sent"
FORTNIGHT = {**QUARTER, "END_TIME": "2026-05-18"}


@pytest.fixture
def start(run_script: RunScript, apache: ApacheKafka, topic: str) -> Start:
    """start(**settings) -> the script at work on `topic`."""

    def start(**settings: Any) -> Script:
        return run_script(SCRIPT, **{"KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, **settings})

    return start


def succeeds(script: Script) -> None:
    assert script.wait() == 0, script.tail()


def values(apache: Broker, topic: str, partitions: int | None = None) -> list[str]:
    """The values by sequence, of a topic with one run of which nothing is missing, repeated, reordered or misplaced."""
    records = read_all(apache.direct, topic)
    if not records:
        return []
    verdict = audit(records, partitions)
    assert verdict.clean, verdict
    assert len(verdict.runs) == 1
    numbered = {event_id(record): record.value.decode() for record in records}
    return [numbered[key] for key in sorted(numbered, key=lambda key: key[1] if key else 0)]


class Growth:
    """How many records a topic has, asked again and again."""

    def __init__(self, bootstrap: str, topic: str, partitions: int) -> None:
        self._consumer = KafkaConsumer(bootstrap_servers=bootstrap.split(","))
        self._places = [TopicPartition(topic, number) for number in range(partitions)]

    def __call__(self) -> int:
        return sum(self._consumer.end_offsets(self._places).values())

    def __enter__(self) -> Growth:
        return self

    def __exit__(self, *exc: object) -> None:
        self._consumer.close()


# ------------------------------------------------------------------------------------------------ which run it is


def run_of(make: type[RandomChurnProducer] = RandomChurnProducer, **settings: Any) -> str:
    given = {name.lower(): value for name, value in {**WEEK, **settings}.items()}
    return make.from_settings(ChurnSettings(**given)).run


def test_what_the_events_depend_on_makes_the_run() -> None:
    class WithSearches(RandomChurnProducer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.event_types.append("search")

    same: list[dict[str, Any]] = [
        {},
        {"END_TIME": "2026-06-01"},
        {"MAX_EVENTS": 5},
        {"INTERVAL_SECONDS": 3},
        {"SPEED": "inf"},
    ]
    other: list[dict[str, Any]] = [
        {"SEED": "another"},
        {"START_TIME": "2026-05-04T00:00:00.000001"},
        {"USERS": 999},
        {"SHARD_COUNT": 2, "SHARD_INDEX": 0},
        {"SHARD_COUNT": 2, "SHARD_INDEX": 1},
    ]
    assert len({run_of(**settings) for settings in same}) == 1
    assert len({run_of(), run_of(WithSearches), *(run_of(**settings) for settings in other)}) == len(other) + 2


def test_a_run_is_no_number_to_kafka_connect() -> None:
    """Its header converter takes `6600191769186975:6` and `1e5` for numbers."""
    runs = {run_of(SEED=f"{seed}") for seed in range(500)}
    assert len(runs) == 500
    assert all(re.fullmatch("[abcdf][0-9a-f]{15}", run) for run in runs)
    assert {run[0] for run in runs} == set("abcdf")


def test_a_run_with_a_drawn_seed_can_be_resumed_with_what_was_logged(start: Start, apache: Broker, topic: str) -> None:
    first = start(START_TIME="2026-05-04", END_TIME="2026-05-06", INTERVAL_SECONDS=0, MAX_EVENTS=100)
    succeeds(first)
    logged = dict(re.findall(r"(SEED|START_TIME|END_TIME)=(\S+)", first.stderr))
    succeeds(start(**logged, INTERVAL_SECONDS=0))
    assert values(apache, topic) == printed(**logged, INTERVAL_SECONDS=0)


# ------------------------------------------------------------------------------------------- resuming, history


def test_a_history_cut_ten_times_is_the_uncut_one(start: Start, apache: ApacheKafka, topic: str) -> None:
    """kill -9 at any moment: nothing missing, nothing repeated, nothing reordered, byte for byte."""
    expected = printed(**QUARTER)
    create_topic(apache.direct, topic, 4, config={"retention.ms": "-1"})
    with Growth(apache.direct, topic, 4) as held:
        for cut in range(1, 11):
            script, least = start(**QUARTER), held() + cut * 300
            wait_until(lambda least=least: held() >= least, 30, f"{least} events", 0.002)  # type: ignore[misc]
            script.kill()
    last = start(**QUARTER)
    succeeds(last)
    assert values(apache, topic, 4) == expected
    assert "unconfirmed 0" in last.tail(1)


def test_a_complete_history_sends_nothing_again(run_script: RunScript, broker: Broker, topic: str) -> None:
    kafka = {"KAFKA_BROKER": broker.bootstrap, "KAFKA_TOPIC": topic}
    for most in (700, 1400):
        succeeds(run_script(SCRIPT, **WEEK, **kafka, MAX_EVENTS=most))
    succeeds(run_script(SCRIPT, **WEEK, **kafka))
    again = run_script(SCRIPT, **WEEK, **kafka)
    succeeds(again)
    again.wait_for(f"{NOTHING_LEFT}.*KAFKA_TOPIC")
    again.wait_for("Stopped: sent 0, failed 0, unconfirmed 0")
    assert values(broker, topic) == printed(**WEEK)
    audited = run_script("test_random_consumer.py", "--json", **kafka, TIMEOUT_SECONDS=2)
    assert audited.wait() == 0
    assert json.loads(audited.stdout)["ok"]


@pytest.mark.slow
def test_a_power_cut_takes_kafka_and_the_process(run_script: RunScript, make_apache: MakeApache, topic: str) -> None:
    expected = printed(**QUARTER)
    with make_apache() as kafka:
        create_topic(kafka.direct, topic, 3, config={"retention.ms": "-1"})
        settings = {**QUARTER, "KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic}
        for _ in range(2):
            with Growth(kafka.direct, topic, 3) as held:
                script, least = run_script(SCRIPT, **settings), held() + 500
                wait_until(lambda held=held, least=least: held() >= least, 60, f"{least} events", 0.002)  # type: ignore[misc]
            kafka.kill()
            script.kill()
            kafka.start_node()
        succeeds(run_script(SCRIPT, **settings))
        assert values(kafka, topic, 3) == expected


def test_a_later_end_sends_the_rest(start: Start, apache: Broker, topic: str) -> None:
    succeeds(start(**WEEK))
    longer = start(**FORTNIGHT)
    succeeds(longer)
    assert NOTHING_LEFT not in longer.stderr
    assert values(apache, topic) == printed(**FORTNIGHT)


def test_max_events_counts_the_events_of_the_run(start: Start, apache: Broker, topic: str) -> None:
    """As --labels does. A second start makes what the first has left, and a third nothing."""
    succeeds(start(**WEEK, MAX_EVENTS=1000))
    second = start(**WEEK, MAX_EVENTS=1500)
    succeeds(second)
    second.wait_for("Stopped: sent 500,")
    third = start(**WEEK, MAX_EVENTS=1200)
    succeeds(third)
    third.wait_for(NOTHING_LEFT)
    third.wait_for("Stopped: sent 0,")
    assert values(apache, topic) == printed(**WEEK, MAX_EVENTS=1500)
    told = labelled(**WEEK, MAX_EVENTS=1500)
    assert sum(int(row["events"]) for row in told.values()) == 1500


def test_a_resumed_run_that_is_stopped_has_not_done_its_work(start: Start, apache: Broker, topic: str) -> None:
    slow = {**WEEK, "INTERVAL_SECONDS": 0.05, "MAX_EVENTS": 400}
    succeeds(start(**WEEK, MAX_EVENTS=300))
    script = start(**slow, LOG_LEVEL="DEBUG")
    script.wait_for("Event sent")
    script.signal(signal.SIGTERM)
    assert script.wait() == 1
    last = start(**{**slow, "INTERVAL_SECONDS": 0})
    succeeds(last)
    assert values(apache, topic) == printed(**WEEK, MAX_EVENTS=400)


def test_runs_of_one_topic_do_not_disturb_each_other(start: Start, apache: Broker, topic: str) -> None:
    """Another seed, fewer users, a plain producer, shards: each resumes for itself."""
    shards = [{**WEEK, "SHARD_COUNT": 2, "SHARD_INDEX": index} for index in range(2)]
    runs = [{**WEEK, "SEED": "another"}, {**WEEK, "USERS": 100}, *shards]
    for settings, most in itertools.product(runs, (200, 400)):
        succeeds(start(**settings, MAX_EVENTS=most))
    records = read_all(apache.direct, topic)
    verdict = audit(records, 1)
    assert verdict.clean
    assert len(verdict.runs) == 4
    held: dict[str, list[str]] = {}
    for record in records:
        run, _ = event_id(record) or ("", 0)
        held.setdefault(run, []).append(record.value.decode())
    assert list(held.values()) == [printed(**settings, MAX_EVENTS=400) for settings in runs]


def test_what_a_killed_process_has_on_its_way_is_awaited(apache: ApacheKafka, topic: str) -> None:
    """A record of the run that comes in while nothing else does counts; and so does what comes after that."""
    create_topic(apache.direct, topic, 2)
    run, users = secrets.token_hex(8), [user_of(number, 2) for number in (0, 1)]
    write(apache.direct, topic, [raw(run, 1, users[0]), raw(run, 2, users[1])])
    turns = itertools.count()

    def tell(_: str) -> None:
        if (turn := next(turns)) in (4, 8):  # after four, and eight, tenths of a second without news
            write(apache.direct, topic, [raw(run, turn, users[1])])

    past = PastReader(settings_of(apache, topic), run, Stop(), tell).read()
    assert past.top == 8
    assert past.bounds(users) == {users[0]: 1, users[1]: 8}


def settings_of(apache: Broker, topic: str, **more: Any) -> ChurnSettings:
    return ChurnSettings(kafka_broker=apache.bootstrap, kafka_topic=topic, **more)


def user_of(partition: int, partitions: int, start: int = 1) -> int:
    return next(user for user in range(start, 1001) if partition_of(str(user).encode(), partitions) == partition)


def raw(run: str, sequence: int, user: int) -> dict[str, Any]:
    return {"key": b"%d" % user, "value": b"{}", "headers": [("event_id", f"{run}:{sequence}".encode())]}


def test_the_run_is_found_far_back_in_each_partition(
    apache: ApacheKafka, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tails are read, ever longer ones; others' records lie behind ours, by their thousands in one partition only."""
    for name, least in (("TAIL_RECORDS", 10), ("READ_RECORDS", 50), ("STILL_SECONDS", 0)):
        monkeypatch.setattr(churn, name, least)
    create_topic(apache.direct, topic, 3)
    run, users = secrets.token_hex(8), [user_of(number, 3) for number in range(3)]
    write(apache.direct, topic, [raw(run, number, users[number % 3]) for number in range(1, 31)])
    write(apache.direct, topic, [raw(secrets.token_hex(8), number, users[1]) for number in range(1, 3001)])
    past = PastReader(settings_of(apache, topic), run, Stop(), lambda _: None).read()
    assert past.bounds(users) == {users[0]: 30, users[1]: 28, users[2]: 29}


def test_somebody_elses_open_transaction_holds_nothing_up(start: Start, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.direct, topic, config={"retention.ms": "-1"})
    succeeds(start(**WEEK, MAX_EVENTS=100))
    with open_transaction(apache, topic) as theirs:
        succeeds(start(**WEEK, MAX_EVENTS=200))
        theirs.abort_transaction()
    succeeds(start(**WEEK, MAX_EVENTS=300))  # a control record stands at the end
    held = [record.value.decode() for record in read_all(apache.direct, topic) if event_id(record)]
    assert held == printed(**WEEK, MAX_EVENTS=300)


def test_a_second_process_of_the_same_run_waits(start: Start, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.direct, topic, config={"retention.ms": "-1"})
    first = start(**{**WEEK, "INTERVAL_SECONDS": 0.02})
    first.wait_for("Total events sent")
    second = start(**WEEK, METRICS_PORT=(port := free_port()))
    second.wait_for("WARNING - Another process sends run .* to topic")
    with pytest.raises(urllib.error.HTTPError, match="503") as unready:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz")
    assert unready.value.read().decode() == f"looking for run {run_of()} in topic {topic}\n"
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").status == 200
    first.kill()
    succeeds(second)
    assert values(apache, topic) == printed(**WEEK)


def test_a_stop_while_the_topic_is_read(start: Start, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.direct, topic)
    script = start(**WEEK)
    script.wait_for("SEED=")
    script.signal(signal.SIGTERM)
    assert script.wait(5) == 0
    assert values(apache, topic) == []


# ------------------------------------------------------------------------------- topics that are not as they were left


def test_a_topic_that_was_enlarged(start: Start, apache: ApacheKafka, topic: str) -> None:
    """Most users' later events go elsewhere than their earlier ones, also when nothing was sent in between."""
    create_topic(apache.direct, topic, 2, config={"retention.ms": "-1"})
    for most, partitions in ((1000, 5), (1000, 6), (2000, 7)):
        succeeds(start(**WEEK, MAX_EVENTS=most))
        add_partitions(apache.direct, topic, partitions)
        with Growth(apache.direct, topic, partitions) as held:
            assert held() == most
    succeeds(start(**WEEK, MAX_EVENTS=3000))
    assert values(apache, topic) == printed(**WEEK, MAX_EVENTS=3000)


def test_a_topic_that_was_made_again(start: Start, apache: ApacheKafka, topic: str) -> None:
    for _ in range(2):
        succeeds(start(**WEEK))
        assert values(apache, topic) == printed(**WEEK)
        delete_topic(apache.direct, topic)


def test_a_topic_that_was_emptied(start: Start, apache: ApacheKafka, topic: str) -> None:
    """There is no telling where the run was: it begins again, and says so."""
    succeeds(start(**WEEK, MAX_EVENTS=1000))
    delete_before(apache.direct, topic, 0, -1)
    again = start(**WEEK)
    succeeds(again)
    again.wait_for(f"INFO - Topic {topic} has no event of run {run_of()}: the run starts at its first event")
    assert values(apache, topic) == printed(**WEEK)


def test_partitions_without_their_beginning(start: Start, apache: ApacheKafka, topic: str) -> None:
    """What retention has deleted was sent. Of a partition with nothing left this is a guess, and is said."""
    create_topic(apache.direct, topic, 3, config={"retention.ms": "-1"})
    succeeds(start(**WEEK, MAX_EVENTS=1000))
    delete_before(apache.direct, topic, 0, 200)
    delete_before(apache.direct, topic, 1, -1)
    left = len(read_all(apache.direct, topic))
    again = start(**WEEK, MAX_EVENTS=2000)
    succeeds(again)
    assert [line.partition(" - WARNING - ")[2] for line in warnings(again)] == [
        f"In partition 1 no event of run {run_of()} is left; all events up to number 1000 count as sent"
    ]
    records = read_all(apache.direct, topic)
    assert len(records) == left + 1000
    numbers = {number for _, number in filter(None, map(event_id, records))}
    assert set(range(1001, 2001)) <= numbers
    assert len(numbers) == len(records)


def test_a_user_who_may_not_read(run_script: RunScript, make_apache: MakeApache, topic: str) -> None:
    """All is sent, under an id that no other start has: the audit of each run stays exact."""
    kafka = make_apache(
        users={"alice": "secret"},
        listeners={"SASL": "SASL_PLAINTEXT"},
        properties={"authorizer.class.name": AUTHORIZER},
    )
    with kafka:
        create_topic(kafka.direct, topic, config={"retention.ms": "-1"})
        grant(kafka.direct, "alice", topic, "WRITE", "DESCRIBE", "DESCRIBE_CONFIGS")
        settings = {
            **WEEK,
            "KAFKA_BROKER": kafka.address("SASL"),
            "KAFKA_TOPIC": topic,
            "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "KAFKA_SASL_MECHANISM": "PLAIN",
            "KAFKA_SASL_USERNAME": "alice",
            "KAFKA_SASL_PASSWORD": "secret",
            "MAX_EVENTS": 100,
        }
        runs = []
        for _ in range(2):
            script = run_script(SCRIPT, **settings)
            succeeds(script)
            (line,) = warnings(script)
            found = re.search(rf"of run {run_of()} are not known: all events are sent, as run (\w+)\..*Read", line)
            assert found, line
            runs.append(found[1])
        verdict = audit(read_all(kafka.direct, topic), 1)
        assert verdict.clean
        assert [(run, found.count) for run, found in verdict.runs.items()] == [(run, 100) for run in runs]
        assert len({*runs, run_of()}) == 3
        grant(kafka.direct, "alice", topic, "READ")
        script = run_script(SCRIPT, **settings)
        succeeds(script)
        assert warnings(script) == []
        assert run_of() in audit(read_all(kafka.direct, topic), 1).runs


def test_events_of_the_run_that_these_settings_do_not_make(start: Start, apache: ApacheKafka, topic: str) -> None:
    """Another version's, another subclass's: going on would mix two streams into one run."""
    create_topic(apache.direct, topic, config={"retention.ms": "-1"})
    write(apache.direct, topic, [raw(run_of(), 1, 5)])
    script = start(**WEEK)
    assert script.wait() == 1
    script.wait_for(f"ERROR - event {run_of()}:1 in topic {topic} is not what these settings make.*KAFKA_TOPIC")
    assert len(read_all(apache.direct, topic)) == 1


def test_a_record_that_cannot_be_read(start: Start, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.direct, topic, config={"retention.ms": "-1"})
    write(apache.direct, topic, [{"value": b"theirs", "headers": [(Raw("fffe"), b"")]}])
    script = start(**WEEK)
    assert script.wait() == 1
    script.wait_for(
        f"ERROR - topic {topic} cannot be read, so its events of run {run_of()} are not known: .*KAFKA_TOPIC"
    )


# ------------------------------------------------------------------------------------------------ the model's clock


def test_the_past_comes_at_the_speed_asked_for_and_ends() -> None:
    """Never before the model's clock, run at that speed, shows its time."""
    begin = time.time()
    settings = {"SEED": "fast", "START_TIME": "2026-05-04", "END_TIME": "2026-05-04T12:00"}
    done = finish("--print", **settings, SPEED=20_000)
    assert done.returncode == 0, done.stderr
    assert time.time() - begin >= 12 * 3600 / 20_000
    assert done.stdout.splitlines() == printed(**settings, INTERVAL_SECONDS=0)
    assert re.search(r"skipped 0 in .*/s by the model's clock", done.stderr)
    assert re.search(
        r"(?m)The model's clock is \d+ days, .* behind the real one; at SPEED=20000 it catches up in \d:\d\d:\d\d$",
        done.stderr,
    )


def test_no_event_comes_before_its_time(run_script: RunScript) -> None:
    speed, begin = 7200, datetime.now(UTC)
    start = (begin - timedelta(hours=20)).replace(microsecond=0)
    script = run_script(SCRIPT, "--print", SEED="early", START_TIME=start.isoformat(), SPEED=speed, MAX_EVENTS=100)
    seen: list[tuple[datetime, datetime]] = []
    while script.process.poll() is None or len(seen) < len(script.stdout_lines):
        lines, now = script.stdout_lines[len(seen) :], datetime.now(UTC)
        seen += [(time_of(line), now) for line in lines]
        time.sleep(0.01)
    assert len(seen) == 100
    assert all(now - begin >= (at - start) / speed for at, now in seen)


def test_the_clock_of_a_speed_stays_behind_or_catches_up() -> None:
    """Due when the model's clock shows it; and that is never ahead of the real one."""

    now = int(time.time())
    pace, start, lag = told_pace(now, [-1000, -990, -100, 3, 20])
    assert pace.take(start, 10) == [start]
    assert pace.due() == pytest.approx(start + 10 / 101, abs=1e-3)
    assert pace.take(start + 0.09, 10) == []
    assert pace.take(start + 1, 10) == pytest.approx([start + 10 / 101], abs=1e-3)
    assert pace.behind(start + 10) == pytest.approx(10 - 900 / 101, abs=1e-2)  # late, and it comes
    assert pace.skip(start + 10) == 0
    assert pace.take(start + 10, 10) == pytest.approx([start + 900 / 101], abs=1e-3)
    assert pace.due() == pytest.approx(start + 1003 / 101, abs=0.5)
    assert pace.due() > time.monotonic() + now + 3 - time.time() - 0.01
    assert lag < 5


def test_the_clock_of_a_resumed_run_starts_where_it_stopped() -> None:
    pace, start, _ = told_pace(int(time.time()), [-500, -490, 20], resumed_at=-500)
    assert pace.take(start, 10) == [start]
    assert pace.due() == pytest.approx(start + 10 / 101, abs=1e-3)


def told_pace(now: int, times: list[int], resumed_at: int | None = None) -> tuple[churn.ClockPace, float, float]:
    """At SPEED=101 with events so many seconds after now, from -1000 on; when it began, and how late that was."""

    class Told(RandomChurnProducer):
        def moments(self) -> Iterator[churn.Moment]:
            return iter([((now + at) * churn.SECOND, 1, "bounce", {}, "") for at in times])

    generator = Told("clock")
    generator.backfill(datetime.fromtimestamp(now - 1000, UTC), None)
    if resumed_at is not None:
        generator.resumed_at = (now + resumed_at) * churn.SECOND
    pace = churn.ClockPace(generator, 101, None)
    pace.begin(start := time.monotonic())
    return pace, start, time.time() - now


def seed_with_events(start: datetime, soon: float, until: float) -> str:
    """A seed whose run has two events between so many seconds from now."""
    first, last = ((time.time() + seconds) * churn.SECOND for seconds in (soon, until))
    for number in itertools.count():
        generator = RandomChurnProducer(f"soon {number}")
        generator.backfill(start, None)
        times = (moment[0] for moment in generator.moments())
        if sum(at > first for at in itertools.takewhile(last.__gt__, times)) >= 2:
            return f"soon {number}"
    raise AssertionError


def test_history_then_now_and_on_after_restarts(start: Start, apache: ApacheKafka, topic: str) -> None:
    """The past at once, then each event at its time; what came due while it was down comes at once too."""
    create_topic(apache.direct, topic, 2, config={"retention.ms": "-1"})
    begin = (datetime.now(UTC) - timedelta(hours=20)).replace(microsecond=0)
    settings = {"SEED": seed_with_events(begin, 15, 60), "START_TIME": begin.isoformat()}
    live = {**settings, "SPEED": "inf"}
    generator = RandomChurnProducer(settings["SEED"])
    generator.backfill(begin, None)
    times = (moment[0] / churn.SECOND for moment in generator.moments())
    past = sum(1 for _ in itertools.takewhile(lambda at: at < time.time(), times))
    with Growth(apache.direct, topic, 2) as held:
        first = start(**live)
        first.wait_for("From now on the model's clock is the real one; the next event comes in")
        wait_until(lambda: held() >= past, 30, "the past")
        first.kill()
        following = held() + 1
        due = [at for at, *_ in itertools.islice(generator.moments(), following + 1)][-2:]
        wait_until(lambda: time.time() > due[0] / churn.SECOND, 90, "an event came due while it was down")
        second = start(**live)
        wait_until(lambda: held() >= following, 30, "it came")
        second.kill()
        third = start(**live)
        third.wait_for("Sending to topic")  # before that a signal ends the process as any other
        wait_until(lambda: held() > following, 90, "the next came at its time")
        assert time.time() >= due[1] / churn.SECOND
        third.signal(signal.SIGTERM)
        succeeds(third)
    found = values(apache, topic, 2)
    assert found == printed(**settings, INTERVAL_SECONDS=0, MAX_EVENTS=len(found))
    for record in read_all(apache.direct, topic):
        assert record.timestamp == int(time_of(record.value.decode()).timestamp() * 1000 + 1e-6)
    told = labelled(**settings, SPEED="inf", MAX_EVENTS=len(found))
    assert sum(int(row["events"]) for row in told.values()) == len(found)


def test_kills_at_a_chosen_speed(start: Start, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.direct, topic, 3, config={"retention.ms": "-1"})
    expected = printed(**FORTNIGHT)
    settings = {**FORTNIGHT, "SPEED": 150_000}
    del settings["INTERVAL_SECONDS"]
    with Growth(apache.direct, topic, 3) as held:
        for _ in range(5):
            script, least = start(**settings), held() + 500
            wait_until(lambda least=least: held() >= least, 30, f"{least} events", 0.002)  # type: ignore[misc]
            script.kill()
    succeeds(start(**settings))
    assert values(apache, topic, 3) == expected


def test_live_at_real_time_from_now(run_script: RunScript) -> None:
    before = datetime.now(UTC)
    script = run_script(SCRIPT, "--print", SPEED=1, DURATION_SECONDS=3)
    found = script.wait_for(r"SEED=\w+ START_TIME=(\S+)$")
    assert before <= datetime.fromisoformat(found[1]) <= datetime.now(UTC)
    script.wait_for("From now on the model's clock is the real one")
    succeeds(script)
    assert all(time_of(line) <= datetime.now(UTC) for line in script.stdout_lines)


def test_at_speed_1_the_clock_stays_behind(run_script: RunScript) -> None:
    script = run_script(SCRIPT, "--print", SPEED=1, START_TIME=f"{datetime.now(UTC) - timedelta(days=3):%F}")
    script.wait_for(r"At SPEED=1 the model's clock stays 3 days, .* behind the real one; SPEED=inf sends that at once")
    script.signal(signal.SIGTERM)
    succeeds(script)


# -------------------------------------------------------------------------------------------------- users and settings


def test_fewer_users_are_the_first_ones() -> None:
    week = printed(**WEEK)
    few = printed(**WEEK, USERS=100)
    assert few == [line for line in week if json.loads(line)["user_id"] <= 100]
    assert len(few) > 300
    shard = printed(**WEEK, USERS=100, SHARD_COUNT=2, SHARD_INDEX=1)
    assert shard == [line for line in few if json.loads(line)["user_id"] % 2 == 1]
    assert list(labelled(**WEEK, USERS=3)) == [1, 2, 3]


def test_end_time_now() -> None:
    before = datetime.now(UTC)
    done = finish(
        "--print", SEED="a", START_TIME=f"{before - timedelta(days=2):%F}", END_TIME="now", INTERVAL_SECONDS=0
    )
    ended = re.search(r"END_TIME=(\S+)", done.stderr)
    assert ended
    assert before <= datetime.fromisoformat(ended[1]) <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"SPEED": 0.5}, "SPEED: '0.5'; allowed: a number from 1 up, or inf"),
        ({"SPEED": "nan"}, "SPEED: 'nan'; allowed: a number from 1 up, or inf"),
        ({"SPEED": "fast"}, "SPEED: 'fast'; allowed: a number from 1 up, or inf"),
        ({"SPEED": 60}, "SPEED: '60.0', .*cannot run ahead of the real one: set START_TIME.*"),
        ({"SPEED": "inf"}, "SPEED: 'inf', .*set START_TIME.*"),
        ({"SPEED": 1, "INTERVAL_SECONDS": 3}, "INTERVAL_SECONDS: '3.0', no use with SPEED.*"),
        ({"SPEED": 1, "INTERVAL_SECONDS": 0}, "INTERVAL_SECONDS: '0.0', no use with SPEED.*"),
        ({"USERS": 0}, "USERS: '0'; allowed: 1 to 1000"),
        ({"USERS": 1001}, "USERS: '1001'; allowed: 1 to 1000"),
        ({"USERS": 2, "SHARD_COUNT": 3, "SHARD_INDEX": 0}, "SHARD_COUNT: '3', more than USERS=2; .*"),
        ({"START_TIME": "now"}, "START_TIME: 'now', not a time that can be read; .*"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], problem: str) -> None:
    done = finish("--print", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"{problem}\n", done.stderr), done.stderr


def test_labels_at_a_speed_need_the_start() -> None:
    done = finish("--labels", SEED="a", SPEED=1, MAX_EVENTS=5)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "START_TIME: not set; --labels needs it\n"


def test_shards_of_a_history_are_warned_of(start: Start) -> None:
    script = start(**WEEK, SHARD_COUNT=2, SHARD_INDEX=0, MAX_EVENTS=5)
    succeeds(script)
    (line,) = warnings(script)
    assert re.search("Each shard sends the past at its own speed.*SHARD_COUNT=1", line)


ADDED = """
import random_event_producer as tool
from random_churn_producer import RandomChurnProducer, main

tool.METADATA["search"] = {"type": "object", "required": ["query"]}


class WithSearches(RandomChurnProducer):
    def _generate_metadata(self, event_type):
        return {"query": "shoes"} if event_type == "search" else super()._generate_metadata(event_type)


raise SystemExit(main(WithSearches))
"""


def test_an_event_type_of_the_table_comes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(ADDED)
    done = finish("--print", script=tmp_path / "own.py", **WEEK)
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["event_type"] for line in done.stdout.splitlines()]
    assert kinds.count("search") / kinds.count("product_view") == pytest.approx(0.2, abs=0.03)
