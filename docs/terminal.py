#!/usr/bin/env python3
"""Draw docs/terminal.svg: the producer and the auditor side by side in a terminal, from a real run.

    .venv/bin/python docs/terminal.py

Both scripts run as the README starts them (the broker is the embedded one); what they write is drawn as it came, and
when it came. The picture is an animation in CSS alone, so that it moves wherever an SVG is shown as an image; where
nothing may move it is its last moment.
"""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "terminal.svg"

EVENTS = 7  # that the auditor sees before Ctrl+C
COLUMNS, ROWS = 62, 31  # of each half
FONT, ROW, LETTER = 10.5, 14.5, 6.32  # px; a letter of any monospaced font is about 0.6 high
EDGE, BAR = 14, 34
WIDTH = 850
HALF = WIDTH / 2
HEIGHT = BAR + ROWS * ROW + EDGE
HOLD_SECONDS = 6.0  # the last moment stays before it begins again

# What is coloured: the first expression that fits, its groups in the classes named, the rest plain.
COLOURS = [
    (r"(\$ )(.*)", "prompt command"),
    (r"(\^C)", "prompt"),
    (r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ - INFO - )(Stopped: )(.*)", "dim good plain"),
    (r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ - \w+ - )(.*Type: )(\w+)(, Metadata: )(\{.*\})(.*)", "dim - type - json -"),
    (r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ - \w+ - )(.*)", "dim -"),
    (r'(partition .*: )(\{.*"event_type":")(\w+)(".*)', "dim json type json"),
    (r"(OK: )(.*)", "good -"),
]
STYLE = """\
text { font: FONTpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #d5d9e0 }
.title { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 11.5px; fill: #8b93a1 }
.prompt { fill: #79b8ff } .command { fill: #ffffff } .dim { fill: #767e8c } .json { fill: #a9b1bf }
.type { fill: #e3b778 } .good { fill: #85c88a }
.line, .page { animation: SECONDSs step-end infinite }
@media (prefers-reduced-motion: reduce) { .line, .page { animation: none } }
"""


@dataclass
class Line:
    """What was written, and when: seconds since the start."""

    at: float
    text: str


class Terminal:
    """One half: a command and what it writes, both streams."""

    def __init__(self, began: float, script: str, **settings: object) -> None:
        assignments = "".join(f"{name}={value} " for name, value in settings.items())
        self.lines = [Line(time.monotonic() - began, f"$ {assignments}python {script}")]
        self._began = began
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / script)],
            env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.lines.append(Line(time.monotonic() - self._began, line.rstrip("\n")))

    def wait_for(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + 60
        while sum(text in line.text for line in self.lines) < count:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("\n".join(line.text for line in self.lines))
            time.sleep(0.02)

    def interrupt(self) -> None:
        self.lines.append(Line(time.monotonic() - self._began, "^C"))
        self._process.send_signal(signal.SIGINT)
        if code := self._process.wait(20):
            raise SystemExit(f"exit code {code}:\n" + "\n".join(line.text for line in self.lines))
        self._reader.join()
        self.lines.append(Line(time.monotonic() - self._began + 0.3, "$ "))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def record() -> tuple[list[Line], list[Line]]:
    """The lines of a run of both scripts."""
    began = time.monotonic()
    producer = Terminal(began, "random_event_producer.py", KAFKA_BROKER="embedded", INTERVAL_SECONDS=1)
    try:
        producer.wait_for("Event sent")
        auditor = Terminal(began, "test_random_consumer.py")
        try:
            auditor.wait_for("partition ", EVENTS)
            auditor.interrupt()
        finally:
            auditor.kill()
        time.sleep(1)
        producer.interrupt()
    finally:
        producer.kill()
    return producer.lines, auditor.lines


def coloured(text: str) -> Iterator[tuple[str, str]]:
    """(class, text) of each part."""
    for pattern, classes in COLOURS:
        if found := re.fullmatch(pattern, text):
            yield from zip(classes.split(), found.groups(), strict=True)
            return
    yield "-", text


def wrapped(text: str) -> Iterator[str]:
    """The rows of a line, as tspans: broken where a terminal breaks it."""
    row, column = "", 0
    for name, part in coloured(text):
        while part:
            here, part = part[: COLUMNS - column], part[COLUMNS - column :]
            here, column = html.escape(here, quote=False), column + len(here)
            row += here if name in ("-", "plain") else f'<tspan class="{name}">{here}</tspan>'
            if column == COLUMNS:
                yield row
                row, column = "", 0
    if row or not text:
        yield row


def half(name: str, lines: list[Line], left: float, seconds: float) -> tuple[str, str]:
    """(CSS, SVG) of one terminal: lines that appear, and a page that moves up when it is full."""
    css, svg, top, moves = [], [], 0, ["0%{transform:translateY(0)}"]
    for number, line in enumerate(lines):
        share = f"{100 * line.at / seconds:.2f}%"
        rows = [(top + n + 1, row) for n, row in enumerate(wrapped(line.text))]
        texts = "".join(f'<text x="0" y="{n * ROW - 4:g}" xml:space="preserve">{row}</text>' for n, row in rows)
        svg.append(f'<g class="line" style="animation-name:{name}{number}">{texts}</g>')
        css.append(f"@keyframes {name}{number}{{0%{{opacity:0}}{share},100%{{opacity:1}}}}")
        top += len(rows)
        if top > ROWS:
            moves.append(f"{share}{{transform:translateY({(ROWS - top) * ROW:g}px)}}")
    last = f"translateY({min(0, ROWS - top) * ROW:g}px)"
    css.append(f"@keyframes {name}{{{''.join(moves)}100%{{transform:{last}}}}}")
    page = f'<g class="page" style="animation-name:{name};transform:{last}">{"".join(svg)}</g>'
    view = f'<svg x="{left + EDGE}" y="{BAR}" width="{COLUMNS * LETTER + 4:g}" height="{ROWS * ROW:g}">{page}</svg>'
    return "\n".join(css), view


def draw(producer: list[Line], auditor: list[Line]) -> str:
    start = producer[0].at
    for line in (*producer, *auditor):
        line.at -= start
    seconds = max(line.at for line in (*producer, *auditor)) + HOLD_SECONDS
    left_css, left = half("p", producer, 0, seconds)
    right_css, right = half("a", auditor, HALF, seconds)
    dots = "".join(f'<circle cx="{18 + 16 * n}" cy="14" r="5" fill="#3a404c"/>' for n in range(3))
    style = STYLE.replace("FONT", f"{FONT:g}").replace("SECONDS", f"{seconds:.2f}")
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT:g}" viewBox="0 0 {WIDTH} {HEIGHT:g}" role="img">
<title>The producer sends an event a second; the auditor reads each, and finds at the end that none is missing</title>
<style>
{style}{left_css}
{right_css}
</style>
<rect width="{WIDTH}" height="{HEIGHT:g}" rx="8" fill="#1b1e24"/>
<path d="M0 {BAR - 6}V8a8 8 0 0 1 8-8h{WIDTH - 16}a8 8 0 0 1 8 8v{BAR - 14}z" fill="#262a32"/>
{dots}
<text class="title" x="{HALF / 2 + 30}" y="18" text-anchor="middle">the producer</text>
<text class="title" x="{HALF * 1.5}" y="18" text-anchor="middle">the auditor</text>
<path d="M{HALF} {BAR - 6}V{HEIGHT:g}" stroke="#343a45"/>
{left}
{right}
</svg>
"""


if __name__ == "__main__":
    PICTURE.write_text(draw(*record()))
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")
