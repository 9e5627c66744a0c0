"""Train a 124M-parameter GPT on FineWeb tokens to a validation loss of 3.28, as fast as can be.

The recipe that took 8 H100 GPUs just under three minutes in January 2025, in one file that runs unchanged on any number of
GPUs, on one, or on a CPU, and imports without running:

    torchrun --standalone --nproc_per_node=8 train_gpt.py         the speedrun
    python train_gpt.py --preset tiny                             a small model, in a minute and a half on two CPU cores

Read from top to bottom: machine, FP8 matmul, Muon, attention, network, data, settings, processes, log, run. What has been
seen, on which hardware, with which log: the results table of README.md.
"""

import argparse, bisect, concurrent.futures, contextlib, copy, ctypes, dataclasses, datetime, functools, glob, hashlib, json, math, os
import platform, re, select, signal, subprocess, sys, threading, time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._pytree import tree_map
from tqdm import tqdm

# ---------- Machine: every choice of device and precision is made here and flows from here
BF16_PEAK_FLOPS = {  # dense, by the vendors' data sheets; the first name that is part of the card's name counts
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A10": 125e12,
    "L40S": 362e12, "L4": 121e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12}

class UserError(Exception):
    """Something that the user can mend, in one sentence: what was found, where, and what to do."""
class Stopped(Exception):
    """The end of a run before its last step, on all processes at the same one: the exit code, and a sentence for the first to say."""
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
        """Take this process's own GPU, before anything else touches one, or the CPU where torch finds no GPU. Raises
        UserError where there are more processes than GPUs, or where the GPU has no bfloat16."""
        place = process_place()
        if not torch.cuda.is_available():
            model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else "")
            name = f"CPU, {model[1] if model else platform.machine()}, {torch.get_num_threads()} threads a process"
            if mallopt := sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None):  # glibc's: keep freed memory,
                for option in (-1, -2, -3):  # by the thresholds of trimming and mmap, and the padding; for
                    mallopt(option, 1 << (25 if option == -3 else 28))  # fresh pages cost more than most of what is computed in them
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # others imitate bfloat16, slowly
            return cls(torch.device("cpu"), name, torch.bfloat16 if fast else torch.float32, *place)
        if place[1] >= (count := torch.cuda.device_count()):
            raise UserError(f"{count} GPU(s) found here, and process {place[1]} would need one more; start --nproc_per_node={count}.")
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # either name is read when the first memory is taken
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less is lost to fragmentation
        torch.cuda.set_device(device := torch.device("cuda", place[1]))
        torch.empty(1, device=device)  # makes the CUDA context on this card, and on no other
        name = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(f"{name} has no bfloat16 (compute capability below 8.0); use an Ampere or newer GPU, or hide it with "
                            "CUDA_VISIBLE_DEVICES='' and train --preset tiny on the CPU.")
        return cls(device, name, torch.bfloat16, *place)
    def activations(self, name: str) -> torch.dtype:
        """The dtype of a setting's name, where auto is the machine's own."""
        return self.dtype if name == "auto" else getattr(torch, name)
    @property
    def is_gpu(self) -> bool:
        """GPUs compile the network, and work while the host goes on; a CPU runs it as it is written."""
        return self.device.type == "cuda"
    @property
    def peak_flops(self) -> float:
        """The GPU's bfloat16 FLOP/s by its data sheet; 0 where the table does not know it."""
        return next((flops for name, flops in BF16_PEAK_FLOPS.items() if re.search(rf"\b{name}\b", self.name)), 0.0)
    @functools.cached_property
    def map(self):
        """`map`; on a CPU two at a time, each on half of the cores: small tensors gain more from that than from all."""
        half = 0 if self.is_gpu or self.world_size > 1 else torch.get_num_threads() // 2
        return concurrent.futures.ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(half,)).map if half else map
    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
    def read_later(self, values: Tensor):
        """Start copying a tensor to the host. The function returned waits for that copy alone, and gives its numbers."""
        if not self.is_gpu:
            return values.tolist
        host, copied = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True), torch.cuda.Event()
        copied.record()
        return lambda: (copied.synchronize(), host.tolist())[1]
    def peak_memory(self) -> tuple[int, int]:
        """Peak memory in MiB, (allocated, reserved); on a CPU the most that was ever resident, twice."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
        import resource  # Windows has none, and nothing else here minds
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10),) * 2

# ---------- FP8 matmul: twice bfloat16's rate, where the range of the operands is known well enough for a fixed scale; e4m3, and
# for gradients, which need range more than digits, e5m2: "FP8 Formats for Deep Learning" (Micikevicius et al., 2022)
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
    """`x @ w.T` in FP8, for x (T, in) and w (out, in) of any float dtype and sizes that are multiples of 16. Returns the
    product, bfloat16 (T, out), and what the backward pass needs: both operands times their scales, in e4m3."""
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
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
# What the compiler has to know of both: the shapes and dtypes of their results.
mm_op.register_fake(lambda x, w, *scales: (x.new_empty(len(x), len(w), dtype=torch.bfloat16), *(
    t.new_empty(t.shape, dtype=torch.float8_e4m3fn) for t in (x, w))))
mm_backward_op.register_fake(lambda grad, x_f8, w_f8, *scales: (
    x_f8.new_empty(x_f8.shape, dtype=torch.bfloat16), w_f8.new_empty(w_f8.shape, dtype=torch.float32)))
mm_op.register_autograd(lambda ctx, grad, *_: (*torch.ops.nanogpt.mm_backward(grad, *ctx.saved_tensors, *ctx.scales), None, None, None),
                        setup_context=mm_setup_context)

# ---------- Muon: momentum, orthogonalised. "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13's name, and the one before
def zeropower_via_newtonschulz5(G: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About the nearest orthogonal matrix: U S V^T becomes U S' V^T, with every S' somewhere between 0.7 and 1.2. G is
    (..., rows, cols) of any float dtype, a batch of matrices; the result has its shape, and `dtype`. Each step applies an odd
    quintic to all singular values at once, by matmuls alone. Its coefficients make the slope at zero as steep as can be, so that
    small values grow 3.4-fold a step; that large ones then hover around 1 instead of reaching it does not hurt. "Old Optimizer,
    New Norm" (Bernstein & Newhouse, 2024)."""
    if G.ndim < 2:
        raise ValueError(f"Newton-Schulz needs matrices, got a tensor of shape {tuple(G.shape)}")
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1; 1e-7 lets a zero matrix stay zero
    X = X.to(dtype).reshape(-1, *G.shape[-2:])
    if tall := G.size(-2) > G.size(-1):
        X = X.mT  # the products below are (rows, rows): let that be the shorter side
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + b A X + c A A X
    return (X.mT if tall else X).reshape(G.shape)

