"""Reads between two hosts (network namespaces): the bytes arrive, and a link that goes down ends the read by its deadline."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

from helpers.netns import INTERFACE, TwoHosts
from helpers.peers import Source, content

SIZE = 8 << 20

READER = """
import hashlib, json, sys, time
import torch
from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.transport.peer.base import PeerOffer, ReadOp, open_transport

def say(*words):
    print(json.dumps(words), flush=True)

offer = PeerOffer.from_json(sys.stdin.readline().encode())
memory = torch.zeros(offer.regions[0].nbytes, dtype=torch.uint8)
transport = open_transport("tcp")
destination = transport.register(memory)
peer = transport.connect(offer, seconds=30)
ops = [ReadOp(0, 0, memory.nbytes, 0)]
peer.submit_read(destination, ops, seconds=30).wait()
say("read", hashlib.sha256(memory.numpy()).hexdigest())
sys.stdin.readline()
start = time.monotonic()
try:
    peer.submit_read(destination, ops, seconds=1).wait()
except CheckpointEngineError as e:
    say(type(e).__name__, str(e), time.monotonic() - start, destination.quarantined)
"""


def test_reads_between_hosts_until_the_link_goes_down(netns: TwoHosts) -> None:
    here, there = netns.hosts
    with Source([SIZE], host=there) as source:
        command = here.command([sys.executable, "-c", READER])
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
            assert reader.stdin is not None and reader.stdout is not None
            try:
                reader.stdin.write(source.offer.to_json().decode() + "\n")
                reader.stdin.flush()
                assert json.loads(reader.stdout.readline()) == ["read", hashlib.sha256(content(0, SIZE)).hexdigest()]
                subprocess.run(["ip", "-n", here.namespace, "link", "set", INTERFACE, "down"], check=True, timeout=30)
                reader.stdin.write("\n")
                reader.stdin.flush()
                kind, message, seconds, quarantined = json.loads(reader.stdout.readline())
            finally:
                reader.kill()
        assert kind in ("DeadlineError", "PeerLostError")
        assert f"{source.name} at {there.address}:" in message
        assert seconds < 9
        assert not quarantined
