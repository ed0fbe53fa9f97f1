"""``/v1/embeddings``: the last token's hidden state, of length 1 unless it is asked for as it is."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from research.core.engine.api import EmbedRequest
from research.core.serve.errors import bad
from research.core.serve.schema import EmbeddingRequest
from research.core.serve.service import Service

router = APIRouter()


@router.post("/v1/embeddings", tags=["openai"])
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """OpenAI's embedding interface. ``normalize=false`` leaves the vector's length as it is."""
    service: Service = request.app.state.service
    adapter = service.adapter_of(body.model)
    request.state.entry.note(model=body.model, user=body.user)
    hidden = service.served.engine.spec.hidden
    if body.dimensions is not None and body.dimensions != hidden:
        raise bad("dimensions", f"this model's embeddings have {hidden} numbers; they cannot be shortened")
    requests = [EmbedRequest(tuple(ids), body.normalize, adapter, body.priority) for ids in await _texts(service, body)]
    work = await service.submit(request, requests)
    vectors: list[Any] = [None] * len(requests)
    for index, update, _ in await work.all(request):
        if update.embedding is not None:
            vectors[index] = np.asarray(update.embedding, np.float32)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": work.prompt_tokens, "total_tokens": work.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model or service.served.name, "usage": usage})


async def _texts(service: Service, body: EmbeddingRequest) -> list[list[int]]:
    """Ids of each input; texts end with the token whose state is the embedding (gte's models are trained so)."""
    texts, rows = await service.rows(body.input, "input")
    if texts is not None:
        rows = [[*ids, service.tokenizer.eos_id] for ids in rows]
    longest = max(map(len, rows))
    if longest > service.length_limit:
        raise bad(
            "input", f"{longest} tokens are more than the {service.length_limit} that fit", "context_length_exceeded"
        )
    return rows


def _written(vector: np.ndarray, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
