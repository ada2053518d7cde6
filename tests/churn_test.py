"""The churn stream: its model, clock, order and seeds, its labels against the events, and its edge cases."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from brokers import ApacheKafka, create_topic, event_id, grant, read_all, set_topic_config
from conftest import ROOT, Broker, MakeApache, RunScript, Script, clean_environment
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import random_churn_producer as churn
from random_churn_producer import ChurnSettings, RandomChurnProducer, User, instant_of, model_days
from random_event_producer import PRODUCTS, Stop

import churn_model

SCRIPT = "random_churn_producer.py"
MONDAY = datetime(2026, 5, 4, tzinfo=UTC)
HALF_HOUR, MONTH = timedelta(minutes=30), timedelta(days=30)
QUARTER: dict[str, Any] = {
    "SEED": "quarter",
    "START_TIME": "2026-05-04",
    "END_TIME": "2026-08-02",
    "INTERVAL_SECONDS": 0,
}
WEEK = {**QUARTER, "END_TIME": "2026-05-11"}
SUMMARY = re.compile(r"(\d+) users, (\d+) gone; best possible AUC (none|0\.\d{4}|1\.0000), log loss (\d+\.\d{4})")

Row = dict[str, str]


def finish(*flags: str, script: str | Path = SCRIPT, **settings: Any) -> subprocess.CompletedProcess[str]:
    """A run to its end, whatever its exit code."""
    command = [sys.executable, str(ROOT / script), *flags]
    environment = clean_environment(PYTHONPATH=str(ROOT), **settings)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def printed(**settings: Any) -> list[str]:
    done = finish("--print", **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def labelled(**settings: Any) -> dict[int, Row]:
    done = finish("--labels", **settings)
    assert done.returncode == 0, done.stderr
    assert SUMMARY.fullmatch(done.stderr.strip()), done.stderr
    return {int(row["user_id"]): row for row in csv.DictReader(io.StringIO(done.stdout))}


def backfill(
    seed: str, start: datetime = MONDAY, days: float = 90, make: type[RandomChurnProducer] = RandomChurnProducer
) -> RandomChurnProducer:
    generator = make(seed)
    generator.backfill(start, start + timedelta(days=days))
    return generator


Made = tuple[int, str, dict[str, Any], datetime]  # user_id, event type, metadata, time


def events_of(generator: RandomChurnProducer) -> list[Made]:
    made = iter(generator.next_event, None)
    return [(user, kind, told, at_time(at)) for user, kind, told, at in made]


def at_time(microseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)


def untimed(line: str) -> str:
    return re.sub(r'"timestamp":"[^"]+"', "", line)


def time_of(line: str) -> datetime:
    return datetime.fromisoformat(json.loads(line)["timestamp"]).replace(tzinfo=UTC)


def by_user(events: Iterable[Made]) -> dict[int, list[Made]]:
    users: dict[int, list[Made]] = defaultdict(list)
    for event in events:
        users[event[0]].append(event)
    return users


def visits_of(events: Iterable[Made]) -> list[list[Made]]:
    """One user's events, cut where 30 minutes or more have passed."""
    visits: list[list[Made]] = []
    for event in events:
        if not visits or event[3] - visits[-1][-1][3] >= HALF_HOUR:
            visits.append([])
        visits[-1].append(event)
    return visits


@pytest.fixture(scope="module")
def quarter() -> list[str]:
    return printed(**QUARTER)


@pytest.fixture(scope="module")
def quarter_labels() -> dict[int, Row]:
    return labelled(**QUARTER)


@pytest.fixture(scope="module")
def made_quarter() -> list[Made]:
    return events_of(backfill("quarter"))


def block(script: str) -> list[str]:
    """The lines of a script's PEP 723 block."""
    lines = (ROOT / script).read_text().splitlines()
    return lines[lines.index("# /// script") : lines.index("# ///") + 1]


def test_the_inline_dependencies_are_the_tools() -> None:
    assert block(SCRIPT) == block("random_event_producer.py")
    assert set(block("benchmarks/churn_model.py")) - set(block(SCRIPT)) == {'#   "scikit-learn==1.9.1",'}


# ------------------------------------------------------------------------------------------------- seeds and order


def test_the_same_seed_and_times_give_the_same_bytes(quarter: list[str]) -> None:
    assert printed(**QUARTER) == quarter
    assert printed(**{**QUARTER, "SEED": "another"}) != quarter


def test_a_later_end_changes_nothing_before(quarter: list[str]) -> None:
    shorter = printed(**{**QUARTER, "END_TIME": "2026-06-10T12:34:56.789"})
    assert shorter == quarter[: len(shorter)]
    end = datetime(2026, 6, 10, 12, 34, 56, 789_000, tzinfo=UTC)
    assert time_of(shorter[-1]) < end <= time_of(quarter[len(shorter)])


def test_events_come_in_the_order_of_the_clock_from_start_to_end(quarter: list[str]) -> None:
    times = [time_of(line) for line in quarter]
    assert times == sorted(times)
    assert times[0] >= MONDAY
    assert times[-1] < MONDAY + timedelta(days=90)


def test_shards_have_the_same_events_user_by_user(quarter: list[str]) -> None:
    shards = [printed(**QUARTER, SHARD_INDEX=index, SHARD_COUNT=3) for index in range(3)]
    for index, shard in enumerate(shards):
        assert shard == [line for line in quarter if json.loads(line)["user_id"] % 3 == index]


