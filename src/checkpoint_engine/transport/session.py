"""The socket that a worker connects to: a Unix socket in a private directory, and the check of who connects.

One socket carries messages, descriptors, the peer's credentials and the news of its death (end of file).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from checkpoint_engine.devices.base import Closing
from checkpoint_engine.errors import CheckpointEngineError, PeerLostError, ProtocolError, SettingsError
from checkpoint_engine.settings import Settings
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.messages import Abort, FromServer, FromWorker, Hello

SCHEME = "ipc://"
MAX_PATH = 107  # bytes of a Unix socket's path
_count = itertools.count()

WorkerChannel = Channel[FromWorker]
ServerChannel = Channel[FromServer]


def prepare_directory(settings: Settings) -> Path:
    """Make the socket directory, or check that the one that is there is ours, and sweep out what the dead left.

    Raises SettingsError when it belongs to someone else or is open to more users than the settings allow.
    """
    path = settings.socket_dir
    try:
        path.mkdir(mode=settings.socket_dir_mode, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as e:
        raise SettingsError(f"socket directory {path} cannot be made: {e}") from e
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise SettingsError(f"socket directory {path} is not a directory of user {os.getuid()}; set CHECKPOINT_ENGINE_SOCKET_DIR")
    if stat.S_IMODE(status.st_mode) & ~settings.socket_dir_mode:
        raise SettingsError(
            f"socket directory {path} has mode {stat.S_IMODE(status.st_mode):o}, looser than {settings.socket_dir_mode:o}: "
            "tighten it or set CHECKPOINT_ENGINE_SOCKET_DIR_MODE"
        )
    for entry in path.glob(f"{_pid_namespace()}-*.sock"):
        if (match := re.match(r"\d+-(\d+)-", entry.name)) and not Path(f"/proc/{match[1]}").exists():
            entry.unlink(missing_ok=True)
    return path


def _pid_namespace() -> int:
    """Containers that share the directory have each their own pids: what looks dead there may live here."""
    return os.stat("/proc/self/ns/pid").st_ino


class SessionListener(Closing):
    """Accepts workers on `handle` until closed. `greeted(channel, hello)` gets each that introduced itself properly,
    `failed(error)` what went wrong with one that did not; both are called on threads of the listener."""

    def __init__(
        self,
        settings: Settings,
        rank: int,
        greeted: Callable[[WorkerChannel, Hello], None],
        failed: Callable[[CheckpointEngineError], None],
    ) -> None:
        self._settings, self._rank, self._greeted, self._failed = settings, rank, greeted, failed
        self._path = prepare_directory(settings) / f"{_pid_namespace()}-{os.getpid()}-{next(_count)}.sock"
        if len(os.fsencode(self._path)) > MAX_PATH:
            raise SettingsError(f"socket path {self._path} is longer than {MAX_PATH} bytes; set CHECKPOINT_ENGINE_SOCKET_DIR")
        self._path.unlink(missing_ok=True)  # a leftover of a process that had our pid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(self._path))
        if settings.allowed_uids:
            self._path.chmod(0o666)  # the directory's mode and the credentials decide
        self._socket.listen(16)
        self.handle = SCHEME + str(self._path)
        self._closed = False
        self._thread = threading.Thread(target=self._accept, name="session-listener", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as e:
                if not self._closed:  # out of descriptors, say: no worker can come then
                    self._failed(PeerLostError(f"the session socket of rank {self._rank}", str(e)))
                return
            # A thread each: whoever connects and says nothing holds up nobody.
            threading.Thread(target=self._greet, args=(connection,), name="session-greeter", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        peer = f"worker of rank {self._rank} (pid {pid})"
        if uid != os.getuid() and uid not in self._settings.allowed_uids:
            connection.close()
            self._failed(ProtocolError(f"{peer}: user {uid} may not connect; CHECKPOINT_ENGINE_ALLOWED_UIDS lists who may"))
            return
        try:
            seconds = self._settings.connect_timeout
            channel: WorkerChannel = Channel(connection, peer, FromWorker, seconds)  # type: ignore[arg-type]
            try:
                hello = channel.receive(seconds=seconds, waiting_for="Hello")
                if not isinstance(hello, Hello):
                    raise ProtocolError(f"{peer} began with {type(hello).__name__}, not Hello")
            except BaseException:
                channel.close()
                raise
        except CheckpointEngineError as e:
            self._failed(e)
        else:
            if self._closed:
                dismiss(channel, "the update is over")
                channel.close()
            else:
                self._greeted(channel, hello)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._socket.close()
        self._path.unlink(missing_ok=True)
        self._thread.join(5)


def connect(handle: str, seconds: float) -> ServerChannel:
    """Connect to a server's session socket.

    Raises PeerLostError naming the path when nobody listens there, ProtocolError when the other side is not ours or the
    handle is not one.
    """
    if not handle.startswith(SCHEME):
        raise ProtocolError(f"{handle!r} is not a session handle ({SCHEME}PATH)")
    path = handle.removeprefix(SCHEME)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(seconds)
    try:
        sock.connect(path)
    except OSError as e:
        sock.close()
        raise PeerLostError(
            f"server at {path}", f"{e.strerror or e}; server and worker must see the same directory, with leave to enter it"
        ) from e
    return Channel(sock, f"server at {path}", FromServer, seconds)  # type: ignore[arg-type]


def dismiss(channel: WorkerChannel, reason: str) -> None:
    """Say why, and end the conversation, from any thread: whoever sends or receives on the channel hears that it is over."""
    with contextlib.suppress(CheckpointEngineError):
        channel.send(Abort(reason), seconds=1.0)
    channel.shutdown()
