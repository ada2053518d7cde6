"""What the tool mends in its Kafka client, each with the defect seen without it.

By DEFECTS: a scenario without the repair, and with it; or by a test of its own, which does both.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import json
import math
import re
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import kafka
import pytest
from audit_field_test import Raw, open_transaction
from auditor_test import write
from brokers import ApacheKafka, create_topic, delete_topic, event_id, free_port, read_all, wait_until
from conftest import ROOT, Script, clean_environment, require_apache
from kafka import KafkaProducer, TopicPartition
from kafka.cluster import ClusterMetadata
from kafka.consumer.fetcher import Fetcher
from kafka.net import inet, transport
from kafka.net.compat import KafkaNetClient
from kafka.net.connection import KafkaConnection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.producer.record_accumulator import RecordAccumulator
from kafka.producer.sender import Sender
from kafka.producer.transaction_manager import ProducerIdAndEpoch, TransactionManager
from kafka.record.default_records import DefaultRecordBatchBuilder
from proxy import PRODUCE, Proxy
from security_test import cpu_seconds

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

HOST = "127.0.0.1"
SECTIONS = {  # of each script that has one: from its heading to the next
    script: re.split(r"^# -{20,} ", (ROOT / script).read_text().partition("kafka-python, repaired\n")[2], flags=re.M)[0]
    for script in ("random_event_producer.py", "test_random_consumer.py")
}

# Each repair by a name in the section: the client's function whose defect it mends, and tests that fail without it,
# beside DEFECTS and NO_DEFECT.
REPAIRS: dict[str, tuple[Any, list[str]]] = {
    "_sock_recv": (
        transport.KafkaTCPTransport._sock_recv,
        ["repairs_test.py::test_last_words", "security_test.py::test_bad_combination_ends_with_its_line"],
    ),
    "handshake": (transport.KafkaSSLTransport.handshake, ["repairs_test.py::test_handshake_limit"]),
    "_create_connection": (
        inet.create_connection,
        ["repairs_test.py::test_a_silent_address_of_several", "repairs_test.py::test_a_silent_address_is_left_early"],
    ),
    "connection_lost": (
        KafkaConnection.connection_lost,
        ["security_test.py::test_bad_combination_ends_with_its_line"],
    ),
    "initialize": (
        KafkaConnection.initialize,
        ["cluster_test.py", "security_test.py::test_credentials_are_revoked_and_valid_again"],
    ),
    "_do_bootstrap": (
        KafkaConnectionManager._do_bootstrap,
        ["repairs_test.py::test_every_bootstrap_server_is_tried", "repairs_test.py::test_a_slow_server_and_a_good_one"],
    ),
    "least_loaded_node": (KafkaConnectionManager.least_loaded_node, ["cluster_test.py"]),
    "_request_update_once": (
        ClusterMetadata.request_update,
        ["security_test.py::test_credentials_are_revoked_and_valid_again"],
    ),
    "get_connection": (KafkaConnectionManager.get_connection, ["renewal_test.py"]),
    "connection_delay": (KafkaNetClient.connection_delay, ["faults_test.py::test_everything_arrives"]),
    "take": (DefaultRecordBatchBuilder.append, ["batch_test.py::test_byte_for_byte"]),
    "hand_over": (RecordAccumulator.append, ["batch_test.py", "refusal_test.py"]),
    "_send_producer_data": (Sender._send_producer_data, ["cluster_test.py"]),
    "_produce_request": (Sender._produce_request, ["refusal_test.py"]),
    "_complete_batch": (
        Sender._complete_batch,
        ["cluster_test.py::test_a_wiped_cluster_hands_out_the_same_producer_id_again"],
    ),
    "_can_retry": (Sender._can_retry, ["refusal_test.py"]),
    "_dispatch_error": (Sender._dispatch_error, []),
    "_repair": (
        TransactionManager.classify_batch_error,
        ["refusal_test.py", "faults_test.py::test_refused_among_others"],
    ),
    "_rewrite": (RecordAccumulator.split_and_reenqueue, ["refusal_test.py", "batch_test.py"]),
    "_lookup_coordinator": (
        TransactionManager._lookup_coordinator,
        ["patience_test.py::test_a_producer_id_after_some_refusals"],
    ),
    "end": (KafkaProducer.close, ["producer_test.py::test_signals_while_kafka_is_gone"]),
    "_unpack_records": (
        Fetcher.PartitionRecords._unpack_records,
        ["audit_field_test.py::test_a_wrong_byte_on_the_way"],
    ),
    "_noting_stable_end": (
        Fetcher._parse_fetched_data,
        ["audit_field_test.py::test_an_open_transaction_beside_traffic"],
    ),
}
SOURCES = json.loads((Path(__file__).parent / "repairs.json").read_text())  # a digest of each function's source


def digest(function: Any) -> str:
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", REPAIRS)
def test_what_is_repaired_is_as_it_was(name: str) -> None:
    """After an upgrade: is the repair still needed, does it still fit? Then its new digest goes into repairs.json."""
    function, _ = REPAIRS[name]
    assert {name: digest(function)} == {name: SOURCES[name]}, f"{function.__qualname__} has changed"


def test_version() -> None:
    """Another version of the client: look at each repair again, whether it is needed and whether it still fits."""
    assert kafka.__version__ == tool.CLIENT_VERSION, f"look again at: {', '.join(REPAIRS)}"


@pytest.mark.parametrize("name", REPAIRS)
def test_every_repair_has_a_test(name: str) -> None:
    _, tests = REPAIRS[name]
    assert re.search(rf"\bdef {name}\(|\.{name}( = |\()|\[\"{name}\"\] = ", "".join(SECTIONS.values())), (
        f"there is no {name} in the sections any more"
    )
    for test in tests:
        file, _, function = test.partition("::")
        assert f"def {function}" in (Path(__file__).parent / file).read_text(), test
    of_its_own = any(test.startswith("repairs_test.py::") for test in tests)
    assert of_its_own or name in SHOWN, f"where is the defect seen that {name} mends?"


def test_the_way_of_an_event_is_short() -> None:
    """From the settings to the summary at most 1,250 lines without a break, the repairs at most 300, a function 35."""
    script = (ROOT / "random_event_producer.py").read_text()
    order = re.findall(r"^# -{20,} (.+)$", script, re.M)
    way = ["settings", "the event", "generator", "pace", "tally", "delivery", "run and summary"]
    assert order[: len(way)] == way
    assert script.partition(f"- {way[0]}\n")[2].partition(f" {order[len(way)]}\n")[0].count("\n") <= 1250
    assert SECTIONS["random_event_producer.py"].strip().count("\n") < 300
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 35, f"{path.name}: {node.name}"


def test_nothing_else_reads_private_names_of_the_client() -> None:
    """Outside the section no attribute with an underscore is read, but of `self`, `cls`, modules and named tuples."""
    for script in ROOT.glob("*.py"):
        text = script.read_text().replace(SECTIONS.get(script.name, "none"), "").replace("super()._", "")
        found = re.findall(r"(?<![\w\"'])(?!self\b|cls\b|os\b|super\(\))([\w\])]+)\._(?!replace\b)[a-z]\w*", text)
        assert found == [], script.name


def test_another_version_is_noticed(run_script: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "kafka").mkdir()
    (tmp_path / "kafka" / "__init__.py").write_text("__version__ = '9.9.9'\n")
    script = run_script("random_event_producer.py", PYTHONPATH=tmp_path)
    assert script.wait() == 2
    assert script.stderr_lines == [
        f"kafka-python {tool.CLIENT_VERSION} is needed, and 9.9.9 is installed. Install the packages: "
        "pip install -r requirements.txt, or start with uv run"
    ]


# ------------------------------------------------------------------------------------------------------- connections


@pytest.fixture
def net() -> Iterator[NetworkSelector]:
    made = NetworkSelector()
    yield made
    made.close()


def test_last_words(net: NetworkSelector) -> None:
    """What came together with the end of the stream was thrown away."""

    def received(kind: Any) -> tuple[bytes, bool]:
        ours, theirs = socket.socketpair()
        theirs.sendall(b"refused")
        theirs.close()
        ours.setblocking(False)
        data, error = kind(net, ours)._sock_recv()
        ours.close()
        return data, error is None

    assert received(transport.KafkaTCPTransport) == (b"refused", False)  # the error goes first, and the data with it
    assert received(kafka.net.manager.KafkaTCPTransport) == (b"refused", True)


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server((HOST, 0)) as server:
        yield server.getsockname()[1]


def test_handshake_limit(net: NetworkSelector, silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "SETUP_SECONDS", 1)

    def ends(kind: Any) -> bool:
        connection = socket.create_connection((HOST, silent))
        connection.setblocking(False)
        made = kind(net, connection, host=HOST, ssl_context=ssl.create_default_context())
        shaken = net.call_soon_with_future(made.handshake)
        net.poll(timeout_ms=2000, future=shaken)
        done: bool = shaken.is_done
        made.close()
        return done

    assert not ends(transport.KafkaSSLTransport)
    assert ends(kafka.net.manager.KafkaSSLTransport)


def test_a_silent_address_of_several(net: NetworkSelector, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with two addresses: the first drops what comes (its backlog is full), the second is there."""
    with socket.create_server((HOST, 0), backlog=0) as full, socket.create_server((HOST, 0)) as good:
        crowd = []
        for _ in range(4):  # until the queue of the port is full, and the next one hears nothing
            crowd.append(socket.socket())
            crowd[-1].setblocking(False)
            crowd[-1].connect_ex(full.getsockname())
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", place.getsockname()) for place in (full, good)]

        monkeypatch.setattr(inet.KafkaNetSocket, "dns_lookup", lambda *_, **__: addresses)
        monkeypatch.setattr(tool, "CONNECT_SECONDS", 1)

        def connects(create_connection: Any) -> bool:
            trial = net.call_soon_with_future(create_connection, net, "name", 1, (), None, time.monotonic() + 2)
            net.poll(timeout_ms=4000, future=trial)
            return bool(trial.succeeded())

        assert not connects(inet.create_connection)
        assert connects(tool._create_connection)
        for one in crowd:
            one.close()