def test_types_and_metadata_do_not_depend_on_the_start() -> None:
    here, there = (
        by_user(events_of(backfill("quarter", start, 20)))
        for start in (MONDAY, datetime(1999, 12, 29, 7, 1, 2, 3, UTC))
    )
    compared = 0
    for user, events in here.items():
        for one, other in zip(events, there[user], strict=False):
            assert one[:3] == other[:3]
            compared += 1
    assert compared > 10_000


def test_live_is_the_backfill_from_2001_with_the_time_of_now() -> None:
    settings = {"SEED": "live", "INTERVAL_SECONDS": 0, "MAX_EVENTS": 20_000}
    before = datetime.now(UTC)
    live = printed(**settings)
    past = printed(**settings, START_TIME="2001-01-01")
    assert len(live) == 20_000
    assert list(map(untimed, live)) == list(map(untimed, past))
    assert before <= time_of(live[0]) <= time_of(live[-1]) <= datetime.now(UTC)
    assert time_of(past[0]).date() == datetime(2001, 1, 1, tzinfo=UTC).date()


def test_a_seed_that_was_drawn_and_the_times_are_logged_and_give_the_same_run() -> None:
    first = finish("--print", START_TIME="2026-11-01", MAX_EVENTS=500, INTERVAL_SECONDS=0)
    logged = dict(re.findall(r"(SEED|START_TIME|END_TIME)=(\S+)", first.stderr))
    assert set(logged) == {"SEED", "START_TIME", "END_TIME"}
    assert printed(**logged, MAX_EVENTS=500, INTERVAL_SECONDS=0) == first.stdout.splitlines()
    assert finish("--labels", **logged).returncode == 0
    again = finish("--print", START_TIME="2026-11-01", MAX_EVENTS=1, INTERVAL_SECONDS=0)
    assert again.stderr.count("SEED=") == 1
    assert logged["SEED"] not in again.stderr


@pytest.mark.parametrize("start", ["2026-05-04T00:00:00Z", "2026-05-04T02:00:00+02:00", "2026-05-04 00:00"])
def test_a_time_can_be_written_in_several_ways(start: str) -> None:
    assert printed(**{**WEEK, "START_TIME": start}) == printed(**WEEK)


def test_max_events_and_end_time_whichever_comes_first() -> None:
    week = printed(**WEEK)
    assert printed(**WEEK, MAX_EVENTS=100) == week[:100]
    assert printed(**WEEK, MAX_EVENTS=10**7) == week


def test_a_period_without_events_ends_well() -> None:
    assert printed(**{**WEEK, "END_TIME": "2026-05-04T00:00:00.000001Z"}) == []


# ------------------------------------------------------------------------------------------------------- the model


def test_events_are_as_the_tool_describes_them(quarter: list[str]) -> None:
    schema = Draft7Validator(json.loads(finish("--schema").stdout))
    for line in quarter[::20]:
        schema.validate(json.loads(line))


def test_visits_cut_from_the_stamps_are_those_of_the_model() -> None:
    modelled: dict[int, list[list[int]]] = defaultdict(list)

    class Recorded(RandomChurnProducer):
        def _visit(self, user: User) -> list[Any]:
            visit = super()._visit(user)
            modelled[user.user_id].append([moment[0] for moment in visit])
            return visit

    users = by_user(events_of(backfill("quarter", days=60, make=Recorded)))
    assert len(users) > 900
    for user, events in users.items():
        cut = [[event[3] for event in visit] for visit in visits_of(events)]
        model = [list(map(at_time, visit)) for visit in modelled[user][: len(cut)]]
        assert cut[:-1] == model[:-1]
        assert cut[-1] == model[-1][: len(cut[-1])]  # the end may have cut it short


def test_seconds_in_a_visit_add_up(made_quarter: list[Made]) -> None:
    """A view's stamp is that of the event before plus its stay; a cart's minutes count from the visit's begin."""
    for visit in itertools.chain(*(visits_of(events) for events in by_user(made_quarter).values())):
        kinds = [kind for _, kind, _, _ in visit]
        if kinds[0] == "bounce":
            assert kinds == ["bounce"]
            assert visit[0][2]["session_length"] <= 1.9
            continue
        begin = visit[0][3] - timedelta(seconds=visit[0][2]["view_duration"])
        for before, (_, kind, told, at) in itertools.pairwise(visit):
            passed = (at - before[3]).total_seconds()
            if kind == "product_view":
                assert passed == pytest.approx(told["view_duration"], abs=0.051)
                assert passed >= 3
            else:
                assert before[1] == "product_view"
                assert before[2]["product_id"] == told["product_id"]
                assert 2 <= passed <= 10
                assert told["session_length"] == pytest.approx((at - begin).total_seconds() / 60, abs=0.052)
        assert len({told["device"] for _, kind, told, _ in visit if kind == "product_view"}) == 1


