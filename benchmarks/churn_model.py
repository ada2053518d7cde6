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
    python benchmarks/churn_model.py labels.csv

with the variables of the run. It reads the run's events from KAFKA_TOPIC, trains a logistic regression, and prints its
AUC over users that it has not seen (5 folds) beside that of p_gone.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from random_churn_producer import ChurnSettings
from random_event_producer import client_options

import orjson
from kafka import KafkaConsumer, TopicPartition
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Events = list[tuple[float, str]]  # of one user: seconds since 1970 as the record says, event type


def read(settings: ChurnSettings, wanted: int) -> dict[int, Events]:
    """The first `wanted` events of the run in the topic, by user. Ends the program when they are not there."""
    topic, users = settings.kafka_topic, defaultdict(list)
    consumer = KafkaConsumer(**client_options(settings), auto_offset_reset="earliest", consumer_timeout_ms=5000)
    consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()])
    missing = set(range(1, wanted + 1))
    for record in consumer if consumer.assignment() else ():
        sequence = int(dict(record.headers).get("event_id", b":0").partition(b":")[2])
        if sequence in missing:
            missing.remove(sequence)
            event = orjson.loads(record.value)
            users[event["user_id"]].append((record.timestamp / 1000, event["event_type"]))
        if not missing:
            return users
    raise SystemExit(f"topic {topic}: {len(missing)} of the {wanted} events that the labels are of are not there")


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
    labels = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
    users = read(ChurnSettings.load(), sum(int(row["events"]) for row in labels))
    times = [at for events in users.values() for at, _ in events]
    told = [features(users[int(row["user_id"])], min(times), max(times)) for row in labels]
    gone = [row["state"] == "gone" for row in labels]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    scores = cross_val_predict(model, told, gone, cv=5, method="predict_proba")[:, 1]
    best, silence = roc_auc_score(gone, [float(row["p_gone"]) for row in labels]), [row[0] for row in told]
    print(f"{len(times)} events of {len(labels)} users, {sum(gone)} gone")
    print(f"AUC: logistic regression {roc_auc_score(gone, scores):.3f}, time since the last event alone ", end="")
    print(f"{roc_auc_score(gone, silence):.3f}, best possible {best:.3f}")


if __name__ == "__main__":
    main()
