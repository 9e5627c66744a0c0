"""Where the time of a step goes.

    python tests/bench.py --gpu             at the speedrun's shapes
    python tests/bench.py --cpu             at the tiny preset's shapes
    python tests/bench.py --versus OLD.py   a step of this script and of another, in turn
    python tests/bench.py --data            how fast shards are read and made
    python tests/bench.py --dist            what several processes spend on communication
    python tests/bench.py --checkpoint      how long training stands still for a checkpoint

It measures the machine first (matmul rates, copy bandwidth), then one process's micro-step
(forward, backward, optimizer), then each part alone, beside its floor: the larger of its operations
over the measured matmul rate and its bytes over the measured bandwidth. Each figure is the median
of several repetitions, with the fastest and the slowest.
"""

import argparse
import functools
import glob
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist

import train_gpt as t
from data.local_text import shard_header

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Timing:
    """Milliseconds of several repetitions."""

    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def __str__(self) -> str:
        return f"{self.median:9.3f}  {min(self.runs):9.3f} to {max(self.runs):9.3f}"


class Bench:
    """Times functions on a machine, and knows what the machine can do at best."""

    def __init__(self, machine: t.Machine, dtype: torch.dtype, seconds: float):
        self.machine, self.dtype, self.seconds = machine, dtype, seconds
        n, copied = (8192, 1 << 30) if machine.is_gpu else (1024, 1 << 26)
        a, b = (torch.randn(n, n, device=machine.device, dtype=dtype) for _ in range(2))
        self.flops = {dtype: 2 * n**3 / self.time(lambda: a @ b).median * 1000}
        if t.fp8_supported(machine.device):
            a8, b8 = (m.to(torch.float8_e4m3fn) for m in (a, b))
            self.flops[torch.float8_e4m3fn] = (
                2
                * n**3
                / self.time(lambda: t.scaled_mm(a8, b8, 1, 1, torch.bfloat16, True)).median
                * 1000
            )
        source = torch.empty(copied, dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        seconds = self.time(lambda: target.copy_(source)).median / 1000
        self.bandwidth = 2 * copied / seconds  # read once, written once

    def time(self, function, before=lambda: None) -> Timing:
        """Repeat `before` and, timed, `function`, for about self.seconds.

        At least three times, and at most twenty.
        """
        for _ in range(2):
            before()
            function()
        runs: list[float] = []
        begin = time.perf_counter()
        while len(runs) < 3 or len(runs) < 20 and time.perf_counter() - begin < self.seconds:
            before()
            self.machine.synchronize()
            start = time.perf_counter()
            function()
            self.machine.synchronize()
            runs.append(1000 * (time.perf_counter() - start))
        return Timing(runs)

    def floor(self, flops: float, moved: float, dtype: torch.dtype | None = None) -> float:
        """Milliseconds that so many operations, or so many bytes, take at the least."""
        return 1000 * max(flops / self.flops[dtype or self.dtype], moved / self.bandwidth)

    def row(self, name: str, timing: Timing, floor: float) -> None:
        times = timing.median / floor if floor else math.nan
        print(f"{name:<44}{timing}  {floor:9.3f}  {times:7.1f}", flush=True)


def draw_batch(
    length: int, vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up ids and targets, in documents of about 700 tokens, as in FineWeb."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size - 1, (length + 1,), generator=generator)
    ids[torch.rand(length + 1, generator=generator) < 1 / 700] = vocab_size - 1
    return ids[:-1].int().to(device), ids[1:].to(device)


def listed_blocks(mask) -> int:
    """How many pairs of blocks a mask lets attention touch."""
    return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())


def compiled(function, machine: t.Machine):
    return torch.compile(function, dynamic=False, fullgraph=True) if machine.is_gpu else function


def both_ways(function, *inputs):
    """A function of nothing that runs `function`, a module or not, forward and backward."""
    grad = torch.randn_like(function(*inputs))
    wanted = [*inputs, *(function.parameters() if isinstance(function, torch.nn.Module) else ())]
    return lambda: torch.autograd.grad(function(*inputs), wanted, grad)


def whole_step(bench: Bench, hp: t.Hyperparameters, vocab_size: int) -> list[str]:
    """The micro-step and the update. Returns the lines of the closing summary."""
    machine = bench.machine
    network = t.build_model(hp, vocab_size, machine)
    optimizers = t.build_optimizers(network, hp, machine)
    model = compiled(network, machine)
    start = time.perf_counter()
    t.warm_up(model, network, optimizers, hp, machine)
    machine.synchronize()
    compile_seconds = time.perf_counter() - start

    ids, targets = draw_batch(hp.train_seq_len, vocab_size, machine.device)
    window = t.set_schedule(optimizers, hp.num_iterations // 2, hp, machine)
    forward = bench.time(lambda: model(ids, targets, window))
    losses: list[torch.Tensor] = []

    def run_forward():
        losses[:] = [model(ids, targets, window)]

    backward = bench.time(lambda: losses[0].backward(), before=run_forward)
    update = bench.time(lambda: [optimizer.step() for optimizer in optimizers])

    long, short = network.create_block_masks(ids, window)
    pairs = sum(
        listed_blocks(long if min(i, hp.num_layers - 1 - i) % 4 == 0 else short)
        for i, block in enumerate(network.blocks)
        if block.attn
    )
    # Two matmuls forward, five backward.
    attention = 4 * pairs * t.BLOCK**2 * hp.num_heads * hp.head_dim
    hidden = (
        2 * hp.train_seq_len * sum(p.numel() for p in network.blocks.parameters() if p.ndim > 1)
    )
    head = 2 * hp.train_seq_len * network.lm_head.weight.numel()
    in_fp8 = {use: torch.float8_e4m3fn if use else bench.dtype for use in (False, True)}
    head_dtype, hidden_dtype = (
        in_fp8[network.lm_head.use_fp8],
        in_fp8[network.blocks[0].mlp.c_fc.use_fp8],
    )
    forward_floor = (
        bench.floor(attention, 0)
        + bench.floor(hidden, 0, hidden_dtype)
        + bench.floor(head, 0, head_dtype)
    )
    backward_floor = (
        bench.floor(2.5 * attention, 0)
        + bench.floor(2 * hidden, 0, hidden_dtype)
        + bench.floor(2 * head, 0, head_dtype)
    )
    matrices = [p for p in network.blocks.parameters() if p.ndim > 1]
    newton_schulz = sum(
        orthogonalisation_flops(*p.shape[-2:]) * p[..., 0, 0].numel() for p in matrices
    )
    tables = [
        *network.embed.parameters(),
        *network.value_embeds.parameters(),
        network.lm_head.weight,
    ]
    moved = sum(7 * p.nbytes for p in tables) + sum(5 * p.nbytes for p in matrices)
    bench.row("micro-step, forward", forward, forward_floor)
    bench.row("micro-step, backward", backward, backward_floor)
    bench.row("optimizers, once a step", update, bench.floor(newton_schulz, moved))

    micro_step = forward.median + backward.median
    step = micro_step * hp.seqs_per_step + update.median
    if not machine.is_gpu:  # where a step's sequences run side by side
        batches = [(ids, targets)] * hp.seqs_per_step
        whole = bench.time(
            lambda: t.training_step(model, optimizers, batches, window, hp.seqs_per_step, machine)
        )
        bench.row(
            "whole step",
            whole,
            hp.seqs_per_step * (forward_floor + backward_floor) + bench.floor(newton_schulz, moved),
        )
        step = whole.median
    flops = 3 * (hidden + head) + 3.5 * attention
    allocated, reserved = machine.peak_memory()
    mfu = flops * hp.seqs_per_step / step * 1000 / bench.flops[bench.dtype]
    return [
        f"a step of {hp.seqs_per_step} micro-steps: {step:.1f} ms; of a micro-step: "
        f"{micro_step:.1f} ms, {hp.train_seq_len} tokens",
        f"tokens/s: {hp.seqs_per_step * hp.train_seq_len / step * 1000:.0f}",
        f"MFU: {mfu:.1%} of the measured matmul rate",
        f"peak memory: {allocated} MiB allocated, {reserved} MiB reserved",
        f"warm-up, with compilation: {compile_seconds:.1f} s",
    ]


def time_to_target(folder: str, seeds: int = 3) -> str:
    """Seconds of training until the tiny preset has reached nanoGPT's loss on tiny Shakespeare.

    Runs whose last step is where they do, in processes of their own.
    """
    target, steps = 1.9087, 130
    if not glob.glob(os.path.join(folder, "*train*.bin")):
        return (
            f"seconds to {target} on Shakespeare: skipped, for there are no shards in {folder} "
            "(--shakespeare FOLDER)"
        )
    found = []
    with tempfile.TemporaryDirectory() as logs:
        for seed in range(seeds):
            flags = dict(
                preset="tiny",
                train_files=f"{folder}/*train*.bin",
                val_files=f"{folder}/*val*.bin",
                val_tokens=0,
                num_iterations=steps,
                val_loss_every=0,
                sample=0,
                seed=seed,
                log_dir=logs,
                run_id=seed,
            )
            subprocess.run(
                [
                    sys.executable,
                    str(ROOT / "train_gpt.py"),
                    *(f"--{name}={value}" for name, value in flags.items()),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            last = re.findall(
                r"val_loss:([\d.]+) train_time:(\d+)ms", Path(logs, f"{seed}.txt").read_text()
            )[-1]
            found.append((int(last[1]) / 1000, float(last[0])))
    times, losses = zip(*found, strict=True)
    return (
        f"seconds of training to {target} on Shakespeare, {steps} steps, median of {seeds} seeds: "
        f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}); "
        f"loss {min(losses):.4f} to {max(losses):.4f}"
        + ("" if max(losses) <= target else ", NOT reached by all")
    )


def orthogonalisation_flops(rows: int, cols: int) -> float:
    """Five steps of Newton-Schulz on one matrix."""
    short, long = sorted((rows, cols))
    return 5 * (4 * short**2 * long + 2 * short**3)


def parts(bench: Bench, hp: t.Hyperparameters, vocab_size: int, shard_folder: str) -> None:
    """Each part of a step alone, both forward and backward where it has both."""
    machine, T, dim, dtype = bench.machine, hp.train_seq_len, hp.model_dim, bench.dtype
    size, H, D = torch.empty((), dtype=dtype).itemsize, hp.num_heads, hp.head_dim

    def draw(*shape):
        return torch.randn(*shape, device=machine.device, dtype=dtype).requires_grad_()

    x, padded = draw(T, dim), t.next_multiple_of_n(vocab_size, n=128)
    for name, fp8 in (("FP8", True), (str(dtype).removeprefix("torch."), False)):
        if fp8 and not t.fp8_supported(machine.device):
            continue
        head = t.CastedLinear(dim, padded, use_fp8=fp8, x_s=2.0, w_s=512.0, grad_s=524288.0).to(
            machine.device
        )
        bench.row(
            f"head in {name}",
            bench.time(both_ways(compiled(head, machine), x)),
            bench.floor(
                6 * T * dim * padded, 2 * size * T * padded, torch.float8_e4m3fn if fp8 else None
            ),
        )

    shell = t.GPT(vocab_size, 6, 1, 16, 16, t.BLOCK)
    ids, _ = draw_batch(T, vocab_size, machine.device)
    q, k, v = (draw(1, H, T, D) for _ in range(3))
    attend = compiled(lambda q, k, v, mask: t.attention(q, k, v, mask, 0.12), machine)
    for window in sorted({128, hp.max_window // 2 // 128 * 128, hp.max_window}):
        mask, _ = shell.create_block_masks(
            ids, torch.tensor(window // 128, dtype=torch.int32, device=machine.device)
        )
        bench.row(
            f"attention, window {window}",
            bench.time(both_ways(functools.partial(attend, mask=mask), q, k, v)),
            bench.floor(14 * listed_blocks(mask) * t.BLOCK**2 * H * D, 12 * q.nbytes),
        )

    mlp = t.MLP(dim).to(machine.device)
    torch.nn.init.normal_(mlp.c_proj.weight, std=0.02)
    bench.row(
        "MLP",
        bench.time(both_ways(compiled(mlp, machine), x)),
        bench.floor(6 * T * 8 * dim * dim, 24 * T * dim * size),
    )

    stack = torch.randn(hp.num_layers, 4 * dim, dim, device=machine.device)
    floor = bench.floor(len(stack) * orthogonalisation_flops(4 * dim, dim), 2 * stack.nbytes)
    bench.row(
        f"Newton-Schulz, {len(stack)} matrices at once",
        bench.time(lambda: t.zeropower_via_newtonschulz5(stack, 5)),
        floor,
    )
    bench.row(
        "Newton-Schulz, one by one",
        bench.time(lambda: [t.zeropower_via_newtonschulz5(G, 5) for G in stack]),
        floor,
    )

    tables = [
        torch.randn(vocab_size, dim, device=machine.device).to(dtype).requires_grad_()
        for _ in range(4)
    ]
    for p in tables:
        p.grad = torch.randn_like(p)
    adam = torch.optim.Adam(tables, fused=True)
    bench.row(
        "Adam, four embeddings",
        bench.time(adam.step),
        bench.floor(0, 7 * sum(p.nbytes for p in tables)),
    )

    path = os.path.join(shard_folder, "bench.bin")
    Path(path).write_bytes(
        shard_header(4 * T, vocab_size) + np.arange(4 * T, dtype="<u2").tobytes()
    )
    loader = t.DistributedDataLoader(path, T, device=machine.device, repeat=True)
    bench.row(
        "loader, one sequence", bench.time(loader.next_batch), bench.floor(0, T * (2 + 4 + 8))
    )


def data(machine: t.Machine, seconds: float) -> None:
    """The loader beside a plain copy of its bytes, and data/local_text.py on 200 MB of text."""
    with tempfile.TemporaryDirectory() as folder:
        # First, while this process is small: a child's peak counts from what its parent held.
        text = Path(folder, "text.txt")
        with open(text, "wb") as file:
            for path in itertools.cycle(sorted(Path(os.__file__).parent.glob("*.py"))):
                if file.write(path.read_bytes()) and file.tell() >= 200e6:
                    break
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "data/local_text.py"), str(text), "--out", folder],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        rate = text.stat().st_size / (time.perf_counter() - start) / 1e6
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(
            f"local_text.py: {rate:.0f} MB/s of input, start and end included; peak memory "
            f"{peak:.0f} MiB"
        )

        length, count = 48 * 1024, 200
        path = Path(folder, "bench.bin")
        tokens = np.random.default_rng(0).integers(0, 50256, length * count + 1, dtype=np.uint16)
        path.write_bytes(shard_header(len(tokens), t.GPT2_VOCAB) + tokens.tobytes())
        loader, mapped = t.DistributedDataLoader(str(path), length), t.open_shard(str(path))[0]
        bench = Bench(machine, machine.dtype, seconds)
        copy = bench.time(
            lambda: [np.array(mapped[i * length : (i + 1) * length + 1]) for i in range(count)]
        )
        read = bench.time(lambda: [loader.read(i * length, length + 1) for i in range(count)])
        sequence = bench.time(lambda: [loader.sequence(i) for i in range(count)])
        for name, timing in (
            ("plain copy", copy),
            ("loader, as bytes", read),
            ("loader, as int32 and int64 ids", sequence),
        ):
            rate = length * count / timing.median / 1e6
            share = copy.median / timing.median
            print(f"{name:<32}{rate:9.2f} billion tokens/s{share:9.2f} of the copy")


# ---------------------------------------------------------------------------------------------
# Two scripts in turn


def stepper(path: Path, hp: t.Hyperparameters, shards: str):
    """A function of nothing that takes one step of the tiny preset with the script at `path`."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}_{id(hp)}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    machine = script.Machine.detect()
    loader = script.DistributedDataLoader(shards, hp.train_seq_len, repeat=True)
    model = script.build_model(hp, loader.vocab_size, machine)
    optimizers = script.build_optimizers(model, hp, machine)
    last = machine
    if hasattr(script, "GradientReducer"):  # up to commit fbb587f
        last = script.GradientReducer(model, optimizers, machine)

    def step():
        window = script.set_schedule(optimizers, hp.num_iterations, hp, machine)
        batches = [loader.next_batch() for _ in range(hp.seqs_per_step)]
        script.training_step(model, optimizers, batches, window, hp.seqs_per_step, last)

    return step


def versus(other: str, hp: t.Hyperparameters, rounds: int = 60) -> None:
    """Steps of this script and of another in turn, the order changed every time; their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "shard.bin")
        tokens = np.random.default_rng(0).integers(0, 256, 200_000, dtype=np.uint16)
        shard.write_bytes(shard_header(len(tokens), 257) + tokens.tobytes())
        steps = [stepper(path, hp, str(shard)) for path in (Path(other), ROOT / "train_gpt.py")]
        found = [], []
        for number in range(rounds + 5):  # the first five only warm up
            for index in (0, 1) if number % 2 else (1, 0):
                begin = time.perf_counter()
                steps[index]()
                if number >= 5:
                    found[index].append(1000 * (time.perf_counter() - begin))
    for name, runs in zip((other, "train_gpt.py"), found, strict=True):
        print(f"{name}: {Timing(runs)} milliseconds a step")
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*found, strict=True)], n=4)
    print(f"ratio, this one to the other: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


# ---------------------------------------------------------------------------------------------
# Several processes


def steps_of_a_process(
    rank: int, world_size: int, folder: str, hp: t.Hyperparameters, vocab_size: int, rounds: int
) -> None:
    """Steps of one of several processes; process 0 writes down what they took."""
    torch.set_num_threads(1)
    machine = t.Machine(torch.device("cpu"), "CPU", torch.float32, rank, rank, world_size)
    if world_size > 1:
        address = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    model = t.build_model(hp, vocab_size, machine)
    optimizers = t.build_optimizers(model, hp, machine)
    batches = [draw_batch(hp.train_seq_len, vocab_size, machine.device)]
    batches *= hp.seqs_per_step // world_size
    window = t.set_schedule(optimizers, hp.num_iterations // 2, hp, machine)
    communication = [0.0]
    sum_gradients = t.sum_gradients

    def timed(*args):
        begin = time.perf_counter()
        sum_gradients(*args)
        communication[0] = time.perf_counter() - begin

    t.sum_gradients = timed
    found = []
    for _ in range(rounds + 2):  # the first two only warm up
        begin = time.perf_counter()
        t.training_step(model, optimizers, batches, window, hp.seqs_per_step, machine)
        found.append((1000 * (time.perf_counter() - begin), 1000 * communication[0]))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found[2:]))
    if world_size > 1:
        dist.destroy_process_group()