@pytest.mark.parametrize("seed", ["quarter", "second"])
def test_shares_and_rhythm(seed: str) -> None:
    """The windows of docs/churn.md, from Monday on for 13 weeks."""
    made = events_of(backfill(seed, days=91))
    kinds, hours, days = (Counter(map(key, made)) for key in (kind, lambda e: e[3].hour, lambda e: e[3].weekday()))
    users, products = (
        Counter(event[0] for event in made),
        Counter(e[2]["product_id"] for e in made if kind(e) == "product_view"),
    )
    visits = sum(len(visits_of(events)) for events in by_user(made).values())
    total = len(made)
    assert 69_000 < total < 79_500
    assert kinds["product_view"] / total == pytest.approx(0.72, abs=0.004)
    assert kinds["add_to_cart"] / total == pytest.approx(0.205, abs=0.006)
    assert kinds["bounce"] / total == pytest.approx(0.075, abs=0.004)
    assert total / visits == pytest.approx(3.06, abs=0.06)
    assert sum(count for _, count in users.most_common(100)) / total == pytest.approx(0.45, abs=0.03)
    assert sum(count for _, count in users.most_common(200)) / total == pytest.approx(0.64, abs=0.03)
    assert sum(count for _, count in products.most_common(10)) / kinds["product_view"] == pytest.approx(0.347, abs=0.01)
    assert 10 < hours[19] / hours[3] < 15
    assert 0.77 < days[5] / mean(days.values()) < 0.85


def kind(event: Made) -> str:
    return event[1]


def test_stays_devices_and_what_is_drawn_evenly(made_quarter: list[Made]) -> None:
    stays = [told["view_duration"] for _, kind, told, _ in made_quarter if kind == "product_view"]
    assert mean(stays) == pytest.approx(43, abs=0.7)  # 3 s and a mean of 40
    bounces = [told for _, kind, told, _ in made_quarter if kind == "bounce"]
    assert mean(told["session_length"] for told in bounces) == pytest.approx(
        25 * (1 - math.exp(-115 / 25)) / 60, abs=0.02
    )
    assert all(
        abs(count / len(bounces) - 1 / 5) < 0.03 for count in Counter(told["referrer"] for told in bounces).values()
    )
    carts = Counter(told["quantity"] for _, kind, told, _ in made_quarter if kind == "add_to_cart")
    assert all(abs(count / carts.total() - 1 / 5) < 0.02 for count in (carts[n] for n in range(1, 6)))
    own = [  # the share of a user's most frequent device: 0.8 + 0.2 / 3
        Counter(visit[0][2]["device"] for visit in visits_of(events)).most_common(1)[0][1] / len(visits_of(events))
        for events in by_user(made_quarter).values()
        if len(visits_of(events)) >= 50
    ]
    assert mean(own) == pytest.approx(0.8667, abs=0.01)


def test_favourites_are_not_neighbours_and_not_of_one_category() -> None:
    numbers = [int(product_id[5:]) for product_id, _, _ in churn.BY_RANK[:20]]
    assert min(abs(a - b) for a, b in itertools.combinations(numbers, 2)) >= 1
    assert sum(abs(a - b) == 1 for a, b in itertools.combinations(numbers, 2)) <= 2
    assert len({category for _, category, _ in churn.BY_RANK[:20]}) >= 5
    assert sorted(churn.BY_RANK) == sorted(PRODUCTS)


def test_the_week_has_seven_model_days_and_its_clock_can_be_read_backwards() -> None:
    weights = [hour * day for day in churn.DAYS for hour in churn.HOURS]
    start, hour = microseconds(0), 3600 * 10**6
    for week in (-2000, 0, 2000):
        begin = start + week * 168 * hour
        for number, weight in enumerate(weights):
            speed = model_days(begin + (number + 1) * hour) - model_days(begin + number * hour)
            assert speed == pytest.approx(7 * weight / sum(weights), rel=1e-9)
            for at in (begin + number * hour, begin + number * hour + 1, begin + (number + 1) * hour - 1):
                assert abs(instant_of(model_days(at)) - at) <= 2  # microseconds
        assert model_days(begin + 168 * hour) - model_days(begin) == pytest.approx(7, abs=1e-9)


def test_waits_follow_the_class_and_the_state() -> None:
    """Waits divided by their mean are exponential with mean 1, in each state; who is gone waits 60 days first."""
    waits: dict[str, list[float]] = defaultdict(list)

    class Recorded(User):
        def _wait(self, since: int) -> None:
            super()._wait(since)
            rate = {"engaged": self._a, "drifting": self._b, "gone": 1 / 90}[self.state]
            days = model_days(self.next_visit) - model_days(since) - (60 if self.state == "gone" else 0)
            waits[self.state].append(days * rate)

    for user_id in range(1, 401):
        user, now = Recorded(user_id, "waits", 0), 0
        for _ in range(150):
            now = user.next_visit
            user.state = "engaged" if user.state == "gone" else user.state
            user.leave(now)
    for state in ("engaged", "drifting", "gone"):
        measured = sorted(waits[state])
        assert len(measured) > 2000
        assert measured[0] >= -1e-6
        furthest = max(abs(n / len(measured) - (1 - math.exp(-wait))) for n, wait in enumerate(measured))
        assert furthest < 1.63 / math.sqrt(len(measured)), state  # Kolmogorov and Smirnov, 1 %


