"""Compile the GPU program of a training script on a machine that has no GPU, and look at it.

    bash tests/gpu_program.sh                                     all cards, as CI runs it
    python tests/gpu_program.py --capability 90 --top 10          one card, and its ten largest kernels
    python tests/gpu_program.py --script OTHER.py --capability 90 --graphs training --no-kernels

The script's own network, FP8 operators and optimizers run on fake CUDA tensors, which have shapes and no data. torch.compile
does on them all that it does on a card, except that nothing is executed: inductor's scheduler tells what each kernel reads,
writes and computes, and Triton and ptxas compile every kernel for the target. Exit code 1 where a graph breaks or a kernel does
not compile or does not fit; 2 where the command is at fault.

What differs from a card: the CUDA runtime is a library of a few functions that answer "one device" (SHIM below), the device's
properties are those of CARDS, and where inductor would time several launch configurations of a kernel, the first one counts.
Predicted times take each kernel at its data sheet's bandwidth or matmul rate, whichever is slower: a floor, not a measurement.
Needs the CUDA build of torch 2.13, whose private names it uses (fetched in `private_names`), and a C compiler.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

TORCH_VERSION = "2.13.0"
LAYERS_OF_OTHERS = 6
WINDOW_BLOCKS = 14  # of 128 tokens: 1,792, the speedrun's last and longest window
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Card:
    """The card that stands for a compute capability: what inductor asks about it, and its data sheet's dense rates."""

    name: str
    shared_memory: int  # bytes that one thread block may take
    multiprocessors: int
    memory_gib: int
    bandwidth: float  # bytes a second
    bf16: float  # FLOP a second of matmuls
    fp8: float


CARDS = {
    80: Card("A100", 166912, 108, 80, 2.04e12, 312e12, 312e12),
    86: Card("RTX 3090", 101376, 82, 24, 0.936e12, 71e12, 71e12),
    89: Card("RTX 4090", 101376, 128, 24, 1.008e12, 165e12, 330e12),
    90: Card("H100", 232448, 132, 80, 3.35e12, 989e12, 1979e12),
    100: Card("B200", 232448, 148, 180, 8.0e12, 2250e12, 4500e12),
    120: Card("RTX 5090", 101376, 170, 32, 1.792e12, 210e12, 419e12),
}

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


class ProgramError(Exception):
    """A reason to fail, in one sentence: what was found, and whose fault it is."""


@dataclasses.dataclass
class Kernel:
    """One launch: what the scheduler counts, and which part of the network it computes."""

    name: str
    operators: str
    bytes: int
    flop: float
    fp8: bool = False
    scheduler_bytes: int = 0  # by inductor's own count, which cuts large tensors short

    def seconds(self, card: Card) -> float:
        """The least that the card needs for it."""
        return max(self.bytes / card.bandwidth, self.flop / (card.fp8 if self.fp8 else card.bf16))


@dataclasses.dataclass
class Program:
    """One compiled graph: its launches, and the most memory that its own tensors take at a time."""

    name: str
    kernels: list[Kernel]
    peak_bytes: int

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flop(self) -> float:
        return sum(kernel.flop for kernel in self.kernels)


