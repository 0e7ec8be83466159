"""How well the laboratory keeps its word on this machine: ``python -m tests.netlab.accuracy``."""

from __future__ import annotations

import json
import math
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from tests.netlab import Laboratory, Link

_CHUNK_BYTES = 1 << 18
_SO_TIMESTAMPNS = 35


def main() -> None:
    """Measure, and print one JSON object."""
    figures: dict[str, float] = {}
    with Laboratory(["a", "b"]) as lab:
        relay = psutil.Process(lab.relay_pid)
        for name, delay_s, busy in [("0", 0.0, 0), ("2.5ms", 0.0025, 0), ("50ms", 0.05, 0), ("2.5ms_busy", 0.0025, 2)]:
            lab.set_link("a", "b", Link(delay_s=delay_s))
            with busy_processes(busy):
                errors_us = [1e6 * (delay - delay_s) for delay in one_way_delays_s(lab, 300)]
            figures[f"late_{name}_median_us"] = statistics.median(errors_us)
            figures[f"late_{name}_p95_us"] = statistics.quantiles(errors_us, n=20)[-1]
        for name, bandwidth_bps in [("free", math.inf), ("1G", 1e9), ("100M", 1e8), ("20M", 2e7)]:
            lab.set_link("a", "b", Link(delay_s=0.005, bandwidth_bps=bandwidth_bps))
            before_s = sum(relay.cpu_times()[:2])
            start_s = time.monotonic()
            figures[f"tcp_{name}_mbps"] = tcp_throughput_bps(lab, "a", "b", 2.0) / 1e6
            used_s = sum(relay.cpu_times()[:2]) - before_s
            figures[f"relay_cpu_{name}_share"] = used_s / (time.monotonic() - start_s)
        lab.set_link("a", "b", Link())
        figures["datagrams_per_s"] = datagrams_per_s(lab, 1.0)
        time.sleep(1)
        before = relay.cpu_times()
        switches = relay.num_ctx_switches().voluntary
        time.sleep(3)
        figures["relay_cpu_idle_share"] = (sum(relay.cpu_times()[:2]) - sum(before[:2])) / 3
        figures["relay_idle_wakeups_per_s"] = (relay.num_ctx_switches().voluntary - switches) / 3
    print(json.dumps({key: round(value, 4) for key, value in figures.items()}, indent=2))


def one_way_delays_s(lab: Laboratory, count: int, *, gap_s: float = 0.002) -> list[float]:
    """Send small datagrams from host a to host b, one at a time, and say how long each one took.

    Arrivals are timed by the receiving kernel: how long a program then takes to wake up is not the link's doing.
    """
    with lab.inside("b"):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        receiver.bind((lab.host("b").address, 0))
        receiver.settimeout(5)
    with lab.inside("a"):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    delays_s = []
    with sender, receiver:
        for _ in range(count):
            sent_ns = time.time_ns()
            sender.sendto(b"x" * 100, receiver.getsockname())
            _, [(_, _, stamp)], _, _ = receiver.recvmsg(200, 100)
            seconds, nanoseconds = struct.unpack("qq", stamp)
            delays_s.append((seconds * 10**9 + nanoseconds - sent_ns) / 1e9)
            time.sleep(gap_s)
    return delays_s


def tcp_throughput_bps(lab: Laboratory, source: str, target: str, duration_s: float) -> float:
    """Payload bits per second of one TCP connection, from its first byte on, slow start left out."""
    with lab.inside(target):
        listener = socket.create_server((lab.host(target).address, 0))
    with lab.inside(source):
        sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    stop = threading.Event()

    def send() -> None:
        chunk = bytes(_CHUNK_BYTES)
        while not stop.is_set():
            sender.sendall(chunk)

    thread = threading.Thread(target=send)
    thread.start()
    buffer = bytearray(_CHUNK_BYTES)
    warm_s = time.monotonic() + duration_s / 2
    while time.monotonic() < warm_s:
        receiver.recv_into(buffer)
    received, start_s = 0, time.monotonic()
    while (now_s := time.monotonic()) < warm_s + duration_s:
        received += receiver.recv_into(buffer)
    stop.set()
    while thread.is_alive():
        receiver.recv_into(buffer)
    for end in (sender, receiver, listener):
        end.close()
    return received * 8 / (now_s - start_s)


def datagrams_per_s(lab: Laboratory, duration_s: float) -> float:
    """How many datagrams of 1400 bytes get through when more are sent: those do not come in bursts."""
    with lab.inside("b"):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((lab.host("b").address, 0))
        receiver.settimeout(0.3)
    with lab.inside("a"):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    end_s = time.monotonic() + duration_s

    def send() -> None:
        while time.monotonic() < end_s:
            sender.sendto(bytes(1400), receiver.getsockname())

    thread = threading.Thread(target=send)
    thread.start()
    received = 0
    with sender, receiver, suppress(TimeoutError):
        while time.monotonic() < end_s:
            receiver.recv(1400)
            received += 1
        thread.join()
    return received / duration_s


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