def test_chances_of_the_states() -> None:
    """By the state of a visit: bounces 0.20 and 0.45, carts 0.30 and 0.15, and which state may follow."""
    bounces, carts, ends = Counter[tuple[str, bool]](), Counter[tuple[str, bool]](), Counter[tuple[str, str]]()

    class Recorded(RandomChurnProducer):
        def _visit(self, user: User) -> list[Any]:
            state = "engaged" if user.state == "gone" else user.state
            visit = super()._visit(user)
            kinds = [moment[2] for moment in visit]
            bounces[state, kinds == ["bounce"]] += 1
            carts[state, True] += kinds.count("add_to_cart")
            carts[state, False] += kinds.count("product_view") - kinds.count("add_to_cart")
            ends[state, visit[-1][4]] += 1
            assert {moment[4] for moment in visit[:-1]} <= {state}  # never in between
            return visit

    for _ in itertools.islice(Recorded("states").moments(), 150_000):
        pass
    for counts, chances in ((bounces, (0.20, 0.45)), (carts, (0.30, 0.15))):
        for state, chance in zip(("engaged", "drifting"), chances, strict=True):
            total = counts[state, True] + counts[state, False]
            assert counts[state, True] / total == pytest.approx(chance, abs=4 * math.sqrt(chance / total))
    assert {end for end in ends if end[0] == "engaged"} == {("engaged", "engaged"), ("engaged", "drifting")}
    assert {end for end in ends if end[0] == "drifting"} == {("drifting", "drifting"), ("drifting", "gone")}


def test_memory_stays_flat() -> None:
    generator, process = RandomChurnProducer("memory"), psutil.Process()
    sizes = []
    for _ in range(4):
        for _ in range(100_000):
            assert generator.generate_event() is not None
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 4_000_000, sizes


# ------------------------------------------------------------------------------------------------------ the labels


def test_labels_tell_what_the_stream_holds(quarter: list[str], quarter_labels: dict[int, Row]) -> None:
    held: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for sequence, line in enumerate(quarter, 1):
        event = json.loads(line)
        held[event["user_id"]].append((sequence, event["timestamp"]))
    assert list(quarter_labels) == list(range(1, 1001))
    for user, row in quarter_labels.items():
        last_sequence, last_event_at = held[user][-1] if held[user] else (0, "")
        expected = (str(len(held[user])), str(last_sequence), last_event_at)
        assert (row["events"], row["last_sequence"], row["last_event_at"]) == expected


@pytest.mark.parametrize("settings", [QUARTER, {**WEEK, "MAX_EVENTS": 3000}], ids=["end", "max-events"])
def test_labels_against_the_run_made_a_month_longer(settings: dict[str, Any]) -> None:
    """silent_30d, and that whoever is gone stays away for 60 model days: 50 of the clock at the least."""
    rows = labelled(**settings)
    run = events_of(backfill("quarter", days=160))
    sent = sum(int(row["events"]) for row in rows.values())
    limit = settings.get("MAX_EVENTS")
    end = run[sent - 1][3] if limit else datetime.fromisoformat(str(settings["END_TIME"])).replace(tzinfo=UTC)
    later: dict[int, datetime] = {}
    for user, _, _, at in run[sent:]:
        later.setdefault(user, at)
    far = end + timedelta(days=1000)
    for user, row in rows.items():
        assert (row["silent_30d"] == "1") == (later.get(user, far) >= end + MONTH)
        if row["state"] == "gone":
            left = datetime.fromisoformat(row["last_event_at"]).replace(tzinfo=UTC)
            assert later.get(user, far) - left > timedelta(days=50)


def test_labels_of_a_live_run_that_has_ended() -> None:
    settings = {"SEED": "live", "MAX_EVENTS": 20_000, "SHARD_COUNT": 2, "SHARD_INDEX": 1}
    rows = labelled(**settings)
    lines = printed(**settings, INTERVAL_SECONDS=0)
    assert set(rows) == set(range(1, 1001, 2))
    assert Counter({user: int(row["events"]) for user, row in rows.items()}) == Counter(
        json.loads(line)["user_id"] for line in lines
    )
    assert {row["last_event_at"] for row in rows.values()} == {""}
    past = labelled(**settings, START_TIME="2001-01-01")
    assert {user: {**row, "last_event_at": ""} for user, row in past.items()} == rows


def test_state_is_the_one_after_the_last_event_sent(quarter_labels: dict[int, Row]) -> None:
    states = dict.fromkeys(range(1, 1001), "engaged")
    generator = backfill("quarter")
    for at, user, _, _, state in generator.moments():
        if at >= generator.end:
            break
        states[user] = state
    assert {user: row["state"] for user, row in quarter_labels.items()} == states
    assert set(states.values()) == {"engaged", "drifting", "gone"}


def test_labels_of_nobody_gone() -> None:
    done = finish("--labels", SEED="a", MAX_EVENTS=5)
    assert done.stderr == "1000 users, 0 gone; best possible AUC none, log loss 0.0000\n"
    rows = done.stdout.splitlines()
    assert len(rows) == 1001
    assert sum(",0,0,,engaged," in row for row in rows) >= 995, "last_sequence is a number without events too"


def test_the_line_on_standard_error_is_the_score_of_the_rows(quarter_labels: dict[int, Row]) -> None:
    said = SUMMARY.fullmatch(finish("--labels", **QUARTER).stderr.strip())
    assert said
    scores = [(float(row["p_gone"]), row["state"] == "gone") for row in quarter_labels.values()]
    gone, here = ([score for score, truth in scores if truth is which] for which in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a in gone for b in here]
    loss = -mean(math.log(max(score if truth else 1 - score, 1e-9)) for score, truth in scores)
    assert (int(said[1]), int(said[2])) == (1000, len(gone))
    assert float(said[3]) == pytest.approx(mean(pairs), abs=1e-4)
    assert float(said[4]) == pytest.approx(loss, abs=1e-3)
    assert 0.91 < float(said[3]) < 0.965
    assert 0.34 < len(gone) / 1000 < 0.48


