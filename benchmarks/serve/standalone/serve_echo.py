"""The least that an openpi server does: decode, constant actions, encode. What any other one costs above this is its
own."""

import asyncio
import sys
import time

from lifeline import end_with_parent
from sample import constant_actions, decode, encode
from websockets.asyncio.server import ServerConnection, serve


async def answer(connection: ServerConnection) -> None:
    await connection.send(encode({}))
    async for data in connection:
        assert isinstance(data, bytes)
        start = time.perf_counter()
        decode(data)
        actions = constant_actions()
        timing = {"infer_ms": 1000 * (time.perf_counter() - start)}
        await connection.send(encode({"actions": actions, "server_timing": timing}))


async def main(port: int) -> None:
    async with serve(answer, "127.0.0.1", port, compression=None, max_size=None) as server:
        await server.serve_forever()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(main(int(sys.argv[1])))
