"""--schema: the same verdict from every validator, types for code generators, and the field that is wrong by name."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import fastjsonschema
import pytest
from auditor_test import BOUNCE, CART, METADATA, VIEW
from conftest import ROOT, clean_environment
from jsonschema import Draft7Validator  # type: ignore[import-untyped]

sys.path.insert(0, str(ROOT))

from random_event_producer import SCHEMA
from test_random_consumer import parse_event

Judge = Callable[[Any], bool]
BRANCHES = SCHEMA["definitions"]
DROPPED = object()
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 1.0, 1.5, 2, 6, 1000, 1001, 10**18, 1e300, "", "1", [], {}, {"a": 1}),
    *("PROD-0042\n", "PROD-042", " PROD-0042", "/home", "home", "/home\n", "Desktop", "desktop", "google", "bounce"),
    *("2026-05-04T00:00:00.000000", "2026-05-04T00:00:00.000000\n", "2026-05-04T00:00:00.000000Z", "2026-05-04"),
]


def event(event_type: Any = "bounce", metadata: Any = BOUNCE, **changes: Any) -> dict[str, Any]:
    timestamp = "2024-01-15T10:30:00.123456"
    return {"user_id": 123, "event_type": event_type, "timestamp": timestamp, "metadata": metadata, **changes}


def printed(script: str, **settings: Any) -> list[Any]:
    command = [sys.executable, str(ROOT / script), "--print"]
    environment = clean_environment(INTERVAL_SECONDS=0, MAX_EVENTS=2000, SEED="schema", **settings)
    output = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout
    return list(map(json.loads, output.splitlines()))


def changed(good: dict[str, Any]) -> Iterator[Any]:
    """The event with each field in turn dropped, or of each value; and with one field more."""
    for inside in (False, True):
        for name in [*(good["metadata"] if inside else good), "extra"]:
            for value in (*VALUES, *METADATA, DROPPED):
                made = copy.deepcopy(good)
                where = made["metadata"] if inside else made
                where[name] = value
                if value is DROPPED:
                    del where[name]
                yield made


def fast(schema: dict[str, Any]) -> Judge:
    validate = fastjsonschema.compile(schema)

    def judge(value: Any) -> bool:
        try:
            validate(value)
        except fastjsonschema.JsonSchemaValueException:
            return False
        return True

    return judge


def test_validators_agree() -> None:
    """On events of both scripts, and on broken ones; of a good event exactly one branch is true."""
    good = printed("random_event_producer.py")
    good += printed("random_churn_producer.py", START_TIME="2026-05-04", END_TIME="2026-06-04")
    own = event("purchase", {"total": 1})
    one_of_each = [own, *(event(event_type, metadata) for event_type, metadata in METADATA.items())]
    values = [*good, *one_of_each, *VALUES, *(made for one in one_of_each for made in changed(one))]
    verdicts = [*map(Draft7Validator(SCHEMA).is_valid, values)]
    assert [*map(fast(SCHEMA), values)] == verdicts
    branches = [[*map(fast(branch), values)] for branch in BRANCHES.values()]
    assert [*map(sum, zip(*branches, strict=True))] == verdicts
    assert all(verdicts[: len(good) + len(one_of_each)])
    assert verdicts.count(False) > 1000


def test_a_branch_for_each_type_and_one_for_all_others() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert [*BRANCHES] == ["AddToCartEvent", "BounceEvent", "ProductViewEvent", "OtherEvent"]
    assert SCHEMA["oneOf"] == [{"$ref": f"#/definitions/{name}"} for name in BRANCHES]
    for name, branch in BRANCHES.items():
        titles = branch["title"], branch["properties"]["metadata"]["title"]
        assert titles == (name, name.replace("Event", "Metadata"))
    types = [branch["properties"]["event_type"] for branch in BRANCHES.values()]
    assert types[:3] == [{"type": "string", "const": name} for name in METADATA]
    assert types[3] == {"type": "string", "minLength": 1, "not": {"enum": [*METADATA]}}


PATTERN = r"must match pattern ^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}$"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (event("add_to_cart", {**CART, "price": "1"}), "metadata.price: must be number"),
        (event("add_to_cart", {**CART, "quantity": 6}), "metadata.quantity: must be smaller than or equal to 5"),
        (event("add_to_cart", {**CART, "product_id": "PROD-00421"}), "metadata.product_id: must match pattern"),
        (event("product_view", {**VIEW, "device": 1}), "metadata.device: must be one of"),
        (event("product_view", {**VIEW, "page": "/home"}), "metadata.page: must be same as const"),
        (event("bounce", CART), "metadata.referrer: is missing"),
        (event(metadata={**BOUNCE, "extra": 1}), "metadata.extra: is not part of such an event"),
        (event(metadata={**BOUNCE, "session_length": 2}), "metadata.session_length: must be smaller than 2"),
        (event(timestamp="2024-01-15T10:30:00.123456Z"), f"timestamp: {PATTERN}"),
        (event(timestamp="2024-01-15T10:30:00.123456\n"), f"timestamp: {PATTERN}"),
        (event(user_id="123"), "user_id: must be integer"),
        (event(extra=1), "extra: is not part of such an event"),
        (event("purchase", {}), "metadata: must contain at least 1 properties"),
        (event("", {"a": 1}), "event_type: must be longer than or equal to 1 characters"),
        (event(None), "event_type: must be string"),
        (event(["bounce"]), "event_type: must be string"),
        ({"user_id": 1}, "event_type: is missing"),
        ([], "event: must be object"),
    ],
    ids=repr,
)
def test_the_auditor_names_the_field(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        parse_event(json.dumps(value).encode())
