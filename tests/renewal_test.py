"""Certificates, names and passwords: renewed on disk in mid-run, taken as they stand, trusted by what is there.

One Apache Kafka. What it asks for changes under a running script: a proxy that stands before two of its listeners is
pointed from the one to the other, and the connections are cut.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme
from auditor_test import record, write
from brokers import HOST, ApacheKafka, Certificates, audit, create_topic, keystore, read_all, wait_until
from conftest import ROOT, RunScript, Script, clean_environment, require_apache
from field_test import AUDITOR, SMOKE, TOOL, end, sasl, tls, warnings
from kafka.admin import UserScramCredentialUpsertion
from proxy import Proxy
from security_test import alter_scram
from terminal_test import mounts

OLD, NEW = "0ld&password", "n3w=pass,word"
SECRET = "kafka_sasl_password"
ODD_USER = "a=b,c"
# What shells, .env files, URLs, SCRAM's messages and templates each take for something else.
ODD_PASSWORD = "${b}$c'd\"e#f \\g\\\\h=%s,&"
IN_TIME = 20.0  # seconds, to a line or to the end
# Each proxy's listeners: where it leads at first, and where afterwards.
PAIRS = {"AUTHORITY": ("OLD_CA", "NEW_CA"), "CLIENT": ("OLD_CLIENTS", "NEW_CLIENTS"), "LOGIN": ("LOGIN", "LOGIN")}
PAIRS |= {"REPEATED": ("SHORT_LOGIN", "SHORT_LOGIN"), "MUTE": ("ODD_LOGIN", "ODD_LOGIN")}
LISTENERS = {
    **dict.fromkeys(["OLD_CA", "NEW_CA", "OLD_CLIENTS", "NEW_CLIENTS", "INTERMEDIATE"], "SSL"),
    "LOGIN": "SASL_PLAINTEXT",
    "ODD_LOGIN": "SASL_PLAINTEXT",
    "SHORT_LOGIN": "SASL_PLAINTEXT",
}
UNTRUSTED = "is not trusted: its certificate is from an unknown authority.* KAFKA_SSL_CAFILE"
UNWANTED = "refuses this client certificate: set KAFKA_SSL_CERTFILE and KAFKA_SSL_KEYFILE"
UNUSABLE = "settings on disk cannot be used: KAFKA_SSL_KEYFILE: .* not the key of KAFKA_SSL_CERTFILE"
REFUSED = "refuses the login"
MUTE = "ends the connection"
NOTHING = "Kafka has confirmed nothing for"

Settings = dict[str, object]


@dataclass
class Renewing:
    """The broker, its proxies, and two sets of certificates: `old` is what scripts begin with."""

    kafka: ApacheKafka
    old: Certificates
    new: Certificates
    intermediate: Path  # the authority that has signed the certificate of the listener of that name
    leaf: Path  # that certificate
    proxies: dict[str, Proxy]

    def ask_for_the_new(self, name: str) -> None:
        """From now on, and of those who are connected too."""
        proxy = self.proxies[name]
        proxy.target_port = self.kafka.port(PAIRS[name][1])
        proxy.cut()


def made_by_an_intermediate(folder: Path) -> tuple[Path, Path, Path]:
    """An intermediate authority's certificate, a broker's that it has signed, and that with its key and chain."""
    folder.mkdir()
    authority = trustme.CA().create_child_ca()
    leaf = authority.issue_cert(HOST)
    files = folder / "authority.pem", folder / "leaf.pem", folder / "broker.pem"
    authority.cert_pem.write_to_path(str(files[0]))
    leaf.cert_chain_pems[0].write_to_path(str(files[1]))
    files[2].write_bytes(keystore(leaf))
    return files


@pytest.fixture(scope="module")
def broker_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Renewing]:
    require_apache()
    folder = tmp_path_factory.mktemp("renewal")
    old, new = (Certificates.make(folder / name) for name in ("old", "new"))
    intermediate, leaf, chain = made_by_an_intermediate(folder / "intermediate")
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    logins = {ODD_USER: NEW, "first": OLD, "second": NEW, "odd": ODD_PASSWORD.replace("\\", "\\\\").replace('"', '\\"')}
    users = " ".join(f'"user_{name}"="{word}"' for name, word in logins.items())
    kafka = ApacheKafka(
        folder / "kafka",
        users={"alice": OLD},
        certificates=old,
        listeners=LISTENERS,
        properties={
            "listener.name.new_ca.ssl.keystore.location": str(new.broker),
            "listener.name.old_clients.ssl.client.auth": "required",
            "listener.name.new_clients.ssl.client.auth": "required",
            "listener.name.new_clients.ssl.truststore.location": str(new.ca),
            "listener.name.intermediate.ssl.keystore.location": str(chain),
            "listener.name.odd_login.plain.sasl.jaas.config": f"{module} required {users};",
            "listener.name.short_login.scram-sha-256.connections.max.reauth.ms": "4000",
        },
    )
    with contextlib.ExitStack() as stack:
        proxies = {name: stack.enter_context(Proxy(kafka.port(pair[0]))) for name, pair in PAIRS.items()}
        for name, pair in PAIRS.items():
            for listener in pair:
                kafka.advertise(proxies[name].port, listener)
        stack.enter_context(kafka)
        yield Renewing(kafka, old, new, intermediate, leaf, proxies)


@pytest.fixture
def renewing(broker_: Renewing) -> Iterator[Renewing]:
    yield broker_
    for name, (old, _) in PAIRS.items():
        broker_.proxies[name].passthrough()
        broker_.proxies[name].target_port = broker_.kafka.port(old)


# ------------------------------------------------------------------------------------ renewed under a running script


@dataclass
class Case:
    """A running script's settings, and the three deeds."""

    settings: Settings
    cause: str  # what the script says in between
    ask: Callable[[], None]  # the broker takes only the new one
    renew: Callable[[], None]
    within: list[str] = field(default_factory=list)  # how the script is started
    scripts: Path = ROOT


