"""A worker program for a test that sends it SIGTERM. Its handler waits until it is interrupted.

Prints `connected`, then `running` once its handler runs.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from streamer import Context, Worker


async def get_token() -> str:
    """Returns the token, and starts the task that prints `connected`: the worker calls this
    function on its event loop before it connects."""
    asyncio.get_running_loop().create_task(print_connected())
    return sys.argv[2]


async def print_connected() -> None:
    await worker.connected.wait()
    print("connected", flush=True)


worker = Worker(sys.argv[1], get_token)


@worker.action("waits", max_attempts=1)
async def waits(context: Context, payload: Any) -> None:
    await context.output("first")
    try:
        print("running", flush=True)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await context.save_checkpoint({"saved": "on interruption"})
        raise


worker.run(grace=0)