class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for the hidden matrices of a network.
    Parameters of one shape are a group, of which every process takes an equal share (the last ones perhaps less): it reads the
    gradients of those p alone for which owner[p] is its rank, keeps their momentum, and orthogonalises their updates in one
    batched call. While the results of one group are being gathered, the next ones are being computed.
    params: of two or more dimensions, the last two being the matrix. lr: length of a step, times a parameter's attribute `lr_mul`,
    and times sqrt(rows / cols) for a tall matrix, for the same change in what it puts out. rank, world_size: this process, of
    how many. dtype: of the orthogonalisation; bfloat16 is precise enough to train with."""
    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5,
                 rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.bfloat16):
        groups: dict[tuple, list[Tensor]] = {}
        for p in params:
            if p.ndim < 2:
                raise ValueError(f"Muon is for matrices; give the parameter of shape {tuple(p.shape)} to Adam")
            groups.setdefault((p.shape, p.dtype, p.device), []).append(p)
        super().__init__([dict(params=group) for group in groups.values()], dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps))
        self.rank, self.world_size, self.dtype = rank, world_size, dtype
        self.owner = {p: i // self.share(group) for group in self.param_groups for i, p in enumerate(group["params"])}
    def share(self, group: dict) -> int:
        """How many of a group's parameters a process takes, at most."""
        return math.ceil(len(group["params"]) / self.world_size)
    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter by its `.grad`; where that is None it counts as zero."""
        for group, updates, work in [(group, *self.orthogonal_updates(group)) for group in self.param_groups]:
            if work:
                work.wait()
            tall = max(1, updates.size(-2) / updates.size(-1)) ** 0.5
            for p, update in zip(group["params"], updates):
                p.add_(update, alpha=-group["lr"] * getattr(p, "lr_mul", 1.0) * tall)
    def orthogonal_updates(self, group: dict) -> tuple:
        """Advance the momentum of this process's share of a group, and gather what all processes make of theirs: the
        updates (n, *shape), zero-padded at the end, and what to wait for before they are read."""
        shape, mine = group["params"][0].shape, [p for p in group["params"] if self.owner[p] == self.rank]
        updates = group["params"][0].new_zeros(self.share(group), *shape, dtype=self.dtype)
        if mine:
            for p in (p for p in mine if not self.state[p]):
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in mine]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            updates[:len(mine)] = zeropower_via_newtonschulz5(torch.stack(ahead), group["ns_steps"], self.dtype)
        if self.world_size == 1:
            return updates, None
        gathered = updates.new_empty(len(updates) * self.world_size, *shape)
        return gathered, all_gather(gathered, updates, async_op=True)
    def whole_state_dict(self) -> dict:
        """`state_dict` with the momentum of all processes, who have to call it together; `load_state_dict` takes it on any number."""
        whole = self.state_dict()
        for i, p in enumerate(self.owner):  # in the order of the groups, as state_dict numbers them
            if self.world_size > 1:
                buffer = self.state[p]["momentum_buffer"] if self.owner[p] == self.rank else torch.empty_like(p)
                dist.broadcast(buffer, self.owner[p])
                whole["state"][i] = dict(momentum_buffer=buffer)
        return whole
    def load_state_dict(self, state_dict: dict) -> None:
        """Take over what was saved, of the momentum this process's share alone."""
        super().load_state_dict(state_dict)
        for p in [p for p in self.state if self.owner[p] != self.rank]:
            del self.state[p]

# ---------- Attention: FlexAttention's kernel on a GPU; on a CPU, where that has no backward pass, one for the same BlockMask
BLOCK = 128  # tokens; masks, windows and sequences are made of such blocks
def block_sparse_plan(block_mask: BlockMask) -> tuple[Tensor, Tensor, Tensor | None]:
    """A BlockMask in the form that batched matmuls want, worked out once and kept with it: for n query blocks that see at
    most K key blocks each, those blocks' numbers (n, K), filled up with others; what to add to the scores, float32
    (n, 128, K * 128), zero or minus infinity; which queries see anything, (T, 1), or None where all do."""
    if not hasattr(block_mask, "plan"):
        listed, blocks = block_mask.to_dense()[0, 0].bool().sort(dim=-1, descending=True, stable=True)
        listed, blocks = (t[:, :max(1, int(listed.sum(-1).max()))] for t in (listed, blocks))
        token = torch.arange(len(blocks) * BLOCK, dtype=torch.int32, device=blocks.device).view(-1, BLOCK)
        zero = token.new_zeros(())
        # In full blocks, too: their mask is true throughout, so asking it is as good as knowing that they are full.
        allowed = block_mask.mask_mod(zero, zero, token[:, :, None, None], token[blocks][:, None]) & listed[:, None, :, None]
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
    """What `flex_attention` returns for the same arguments, with a backward pass on every device. q, k, v and the result are
    (1, heads, T, head_dim). Only listed blocks are touched, so the cost grows with T * window; who sees nothing gets zeros."""
    blocks, bias, sees = block_sparse_plan(block_mask)
    out = BlockSparseAttention.apply(q[0], k[0], v[0], blocks, bias, scale)
    return (out if sees is None else out * sees)[None]
def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Attention under a block mask with the kernel that the tensors' device has; shapes as in block_sparse_attention."""
    if q.device.type == "meta":
        return (q @ k.mT) @ v  # FlexAttention refuses the meta device, which asks for shapes and dtypes alone
    return (block_sparse_attention if q.device.type == "cpu" else flex_attention)(q, k, v, block_mask=block_mask, scale=scale)

