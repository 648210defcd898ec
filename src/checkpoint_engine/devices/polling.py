"""Waiting for what can only be asked for: a device's event, a number in shared memory."""

from __future__ import annotations

import time
from collections.abc import Callable

_NAP = (20e-6, 250e-6)


def poll(done: Callable[[], bool], seconds: float) -> bool:
    """True as soon as `done()`, False after `seconds`.

    Naps for about a sixteenth of the time waited so far, 20 to 250 us; the kernel adds its timer slack (50 us by default) to
    each. So what comes is noticed 40 us late on average, later than 4 ms some 150. It does not spin: several threads of a
    server wait at a time, and a virtual CPU that spins can be the other half of the core on which an engine loads.
    """
    start = time.monotonic()
    while not done():
        waited = time.monotonic() - start
        if waited >= seconds:
            return False
        time.sleep(min(max(waited / 16, _NAP[0]), _NAP[1], seconds - waited))
    return True
