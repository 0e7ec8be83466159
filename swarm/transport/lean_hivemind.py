"""Import hivemind's networking without its training stack.

``import hivemind`` pulls in averaging, optimizers and SciPy: 55 MB and most of a second in every server
and client, none of it used here. Its networking modules need nothing from the package's ``__init__``, so
the package is registered without running it (unless somebody has imported all of it already). It still runs
when somebody asks the package for a name, so ``from hivemind import DHT`` goes on working in this process.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def _register_without_running_init() -> Callable[[], None]:
    """Returns what is to be called when the modules we need are imported."""
    spec = importlib.machinery.PathFinder.find_spec("hivemind")
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        raise ImportError("hivemind is not installed: pip install 'hivemind>=1.1.12,<1.2'")
    loader, package = spec.loader, ModuleType("hivemind")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec

    def run_init_and_get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del package.__dict__["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    sys.modules["hivemind"] = package
    return lambda: setattr(package, "__getattr__", run_init_and_get)


_run_init_on_demand: Callable[[], None] = (
    (lambda: None) if "hivemind" in sys.modules else _register_without_running_init()
)

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.p2p.p2p_daemon import P2P  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID, StreamInfo  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError  # noqa: E402
from hivemind.proto import crypto_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

_run_init_on_demand()

__all__ = [
    "DHTID", "P2P", "DHTNode", "DHTRecord", "Multiaddr", "P2PDaemonError", "P2PHandlerError", "PeerID",
    "RecordValidatorBase", "StreamInfo", "crypto_pb2",
]  # fmt: skip
