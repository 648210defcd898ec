"""Time a full weight update of a tensor-parallel model through whichever `checkpoint_engine` is on PYTHONPATH.

    PYTHONPATH=<implementation> torchrun --nproc-per-node N side.py MODEL [--rounds 5] [--verify] [--label NAME] [--out FILE] [--recorded]

One parameter server per rank, one worker process per GPU holding a TP=N shard (tpmodel.py) that loads the way vLLM's
loaders do. Uses only the names of the drop-in contract, so that two implementations run on the same work. A round is
`gather_metas` + `update` and ends when the slowest rank's worker has returned; parameters are zeroed before each, so that
`--verify` proves the last of them. Memory is compared with the moment before the server was made. Prints a line per
round and appends a JSON record to FILE. --recorded names the model to the session, which only ours takes: its loads are
recorded and proved in the first round and replayed from then on, so the median leaves out the first two rounds.
--then LABEL:NAME=VALUE: afterwards as many rounds again, in a record of their own, with that variable, besides those before it,
for what reads it in each update: our workers, upstream's servers. (Our servers read theirs once.)
Without a GPU ours runs on the CPU, to rehearse; memory is then not measured.
"""
import argparse, json, os, random, statistics, sys, threading, time

import torch
import torch.multiprocessing as mp

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from tpmodel import TPModel
from zoo import ZOO, nbytes

GIB = 1 << 30
CUDA = torch.cuda.is_available()


def use(rank: int) -> str:
    """Bind this thread to the rank's device, whose name is returned."""
    if CUDA:
        torch.cuda.set_device(rank)
    return "cuda" if CUDA else "cpu"


def wait():
    if CUDA:
        torch.cuda.synchronize()


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if CUDA else 0


def named(shard: TPModel) -> torch.nn.Module:
    """The shard's parameters as a module, by which a session finds them."""
    module = torch.nn.Module()
    for name, tensor in shard.p.items():
        module.register_buffer(name.replace(".", "_"), tensor)
    return module


def base_bytes() -> torch.Tensor:
    """1 GiB of deterministic bf16 noise; every tensor of a model is a view into it."""
    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    return noise.repeat(1 << 5).view(torch.uint8)


