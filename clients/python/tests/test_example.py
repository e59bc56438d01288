"""The example worker of the repository, without and with a real server."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import KILLED_WITH_TESTS, Server, poll_until, within_timeout

from streamer import Client, InvalidPayload, events
from streamer.testing import run_handler

EXAMPLE = Path(__file__).parents[3] / "examples" / "workers" / "summarize_text.py"

TEXT = """Tides are the rise and fall of the sea. They are caused by the gravity of the moon and, to a
lesser degree, by that of the sun. When sun and moon pull together, at new and at full moon, the tides
are highest: these are spring tides. Dr. A. Doodson listed 388 tidal frequencies in 1921! Are tides the
same everywhere? No: the shape of a bay can make the tide of the sea many times higher.

Some tides drive power stations. A dam holds the water of the high tide back, and lets it drive
turbines. No fuel has to burn for that."""


def load() -> Any:
    spec = importlib.util.spec_from_file_location("summarize_text", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def test_the_summary_is_the_same_after_a_resume_from_a_checkpoint() -> None:
    handler, task = load().summarize_text, {"text": TEXT, "sentences": 2, "key_terms": 1}
    whole = await run_handler(handler, task)
    assert whole.error is None
    assert whole.result["key_terms"] == [{"term": "tides", "count": 5}]
    assert whole.result["readability"]["sentences"] == 9
    assert len(whole.output) == 2
    assert " ".join(sentence.strip() for sentence in whole.output) == whole.result["summary"]
    percentages = [one.percentage or 0 for one in whole.progress]
    assert percentages == sorted(percentages)
    assert percentages[-1] == 100

    half = await run_handler(handler, task, cancel_when=lambda run: len(run.checkpoints) == 4)
    assert half.cancelled
    rest = await run_handler(handler, task, checkpoint=half.checkpoint, attempt=2)
    assert rest.result == whole.result
    assert len(rest.progress) == len(whole.progress) - 4

    assert isinstance((await run_handler(handler, {"text": " "})).error, InvalidPayload)


async def test_a_failing_token_command_raises() -> None:
    assert await load().command_output("echo token") == "token"
    with pytest.raises(RuntimeError, match="status 3"):
        await load().command_output("echo token; exit 3")


async def test_it_serves_until_sigterm(server: Server, client: Client) -> None:
    environment = {**os.environ, "STREAMER_TOKEN": server.token("worker:*")}
    process = await asyncio.create_subprocess_exec(
        *KILLED_WITH_TESTS, sys.executable, str(EXAMPLE), "--server", server.url, env=environment
    )

    async def is_offered() -> bool:
        return "summarize_text" in [action.name for action in await client.actions()]

    await poll_until(is_offered)
    output: list[events.Output] = []
    result = await within_timeout(
        client.run("summarize_text", {"text": TEXT}, on_output=output.append)
    )
    assert [one.value.strip() for one in output] == [one["text"] for one in result["sentences"]]
    process.terminate()
    assert await within_timeout(process.wait()) == 0
