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

__doc__ = """Send a few sample events to the topic, at least one of each type, and print where each one is stored.

It sends 10 events, or MAX_EVENTS. Exit code 0: Kafka has confirmed all of them; 1: it has not; 2: wrong settings.
"""

import os
import sys
import time
from collections.abc import Iterator

sys.path[:0] = [os.path.dirname(os.path.realpath(__file__))]  # which `python -I` leaves out

from random_event_producer import (
    BadConfiguration,
    Delivery,
    Event,
    GiveUp,
    RandomEventProducer,
    Script,
    Seconds,
    Settings,
    Tally,
    log,
    run_script,
    setting,
    show,
)


class SampleSettings(Settings):
    max_events: int = setting(10, "how many events to send", "a whole number from 1 up", ge=1)
    connect_timeout_seconds: Seconds = setting(30, "seconds to wait for Kafka", "a number above 0", gt=0)


def samples(generator: RandomEventProducer, count: int) -> Iterator[Event]:
    """Random events; the first ones are one of each type."""
    types = list(generator.event_types)
    for number in range(count):
        generator.event_types = [types[number]] if number < len(types) else types
        if event := generator.generate_event(time.monotonic()):
            yield event


def send_samples(script: Script) -> int:
    settings, stop = script.settings, script.stop
    generator = RandomEventProducer.from_settings(settings)
    if settings.max_events < (least := len(generator.event_types)):
        raise BadConfiguration(f"MAX_EVENTS: {settings.max_events}; allowed: {least} or more, one event of each type")
    tally = Tally(generator.event_types)

    def confirmed(event: Event, partition: int, offset: int) -> None:
        show(f"partition {partition}, offset {offset}, key {event.key.decode()}: {event.value.decode()}", stop)

    delivery, gave_up = Delivery(settings, tally, stop, confirmed), False
    try:
        if delivery.open():
            delivery.send(*samples(generator, settings.max_events))
            delivery.drain(patience=settings.connect_timeout_seconds)
    except GiveUp as reason:
        log.error("%s", reason)
        gave_up = True
    finally:
        delivery.close()
    show(f"{tally.total_sent} of {settings.max_events} events confirmed", stop)
    return int(gave_up or tally.total_sent != settings.max_events)


if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, SampleSettings, send_samples))
