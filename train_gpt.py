"""Train a 124M-parameter GPT on FineWeb tokens to a validation loss of 3.28, as fast as can be.

The recipe that took 8 H100 GPUs just under three minutes in January 2025, in one file that runs unchanged on any number of GPUs, on
one, or on a CPU, and imports without running. What has been seen, on which hardware, with which log: the table in README.md.

    torchrun --standalone --nproc_per_node=8 train_gpt.py         the speedrun
    python train_gpt.py --preset tiny                             a small model, in a minute and a half on two CPU cores
"""

import argparse, bisect, concurrent.futures, contextlib, copy, ctypes, dataclasses, datetime, functools, glob, hashlib, importlib, json, math, os
import platform, re, select, signal, subprocess, sys, threading, time, warnings
from pathlib import Path

import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

# ---------- Machine: every choice of device and precision is made here and flows from here
BF16_PEAK_FLOPS = {  # dense, by the vendors' data sheets; the first name that is part of the card's name counts; 0 for others
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10": 125e12, "L40S": 362e12,
    "L4": 121e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
class UserError(Exception):
    """Something that the user can mend, in one sentence: what was found, where, and what to do."""
class Stopped(BaseException):
    """The run's end before its last step, on all processes alike: the exit code, and a sentence for the first one to say."""
def process_place() -> tuple[int, ...]:
    """This process's number, its number on this machine, and how many there are, as torchrun tells them."""
    return tuple(int(os.environ.get(*variable)) for variable in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
@torch.compiler.assume_constant_result
def fp8_supported(device: torch.device) -> bool:
    """Whether the device multiplies FP8 in hardware: CUDA, compute capability 8.9 (Ada) and up."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
@dataclasses.dataclass(frozen=True)
class Machine:
    """What this process runs on, and as which of how many processes."""
    device: torch.device
    name: str  # of the GPU or the CPU
    dtype: torch.dtype  # of the activations, when the settings leave it to the machine: the faster one
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    @classmethod
    def detect(cls) -> "Machine":
        """This process's own GPU, before anything else touches one, or the CPU. Raises UserError where a GPU lacks, or bfloat16."""
        place = process_place()
        if not torch.cuda.is_available():
            model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else "")
            name = f"CPU, {model[1] if model else platform.machine()}, {torch.get_num_threads()} threads a process"
            if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's thresholds: keep freed memory,
                for option, bits in ((-1, 28), (-2, 28), (-3, 25)): mallopt(option, 1 << bits)  # for fresh pages cost more than computing
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # others imitate bfloat16, slowly
            return cls(torch.device("cpu"), name, torch.bfloat16 if fast else torch.float32, *place)
        if place[1] >= (count := torch.cuda.device_count()):
            raise UserError(f"{count} GPU(s) found here, and process {place[1]} would need one more; start --nproc_per_node={count}.")
        # Read when the first memory is taken, by either name; less is lost to fragmentation.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))
        torch.cuda.set_device(device := torch.device("cuda", place[1]))
        torch.empty(1, device=device)  # makes the CUDA context on this card, and on no other
        name = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(f"{name} has no bfloat16; use an Ampere or newer GPU, or CUDA_VISIBLE_DEVICES='' --preset tiny, on the CPU.")
        return cls(device, name, torch.bfloat16, *place)
    activations = lambda self, name: self.dtype if name == "auto" else getattr(torch, name)  # of --dtype
    is_gpu = property(lambda self: self.device.type == "cuda")  # compiles, and works while the host goes on
    peak_flops = property(lambda self: next((flops for name, flops in BF16_PEAK_FLOPS.items() if re.search(rf"\b{name}\b", self.name)), 0.0))
    @functools.cached_property
    def map(self):
        """`map`; on a CPU two at a time, each on half of the cores: small tensors gain more from that than from all."""
        half = 0 if self.is_gpu or self.world_size > 1 else torch.get_num_threads() // 2
        return concurrent.futures.ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(half,)).map if half else map
    synchronize = lambda self: self.is_gpu and torch.cuda.synchronize(self.device)  # wait until all is done that was asked of it
    def read_later(self, values: Tensor):
        """Start copying a tensor to the host. The function returned waits for that copy alone, and gives its numbers."""
        if not self.is_gpu: return values.tolist
        host, copied = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True), torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), host.tolist())[1]
    def peak_memory(self) -> tuple[int, int]:
        """Peak memory in MiB, (allocated, reserved); on a CPU the most that was ever resident, twice."""
        if self.is_gpu: return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        return (importlib.import_module("resource").getrusage(0).ru_maxrss >> (20 if sys.platform == "darwin" else 10),) * 2  # 0: its own

# ---------- FP8 matmul: e4m3, for gradients e5m2, by fixed scales: "FP8 Formats for Deep Learning" (Micikevicius et al., 2022)
def fused_on_gpu(function):
    """Compile a function of tensors at its first call on a GPU; elsewhere run it as it is."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=False))
    return functools.wraps(function)(lambda *args: compiled()(*args) if args[0].is_cuda else function(*args))
def to_fp8(t: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`t * scale` rounded to an FP8 format. What is too large becomes the format's largest number, not infinity."""
    largest = torch.finfo(dtype).max
    return (t.float() * scale).clamp(-largest, largest).to(dtype)
