"""A Hub-compatible bucket server on this machine, for the unmodified `huggingface_hub` and `hf_xet`."""

try:
    from deltawire.hub_server.app import create_app
    from deltawire.hub_server.connections import Bounds
    from deltawire.hub_server.serving import HubProcess, HubServer, serve
    from deltawire.hub_server.store import Stats, Store
except ModuleNotFoundError as error:
    if error.name not in ("starlette", "uvicorn", "h11", "lz4"):
        raise
    raise ImportError(f"the bucket server needs {error.name}: pip install 'deltawire[server]'") from None

__all__ = ["Bounds", "HubProcess", "HubServer", "Stats", "Store", "create_app", "serve"]
