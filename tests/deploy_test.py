"""What stands around the tool: image, compose file, Kubernetes manifests, alerts, dashboard. No container engine."""

from __future__ import annotations

import functools
import http.client
import importlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from conftest import clean_environment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import random_event_producer as tool

COMPOSE = ROOT / "docker-compose.yml"
MANIFESTS = ROOT / "deploy" / "kubernetes.yaml"
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "random-event-producer.json"
IMAGE = f"random-event-producer:{tool.__version__}"
KUBERNETES_VERSIONS = ("1.33", "1.37")  # the manifests need nothing newer than the first
VARIABLES = {name.upper() for name in tool.Settings.model_fields}


@functools.cache
def every_variable() -> set[str]:
    """Of each script: of each class of settings in it."""
    modules = [importlib.import_module(path.stem) for path in ROOT.glob("*.py")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return {name.upper() for kind in found if issubclass(kind, tool.Settings) for name in kind.model_fields}


@functools.cache
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())  # type: ignore[no-any-return]


@functools.cache
def manifests() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFESTS.read_text())}


@functools.cache
def dockerfile() -> list[tuple[str, str]]:
    """Its instructions: (name, arguments)."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def instructions(name: str) -> list[str]:
    return [arguments for found, arguments in dockerfile() if found == name]


# ----------------------------------------------------------------------------------------------------- the image


def test_image_runs_the_tool_as_an_unprivileged_number() -> None:
    assert instructions("FROM") == ["python:3.13-slim"]
    (user,) = instructions("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert json.loads(instructions("CMD")[0]) == ["python", "random_event_producer.py"]
    assert instructions("ARG") == [f"VERSION={tool.__version__}"]


def test_image_says_what_it_is() -> None:
    labels = dict(pair.split("=", 1) for line in instructions("LABEL") for pair in shlex.split(line))
    said = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert f"{said.pop('title')}:{tool.__version__}" == IMAGE
    assert (ROOT / "LICENSE").read_text().startswith(f"{said.pop('licenses')} License\n")
    assert said.pop("version") == "${VERSION}"
    assert said.keys() == {"description"}


def test_image_environment_is_the_tools() -> None:
    environment = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    assert {name for name in environment if not name.startswith("PYTHON")} <= VARIABLES
    assert environment["METRICS_PORT"] == instructions("EXPOSE")[0] == "8000"
    assert environment["METRICS_HOST"] == manifests()["ConfigMap"]["data"]["METRICS_HOST"] == "::"


def test_image_installs_dependencies_before_the_source() -> None:
    order = [arguments for name, arguments in dockerfile() if name in ("COPY", "RUN")]
    assert order[0] == "requirements.txt ."
    assert order[1].startswith("pip install ")
    assert "random_event_producer.py" in order[2]


def test_build_context_is_what_the_image_copies() -> None:
    first, *allowed = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    copied = [name for arguments in instructions("COPY") for name in arguments.split()[:-1]]
    assert allowed == [f"!{name}" for name in copied]
    assert [name for name in copied if not (ROOT / name).is_file()] == []


@pytest.fixture
def metrics() -> Iterator[tuple[int, tool.Tally]]:
    """The tool's own metrics server: its port and what it tells of."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tally = tool.Tally(["bounce"])
    with tool.metrics_server(tool.Settings(metrics_port=port, metrics_host="127.0.0.1"), tally):
        yield port, tally