def scaled_mm(a: Tensor, b: Tensor, a_s: float, b_s: float, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """`a @ b.T / (a_s * b_s)` of two row-major FP8 matrices, the one layout that the hardware multiplies."""
    inverse_a, inverse_b = (a.new_full((), 1 / scale, dtype=torch.float32) for scale in (a_s, b_s))
    return torch._scaled_mm(a, b.T, scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=fast)
@torch.library.custom_op("nanogpt::mm", mutates_args=())
@fused_on_gpu
def mm_op(x: Tensor, w: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor, Tensor]:
    """`x @ w.T` in FP8, bfloat16 (T, out), of x (T, in), w (out, in) with sizes a multiple of 16; and both in e4m3 for the backward pass."""
    x_f8, w_f8 = to_fp8(x, x_s, torch.float8_e4m3fn), to_fp8(w, w_s, torch.float8_e4m3fn)
    return scaled_mm(x_f8, w_f8, x_s, w_s, torch.bfloat16, fast=True), x_f8, w_f8
@torch.library.custom_op("nanogpt::mm_backward", mutates_args=())
@fused_on_gpu
def mm_backward_op(grad: Tensor, x_f8: Tensor, w_f8: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor]:
    """Gradients of `mm` for grad (T, out), which is multiplied in e5m2: of x, bfloat16 (T, in), and of w, float32 (out, in)."""
    grad_f8 = to_fp8(grad, grad_s, torch.float8_e5m2)
    return (scaled_mm(grad_f8, w_f8.T.contiguous(), grad_s, w_s, torch.bfloat16),
            scaled_mm(grad_f8.T.contiguous(), x_f8.T.contiguous(), grad_s, x_s, torch.float32))
def mm_setup_context(ctx, inputs, output) -> None:
    ctx.scales = inputs[2:]
    ctx.save_for_backward(*output[1:]), ctx.mark_non_differentiable(*output[1:])
mm_op.register_fake(lambda x, w, *scales: (x.new_empty(len(x), len(w), dtype=torch.bfloat16), *(
    t.new_empty(t.shape, dtype=torch.float8_e4m3fn) for t in (x, w))))
mm_backward_op.register_fake(lambda grad, x_f8, w_f8, *scales: (
    x_f8.new_empty(x_f8.shape, dtype=torch.bfloat16), w_f8.new_empty(w_f8.shape, dtype=torch.float32)))
mm_op.register_autograd(lambda ctx, grad, *_: (*torch.ops.nanogpt.mm_backward(grad, *ctx.saved_tensors, *ctx.scales), None, None, None),
                        setup_context=mm_setup_context)

# ---------- Muon: momentum, orthogonalised. "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13's name, and the one before
def zeropower_via_newtonschulz5(G: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About the nearest orthogonal matrix: U S V^T becomes U S' V^T, S' between 0.7 and 1.2, by an odd quintic of all singular values,
    in matmuls alone. As steep as can be at zero, it lets small values grow 3.4-fold a step; that large ones hover around 1 does no
    harm. G: (..., rows, cols) of any float dtype, and so the result, in `dtype`. "Old Optimizer, New Norm" (Bernstein & Newhouse, 2024)."""
    if G.ndim < 2: raise ValueError(f"Newton-Schulz needs matrices, got a tensor of shape {tuple(G.shape)}")
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1; 1e-7 lets a zero matrix stay zero
    X = X.to(dtype).reshape(-1, *G.shape[-2:])
    if tall := G.size(-2) > G.size(-1): X = X.mT  # the products below are (rows, rows): let that be the shorter side
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + b A X + c A A X
    return (X.mT if tall else X).reshape(G.shape)
class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (the last two dimensions). Parameters of one shape are a group, of which
    every process takes an equal share (the last ones perhaps less): it reads the gradients of those p alone for which owner[p] is
    its rank, keeps their momentum, and orthogonalises their updates in one batched call. lr: length of a step, times a parameter's
    attribute `lr_mul`, and times sqrt(rows / cols) for a tall matrix, for the same change in what it puts out."""
    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5,
                 rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.bfloat16):
        groups: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.ndim < 2: raise ValueError(f"Muon is for matrices; give the parameter of shape {tuple(p.shape)} to Adam")
            groups.setdefault((p.shape, p.dtype, p.device), []).append(p)
        super().__init__([dict(params=group) for group in groups.values()], dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps))
        self.rank, self.world_size, self.dtype = rank, world_size, dtype
        self.share = lambda group: math.ceil(len(group["params"]) / world_size)  # of a group's parameters, for a process
        self.owner = {p: i // self.share(group) for group in self.param_groups for i, p in enumerate(group["params"])}
    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter by its `.grad`; where that is None it counts as zero."""
        for group, updates, work in [(group, *self.orthogonal_updates(group)) for group in self.param_groups]:
            if work: work.wait()
            tall = max(1, updates.size(-2) / updates.size(-1)) ** 0.5
            for p, update in zip(group["params"], updates): p.add_(update, alpha=-group["lr"] * getattr(p, "lr_mul", 1.0) * tall)
    def orthogonal_updates(self, group: dict) -> tuple:
        """Advance the momentum of this process's share of a group, and gather the updates (n, *shape), zero-padded at the end."""
        shape, mine = group["params"][0].shape, [p for p in group["params"] if self.owner[p] == self.rank]
        updates = group["params"][0].new_zeros(self.share(group), *shape, dtype=self.dtype)
        if mine:
            if mine[0] not in self.state: self.state.update((p, dict(momentum_buffer=torch.zeros_like(p))) for p in mine)
            buffers = [self.state[p]["momentum_buffer"] for p in mine]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            updates[:len(mine)] = zeropower_via_newtonschulz5(torch.stack(ahead), group["ns_steps"], self.dtype)
        if self.world_size == 1: return updates, None
        gathered = updates.new_empty(len(updates) * self.world_size, *shape)
        return gathered, all_gather(gathered, updates, async_op=True)
    def whole_state_dict(self) -> dict:
        """`state_dict`, on process 0 with the momentum of all, who have to call it together; any number of processes can load it."""
        whole = self.state_dict()
        for i, p in enumerate(self.owner) if self.world_size > 1 else ():  # in the order in which state_dict numbers them
            buffer = self.state[p]["momentum_buffer"] if p in self.state else torch.empty_like(p)
            dist.broadcast(buffer, self.owner[p])
            if self.rank == 0: whole["state"][i] = dict(momentum_buffer=buffer.cpu())
        return whole
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what was saved, of the momentum this process's share alone."""
        super().load_state_dict(state_dict)
        for p in [p for p in self.state if self.owner[p] != self.rank]: del self.state[p]

# ---------- Attention: FlexAttention's kernel on a GPU; on a CPU, where that has no backward pass, one for the same BlockMask
BLOCK = 128  # tokens; masks, windows and sequences are made of such blocks
def block_sparse_plan(block_mask: BlockMask) -> tuple[Tensor, Tensor, Tensor | None]:
    """A BlockMask as batched matmuls want it, worked out once: for n query blocks that see at most K key blocks each, their numbers
    (n, K), filled up with others; what to add to the scores, float32 (n, 128, K * 128); which queries see anything, (T, 1), or None."""
    if not hasattr(block_mask, "plan"):
        listed, blocks = block_mask.to_dense()[0, 0].bool().sort(dim=-1, descending=True, stable=True)
        listed, blocks = (t[:, :max(1, int(listed.sum(-1).max()))] for t in (listed, blocks))
        token = torch.arange(len(blocks) * BLOCK, dtype=torch.int32, device=blocks.device).view(-1, BLOCK)
        allowed = block_mask.mask_mod(token[0, 0], token[0, 0], token[:, :, None, None], token[blocks][:, None]) & listed[:, None, :, None]
        allowed = allowed.expand(-1, BLOCK, -1, BLOCK).flatten(2)
        sees = allowed.any(-1, keepdim=True)
        bias = torch.zeros(allowed.shape, device=token.device).masked_fill_(~allowed & sees, float("-inf"))
        block_mask.plan = blocks, bias, None if sees.all() else sees.view(-1, 1)
    return block_mask.plan
class BlockSparseAttention(torch.autograd.Function):
    """Softmax attention over listed blocks, in float32 between products in the inputs' dtype: q, k, v (heads, T, head_dim)."""
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, bias: Tensor, scale: float) -> Tensor:
        H, T, D = q.shape
        q = q.reshape(H, -1, BLOCK, D)
        k, v = (t.reshape(H, len(blocks), -1).index_select(1, blocks.flatten()).view(H, len(blocks), -1, D) for t in (k, v))
        p = torch.softmax(torch.add(bias, q @ k.mT, alpha=scale), dim=-1).to(v.dtype)
        ctx.save_for_backward(q, k, v, p, blocks)
        ctx.scale = scale
        return (p @ v).view(H, T, D)
    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, p, blocks = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        ds = torch._softmax_backward_data(grad @ v.mT, p, -1, p.dtype).mul_(ctx.scale)
        def to_keys(t: Tensor) -> Tensor:  # a key block adds up what came from every query block that saw it
            t = t.view(len(q), blocks.numel(), -1)
            return torch.zeros_like(t[:, :len(blocks)]).index_add_(1, blocks.flatten(), t).view(len(q), -1, q.size(-1))
        return (ds @ k).flatten(1, 2), to_keys(ds.mT @ q), to_keys(p.mT @ grad), None, None, None
@torch.compiler.disable
def block_sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """What `flex_attention` returns for (1, heads, T, head_dim), with a backward pass on every device, in time that grows as T * window."""
    blocks, bias, sees = block_sparse_plan(block_mask)
    out = BlockSparseAttention.apply(q[0], k[0], v[0], blocks, bias, scale)
    return (out if sees is None else out * sees)[None]
def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Attention under a block mask with the kernel that the tensors' device has; shapes as in block_sparse_attention."""
    if q.device.type == "meta": return (q @ k.mT) @ v  # which asks for shapes and dtypes alone, and FlexAttention refuses it
    return (block_sparse_attention if q.device.type == "cpu" else flex_attention)(q, k, v, block_mask=block_mask, scale=scale)

# ---------- Network: a GPT with rotary positions, value embeddings, U-net skips, and attention within documents and windows
def norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, without weights; shape and dtype stay."""
    return F.rms_norm(x, (x.size(-1),))
def next_multiple_of_n(v: float, *, n: int) -> int:
    """The smallest positive multiple of n that is at least v."""
    return max(1, math.ceil(v / n)) * n
class CastedLinear(nn.Module):
    """`x @ weight.T`; weight: (out_features, in_features), float32, cast at each use. use_fp8: in training, where the hardware can."""
    def __init__(self, in_features: int, out_features: int, use_fp8: bool = False, x_s: float = 1.0, w_s: float = 1.0, grad_s: float = 1.0):
        super().__init__()
        self.use_fp8, self.x_s, self.w_s, self.grad_s = use_fp8, x_s, w_s, grad_s
        bound = 3**0.5 * 0.5 * in_features**-0.5  # standard deviation 0.5 / sqrt(fan_in), times sqrt(3) for a uniform one
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
    def zeroed(self) -> "CastedLinear":
        """With its weight at zero: what it projects into begins undisturbed."""
        nn.init.zeros_(self.weight)
        return self
    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), of the same dtype. Leading dimensions of the weight count as rows."""
        weight = self.weight.flatten(0, -2)
        if self.use_fp8 and self.training and fp8_supported(x.device):
            out, *_ = torch.ops.nanogpt.mm(x.flatten(0, -2), weight, self.x_s, self.w_s, self.grad_s)
            return out.view(*x.shape[:-1], -1).type_as(x)
        return F.linear(x, weight.type_as(x))
class Rotary(nn.Module):
    """Rotary positions, "RoFormer" (Su et al., 2021), for half of the channels; the others do not turn, and compare contents."""
    def __init__(self, head_dim: int, max_seq_len: int):
        super().__init__()
        if head_dim % 4: raise ValueError(f"head_dim must be a multiple of 4 for rotary positions, got {head_dim}")
        frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, head_dim // 4), torch.zeros(head_dim // 4)])
        angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # radians
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)  # (max_seq_len, head_dim)
        self.register_buffer("sin", torch.cat([angle.sin(), -angle.sin()], dim=1), persistent=False)
    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, head_dim), T at most max_seq_len, to the same shape and dtype."""
        if x.size(1) > self.cos.size(0): raise ValueError(f"a sequence of {x.size(1)} tokens is longer than max_seq_len, {self.cos.size(0)}")
        cos, sin, x32 = self.cos[:x.size(1)], self.sin[:x.size(1)], x.transpose(1, 2).float()
        return torch.addcmul(x32 * cos, x32.roll(x32.size(-1) // 2, -1), sin).transpose(1, 2).type_as(x)
class CausalSelfAttention(nn.Module):
    """Attention of one sequence, with normalised queries and keys, and a token's value embedding mixed into its value."""
    def __init__(self, dim: int, num_heads: int, head_dim: int, max_seq_len: int, **fp8):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = CastedLinear(dim, 3 * num_heads * head_dim, **fp8)
        self.qkv.weight = nn.Parameter(self.qkv.weight.detach().view(3, -1, dim))  # one matmul, three matrices for Muon
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.rotary = Rotary(head_dim, max_seq_len)
        self.c_proj = CastedLinear(num_heads * head_dim, dim, **fp8).zeroed()
        self.scale = 0.12  # for unit-RMS q and k of 128 channels a bit sharper than the usual 1/sqrt(128) = 0.088
    def forward(self, x: Tensor, ve: Tensor | None, block_mask: BlockMask) -> Tensor:
        """x (1, T, dim), ve (1, T, num_heads * head_dim) or None; returns (1, T, dim)."""
        qkv = self.qkv(x).view(*x.shape[:2], 3 * self.num_heads, self.head_dim).transpose(1, 2).contiguous()  # heads first
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=1)
        q, k = self.rotary(norm(qk).transpose(1, 2)).transpose(1, 2).chunk(2, dim=1)
        v = self.lambdas[0] * v
        if ve is not None: v = v + self.lambdas[1] * ve.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        return self.c_proj(attention(q, k, v, block_mask, self.scale).transpose(1, 2).flatten(2))
