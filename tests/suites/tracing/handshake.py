"""Submits a request over a WebSocket whose handshake carries a trace context; prints the trace ID of the
acknowledgment."""

import asyncio
import json
import sys

from websockets import Subprotocol
from websockets.asyncio.client import connect


async def main(url: str, token: str, trace_parent: str) -> None:
    headers = {"authorization": f"Bearer {token}", "traceparent": trace_parent}
    protocols = [Subprotocol("streamer.v1.json")]
    async with connect(url, subprotocols=protocols, additional_headers=headers) as socket:
        await socket.send(json.dumps({"action": "echo_async"}))
        async for message in socket:
            reply = json.loads(message)
            if reply["type"] == "acknowledgment":
                print(reply["trace_id"])
                return


asyncio.run(main(*sys.argv[1:]))