def distributed(hp: t.Hyperparameters, vocab_size: int, rounds: int = 20) -> None:
    """A step of 1, 2 and 4 processes, and what of it the sums of the gradients take."""
    for world_size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                steps_of_a_process,
                (world_size, folder, hp, vocab_size, rounds),
                nprocs=world_size,
                start_method="fork",
            )
            found = json.loads(Path(folder, "found.json").read_text())
        step, communication = (Timing(list(runs)) for runs in zip(*found, strict=True))
        print(f"{world_size} process(es), model_dim {hp.model_dim}, milliseconds")
        print(f"    a step                        {step}")
        print(f"    of it, the gradients' sums    {communication}", flush=True)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def checkpoints(machine: t.Machine, hp: t.Hyperparameters, vocab_size: int, seconds: float) -> None:
    """How long training stands still for a checkpoint, beside a plain torch.save of the same."""
    network = t.build_model(hp, vocab_size, machine)
    optimizers = t.build_optimizers(network, hp, machine)
    for p in network.parameters():  # what the optimizers remember after a step
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    bench = Bench(machine, machine.dtype, seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "step_00000001.pt")
        state = t.snapshot(network, optimizers)
        timings = {
            "training stands still": bench.time(lambda: t.write_checkpoint(path, state, 2)),
            "plain torch.save": bench.time(lambda: torch.save(state, Path(folder, "plain.pt"))),
            "read, checksums compared": bench.time(lambda: read(path)),
        }
        size = path.stat().st_size
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{millions:.2f}M parameters, a checkpoint of {size / 1e6:.1f} MB; milliseconds")
    for name, timing in timings.items():
        print(f"    {name:<28}{timing}   {size / 1e3 / timing.median:.0f} MB/s", flush=True)