def load_shim() -> None:
    """Put the pretended CUDA runtime before the real one. The name lets it also stand for the driver's library."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "shim.c"), Path(folder, "shim.so")
        source.write_text(SHIM)
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-w",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            library,
            source,
        ]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def private_names() -> types.SimpleNamespace:
    """Everything of torch and Triton that is not public, fetched in this one place."""
    import torch._inductor.config as config
    import torch._inductor.runtime.triton_helpers as triton_helpers
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import memory
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.codegen.simd import SIMDScheduling
    from torch._inductor.codegen.triton import TritonScheduling
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    return types.SimpleNamespace(**{name: value for name, value in locals().items()})


class PretendedCard:
    """Stands in for a card and records what inductor makes for it. Exists once a process, before any tensor is on "cuda"."""

    def __init__(self, capability: int, torch, private: types.SimpleNamespace):
        self.capability, self.card = capability, CARDS[capability]
        self.torch, self.private = torch, private
        self.programs: list[Program] = []
        self.sources: dict[
            str, tuple[str, str]
        ] = {}  # Triton source to its kernel's name and its program's
        self.stage = ""
        self.pretend_properties()
        self.record_programs()

    def pretend_properties(self) -> None:
        """Answer every question about the device as the card would."""
        torch, private = self.torch, self.private
        card = self.card
        properties = types.SimpleNamespace(
            name=card.name,
            major=self.capability // 10,
            minor=self.capability % 10,
            multi_processor_count=card.multiprocessors,
            total_memory=card.memory_gib << 30,
            warp_size=32,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048 if self.capability in (80, 90, 100) else 1536,
            max_threads_per_block=1024,
            L2_cache_size=50 << 20,
            gcnArchName="",
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=card.shared_memory,
            shared_memory_per_multiprocessor=card.shared_memory + 1024,
        )
        state = torch.zeros(16, dtype=torch.uint8)
        answers = {
            "is_available": True,
            "is_bf16_supported": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": properties,
            "get_device_capability": (properties.major, properties.minor),
            "get_device_name": card.name,
            "get_rng_state": state,
            "set_rng_state": None,
            "synchronize": None,
            "_lazy_init": None,
        }
        for name, answer in answers.items():
            getattr(torch.cuda, name)  # an AttributeError where torch has renamed it
            setattr(torch.cuda, name, constant(answer))
        torch.cuda.device = constant(contextlib.nullcontext())
        interface = private.CudaInterface
        interface.get_device_properties = staticmethod(constant(properties))
        interface.get_compute_capability = staticmethod(constant(self.capability))
        interface.is_available = staticmethod(constant(True))
        interface.get_raw_stream = staticmethod(constant(0))
        interface.Worker.get_device_properties = staticmethod(constant(properties))
        interface.Worker.current_device = staticmethod(constant(0))
        triton_driver = types.SimpleNamespace(
            get_current_target=constant(private.GPUTarget("cuda", self.capability, 32)),
            get_active_torch_device=constant(torch.device("cuda", 0)),
            get_current_device=constant(0),
            get_current_stream=constant(0),
            get_device_interface=constant(torch.cuda),
        )
        private.driver.set_active(triton_driver)
        private.triton_helpers.set_driver_to_gpu = constant(None)
        fold_constants = private.UniformValueConstantFolder.run

        class OnTheHost(private.TorchDispatchMode):
            """Constants are computed for real: let the host do it."""

            def __torch_dispatch__(self, function, _, arguments=(), keywords=None):
                keywords = dict(keywords or {})
                if keywords.get("device") is not None:
                    keywords["device"] = torch.device("cpu")
                return function(*arguments, **keywords)

        def fold_on_the_host(folder, *arguments):
            with OnTheHost():
                return fold_constants(folder, *arguments)

        private.UniformValueConstantFolder.run = fold_on_the_host
        # Otherwise torch.tensor(..., device="cuda") would take memory on the device.
        private.FakeTensorMode.avoid_device_init = True
        private.config.compile_threads = 1
        private.config.fx_graph_cache = False
        private.config.use_static_cuda_launcher = False
        torch._functorch.config.enable_autograd_cache = False

    def record_programs(self) -> None:
        """Let inductor hand over each graph that it has scheduled, and its Triton kernels, instead of running them."""
        private, torch = self.private, self.torch
        compile_to_module = private.GraphLowering.compile_to_module
        define_kernel = private.TritonScheduling.define_kernel
        kernel_of_node = {}

        def define_and_note(scheduling, source, nodes, kernel):
            name = define_kernel(scheduling, source, nodes, kernel)
            for node in nodes:
                if hasattr(node, "get_name"):
                    kernel_of_node[node.get_name()] = name
            return name

        def keep_source(compiler, name, source, *_, **__):
            self.sources.setdefault(re.sub(rf"\b{name}\b", "kernel", source), (name, source))
            return name

        def compile_and_record(graph):
            kernel_of_node.clear()
            module = compile_to_module(graph)
            self.programs.append(self.program(graph, kernel_of_node))
            layouts = [output_layout(output) for output in graph.graph_outputs]

            def call(arguments):
                arguments.clear()
                return [
                    torch.empty_strided(*layout[:2], dtype=layout[2], device=layout[3])
                    if isinstance(layout, tuple)
                    else layout
                    for layout in layouts
                ]

            return types.SimpleNamespace(call=call, __file__=module.__file__)

        private.TritonScheduling.define_kernel = define_and_note
        private.AsyncCompile.triton = keep_source
        private.GraphLowering.compile_to_module = compile_and_record

    def program(self, graph, kernel_of_node: dict[str, str]) -> Program:
        """What the scheduler knows of a graph after code was made for it."""
        scheduler = graph.scheduler
        kernels = []
        with self.private.V.set_graph_handler(graph):
            for node in scheduler.nodes:
                kernel = scheduled_kernel(node, kernel_of_node, graph)
                if kernel.bytes:
                    kernels.append(kernel)
            inputs = self.private.memory.get_freeable_input_buf(
                scheduler.nodes, set(graph.graph_inputs)
            )
            peak, _ = self.private.memory.estimate_peak_memory(
                scheduler.nodes, inputs, set(graph.get_output_names())
            )
        passes = ["forward", "backward"][graph.is_backward]
        return Program(f"{self.stage}, {passes}", kernels, peak)


def constant(answer):
    """A function that gives this answer to whatever it is asked."""

    def give(*_, **__):
        return answer

    return give


def output_layout(output):
    """Size, stride, dtype and device of a graph's output; or what stands for it, where it is no tensor."""
    if not hasattr(output, "get_size") or output.maybe_get_layout() is None:
        return None
    size, stride = (
        [int(n) for n in numbers] for numbers in (output.get_size(), output.get_stride())
    )
    return size, stride, output.get_dtype(), output.get_device()


