from __future__ import annotations

from urllib.parse import quote

import pytest

from fraiseql_pipeline.errors import FlightBusy, InputError, LakeDamaged, NotAllowed, PipelineError
from fraiseql_pipeline.flight.status import status_of


@pytest.mark.parametrize("character", ["x", "é", "€", "\U0001f600", "\udc80"])
def test_a_sentence_fits_into_the_headers_of_every_client(character: str) -> None:
    sentence = status_of(InputError(character * 5000)).sentence
    assert sentence
    assert len(quote(sentence)) <= 4096, "half of what Java takes: there are other headers"


def test_a_short_sentence_stays_as_it_is() -> None:
    assert status_of(InputError("The column 'größe' is none of an event.")).sentence == "The column 'größe' is none of an event."


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (FlightBusy("The server already sends 64 streams.", 1.0), 0),
        (InputError("A ticket must not be empty."), 0),
        (NotAllowed("It needs the scope read."), 0),
        (LakeDamaged("A file is missing."), 1),
    ],
)
def test_what_a_caller_brings_about_is_no_line_of_the_log(
    error: PipelineError, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert status_of(error).sentence == str(error)
    assert len(caplog.records) == lines