# ---------- Network: a GPT with rotary positions, value embeddings, U-net skips, and attention within documents and windows
def norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, without weights; shape and dtype stay."""
    return F.rms_norm(x, (x.size(-1),))
def next_multiple_of_n(v: float, *, n: int) -> int:
    """The smallest positive multiple of n that is at least v."""
    return max(1, math.ceil(v / n)) * n

class CastedLinear(nn.Module):
    """`x @ weight.T`, no bias. The weight, (out_features, in_features), is float32, drawn uniformly, and cast to the
    activations' dtype at each use. use_fp8: multiply in FP8 in training, where the hardware can, with the scales x_s, w_s,
    grad_s of activations, weight and gradient; in evaluation always plainly."""
    def __init__(self, in_features: int, out_features: int, use_fp8: bool = False, x_s: float = 1.0, w_s: float = 1.0, grad_s: float = 1.0):
        super().__init__()
        self.use_fp8, self.x_s, self.w_s, self.grad_s = use_fp8, x_s, w_s, grad_s
        bound = 3**0.5 * 0.5 * in_features**-0.5  # standard deviation 0.5 / sqrt(fan_in), times sqrt(3) for a uniform one
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))
    def zeroed(self) -> "CastedLinear":
        """The same layer with its weight at zero: what it projects into begins undisturbed."""
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
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for rotary positions, got {head_dim}")
        frequency = torch.cat([(1 / 1024) ** torch.linspace(0, 1, head_dim // 4), torch.zeros(head_dim // 4)])
        angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # radians
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)  # (max_seq_len, head_dim)
        self.register_buffer("sin", torch.cat([angle.sin(), -angle.sin()], dim=1), persistent=False)
    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, head_dim), T at most max_seq_len, to the same shape and dtype."""
        if x.size(1) > self.cos.size(0):
            raise ValueError(f"a sequence of {x.size(1)} tokens is longer than max_seq_len, {self.cos.size(0)}")
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
        if ve is not None:
            v = v + self.lambdas[1] * ve.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        return self.c_proj(attention(q, k, v, block_mask, self.scale).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    """Four times as wide inside, with a squared ReLU: "Primer" (So et al., 2021)."""
    def __init__(self, dim: int, **fp8):
        super().__init__()
        self.c_fc = CastedLinear(dim, 4 * dim, **fp8)
        # Squares are larger than what is normalised: a quarter of the scale keeps them below 448, e4m3's largest number.
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
        if self.attn is not None:
            x = x + self.attn(norm(x), ve, block_mask)
        return x + self.mlp(norm(x))

class ValueEmbedding(nn.Module):
    """Three embeddings of each token, for the values of the first three layers and again of the last three: in place of the
    first layer's values in "Value Residual Learning" (Zhou et al., 2024)."""
    def __init__(self, vocab_size: int, dim: int, num_layers: int, dtype: torch.dtype):
        super().__init__()
        if num_layers < 6:
            raise ValueError(f"three value embeddings, each used twice, need six layers or more, got {num_layers}")
        self.num_layers = num_layers
        self.embed = nn.ModuleList(nn.Embedding(vocab_size, dim, dtype=dtype) for _ in range(3))
    def forward(self, input_seq: Tensor) -> list[Tensor | None]:
        """Ids (T,) to an entry for each layer: (1, T, dim), or None for the layers between."""
        ve = [table(input_seq)[None] for table in self.embed]
        return ve + [None] * (self.num_layers - 6) + ve

class GPT(nn.Module):
    """The network, for one sequence at a time, which holds any number of documents. The first half of the layers pushes what it
    puts out, the second half pops it and mixes it in by a learnable weight, as in "U-Net" (Ronneberger et al., 2015). vocab_size:
    of the tokens, the last of which begins a document. max_seq_len: tokens of the longest sequence.
    attention_free_layers: layers that are an MLP alone. fp8: matmuls in FP8, where the hardware can: "none", "head", or "all",
    which adds the hidden ones. dtype: of the embeddings, from which the activations take theirs; all other weights are float32.
    train_seq_len: tokens of a micro-step (None: max_seq_len). The loss is their mean, so its gradients shrink as they grow in
    number, and FP8 has to scale them up by as much."""
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
        """The long and the short mask: causal, within documents, within a window of blocks. input_seq: ids (T,), T a multiple
        of 128. sliding_window_num_blocks: W, 0-d int32. Query block i sees the key blocks i - W < j <= i (the short mask: with
        max(1, W // 2) for W), and in them token q sees k when k <= q and both are of one document. Only block indices and the
        blocks' first and last tokens are looked at, all on the device. Full blocks, which need no mask inside, are listed apart
        from partial ones; the nearest come first."""
        if input_seq.ndim != 1 or input_seq.numel() % BLOCK:
            raise ValueError(f"input_seq must be (T,) with T a multiple of {BLOCK}, got {tuple(input_seq.shape)}")
        document = (input_seq == self.vocab_size - 1).cumsum(0)
        first, last = document.view(-1, BLOCK)[:, 0], document.view(-1, BLOCK)[:, -1]
        j = torch.arange(first.numel(), dtype=torch.int32, device=input_seq.device)
        i = j[:, None]
        # Documents are numbered upwards. So an earlier block shares one with block i exactly when it ends in the one where
        # i begins, and both lie in a single one exactly when it begins in the one where i ends.
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
            if from_end < self.num_skips:
                x = x + self.skip_weights[self.num_skips - 1 - from_end] * skips.pop()
            # Every fourth layer from either end sees the long window: 0, 4, 7 and 11 of 12.
            x = block(x, ve[i], x0, long if min(i, from_end) % 4 == 0 else short)
            if i < self.num_skips:
                skips.append(x)
        return norm(x)[0]
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: (T, model_dim) to float32 (T, vocab_size padded to a multiple of 128)."""
        # Kept below 30, as in "Gemma 2" (2024): up to a constant, which the softmax ignores, this is 15 tanh(x / 15).
        return 30 * torch.sigmoid(self.lm_head(hidden).float() / 7.5)
    def forward(self, input_seq: Tensor, target_seq: Tensor, sliding_window_num_blocks: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, 0-d float32: input_seq (T,) int32; target_seq (T,) int64, where -100
        does not count; sliding_window_num_blocks 0-d int32."""
        return self.loss(self.hidden(input_seq, sliding_window_num_blocks), target_seq)
    def loss(self, hidden: Tensor, target_seq: Tensor) -> Tensor:
        """Mean cross-entropy of what `hidden` returned."""
        if self.training:
            return F.cross_entropy(self.logits(hidden), target_seq)
        # Without a backward pass nobody needs all logits at once, and 64K tokens of them would not fit on a small card.
        parts = zip(hidden.split(8192), target_seq.split(8192))
        return sum(F.cross_entropy(self.logits(h), t, reduction="sum") for h, t in parts) / (target_seq >= 0).sum()

# ---------- Data: shards, each a header of 256 int32 (magic, version, number of tokens, vocabulary size, zeros) and uint16 tokens
HEADER_INTS, SHARD_MAGIC, SHARD_VERSION, GPT2_VOCAB = 256, 20240520, 1, 50257
def open_shard(path: str) -> tuple[np.ndarray, int]:
    """Map a shard into memory: its tokens (N,) uint16 and its vocabulary size. Raises UserError where it is not one."""
    size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a token shard: it begins with {header[:2].tolist()}, not with magic number and version "
                        f"[{SHARD_MAGIC}, {SHARD_VERSION}]; make it again, or let --train_files and --val_files leave it out.")
    num_tokens, vocab_size = int(header[2]), int(header[3]) or GPT2_VOCAB  # the public shards leave the vocabulary at 0
    if num_tokens < 1 or size != 4 * HEADER_INTS + 2 * num_tokens:
        raise UserError(f"{path} is damaged: its header promises {num_tokens} tokens, and {size - 4 * HEADER_INTS} bytes follow; make it again.")
    if not 2 <= vocab_size <= 1 << 16:
        raise UserError(f"{path} is damaged: its header has a vocabulary of {vocab_size}, which 16-bit tokens cannot; make it again.")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * HEADER_INTS, shape=(num_tokens,)), vocab_size

