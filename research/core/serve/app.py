"""The application: routes, errors and the gate around them, for one :class:`Service`."""

from __future__ import annotations

from fastapi import FastAPI

from research.core.serve import admin, chat, completions, embeddings, errors, tgi
from research.core.serve.gate import Gate
from research.core.serve.service import Service


def create_app(service: Service) -> Gate:
    """The ASGI application. FastAPI's own pages, which load scripts from elsewhere, are off; ``/openapi.json`` stays."""
    app = FastAPI(title="Qwen Workbench", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    routers = [chat.router, completions.router, embeddings.router, tgi.router, admin.router]
    if service.settings.page:
        routers.append(admin.page)
    for router in routers:
        app.include_router(router)
    errors.install(app)
    known = frozenset(route.path for router in routers for route in router.routes if "{" not in route.path)
    return Gate(app, service.settings, service.served.api_keys, service.metrics, known)