def at(renewing: Renewing, proxy: str, topic: str) -> Settings:
    return {"KAFKA_BROKER": f"{HOST}:{renewing.proxies[proxy].port}", "KAFKA_TOPIC": topic}


def authority(renewing: Renewing, topic: str, folder: Path) -> Case:
    """Written over, as a person does it."""
    shutil.copy(renewing.old.ca, ca := folder / "ca.pem")
    return Case(
        at(renewing, "AUTHORITY", topic) | tls(ca),
        UNTRUSTED,
        lambda: renewing.ask_for_the_new("AUTHORITY"),
        lambda: none(shutil.copy(renewing.new.ca, ca)),
    )


def client_certificate(renewing: Renewing, topic: str, folder: Path) -> Case:
    """Certificate and key at once, by a symbolic link, as Kubernetes does it."""
    for name, files in (("1", renewing.old), ("2", renewing.new)):
        (folder / name).mkdir()
        shutil.copy(files.client, folder / name / "tls.crt")
        shutil.copy(files.client_key, folder / name / "tls.key")
    (folder / "data").symlink_to("1")

    def renew() -> None:
        (folder / "next").symlink_to("2")
        (folder / "next").rename(folder / "data")

    settings = at(renewing, "CLIENT", topic) | tls(renewing.old.ca)
    settings |= {"KAFKA_SSL_CERTFILE": folder / "data/tls.crt", "KAFKA_SSL_KEYFILE": folder / "data/tls.key"}
    return Case(settings, UNWANTED, lambda: renewing.ask_for_the_new("CLIENT"), renew)


def client_certificate_in_two_steps(renewing: Renewing, topic: str, folder: Path) -> Case:
    """For a while the key is not the certificate's."""
    certificate, key = folder / "client.pem", folder / "client-key.pem"
    shutil.copy(renewing.old.client, certificate)
    shutil.copy(renewing.old.client_key, key)

    def ask() -> None:
        shutil.copy(renewing.new.client, certificate)
        renewing.ask_for_the_new("CLIENT")

    settings = at(renewing, "CLIENT", topic) | tls(renewing.old.ca)
    settings |= {"KAFKA_SSL_CERTFILE": certificate, "KAFKA_SSL_KEYFILE": key}
    return Case(settings, f"{UNWANTED}|{UNUSABLE}", ask, lambda: none(shutil.copy(renewing.new.client_key, key)))


