"""Train a 124M-parameter GPT on FineWeb to a validation loss of 3.28, fast.

The recipe is the one that took 8 H100 GPUs just under three minutes in January
2025. This file runs it unchanged on any number of GPUs, and smaller models on
a CPU. Importing it defines everything and starts nothing. README.md tells what
has been seen on which hardware, with the log of each result.

    torchrun --standalone --nproc_per_node=8 train_gpt.py   the speedrun
    python train_gpt.py --preset tiny                       a small one, on a CPU

The first part is the recipe: settings, FP8 matmul, Muon, network, data, step.
The second part is what a run needs around it: machine, shards, command line,
processes, checkpoints, log.
"""

import argparse
import bisect
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import glob
import hashlib
import importlib
import io
import logging
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

BLOCK = 128  # tokens; attention masks, windows and sequences are made of such blocks


class UserError(Exception):
    """What the user can mend, in one sentence: what was found, where, and what to do."""


# ==================================================================================================
# Part one: the recipe
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Settings and schedules: each field of the dataclass is a flag of the command line


def setting(group: str, default, meaning: str, **limits):
    """A field with the group of flags it belongs to, its meaning, and the limits of its value."""
    return dataclasses.field(default=default, metadata=dict(group=group, meaning=meaning, **limits))


@dataclasses.dataclass
class Hyperparameters:
    """All that a run depends on besides the machine. The defaults are the speedrun."""

    num_layers: int = setting("network", 12, "layers", least=6)
    num_heads: int = setting("network", 6, "attention heads", least=1)
    head_dim: int = setting("network", 128, "channels of a head", multiple_of=16)
    model_dim: int = setting("network", 768, "channels of the residual stream", multiple_of=16)
    attention_free_layers: tuple[int, ...] = setting(
        "network", (7,), "layers without attention, as in 3,7, or none"
    )
    max_window: int = setting(
        "network", 1792, "tokens that attention reaches back at the end", multiple_of=BLOCK
    )
    fp8: str = setting(
        "network",
        "head",
        "matmuls in FP8 where the GPU can: none, head or all",
        choices=("none", "head", "all"),
    )

    train_seq_len: int = setting(
        "training", 48 * 1024, "tokens of a training sequence, one micro-step", multiple_of=BLOCK
    )
    seqs_per_step: int = setting(
        "training", 8, "sequences of a step, which the processes share", least=1
    )
    num_iterations: int = setting("training", 1770, "steps", least=1)
    cooldown_frac: float = setting(
        "training",
        0.4,
        "share of the steps, at the end, over which learning rates fall",
        least=1e-6,
        most=1,
    )
    embed_lr: float = setting("training", 0.6, "learning rate of the embeddings (Adam)")
    head_lr: float = setting("training", 0.008, "learning rate of the head (Adam)")
    scalar_lr: float = setting("training", 0.04, "learning rate of the mixing weights (Adam)")
    muon_lr: float = setting("training", 0.05, "learning rate of the hidden matrices (Muon)")
    repeat: bool = setting("training", False, "begin again when the training tokens are used up")
    shuffle: bool = setting("training", False, "take the training sequences in a random order")
    seed: int = setting(
        "training", 0, "seed of the initial weights and of the sample", most=2**63 - 1
    )

    train_files: str = setting(
        "data", "data/fineweb10B/fineweb_train_*.bin", "training shards, a glob"
    )
    val_files: str = setting(
        "data", "data/fineweb10B/fineweb_val_*.bin", "validation shards, a glob"
    )
    val_tokens: int = setting("data", 10485760, "tokens to validate on; 0 for all")
    val_seq_len: int = setting(
        "data", 4 * 64 * 1024, "tokens of a validation sequence", multiple_of=BLOCK
    )

    dtype: str = setting(
        "run",
        "auto",
        "of the activations: bfloat16, float32, or auto, the faster one here",
        choices=("auto", "bfloat16", "float32"),
    )
    coordinate_descent_tuning: bool = setting(
        "run", False, "tune the compiled kernels: minutes more before a faster step"
    )
    val_loss_every: int = setting("run", 125, "steps between validations; 0 for the last alone")
    sample: int = setting("run", 0, "tokens to write after training, at most")
    timeout: int = setting(
        "run", 300, "seconds to wait for a process, which may compile, validate or write", least=5
    )
    log_dir: str = setting("run", "logs", "folder of the log")
    run_id: str = setting(
        "run", "", "name of the log, LOG_DIR/RUN_ID.txt; made from the time when empty"
    )

    save_every: int = setting(
        "checkpoints", 0, "steps between checkpoints, LOG_DIR/RUN_ID/step_*.pt; 0: none"
    )
    keep: int = setting("checkpoints", 2, "how many checkpoints to keep, the newest", least=1)
    resume: str = setting(
        "checkpoints",
        "",
        "checkpoint to go on from; auto: the newest whole one, or the beginning",
    )
    eval_only: bool = setting(
        "checkpoints", False, "validate the checkpoint of --resume, write its sample, and end"
    )


PRESETS = {
    "speedrun": {},  # 124M parameters as GPT-2 counts them, to a loss of 3.28
    "medium": dict(  # 350M by the same count, the shape of GPT-2 Medium, to a loss of 2.92
        num_layers=24,
        num_heads=8,
        model_dim=1024,
        train_seq_len=64 * 1024,
        num_iterations=6000,
        cooldown_frac=0.6,
        embed_lr=0.3,
        head_lr=0.004,
        scalar_lr=0.02,
        muon_lr=0.025,
    ),
    "tiny": dict(  # 0.85M, for two CPU cores and the shards of data/local_text.py
        num_layers=6,
        num_heads=2,
        head_dim=64,
        model_dim=96,
        attention_free_layers=(4,),
        max_window=256,
        train_seq_len=1024,
        seqs_per_step=2,
        num_iterations=800,
        cooldown_frac=0.7,
        embed_lr=0.15,
        head_lr=0.004,
        scalar_lr=0.02,
        muon_lr=0.035,
        repeat=True,
        shuffle=True,
        train_files="data/local_text/train_*.bin",
        val_files="data/local_text/val_*.bin",
        val_tokens=65536,
        val_seq_len=2048,
        val_loss_every=100,
        sample=200,
    ),
}


def learning_rate_factor(step: int, hp: Hyperparameters) -> float:
    """1 until the cooldown, then linearly down to 0.1 at the end."""
    return 0.1 + 0.9 * min(1, (1 - step / hp.num_iterations) / hp.cooldown_frac)


def muon_momentum(step: int) -> float:
    """From 0.85 to 0.95 over 300 steps: while gradients turn fast, a short memory is better."""
    return 0.85 + 0.1 * min(step / 300, 1)


