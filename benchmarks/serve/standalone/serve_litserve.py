"""LitServe: one worker that decodes the observation and returns a constant chunk, by HTTP."""

import sys
from typing import Annotated, Any

import litserve
from fastapi import Body, Response
from lifeline import end_with_parent
from sample import constant_actions, decode, encode


class Constant(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        pass

    def decode_request(self, request: Annotated[bytes, Body()]) -> Any:  # raw bytes: no JSON, no base64
        return decode(request)

    def predict(self, x: Any) -> Any:  # noqa: ARG002 - LitServe's signature
        return constant_actions()

    def encode_response(self, output: Any) -> Response:
        return Response(encode({"actions": output}), media_type="application/octet-stream")


if __name__ == "__main__":
    end_with_parent()
    # fast_queue: ZeroMQ between its processes, the faster of its two ways here
    server = litserve.LitServer(Constant(), accelerator="cpu", timeout=30, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
