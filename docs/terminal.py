#!/usr/bin/env python3
"""Draw docs/terminal.svg: the producer, then the auditor, in a terminal, from a real run.

    .venv/bin/python docs/terminal.py

Both scripts run against the embedded broker, on a free port instead of 9092. What they write is drawn as it came; a
line that is too long is broken between words, and one with an event's JSON is cut.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from brokers import Tansu

PICTURE = ROOT / "docs" / "terminal.svg"
COMMANDS = [
    "INTERVAL_SECONDS=1 MAX_EVENTS=6 python random_event_producer.py",
    "TIMEOUT_SECONDS=2 python test_random_consumer.py",
]

COLUMNS = 100
FONT, ROW = 13.5, 19  # px; a letter of any monospaced font is about 0.6 wide
EDGE, BAR = 18, 44
WIDTH = 850  # of a README on GitHub, so that a letter is drawn as large as it is meant

# What is coloured: the first expression that fits a row, its groups in the classes named, the rest plain.
TIME = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ - \w+ - )"
COLOURS = [
    (r"(\$ )(.*)", "prompt command"),
    (TIME + r"(Event sent - .*Type: )(\w+)(, Metadata: )(\{.*)", "dim - type - json"),
    (TIME + r"(Stopped: )(sent \d+)(.*)", "dim - good -"),
    (TIME + r"(.*)", "dim -"),
    (r'(partition .*: )(\{.*"event_type":")(\w+)(".*)', "- json type json"),
    (r"(Run \w+: )(\d+ events)(, .*, )(missing 0)(.*)", "- good - good -"),
    (r"(OK)(: .*)", "good -"),
]
STYLE = f"""\
text {{ font: {FONT}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d5d9e0 }}
.prompt {{ fill: #79b8ff }} .command {{ fill: #ffffff; font-weight: bold }} .dim {{ fill: #868e9c }}
.json {{ fill: #a9b1bf }} .type {{ fill: #e3b778 }} .good {{ fill: #85e08a; font-weight: bold }}"""


def record() -> Iterator[str]:
    """The lines of a run of both commands, each command first."""
    with Tansu() as broker:
        for command in COMMANDS:
            yield f"$ {command}"
            *settings, _, script = command.split()
            done = subprocess.run(
                [sys.executable, str(ROOT / script)],
                env={**os.environ, "KAFKA_BROKER": broker.bootstrap, **dict(item.split("=") for item in settings)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60,
            )
            if done.returncode:
                raise SystemExit(done.stdout)
            yield from (*done.stdout.splitlines(), "")


def rows(line: str) -> list[str]:
    """The line, broken between words; with JSON in it, cut."""
    if "{" in line and len(line) > COLUMNS:
        return [line[: COLUMNS - 1] + "…"]
    return textwrap.wrap(line, COLUMNS, drop_whitespace=False) or [""]


def coloured(row: str) -> str:
    """The row as tspans."""
    for pattern, classes in COLOURS:
        if found := re.fullmatch(pattern, row):
            parts = zip(classes.split(), found.groups(), strict=True)
            return "".join(f'<tspan class="{name}">{html.escape(part, quote=False)}</tspan>' for name, part in parts)
    return html.escape(row, quote=False)


def draw(lines: list[str]) -> str:
    drawn = [row for line in lines for row in rows(line)]
    height = BAR + (len(drawn) - 1) * ROW  # the last row is empty
    texts = "\n".join(
        f'<text x="{EDGE}" y="{BAR + 8 + n * ROW}" xml:space="preserve">{coloured(row)}</text>'
        for n, row in enumerate(drawn)
    )
    dots = "".join(f'<circle cx="{EDGE + 4 + 16 * n}" cy="14" r="5" fill="#4a515e"/>' for n in range(3))
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">
<title>The producer says how many events it sent; the auditor reads as many, and finds that none is missing</title>
<style>
{STYLE}
</style>
<rect width="{WIDTH}" height="{height}" rx="8" fill="#1b1e24"/>
<path d="M0 28V8a8 8 0 0 1 8-8h{WIDTH - 16}a8 8 0 0 1 8 8v20z" fill="#262a32"/>
{dots}
{texts}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(draw(list(record())))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")
