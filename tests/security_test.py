"""Every way to talk to a secured Kafka, and every way in which that goes wrong.

One Apache Kafka with a listener of each kind, an authorizer, and certificates made here.
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import trustme
from brokers import (
    AUTHORIZER,
    HOST,
    MECHANISMS,
    ApacheKafka,
    Certificates,
    audit,
    create_topic,
    free_port,
    grant,
    read_all,
    revoke,
)
from conftest import ROOT, RunScript, Script, clean_environment, require_apache
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from kafka.admin import KafkaAdminClient, UserScramCredentialDeletion, UserScramCredentialUpsertion
from proxy import Proxy

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

TOOL = "random_event_producer.py"
# With characters that JSON, repr, URLs, %-formatting and shells each would write in another way.
PASSWORD = "Tr0ub&4dor'%s$<q"
WRONG = "c0rrect%shorse'&"
KEY_PASSWORD = "st4ple%d'&bat=tery"
USERS = {"alice": PASSWORD, "bob": PASSWORD, "carol": PASSWORD}
IN_TIME = 10.0  # seconds to the line and the end, whatever is wrong
LISTENERS = {
    "SSL": "SSL",
    "MTLS": "SSL",
    "OTHER_HOST": "SSL",
    "EXPIRED": "SSL",
    "SASL": "SASL_PLAINTEXT",
    "SCRAM_ONLY": "SASL_PLAINTEXT",
    "SASL_SSL": "SASL_SSL",
    "SASL_MTLS": "SASL_SSL",
    "PROXIED": "SASL_PLAINTEXT",
    "PROXIED_SSL": "SASL_SSL",
}
OPEN, DESCRIBED, CLOSED = "open", "described", "closed"  # topics; what each user but the super user may do

Settings = dict[str, object]


# ----------------------------------------------------------------------------------------------------- the broker


@dataclass(frozen=True)
class Files:
    """PEM files by name, in one folder."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    @classmethod
    def make(cls, folder: Path) -> Files:
        """`good-` is the authority of the broker's odd certificates, `foreign-` one that no broker trusts."""
        files = cls(folder)
        folder.mkdir()
        good, foreign = trustme.CA(), trustme.CA()
        now = datetime.now(UTC)
        begin, end = now - timedelta(days=9), now - timedelta(days=1)
        good.cert_pem.write_to_path(str(files["good-ca"]))
        foreign.cert_pem.write_to_path(str(files["foreign-ca"]))
        files._leaf("other-host", good.issue_cert("other.test"))
        files._leaf("expired", good.issue_cert(HOST, not_before=begin, not_after=end))
        files._leaf("foreign", foreign.issue_cert("client.test", common_name="client"))
        files["garbage"].write_text("not a certificate\n")
        files["broken"].write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        return files

    def _leaf(self, name: str, leaf: trustme.LeafCert) -> None:
        key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        self[name].write_bytes(chain)
        self[f"{name}-key"].write_bytes(text)
        self[f"{name}-both"].write_bytes(text + chain)

    def encrypt(self, key: Path, password: str) -> None:
        """`key` as the file `encrypted-key`."""
        opened = load_pem_private_key(key.read_bytes(), None)
        encryption = BestAvailableEncryption(password.encode())
        self["encrypted-key"].write_bytes(opened.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))