def made(network: tool.Network, settings: tool.Settings) -> tool.Producer:
    return tool.Producer("events", network, **tool.client_options(settings, network), delivery_timeout_ms=math.inf)


def test_every_bootstrap_server_is_tried() -> None:
    """One was drawn at random again and again, however often it had failed."""
    servers = [f"{HOST}:{free_port()}" for _ in range(3)]
    settings = tool.Settings(kafka_broker=",".join(servers))
    tried: list[str] = []

    class Network(tool.Network):
        def closed(self, _node_id: object, at: str, _error: Exception | None, _stage: str) -> None:
            tried.append(at)

    network = Network(settings)
    producer = made(network, settings)
    try:
        wait_until(lambda: len(tried) >= 9, 10, "nine tries")
    finally:
        producer.end(0)
    assert [sorted(tried[turn : turn + 3]) for turn in (0, 3)] == [sorted(servers)] * 2


@pytest.mark.parametrize("order", [0, 1], ids=["silent first", "silent last"])
def test_a_slow_server_and_a_good_one(order: int, silent: int, apache: Any) -> None:
    """The client waits for the one that it has drawn; the tool asks the next one beside it, and gives up on neither."""
    servers = [f"{HOST}:{silent}", apache.bootstrap]
    settings = tool.Settings(kafka_broker=",".join(servers[order:] + servers[:order]))
    network = tool.Network(settings)
    producer = made(network, settings)
    try:
        wait_until(lambda: network.reached, 2 * tool.SLOW_SECONDS, "the good server is reached")
    finally:
        producer.end()


