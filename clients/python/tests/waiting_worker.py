"""A worker as a program of its own, for a test that sends it SIGTERM: its handler never ends by
itself.

Prints `connected`, then `running` once its handler runs.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from streamer import Context, Worker


async def say_connected() -> str:
    """The token; the worker asks for it before it connects."""
    asyncio.get_running_loop().create_task(report())
    return sys.argv[2]


async def report() -> None:
    await worker.connected.wait()
    print("connected", flush=True)


worker = Worker(sys.argv[1], say_connected)


@worker.action("waits", max_attempts=1)
async def waits(context: Context, payload: Any) -> None:
    await context.output("first")
    try:
        print("running", flush=True)
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await context.save_checkpoint({"said": "goodbye"})
        raise


worker.run(grace=0)
