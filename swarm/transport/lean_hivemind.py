"""Import hivemind's networking without its training stack.

``import hivemind`` pulls in averaging, optimizers and SciPy: 55 MB and most of a second in every server
and client, none of it used here; its packages ``utils`` and ``dht`` import torch, 150 MB in peers that compute nothing.
The networking modules need nothing from the packages' ``__init__``, so these packages are registered without running it
(unless somebody has imported hivemind already). It still runs when somebody asks a package for a name that it
defines, so ``from hivemind import DHT`` goes on working in this process.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

_PACKAGES: Mapping[str, Mapping[str, str]] = {
    "hivemind": {},
    "hivemind.utils": {
        "get_logger": "hivemind.utils.logging",
        "MSGPackSerializer": "hivemind.utils.serializer",
        "SerializerBase": "hivemind.utils.serializer",
        "get_dht_time": "hivemind.utils.timed_storage",
    },
    "hivemind.dht": {},
}
"""Packages whose ``__init__`` is left out, and where the names are that the networking modules take from them."""


def _register_without_running_init(name: str, homes: Mapping[str, str], path: list[str] | None) -> ModuleType:
    """Returns the package, which has its ``__init__`` run when it is asked for a name that is not in `homes`."""
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        raise ImportError("hivemind is not installed: pip install 'hivemind>=1.1.12,<1.2'")
    loader, package = spec.loader, ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec

    def find(attribute: str) -> Any:
        if attribute in homes:
            return getattr(importlib.import_module(homes[attribute]), attribute)
        if attribute.startswith("__") or not _complete:
            raise AttributeError(attribute)
        del package.__dict__["__getattr__"]
        loader.exec_module(package)
        return getattr(package, attribute)

    package.__dict__["__getattr__"] = find
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)
    return package


_complete = False
"""All that is needed here is imported; until then, a name that a package lacks is a submodule to be imported."""

if "hivemind" not in sys.modules:
    _path: list[str] | None = None
    for _name, _homes in _PACKAGES.items():
        _package = _register_without_running_init(_name, _homes, _path)
        _path = _path or list(_package.__path__)

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.p2p.p2p_daemon import P2P  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID, StreamInfo  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError  # noqa: E402
from hivemind.proto import crypto_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402

_complete = True

__all__ = [
    "DHTID", "P2P", "DHTNode", "DHTRecord", "Multiaddr", "P2PDaemonError", "P2PHandlerError", "PeerID",
    "RecordValidatorBase", "StreamInfo", "crypto_pb2",
]  # fmt: skip