def window_blocks(step: int, hp: Hyperparameters) -> int:
    """The attention window in blocks of 128 tokens, which grows with the steps.

    It is rounded up to whole blocks. Aiming at half a block less than the maximum still ends at the
    maximum, and reaches it later.
    """
    tokens = (hp.max_window - BLOCK // 2) * step / hp.num_iterations
    return next_multiple_of_n(tokens, n=BLOCK) // BLOCK


# --------------------------------------------------------------------------------------------------
# FP8 matmul with fixed scales: activations and weights in e4m3, gradients in e5m2, as in
# "FP8 Formats for Deep Learning" (Micikevicius et al., 2022). The compiler sees into operators that
# are declared as triton_op, and so fuses the casts with what makes their input.


def to_fp8(t: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`t * scale` in an FP8 format. What is too large becomes its largest number, not infinity."""
    largest = torch.finfo(dtype).max
    return (t.float() * scale).clamp(-largest, largest).to(dtype)


def scaled_mm(
    a: Tensor, b: Tensor, a_s: float, b_s: float, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """`a @ b.T / (a_s * b_s)` of two row-major FP8 matrices, the layout that hardware multiplies.

    fast: add up in less than float32, which is precise enough for activations.
    """
    scale_a = a.new_full((), 1 / a_s, dtype=torch.float32)
    scale_b = a.new_full((), 1 / b_s, dtype=torch.float32)
    return torch._scaled_mm(
        a, b.T, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast
    )


# Without Triton, as on a CPU, torch would warn here that it finds no kernels in these operators.
logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


@torch.library.triton_op("nanogpt::mm", mutates_args=())
def mm_op(
    x: Tensor, w: Tensor, x_s: float, w_s: float, grad_s: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`x @ w.T` in FP8: bfloat16 (T, out), with x and w in e4m3 for the backward pass.

    x: (T, in), w: (out, in), all sizes multiples of 16.
    """
    x_f8 = to_fp8(x, x_s, torch.float8_e4m3fn)
    w_f8 = to_fp8(w, w_s, torch.float8_e4m3fn)
    return scaled_mm(x_f8, w_f8, x_s, w_s, torch.bfloat16, fast=True), x_f8, w_f8


@torch.library.triton_op("nanogpt::mm_backward", mutates_args=())
def mm_backward_op(
    grad: Tensor, x_f8: Tensor, w_f8: Tensor, x_s: float, w_s: float, grad_s: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `mm` for grad (T, out): of x, bfloat16 (T, in), of w, float32 (out, in)."""
    grad_f8 = to_fp8(grad, grad_s, torch.float8_e5m2)
    grad_x = scaled_mm(grad_f8, w_f8.T.contiguous(), grad_s, w_s, torch.bfloat16)
    grad_w = scaled_mm(grad_f8.T.contiguous(), x_f8.T.contiguous(), grad_s, x_s, torch.float32)
    return grad_x, grad_w


def mm_setup_context(ctx, inputs, output):
    _, x_f8, w_f8 = output
    ctx.save_for_backward(x_f8, w_f8)
    ctx.mark_non_differentiable(x_f8, w_f8)
    ctx.scales = inputs[2:]


def mm_autograd(ctx, grad, *_):
    gradients = torch.ops.nanogpt.mm_backward(grad, *ctx.saved_tensors, *ctx.scales)
    return *gradients, None, None, None


mm_op.register_autograd(mm_autograd, setup_context=mm_setup_context)


# --------------------------------------------------------------------------------------------------
# Muon: momentum, orthogonalised.
# "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024)


def zeropower_via_newtonschulz5(
    G: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """About the nearest orthogonal matrix: U S V^T becomes U S' V^T with S' between 0.7 and 1.2.

    Each step applies an odd polynomial of degree five to all singular values, in matmuls alone. Its
    coefficients give the steepest slope at zero: small values grow 3.4-fold a step. The price is
    that large ones hover around 1 instead of reaching it, which does no harm. "Old Optimizer, New
    Norm" (Bernstein & Newhouse, 2024).
    G: (..., rows, cols), of any float dtype. The result has its shape, in `dtype`.
    """
    if G.ndim < 2:
        raise ValueError(f"Newton-Schulz needs matrices, got a tensor of shape {tuple(G.shape)}")
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values <= 1; zeros stay zero
    X = X.to(dtype).reshape(-1, *G.shape[-2:])
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT  # the products below are (rows, rows), so let the rows be the shorter side
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + b A X + c A A X
    if tall:
        X = X.mT
    return X.reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (the last two dimensions).

    Parameters of one shape form a group, whose updates are orthogonalised in one batched call, and
    of which every process owns an equal share (the last ones perhaps less). A process reads the
    gradients of the parameters it owns, keeps their momentum, and sends their updates to all.

    lr scales the orthogonal update. It is multiplied by a parameter's attribute `lr_mul`, if it has
    one, and by sqrt(rows / cols) for a tall matrix, so that tall matrices change their output as
    much as wide ones do.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.bfloat16,
    ):
        groups = {}
        for p in params:
            if p.ndim < 2:
                raise ValueError(f"Muon is for matrices; give the {tuple(p.shape)} to Adam")
            groups.setdefault((p.shape, p.dtype), []).append(p)
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps)
        super().__init__([dict(params=group) for group in groups.values()], defaults)
        self.rank = rank
        self.world_size = world_size
        self.dtype = dtype
        self.owner = {}  # parameter: rank of the process that keeps its momentum
        for group in groups.values():
            for i, p in enumerate(group):
                self.owner[p] = i // self.share(group)

    def share(self, params: list[Tensor]) -> int:
        """How many of a group's parameters a process owns."""
        return math.ceil(len(params) / self.world_size)

    @torch.no_grad()
    def step(self):
        """Update every parameter by its `.grad`; where that is None it counts as zero."""
        updates = [self.orthogonal_updates(group) for group in self.param_groups]
        for group, (update, work) in zip(self.param_groups, updates, strict=True):
            if work is not None:
                work.wait()
            tall_factor = max(1, update.size(-2) / update.size(-1)) ** 0.5
            for p, u in zip(group["params"], update, strict=False):
                p.add_(u, alpha=-group["lr"] * getattr(p, "lr_mul", 1.0) * tall_factor)

    def orthogonal_updates(self, group: dict) -> tuple:
        """Advance the momentum this process owns, and start to gather the updates of all.

        Returns the updates (n, *shape), which end in zeros where the shares are unequal, and the
        communication to wait for before they are read.
        """
        params = group["params"]
        updates = params[0].new_zeros(self.share(params), *params[0].shape, dtype=self.dtype)
        own = [p for p in params if self.owner[p] == self.rank]
        if own:
            for p in own:
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in own]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            if group["nesterov"]:
                buffers = torch._foreach_lerp(grads, buffers, group["momentum"])
            updates[: len(own)] = zeropower_via_newtonschulz5(
                torch.stack(buffers), group["ns_steps"], self.dtype
            )
        if self.world_size == 1:
            return updates, None
        gathered = updates.new_empty(self.world_size * len(updates), *updates.shape[1:])
        # torch 2.13 renamed all_gather_into_tensor to all_gather_single.
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        return gathered, gather(gathered, updates, async_op=True)


# --------------------------------------------------------------------------------------------------
# Network: a GPT with rotary positions, value embeddings and U-net skips, whose tokens attend within
# their document and a sliding window


def norm(x: Tensor) -> Tensor:
    """RMS normalisation over the last dimension, without weights; shape and dtype stay."""
    return F.rms_norm(x, (x.size(-1),))


def next_multiple_of_n(v: float, *, n: int) -> int:
    """The smallest positive multiple of n that is at least v."""
    return max(1, math.ceil(v / n)) * n


def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Softmax attention under a block mask; all tensors are (1, heads, T, head_dim).

    FlexAttention has no backward pass on a CPU, where a function of ours takes its place.
    """
    if q.device.type == "cpu":
        return block_sparse_attention(q, k, v, block_mask, scale)
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale)


class CastedLinear(nn.Module):
    """`x @ weight.T` with a float32 weight (out_features, in_features), cast at each use.

    use_fp8: multiply in FP8 while training, where the hardware can, with these scales.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        use_fp8: bool = False,
        x_s: float = 1.0,
        w_s: float = 1.0,
        grad_s: float = 1.0,
    ):
        super().__init__()
        self.use_fp8 = use_fp8
        self.scales = x_s, w_s, grad_s
        # A uniform distribution whose standard deviation is 0.5 / sqrt(in_features).
        bound = 3**0.5 * 0.5 * in_features**-0.5
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-bound, bound))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """(..., in_features) to (..., out_features), with the weight multiplied by `scale` first.

        Leading dimensions of the weight count as rows.
        """
        weight = self.weight if scale is None else self.weight * scale
        weight = weight.flatten(0, -2)
        if self.use_fp8 and self.training and fp8_supported(x.device):
            out, *_ = torch.ops.nanogpt.mm(x.flatten(0, -2), weight, *self.scales)
            return out.view(*x.shape[:-1], -1).type_as(x)
        return F.linear(x, weight.type_as(x))


