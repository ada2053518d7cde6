"""What monitoring sees: /metrics, /healthz, /readyz and JSON lines of the running tool, and a real Prometheus."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml
from brokers import HOST, ApacheKafka, create_topic, free_port, read_all, set_topic_config, wait_until
from conftest import ROOT, RunScript, Script, clean_environment, require_apache
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

TOOL = "random_event_producer.py"
PREFIX = "random_event_producer_"
PROMETHEUS = ROOT / "deploy" / "prometheus"
TYPES = {"add_to_cart", "bounce", "product_view"}
# Every sample of a run without failures: name -> its labels.
SAMPLES = {
    "events_sent_total": {"event_type"},
    "events_skipped_total": set(),
    "unacknowledged_events": set(),
    "delivery_latency_seconds_bucket": {"le"},
    "delivery_latency_seconds_count": set(),
    "delivery_latency_seconds_sum": set(),
    "connected": set(),
    "behind_seconds": set(),
    "build_info": {"version"},
}
KINDS = {
    "events_sent": "counter",
    "events_failed": "counter",
    "events_skipped": "counter",
    "unacknowledged_events": "gauge",
    "delivery_latency_seconds": "histogram",
    "connected": "gauge",
    "behind_seconds": "gauge",
    "build_info": "gauge",
}


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApacheKafka]:
    """One that may be killed; each test leaves it running."""
    require_apache()
    with ApacheKafka(tmp_path_factory.mktemp("metrics")) as broker:
        yield broker


class Watched:
    """A running tool and its HTTP port."""

    def __init__(self, script: Script, port: int) -> None:
        self.script = script
        self.port = port

    def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        """Status, content type, body."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.headers["Content-Type"], response.read().decode()
        finally:
            connection.close()

    def status(self, path: str) -> int:
        return self.get(path)[0]

    def ready(self, status: int = 200) -> bool:
        try:
            return self.status("/readyz") == status
        except OSError:  # the tool has not opened its port yet
            return False

    def families(self) -> dict[str, Metric]:
        return {family.name: family for family in text_string_to_metric_families(self.get("/metrics")[2])}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples with that name and these labels."""
        samples = [sample for family in self.families().values() for sample in family.samples]
        found = [s.value for s in samples if s.name == PREFIX + name and labels.items() <= s.labels.items()]
        assert found, f"no {name} with {labels}"
        return sum(found)


@pytest.fixture
def watch(run_script: RunScript, kafka: ApacheKafka, topic: str) -> Any:
    """watch(INTERVAL_SECONDS=0.1, …) -> Watched."""

    def start(**settings: object) -> Watched:
        port = free_port()
        given = {"KAFKA_BROKER": kafka.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.05, **settings}
        return Watched(run_script(TOOL, METRICS_PORT=port, **given), port)

    return start


def is_up(watched: Watched) -> None:
    wait_until(watched.ready, 20, "the tool is ready")


# ------------------------------------------------------------------------------------------------- names and values


def test_names_kinds_and_labels_are_the_agreed_ones(watch: Any) -> None:
    watched = watch()
    is_up(watched)
    watched.script.wait_for("Total events sent: [1-9]")
    status, content_type, text = watched.get("/metrics")
    assert (status, content_type.partition(";")[0]) == (200, "text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name.removeprefix(PREFIX): family.type for name, family in families.items()} == KINDS
    assert all(name.startswith(PREFIX) and family.documentation for name, family in families.items())
    samples = [sample for family in families.values() for sample in family.samples]
    assert {sample.name.removeprefix(PREFIX): set(sample.labels) for sample in samples} == SAMPLES
    sent = families[f"{PREFIX}events_sent"].samples
    assert {sample.labels["event_type"] for sample in sent} == TYPES
    assert (watched.value("connected"), watched.value("build_info")) == (1, 1)
    assert 0 <= watched.value("behind_seconds") < 1


def test_numbers_agree(watch: Any, kafka: ApacheKafka, topic: str) -> None:
    watched = watch(INTERVAL_SECONDS=0.02)
    is_up(watched)
    wait_until(lambda: watched.value("events_sent_total") >= 100, 20, "100 events are sent")
    families = watched.families()  # of one moment
    total = sum(sample.value for sample in families[f"{PREFIX}events_sent"].samples)
    histogram = families[f"{PREFIX}delivery_latency_seconds"].samples
    buckets = [(float(s.labels["le"]), s.value) for s in histogram if s.name.endswith("_bucket")]
    (count,) = [s.value for s in histogram if s.name.endswith("_count")]
    (seconds,) = [s.value for s in histogram if s.name.endswith("_sum")]
    assert buckets == sorted(buckets)
    assert [seen for _, seen in buckets] == sorted(seen for _, seen in buckets)
    assert buckets[-1] == (float("inf"), count)
    assert count == total
    # the sum lies between what the buckets allow
    steps = [(bound, seen - before) for (bound, seen), (_, before) in zip(buckets, [(0, 0.0), *buckets], strict=False)]
    lowest = sum(before * n for (_, n), (before, _) in zip(steps, [(0.0, 0), *steps], strict=False))
    highest = sum(bound * n for bound, n in steps if n)
    assert lowest * 0.95 <= seconds <= highest * 1.05  # quantiles are kept to 5 %
    assert 0 < seconds / count < 5
    watched.script.signal()
    assert watched.script.wait() == 0
    sent = int(watched.script.wait_for(r"Stopped: sent (\d+)")[1])
    assert sent == len(read_all(kafka.direct, topic)) >= total


def test_failures_are_counted_by_error(watch: Any, kafka: ApacheKafka, topic: str) -> None:
    create_topic(kafka.direct, topic)
    watched = watch(INTERVAL_SECONDS=0.5)
    is_up(watched)
    watched.script.wait_for("Event sent")
    set_topic_config(kafka.direct, topic, {"max.message.bytes": "100"})
    watched.script.wait_for("(WARNING|ERROR) - .*max.message.bytes")
    set_topic_config(kafka.direct, topic, {"max.message.bytes": "1000000"})
    watched.script.wait_for("Event sent", after=len(watched.script.lines))
    (failed,) = watched.families()[f"{PREFIX}events_failed"].samples[:1]
    assert (failed.name, set(failed.labels)) == (f"{PREFIX}events_failed_total", {"error"})
    assert re.fullmatch(r"\w*TooLarge\w*", failed.labels["error"])
    assert failed.value >= 1
    watched.script.signal()
    assert watched.script.wait() == 1
    assert int(watched.script.wait_for(r"Stopped: .*failed (\d+)")[1]) >= failed.value


def test_unacknowledged_behind_and_skipped(watch: Any, kafka: ApacheKafka) -> None:
    watched = watch(INTERVAL_SECONDS=0.0002)
    is_up(watched)
    wait_until(lambda: watched.value("events_sent_total") > 0, 20, "events are sent")
    kafka.freeze()
    try:
        wait_until(lambda: watched.value("unacknowledged_events") >= 10_000, 20, "as many wait as may")
        wait_until(lambda: watched.value("behind_seconds") > 1, 20, "the schedule is not kept")
        assert watched.status("/healthz") == 200
    finally:
        kafka.thaw()
    wait_until(lambda: watched.value("events_skipped_total") > 0, 30, "slots are given up")
    wait_until(lambda: watched.value("behind_seconds") < 1, 30, "the schedule is kept again")
    watched.script.signal()
    assert watched.script.wait() == 0
    skipped = int(watched.script.wait_for(r"Stopped: .*skipped (\d+)")[1])
    assert skipped > 0


# ------------------------------------------------------------------------------------------------------------ health


def test_before_kafka_is_there(watch: Any) -> None:
    watched = watch(KAFKA_BROKER=f"{HOST}:{free_port()}")
    wait_until(lambda: watched.ready(503), 20, "the port is open")
    assert watched.status("/healthz") == 200
    assert watched.value("connected") == 0
    assert "Kafka" in watched.get("/readyz")[2]
    assert watched.value("events_sent_total") == 0
    watched.script.signal(signal.SIGTERM)
    assert watched.script.wait(5) == 0


def test_broker_is_killed_and_comes_back(watch: Any, kafka: ApacheKafka) -> None:
    watched = watch()
    is_up(watched)
    watched.script.wait_for("Total events sent: [1-9]")
    kafka.kill()
    try:
        killed_at = time.monotonic()
        wait_until(lambda: watched.ready(503), 15, "not ready")
        print(f"not ready {time.monotonic() - killed_at:.1f} s after the broker was killed")
        wait_until(lambda: "nothing listens" in watched.get("/readyz")[2], 10, "the reason")
        assert (watched.status("/healthz"), watched.value("connected")) == (200, 0)
        assert watched.value("unacknowledged_events") > 0
        time.sleep(2)
        assert watched.status("/healthz") == 200
    finally:
        kafka.start_node()
    back_at = time.monotonic()
    wait_until(watched.ready, 20, "ready again")
    print(f"ready {time.monotonic() - back_at:.1f} s after the broker was back")
    assert watched.get("/readyz") == (200, "text/plain; charset=utf-8", "ok\n")
    assert (watched.status("/healthz"), watched.value("connected")) == (200, 1)
    watched.script.signal()
    assert watched.script.wait() == 0


def test_a_quiet_interval_is_fine(watch: Any) -> None:
    watched = watch(INTERVAL_SECONDS=3600)
    is_up(watched)
    wait_until(lambda: watched.value("events_sent_total") == 1, 20, "the first event")
    time.sleep(7)  # longer than what counts as a stall
    assert (watched.status("/readyz"), watched.status("/healthz"), watched.value("connected")) == (200, 200, 1)
    watched.script.signal()
    assert watched.script.wait(5) == 0


def test_loop_that_hangs_is_not_healthy(watch: Any) -> None:
    """A stopped process answers nothing at all: what a probe's time-out is for."""
    watched = watch()
    is_up(watched)
    watched.script.signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        watched.status("/healthz")
    watched.script.signal(signal.SIGCONT)
    wait_until(lambda: watched.status("/healthz") == 200, 10, "healthy again")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/?", 200),
        ("/index.html", 404),
        ("/metric", 404),
        ("/metrics/", 404),
        ("/healthz?verbose", 200),
        ("/metrics?name[]=none", 200),
    ],
    ids=str,
)
def test_paths(live: Watched, path: str, status: int) -> None:
    assert live.status(path) == status


