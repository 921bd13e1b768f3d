"""Whether texts are UTF-8: each for itself, not the column as a whole."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fraiseql_pipeline.changelog.utf8 import are_utf8


def texts(*values: bytes | None) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    ("values", "sound"),
    [
        ([], True),
        ([None, b"", None], True),
        ([b"a", None, "ü€𝄞".encode(), b""], True),
        ([b"a", b"\xff"], False),
        ([b"a", b"\xc3"], False),
        ([b"\xc3", b"\xa9"], False),  # together they are é
        ([b"\xe2\x82", b"", None, b"\xac"], False),
        ([b"\xed\xa0\x80"], False),
    ],
)
def test_every_text_must_be_utf_8_by_itself(values: list[bytes | None], sound: bool) -> None:
    column = texts(*values)
    assert are_utf8([pa.array([1]), column]) == sound
    offsets = pa.array([0, len(values)], pa.int32())
    assert are_utf8([pa.ListArray.from_arrays(offsets, column)]) == sound


def test_a_slice_answers_for_its_own_texts() -> None:
    column = texts(b"\xff", "é".encode(), b"b", b"\xc3")
    assert are_utf8([column.slice(1, 2)])
    assert not are_utf8([column.slice(1)])
    assert not are_utf8([column.slice(0, 2)])