class DistributedDataLoader:
    """The tokens of all shards, in the order of the files' names, cut into sequences that the processes take in turn. Sequence
    g begins at token g * seq_len, whatever the number of processes, and may run across the ends of shards.
    filename_pattern: a glob. num_tokens: how many tokens the run predicts (None or 0: all that there are); targets beyond
    are -100. repeat: begin again at the end of the tokens. device: where sequences go.
    Raises UserError where files are missing or broken, or have too few tokens."""
    def __init__(self, filename_pattern: str, seq_len: int, *, num_tokens: int | None = None, rank: int = 0,
                 world_size: int = 1, device: torch.device | str = "cpu", repeat: bool = False):
        self.files = sorted(glob.glob(filename_pattern))
        if not self.files:
            raise UserError(f"no token shard matches {os.path.abspath(filename_pattern)}; make some with `python data/local_text.py`, "
                            "fetch FineWeb as README.md says, or name yours with --train_files and --val_files.")
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
    def check_tokens(self) -> None:
        """Read all that the run will see. Raises UserError at a token beyond the vocabulary."""
        for path, start, shard in zip(self.files, self.starts, self.shards):
            tokens = shard[:max(0, self.num_tokens + 1 - start)]
            if tokens.max(initial=0) >= self.vocab_size:
                at = int(np.argmax(tokens >= self.vocab_size))
                raise UserError(f"{path} has token {tokens[at]} at position {at}, and a vocabulary of {self.vocab_size}; make it again.")
    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens, uint16, from position `start` of the shards' endless repetition."""
        pieces = []
        while count:
            shard = bisect.bisect_right(self.starts, start % self.total) - 1
            pieces.append(self.shards[shard][start % self.total - self.starts[shard]:][:count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)
    def whereabouts(self, first: int, count: int) -> str:
        """For people: `count` sequences from `first` on, and the shards that their tokens come from."""
        tokens = range(first * self.seq_len, (first + count) * self.seq_len, BLOCK)
        files = dict.fromkeys(self.files[bisect.bisect_right(self.starts, token % self.total) - 1] for token in tokens)
        return f"sequences {first} to {first + count - 1}, tokens {tokens[0]} to {tokens[-1] + BLOCK - 1}, in {' and '.join(files)}"
    def sequence(self, index: int) -> tuple[Tensor, Tensor]:
        """Sequence `index` on the device: inputs (seq_len,) int32 and targets (seq_len,) int64."""
        tokens = torch.from_numpy(self.read(index * self.seq_len, self.seq_len + 1).view(np.int16))
        if self.device.type == "cuda":  # the host does not wait for a copy out of pinned memory
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
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
    """A field with its meaning, for --help, and its limits: least, most, multiple_of, choices. aside: the training's course does not
    depend on it, so that a run may be resumed with another."""
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
    timeout: int = setting(300, "seconds to wait for a process that does not answer or go on; longer than a step, or a validation", least=5, aside=True)
    save_every: int = setting(0, "steps between checkpoints, log_dir/RUN_ID/step_*.pt; 0 for none", least=0, aside=True)
    keep: int = setting(2, "how many checkpoints to keep, the newest", least=1, aside=True)
    resume: str = setting("", "checkpoint to go on from; auto: the newest whole one of RUN_ID, or the beginning", aside=True)
    eval_only: bool = setting(False, "validate the checkpoint of --resume, write its sample, and end", aside=True)
    log_dir: str = setting("logs", "folder of the log", aside=True)
    run_id: str = setting("", "name of the log, log_dir/RUN_ID.txt; made from the time when empty", aside=True)

PRESETS = {
    "speedrun": {},  # 124M parameters as GPT-2 counts them, to 3.28
    "medium": dict(  # 350M by the same count, the shape of GPT-2 Medium, to 2.92
        num_layers=24, num_heads=8, model_dim=1024, train_seq_len=64 * 1024, num_iterations=6000, cooldown_frac=0.6,
        embed_lr=0.3, head_lr=0.004, scalar_lr=0.02, muon_lr=0.025),
    "tiny": dict(  # 0.85M, for a minute and a half on two CPU cores, and the shards of data/local_text.py
        train_files="data/local_text/train_*.bin", val_files="data/local_text/val_*.bin", val_tokens=65536, repeat=True,
        train_seq_len=1024, val_seq_len=2048, seqs_per_step=2, num_layers=6, num_heads=2, head_dim=64, model_dim=96,
        attention_free_layers=(4,), num_iterations=800, cooldown_frac=0.7, max_window=256, embed_lr=0.15, head_lr=0.004,
        scalar_lr=0.02, muon_lr=0.035, val_loss_every=100, sample=200)}

def parse_arguments(argv: list[str] | None = None) -> tuple[Hyperparameters, str]:
    """The settings that a command line asks for, and its preset. Raises UserError at what it does not know."""
    def boolean(text: str) -> bool:
        return bool(["false", "true"].index(text.lower()))
    def layers(text: str) -> tuple[int, ...]:
        return () if text == "none" else tuple(map(int, text.split(",")))
    def refuse(message: str):
        raise UserError(f"{message}; --help lists all flags and presets.")
    parser = argparse.ArgumentParser(prog="train_gpt.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse  # argparse's own would print the usage, and exit
    parser.add_argument("--preset", default="speedrun", choices=PRESETS, help="where the settings start from (default speedrun)")
    for field in dataclasses.fields(Hyperparameters):
        presets = (f"; {name} {preset[field.name]}" for name, preset in PRESETS.items() if field.name in preset)
        parser.add_argument(
            f"--{field.name}", type={bool: boolean, tuple[int, ...]: layers}.get(field.type, field.type), default=argparse.SUPPRESS,
            metavar="X", choices=field.metadata.get("choices"), **(dict(nargs="?", const=True) if field.type is bool else {}),
            help=f"{field.metadata['meaning']} (default {field.default!r}{''.join(presets)})")
    given = vars(parser.parse_args(argv))
    return Hyperparameters(**PRESETS[preset := given.pop("preset")] | given), preset
def check_settings(hp: Hyperparameters, preset: str, machine: Machine) -> None:
    """Raise UserError at the first setting that cannot work, on this machine and with these processes."""
    if preset != "tiny" and not machine.is_gpu:
        raise UserError(f"the {preset} preset needs a CUDA GPU, and torch {torch.__version__} finds none here; use --preset tiny, or see "
                        "whether nvidia-smi lists the card and torch is a CUDA build.")
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
        raise UserError(f"{machine.world_size} processes cannot share {hp.seqs_per_step} sequences a step evenly; give --seqs_per_step a "
                        f"multiple of {machine.world_size}, or --nproc_per_node a divisor.")
def learning_rate_factor(step: int, hp: Hyperparameters) -> float:
    """1 until the cooldown, then linearly down to 0.1 at the end."""
    return 0.1 + 0.9 * min(1, (1 - step / hp.num_iterations) / hp.cooldown_frac)
def muon_momentum(step: int) -> float:
    """From 0.85 to 0.95 over 300 steps: while gradients turn fast, a short memory is the better one."""
    return 0.85 + 0.1 * min(step / 300, 1)
def window_blocks(step: int, hp: Hyperparameters) -> int:
    """The attention window in blocks of 128 tokens, from 1 to max_window / 128, linear in the steps; up to half a block below the
    maximum, so that the longest window is there for some steps and not only after the last."""
    return next_multiple_of_n((hp.max_window - BLOCK // 2) * step / hp.num_iterations, n=BLOCK) // BLOCK

# ---------- Processes: those of one run start from the same, add up their gradients, and end together
def run_facts(hp: Hyperparameters, machine: Machine, train_loader, val_loader) -> tuple[dict[str, str], dict[str, str]]:
    """What the training's course depends on, which a run that is resumed has to have in common with the one before; and what
    else all processes of a run have to. By names for people; files may lie elsewhere on each machine."""
    course, else_, fields = {}, {}, [field for field in dataclasses.fields(hp) if not field.name.endswith(("_files", "_dir", "_id"))]
    for field in fields:
        (else_ if field.metadata.get("aside") else course)[f"--{field.name}"] = str(getattr(hp, field.name))
    for facts, loader in ((course, train_loader), (else_, val_loader)):
        facts.update({f"tokens in {Path(file).name}": str(len(shard)) for file, shard in zip(loader.files, loader.shards)})
    course |= dict(vocabulary=str(train_loader.vocab_size), activations=str(machine.activations(hp.dtype)))
    return course, else_ | dict(script=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), torch=str(torch.__version__), device=machine.device.type)
def difference(one: dict[str, str], other: dict[str, str]) -> tuple[str, str | None, str | None] | None:
    """The first name whose facts differ, and both facts."""
    return next(((name, one.get(name), other.get(name)) for name in one | other if one.get(name) != other.get(name)), None)
def agree(store, rank: int, world_size: int, facts: dict[str, str], failure: str) -> list[str]:
    """Tell the other processes what this one starts from, or why it cannot start, and hear them. Returns the names of their
    machines. Raises UserError, in all processes alike, where one cannot start, is missing, or differs from process 0."""
    store.set(f"start/{rank}", json.dumps([f"machine {os.environ.get('GROUP_RANK', 0)} ({platform.node()})", failure, facts]))
    said = []
    try:
        while len(said) < world_size:
            said.append(json.loads(store.get(f"start/{len(said)}")))
    except dist.DistError:
        raise UserError(f"process {len(said)} did not start within --timeout; see what its machine says.") from None
    for other, (host, failure, facts) in enumerate(said):
        if failure:
            raise UserError(failure if all(failure == each for _, each, _ in said) else f"process {other} on {host}: {failure}")
        if found := difference(said[0][2], facts):
            name, expected, there = found
            raise UserError(f"process {other} on {host} has {name} {there}, and process 0 has {expected}; give them the same.")
    return [host for host, *_ in said]

class Signals:
    """SIGINT and SIGTERM: the first asks the run to stop after its step. One that comes outside of the steps, and a second one, end
    it at once; torchrun passes on what the terminal has sent to all, so that a second one within a second is the same."""
    def __init__(self, handler=None):
        self.place, self.asked, self.since = -1, 0, 0.0  # place: -1 before the steps; infinity after them
        main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python has no handlers
        self.before = {number: signal.signal(number, handler or self.receive) for number in (signal.SIGINT, signal.SIGTERM) if main_thread}
    def __enter__(self) -> "Signals":
        return self
    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
    def receive(self, number: int, frame=None) -> None:
        if not 0 <= self.place < math.inf or self.asked and time.monotonic() - self.since > 1:
            self.end_at_once(number)
        elif not self.asked:
            self.asked, self.since = number, time.monotonic()
    def end_at_once(self, number: int) -> None:
        raise KeyboardInterrupt(number)

class Watchdog(Signals, threading.Thread):
    """Ends this process, with a line, when another one has died or hangs, for which collectives would wait in vain. Twice a second
    every process tells the others, through the launcher's store, that it lives, its `place`, which grows with what the main
    thread does, and the error that ends it. Who says nothing for `timeout` seconds is dead, stopped or cut off; where no place
    changes, those behind the others hang. Signals come to this thread, since the main one may wait where Python cannot interrupt
    it; they let it look for a lost process at once, for torchrun sends SIGTERM when it has lost one."""
    def __init__(self, store, rank: int, hosts: list[str], timeout: float):
        threading.Thread.__init__(self, daemon=True)
        Signals.__init__(self, lambda *_: None)
        self.store, self.rank, self.hosts, self.timeout = store.clone(), rank, hosts, timeout
        self.failure, self.look_until, self.closed = "", 0.0, False
        self.signals, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written)
        self.say(0)
        self.start()
    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        """The main thread ends: by the loss of another process, which is named, without return; or the others hear of its error."""
        if isinstance(error, RuntimeError):
            self.look_until = time.monotonic() + 4
            self.join(5)
        if isinstance(error, Stopped):
            self.place, error = math.inf, None  # the others stop as well
        self.closed, self.failure = True, f"has failed: {str(error) or kind.__name__}".splitlines()[0] if error else ""
        self.join(1), self.say(time.monotonic())  # its last word is this one, and no thread is left at the end
    def say(self, now: float) -> None:
        self.store.set(f"alive/{self.rank}", json.dumps([now, self.place, self.failure]))
    def run(self) -> None:
        ranks, since, moved = range(len(self.hosts)), [0.0] * len(self.hosts), 0.0
        heard = [[None, -1, ""]] * len(ranks)
        while not self.closed:
            if select.select([self.signals], [], [], 0.5)[0]:
                self.look_until = time.monotonic() + 4
                self.receive(os.read(self.signals, 1)[0])
            before, now = heard, time.monotonic()
            overdue = threading.Timer(self.timeout, self.end, ("the launcher of process 0 does not answer", 1))
            overdue.start()  # of a machine that is cut off there comes no answer at all, not even an error
            try:
                self.say(now)
                heard = [json.loads(text) for text in self.store.multi_get([f"alive/{rank}" for rank in ranks])]
            except dist.DistError:
                self.end("the launcher of process 0 does not answer", 1)
            overdue.cancel()
            since = [since[rank] if heard[rank] == before[rank] else now for rank in ranks]
            _, places, failures = zip(*heard)
            moved = moved if places == tuple(place for _, place, _ in before) else now
            silence = 2.5 if now < self.look_until else self.timeout  # while it looks for a loss, a shorter one is enough
            if lost := [rank for rank in ranks if failures[rank] or now - since[rank] > silence and places[rank] < math.inf]:
                known = failures[lost[0]] and self.hosts[lost[0]] == self.hosts[self.rank]  # where it was said by the process itself
                self.end(failures[lost[0]] or "gave no answer: killed, stopped or cut off", 1, lost, places, shown=not known)
            if 0 <= self.place < math.inf and now - moved > self.timeout:
                self.end(f"made no progress for {self.timeout} s", 1, [rank for rank in ranks if places[rank] == min(places)], places)
    def end_at_once(self, number: int) -> None:
        self.end(f"stopped by {signal.Signals(number).name}", 128 + number)
    def end(self, reason: str, code: int, culprits: list[int] | tuple = (), places: tuple = (), shown: bool = True) -> None:
        """Say why, once a machine, and leave without waiting for what cannot end."""
        here = {rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]}
        names = " and ".join(f"process {rank} on {self.hosts[rank]}" for rank in culprits) + " " * bool(culprits)
        at = f", at step {max(places) // 3 + 1}" if 0 <= max(places, default=-1) < math.inf else ""
        if shown and not self.closed and self.rank == min(here - set(culprits) or here):
            tqdm.write(f"train_gpt.py: {names}{reason}{at}; the run has ended.", file=sys.stderr)
        if not self.closed:
            os._exit(code)

class GradientReducer:
    """Adds up gradients over the processes, each as soon as the backward pass has it (the step's `last`): a matrix of Muon's where
    it will be orthogonalised, which takes half the bytes, the others everywhere; what is small together, by the megabyte."""
    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], machine: Machine, signals: Signals | None = None):
        self.machine, self.signals = machine, signals or argparse.Namespace(place=0, asked=0)
        self.last, self.small, self.in_flight = False, {}, []
        self.owner = {p: rank for muon in optimizers if isinstance(muon, Muon) for p, rank in muon.owner.items()}
        for p in model.parameters() if machine.world_size > 1 else ():
            p.register_post_accumulate_grad_hook(self.ready)
    def ready(self, p: Tensor) -> None:
        """A gradient is complete."""
        if self.last and p.grad.nbytes < 1 << 20:
            self.collect(p.grad)
        elif self.last:
            work = dist.reduce(p.grad, self.owner[p], async_op=True) if p in self.owner else dist.all_reduce(p.grad, async_op=True)
            self.in_flight.append((work, p.grad, []))
    def collect(self, t: Tensor, full: int = 1 << 20) -> None:
        """Put a small tensor into the bucket of its dtype, and send that off when it has `full` bytes."""
        bucket = self.small.setdefault(t.dtype, [])
        bucket.append(t)
        if sum(t.nbytes for t in bucket) >= full:
            flat = torch.cat([t.flatten() for t in self.small.pop(t.dtype)])
            self.in_flight.append((dist.all_reduce(flat, async_op=True), flat, bucket))
    def finish(self, total: Tensor) -> None:
        """Send off what is left, add up `total`, a small tensor, as well, and wait until all sums are there."""
        for t in [*(bucket.pop() for bucket in self.small.values() if bucket), total] if self.machine.world_size > 1 else ():
            self.collect(t, full=0)
        self.signals.place += self.signals.place >= 0
        for work, flat, bucket in self.in_flight:
            work.wait()
            for t, part in zip(bucket, flat.split([t.numel() for t in bucket]) if bucket else ()):
                t.copy_(part.view_as(t))
        self.in_flight.clear()