def test_chances_are_calibrated() -> None:
    """Over 6 seeds the sum of each chance and the number of users it came true for: less than 3 s.d. apart."""
    p_gone, p_silent, gone, silent = [], [], 0, 0
    for seed in range(6):
        records, end = churn.observe(backfill(f"calibrated {seed}"), sys.maxsize, Stop())
        chances = [record.chances(end) for record in records.values()]
        p_gone += [chance for chance, _ in chances]
        p_silent += [chance for _, chance in chances]
        gone += sum(record.state == "gone" for record in records.values())
        silent += sum(not record.heard_after for record in records.values())
    for expected, came in ((p_gone, gone), (p_silent, silent)):
        assert abs(sum(expected) - came) < 3 * math.sqrt(sum(p * (1 - p) for p in expected))


# --------------------------------------------- the two chances, computed anew: from docs/churn.md, not from the code

Z = NormalDist().inv_cdf
BOUNCES, CARTS = {"E": 0.20, "D": 0.45}, {"E": 0.30, "D": 0.15}


def hours_weight(at: datetime) -> int:
    hours = [
        50,
        30,
        20,
        15,
        15,
        25,
        45,
        70,
        90,
        100,
        110,
        115,
        120,
        115,
        110,
        110,
        115,
        130,
        160,
        190,
        200,
        180,
        130,
        85,
    ]
    return hours[at.hour] * [104, 104, 102, 102, 102, 82, 104][at.weekday()]


WEEK_WEIGHT = sum(hours_weight(MONDAY + timedelta(hours=hour)) for hour in range(168))


def model_time(since: datetime, until: datetime) -> float:
    """Model days between two instants: hour by hour."""
    days = 0.0
    while since < until:
        border = min(until, since.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1))
        days += 7 * hours_weight(since) / WEEK_WEIGHT * ((border - since) / timedelta(hours=1))
        since = border
    return days


def likelihood_of(path: Sequence[str], visits: Sequence[tuple[float, int, int]], k: int, rest: float) -> float:
    """The density of waits and visits when the user, of class k, was in these states after them, and then silent.

    path[n] is the state after visit n; "G" before a visit means that the user came back.
    """
    a = 0.2 * math.exp(1.2 * Z((k - 0.5) / 16))
    b = 0.6 * a
    p, q = 1 / (1 + 90 * a), 1 / (1 + 21 * b)
    chances = {("E", "E"): 1 - p, ("E", "D"): p, ("E", "G"): 0, ("D", "E"): 0, ("D", "D"): 1 - q, ("D", "G"): q}
    before, density = "E", 1 / 16
    for (wait, views, carts), after in zip(visits, path, strict=True):
        if before == "G":
            density *= math.exp(-(wait - 60) / 90) / 90 if wait > 60 else 0
        else:
            rate = {"E": a, "D": b}[before]
            density *= rate * math.exp(-rate * wait)
        during = "E" if before == "G" else before
        cart = CARTS[during]
        density *= (1 - BOUNCES[during]) * cart**carts * (1 - cart) ** (views - carts) if views else BOUNCES[during]
        density *= chances[during, after]
        before = after
    return (
        density * {"E": math.exp(-a * rest), "D": math.exp(-b * rest), "G": math.exp(-max(0, rest - 60) / 90)}[before]
    )


def all_paths(visits: Sequence[tuple[float, int, int]], rest: float) -> dict[str, float]:
    """The density of each state after the last visit: every path of states, summed up."""
    sums = dict.fromkeys("EDG", 0.0)
    for path in itertools.product("EDG", repeat=len(visits)):
        sums[path[-1] if path else "E"] += sum(likelihood_of(path, visits, k, rest) for k in range(1, 17))
    return sums


def test_chances_equal_the_sum_over_all_paths(made_quarter: list[Made], quarter_labels: dict[int, Row]) -> None:
    end = MONDAY + timedelta(days=90)
    users, compared = by_user(made_quarter), Counter[str]()
    for user, row in quarter_labels.items():
        visits, since = [], MONDAY
        for visit in visits_of(users[user]):
            kinds = [kind for _, kind, _, _ in visit]
            visits.append((model_time(since, visit[0][3]), kinds.count("product_view"), kinds.count("add_to_cart")))
            since = visit[-1][3] + HALF_HOUR
        if len(visits) > 5 or compared[row["state"]] >= 12:
            continue
        compared[row["state"]] += 1
        now, later = (all_paths(visits, model_time(since, until)) for until in (end, end + MONTH))
        assert float(row["p_gone"]) == pytest.approx(now["G"] / sum(now.values()), abs=2e-6)
        assert float(row["p_silent_30d"]) == pytest.approx(sum(later.values()) / sum(now.values()), abs=2e-6)
    assert min(compared.values()) >= 5
    assert len(compared) == 3


def record(*events: tuple[float, str]) -> churn.Record:
    """A user with events so many days after a Monday."""
    made = churn.Record(int(MONDAY.timestamp()) * 10**6)
    for sequence, (days, kind) in enumerate(events, 1):
        made.add(sequence, microseconds(days), kind, "engaged")
    return made


