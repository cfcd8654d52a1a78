"""Prints the HTTP status of an address: URL KEY."""

import sys
import urllib.error
import urllib.request

headers = {"Authorization": f"Bearer {sys.argv[2]}"}
try:
    print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers), timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