# ---------- Log: this script, versions, hardware and settings; then a line for each step and validation
class RunLog:
    """Keeps the clock of the training, and writes, on the first process alone, log_dir/RUN_ID.txt and what a person sees: a bar on
    a terminal, plain lines elsewhere. A resumed run continues its log from where the checkpoint was written; --eval_only writes
    none. Raises UserError where the file cannot be made, and Stopped, from `step` or `stop_clock`, at a loss that is not finite."""
    def __init__(self, hp: Hyperparameters, machine: Machine, facts: dict, loader: DistributedDataLoader, checkpoint: dict | None):
        self.machine, self.hp, self.loader = machine, hp, loader
        self.saved = checkpoint["path"] if checkpoint else ""  # the newest whole checkpoint
        self.pending, self.stops = None, 0  # a step whose loss may still be on its way; how many processes were asked to stop
        self.since, self.unwritten, self.complaints = None, b"", set()  # when the clock was last started; what a full disk refused
        before = checkpoint["log"] if checkpoint else dict(run_id="", length=0, trained_ms=0.0, best=math.inf)
        self.run_id = hp.run_id or before["run_id"] or time.strftime("%Y-%m-%d_%H%M%S_") + os.urandom(3).hex()
        self.length, self.trained_ms, self.best = 0, before["trained_ms"], before["best"]  # in bytes; before `since`; val_loss
        self.folder, path = Path(hp.log_dir, self.run_id), Path(hp.log_dir, f"{self.run_id}.txt")
        continued = before["run_id"] == self.run_id and path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if hp.resume == "auto" and not checkpoint and path.exists() and machine.rank == 0:  # cut before its first checkpoint
                path.rename(path.with_suffix(time.strftime(".cut_%Y-%m-%d_%H%M%S")))
            silent = machine.rank > 0 or hp.eval_only
            self.file = open(os.devnull if silent else path, "wb" if silent else "r+b" if continued else "xb", buffering=0)
        except OSError as error:
            raise UserError(f"the log {path} cannot be made ({error.strerror}); choose another --run_id or --log_dir.") from None
        self.bar = tqdm(total=hp.num_iterations, initial=checkpoint["step"] if checkpoint else 0, unit="step", dynamic_ncols=True,
                        disable=machine.rank > 0 or hp.eval_only or not sys.stderr.isatty())
        if continued and not silent:
            self.length = min(before["length"], os.path.getsize(path))
            self.file.truncate(self.length)
            self.file.seek(self.length)
        else:
            source = Path(__file__).read_text()
            gpus = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True).stdout if machine.is_gpu else ""
            about = dict(python=platform.python_version(), cuda=torch.version.cuda, hardware=machine.name, world_size=machine.world_size)
            about |= facts | dataclasses.asdict(hp)
            self.write("\n".join([source, "=" * 100, gpus, *(f"{name}: {value}" for name, value in about.items()), "=" * 100, ""]))
        if not hp.eval_only:
            self.line(f"log: {path}")
        if checkpoint:
            self.line(f"resumed from {self.saved}: step {checkpoint['step']}, world_size {machine.world_size}, {machine.name}, torch {torch.__version__}, "
                      f"script {facts['script'][:12]}" + "".join(f"; passed over: {found}" for found in checkpoint["defects"]))
    def start_clock(self) -> None:
        """Start it, or let it go on."""
        if self.since is None:
            self.machine.synchronize()
            self.since = time.perf_counter()
    def stop_clock(self) -> None:
        self.flush()
        self.machine.synchronize()
        self.trained_ms, self.since = self.milliseconds(), None
    def milliseconds(self) -> float:
        """Time spent in training, without validations and checkpoints."""
        return self.trained_ms + (1000 * (time.perf_counter() - self.since) if self.since else 0)
    def state(self) -> dict:
        """What a checkpoint keeps of this."""
        return dict(run_id=self.run_id, length=self.length, trained_ms=self.trained_ms, best=self.best)
    def complain(self, what: str, error: Exception) -> None:
        """Say, once, what cannot be written."""
        if what not in self.complaints:
            self.complaints.add(what)
            tqdm.write(f"train_gpt.py: {what} cannot be written ({error}); training goes on, and it is tried again later.", file=sys.stderr)
    def write(self, text: str) -> None:
        """Add to the file, unbuffered: what it does not take now is tried again with what follows."""
        self.unwritten, self.length = self.unwritten + text.encode(), self.length + len(text.encode())
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        except OSError as error:
            self.complain("the log", error)
    def line(self, text: str, shown: bool = True) -> None:
        """Add a line to the file, and show it."""
        self.write(text + "\n")
        if shown and self.machine.rank == 0:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()
    def progress(self, step: int, result: str = "", more: str = "", shown: bool = True) -> None:
        """A line in the form of the public logs."""
        now = self.milliseconds()
        self.line(f"step:{step}/{self.hp.num_iterations} {result}train_time:{now:.0f}ms step_avg:{now / max(step, 1):.2f}ms{more}", shown)
    def validation(self, step: int, loss: float) -> None:
        self.best = min(self.best, loss)
        self.progress(step, f"val_loss:{loss:.4f} ")
    def step(self, step: int, result: Tensor) -> None:
        """The line of a step. A GPU's is written while its next step runs, when the loss has arrived without a wait."""
        self.flush()
        self.pending = step, self.machine.read_later(result)
        if not self.machine.is_gpu:
            self.flush()
    def flush(self) -> None:
        """Write the line that waits for its loss."""
        if self.pending:
            (step, read), self.pending = self.pending, None
            loss, self.stops = read()
            self.progress(step, more=f" train_loss:{loss:.4f}", shown=self.bar.disable)
            self.bar.set_postfix_str(f"train_loss {loss:.4f}", refresh=False)
            self.bar.update()
            if not math.isfinite(loss):
                raise Stopped(2, f"the loss of step {step} is {loss}, on {self.loader.whereabouts((step - 1) * self.hp.seqs_per_step, self.hp.seqs_per_step)}; "
                                 f"the last checkpoint: {self.saved or 'none'}; lower the learning rates, or look at these tokens.")
    def close(self) -> None:
        self.bar.close()
        self.file.close()

