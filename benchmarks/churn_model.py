#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "scikit-learn==1.9.1",
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
"""How well does a plain model tell who has left, from the topic alone, beside the best possible?

    python random_churn_producer.py --labels > labels.csv
    python benchmarks/churn_model.py labels.csv [RUN]

with the variables of the run. It finds the run that the labels are of in KAFKA_TOPIC (RUN: it must be this one), trains
a logistic regression on its events, and prints its AUC over users that it has not seen (5 folds) beside that of p_gone.
"""

from __future__ import annotations

import csv
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from random_churn_producer import ChurnSettings
from random_event_producer import client_options

import orjson
from kafka import KafkaConsumer, TopicPartition

Events = list[tuple[float, str]]  # of one user: seconds since 1970 as the record says, event type
Run = dict[int, tuple[int, float, str]]  # by sequence: user_id, and the same two
Labels = list[dict[str, str]]


def held(consumer: KafkaConsumer, topic: str) -> Iterator[Any]:
    """The records that are in the topic now; those that a live stream adds meanwhile are not waited for."""
    consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()])
    ends: dict[TopicPartition, int] = {}
    while (partitions := consumer.assignment()) and (batches := consumer.poll(timeout_ms=5000)):
        yield from itertools.chain(*batches.values())
        for partition in partitions - ends.keys():
            if (end := consumer.highwater(partition)) is not None:
                ends[partition] = end
        if all(at in ends and consumer.position(at) >= ends[at] for at in partitions):
            return


def labelled(run: Run, labels: Labels) -> bool:
    """Whether the labels are of this run: each user has as many events in it, and the same last one."""
    events = Counter(user for user, _, _ in run.values())
    last = {run[sequence][0]: sequence for sequence in sorted(run)}
    told = ((int(row["user_id"]), int(row["events"]), int(row["last_sequence"])) for row in labels)
    return all((events[user], last.get(user, 0)) == (count, sequence) for user, count, sequence in told)


def read(settings: ChurnSettings, labels: Labels, chosen: str) -> tuple[str, Run]:
    """The run that the labels are of, up to their end; only the `chosen` one, if named. Ends the program without."""
    wanted, runs = sum(int(row["events"]) for row in labels), defaultdict[str, Run](dict)
    consumer = KafkaConsumer(**client_options(settings), auto_offset_reset="earliest")
    for record in held(consumer, settings.kafka_topic):
        event_id = dict(record.headers).get("event_id") or b""
        name, _, sequence = event_id.decode(errors="replace").partition(":")
        if chosen in ("", name) and sequence.isdigit() and int(sequence) <= wanted:
            event = orjson.loads(record.value)
            runs[name][int(sequence)] = event["user_id"], record.timestamp / 1000, event["event_type"]
            if len(runs[name]) == wanted and labelled(runs[name], labels):
                return name, runs[name]
    there = ", ".join(f"{name} has {len(run)}" for name, run in runs.items()) or "there is none"
    raise SystemExit(f"topic {settings.kafka_topic}: the labels are of no run there; of events 1 to {wanted}, {there}")


def features(events: Events, start: float, end: float) -> list[float]:
    """What any consumer could compute, of all events and of the last twelve."""
    recent, least = events[-12:], (end - start) / 5000  # half an hour of 90 days, so that no logarithm is of 0
    silence = (end - events[-1][0] if events else end - start) + least
    gap = (end - start) / (len(events) + 1)
    recent_gap = ((events[-1][0] - recent[0][0]) / 12 if events else end - start) + least
    views, carts, bounces = (
        [kind for _, kind in recent].count(which) for which in ("product_view", "add_to_cart", "bounce")
    )
    times = map(math.log, (silence, gap, recent_gap, silence / gap, silence / recent_gap))
    return [*times, bounces / (len(recent) + 1), carts / (views + 2)]


def main() -> None:
    from sklearn.linear_model import LogisticRegression  # here, since the tests read topics without it
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
    name, run = read(ChurnSettings.load(), labels, "".join(sys.argv[2:]))
    users, times = defaultdict[str, Events](list), [at for _, at, _ in run.values()]
    for _, (user, at, event_type) in sorted(run.items()):
        users[str(user)].append((at, event_type))
    told = [features(users[row["user_id"]], min(times), max(times)) for row in labels]
    gone = [row["state"] == "gone" for row in labels]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores = cross_val_predict(model, told, gone, cv=5, method="predict_proba")[:, 1]
    best, silence = roc_auc_score(gone, [float(row["p_gone"]) for row in labels]), [row[0] for row in told]
    print(f"run {name}: {len(times)} events of {len(labels)} users, {sum(gone)} gone")
    print(f"AUC: logistic regression {roc_auc_score(gone, scores):.3f}, time since the last event alone ", end="")
    print(f"{roc_auc_score(gone, silence):.3f}, best possible {best:.3f}")


if __name__ == "__main__":
    main()
