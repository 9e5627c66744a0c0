"""Compile the GPU program of train_gpt.py on a machine that has no GPU, and look at it.

    bash tests/gpu_program.sh                                  all cards, as CI runs it
    bash tests/gpu_program.sh --capability 90 --top 10         one card, and its slowest kernels
    bash tests/gpu_program.sh --capability 90 --no-kernels --preset medium --train_seq_len 32768

Flags that it does not know are the training script's own. The script's network runs on fake CUDA
tensors, which have shapes and no data. torch.compile does on them all that it does on a card, but
nothing is executed: inductor's scheduler tells what each kernel reads, writes and computes, and
Triton and ptxas compile every kernel for the card. Exit code 1 where a graph breaks or a kernel
does not compile or does not fit, 2 where the command is at fault.

The graphs are those of a training step and of a validation. Optimizers run eagerly: nothing of Muon
or Adam is compiled. The FP8 operators are part of the graphs, since the compiler sees into them.

What differs from a card: the CUDA runtime is a library of a few functions that answer "one device"
(SHIM below), the device's properties are those of CARDS, and where a card would time several launch
configurations of a kernel, the first one that fits counts. Predicted times take each kernel at its
data sheet's bandwidth or matmul rate, whichever is slower: lower bounds, not measurements.
Needs the CUDA build of torch 2.13, whose private names it uses (see `private_names`), and cc.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import importlib.util
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import traceback
import types
import unittest.mock
from pathlib import Path

TORCH_VERSION = "2.13.0"
VOCAB_SIZE = 50257
LAYERS_OF_OTHERS = 6
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Card:
    """The card that stands for a compute capability, with its data sheet's dense rates."""

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


class UsageError(Exception):
    """What the user can mend, in one sentence."""


@dataclasses.dataclass
class Kernel:
    """One launch: what it moves and computes, and which operators of the network it stands for."""

    name: str
    operators: str
    bytes: int  # with every buffer counted whole
    inductor_bytes: int  # by inductor's own count, which cuts buffers short at 1e9 elements
    flop: float

    def seconds(self, card: Card) -> float:
        """The least that the card needs for it."""
        rate = card.fp8 if "scaled_mm" in self.name else card.bf16
        return max(self.bytes / card.bandwidth, self.flop / rate)


@dataclasses.dataclass
class Program:
    """One compiled graph: its launches, and the most memory that its tensors take at a time."""

    name: str
    kernels: list[Kernel]
    peak_bytes: int

    def total(self, field: str) -> float:
        """The sum of a field over all kernels."""
        return sum(getattr(kernel, field) for kernel in self.kernels)

    def milliseconds(self, card: Card) -> float:
        """The sum of all kernels' lower bounds."""
        return 1000 * sum(kernel.seconds(card) for kernel in self.kernels)


@dataclasses.dataclass
class Resources:
    """What a compiled kernel takes of a card."""

    name: str
    shared_memory: int  # bytes
    registers: int  # a thread
    stack: int  # bytes a thread, for registers that spill


# --------------------------------------------------------------------------------------------------
# The pretended card


def load_shim():
    """Put the pretended CUDA runtime before the real one, and in place of the driver."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "shim.c"), Path(folder, "shim.so")
        source.write_text(SHIM)
        flags = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["cc", *flags, "-o", library, source], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


# Everything of torch and Triton that is not public.
PRIVATE = (
    "torch._dynamo.device_interface.CudaInterface",
    "torch._inductor.config",
    "torch._inductor.ir",
    "torch._inductor.memory",
    "torch._inductor.scheduler",
    "torch._inductor.async_compile.AsyncCompile",
    "torch._inductor.codecache.PyCodeCache",
    "torch._inductor.codegen.triton.TritonScheduling",
    "torch._inductor.fx_passes.joint_graph.UniformValueConstantFolder",
    "torch._inductor.graph.GraphLowering",
    "torch._inductor.runtime.triton_helpers",
    "torch._inductor.virtualized.V",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._subclasses.fake_tensor.unset_fake_temporarily",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "triton.backends.compiler.GPUTarget",
    "triton.runtime.driver.driver",
)


def private_names() -> types.SimpleNamespace:
    """What PRIVATE lists, each by the last part of its name."""
    names = {path.rpartition(".")[2]: pkgutil.resolve_name(path) for path in PRIVATE}
    return types.SimpleNamespace(**names)


def constant(answer):
    """A function that gives this answer to whatever it is asked."""

    def give(*_, **__):
        return answer

    return give


def stay(module, device):
    """Stands for a module's `to`."""
    return module