class MLP(nn.Module):
    """Four times as wide inside, with a squared ReLU, "Primer" (So et al., 2021), whose results FP8 needs at a quarter of the scale."""
    def __init__(self, dim: int, **fp8):
        super().__init__()
        self.c_fc = CastedLinear(dim, 4 * dim, **fp8)
        self.c_proj = CastedLinear(4 * dim, dim, **fp8 | (dict(x_s=fp8["x_s"] / 4) if fp8 else {})).zeroed()
    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape and dtype."""
        return self.c_proj(F.relu(self.c_fc(x)).square())
class Block(nn.Module):
    """Attention, where the layer has it, and MLP, with the embedded input x0 mixed into the stream before them."""
    def __init__(self, dim: int, num_heads: int, head_dim: int, max_seq_len: int, has_attention: bool = True, **fp8):
        super().__init__()
        self.attn = CausalSelfAttention(dim, num_heads, head_dim, max_seq_len, **fp8) if has_attention else None
        self.mlp = MLP(dim, **fp8)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))
    def forward(self, x: Tensor, ve: Tensor | None, x0: Tensor, block_mask: BlockMask) -> Tensor:
        """x and x0 (1, T, dim), ve as for attention; returns the shape and dtype of x."""
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        if self.attn is not None: x = x + self.attn(norm(x), ve, block_mask)
        return x + self.mlp(norm(x))
class ValueEmbedding(nn.Module):
    """Three embeddings, for the values of the first and the last three layers: "Value Residual Learning" (Zhou et al., 2024)."""
    def __init__(self, vocab_size: int, dim: int, num_layers: int, dtype: torch.dtype):
        super().__init__()
        if num_layers < 6: raise ValueError(f"three value embeddings, each used twice, need six layers or more, got {num_layers}")
        self.num_layers = num_layers
        self.embed = nn.ModuleList(nn.Embedding(vocab_size, dim, dtype=dtype) for _ in range(3))
    def forward(self, input_seq: Tensor) -> list[Tensor | None]:
        """Ids (T,) to an entry for each layer: (1, T, dim), or None for the layers between."""
        return (ve := [table(input_seq)[None] for table in self.embed]) + [None] * (self.num_layers - 6) + ve
class GPT(nn.Module):
    """The network, for one sequence at a time, of any number of documents. The first half of the layers pushes what it puts out, the
    second half pops it and mixes it in by a learnable weight, as in "U-Net" (Ronneberger et al., 2015). The last token of vocab_size
    begins a document. fp8: matmuls in FP8, where the hardware can: "none", "head", or "all", which adds the hidden ones. dtype: of the
    activations and embeddings; other weights are float32. train_seq_len: of a micro-step, to whose mean loss FP8's scale belongs."""
    def __init__(self, vocab_size: int, num_layers: int, num_heads: int, head_dim: int, model_dim: int, max_seq_len: int, *,
                 attention_free_layers: tuple[int, ...] = (7,), fp8: str = "head", dtype: torch.dtype = torch.bfloat16,
                 train_seq_len: int | None = None):
        super().__init__()
        self.vocab_size, self.num_layers, self.num_skips = vocab_size, num_layers, num_layers // 2
        grad_s = 524288.0 * (train_seq_len or max_seq_len) / (48 * 1024)  # 2**19 is right for a mean over 48K tokens
        hidden = dict(use_fp8=True, x_s=2.0, w_s=128.0, grad_s=grad_s) if fp8 == "all" else {}  # |x| <= 224, |w| <= 3.5
        self.embed = nn.Embedding(vocab_size, model_dim, dtype=dtype)  # drawn from N(0, 1), as the value embeddings
        self.value_embeds = ValueEmbedding(vocab_size, num_heads * head_dim, num_layers, dtype)
        self.blocks = nn.ModuleList(Block(model_dim, num_heads, head_dim, max_seq_len, i not in attention_free_layers, **hidden)
                                    for i in range(num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips))
        self.lm_head = CastedLinear(model_dim, next_multiple_of_n(vocab_size, n=128), fp8 != "none", 2.0, 512.0, grad_s).zeroed()
    def create_block_masks(self, input_seq: Tensor, sliding_window_num_blocks: Tensor) -> tuple[BlockMask, BlockMask]:
        """The long and the short mask, for ids (T,), T a multiple of 128, and a window W, 0-d int32. Query block i sees the key blocks
        i - W < j <= i (the short mask: with max(1, W // 2) for W), and in them q sees k when k <= q and both are of one document. Only
        block indices are looked at, on the device. Full blocks, without a mask inside, are listed apart; the nearest come first."""
        if input_seq.ndim != 1 or input_seq.numel() % BLOCK:
            raise ValueError(f"input_seq must be (T,) with T a multiple of {BLOCK}, got {tuple(input_seq.shape)}")
        document = (input_seq == self.vocab_size - 1).cumsum(0)
        first, last = document.view(-1, BLOCK)[:, 0], document.view(-1, BLOCK)[:, -1]
        i = (j := torch.arange(first.numel(), dtype=torch.int32, device=input_seq.device))[:, None]
        # An earlier block shares a document with i when it ends in the one where i begins; both are of one when it begins where i ends.
        shared, full = (j <= i) & (last == first[:, None]) | (j == i), (j < i) & (first == last[:, None])
        def causal_in_document(b, h, q, k):
            return (k <= q) & (document[q] == document[k])
        def nearest_first(listed: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.where(listed, j + 1, 0).argsort(dim=-1, descending=True).int()
            return listed.sum(-1, dtype=torch.int32)[None, None], order[None, None]
        def within(window: Tensor) -> BlockMask:
            near = j > i - window
            return BlockMask.from_kv_blocks(*nearest_first(shared & ~full & near), *nearest_first(full & near),
                                            BLOCK_SIZE=BLOCK, mask_mod=causal_in_document)
        return within(sliding_window_num_blocks), within((sliding_window_num_blocks // 2).clamp(min=1))
    def hidden(self, input_seq: Tensor, sliding_window_num_blocks: Tensor) -> Tensor:
        """What the head reads: ids (T,) to (T, model_dim), normalised."""
        long, short = self.create_block_masks(input_seq, sliding_window_num_blocks)
        ve, skips = self.value_embeds(input_seq), []
        x = x0 = norm(self.embed(input_seq)[None])
        for i, block in enumerate(self.blocks):
            from_end = self.num_layers - 1 - i
            if from_end < self.num_skips: x = x + self.skip_weights[self.num_skips - 1 - from_end] * skips.pop()
            x = block(x, ve[i], x0, long if min(i, from_end) % 4 == 0 else short)  # long: 0, 4, 7 and 11 of 12
            if i < self.num_skips: skips.append(x)
        return norm(x)[0]
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: (T, model_dim) to float32 (T, vocab_size padded to a multiple of 128)."""
        return 30 * torch.sigmoid(self.lm_head(hidden).float() / 7.5)  # up to a constant 15 tanh(x / 15): "Gemma 2" (2024)
    def forward(self, input_seq: Tensor, target_seq: Tensor, sliding_window_num_blocks: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, 0-d float32, of ids (T,) int32, targets (T,) int64, -100 for none, and a window, 0-d int32."""
        return self.loss(self.hidden(input_seq, sliding_window_num_blocks), target_seq)
    def loss(self, hidden: Tensor, target_seq: Tensor) -> Tensor:
        """Mean cross-entropy of what `hidden` returned."""
        if self.training: return F.cross_entropy(self.logits(hidden), target_seq)
        parts = zip(hidden.split(8192), target_seq.split(8192))  # the logits of 64K tokens at once would not fit on a small card
        return sum(F.cross_entropy(self.logits(h), t, reduction="sum") for h, t in parts) / (target_seq >= 0).sum()

# ---------- Data: shards, each a header of 256 int32 (magic, version, number of tokens, vocabulary size, zeros) and uint16 tokens
HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, GPT2_VOCAB = 256, 20240520, 1, 50257
def open_shard(path: str) -> tuple[np.ndarray, int]:
    """Map a shard into memory: its tokens (N,) uint16 and its vocabulary size. Raises UserError where it is not a whole one."""
    size, header = os.path.getsize(path) - 4 * HEADER_INTS, np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, num_tokens, vocab_size, *zeros = header.tolist() if len(header) == HEADER_INTS else [0] * 4
    vocab_size = vocab_size or GPT2_VOCAB  # the public shards leave it at 0
    right = (magic, version) == (SHARD_MAGIC, SHARD_VERSION) and not any(zeros) and 2 <= vocab_size <= 1 << 16
    if not right or size != 2 * num_tokens or num_tokens < 1:
        raise UserError(f"{path} is no whole token shard: magic number {magic}, version {version}, {num_tokens} tokens, vocabulary {vocab_size}"
                        f"{', and more' * any(zeros)}, {size} bytes; make it again, or let --train_files and --val_files leave it out.")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(num_tokens,)), vocab_size
class DistributedDataLoader:
    """The tokens of all shards, in the order of the files' names, cut into sequences that the processes take in turn. Sequence g
    begins at token g * seq_len, whatever the number of processes. filename_pattern: a glob. num_tokens: how many tokens the run
    predicts (None or 0: all); targets beyond are -100. Raises UserError where files are missing or broken, or have too few tokens."""
    def __init__(self, filename_pattern: str, seq_len: int, *, num_tokens: int | None = None, rank: int = 0,
                 world_size: int = 1, device: torch.device | str = "cpu", repeat: bool = False):
        self.files = sorted(glob.glob(filename_pattern))
        if not self.files:
            raise UserError(f"no token shard matches {os.path.abspath(filename_pattern)}; make some with `python data/local_text.py`, fetch "
                            "FineWeb as README.md says, or name yours with --train_files and --val_files.")
        self.shards, vocab_sizes = zip(*map(open_shard, self.files))
        self.vocab_size = vocab_sizes[0]
        if other := [path for path, size in zip(self.files, vocab_sizes) if size != self.vocab_size]:
            raise UserError(f"{other[0]} and {self.files[0]} have different vocabularies ({set(vocab_sizes)}); use one tokenizer's shards.")
        *self.starts, self.total = np.cumsum([0, *map(len, self.shards)]).tolist()
        self.num_tokens = num_tokens or self.total - 1
        if self.total < 2 or not repeat and self.num_tokens >= self.total:  # the last target is one token further
            raise UserError(f"{filename_pattern} has {self.total} tokens, {max(2, self.num_tokens + 1) - self.total} fewer than the run needs; "
                            "add shards, lower --num_iterations (or --val_tokens), or train on them again with --repeat.")
        self.seq_len, self.rank, self.world_size, self.device = seq_len, rank, world_size, torch.device(device)
        self.num_sequences, self.position = math.ceil(self.num_tokens / seq_len), 0  # position: what all processes have taken
        self.shard_at = lambda token: bisect.bisect_right(self.starts, token % self.total) - 1
    def check_tokens(self) -> None:
        """Read all that the run will see. Raises UserError at a token beyond the vocabulary."""
        for path, start, shard in zip(self.files, self.starts, self.shards):
            tokens = shard[:max(0, self.num_tokens + 1 - start)]
            for at in np.flatnonzero(tokens >= self.vocab_size)[:1]:
                raise UserError(f"{path} has token {tokens[at]} at position {at}, and a vocabulary of {self.vocab_size}; make it again.")
    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens, uint16, from position `start` of the shards' endless repetition."""
        pieces = []
        while count:
            shard = self.shard_at(start)
            pieces.append(self.shards[shard][start % self.total - self.starts[shard]:][:count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)
    def whereabouts(self, first: int, count: int) -> str:
        """For people: `count` sequences from `first` on, and the shards that their tokens come from."""
        start, end = first * self.seq_len, (first + count) * self.seq_len - 1
        files = dict.fromkeys(self.files[self.shard_at(token)] for token in range(start, end + 1))
        return f"sequences {first} to {first + count - 1} (tokens {start} to {end}) out of {' and '.join(files)}"
    def sequence(self, index: int) -> tuple[Tensor, Tensor]:
        """Sequence `index` on the device: inputs (seq_len,) int32 and targets (seq_len,) int64."""
        tokens = torch.from_numpy(self.read(index * self.seq_len, self.seq_len + 1).view(np.int16))
        if self.device.type == "cuda": tokens = tokens.pin_memory().to(self.device, non_blocking=True)  # the host does not wait
        ids = tokens.int() & 0xFFFF  # unsigned again; few of torch's kernels take uint16
        targets = ids[1:].long()
        targets[max(0, self.num_tokens - index * self.seq_len):] = -100
        return ids[:-1], targets
    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This process's next sequence: number rank, then rank + world_size, and so on."""
        index, self.position = self.position + self.rank, self.position + self.world_size
        return self.sequence(index)

# ---------- Settings: one dataclass, whose fields are the flags
def setting(default, meaning: str, **more):
    """A field with its meaning, and limits: least, most, multiple_of, choices. aside: a resumed run may have another one."""
    return dataclasses.field(default=default, metadata=dict(meaning=meaning, **more))
@dataclasses.dataclass
class Hyperparameters:
    """All that a run depends on besides the machine. The defaults are the speedrun."""
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "training shards, a glob", aside=True)
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards, a glob", aside=True)
    val_tokens: int = setting(10485760, "tokens to validate on; 0 for all that there are", least=0, aside=True)
    train_seq_len: int = setting(48 * 1024, "tokens of a training sequence, one micro-step", least=BLOCK, multiple_of=BLOCK)
    val_seq_len: int = setting(64 * 1024, "tokens of a validation sequence", least=BLOCK, multiple_of=BLOCK, aside=True)
    seqs_per_step: int = setting(8, "sequences of a step, which the processes share", least=1)
    repeat: bool = setting(False, "begin again when the training tokens are used up")
    num_layers: int = setting(12, "layers", least=6)
    num_heads: int = setting(6, "attention heads", least=1)
    head_dim: int = setting(128, "channels of a head", least=16, multiple_of=16)
    model_dim: int = setting(768, "channels of the residual stream", least=16, multiple_of=16)
    attention_free_layers: tuple[int, ...] = setting((7,), "layers without attention, as in 3,7, or none")
    num_iterations: int = setting(1770, "steps", least=1)
    cooldown_frac: float = setting(0.4, "share of the steps, the last, over which learning rates fall to a tenth", least=1e-6, most=1)
    max_window: int = setting(1792, "tokens of attention at the end; it grows from 128", least=BLOCK, multiple_of=BLOCK)
    embed_lr: float = setting(0.6, "learning rate of the embeddings (Adam)", least=0)
    head_lr: float = setting(0.008, "learning rate of the head (Adam)", least=0)
    scalar_lr: float = setting(0.04, "learning rate of the mixing weights (Adam)", least=0)
    muon_lr: float = setting(0.05, "learning rate of the hidden matrices (Muon)", least=0)
    seed: int = setting(0, "seed of the initial weights and of the sample", least=0, most=2**63 - 1)
    dtype: str = setting("auto", "of the activations; auto is the machine's faster", choices=("auto", "bfloat16", "float32"), aside=True)
    fp8: str = setting("head", "matmuls in FP8, where the GPU can; all adds the hidden", choices=("none", "head", "all"))
    coordinate_descent_tuning: bool = setting(False, "tune inductor's kernels: minutes of compilation for a faster step", aside=True)
    val_loss_every: int = setting(125, "steps between validations; 0 for the last alone", least=0, aside=True)
    sample: int = setting(0, "tokens to write after training, at most", least=0, aside=True)
    timeout: int = setting(300, "seconds to wait for a process; longer than a step, a validation, or writing a checkpoint", least=5, aside=True)
    save_every: int = setting(0, "steps between checkpoints, log_dir/RUN_ID/step_*.pt; 0 for none", least=0, aside=True)
    keep: int = setting(2, "how many checkpoints to keep, the newest", least=1, aside=True)
    resume: str = setting("", "checkpoint to go on from; auto: the newest whole one of RUN_ID, or the beginning", aside=True)
    eval_only: bool = setting(False, "validate the checkpoint of --resume, write its sample, and end", aside=True)
    log_dir: str = setting("logs", "folder of the log", aside=True)
    run_id: str = setting("", "name of the log, log_dir/RUN_ID.txt; made from the time when empty", aside=True)
PRESETS = {
    "speedrun": {},  # 124M parameters as GPT-2 counts them, to 3.28
    "medium": dict(  # 350M by the same count, the shape of GPT-2 Medium, to 2.92
        num_layers=24, num_heads=8, model_dim=1024, train_seq_len=64 * 1024, num_iterations=6000, cooldown_frac=0.6, embed_lr=0.3,
        head_lr=0.004, scalar_lr=0.02, muon_lr=0.025),
    "tiny": dict(  # 0.85M, for a minute and a half on two CPU cores, and the shards of data/local_text.py
        train_files="data/local_text/train_*.bin", val_files="data/local_text/val_*.bin", val_tokens=65536, repeat=True, train_seq_len=1024,
        val_seq_len=2048, seqs_per_step=2, num_layers=6, num_heads=2, head_dim=64, model_dim=96, attention_free_layers=(4,), sample=200,
        num_iterations=800, cooldown_frac=0.7, max_window=256, embed_lr=0.15, head_lr=0.004, scalar_lr=0.02, muon_lr=0.035, val_loss_every=100)}
def parse_arguments(argv: list[str] | None = None) -> tuple[Hyperparameters, str]:
    """The settings that a command line asks for, and its preset. Raises UserError at what it does not know."""
    def refuse(message: str):
        raise UserError(f"{message}; --help lists all flags and presets.")
    parse = {bool: lambda text: bool(["false", "true"].index(text.lower())),
             tuple[int, ...]: lambda text: () if text == "none" else tuple(map(int, text.split(",")))}
    parser = argparse.ArgumentParser("train_gpt.py", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = refuse  # argparse's own would print the usage, and exit
    parser.add_argument("--preset", default="speedrun", choices=PRESETS, help="where the settings start from (default speedrun)")
    for field in dataclasses.fields(Hyperparameters):
        presets = (f"; {name} {preset[field.name]}" for name, preset in PRESETS.items() if field.name in preset)
        parser.add_argument(f"--{field.name}", type=parse.get(field.type, field.type), default=argparse.SUPPRESS, metavar="X",
                            choices=field.metadata.get("choices"), **(dict(nargs="?", const=True) if field.type is bool else {}),
                            help=f"{field.metadata['meaning']} (default {field.default!r}{''.join(presets)})")
    given = vars(parser.parse_args(argv))
    return Hyperparameters(**PRESETS[preset := given.pop("preset")] | given), preset
def check_settings(hp: Hyperparameters, preset: str, machine: Machine) -> None:
    """Raise UserError at the first setting that cannot work, on this machine and with these processes."""
    if preset != "tiny" and not machine.is_gpu:
        raise UserError(f"the {preset} preset needs a CUDA GPU, and torch {torch.__version__} finds none; use --preset tiny, or see README.md.")
    for field in dataclasses.fields(hp):
        value, limits = getattr(hp, field.name), field.metadata
        least, most, multiple = limits.get("least"), limits.get("most", math.inf), limits.get("multiple_of")
        if least is not None and (not least <= value <= most or multiple and value % multiple):
            wanted = f"a multiple of {multiple}, as {next_multiple_of_n(value, n=multiple)}" if multiple else f"at least {least}"
            raise UserError(f"--{field.name} is {value}, and has to be {wanted}{f' and at most {most}' if most < math.inf else ''}.")
    if not set(hp.attention_free_layers) <= set(range(hp.num_layers)):
        raise UserError(f"--attention_free_layers is {hp.attention_free_layers}, and the layers are 0 to {hp.num_layers - 1}.")
    if hp.eval_only and not hp.resume or hp.resume == "auto" and not hp.run_id:
        raise UserError("which checkpoint is meant? --eval_only needs --resume, and --resume auto needs --run_id.")
    if hp.seqs_per_step % machine.world_size:
        raise UserError(f"{machine.world_size} processes cannot share {hp.seqs_per_step} sequences a step evenly; change one of the numbers.")
def learning_rate_factor(step: int, hp: Hyperparameters) -> float:
    """1 until the cooldown, then linearly down to 0.1 at the end."""
    return 0.1 + 0.9 * min(1, (1 - step / hp.num_iterations) / hp.cooldown_frac)
def muon_momentum(step: int) -> float:
    """From 0.85 to 0.95 over 300 steps: while gradients turn fast, a short memory is the better one."""
    return 0.85 + 0.1 * min(step / 300, 1)
def window_blocks(step: int, hp: Hyperparameters) -> int:
    """In blocks of 128 tokens, linear in the steps; up to half a block short of the maximum, so that it is reached before the end."""
    return next_multiple_of_n((hp.max_window - BLOCK // 2) * step / hp.num_iterations, n=BLOCK) // BLOCK

# ---------- Processes: those of one run start from the same, add up their gradients, and end together
def run_facts(hp: Hyperparameters, machine: Machine, train_loader, val_loader) -> tuple[dict[str, str], dict[str, str]]:
    """What the training's course depends on, which a resumed run has in common with the one before, and what else all processes have."""
    fields = [f for f in dataclasses.fields(hp) if not f.name.endswith(("_files", "_dir", "_id", "resume"))]  # files may lie elsewhere
    course, more = ({f"--{field.name}": str(getattr(hp, field.name)) for field in fields if bool(field.metadata.get("aside")) is aside} | {
        f"tokens in {Path(file).name}": str(len(shard)) for file, shard in zip(loader.files, loader.shards)}
                    for aside, loader in ((False, train_loader), (True, val_loader)))
    course |= dict(vocabulary=str(train_loader.vocab_size), activations=str(machine.activations(hp.dtype)))
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return course, more | dict(script=script, torch=str(torch.__version__), device=machine.device.type)
def compare_facts(one: str, facts: dict[str, str], other: str, expected: dict[str, str], advice: str) -> None:
    """Raise UserError at the first name whose facts are different, `facts` of `one`, `expected` of `other`."""
    for name in (name for name in expected | facts if facts.get(name) != expected.get(name)):
        raise UserError(f"{one} has {name} {facts.get(name)}, and {other} has {expected.get(name)}; {advice}.")
def agree(store, rank: int, world_size: int, facts: dict[str, str], failure: str) -> list[str]:
    """Tell the others what this process starts from, and hear them; their machines' names. Raises UserError in all alike."""
    store.set(f"start/{rank}", json.dumps([f"machine {os.environ.get('GROUP_RANK', 0)} ({platform.node()})", failure, facts]))
    said = []
    try:
        while len(said) < world_size: said.append(json.loads(store.get(f"start/{len(said)}")))
    except dist.DistError:
        raise UserError(f"process {len(said)} did not start within --timeout; see what its machine says.") from None
    for other, (host, failure, facts) in enumerate(said):
        if failure: raise UserError(failure if all(failure == each for _, each, _ in said) else f"process {other} on {host}: {failure}")
        compare_facts(f"process {other} on {host}", facts, "process 0", said[0][2], "give them the same")
    return [host for host, *_ in said]
class Watchdog(threading.Thread):
    """Ends this process, with a line, when another one has died or hangs, for which collectives would wait in vain. Twice a second
    each tells the others, through the launcher's store, that it lives, its `place`, which grows with what the main thread does, and its
    error. Who says nothing for `timeout` seconds is dead, stopped or cut off; where no place changes, those behind the others hang.
    SIGINT and SIGTERM come to this thread, as the main one may wait in a collective: the first stops the run after its step; a second
    (a second later, for torchrun repeats them), and one outside of the steps, end it at once. A process alone has no thread for them."""
    def __init__(self, hosts: list[str] | tuple = (), rank: int = 0, store=None, timeout: float = 0.0):
        super().__init__(daemon=True)
        self.hosts, self.rank, self.store, self.timeout = hosts, rank, store and store.clone(), timeout
        self.place, self.asked, self.asked_at = -1, 0, 0.0  # place: -1 before the steps, infinity after them; asked: the signal
        self.failure, self.look_until, self.closed = "", 0.0, False
        if store:
            self.signals, written = os.pipe()
            os.set_blocking(written, False)
            signal.set_wakeup_fd(written)
            for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda *_: None)
            self.say(0), self.start()
    def receive(self, number: int, frame=None) -> None:
        now = time.monotonic()
        early = self.place < 0 and not (self.hosts and number == signal.SIGTERM)  # that may be torchrun's, for the loss of a process
        if early or self.place == math.inf or self.asked and now > self.asked_at + 1:
            self.end(f"stopped by {signal.Signals(number).name}", 128 + number)
        self.asked, self.asked_at, self.look_until = self.asked or number, self.asked_at or now, now + 8
    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        """The main thread ends: by the loss of another process, which is named, without return; or the others hear of its error."""
        if isinstance(error, RuntimeError):
            self.look_until = time.monotonic() + 8
            self.join(9)
        if isinstance(error, Stopped): self.place, error = math.inf, None  # the others stop as well
        self.closed, self.failure = True, f"has failed: {str(error) or kind.__name__}".splitlines()[0] if error else ""
        self.join(1), self.say(time.monotonic())  # its last word is this one, and no thread is left at the end
    def say(self, now: float) -> None:
        self.store.set(f"alive/{self.rank}", json.dumps([now, self.place, self.failure]))
    def run(self) -> None:
        ranks, since, moved = range(len(self.hosts)), [0.0] * len(self.hosts), 0.0
        heard, unheard = [[None, -1, ""]] * len(ranks), ("the launcher of process 0 does not answer", 1)
        while not self.closed:
            if select.select([self.signals], [], [], 0.5)[0]: self.receive(os.read(self.signals, 1)[0])
            before, now, overdue = heard, time.monotonic(), threading.Timer(self.timeout, self.end, unheard)
            overdue.start()  # of a machine that is cut off there comes no answer at all, not even an error
            try:
                self.say(now)
                heard = [json.loads(text) for text in self.store.multi_get([f"alive/{rank}" for rank in ranks])]
            except dist.DistError:
                self.end(*unheard)
            overdue.cancel()
            since = [since[rank] if heard[rank] == before[rank] else now for rank in ranks]
            _, places, failures = zip(*heard)
            moved = moved if places == tuple(place for _, place, _ in before) else now
            silence = 6 if now < self.look_until else self.timeout  # while it looks for a loss, a shorter one is enough
            if lost := [rank for rank in ranks if failures[rank] or now - since[rank] > silence and places[rank] < math.inf]:
                known = failures[lost[0]] and self.hosts[lost[0]] == self.hosts[self.rank]  # where it was said by the process itself
                self.end(failures[lost[0]] or "gave no answer: killed, stopped or cut off", 1, lost, places, shown=not known)
            if self.asked and self.place < 0 and now > self.look_until: self.receive(self.asked)  # nobody was lost
            if 0 <= self.place < math.inf and now - moved > self.timeout:
                self.end(f"made no progress for {self.timeout} s", 1, [rank for rank in ranks if places[rank] == min(places)], places)
    def end(self, reason: str, code: int, culprits: list[int] | tuple = (), places: tuple = (), shown: bool = True) -> None:
        """Say why, once a machine, and leave without waiting for what cannot end."""
        if not self.hosts: raise Stopped(code, reason)
        here = {rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]}
        names = " and ".join(f"process {rank} on {self.hosts[rank]}" for rank in culprits) + " " * bool(culprits)
        at = f", at step {max(places) // 3 + 1}" if 0 <= max(places, default=-1) < math.inf else ""
        if shown and not self.closed and self.rank == min(here - set(culprits) or here):
            tqdm.write(f"train_gpt.py: {names}{reason}{at}; the run has ended.", file=sys.stderr)
        self.closed or os._exit(code)
class GradientReducer:
    """Adds up gradients over the processes, each as soon as the backward pass has it (the step's `last`): a matrix of Muon's where
    it will be orthogonalised, which takes half the bytes, the others everywhere; what is small together, by the megabyte."""
    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], machine: Machine, watchdog: Watchdog | None = None):
        self.machine, self.watchdog, self.last, self.small, self.in_flight = machine, watchdog or Watchdog(), False, {}, []
        self.owner = {p: rank for muon in optimizers if isinstance(muon, Muon) for p, rank in muon.owner.items()}
        for p in model.parameters() if machine.world_size > 1 else ():
            p.register_post_accumulate_grad_hook(lambda p: self.send(p.grad, self.owner.get(p)) if self.last else None)
    def send(self, t: Tensor, owner: int | None = None, full: int = 1 << 20) -> None:
        """Start adding up a tensor: alone, or, where it is small, in the bucket of its dtype as soon as that has `full` bytes."""
        if t.nbytes >= 1 << 20:
            work = dist.all_reduce(t, async_op=True) if owner is None else dist.reduce(t, owner, async_op=True)
            return self.in_flight.append((work, t, []))
        bucket = self.small.setdefault(t.dtype, [])
        bucket.append(t)
        if sum(t.nbytes for t in bucket) >= full:
            flat = torch.cat([t.flatten() for t in self.small.pop(t.dtype)])
            self.in_flight.append((dist.all_reduce(flat, async_op=True), flat, bucket))
    def finish(self, total: Tensor) -> None:
        """Send off what is left, add up `total`, a small tensor, as well, and wait until all sums are there."""
        for t in [*(bucket.pop() for bucket in self.small.values() if bucket), total] if self.machine.world_size > 1 else ():
            self.send(t, full=0)
        self.watchdog.place += self.watchdog.place >= 0
        for work, flat, bucket in self.in_flight:
            work.wait()
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]) if bucket else ()): t.copy_(part.view_as(t))
        self.in_flight.clear()