def password(renewing: Renewing, topic: str) -> tuple[Settings, Callable[[], None]]:
    """Settings without the password, of a user of the test's own; and how the broker's is changed."""

    def change(to: str) -> None:
        alter_scram(renewing.kafka.direct, UserScramCredentialUpsertion(topic, "SCRAM-SHA-256", to))

    def ask() -> None:
        change(NEW)
        renewing.ask_for_the_new("LOGIN")

    change(OLD)
    settings = at(renewing, "LOGIN", topic) | sasl(topic, mechanism="SCRAM-SHA-256")
    del settings["KAFKA_SASL_PASSWORD"]
    return settings, ask


def password_in_a_secret_file(renewing: Renewing, topic: str, folder: Path) -> Case:
    """/run/secrets, in a mount namespace of the script's own."""
    settings, ask = password(renewing, topic)
    (folder / SECRET).write_text(f"{OLD}\n")
    return Case(settings, REFUSED, ask, lambda: none((folder / SECRET).write_text(f"{NEW}\n")), with_secrets(folder))


def password_in_env_file(renewing: Renewing, topic: str, folder: Path) -> Case:
    """In single quotes, in a `.env` beside the scripts."""
    settings, ask = password(renewing, topic)
    write_env(folder, KAFKA_SASL_PASSWORD=OLD)
    return Case(settings, REFUSED, ask, lambda: write_env(folder, KAFKA_SASL_PASSWORD=NEW), scripts=copied(folder))


def user_of_a_broker_that_says_nothing(renewing: Renewing, topic: str, folder: Path) -> Case:
    """Another user altogether, and a refusal that shows as the end of the connection only."""
    settings = at(renewing, "MUTE", topic) | sasl("?", "?", "PLAIN")
    del settings["KAFKA_SASL_USERNAME"], settings["KAFKA_SASL_PASSWORD"]
    write_env(folder, KAFKA_SASL_USERNAME="first", KAFKA_SASL_PASSWORD=OLD)

    def ask() -> None:
        renewing.proxies["MUTE"].end_at_words(OLD.encode())
        renewing.ask_for_the_new("MUTE")

    def renew() -> None:
        write_env(folder, KAFKA_SASL_USERNAME="second", KAFKA_SASL_PASSWORD=NEW)

    return Case(settings, MUTE, ask, renew, scripts=copied(folder))


def with_secrets(folder: Path) -> list[str]:
    """How to start what finds this folder as /run/secrets."""
    if not mounts():
        pytest.skip("no right to make a mount namespace")
    mount = f"mount -t tmpfs none /run && mkdir /run/secrets && mount --bind {folder} /run/secrets"
    return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"']


