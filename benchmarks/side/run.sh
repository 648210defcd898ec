#!/usr/bin/env bash
# Upstream and ours in turn on the GPUs of this host: benchmarks/side/run.sh GPUS UPSTREAM_FOLDER OUT [MODEL...]
# UPSTREAM_FOLDER: where the wheel checkpoint-engine==0.4.2 was unpacked. Appends one JSON record a run to OUT/side.jsonl.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd) gpus=$1 upstream=$2 out=$3
shift 3
site=${PYTHONPATH:-}
side() { # label, folder of the implementation, model, more for side.py
    PYTHONPATH=$2:$site timeout "${SIDE_TIMEOUT:-170}" torchrun --nproc-per-node "$gpus" --master-port 25400 \
        "$here/side.py" "$3" --label "$1" --verify --rounds 5 --out "$out/side.jsonl" "${@:4}" >"$out/$3-$1.log" 2>&1
    echo "$1 $3: exit code $?"
}
[ $# -gt 0 ] || set -- tiny-moe qwen3-8b qwen3-30b-a3b qwen3-32b
for model in "$@"; do
    side ours "$here/../../src" "$model"
    side upstream "$upstream" "$model" ${SIDE_SMALL_BUCKETS:+--then upstream-2GB:PS_MAX_BUCKET_SIZE_GB=2}
done
