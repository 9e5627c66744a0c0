"""Compile the GPU program of a training script on a machine without a GPU, and measure it.

    python tests/gpu_program.py --capability 90 --top 10
    python tests/gpu_program.py --script records/modern/train_modern.py --train_seq_len 49152

Other flags are the script's. Its network runs on fake CUDA tensors, which have shapes and no data,
through torch.compile, and Triton and ptxas compile every kernel for the capability. Nothing is
executed: the CUDA runtime is the library SHIM, and a compiled graph ends at its first call.

Prints, for the training graphs and the validation graph, their kernels, the bytes that these move,
a lower bound of the time (each kernel at its card's bandwidth or matmul rate, whichever is slower)
and the peak memory of the graph's own tensors, without weights, optimizers and earlier gradients;
then the Triton kernels that need most shared memory and those that take longest to compile. Raises
where a graph breaks, or where a kernel does not compile or does not fit.

Needs cc and a CUDA build of torch 2.11 or 2.13, whose private names it uses.
"""

import argparse
import contextlib
import ctypes
import itertools
import math
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

# What autograd and fake tensors ask of the CUDA runtime and driver before any memory is taken.
SHIM = """
static int succeed(void) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = *greatest = 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                     unsigned long long flags, int *status) {
    *function = (void *)succeed;
    return *status = 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = *active = 0;
    return 0;
}
"""

with tempfile.TemporaryDirectory() as folder:  # it has to be loaded before torch
    library = Path(folder, "libcuda.so.1")
    flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-xc", "-"]
    subprocess.run(["cc", "-o", library, *flags], input=SHIM.encode(), check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch._dynamo.device_interface import CudaInterface  # noqa: E402
from torch._inductor import config, ir, memory  # noqa: E402
from torch._inductor.async_compile import AsyncCompile  # noqa: E402
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.scheduler import SchedulerNode  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helpers  # noqa: E402

import train_gpt  # noqa: E402

VOCAB_SIZE = 50257
# Blocks of 128 keys that a block of queries sees, the mean over the layers of the speedrun at its
# last step, in documents of about 700 tokens, as in FineWeb.
VISIBLE_BLOCKS = 6


class Card(NamedTuple):
    """A card, with the dense rates of its data sheet."""

    name: str
    shared_memory: int  # bytes that a thread block may take
    multiprocessors: int
    bandwidth: float  # bytes a second
    bf16: float  # FLOP a second of matmuls
    fp8: float


CARDS = {
    80: Card("A100", 166912, 108, 2.04e12, 312e12, 312e12),
    86: Card("RTX 3090", 101376, 82, 0.936e12, 71e12, 71e12),
    89: Card("RTX 4090", 101376, 128, 1.008e12, 165e12, 330e12),
    90: Card("H100", 232448, 132, 3.35e12, 989e12, 1979e12),
    100: Card("B200", 232448, 148, 8.0e12, 2250e12, 4500e12),
    120: Card("RTX 5090", 101376, 170, 1.792e12, 210e12, 419e12),
}


class Compiled(Exception):
    """Raised when a compiled graph is called."""


def constant(answer):
    """A function that returns `answer` whatever its arguments."""
    return lambda *_, **__: answer


def pretend(capability, card, graphs, sources):
    """Answer as the card would; collect each lowered graph and the source of each Triton kernel."""
    major, minor = divmod(capability, 10)
    properties = types.SimpleNamespace(
        name=card.name,
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048 if capability in (80, 90, 100) else 1536,
        max_threads_per_block=1024,
        L2_cache_size=50 << 20,
        gcnArchName="",
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=card.shared_memory,
        shared_memory_per_multiprocessor=card.shared_memory + 1024,
    )
    answers = dict(
        is_available=True,
        is_bf16_supported=True,
        device_count=1,
        current_device=0,
        get_device_properties=properties,
        get_device_capability=(major, minor),
        get_device_name=card.name,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
        synchronize=None,
        device=contextlib.nullcontext(),
        _lazy_init=None,
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, constant(answer))
    for name in ("get_device_properties", "is_available", "get_raw_stream"):
        setattr(CudaInterface, name, staticmethod(constant(answers.get(name, 0))))
    CudaInterface.get_compute_capability = staticmethod(constant(capability))
    for name in ("get_device_properties", "current_device"):
        setattr(CudaInterface.Worker, name, staticmethod(constant(answers[name])))
    target = GPUTarget("cuda", capability, 32)
    answers = dict(
        get_current_target=target,
        get_active_torch_device=torch.device("cuda", 0),
        get_current_device=0,
        get_current_stream=0,
        get_device_interface=torch.cuda,
    )
    driver.set_active(types.SimpleNamespace(**{n: constant(a) for n, a in answers.items()}))
    triton_helpers.set_driver_to_gpu = constant(None)
    fake_tensor.FakeTensorMode.avoid_device_init = True
    fake_tensor.init_gpu_context = constant(None)
    config.compile_threads = 1
    config.force_disable_caches = True
    config.use_static_cuda_launcher = False
    config.joint_graph_constant_folding = False  # would compute constants on the device
    # The backward pass is compiled with the forward pass, and not when it is called.
    torch._functorch.config.force_non_lazy_backward_lowering = True

    def end(arguments):
        raise Compiled

    def keep(compiler, name, source, *_, **__):
        sources.setdefault(source.replace(name, "kernel"), (name, source))

    compile_to_module = GraphLowering.compile_to_module

    def compile_and_keep(graph):
        module = compile_to_module(graph)
        with V.set_graph_handler(graph):
            graphs.append(describe(graph, card))
        return types.SimpleNamespace(call=end, __file__=module.__file__)

    GraphLowering.compile_to_module = compile_and_keep
    AsyncCompile.triton = keep


def describe(graph, card):
    """A graph's kernels as (seconds, bytes, FLOP, name), and its peak memory in bytes."""
    kernels = []
    for node in graph.scheduler.nodes:
        size = moved_bytes(node, graph)
        flop = node.estimate_flops() or 0
        name = str(getattr(node.node, "python_kernel_name", None) or node.get_name())
        if node.is_template():  # attention; the backward pass computes the scores twice
            output = node.get_template_node().get_size()
            products = 7 if graph.is_backward else 2
            flop = products * 2 * math.prod(map(int, output)) * VISIBLE_BLOCKS * train_gpt.BLOCK
            name = "attention"
        rate = card.fp8 if "scaled_mm" in name else card.bf16
        origins = [str(o) for part in node.get_nodes() for o in part.node.get_origins()]
        name += ": " + " ".join(dict.fromkeys(origins))
        kernels.append((max(size / card.bandwidth, flop / rate), size, flop, name))
    nodes = graph.scheduler.nodes
    freeable = memory.get_freeable_input_buf(nodes, set(graph.graph_inputs))
    outputs = set(graph.get_output_names())
    change = [0] * (len(nodes) + 1)  # of the memory, before each kernel
    for buffer in memory.compute_memory_timeline(nodes, freeable, outputs)[0]:
        change[buffer.start_step] += buffer.size_alloc
        if buffer.end_step >= 0:  # outputs stay
            change[buffer.end_step + 1] -= buffer.size_free
    return [kernel for kernel in kernels if kernel[1]], max(itertools.accumulate(change))


def moved_bytes(node, graph):
    """What a kernel reads and writes; inductor counts at most 1e9 elements of a buffer."""
    total = 0
    for name, size in node.get_read_write_buffer_accesses(True, True).items():
        layout = getattr(graph.try_get_buffer(name), "layout", None)
        if isinstance(layout, ir.Layout) and not isinstance(node, SchedulerNode):
            elements = math.prod(map(int, layout.size))
            if elements > 1e9:
                size = elements * layout.dtype.itemsize
        total += size
    return total


def lower(recipe, hp, capability):
    """Trace and lower the micro-step of training, then a validation."""
    device = torch.device("cuda", 0)
    machine = train_gpt.Machine(device, torch.bfloat16)
    # Fake parameters cannot be moved, so they are made where they will be.
    torch.nn.Module.to = lambda module, device: module
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), device:
        network = recipe.build_model(hp, VOCAB_SIZE, machine)
        optimizers = recipe.build_optimizers(network, hp, machine)
        schedule = recipe.set_schedule(optimizers, hp.num_iterations, hp, machine)
        for tokens, training in ((hp.train_seq_len, True), (hp.val_seq_len, False)):
            network.train(training).compile(dynamic=False, fullgraph=True)
            ids = torch.empty(tokens, dtype=torch.int32), torch.empty(tokens, dtype=torch.int64)
            with torch.set_grad_enabled(training), contextlib.suppress(Compiled):
                network(*ids, schedule)


