"""Hold the numbers of the GPU's attention against the dense twin, on a machine without a GPU.

    bash tests/gpu_program.sh --numbers

The compiler makes the GPU program of two attention calls, under a long and a short mask of the
script's, on fake CUDA tensors. Each launch of it then runs on CPU tensors: Triton kernels by
Triton's interpreter, the rest by torch. Output and gradients are compared with those of
tests/twins.py in float32. Matmuls by tensor cores, and their rounding, are not imitated.
Runs in a process of its own, since Triton's interpreter has to be chosen before Triton is imported.
"""

import contextlib
import types
from pathlib import Path

import gpu_program

TOKENS, HEADS, HEAD_DIM, VOCAB_SIZE, SCALE = 512, 2, 64, 257, 0.12
WINDOW = 2  # blocks
TOLERANCE = 1e-4  # of the largest number; differences are float32 rounding, about 1e-6


class Launch:
    """Stands for a compiled Triton kernel, and runs it by the interpreter."""

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, *arguments, stream):
        """The call that inductor's program makes: tensors, sizes and grid, in this order."""
        from torch._inductor.runtime.triton_heuristics import GridExpr

        kernel, configuration = self.kernel, self.kernel.configs[0]
        constants = configuration.kwargs
        names = [name for name in kernel.fn.arg_names if name not in constants]
        named = dict(zip(names, arguments, strict=False))
        grid_names = kernel.inductor_meta.get("extra_launcher_args", [])
        grid_sizes = dict(zip(grid_names, arguments[len(names) :], strict=True))
        rule = GridExpr.from_meta(kernel.inductor_meta, configuration, mode="python")
        grid = rule.eval_slow({**named, **constants, **grid_sizes})
        kernel.fn[grid](**named, **constants)


class InterpretedCard(gpu_program.PretendedCard):
    """Runs each program on CPU tensors that belong to the fake ones."""

    def record_programs(self):
        """Let inductor's programs run, each launch on the CPU."""
        private, torch = self.private, self.torch
        compile_to_module = private.GraphLowering.compile_to_module
        self.real, self.alive = {}, []  # by storage; the fake tensors keep their storages

        def keep_source(compiler, name, source, *_, **__):
            self.sources[name] = source
            return name

        def allocate(size, stride, dtype):
            return torch.empty_strided(size, stride, dtype=dtype)

        def compile_and_run(graph):
            self.sources.clear()
            module = compile_to_module(graph)
            for name, source in dict(self.sources).items():
                kernel = getattr(private.PyCodeCache.load(source), name)
                setattr(module, name, Launch(kernel))
            module.empty_strided_cuda = allocate
            module.get_raw_stream = gpu_program.constant(0)
            outputs = [self.describe_output(output) for output in graph.graph_outputs]

            def call(arguments):
                fakes = list(arguments)
                arguments.clear()
                with private.unset_fake_temporarily():
                    results = module.call([self.real_one(fake) for fake in fakes])
                made = [make() for make in outputs]
                for fake, result in zip(made, results, strict=True):
                    if fake is not None:
                        self.pair(fake, result)
                return made

            return types.SimpleNamespace(call=call, __file__=module.__file__)

        private.AsyncCompile.triton = keep_source
        private.GraphLowering.compile_to_module = compile_and_run
        torch.cuda._DeviceGuard = gpu_program.constant(contextlib.nullcontext())
        torch.cuda.set_device = gpu_program.constant(None)

    def pair(self, fake, real):
        """Let a CPU tensor be what a fake one holds."""
        self.alive.append(fake)
        self.real[fake.untyped_storage()._cdata] = real

    def real_one(self, fake):
        """The CPU tensor of a fake one; what is no tensor stays."""
        if not isinstance(fake, self.torch.Tensor):
            return fake
        return self.real[fake.untyped_storage()._cdata]


def make_data(torch) -> tuple:
    """Queries, keys, values, the output's gradient, ids of several documents, and a window."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, HEADS, TOKENS, HEAD_DIM
    tensors = [torch.randn(shape, generator=generator) for _ in range(4)]
    ids = torch.zeros(TOKENS, dtype=torch.int32)
    ids[[0, 70, 300]] = VOCAB_SIZE - 1  # so that there are full, partial and empty blocks
    return *tensors, ids, torch.tensor(WINDOW, dtype=torch.int32)


def by_kernels(script, card, mode, data: tuple) -> list:
    """The output, and the gradients of queries, keys and values, by the GPU's program."""
    torch = card.torch
    network = types.SimpleNamespace(vocab_size=VOCAB_SIZE)

    def attend_twice(q, k, v, ids, window):
        masks = script.GPT.create_block_masks(network, ids, window)
        return sum(script.attention(q, k, v, mask, SCALE) for mask in masks)

    with mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in data]
        for fake, real in zip(fakes, data, strict=True):
            card.pair(fake, real)
        q, k, v, gradient, ids, window = fakes
        inputs = [t.requires_grad_() for t in (q, k, v)]
        output = torch.compile(attend_twice, dynamic=False, fullgraph=True)(*inputs, ids, window)
        gradients = torch.autograd.grad(output, inputs, gradient)
    return [card.real_one(fake) for fake in (output.detach(), *gradients)]


def by_twin(data: tuple) -> list:
    """The same by dense attention."""
    import twins

    q, k, v, gradient, ids, window = data
    inputs = [t.clone().requires_grad_() for t in (q, k, v)]
    masks = [twins.dense_mask(ids, VOCAB_SIZE - 1, int(window) // n) for n in (1, 2)]
    output = sum(twins.dense_attention(*inputs, mask, SCALE) for mask in masks)
    output.backward(gradient)
    return [output.detach(), *(t.grad for t in inputs)]


def compare(script_path: str, capability: int):
    """Print the largest differences. Raises ProgramError where one is too large."""
    card, mode = gpu_program.pretend(InterpretedCard, capability)
    script = gpu_program.load_script(script_path)
    data = make_data(card.torch)
    try:
        found = by_kernels(script, card, mode, data)
    except Exception as error:
        fault = gpu_program.whose_fault(error, script.__file__)
        raise gpu_program.ProgramError(f"{gpu_program.sentence(error)}; {fault}") from error
    names = "output", "gradient of q", "gradient of k", "gradient of v"
    for name, ours, twin in zip(names, found, by_twin(data), strict=True):
        difference = float((ours - twin).abs().max() / twin.abs().max())
        print(f"  attention's {name}: {difference:.1e} from the dense twin's, of its largest")
        if not difference < TOLERANCE:
            raise gpu_program.ProgramError(
                f"attention's {name} by the GPU's kernels is {difference:.1e} from "
                f"{Path(script_path).name}'s dense twin, {TOLERANCE} is allowed; the mask that the "
                "script gives to FlexAttention is at fault, or torch's kernel."
            )
