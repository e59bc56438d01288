"""Token sources."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

from streamer import _tracing

Token: TypeAlias = "str | Callable[[], Awaitable[str]]"
"""A JWT, or an async callable that returns a fresh one on each call."""


def token_file(path: str | os.PathLike[str]) -> Callable[[], Awaitable[str]]:
    """Returns a token source that reads the file at `path` each time a token is needed. Use it for
    a file that a sidecar or a mounted secret keeps up to date."""

    async def read() -> str:
        return await asyncio.to_thread(Path(path).read_text, encoding="utf-8")

    return read


class InvalidToken(ValueError):
    """The token is malformed. The message does not contain the token."""


class TokenSource:
    """Provides tokens for calls."""

    def __init__(self, token: Token) -> None:
        """Raises `InvalidToken` if `token` is a malformed string."""
        self._token = _validated(token) if isinstance(token, str) else token

    @property
    def renewable(self) -> bool:
        """Whether the source can return a fresh token."""
        return not isinstance(self._token, str)

    async def get(self) -> str:
        """Returns the current token. Raises `InvalidToken`, and the exceptions of the application's
        function."""
        if isinstance(self._token, str):
            return self._token
        return _validated(await self._token())

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a gRPC call: the token and the trace context."""
        return (("authorization", f"Bearer {await self.get()}"), *_tracing.headers().items())


def _validated(token: object) -> str:
    """Returns the token without surrounding white space, such as the final newline of a file."""
    if not isinstance(token, str):
        raise InvalidToken(f"token: must be a str, is a {type(token).__name__}")
    stripped = token.strip()
    if not stripped:
        raise InvalidToken("token: must not be empty")
    if not all("!" <= character <= "~" for character in stripped):
        raise InvalidToken("token: must contain visible ASCII characters only")
    return stripped
