#!/usr/bin/env python3
"""Send a few sample events to the topic, at least one of each type, and say where each one went.

10 events, or MAX_EVENTS. Exit code 0 when Kafka has confirmed all of them, 1 when not, 2 for bad settings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from pydantic import Field

from random_event_producer import (
    BadConfiguration,
    Delivery,
    Event,
    GiveUp,
    RandomEventProducer,
    Settings,
    Stop,
    Tally,
    log,
    run_script,
    show,
)


class SampleSettings(Settings):
    max_events: int = Field(10, ge=1, title="a whole number from 1 up", description="how many events to send")
    connect_timeout_seconds: float = Field(
        30, gt=0, title="a number above 0", description="give up when Kafka is not reached in time"
    )


def samples(generator: RandomEventProducer, count: int) -> Iterator[Event]:
    """Random events; the first ones are one of each type."""
    types = list(generator.event_types)
    for number in range(count):
        generator.event_types = [types[number]] if number < len(types) else types
        yield generator.generate_event(time.monotonic())


def send_samples(settings: SampleSettings, stop: Stop) -> int:
    generator = RandomEventProducer(settings.seed, settings.shard_index, settings.shard_count)
    if settings.max_events < (least := len(generator.event_types)):
        raise BadConfiguration(f"MAX_EVENTS: {settings.max_events}; allowed: {least} or more, one event of each type")
    tally = Tally(generator.event_types)

    def confirmed(event: Event, partition: int, offset: int) -> None:
        show(f"partition {partition}, offset {offset}, key {event.key.decode()}: {event.value.decode()}", stop)

    delivery = Delivery(settings, tally, stop, confirmed)
    try:
        if delivery.open(stop.over):
            delivery.send(*samples(generator, settings.max_events))
            delivery.drain(patience=settings.connect_timeout_seconds)
    except GiveUp as reason:
        log.error("%s", reason)
    finally:
        delivery.close()
    show(f"{tally.total_sent} of {settings.max_events} events confirmed", stop)
    return int(tally.total_sent != settings.max_events)


if __name__ == "__main__":
    raise SystemExit(run_script(str(__doc__), SampleSettings, send_samples))
