"""Where the time of a step goes.

    python tests/bench.py --gpu          at the speedrun's shapes
    python tests/bench.py --cpu          at the tiny preset's shapes
    python tests/bench.py --data         how fast shards are read and made
    python tests/bench.py --dist         what 1, 2 and 4 processes spend on communication
    python tests/bench.py --checkpoint   how long training stands still for a checkpoint, and how
                                         fast it is written

It measures the machine first (matmul rates, copy bandwidth), then one process's micro-step (forward,
backward, optimizer), then each part alone, beside its floor: the larger of its operations over the
measured matmul rate and its bytes over the measured bandwidth. Each figure is the median of several
repetitions, with the fastest and the slowest.
"""

import argparse
import contextlib
import functools
import glob
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
        self.bandwidth = (
            2 * copied / self.time(lambda: target.copy_(source)).median * 1000
        )  # read once, written once

    def time(self, function, before=lambda: None) -> Timing:
        """Repeat `before` and, timed, `function`: at least three times, at most twenty, for about self.seconds."""
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
        print(
            f"{name:<44}{timing}  {floor:9.3f}  {timing.median / floor if floor else math.nan:7.1f}",
            flush=True,
        )


def draw_batch(
    length: int, vocab_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up ids and targets, with a document's beginning every 700 tokens or so, as in FineWeb."""
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
    reducer = t.GradientReducer(network, optimizers, machine)
    t.warm_up(model, optimizers, hp, vocab_size, reducer)
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
    attention = (
        4 * pairs * t.BLOCK**2 * hp.num_heads * hp.head_dim
    )  # two matmuls forward; five more than two backward
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
            lambda: t.training_step(model, optimizers, batches, window, hp.seqs_per_step, reducer)
        )
        bench.row(
            "whole step",
            whole,
            hp.seqs_per_step * (forward_floor + backward_floor) + bench.floor(newton_schulz, moved),
        )
        step = whole.median
    flops = 3 * (hidden + head) + 3.5 * attention
    allocated, reserved = machine.peak_memory()
    return [
        f"a step of {hp.seqs_per_step} micro-steps: {step:.1f} ms; of a micro-step: {micro_step:.1f} ms, {hp.train_seq_len} tokens",
        f"tokens/s: {hp.seqs_per_step * hp.train_seq_len / step * 1000:.0f}",
        f"MFU: {flops * hp.seqs_per_step / step * 1000 / bench.flops[bench.dtype]:.1%} of the measured matmul rate",
        f"peak memory: {allocated} MiB allocated, {reserved} MiB reserved"
        + (
            f"; the model of memory says {t.memory_needed(network, hp, hp.train_seq_len) / 2**20:.0f} MiB"
            if machine.is_gpu
            else ""
        ),
        f"warm-up, with compilation: {compile_seconds:.1f} s",
    ]


