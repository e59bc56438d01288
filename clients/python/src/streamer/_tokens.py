"""Where the token of a call comes from."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

from streamer import _tracing

Token: TypeAlias = "str | Callable[[], Awaitable[str]]"
"""A JWT, or an async callable that returns a fresh one each time."""


def token_file(path: str | os.PathLike[str]) -> Callable[[], Awaitable[str]]:
    """The token in this file, read again each time one is needed: for what is kept fresh by others,
    such as a sidecar or a mounted secret."""

    async def read() -> str:
        return await asyncio.to_thread(Path(path).read_text, encoding="utf-8")

    return read


class BadToken(ValueError):
    """What was given as a token cannot be one. The message does not contain it."""


class TokenSource:
    """Gives out tokens."""

    def __init__(self, token: Token) -> None:
        """Raises `BadToken` when it can be seen that this is none."""
        self._token = _checked(token) if isinstance(token, str) else token

    @property
    def renewable(self) -> bool:
        """Whether asking again may bring another one."""
        return not isinstance(self._token, str)

    async def get(self) -> str:
        """The token, or a fresh one. Raises `BadToken`, and what the caller's function raises."""
        if isinstance(self._token, str):
            return self._token
        return _checked(await self._token())

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a gRPC call."""
        return (("authorization", f"Bearer {await self.get()}"), *_tracing.headers().items())


def _checked(token: object) -> str:
    """The token without the white space around it, such as the line's end in a file."""
    if not isinstance(token, str):
        raise BadToken(f"token: must be a str, is a {type(token).__name__}")
    stripped = token.strip()
    if not stripped:
        raise BadToken("token: must not be empty")
    if not all("!" <= character <= "~" for character in stripped):
        raise BadToken("token: must have visible ASCII characters only")
    return stripped