# ---------- Checkpoints: all that a run goes on from, written beside the training; what is not whole, or of another run, is refused
CHECKPOINT_FORMAT = 1
def manifest(path: Path) -> bytes:
    """What stands beside a checkpoint from the moment that it is whole, in a .json of its name."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return json.dumps(dict(format=CHECKPOINT_FORMAT, bytes=path.stat().st_size, sha256=digest)).encode()
def defect(path: Path) -> str:
    """Why a checkpoint cannot be read, for people; empty where it is whole."""
    try:
        said = path.with_suffix(".json").read_bytes()
        found = re.match(rb'{"format": (\d{1,9}),', said)
        if found and int(found[1]) > CHECKPOINT_FORMAT:
            return f"{path} is in format {int(found[1])}, and this script reads up to {CHECKPOINT_FORMAT}; resume with the script that wrote it."
        return "" if said == manifest(path) else f"{path} is damaged: it is not what {path.stem}.json says; resume from another one."
    except OSError as error:
        return f"{path} is not a whole checkpoint ({error.strerror}: {error.filename}); resume from another one."
def load_checkpoint(hp: Hyperparameters, course: dict[str, str]) -> dict | None:
    """The checkpoint to go on from, in host memory; None without --resume, and for auto where there is none. Nothing in the file is
    run. Raises UserError where it is damaged, or of another course than this run's."""
    paths = [Path(hp.resume)] if hp.resume else []
    if hp.resume == "auto":  # the manifest is written last, so that files without one are those of a run that was cut
        paths = sorted((path.with_suffix(".pt") for path in Path(hp.log_dir, hp.run_id).glob("step_*.json")), reverse=True)
    defects = [defect(path) for path in paths]
    whole = [path for path, found in zip(paths, defects) if not found]
    if paths and not whole:
        raise UserError(defects[0])
    if not paths:
        return None
    try:
        checkpoint = torch.load(whole[0], map_location="cpu", weights_only=True)
        found = difference(checkpoint["course"], course)
    except Exception as error:  # a whole file, and anything may be in it
        raise UserError(f"{whole[0]} is no checkpoint of this script ({str(error).splitlines()[0]}); resume from another one.") from None
    if found:
        name, theirs, ours = found
        raise UserError(f"{whole[0]} is of a run with {name} {theirs}, and this one has {ours}; give it the same, or another --resume.")
    return checkpoint | dict(path=str(whole[0]), manifest=manifest(whole[0]).decode(), defects=[found for found in defects if found])

class Checkpoints:
    """Writes checkpoints on the first process, beside the training: to another name, which is changed when all is on the disk, and
    after it the manifest. Of the older ones the newest `keep` stay."""
    def __init__(self, keep: int, log: RunLog):
        self.keep, self.log, self.writing, self.writer = keep, log, None, concurrent.futures.ThreadPoolExecutor(1)
    def save(self, step: int, state: dict) -> None:
        """Copy `state` to host memory, and let the rest happen beside the training."""
        self.wait()
        if self.log.machine.rank == 0:
            state = tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, state)
            self.writing = self.writer.submit(self.write, self.log.folder / f"step_{step:08d}.pt", state)
    def write(self, path: Path, state: dict) -> str:
        unfinished, listed = path.with_name("unfinished"), path.with_suffix(".json")
        path.parent.mkdir(exist_ok=True)
        listed.unlink(missing_ok=True)
        try:
            for target, write in ((path, lambda file: torch.save(state, file)), (listed, lambda file: file.write(manifest(path)))):
                with open(unfinished, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)  # a full disk has better use for it
        oldest = sorted(name for other in path.parent.glob("step_*.json") if (name := other.stem) <= path.stem)[-self.keep:][0]
        for other in [other for other in path.parent.glob("step_*") if other.stem < oldest]:
            other.unlink()
        return str(path)
    def wait(self) -> None:
        """Until what is being written is on the disk, or is known not to be."""
        try:
            self.log.saved = self.writing.result() if self.writing else self.log.saved
        except (OSError, RuntimeError) as error:  # torch makes the latter out of the former
            self.log.complain("a checkpoint", error)
        self.writing = None

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
    # The gradients of a mean over many tokens are small, and an eps of the usual 1e-8 would not be small beside them.
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
    muon = Muon([p for p in model.blocks.parameters() if p.ndim >= 2], lr=hp.muon_lr, momentum=muon_momentum(0), rank=machine.rank,
                world_size=machine.world_size, dtype=model.embed.weight.dtype)  # who asks for float32 gets precise updates too
    return [adam, muon]