class PretendedCard:
    """Stands in for a card and records what inductor makes for it.

    Exists once a process, before any tensor is on "cuda".
    """

    def __init__(self, capability: int, torch, private: types.SimpleNamespace):
        self.capability, self.card = capability, CARDS[capability]
        self.torch, self.private = torch, private
        self.stage = ""  # what is compiled now, for people
        self.programs: list[Program] = []
        # Triton source without its name, to the name and the source as it was.
        self.sources: dict[str, tuple[str, str]] = {}
        self.answer_questions()
        self.fold_constants_on_the_host()
        self.record_programs()

    def properties(self) -> types.SimpleNamespace:
        """The device's properties."""
        return types.SimpleNamespace(
            name=self.card.name,
            major=self.capability // 10,
            minor=self.capability % 10,
            multi_processor_count=self.card.multiprocessors,
            total_memory=self.card.memory_gib << 30,
            warp_size=32,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048 if self.capability in (80, 90, 100) else 1536,
            max_threads_per_block=1024,
            L2_cache_size=50 << 20,
            gcnArchName="",
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.card.shared_memory,
            shared_memory_per_multiprocessor=self.card.shared_memory + 1024,
        )

    def answer_questions(self):
        """Answer every question about the device as the card would."""
        torch, private, properties = self.torch, self.private, self.properties()
        answers = {
            "is_available": True,
            "is_bf16_supported": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": properties,
            "get_device_capability": (properties.major, properties.minor),
            "get_device_name": properties.name,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
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
        # Otherwise torch.tensor(..., device="cuda") would take memory on the device.
        private.FakeTensorMode.avoid_device_init = True
        private.config.compile_threads = 1
        private.config.fx_graph_cache = False
        private.config.use_static_cuda_launcher = False
        torch._functorch.config.enable_autograd_cache = False

    def fold_constants_on_the_host(self):
        """Inductor computes constants for real: let it do so without a device."""
        private, torch = self.private, self.torch
        fold_constants = private.UniformValueConstantFolder.run

        class OnTheHost(private.TorchDispatchMode):
            def __torch_dispatch__(self, function, _, arguments=(), keywords=None):
                keywords = dict(keywords or {})
                if keywords.get("device") is not None:
                    keywords["device"] = torch.device("cpu")
                return function(*arguments, **keywords)

        def fold_on_the_host(folder, *arguments):
            with OnTheHost():
                return fold_constants(folder, *arguments)

        private.UniformValueConstantFolder.run = fold_on_the_host

    def record_programs(self):
        """Let inductor hand over its graphs and Triton kernels, instead of running them."""
        private = self.private
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
            outputs = [self.describe_output(output) for output in graph.graph_outputs]

            def call(arguments):
                arguments.clear()
                return [make() for make in outputs]

            return types.SimpleNamespace(call=call, __file__=module.__file__)

        private.TritonScheduling.define_kernel = define_and_note
        private.AsyncCompile.triton = keep_source
        private.GraphLowering.compile_to_module = compile_and_record

    def describe_output(self, output):
        """A function that makes a tensor like this output of a graph; or None, where it is none."""
        if not hasattr(output, "get_size") or output.maybe_get_layout() is None:
            return constant(None)
        size, stride = (list(map(int, n)) for n in (output.get_size(), output.get_stride()))
        place = dict(dtype=output.get_dtype(), device=output.get_device())

        def make():
            return self.torch.empty_strided(size, stride, **place)

        return make

    def program(self, graph, kernel_of_node: dict[str, str]) -> Program:
        """What the scheduler knows of a graph after code was made for it."""
        nodes, memory = graph.scheduler.nodes, self.private.memory
        with self.private.V.set_graph_handler(graph):
            kernels = [self.kernel(node, kernel_of_node, graph) for node in nodes]
            inputs = memory.get_freeable_input_buf(nodes, set(graph.graph_inputs))
            peak, _ = memory.estimate_peak_memory(nodes, inputs, set(graph.get_output_names()))
        name = f"{self.stage}, {'backward' if graph.is_backward else 'forward'}"
        return Program(name, [kernel for kernel in kernels if kernel.bytes], peak)

    def kernel(self, node, kernel_of_node: dict[str, str], graph) -> Kernel:
        """One node of the schedule: a Triton kernel, or a call of a library or an operator."""
        parts = list(node.get_nodes())
        external = str(getattr(node.node, "python_kernel_name", None) or type(node).__name__)
        names = [kernel_of_node.get(part.get_name()) for part in parts]
        origins = {
            origin.name: None  # a dictionary keeps the order
            for part in parts
            if part.node is not None
            for origin in part.node.get_origins()
        }
        accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
        if isinstance(node, self.private.scheduler.SchedulerNode):
            whole = accesses
        else:  # a fused or an external one, of which inductor counts 1e9 elements a buffer
            whole = {name: max(n, self.whole_size(name, graph)) for name, n in accesses.items()}
        return Kernel(
            name=next(filter(None, names), external),
            operators=" ".join(origins),
            bytes=sum(whole.values()),
            inductor_bytes=sum(accesses.values()),
            flop=float(node.estimate_flops() or 0),
        )

    def whole_size(self, name: str, graph) -> int:
        """All bytes of a buffer; of an operator with several outputs, of those that are used."""
        ir = self.private.ir
        buffer = graph.try_get_buffer(name)
        layout = buffer.maybe_get_layout() if isinstance(buffer, ir.IRNode) else None
        if isinstance(layout, ir.MultiOutputLayout):
            users = [user.node.node for user in graph.scheduler.name_to_buf[name].users]
            outputs = [user for user in users if isinstance(user, ir.MultiOutput)]
            return sum(self.whole_size(output.get_name(), graph) for output in outputs)
        if not isinstance(layout, ir.Layout):
            return 0
        return math.prod(map(int, layout.size)) * layout.dtype.itemsize


# --------------------------------------------------------------------------------------------------
# The script's graphs


def load_script(path: str):
    """The training script as a module. Dataclasses want it to be listed among the modules."""
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = script
    spec.loader.exec_module(script)
    return script


class Lowering:
    """Takes the script's graphs through torch.compile, one graph a method."""

    def __init__(self, script, hp, card: PretendedCard, mode):
        self.script, self.hp, self.card, self.torch = script, hp, card, card.torch
        self.mode = mode
        self.blocks: dict[str, list[int]] = {}  # of each stage, see attention_blocks
        self.state_bytes = 0

    def network(self, stage: str, tokens: int, **changes):
        """The network on the pretended card, with some settings changed."""
        self.card.stage = stage
        hp = dataclasses.replace(self.hp, **changes)
        device = self.torch.device("cuda")
        machine = self.script.Machine(device, self.card.card.name, self.torch.bfloat16)
        # Fake parameters cannot be moved, so they are made where they will be.
        unmoved = unittest.mock.patch.object(self.torch.nn.Module, "to", stay)
        with self.mode, device, unmoved:
            network = self.script.build_model(hp, VOCAB_SIZE, machine)
            adam, muon = self.script.build_optimizers(network, hp, machine)
        weights = sum(p.nbytes for p in network.parameters())
        moments = sum(p.nbytes for group in adam.param_groups for p in 2 * group["params"])
        self.state_bytes = weights + moments + sum(p.nbytes for p in muon.owner)
        self.blocks[stage] = self.attention_blocks(network, tokens)
        return network

    def inputs(self, tokens: int) -> tuple:
        """Ids, targets and window of a sequence, without data."""
        torch = self.torch
        shapes = ((tokens,), torch.int32), ((tokens,), torch.int64), ((), torch.int32)
        return tuple(torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in shapes)

    def attention_blocks(self, network, tokens: int) -> list[int]:
        """How many blocks of 128 x 128 each attention call computes, first layer first.

        At the longest window, in documents of about 700 tokens, lognormally distributed, as on the
        web.
        """
        torch, script = self.torch, self.script
        generator = torch.Generator().manual_seed(0)
        lengths = torch.empty(tokens).log_normal_(6.05, 1.0, generator=generator)
        starts = lengths.long().clamp(min=2).cumsum(0)
        ids = torch.zeros(tokens, dtype=torch.int32)
        ids[starts[starts < tokens]] = VOCAB_SIZE - 1
        window = torch.tensor(self.hp.max_window // BLOCK, dtype=torch.int32)
        masks = network.create_block_masks(ids, window)
        counts = {id(m): int(m.kv_num_blocks.sum() + m.full_kv_num_blocks.sum()) for m in masks}
        used = []

        def note(q, k, v, block_mask, scale):
            used.append(counts[id(block_mask)])
            return torch.empty_like(v)

        attention = script.attention
        network.create_block_masks, script.attention = constant(masks), note
        with self.mode, torch.no_grad():
            network.hidden(self.inputs(tokens)[0], self.inputs(tokens)[2])
        script.attention = attention
        del network.create_block_masks
        return used

    def training(self, fp8: str):
        """A micro-step, forward and backward."""
        tokens = self.hp.train_seq_len
        network = self.network(f"training, FP8 {fp8}", tokens, fp8=fp8)
        compiled = self.torch.compile(network, dynamic=False, fullgraph=True)
        with self.mode:
            compiled(*self.inputs(tokens)).backward()

    def validation(self):
        """The loss of a sequence, without gradients."""
        tokens = self.hp.val_seq_len
        network = self.network("validation", tokens).eval()
        compiled = self.torch.compile(network, dynamic=False, fullgraph=True)
        with self.mode, self.torch.no_grad():
            compiled(*self.inputs(tokens))

    def count_attention(self, program: Program):
        """Give attention kernels the FLOP of their blocks.

        Forward that is two products, backward seven, since scores are computed twice.
        """
        stage, _, way = program.name.rpartition(", ")
        blocks = self.blocks[stage][:: -1 if way == "backward" else 1]
        product = 2 * BLOCK * BLOCK * self.hp.head_dim * self.hp.num_heads
        kernels = [kernel for kernel in program.kernels if "triton_tem" in kernel.name]
        for kernel, count in zip(kernels, blocks, strict=True):
            kernel.flop = product * count * (7 if way == "backward" else 2)

    def run(self, graphs: list[str]):
        """Compile the chosen graphs. Raises ProgramError where one breaks."""
        supported = self.script.fp8_supported(self.torch.device("cuda"))
        variants = [fp8 for fp8 in ("none", "all") if fp8 != self.hp.fp8] if supported else []
        steps = {
            "training": [(self.training, self.hp.fp8 if supported else "none")],
            "variants": [(self.training, fp8) for fp8 in variants],
            "validation": [(self.validation,)],
        }
        for step, *arguments in [step for graph in graphs for step in steps[graph]]:
            self.torch._dynamo.reset()
            try:
                step(*arguments)
            except Exception as error:
                fault = whose_fault(error, self.script.__file__)
                raise ProgramError(f"{self.card.stage}: {sentence(error)}; {fault}") from error
        for program in self.card.programs:
            self.count_attention(program)


def sentence(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def whose_fault(error: BaseException, script: str) -> str:
    """The script's, where frames of it lie in the tracebacks, or in the stack that was traced.

    Otherwise that of the file which the innermost frame is of.
    """
    frames = []
    while error is not None:
        frames += traceback.extract_tb(error.__traceback__)
        frames += getattr(error, "real_stack", [])
        error = error.__cause__
    guilty = [frame for frame in frames if frame.filename == script]
    if guilty:
        return f"the script is at fault, at {Path(script).name}, line {guilty[-1].lineno}."
    if frames[-1].filename == __file__:
        return f"gpu_program.py itself is at fault, at line {frames[-1].lineno}."
    return (
        f"torch is at fault, or cannot do this, at {frames[-1].filename}, line {frames[-1].lineno}."
    )


def canary(card: PretendedCard):
    """Take a small network the same way. Where it fails, the script is not at fault."""
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
    compiled = torch.compile(network, dynamic=False, fullgraph=True)
    compiled(torch.empty(256, 512, device="cuda")).backward()
    card.programs.clear()
    card.sources.clear()


# --------------------------------------------------------------------------------------------------
# The kernels


def compile_kernels(card: PretendedCard) -> list[Resources]:
    """Every Triton kernel through Triton and ptxas. Raises ProgramError where one fails."""
    return [compile_kernel(card, name, source) for name, source in card.sources.values()]


def compile_kernel(card: PretendedCard, name: str, source: str) -> Resources:
    """One kernel in the first launch configuration that compiles and fits."""
    kernel = getattr(card.private.PyCodeCache.load(source), name)
    problems = []
    for configuration in kernel.configs:
        try:
            compiled = kernel._precompile_config(configuration)
        except Exception as error:
            problems.append(sentence(error))
            continue
        compiled = getattr(compiled, "kernel", compiled)
        needed = compiled.metadata.shared
        if needed <= card.card.shared_memory:
            return resources(name, compiled)
        problems.append(f"it needs {needed} of {card.card.shared_memory} bytes of shared memory")
    raise ProgramError(
        f"{name} does not compile or does not fit: {'; '.join(dict.fromkeys(problems))}; "
        "the script is at fault, which asks for a kernel of this size, or torch, which wrote it."
    )


def resources(name: str, compiled) -> Resources:
    """Registers and stack from the machine code, for the attention kernels alone: it takes time."""
    numbers = {"REG": 0, "STACK": 0}
    if "triton_tem" in name:
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [tool, "-res-usage", file.name]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        numbers |= {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", told)}
    return Resources(name, compiled.metadata.shared, numbers["REG"], numbers["STACK"])


# --------------------------------------------------------------------------------------------------
# The report


def describe(programs: list[Program], name: str, card: Card):
    """A line for a program, or for several together."""
    gigabytes, by_inductor, teraflop = (
        sum(program.total(field) for program in programs) / unit
        for field, unit in (("bytes", 1e9), ("inductor_bytes", 1e9), ("flop", 1e12))
    )
    print(
        f"  {name}: {sum(len(program.kernels) for program in programs)} kernels, "
        f"{by_inductor:.1f} GB by inductor's count, {gigabytes:.1f} GB with large buffers counted "
        f"whole, {teraflop:.2f} TFLOP, at least "
        f"{sum(program.milliseconds(card) for program in programs):.1f} ms, "
        f"peak {max(program.peak_bytes for program in programs) / 2**30:.1f} GiB"
    )


def describe_slowest(program: Program, card: Card, top: int):
    """The slowest kernels of a program."""
    for kernel in sorted(program.kernels, key=lambda kernel: -kernel.seconds(card))[:top]:
        print(
            f"    {1000 * kernel.seconds(card):7.3f} ms {kernel.bytes / 1e9:6.2f} GB "
            f"{kernel.flop / 1e12:6.3f} TFLOP  {kernel.name[:50]}: {kernel.operators[:110]}"
        )


def describe_kernels(compiled: list[Resources], card: Card):
    """The number of kernels, and a line for each kind of attention kernel."""
    print(f"  {len(compiled)} different Triton kernels compiled, all of which fit")
    seen = collections.Counter()
    for kernel in compiled:
        if "triton_tem" in kernel.name:
            way = "backward" if "backward" in kernel.name else "forward"
            line = f"{way}: {kernel.shared_memory} of {card.shared_memory} bytes of shared memory"
            seen[f"{line}, {kernel.registers} registers, {kernel.stack} bytes of stack"] += 1
    for line, number in seen.items():
        print(f"  attention {line} ({number} kernels)")


def pretend(kind: type, capability: int) -> tuple:
    """A pretended card of this class, and the mode in which tensors are fake."""
    load_shim()
    import torch

    if torch.__version__.split("+")[0] != TORCH_VERSION or not torch.version.cuda:
        raise UsageError(
            f"gpu_program.py needs the CUDA build of torch {TORCH_VERSION}, found "
            f"{torch.__version__}; run bash tests/gpu_program.sh, which installs it."
        )
    try:
        card = kind(capability, torch, private_names())
        return card, card.private.FakeTensorMode(allow_non_fake_inputs=True)
    except Exception as error:
        raise ProgramError(f"torch is at fault, not the script: {sentence(error)}.") from error


def prepare(arguments: argparse.Namespace) -> Lowering:
    """The pretended card, seen to work, and the script for it. Raises ProgramError."""
    card, mode = pretend(PretendedCard, arguments.capability)
    try:
        with mode:
            canary(card)
    except Exception as error:
        raise ProgramError(
            "torch is at fault, or gpu_program.py itself, and not the script, since a small "
            f"network does not compile: {sentence(error)}."
        ) from error
    script = load_script(arguments.script)
    try:
        hp, _ = script.parse_arguments(arguments.flags)
    except script.UserError as error:
        raise UsageError(str(error)) from error
    return Lowering(script, hp, card, mode)


def look(arguments: argparse.Namespace):
    """One script on one card: lower, count, compile, print. Raises ProgramError."""
    lowering = prepare(arguments)
    lowering.run(arguments.graphs)
    hp, programs, card = lowering.hp, lowering.card.programs, lowering.card.card
    print(
        f"capability {arguments.capability / 10} ({card.name}), {hp.num_layers} layers, "
        f"{hp.train_seq_len} tokens in training, {hp.val_seq_len} in validation; besides each "
        f"peak, weights and optimizers' state take {lowering.state_bytes / 2**30:.1f} GiB"
    )
    for program in programs:
        describe([program], program.name, card)
        describe_slowest(program, card, arguments.top)
    step = [program for program in programs if program.name.startswith("training")][:2]
    if step:
        describe(step, "a micro-step", card)
    if not arguments.no_kernels:
        describe_kernels(compile_kernels(lowering.card), card)


def look_at_numbers(arguments: argparse.Namespace):
    """The attention kernels' numbers, by Triton's interpreter. Raises ProgramError."""
    os.environ["TRITON_INTERPRET"] = "1"
    import gpu_numbers

    print(f"numbers of the kernels for capability {arguments.capability / 10}, on the CPU")
    gpu_numbers.compare(arguments.script, arguments.capability)


def look_at_all(arguments: argparse.Namespace) -> int:
    """Every card and the numbers, each in a process of its own, two at a time.

    Returns the exit code.
    """

    def start(flags: list[str]) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, *sys.argv[1:], *flags]
        return subprocess.run(command, capture_output=True, text=True)

    print(f"All layers for capability 9.0, and {LAYERS_OF_OTHERS} for the others, to save time.")
    print("Times are lower bounds, at the rates of data sheets; nothing has run on a GPU.")
    parts = [["--capability", "90"], ["--capability", "90", "--numbers"]]
    for capability in CARDS:
        if capability != 90:
            flags = ["--num_layers", str(LAYERS_OF_OTHERS)]
            parts.append(["--capability", str(capability), *flags])
    code = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(start, parts):
            print(done.stdout, end="", flush=True)
            if done.returncode:
                print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
                code = max(code, done.returncode)
    return code


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    script = Path(__file__).resolve().parents[1] / "train_gpt.py"
    graphs = ["training", "variants", "validation"]
    parser.add_argument("--script", default=str(script), help="the training script")
    parser.add_argument("--capability", type=int, choices=CARDS, help="one card alone")
    parser.add_argument("--graphs", nargs="+", choices=graphs, default=graphs)
    parser.add_argument("--top", type=int, default=0, help="slowest kernels to print of each graph")
    parser.add_argument("--no-kernels", action="store_true", help="count, and compile none")
    parser.add_argument("--numbers", action="store_true", help="see tests/gpu_numbers.py")
    arguments, arguments.flags = parser.parse_known_args()
    if not Path(arguments.script).is_file():
        parser.error(f"there is no script at {arguments.script}")
    if arguments.capability is None and not arguments.numbers:
        return look_at_all(arguments)
    arguments.capability = arguments.capability or 90
    try:
        if arguments.numbers:
            look_at_numbers(arguments)
        else:
            look(arguments)
    except (ProgramError, UsageError) as error:
        print(f"gpu_program.py: capability {arguments.capability / 10}: {error}", file=sys.stderr)
        return 1 if isinstance(error, ProgramError) else 2
    return 0


if __name__ == "__main__":
    sys.modules["gpu_program"] = sys.modules["__main__"]  # for gpu_numbers.py
    sys.exit(main())