def moved_bytes(node, graph) -> int:
    """What a kernel reads and writes. The scheduler counts at most 1e9 elements of a buffer, which is
    too few for the logits: there the whole buffer counts."""
    total = 0
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    for name, size in accesses.items():
        buffer = graph.try_get_buffer(name)
        whole = size
        if buffer is not None and size >= 10**9 and buffer.maybe_get_size() is not None:
            whole = math.prod(map(int, buffer.get_size())) * buffer.get_dtype().itemsize
            cut_short = size == 10**9 * buffer.get_dtype().itemsize
            whole = whole if cut_short else size
        total += whole
    return total


def scheduled_kernel(node, kernel_of_node: dict[str, str], graph) -> Kernel:
    """One node of the schedule: a Triton kernel, or a call of a library or of a custom operator."""
    names = [
        kernel_of_node[part.get_name()]
        for part in node.get_nodes()
        if part.get_name() in kernel_of_node
    ]
    external = str(getattr(node.node, "python_kernel_name", None) or type(node).__name__)
    name = names[0] if names else external
    origins = dict.fromkeys(
        origin.name
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.get_origins()
    )
    return Kernel(
        name,
        " ".join(origins),
        moved_bytes(node, graph),
        float(node.estimate_flops() or 0),
        "scaled_mm" in name,
        node.get_read_write_buffers_sizes(),
    )


