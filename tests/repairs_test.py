"""What the tool mends in its Kafka client, each with the defect seen without it.

Where a fault of a whole cluster is needed to see the defect, the test that does so is named instead.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import math
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kafka
import pytest
from brokers import free_port, wait_until
from conftest import ROOT
from kafka import KafkaProducer
from kafka.cluster import ClusterMetadata
from kafka.consumer.fetcher import Fetcher
from kafka.net import inet, transport
from kafka.net.compat import KafkaNetClient
from kafka.net.connection import KafkaConnection
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector
from kafka.producer.record_accumulator import RecordAccumulator
from kafka.producer.sender import Sender
from kafka.producer.transaction_manager import TransactionManager
from kafka.record.default_records import DefaultRecordBatchBuilder

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

HOST = "127.0.0.1"
SECTIONS = {  # of each script that has one: from its heading to the next
    script: re.split(r"^# -{20,} ", (ROOT / script).read_text().partition("kafka-python, repaired\n")[2], flags=re.M)[0]
    for script in ("random_event_producer.py", "test_random_consumer.py")
}

# Each repair by a name in the section: the client's function whose defect it mends, and the tests that fail without it.
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
    "get_connection": (KafkaConnectionManager.get_connection, ["repairs_test.py"]),
    "connection_delay": (KafkaNetClient.connection_delay, ["faults_test.py::test_everything_arrives"]),
    "take": (DefaultRecordBatchBuilder.append, ["batch_test.py::test_byte_for_byte"]),
    "hand_over": (RecordAccumulator.append, ["batch_test.py", "refusal_test.py"]),
    "_send_producer_data": (Sender._send_producer_data, ["cluster_test.py"]),
    "_produce_request": (Sender._produce_request, ["refusal_test.py"]),
    "_can_retry": (Sender._can_retry, ["refusal_test.py"]),
    "_dispatch_error": (Sender._dispatch_error, ["repairs_test.py::test_a_defect_of_a_repair_ends_the_run"]),
    "_repair": (
        TransactionManager.classify_batch_error,
        ["refusal_test.py", "faults_test.py::test_refused_among_others"],
    ),
    "_rewrite": (RecordAccumulator.split_and_reenqueue, ["refusal_test.py", "batch_test.py"]),
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


# ---------------------------------------------------------------------------------------------------------- batches

BROKEN = """
import sys
sys.path.insert(0, {root!r})
import random_event_producer as tool

class Broken(tool._Sender):
    def _repair(self, batch, error):
        raise KeyError("a defect")

tool._Sender = Broken
raise SystemExit(tool.main())
"""


def test_a_defect_of_a_repair_ends_the_run(
    run_script: Callable[..., Any], apache: Any, topic: str, tmp_path: Path
) -> None:
    """The client would log it and never send to that partition again."""
    from brokers import create_topic

    create_topic(apache.direct, topic, config={"max.message.bytes": "100"})
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN.format(root=str(ROOT)))
    script = run_script(str(broken), KAFKA_BROKER=apache.bootstrap, KAFKA_TOPIC=topic, INTERVAL_SECONDS=0.1)
    script.wait_for("ERROR - a repair of the Kafka client has failed: KeyError")
    assert script.wait() == 1
