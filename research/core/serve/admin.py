"""Models and adapters, whether the server lives, its metrics, and the chat page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from research.core.serve.errors import ApiError
from research.core.serve.metrics import CONTENT_TYPE
from research.core.serve.schema import LoadAdapter, UnloadAdapter
from research.core.serve.service import Service

router = APIRouter()
page = APIRouter(include_in_schema=False)

PAGE = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def _model(service: Service, name: str) -> dict:
    base = service.served.name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qwen-workbench",
        "parent": None if name == base else base,
        "max_model_len": service.length_limit,
    }


@router.get("/v1/models", tags=["openai"])
async def models(request: Request) -> Response:
    """The model and the adapters that can be named in requests."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})


@router.get("/v1/models/{name:path}", tags=["openai"])
async def model(request: Request, name: str) -> Response:
    """One of them."""
    service: Service = request.app.state.service
    service.adapter_of(name)
    return JSONResponse(_model(service, name))


@router.delete("/v1/models/{name:path}", tags=["adapters"])
async def delete_model(request: Request, name: str) -> Response:
    """Unload an adapter, as OpenAI's interface deletes a fine-tuned model."""
    service: Service = request.app.state.service
    if name == service.served.name:
        raise ApiError(403, "the model itself cannot be unloaded")
    await service.unload_adapter(name)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


@router.post("/v1/load_lora_adapter", tags=["adapters"])
async def load_adapter(request: Request, body: LoadAdapter) -> Response:
    """Load an adapter from a folder inside ``serve.adapter_folder``; requests can name it at once."""
    await request.app.state.service.load_adapter(body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", tags=["adapters"])
async def unload_adapter(request: Request, body: UnloadAdapter) -> Response:
    """Unload an adapter that nobody uses now."""
    await request.app.state.service.unload_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/health", tags=["server"])
async def health(request: Request) -> Response:
    """200 while new requests are taken; 503 after SIGTERM, or when the engine has failed."""
    service: Service = request.app.state.service
    if service.ready:
        return JSONResponse({"status": "ready"})
    what = "draining" if service.draining else "failed"
    return JSONResponse({"status": what}, 503)


@router.get("/metrics", tags=["server"])
async def metrics(request: Request) -> Response:
    """Prometheus."""
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE)


@page.get("/")
async def index(request: Request) -> Response:
    return _file("index.html")


@page.get("/page/{name}")
async def asset(request: Request, name: str) -> Response:
    return _file(name)


@page.get("/favicon.ico")
async def icon(request: Request) -> Response:
    return _file("icon.svg")


def _file(name: str) -> Response:
    path = PAGE / name
    if name not in {entry.name for entry in PAGE.iterdir()} or path.suffix not in _TYPES:
        raise ApiError(404, f"there is no page {name[:100]!r}")
    return Response(path.read_bytes(), media_type=_TYPES[path.suffix], headers={"Cache-Control": "no-cache"})
