"""The application that answers HTTP: the Hub's bucket routes and Xet's content routes over one store."""

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from deltawire.errors import DeltaWireError
from deltawire.hub_server import bucket_routes, cas_routes, hub_routes
from deltawire.hub_server.access import Access
from deltawire.hub_server.answers import (
    RangeNotSatisfiable,
    RequestIds,
    WholeAddresses,
    http_refusal,
    nobody_there,
    range_refusal,
    refusal,
)
from deltawire.hub_server.events import Feed
from deltawire.hub_server.grants import Grants
from deltawire.hub_server.home import Home, routes
from deltawire.hub_server.store import Store
from deltawire.hub_server.users import Users

Inject = Callable[[Request], Response | None]
"""what a test has the server answer instead, if anything; it cannot be reached over the network"""


class Faults:
    """Answers what `inject` says, where it says anything."""

    def __init__(self, app: ASGIApp, inject: Inject) -> None:
        self._app, self._inject = app, inject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        injected = self._inject(Request(scope)) if scope["type"] == "http" else None
        await (injected or self._app)(scope, receive, send)


def create_app(
    store: Store,
    *,
    page_size: int = 1000,
    users: Users | None = None,
    faults: Inject = lambda request: None,
    home: Home | None = None,
) -> Starlette:
    """An ASGI application over `store`, which stays the caller's to close. Listings have `page_size` items a page.

    `users` are those who may use it; without them, anyone who reaches it. `faults` may answer in the server's place.
    `home` is the page at /, which anyone may see.
    """
    app = Starlette(
        routes=[*(routes(home) if home else ()), *hub_routes.ROUTES, *cas_routes.ROUTES, *bucket_routes.ROUTES],
        middleware=[Middleware(WholeAddresses), Middleware(RequestIds), Middleware(Faults, inject=faults)],
        exception_handlers={
            RangeNotSatisfiable: range_refusal,
            DeltaWireError: refusal,
            HTTPException: http_refusal,
            ClientDisconnect: nobody_there,
        },
    )
    app.router.redirect_slashes = False
    app.state.store = store
    app.state.access = Access(users, store.secret)
    app.state.feed = Feed()
    app.state.grants = Grants()
    app.state.page_size = page_size
    app.state.home = home
    return app
