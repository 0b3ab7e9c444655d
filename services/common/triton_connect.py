"""The way to a Triton server that its address names; each loads its own library."""

from services.common.engine import EngineError
from services.common.triton_api import Address, Transport


def connect(address: Address) -> Transport:
    """The transport for an address; opens no connection yet. Raises EngineError without the library of gRPC."""
    if address.scheme == "http":
        from services.common.triton_http import HttpTransport

        return HttpTransport(address)
    try:
        from services.common.triton_grpc import GrpcTransport
    except ImportError as error:
        raise EngineError(
            f"{address}: cannot import {error.name}; install it with `pip install 'tritonclient[grpc]'`, "
            "or use http://, which needs nothing more"
        ) from error
    return GrpcTransport(address)
