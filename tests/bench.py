"""Time a training step and its parts, on a GPU or a CPU.

    python tests/bench.py                          on a CPU with the preset tiny
    python tests/bench.py --versus OLD.py          a micro-step beside that of another version
    python tests/bench.py --profile 25 --fp8 none  the slowest kernels of a micro-step as well

Other flags are the script's. Times are in milliseconds, of CUDA events on a GPU and of the wall
clock on a CPU: the median and the quartiles of 20 calls.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helpers

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DOCUMENT = 700  # tokens, about the mean of FineWeb


def clock(function, repetitions: int = 20, before=lambda: None) -> list[float]:
    """Milliseconds of each call of `function`, without that of `before`, which comes before it."""
    times = []
    for _ in range(repetitions):
        before()
        if GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - start))
    return times


def show(name: str, values: list[float], unit: str = "ms"):
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{name:<44}{median:10.3f} {unit} ({low:.3f} to {high:.3f})", flush=True)


def random_batch(length: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (length,) int32 and targets (length,) int64 of random documents."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size - 1, (length + 1,), generator=generator)
    ids[torch.rand(length + 1, generator=generator) < 1 / DOCUMENT] = vocab_size - 1
    ids = ids.to(DEVICE)
    return ids[:-1].int(), ids[1:].contiguous()


def compiled(network):
    return torch.compile(network, dynamic=False, fullgraph=True) if GPU else network


class MicroStep:
    """Forward and backward pass of a model on one batch. The first call compiles."""

    def __init__(self, name, model, batch):
        self.name = name
        self.model = model
        self.batch = batch
        start = time.perf_counter()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        self()
        loss = self.loss.item()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else 0
        print(f"{name}: loss {loss:.6f}, first step {seconds:.1f} s, peak {peak:.1f} GiB")

    def forward(self):
        self.loss = self.model(*self.batch).sum()  # a recipe may return several losses

    def backward(self):
        self.loss.backward()

    def __call__(self):
        self.model.zero_grad(set_to_none=True)
        self.forward()
        self.backward()


def in_turns(new: MicroStep, old: MicroStep, repetitions: int = 20):
    """Times of two micro-steps that alternate, which goes first as well, and their ratio."""
    times = {step: [] for step in (new, old)}
    for number in range(repetitions):
        for step in (new, old) if number % 2 else (old, new):
            times[step] += clock(step, 1)
    for step, values in times.items():
        show(f"{step.name}, micro-step", values)
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    show(f"ratio of {new.name} to {old.name}", ratios, "")


def profile(step: MicroStep, top: int):
    """Print the kernels (on a CPU the operators) in which a micro-step spends its time."""
    kind = torch.profiler.ProfilerActivity.CUDA if GPU else torch.profiler.ProfilerActivity.CPU
    column = "self_device_time_total" if GPU else "self_cpu_time_total"
    with torch.profiler.profile(activities=[kind]) as profiler:
        step()
        if GPU:
            torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, column))
    total = sum(getattr(event, column) for event in events)
    print(f"{step.name}: {total / 1000:.2f} ms in {sum(event.count for event in events)} kernels")
    for event in events[:top]:
        print(f"{getattr(event, column) / 1000:9.3f} ms {event.count:4} x {event.key[:110]}")


class Subject:
    """A script with its settings, network and optimizers. flags: its command line."""

    def __init__(self, script, flags):
        self.script = script
        base = getattr(script, "train_gpt", script)  # what a recipe builds on
        self.hp = base.parse_arguments(flags, script)
        base.configure_torch(script.SOURCE)
        self.machine = base.detect_machine(self.hp.dtype)
        self.vocab_size = 257 if "tiny" in flags else base.GPT2_VOCAB
        self.network = script.build_model(self.hp, self.vocab_size, self.machine)
        self.optimizers = script.build_optimizers(self.network, self.hp, self.machine)
        self.model = compiled(self.network)

    def batch(self, length):
        """A random sequence, and the schedule in the middle of the run."""
        step = self.hp.num_iterations // 2
        schedule = self.script.set_schedule(self.optimizers, step, self.hp, self.machine)
        return *random_batch(length, self.vocab_size), schedule

    def micro_step(self, name):
        return MicroStep(name, self.model, self.batch(self.hp.train_seq_len))


def parts(subject: Subject, step: MicroStep):
    """Times of a micro-step, of the optimizers and of a whole step."""
    hp = subject.hp
    show("forward", clock(step.forward))
    show("backward", clock(step.backward, before=step.forward))
    for optimizer in subject.optimizers:
        show(f"{type(optimizer).__name__}, a step", clock(optimizer.step))
    *sequence, schedule = step.batch
    work = subject.model, subject.optimizers, [sequence] * hp.seqs_per_step, schedule
    one_step = functools.partial(subject.script.training_step, *work, 1, False, hp, subject.machine)
    times = clock(one_step)
    show(f"a step of {hp.seqs_per_step} sequences of {hp.train_seq_len}", times)
    rate = 1000 * hp.seqs_per_step * hp.train_seq_len / statistics.median(times)
    weights = subject.network.named_parameters()
    matrices = sum(p.numel() for name, p in weights if p.ndim > 1 and "embed" not in name)
    print(f"{rate:.0f} tokens/s, {6e-12 * matrices * rate:.3g} TFLOP/s without attention")


@torch.no_grad()
def validation(subject: Subject):
    """Time of a validation sequence."""
    model = subject.model.eval()
    batch = subject.batch(subject.hp.val_seq_len)
    model(*batch)
    show(f"validation, {subject.hp.val_seq_len} tokens", clock(lambda: model(*batch)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--script", default=ROOT / "train_gpt.py", help="train_gpt.py or a recipe")
    parser.add_argument("--versus", metavar="OLD.py", help="another version of the script")
    parser.add_argument("--micro_step", action="store_true", help="and nothing else")
    parser.add_argument("--profile", type=int, default=0, help="number of kernels to print")
    arguments, flags = parser.parse_known_args()
    if not GPU and "--preset" not in flags:
        flags += ["--preset", "tiny"]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if GPU else 'CPU'}")
    subject = Subject(helpers.load_script(arguments.script), flags)
    step = subject.micro_step("new" if arguments.versus else "ours")
    if arguments.versus:
        other = Subject(helpers.load_script(arguments.versus, "other"), flags)
        in_turns(step, other.micro_step("old"))
    elif arguments.micro_step:
        show("forward and backward", clock(step))
    else:
        parts(subject, step)
        validation(subject)
    if arguments.profile:
        profile(step, arguments.profile)


if __name__ == "__main__":
    main()
