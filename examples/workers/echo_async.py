#!/usr/bin/env python3
"""Python worker of the built-in action `echo_async`, for tests and load generators. The payload
sets the number of progress reports and output chunks, their interval, the number of failing
attempts, and the result.

    streamer up --set execution.builtin_actions=echo
    export STREAMER_TOKEN=$(streamer token --permissions 'worker:*')
    python examples/workers/echo_async.py

It reads STREAMER_SERVER, STREAMER_TOKEN or STREAMER_TOKEN_FILE, and STREAMER_SLOTS.
"""

from __future__ import annotations

import os
from typing import Any

from streamer import Context, HandlerError, Worker, token_file


async def echo_async(context: Context, payload: dict[str, Any]) -> Any:
    """Runs the number of steps, and fails the number of attempts, that the payload specifies."""
    steps = payload.get("steps", 10)
    delay = payload.get("delay_ms", 0) / 1000
    chunks = payload.get("output_chunks", 0)
    text = "x" * payload.get("chunk_bytes", 64)
    fails = context.attempt <= payload.get("fail_attempts", 0)
    emitted = 0
    for step in range(1, steps // 2 + 1 if fails else steps + 1):
        if delay:
            await context.sleep(delay)
        await context.progress(100 * step / steps, f"step {step} of {steps}")
        while emitted < chunks * step // steps:
            emitted += 1
            await context.output([text])
    if fails:
        raise HandlerError(f"attempt {context.attempt} fails as requested", retryable=True)
    return payload.get("result")


def main() -> None:
    """Runs the worker until SIGTERM or Ctrl-C."""
    server = os.environ.get("STREAMER_SERVER", "http://127.0.0.1:8080")
    slots = int(os.environ.get("STREAMER_SLOTS", "8"))
    file = os.environ.get("STREAMER_TOKEN_FILE")
    token = token_file(file) if file else os.environ["STREAMER_TOKEN"]
    worker = Worker(server, token, slots=slots)
    worker.action("echo_async", max_attempts=10, initial_backoff=0.1)(echo_async)
    worker.run()


if __name__ == "__main__":
    main()
