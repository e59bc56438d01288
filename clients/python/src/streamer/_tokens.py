"""Where the token of a call comes from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

Token: TypeAlias = "str | Callable[[], Awaitable[str]]"
"""A JWT, or an async callable that returns a fresh one each time."""


class TokenSource:
    """Gives out tokens."""

    def __init__(self, token: Token) -> None:
        self._token = token

    @property
    def renewable(self) -> bool:
        """Whether asking again may bring another one."""
        return not isinstance(self._token, str)

    async def get(self) -> str:
        """The token, or a fresh one."""
        if isinstance(self._token, str):
            return self._token
        return await self._token()

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of a gRPC call."""
        return (("authorization", f"Bearer {await self.get()}"),)
