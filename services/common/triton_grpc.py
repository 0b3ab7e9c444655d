"""Triton over gRPC, with the messages of the tritonclient package."""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from services.common.triton_api import Address, Call, Part, TritonError, refusal

_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # a robot waits: after a restart the next try comes at once, not after gRPC's usual seconds to minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel takes over the connection of the old one
]
_DOWN = (
    grpc.ChannelConnectivity.IDLE,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
    grpc.ChannelConnectivity.SHUTDOWN,
)
# gRPC says UNAVAILABLE of a server that is not there, and Triton of a model that is not: only the words differ
_OF_THE_CHANNEL = ("connect", "socket", "reset", "goaway", "broken pipe", "endpoint", "ping timeout", "dns", "stream")
_UNANSWERED = 2  # calls in a row
_ABSENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND)


class GrpcTransport:
    """See `Transport`. One channel, which reconnects by itself; and another one when calls on it get no answer, for a
    connection can be gone without a word (Triton ends connections that ping it more than once in five minutes)."""

    def __init__(self, address: Address) -> None:
        self._target = f"{address.host}:{address.port}"
        self._losses = 0
        self._unanswered = 0
        self._open()

    def _open(self) -> None:
        self._channel = grpc.insecure_channel(self._target, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._channel.subscribe(self._watch)

    @property
    def losses(self) -> int:
        """See `Transport.losses`."""
        return self._losses

    def ready(self, model: str, version: str, timeout_s: float) -> bool:
        """See `Transport.ready`."""
        try:
            request = pb.ModelReadyRequest(name=model, version=version)
            return bool(self._ask("ModelReady", request, timeout_s).ready)
        except TritonError as error:
            if error.reason in ("unreachable", "timeout"):
                raise
            return False

    def config(self, model: str, version: str, timeout_s: float) -> Mapping[str, Any]:
        """See `Transport.config`."""
        answer = self._ask("ModelConfig", pb.ModelConfigRequest(name=model, version=version), timeout_s)
        return dict(MessageToDict(answer.config, preserving_proto_field_name=True))

    def load(self, model: str, timeout_s: float) -> None:
        """See `Transport.load`."""
        self._ask("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=model), timeout_s)

    def unload(self, model: str, timeout_s: float) -> None:
        """See `Transport.unload`."""
        self._ask("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=model), timeout_s)

    def register(self, region: str, key: str, size: int, timeout_s: float) -> None:
        """See `Transport.register`."""
        request = pb.SystemSharedMemoryRegisterRequest(name=region, key=key, offset=0, byte_size=size)
        self._ask("SystemSharedMemoryRegister", request, timeout_s)

    def unregister(self, region: str, timeout_s: float) -> None:
        """See `Transport.unregister`."""
        request = pb.SystemSharedMemoryUnregisterRequest(name=region)
        self._ask("SystemSharedMemoryUnregister", request, timeout_s)

    def infer(self, call: Call, timeout_s: float) -> dict[str, bytes | memoryview]:
        """See `Transport.infer`."""
        request = pb.ModelInferRequest(model_name=call.model, model_version=call.version)
        request.parameters["timeout"].int64_param = call.timeout_us
        if call.priority is not None:
            request.parameters["priority"].uint64_param = call.priority
        for part in call.inputs:
            item = request.inputs.add(name=part.tensor.name, datatype=part.tensor.datatype, shape=part.shape)
            _place(part, item)
            if part.data is not None:
                request.raw_input_contents.append(part.data.tobytes())
        for part in call.outputs:
            _place(part, request.outputs.add(name=part.tensor.name))
        metadata = None if call.traceparent is None else (("traceparent", call.traceparent),)
        answer = self._ask("ModelInfer", request, timeout_s, metadata)
        return {item.name: data for item, data in zip(answer.outputs, answer.raw_output_contents, strict=False)}

    def close(self) -> None:
        self._channel.close()

    def _ask(self, method: str, request: Any, timeout_s: float, metadata: Any = None) -> Any:
        if timeout_s <= 0:
            raise TritonError("timeout", "no time left to ask")
        if self._unanswered >= _UNANSWERED:
            self._unanswered = 0
            self._losses += 1
            self._open()  # the old one ends with the last call on it
        try:
            answer = getattr(self._stub, method)(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise self._translate(error, timeout_s) from error
        self._unanswered = 0
        return answer

    def _translate(self, error: Any, timeout_s: float) -> TritonError:
        code, detail = error.code(), str(error.details())
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            self._unanswered += 1
            return TritonError("timeout", f"no answer within {timeout_s:.3f} s")
        lost = code is grpc.StatusCode.UNAVAILABLE and any(word in detail.lower() for word in _OF_THE_CHANNEL)
        if lost or code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN):
            self._losses += 1
            return TritonError("unreachable", f"{code.name}: {detail}")
        return refusal(detail, unavailable=code in _ABSENT)

    def _watch(self, state: grpc.ChannelConnectivity) -> None:
        if state in _DOWN:
            self._losses += 1


def _place(part: Part, item: Any) -> None:
    if part.region is not None:
        item.parameters["shared_memory_region"].string_param = part.region
        item.parameters["shared_memory_offset"].int64_param = part.offset
        item.parameters["shared_memory_byte_size"].int64_param = part.nbytes
