"""A conversation in the engine: the prefix cache keeps what the turns share."""

from __future__ import annotations

from research.core.engine.api import Engine, EngineRequest, Update
from research.core.engine.run_all import run_all
from research.core.generation.requests import OnToken, Request, Result
from research.core.generation.session import ChatSession


class EngineSession(ChatSession):
    """:class:`ChatSession` whose answers come from ``engine``. Of a prompt, whole blocks are kept from the turns before."""

    def __init__(self, engine: Engine, *args, adapter: str | None = None, **kwargs):
        super().__init__(engine, *args, **kwargs)
        self.engine, self.adapter = engine, adapter

    def close(self) -> None:
        self.engine.close()

    def _generate(self, request: Request, on_token: OnToken) -> tuple[Result, int]:
        def tell(_: int, update: Update) -> bool:
            return any(bool(on_token(0, token)) for token in update.tokens)

        asked = EngineRequest(tuple(request.prompt), request.sampling, request.max_new_tokens, adapter=self.adapter)
        answer = run_all(self.engine, [asked], tell)[0]
        return Result(answer.ids, answer.reason), answer.cached_tokens
