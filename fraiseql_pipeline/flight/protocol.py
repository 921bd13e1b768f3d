"""The messages of Arrow Flight, declared from the specification: no generated code, so no generator to match with the runtime.

What lives here: the protobuf messages this server and its tests speak, as descriptors, how a request becomes one, and the name of the
service. What must not: anything that knows events, tickets or gRPC.

Source of the numbers: `Flight.proto` (https://arrow.apache.org/docs/format/Flight.html). A field that is missing here still travels:
protobuf keeps what it does not know. The messages live in a pool of their own, so other libraries may register theirs.

``FlightData`` is the one message that is never built through protobuf on the way out: ``encoding.frame`` writes its bytes, so that
a batch is copied once.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.message import DecodeError

from fraiseql_pipeline.errors import InputError

PACKAGE = "arrow.flight.protocol"
SERVICE = f"{PACKAGE}.FlightService"

#: Message → fields, each ``[repeated] type name = number [in oneof]``, as `Flight.proto` writes them. A map is a repeated entry and an
#: enumeration without a field of its own here is an int32: the same on the wire.
_MESSAGES: dict[str, tuple[str, ...]] = {
    "Action": ("string type = 1", "bytes body = 2"),
    "ActionType": ("string type = 1", "string description = 2"),
    "BasicAuth": ("string username = 2", "string password = 3"),
    "CancelFlightInfoRequest": ("FlightInfo info = 1",),
    "CancelFlightInfoResult": ("int32 status = 1",),
    "CloseSessionRequest": (),
    "CloseSessionResult": ("int32 status = 1",),
    "Criteria": ("bytes expression = 1",),
    "Empty": (),
    "FlightData": (
        "FlightDescriptor flight_descriptor = 1",
        "bytes data_header = 2",
        "bytes app_metadata = 3",
        "bytes data_body = 1000",
    ),
    "FlightDescriptor": ("DescriptorType type = 1", "bytes cmd = 2", "repeated string path = 3"),
    "FlightEndpoint": (
        "Ticket ticket = 1",
        "repeated Location location = 2",
        "google.protobuf.Timestamp expiration_time = 3",
        "bytes app_metadata = 4",
    ),
    "FlightInfo": (
        "bytes schema = 1",
        "FlightDescriptor flight_descriptor = 2",
        "repeated FlightEndpoint endpoint = 3",
        "int64 total_records = 4",
        "int64 total_bytes = 5",
        "bool ordered = 6",
        "bytes app_metadata = 7",
    ),
    "GetSessionOptionsRequest": (),
    "GetSessionOptionsResult": ("repeated SessionOption session_options = 1",),
    "HandshakeRequest": ("uint64 protocol_version = 1", "bytes payload = 2"),
    "HandshakeResponse": ("uint64 protocol_version = 1", "bytes payload = 2"),
    "Location": ("string uri = 1",),
    "PollInfo": (
        "FlightInfo info = 1",
        "FlightDescriptor flight_descriptor = 2",
        "double progress = 3",
        "google.protobuf.Timestamp expiration_time = 4",
    ),
    "PutResult": ("bytes app_metadata = 1",),
    "RenewFlightEndpointRequest": ("FlightEndpoint endpoint = 1",),
    "Result": ("bytes body = 1",),
    "SchemaResult": ("bytes schema = 1",),
    "SessionOption": ("string key = 1", "SessionOptionValue value = 2"),
    "SessionOptionError": ("string key = 1", "SessionOptionErrorValue value = 2"),
    "SessionOptionErrorValue": ("int32 value = 1",),
    "SessionOptionValue": (
        "string string_value = 1 in option_value",
        "bool bool_value = 2 in option_value",
        "sfixed64 int64_value = 3 in option_value",
        "double double_value = 4 in option_value",
        "StringListValue string_list_value = 5 in option_value",
    ),
    "SetSessionOptionsRequest": ("repeated SessionOption session_options = 1",),
    "SetSessionOptionsResult": ("repeated SessionOptionError errors = 1",),
    "StringListValue": ("repeated string values = 1",),
    "Ticket": ("bytes ticket = 1",),
    # Of grpc.health.v1 (https://github.com/grpc/grpc/blob/master/doc/health-checking.md).
    "HealthCheckRequest": ("string service = 1",),
    "HealthCheckResponse": ("int32 status = 1",),
    # Of google.rpc: what a status carries beside its sentence.
    "ErrorStatus": ("int32 code = 1", "string message = 2", "repeated ErrorDetail details = 3"),
    "ErrorDetail": ("string type_url = 1", "bytes value = 2"),
    "RetryInfo": ("Duration retry_delay = 1",),
    "Duration": ("int64 seconds = 1", "int32 nanos = 2"),
}
_ENUMS: dict[str, tuple[str, ...]] = {"DescriptorType": ("UNKNOWN", "PATH", "CMD")}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bytes": _Field.TYPE_BYTES,
    "string": _Field.TYPE_STRING,
    "int64": _Field.TYPE_INT64,
    "int32": _Field.TYPE_INT32,
    "uint64": _Field.TYPE_UINT64,
    "sfixed64": _Field.TYPE_SFIXED64,
    "double": _Field.TYPE_DOUBLE,
    "bool": _Field.TYPE_BOOL,
}


def _field(declaration: str) -> descriptor_pb2.FieldDescriptorProto:
    declaration, _, choice = declaration.partition(" in ")
    *label, kind, name, _, number = declaration.split()
    field = _Field(name=name, number=int(number), label=_Field.LABEL_REPEATED if label else _Field.LABEL_OPTIONAL)
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind in _ENUMS else _Field.TYPE_MESSAGE
        field.type_name = f".{kind}" if "." in kind else f".{PACKAGE}.{kind}"
    if choice:
        field.oneof_index = 0
    return field


def _declare() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="fraiseql_pipeline/flight.proto", package=PACKAGE, syntax="proto3", dependency=["google/protobuf/timestamp.proto"]
    )
    for name, values in _ENUMS.items():
        # `Flight.proto` nests the enumeration in its message; on the wire both are the same number.
        file.enum_type.add(name=name).value.extend(
            descriptor_pb2.EnumValueDescriptorProto(name=value, number=number) for number, value in enumerate(values)
        )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        message.field.extend(_field(declaration) for declaration in fields)
        for choice in sorted({declaration.partition(" in ")[2] for declaration in fields} - {""}):
            message.oneof_decl.add(name=choice)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES}


_CLASSES = _declare()

Action: Any = _CLASSES["Action"]
ActionType: Any = _CLASSES["ActionType"]
BasicAuth: Any = _CLASSES["BasicAuth"]
CancelFlightInfoRequest: Any = _CLASSES["CancelFlightInfoRequest"]
CancelFlightInfoResult: Any = _CLASSES["CancelFlightInfoResult"]
CloseSessionRequest: Any = _CLASSES["CloseSessionRequest"]
CloseSessionResult: Any = _CLASSES["CloseSessionResult"]
Criteria: Any = _CLASSES["Criteria"]
Empty: Any = _CLASSES["Empty"]
FlightData: Any = _CLASSES["FlightData"]
FlightDescriptor: Any = _CLASSES["FlightDescriptor"]
FlightEndpoint: Any = _CLASSES["FlightEndpoint"]
FlightInfo: Any = _CLASSES["FlightInfo"]
GetSessionOptionsRequest: Any = _CLASSES["GetSessionOptionsRequest"]
GetSessionOptionsResult: Any = _CLASSES["GetSessionOptionsResult"]
HandshakeRequest: Any = _CLASSES["HandshakeRequest"]
HandshakeResponse: Any = _CLASSES["HandshakeResponse"]
HealthCheckRequest: Any = _CLASSES["HealthCheckRequest"]
HealthCheckResponse: Any = _CLASSES["HealthCheckResponse"]
Location: Any = _CLASSES["Location"]
PollInfo: Any = _CLASSES["PollInfo"]
PutResult: Any = _CLASSES["PutResult"]
RenewFlightEndpointRequest: Any = _CLASSES["RenewFlightEndpointRequest"]
Result: Any = _CLASSES["Result"]
SchemaResult: Any = _CLASSES["SchemaResult"]
SessionOption: Any = _CLASSES["SessionOption"]
SessionOptionError: Any = _CLASSES["SessionOptionError"]
SessionOptionErrorValue: Any = _CLASSES["SessionOptionErrorValue"]
SessionOptionValue: Any = _CLASSES["SessionOptionValue"]
SetSessionOptionsRequest: Any = _CLASSES["SetSessionOptionsRequest"]
SetSessionOptionsResult: Any = _CLASSES["SetSessionOptionsResult"]
Ticket: Any = _CLASSES["Ticket"]

#: ``FlightDescriptor.type``.
PATH, CMD = (_ENUMS["DescriptorType"].index(name) for name in ("PATH", "CMD"))

#: ``CancelFlightInfoResult.status`` and ``CloseSessionResult.status``.
CANCELLED, NOT_CANCELLABLE = 1, 3
CLOSED = 1

#: ``SetSessionOptionsResult`` errors.
INVALID_NAME, INVALID_VALUE = 1, 2

#: ``HealthCheckResponse.status``.
HEALTH_SERVICE = "grpc.health.v1.Health"
SERVING = 1


def parse(kind: Any, request: bytes) -> Any:
    """The request as a message of this kind. Raises ``InputError``."""
    try:
        return kind.FromString(request)
    except DecodeError:
        raise InputError(f"The request must be a message of type {kind.DESCRIPTOR.full_name}.") from None


def retry_details(code: int, sentence: str, seconds: float) -> bytes:
    """A google.rpc.Status with a google.rpc.RetryInfo: what clients read as the details of an error."""
    whole = int(seconds)
    delay = _CLASSES["Duration"](seconds=whole, nanos=int((seconds - whole) * 1e9))
    info = _CLASSES["RetryInfo"](retry_delay=delay).SerializeToString()
    detail = _CLASSES["ErrorDetail"](type_url="type.googleapis.com/google.rpc.RetryInfo", value=info)
    return _CLASSES["ErrorStatus"](code=code, message=sentence, details=[detail]).SerializeToString()