@pytest.fixture(scope="module")
def live(kafka: ApacheKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """One for all tests that only ask."""
    port = free_port()
    environment = clean_environment(KAFKA_BROKER=kafka.bootstrap, METRICS_PORT=port, INTERVAL_SECONDS=0.1)
    watched = Watched(Script([sys.executable, str(ROOT / TOOL)], environment, tmp_path_factory.mktemp("live")), port)
    try:
        is_up(watched)
        yield watched
    finally:
        watched.script.kill()


def test_unknown_path_names_the_known_ones(live: Watched) -> None:
    assert re.search("/metrics.*/healthz.*/readyz", live.get("/nothing")[2])


def test_garbage_does_not_hurt(live: Watched) -> None:
    for sent in (b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x00", b"GET " + b"/a" * 70_000 + b" HTTP/1.0\r\n\r\n"):
        with socket.create_connection((HOST, live.port), 5) as connection:
            connection.sendall(sent)
    with socket.create_connection((HOST, live.port), 5):  # one that says nothing holds up nobody
        assert live.status("/healthz") == 200
    live.script.check()
    assert not re.search("Exception|Error", live.script.stderr), live.script.tail()


# ------------------------------------------------------------------------------------------------------ bad settings


def test_port_that_is_taken(run_script: RunScript) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        script = run_script(TOOL, METRICS_PORT=port, KAFKA_BROKER=f"{HOST}:{free_port()}")
        assert script.wait(10) == 2
    assert re.search(rf"METRICS_PORT: .*{port}.*in use", script.stderr), script.tail()


@pytest.mark.parametrize("value", ["0", "65536", "http", "-1"])
def test_port_that_is_none(run_script: RunScript, value: str) -> None:
    script = run_script(TOOL, METRICS_PORT=value)
    assert script.wait(10) == 2
    assert re.search(rf"METRICS_PORT: '{value}'.*1 to 65535", script.stderr), script.tail()


def test_nothing_is_served_unasked(run_script: RunScript, kafka: ApacheKafka, topic: str) -> None:
    script = run_script(TOOL, KAFKA_BROKER=kafka.bootstrap, KAFKA_TOPIC=topic)
    script.wait_for("Event sent")
    connections = psutil.Process(script.process.pid).net_connections()
    assert connections  # to Kafka
    assert psutil.CONN_LISTEN not in {connection.status for connection in connections}


# -------------------------------------------------------------------------------------------------------- JSON lines

EVENT = {"time", "level", "message", "user_id", "event_type", "metadata", "partition", "offset", "event_id"}
SUMMARY = {"sent", "failed", "unconfirmed", "sent_again", "skipped", "seconds", "rate", "rate_asked", "run"}


@pytest.mark.parametrize(("interval", "level"), [(0.1, "INFO"), (0.01, "DEBUG")])
def test_json_lines(run_script: RunScript, kafka: ApacheKafka, topic: str, interval: float, level: str) -> None:
    script = run_script(
        TOOL,
        KAFKA_BROKER=kafka.bootstrap,
        KAFKA_TOPIC=topic,
        INTERVAL_SECONDS=interval,
        MAX_EVENTS=10,
        LOG_FORMAT="json",
        LOG_LEVEL=level,
    )
    assert script.wait() == 0
    assert script.stdout == ""
    lines: list[dict[str, Any]] = [json.loads(line) for line in script.stderr_lines]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|\+00:00)", line["time"]) for line in lines)
    assert {line["level"] for line in lines} <= {"DEBUG", "INFO", "WARNING", "ERROR"}
    events = [line for line in lines if line["message"].startswith("Event sent")]
    assert all(line.keys() == EVENT and line["level"] == level for line in events)
    stored = read_all(kafka.direct, topic)
    assert [told(line) for line in events] == [kept(record) for record in stored]
    summary = lines[-1]
    assert summary["message"].startswith("Stopped: ")
    assert summary.keys() >= SUMMARY
    assert [summary[name] for name in ("sent", "failed", "unconfirmed", "sent_again", "skipped")] == [10, 0, 0, 0, 0]
    assert events[0]["event_id"] == f"{summary['run']}:1"


def told(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("user_id", "event_type", "metadata", "partition", "offset", "event_id"))


def kept(record: Any) -> tuple[Any, ...]:
    value = json.loads(record.value)
    return (
        *(value[name] for name in ("user_id", "event_type", "metadata")),
        record.partition,
        record.offset,
        dict(record.headers)["event_id"].decode(),
    )


def test_json_lines_of_trouble(run_script: RunScript) -> None:
    script = run_script(TOOL, KAFKA_BROKER=f"{HOST}:{free_port()}", CONNECT_TIMEOUT_SECONDS=1, LOG_FORMAT="json")
    assert script.wait() == 1
    levels = [json.loads(line)["level"] for line in script.stderr_lines]
    assert {"WARNING", "ERROR", "INFO"} == set(levels)


# ------------------------------------------------------------------------------------------------- a real Prometheus


class Prometheus:
    """Debian's, with the project's alerts, shortened so that minutes become seconds."""

    def __init__(self, folder: Path, target: int) -> None:
        self.port = free_port()
        self.log = folder / "prometheus.log"
        configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        configuration["global"] = dict.fromkeys(configuration["global"], "1s")
        (job,) = [job for job in configuration["scrape_configs"] if job["job_name"] == "random-event-producer"]
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"{HOST}:{target}"]}]
        configuration["scrape_configs"] = [job]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        alerts = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
        for rule in alerts["groups"][0]["rules"]:
            rule["for"] = "2s" if "for" in rule else "0s"
            rule["expr"] = re.sub(r"\b\d+m\b", "6s", rule["expr"])
        (folder / "alerts.yml").write_text(yaml.safe_dump(alerts))
        command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={HOST}:{self.port}",
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)

    def ask(self, what: str, **parameters: str) -> Any:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", f"/api/v1/{what}?{urllib.parse.urlencode(parameters)}")
            return json.loads(connection.getresponse().read())["data"]
        finally:
            connection.close()

    def value(self, expression: str) -> float | None:
        result = self.ask("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None

    def started(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        try:
            return self.value("vector(1)") == 1
        except (OSError, ValueError):
            return False

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def test_prometheus_scrapes_and_raises_alerts(watch: Any, kafka: ApacheKafka, tmp_path: Path) -> None:
    if not shutil.which("prometheus"):
        if os.environ.get("REQUIRE_PROMETHEUS") == "1":
            pytest.fail("no prometheus here, and REQUIRE_PROMETHEUS=1 (Debian's package: prometheus)")
        pytest.skip("no prometheus here (Debian's package: prometheus)")
    watched = watch()
    is_up(watched)
    prometheus = Prometheus(tmp_path, watched.port)
    try:
        wait_until(prometheus.started, 30, "Prometheus answers")
        wait_until(lambda: prometheus.value("up") == 1, 20, "the tool is scraped")
        wait_until(lambda: (prometheus.value(f"sum(rate({PREFIX}events_sent_total[6s]))") or 0) > 10, 20, "a rate")
        time.sleep(6)
        assert prometheus.firing() == set()
        names = {series["__name__"] for series in prometheus.ask("series", **{"match[]": '{__name__=~"random_.*"}'})}
        assert {name.removeprefix(PREFIX) for name in names} == SAMPLES.keys()
        rules = prometheus.ask("rules")["groups"][0]["rules"]
        assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []

        kafka.kill()
        try:
            lost = {"RandomEventProducerNotConnected", "RandomEventProducerNoEventsConfirmed"}
            wait_until(lambda: prometheus.firing() >= lost, 40, f"{lost} are raised")
        finally:
            kafka.start_node()
        wait_until(lambda: not prometheus.firing(), 60, "all is well again")

        watched.script.signal(signal.SIGKILL)
        wait_until(lambda: prometheus.firing() == {"RandomEventProducerDown"}, 30, "RandomEventProducerDown is raised")
    finally:
        prometheus.close()