def set_schedule(optimizers: list[torch.optim.Optimizer], step: int, hp: Hyperparameters, machine: Machine) -> Tensor:
    """Give the optimizers a step's learning rates and momentum. Returns its window in blocks, 0-d int32 on the device."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * learning_rate_factor(step, hp)
        if "momentum" in group:
            group["momentum"] = muon_momentum(step)
    return torch.tensor(window_blocks(step, hp), dtype=torch.int32).to(machine.device, non_blocking=True)
def training_step(model, optimizers, batches, window: Tensor, seqs_per_step: int, reducer: GradientReducer) -> Tensor:
    """One update by the mean gradient of a step's sequences, of which `batches` gives this process's share. Gradients add up
    over the micro-steps, and are reduced over the processes once, during the last. Returns (2,): the step's mean loss, and how
    many processes were asked to stop."""
    def micro_step(number: int) -> Tensor:
        reducer.last = number == len(batches) - 1
        loss = model(*batches[number], window)
        loss.backward()
        return loss.detach()
    # Two at a time only where there are two: a sum of more would depend on which comes first.
    loss_sum = sum((reducer.machine.map if len(batches) == 2 else map)(micro_step, range(len(batches))))
    result = torch.stack([loss_sum / seqs_per_step, loss_sum.new_full((), reducer.signals.asked > 0)])
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
    indices = range(loader.rank, loader.num_sequences, loader.world_size)
    total = sum(reducer.machine.map(loss_sum, indices), torch.zeros((), dtype=torch.float64, device=window.device))
    reducer.finish(total)
    model.train()
    return total.item() / loader.num_tokens
def memory_needed(model: GPT, hp: Hyperparameters, train_seq_len: int) -> float:
    """About how many bytes a GPU needs for micro-steps of train_seq_len tokens: for a weight its gradient, optimizer state and
    copy in the warm-up, for a token its logits and what each layer keeps for the backward pass. 5 bytes a logit and 34 a channel
    were chosen to meet one figure, the public record's 30,724 MiB at 48K tokens; other lengths extrapolate."""
    adam = sum(p.nbytes for m in (model.embed, model.value_embeds, model.lm_head) for p in m.parameters())
    per_token = 5 * model.lm_head.weight.size(0) + 34 * hp.model_dim * hp.num_layers
    return 5 * adam + 4 * sum(p.nbytes for p in model.blocks.parameters()) + per_token * train_seq_len
def out_of_memory(model: GPT, hp: Hyperparameters, machine: Machine, total: int) -> UserError:
    """The sentence for a GPU of `total` bytes that is too small, with flags that would fit: the same tokens in smaller parts."""
    needed, advice = memory_needed(model, hp, hp.train_seq_len), "no --train_seq_len would fit, so train a smaller model or use a larger card"
    for parts in range(hp.train_seq_len // BLOCK, 1, -1):
        length = hp.train_seq_len // parts
        if hp.train_seq_len % (parts * BLOCK) == 0 and memory_needed(model, hp, length) < 0.9 * total:
            advice = f"--train_seq_len {length} --seqs_per_step {hp.seqs_per_step * parts} (the same tokens a step) would fit"
    return UserError(f"out of memory: --train_seq_len {hp.train_seq_len} needs about {needed / 2**30:.1f} GiB, and {machine.name} has "
                     f"{total / 2**30:.1f}, some of it perhaps taken by others; {advice}.")
def warm_up(model, optimizers, hp: Hyperparameters, vocab_size: int, reducer: GradientReducer) -> None:
    """Compile and run every kernel on made-up tokens, then put weights, optimizers and random state back as they were."""
    before, device = copy.deepcopy([module.state_dict() for module in (model, *optimizers)]), reducer.machine.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        window = set_schedule(optimizers, hp.num_iterations, hp, reducer.machine)  # the longest: what fits now always will
        train_ids, val_ids = (torch.randint(vocab_size, (n,), device=device) for n in (hp.train_seq_len, hp.val_seq_len))
        for _ in range(2):
            training_step(model, optimizers, [(train_ids.int(), train_ids)], window, 1, reducer)
        model.eval()
        with torch.no_grad():
            model(val_ids.int(), val_ids, window)
        model.train()
    for module, state in zip((model, *optimizers), before):
        module.load_state_dict(state)
@torch.no_grad()
def sample(model: GPT, num_tokens: int, window: Tensor, seed: int) -> str:
    """Draw one document from the model, num_tokens at most, and decode it: bytes directly, GPT-2's tokens by tiktoken where
    that is installed, otherwise as numbers."""
    model.eval()
    boundary, generator, tokens = model.vocab_size - 1, torch.Generator().manual_seed(seed), []
    while len(tokens) < num_tokens and boundary not in tokens[-1:]:
        seen = [boundary, *tokens][-int(window) * BLOCK:]
        padded = seen + [boundary] * (-len(seen) % BLOCK)  # what comes later does not change a token's logits
        hidden = model.hidden(torch.tensor(padded, dtype=torch.int32, device=window.device), window)[len(seen) - 1]
        probabilities = model.logits(hidden)[:model.vocab_size].softmax(-1).cpu()
        tokens.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    tokens = [token for token in tokens if token != boundary]
    if boundary == 256:
        return bytes(tokens).decode(errors="replace")
    try:
        import tiktoken
        return tiktoken.get_encoding("gpt2").decode(tokens)
    except Exception as error:  # not there, or its vocabulary cannot be fetched: at this point no reason to fail
        return f"(as numbers, for want of tiktoken: {error}) {' '.join(map(str, tokens))}"
def report(log: RunLog, loader: DistributedDataLoader, model: GPT, hp: Hyperparameters, machine: Machine) -> None:
    """The closing lines: tokens per second and MFU, passes over the tokens, peak memory."""
    rate, mfu = hp.num_iterations * hp.seqs_per_step * hp.train_seq_len / log.milliseconds() * 1000, ""
    if machine.is_gpu and machine.peak_flops:
        # 6 FLOP a token for each weight in a matmul, and attention at half the longest window: an upper bound of the mean.
        weights = sum(p.numel() for module in (model.blocks, model.lm_head) for p in module.parameters())
        attention_dim = sum(block.attn is not None for block in model.blocks) * hp.num_heads * hp.head_dim
        share = rate * (6 * weights + 6 * attention_dim * hp.max_window) / (machine.world_size * machine.peak_flops)
        mfu = f" mfu: {share:.1%} of {machine.peak_flops / 1e12:.0f} TFLOP/s a GPU"
    log.line(f"tokens per second: {rate:.0f}{mfu}")
    log.line(f"passes over the training tokens: {loader.position * loader.seq_len / loader.total:.2f}")
    log.line(f"best val_loss: {log.best:.4f}")
    log.line("peak memory allocated: {} MiB reserved: {} MiB".format(*machine.peak_memory()))
def compiled(network: GPT, hp: Hyperparameters, machine: Machine):
    """The network as the machine runs it fastest. On one GPU it is a single graph; on several it is compiled in parts, since
    gradients are ready where a compiled backward pass ends, and shall travel while the next part's computes."""
    if not machine.is_gpu:
        return network
    torch._inductor.config.coordinate_descent_tuning = hp.coordinate_descent_tuning
    if machine.world_size == 1:
        return torch.compile(network, dynamic=False, fullgraph=True)
    torch._dynamo.config.recompile_limit = 32  # blocks share their code, and each kind of them is compiled for itself
    for part in network.blocks:
        part.compile(dynamic=False, fullgraph=True)
    network.loss = torch.compile(network.loss, dynamic=False, fullgraph=True)
    return network
def prepare(argv: list[str] | None) -> tuple:
    """Settings, preset, machine, loaders, facts and checkpoint: all that can be wrong with one process alone. Raises UserError."""
    hp, preset = parse_arguments(argv)
    machine = Machine.detect()
    check_settings(hp, preset, machine)
    processes = dict(rank=machine.rank, world_size=machine.world_size, device=machine.device)
    train_tokens = hp.num_iterations * hp.seqs_per_step * hp.train_seq_len
    train_loader = DistributedDataLoader(hp.train_files, hp.train_seq_len, num_tokens=train_tokens, repeat=hp.repeat, **processes)
    val_loader = DistributedDataLoader(hp.val_files, hp.val_seq_len, num_tokens=hp.val_tokens, **processes)
    if train_loader.vocab_size != val_loader.vocab_size:
        sizes = f"{train_loader.vocab_size} in {hp.train_files} and {val_loader.vocab_size} in {hp.val_files}"
        raise UserError(f"vocabularies differ, {sizes}; train and validate on shards of the same tokenizer.")
    for loader in (train_loader, val_loader) if machine.local_rank == 0 else ():  # once a machine is enough
        loader.check_tokens()
    facts = run_facts(hp, machine, train_loader, val_loader)
    checkpoint = load_checkpoint(hp, facts[0])
    facts[1]["checkpoint"] = checkpoint["manifest"] if checkpoint else "none"
    return hp, preset, machine, train_loader, val_loader, facts, checkpoint
def snapshot(network: GPT, optimizers, loader: DistributedDataLoader, machine: Machine) -> dict:
    """What the training goes on from, wherever it lies; all processes have to ask for it together."""
    random = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if machine.is_gpu else [])]
    adam, muon = optimizers
    return dict(modules=[network.state_dict(), adam.state_dict(), muon.whole_state_dict()], position=loader.position, random=random)
