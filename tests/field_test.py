"""What goes wrong in the field is named right: the cause that was met, at the address where it was met.

Each case was once reported by somebody, about this tool or a similar one: a mistake in a setting or on a broker whose
message sent its reader to the wrong place.
"""

from __future__ import annotations

import contextlib
import http.server
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from brokers import (
    AUTHORIZER,
    HOST,
    ApacheKafka,
    Certificates,
    create_topic,
    delete_topic,
    free_port,
    grant,
    leader,
    wait_until,
)
from conftest import ROOT, MakeApache, RunScript, Script, clean_environment, require_apache
from proxy import Peer, Proxy, unanswered

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

TOOL = "random_event_producer.py"
SMOKE = "test_random_producer.py"
AUDITOR = "test_random_consumer.py"
SCRIPTS = (TOOL, SMOKE, AUDITOR)
IN_TIME = 10.0  # seconds to the line, whatever is wrong; to the end, where waiting cannot help
SILENT = 20.0  # the same where only the client's time-out tells
HELD = 45.0  # the same where the broker may keep a batch for as long as the client lets it, which is 30 s
PASSWORD = "c0rrect-horse"
USERS = {"alice": PASSWORD, "carol": PASSWORD}
ELSEWHERE = "127.0.0.2"  # another address of this machine
pytestmark = pytest.mark.linux  # elsewhere it is none
TOPIC = "open"
LEADERLESS = "no leader|without a leader"
FEW_REPLICAS = "too few replicas.* in sync"
NOT_THERE = "[Tt]opic \\S+ (does not exist|is not there)|kafka-topics|create it"

Settings = dict[str, object]


