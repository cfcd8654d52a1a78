"""Listens until its standard input ends; the kernel alone answers: ADDRESS PORT."""

import socket
import sys

server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("up", flush=True)
sys.stdin.read()
