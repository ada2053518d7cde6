"""One mishap is no verdict, what is slow is not silent, and every wait has a name: the one that it has."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from auditor_test import outcome, record, records, user_of, write
from brokers import HOST, ApacheKafka, Certificates, create_topic, free_port, leader, led_by, wait_until
from cluster_test import NO_CREATION
from conftest import MakeApache, RunScript, Script, require_apache
from field_test import AUDITOR, PASSWORD, SMOKE, TOOL, end, sasl, tls, wait_not_ready, warnings
from kafka.errors import KafkaError
from proxy import API_VERSIONS, LIST_OFFSETS, METADATA, SASL_AUTHENTICATE, Peer, Proxy, unanswered

LISTENERS = {"FRONT": "PLAINTEXT", "TLS": "SSL", "SASL": "SASL_PLAINTEXT"}
SCRIPTS: dict[str, dict[str, object]] = {TOOL: {"MAX_EVENTS": 3}, SMOKE: {}, AUDITOR: {"MAX_EVENTS": 3}}
IN_TIME = 15.0  # seconds, to the end of what has gone wrong once
LATE = 70.0  # the same where every answer is late
QUICK = 8.0  # the same where one server of several is silent
MISHAP = "wants a login|SASL"
VERDICT = "does not answer|is not there|does not exist|not reached"

Settings = dict[str, object]


@dataclass
class Slow:
    """A broker; before each of its LISTENERS is a proxy, whose address it advertises there."""

    kafka: ApacheKafka
    certificates: Certificates
    proxies: dict[str, Proxy]

    def settings(self, listener: str) -> Settings:
        """Through the proxy from the first request on."""
        more = {"TLS": tls(self.certificates.ca), "SASL": sasl()}.get(listener, {})
        return {"KAFKA_BROKER": self.kafka.address(listener), **more}


@pytest.fixture(scope="module")
def broker_(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    require_apache()
    folder = tmp_path_factory.mktemp("slow")
    certificates = Certificates.make(folder / "certificates")
    kafka = ApacheKafka(
        folder / "kafka",
        users={"alice": PASSWORD},
        certificates=certificates,
        listeners=LISTENERS,
        properties=NO_CREATION,
    )
    with contextlib.ExitStack() as stack:
        proxies = {name: stack.enter_context(Proxy(kafka.port(name))) for name in LISTENERS}
        for name, proxy in proxies.items():
            kafka.advertise(proxy.port, name)
        stack.enter_context(kafka)
        yield Slow(kafka, certificates, proxies)


@pytest.fixture
def slow(broker_: Slow) -> Iterator[Slow]:
    yield broker_
    for proxy in broker_.proxies.values():
        proxy.passthrough()
        proxy.recording = False
        proxy.requests.clear()


@pytest.fixture
def launch(slow: Slow, run_script: RunScript, topic: str) -> Callable[..., Script]:
    """launch(TOOL, KAFKA_BROKER="…") -> the script, with something to do on a topic that holds three events."""
    create_topic(slow.kafka.direct, topic, config={"retention.ms": "-1"})
    write(slow.kafka.direct, topic, records([1, 2, 3]))

    def launch(name: str, **settings: object) -> Script:
        given = {"KAFKA_BROKER": slow.kafka.direct, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.05}
        return run_script(name, **{**given, **SCRIPTS[name], **settings})

    return launch


def succeeds(script: Script, seconds: float) -> None:
    """Without an error in its log."""
    assert script.wait(seconds) == 0, script.tail()
    assert " - ERROR - " not in script.stderr, script.tail()


# ---------------------------------------------------------------------------------------------- one mishap at a start


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
@pytest.mark.parametrize("kind", [API_VERSIONS, METADATA], ids=["at ApiVersions", "at Metadata"])
def test_a_connection_that_ends_once(
    slow: Slow, launch: Callable[..., Script], name: str, kind: int, reset: bool
) -> None:
    """At the server that KAFKA_BROKER names: a broker that restarts, a firewall that forgets."""
    with Proxy(slow.kafka.port()) as front:
        front.end_at(kind, reset=reset)
        script = launch(name, KAFKA_BROKER=f"{HOST}:{front.port}")
        succeeds(script, IN_TIME)
        assert front.connections > 1, "nothing has ended"
    assert not re.search(MISHAP, script.stderr), script.tail()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("listener", ["FRONT", "SASL"])
def test_a_connection_that_ends_once_at_an_advertised_address(
    slow: Slow, launch: Callable[..., Script], name: str, listener: str
) -> None:
    """After a login too: who has logged in is not told to."""
    proxy = slow.proxies[listener]
    proxy.end_at(METADATA)
    before = proxy.connections
    script = launch(name, **slow.settings(listener) | {"KAFKA_BROKER": slow.kafka.listening(listener)})
    succeeds(script, IN_TIME)
    assert proxy.connections > before + 1, "nothing has ended"
    assert not re.search(MISHAP, script.stderr), script.tail()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_proxy_whose_broker_is_away(slow: Slow, launch: Callable[..., Script], name: str) -> None:
    """It knows Kafka's protocol, answers ApiVersions by itself, and ends the connection at whatever is asked next. On
    the wire that looks like a login that is wanted, but for the answer to a SaslHandshake."""
    with Proxy(slow.kafka.port()) as front:
        front.stand_in()
        script = launch(name, KAFKA_BROKER=f"{HOST}:{front.port}")
        script.wait_for(f"(WARNING|ERROR) - .*{HOST}:{front.port}", IN_TIME)
        came = time.monotonic()
        wait_until(lambda: script.process.poll() is not None or time.monotonic() > came + 6, IN_TIME, "some tries")
        front.passthrough()
        succeeds(script, IN_TIME)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_login_that_is_really_wanted(slow: Slow, launch: Callable[..., Script], name: str) -> None:
    """Kafka tells it in no other way than by the end of the connection; but it does so each time."""
    script = launch(name, KAFKA_BROKER=slow.kafka.address("SASL"))
    assert script.wait(10) == 1
    assert re.search("wants a login .*KAFKA_SECURITY_PROTOCOL.*SASL_PLAINTEXT", warnings(script)[-1]), script.tail()


# ------------------------------------------------------------------------------------------------ slow is not silent


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_broker_that_answers_each_request_late(slow: Slow, launch: Callable[..., Script], name: str) -> None:
    """Each later than what is told as slow. A connection needs two answers before it can be used, a start some more."""
    slow.proxies["FRONT"].answer_late(3.2, 3.5)
    script = launch(name, **slow.settings("FRONT"))
    succeeds(script, LATE)
    assert re.search("WARNING - .*(?i:slow)", script.stderr), script.tail()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_tls_handshake_that_takes_its_time(slow: Slow, launch: Callable[..., Script], name: str) -> None:
    slow.proxies["TLS"].start_late(3.5)
    script = launch(name, **slow.settings("TLS"))
    succeeds(script, LATE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_login_that_takes_its_time(slow: Slow, launch: Callable[..., Script], name: str) -> None:
    """A password that the broker looks up elsewhere (LDAP), and a server there that locks who comes too often."""
    proxy = slow.proxies["SASL"]
    proxy.recording = True
    proxy.answer_late(6, kind=SASL_AUTHENTICATE)
    script = launch(name, **slow.settings("SASL"))
    succeeds(script, LATE)
    assert re.search("WARNING - .*(?i:slow)", script.stderr), script.tail()
    assert proxy.count(SASL_AUTHENTICATE) <= 4


def test_beginnings_of_partitions_that_are_told_late(slow: Slow, run_script: RunScript, topic: str) -> None:
    create_topic(slow.kafka.direct, topic, 4, config={"retention.ms": "-1"})
    write(slow.kafka.direct, topic, records(range(1, 15)))
    slow.proxies["FRONT"].answer_late(0.8, kind=LIST_OFFSETS)
    settings = {"KAFKA_TOPIC": topic, "MAX_EVENTS": 14, "CONNECT_TIMEOUT_SECONDS": 10}
    script = run_script(AUDITOR, **slow.settings("FRONT"), **settings)
    succeeds(script, IN_TIME)
    assert not re.search(VERDICT, script.stderr), script.tail()


SILENT = {"accepts, and never answers": lambda: Peer(stays=True), "drops what comes": unanswered}


def silent_address(stack: contextlib.ExitStack, kind: str) -> str:
    place: Any = stack.enter_context(SILENT[kind]())  # type: ignore[operator]
    return f"{HOST}:{place if isinstance(place, int) else place.port}"


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", SILENT)
def test_the_first_of_several_servers_is_silent(
    slow: Slow, launch: Callable[..., Script], name: str, kind: str
) -> None:
    """Patience with what is slow does not make everybody wait for it: the next one is tried beside it."""
    with contextlib.ExitStack() as stack:
        brokers = f"{silent_address(stack, kind)},{slow.kafka.bootstrap}"
        succeeds(launch(name, KAFKA_BROKER=brokers), QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_of_several_servers_is_silent_and_the_other_slow(
    slow: Slow, launch: Callable[..., Script], name: str
) -> None:
    slow.proxies["FRONT"].answer_late(2, 3.5)
    with contextlib.ExitStack() as stack:
        silent = silent_address(stack, "accepts, and never answers")
        succeeds(launch(name, KAFKA_BROKER=f"{silent},{slow.kafka.address('FRONT')}"), LATE)


# ------------------------------------------------------------------------------------------------ waits with no name


@pytest.fixture
def ungoverned(make_apache: MakeApache, topic: str) -> ApacheKafka:
    """A broker that serves, while the controller is away: it has no producer id to give."""
    kafka = make_apache(controller=True, properties=NO_CREATION)
    kafka.start()
    create_topic(kafka.direct, topic)
    kafka.freeze_controller()
    return kafka


def test_no_producer_id(ungoverned: ApacheKafka, run_script: RunScript, topic: str) -> None:
    """Nothing is wrong with the topic, its leader or the connection; it is the first thing that a producer asks for."""
    port = free_port()
    settings = {"KAFKA_BROKER": ungoverned.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.2}
    script = run_script(TOOL, METRICS_PORT=port, **settings)
    script.wait_for("WARNING - .*confirmed nothing", 20)
    told = warnings(script)
    assert any("producer id" in line for line in told), told
    wait_not_ready(port, "producer id", 3)
    ungoverned.thaw_controller()
    script.wait_for("Total events sent: [1-9]", 20)
    assert end(script) == 0, script.tail()
    script.wait_for(r"Stopped: sent \d+, failed 0, unconfirmed 0,")


def test_samples_without_a_producer_id(ungoverned: ApacheKafka, run_script: RunScript, topic: str) -> None:
    settings = {"KAFKA_BROKER": ungoverned.bootstrap, "KAFKA_TOPIC": topic, "CONNECT_TIMEOUT_SECONDS": 8}
    script = run_script(SMOKE, **settings)
    assert script.wait(25) == 1
    assert any("producer id" in line for line in warnings(script)), script.tail()


@pytest.mark.parametrize("error", [7, 14, 15, 16], ids=["timed out", "loading", "not available", "not coordinator"])
def test_a_producer_id_after_some_refusals(slow: Slow, launch: Callable[..., Script], error: int) -> None:
    """Each says "ask again", also those that speak of a coordinator, which only a transaction has."""
    slow.proxies["FRONT"].refuse_producer_ids(error, times=3)
    succeeds(launch(TOOL, **slow.settings("FRONT")), IN_TIME)


QUOTA = "(?i:quota|throttl)"


def test_a_quota_on_reading(slow: Slow, run_script: RunScript, topic: str) -> None:
    """A fetch brings what ten seconds allow, and nothing comes in the next ten: nothing is wrong with the partition."""
    create_topic(slow.kafka.direct, topic, config={"retention.ms": "-1"})
    write(slow.kafka.direct, topic, records(range(1, 2001)), linger_ms=20)
    slow.kafka.limit_consumers(20_000)
    try:
        settings = {"KAFKA_BROKER": slow.kafka.bootstrap, "KAFKA_TOPIC": topic, "TIMEOUT_SECONDS": 5}
        script = run_script(AUDITOR, "--json", **settings)
        code, report = outcome(script, IN_TIME)
    finally:
        slow.kafka.limit_consumers(None)
    assert (code, report["ok"], 0 < report["events"] < 2000) == (1, False, True)
    assert re.search(f"WARNING - .*{QUOTA}", script.stderr), script.tail()
    (note,) = report["notes"]
    assert re.search(QUOTA, note), note


def test_enough_was_read_under_a_quota(make_apache: MakeApache, run_script: RunScript, topic: str) -> None:
    """One event is missing, or further on. To look for it in all of the topic would take a minute: that is not waited
    for, and what could not be judged is said."""
    kafka = make_apache(properties={**NO_CREATION, "quota.window.num": "2"})  # a little each second
    kafka.start()
    create_topic(kafka.direct, topic, 4, config={"retention.ms": "-1"})
    users = [user_of(number, 4) for number in range(4)]
    wanted = [record(number, users[number % 4]) for number in range(1, 6001) if number != 50]
    write(kafka.direct, topic, wanted, linger_ms=20)
    kafka.limit_consumers(20_000)
    settings = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "MAX_EVENTS": 400}
    script = run_script(AUDITOR, "--json", **settings)
    code, report = outcome(script, 30)
    assert (code, report["events"], report["ok"]) == (1, 400, False)
    assert any(re.search(QUOTA, note) for note in report["notes"]), report["notes"]


@pytest.fixture
def one_leaderless(make_apache: MakeApache, topic: str) -> tuple[ApacheKafka, int]:
    """Three brokers, of which one is dead; the topic's partition that was led there alone has no leader."""
    kafka = make_apache(nodes=3, properties=NO_CREATION)
    kafka.start()
    create_topic(kafka.direct, topic, 3, config={"retention.ms": "-1"})
    users = [user_of(number, 3) for number in range(3)]
    write(kafka.direct, topic, [record(number, users[number % 3]) for number in range(1, 31)])
    dead = leader(kafka.direct, topic)
    (partition,) = led_by(kafka.direct, topic, dead)
    kafka.kill(dead)
    survivor = (dead + 1) % 3
    address = kafka.listening("INTERNAL").split(",")[survivor]

    def noticed() -> bool:
        with contextlib.suppress(KafkaError):  # of the dead one, which was asked
            return led_by(address, topic, -2) == {partition}
        return False

    wait_until(noticed, 20, "the partition has no leader", 0.3)
    return kafka, partition


def test_a_partition_without_a_leader_before_an_audit(
    one_leaderless: tuple[ApacheKafka, int], run_script: RunScript, topic: str
) -> None:
    kafka, partition = one_leaderless
    settings = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic}
    script = run_script(AUDITOR, "--json", TIMEOUT_SECONDS=5, CONNECT_TIMEOUT_SECONDS=10, **settings)
    script.wait_for(f"WARNING - .*partition {partition}.*leader|WARNING - .*leader.*partition {partition}", 20)
    code, report = outcome(script, LATE)
    assert (code, report["ok"], report["events"]) == (1, False, 20), report
    assert not re.search(VERDICT, script.stderr), script.tail()
    (note,) = report["notes"]
    assert re.search(f"partition {partition}\\b.*leader|leader.*partition {partition}\\b", note), note
    (run,) = report["runs"]
    assert (run["repeated"], run["reordered"]) == (0, 0)
