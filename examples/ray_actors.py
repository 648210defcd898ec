"""Parameter servers as Ray actors: one beside each accelerator, for engines that run there already.

    python examples/ray_actors.py DIR --ranks 2 --endpoint http://127.0.0.1:8001 --endpoint http://127.0.0.1:8002

Endpoint i serves ranks [i*K, (i+1)*K), K = ranks / endpoints. On several hosts connect to their Ray cluster (RAY_ADDRESS), with
as many ranks on each host as it has accelerators; DIR must be there on all of them. Actors see all accelerators of their host and
claim none of Ray, for those are the engines': rank r takes number r modulo the host's. Needs 'ckpt-engine' and ray.
"""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import ray

from checkpoint_engine import ParameterServer
from checkpoint_engine.engines import get_engine


@ray.remote(num_cpus=1, runtime_env={"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}})
class Server:
    """One rank."""

    def place(self) -> tuple[str, int]:
        """Its host's address, and a port there that is free, as is the one after it."""
        while True:
            with socket.create_server(("", 0)) as one, socket.socket() as other:
                port: int = one.getsockname()[1]
                if other.connect_ex(("127.0.0.1", port + 1)):  # nobody listens there
                    return ray.util.get_node_ip_address(), port

    def start(self, rank: int, world_size: int, address: str, port: int) -> None:
        self.ps = ParameterServer(rank=rank, world_size=world_size, master_addr=address, master_port=port)

    def update(self, directory: str, endpoints: list[str], kind: str) -> str:
        """Collective: all actors are called at the same time."""
        files = sorted(Path(directory).glob("*.safetensors"))
        self.ps.register_checkpoint("release", files=files, stripe=True)
        self.ps.gather_metas("release")
        engines = [get_engine(kind, url) for url in endpoints]
        return str(self.ps.roll_out("release", engines=engines))

    def stop(self) -> None:
        self.ps.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="checkpoint: a directory of safetensors files")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--endpoint", action="append", required=True)
    parser.add_argument("--engine", default="sglang")
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    servers = [Server.options(scheduling_strategy="SPREAD").remote() for _ in range(options.ranks)]
    # Ranks of one host are consecutive.
    places = sorted(zip(ray.get([server.place.remote() for server in servers]), servers, strict=True), key=lambda p: p[0][0])
    servers = [server for _, server in places]
    address, port = places[0][0]
    ray.get([server.start.remote(rank, options.ranks, address, port) for rank, server in enumerate(servers)])
    reports = ray.get([server.update.remote(options.directory, options.endpoint, options.engine) for server in servers])
    print(reports[0])
    ray.get([server.stop.remote() for server in servers])
    ray.shutdown()


if __name__ == "__main__":
    main()
