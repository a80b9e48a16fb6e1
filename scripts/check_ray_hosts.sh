#!/usr/bin/env bash
# Two hosts make one result: with Ray, with Ray while the second loses its network, and by parts. The hosts are namespaces
# of this machine with a network, /tmp, /dev/shm, processes and a name of their own; they share one folder and a cable.
# Needs root, Linux and the extra [ray]; some minutes.
#   sudo PYTHON=.venv/bin/python scripts/check_ray_hosts.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
work=$(mktemp -d -p /var/tmp)
export PYTHONPATH=$PWD/convert:$PWD/runtime OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
declare -A pid

cleanup() {
    for host in "${!pid[@]}"; do kill -9 "${pid[$host]}" 2>/dev/null || true; done
    for host in one two; do ip netns del "convert-ckpt-$host" 2>/dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT

fail() {
    echo "check_ray_hosts: $*" >&2
    exit 1
}

start_host() { # NAME: its first process sleeps, and all others end with it
    ip netns add "convert-ckpt-$1"
    ip -n "convert-ckpt-$1" link set lo up
    # shellcheck disable=SC2016
    ip netns exec "convert-ckpt-$1" unshare --mount --uts --ipc --pid --fork --mount-proc --kill-child sh -c '
        hostname "$0" && mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && mkdir /tmp/home && touch "$1" &&
        exec sleep infinity' "host-$1" "$work/$1.ready" &
    until [[ -e $work/$1.ready ]]; do sleep 0.1; done
    pid[$1]=$(pgrep -P $!)
}

on() { # NAME COMMAND...
    local host=$1
    shift
    nsenter -t "${pid[$host]}" --mount --uts --ipc --net --pid env HOME=/tmp/home "$@"
}

convert() { # NAME OUTPUT OPTIONS...
    on "$1" "$python" -c 'from convert_ckpt.cli import main; main()' "$work/shared/in" "$work/shared/$2" --format fp8 "${@:3}"
}

same() { # OUTPUT
    diff -r "$work/shared/whole" "$work/shared/$1" || fail "$1: not the bytes of one host"
    echo "check_ray_hosts: $1: the bytes of one host, $SECONDS s"
}

# Twelve shards; q, k and v of each layer lie in three of them. A file takes two seconds, so that there is a middle.
mkdir -p "$work/shared/in" "$work/slow"
"$python" - "$work/shared/in" <<'PYTHON'
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
folder, index = Path(sys.argv[1]), {}
for shard in range(12):
    name = f"model-{shard + 1:05}-of-00012.safetensors"
    weight = np.random.default_rng(shard).standard_normal((512, 512)).astype(np.float32)
    key = f"model.layers.{shard // 3}.self_attn.{'qkv'[shard % 3]}_proj.weight"
    save_file({key: weight}, folder / name)
    index[key] = name
(folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
(folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
PYTHON
cat >"$work/slow/sitecustomize.py" <<'PYTHON'
import time
from run_ckpt.storage.writer import ShardWriter
finish = ShardWriter.finish
ShardWriter.finish = lambda self: (time.sleep(2), finish(self))[1]
PYTHON

start_host one
start_host two
ip link add one netns convert-ckpt-one type veth peer name two netns convert-ckpt-two
ip -n convert-ckpt-one addr add 10.77.0.1/24 dev one
ip -n convert-ckpt-two addr add 10.77.0.2/24 dev two
ip -n convert-ckpt-one link set one up
ip -n convert-ckpt-two link set two up

convert one whole
SECONDS=0
convert one parts --part 1/2 &
convert two parts --part 2/2
wait $!
same parts

export PYTHONPATH=$work/slow:$PYTHONPATH
ray=(-m ray.scripts.scripts start --num-cpus 1 --object-store-memory 100000000 --disable-usage-stats)
on one "$python" "${ray[@]}" --head --node-ip-address 10.77.0.1 --port 6379 --include-dashboard false >"$work/one.log"
on two "$python" "${ray[@]}" --address 10.77.0.1:6379 --node-ip-address 10.77.0.2 >"$work/two.log"

for from in one two; do
    SECONDS=0
    convert "$from" "ray-from-$from" --engine ray --ray-address auto
    same "ray-from-$from"
done

SECONDS=0
convert one cut --engine ray --ray-address auto &
until [[ $(find "$work/shared/cut.partial/records" -name '*.json' 2>/dev/null | wc -l) -ge 2 ]]; do sleep 0.1; done
ip -n convert-ckpt-two link set two down
echo "check_ray_hosts: the second host has lost its network after $SECONDS s"
wait $!
same cut