# ---------- Checkpoints: all that a run goes on from; what is not whole, or belongs to another run, is refused
CHECKPOINT_FORMAT, written = 1, lambda path: path.stat().st_mtime_ns
def manifest(path: Path) -> bytes:
    """What stands beside a checkpoint from the moment that it is whole, in a .json of its name."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(dict(format=CHECKPOINT_FORMAT, bytes=path.stat().st_size, sha256=digest)).encode()
def write_checkpoint(path: Path, state: dict, keep: int) -> str:
    """Write it under another name, which is changed when all is on the disk, then its manifest; the newest `keep` stay."""
    if not all(t.isfinite().all() for t in state["modules"][0].values()): raise OSError("its weights are not finite")
    unfinished, listed = path.with_name("unfinished"), path.with_suffix(".json")
    path.parent.mkdir(exist_ok=True)
    listed.unlink(missing_ok=True)
    try:
        for target, write in ((path, lambda file: torch.save(state, file)), (listed, lambda file: file.write(manifest(path)))):
            with open(unfinished, "wb") as file:
                write(file), file.flush(), os.fsync(file.fileno())
            os.replace(unfinished, target)
        os.utime(listed, ns=(max(map(written, path.parent.glob("step_????????.json"))) + 1,) * 2)  # the newest, whatever the clock said
    finally:
        unfinished.unlink(missing_ok=True)  # a full disk has better use for it
    newest = sorted(path.parent.glob("step_????????.json"), key=written)[-keep:]
    for other in {*path.parent.glob("step_????????.*")} - {file.with_suffix(suffix) for file in newest for suffix in (".pt", ".json")}:
        with contextlib.suppress(OSError): other.unlink()
    return str(path)
def defect(path: Path) -> str:
    """Why a checkpoint cannot be read, for people; empty where it is whole."""
    listed = path.with_suffix(".json") if path.name else path
    said = listed.read_bytes() if listed.is_file() and path.is_file() else b""
    found = re.match(rb'{"format": (\d{1,9}),', said)
    if found and int(found[1]) > CHECKPOINT_FORMAT:
        return f"{path} is in format {int(found[1])}, and this script reads {CHECKPOINT_FORMAT}; resume with the script that wrote it."
    return "" if said and said == manifest(path) else f"{path} is not there, or not what {listed.name} says; resume from another one."
def load_checkpoint(hp: Hyperparameters, course: dict[str, str]) -> dict:
    """What to go on from, in host memory; nothing in the file is run. Raises UserError where it is damaged or of another course."""
    paths = [Path(hp.resume)] if hp.resume else []
    if hp.resume == "auto":  # what has no manifest is of a run that was cut while it wrote
        listed = sorted(Path(hp.log_dir, hp.run_id).glob("step_????????.json"), key=written, reverse=True)
        paths = [path.with_suffix(".pt") for path in listed] or [Path(hp.log_dir, hp.run_id, "step_*.pt")][:hp.eval_only]
    if not paths: return dict(path="", step=0, run_id="", ms=0.0, best=math.inf, manifest="none")
    if not (path := next((path for path in paths if not defect(path)), None)): raise UserError(defect(paths[0]))
    try:
        with warnings.catch_warnings(action="ignore"): state = torch.load(path, map_location="cpu", weights_only=True)
        kinds = dict(step=int, course=dict, made=dict, run_id=str, ms=float, best=float, modules=list, position=int, random=list)
        if {n: type(v) for n, v in state.items()} != kinds or not 0 < state["step"] <= int(state["course"]["--num_iterations"]): raise TypeError
    except Exception as error:  # a whole file, and anything may be in it
        raise UserError(f"{path} is no checkpoint of this script ({type(error).__name__}); resume from another one.") from None
    compare_facts("this run", course, path, state["course"], "give it the same, or another --resume")
    return state | dict(path=str(path), manifest=path.with_suffix(".json").read_text())

# ---------- Log: this script, versions, hardware and settings; then a line for each step and validation
class RunLog:
    """Keeps the clock, and writes, on the first process alone, log_dir/RUN_ID.txt (a resumed run's from the checkpoint on; none for
    --eval_only), what a person sees, and checkpoints. Raises UserError where the file cannot be made, Stopped at a loss not finite."""
    def __init__(self, hp: Hyperparameters, machine: Machine, facts: dict, loader: DistributedDataLoader, start: dict):
        self.hp, self.machine, self.loader, self.unwritten, self.failed = hp, machine, loader, b"", set()  # what a full disk refuses
        self.pending, self.stops = None, 0  # a step whose loss may still be on its way; how many processes were asked to stop
        self.ms, self.since, self.best, self.saved = start["ms"], None, start["best"], start["path"]
        self.writing = argparse.Namespace(join=lambda: None)  # the thread that writes the newest checkpoint, beside the training
        self.folder = Path(hp.log_dir, hp.run_id or start["run_id"] or time.strftime("%Y-%m-%d_%H%M%S_") + os.urandom(3).hex())
        path, silent = Path(f"{self.folder}.txt"), machine.rank > 0 or hp.eval_only
        try:
            hp.eval_only or path.parent.mkdir(parents=True, exist_ok=True)
            own = not silent and path.exists() and (hp.resume == "auto" or Path(start["path"]).resolve().parent == self.folder.resolve())
            kept = own and start["path"] and re.match(rb"(?s).*\nstep:%d/[^\n]*\n" % start["step"], path.read_bytes())
            if kept and hp.resume == "auto": os.truncate(path, kept.end())  # the rest comes again; otherwise the old log stays beside it
            elif own: self.unwritten, _ = kept[0] if kept else b"", path.rename(path.with_suffix(f".cut_{time.time_ns()}"))
            self.file = open(os.devnull if silent else path, "ab" if silent or own else "xb", buffering=0)
        except OSError as error:
            raise UserError(f"the log {path} cannot be made ({error.strerror}); choose another --run_id or --log_dir.") from None
        self.bar = tqdm(total=hp.num_iterations, initial=start["step"], unit="step", dynamic_ncols=True, disable=silent or None)
        gpus = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True).stdout if machine.is_gpu else ""
        about = dict(python=platform.python_version(), cuda=torch.version.cuda, hardware=machine.name, world_size=machine.world_size) | facts
        self.line("\n".join([Path(__file__).read_text(), "=" * 100, gpus, *map("{0[0]}: {0[1]}".format, about.items()), "=" * 100]), shown=False)
        self.line(", ".join([f"log: {path}"] * (not hp.eval_only) + [f"resumed from {self.saved}"] * bool(self.saved)))
    @contextlib.contextmanager
    def paused(self):
        """The clock, which counts milliseconds of training, stands still for what is done within."""
        self.flush()
        self.machine.synchronize()
        self.ms, self.since = self.milliseconds(), None
        yield
        self.machine.synchronize()
        self.since = time.perf_counter()
    def milliseconds(self) -> float:
        return self.ms + (1000 * (time.perf_counter() - self.since) if self.since is not None else 0)
    def attempt(self, what: str, action) -> None:
        """Do what a full disk shall not end the training by; say its failure, once."""
        try:
            action(), self.failed.discard(what)
        except (OSError, RuntimeError) as error:  # torch makes the latter out of the former, its context
            said = f"train_gpt.py: {what} cannot be written ({error.__context__ or error}); training goes on."
            with contextlib.suppress(OSError): what in self.failed or tqdm.write(said, file=sys.stderr)
            self.failed.add(what)
    def drain(self) -> None:
        while self.unwritten: self.unwritten = self.unwritten[self.file.write(self.unwritten):]
    def line(self, text: str, shown: bool = True) -> None:
        """Add a line to the file, unbuffered, after what it did not take before; and show it."""
        self.unwritten += f"{text}\n".encode()
        self.attempt("the log", self.drain)
        if shown and self.machine.rank == 0:
            self.attempt("standard output", lambda: (self.bar.write(text, file=sys.stdout), sys.stdout.flush()))
    def progress(self, step: int, result: str = "", more: str = "", shown: bool = True) -> None:
        """A line in the form of the public logs."""
        now = self.milliseconds()
        self.line(f"step:{step}/{self.hp.num_iterations} {result}train_time:{now:.0f}ms step_avg:{now / max(step, 1):.2f}ms{more}", shown)
    def step(self, step: int, result: Tensor) -> None:
        """The line of a step. A GPU's is written while its next step runs, when the loss has arrived without a wait."""
        self.flush()
        self.pending = step, self.machine.read_later(result)
        self.machine.is_gpu or self.flush()
    def flush(self) -> None:
        """Write the line that waits for its loss."""
        if self.pending:
            (step, read), self.pending = self.pending, None
            loss, self.stops = read()
            self.progress(step, more=f" train_loss:{loss:.4f}", shown=self.bar.disable)
            self.bar.set_postfix_str(f"train_loss {loss:.4f}", refresh=False)
            self.bar.update()
            self.check(step, loss)
    def check(self, step: int, loss: float) -> None:
        """Stop at a loss that is not finite; all processes have the same."""
        if not math.isfinite(loss):
            tokens, _ = self.loader.whereabouts((max(step, 1) - 1) * self.hp.seqs_per_step, self.hp.seqs_per_step), self.writing.join()
            raise Stopped(2, f"the loss of step {step} is {loss}, on {tokens}; the last checkpoint: {self.saved or 'none'}.")
    def save(self, step: int, state: dict) -> None:
        """Copy a checkpoint to host memory; it is written beside the training, when the one before is."""
        self.writing.join()
        if self.machine.rank == 0:
            state = torch.utils._pytree.tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, state)
            state |= dict(step=step, run_id=str(self.folder.relative_to(self.hp.log_dir)), ms=self.ms, best=self.best)
            write = lambda: setattr(self, "saved", write_checkpoint(self.folder / f"step_{step:08d}.pt", state, self.hp.keep))
            self.writing = threading.Thread(target=self.attempt, args=("a checkpoint", write))
            self.writing.start()
    def close(self) -> None:
        self.writing.join()
        self.bar.close(), self.file.close()

