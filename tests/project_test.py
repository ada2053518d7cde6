"""The files for GitHub and for pre-commit, against the schemas that check-jsonschema brings: nothing is fetched."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT


def check(*command: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*"),
        ("vendor.dependabot", ".github/dependabot.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*"),
        ("vendor.compose-spec", "docker-compose.yml"),
    ],
)
def test_a_file_fits_its_schema(schema: str, pattern: str) -> None:
    check("check_jsonschema", "--builtin-schema", schema, *ROOT.glob(pattern))  # without a file it is an error


def test_pre_commit_accepts_its_configuration() -> None:
    check("pre_commit", "validate-config", ".pre-commit-config.yaml")
