"""A laboratory of network namespaces and shaped links on one Linux machine, for tests and benchmarks.

    with Laboratory(["client", "server"], Link(delay_s=0.025, bandwidth_bps=100e6)) as lab:
        server = lab.host("server").start(["swarm-server", "smollm2", "--host", lab.host("server").address])
        with lab.inside("client"):
            ...  # this thread, and the threads and processes that it starts, are on host "client"
        lab.cut("client", "server")

It needs root, ``/dev/net/tun`` and iproute2; ask `netlab_available` first. Import it as ``tests.netlab`` from the root
of the repository.
"""

from tests.netlab.laboratory import Host, Laboratory, netlab_available
from tests.netlab.links import Link

__all__ = ["Host", "Laboratory", "Link", "netlab_available"]
