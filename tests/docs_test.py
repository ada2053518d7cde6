"""The pages: links lead somewhere, the variables are those of --help, commands name files that exist."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml
from conftest import ROOT, clean_environment

TOOL = "random_event_producer.py"
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:    .*\n|\n(?=    ))+)")
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
HTML_LINK = re.compile(r"<(?:a|img|source)\b[^>]*\b(?:href|src|srcset)=\"([^\"]+)\"")
FILE = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|yaml|yml|json|txt)")
TABLE = re.compile(r"^\| *[Vv]ariable *\|.*\n\|[-|: ]+\n((?:\|.*\n)+)", re.MULTILINE)


@functools.cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@functools.cache
def prose(page: str) -> str:
    """The page without its code."""
    return CODE.sub("", INDENTED.sub("", FENCE.sub("", text(page))))


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, code) of each block, fenced or indented."""
    yield from FENCE.findall(text(page))
    for block in INDENTED.findall(FENCE.sub("", text(page))):
        yield "", re.sub(r"^    ", "", block, flags=re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of its code that a shell would take, without comments."""
    code = "".join(code for language, code in blocks(page) if language in ("", "sh", "bash", "shell", "console"))
    lines = re.sub(r"(^|\s)#.*", "", code.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
    return [line.removeprefix("$ ") for line in lines if not line.startswith("{")]


def links(page: str) -> list[str]:
    """The relative ones, pictures too."""
    found = [*LINK.findall(prose(page)), *HTML_LINK.findall(prose(page))]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: str) -> set[str]:
    """Of its headings, as GitHub makes them, and of what has an id."""
    made: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text(page)), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        made[re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")] += 1
    headings = {f"{name}-{n}" if n else name for name, count in made.items() for n in range(count)}
    return headings | set(re.findall(r"\b(?:id|name)=\"([^\"]+)\"", text(page)))


# ------------------------------------------------------------------------------------------------------- links


def leads_somewhere(page: str, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = ((ROOT / page).parent / path if path else ROOT / page).resolve()
    if not (target.exists() and target.is_relative_to(ROOT)):
        return False
    return not anchor or anchor in anchors(target.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert [link for link in links(page) if not leads_somewhere(page, link)] == []


def test_every_picture_is_shown_and_said_in_words() -> None:
    shown = {((ROOT / page).parent / link).resolve() for page in PAGES for link in links(page)}
    assert [path.name for path in sorted(ROOT.glob("docs/*.[ps][nv]g")) if path not in shown] == []
    wordless = re.compile(r"!\[\]\(|<img(?![^>]*\balt=\"[^\"])")
    assert [page for page in PAGES if wordless.search(prose(page))] == []


# --------------------------------------------------------------------------------------------------- variables


@functools.cache
def told_by_help(script: str) -> dict[str, str]:
    """Variable -> default, from the table that --help prints."""
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=30, check=True)
    return dict(re.findall(r"^  ([A-Z_]+) +(\S+) ", done.stdout, re.MULTILINE))


def described() -> dict[str, str]:
    """Variable -> its default, from the tables of the page that has all of them.

    A row may have several variables, and then one default for all or one for each.
    """
    page = "docs/configuration.md" if (ROOT / "docs" / "configuration.md").exists() else "README.md"
    found: dict[str, str] = {}
    for row in "".join(TABLE.findall(text(page))).splitlines():
        first, second, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        names = re.findall(r"`([A-Z_]+)`", first)
        defaults = [value.strip("`") for value in re.split("; |: ", second)[0].split(", ")]
        found |= dict(zip(names, defaults if len(defaults) > 1 else defaults * len(names), strict=True))
    return found


def test_the_tables_are_what_help_says() -> None:
    assert {name: described().get(name) for name in told_by_help(TOOL)} == told_by_help(TOOL)
    assert described().keys() == {name for script in SCRIPTS for name in told_by_help(script)}


@pytest.mark.parametrize("page", PAGES)
def test_commands_set_variables_that_are_there(page: str) -> None:
    known = {"PYTHONPATH", "RESTART_POLICY", *(name for script in SCRIPTS for name in told_by_help(script))}
    ours = [line for line in commands(page) if any(word in line for word in (*SCRIPTS, "docker"))]
    assert {name for line in ours for name in re.findall(r"(?:^|\s)([A-Z][A-Z_]+)=", line)} - known == set()


# ---------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_that_exist(page: str) -> None:
    """Or that a command on the page makes, or that the reader is to make."""
    words = {word.strip("'\"") for line in commands(page) for word in line.split()}
    made = {name for line in commands(page) for name in re.findall(r"(?:>|--output) (\S+)", line)}
    made |= {name for pair in re.findall(r"[Ss]ave it as `([\w.]+)`|`([\w.]+)` is yours", text(page)) for name in pair}
    assert [word for word in sorted(words - made) if FILE.fullmatch(word) and not (ROOT / word).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_the_text_exist(page: str) -> None:
    """`deploy/kubernetes.yaml` and the like: in code style, in a folder of ours."""
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir())
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", FENCE.sub("", text(page)))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_in_a_page_is_python(page: str) -> None:
    for language, code in blocks(page):
        if language == "python":
            compile(code, page, "exec")


def test_profiles_in_commands_exist() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    profiles = {profile for service in services for profile in service.get("profiles", [])}
    used = {name for page in PAGES for line in commands(page) for name in re.findall(r"--profile (\S+)", line)}
    assert used <= profiles | {'"*"'}


def test_the_changelog_begins_with_this_version() -> None:
    command = [sys.executable, str(ROOT / TOOL), "--version"]
    version = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout
    newest = re.findall(r"^## \[([^\]]+)\]", text("CHANGELOG.md"), re.MULTILINE)[0]
    assert newest in ("Unreleased", version.split()[1])
