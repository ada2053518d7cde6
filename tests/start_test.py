"""How a script is started, and what stands around it: Python's own options, folders, a `.env` with mistakes in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from auditor_test import records, write
from brokers import Tansu, create_topic, read_all
from conftest import ROOT, Script, clean_environment
from field_test import AUDITOR, SMOKE, TOOL
from terminal_test import mounts

sys.path.insert(0, str(ROOT))

import random_event_producer as tool

CHURN, FAULTY = "random_churn_producer.py", "random_faulty_producer.py"
SCRIPTS = [TOOL, SMOKE, AUDITOR, CHURN, FAULTY]
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - INFO - .*")
TIMESTAMP = re.compile(r'"timestamp":"[^"]*"')

# Options of Python's, and variables (None: taken away).
Mode = tuple[list[str], dict[str, str | None]]
MODES: dict[str, Mode] = {
    "plain": ([], {}),
    "isolated": (["-I"], {}),
    "safe path": ([], {"PYTHONSAFEPATH": "1"}),
    "warnings are errors": (["-W", "error"], {}),
    "bytes warnings are errors": (["-bb"], {}),
    "optimized": ([], {"PYTHONOPTIMIZE": "2"}),
    "development": ([], {"PYTHONDEVMODE": "1"}),
    "no home": ([], {"HOME": None}),
    "ASCII": ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
}


def command_of(name: str, options: list[str], *flags: str, folder: Path = ROOT) -> list[str]:
    return [sys.executable, *options, str(folder / name), *flags]


def environment_of(changes: dict[str, str | None], **settings: object) -> dict[str, str]:
    given = clean_environment(**settings) | {name: value for name, value in changes.items() if value is not None}
    return {name: value for name, value in given.items() if changes.get(name, "") is not None}


def finish(command: list[str], environment: dict[str, str], cwd: Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run(
        command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What --help prints, by script."""
    folder = tmp_path_factory.mktemp("plain")
    told = {name: finish(command_of(name, [], "--help"), clean_environment(), folder) for name in SCRIPTS}
    assert all((code, stderr) == (0, "") for code, _, stderr in told.values()), told
    return {name: stdout for name, (_, stdout, _) in told.items()}


def settings_of(name: str, tansu: Tansu, topic: str) -> dict[str, object]:
    """For a run that ends with 0 after three events, or ten."""
    create_topic(tansu.direct, topic)
    if name == AUDITOR:
        write(tansu.direct, topic, records([1, 2, 3]))
    more = {} if name == SMOKE else {"MAX_EVENTS": 3}
    return {"KAFKA_BROKER": tansu.bootstrap, "KAFKA_TOPIC": topic, "INTERVAL_SECONDS": 0.01, "SEED": "7", **more}


