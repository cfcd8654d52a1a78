#!/bin/sh
# obstore says "already exists" of an object that is not there.
#
# S3 answers 409 ConditionalRequestConflict to a conditional PUT that meets another request for the same key, and
# documents: retry the upload. obstore 0.12.1 (object_store 0.14.2) raises AlreadyExistsError for that 409, as for the 412
# of a key that is taken; of a PUT without any condition, too. Its own retries do not repeat it. Who takes
# AlreadyExistsError for "somebody wrote this key" goes on without the object: stat the key, and try again if it is absent.
#
# Output seen, 2026-11-29:
#   create: AlreadyExistsError
#   overwrite: AlreadyExistsError
#   the object: FileNotFoundError
#
# Exit: 0 as described, 1 if the behaviour changed, 2 if the packages cannot be installed.
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --target "$folder" obstore==0.12.1 || exit 2
PYTHONPATH=$folder python3 - <<'PYTHON'
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import obstore
from obstore.store import S3Store


class Conflict(BaseHTTPRequestHandler):
    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>")

    def do_HEAD(self):
        self.answer(404, b"")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Conflict)
threading.Thread(target=server.serve_forever, daemon=True).start()
keys = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
address = f"http://127.0.0.1:{server.server_port}"
store = S3Store("bucket", endpoint=address, client_options={"allow_http": True}, **keys)


def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "success"


seen = {
    "create": outcome(lambda: obstore.put(store, "key", b"1", mode="create")),
    "overwrite": outcome(lambda: obstore.put(store, "key", b"1")),
    "the object": outcome(lambda: obstore.head(store, "key")),
}
for what, result in seen.items():
    print(f"{what}: {result}")
sys.exit(list(seen.values()) != ["AlreadyExistsError", "AlreadyExistsError", "FileNotFoundError"])
PYTHON