def restore(state: dict, network: GPT, optimizers, loader: DistributedDataLoader, machine: Machine) -> None:
    """Go on from a snapshot."""
    for module, saved in zip((network, *optimizers), state.pop("modules")):  # popped: the memory is wanted
        module.load_state_dict(saved)
    loader.position = state["position"]
    for set_state, saved in zip((torch.set_rng_state, torch.cuda.set_rng_state)[:1 + machine.is_gpu], state["random"]):
        set_state(saved)
def train(hp: Hyperparameters, preset: str, machine: Machine, train_loader, val_loader, facts, checkpoint: dict | None, signals: Signals) -> None:
    """The whole run: build, warm up, go on from the checkpoint, train, validate and save, report. Raises Stopped, on all processes
    after the same step, when one was asked to stop."""
    network = build_model(hp, train_loader.vocab_size, machine)
    optimizers = build_optimizers(network, hp, machine)
    model, reducer = compiled(network, hp, machine), GradientReducer(network, optimizers, machine, signals)
    with contextlib.closing(RunLog(hp, machine, dict(
        preset=preset, activations=network.embed.weight.dtype, head="FP8" if network.lm_head.use_fp8 else "as the activations",
        attention="FlexAttention" if machine.is_gpu else "block-sparse, for want of FlexAttention's backward pass on a CPU",
        parameters=sum(p.numel() for p in network.parameters()), train_tokens=train_loader.total) | facts[1], train_loader, checkpoint)) as log:
        if not hp.eval_only:
            try:
                warm_up(model, optimizers, hp, network.vocab_size, reducer)
            except torch.OutOfMemoryError:
                raise out_of_memory(network, hp, machine, torch.cuda.mem_get_info()[1]) from None
        if checkpoint:
            restore(checkpoint, network, optimizers, train_loader, machine)
        first, checkpoints = checkpoint["step"] if checkpoint else 0, Checkpoints(hp.keep, log)
        for step in range(first, hp.num_iterations + 1):
            signals.place = 3 * step  # one more wherever this process waits: in the validation, in the step
            window = set_schedule(optimizers, step, hp, machine)
            last = step == hp.num_iterations or hp.eval_only
            due = last or hp.val_loss_every and step % hp.val_loss_every == 0
            if due and (step > first or not checkpoint or hp.eval_only):  # a checkpoint is written after the validation
                log.stop_clock()
                log.validation(step, validate(model, val_loader, window, reducer))
            if hp.save_every and step > first and (last or log.stops or step % hp.save_every == 0):
                log.stop_clock()
                checkpoints.save(step, dict(step=step, course=facts[0], made=facts[1], log=log.state(),
                                            **snapshot(network, optimizers, train_loader, machine)))
            if last or log.stops:
                break
            log.start_clock()
            batches = [train_loader.next_batch() for _ in range(hp.seqs_per_step // machine.world_size)]
            log.step(step + 1, training_step(model, optimizers, batches, window, hp.seqs_per_step, reducer))
        checkpoints.wait()
        if machine.world_size > 1:
            dist.barrier()
        signals.place = math.inf  # from here on no process waits for another
        if not last:
            number = signals.asked or signal.SIGTERM
            raise Stopped(128 + number, f"stopped by {signal.Signals(number).name} after step {step} of {hp.num_iterations}; " + (
                f"to go on, give the same command with --resume {log.saved}" if log.saved else "nothing is saved, for want of --save_every."))
        if not hp.eval_only:
            report(log, train_loader, network, hp, machine)
        if hp.sample and machine.rank == 0:
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled
                log.line("sample: " + next(iter(machine.map(lambda seed: sample(network, hp.sample, window, seed), [hp.seed]))))
def main(argv: list[str] | None = None) -> int:
    """Run with the flags in `argv` (default: the command line's). Returns the exit code: 2 for what the user can mend."""
    rank, local_rank, world_size = process_place()
    signals, run, failure = None, (), ""
    try:
        with contextlib.ExitStack() as at_exit:
            if world_size == 1:
                signals = at_exit.enter_context(Signals())
            try:
                run = prepare(argv)
            except (UserError, OSError, torch.OutOfMemoryError) as error:
                if world_size == 1:
                    raise
                failure = str(error)  # the others have to hear of it
            if world_size > 1:
                timeout, facts = (run[0].timeout, run[5][0] | run[5][1]) if run else (Hyperparameters.timeout, {})
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # whose handler of Python's would wait as long as the store does
                store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
                signals = Watchdog(store, rank, agree(store, rank, world_size, facts, failure), timeout)
                at_exit.callback(lambda: dist.is_initialized() and not signals.failure and dist.destroy_process_group())
                at_exit.push(signals)
                gpu = run[2].device if run[2].is_gpu else None
                dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, device_id=gpu)
            train(*run, signals)
            return 0
    except Stopped as error:
        (code, sentence), said = error.args, rank == 0
    except (UserError, OSError, torch.OutOfMemoryError) as error:  # an OSError names the file
        code, sentence, said = 2, str(error), signals or local_rank == 0  # before there are signals, all of a machine meet the same
    except KeyboardInterrupt as error:
        code, sentence, said = 128 + (number := (*error.args, signal.SIGINT)[0]), f"stopped by {signal.Signals(number).name}", True
    if said:
        print(f"train_gpt.py: {sentence}", file=sys.stderr)
    return code

if __name__ == "__main__":
    sys.exit(main())
