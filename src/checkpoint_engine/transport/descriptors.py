"""Descriptors of one process that another of the same host, PID namespace and user opens by itself."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec


class AnotherFileError(OSError):
    """A descriptor that can be opened is not what was announced."""


class SharedDescriptor(msgspec.Struct, frozen=True, array_like=True):
    """`nbytes` of memory behind a descriptor of process `pid`; the inode proves that it is still the same."""

    pid: int
    descriptor: int
    inode: int
    nbytes: int

    @classmethod
    def of(cls, descriptor: int, nbytes: int) -> SharedDescriptor:
        """This process's own `descriptor`."""
        return cls(os.getpid(), descriptor, os.fstat(descriptor).st_ino, nbytes)

    def open(self, flags: int) -> int:
        """A descriptor of this process. Raises OSError when it cannot be opened, AnotherFileError when it is not what was
        announced."""
        descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", flags | os.O_CLOEXEC)
        if os.fstat(descriptor).st_ino != self.inode:
            os.close(descriptor)
            raise AnotherFileError(f"descriptor {self.descriptor} of process {self.pid} is another file by now")
        return descriptor


def whereabouts() -> str:
    """Equal for processes that can open each other's descriptors: host, boot, PID namespace and user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
