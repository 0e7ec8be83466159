#!/usr/bin/env python3
"""A container's health check: exit code 0 if what ``$SWARM_HEALTH`` names (``tcp://…`` or ``http://…``) answers."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

_PATIENCE_S = 4.0


def main() -> int:
    """Returns 1, with the reason on stderr, if it does not."""
    url = os.environ["SWARM_HEALTH"]
    try:
        if url.startswith("tcp:"):
            where = urlsplit(url)
            socket.create_connection((where.hostname, where.port), _PATIENCE_S).close()
        else:
            urllib.request.urlopen(url, timeout=_PATIENCE_S).close()  # raises for a status of 400 and above
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