def time_to_target(folder: str, seeds: int = 3) -> str:
    """Seconds of training until the tiny preset has reached nanoGPT's loss on tiny Shakespeare: runs whose last step is
    where they do, in processes of their own."""
    target, steps = 1.9087, 230
    if not glob.glob(os.path.join(folder, "*train*.bin")):
        return f"seconds to {target} on Shakespeare: skipped, for there are no shards in {folder} (--shakespeare FOLDER)"
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
        f"seconds of training to {target} on Shakespeare, {steps} steps, median of {seeds} seeds: {statistics.median(times):.1f} "
        f"({min(times):.1f} to {max(times):.1f}); loss {min(losses):.4f} to {max(losses):.4f}"
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
            bench.time(both_ways(lambda q, k, v: attend(q, k, v, mask), q, k, v)),
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
    """The loader beside a plain copy of the same bytes out of a memory map, and data/local_text.py on 200 MB of text."""
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
        elapsed, peak = (
            time.perf_counter() - start,
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        )
        print(
            f"local_text.py: {text.stat().st_size / elapsed / 1e6:.0f} MB/s of input, start and end included; peak memory {peak:.0f} MiB"
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
            print(
                f"{name:<32}{length * count / timing.median / 1e6:9.2f} billion tokens/s{copy.median / timing.median:9.2f} of the copy"
            )


# ---------------------------------------------------------------------------------------------
# Several processes


class Afterwards(t.GradientReducer):
    """The obvious way: each gradient summed up everywhere, by itself, after the backward pass."""

    def __init__(self, model, *args):
        super().__init__(model, *args)
        self.parameters = list(model.parameters())

    def ready(self, p) -> None:
        pass

    def finish(self, total) -> None:
        if self.machine.world_size > 1:
            self.in_flight += [
                (dist.all_reduce(p.grad, async_op=True), None, [])
                for p in self.parameters
                if p.grad is not None
            ]
        super().finish(total)


class Everywhere(t.GradientReducer):
    """As the trainer's, but each gradient is summed up for all processes, Muon's too."""

    def __init__(self, *args):
        super().__init__(*args)
        self.owner = {}


CHOICES = {
    "(a) all-reduce after the backward pass": Afterwards,
    "(b) all-reduce as ready, in buckets": Everywhere,
    "(c) kept: as (b), but Muon's to their owner": t.GradientReducer,
}


class Traffic:
    """Counts what goes over the network, in bytes that a process sends (it receives as many), at the calls of collectives, and
    the time that is spent waiting for what Muon gathers."""

    def __init__(self, world_size: int):
        self.sent, self.calls, self.waited = 0.0, 0, 0.0
        share = (world_size - 1) / world_size  # of a ring: each process passes on all parts but one
        self.count(dist, "all_reduce", lambda t: 2 * share * t.nbytes)
        self.count(
            dist, "reduce", lambda t: share * t.nbytes
        )  # on average, when the owners take turns
        self.count(t, "all_gather", lambda gathered: share * gathered.nbytes)
        gather = t.all_gather
        t.all_gather = lambda *args, **kwargs: Waiting(gather(*args, **kwargs), self)

    def count(self, module, name, cost) -> None:
        function = getattr(module, name)

        def counted(tensor, *args, **kwargs):
            self.sent, self.calls = self.sent + cost(tensor), self.calls + 1
            return function(tensor, *args, **kwargs)

        setattr(module, name, counted)


@dataclass
class Waiting:
    """What Muon waits for, and how long."""

    work: object
    traffic: Traffic

    def wait(self) -> None:
        start = time.perf_counter()
        self.work.wait()
        self.traffic.waited += time.perf_counter() - start


def steps_of_a_process(
    rank: int, world_size: int, folder: str, hp: t.Hyperparameters, vocab_size: int, seconds: float
) -> None:
    """Steps by each choice in turn, for about so many seconds; process 0 writes the figures, means over the processes."""
    torch.set_num_threads(1)
    machine = t.Machine(torch.device("cpu"), "CPU", torch.float32, rank, rank, world_size)
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous{world_size}",
            rank=rank,
            world_size=world_size,
        )
    traffic = Traffic(world_size)
    model = t.build_model(hp, vocab_size, machine)
    optimizers = t.build_optimizers(model, hp, machine)
    watchdog = argparse.Namespace(place=0)
    choices = CHOICES if world_size > 1 else {"alone": t.GradientReducer}
    reducers = {
        name: choice(model, optimizers, machine, watchdog) for name, choice in choices.items()
    }
    batch = draw_batch(hp.train_seq_len, vocab_size, machine.device)
    window = t.set_schedule(optimizers, hp.num_iterations // 2, hp, machine)
    marks: list[float] = []

    def marked(function, *args):
        marks.append(time.perf_counter())
        function(*args)
        marks.append(time.perf_counter())

    for reducer in reducers.values():
        reducer.finish = functools.partial(marked, reducer.finish)

    found: dict[str, list[list[float]]] = {name: [] for name in reducers}
    volume = {}
    begin, round_number, going_on = time.perf_counter(), 0, torch.ones(())
    while going_on:
        for name, reducer in reducers.items():
            for each in reducers.values():
                each.last = False
            marks.clear()
            traffic.sent, traffic.calls, traffic.waited = 0.0, 0, 0.0
            start = time.perf_counter()
            t.training_step(
                model,
                optimizers,
                [batch] * (hp.seqs_per_step // world_size),
                window,
                hp.seqs_per_step,
                reducer,
            )
            end = time.perf_counter()
            reducer.last = False
            volume[name] = traffic.sent, traffic.calls
            exposed = marks[1] - marks[0] + traffic.waited
            split = (
                torch.tensor(
                    [end - start, marks[0] - start, exposed, end - marks[1] - traffic.waited]
                )
                * 1000
            )
            if world_size > 1:
                dist.all_reduce(split)
            if round_number > 1:  # the first ones only warm up
                found[name].append((split / world_size).tolist())
        round_number += 1
        going_on.fill_(
            round_number < 6 or round_number < 200 and time.perf_counter() - begin < seconds
        )
        if world_size > 1:
            dist.broadcast(going_on, 0)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps([found, volume]))
    if world_size > 1:
        dist.destroy_process_group()


def distributed(hp: t.Hyperparameters, vocab_size: int, seconds: float) -> None:
    """The split of a step for 1, 2 and 4 processes and each choice, in milliseconds."""
    for world_size in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                steps_of_a_process,
                (world_size, folder, hp, vocab_size, seconds),
                nprocs=world_size,
                start_method="fork",
            )
            found, volume = json.loads(Path(folder, "found.json").read_text())
        print(
            f"\n{world_size} process{'es' * (world_size > 1)}, {hp.seqs_per_step // world_size} sequence(s) of {hp.train_seq_len} tokens each "
            f"a step, model_dim {hp.model_dim}, {len(next(iter(found.values())))} steps by each choice, in turn"
        )
        print(
            f"{'milliseconds: median (quartiles)':<46}{'step':>25}{'compute':>25}{'exposed communication':>25}{'optimizer':>25}"
            f"{'sent, MB':>10}{'calls':>6}"
        )
        for name, runs in found.items():
            cells = []
            for values in zip(*runs, strict=True):
                low, middle, high = statistics.quantiles(values, n=4)
                cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
            print(
                f"{name:<46}{''.join(f'{cell:>25}' for cell in cells)}"
                f"{volume[name][0] / 1e6:>10.2f}{volume[name][1]:>6}",
                flush=True,
            )