def health_check(port: object) -> int:
    (_, arguments), *_ = [line for line in dockerfile() if line[0] == "HEALTHCHECK"]
    command = json.loads(arguments[arguments.index("CMD ") + 4 :])
    assert command[0] == "python"
    environment = {**os.environ, "METRICS_HOST": "::", "METRICS_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, timeout=20)
    return done.returncode


def test_health_check_is_the_tools_own_word(metrics: tuple[int, tool.Tally]) -> None:
    port, tally = metrics
    assert health_check(port) == 0
    tally.turned_at -= 3600
    assert health_check(port) == 1


def test_health_check_without_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert health_check(port) == 1
    assert health_check("") == 0  # an empty METRICS_PORT: nothing is served, nothing can be asked


# ------------------------------------------------------------------------------------------------------- compose


@pytest.fixture(params=["docker-compose", "docker compose"])
def compose_config(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., str]:
    """compose_config("-q", SEED="x") -> the file as this version of compose reads it, all profiles, with these set."""
    options = ("-f", COMPOSE, "--project-directory", tmp_path, "--profile", "*")  # no .env of a developer's
    command = request.param.split()
    if not shutil.which(command[0]) or subprocess.run([*command, "version"], capture_output=True).returncode:
        pytest.skip(f"no {request.param} here")

    def config(*flags: str, **settings: str) -> str:
        done = subprocess.run(
            [*command, *options, "config", *flags],
            env=clean_environment(**settings),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert not re.search("warn|obsolete|unsupported", done.stderr, re.IGNORECASE), done.stderr
        return done.stdout

    return config


def test_compose_accepts_the_file(compose_config: Callable[..., str]) -> None:
    assert compose_config("-q") == ""


def test_compose_gives_a_setting_to_the_container_where_it_is_set(compose_config: Callable[..., str]) -> None:
    services = yaml.safe_load(compose_config(SEED="x", START_TIME="2026-05-04", KAFKA_BROKER="nowhere"))["services"]
    for name in ("random-event-producer", "random-churn-producer", "random-faulty-producer"):
        given = {variable: value for variable, value in services[name]["environment"].items() if value is not None}
        assert given == {"KAFKA_BROKER": "kafka:29092", "SEED": "x", "START_TIME": "2026-05-04"}


def test_compose_profiles() -> None:
    assert {name: service.get("profiles") for name, service in compose()["services"].items()} == {
        "kafka": None,
        "random-event-producer": ["random"],
        "random-churn-producer": ["churn"],
        "random-faulty-producer": ["faulty"],
        "kafka-ui": ["frontend"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }


def test_compose_publishes_on_this_machine_only() -> None:
    ports = [port for service in compose()["services"].values() for port in service.get("ports", [])]
    assert "127.0.0.1:9092:9092" in ports
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []


def test_compose_images_are_pinned() -> None:
    images = {name: service["image"] for name, service in compose()["services"].items()}
    assert {images[f"random-{name}-producer"] for name in ("event", "churn", "faulty")} == {IMAGE}
    assert [image for image in images.values() if not re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", image)] == []


def test_compose_producer() -> None:
    service = compose()["services"]["random-event-producer"]
    assert service["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    # exit code 0 is the end, with MAX_EVENTS too; wrong settings are not tried for ever
    assert re.fullmatch(r"\$\{RESTART_POLICY:-on-failure:\d\}", service["restart"])


@pytest.mark.parametrize("other", ["churn", "faulty"])
def test_compose_other_producers_are_the_same_with_another_script(other: str) -> None:
    plain, own = (dict(compose()["services"][f"random-{name}-producer"]) for name in ("event", other))
    assert own.pop("command") == ["python", f"random_{other}_producer.py"]
    differing = {name for name in plain if plain[name] != own.get(name)}
    assert differing == {"profiles", "container_name", "command"}


def test_compose_passes_every_setting_on() -> None:
    """By its name alone: what is not set outside is not set inside, and has the tool's own default."""
    own = {"KAFKA_BROKER", "METRICS_PORT", "METRICS_HOST"}  # the compose file and the image have values for them
    environment = compose()["services"]["random-event-producer"]["environment"]
    assert sorted(environment) == sorted({"KAFKA_BROKER=kafka:29092"} | every_variable() - own)


def test_compose_kafka_says_only_what_is_wrong() -> None:
    environment = compose()["services"]["kafka"]["environment"]
    levels = dict(pair.split("=") for pair in environment["KAFKA_LOG4J_LOGGERS"].split(","))
    assert levels["kafka"] == levels["org.apache.kafka"] == "WARN"
    assert "KAFKA_LOG4J_ROOT_LOGLEVEL" not in environment  # it would take the errors away too


def test_compose_mounts_exist() -> None:
    mounts = [mount for service in compose()["services"].values() for mount in service.get("volumes", [])]
    files = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(files) == 5
    assert [name for name in files if not (ROOT / name).is_file()] == []


# ---------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("kind", ["ConfigMap", "Service", "StatefulSet", "Job"])
def test_manifest_fits_the_published_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(manifests()[kind], version, strict=True)


def workloads() -> dict[str, dict[str, Any]]:
    return {kind: manifests()[kind]["spec"] for kind in ("StatefulSet", "Job")}


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_pods_are_restricted(kind: str) -> None:
    pod = workloads()[kind]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == instructions("USER")[0]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    assert pod["terminationGracePeriodSeconds"] > 10
    assert container["resources"].keys() == {"requests", "limits"}
    assert container["image"] == IMAGE


@pytest.mark.parametrize("kind", ["StatefulSet", "Job"])
def test_pod_settings_are_accepted_by_the_tool(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every Pod of the workload: ConfigMap, then its own variables, read as the tool reads them."""
    spec = workloads()[kind]
    (container,) = spec["template"]["spec"]["containers"]
    pods = spec["replicas"] if kind == "StatefulSet" else spec["completions"]
    values = {**manifests()["ConfigMap"]["data"], **{item["name"]: item.get("value") for item in container["env"]}}
    assert set(values) <= VARIABLES
    monkeypatch.setattr(tool, "ENV_FILE", Path("no-such-file"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    shards = set()
    for index in range(pods):
        for name, value in values.items():
            monkeypatch.setenv(name, str(index) if name == "SHARD_INDEX" else value)
        settings = tool.Settings.load()
        shards.add((settings.shard_index, settings.shard_count))
    assert shards == {(index, pods) for index in range(pods)}  # together they have every user, each once


def test_pods_take_their_number_from_their_label() -> None:
    fields = {
        kind: [item["valueFrom"] for item in spec["template"]["spec"]["containers"][0]["env"] if "valueFrom" in item]
        for kind, spec in workloads().items()
    }
    assert fields == {
        "StatefulSet": [{"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}],
        "Job": [{"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-completion-index']"}}],
    }


def test_only_a_job_that_is_done_counts_as_done() -> None:
    """Exit code 2 ends it; an evicted Pod (exit code 1, and the condition) is replaced; any other end is a failure."""
    job = workloads()["Job"]
    container = job["template"]["spec"]["containers"][0]["name"]
    assert job["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": [2]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    assert job["backoffLimit"] > 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # else the policy is refused
    assert job.get("podReplacementPolicy", "Failed") == "Failed"  # never two Pods with the same users


def test_probes_ask_what_the_tool_serves(metrics: tuple[int, tool.Tally]) -> None:
    port, tally = metrics
    (container,) = workloads()["StatefulSet"]["template"]["spec"]["containers"]

    def ask(probe: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", container[probe]["httpGet"]["path"])
        return connection.getresponse().status

    assert (ask("livenessProbe"), ask("readinessProbe")) == (200, 503)  # Kafka is not reached yet
    tally.trouble = ""
    assert (ask("livenessProbe"), ask("readinessProbe")) == (200, 200)
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {"metrics"}
    assert container["ports"] == [{"name": "metrics", "containerPort": 8000}]
    assert manifests()["ConfigMap"]["data"]["METRICS_PORT"] == "8000"
    assert manifests()["Service"]["spec"]["ports"][0]["targetPort"] == "metrics"


# ----------------------------------------------------------------------------------------------- alerts, dashboard


def promtool(*arguments: object) -> str:
    if not shutil.which("promtool"):
        if os.environ.get("REQUIRE_PROMETHEUS") == "1":
            pytest.fail("no promtool here, and REQUIRE_PROMETHEUS=1 (Debian's package: prometheus)")
        pytest.skip("no promtool here (Debian's package: prometheus)")
    done = subprocess.run(
        ["promtool", *map(str, arguments)], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_its_configuration() -> None:
    assert "valid prometheus config" in promtool("check", "config", "prometheus.yml")


def test_alerts_are_raised_when_due_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return group["rules"]  # type: ignore[no-any-return]


def test_every_alert_is_tested() -> None:
    tested = re.findall(r'alertname="(\w+)"', (PROMETHEUS / "alerts_test.yml").read_text())
    assert {rule["alert"] for rule in alerts()} == set(tested)


def test_alerts_say_what_to_do() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning")
        what, colon, next_step = rule["annotations"]["summary"].partition(": ")
        assert all((what, colon, next_step)), rule["alert"]


@pytest.fixture
def exported(metrics: tuple[int, tool.Tally]) -> set[str]:
    """The names of the samples that the tool exports, all of them."""
    port, tally = metrics
    tally.failed["KafkaError"] += 1
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    return set(re.findall(r"^(\w+)[{ ]", connection.getresponse().read().decode(), re.MULTILINE))


def dashboard_expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_expressions_use_what_the_tool_exports(exported: set[str]) -> None:
    variable = json.loads(DASHBOARD.read_text())["templating"]["list"][0]["definition"]
    used = {
        name
        for text in [*(rule["expr"] for rule in alerts()), *dashboard_expressions(), variable]
        for name in re.findall(r"\brandom_event_producer_\w+", text)
    }
    assert used <= exported
    # and the other way round: nothing that matters is left unseen
    assert exported - used == {
        "random_event_producer_delivery_latency_seconds_count",
        "random_event_producer_delivery_latency_seconds_sum",
    }


def test_dashboard_expressions_are_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "1m").replace("$instance", ".*")}
        for number, text in enumerate(dashboard_expressions())
    ]
    file = tmp_path / "dashboard.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_dashboard_belongs_to_its_data_source() -> None:
    (source,) = yaml.safe_load((ROOT / "deploy" / "grafana" / "datasource.yml").read_text())["datasources"]
    board = json.loads(DASHBOARD.read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


def test_prometheus_looks_for_each_producer_of_the_compose_file() -> None:
    (scrape, _) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = scrape["dns_sd_configs"]
    assert set(found["names"]) == {name for name, made in compose()["services"].items() if made["image"] == IMAGE}
    assert str(found["port"]) == instructions("EXPOSE")[0]