def runs_as_ever(name: str, command: list[str], environment: dict[str, str], cwd: Path) -> None:
    """To its end, and with no other lines."""
    code, stdout, stderr = finish(command, environment, cwd)
    assert code == 0, stderr
    assert all(map(LINE.fullmatch, stderr.splitlines())), stderr
    if name in (SMOKE, AUDITOR):
        assert re.search("(?m)^(10 of 10 events confirmed|OK: .*)$", stdout), stdout
    else:
        assert re.search("Stopped: sent 3, failed 0, unconfirmed 0", stderr), stderr


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_however_python_is_started(tansu: Tansu, topic: str, tmp_path: Path, name: str, mode: str) -> None:
    options, changes = MODES[mode]
    environment = environment_of(changes, **settings_of(name, tansu, topic))
    runs_as_ever(name, command_of(name, options), environment, tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_a_folder_that_is_gone(tansu: Tansu, topic: str, tmp_path: Path, name: str) -> None:
    (gone := tmp_path / "gone").mkdir()
    within = ["sh", "-c", 'rmdir "$0" && exec "$@"', str(gone)]
    environment = clean_environment(**settings_of(name, tansu, topic))
    runs_as_ever(name, [*within, *command_of(name, [])], environment, gone)


def test_by_code_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    """`python -c` has no script beside which anything could be."""
    (gone := tmp_path / "gone").mkdir()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import random_event_producer as tool; sys.exit(tool.main())"
    within = ["sh", "-c", 'rmdir "$0" && exec "$@"', str(gone), sys.executable]
    environment = clean_environment(MAX_EVENTS=3, INTERVAL_SECONDS=0)
    ended, stdout, stderr = finish([*within, "-c", code, "--print"], environment, gone)
    assert (ended, len(stdout.splitlines())) == (0, 3), stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_by_a_symbolic_link(tansu: Tansu, topic: str, tmp_path: Path, name: str) -> None:
    """As somebody puts a script on the PATH; its sibling is where the script is, not where the link is."""
    (tmp_path / name).symlink_to(ROOT / name)
    options = ["-I", "-W", "error"]
    environment = clean_environment(**settings_of(name, tansu, topic))
    runs_as_ever(name, command_of(name, options, folder=tmp_path), environment, tmp_path)


OFFLINE = [
    *([name, "--help"] for name in SCRIPTS),
    [TOOL, "--print"],
    [TOOL, "--schema"],
    [CHURN, "--labels"],
    [FAULTY, "--faults"],
]


@pytest.mark.parametrize("mode", ["optimized", "ASCII"])
@pytest.mark.parametrize("command", OFFLINE, ids=" ".join)
def test_what_needs_no_kafka_is_the_same(tmp_path: Path, command: list[str], mode: str) -> None:
    def start(mode: str) -> tuple[int, str, str]:
        options, changes = MODES[mode]
        settings = {"MAX_EVENTS": 3, "INTERVAL_SECONDS": 0, "SEED": 7}
        return finish(command_of(command[0], options, *command[1:]), environment_of(changes, **settings), tmp_path)

    code, stdout, stderr = start(mode)
    assert (code, TIMESTAMP.sub("", stdout)) == (0, TIMESTAMP.sub("", start("plain")[1])), stderr
    assert [line for line in stderr.splitlines() if not re.search("^20.* - INFO - |^[0-9]+ users", line)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_h_is_help(wanted: dict[str, str], tmp_path: Path, name: str) -> None:
    """Whatever the environment says."""
    environment = clean_environment(KAFKA_BROKER="no where", MAX_EVENTS="many")
    assert finish(command_of(name, [], "-h"), environment, tmp_path) == (0, wanted[name], "")


# ------------------------------------------------------------------------------------------- mistakes in what is given


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """beside("KAFKA_TOPIC=x", TOOL, MAX_EVENTS=3) -> the script, with a `.env` like that beside it."""
    (folder := tmp_path / "copy").mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    running: list[Script] = []

    def start(env: str, name: str, *flags: str, **settings: object) -> Script:
        (folder / ".env").write_bytes(env.encode())
        running.append(Script(command_of(name, [], *flags, folder=folder), clean_environment(**settings), tmp_path))
        return running[-1]

    yield start
    for script in running:
        script.kill()


def warned(script: Script) -> list[str]:
    return re.findall(r" - WARNING - (.*)", script.stderr)


@pytest.mark.parametrize("name", SCRIPTS)
def test_lines_of_env_that_are_no_setting(beside: Callable[..., Script], tansu: Tansu, topic: str, name: str) -> None:
    """Each is named, at the start, and not shown: it may be half a password. The others count."""
    settings = settings_of(name, tansu, topic)
    lines = [f"{name}={value}" for name, value in settings.items()]
    mistakes = ["hunter2 is", "", "SEED", "LOG_FORMAT: hunter2", "LOG_FORMAT='hunter2"]
    good = ["# a comment, and a line of blanks", "  "]
    env = "\n".join([lines[0], *good, *mistakes, *lines[1:], "export SHARD_COUNT = 1"])
    script = beside(f"{env}\n", name)
    assert script.wait() == 0, script.tail()
    (told,) = warned(script)
    assert re.search(r"\.env, line 4, 6-8: not NAME=value", told), told
    assert "WARNING" in script.stderr_lines[0]
    assert "hunter2" not in script.stderr
    if name != AUDITOR:
        assert len(read_all(tansu.direct, topic)) == settings.get("MAX_EVENTS", 10)


@pytest.mark.parametrize("text", ["\ufeff{}", "{}\r\n"], ids=["byte order mark", "CRLF"])
def test_env_as_windows_writes_it(beside: Callable[..., Script], text: str) -> None:
    lines = ["MAX_EVENTS=3", "bad", "INTERVAL_SECONDS=0", "bad"]
    script = beside(text.format("\r\n".join(lines)), TOOL, "--print")
    assert script.wait() == 0, script.tail()
    assert len(script.stdout_lines) == 3
    assert re.search("line 2, 4: ", warned(script)[0])


MISTYPED = {"KAFKA_TOPICS": "KAFKA_TOPIC", "INTERVAL_SECOND": "INTERVAL_SECONDS", "KAFKA_BROKERS": "KAFKA_BROKER"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_name_that_is_mistyped(beside: Callable[..., Script], tansu: Tansu, topic: str, name: str) -> None:
    """In the environment, and in `.env`."""
    settings = settings_of(name, tansu, topic) | {"KAFKA_TOPICS": "hunter2", "INTERVAL_SECOND": "hunter2"}
    script = beside("kafka_brokers=hunter2\n", name, **settings)
    assert script.wait() == 0, script.tail()
    wanted = [f"{given} is not a setting: did you mean {meant}?" for given, meant in MISTYPED.items()]
    assert sorted(warned(script)) == sorted(wanted)
    assert "hunter2" not in script.stderr


def test_mistakes_are_warnings_of_the_log(beside: Callable[..., Script]) -> None:
    settings = {"LOG_FORMAT": "json", "MAX_EVENTS": 1, "INTERVAL_SECONDS": 0}
    script = beside("nothing\n", TOOL, "--print", MAX_EVENT=5, **settings)
    assert script.wait() == 0, script.tail()
    lines = [json.loads(line) for line in script.stderr_lines]
    assert [line["level"] for line in lines[:3]] == ["WARNING", "WARNING", "INFO"]


def test_mistakes_are_named_where_they_are_the_end(beside: Callable[..., Script]) -> None:
    """What is said to be not set stands there, nearly."""
    login = {"KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "KAFKA_SASL_MECHANISM": "PLAIN", "KAFKA_SASL_USERNAME": "me"}
    script = beside("KAFKA_SASL_PASSWORD hunter2\n", TOOL, KAFKA_SASL_PASSWRD="hunter2", **login)
    assert script.wait() == 2
    assert len(script.stderr_lines) == 3, script.tail()
    told = ("KAFKA_SASL_PASSWRD .*KAFKA_SASL_PASSWORD", r"\.env, line 1: not NAME", "KAFKA_SASL_PASSWORD: not set")
    assert all(re.search(words, script.stderr) for words in told), script.tail()
    assert "hunter2" not in script.stderr


# What stands beside it in a Pod, a compose file, a shell: other programs' business.
FOREIGN = re.findall(
    r"\w+",
    """
    KAFKA_HEAP_OPTS KAFKA_PORT KAFKA_PORT_9092_TCP KAFKA_PORT_9092_TCP_ADDR KAFKA_SERVICE_HOST
    KAFKA_SERVICE_PORT KAFKA_SERVICE_PORT_PLAINTEXT KAFKA_BROKER_SERVICE_HOST KAFKA_BROKER_SERVICE_PORT
    KAFKA_BROKER_PORT KAFKA_BROKER_ID KAFKA_HOME KAFKA_OPTS KAFKA_LOG4J_OPTS KAFKA_JMX_PORT KAFKA_LOG_DIRS
    KAFKA_NODE_ID KAFKA_PROCESS_ROLES KAFKA_LISTENERS KAFKA_ADVERTISED_LISTENERS
    KAFKA_LISTENER_SECURITY_PROTOCOL_MAP KAFKA_INTER_BROKER_LISTENER_NAME KAFKA_CLUSTER_ID
    KAFKA_BOOTSTRAP_SERVERS KAFKA_SECURITY_INTER_BROKER_PROTOCOL KAFKA_SASL_ENABLED_MECHANISMS
    KAFKA_SASL_JAAS_CONFIG KAFKA_SASL_MECHANISM_INTER_BROKER_PROTOCOL KAFKA_SSL_KEYSTORE_LOCATION
    KAFKA_SSL_KEY_CREDENTIALS KAFKA_COMPRESSION_TYPE KAFKA_AUTO_CREATE_TOPICS_ENABLE KAFKA_CFG_NODE_ID
    KAFKA_CLIENT_USERS KAFKA_ENABLE_KRAFT KAFKA_METRICS_ENABLED LOG_DIR LOG_LEVEL_ROOT LOGNAME COMPOSE_PROFILES
    COMPOSE_PROJECT_NAME METRICS_SERVICE_HOST MAX_JOBS SEEDS INTERVAL START SPEED USERS TIMEOUT_SECONDS
    START_TIME END_TIME
    STARTED SHARD TOPIC BROKER HOSTNAME PATH_MAX
    """,
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_other_programs_business(wanted: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same look as a start takes at it."""
    for variable in FOREIGN:
        monkeypatch.setenv(variable, "tcp://10.0.0.7:9092")
    names = [variable.lower() for variable in re.findall("(?m)^  ([A-Z_]+) ", wanted[name])]
    assert "kafka_broker" in names
    told: list[str] = []
    tool.read_variables(names, told.append)
    assert told == []


def test_what_the_documentation_writes_is_no_mistake(beside: Callable[..., Script]) -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([^`]*)`", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    assert len(rows) > 8
    env = "".join(f"{name}={value}\n" for name, value in rows)
    script = beside(env, TOOL, "--print", MAX_EVENTS=1, INTERVAL_SECONDS=0)
    assert script.wait() == 0, script.tail()
    assert warned(script) == []


# ------------------------------------------------------------------------------------------- what quotes are for

# Each value as it is read, and as it is written in `.env`. In single quotes as Docker Compose 2 reads it (compose-go
# 2.16.2), so that one file can be for both.
WRITTEN = {
    "plain": ("a${b}$c", ["a${b}$c", "'a${b}$c'", '"a${b}$c"']),
    "quotes": ('it\'s "it"', ['it\'s "it"', "'it\\'s \"it\"'", '"it\'s \\"it\\""']),
    "backslash": (r"a\nb\\c\d", [r"a\nb\\c\d", r"'a\nb\\c\d'"]),
    "escapes": ("a\nb\\c", [r'"a\nb\\c"', "'a\nb\\c'"]),
    "hash": ("a#b", ["a#b", "'a#b'", '"a#b"', "a#b # a comment", "'a#b' # it's a comment"]),
    "blank and hash": ("a #b", ["'a #b'", '"a #b"']),
    "blanks": (" a ", ["' a '", '" a "']),
    "blanks around": ("a b", [" a b ", "  'a b'  ", "a b\t"]),
    "equals": ("a=b='c'", ["a=b='c'", "'a=b=\\'c\\''"]),
    "at the end": ("a\\", ["a\\"]),
}
ROWS = [pytest.param(value, text, id=text) for value, texts in WRITTEN.values() for text in texts]


@pytest.mark.parametrize(("value", "text"), ROWS)
def test_quotes(value: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text(f"MAX_EVENTS=1\nSEED={text}\nexport LOG_LEVEL={text}\nMETRICS_PORT=1")
    monkeypatch.setattr(tool, "ENV_FILE", tmp_path / ".env")
    for name in ("SEED", "LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    told: list[str] = []
    read = tool.read_variables(["max_events", "seed", "log_level", "metrics_port"], told.append)
    assert (read, told) == ({"max_events": "1", "seed": value, "log_level": value, "metrics_port": "1"}, [])


def test_quotes_as_they_are_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"^\| `NAME=(.*?)` \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    monkeypatch.setattr(tool, "ENV_FILE", tmp_path / ".env")
    monkeypatch.delenv("SEED", raising=False)
    read = []
    for text in rows:
        (tmp_path / ".env").write_text(f"SEED={text}\n")
        read.append(tool.read_variables(["seed"], print)["seed"])
    assert read == [r'a${b} "c" #d\e', r'a${b}"c"#d\e', "a\tb"]


# ---------------------------------------------------------------------------------------------------- secret files


@pytest.fixture
def with_secret(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """with_secret("seed", b"7") -> exit code, output and log of --print, with that file in /run/secrets."""
    if not mounts():
        pytest.skip("no right to make a mount namespace")

    def start(name: str, content: bytes, **settings: object) -> tuple[int, str, str]:
        (tmp_path / name).write_bytes(content)
        mount = f"mount -t tmpfs none /run && mkdir /run/secrets && cp {name} /run/secrets"
        within = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"']
        command = [*within, *command_of(TOOL, [], "--print")]
        return finish(command, clean_environment(MAX_EVENTS=3, INTERVAL_SECONDS=0, **settings), tmp_path)

    return start


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"], ids=["nothing", "newline", "CRLF"])
def test_blanks_belong_to_a_secret_and_the_end_of_the_line_does_not(
    with_secret: Callable[..., tuple[int, str, str]], tmp_path: Path, end: bytes
) -> None:
    code, stdout, stderr = with_secret("seed", b" a b " + end)
    settings = {"MAX_EVENTS": 3, "INTERVAL_SECONDS": 0, "SEED": " a b "}
    wanted = finish(command_of(TOOL, [], "--print"), clean_environment(**settings), tmp_path)[1]
    assert (code, TIMESTAMP.sub("", stdout)) == (0, TIMESTAMP.sub("", wanted)), stderr


def test_a_secret_that_is_no_text(with_secret: Callable[..., tuple[int, str, str]]) -> None:
    code, _, stderr = with_secret("kafka_sasl_password", b"hunter\xe9\n")
    assert (code, stderr) == (2, "settings cannot be read: /run/secrets/kafka_sasl_password: not UTF-8\n")


def test_an_empty_line_of_env_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty value counts as not set, so the secret file does."""
    (tmp_path / ".env").write_text("SEED=\nMAX_EVENTS=''\n")
    for name in ("seed", "max_events"):
        (tmp_path / name).write_text("5\n")
    monkeypatch.setattr(tool, "ENV_FILE", tmp_path / ".env")
    monkeypatch.setattr(tool, "SECRETS_FOLDER", tmp_path)
    for name in ("SEED", "MAX_EVENTS"):
        monkeypatch.delenv(name, raising=False)
    told: list[Any] = []
    assert tool.read_variables(["seed", "max_events"], told.append) == {"seed": "5", "max_events": "5"}
    assert told == []