def on_paper(
    world_size: int = 8,
    link: float = 450e9,
    flops: float = 790e12,
    memory: float = 3.35e12,
    attention: float = 20e12,
) -> None:
    """The speedrun's step on 8 GPUs: what each choice sends, and the arithmetic that it can hide behind. 450 GB/s each way is
    NVLink's rate on an H100 by its data sheet, 3.35 TB/s its memory's; 790 TFLOP/s are what its large bfloat16 matmuls reach;
    20 TFLOP are a step's attention."""
    hp, share = t.Hyperparameters(), (world_size - 1) / world_size
    with torch.device("meta"):
        model = t.GPT(
            t.GPT2_VOCAB, hp.num_layers, hp.num_heads, hp.head_dim, hp.model_dim, hp.train_seq_len
        )
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    muon = sum(p.nbytes for p in matrices)
    adam = sum(p.nbytes for p in model.parameters()) - muon
    shapes: dict[tuple, int] = {}
    for p in matrices:
        shapes[p.shape] = shapes.get(p.shape, 0) + 1
    gathered = sum(
        2 * math.ceil(count / world_size) * world_size * math.prod(shape)
        for shape, count in shapes.items()
    )  # bfloat16
    multiplied = sum(p.numel() for p in matrices) + model.lm_head.weight.numel()
    matmuls = 6 * multiplied * hp.train_seq_len * hp.seqs_per_step
    micro_step = 1000 * (matmuls + attention) / hp.seqs_per_step / flops
    print(
        f"\nOn paper: the speedrun on {world_size} GPUs, {link / 1e9:.0f} GB/s each way. Gradients: {muon / 1e6:.0f} MB of Muon's matrices, "
        f"{adam / 1e6:.0f} MB of Adam's; updates gathered: {gathered / 1e6:.0f} MB.\nArithmetic of a step: {matmuls / 1e12:.0f} TFLOP in "
        f"matmuls and {attention / 1e12:.0f} in attention; a GPU's one micro-step takes {micro_step:.1f} ms at {flops / 1e12:.0f} TFLOP/s, "
        f"{micro_step * 2 / 3:.1f} of them backward."
    )
    update = (
        1000 * 7 * adam / memory
    )  # reads the gradient, the weight and two moments, writes all but the gradient
    rows = [
        ("(a) all-reduce after the backward pass", 0, 2 * share * (muon + adam), update),
        ("(b) all-reduce as ready", 2 * share * (muon + adam), 0, update),
        ("(c) kept: Muon's to their owner, Adam replicated", share * (muon + 2 * adam), 0, update),
        ("(d) as (c), Adam sharded", share * (muon + adam), share * adam, update / world_size),
    ]
    print(
        f"{'':<50}{'in the backward pass':>22}{'after it':>20}{'of which Muon gathers':>24}{'Adam, memory-bound':>20}{'not hidden':>12}"
    )
    for name, during, after, adam_ms in rows:
        after += share * gathered
        cells = [
            f"{sent / 1e6:.0f} MB, {1000 * sent / link:.2f} ms"
            for sent in (during, after, share * gathered)
        ]
        print(
            f"{name:<50}{cells[0]:>22}{cells[1]:>20}{cells[2]:>24}{f'{adam_ms:.2f} ms':>20}{f'{1000 * after / link + adam_ms:.2f} ms':>12}"
        )
    print(
        "Muon's gathers travel while the next group is orthogonalised, and all but the last are hidden; the column counts them in full."
    )


