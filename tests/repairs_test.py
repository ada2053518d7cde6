"""What the tool mends in its Kafka client, each with the defect seen without it.

Where a fault of a whole cluster is needed to see the defect, the test that does so is named instead.
"""

from __future__ import annotations

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
from kafka.net import inet, transport
from kafka.net.selector import NetworkSelector

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

HOST = "127.0.0.1"
SOURCE = (ROOT / "random_event_producer.py").read_text()
SECTION = SOURCE[SOURCE.index("kafka-python, repaired") : SOURCE.index("-- reaching Kafka")]

# Each repair by a name in the section, and the tests that fail without it.
REPAIRS = {
    "_sock_recv": ["repairs_test.py::test_last_words", "security_test.py::test_bad_combination_ends_with_its_line"],
    "handshake": [
        "repairs_test.py::test_handshake_limit",
        "security_test.py::test_handshake_in_mid_run_is_never_answered",
    ],
    "_create_connection": ["repairs_test.py::test_a_silent_address_of_several"],
    "_request_update_once": ["security_test.py::test_credentials_are_revoked_and_valid_again"],
    "connection_delay": ["faults_test.py::test_everything_arrives"],
    "reset_backoff": ["security_test.py::test_credentials_are_revoked_and_valid_again"],
    "update_backoff": ["cluster_test.py"],
    "bootstrap_brokers": ["repairs_test.py::test_bootstrap_servers_take_turns"],
    "connection_lost": ["security_test.py::test_bad_combination_ends_with_its_line"],
    "initialize": ["cluster_test.py", "security_test.py::test_bad_combination_ends_with_its_line"],
    "_end_line": ["field_test.py"],
    "send": ["producer_test.py::test_larger_than_the_client_takes"],
    "_can_retry": ["refusal_test.py"],
    "_end_batch": ["repairs_test.py::test_a_defect_of_a_repair_ends_the_run"],
    "_repair_batch": ["refusal_test.py", "faults_test.py::test_refused_among_others"],
    "_look_at_topic": ["cluster_test.py"],
    "_send_unless_changed": ["cluster_test.py"],
    "take_back": ["cluster_test.py"],
    "end": ["producer_test.py::test_signals_while_kafka_is_gone"],
    "read_record": ["audit_field_test.py::test_header_names_that_are_no_text"],
    "_unpack_records": ["audit_field_test.py::test_a_wrong_byte_on_the_way"],
    "_step_over": ["audit_field_test.py::test_a_batch_that_cannot_be_read"],
    "allow_auto_create_topics": ["consumer_test.py::test_no_topic"],
    "_noting_stable_end": ["audit_field_test.py::test_an_open_transaction_beside_traffic"],
    "cleanup_policy": ["audit_field_test.py::test_a_user_who_may_not_see_the_settings"],
}


def test_version() -> None:
    """Another version of the client: look at each repair again, whether it is needed and whether it still fits."""
    assert kafka.__version__ == tool.CLIENT_VERSION, f"look again at: {', '.join(REPAIRS)}"


@pytest.mark.parametrize(("name", "tests"), REPAIRS.items(), ids=REPAIRS)
def test_every_repair_has_a_test(name: str, tests: list[str]) -> None:
    assert re.search(rf"\bdef {name}\(|\.{name}( = |\()|\[\"{name}\"\] = ", SECTION), (
        f"there is no {name} in the section any more"
    )
    for test in tests:
        file, _, function = test.partition("::")
        assert f"def {function}" in (Path(__file__).parent / file).read_text(), test


def test_nothing_else_reads_private_names_of_the_client() -> None:
    """Outside the section no attribute with an underscore is read, but of `self`, `cls` and modules of our own."""
    for script in ROOT.glob("*.py"):
        text = script.read_text().replace(SECTION, "").replace("super()._", "")
        found = re.findall(r"(?<![\w\"'])(?!self\b|cls\b|os\b|super\(\))([\w\])]+)\._[a-z]\w*", text)
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


def test_handshake_limit(net: NetworkSelector, silent: int) -> None:
    def ends(kind: Any) -> bool:
        connection = socket.create_connection((HOST, silent))
        connection.setblocking(False)
        made = kind(net, connection, host=HOST, ssl_context=ssl.create_default_context())
        shaken = net.call_soon_with_future(made.handshake)
        net.poll(timeout_ms=1000 * (tool.SILENT_SECONDS + 1), future=shaken)
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

        def connects(create_connection: Any) -> bool:
            trial = net.call_soon_with_future(create_connection, net, "name", 1, (), None, time.monotonic() + 2)
            net.poll(timeout_ms=4000, future=trial)
            return bool(trial.succeeded())

        assert not connects(inet.create_connection)
        assert connects(kafka.net.manager.create_connection)
        for one in crowd:
            one.close()


def test_bootstrap_servers_take_turns() -> None:
    """One was drawn at random again and again, however often it had failed."""
    servers = [f"{HOST}:{free_port()}" for _ in range(3)]
    settings = tool.Settings(kafka_broker=",".join(servers))
    tried: list[str] = []

    class Network(tool.Network):
        def closed(self, _node_id: object, at: str, _error: Exception | None, _stage: str) -> None:
            tried.append(at)

    network = Network(settings)
    producer = tool.Producer("events", network, **tool.client_options(settings, network), delivery_timeout_ms=math.inf)
    try:
        wait_until(lambda: len(tried) >= 9, 10, "nine tries")
    finally:
        producer.end(0)
    assert [sorted(tried[turn : turn + 3]) for turn in (0, 3)] == [sorted(servers)] * 2


# ---------------------------------------------------------------------------------------------------------- batches

BROKEN = """
import sys
sys.path.insert(0, {root!r})
import random_event_producer as tool

class Broken(tool.Producer):
    def _repair_batch(self, batch, error, partition_response):
        raise KeyError("a defect")

tool.Producer = Broken
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