# ---------- Run
def build_model(hp: Hyperparameters, vocab_size: int, machine: Machine) -> GPT:
    """The network on the machine's device. Weights are drawn on the CPU, so that a seed gives the same ones everywhere."""
    torch.manual_seed(hp.seed)
    dtype = machine.activations(hp.dtype)
    fp8 = hp.fp8 if fp8_supported(machine.device) and dtype == torch.bfloat16 else "none"
    return GPT(vocab_size, hp.num_layers, hp.num_heads, hp.head_dim, hp.model_dim, max(hp.train_seq_len, hp.val_seq_len),
               attention_free_layers=hp.attention_free_layers, fp8=fp8, dtype=dtype, train_seq_len=hp.train_seq_len).to(machine.device)
def build_optimizers(model: GPT, hp: Hyperparameters, machine: Machine) -> list[torch.optim.Optimizer]:
    """Adam for the embeddings, the head and single numbers; Muon for the matrices between."""
    embeds = [*model.embed.parameters(), *model.value_embeds.parameters()]
    groups = [dict(params=model.lm_head.parameters(), lr=hp.head_lr), dict(params=embeds, lr=hp.embed_lr),
              dict(params=[p for p in model.parameters() if p.ndim < 2], lr=hp.scalar_lr)]
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)  # gradients of a mean are small: 1e-8 would not be, beside them
    return [adam, Muon([p for p in model.blocks.parameters() if p.ndim >= 2], lr=hp.muon_lr, momentum=muon_momentum(0), rank=machine.rank,
                       world_size=machine.world_size, dtype=model.embed.weight.dtype)]  # who asks for float32 gets precise updates too