def microseconds(days: float) -> int:
    return round((MONDAY.timestamp() + days * 86_400) * 10**6)


def test_closed_cases_of_the_chances() -> None:
    rates = [0.2 * math.exp(1.2 * Z((k - 0.5) / 16)) for k in range(1, 17)]
    nothing = record().chances(microseconds(70))
    later = model_time(MONDAY, MONDAY + timedelta(days=100))
    assert nothing[0] == 0
    assert nothing[1] == pytest.approx(sum(math.exp(-a * later) for a in rates) / sum(math.exp(-a * 70) for a in rates))
    # A visit under way counts as over: within its 30 minutes the wait is 0, and not negative.
    twice = ((0.5, "bounce"), (1.0, "bounce"))
    assert record(*twice).chances(microseconds(1))[0] == record(*twice).chances(microseconds(1) + 1800 * 10**6)[0]
    # One visit ago nobody can be gone: who is engaged has to drift first.
    assert record((0.5, "bounce")).chances(microseconds(300))[0] == 0
    assert record(*twice).chances(microseconds(300))[0] > 0.5
    assert record(*twice).chances(microseconds(3000))[0] > 0.9999
    # Added types say nothing: only the wait counts from them.
    visit = ((1, "product_view"), (1.0001, "add_to_cart"), (1.0002, "product_view"))
    with_search = (*visit[:2], (1.00015, "search"), visit[2])
    assert record(*visit).chances(microseconds(40)) == record(*with_search).chances(microseconds(40))


# --------------------------------------------------------------------------------------------------- own event types