@dataclass
class Secured:
    """A running broker, its files, and settings for the tool."""

    kafka: ApacheKafka
    certificates: Certificates
    files: Files
    proxies: Mapping[str, Proxy]

    def at(self, where: str, **settings: object) -> Settings:
        """`where`: a listener, or host:port. Names of files become their paths."""
        known = {"ca": self.certificates.ca, "client": self.certificates.client, "key": self.certificates.client_key}
        paths = {
            name: known.get(str(value)) or self.files[str(value)]
            for name, value in settings.items()
            if name.startswith("KAFKA_SSL_") and name != "KAFKA_SSL_KEY_PASSWORD"
        }
        address = self.kafka.address(where) if where in self.kafka.protocols else where
        return {"KAFKA_BROKER": address, "KAFKA_TOPIC": OPEN, "INTERVAL_SECONDS": 0.05, **settings, **paths}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.make(tmp_path_factory.mktemp("files") / "pem")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory, files: Files) -> Certificates:
    made = Certificates.make(tmp_path_factory.mktemp("certificates"))
    files.encrypt(made.client_key, KEY_PASSWORD)
    return made


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates, files: Files) -> Iterator[Secured]:
    require_apache()
    kafka = ApacheKafka(
        tmp_path_factory.mktemp("secured"),
        users=USERS,
        certificates=certificates,
        listeners=LISTENERS,
        properties={
            "authorizer.class.name": AUTHORIZER,
            "listener.name.mtls.ssl.client.auth": "required",
            "listener.name.sasl_mtls.ssl.client.auth": "required",
            "listener.name.other_host.ssl.keystore.location": str(files["other-host-both"]),
            "listener.name.expired.ssl.keystore.location": str(files["expired-both"]),
            "listener.name.scram_only.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        },
    )
    proxies = {name: Proxy(kafka.port(name)) for name in LISTENERS if name.startswith("PROXIED")}
    for name, proxy in proxies.items():
        kafka.advertise(proxy.port, name)
    try:
        with kafka:
            for topic in (OPEN, DESCRIBED, CLOSED):
                create_topic(kafka.direct, topic)
            for user in ("alice", "CN=client"):
                grant(kafka.direct, user, OPEN, "WRITE", "DESCRIBE")
            grant(kafka.direct, "bob", DESCRIBED, "DESCRIBE")
            yield Secured(kafka, certificates, files, proxies)
    finally:
        for proxy in proxies.values():
            proxy.close()


def login(mechanism: str = "PLAIN", user: str = "alice", password: str = PASSWORD) -> Settings:
    return {"KAFKA_SASL_MECHANISM": mechanism, "KAFKA_SASL_USERNAME": user, "KAFKA_SASL_PASSWORD": password}


CA: Settings = {"KAFKA_SSL_CAFILE": "ca"}
GOOD_CA: Settings = {"KAFKA_SSL_CAFILE": "good-ca"}
CLIENT: Settings = {"KAFKA_SSL_CERTFILE": "client", "KAFKA_SSL_KEYFILE": "key"}
FOREIGN: Settings = {"KAFKA_SSL_CERTFILE": "foreign", "KAFKA_SSL_KEYFILE": "foreign-key"}
ENCRYPTED: Settings = {
    "KAFKA_SSL_CERTFILE": "client",
    "KAFKA_SSL_KEYFILE": "encrypted-key",
    "KAFKA_SSL_KEY_PASSWORD": KEY_PASSWORD,
}
PLAINTEXT: Settings = {"KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"}
SSL: Settings = {"KAFKA_SECURITY_PROTOCOL": "SSL"}
SASL: Settings = {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}
SASL_SSL: Settings = {"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}


# --------------------------------------------------------------------------------------------- what is right works

GOOD: dict[str, tuple[str, Settings]] = {
    "plaintext": ("PLAINTEXT", PLAINTEXT),
    "tls": ("SSL", SSL | CA),
    "mutual-tls": ("MTLS", SSL | CA | CLIENT),
    "mutual-tls-with-encrypted-key": ("MTLS", SSL | CA | ENCRYPTED),
    **{f"login-{mechanism}": ("SASL", SASL | login(mechanism)) for mechanism in MECHANISMS},
    **{f"tls-and-login-{mechanism}": ("SASL_SSL", SASL_SSL | CA | login(mechanism)) for mechanism in MECHANISMS},
    "mutual-tls-and-login": ("SASL_MTLS", SASL_SSL | CA | CLIENT | login("SCRAM-SHA-512")),
    "lower-case": (
        "SASL_SSL",
        CA | login("scram-sha-256") | {"KAFKA_SECURITY_PROTOCOL": "sasl_ssl"},
    ),
    "log-as-json": ("SASL", SASL | login() | {"LOG_FORMAT": "json"}),
    "only-one-of-two-brokers-is-there": (
        "SASL_SSL",
        SASL_SSL | CA | login() | {"ABSENT": "first"},
    ),
}


@pytest.mark.parametrize(("where", "settings"), GOOD.values(), ids=GOOD)
def test_good_combination_delivers(secured: Secured, run_script: RunScript, where: str, settings: Settings) -> None:
    settings = secured.at(where, **settings)
    if settings.pop("ABSENT", None):
        settings["KAFKA_BROKER"] = f"{HOST}:{free_port()},{settings['KAFKA_BROKER']}"
    script = run_script(TOOL, MAX_EVENTS=3, LOG_LEVEL="DEBUG", **settings)
    run = script.wait_for(r"Stopped: sent 3, failed 0, unconfirmed 0, .*run (\w+)")[1]
    assert script.wait() == 0
    assert "KafkaConnection" in script.stderr  # the client did talk
    assert secrets_in(script) == []
    found = audit(read_all(secured.kafka.direct, OPEN)).runs[run]
    assert (found.first, found.last, found.count) == (1, 3, 3)


@pytest.mark.parametrize("name", ["test_random_producer.py"])
def test_smoke_test_takes_the_same_settings(secured: Secured, run_script: RunScript, name: str) -> None:
    settings = secured.at("SASL_SSL", **SASL_SSL, **CA, **login("SCRAM-SHA-256"))
    assert run_script(name, **settings).wait() == 0


def test_consumer_takes_the_same_settings(secured: Secured, run_script: RunScript, topic: str) -> None:
    create_topic(secured.kafka.direct, topic)
    grant(secured.kafka.direct, "alice", topic, "WRITE", "DESCRIBE")
    settings = secured.at("SASL_SSL", **SASL_SSL, **CA, **login("SCRAM-SHA-256")) | {"KAFKA_TOPIC": topic}
    assert run_script(TOOL, MAX_EVENTS=5, **settings).wait() == 0
    refused = run_script("test_random_consumer.py", MAX_EVENTS=5, **settings)
    assert refused.wait(IN_TIME + 5) == 1
    assert re.search(rf"ERROR - .*authori[sz]ed.*{topic}.*Read", refused.stderr), refused.tail()
    grant(secured.kafka.direct, "alice", topic, "READ")
    assert run_script("test_random_consumer.py", MAX_EVENTS=5, **settings).wait() == 0


# ------------------------------------------------------------------------------------ what is wrong is told, and how

LOGIN_REFUSED = "refuses the login: check user name, password"
UNKNOWN_CA = "is not trusted: .*unknown authority.*KAFKA_SSL_CAFILE"
IS_PLAIN = "does not speak TLS.*KAFKA_SECURITY_PROTOCOL.*PLAINTEXT"
IS_TLS = "is a TLS port.*KAFKA_SECURITY_PROTOCOL.*SSL"
WANTS_LOGIN = "wants a login.*KAFKA_SECURITY_PROTOCOL.*{}"
NO_LOGIN = "takes no login.*KAFKA_SECURITY_PROTOCOL.*{}"
NEEDS_CERTIFICATE = "requires a client certificate.*KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE"
REFUSES_CERTIFICATE = "refuses th(e|is) client certificate.*KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE"
NO_WRITE = "(WARNING|ERROR) - .*refuse.*may not write to the topic.*grant.*Write"
NOT_AUTHORISED = "not authorised for topic {}.*grant .*Write and Describe"

BAD: dict[str, tuple[str, Settings, str]] = {
    **{
        f"wrong-password-{mechanism}": ("SASL", SASL | login(mechanism, password=WRONG), LOGIN_REFUSED)
        for mechanism in MECHANISMS
    },
    **{
        f"unknown-user-{mechanism}": ("SASL", SASL | login(mechanism, "nobody"), LOGIN_REFUSED)
        for mechanism in MECHANISMS
    },
    "wrong-password-over-tls": ("SASL_SSL", SASL_SSL | CA | login(password=WRONG), LOGIN_REFUSED),
    "mechanism-not-offered": (
        "SCRAM_ONLY",
        SASL | login("PLAIN"),
        "does not offer this login.*KAFKA_SASL_MECHANISM.*SCRAM-SHA-512",
    ),
    "unknown-ca-system": ("SSL", SSL, UNKNOWN_CA),
    "unknown-ca-file": ("SSL", SSL | {"KAFKA_SSL_CAFILE": "foreign-ca"}, UNKNOWN_CA),
    "wrong-host-name": (
        "OTHER_HOST",
        SSL | GOOD_CA,
        r"is not trusted: .*another (address|host name)\b.*name in the certificate",
    ),
    "expired-certificate": ("EXPIRED", SSL | GOOD_CA, "is not trusted: .*has expired.*renew it"),
    "client-certificate-required": ("MTLS", SSL | CA, NEEDS_CERTIFICATE),
    "client-certificate-refused": ("MTLS", SSL | CA | FOREIGN, REFUSES_CERTIFICATE),
    "client-certificate-refused-with-login": ("SASL_MTLS", SASL_SSL | CA | FOREIGN | login(), REFUSES_CERTIFICATE),
    "plain-to-a-tls-port": ("SSL", PLAINTEXT, IS_TLS),
    "plain-to-a-tls-port-with-login": ("SASL_SSL", PLAINTEXT, IS_TLS),
    "login-to-a-tls-port": ("SASL_SSL", SASL | login(), IS_TLS),
    "no-login-to-a-login-port": ("SASL", PLAINTEXT, WANTS_LOGIN.format("SASL_PLAINTEXT")),
    "no-login-to-a-tls-port-with-login": ("SASL_SSL", SSL | CA, WANTS_LOGIN.format("SASL_SSL")),
    "login-to-a-plain-port": ("PLAINTEXT", SASL | login(), NO_LOGIN.format("PLAINTEXT")),
    "login-to-a-tls-port-without-login": ("SSL", SASL_SSL | CA | login(), NO_LOGIN.format("SSL")),
    "no-describe": ("SASL", SASL | login(user="bob") | {"KAFKA_TOPIC": CLOSED}, NOT_AUTHORISED.format(CLOSED)),
    "no-such-topic-and-no-create": (
        "SASL",
        SASL | login(user="bob") | {"KAFKA_TOPIC": "missing"},
        NOT_AUTHORISED.format("missing"),
    ),
}


def errors(script: Script) -> list[str]:
    return re.findall(r"- (?:ERROR|CRITICAL) - (.*)", script.stderr)


@pytest.mark.parametrize(("where", "settings", "line"), BAD.values(), ids=BAD)
def test_bad_combination_ends_with_its_line(
    secured: Secured, run_script: RunScript, where: str, settings: Settings, line: str
) -> None:
    started = time.monotonic()
    script = run_script(TOOL, **secured.at(where, **settings))
    assert script.wait(IN_TIME) == 1
    assert time.monotonic() - started < IN_TIME
    assert secrets_in(script) == []
    (error,) = errors(script)
    assert re.search(line, error), error
    assert "WARNING" not in script.stderr, script.tail()
    script.wait_for("Stopped: sent 0, failed 0, unconfirmed 0")


def test_describe_without_write(secured: Secured, run_script: RunScript) -> None:
    settings = secured.at("SASL", **SASL, **login(user="bob")) | {"KAFKA_TOPIC": DESCRIBED}
    script = run_script(TOOL, **settings)
    script.wait_for(NO_WRITE, IN_TIME)
    assert script.wait(IN_TIME) == 1
    assert read_all(secured.kafka.direct, DESCRIBED) == []


@pytest.mark.parametrize("name", ["test_random_producer.py", "test_random_consumer.py"])
def test_siblings_name_the_cause(secured: Secured, run_script: RunScript, name: str) -> None:
    script = run_script(name, **secured.at("SASL", **SASL, **login(password=WRONG)))
    assert script.wait(IN_TIME) == 1
    assert re.search(LOGIN_REFUSED, script.stderr), script.tail()


WAITING: dict[str, tuple[str, Settings, str]] = {
    "name-not-resolved": (
        "no-such-host.invalid:9092",
        PLAINTEXT,
        "the name in no-such-host.invalid:9092 cannot be resolved",
    ),
    "nothing-listens": ("{free}", PLAINTEXT, "nothing listens at 127.0.0.1:"),
    "silent": ("{silent}", PLAINTEXT, "has not answered yet"),
    "silent-tls": ("{silent}", SSL | CA, "has not answered yet"),
    # A port proxy in front of a broker that is starting looks the same.
    "tls-to-a-plain-port": ("PLAINTEXT", SSL | CA, IS_PLAIN),
    "tls-to-a-login-port": ("SASL", SSL | CA, IS_PLAIN),
    "tls-and-login-to-a-login-port": ("SASL", SASL_SSL | CA | login(), f"{IS_PLAIN}.*SASL_PLAINTEXT"),
}


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A port that takes connections and never says a word."""
    with socket.create_server((HOST, 0)) as server:
        server.settimeout(IN_TIME)
        yield server


@pytest.mark.parametrize(("where", "settings", "cause"), WAITING.values(), ids=WAITING)
def test_what_may_come_is_waited_for_as_long_as_allowed(
    secured: Secured, run_script: RunScript, silent: socket.socket, where: str, settings: Settings, cause: str
) -> None:
    where = where.format(free=f"{HOST}:{free_port()}", silent=f"{HOST}:{silent.getsockname()[1]}")
    started = time.monotonic()
    script = run_script(TOOL, CONNECT_TIMEOUT_SECONDS=2, **secured.at(where, **settings))
    script.wait_for(f"(WARNING|ERROR) - .*{cause}", IN_TIME)
    assert script.wait(IN_TIME) == 1
    assert 2 < time.monotonic() - started < IN_TIME
    (error,) = errors(script)
    assert re.search(f"not reached in 2 s: .*{cause}", error), error


def test_ctrl_c_during_a_handshake_that_is_never_answered(
    secured: Secured, run_script: RunScript, silent: socket.socket
) -> None:
    script = run_script(TOOL, **secured.at(f"{HOST}:{silent.getsockname()[1]}", **SSL, **CA))
    connection, _ = silent.accept()
    with connection:
        connection.settimeout(IN_TIME)
        assert connection.recv(1) == b"\x16"  # TLS: the handshake has begun
        started = time.monotonic()
        script.signal(signal.SIGINT)
        assert script.wait(IN_TIME) == 0  # nothing was made
        assert time.monotonic() - started < 2


# ---------------------------------------------------------------------------------------------- changes in mid-run


def count_of(script: Script, word: str) -> int:
    return int(script.wait_for(rf"Stopped: .*\b{word} (\d+)")[1])


def cpu_seconds(script: Script) -> float:
    used = psutil.Process(script.process.pid).cpu_times()
    return float(used.user + used.system)


def test_write_is_taken_away_and_given_back(secured: Secured, run_script: RunScript, topic: str) -> None:
    direct = secured.kafka.direct
    create_topic(direct, topic)
    grant(direct, "*", topic, "DESCRIBE")
    grant(direct, "carol", topic, "WRITE")
    settings = secured.at("SASL", **SASL, **login("SCRAM-SHA-256", "carol"))
    script = run_script(TOOL, **settings | {"KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 1})
    script.wait_for("Event sent")
    revoke(direct, "carol", topic)
    script.wait_for(NO_WRITE)
    grant(direct, "carol", topic, "WRITE")
    script.wait_for("Event sent", after=len(script.lines))
    script.signal()
    assert script.wait() == 1  # what was refused has failed
    found = audit(read_all(direct, topic))
    (run,) = found.runs.values()
    assert (run.repeated, run.reordered) == (0, 0)
    assert (run.count, len(run.missing)) == (count_of(script, "sent"), count_of(script, "failed"))
    assert count_of(script, "unconfirmed") == 0


def test_write_is_taken_away_for_good(secured: Secured, run_script: RunScript, topic: str) -> None:
    direct = secured.kafka.direct
    create_topic(direct, topic)
    grant(direct, "*", topic, "DESCRIBE")
    grant(direct, "carol", topic, "WRITE")
    script = run_script(TOOL, **secured.at("SASL", **SASL, **login(user="carol")) | {"KAFKA_TOPIC": topic})
    script.wait_for("Sending to topic")
    time.sleep(1)
    revoke(direct, "carol", topic)
    assert script.wait(IN_TIME) == 1
    assert re.search(NO_WRITE, script.stderr)
    assert len(read_all(direct, topic)) == count_of(script, "sent") > 0


@pytest.mark.parametrize(("listener", "more"), [("PROXIED", SASL), ("PROXIED_SSL", SASL_SSL | CA)])
def test_credentials_are_revoked_and_valid_again(
    secured: Secured, run_script: RunScript, topic: str, listener: str, more: Settings
) -> None:
    direct, proxy = secured.kafka.direct, secured.proxies[listener]
    create_topic(direct, topic)
    user = f"guest-{topic}"
    grant(direct, user, topic, "WRITE", "DESCRIBE")
    alter_scram(direct, UserScramCredentialUpsertion(user, "SCRAM-SHA-512", PASSWORD))
    script = run_script(TOOL, **secured.at(listener, **more, **login("SCRAM-SHA-512", user)) | {"KAFKA_TOPIC": topic})
    script.wait_for("Total events sent: [1-9]")

    alter_scram(direct, UserScramCredentialDeletion(user, "SCRAM-SHA-512"))
    before, cut_at = len(script.lines), time.monotonic()
    proxy.cut()
    script.wait_for("WARNING - .*confirmed nothing .*refuses the login", IN_TIME, after=before)
    to_the_line = time.monotonic() - cut_at
    connections, cpu, began = proxy.connections, cpu_seconds(script), time.monotonic()
    time.sleep(6)
    seconds = time.monotonic() - began
    rate, load = (proxy.connections - connections) / seconds, (cpu_seconds(script) - cpu) / seconds
    warnings = script.stderr.count(" - WARNING - ")
    print(f"{listener}: {to_the_line:.1f} s to the line, {rate:.2f} connections/s, {load:.1%} of a core")
    assert rate <= 2
    assert load <= 0.2
    assert warnings <= 3, script.tail()

    alter_scram(direct, UserScramCredentialUpsertion(user, "SCRAM-SHA-512", PASSWORD))
    script.wait_for("confirms again", after=before)
    script.signal()
    assert script.wait() == 0
    found = audit(read_all(direct, topic), partitions=1)
    assert found.clean
    assert found.events == count_of(script, "sent") > 100


def alter_scram(bootstrap: str, alteration: object) -> None:
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        assert set(admin.alter_user_scram_credentials([alteration]).values()) == {None}
    finally:
        admin.close()


def test_handshake_in_mid_run_is_never_answered(secured: Secured, run_script: RunScript, topic: str) -> None:
    direct, proxy = secured.kafka.direct, secured.proxies["PROXIED_SSL"]
    create_topic(direct, topic)
    grant(direct, "alice", topic, "WRITE", "DESCRIBE")
    settings = secured.at("PROXIED_SSL", **SASL_SSL, **CA, **login()) | {"KAFKA_TOPIC": topic}
    script = run_script(TOOL, **settings)
    script.wait_for("Total events sent: [1-9]")
    before = len(script.lines)
    proxy.hang()
    try:
        proxy.cut()
        script.wait_for("WARNING - .*confirmed nothing .*no answer for", IN_TIME + 5, after=before)
    finally:
        proxy.passthrough()
    script.wait_for("confirms again", after=before)
    script.signal()
    assert script.wait() == 0
    found = audit(read_all(direct, topic), partitions=1)
    assert (found.clean, found.events) == (True, count_of(script, "sent"))


# ---------------------------------------------------------------------------- what can be seen without Kafka: exit 2


@dataclass(frozen=True)
class Wrong:
    """Settings (names of files for KAFKA_SSL_), and for each line that is due: words in it."""

    settings: Settings
    lines: tuple[str, ...]


USER: Settings = {"KAFKA_SASL_USERNAME": "alice"}
SECRET: Settings = {"KAFKA_SASL_PASSWORD": PASSWORD}
MECHANISM: Settings = {"KAFKA_SASL_MECHANISM": "PLAIN"}
INCONSISTENT: dict[str, Wrong] = {
    "login-without-anything": Wrong(
        SASL,
        (
            "KAFKA_SASL_MECHANISM: .*needed with .*SASL_PLAINTEXT",
            "KAFKA_SASL_USERNAME: .*needed",
            "KAFKA_SASL_PASSWORD: .*needed",
        ),
    ),
    "login-without-user": Wrong(SASL_SSL | MECHANISM | SECRET, ("KAFKA_SASL_USERNAME: .*needed with .*SASL_SSL",)),
    "login-without-password": Wrong(SASL | MECHANISM | USER, ("KAFKA_SASL_PASSWORD: .*needed",)),
    "login-without-mechanism": Wrong(SASL | USER | SECRET, ("KAFKA_SASL_MECHANISM: .*needed.*PLAIN, SCRAM-SHA-256",)),
    "mechanism-with-plaintext": Wrong(MECHANISM, ("KAFKA_SASL_MECHANISM: 'PLAIN'.*PLAINTEXT: set that to SASL_SSL",)),
    "login-with-tls-only": Wrong(
        SSL | USER | SECRET, ("KAFKA_SASL_USERNAME: 'alice'.*=SSL", "KAFKA_SASL_PASSWORD: a secret.*=SSL")
    ),
    "unknown-mechanism": Wrong(
        SASL | USER | SECRET | {"KAFKA_SASL_MECHANISM": "GSSAPI"},
        ("KAFKA_SASL_MECHANISM: 'GSSAPI'.*PLAIN, SCRAM-SHA-256, SCRAM-SHA-512",),
    ),
    "unknown-protocol": Wrong(
        {"KAFKA_SECURITY_PROTOCOL": "FOO"},
        ("KAFKA_SECURITY_PROTOCOL: 'FOO'.*PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL",),
    ),
    "ca-with-plaintext": Wrong(CA, ("KAFKA_SSL_CAFILE: .*no use with .*PLAINTEXT",)),
    "certificate-with-login-only": Wrong(
        SASL | login() | CLIENT, ("KAFKA_SSL_CERTFILE: .*SASL_PLAINTEXT", "KAFKA_SSL_KEYFILE: .*SASL_PLAINTEXT")
    ),
    "key-without-certificate": Wrong(
        SSL | {"KAFKA_SSL_KEYFILE": "key"}, ("KAFKA_SSL_KEYFILE: .*without its certificate: set KAFKA_SSL_CERTFILE",)
    ),
    "certificate-without-key": Wrong(SSL | {"KAFKA_SSL_CERTFILE": "client"}, ("KAFKA_SSL_.*client.pem.* key",)),
    "key-that-does-not-fit": Wrong(
        SSL | CLIENT | {"KAFKA_SSL_KEYFILE": "foreign-key"}, ("KAFKA_SSL_KEYFILE: .*not the key of KAFKA_SSL_CERTFILE",)
    ),
    "missing-files": Wrong(
        SSL | {"KAFKA_SSL_CAFILE": "a", "KAFKA_SSL_CERTFILE": "b", "KAFKA_SSL_KEYFILE": "c"},
        tuple(f"KAFKA_SSL_{name}FILE: .*No such file" for name in ("CA", "CERT", "KEY")),
    ),
    "folder-for-a-file": Wrong(SSL | {"KAFKA_SSL_CAFILE": "folder"}, ("KAFKA_SSL_CAFILE: .*cannot be read",)),
    "not-pem": Wrong(
        SSL | dict.fromkeys(("KAFKA_SSL_CAFILE", "KAFKA_SSL_CERTFILE", "KAFKA_SSL_KEYFILE"), "garbage"),
        tuple(f"KAFKA_SSL_{name}FILE: .*not a PEM file" for name in ("CA", "CERT", "KEY")),
    ),
    "broken-ca": Wrong(SSL | {"KAFKA_SSL_CAFILE": "broken"}, ("KAFKA_SSL_CAFILE: .*broken.pem.* not usable PEM",)),
    "ca-file-with-a-key": Wrong(SSL | {"KAFKA_SSL_CAFILE": "key"}, ("KAFKA_SSL_CAFILE: .* not usable PEM",)),
    "broken-certificate": Wrong(SSL | CLIENT | {"KAFKA_SSL_CERTFILE": "broken"}, ("broken.pem.* not usable PEM",)),
    "encrypted-key-without-password": Wrong(
        SSL | ENCRYPTED | {"KAFKA_SSL_KEY_PASSWORD": ""}, ("KAFKA_SSL_KEY_PASSWORD: not set, .*encrypted key",)
    ),
    "encrypted-key-with-a-wrong-password": Wrong(
        SSL | ENCRYPTED | {"KAFKA_SSL_KEY_PASSWORD": WRONG}, ("KAFKA_SSL_KEY_PASSWORD: a secret, .*encrypted key",)
    ),
    "everything-at-once": Wrong(
        SASL_SSL | USER | {"KAFKA_BROKER": "no where", "KAFKA_SSL_CAFILE": "a", "MAX_EVENTS": "some"},
        ("KAFKA_BROKER: ", "MAX_EVENTS: 'some'", "KAFKA_SASL_MECHANISM: ", "KAFKA_SASL_PASSWORD: ", "KAFKA_SSL_CAFILE"),
    ),
}


def without_broker(files: Files, certificates: Certificates, settings: Settings) -> Settings:
    (files.folder / "folder.pem").mkdir(exist_ok=True)
    nowhere = ApacheKafka(files.folder)
    return {"CONNECT_TIMEOUT_SECONDS": 1, **Secured(nowhere, certificates, files, {}).at(f"{HOST}:1", **settings)}


def problems(environment: Settings, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(tool, "ENV_FILE", Path("no-such-file"))
    for name in tool.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(tool.BadConfiguration) as caught:
        tool.Settings.load()
    return str(caught.value).splitlines()


@pytest.mark.parametrize("wrong", INCONSISTENT.values(), ids=INCONSISTENT)
def test_inconsistent_settings_are_refused_all_together(
    files: Files, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, wrong: Wrong
) -> None:
    lines = problems(without_broker(files, certificates, wrong.settings), monkeypatch)
    assert len(lines) == len(wrong.lines), lines
    for line, words in zip(sorted(lines), sorted(wrong.lines), strict=True):
        assert re.search(words, line), line
    assert not any(traces(secret, line) for secret in (PASSWORD, WRONG, KEY_PASSWORD) for line in lines)


def test_unreadable_file(files: Files, certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    files["closed"].touch(0o000)
    settings = without_broker(files, certificates, SSL | {"KAFKA_SSL_CAFILE": "closed"})
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65534)
        (line,) = problems(settings, monkeypatch)
    finally:
        os.seteuid(user)
    assert re.search("KAFKA_SSL_CAFILE: .*cannot be read: Permission denied", line)


def on_a_terminal(settings: Settings) -> tuple[int, str]:
    """The tool with a terminal of its own, where OpenSSL would ask for a password: exit code, what is shown there."""
    master, slave = os.openpty()
    try:
        # The first terminal that a session's leader opens becomes the controlling one.
        command = f'exec "$0" "$1" <{os.ttyname(slave)} >{os.ttyname(slave)} 2>&1'
        process = subprocess.Popen(
            ["sh", "-c", command, sys.executable, str(ROOT / TOOL)],
            env=clean_environment(**settings),
            start_new_session=True,
        )
        try:
            code = process.wait(IN_TIME)
        finally:
            process.kill()
            process.wait()
        return code, os.read(master, 100_000).decode()
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(
    "case", ["encrypted-key-without-password", "encrypted-key-with-a-wrong-password", "everything-at-once"]
)
def test_bad_settings_end_with_2_and_nothing_is_asked(files: Files, certificates: Certificates, case: str) -> None:
    wrong = INCONSISTENT[case]
    started = time.monotonic()
    code, output = on_a_terminal(without_broker(files, certificates, wrong.settings))
    assert (code, time.monotonic() - started < 5) == (2, True), output
    assert len(output.splitlines()) == len(wrong.lines), output
    assert not re.search("pass ?phrase|Traceback", output), output


# ------------------------------------------------------------------------------------------------------- secret files


def test_secret_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "ENV_FILE", tmp_path / "none")
    monkeypatch.setattr(tool, "SECRETS_FOLDER", tmp_path)
    for name in tool.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "kafka_sasl_password").write_text(f"{PASSWORD}\n")  # editors end files with a newline
    (tmp_path / "kafka_sasl_username").write_text("alice")
    (tmp_path / "somebody_elses").write_text("no business of ours")
    for name, value in (SASL | MECHANISM).items():
        monkeypatch.setenv(name, str(value))
    settings = tool.Settings.load()
    assert settings.kafka_sasl_password is not None
    assert (settings.kafka_sasl_username, settings.kafka_sasl_password.get_secret_value()) == ("alice", PASSWORD)
    assert not traces(PASSWORD, f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}")
    monkeypatch.setenv("KAFKA_SASL_PASSWORD", WRONG)  # the environment is nearer
    settings = tool.Settings.load()
    assert settings.kafka_sasl_password is not None
    assert settings.kafka_sasl_password.get_secret_value() == WRONG


def test_secret_file_under_run_secrets(secured: Secured, tmp_path: Path) -> None:
    """In a mount namespace of its own, so that no other process ever sees the file."""
    within = "mount -t tmpfs none /run && mkdir /run/secrets && cp ./kafka_* /run/secrets && "
    unshare = ["unshare", "--mount", "sh", "-c"]
    try:
        if subprocess.run([*unshare, "mount -t tmpfs none /run"], capture_output=True).returncode:
            pytest.skip("no right to make a mount namespace")
    except FileNotFoundError:
        pytest.skip("no unshare")
    (tmp_path / "kafka_sasl_password").write_text(f"{PASSWORD}\n")
    (tmp_path / "kafka_ssl_key_password").write_text(f"{KEY_PASSWORD}\n")
    settings = secured.at("SASL_MTLS", **SASL_SSL, **CA, **ENCRYPTED, **login())
    settings = {name: value for name, value in settings.items() if "PASSWORD" not in name}
    command = [*unshare, f'{within} exec "$0" "$1"', sys.executable, str(ROOT / TOOL)]
    environment = clean_environment(**settings, MAX_EVENTS=3)
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, "Stopped: sent 3," in done.stderr) == (0, True), done.stderr
    assert not traces(PASSWORD, done.stderr)


# ------------------------------------------------------------------------------------------- no secret ever comes out


def forms(secret: str) -> dict[str, str]:
    """How a secret may look in a log: as text, quoted, and as bytes in several notations."""
    raw = secret.encode()
    made = {
        "text": secret,
        "repr": repr(secret)[1:-1],
        "bytes": repr(raw)[2:-1],
        "bytearray": repr(bytearray(raw))[12:-2],
        "json": json.dumps(secret)[1:-1],
        "url": urllib.parse.quote(secret, safe=""),
        "hex": raw.hex(),
        "spaced hex": raw.hex(" "),
        "escapes": "".join(f"\\x{byte:02x}" for byte in raw),
        "numbers": ", ".join(map(str, raw)),
        "compact numbers": ",".join(map(str, raw)),
    }
    for before in range(3):  # base64 has three faces, by what stands before
        text = base64.b64encode(bytes(before) + raw).decode()
        made[f"base64+{before}"] = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
    return made


def traces(secret: str, text: str) -> list[str]:
    """The forms in which the secret stands in the text."""
    return [name for name, form in forms(secret).items() if form in text or form in text.lower()]


def secrets_in(script: Script) -> list[str]:
    """What a script said that it must not: also SCRAM's proof, from which a password can be guessed, and keys."""
    output = script.stdout + script.stderr
    found = [f"{secret}: {form}" for secret in (PASSWORD, WRONG, KEY_PASSWORD) for form in traces(secret, output)]
    return found + re.findall("c=biws|BEGIN [A-Z ]*PRIVATE KEY", output)


@pytest.mark.parametrize("name", forms(PASSWORD))
def test_traces_are_found(name: str) -> None:
    assert name in traces(PASSWORD, f"x {forms(PASSWORD)[name]} y")
    assert traces(PASSWORD, "x y") == []


def test_traces_are_found_in_what_plain_sends() -> None:
    message = f"\0alice\0{PASSWORD}".encode()
    for text in (repr(message), repr(bytearray(message)), base64.b64encode(message).decode(), message.hex()):
        assert traces(PASSWORD, text)


TALKATIVE = [*(f"wrong-password-{mechanism}" for mechanism in MECHANISMS), "mechanism-not-offered", "no-describe"]


@pytest.mark.parametrize("case", TALKATIVE)
def test_no_secret_comes_out_of_a_failure_at_debug(secured: Secured, run_script: RunScript, case: str) -> None:
    where, settings, line = BAD[case]
    script = run_script(TOOL, LOG_LEVEL="DEBUG", **secured.at(where, **settings))
    assert script.wait(IN_TIME) == 1
    assert re.search(line, errors(script)[-1]), script.tail()
    assert secrets_in(script) == []


def test_no_secret_comes_out_of_the_metrics_server_or_after_a_reconnect(
    secured: Secured, run_script: RunScript, topic: str
) -> None:
    create_topic(secured.kafka.direct, topic)
    grant(secured.kafka.direct, "alice", topic, "WRITE", "DESCRIBE")
    port = free_port()
    settings = secured.at("PROXIED", **SASL, **login()) | {"KAFKA_TOPIC": topic}
    script = run_script(TOOL, LOG_LEVEL="DEBUG", METRICS_PORT=port, **settings)
    script.wait_for("Total events sent: [1-9]")
    secured.proxies["PROXIED"].cut()
    script.wait_for("Event sent", after=len(script.lines) + 5)
    pages = [_page(port, path) for path in ("/metrics", "/healthz", "/readyz", "/")]
    assert "random_event_producer_connected 1.0" in pages[0]
    script.signal()
    assert script.wait() == 0
    assert secrets_in(script) + traces(PASSWORD, "".join(pages)) == []


def _page(port: int, path: str) -> str:
    with socket.create_connection((HOST, port), 5) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return connection.makefile().read()


@pytest.mark.parametrize("argument", ["--help", "--version", "--schema", "--nonsense"])
def test_no_secret_comes_out_of(argument: str, run_script: RunScript, secured: Secured) -> None:
    script = run_script(TOOL, argument, **secured.at("SASL_MTLS", **SASL_SSL, **CA, **ENCRYPTED, **login()))
    assert script.wait() == (2 if argument == "--nonsense" else 0)
    assert script.lines
    assert secrets_in(script) == []


def test_no_secret_comes_out_of_a_defect(secured: Secured, tmp_path: Path) -> None:
    """An exception that nobody thought of, in the middle of a run, with its traceback asked for."""
    source = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import random_event_producer as tool
class Broken(tool.RandomEventProducer):
    def generate_event(self, due=0.0):
        raise RuntimeError('a defect')
sys.exit(tool.main(Broken))
"""
    settings: dict[str, Any] = secured.at("SASL", **SASL, **login())
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=clean_environment(**settings, LOG_LEVEL="DEBUG"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, "Unexpected RuntimeError: a defect" in done.stderr) == (1, True), done.stderr
    assert "Traceback" in done.stderr  # at DEBUG
    assert traces(PASSWORD, done.stdout + done.stderr) == []