def set_schedule(optimizers: list[torch.optim.Optimizer], step: int, hp: Hyperparameters, machine: Machine) -> Tensor:
    """Give the optimizers a step's learning rates and momentum. Returns its window in blocks, 0-d int32 on the device."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * learning_rate_factor(step, hp)
        if "momentum" in group: group["momentum"] = muon_momentum(step)
    return torch.tensor(window_blocks(step, hp), dtype=torch.int32).to(machine.device, non_blocking=True)
def training_step(model, optimizers, batches, window: Tensor, seqs_per_step: int, reducer: GradientReducer) -> Tensor:
    """One update by the mean gradient of a step's sequences, of which `batches` are this process's share, reduced once, in the last
    micro-step. Returns (2,): the step's mean loss, and how many processes were asked to stop."""
    def micro_step(number: int) -> Tensor:
        reducer.last = number == len(batches) - 1
        loss = model(*batches[number], window)
        loss.backward()
        return loss.detach()
    # Two at a time only where there are two: a sum of more would depend on which comes first.
    loss_sum = sum((reducer.machine.map if len(batches) == 2 else map)(micro_step, range(len(batches))))
    result = torch.stack([loss_sum / seqs_per_step, loss_sum.new_full((), reducer.watchdog.asked > 0)])
    reducer.finish(result)
    torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], seqs_per_step)
    list(reducer.machine.map(lambda optimizer: optimizer.step(), optimizers))
    model.zero_grad(set_to_none=True)
    return result
