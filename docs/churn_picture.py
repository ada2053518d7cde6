#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "matplotlib==3.11.2",
#   "kafka-python[crc32c]==3.0.12",
#   "pydantic==2.14.4",
#   "python-dotenv==1.2.4",
#   "orjson==3.13.0",
#   "prometheus-client==0.26.0",
#   "tqdm==4.70.1",
#   "lz4==4.4.5",
#   "python-snappy==0.7.3",
#   "zstandard==0.25.0",
# ]
# ///
"""Draw docs/churn.png from a run of random_churn_producer.py: 1000 users, 90 days.

python docs/churn_picture.py
"""

from __future__ import annotations

import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from random_churn_producer import DAY, DRIFTING, ENGAGED, EPOCH, GONE, RandomChurnProducer

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

START, DAYS = datetime(2026, 5, 4, tzinfo=UTC), 90
BLUE, LIGHT, RED, GREY = "#2a6f97", "#89c2d9", "#c8553d", "#555555"


def run() -> tuple[Counter[datetime], list[Counter[str]]]:
    """Events by hour, and how many users were in each state at the end of each day."""
    generator = RandomChurnProducer("picture")
    generator.backfill(START, START + timedelta(days=DAYS))
    hours, states, days = Counter[datetime](), dict.fromkeys(generator.users, ENGAGED), [Counter({ENGAGED: 1000})]
    for at, user_id, _, _, state in generator.moments():
        while at >= generator.start + len(days) * DAY:
            days.append(Counter(states.values()))
        if at >= generator.end:
            return hours, days
        hours[(EPOCH + timedelta(microseconds=at)).replace(minute=0, second=0, microsecond=0)] += 1
        states[user_id] = state
    raise AssertionError("the model has no end")


def draw_hours(axes: Axes, hours: Counter[datetime]) -> None:
    days = [START + timedelta(days=day) for day in range(15)]
    counts = [hours[START + timedelta(hours=hour)] for hour in range(14 * 24)]
    axes.bar([(hour + 0.5) / 24 for hour in range(14 * 24)], counts, 1 / 24, color=BLUE)
    for number, day in enumerate(days[:-1]):
        if day.weekday() == 5:
            axes.axvspan(number, number + 1, color=GREY, alpha=0.12, lw=0)
    axes.set_title("Events by hour: busy evenings, quiet nights, fewer on Saturdays (grey)", loc="left", fontsize=11)
    axes.set_xlim(0, 14)
    axes.set_xticks(range(15), [f"{day:%a}\n{day.day} {day:%b}" for day in days])
    axes.set_ylabel("events")


def draw_states(axes: Axes, days: list[Counter[str]]) -> None:
    parts = [[100 * day[state] / 1000 for day in days] for state in (ENGAGED, DRIFTING, GONE)]
    axes.stackplot(range(len(days)), parts, colors=(BLUE, LIGHT, RED), linewidth=0)
    places = ((20, 35, "engaged"), (62, (parts[0][62] + 100 - parts[2][62]) / 2, "drifting"), (76, 84, "gone"))
    for x, y, name in places:
        axes.text(x, y, name, color="white" if name != "drifting" else "black", fontsize=11, ha="center", va="center")
    axes.set_title(
        f"Users by day: {parts[2][-1]:.0f} % have left after {DAYS} days, and no event says so", loc="left", fontsize=11
    )
    axes.set_xlim(0, len(days) - 1)
    axes.set_ylim(0, 100)
    axes.set_xlabel("day", labelpad=1)
    axes.set_ylabel("% of users")


def main() -> None:
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8.5, 5.6), layout="constrained")
    hours, days = run()
    draw_hours(upper, hours)
    draw_states(lower, days)
    figure.savefig(Path(__file__).with_name("churn.png"), dpi=200)


if __name__ == "__main__":
    main()