def checkpoints(
    machine: t.Machine, hp: t.Hyperparameters, vocab_size: int, seconds: float, steps: bool
) -> None:
    """What a checkpoint costs: the stall of the training, which is the copy to host memory, and then the writing, beside steps and
    alone, against torch.save of the same tensors; all in turn. steps: whether this machine can take the model's steps at all."""
    network = t.build_model(hp, vocab_size, machine)
    optimizers = t.build_optimizers(network, hp, machine)
    reducer = t.GradientReducer(network, optimizers, machine)
    model, window = (
        t.compiled(network, hp, machine),
        t.set_schedule(optimizers, hp.num_iterations // 2, hp, machine),
    )
    ids = torch.randint(vocab_size, (hp.train_seq_len,), device=machine.device)
    batches = [(ids.int(), ids)] * hp.seqs_per_step

    def step() -> None:
        t.training_step(model, optimizers, batches, window, hp.seqs_per_step, reducer)
        machine.synchronize()

    def timed(function) -> float:
        begin = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - begin)

    if steps:
        step(), step()
    else:  # all that the optimizers remember after a step, by way of a step without a network
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        for optimizer in optimizers:
            optimizer.step()
    print(
        f"\n{sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters; milliseconds: median (fastest to slowest)"
    )
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as folder:
        hp = replace(hp, log_dir=folder, run_id="bench")
        beginning = t.load_checkpoint(hp, {})
        tensors = np.zeros(32, dtype="<u2")
        Path(folder, "shard.bin").write_bytes(
            shard_header(len(tensors), vocab_size) + tensors.tobytes()
        )
        with contextlib.closing(
            t.RunLog(hp, machine, {}, t.DistributedDataLoader(f"{folder}/shard.bin", 16), beginning)
        ) as log:
            begin, number = time.perf_counter(), 0
            while number < 5 or number < 20 and time.perf_counter() - begin < seconds:
                number += 1
                modules = [
                    network.state_dict(),
                    optimizers[0].state_dict(),
                    optimizers[1].whole_state_dict(),
                ]
                if steps:
                    for _ in range(3):
                        note("a step", timed(step))
                machine.synchronize()
                note("stall of a save", timed(lambda: log.save(number, dict(modules=modules))))
                while steps and log.writing.is_alive():
                    note("a step beside the writing", timed(step))
                log.writing.join()
                note("stall of a save", timed(lambda: log.save(number, dict(modules=modules))))
                note("written alone, checksum and flush to disk included", timed(log.writing.join))
                on_host = torch.load(log.saved, weights_only=True)["modules"]
                note("torch.save", timed(lambda: torch.save(on_host, f"{folder}/plain.pt")))
                note(
                    "torch.save, and flush to disk",
                    timed(lambda: save_and_flush(on_host, f"{folder}/flushed.pt")),
                )
            size = os.path.getsize(log.saved)
    print(f"size: {size / 1e6:.2f} MB")
    for name, runs in found.items():
        middle = statistics.median(runs)
        rate = (
            f"   {size / 1e3 / middle:.0f} MB/s"
            if "save" in name and "stall" not in name or "written" in name
            else ""
        )
        share = (
            f"   {middle / statistics.median(found['a step']):.2f} of a step"
            if steps and name != "a step" and not rate
            else ""
        )
        print(
            f"{name:<52}{middle:9.2f} ({min(runs):.2f} to {max(runs):.2f}), {len(runs)} times{rate}{share}"
        )


