"""Ray Serve: one replica that decodes the observation and returns a constant chunk, by HTTP."""

import sys
import threading
from typing import Any

import ray
from lifeline import end_with_parent
from ray import serve
from sample import constant_actions, decode, encode
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=100)
class Constant:
    async def __call__(self, request: Request) -> Any:
        decode(await request.body())
        return Response(encode({"actions": constant_actions()}), media_type="application/octet-stream")


if __name__ == "__main__":
    end_with_parent()
    ray.init(include_dashboard=False, _temp_dir=sys.argv[3], logging_level="warning", _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Constant.bind())  # type: ignore[attr-defined]
    threading.Event().wait()