def source(base: torch.Tensor, index: int, t) -> torch.Tensor:
    size, rng = nbytes(t), random.Random(index)
    if size > GIB - 256:
        return base.repeat(-(-size // GIB))[:size].view(t[2]).view(t[1])
    off = rng.randrange((GIB - size) // 256 + 1) * 256
    return base[off:off + size].view(t[2]).view(t[1])


def worker(rank, tp, uuid, model, recorded, requests, replies):
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc
    device = use(rank)
    spec, ctx = ZOO[model](), zmq.Context()
    shard = TPModel(spec, tp, rank, device)
    more = {"model": named(shard)} if recorded else {}
    wait()
    replies.put("ready")
    while (asked := requests.get()) is not None:
        if isinstance(asked, dict):
            os.environ.update(asked)
        elif asked == "zero":
            for p in shard.p.values():
                p.zero_()
            wait()
            replies.put("zeroed")
        elif asked == "verify":
            replies.put(differing(shard, spec, tp, rank, device))
        else:
            inside = [0.0, 0]

            def load(weights):
                t = time.perf_counter()
                shard.load_weights(weights)
                inside[0] += time.perf_counter() - t
                inside[1] += 1
            handle = dict(asked)[uuid] if CUDA else asked[rank][1]
            update_weights_from_ipc(ctx, handle, device_id=rank, run=load, post_hook=None, **more)
            replies.put(inside)


def differing(shard, spec, tp, rank, device):
    """Names of the shard's parameters that are not what the model's own loader makes of the same weights."""
    base = base_bytes().to(device)
    expected = TPModel(spec, tp, rank, device)
    expected.load_weights((t[0], source(base, i, t)) for i, t in enumerate(spec))
    wrong = [k for k in shard.p if not torch.equal(shard.p[k].view(torch.uint8), expected.p[k].view(torch.uint8))]
    del base, expected
    if CUDA:                                           # the memory of what was compared is not the next update's
        torch.cuda.empty_cache()
    return wrong


class Meeting:
    """A barrier over files that also tells every rank's number, independent of the implementation under test."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world
        self.folder = f"/tmp/side-{os.environ.get('TORCHELASTIC_RUN_ID', '')}-{os.environ['MASTER_PORT']}-{os.getppid()}"
        os.makedirs(self.folder, exist_ok=True)
        self.n = 0

    def __call__(self, number: float = 0.0) -> list[float]:
        self.n += 1
        mine = f"{self.folder}/{self.n}-{self.rank}"
        with open(mine + ".tmp", "w") as f:
            f.write(repr(number))
        os.rename(mine + ".tmp", mine)
        names = [f"{self.folder}/{self.n}-{r}" for r in range(self.world)]
        while not all(map(os.path.exists, names)):
            time.sleep(0.001)
        return [float(open(n).read()) for n in names]


def series(text):
    """(label, environment) of LABEL:NAME=VALUE."""
    label, _, setting = text.partition(":")
    name, _, value = setting.partition("=")
    return label, {name: value}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model", choices=list(ZOO))
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--verify", action="store_true")
    ap.add_argument("--label", default="")
    ap.add_argument("--recorded", action="store_true")
    ap.add_argument("--then", action="append", default=[], metavar="LABEL:NAME=VALUE")
    ap.add_argument("--out")
    a = ap.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    use(rank)
    spec, base = ZOO[a.model](), base_bytes()
    mine, load = {}, [0] * world
    for i, t in enumerate(spec):                       # balanced by bytes
        owner = load.index(min(load))
        load[owner] += nbytes(t)
        if owner == rank:
            mine[t[0]] = source(base, i, t)
    ctx = mp.get_context("spawn")
    requests, replies = ctx.Queue(), ctx.Queue()
    uuid = f"GPU-{torch.cuda.get_device_properties(rank).uuid!s}" if CUDA else ""
    proc = ctx.Process(target=worker, args=(rank, world, uuid, a.model, a.recorded, requests, replies))
    proc.start()
    assert replies.get() == "ready"
    free0 = free_bytes()
    from checkpoint_engine.ps import ParameterServer
    ps = ParameterServer(auto_pg=True)
    t0 = time.perf_counter()
    ps.register_checkpoint("c", named_tensors=mine)
    registered = time.perf_counter() - t0
    gb, meet, failed = sum(load) / 1e9, Meeting(rank, world), False
    for label, environment in [(a.label, {})] + [series(text) for text in a.then]:
        os.environ.update(environment)
        requests.put(environment)
        seconds, extra, inside = [], 0, (0.0, 0)
        for i in range(a.rounds):
            requests.put("zero")
            assert replies.get() == "zeroed"
            meet()
            low, stop = [1 << 62], threading.Event()

            def watch():
                use(rank)                              # or this thread makes a context on GPU 0, half a GiB, and counts it
                while not stop.is_set():
                    low[0] = min(low[0], free_bytes())
                    time.sleep(0.005)
            watcher = threading.Thread(target=watch)
            watcher.start()
            t0 = time.perf_counter()
            ps.gather_metas("c")
            t1 = time.perf_counter()
            ps.update("c", requests.put)
            inside = replies.get()
            t2 = time.perf_counter()
            stop.set(), watcher.join()
            total = max(meet(t2 - t0))
            held = free0 - free_bytes()
            seconds.append((t1 - t0, total))
            extra = max(extra, free0 - low[0])
            if rank == 0:
                print(f"{label} {a.model} round {i}: {total:.3f} s, of it gather {t1 - t0:.3f} s, {gb / total:.1f} GB/s, inside load_weights "
                      f"{inside[0]:.3f} s / {inside[1]} calls, GPU memory +{(free0 - low[0]) / GIB:.2f} GiB at most, +{held / GIB:.2f} after", flush=True)
            time.sleep(1)
        wrong = []
        if a.verify:
            requests.put("verify")
            wrong = replies.get()
            failed = failed or bool(wrong)
        if rank == 0:
            med = statistics.median(s[1] for s in seconds[2 if a.recorded else 1:] or seconds)
            rec = dict(label=label, model=a.model, gpus=world, gb=round(gb, 2), tensors=len(spec), register_s=round(registered, 2),
                       median_s=round(med, 4), gather_s=round(seconds[-1][0], 4), gb_per_s=round(gb / med, 1), first_s=round(seconds[0][1], 3),
                       inside_load_s=round(inside[0], 3), extra_gpu_gib=round(extra / GIB, 2), held_gpu_gib=round(held / GIB, 2),
                       verified=(a.verify and not wrong), wrong=wrong[:5])
            print(json.dumps(rec), flush=True)
            if a.out:
                with open(a.out, "a") as f:
                    f.write(json.dumps(rec) + "\n")
    requests.put(None)
    proc.join()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
