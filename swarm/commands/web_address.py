"""Where a command serves web pages: ``--host``, ``--port``, and the address that one types into a browser."""

from __future__ import annotations

import argparse
import socket

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def add_web_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """``--host`` and ``--port``."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="IP address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {port}; 0: any)")


def url_of(listening: socket.socket) -> str:
    """``http://127.0.0.1:8000``, also for one that listens on all addresses."""
    host, port = listening.getsockname()[:2]
    shown = _ANY.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
