"""From ``--host`` and ``--port`` to libp2p multiaddrs."""

from __future__ import annotations


def listen_addresses(host: str, port: int, *, quic: bool) -> tuple[str, ...]:
    """The multiaddrs for a host and port.

    QUIC gets through more routers. But the kernel resets a dead process's TCP connections and cannot do so for
    QUIC, so where no router is in the way TCP alone notices deaths sooner.
    """
    family = "ip6" if ":" in host else "ip4"
    tcp = f"/{family}/{host}/tcp/{port}"
    return (tcp, f"/{family}/{host}/udp/{port}/quic-v1") if quic else (tcp,)
