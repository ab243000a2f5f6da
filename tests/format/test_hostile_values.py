"""JSON in the place of values that no writer makes: one error, or a value."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiockpt.errors import CheckpointCorruptError
from aiockpt.format.values import MAX_DEPTH, decode_value
from tests.format.valuing import fingerprint, through_json

HOSTILE_JSON: list[Any] = [
    {"~no such type": 1},
    {"~": 1},
    {"~tuple": 1},
    {"~tuple": {"a": 1}},
    {"~tuple": None},
    {"~set": [[1]]},
    {"~set": [{"a": 1}]},
    {"~set": "ab"},
    {"~frozenset": [{"~set": [1]}]},
    {"~dict": [[1]]},
    {"~dict": [[1, 2, 3]]},
    {"~dict": [1]},
    {"~dict": {"a": 1}},
    {"~dict": [[[1], 2]]},
    {"~OrderedDict": "ab"},
    {"~Counter": [[{}, 1]]},
    {"~defaultdict": []},
    {"~defaultdict": ["list"]},
    {"~defaultdict": ["set", []]},
    {"~defaultdict": [["list"], []]},
    {"~defaultdict": [1, []]},
    {"~defaultdict": ["list", [], 1]},
    {"~int": 1},
    {"~int": ""},
    {"~int": "0xg"},
    {"~int": "one"},
    {"~float": "1.5"},
    {"~float": 1.5},
    {"~float": ["nan"]},
    {"~complex": ["1", "2", "3"]},
    {"~complex": [1, 2]},
    {"~complex": ["1", "x"]},
    {"~complex": "12"},
    {"~str": "!!"},
    {"~str": "/w=="},
    {"~str": ["YQ=="]},
    {"~bytes": "YQ="},
    {"~bytes": "ü"},
    {"~bytes": [1]},
    {"~BytesIO": ["YQ==", -1]},
    {"~BytesIO": ["YQ==", "0"]},
    {"~BytesIO": ["YQ==", True]},
    {"~BytesIO": ["YQ==", 1 << 70]},
    {"~BytesIO": "YQ=="},
    {"~datetime": "2026-01-01T00:00:00"},
    {"~datetime": ["2026-13-01T00:00:00", 0, None]},
    {"~datetime": ["2026-01-01T00:00:00", 2, None]},
    {"~datetime": ["2026-01-01T00:00:00", "0", None]},
    {"~datetime": ["2026-01-01T00:00:00", 0, "CET"]},
    {"~datetime": ["2026-01-01T00:00:00+01:00", 0, 5]},
    {"~datetime": ["2026-01-01T00:00:00+25:00", 0, None]},
    {"~datetime": [0, 0, None]},
    {"~Path": 1},
    {"~Path": {"~bytes": "YQ=="}},
    {"~Path": ["a"]},
    [1, [{"a": {"~tuple": 5}}]],
]


@pytest.mark.parametrize("json", HOSTILE_JSON, ids=str)
def test_hostile_json(json: Any) -> None:
    """JSON that no writer makes is an error that names the file, not another exception and not another value."""
    with pytest.raises(CheckpointCorruptError) as caught:
        decode_value(json, file="step-3/manifest.json")
    assert caught.value.file == "step-3/manifest.json"
    assert "step-3/manifest.json" in caught.value.what
    assert caught.value.why
    assert caught.value.next
    assert len(str(caught.value)) < 500


TAGS = [
    *("~tuple", "~set", "~frozenset", "~dict", "~OrderedDict", "~Counter", "~defaultdict"),
    *("~int", "~float", "~complex", "~str", "~bytes", "~BytesIO", "~datetime", "~Path"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(TAGS),
            inner,
            min_size=1,
            max_size=1,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json(json: Any) -> None:
    """Any JSON is a value or the error; what is a value goes there and back."""
    try:
        value = decode_value(json, file="m")
    except CheckpointCorruptError:
        return
    assert fingerprint(through_json(value)) == fingerprint(value)


@pytest.mark.parametrize("opening", ["[", '{"~tuple":[', '{"a":', '{"~dict":[[0,', '{"~set":['])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 300])
def test_deep_json(opening: str, depth: int) -> None:
    """JSON that is nested deeper than any writer nests is refused."""
    closing = opening.translate({ord("["): "]", ord("{"): "}"})[::-1]
    closing = "".join(character for character in closing if character in "]}")
    with pytest.raises(CheckpointCorruptError, match="deeper"):
        decode_value(msgspec.json.decode(opening * depth + "1" + closing * depth), file="m")
