"""A Hub-compatible bucket server on this machine: the unmodified `huggingface_hub` and `hf_xet` talk to it when
`HF_ENDPOINT` names its URL, so the code that runs against the Hub runs on a laptop and in CI.

    with HubServer("buckets") as hub:
        HfApi(endpoint=hub.url, token="any").create_bucket("me/run")
"""

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
