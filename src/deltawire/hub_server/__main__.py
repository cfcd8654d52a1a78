"""The process `HubProcess` starts: serve, and write the URL to the file descriptor it was given."""

import os
import sys

from deltawire.hub_server.serving import serve


def main(arguments: list[str]) -> None:
    """Serve ROOT HOST PORT PAGE_SIZE USERS, telling READY_DESCRIPTOR."""
    root, host, port, page_size, users, ready = arguments
    descriptor = int(ready)

    def tell(url: str) -> None:
        os.write(descriptor, url.encode())
        os.close(descriptor)

    serve(root, host, int(port), page_size=int(page_size), users=users or None, on_ready=tell)


if __name__ == "__main__":
    main(sys.argv[1:])