def validate(model, loader: DistributedDataLoader, window: Tensor, reducer: GradientReducer) -> float:
    """Mean loss in nats per token, over exactly loader.num_tokens, however they divide into sequences and processes."""
    model.eval()
    @torch.no_grad()
    def loss_sum(index: int) -> Tensor:
        return model(*loader.sequence(index), window).double() * min(loader.seq_len, loader.num_tokens - index * loader.seq_len)
    losses = reducer.machine.map(loss_sum, range(loader.rank, loader.num_sequences, loader.world_size))
    total = sum(losses, torch.zeros_like(window, dtype=torch.float64))
    reducer.finish(total)
    model.train()
    return total.item() / loader.num_tokens
def memory_needed(model: GPT, hp: Hyperparameters, train_seq_len: int) -> float:
    """Of a GPU, in bytes: 5 a logit and 34 a channel and layer meet the public record's 30,724 MiB at 48K tokens; others extrapolate."""
    adam = sum(p.nbytes for p in model.parameters()) - (muon := sum(p.nbytes for p in model.blocks.parameters()))
    return 5 * adam + 4 * muon + (5 * model.lm_head.weight.size(0) + 34 * hp.model_dim * hp.num_layers) * train_seq_len
def out_of_memory(model: GPT, hp: Hyperparameters, machine: Machine, total: int) -> UserError:
    """The sentence for a GPU of `total` bytes that is too small, with flags that would fit: the same tokens in smaller parts."""
    fitting = [n for n in range(2, hp.train_seq_len // BLOCK + 1)
               if hp.train_seq_len % (n * BLOCK) == 0 and memory_needed(model, hp, hp.train_seq_len // n) < 0.9 * total]
    advice = (f"--train_seq_len {hp.train_seq_len // fitting[0]} --seqs_per_step {hp.seqs_per_step * fitting[0]} (the same tokens) would fit"
              if fitting else "no --train_seq_len would fit, so train a smaller model or use a larger card")
    needed = memory_needed(model, hp, hp.train_seq_len)
    return UserError(f"out of memory: --train_seq_len {hp.train_seq_len} needs about {needed / 2**30:.1f} GiB, and {machine.name} has "
                     f"{total / 2**30:.1f}, some of it perhaps taken by others; {advice}.")
def warm_up(model, optimizers, hp: Hyperparameters, vocab_size: int, reducer: GradientReducer) -> None:
    """Compile and run every kernel on made-up tokens, then put weights, optimizers and random state back as they were."""
    before, device = copy.deepcopy([module.state_dict() for module in (model, *optimizers)]), reducer.machine.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        window = set_schedule(optimizers, hp.num_iterations, hp, reducer.machine)  # the longest: what fits now always will
        train_ids, val_ids = (torch.randint(vocab_size, (n,), device=device) for n in (hp.train_seq_len, hp.val_seq_len))
        for _ in range(2): training_step(model, optimizers, [(train_ids.int(), train_ids)], window, 1, reducer)
        model.eval()
        with torch.no_grad(): model(val_ids.int(), val_ids, window)
        model.train()
    for module, state in zip((model, *optimizers), before): module.load_state_dict(state)
@torch.no_grad()
def sample(model: GPT, num_tokens: int, window: Tensor, seed: int) -> str:
    """Draw a document from the model, num_tokens at most: bytes decoded directly, GPT-2's tokens by tiktoken, or as numbers."""
    model.eval()
    boundary, generator, tokens = model.vocab_size - 1, torch.Generator().manual_seed(seed), []
    while len(tokens) < num_tokens and boundary not in tokens[-1:]:
        seen = [boundary, *tokens][-int(window) * BLOCK:]
        padded = torch.tensor(seen + [boundary] * (-len(seen) % BLOCK), dtype=torch.int32, device=window.device)
        probabilities = model.logits(model.hidden(padded, window)[len(seen) - 1])[:model.vocab_size].softmax(-1).cpu()
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    tokens = [token for token in tokens if token != boundary]
    try:
        decode = bytes.decode if boundary == 256 else importlib.import_module("tiktoken").get_encoding("gpt2").decode
        return decode(bytes(tokens) if boundary == 256 else tokens, errors="replace")
    except Exception as error:  # not there, or its vocabulary cannot be fetched: at this point no reason to fail
        return f"(as numbers, for want of tiktoken: {error}) {' '.join(map(str, tokens))}"
def report(log: RunLog, loader: DistributedDataLoader, model: GPT, hp: Hyperparameters, machine: Machine) -> None:
    """The closing lines: tokens per second and MFU, passes over the tokens, peak memory."""
    rate, mfu = hp.num_iterations * hp.seqs_per_step * hp.train_seq_len / log.ms * 1000, ""
    if machine.peak_flops:  # 6 FLOP a token for each weight in a matmul, and attention at half the longest window: a bound of the mean
        weights = sum(p.numel() for module in (model.blocks, model.lm_head) for p in module.parameters())
        heads = sum(block.attn is not None for block in model.blocks) * hp.num_heads
        share = rate * 6 * (weights + heads * hp.head_dim * hp.max_window) / (machine.world_size * machine.peak_flops)
        mfu = f" mfu: {share:.1%} of {machine.peak_flops / 1e12:.0f} TFLOP/s a GPU"
    log.line(f"tokens per second: {rate:.0f}{mfu}")
    log.line(f"passes over the training tokens: {loader.position * loader.seq_len / loader.total:.2f}, lowest validation loss {log.best:.4f}")
    log.line("peak memory allocated: {} MiB reserved: {} MiB".format(*machine.peak_memory()))
def compiled(network: GPT, hp: Hyperparameters, machine: Machine):
    """As it runs fastest: on several GPUs in parts, since gradients leave while the next part's backward pass computes."""
    if machine.is_gpu:
        torch._inductor.config.coordinate_descent_tuning = hp.coordinate_descent_tuning
        torch._dynamo.config.recompile_limit = 32  # blocks share their code, and each kind of them is compiled for itself
        if machine.world_size == 1: return torch.compile(network, dynamic=False, fullgraph=True)
        for part in network.blocks: part.compile(dynamic=False, fullgraph=True)
        network.loss = torch.compile(network.loss, dynamic=False, fullgraph=True)
    return network
def prepare(argv: list[str] | None) -> tuple:
    """Settings, preset, machine, loaders, facts and checkpoint: all that can be wrong with one process alone. Raises UserError."""
    hp, preset = parse_arguments(argv)
    machine = Machine.detect()
    check_settings(hp, preset, machine)
    processes = dict(rank=machine.rank, world_size=machine.world_size, device=machine.device)
    train_loader = DistributedDataLoader(hp.train_files, hp.train_seq_len, repeat=hp.repeat, **processes,
                                         num_tokens=hp.num_iterations * hp.seqs_per_step * hp.train_seq_len)
    val_loader = DistributedDataLoader(hp.val_files, hp.val_seq_len, num_tokens=hp.val_tokens, **processes)
    if train_loader.vocab_size != val_loader.vocab_size:
        raise UserError(f"{hp.train_files} has a vocabulary of {train_loader.vocab_size}, and {hp.val_files} of {val_loader.vocab_size}; "
                        "train and validate on shards of the same tokenizer.")
    for loader in (train_loader, val_loader) if machine.local_rank == 0 else (): loader.check_tokens()  # once a machine is enough
    facts = run_facts(hp, machine, train_loader, val_loader)
    facts[1]["checkpoint"] = (start := load_checkpoint(hp, facts[0]))["manifest"]
    return hp, preset, machine, train_loader, val_loader, facts, start
def train(hp: Hyperparameters, preset: str, machine: Machine, train_loader, val_loader, facts, start: dict, watchdog: Watchdog) -> None:
    """The whole run. Raises Stopped, on all processes after the same step, where one was asked to stop."""
    network = build_model(hp, train_loader.vocab_size, machine)
    optimizers = build_optimizers(network, hp, machine)
    model, reducer = compiled(network, hp, machine), GradientReducer(network, optimizers, machine, watchdog)
    about = {name: fact for name, fact in (facts[0] | facts[1]).items() if name[0] != "-"} | dataclasses.asdict(hp) | dict(
        preset=preset, parameters=sum(p.numel() for p in network.parameters()), head="FP8" if network.lm_head.use_fp8 else "as the activations",
        attention="FlexAttention" if machine.is_gpu else "block-sparse, for want of FlexAttention's backward pass on a CPU")
    with contextlib.closing(RunLog(hp, machine, about, train_loader, start)) as log:
        random = [torch.random, torch.cuda][:1 + machine.is_gpu]
        with log.paused():
            try:
                hp.eval_only or warm_up(model, optimizers, hp, network.vocab_size, reducer)
            except torch.OutOfMemoryError:
                raise out_of_memory(network, hp, machine, torch.cuda.mem_get_info()[1]) from None
            if start["path"]:
                loads = [module.load_state_dict for module in (network, *optimizers)] + [module.set_rng_state for module in random]
                try:
                    for load, state in zip(loads, start.pop("modules") + start["random"]): load(state)
                except (RuntimeError, ValueError, KeyError) as error:
                    raise UserError(f"{log.saved} is of another network ({type(error).__name__}); resume it with its own script.") from None
                train_loader.position = start["position"]
        first, end = start["step"], start["step"] if hp.eval_only else hp.num_iterations
        for step in range(first, end + 1):
            watchdog.place = -1 if hp.eval_only else 3 * step  # one more wherever this process waits: in the validation, in the step
            window = set_schedule(optimizers, step, hp, machine)
            if hp.eval_only or (step == end or hp.val_loss_every and step % hp.val_loss_every == 0) and (step > first or not start["path"]):
                with log.paused(): loss = validate(model, val_loader, window, reducer)
                log.best = min(log.best, loss)
                log.progress(step, f"val_loss:{loss:.4f} ")
                log.check(step, loss)
            if hp.save_every and step > first and (step == end or log.stops or step % hp.save_every == 0):
                with log.paused():
                    log.save(step, dict(course=facts[0], made=facts[1], position=train_loader.position,
                                        modules=[network.state_dict(), optimizers[0].state_dict(), optimizers[1].whole_state_dict()],
                                        random=[module.get_rng_state() for module in random]))
            if step == end or log.stops: break
            batches = [train_loader.next_batch() for _ in range(hp.seqs_per_step // machine.world_size)]
            log.step(step + 1, training_step(model, optimizers, batches, window, hp.seqs_per_step, reducer))
        log.flush(), log.writing.join()
        if machine.world_size > 1: dist.barrier()
        watchdog.place = math.inf  # from here on no process waits for another
        if step < end:
            number = watchdog.asked or signal.SIGTERM
            how = f"to go on, repeat the command with --resume {log.saved}" if log.saved else f"nothing is saved (--save_every {hp.save_every})"
            raise Stopped(128 + number, f"stopped by {signal.Signals(number).name} after step {step} of {end}; {how}")
        if not hp.eval_only: report(log, train_loader, network, hp, machine)
        if hp.sample and machine.rank == 0:
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled
                log.line("sample: " + next(iter(machine.map(lambda seed: sample(network, hp.sample, window, seed), [hp.seed]))))
def main(argv: list[str] | None = None) -> int:
    """Run with the flags in `argv` (default: the command line's). Returns the exit code: 2 for what the user can mend."""
    rank, local_rank, world_size = process_place()
    watchdog, run, failure = None if world_size > 1 else Watchdog(), (), ""
    try:
        with contextlib.ExitStack() as at_exit:
            for number in (signal.SIGINT, signal.SIGTERM):  # a handler of Python's would wait as long as the store does
                at_exit.callback(signal.signal, number, signal.signal(number, watchdog.receive if watchdog else signal.SIG_DFL))
            try:
                run = prepare(argv)
            except (UserError, OSError, torch.OutOfMemoryError) as error:
                failure = error  # the others have to hear of it
            if failure and watchdog: raise failure
            if not watchdog:
                timeout, facts = (run[0].timeout, run[5][0] | run[5][1]) if run else (Hyperparameters.timeout, {})
                store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
                watchdog = Watchdog(agree(store, rank, world_size, facts, str(failure)), rank, store, timeout)
                at_exit.callback(lambda: dist.is_initialized() and not watchdog.failure and dist.destroy_process_group())
                at_exit.push(watchdog)
                gpu = run[2].device if run[2].is_gpu else None
                dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, device_id=gpu)
            train(*run, watchdog)
            return 0
    except Stopped as error:
        (code, sentence), said = error.args, rank == 0
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # an OSError names the file
        code, sentence, said = 2, str(error), watchdog or local_rank == 0  # before it is there, all of a machine meet the same
    if said: print(f"train_gpt.py: {sentence}", file=sys.stderr)
    return code
if __name__ == "__main__": sys.exit(main())
