"""The application that answers HTTP: the Hub's bucket routes and Xet's content routes over one store."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from deltawire.errors import DeltaWireError
from deltawire.hub_server import cas_routes, hub_routes
from deltawire.hub_server.answers import (
    RangeNotSatisfiable,
    RequestIds,
    http_refusal,
    nobody_there,
    range_refusal,
    refusal,
)
from deltawire.hub_server.grants import Grants
from deltawire.hub_server.store import Store


def create_app(store: Store, *, page_size: int = 1000) -> Starlette:
    """An ASGI application over `store`, which stays the caller's to close. Listings have `page_size` items a page."""
    app = Starlette(
        routes=[*hub_routes.ROUTES, *cas_routes.ROUTES],
        middleware=[Middleware(RequestIds)],
        exception_handlers={
            RangeNotSatisfiable: range_refusal,
            DeltaWireError: refusal,
            HTTPException: http_refusal,
            ClientDisconnect: nobody_there,
        },
    )
    app.router.redirect_slashes = False
    app.state.store = store
    app.state.grants = Grants()
    app.state.page_size = page_size
    return app