class Rotary(nn.Module):
    """Rotary positions for half of the channels, "RoFormer" (Su et al., 2021).

    The other half has no position: it compares contents at any distance.
    """

    def __init__(self, head_dim: int, max_seq_len: int):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need a multiple of 4 channels, got {head_dim}")
        frequency = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # radians
        # (max_seq_len, head_dim / 4), in float32: bfloat16 cannot tell late positions apart.
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads, head_dim), T at most max_seq_len, to the same shape and dtype."""
        T = x.size(1)
        max_seq_len = len(self.cos)
        if max_seq_len < T:
            raise ValueError(f"{T} tokens are more than max_seq_len, which is {max_seq_len}")
        cos = self.cos[:T, None]
        sin = self.sin[:T, None]
        # Channel i turns with channel i + head_dim / 2, for i in the first quarter.
        x1, same1, x2, same2 = x.float().chunk(4, dim=-1)
        y1 = torch.addcmul(x1 * cos, x2, sin)
        y2 = torch.addcmul(x2 * cos, x1, -sin)
        return torch.cat([y1, same1, y2, same2], dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Attention with normalised queries and keys, and value embeddings mixed into the values."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, rotary: Rotary, **fp8):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.qkv = CastedLinear(dim, 3 * num_heads * head_dim, **fp8)
        # One matmul with three matrices, which Muon orthogonalises one by one.
        self.qkv.weight = nn.Parameter(self.qkv.weight.detach().view(3, -1, dim))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.c_proj = CastedLinear(num_heads * head_dim, dim, **fp8)
        nn.init.zeros_(self.c_proj.weight)  # the residual stream begins undisturbed
        # A bit sharper than the usual 1 / sqrt(128) = 0.088, since q and k have unit RMS.
        self.scale = 0.12

    def forward(self, x: Tensor, ve: Tensor | None, block_mask: BlockMask) -> Tensor:
        """x (1, T, dim), ve (1, T, num_heads * head_dim) or None; returns (1, T, dim)."""
        # The values are scaled by way of their weight, which is the smaller tensor.
        one = torch.ones_like(self.lambdas[0])
        scale = torch.stack([one, one, self.lambdas[0]])
        qkv = self.qkv(x, scale.view(3, 1, 1))
        qkv = qkv.view(*x.shape[:2], 3 * self.num_heads, self.head_dim)
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=2)
        q, k = self.rotary(norm(qk)).chunk(2, dim=2)
        if ve is not None:
            v = v + self.lambdas[1] * ve.view_as(v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = attention(q, k, v, block_mask, self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, four times as wide inside, with a squared ReLU, "Primer" (So et al., 2021)."""

    def __init__(self, dim: int, **fp8):
        super().__init__()
        self.c_fc = CastedLinear(dim, 4 * dim, **fp8)
        if fp8:  # squares are larger and need a smaller scale
            fp8["x_s"] /= 4
        self.c_proj = CastedLinear(4 * dim, dim, **fp8)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to the same shape and dtype."""
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention, where the layer has it, and MLP; first some of the embedded input is mixed in."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        rotary: Rotary,
        has_attention: bool = True,
        **fp8,
    ):
        super().__init__()
        self.attn = None
        if has_attention:
            self.attn = CausalSelfAttention(dim, num_heads, head_dim, rotary, **fp8)
        self.mlp = MLP(dim, **fp8)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, ve: Tensor | None, x0: Tensor, block_mask: BlockMask) -> Tensor:
        """x and x0 (1, T, dim), ve as for attention; returns the shape and dtype of x."""
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(norm(x), ve, block_mask)
        return x + self.mlp(norm(x))


class ValueEmbedding(nn.Module):
    """Three embeddings of the tokens, for the values of the first and of the last three layers.

    "Value Residual Learning" (Zhou et al., 2024) shows what a path from the input to late values
    gains.
    """

    def __init__(self, vocab_size: int, dim: int, num_layers: int, dtype: torch.dtype):
        super().__init__()
        if num_layers < 6:
            raise ValueError(f"three embeddings, used twice, need six layers, got {num_layers}")
        self.num_layers = num_layers
        self.embed = nn.ModuleList(nn.Embedding(vocab_size, dim, dtype=dtype) for _ in range(3))

    def forward(self, input_seq: Tensor) -> list[Tensor | None]:
        """Ids (T,) to an entry for each layer: (1, T, dim), or None for the layers between."""
        ve = [table(input_seq)[None] for table in self.embed]
        return ve + [None] * (self.num_layers - 6) + ve


class GPT(nn.Module):
    """The network, for one sequence at a time, which may hold any number of documents.

    The first half of the layers push their outputs, the second half pop them and mix them in by a
    learnable weight, as in "U-Net" (Ronneberger et al., 2015). The last token of the vocabulary
    begins a document.

    fp8: matmuls in FP8 where the hardware can: "none", "head", or "all", with the hidden ones.
    dtype: of the activations and the embeddings; the other weights are float32.
    train_seq_len: tokens of a micro-step. The more there are, the smaller the gradients of their
    mean loss, and the larger the factor that FP8 gradients are multiplied by.
    """

    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        model_dim: int,
        max_seq_len: int,
        *,
        attention_free_layers: tuple[int, ...] = (7,),
        fp8: str = "head",
        dtype: torch.dtype = torch.bfloat16,
        train_seq_len: int | None = None,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.num_layers = num_layers
        self.num_skips = num_layers // 2
        self.train_seq_len = train_seq_len or max_seq_len
        # 2**19 keeps the gradients of a mean over 48K tokens inside e5m2's range.
        grad_s = 2.0**19 * self.train_seq_len / (48 * 1024)
        hidden_fp8 = {}
        if fp8 == "all":  # up to |x| = 448 / 2 and |w| = 448 / 128 fit into e4m3
            hidden_fp8 = dict(use_fp8=True, x_s=2.0, w_s=128.0, grad_s=grad_s)
        self.embed = nn.Embedding(vocab_size, model_dim, dtype=dtype)
        self.value_embeds = ValueEmbedding(vocab_size, num_heads * head_dim, num_layers, dtype)
        rotary = Rotary(head_dim, max_seq_len)  # one table for all layers
        self.blocks = nn.ModuleList()
        for i in range(num_layers):
            has_attention = i not in attention_free_layers
            self.blocks.append(
                Block(model_dim, num_heads, head_dim, rotary, has_attention, **hidden_fp8)
            )
        self.skip_weights = nn.Parameter(torch.ones(self.num_skips))
        padded_vocab = next_multiple_of_n(vocab_size, n=128)
        self.lm_head = CastedLinear(model_dim, padded_vocab, fp8 != "none", 2.0, 512.0, grad_s)
        nn.init.zeros_(self.lm_head.weight)

    def create_block_masks(
        self, input_seq: Tensor, sliding_window_num_blocks: Tensor
    ) -> tuple[BlockMask, BlockMask]:
        """The long and the short mask for ids (T,), T a multiple of 128, and a 0-d int32 window W.

        Query block i sees the key blocks i - W < j <= i, with max(1, W // 2) for W in the short
        mask; in them query q sees key k when k <= q and both are of one document. Documents are
        numbered in order, so the numbers of a block's first and last token tell which blocks share
        one. Blocks in which every query sees every key are listed apart, so that the kernel skips
        the mask there. The nearest come first.
        """
        if input_seq.ndim != 1 or input_seq.numel() % BLOCK:
            raise ValueError(f"ids must be (T,), T a multiple of 128, got {tuple(input_seq.shape)}")
        document = (input_seq == self.vocab_size - 1).cumsum(0)
        first = document.view(-1, BLOCK)[:, 0]
        last = document.view(-1, BLOCK)[:, -1]
        j = torch.arange(first.numel(), dtype=torch.int32, device=input_seq.device)
        i = j[:, None]
        # Of j < i some key is seen when j ends in the document in which i begins, and every key is
        # seen by every query when j begins in the document in which i ends.
        some_pair = (j == i) | ((j < i) & (last == first[:, None]))
        every_pair = (j < i) & (first == last[:, None])

        def causal_in_document(b, h, q, k):
            return (k <= q) & (document[q] == document[k])

        def nearest_first(listed: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.where(listed, j + 1, 0).argsort(dim=-1, descending=True).int()
            return listed.sum(-1, dtype=torch.int32)[None, None], order[None, None]

        def within(window: Tensor) -> BlockMask:
            near = j > i - window
            return BlockMask.from_kv_blocks(
                *nearest_first(some_pair & ~every_pair & near),
                *nearest_first(every_pair & near),
                BLOCK_SIZE=BLOCK,
                mask_mod=causal_in_document,
            )

        window = sliding_window_num_blocks
        return within(window), within((window // 2).clamp(min=1))

    def hidden(self, input_seq: Tensor, sliding_window_num_blocks: Tensor) -> Tensor:
        """What the head reads: ids (T,) to (T, model_dim), normalised."""
        long, short = self.create_block_masks(input_seq, sliding_window_num_blocks)
        ve = self.value_embeds(input_seq)
        x = x0 = norm(self.embed(input_seq)[None])
        skips = []
        for i, block in enumerate(self.blocks):
            from_end = self.num_layers - 1 - i
            if from_end < self.num_skips:
                x = x + self.skip_weights[self.num_skips - 1 - from_end] * skips.pop()
            mask = long if min(i, from_end) % 4 == 0 else short  # long: 0, 4, 7 and 11 of 12
            x = block(x, ve[i], x0, mask)
            if i < self.num_skips:
                skips.append(x)
        return norm(x)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token: (T, model_dim) to float32 (T, vocabulary padded to 128s).

        It is 15 + 15 tanh(x / 15), the cap of "Gemma 2" (Gemma Team, 2024) and a constant, which
        the softmax does not see.
        """
        return 30 * torch.sigmoid(self.lm_head(hidden).float() / 7.5)

    def forward(
        self, input_seq: Tensor, target_seq: Tensor, sliding_window_num_blocks: Tensor
    ) -> Tensor:
        """Mean cross-entropy in nats per token, 0-d float32.

        Ids (T,) int32, targets (T,) int64 with -100 where there is none, a window, 0-d int32.
        """
        hidden = self.hidden(input_seq, sliding_window_num_blocks)
        # The logits of a longer sequence, as in validation, might not fit on the card at once.
        hiddens = hidden.split(self.train_seq_len)
        targets = target_seq.split(self.train_seq_len)
        total = sum(self.loss_sum(h, t) for h, t in zip(hiddens, targets, strict=True))
        return total / (target_seq >= 0).sum()

    def loss_sum(self, hidden: Tensor, target_seq: Tensor) -> Tensor:
        """Sum of the cross-entropies of what `hidden` returned.

        Logits between 0 and 30 need no shift before exp. The target's logit is taken by a sum over
        the row, which the compiler fuses; the backward pass of a gather would fill a float32 tensor
        of (T, vocabulary).
        """
        logits = self.logits(hidden)
        vocabulary = torch.arange(logits.size(-1), device=logits.device)
        is_target = vocabulary == target_seq[:, None]
        losses = logits.exp().sum(-1).log() - torch.where(is_target, logits, 0.0).sum(-1)
        return torch.where(target_seq >= 0, losses, 0.0).sum()


# --------------------------------------------------------------------------------------------------
# Data: the tokens of all shards, cut into sequences


@functools.lru_cache(maxsize=2)  # a step may have sequences of two passes
def random_order(seed: int, length: int) -> np.ndarray:
    """The numbers from 0 to length - 1, shuffled."""
    return np.random.default_rng(seed).permutation(length)


class DistributedDataLoader:
    """The tokens of all shards, in the order of their names, as sequences that processes share.

    Sequence g begins at token start_of(g), whatever the number of processes. They take
    sequences in turn: rank, rank + world_size, and so on.
    num_tokens: how many tokens the run predicts (None or 0: all); targets beyond them are -100.
    repeat: begin again after the last token. shuffle: read in a random order, the same in each run.
    Raises UserError where files are missing or broken, or have too few tokens.
    """

    def __init__(
        self,
        filename_pattern: str,
        seq_len: int,
        *,
        num_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        repeat: bool = False,
        shuffle: bool = False,
    ):
        self.files = sorted(glob.glob(filename_pattern))
        if not self.files:
            raise UserError(
                f"no token shard matches {os.path.abspath(filename_pattern)}; make some with "
                "`python data/local_text.py`, fetch FineWeb as README.md says, or name yours with "
                "--train_files and --val_files."
            )
        self.shards, self.vocab_sizes = zip(*map(open_shard, self.files), strict=True)
        self.vocab_size = self.vocab_sizes[0]
        *self.starts, self.total = np.cumsum([0, *map(len, self.shards)]).tolist()
        self.num_tokens = num_tokens or self.total - 1
        missing = max(2, self.num_tokens + 1) - self.total  # the last target is one token further
        if missing > 0 and not (repeat and self.total > 1):
            raise UserError(
                f"{filename_pattern} has {self.total} tokens, {missing} fewer than the run needs; "
                "add shards, lower --num_iterations (or --val_tokens), or train on them again with "
                "--repeat."
            )
        self.seq_len = seq_len
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.num_sequences = math.ceil(self.num_tokens / seq_len)
        self.position = 0  # the number of sequences that all processes have taken together

    def shard_at(self, token: int) -> int:
        """The number of the shard that holds a token, counted through all repetitions."""
        return bisect.bisect_right(self.starts, token % self.total) - 1

    def start_of(self, index: int) -> int:
        """The token at which a sequence begins; shuffled, in another order for each pass."""
        if self.shuffle:
            in_a_pass = max(1, (self.total - 1) // self.seq_len)
            pass_number, place = divmod(index, in_a_pass)
            index = int(random_order(pass_number, in_a_pass)[place])
        return index * self.seq_len

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens, uint16, from position `start` of the shards' endless repetition."""
        pieces = []
        while count:
            shard = self.shard_at(start)
            piece = self.shards[shard][start % self.total - self.starts[shard] :][:count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def sequence(self, index: int) -> tuple[Tensor, Tensor]:
        """Sequence `index` on the device: inputs (seq_len,) int32 and targets (seq_len,) int64."""
        tokens = self.read(self.start_of(index), self.seq_len + 1)
        tokens = torch.from_numpy(tokens.view(np.int16))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)  # the host goes on
        ids = tokens.int() & 0xFFFF  # unsigned again; few of torch's kernels take uint16
        targets = ids[1:].long()
        targets[max(0, self.num_tokens - index * self.seq_len) :] = -100
        return ids[:-1], targets

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This process's next sequence: number rank, then rank + world_size, and so on."""
        index = self.position + self.rank
        self.position += self.world_size
        return self.sequence(index)


# --------------------------------------------------------------------------------------------------
# Training step and validation


def build_model(hp: Hyperparameters, vocab_size: int, machine: "Machine") -> GPT:
    """The network on the machine's device. A seed draws the same weights on every device."""
    torch.manual_seed(hp.seed)
    dtype = machine.activations(hp.dtype)
    fp8 = hp.fp8 if dtype == torch.bfloat16 and fp8_supported(machine.device) else "none"
    model = GPT(
        vocab_size,
        hp.num_layers,
        hp.num_heads,
        hp.head_dim,
        hp.model_dim,
        max(hp.train_seq_len, hp.val_seq_len),
        attention_free_layers=hp.attention_free_layers,
        fp8=fp8,
        dtype=dtype,
        train_seq_len=hp.train_seq_len,
    )
    return model.to(machine.device)


def build_optimizers(
    model: GPT, hp: Hyperparameters, machine: "Machine"
) -> list[torch.optim.Optimizer]:
    """Adam for the embeddings, the head and the mixing weights; Muon for the matrices between."""
    embeds = [*model.embed.parameters(), *model.value_embeds.parameters()]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    groups = [
        dict(params=model.lm_head.parameters(), lr=hp.head_lr),
        dict(params=embeds, lr=hp.embed_lr),
        dict(params=scalars, lr=hp.scalar_lr),
    ]
    # Gradients of a mean over many tokens are small, and Adam's usual eps of 1e-8 would not be
    # small beside them. The drawback of 1e-10: while the projections are still zero, the
    # gradients of the mixing weights, zero on paper, are rounding errors of 1e-10 to 3e-9, which
    # Adam turns into full steps. Runs that differ in rounding alone differ from there on.
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
    muon = Muon(
        matrices,
        lr=hp.muon_lr,
        momentum=muon_momentum(0),
        rank=machine.rank,
        world_size=machine.world_size,
        dtype=model.embed.weight.dtype,  # who asks for float32 gets precise updates, too
    )
    return [adam, muon]


def set_schedule(optimizers, step: int, hp: Hyperparameters, machine: "Machine") -> Tensor:
    """Give the optimizers a step's learning rates and momentum.

    Returns the step's window in blocks, 0-d int32 on the device: a tensor, so that a growing window
    is not compiled again.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * learning_rate_factor(step, hp)
            if "momentum" in group:
                group["momentum"] = muon_momentum(step)
    window = torch.tensor(window_blocks(step, hp), dtype=torch.int32)
    return window.to(machine.device, non_blocking=True)


def training_step(
    model: GPT, optimizers, batches, window: Tensor, seqs_per_step: int, machine: "Machine"
) -> Tensor:
    """One update by the mean gradient of a step's sequences, of which `batches` are this process's.

    Returns this process's share of the step's mean loss, 0-d.
    """

    def micro_step(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = model(*batch, window)
        loss.backward()
        return loss.detach()

    losses = machine.map(micro_step, batches, accumulates=True)
    if dist.is_initialized():
        sum_gradients(model, optimizers[1])
    # So far they are those of the sum of the sequences' losses.
    torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], seqs_per_step)
    machine.map(lambda optimizer: optimizer.step(), optimizers)
    model.zero_grad(set_to_none=True)
    return sum(losses) / seqs_per_step


@torch.no_grad()
def validate(
    model: GPT, loader: DistributedDataLoader, window: Tensor, machine: "Machine"
) -> float:
    """Mean loss in nats per token over exactly loader.num_tokens, shared by the processes."""

    @torch.no_grad()  # which holds for one thread, and the machine may run this in another
    def loss_sum(index: int) -> Tensor:
        num_targets = min(loader.seq_len, loader.num_tokens - index * loader.seq_len)
        return model(*loader.sequence(index), window).double() * num_targets

    model.eval()
    own = range(loader.rank, loader.num_sequences, loader.world_size)
    losses = machine.map(loss_sum, own)
    model.train()
    total = sum(losses, torch.zeros((), dtype=torch.float64, device=window.device))
    return sum_over_processes(total).item() / loader.num_tokens


# ==================================================================================================
# Part two: around the recipe
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# Machine: the device, its precision, and what is done in another way on a CPU


@torch.compiler.assume_constant_result
def fp8_supported(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 and e5m2: NVIDIA's, compute capability 8.9 and up.

    AMD's cards have FP8 formats of their own.
    """
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What this process runs on, and as which of how many processes."""

    device: torch.device
    name: str  # of the GPU or the CPU
    dtype: torch.dtype  # of the activations, when the settings leave it to the machine
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def detect(cls) -> "Machine":
        """This process's own GPU, or the CPU.

        Raises UserError where there are fewer GPUs than processes, or one without bfloat16.
        """
        variables = ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)
        ranks = [int(os.environ.get(name, default)) for name, default in variables]
        if not torch.cuda.is_available():
            keep_freed_memory()
            name = f"CPU, {cpu_model()}, {torch.get_num_threads()} threads a process"
            # Other CPUs imitate bfloat16, slowly.
            fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            return cls(torch.device("cpu"), name, torch.bfloat16 if fast else torch.float32, *ranks)
        count = torch.cuda.device_count()
        if ranks[1] >= count:
            raise UserError(
                f"{count} GPU(s) found here, and process {ranks[1]} would need one more; start "
                f"--nproc_per_node={count}."
            )
        # Segments that can grow lose less memory to fragmentation.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", ranks[1])
        torch.cuda.set_device(device)
        name = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"{name} has no bfloat16; use an Ampere or newer GPU, or the CPU by "
                "CUDA_VISIBLE_DEVICES='' and --preset tiny."
            )
        return cls(device, name, torch.bfloat16, *ranks)

    @property
    def is_gpu(self) -> bool:
        """Whether the network is compiled, and runs while the host goes on."""
        return self.device.type == "cuda"

    @functools.cached_property
    def pool(self) -> concurrent.futures.Executor | None:
        """Two threads, each with half of a CPU's cores; None on a GPU and for several processes."""
        half = torch.get_num_threads() // 2
        if self.is_gpu or self.world_size > 1 or half == 0:
            return None
        return concurrent.futures.ThreadPoolExecutor(2, "", torch.set_num_threads, (half,))

    def activations(self, name: str) -> torch.dtype:
        """The dtype that --dtype asks for."""
        return self.dtype if name == "auto" else getattr(torch, name)

    def map(self, function, items, accumulates: bool = False) -> list:
        """`function` of each item; on a CPU two at a time, which suits small tensors better.

        accumulates: the function adds to gradients. Two items add up to the same in either order,
        three do not, so that more than two are run one after another.
        """
        if self.pool is None or (accumulates and len(items) != 2):
            return [function(item) for item in items]
        return list(self.pool.map(function, items))

    def synchronize(self):
        """Wait until the GPU has done all that it was asked for."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def read_later(self, values: Tensor):
        """Start copying a tensor to the host; the function returned waits for its numbers."""
        if not self.is_gpu:
            return values.tolist
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[float]:
            copied.synchronize()
            return host.tolist()

        return read

    def peak_memory(self) -> tuple[int, int]:
        """Peak memory in MiB, (allocated, reserved); on a CPU the most that was resident, twice."""
        if self.is_gpu:
            allocated = torch.cuda.max_memory_allocated()
            return allocated >> 20, torch.cuda.max_memory_reserved() >> 20
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident >>= 20 if sys.platform == "darwin" else 10  # there in bytes, elsewhere in KiB
        return resident, resident


def cpu_model() -> str:
    """The CPU's name where Linux tells it, or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return found[1] if found else platform.machine()


def keep_freed_memory():
    """Let glibc keep what is freed: fresh pages cost a small network more than its computing."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 1 << 28)  # M_TOP_PAD
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD


def block_sparse_plan(block_mask: BlockMask) -> tuple[Tensor, Tensor]:
    """A BlockMask as batched matmuls want it, worked out once and kept on the mask.

    For n query blocks that see at most K key blocks each: the indices of these, (n, K), filled up
    with others that the bias hides, and the bias of the scores, float32 (n, 128, K * 128), which is
    0 or -inf.
    """
    if not hasattr(block_mask, "plan"):
        seen = block_mask.to_dense()[0, 0].bool()
        listed, blocks = seen.sort(dim=-1, descending=True, stable=True)
        most = int(listed.sum(-1).max())
        listed = listed[:, :most]
        blocks = blocks[:, :most]
        token = torch.arange(len(blocks) * BLOCK, dtype=torch.int32).view(-1, BLOCK)
        queries = token[:, :, None, None]
        keys = token[blocks][:, None]
        allowed = block_mask.mask_mod(token[0, 0], token[0, 0], queries, keys)
        allowed = (allowed & listed[:, None, :, None]).expand(-1, BLOCK, -1, BLOCK).flatten(2)
        bias = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
        block_mask.plan = blocks, bias
    return block_mask.plan


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float
) -> Tensor:
    """What flex_attention returns for (1, heads, T, head_dim), with a backward pass on a CPU.

    Its time grows with T times the window. Each query has to see a key, if only its own.
    """
    blocks, bias = block_sparse_plan(block_mask)
    _, H, T, D = q.shape
    n = len(blocks)
    q = q.reshape(H, n, BLOCK, D)
    k = k.reshape(H, n, BLOCK * D).index_select(1, blocks.flatten()).view(H, n, -1, D)
    v = v.reshape(H, n, BLOCK * D).index_select(1, blocks.flatten()).view(H, n, -1, D)
    p = torch.softmax(torch.add(bias, q @ k.mT, alpha=scale), dim=-1)
    return (p.to(v.dtype) @ v).view(1, H, T, D)


# --------------------------------------------------------------------------------------------------
# Shards: each a header of 256 int32 (magic number, version, number of tokens, vocabulary size,
# zeros) and its tokens in uint16

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_BYTES = 4 * 256
GPT2_VOCAB = 50257


def open_shard(path: str) -> tuple[np.ndarray, int]:
    """Map a shard into memory: its tokens (N,) uint16 and its vocabulary size.

    Raises UserError where the file is not a whole shard.
    """
    size = os.path.getsize(path) - HEADER_BYTES
    header = np.fromfile(path, dtype="<i4", count=256)
    if size < 0:
        header = np.zeros(256, dtype="<i4")
    magic, version, num_tokens, vocab_size = header[:4].tolist()
    vocab_size = vocab_size or GPT2_VOCAB  # the public shards leave it at 0
    known = magic == SHARD_MAGIC and version == SHARD_VERSION and not header[4:].any()
    whole = num_tokens > 0 and size == 2 * num_tokens
    if not (known and whole and 2 <= vocab_size <= 1 << 16):
        raise UserError(
            f"{path} is no whole token shard (magic number {magic}, version {version}, "
            f"{num_tokens} tokens, vocabulary {vocab_size}, {size} bytes of them); make it again, "
            "or let --train_files and --val_files leave it out."
        )
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
    return tokens, vocab_size


def check_tokens(loader: DistributedDataLoader):
    """Read all that the run may see. Raises UserError at a token beyond the vocabulary."""
    needed = loader.total if loader.shuffle else loader.num_tokens + 1
    for path, start, shard in zip(loader.files, loader.starts, loader.shards, strict=True):
        wrong = np.flatnonzero(shard[: max(0, needed - start)] >= loader.vocab_size)
        if len(wrong):
            raise UserError(
                f"{path} has token {shard[wrong[0]]} at position {wrong[0]}, beyond its "
                f"vocabulary of {loader.vocab_size}; make it again."
            )


# --------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, without the usage."""

    def error(self, message: str):
        raise UserError(f"{message}; --help lists all flags and presets.")


def parse_bool(text: str) -> bool:
    return ["false", "true"].index(text.lower()) == 1  # argparse reports a ValueError


def parse_layers(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(int(number) for number in text.split(","))


def parse_arguments(argv: list[str] | None = None) -> tuple[Hyperparameters, str]:
    """The settings that a command line asks for, and the name of its preset.

    Raises UserError at what it does not know.
    """
    parser = Parser(
        "train_gpt.py",
        usage="train_gpt.py [--preset NAME] [--FLAG VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    presets = ", ".join(PRESETS)
    parser.add_argument(
        "--preset",
        default="speedrun",
        choices=PRESETS,
        metavar="NAME",
        help=f"where the settings start from: {presets} (speedrun)",
    )
    groups = {}
    for field in dataclasses.fields(Hyperparameters):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        values = [repr(field.default)]
        values += [f"{n} {p[field.name]!r}" for n, p in PRESETS.items() if field.name in p]
        is_bool = field.type is bool
        groups[group].add_argument(
            f"--{field.name}",
            type={bool: parse_bool, tuple[int, ...]: parse_layers}.get(field.type, field.type),
            nargs="?" if is_bool else None,
            const=True if is_bool else None,
            default=argparse.SUPPRESS,
            choices=field.metadata.get("choices"),
            metavar="X",
            help=f"{field.metadata['meaning']} ({', '.join(values)})",
        )
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset")
    return Hyperparameters(**PRESETS[preset] | given), preset


def check_settings(hp: Hyperparameters, preset: str, machine: Machine):
    """Raise UserError at the first setting that cannot work here, with these processes."""
    if preset != "tiny" and not machine.is_gpu:
        raise UserError(
            f"the {preset} preset needs a CUDA GPU, and torch {torch.__version__} finds none; use "
            "--preset tiny, or see README.md."
        )
    for field in dataclasses.fields(hp):
        check_limits(field.name, getattr(hp, field.name), **field.metadata)
    if not set(hp.attention_free_layers) <= set(range(hp.num_layers)):
        raise UserError(
            f"--attention_free_layers is {hp.attention_free_layers}, and the layers are 0 to "
            f"{hp.num_layers - 1}."
        )
    if hp.eval_only and not hp.resume:
        raise UserError("--eval_only needs a checkpoint; name it with --resume.")
    if hp.seqs_per_step % machine.world_size:
        raise UserError(
            f"{machine.world_size} processes cannot share {hp.seqs_per_step} sequences a step "
            "evenly; change --seqs_per_step or --nproc_per_node."
        )


def check_limits(name: str, value, least=0, most=math.inf, multiple_of=None, **_):
    """Raise UserError where a number is outside of its limits; without any, it is at least 0."""
    if not isinstance(value, (int, float)):
        return
    if multiple_of and (value < multiple_of or value % multiple_of):
        nearest = next_multiple_of_n(value, n=multiple_of)
        raise UserError(
            f"--{name} is {value}, and has to be a multiple of {multiple_of}, as {nearest}."
        )
    if not least <= value <= most:
        up_to = f" and at most {most}" if most < math.inf else ""
        raise UserError(f"--{name} is {value}, and has to be at least {least}{up_to}.")


# --------------------------------------------------------------------------------------------------
# Processes: they start from the same, add up, stop after the same step, and end together


def say(sentence: str):
    """A line for a person, which a full disk cannot turn into an error."""
    with contextlib.suppress(OSError):
        tqdm.write(f"train_gpt.py: {sentence}", file=sys.stderr)


class StopSignals(contextlib.ExitStack):
    """SIGINT and SIGTERM: the first one asks all processes to stop after the same step.

    A second one, at least a second later, ends this process at once, as the first does where no
    steps are under way. (torchrun and a terminal may both send the first one.)
    """

    def __init__(self):
        super().__init__()
        self.received = 0  # the first signal's number
        self.in_steps = False
        self.second_from = math.inf  # on the clock of time.monotonic
        for number in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self.handle))

    def handle(self, number: int, _frame):
        if not self.in_steps or time.monotonic() > self.second_from:
            # What torchrun ends is silent, for torchrun says why.
            if "RANK" not in os.environ:
                say(f"stopped by {signal.Signals(number).name}.")
            os._exit(128 + number)
        if not self.received:
            self.received = number
            self.second_from = time.monotonic() + 1


def sum_over_processes(t: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def sum_gradients(model: GPT, muon: Muon):
    """Add up the gradients over all processes: Muon's at their owners, the others everywhere.

    All are sent off before the first is waited for. A matrix that goes to its owner alone takes
    half of the traffic of a sum that everybody gets.
    """
    works = []
    for p in model.parameters():
        if p.grad is None:
            continue
        if p in muon.owner:
            works.append(dist.reduce(p.grad, muon.owner[p], async_op=True))
        else:
            works.append(dist.all_reduce(p.grad, async_op=True))
    for work in works:
        work.wait()


@contextlib.contextmanager
def process_group(machine: Machine, facts: dict[str, str], timeout: int):
    """The processes of a run, where there are several, which have to agree on the facts.

    Raises UserError in all of them where they do not. When one is lost, gloo lets the others say so
    and end; NCCL's own watchdog ends them, after the timeout, and tells which collective waited.
    """
    if machine.world_size == 1:
        yield
        return
    patience = datetime.timedelta(seconds=timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=patience))
    except (ValueError, dist.DistError) as error:  # not started by torchrun, or not all of them
        raise UserError(f"{error}; start several processes by torchrun.") from None
    try:
        dist.init_process_group(
            "nccl" if machine.is_gpu else "gloo",
            store=store,
            rank=machine.rank,
            world_size=machine.world_size,
            timeout=patience,
            device_id=machine.device if machine.is_gpu else None,
        )
        everyone = [None] * machine.world_size
        dist.all_gather_object(everyone, facts)
        for rank, other in enumerate(everyone):
            compare_facts(f"process {rank}", other, "process 0", everyone[0], "start all alike")
        yield
        dist.barrier()
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, which name its source file or speak of a pair.
        if not isinstance(error, dist.DistError) and not re.search("gloo|pair closure", str(error)):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold communication that is under way
        call_the_roll(store, machine, error)
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def call_the_roll(store, machine: Machine, error: RuntimeError):
    """Say which processes do not answer in the launcher's store, after a collective has failed.

    When this process leaves the group, the collectives in which others still wait fail as well, and
    these others answer, too.
    """
    # On a host that is cut off, the store would keep its clients waiting for many minutes.
    threading.Timer(20, end_unanswered).start()
    try:
        store.set_timeout(datetime.timedelta(seconds=5))
        store.set(f"present {machine.rank}", "")
        if dist.is_initialized():
            # Not waited for, since it waits for all communication that is under way.
            threading.Thread(target=dist.destroy_process_group, daemon=True).start()
        time.sleep(4)
        ranks = range(machine.world_size)
        missing = [str(rank) for rank in ranks if not store.check([f"present {rank}"])]
        told = store.add("told", 1) > 1
    except RuntimeError:
        end_unanswered()
    if told:
        return
    if missing:
        names = ", ".join(missing)
        say(f"process {names} gave no answer: killed, stopped or cut off; the run has ended.")
    else:
        say(f"all processes are there, but their communication failed: {error}")


def end_unanswered():
    """End this process where not even the launcher's store can be reached."""
    say("the launcher of process 0 does not answer; the run has ended.")
    os._exit(1)


def compare_facts(one: str, facts: dict, other: str, expected: dict, advice: str):
    """Raise UserError at the first name whose facts differ: `facts` of `one`, and of `other`."""
    for name in expected | facts:
        found = facts.get(name)
        wanted = expected.get(name)
        if found != wanted:
            raise UserError(f"{one} has {name} {found}, and {other} has {wanted}; {advice}.")


# --------------------------------------------------------------------------------------------------
# Checkpoints: all that a run goes on from. What is damaged or of another run is refused

CHECKPOINT_FORMAT = 2
CHECKPOINT_FILES = "step_" + 8 * "[0-9]" + ".pt"  # other files in the folder are the user's
# What a checkpoint holds besides tensors, as it is for a run that begins.
BEGINNING = dict(step=0, run_id="", ms=0.0, best=math.inf, position=0, curve={})


def snapshot(network: GPT, optimizers) -> dict:
    """The state of a run's weights, optimizers and random numbers, as references to its tensors.

    All processes have to call this together; process 0 gets the momentum of all.
    """
    adam, muon = optimizers
    state = dict(network=network.state_dict(), adam=adam.state_dict(), muon=muon.state_dict())
    for i, (p, owner) in enumerate(muon.owner.items()):  # numbered as state_dict numbers them
        if dist.is_initialized() and adam.state:  # after the first step
            buffer = torch.empty_like(p) if owner != muon.rank else muon.state[p]["momentum_buffer"]
            dist.broadcast(buffer, owner)
            if muon.rank == 0:
                state["muon"]["state"][i] = dict(momentum_buffer=buffer.cpu())
    state["random"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        state["random_cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict, network: GPT, optimizers):
    """Put back what `snapshot` returned, on any number of processes."""
    adam, muon = optimizers
    network.load_state_dict(state["network"])
    adam.load_state_dict(state["adam"])
    muon.load_state_dict(state["muon"])
    for p, owner in muon.owner.items():
        if owner != muon.rank:
            muon.state.pop(p, None)
    torch.set_rng_state(state["random"])
    if "random_cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["random_cuda"])


def write_checkpoint(path: Path, state: dict, keep: int):
    """Write a checkpoint under another name, which is changed when all is on the disk.

    Then delete all but the newest `keep`, and those of later steps, which a run that was resumed
    from an earlier step has given up. Raises OSError where it cannot be written.
    """
    if not all(t.isfinite().all() for t in state["network"].values()):
        raise OSError("its weights are not finite")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name("unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)  # after a failure, too: the disk may be full
    saved = sorted(path.parent.glob(CHECKPOINT_FILES))
    kept = [other for other in saved if other <= path][-keep:]
    for other in set(saved) - set(kept):
        other.unlink(missing_ok=True)


def go_on_from(start: dict, network: GPT, optimizers, loader: DistributedDataLoader):
    """Put everything where it was when the checkpoint was taken."""
    try:
        restore(start, network, optimizers)
        loader.position = start["position"]
        for name in ("network", "adam", "muon"):
            del start[name]  # a copy in the memory of each process
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{start['path']} is of another network ({type(error).__name__}); resume it with its "
            "own script."
        ) from None


def read_checkpoint(path: Path) -> dict:
    """A checkpoint in host memory. Nothing in the file is run.

    torch.save writes a zip archive, whose checksums zipfile compares and torch.load does not.
    Raises UserError where the file is damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            checksum = sum(member.CRC for member in archive.infolist())
        if damaged:
            raise zipfile.BadZipFile(damaged)
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = int(state["format"])
        if found == CHECKPOINT_FORMAT:
            # Every entry has to be there, and of the type that it has in BEGINNING.
            state |= {name: type(value)(state[name]) for name, value in BEGINNING.items()}
    except Exception as error:  # anything may be in a file
        raise UserError(
            f"{path} is not a whole checkpoint of this script ({type(error).__name__}); resume "
            "from another one."
        ) from None
    if found != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} is in format {found}, and this script reads {CHECKPOINT_FORMAT}; resume with "
            "the script that wrote it."
        )
    return state | dict(path=str(path), checksum=checksum)


def find_checkpoint(hp: Hyperparameters, curve: dict[str, str]) -> dict:
    """What to go on from: --resume's checkpoint, for auto the whole one that was written last.

    Raises UserError where none can be read, or it is of a run whose curve was another.
    """
    paths = [Path(hp.resume)] if hp.resume else []
    if hp.resume == "auto":
        found = Path(hp.log_dir).glob(f"{glob.escape(hp.run_id) or '**'}/{CHECKPOINT_FILES}")
        paths = sorted(found, key=os.path.getmtime, reverse=True)
        if hp.eval_only and not paths:
            raise UserError(f"there is no checkpoint under {hp.log_dir}; name one with --resume.")
    failures = []
    for path in paths:
        try:
            state = read_checkpoint(path)
        except UserError as failure:
            failures.append(failure)
            continue
        advice = "give it the same, or another --resume"
        compare_facts("this run", curve, str(path), state["curve"], advice)
        return state
    if failures:
        raise failures[0]
    return BEGINNING | dict(path="", checksum=0)


# --------------------------------------------------------------------------------------------------
# Log: this script, versions, hardware and settings; then a line for each step and validation


class Log:
    """The file LOG_DIR/RUN_ID.txt, to which process 0 only ever appends, and what a person sees.

    It keeps the clock, whose milliseconds are those of training. Raises UserError where the file
    cannot be made or is another run's, and at a loss that is not finite.
    """

    def __init__(self, hp: Hyperparameters, machine: Machine, loader, start: dict):
        self.hp = hp
        self.machine = machine
        self.loader = loader
        self.step_tokens = hp.seqs_per_step * hp.train_seq_len
        self.best = start["best"]
        self.last_checkpoint = start["path"]
        self.ms_before = start["ms"]
        self.running_since = None  # None while the clock is stopped
        self.stopping = False  # whether a process was asked to stop
        self.pending = None  # a step, and a function that waits for its loss
        self.failing = set()  # what could not be written when it was last tried
        made_up = time.strftime("%Y-%m-%d_%H%M%S_") + os.urandom(3).hex()
        self.run_id = hp.run_id or start["run_id"] or made_up
        self.path = Path(hp.log_dir, f"{self.run_id}.txt")
        silent = machine.rank > 0 or hp.eval_only
        goes_on = silent or hp.resume == "auto" or start["run_id"] == self.run_id
        try:
            if not silent:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # The buffer keeps lines that a full disk does not take until there is room.
            path = os.devnull if silent else self.path
            self.file = io.BufferedWriter(io.FileIO(path, "a" if goes_on else "x"), 1 << 24)
        except OSError as error:
            raise UserError(
                f"the log {self.path} cannot be made ({error.strerror}); choose another --run_id "
                "or --log_dir."
            ) from None
        self.bar = tqdm(
            desc="warming up",
            total=hp.num_iterations * self.step_tokens,
            initial=start["step"] * self.step_tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            disable=silent or None,  # None: only where stderr is no terminal
        )

    def attempt(self, what: str, action, *args) -> bool:
        """Run an action that writes. Where it fails, say so once, and return False."""
        try:
            action(*args)
        except (OSError, RuntimeError) as error:  # torch.save turns the former into the latter
            if what not in self.failing:
                say(f"{what} cannot be written ({error.__context__ or error}); training goes on.")
            self.failing.add(what)
            return False
        self.failing.discard(what)
        return True

    def line(self, text: str, shown: bool = True):
        """Add a line to the file, and show it."""
        self.file.write(f"{text}\n".encode())
        self.attempt("the log", self.file.flush)
        if shown and self.machine.rank == 0:
            self.attempt("standard output", self.show, text)

    def show(self, text: str):
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def ms(self) -> float:
        """Milliseconds of training so far."""
        if self.running_since is None:
            return self.ms_before
        return self.ms_before + 1000 * (time.perf_counter() - self.running_since)

    @contextlib.contextmanager
    def clock_stopped(self):
        """The clock stands still for what is not training, and runs afterwards."""
        self.machine.synchronize()
        self.ms_before = self.ms()
        self.running_since = None
        yield
        self.machine.synchronize()
        self.running_since = time.perf_counter()

    def times(self, step: int) -> str:
        """The clock, in the form of the public logs."""
        now = self.ms()
        return f"train_time:{now:.0f}ms step_avg:{now / max(step, 1):.2f}ms"

    def check(self, step: int, loss: float, validation: bool = False):
        """Raise UserError where the loss is not finite; it is the same on all processes."""
        if math.isfinite(loss):
            return
        tokens = "the validation tokens" if validation else self.tokens_of(step)
        raise UserError(
            f"the loss of step {step} is {loss}, on {tokens}; the last checkpoint: "
            f"{self.last_checkpoint or 'none'}."
        )

    def tokens_of(self, step: int) -> str:
        """Where the sequences of a step begin, and the shards that hold them."""
        loader = self.loader
        end = step * self.hp.seqs_per_step
        starts = [loader.start_of(index) for index in range(end - self.hp.seqs_per_step, end)]
        tokens = [start + i for start in starts for i in range(loader.seq_len)]
        files = dict.fromkeys(loader.files[loader.shard_at(token)] for token in tokens)
        return f"the sequences that begin at tokens {starts} of {' and '.join(files)}"

    def step(self, step: int, loss_and_stops: Tensor):
        """The line of a step. A GPU's is written while the next step runs: nothing waits for it."""
        self.flush()
        self.pending = step, self.machine.read_later(loss_and_stops)
        if not self.machine.is_gpu:
            self.flush()

    def flush(self):
        """Write the line that waits for its loss."""
        if self.pending is None:
            return
        step, read = self.pending
        self.pending = None
        loss, stops = read()
        self.stopping = stops > 0
        self.bar.set_description(f"step {step}/{self.hp.num_iterations}", refresh=False)
        self.bar.set_postfix_str(f"train_loss {loss:.4f}", refresh=False)
        self.bar.update(self.step_tokens)
        line = f"step:{step}/{self.hp.num_iterations} {self.times(step)} train_loss:{loss:.4f}"
        self.line(line, shown=self.bar.disable)
        self.check(step, loss)

    def validation(self, step: int, loss: float):
        """The line of a validation after `step` steps."""
        self.flush()
        self.best = min(self.best, loss)
        self.line(f"step:{step}/{self.hp.num_iterations} val_loss:{loss:.4f} {self.times(step)}")
        self.check(step, loss, validation=True)

    def save(self, step: int, state: dict):
        """Write a checkpoint, LOG_DIR/RUN_ID/step_*.pt, on process 0."""
        self.flush()
        if self.machine.rank > 0:
            return
        state |= dict(format=CHECKPOINT_FORMAT, step=step, run_id=self.run_id)
        state |= dict(ms=self.ms(), best=self.best, position=self.loader.position)
        path = Path(self.hp.log_dir, self.run_id, f"step_{step:08d}.pt")
        if self.attempt("a checkpoint", write_checkpoint, path, state, self.hp.keep):
            self.last_checkpoint = str(path)

    def checkpoint_due(self, step: int) -> bool:
        """Whether to save after `step` steps: regularly, at the end, and when stopping."""
        if self.hp.save_every == 0:
            return False
        return self.stopping or due(step, self.hp.save_every, self.hp.num_iterations)

    def stopped(self, step: int, number: int) -> int:
        """Say that the run was stopped after `step` steps; returns the exit code."""
        if self.last_checkpoint:
            how = f"to go on, repeat the command with --resume {self.last_checkpoint}"
        elif self.hp.save_every:
            how = "nothing is saved"
        else:
            how = "nothing is saved, for want of --save_every"
        if self.machine.rank == 0:
            name = signal.Signals(number).name
            say(f"stopped by {name} after step {step} of {self.hp.num_iterations}; {how}.")
        return 128 + number

    def report(self):
        """The closing lines: tokens per second, passes over the tokens, memory, and the log."""
        tokens = self.hp.num_iterations * self.step_tokens
        passes = self.loader.position * self.loader.seq_len / self.loader.total
        allocated, reserved = self.machine.peak_memory()
        self.line(f"tokens per second: {tokens / self.ms() * 1000:.0f}")
        self.line(
            f"passes over the training tokens: {passes:.2f}, lowest validation loss {self.best:.4f}"
        )
        self.line(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
        self.line(f"log: {self.path}")
        self.line(f"to plot it: python records/compare.py {self.path} --plot")

    def close(self):
        self.bar.close()
        with contextlib.suppress(OSError):
            self.file.close()


# --------------------------------------------------------------------------------------------------
# The run


def describe_run(hp: Hyperparameters, machine: Machine, train_loader, val_loader) -> tuple:
    """Two dictionaries: the facts that shape the loss curve, and all that processes have to share.

    A resumed run has the former in common with the run before. Paths are left out, so that data may
    be moved.
    """
    curve = dict(
        vocabulary=str(train_loader.vocab_size), activations=str(machine.activations(hp.dtype))
    )
    shared = dict(
        script=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        torch=torch.__version__,
        device=machine.device.type,
    )
    for field in dataclasses.fields(hp):
        facts = curve if field.metadata["group"] in ("network", "training") else shared
        if not field.name.endswith(("_files", "_dir", "_id", "resume")):
            facts[f"--{field.name}"] = str(getattr(hp, field.name))
    for facts, loader in ((curve, train_loader), (shared, val_loader)):
        for file, shard in zip(loader.files, loader.shards, strict=True):
            facts[f"tokens in {Path(file).name}"] = str(len(shard))
    return curve, shared | curve


def open_data(hp: Hyperparameters, machine: Machine) -> tuple:
    """The loaders of the training and of the validation tokens. Raises UserError."""
    share = dict(rank=machine.rank, world_size=machine.world_size, device=machine.device)
    train_tokens = hp.num_iterations * hp.seqs_per_step * hp.train_seq_len
    train_loader = DistributedDataLoader(
        hp.train_files,
        hp.train_seq_len,
        num_tokens=train_tokens,
        repeat=hp.repeat,
        shuffle=hp.shuffle,
        **share,
    )
    val_loader = DistributedDataLoader(
        hp.val_files, hp.val_seq_len, num_tokens=hp.val_tokens, **share
    )
    for loader in (train_loader, val_loader):
        for path, vocab_size in zip(loader.files, loader.vocab_sizes, strict=True):
            if vocab_size != train_loader.vocab_size:
                raise UserError(
                    f"{path} has a vocabulary of {vocab_size}, and {train_loader.files[0]} one of "
                    f"{train_loader.vocab_size}; use shards of one tokenizer."
                )
    if machine.local_rank == 0:  # once a machine is enough
        check_tokens(train_loader)
        check_tokens(val_loader)
    return train_loader, val_loader


def compiled(network: GPT, hp: Hyperparameters, machine: Machine):
    """The network as one compiled graph on a GPU; on a CPU the network itself."""
    if not machine.is_gpu:
        return network
    torch._inductor.config.coordinate_descent_tuning = hp.coordinate_descent_tuning
    return torch.compile(network, dynamic=False, fullgraph=True)


def warm_up(model, network: GPT, optimizers, hp: Hyperparameters, machine: Machine):
    """Compile and run every kernel on made-up tokens; then put everything back as it was."""
    before = io.BytesIO()  # in the host's memory, where there is more room
    torch.save(snapshot(network, optimizers), before)
    # The longest window: what fits now will always fit.
    window = set_schedule(optimizers, hp.num_iterations, hp, machine)
    ids = torch.randint(network.vocab_size, (hp.train_seq_len,), device=machine.device)
    # A second micro-step, where there is one, needs memory for the gradients of the first as well.
    batches = [(ids.int(), ids)] * min(2, hp.seqs_per_step // machine.world_size)
    for _ in range(2):
        training_step(model, optimizers, batches, window, len(batches), machine)
    ids = torch.randint(network.vocab_size, (hp.val_seq_len,), device=machine.device)
    model.eval()
    with torch.no_grad():
        model(ids.int(), ids, window)
    model.train()
    before.seek(0)
    restore(torch.load(before, map_location="cpu"), network, optimizers)


def out_of_memory(hp: Hyperparameters, machine: Machine) -> str:
    """The sentence for a GPU that is too small, with flags that need about half of the memory."""
    blocks = hp.train_seq_len // BLOCK
    parts = 2 if blocks % 2 == 0 else blocks  # an odd number of blocks is cut into single ones
    val_seq_len = next_multiple_of_n(hp.val_seq_len / parts, n=BLOCK)
    total = torch.cuda.get_device_properties(machine.device).total_memory
    return (
        f"out of memory on {machine.name} ({total / 2**30:.0f} GiB, perhaps shared with others); "
        f"--train_seq_len {hp.train_seq_len // parts} --seqs_per_step {hp.seqs_per_step * parts} "
        f"--val_seq_len {val_seq_len} trains on the same tokens a step in smaller parts, and "
        "README.md tells what fits on which card."
    )


@torch.no_grad()
def sample(model: GPT, num_tokens: int, window: Tensor, seed: int) -> str:
    """Draw a document from the model, as text: at most num_tokens, and no more than the window.

    GPT-2's tokens need tiktoken to become text; without it they are shown as numbers.
    """
    model.eval()
    boundary = model.vocab_size - 1
    generator = torch.Generator().manual_seed(seed)
    context = min(int(window) * BLOCK, model.train_seq_len)
    ids = torch.full((context,), boundary, dtype=torch.int32, device=window.device)
    # FlexAttention heeds the lists of blocks only where it is compiled.
    hidden = torch.compile(model.hidden, dynamic=False) if ids.is_cuda else model.hidden
    length = 1
    while length <= min(num_tokens, context - 1):
        logits = model.logits(hidden(ids, window)[length - 1])
        probabilities = logits[: model.vocab_size].softmax(-1).cpu()
        ids[length] = torch.multinomial(probabilities, 1, generator=generator).item()
        if ids[length] == boundary:
            break
        length += 1
    tokens = ids[1:length].tolist()
    if boundary == 256:
        return bytes(tokens).decode(errors="replace")
    try:
        return importlib.import_module("tiktoken").get_encoding("gpt2").decode(tokens)
    except Exception as error:  # not there, or its vocabulary cannot be fetched
        return f"(as numbers, for want of tiktoken: {error}) {tokens}"


class Run:
    """What each process prepares by itself, before they meet.

    Raises UserError at the first thing that is missing or wrong.
    """

    def __init__(self, argv: list[str] | None):
        self.hp, self.preset = parse_arguments(argv)
        self.machine = Machine.detect()
        check_settings(self.hp, self.preset, self.machine)
        self.train_loader, self.val_loader = open_data(self.hp, self.machine)
        self.curve, self.shared = describe_run(
            self.hp, self.machine, self.train_loader, self.val_loader
        )
        self.start = find_checkpoint(self.hp, self.curve)
        self.shared["checkpoint"] = str(self.start["checksum"])


def header(run: Run, network: GPT) -> str:
    """The script and what it runs on, so that a log can be understood and repeated by itself."""
    gpus = ""
    if run.machine.is_gpu:
        gpus = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True).stdout
    facts = dict(
        python=platform.python_version(),
        cuda=torch.version.cuda,
        hardware=run.machine.name,
        world_size=run.machine.world_size,
        preset=run.preset,
        parameters=sum(p.numel() for p in network.parameters()),
        head="FP8" if network.lm_head.use_fp8 else "as the activations",
        attention="FlexAttention"
        if run.machine.is_gpu
        else "block-sparse, for FlexAttention has no backward pass on a CPU",
    )
    facts |= {name: fact for name, fact in run.shared.items() if not name.startswith("--")}
    facts |= dataclasses.asdict(run.hp)
    rule = "=" * 100
    lines = [f"{name}: {fact}" for name, fact in facts.items()]
    return "\n".join([Path(__file__).read_text(), rule, gpus, *lines, rule])


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is the last one, or one of those in which something is done regularly."""
    return step == last or (every > 0 and step % every == 0)


def train(run: Run, signals: StopSignals) -> int:
    """Train, or only validate. Returns the exit code: 0, or that of the signal that ended it."""
    hp = run.hp
    machine = run.machine
    start = run.start
    network = build_model(hp, run.train_loader.vocab_size, machine)
    optimizers = build_optimizers(network, hp, machine)
    model = compiled(network, hp, machine)
    first = start["step"]
    last = first if hp.eval_only else hp.num_iterations
    with contextlib.closing(Log(hp, machine, run.train_loader, start)) as log:
        log.line(header(run, network), shown=False)
        with log.clock_stopped():
            if not hp.eval_only:
                warm_up(model, network, optimizers, hp, machine)
            if start["path"]:
                go_on_from(start, network, optimizers, run.train_loader)
                log.line(f"resumed from step {first} of {start['path']}")
        signals.in_steps = not hp.eval_only
        for step in range(first, last + 1):
            window = set_schedule(optimizers, step, hp, machine)
            # A run that is asked to stop does not validate first: batch systems are not patient.
            if due(step, hp.val_loss_every, last) and (step == last or not log.stopping):
                with log.clock_stopped():
                    loss = validate(model, run.val_loader, window, machine)
                log.validation(step, loss)
            if step > first and log.checkpoint_due(step):
                with log.clock_stopped():
                    log.save(step, snapshot(network, optimizers) | dict(curve=run.curve))
            if step == last or log.stopping:
                break
            own_share = range(hp.seqs_per_step // machine.world_size)
            batches = [run.train_loader.next_batch() for _ in own_share]
            loss = training_step(model, optimizers, batches, window, hp.seqs_per_step, machine)
            stops = torch.full_like(loss, signals.received > 0)
            log.step(step + 1, sum_over_processes(torch.stack([loss, stops])))
        log.flush()
        signals.in_steps = False
        if step < last:
            # Where another process got the signal, its number is not known here.
            return log.stopped(step, signals.received or signal.SIGTERM)
        if not hp.eval_only:
            log.report()
        if hp.sample and machine.rank == 0:
            log.line("sample: " + sample(network, hp.sample, window, hp.seed))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run with the flags in `argv` (default: the command line's).

    Returns the exit code: 0, 2 for what the user can mend, 128 + N for a stop by signal N.
    """
    try:
        with StopSignals() as signals:
            run = Run(argv)
            with process_group(run.machine, run.shared, run.hp.timeout):
                return train(run, signals)
    except (UserError, OSError) as error:  # an OSError names the file
        sentence = str(error)
    except torch.OutOfMemoryError:
        sentence = out_of_memory(run.hp, run.machine)
    # What all processes of a machine meet is said by the first of them alone: when it has ended,
    # torchrun ends the others, while they wait here.
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(10)
    say(sentence)
    return 2


if __name__ == "__main__":
    sys.exit(main())
