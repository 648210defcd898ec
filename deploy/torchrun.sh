#!/usr/bin/env bash
# Parameter servers on several hosts: run this on each of them, beside the engines. Rank 0, on the first host, speaks for all.
#
#   HOSTS=2 HOST=0 FIRST=gpu-1 deploy/torchrun.sh --endpoint http://gpu-1:8000 --endpoint http://gpu-2:8000 --engine vllm
#   HOSTS=2 HOST=1 FIRST=gpu-1 deploy/torchrun.sh --endpoint http://gpu-1:8000 --endpoint http://gpu-2:8000 --engine vllm
#
# HOSTS: how many; HOST: the number of this one; FIRST: the first one's name; RANKS: servers of a host, one for each of its GPUs;
# PORT: free on the first host, as is the one after it. Arguments go to `checkpoint-engine serve`, the same on all hosts.
# Servers reach each other on these two ports and on others that the system chooses: keep them inside a trusted network.
# Engines need CHECKPOINT_ENGINE_SOCKET_DIR as it is here. docs/limits.md says what else they share with the servers.
set -euo pipefail
exec torchrun --nnodes "$HOSTS" --node-rank "$HOST" --master-addr "$FIRST" --master-port "${PORT:-29500}" \
    --nproc-per-node "${RANKS:-gpu}" -m checkpoint_engine serve "$@"