def load_script(path: str):
    """The training script as a module. Dataclasses want it to be listed among the modules."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = script
    spec.loader.exec_module(script)
    return script


class Lowering:
    """Takes a script's graphs through torch.compile, one kind of graph a method, at the speedrun's sizes."""

    vocab_size, heads, head_dim, dim = 50257, 6, 128, 768

    def __init__(self, script, card: PretendedCard, tokens: int, layers: int):
        self.script, self.card, self.torch = script, card, card.torch
        self.tokens, self.layers = tokens, layers

    def network(self, fp8: str):
        """The network on the pretended card."""
        with self.torch.device("cuda"):
            return self.script.GPT(
                *(self.vocab_size, self.layers, self.heads, self.head_dim, self.dim, self.tokens),
                fp8=fp8,
                train_seq_len=self.tokens,
            )

    def empty(self, *shape: int, dtype=None):
        return self.torch.empty(shape, dtype=dtype, device="cuda")

    def sequence(self, tokens: int) -> tuple:
        """Inputs, targets and window of a sequence."""
        torch = self.torch
        ids, targets = (self.empty(tokens, dtype=dtype) for dtype in (torch.int32, torch.int64))
        return ids, targets, self.empty(dtype=torch.int32)

    def training(self, fp8: str) -> None:
        """A micro-step, forward and backward."""
        self.card.stage = f"training, FP8 {fp8}"
        network = self.network(fp8)
        compiled = self.torch.compile(network, dynamic=False, fullgraph=True)
        compiled(*self.sequence(self.tokens)).backward()

    def validation(self) -> None:
        """The loss of a sequence, without gradients."""
        self.card.stage = "validation"
        network = self.network("none").eval()
        compiled = self.torch.compile(network, dynamic=False, fullgraph=True)
        with self.torch.no_grad():
            compiled(*self.sequence(self.tokens))

    def operators(self) -> None:
        """The FP8 operators' own kernels, at the head's sizes: their casts, and the products."""
        torch = self.torch
        rows = math.ceil(self.vocab_size / BLOCK) * BLOCK
        x = self.empty(self.tokens, self.dim, dtype=torch.bfloat16)
        w = self.empty(rows, self.dim, dtype=torch.float32)
        grad = self.empty(self.tokens, rows, dtype=torch.bfloat16)
        scales = 2.0, 512.0, 524288.0
        self.card.stage = "FP8 operator of the head, forward"
        with torch.no_grad():
            _, x_f8, w_f8 = self.script.mm_op._init_fn(x, w, *scales)
            self.card.stage = "FP8 operator of the head, backward"
            self.script.mm_backward_op._init_fn(grad, x_f8, w_f8, *scales)

    def optimizers(self) -> None:
        """Muon's step and Adam's; what they do not compile leaves no program."""
        torch = self.torch
        network = self.network("none")
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        matrices = [p for p in network.blocks.parameters() if p.ndim >= 2]
        others = [p for p in network.parameters() if not any(p is matrix for matrix in matrices)]
        self.card.stage = "Muon's step"
        muon = dict(lr=0.05, momentum=0.95, nesterov=True, ns_steps=5, rank=0, world_size=1)
        self.script.Muon(matrices, **muon).step()
        self.card.stage = "Adam's step"
        torch.optim.Adam(others, fused=True).step()


def lower(lowering: Lowering, graphs: list[str]) -> None:
    """Compile the chosen graphs, and say where one breaks."""
    supported = lowering.card.capability >= 89
    head = "head" if supported else "none"
    steps = {
        "training": [lambda: lowering.training(head)],
        "variants": [
            lambda fp8=fp8: lowering.training(fp8) for fp8 in ("none", "all") if supported
        ],
        "validation": [lowering.validation],
        "operators": [lowering.operators] if supported else [],
        "optimizers": [lowering.optimizers],
    }
    for graph in graphs:
        for step in steps[graph]:
            lowering.torch._dynamo.reset()
            try:
                step()
            except Exception as error:
                first = str(error).strip().splitlines()[0] if str(error).strip() else ""
                raise ProgramError(
                    f"{lowering.card.stage}: {type(error).__name__}: {first}. A small network of this file went through "
                    "the same way, so the fault is the script's"
                ) from error


def canary(card: PretendedCard) -> None:
    """Take a small network through all that the script's will meet: where this fails, torch is not the one expected."""
    torch = card.torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    weight = torch.empty(512, 512, device="cuda", requires_grad=True)

    def causal(b, h, q, k):
        return q >= k

    def network(x):
        q = (torch.nn.functional.rms_norm(x, (512,)) @ weight).view(1, -1, 4, 128).transpose(1, 2)
        mask = create_block_mask(causal, None, None, 256, 256, device="cuda")
        return flex_attention(q, q, q, block_mask=mask).float().square().mean()

    card.stage = "canary"
    torch.compile(network, dynamic=False, fullgraph=True)(
        torch.empty(256, 512, device="cuda")
    ).backward()
    card.programs.clear()
    card.sources.clear()


@dataclasses.dataclass
class Resources:
    """What a compiled kernel takes of a card."""

    name: str
    shared_memory: int
    registers: int
    stack: int  # bytes a thread spills or indexes