def test_a_silent_address_is_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is not made: then the whole time for set-up was spent on it."""
    monkeypatch.setattr(tool, "CONNECT_SECONDS", 1)
    with socket.create_server((HOST, 0), backlog=0) as full:
        crowd = []
        for _ in range(4):
            crowd.append(socket.socket())
            crowd[-1].setblocking(False)
            crowd[-1].connect_ex(full.getsockname())
        settings = tool.Settings(kafka_broker="{}:{}".format(*full.getsockname()))
        network = tool.Network(settings)
        producer = made(network, settings)
        try:
            wait_until(lambda: bool(network.recent_cause()), 4, "it is given up")
        finally:
            producer.end()
        for one in crowd:
            one.close()


# ------------------------------------------------------------------------------- each defect, without its repair

UNREPAIRED = """
import sys
sys.path.insert(0, {root!r})
import {module} as script

{both}
{without}
raise SystemExit({start})
"""
START = {
    "random_event_producer": "script.main()",
    "test_random_consumer": "script.tool.run_script('', script.ConsumerSettings, script.audit_topic)",
}
LIMIT = {"max.message.bytes": "312"}
NINE: dict[str, object] = {"SEED": 1, "MAX_EVENTS": 9}  # just the third one is larger than that


@dataclass
class Lab:
    """A Kafka behind a proxy, another one with the same cluster id that advertises the same address, and scenarios.

    Each scenario returns what is seen: a word about it where that is not enough, and all that the script says.
    """

    here: ApacheKafka
    there: ApacheKafka
    proxy: Proxy
    topic: str
    start: Callable[..., Script]

    def produce(self, interval: float = 0.5, **settings: object) -> Script:
        given = {"KAFKA_BROKER": f"{HOST}:{self.proxy.port}", "KAFKA_TOPIC": self.topic, "INTERVAL_SECONDS": interval}
        return self.start(**{**given, **settings})

    def produced(self, interval: float = 0.5, **settings: object) -> Script:
        """It has sent the first event."""
        script = self.produce(interval, **settings)
        script.wait_for("Event sent")
        return script

    def connected_again(self, before: int) -> bool:
        return self.proxy.connections > before

    def limit(self, partitions: int = 1) -> None:
        delete_topic(self.here.direct, self.topic)
        create_topic(self.here.direct, self.topic, partitions, config=LIMIT)

    def silence(self) -> None:
        """Until a batch waits for its answer."""
        self.proxy.hang()
        wait_until(lambda: self.proxy.unanswered(PRODUCE), 10, "a batch is on its way")

    def swap(self, script: Script) -> str:
        """Another Kafka from now on, where somebody with the same producer id has written what would come next: is all
        there that is called sent?
        """
        identity = ProducerIdAndEpoch(int(script.wait_for(r"ProducerId set to (\d+)")[1]), 0)
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.there.direct)) as somebody:
            somebody.send(self.topic, b"{}", b"1").get(10)  # then it has an id of its own
            state, sent = somebody._transaction_manager, script.stderr.count("Event sent - ")
            state.set_producer_id_and_epoch(identity)
            state.set_sequence_number(TopicPartition(self.topic, 0), sent)
            somebody.send(self.topic, b"{}", b"1").get(10)
        self.proxy.target_port = self.there.port("PROXIED")
        self.proxy.cut()
        self.proxy.passthrough()
        script.wait_for("Event sent", after=len(script.lines))
        told = end(script, signal.SIGINT)
        stored = [record for kafka in (self.here, self.there) for record in read_all(kafka.direct, self.topic)]
        present = len({identity[1] for record in stored if (identity := event_id(record))})
        missing = present < int(re.findall(r"Stopped: sent (\d+)", told)[0])
        return f"{'missing' if missing else 'all there'}: {present} stored\n{told}"

    # -- the scenarios

    def nothing_listens(self) -> str:
        script = self.produce(KAFKA_BROKER=f"{HOST}:{free_port()}", CONNECT_TIMEOUT_SECONDS=2)
        script.wait_for("Stopped: ")
        return end(script, signal.SIGKILL)

    def every_connection_is_closed(self) -> str:
        self.proxy.accept_and_close()
        before = self.proxy.connections
        told = end(self.produce(CONNECT_TIMEOUT_SECONDS=3))
        count = self.proxy.connections - before
        return f"{'a storm' if count > 50 else 'calm'}: {count} connections\n{told}"

    def a_silent_server_and_a_good_one(self) -> str:
        with socket.create_server((HOST, 0)) as silent:  # its port is the greater one, and so it is drawn
            servers = f"{HOST}:{silent.getsockname()[1]},{HOST}:{self.proxy.port}"
            return end(self.produce(KAFKA_BROKER=servers, MAX_EVENTS=1, CONNECT_TIMEOUT_SECONDS=8))

    def the_broker_has_moved(self) -> str:
        with Proxy(self.here.port("PROXIED")) as name:
            script = self.produced(KAFKA_BROKER=f"{HOST}:{name.port}", MAX_EVENTS=4)
            name.target_port = self.here.port("PLAINTEXT")
            self.proxy.refuse()
            return end(script)

    def the_topic_is_deleted(self) -> str:
        script = self.produced()
        self.silence()
        delete_topic(self.here.direct, self.topic)
        self.proxy.passthrough()
        return load(script)

    def kafka_falls_silent(self) -> str:
        script = self.produced()
        self.silence()
        self.proxy.cut()
        return load(script)

    def another_kafka(self) -> str:
        """While a batch is on its way, and the main thread waits."""
        script = self.produced(2, LOG_LEVEL="DEBUG")
        self.silence()
        return self.swap(script)

    def another_kafka_between_two_events(self) -> str:
        script = self.produced(1.5, LOG_LEVEL="DEBUG")
        script.wait_for("Event sent", after=len(script.lines))
        return self.swap(script)

    def answers_are_lost(self) -> str:
        self.proxy.drop_responses(0.3, seed=1)
        return end(self.produce(0.05, MAX_EVENTS=40))

    def one_is_refused(self) -> str:
        self.limit()
        return end(self.produce(0.1, **NINE))

    def one_is_refused_of_a_batch(self) -> str:
        self.limit()
        return end(self.produce(0, **NINE))

    def a_new_epoch_while_a_batch_is_on_its_way(self) -> str:
        """What is refused at a second try brings it; then the batch, of another partition, is interrupted again."""
        self.limit(8)
        script = self.produced(0.5, **NINE)
        script.wait_for("Event sent", after=len(script.lines))
        self.silence()
        self.proxy.cut()
        self.proxy.answer_late(1.0, kind=PRODUCE)
        script.wait_for("Kafka refuses event")
        for kind in (None, PRODUCE, PRODUCE):
            before = self.proxy.connections
            self.proxy.cut(kind)
            wait_until(partial(self.connected_again, before), 10, "it comes again")
        self.proxy.passthrough()
        return end(script)

    def no_producer_id_at_first(self) -> str:
        self.proxy.refuse_producer_ids(15, times=2)
        return end(self.produce(MAX_EVENTS=1))

    def a_stop_while_kafka_is_gone(self) -> str:
        script = self.produced()
        self.silence()
        self.proxy.refuse()
        return end(script, signal.SIGINT)

    def a_header_that_is_no_text(self) -> str:
        write(self.here.direct, self.topic, [{"key": None, "value": b"", "headers": [(Raw("c328"), b"1")]}])
        script = self.start(KAFKA_BROKER=self.here.direct, KAFKA_TOPIC=self.topic, TIMEOUT_SECONDS=60)
        script.wait_for("Trying again|cannot be read")
        time.sleep(1)  # it asks for the next records
        return end(script, signal.SIGTERM, 4)

    def an_open_transaction(self) -> str:
        with open_transaction(self.here, self.topic):
            return end(self.start(KAFKA_BROKER=self.here.direct, KAFKA_TOPIC=self.topic, TIMEOUT_SECONDS=1))


def end(script: Script, number: int | None = None, seconds: float = 15.0) -> str:
    """All that it says, and how it ends: by that signal; or by itself, unless it says that nothing is confirmed."""
    if number:
        script.signal(number)
    with contextlib.suppress(TimeoutError):
        over = "a word that never comes" if number else "confirmed nothing"
        wait_until(lambda: script.process.poll() is not None or over in script.stderr, seconds, "its end")
    code = script.process.poll()
    script.kill()
    return f"{script.stdout}{script.stderr}{'it goes on' if code is None else f'exit code {code}'}"


def load(script: Script) -> str:
    """What it computes while it can do nothing."""
    time.sleep(1.0)
    before = cpu_seconds(script)
    time.sleep(2.0)
    share = (cpu_seconds(script) - before) / 2.0
    return f"{'busy' if share > 0.25 else 'calm'}: {share:.0%} of a core\n{end(script, signal.SIGKILL)}"


class Defect(NamedTuple):
    """A scenario that is played twice, and what is seen of it: regular expressions."""

    scenario: Callable[[Lab], str]
    seen: str
    repaired: str
    without: str = ""  # Python: how the repair is taken away, when not by `del`
    both: str = ""  # Python: what is done in either case
    script: str = "random_event_producer"


FAILS = "script._Sender._can_retry = lambda *_: {}['a defect']"
DRAWN = "script.client_manager.random.choice = lambda servers: max(servers, key=lambda server: server.port)"
NO_TOPIC_ID = """
def as_with_kafka_2_7(*given, options=script.client_options): return options(*given) | {"api_version": (2, 7)}
script.client_options = as_with_kafka_2_7"""
LOOKS_UP = """
def made(self, *given, init=script.Producer.__init__, **options):
    init(self, *given, **options)
    del self._transaction_manager._lookup_coordinator