# ------------------------------------------------------------------------------------------------------- the broker


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def private_ca(folder: Path) -> None:
    """An authority and two certificates as the README files of many projects make them: no key usage in the one, no
    authority key identifier in the others. `ca.pem`, and key and certificate in `here.pem` and `elsewhere.pem`."""
    folder.mkdir()
    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(folder, *new, "-x509", "-days", "2", "-subj", "/CN=private CA", "-keyout", "ca.key", "-out", "ca.pem")
    for name, alternative in (("here", f"IP:{HOST},DNS:localhost"), ("elsewhere", "DNS:other.test")):
        (folder / f"{name}.cnf").write_text(f"subjectAltName = {alternative}\n")
        openssl(folder, *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        sign = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(folder, *sign, "-days", "2", "-extfile", f"{name}.cnf", "-out", f"{name}.crt")
        (folder / f"{name}.pem").write_bytes(
            b"".join((folder / f"{name}{end}").read_bytes() for end in (".key", ".crt"))
        )


@dataclass
class Field:
    kafka: ApacheKafka
    certificates: Certificates
    private: Path
    proxy: Proxy  # before the listener PROXIED

    def settings(self, listener: str, **more: object) -> Settings:
        """Where the listener listens, whatever it advertises."""
        return at(self.kafka.listening(listener), **more)


def at(address: str, **more: object) -> Settings:
    return {"KAFKA_BROKER": address, "KAFKA_TOPIC": TOPIC, "INTERVAL_SECONDS": 0.05, **more}


def sasl(user: str = "alice", password: str = PASSWORD, mechanism: str = "PLAIN") -> Settings:
    return {
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_MECHANISM": mechanism,
        "KAFKA_SASL_USERNAME": user,
        "KAFKA_SASL_PASSWORD": password,
    }


def tls(ca: Path) -> Settings:
    return {"KAFKA_SECURITY_PROTOCOL": "SSL", "KAFKA_SSL_CAFILE": ca}


# Listeners that send their clients to an address where they cannot come in: what is there, and what may be told of it.
ADVERTISED = {
    "NO_NAME": "cannot be resolved",
    "REFUSING": "nothing listens",
    "MUTE": "no answer|has not answered|does not answer",
    "UNANSWERED": "no answer|has not answered|does not answer",
}
LISTENERS = {
    "TLS": "SSL",
    "PRIVATE": "SSL",
    "PRIVATE_ELSEWHERE": "SSL",
    "SASL": "SASL_PLAINTEXT",
    "SCRAM_ONLY": "SASL_PLAINTEXT",
    "PROXIED": "PLAINTEXT",
    **dict.fromkeys(ADVERTISED, "PLAINTEXT"),
    "TO_A_LOGIN": "PLAINTEXT",
    "TO_ANOTHER_NAME": "SSL",
}


@pytest.fixture(scope="module")
def field_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    require_apache()
    folder = tmp_path_factory.mktemp("field")
    certificates = Certificates.make(folder / "certificates")
    private_ca(folder / "private")
    kafka = ApacheKafka(
        folder / "kafka",
        users=USERS,
        certificates=certificates,
        listeners=LISTENERS,
        properties={
            "authorizer.class.name": AUTHORIZER,
            "auto.create.topics.enable": "true",
            "listener.name.private.ssl.keystore.location": str(folder / "private" / "here.pem"),
            "listener.name.private_elsewhere.ssl.keystore.location": str(folder / "private" / "elsewhere.pem"),
            "listener.name.scram_only.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        },
    )
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(kafka.port("PROXIED")))
        kafka.advertise(proxy.port, "PROXIED")
        kafka.advertise(9092, "NO_NAME", host="kafka.invalid")
        kafka.advertise(free_port(), "REFUSING")
        kafka.advertise(stack.enter_context(Peer(stays=True)).port, "MUTE")
        kafka.advertise(stack.enter_context(unanswered()), "UNANSWERED")
        kafka.advertise(kafka.port("SASL"), "TO_A_LOGIN")
        elsewhere = stack.enter_context(Proxy(kafka.port("TO_ANOTHER_NAME"), host=ELSEWHERE))
        kafka.advertise(elsewhere.port, "TO_ANOTHER_NAME", host=ELSEWHERE)
        stack.enter_context(kafka)
        create_topic(kafka.direct, TOPIC)
        grant(kafka.direct, "alice", TOPIC, "READ", "WRITE", "DESCRIBE")
        yield Field(kafka, certificates, folder / "private", proxy)


# ------------------------------------------------------------------------------------------------------- the scripts


def warnings(script: Script) -> list[str]:
    return re.findall(r"- (?:WARNING|ERROR|CRITICAL) - (.*)", script.stderr)


def ready(port: int) -> tuple[int, str]:
    """What /readyz answers; 0 while nobody listens there."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=2) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_not_ready(port: int, reason: str, timeout: float) -> None:
    answers: list[tuple[int, str]] = [(0, "")]

    def told() -> bool:
        answers.append(ready(port))
        return answers[-1][0] == 503 and bool(re.search(reason, answers[-1][1]))

    try:
        wait_until(told, timeout, f"/readyz says {reason}", 0.2)
    except TimeoutError as error:
        raise AssertionError(f"{error}, but {answers[-1]}") from None


def end(script: Script) -> int:
    script.signal()
    return script.wait(IN_TIME)


def with_hosts(tmp_path: Path, hosts: str, name: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """A script in a mount namespace with an /etc/hosts of its own."""
    (tmp_path / "hosts").write_text(hosts)
    within = 'mount --bind hosts /etc/hosts && exec "$@"'
    unshare = ["unshare", "--mount", "sh", "-c"]
    try:
        if subprocess.run([*unshare, "mount --bind hosts /etc/hosts"], cwd=tmp_path, capture_output=True).returncode:
            pytest.skip("no right to make a mount namespace")
    except FileNotFoundError:
        pytest.skip("no unshare")
    return subprocess.run(
        [*unshare, within, "sh", sys.executable, str(ROOT / name)],
        env=clean_environment(**settings),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


# ------------------------------------------------------------------------------------------ what a broker advertises


@pytest.mark.parametrize("listener", ADVERTISED)
def test_an_advertised_address_that_cannot_be_reached(field_: Field, run_script: RunScript, listener: str) -> None:
    """Said by all three scripts, and by /readyz: nobody is sent to look for a topic."""
    patience = SILENT if "answer" in ADVERTISED[listener] else IN_TIME
    line = rf"advertises .*{re.escape(field_.kafka.address(listener))}.*{ADVERTISED[listener]}.*advertised\.listeners"
    port = free_port()
    settings = field_.settings(listener, CONNECT_TIMEOUT_SECONDS=patience - 7)
    running = [run_script(name, METRICS_PORT=port if name == TOOL else "", **settings) for name in SCRIPTS]
    running[0].wait_for(f"WARNING - .*{line}", patience)
    wait_not_ready(port, line, 2)
    for script in running:
        script.wait_for(f"(WARNING|ERROR) - .*{line}", patience)
    for script in running:
        assert script.wait(patience) == 1
        assert re.search(line, warnings(script)[-1]), script.tail()
        assert not re.search(NOT_THERE, script.stderr), script.tail()


def test_an_advertised_address_comes_back(field_: Field, run_script: RunScript) -> None:
    """The address is right, but what is behind it (a port forwarding, a pod) comes later."""
    field_.proxy.refuse()
    try:
        script = run_script(
            TOOL, MAX_EVENTS=3, **at(field_.kafka.direct, KAFKA_BROKER=field_.kafka.listening("PROXIED"))
        )
        script.wait_for(rf"WARNING - .*advertises .*:{field_.proxy.port}.*advertised\.listeners", IN_TIME)
    finally:
        field_.proxy.passthrough()
    assert script.wait(IN_TIME) == 0


def test_the_line_on_an_advertised_address_names_what_is_wrong_there(field_: Field, run_script: RunScript) -> None:
    """A listener of another kind (a login is asked for there), or a certificate without that name."""
    login = run_script(TOOL, CONNECT_TIMEOUT_SECONDS=4, **field_.settings("TO_A_LOGIN"))
    name = run_script(
        TOOL, CONNECT_TIMEOUT_SECONDS=4, **field_.settings("TO_ANOTHER_NAME", **tls(field_.certificates.ca))
    )
    for listener, script, words in (
        ("TO_A_LOGIN", login, "wants a login|ends the connection"),
        ("TO_ANOTHER_NAME", name, "another (address|host name).*name in the certificate"),
    ):
        assert script.wait(IN_TIME) == 1
        assert re.search(f"{re.escape(field_.kafka.address(listener))}.*({words})", warnings(script)[-1]), script.tail()
        assert not re.search(NOT_THERE, script.stderr), script.tail()


def test_another_advertised_address_in_mid_run(make_apache: MakeApache, run_script: RunScript, topic: str) -> None:
    """A broker comes back somewhere else with a mistake in its configuration, and again without."""
    kafka = make_apache(properties={"auto.create.topics.enable": "false"})
    kafka.start()
    create_topic(kafka.direct, topic)
    port, wrong = free_port(), free_port()
    line = rf"advertises .*{HOST}:{wrong}.*nothing listens.*advertised\.listeners"
    with Proxy(kafka.port()) as front:
        settings = at(f"{HOST}:{front.port}", KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.2)
        script = run_script(TOOL, METRICS_PORT=port, **settings)
        script.wait_for("Event sent")
        kafka.stop()
        kafka.move()
        kafka.advertise(wrong)
        front.target_port = kafka.port()
        kafka.start_node()
        script.wait_for(f"WARNING - .*{line}", SILENT)
        wait_not_ready(port, line, IN_TIME)
        kafka.advertise(kafka.port())
        kafka.restart()
        script.wait_for("Event sent", SILENT, after=len(script.lines))
        assert end(script) == 0, script.tail()
    script.wait_for(r"Stopped: sent \d+, failed 0, unconfirmed 0,")


# --------------------------------------------------------------------------------------------- certificates and names

STRICT = """
import ssl, sys
sys.path.insert(0, {root!r})
create = ssl.create_default_context

def as_of_3_13(*arguments, **options):
    context = create(*arguments, **options)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
    return context

ssl.create_default_context = as_of_3_13
import random_event_producer as tool
raise SystemExit(tool.main())
"""


@pytest.fixture
def strict(tmp_path: Path) -> str:
    """The tool under the defaults that Python has from 3.13 on."""
    script = tmp_path / "strict.py"
    script.write_text(STRICT.format(root=str(ROOT)))
    return str(script)


def test_a_private_ca_is_good_enough(field_: Field, run_script: RunScript, strict: str) -> None:
    settings = field_.settings("PRIVATE", MAX_EVENTS=3, **tls(field_.private / "ca.pem"))
    for name in (strict, TOOL):
        script = run_script(name, **settings)
        assert script.wait(IN_TIME) == 0, script.tail()


def test_what_is_verified(field_: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Java, librdkafka and kafka-python do: the chain and the name, not how the authority wrote its certificate."""
    monkeypatch.setattr(tool, "ENV_FILE", Path("no-such-file"))
    create = ssl.create_default_context

    def as_of_3_13(*arguments: object, **options: object) -> ssl.SSLContext:
        context = create(*arguments, **options)  # type: ignore[arg-type]
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", as_of_3_13)
    settings = tool.Settings(kafka_security_protocol="SSL", kafka_ssl_cafile=field_.private / "ca.pem")
    context = settings.tls_context()
    assert context is not None
    assert not context.verify_flags & ssl.VERIFY_X509_STRICT
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


@pytest.mark.parametrize(
    ("listener", "line"),
    [
        ("TLS", "is not trusted: .*unknown authority"),
        ("PRIVATE_ELSEWHERE", "is not trusted: .*another (host name|address)"),
    ],
    ids=["another authority", "another name"],
)
def test_a_private_ca_vouches_only_for_its_own(
    field_: Field, run_script: RunScript, strict: str, listener: str, line: str
) -> None:
    script = run_script(strict, **field_.settings(listener, **tls(field_.private / "ca.pem")))
    assert script.wait(IN_TIME) == 1
    assert re.search(line, warnings(script)[-1]), script.tail()


@pytest.mark.slow
def test_a_private_ca_under_python_3_13(field_: Field, tmp_path: Path) -> None:
    python = ["python3.13", "-c", "import ssl; ssl.VERIFY_X509_STRICT"]
    environment = clean_environment(PYENV_VERSION="3.13.0")  # a shim that is not told ends with an error
    try:
        subprocess.run(python, check=True, capture_output=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no python3.13")
    subprocess.run(["python3.13", "-m", "venv", tmp_path / "venv"], check=True, capture_output=True, env=environment)
    pip = [str(tmp_path / "venv/bin/pip"), "install", "-q", "-r", str(ROOT / "requirements.txt")]
    if subprocess.run(pip, capture_output=True, env=environment).returncode:
        pytest.skip("the requirements cannot be had for python3.13")
    settings = field_.settings("PRIVATE", MAX_EVENTS=3, **tls(field_.private / "ca.pem"))
    done = subprocess.run(
        [tmp_path / "venv/bin/python", ROOT / TOOL],
        env=clean_environment(**settings),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


def test_a_trailing_dot(field_: Field, tmp_path: Path) -> None:
    """kafka.example.com. is how a full name is written in DNS, and in some manifests; TLS knows no dot."""
    port = field_.kafka.port("PRIVATE")
    settings = at(f"localhost.:{port}", MAX_EVENTS=3, CONNECT_TIMEOUT_SECONDS=5, **tls(field_.private / "ca.pem"))
    done = with_hosts(tmp_path, f"{HOST} localhost localhost.\n", TOOL, **settings)
    assert "client certificate" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


ALERTS = {
    "handshake_failure": 40,
    "illegal_parameter": 47,
    "protocol_version": 70,
    "internal_error": 80,
    "unrecognized_name": 112,
}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_not_always_a_question_for_a_certificate(field_: Field, run_script: RunScript, alert: str) -> None:
    with Peer(answer=bytes([21, 3, 3, 0, 2, 2, ALERTS[alert]])) as peer:
        script = run_script(TOOL, **at(peer.address, CONNECT_TIMEOUT_SECONDS=1, **tls(field_.certificates.ca)))
        assert script.wait(IN_TIME) == 1
    assert re.search(rf"(?i){peer.address} .*{alert.replace('_', '.')}", warnings(script)[-1]), script.tail()
    assert "client certificate" not in script.stderr


# ------------------------------------------------------------------------------------------------ topics and rights


@pytest.mark.parametrize("name", [TOOL, AUDITOR])
def test_a_topic_that_this_user_may_not_create(field_: Field, run_script: RunScript, topic: str, name: str) -> None:
    """Kafka calls it unauthorised; it is only not there yet."""
    direct = field_.kafka.direct
    grant(direct, "alice", topic, "WRITE", "READ", "DESCRIBE")
    script = run_script(name, **field_.settings("SASL", MAX_EVENTS=5, **sasl()) | {"KAFKA_TOPIC": topic})
    (line,) = script.wait_for(rf"WARNING - (.*{topic}.*)", IN_TIME).groups()
    assert re.search("(?i)create", line), line
    assert "Write and Describe" not in line
    create_topic(direct, topic)
    if name == TOOL:
        assert script.wait(IN_TIME) == 0
    else:
        script.wait_for(f"Reading topic {topic}", IN_TIME)
        assert run_script(TOOL, **at(direct, KAFKA_TOPIC=topic, MAX_EVENTS=5)).wait(IN_TIME) == 0
        assert script.wait(IN_TIME) == 0, script.tail()


def test_a_topic_deleted_that_this_user_may_not_create(field_: Field, run_script: RunScript, topic: str) -> None:
    direct = field_.kafka.direct
    create_topic(direct, topic)
    grant(direct, "alice", topic, "WRITE", "DESCRIBE")
    script = run_script(TOOL, **field_.settings("SASL", INTERVAL_SECONDS=0.2, **sasl()) | {"KAFKA_TOPIC": topic})
    script.wait_for("Event sent")
    before = len(script.lines)
    delete_topic(direct, topic)
    (line,) = script.wait_for(rf"WARNING - (.*{topic}.*)", IN_TIME, after=before).groups()
    assert re.search("(?i)create", line), line
    create_topic(direct, topic)
    script.wait_for("Event sent", IN_TIME, after=len(script.lines))
    assert end(script) == 0, script.tail()
    script.wait_for(r"Stopped: sent \d+, failed 0, unconfirmed 0,")


def test_describe_really_missing_is_still_said(field_: Field, run_script: RunScript, topic: str) -> None:
    """It looks much like the case above, but is not waited for."""
    create_topic(field_.kafka.direct, topic)
    script = run_script(TOOL, **field_.settings("SASL", **sasl("carol")) | {"KAFKA_TOPIC": topic})
    script.wait_for(f"(WARNING|ERROR) - .*not authorised for topic {topic}.*Describe", IN_TIME)


def test_a_timestamp_that_the_topic_does_not_take(field_: Field, run_script: RunScript, topic: str) -> None:
    """The line names the setting: the clock may be right, and the limit short. Kafka has two errors for it."""
    create_topic(field_.kafka.direct, topic, config={"message.timestamp.before.max.ms": "0"})
    script = run_script(
        TOOL, **field_.settings("PLAINTEXT", MAX_EVENTS=500, INTERVAL_SECONDS=0) | {"KAFKA_TOPIC": topic}
    )
    script.wait_for(r"(WARNING|ERROR) - .*Invalid(Timestamp|Record)Error.*message\.timestamp", IN_TIME)
    assert script.wait(SILENT) == 1


def test_a_quota(field_: Field, run_script: RunScript, topic: str) -> None:
    """Slowed down by a quota, nothing is lost, and nobody is sent to look for a broken cluster."""
    create_topic(field_.kafka.direct, topic)
    field_.kafka.limit_producers(2_000)
    try:
        script = run_script(TOOL, **field_.settings("PLAINTEXT", INTERVAL_SECONDS=0.005) | {"KAFKA_TOPIC": topic})
        script.wait_for("(WARNING|ERROR) - .*(?i:quota|throttl)", 30)
    finally:
        field_.kafka.limit_producers(None)
    assert not re.search("does not answer|replicas|no leader", script.stderr), script.tail()
    script.signal()
    script.wait(IN_TIME + 5)


def test_a_dead_node_leaves_no_leader_or_too_few_replicas(
    make_apache: MakeApache, run_script: RunScript, topic: str
) -> None:
    """A topic whose only replica was there, and one that has two left of three: not the same, nor told as one.

    A batch that Kafka 4 has stored before it counts the dead node out waits until its time is over.
    """
    kafka = make_apache(nodes=3, properties={"auto.create.topics.enable": "false"})
    kafka.start()
    names = {words: f"{topic}-{number}" for number, words in enumerate((LEADERLESS, FEW_REPLICAS))}
    create_topic(kafka.direct, names[LEADERLESS])
    create_topic(kafka.direct, names[FEW_REPLICAS], 1, 3, {"min.insync.replicas": "3"})
    dead = leader(kafka.direct, names[LEADERLESS])
    kafka.kill(dead)
    ports = {words: free_port() for words in names}
    running = {
        words: run_script(TOOL, METRICS_PORT=ports[words], **at(kafka.bootstrap, KAFKA_TOPIC=name))
        for words, name in names.items()
    }
    for words, script in running.items():
        line = script.wait_for(f"(?:WARNING|ERROR) - (.*(?:{words}).*)", HELD)[1]
        assert not re.search("replicas" if words == LEADERLESS else LEADERLESS, line), line
        assert not re.search(NOT_THERE, script.stderr), script.tail()
        wait_not_ready(ports[words], words, IN_TIME)
    kafka.start_node(dead)
    for script in running.values():
        script.wait_for("Total events sent: [1-9]", SILENT, after=len(script.lines))
        assert end(script) == 0, script.tail()


def test_one_partition_of_three_without_a_leader(make_apache: MakeApache, run_script: RunScript, topic: str) -> None:
    """The others go on, so that the run looks alive, while a third of the events waits."""
    kafka = make_apache(nodes=3, properties={"auto.create.topics.enable": "false"})
    kafka.start()
    create_topic(kafka.direct, topic, 3)
    script = run_script(TOOL, **at(kafka.bootstrap, KAFKA_TOPIC=topic))
    script.wait_for("Total events sent: [1-9]")
    dead = leader(kafka.direct, topic)
    kafka.kill(dead)
    script.wait_for(f"WARNING - .*({LEADERLESS}|partition 0)", SILENT)
    kafka.start_node(dead)
    time.sleep(1)
    assert end(script) == 0, script.tail()
    script.wait_for(r"Stopped: sent \d+, failed 0, unconfirmed 0,")


# -------------------------------------------------------------------------------------------- somebody else answers


def test_a_port_that_speaks_http(field_: Field, run_script: RunScript) -> None:
    """Some servers answer what they do not understand at once (nginx, Jetty, Envoy)."""
    refusal = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    with Peer(answer=refusal) as peer:
        plain = run_script(TOOL, **at(peer.address, CONNECT_TIMEOUT_SECONDS=3))
        secured = run_script(TOOL, **at(peer.address, CONNECT_TIMEOUT_SECONDS=3, **tls(field_.certificates.ca)))
        for script in (plain, secured):
            assert script.wait(IN_TIME) == 1
        assert re.search(f"{peer.address} .*HTTP", warnings(plain)[-1]), plain.tail()
        assert re.search(f"{peer.address} .*(HTTP|does not speak TLS|no TLS)", warnings(secured)[-1]), secured.tail()


def test_a_port_that_speaks_http_and_waits_for_a_line(run_script: RunScript) -> None:
    """Others wait for the end of the line (Python's, Go's), and so for ever: they look like a slow Kafka."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, free_port()), Quiet) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = run_script(TOOL, **at(f"{HOST}:{server.server_port}", CONNECT_TIMEOUT_SECONDS=SILENT - 7))
        assert script.wait(SILENT) == 1
        server.shutdown()
    assert re.search(rf"{HOST}:{server.server_port} is slow: no answer for", warnings(script)[-1]), script.tail()


NO_KAFKA_WORDS = "no Kafka|not Kafka|does not speak Kafka"
NO_KAFKA: dict[str, tuple[dict[str, Any], str]] = {
    "ssh": ({"first": b"SSH-2.0-OpenSSH_9.6\r\n", "stays": True}, NO_KAFKA_WORDS),
    "garbage": ({"answer": b"\0\0\0\x08" + b"\xff" * 8}, NO_KAFKA_WORDS),
    "closes when asked": ({}, "(ends|closes) the connection"),  # ZooKeeper does
}


@pytest.mark.parametrize(("peer", "words"), NO_KAFKA.values(), ids=NO_KAFKA)
def test_a_port_that_is_no_kafka(run_script: RunScript, peer: dict[str, Any], words: str) -> None:
    with Peer(**peer) as somebody:
        script = run_script(TOOL, **at(somebody.address, CONNECT_TIMEOUT_SECONDS=3))
        assert script.wait(IN_TIME) == 1
    line = warnings(script)[-1]
    assert re.search(rf"{somebody.address} .*({words})", line), line
    assert not re.search("login|SASL_|SSL|certificate", line), line


def test_the_port_of_the_controllers(field_: Field, run_script: RunScript) -> None:
    port = field_.kafka.port("CONTROLLER")
    script = run_script(TOOL, **at(f"{HOST}:{port}", CONNECT_TIMEOUT_SECONDS=4))
    assert script.wait(IN_TIME) == 1
    assert re.search(f"{HOST}:{port} .*controller", warnings(script)[-1]), script.tail()
    assert not re.search(NOT_THERE, script.stderr), script.tail()


def test_connections_closed_at_once(field_: Field, run_script: RunScript) -> None:
    """A limit on connections (max.connections.per.ip), or a port proxy before a broker that is not up: not a login."""
    with Proxy(field_.kafka.port()) as proxy:
        proxy.accept_and_close()
        script = run_script(TOOL, MAX_EVENTS=3, **at(f"{HOST}:{proxy.port}"))
        line = script.wait_for(rf"WARNING - (.*{HOST}:{proxy.port}.*)", IN_TIME)[1]
        assert re.search("(ends|closes) the connection", line), line
        assert not re.search("login|SASL_|SSL|certificate", line), line
        proxy.passthrough()
        assert script.wait(IN_TIME) == 0, script.tail()


# -------------------------------------------------------------------------------------------------- wrong credentials

ODD_LOGINS = {
    "line break": sasl(password=f"{PASSWORD}\n"),
    "leading space": sasl(password=f" {PASSWORD}"),
    "quotes": sasl(password=f'"{PASSWORD}"'),
    "single quotes": sasl(password=f"'{PASSWORD}'"),
    "user name": sasl("alice "),
    "scram": sasl(password=f"{PASSWORD}\n", mechanism="SCRAM-SHA-256"),
}


@pytest.mark.parametrize("settings", ODD_LOGINS.values(), ids=ODD_LOGINS)
def test_a_secret_with_something_around_it(field_: Field, run_script: RunScript, settings: Settings) -> None:
    """It was pasted, or echoed into a file: the line says to look for that; the value itself is not shown."""
    script = run_script(TOOL, CONNECT_TIMEOUT_SECONDS=5, **field_.settings("SASL", **settings))
    assert script.wait(IN_TIME) == 1
    line = warnings(script)[-1]
    assert re.search("refuses the login: check user name, password, and whether quotes or blanks", line), line
    assert PASSWORD not in script.stderr + script.stdout


# ----------------------------------------------------------------------------------------- several bootstrap servers


def all_reach_kafka(run_script: RunScript, brokers: list[str], seconds: float, **settings: object) -> None:
    """One start for each, at the same time; which server the client asks first is chance."""
    began = time.monotonic()
    running = [run_script(TOOL, **at(broker, MAX_EVENTS=1, **settings)) for broker in brokers]
    for script in running:
        assert script.wait(max(0.1, began + seconds - time.monotonic())) == 0, script.tail()


def test_two_of_three_bootstrap_servers_silent(field_: Field, run_script: RunScript) -> None:
    good = field_.kafka.bootstrap
    with Peer(stays=True) as mute, unanswered() as port:
        silent = [mute.address, f"{HOST}:{port}"]
        orders = [[good, *silent], [silent[0], good, silent[1]], [*silent, good]]
        all_reach_kafka(run_script, [",".join(order) for order in orders * 2], 11)


def test_the_auditor_with_two_of_three_bootstrap_servers_silent(field_: Field, run_script: RunScript) -> None:
    with Peer(stays=True) as mute, unanswered() as port:
        brokers = f"{mute.address},{HOST}:{port},{field_.kafka.bootstrap}"
        running = [run_script(AUDITOR, **at(brokers, TIMEOUT_SECONDS=1)) for _ in range(4)]
        for script in running:
            script.wait_for("Reading topic", 11)


@pytest.mark.parametrize("silent", [HOST, ELSEWHERE])
def test_a_name_with_several_addresses_of_which_one_is_silent(field_: Field, tmp_path: Path, silent: str) -> None:
    """As `localhost` is ::1 and 127.0.0.1, or as a name in DNS stands for all brokers."""
    good = ELSEWHERE if silent == HOST else HOST
    port = free_port()
    with unanswered(silent, port), Proxy(field_.kafka.port(), port, good):
        settings = at(f"kafka.test:{port}", MAX_EVENTS=1, CONNECT_TIMEOUT_SECONDS=15)
        began = time.monotonic()
        done = with_hosts(tmp_path, f"{HOST} localhost\n{HOST} kafka.test\n{ELSEWHERE} kafka.test\n", TOOL, **settings)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 11


def test_localhost_where_only_ipv4_listens(field_: Field, tmp_path: Path) -> None:
    settings = at(f"localhost:{field_.kafka.port()}", MAX_EVENTS=1, CONNECT_TIMEOUT_SECONDS=15)
    done = with_hosts(tmp_path, f"::1 localhost\n{HOST} localhost\n", TOOL, **settings)
    assert done.returncode == 0, done.stderr


BAD_FIRST: dict[str, tuple[str, str, Settings]] = {  # the bad listener, the good one, settings
    "a TLS port": ("TLS", "PLAINTEXT", {}),
    "a port with login": ("SASL", "PLAINTEXT", {}),
    "another mechanism": ("SCRAM_ONLY", "SASL", sasl()),
    "no Kafka": ("", "PLAINTEXT", {}),
    "another authority": ("TLS", "PRIVATE", {"CA": "private"}),
}


@pytest.mark.parametrize("case", BAD_FIRST)
def test_a_bad_server_among_good_ones(field_: Field, run_script: RunScript, case: str) -> None:
    """A hard fault of one is no fault of all; only when every one has one is the run at its end."""
    bad, good, settings = BAD_FIRST[case]
    if settings.get("CA"):
        settings = tls(field_.private / "ca.pem")
    with Peer(answer=b"HTTP/1.1 400 Bad Request\r\n\r\n") as peer:
        first = field_.kafka.listening(bad) if bad else peer.address
        brokers = f"{first},{field_.kafka.listening(good)}"
        all_reach_kafka(run_script, [brokers] * 3, IN_TIME, **settings)


def test_all_servers_bad(field_: Field, run_script: RunScript) -> None:
    """Nothing to wait for: it ends, and the line tells of a fault there is."""
    script = run_script(TOOL, **at(f"{field_.kafka.listening('TLS')},{field_.kafka.listening('SASL')}"))
    assert script.wait(IN_TIME) == 1
    assert re.search("is a TLS port|wants a login", warnings(script)[-1]), script.tail()


@pytest.mark.parametrize("broker", ["kafka://localhost:9092", "PLAINTEXT://localhost:9092", "http://localhost:9092"])
def test_an_address_with_a_scheme(run_script: RunScript, broker: str) -> None:
    """As it stands in advertised.listeners, and as other tools write it."""
    script = run_script(TOOL, KAFKA_BROKER=broker)
    assert script.wait(IN_TIME) == 2
    (line,) = script.lines
    assert re.search("KAFKA_BROKER: .*host:port", line), line