def copied(folder: Path) -> Path:
    """The scripts beside a `.env` of their own."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def write_env(folder: Path, **values: str) -> None:
    (folder / ".env").write_text("".join(f"{name}='{value}'\n" for name, value in values.items()))


def none(_: object) -> None:
    pass


CASES = (
    authority,
    client_certificate,
    client_certificate_in_two_steps,
    password_in_a_secret_file,
    password_in_env_file,
    user_of_a_broker_that_says_nothing,
)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """launch(case, TOOL, MAX_EVENTS=3) -> Script"""
    running: list[Script] = []

    def start(case: Case, name: str, **settings: object) -> Script:
        command = [*case.within, sys.executable, str(case.scripts / name)]
        running.append(Script(command, clean_environment(**case.settings, **settings), tmp_path))
        return running[-1]

    yield start
    for script in running:
        script.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (made := tmp_path / "renewed").mkdir()
    return made


@pytest.mark.parametrize("make", CASES)
def test_what_is_renewed_on_disk_counts_without_a_new_start(
    renewing: Renewing, launch: Callable[..., Script], topic: str, folder: Path, make: Callable[..., Case]
) -> None:
    create_topic(renewing.kafka.direct, topic)
    case = make(renewing, topic, folder)
    script = launch(case, TOOL, INTERVAL_SECONDS=0.05)
    script.wait_for("Total events sent: [1-9]")
    case.ask()
    told = script.wait_for(rf"WARNING - {NOTHING} .*", IN_TIME)[0]
    assert re.search(case.cause, told), script.tail()
    before = len(script.lines)
    case.renew()
    script.wait_for("confirms again", IN_TIME, after=before)
    assert end(script) == 0, script.tail()
    assert all(re.search(case.cause, line) for line in warnings(script) if "skipped" not in line), script.tail()
    found = audit(read_all(renewing.kafka.direct, topic), partitions=1)
    assert found.clean
    assert found.events == int(script.wait_for(r"Stopped: sent (\d+), failed 0, unconfirmed 0")[1])
    assert not re.search(f"{OLD}|{NEW}", script.stderr)


@pytest.mark.parametrize("make", [authority, password_in_env_file])
def test_an_audit_goes_on_too(
    renewing: Renewing, launch: Callable[..., Script], topic: str, folder: Path, make: Callable[..., Case]
) -> None:
    create_topic(renewing.kafka.direct, topic, config={"retention.ms": "-1"})
    write(renewing.kafka.direct, topic, [record(1)])
    case = make(renewing, topic, folder)
    script = launch(case, AUDITOR, MAX_EVENTS=2)
    script.wait_for("partition 0, offset 0")
    case.ask()
    script.wait_for(f"WARNING - .*{case.cause}", IN_TIME)
    case.renew()
    write(renewing.kafka.direct, topic, [record(2)])
    script.wait_for("partition 0, offset 1", IN_TIME)
    assert script.wait() == 0, script.tail()


def test_a_login_that_has_to_be_repeated(
    renewing: Renewing, launch: Callable[..., Script], topic: str, folder: Path
) -> None:
    """connections.max.reauth.ms: nobody cuts the connection, but the password that it began with has changed."""
    create_topic(renewing.kafka.direct, topic)
    case = password_in_env_file(renewing, topic, folder)
    proxy = renewing.proxies["REPEATED"]
    case.settings |= {"KAFKA_BROKER": f"{HOST}:{proxy.port}"}
    script = launch(case, TOOL, INTERVAL_SECONDS=0.05)
    script.wait_for("Total events sent: [1-9]")
    case.ask()
    case.renew()
    before = proxy.connections
    wait_until(lambda: proxy.connections > before, IN_TIME, "the login is repeated, and refused")
    script.wait_for("Total events sent", after=len(script.lines) + 1)
    assert end(script) == 0, script.tail()
    script.wait_for(r"Stopped: sent \d+, failed 0, unconfirmed 0")


def test_another_protocol_on_disk_is_for_the_next_start(
    renewing: Renewing, launch: Callable[..., Script], topic: str, folder: Path
) -> None:
    """The login that goes with it, too."""
    create_topic(renewing.kafka.direct, topic)
    case = password_in_env_file(renewing, topic, folder)
    login = {name: str(case.settings.pop(name)) for name in list(case.settings) if "SASL" in name or "SECURITY" in name}
    write_env(folder, KAFKA_SASL_PASSWORD=OLD, **login)
    script = launch(case, TOOL, INTERVAL_SECONDS=0.05)
    script.wait_for("Total events sent: [1-9]")
    write_env(folder, KAFKA_SECURITY_PROTOCOL="PLAINTEXT")
    before = len(script.lines)
    renewing.proxies["LOGIN"].refuse()
    script.wait_for("nothing listens at", IN_TIME, after=before)
    renewing.proxies["LOGIN"].passthrough()
    script.wait_for("confirms again", IN_TIME, after=before)
    assert end(script) == 0, script.tail()


# --------------------------------------------------------------------------------------------------- what is trusted


@pytest.mark.parametrize("name", [TOOL, SMOKE, AUDITOR])
@pytest.mark.parametrize("trusted", ["intermediate", "leaf"])
def test_an_authority_that_is_not_a_root(
    renewing: Renewing, run_script: RunScript, topic: str, name: str, trusted: str
) -> None:
    """As Java and librdkafka take it: what stands in the file is trusted, whoever has signed it."""
    create_topic(renewing.kafka.direct, topic, config={"retention.ms": "-1"})
    write(renewing.kafka.direct, topic, [record(1), record(2), record(3)])
    more = {} if name == SMOKE else {"MAX_EVENTS": 3}
    settings = {"KAFKA_BROKER": renewing.kafka.address("INTERMEDIATE"), "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0}
    script = run_script(name, **settings, **tls(getattr(renewing, trusted)), **more)
    assert script.wait(IN_TIME) == 0, script.tail()


def test_another_intermediate_authority_is_not_trusted(
    renewing: Renewing, run_script: RunScript, tmp_path: Path, topic: str
) -> None:
    other, _, _ = made_by_an_intermediate(tmp_path / "other")
    settings = {"KAFKA_BROKER": renewing.kafka.address("INTERMEDIATE"), "KAFKA_TOPIC": topic}
    script = run_script(TOOL, **settings, **tls(other))
    assert script.wait(IN_TIME) == 1
    assert re.search(UNTRUSTED, warnings(script)[-1]), script.tail()


# ----------------------------------------------------------------------------------- names and passwords, as they are


ODD_NAMES = [ODD_USER, "=2C=3D", "a user"]


@pytest.mark.parametrize(
    ("user", "mechanism"),
    [(ODD_USER, "PLAIN"), *itertools.product(ODD_NAMES, ["SCRAM-SHA-256", "SCRAM-SHA-512"])],
)
def test_a_user_name_as_it_is(renewing: Renewing, run_script: RunScript, topic: str, user: str, mechanism: str) -> None:
    """SCRAM writes = and , in a name otherwise (RFC 5802, 5.1); PLAIN does not."""
    create_topic(renewing.kafka.direct, topic)
    if mechanism != "PLAIN":
        alter_scram(renewing.kafka.direct, UserScramCredentialUpsertion(user, mechanism, NEW))
    settings = {"KAFKA_BROKER": renewing.kafka.address("ODD_LOGIN"), "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0}
    script = run_script(TOOL, MAX_EVENTS=3, **settings, **sasl(user, NEW, mechanism))
    assert script.wait(IN_TIME) == 0, script.tail()


ENV_LINES = {  # how a password is written in `.env`
    "in single quotes": "'{}'".format(ODD_PASSWORD.replace("'", "\\'")),
    "without quotes": ODD_PASSWORD,
}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512"])
@pytest.mark.parametrize("way", [*ENV_LINES, "in a secret file", "in the environment"])
def test_a_password_as_it_is(
    renewing: Renewing, launch: Callable[..., Script], topic: str, folder: Path, way: str, mechanism: str
) -> None:
    create_topic(renewing.kafka.direct, topic)
    settings = {"KAFKA_BROKER": renewing.kafka.address("ODD_LOGIN"), "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0}
    case = Case(settings | sasl("odd", ODD_PASSWORD, mechanism), "", lambda: None, lambda: None)
    if mechanism != "PLAIN":
        alter_scram(renewing.kafka.direct, UserScramCredentialUpsertion("odd", mechanism, ODD_PASSWORD))
    if way != "in the environment":
        del case.settings["KAFKA_SASL_PASSWORD"]
    if way in ENV_LINES:
        case.scripts = copied(folder)
        (folder / ".env").write_text(f"KAFKA_SASL_PASSWORD={ENV_LINES[way]}\n")
    if way == "in a secret file":
        case.within = with_secrets(folder)
        (folder / SECRET).write_text(f"{ODD_PASSWORD}\n")
    script = launch(case, TOOL, MAX_EVENTS=3)
    assert script.wait(IN_TIME) == 0, script.tail()