script.Producer.__init__ = made"""
UPDATES = "script._Manager._request_update_once = lambda self: self._request_update()"
REPAIRS_NOTHING = "script._Sender._repair = lambda self, *given: script.Sender._dispatch_error(self, *given, None)"
SPLITS = "script._Sender._rewrite = lambda self, batch, _: self._accumulator.split_and_reenqueue(batch)"
GRACE = "script.STOP_GRACE_SECONDS = 2.0"
CLOSES = "script.Producer.end = script.Producer.close"
FORGETS = "script.Consumer._noting_stable_end = lambda self, answer: self._parse(answer)"
AUDITOR = "test_random_consumer"
STUCK = "confirmed nothing.*it goes on"
DEFECTS = {
    "_Connection.connection_lost": Defect(Lab.nothing_listens, "has not answered yet", "nothing listens at"),
    "_Connection.initialize": Defect(Lab.every_connection_is_closed, "a storm", "calm"),
    "_Manager._do_bootstrap": Defect(Lab.a_silent_server_and_a_good_one, "not reached in", "sent 1,", both=DRAWN),
    "_Manager.least_loaded_node": Defect(Lab.the_broker_has_moved, STUCK, "sent 4, .*exit code 0"),
    "_Manager._request_update_once": Defect(Lab.the_topic_is_deleted, "busy", "calm", UPDATES),
    "_NetClient.connection_delay": Defect(Lab.kafka_falls_silent, "busy", "calm"),
    "_Sender._send_producer_data": Defect(Lab.another_kafka, "missing", "all there", both="script.SLICE_SECONDS = 9.0"),
    "_Sender._produce_request": Defect(Lab.answers_are_lost, "sent again 0", "sent again [1-9]"),
    "_Sender._complete_batch": Defect(Lab.another_kafka_between_two_events, "missing", "all there", both=NO_TOPIC_ID),
    "_Sender._can_retry": Defect(Lab.a_new_epoch_while_a_batch_is_on_its_way, "failed [2-9],", "sent 8, failed 1,"),
    "_Sender._dispatch_error": Defect(
        Lab.one_is_refused, STUCK, "ERROR - a repair of the Kafka client has failed: KeyError.*exit code 1", both=FAILS
    ),
    "_Sender._repair": Defect(Lab.one_is_refused, "sent 2, failed 7,", "sent 8, failed 1,", REPAIRS_NOTHING),
    "_Sender._rewrite": Defect(Lab.one_is_refused_of_a_batch, STUCK, "sent 8, failed 1,", SPLITS),
    "Producer._lookup_coordinator": Defect(
        Lab.no_producer_id_at_first, "Kafka gives no producer id.*it goes on", "sent 1,", LOOKS_UP
    ),
    "Producer.end": Defect(
        Lab.a_stop_while_kafka_is_gone, "Unexpected KafkaTimeoutError", "sent 1, failed 0, unconfirmed", CLOSES, GRACE
    ),
    "_PartitionRecords._unpack_records": Defect(
        Lab.a_header_that_is_no_text, "it goes on", "offset 0: cannot be read.*exit code 1", script=AUDITOR
    ),
    "Consumer._noting_stable_end": Defect(
        Lab.an_open_transaction, "the broker hands out no more", "transaction .*is open", FORGETS, script=AUDITOR
    ),
}
NO_DEFECT = {
    "get_connection": "it only passes on who is connected where, and the login that was renewed",
    "take": "for speed; batch_test.py compares it with the client's own, byte by byte",
    "hand_over": "for speed, as take",
}
SHOWN = {name.partition(".")[2] for name in DEFECTS} | NO_DEFECT.keys()


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApacheKafka, ApacheKafka, Proxy]]:
    require_apache()
    own, listeners = {"auto.create.topics.enable": "false"}, {"PROXIED": "PLAINTEXT"}
    here = ApacheKafka(tmp_path_factory.mktemp("here"), 1, own, listeners)
    there = ApacheKafka(tmp_path_factory.mktemp("there"), 1, own, listeners)
    there._cluster = here._cluster  # as where CLUSTER_ID is written down
    with Proxy(here.port("PROXIED")) as proxy:
        for one in (here, there):
            one.advertise(proxy.port, "PROXIED")
        with here, there:
            yield here, there, proxy


@pytest.mark.parametrize("repaired", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("name", DEFECTS)
def test_the_defect(
    name: str, repaired: bool, clusters: tuple[ApacheKafka, ApacheKafka, Proxy], topic: str, tmp_path: Path
) -> None:
    """It is seen without the repair, and not with it."""
    row, (here, there, proxy) = DEFECTS[name], clusters
    running: list[Script] = []
    without = "" if repaired else row.without or f"del script.{name}"
    given = {"root": str(ROOT), "module": row.script, "both": row.both, "without": without}

    def start(**settings: object) -> Script:
        command = [sys.executable, "-c", UNREPAIRED.format(**given, start=START[row.script])]
        running.append(Script(command, clean_environment(**settings), tmp_path))
        return running[-1]

    proxy.passthrough()
    proxy.target_port = here.port("PROXIED")
    for one in (here, there):
        create_topic(one.direct, topic)
    try:
        seen = row.scenario(Lab(here, there, proxy, topic, start))
    finally:
        for script in running:
            script.kill()
    print(seen)
    assert bool(re.search(row.seen, seen, re.S)) is not repaired, seen
    assert re.search(row.repaired, seen, re.S) or not repaired, seen