def compile_kernels(card: PretendedCard) -> list[Resources]:
    """Every Triton kernel through Triton and ptxas, in the first launch configuration that fits."""
    found = []
    for name, source in card.sources.values():
        kernel = getattr(card.private.PyCodeCache.load(source), name)
        problems = []
        for configuration in kernel.configs:
            try:
                compiled = kernel._precompile_config(configuration)
            except Exception as error:
                problems.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
                continue
            compiled = getattr(compiled, "kernel", compiled)
            if compiled.metadata.shared <= card.card.shared_memory:
                found.append(resources(name, compiled))
                break
            problems.append(
                f"{compiled.metadata.shared} bytes of shared memory, of {card.card.shared_memory}"
            )
        else:
            raise ProgramError(f"{name} does not compile or does not fit: {'; '.join(problems)}")
    return found


def resources(name: str, compiled) -> Resources:
    """Registers and stack from the machine code, for which the attention kernels alone are worth the time."""
    numbers = {"REG": 0, "STACK": 0}
    if "flex_attention" in name:
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            told = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True
            ).stdout
        numbers |= {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", told)}
    return Resources(name, compiled.metadata.shared, numbers["REG"], numbers["STACK"])


def attention_blocks(lowering: Lowering, mode) -> list[int]:
    """How many blocks of 128 x 128 each attention call computes, first layer first: at the longest window, in documents of
    about 700 tokens, lognormally distributed, as in web text."""
    torch, script = lowering.torch, lowering.script
    with mode:
        network = lowering.network("none")
    lengths = torch.empty(lowering.tokens).log_normal_(
        6.05, 1.0, generator=torch.Generator().manual_seed(0)
    )
    starts = lengths.long().clamp(min=2).cumsum(0)
    ids = torch.zeros(lowering.tokens, dtype=torch.int32)
    ids[starts[starts < lowering.tokens]] = lowering.vocab_size - 1
    masks = network.create_block_masks(ids, torch.tensor(WINDOW_BLOCKS, dtype=torch.int32))
    blocks = [int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) for mask in masks]
    made, used, create, attend = [], [], network.create_block_masks, script.attention

    def create_and_note(*arguments):
        made.extend(create(*arguments))
        return tuple(made)

    def note_mask(q, k, v, block_mask, scale):
        used.append(next(i for i, mask in enumerate(made) if mask is block_mask))
        return torch.empty_like(v)

    network.create_block_masks, script.attention = create_and_note, note_mask
    try:
        with mode, torch.no_grad():
            network(*lowering.sequence(lowering.tokens))
    finally:
        script.attention = attend
    return [blocks[i] for i in used]


def count_attention(program: Program, blocks: list[int], lowering: Lowering) -> None:
    """Give each attention kernel the FLOP of its blocks: two products forward, and seven backward, which computes scores twice."""
    product = 2 * BLOCK * BLOCK * lowering.head_dim * lowering.heads
    backward = program.name.endswith("backward")
    calls = [kernel for kernel in program.kernels if "triton_tem" in kernel.name]
    for kernel, count in zip(calls, blocks[::-1] if backward else blocks, strict=False):
        kernel.flop = product * count * (7 if backward else 2)


def count_fp8_operators(program: Program, lowering: Lowering) -> None:
    """The head's products, which the scheduler does not see into."""
    product = 2 * lowering.tokens * math.ceil(lowering.vocab_size / BLOCK) * BLOCK * lowering.dim
    for kernel in program.kernels:
        if "nanogpt.mm" in kernel.name and not program.name.startswith("training, FP8 all"):
            kernel.flop = product * (2 if "backward" in kernel.name else 1)
            kernel.fp8 = True


def describe(program: Program, card: Card, top: int) -> None:
    """A line for a program, and its largest kernels."""
    milliseconds = 1000 * sum(kernel.seconds(card) for kernel in program.kernels)
    print(
        f"  {program.name}: {len(program.kernels)} kernels, {program.bytes / 1e9:.1f} GB, "
        f"{program.flop / 1e12:.2f} TFLOP, predicted {milliseconds:.1f} ms, "
        f"peak of its own tensors {program.peak_bytes / 2**30:.1f} GiB"
    )
    for kernel in sorted(program.kernels, key=lambda kernel: -kernel.seconds(card))[:top]:
        print(
            f"    {1000 * kernel.seconds(card):7.3f} ms {kernel.bytes / 1e9:6.2f} GB {kernel.flop / 1e12:6.3f} TFLOP  "
            f"{kernel.name[:60]}: {kernel.operators[:160]}"
        )