SUBCLASS = """
from random_churn_producer import RandomChurnProducer, main


class WithSearches(RandomChurnProducer):
    def __init__(self, *args):
        super().__init__(*args)
        self.event_types.append("search")

    def _generate_metadata(self, event_type):
        if event_type == "search":
            return {"query": self.random.choice(["shoes", "lamp", "tent"]), "page": "/search"}
        return super()._generate_metadata(event_type)


raise SystemExit(main(WithSearches))
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(SUBCLASS)
    return tmp_path / "own.py"


def test_an_event_type_of_a_subclass_and_its_labels(own: Path) -> None:
    made, done = finish("--print", script=own, **QUARTER), finish("--labels", script=own, **QUARTER)
    assert (made.returncode, done.returncode) == (0, 0), made.stderr + done.stderr
    events = [json.loads(line) for line in made.stdout.splitlines()]
    kinds = Counter(event["event_type"] for event in events)
    assert kinds["search"] / kinds["product_view"] == pytest.approx(0.2, abs=0.01)
    rows = {int(row["user_id"]): int(row["events"]) for row in csv.DictReader(io.StringIO(done.stdout))}
    assert Counter(rows) == Counter(event["user_id"] for event in events)
    said = SUMMARY.fullmatch(done.stderr.strip())
    assert said
    assert 0.91 < float(said[3]) < 0.965
    for _, events_of_user in itertools.groupby(
        sorted(events, key=lambda event: event["user_id"]), lambda e: e["user_id"]
    ):
        for before, event in itertools.pairwise(events_of_user):
            if event["event_type"] == "search":
                assert before["event_type"] in ("product_view", "add_to_cart")
                between = datetime.fromisoformat(event["timestamp"]) - datetime.fromisoformat(before["timestamp"])
                assert timedelta(seconds=2) <= between <= timedelta(seconds=10)


def test_the_check_of_the_event_types_draws_nothing() -> None:
    checked, plain = backfill("quarter", days=5), backfill("quarter", days=5)
    checked.check_event_types()
    assert events_of(checked) == events_of(plain)


# ------------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"END_TIME": "2026-05-04"}, "END_TIME: .*START_TIME"),
        ({"START_TIME": "2026-05-04", "END_TIME": "2026-05-04"}, "END_TIME: .*after START_TIME"),
        ({"START_TIME": "2026-05-04", "END_TIME": "2026-05-03T23:00Z"}, "END_TIME: .*after START_TIME"),
        ({"START_TIME": "2999-01-01"}, "START_TIME: .*before now"),
        ({"START_TIME": "1969-12-31"}, "START_TIME: .*from 1970"),
        ({"START_TIME": "2026-05-04", "END_TIME": "2999-01-01"}, "END_TIME: .*after now"),
        ({"START_TIME": "yesterday"}, "START_TIME: 'yesterday'.*ISO 8601"),
        ({"START_TIME": "2026"}, "START_TIME: '2026'.*ISO 8601"),
        ({"START_TIME": "2026-02-30"}, "START_TIME: '2026-02-30'.*ISO 8601"),
        ({"START_TIME": "0001-01-01T00:00+14:00"}, "START_TIME: .*ISO 8601"),
        ({"START_TIME": "2026-05-04", "END_TIME": "soon"}, "END_TIME: 'soon'.*ISO 8601"),
    ],
)
def test_times_that_make_no_sense(settings: dict[str, Any], problem: str) -> None:
    done = finish("--print", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(f"{problem}.*\n", done.stderr), done.stderr


def test_all_problems_are_told_together() -> None:
    done = finish("--labels", INTERVAL_SECONDS=-1, START_TIME="2999-01-01", END_TIME="soon", SHARD_COUNT=0)
    assert done.returncode == 2
    named = {line.split(":")[0] for line in done.stderr.splitlines()}
    assert named >= {"INTERVAL_SECONDS", "START_TIME", "END_TIME", "SHARD_COUNT"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["SEED", "MAX_EVENTS or END_TIME"]),
        ({"SEED": "a"}, ["MAX_EVENTS or END_TIME"]),
        ({"SEED": "a", "START_TIME": "2026-05-04"}, ["MAX_EVENTS or END_TIME"]),
        ({"MAX_EVENTS": 5}, ["SEED"]),
    ],
)
def test_labels_without_what_they_need(settings: dict[str, Any], named: list[str]) -> None:
    done = finish("--labels", **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == named


def test_labels_are_for_this_script_only() -> None:
    done = finish("--labels", script="random_event_producer.py", SEED="a", MAX_EVENTS=5)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown argument" in done.stderr


def test_labels_use_nothing_of_kafka() -> None:
    assert labelled(**WEEK, KAFKA_BROKER="127.0.0.1:1") == labelled(**WEEK)


def test_help_has_the_two_variables_and_labels() -> None:
    text = finish("--help").stdout
    assert re.search(r"START_TIME .*none", text)
    assert re.search(r"END_TIME .*none", text)
    assert "--labels" in text
    assert "START_TIME" not in finish("--help", script="random_event_producer.py").stdout


def test_a_backfill_at_a_slow_pace_says_how_long_it_takes(run_script: RunScript, quarter: list[str]) -> None:
    script = run_script(SCRIPT, "--print", **{**QUARTER, "INTERVAL_SECONDS": 3})
    line = script.wait_for(rf"{len(quarter)} events.*INTERVAL_SECONDS=0").string
    assert str(timedelta(seconds=3 * len(quarter))) in line
    script.wait_for('"user_id"')
    few = finish("--print", **{**QUARTER, "INTERVAL_SECONDS": 0.01, "MAX_EVENTS": 5})
    assert "has 5 events" in few.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("flag", "settings"),
    [("--labels", {"SEED": "a", "MAX_EVENTS": 10_000_000}), ("--print", {"SEED": "a", "START_TIME": "1971-01-01"})],
    ids=["labels", "count"],
)
def test_a_stop_while_the_stream_is_being_made(
    run_script: RunScript, flag: str, settings: dict[str, Any], number: int
) -> None:
    script = run_script(SCRIPT, flag, **settings)
    time.sleep(1.5)
    asked = time.monotonic()
    script.signal(number)
    code = script.wait(5)
    assert time.monotonic() - asked < 1
    assert code == (1 if flag == "--labels" else 0)
    assert script.stdout == ""


@pytest.mark.parametrize(("flag", "code"), [("--labels", 0), ("--print", 1)])
def test_a_reader_that_has_gone(flag: str, code: int) -> None:
    """Of --print, there are events that nobody has taken."""
    command = f"'{sys.executable}' '{ROOT / SCRIPT}' {flag} | head -2"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=clean_environment(**QUARTER),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code
    assert len(done.stdout.splitlines()) == 2
    assert not re.search("Traceback|ERROR|Exception", done.stderr)


# ------------------------------------------------------------------------------------------------------- with Kafka


def warnings(script: Script) -> list[str]:
    return [line for line in script.lines if " - WARNING - " in line or " - ERROR - " in line]


def before_sending(script: Script) -> list[str]:
    sending = next(number for number, line in enumerate(script.lines) if "Sending to topic" in line)
    return script.lines[:sending]


def test_a_backfill_into_kafka_and_its_labels(run_script: RunScript, broker: Broker, topic: str) -> None:
    """What a consumer reads is what --print prints and --labels counts; the topic was made to keep it."""
    script = run_script(SCRIPT, **WEEK, KAFKA_BROKER=broker.bootstrap, KAFKA_TOPIC=topic)
    assert script.wait() == 0
    assert any(f"Created topic {topic} with retention.ms=-1" in line for line in before_sending(script))
    assert warnings(script) == []
    records = sorted(read_all(broker.direct, topic), key=lambda record: event_id(record) or ("", 0))
    lines = printed(**WEEK)
    assert [record.value.decode() for record in sorted(records, key=sequence)] == lines
    assert [sequence(record) for record in sorted(records, key=sequence)] == list(range(1, len(lines) + 1))
    held = {}
    for record in sorted(records, key=sequence):
        event = json.loads(record.value)
        held[event["user_id"]] = (str(sequence(record)), event["timestamp"])
        assert record.timestamp == int(time_of(record.value.decode()).timestamp() * 1000 + 1e-6)
    rows = labelled(**WEEK)
    told = {user: (row["last_sequence"], row["last_event_at"]) for user, row in rows.items() if row["events"] != "0"}
    assert told == held


def sequence(record: Any) -> int:
    found = event_id(record)
    assert found
    return found[1]


def test_the_model_finds_the_run_that_the_labels_are_of(run_script: RunScript, broker: Broker, topic: str) -> None:
    """Among others in the topic: a later one, and one that goes on for longer; with shards each has its own."""
    create_topic(broker.direct, topic, 3, config={"retention.ms": "-1"})
    shards = {"SHARD_COUNT": 2, "SHARD_INDEX": 1}
    others: list[dict[str, Any]] = [{}, {**shards, "END_TIME": "2026-05-14"}, {"SEED": "another"}]
    runs = []
    for other in others:
        settings = {**WEEK, **other, "KAFKA_BROKER": broker.bootstrap, "KAFKA_TOPIC": topic}
        script = run_script(SCRIPT, **settings)
        assert script.wait() == 0, script.tail()
        runs.append(script.wait_for(r"run ([0-9a-f]{16})$", after=len(script.lines) - 1)[1])
    kafka = ChurnSettings(kafka_broker=broker.bootstrap, kafka_topic=topic)
    for changes, name in zip(({}, shards, others[2]), runs, strict=True):
        rows = [*labelled(**{**WEEK, **changes}).values()]
        found, run = churn_model.read(kafka, rows, "")
        assert (found, sorted(run)) == (name, [*range(1, sum(int(row["events"]) for row in rows) + 1)])
        assert churn_model.read(kafka, rows, name)[0] == name
        with pytest.raises(SystemExit, match=f"the labels are of no run there; .*, {runs[name == runs[0]]} has"):
            churn_model.read(kafka, rows, runs[name == runs[0]])
    with pytest.raises(SystemExit, match="there is none"):
        churn_model.read(kafka, rows, "0123456789abcdef")


def test_a_live_run_and_its_labels(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    script = run_script(SCRIPT, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.002)
    script.wait_for("Total events sent")
    time.sleep(1)
    script.signal(signal.SIGTERM)
    assert script.wait() == 0
    seed = script.wait_for(r"SEED=(\w+)")[1]
    made = script.wait_for(r"Stopped: sent (\d+),")[1]
    assert warnings(script) == []
    rows = labelled(SEED=seed, MAX_EVENTS=made)
    events = Counter(json.loads(record.value)["user_id"] for record in read_all(apache.direct, topic))
    assert events == Counter({user: int(row["events"]) for user, row in rows.items()})


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({}, "7.0 days"),
        ({"retention.ms": "86400000"}, "1.0 days"),
        ({"retention.ms": "-1"}, ""),
        ({"retention.ms": str(50 * 365 * 86_400_000)}, ""),
        ({"cleanup.policy": "compact", "retention.ms": "1000"}, ""),
        ({"cleanup.policy": "compact,delete"}, "7.0 days"),
    ],
    ids=["default", "a-day", "for-ever", "long-enough", "compacted", "both"],
)
def test_a_topic_that_keeps_less_is_warned_of(
    run_script: RunScript, apache: ApacheKafka, topic: str, config: dict[str, str], warned: str
) -> None:
    create_topic(apache.direct, topic)
    if config:
        set_topic_config(apache.direct, topic, config)
    settings = {**WEEK, "KAFKA_BROKER": apache.bootstrap, "KAFKA_TOPIC": topic, "MAX_EVENTS": 10}
    script = run_script(SCRIPT, **settings)
    assert script.wait() == 0
    found = [line for line in before_sending(script) if " - WARNING - " in line]
    assert found == warnings(script)
    assert len(found) == bool(warned)
    for line in found:
        age = (datetime.now(UTC) - MONDAY) / timedelta(days=1)
        assert "retention" in line
        assert warned in line
        assert abs(float(re.findall(r"([\d.]+) days old", line)[0]) - age) < 0.2
        assert f"--topic {topic} --add-config retention.ms=-1" in line


def test_live_asks_nothing_of_the_topic(run_script: RunScript, apache: ApacheKafka, topic: str) -> None:
    create_topic(apache.direct, topic)
    script = run_script(SCRIPT, KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0, MAX_EVENTS=10)
    assert script.wait() == 0
    assert "retention" not in script.tail(100)


def test_the_embedded_brokers_topic_does_not_tell(run_script: RunScript, tansu: Broker, topic: str) -> None:
    create_topic(tansu.direct, topic)
    script = run_script(SCRIPT, **WEEK, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic, MAX_EVENTS=10)
    assert script.wait() == 0
    (line,) = warnings(script)
    assert "retention" in line


def test_a_user_who_may_only_write(run_script: RunScript, make_apache: MakeApache, topic: str) -> None:
    """Neither creating, describing nor reading is needed: a WARNING says what is not known, and it goes on."""
    kafka = make_apache(
        users={"alice": "secret"},
        listeners={"SASL": "SASL_PLAINTEXT"},
        properties={"authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer"},
    )
    with kafka:
        grant(kafka.direct, "alice", topic, "WRITE", "DESCRIBE")
        settings = {
            **WEEK,
            "KAFKA_BROKER": kafka.address("SASL"),
            "KAFKA_TOPIC": topic,
            "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "KAFKA_SASL_MECHANISM": "PLAIN",
            "KAFKA_SASL_USERNAME": "alice",
            "KAFKA_SASL_PASSWORD": "secret",
            "MAX_EVENTS": 10,
        }
        script = run_script(SCRIPT, **settings)
        script.wait_for("WARNING - .*retention.*AuthorizationFailed")
        script.signal(signal.SIGTERM)
        script.wait()
        create_topic(kafka.direct, topic)
        script = run_script(SCRIPT, **settings)
        assert script.wait() == 0
        kept, read = warnings(script)
        assert re.search("retention.*AuthorizationFailed", kept)
        assert re.search("cannot be read.*To resume, grant this user Read", read)
        assert len(read_all(kafka.direct, topic)) == 10
