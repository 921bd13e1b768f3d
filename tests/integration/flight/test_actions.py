"""Actions, polling and sessions, asked with the specification's messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from pyarrow import flight

from fraiseql_pipeline.flight import protocol, session
from fraiseql_pipeline.flight.server import FlightServer
from fraiseql_pipeline.lake import Lake
from tests.integration.flight.conftest import hour, publish
from tests.support.events import lake_events

ALL = b"events:*:2026-11-01T00:00:00Z:2026-11-01T04:00:00Z:10000"
JSON = json.dumps({"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T04:00:00Z"}).encode()


@pytest.fixture
def channel(server: FlightServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


def act(channel: grpc.Channel, name: str, request: Any = None, cookie: str = "") -> tuple[bytes, str | None]:
    """The body of the one result, and the cookie that came with it."""
    body = b"" if request is None else request.SerializeToString()
    method = channel.unary_stream(f"/{protocol.SERVICE}/DoAction")
    call = method(protocol.Action(type=name, body=body).SerializeToString(), metadata=[("cookie", cookie)] if cookie else None)
    [result] = list(call)
    return protocol.Result.FromString(result).body, dict(call.initial_metadata()).get("set-cookie")


def test_the_actions_are_listed_with_what_they_take(client: flight.FlightClient) -> None:
    listed = {action.type: action.description for action in client.list_actions()}
    assert {
        "healthcheck",
        "refresh",
        "warm",
        "CancelFlightInfo",
        "RenewFlightEndpoint",
        "SetSessionOptions",
        "GetSessionOptions",
        "CloseSession",
    } <= set(listed)
    assert all(listed.values())


@pytest.mark.parametrize("name", ["healthcheck", "HealthCheck", "refresh"])
def test_the_state_of_the_lake_is_told(lake: Lake, start_server: Callable[..., FlightServer], name: str) -> None:
    with flight.connect(start_server(lake).url) as client:

        def state() -> dict[str, Any]:
            [result] = client.do_action(name)
            return dict(json.loads(result.body.to_pybytes()))

        assert state() == {"status": "ok", "table_version": None, "complete_through": None}
        commit = publish(lake, hour(0), lake_events(hour(0), 1))
        assert state() == {
            "status": "ok",
            "table_version": commit.table_version,
            "complete_through": hour(0).end.isoformat(),
        }


def test_frames_are_encoded_ahead_and_the_reader_gets_them(lake: Lake, start_server: Callable[..., FlightServer]) -> None:
    publish(lake, hour(0), lake_events(hour(0), 20_000))
    ticket = json.dumps({"type": "events", "entity_type": "*", "start": "2026-11-01", "end": "2026-11-01T01:00:00Z"})
    with flight.connect(start_server(lake).url) as client:
        descriptor = flight.FlightDescriptor.for_command(ticket)
        assert client.get_flight_info(descriptor).total_bytes == -1
        [result] = client.do_action(("warm", ticket.encode()))
        assert json.loads(result.body.to_pybytes()) == {"status": "ok", "rows": 20_000}
        info = client.get_flight_info(descriptor)
        assert info.total_bytes > 0, "the frames are there"
        assert client.do_get(info.endpoints[0].ticket).read_all().num_rows == 20_000
        with pytest.raises(ValueError, match="A ticket must look like"):
            list(client.do_action(("warm", b"no ticket")))


def test_an_action_there_is_not_says_which_there_are(client: flight.FlightClient) -> None:
    with pytest.raises(NotImplementedError, match="There is no such action; this server has healthcheck, refresh"):
        list(client.do_action("drop"))
    with pytest.raises(ValueError, match="This action takes no body"):
        list(client.do_action(("healthcheck", b"body")))


def test_a_poll_is_the_whole_answer(channel: grpc.Channel) -> None:
    request = protocol.FlightDescriptor(type=protocol.CMD, cmd=ALL).SerializeToString()
    poll = protocol.PollInfo.FromString(channel.unary_unary(f"/{protocol.SERVICE}/PollFlightInfo")(request))
    info = protocol.FlightInfo.FromString(channel.unary_unary(f"/{protocol.SERVICE}/GetFlightInfo")(request))
    assert poll.progress == 1.0
    assert not poll.HasField("flight_descriptor"), "nothing more to ask for"
    assert (poll.info.schema, poll.info.total_records) == (info.schema, info.total_records)
    assert len(poll.info.endpoint) == len(info.endpoint)


def test_an_endpoint_is_renewed_and_still_opens_the_same(client: flight.FlightClient, channel: grpc.Channel) -> None:
    info = protocol.FlightInfo.FromString(client.get_flight_info(flight.FlightDescriptor.for_command(ALL)).serialize())
    body, _ = act(channel, "RenewFlightEndpoint", protocol.RenewFlightEndpointRequest(endpoint=info.endpoint[0]))
    renewed = protocol.FlightEndpoint.FromString(body)
    assert client.do_get(flight.Ticket(renewed.ticket.ticket)).read_all().num_rows == 6_000
    stranger = protocol.FlightEndpoint(ticket=protocol.Ticket(ticket=b"not ours"))
    with pytest.raises(grpc.RpcError) as refused:
        act(channel, "RenewFlightEndpoint", protocol.RenewFlightEndpointRequest(endpoint=stranger))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_runs_of_an_info_nobody_reads(client: flight.FlightClient, channel: grpc.Channel) -> None:
    info = protocol.FlightInfo.FromString(client.get_flight_info(flight.FlightDescriptor.for_command(ALL)).serialize())
    body, _ = act(channel, "CancelFlightInfo", protocol.CancelFlightInfoRequest(info=info))
    assert protocol.CancelFlightInfoResult.FromString(body).status == protocol.NOT_CANCELLABLE


def option(name: str, **value: Any) -> Any:
    return protocol.SessionOption(key=name, value=protocol.SessionOptionValue(**value))


def set_options(channel: grpc.Channel, *options: Any, cookie: str = "") -> tuple[dict[str, int], str]:
    body, header = act(channel, "SetSessionOptions", protocol.SetSessionOptionsRequest(session_options=options), cookie)
    assert header is not None
    errors = {error.key: error.value.value for error in protocol.SetSessionOptionsResult.FromString(body).errors}
    return errors, header.partition(";")[0]


def get_options(channel: grpc.Channel, cookie: str) -> dict[str, Any]:
    body, _ = act(channel, "GetSessionOptions", protocol.GetSessionOptionsRequest(), cookie)
    found = protocol.GetSessionOptionsResult.FromString(body).session_options
    return {each.key: getattr(each.value, each.value.WhichOneof("option_value")) for each in found}


def test_session_options_fill_what_tickets_leave_out(channel: grpc.Channel) -> None:
    errors, cookie = set_options(channel, option("batch_size", int64_value=250), option("codec", string_value="none"))
    assert errors == {}
    assert get_options(channel, cookie) == {"batch_size": 250, "codec": "none"}
    get = channel.unary_stream(f"/{protocol.SERVICE}/DoGet")

    def receipt_and_messages(ticket: bytes) -> tuple[dict[str, Any], int]:
        messages = list(get(protocol.Ticket(ticket=ticket).SerializeToString(), metadata=[("cookie", f"a=b; {cookie}")]))
        return json.loads(protocol.FlightData.FromString(messages[-1]).app_metadata), len(messages)

    receipt, count = receipt_and_messages(JSON)
    assert (receipt["rows"], receipt["codec"]) == (6_000, "none")
    assert count >= 6_000 / 250
    assert receipt_and_messages(ALL)[1] < 24, "the ticket's own rows per batch win"

    errors, cookie = set_options(channel, option("batch_size"), option("codec", string_value="lz4"), cookie=cookie)
    assert get_options(channel, cookie) == {"codec": "lz4"}, "an option without a value is unset"
    body, header = act(channel, "CloseSession", protocol.CloseSessionRequest(), cookie)
    assert protocol.CloseSessionResult.FromString(body).status == protocol.CLOSED
    assert header == f"{session.COOKIE}=; Max-Age=0"
    assert get_options(channel, f"{session.COOKIE}=") == {}


def test_a_wrong_option_is_named_and_changes_nothing(channel: grpc.Channel) -> None:
    errors, cookie = set_options(
        channel,
        option("colour", string_value="red"),
        option("codec", string_value="snappy"),
        option("batch_size", string_value="many"),
        option("profile", bool_value=True),
    )
    assert errors == {
        "colour": protocol.INVALID_NAME,
        "codec": protocol.INVALID_VALUE,
        "batch_size": protocol.INVALID_VALUE,
        "profile": protocol.INVALID_VALUE,
    }
    assert get_options(channel, cookie) == {}


@pytest.mark.parametrize("value", ["%%%", "e30", "W10", "bnVsbA", "eyJ4IjoxfQ", "eyJiYXRjaF9zaXplIjowfQ", "A" * 4000])
def test_a_cookie_of_somebody_else_is_refused_or_empty(channel: grpc.Channel, value: str) -> None:
    if value == "e30":  # an empty object
        assert get_options(channel, f"{session.COOKIE}={value}") == {}
        return
    with pytest.raises(grpc.RpcError) as refused:
        get_options(channel, f"{session.COOKIE}={value}")
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not one this server sets" in (refused.value.details() or "")