def compile_kernel(name, source, card):
    """Compile in the first launch configuration that fits. Returns (bytes of shared memory, s)."""
    kernel = getattr(PyCodeCache.load(source), name)
    start = time.process_time()
    for configuration in kernel.configs:
        result = kernel._precompile_config(configuration)
        shared = getattr(result, "kernel", result).metadata.shared
        if shared <= card.shared_memory:
            return shared, time.process_time() - start
    raise RuntimeError(f"{name} needs {shared} bytes of shared memory of {card.shared_memory}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--script", default=train_gpt.__file__, help="train_gpt.py or a recipe")
    parser.add_argument("--capability", type=int, choices=CARDS, default=90)
    parser.add_argument("--top", type=int, default=0, help="slowest kernels to print of each graph")
    arguments, flags = parser.parse_known_args()
    recipe = helpers.load_script(arguments.script)
    hp = train_gpt.parse_arguments(flags, recipe)
    card = CARDS[arguments.capability]
    graphs, sources = [], {}
    pretend(arguments.capability, card, graphs, sources)
    train_gpt.configure_torch(recipe.SOURCE)
    lower(recipe, hp, arguments.capability)
    print(
        f"{recipe.__file__} on an {card.name}, torch {torch.__version__}: {hp.num_layers} layers, "
        f"{hp.train_seq_len} tokens in training, {hp.val_seq_len} in validation"
    )
    for name, (kernels, peak) in zip(("forward", "backward", "validation"), graphs, strict=True):
        seconds, size, flop, _ = zip(*kernels, strict=True)
        print(
            f"{name}: {len(kernels)} kernels, {sum(size) / 1e9:.1f} GB, {sum(flop) / 1e12:.2f} "
            f"TFLOP, at least {1000 * sum(seconds):.1f} ms, peak {peak / 2**30:.1f} GiB"
        )
        for seconds, size, flop, kernel in sorted(kernels, reverse=True)[: arguments.top]:
            print(
                f"    {1000 * seconds:7.3f} ms {size / 1e9:6.2f} GB {flop / 1e12:6.3f} TFLOP  "
                f"{kernel[:100]}"
            )
    needs = {name: compile_kernel(name, source, card) for name, source in sources.values()}
    print(f"{len(needs)} Triton kernels, {sum(s for _, s in needs.values()):.0f} s to compile")
    for position, unit in enumerate((f"of {card.shared_memory} bytes of shared memory", "s")):
        for name in sorted(needs, key=lambda name: -needs[name][position])[:4]:
            print(f"    {needs[name][position]:.6g} {unit}: {name[:80]}")


if __name__ == "__main__":
    main()