def save_and_flush(state, path: str) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


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
    where.add_argument(
        "--dist", action="store_true", help="1, 2 and 4 processes on the CPU, and 8 GPUs on paper"
    )
    where.add_argument(
        "--checkpoint",
        action="store_true",
        help="checkpoints of the tiny preset, and of the speedrun's model",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="of repetitions for each figure (default 1); with --dist for each number of processes",
    )
    parser.add_argument(
        "--shakespeare",
        default=str(ROOT.parent / "shared/data/shakespeare"),
        help="folder of tiny Shakespeare's "
        "shards, as bytes, for the time to nanoGPT's loss (with --cpu; skipped where there are none)",
    )
    args, settings = (
        parser.parse_known_args()
    )  # the rest are train_gpt.py's flags, to change the shapes
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
    if args.data:
        data(machine, args.seconds)
        return 0
    vocab_size = t.GPT2_VOCAB if args.gpu else 257
    if args.checkpoint:
        print(f"{machine.name}, torch {torch.__version__}")
        checkpoints(machine, hp, 257, 10 * args.seconds, steps=True)
        checkpoints(
            machine, t.Hyperparameters(), t.GPT2_VOCAB, 10 * args.seconds, steps=machine.is_gpu
        )
        return 0
    if args.dist:
        print(f"{machine.name}, torch {torch.__version__}")
        on_paper()
        hp.seqs_per_step = t.next_multiple_of_n(hp.seqs_per_step, n=4)
        # The second has matrices that travel alone, and less to hide them behind.
        for shape in ({}, dict(model_dim=256, num_heads=4, train_seq_len=256)):
            distributed(replace(hp, dtype="float32", **shape), vocab_size, args.seconds)
        return 0
    bench = Bench(
        machine, machine.dtype if hp.dtype == "auto" else getattr(torch, hp.dtype), args.seconds
    )
    print(f"{machine.name}, torch {torch.__version__}")
    rates = ", ".join(
        f"{flops / 1e12:.2f} TFLOP/s in {str(dtype).removeprefix('torch.')}"
        for dtype, flops in bench.flops.items()
    )
    print(f"measured: {rates}; copies at {bench.bandwidth / 1e9:.0f} GB/s, read and written\n")
    print(
        f"{'milliseconds':<44}{'median':>9}  {'fastest to slowest':>22}  {'floor':>9}  {'x floor':>7}"
    )
    summary = whole_step(bench, hp, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        parts(bench, hp, vocab_size, folder)
    print("\n" + "\n".join(summary), flush=True)
    if args.cpu:
        print(time_to_target(args.shakespeare))
    return 0


if __name__ == "__main__":
    sys.exit(main())