def read(path: Path) -> dict:
    """A checkpoint as the trainer reads it, but for the entries that only a run writes."""
    with zipfile.ZipFile(path) as archive:
        archive.testzip()
    return torch.load(path, map_location="cpu", weights_only=True)


def other_figures(args, machine: t.Machine, hp: t.Hyperparameters) -> int:
    """Those that say nothing about the parts of a step."""
    print(f"{machine.name}, torch {torch.__version__}")
    if args.data:
        data(machine, args.seconds)
    elif args.versus:
        versus(args.versus, hp)
    elif args.dist:
        hp.seqs_per_step = t.next_multiple_of_n(hp.seqs_per_step, n=4)
        for shape in ({}, dict(model_dim=256, num_heads=4, train_seq_len=256)):
            distributed(replace(hp, dtype="float32", **shape), 257)
    else:
        checkpoints(machine, hp, 257, args.seconds)
        checkpoints(machine, t.Hyperparameters(), t.GPT2_VOCAB, args.seconds)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--gpu", action="store_true", help="the speedrun preset's shapes, on a CUDA GPU"
    )
    where.add_argument("--cpu", action="store_true", help="the tiny preset's shapes")
    where.add_argument("--data", action="store_true", help="the loader and data/local_text.py")
    where.add_argument("--versus", metavar="SCRIPT", help="a step of another version, in turn")
    where.add_argument("--dist", action="store_true", help="1, 2 and 4 processes on the CPU")
    where.add_argument(
        "--checkpoint",
        action="store_true",
        help="checkpoints of the tiny preset, and of the speedrun's model",
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of repetitions for each figure (default 1)"
    )
    parser.add_argument(
        "--shakespeare",
        default=str(ROOT.parent / "shared/data/shakespeare"),
        help="folder of tiny Shakespeare's shards, as bytes, for the time to nanoGPT's loss (with "
        "--cpu; skipped where there are none)",
    )
    # The rest are train_gpt.py's flags, to change the shapes.
    args, settings = parser.parse_known_args()
    try:
        if not args.gpu and not args.checkpoint:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        machine = t.Machine.detect()
        if args.gpu and not machine.is_gpu:
            raise t.UserError(
                "--gpu needs a CUDA GPU, and torch finds none here; --cpu measures the tiny preset."
            )
        hp, preset = t.parse_arguments(["--preset", "speedrun" if args.gpu else "tiny", *settings])
        t.check_settings(hp, preset, machine)
    except t.UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    vocab_size = t.GPT2_VOCAB if args.gpu else 257
    if args.data or args.versus or args.dist or args.checkpoint:
        return other_figures(args, machine, hp)
    bench = Bench(
        machine, machine.dtype if hp.dtype == "auto" else getattr(torch, hp.dtype), args.seconds
    )
    print(f"{machine.name}, torch {torch.__version__}")
    rates = ", ".join(
        f"{flops / 1e12:.2f} TFLOP/s in {str(dtype).removeprefix('torch.')}"
        for dtype, flops in bench.flops.items()
    )
    print(f"measured: {rates}; copies at {bench.bandwidth / 1e9:.0f} GB/s, read and written\n")
    columns = f"{'median':>9}  {'fastest to slowest':>22}  {'floor':>9}  {'x floor':>7}"
    print(f"{'milliseconds':<44}{columns}")
    summary = whole_step(bench, hp, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        parts(bench, hp, vocab_size, folder)
    print("\n" + "\n".join(summary), flush=True)
    if args.cpu:
        print(time_to_target(args.shakespeare))
    return 0


if __name__ == "__main__":
    sys.exit(main())