def look(arguments: argparse.Namespace) -> None:
    """One script on one card: lower, count, compile, print."""
    load_shim()
    import torch

    if torch.__version__.split("+")[0] != TORCH_VERSION or not torch.version.cuda:
        raise SystemExit(
            f"gpu_program.py needs the CUDA build of torch {TORCH_VERSION}, found {torch.__version__}; "
            "run bash tests/gpu_program.sh, which installs it."
        )
    try:
        card = PretendedCard(arguments.capability, torch, private_names())
        mode = card.private.FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            canary(card)
    except Exception as error:
        raise ProgramError(
            f"torch's private names are not those of {TORCH_VERSION}, and the script is not at fault: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    lowering = Lowering(load_script(arguments.script), card, arguments.tokens, arguments.layers)
    blocks = attention_blocks(lowering, mode)
    with mode:
        lower(lowering, arguments.graphs)
    print(
        f"capability {arguments.capability / 10} ({card.card.name}), {arguments.layers} layers, {arguments.tokens} tokens"
    )
    for program in card.programs:
        count_attention(program, blocks, lowering)
        count_fp8_operators(program, lowering)
        describe(program, card.card, arguments.top)
    step = [program for program in card.programs if program.name.startswith("training")][:2]
    if step:
        print(
            f"  a micro-step: {sum(program.bytes for program in step) / 1e9:.1f} GB (by inductor's "
            f"own count {sum(k.scheduler_bytes for program in step for k in program.kernels) / 1e9:.1f}), predicted "
            f"{1000 * sum(k.seconds(card.card) for program in step for k in program.kernels):.1f} ms"
        )
    if not arguments.no_kernels:
        compiled = compile_kernels(card)
        print(f"  {len(compiled)} Triton kernels compiled")
        seen = collections.Counter()
        for kernel in compiled:
            if "flex_attention" in kernel.name:
                way = "backward" if "backward" in kernel.name else "forward"
                line = (
                    f"  attention {way}: {kernel.shared_memory} of {card.card.shared_memory} bytes of shared memory, "
                    f"{kernel.registers} registers, {kernel.stack} bytes of stack a thread"
                )
                seen[line] += 1
        for line, number in seen.items():
            print(f"{line} ({number} kernels)")


def look_at_all(arguments: argparse.Namespace) -> int:
    """Every card, each in a process of its own, two at a time."""

    def start(capability: int) -> subprocess.CompletedProcess:
        layers = arguments.layers if capability == 90 else min(arguments.layers, LAYERS_OF_OTHERS)
        command = [
            sys.executable,
            __file__,
            "--script",
            arguments.script,
            "--capability",
            str(capability),
        ]
        command += [
            "--tokens",
            str(arguments.tokens),
            "--layers",
            str(layers),
            "--top",
            str(arguments.top),
        ]
        command += ["--graphs", *arguments.graphs] + ["--no-kernels"] * arguments.no_kernels
        return subprocess.run(command, capture_output=True, text=True)

    code = 0
    print(
        f"Capability 9.0 with {arguments.layers} layers, the others with at most {LAYERS_OF_OTHERS}, to save time."
    )
    order = sorted(CARDS, key=lambda capability: capability != 90)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, order):
            print(done.stdout, end="", flush=True)
            if done.returncode:
                print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
                code = max(code, done.returncode)
    return code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--script", default=str(Path(__file__).resolve().parents[1] / "train_gpt.py")
    )
    parser.add_argument(
        "--capability", type=int, choices=CARDS, help="one card alone; default: all"
    )
    parser.add_argument("--tokens", type=int, default=48 * 1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument(
        "--top", type=int, default=0, help="print so many of each program's slowest kernels"
    )
    graphs = ["training", "variants", "validation", "operators", "optimizers"]
    parser.add_argument("--graphs", nargs="+", choices=graphs, default=graphs)
    parser.add_argument(
        "--no-kernels", action="store_true", help="count, and compile nothing by ptxas"
    )
    arguments = parser.parse_args()
    if not Path(arguments.script).is_file():
        parser.error(f"there is no script at {arguments.script}")
    if arguments.capability is None:
        return look_at_all(arguments)
    try:
        look(arguments)
    except ProgramError as error:
        print(f"gpu_program.py: capability {arguments.capability / 10}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
