"""Start the swarm's programs from a process that has imported everything: seconds of imports for each of 200 become ms.

Every peer is still a process of its own, made by fork(2), with its own memory, sockets and signals. Tests of what a
process has in memory, and of its very start, use ordinary child processes.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import json
import os
import queue
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from swarm.transport.daemon import die_with_parent

PROGRAMS = ("swarm.commands.server", "swarm.commands.main")
_MOST_BYTES = 1 << 20
_PATIENCE_S = 120.0


class WarmProcess:
    """What tests use of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.stdout: IO[bytes] | None = None
        self.returncode: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Likewise, as soon as it has ended."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM"""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL"""
        self.send_signal(signal.SIGKILL)

    def ended(self, code: int) -> None:
        """It has."""
        self.returncode = code
        self._ended.set()


class WarmLoopback:
    """A :class:`swarm.commands.local_swarm.Host`: this machine, with the programs imported already."""

    address = "127.0.0.1"

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._parent = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            preexec_fn=die_with_parent(os.getpid()),
        )
        theirs.close()
        self._starting, self._telling = threading.Lock(), threading.Lock()
        self._started: queue.Queue[int] = queue.Queue()
        self._processes: dict[int, WarmProcess] = {}
        self._codes: dict[int, int] = {}
        """Of those that ended before it was known here that they began."""
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, arguments: Sequence[str], **options: Any) -> Any:
        """As :meth:`swarm.commands.local_swarm.Host.start`; programs that are not known here start as usual."""
        if list(arguments[:2]) != [sys.executable, "-m"] or arguments[2] not in PROGRAMS:
            return subprocess.Popen(arguments, **options)
        assert options["stdin"] == subprocess.DEVNULL and options["stdout"] == subprocess.PIPE
        mine, its = os.pipe()
        with Path(os.devnull).open("rb") as nothing:
            files = [nothing.fileno(), its, options["stderr"].fileno()]
            process = self._fork(arguments[2], arguments[3:], dict(os.environ), files)
        os.close(its)
        process.stdout = os.fdopen(mine, "rb", buffering=0)
        return process

    def run(
        self, program: str, *arguments: str, input_: str = "", timeout_s: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """``python -m program …`` to its end."""
        with contextlib.ExitStack() as stack:
            given, out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
            given.write(input_)
            given.seek(0)
            files = [file.fileno() for file in (given, out, err)]
            process = self._fork(program, arguments, {**os.environ, **environment}, files)
            try:
                code = process.wait(timeout_s)
            finally:
                process.kill()
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess([program, *arguments], code, out.read(), err.read())

    def _fork(
        self, program: str, arguments: Sequence[str], environment: Mapping[str, str], files: Sequence[int]
    ) -> WarmProcess:
        request = json.dumps({"program": program, "arguments": arguments, "environment": environment})
        with self._starting:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
            self._ours.sendmsg([request.encode()], rights)
            process = WarmProcess(self._started.get(timeout=_PATIENCE_S))
            with self._telling:
                self._processes[process.pid] = process
                if process.pid in self._codes:
                    process.ended(self._codes.pop(process.pid))
        return process

    def close(self) -> None:
        """Also kills what it started."""
        self._ours.close()
        self._parent.kill()
        self._parent.wait()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while answer := self._ours.recv(_MOST_BYTES):
                told = json.loads(answer)
                if "code" not in told:
                    self._started.put(told["pid"])
                    continue
                with self._telling:
                    if (process := self._processes.pop(told["pid"], None)) is not None:
                        process.ended(told["code"])
                    else:
                        self._codes[told["pid"]] = told["code"]


def _serve(control: socket.socket) -> tuple[str, list[str]]:
    """Fork whenever asked; returns only in the children, with what each is to run."""
    wake, alarm = os.pipe()
    os.set_blocking(alarm, False)
    signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    parent = os.getpid()
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if wake in ready:
                os.read(wake, 4096)
                _tell_who_ended(control)
            if control not in ready:
                continue
            request, ancillary, _, _ = control.recvmsg(_MOST_BYTES, socket.CMSG_SPACE(3 * 4))
            if not request:
                os._exit(0)
            files = array.array("i", ancillary[0][2])
            pid = os.fork()
            if pid == 0:
                break
            for file in files:
                os.close(file)
            control.send(json.dumps({"pid": pid}).encode())
    asked = json.loads(request)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for file in (wake, alarm):
        os.close(file)
    control.close()
    os.setsid()
    arm = die_with_parent(parent)
    if arm is not None:
        arm()
    for target, source in enumerate(files):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(asked["environment"])
    return asked["program"], asked["arguments"]


def _tell_who_ended(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            control.send(json.dumps({"pid": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def main() -> None:
    """Import, and then be forked."""
    programs = {name: importlib.import_module(name) for name in PROGRAMS}
    for name in ("swarm.commands.bootstrap", "swarm.api.app"):
        importlib.import_module(name)
    program, arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [program, *arguments]
    try:
        code = programs[program].main()
    except SystemExit as leaving:
        code = leaving.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))  # undoing all that was imported takes a second


if __name__ == "__main__":
    main()
