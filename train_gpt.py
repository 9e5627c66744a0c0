"""Train a GPT of 124M parameters, by GPT-2's count, on FineWeb to a validation loss of 3.28.

The recipe is record #21 of the public NanoGPT speedrun, whose script took 2.997 minutes on 8 H100
GPUs. This file trains on any number of GPUs and, at a smaller size, on a CPU. It has not yet run on
a GPU; records/README.md lists what has been run, with the log of each result.

    torchrun --standalone --nproc_per_node=8 train_gpt.py   the speedrun
    python train_gpt.py --preset tiny                       a small network, on a CPU

Notable features of the network and its training:
- attention within documents and a sliding window that grows during training (FlexAttention)
- normalized queries and keys, rotary positions on half of the channels
- value embeddings in the first and last three layers, U-net skips, a shortcut from the embedding
- squared ReLU in the MLP, projections that start at zero, capped logits
- matmul of the head in FP8, with fixed scales
- Muon for the hidden matrices, Adam for embeddings, head and scalars

Importing this file only defines. To change the network, read the section "Network".
"""

import argparse
import bisect
import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from tqdm import tqdm

SOURCE = Path(__file__).read_text(encoding="utf-8")  # goes into each log
DATA = Path(__file__).resolve().parent / "data"
BLOCK = 128  # tokens; attention masks, windows and sequences consist of such blocks


class UserError(Exception):
    """An error that the user can fix, as one sentence: what was found, where, and what to do."""


def next_multiple_of_n(v, *, n):
    """The smallest positive multiple of n that is at least v."""
    return max(1, math.ceil(v / n)) * n


# --------------------------------------------------------------------------------------------------
# Settings, which are the flags, and schedules, which are functions of the step


@dataclasses.dataclass
class Hyperparameters:
    """All settings of a run. The defaults are the speedrun; the comments are the flags' help."""

    # The network
    num_layers: int = 12  # layers
    num_heads: int = 6  # attention heads
    head_dim: int = 128  # channels of a head
    model_dim: int = 768  # channels of the residual stream
    attention_free_layer: int = 7  # the layer without attention; num_layers for none
    max_window: int = 1792  # attention window at the end of training, in tokens
    fp8: str = "head"  # matmuls in FP8 on GPUs that support it: none, head or all
    # Training
    train_seq_len: int = 48 * 1024  # tokens of a training sequence, one micro-step
    seqs_per_step: int = 8  # sequences of the global batch, which the processes share
    num_iterations: int = 1770  # steps
    cooldown_frac: float = 0.4  # fraction of the steps over which learning rates decay
    embed_lr: float = 0.6  # learning rate of the embeddings (Adam)
    head_lr: float = 0.008  # learning rate of the head (Adam)
    scalar_lr: float = 0.04  # learning rate of the scalars (Adam)
    muon_lr: float = 0.05  # learning rate of the hidden matrices (Muon)
    repeat: bool = False  # start again when the training tokens are used up
    shuffle: bool = False  # take the training sequences in a random order
    seed: int = 0  # seed of the weights and of the sample
    dtype: str = "auto"  # of the activations: bfloat16, float32, or auto for the faster one
    # Data
    train_files: str = f"{DATA}/fineweb10B/fineweb_train_*.bin"  # training shards, a quoted glob
    val_files: str = f"{DATA}/fineweb10B/fineweb_val_*.bin"  # validation shards, a quoted glob
    val_tokens: int = 10485760  # tokens to validate on; 0 for all
    val_seq_len: int = 256 * 1024  # tokens of a validation sequence
    # Log and checkpoints
    val_loss_every: int = 125  # steps between validations; 0 for the last only
    sample: int = 0  # maximum number of tokens to sample after training
    log_dir: str = "logs"  # folder of the log, LOG_DIR/RUN_ID.txt
    run_id: str = ""  # name of the run; empty: made from the time
    save_every: int = 0  # steps between checkpoints, LOG_DIR/RUN_ID/step_*.pt; 0 for none
    keep: int = 2  # number of checkpoints to keep
    resume: str = ""  # checkpoint to resume, or auto for the newest valid one, if there is one

    def __post_init__(self):
        """Raise UserError at the first setting that cannot be right."""
        for name, value in vars(self).items():
            if not isinstance(value, str):
                self.require(0 <= value < 2**63, name, "a number from 0 to 2**63")
        for name in ("num_heads", "seqs_per_step", "num_iterations", "cooldown_frac", "keep"):
            self.require(getattr(self, name) > 0, name, "positive")
        units = dict(
            head_dim=16,
            model_dim=16,
            max_window=BLOCK,
            train_seq_len=BLOCK,
            val_seq_len=BLOCK,
        )
        for name, unit in units.items():
            value = getattr(self, name)
            self.require(value > 0 and value % unit == 0, name, f"a positive multiple of {unit}")
        self.require(self.num_layers >= 6, "num_layers", "at least 6")  # two for each value table
        self.require("/" not in self.run_id, "run_id", "a name without /")
        self.require(self.cooldown_frac <= 1, "cooldown_frac", "at most 1")
        self.require(self.fp8 in ("none", "head", "all"), "fp8", "none, head or all")
        known = self.dtype in ("auto", "bfloat16", "float32")
        self.require(known, "dtype", "auto, bfloat16 or float32")

    def require(self, condition, name, rule):
        if not condition:
            raise UserError(f"--{name} is {getattr(self, name)}; it has to be {rule}.")


# Settings that may differ between machines, and settings that may change when a run is resumed. The
# data and the dtype of the activations are compared by what these settings lead to.
PATHS = ["train_files", "val_files", "log_dir", "resume"]
FREE_SETTINGS = [
    *PATHS,
    "val_tokens",
    "val_seq_len",
    "val_loss_every",
    "sample",
    "dtype",
    "run_id",
    "save_every",
    "keep",
]

PRESETS = {
    "speedrun": {},  # 124M parameters as GPT-2 counts them
    # 454M parameters, of which 249M are neither value embeddings nor the head. The public medium
    # record of 18 January 2025 took these settings to 2.9166 in 29.3 minutes on 8 H100s. Its FP8
    # scales differ from those used here (head weights 32, gradients 2**29).
    "medium": dict(
        num_layers=16,
        num_heads=8,
        model_dim=1024,
        train_seq_len=64 * 1024,
        num_iterations=7500,
        embed_lr=0.3,
        head_lr=0.003,
        scalar_lr=0.015,
        muon_lr=0.025,
        val_seq_len=64 * 1024,
    ),
    "tiny": dict(  # 0.85M, for two CPU cores and the shards of data/local_text.py
        num_layers=6,
        num_heads=2,
        head_dim=64,
        model_dim=96,
        attention_free_layer=4,
        max_window=256,
        train_seq_len=1024,
        seqs_per_step=2,
        num_iterations=800,
        cooldown_frac=0.7,
        embed_lr=0.15,
        head_lr=0.004,
        scalar_lr=0.02,
        muon_lr=0.035,
        train_files=f"{DATA}/local_text/train_*.bin",
        val_files=f"{DATA}/local_text/val_*.bin",
        val_tokens=65536,
        val_seq_len=2048,
        repeat=True,
        shuffle=True,
        val_loss_every=100,
        sample=200,
    ),
}


def learning_rate_factor(step, hp):
    """1 until the cooldown, then a linear decay to 0.1 after the last step."""
    return 0.1 + 0.9 * min(1, (1 - step / hp.num_iterations) / hp.cooldown_frac)


def muon_momentum(step):
    """From 0.85 to 0.95 over 300 steps: early gradients change quickly."""
    return 0.85 + 0.1 * min(step / 300, 1)


def window_blocks(step, hp):
    """The attention window in blocks of 128 tokens, which grows linearly with the step.

    It is rounded up to whole blocks. The target is half a block below the maximum, so that the last
    block is added later.
    """
    tokens = (hp.max_window - BLOCK // 2) * step / hp.num_iterations
    return next_multiple_of_n(tokens, n=BLOCK) // BLOCK


def sequences_of_step(step, hp):
    """The number of sequences in a step's global batch. Another recipe may let it grow."""
    return hp.seqs_per_step


def can_stop(step):
    """Whether a run can be resumed after `step` steps. Another recipe may need an even number."""
    return True


# --------------------------------------------------------------------------------------------------
# Device and processes: the one place where device and precision are chosen


@dataclasses.dataclass
class Machine:
    """The device of this process, and its rank among the processes of the run."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    rank: int = 0
    world_size: int = 1

    @property
    def is_gpu(self):
        """Whether the network is compiled and runs asynchronously."""
        return self.device.type == "cuda"

    @property
    def supports_fp8(self):
        """Whether bfloat16 matmuls may be in e4m3 and e5m2: NVIDIA's, capability 8.9 and up."""
        if self.dtype != torch.bfloat16 or not self.is_gpu or torch.version.hip:
            return False  # AMD's cards have FP8 formats of their own
        return torch.cuda.get_device_capability(self.device) >= (8, 9)


def detect_machine(dtype):
    """This process's own GPU, or the CPU. dtype: of the activations, or "auto".

    Raises UserError if torchrun's variables contradict each other, where there are fewer GPUs
    than processes, and where the GPU is too old.
    """
    ranks = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if not any(ranks):
        ranks = "0", "0", "1"
    if not all(map(str.isdecimal, ranks)) or int(ranks[0]) >= int(ranks[2]):
        raise UserError(
            f"RANK, LOCAL_RANK and WORLD_SIZE are {ranks}; start several processes with torchrun, "
            "or unset all three for one process."
        )
    rank, local_rank, world_size = map(int, ranks)
    device = torch.device("cpu")
    native = torch.cpu._is_avx512_bf16_supported()
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"there are {count} GPUs here; start --nproc_per_node={count}.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability() < (8, 0):
            raise UserError(
                f"{torch.cuda.get_device_name()} has no bfloat16; use an Ampere or newer GPU, or "
                "the CPU with CUDA_VISIBLE_DEVICES='' and --preset tiny."
            )
        native = True
    if dtype == "auto":
        dtype = "bfloat16" if native else "float32"  # other CPUs emulate bfloat16, slowly
    return Machine(device, getattr(torch, dtype), rank, world_size)


def configure_torch(source):
    """All process-wide settings of torch. They come before the first CUDA call."""
    import torch._inductor.config as inductor

    # Growing segments lose less memory to fragmentation.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # torch caches compiled graphs by the names of custom operators and not by their code (pytorch
    # issue 144344). Without the tag, an edited operator would silently run its old code.
    torch.compiler.config.cache_key_tag = hashlib.sha256(source.encode()).hexdigest()
    # Autotuning copies what a kernel overwrites to the host before each trial. The backward pass of
    # the loss would overwrite the logits, 4.9 GB.
    inductor.inplace_buffers = False
    # Drops or pads gradients of a norm's gains in torch 2.10 to 2.13 (pytorch issues 193061 and
    # 195845).
    inductor.triton.mix_order_reduction = False


def check_equal(found, expected, one, other):
    """Raise UserError at the first name whose values differ: `found` in one, and in the other."""
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{name} is {found.get(name)} in {one}, and {expected.get(name)} in {other}."
            )


def start_processes(config, machine):
    """Connect the processes of the run. Raises UserError if their configs differ."""
    if machine.world_size == 1:
        return
    dist.init_process_group(
        "nccl" if machine.is_gpu else "gloo",
        device_id=machine.device if machine.is_gpu else None,
    )
    configs = [None] * machine.world_size
    dist.all_gather_object(configs, config)
    for rank, other in enumerate(configs):
        check_equal(configs[0], other, "process 0", f"process {rank}; start all processes alike")


def sum_gradients(parameters, owner, extra, machine):
    """Sum gradients, and `extra` (n,) float32, over all processes, in place.

    Gradients of fewer than two dimensions travel with `extra` in one tensor. owner: the rank of the
    process that updates a parameter; its gradient is complete there alone, which takes half of the
    traffic. All communication starts before any is waited for.
    """
    if machine.world_size == 1:
        return
    parameters = [p for p in parameters if p.grad is not None]
    small = [extra] + [p.grad for p in parameters if p.ndim < 2]
    flat = nn.utils.parameters_to_vector(small)
    handles = [dist.all_reduce(flat, async_op=True)]
    for p in parameters:
        if p in owner:
            handles.append(dist.reduce(p.grad, owner[p], async_op=True))
        elif p.ndim >= 2:
            handles.append(dist.all_reduce(p.grad, async_op=True))
    for handle in handles:
        handle.wait()
    nn.utils.vector_to_parameters(flat, small)


@contextlib.contextmanager
def stop_signals():
    """Puts the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 in a list, instead of its usual effect.

    A second signal has its usual effect. Ignored signals stay so, as under nohup.
    """
    received = []
    with contextlib.ExitStack() as restore:

        def receive(number, frame):
            received.append(number)
            restore.close()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                restore.callback(signal.signal, number, signal.signal(number, receive))
        yield received


# --------------------------------------------------------------------------------------------------
# Data: shards of tokens, cut into sequences. A shard is a header of 256 little-endian int32 (magic
# number 20240520, version 1, number of tokens, vocabulary size, zeros) and its tokens in uint16.

HEADER_BYTES = 4 * 256
GPT2_VOCAB = 50257


def find_shards(pattern):
    """The files of a glob, sorted; an existing path stands for itself. Raises UserError."""
    folder, name = os.path.split(pattern)
    if os.path.isdir(folder):
        folder = glob.escape(folder)  # its name may contain brackets
    paths = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(os.path.join(folder, name)))
    if not paths:
        raise UserError(
            f"no shard matches {os.path.abspath(pattern)}; make some with "
            f"`python {shlex.quote(f'{DATA}/local_text.py')}`, download FineWeb as README.md "
            "describes, or name yours with --train_files and --val_files."
        )
    return paths


def read_header(path):
    """A shard's number of tokens and its vocabulary size. Raises UserError if it is corrupt."""
    try:
        header = np.fromfile(path, "<i4", 256).tolist()
        num_tokens, vocab_size = header[2:4]
        vocab_size = vocab_size or GPT2_VOCAB  # 0 in the public shards
        size = os.path.getsize(path)
        known = header[:2] == [20240520, 1] and not any(header[4:])
        complete = num_tokens > 0 and size == HEADER_BYTES + 2 * num_tokens
        if not (known and complete and 2 <= vocab_size <= 1 << 16):
            raise ValueError(f"{size} bytes with the header {header[:4]}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a valid token shard ({error}); make it again, or leave it out of "
            "--train_files and --val_files."
        ) from None
    return num_tokens, vocab_size


def fingerprint(paths):
    """A hash of the first and the last megabyte of each shard. The first holds its length."""
    digest = hashlib.sha256()
    for path in paths:
        content = np.memmap(path, mode="r")
        digest.update(content[: 2**20])
        digest.update(content[-(2**20) :])
    return digest.hexdigest()[:12]


class DistributedDataLoader:
    """The tokens of all shards, in the order of their names, as sequences that processes share.

    Sequence `index` is the same whatever the number of processes. They take sequences in turn:
    rank, rank + world_size, and so on.
    num_tokens: number of tokens that the run predicts (None or 0: all); later targets are -100.
    repeat: start again after the last token. shuffle: read in a random order, the same in each run.
    Raises UserError if files are missing or corrupt, or have too few tokens.
    """

    def __init__(
        self,
        filename_pattern,
        seq_len,
        *,
        num_tokens=None,
        rank=0,
        world_size=1,
        device="cpu",
        repeat=False,
        shuffle=False,
    ):
        self.files = find_shards(filename_pattern)
        self.lengths, self.vocab_sizes = zip(*map(read_header, self.files))
        self.vocab_size = self.vocab_sizes[0]
        *self.starts, self.total = np.cumsum([0, *self.lengths]).tolist()
        self.num_tokens = num_tokens or self.total - 1
        missing = max(2, self.num_tokens + 1) - self.total  # the last target is one token further
        if missing > 0 and not (repeat and self.total > 1):
            raise UserError(
                f"{filename_pattern} has {self.total} tokens, {missing} fewer than the run needs; "
                "add shards, lower --num_iterations (or --val_tokens), or use them again with "
                "--repeat."
            )
        self.seq_len = seq_len
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.num_sequences = math.ceil(self.num_tokens / seq_len)
        self.in_an_epoch = max(1, (self.total - 1) // seq_len)  # sequences, where they are shuffled
        self.position = 0  # number of sequences that all processes have taken together

    def summary(self):
        """The shards in a few words, which identify their content."""
        return (
            f"{len(self.files)} shards, {self.total} tokens, fingerprint {fingerprint(self.files)}"
        )

    def read(self, start, count):
        """`count` tokens, uint16, from position `start` of the shards' endless repetition.

        Raises UserError at a token beyond the vocabulary.
        """
        pieces = []
        while count:
            start %= self.total
            shard = bisect.bisect(self.starts, start) - 1
            offset = HEADER_BYTES + 2 * (start - self.starts[shard])
            piece = np.fromfile(self.files[shard], "<u2", count, offset=offset)  # or the rest
            if piece.max() >= self.vocab_sizes[shard]:
                raise UserError(
                    f"{self.files[shard]} has token {piece.max()}, beyond its vocabulary of "
                    f"{self.vocab_sizes[shard]}; make it again."
                )
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def to_device(self, tokens, num_targets):
        """uint16 (n + 1,) to inputs (n,) int32 and targets (n,) int64 on the device.

        Targets from number `num_targets` on are -100.
        """
        ids = torch.from_numpy(tokens.astype(np.int32))  # few kernels of torch take uint16
        if self.device.type == "cuda":
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        targets = ids[1:].long()
        targets[max(0, num_targets) :] = -100
        return ids[:-1], targets

    def sequence(self, index):
        """Sequence `index`: inputs (seq_len,) int32 and targets (seq_len,) int64 on the device."""
        place = index
        if self.shuffle:  # another order in each epoch
            epoch, place = divmod(index, self.in_an_epoch)
            place = np.random.default_rng(epoch).permutation(self.in_an_epoch)[place]
        return self.to_device(self.tokens(place), self.num_tokens - index * self.seq_len)

    def tokens(self, place):
        """The seq_len + 1 tokens of the sequence at a place of the stream, uint16."""
        return self.read(place * self.seq_len, self.seq_len + 1)

    def next_batch(self):
        """This process's next sequence: number rank, then rank + world_size, and so on."""
        index = self.position + self.rank
        self.position += self.world_size
        return self.sequence(index)


def open_loaders(hp, machine, num_sequences, train_class=DistributedDataLoader):
    """The loaders of the training and of the validation tokens.

    num_sequences: that the run trains on. Raises UserError if a validation shard is trained on, or
    vocabularies differ.
    """
    train_loader = train_class(
        hp.train_files,
        hp.train_seq_len,
        num_tokens=num_sequences * hp.train_seq_len,
        rank=machine.rank,
        world_size=machine.world_size,
        device=machine.device,
        repeat=hp.repeat,
        shuffle=hp.shuffle,
    )
    val_loader = DistributedDataLoader(
        hp.val_files, hp.val_seq_len, num_tokens=hp.val_tokens, device=machine.device
    )
    vocab_sizes = set(train_loader.vocab_sizes + val_loader.vocab_sizes)
    if len(vocab_sizes) > 1:
        raise UserError(
            f"the shards have vocabularies of {sorted(vocab_sizes)}; use shards of one tokenizer "
            "in --train_files and --val_files."
        )
    both = {*map(os.path.realpath, train_loader.files)} & {*map(os.path.realpath, val_loader.files)}
    if both:
        raise UserError(
            f"{min(both)} is among the training and the validation shards; change --train_files or "
            "--val_files."
        )
    return train_loader, val_loader


# --------------------------------------------------------------------------------------------------
# Numerics: matmul in FP8, and attention on a CPU


def to_fp8(t, scale, dtype):
    """`t * scale` in an FP8 format. Larger values become its largest number, not infinity."""
    largest = torch.finfo(dtype).max
    return (t.float() * scale).clamp(-largest, largest).to(dtype)


def scaled_mm(a, b, a_s, b_s, dtype, fast=False):
    """`a @ b.T / (a_s * b_s)` of FP8 matrices, made row-major, as the hardware multiplies them.

    fast: accumulate in less than float32, which is precise enough for activations.
    """
    scale_a, scale_b = (a.new_full((), 1 / s, dtype=torch.float32) for s in (a_s, b_s))
    return torch._scaled_mm(
        a.contiguous(),
        b.contiguous().T,
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def visible_op(name, schema):
    """A decorator for a custom operator that the compiler can see into.

    The compiler fuses the casts of an FP8 matmul with the kernel before it. torch.library.triton_op
    does the same, but imports the compiler at once, which takes seconds.
    """

    def decorate(function):
        op = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        op.register_fake(function)

        @op.register_torch_dispatch(FunctionalTensorMode)
        def trace(mode, op, types, args, kwargs):
            with mode:
                return function(*args, **kwargs)

        return op

    return decorate


# "FP8 Formats for Deep Learning" (Micikevicius et al., 2022), with fixed scales
@visible_op(
    "nanogpt::mm",
    "(Tensor x, Tensor w, float x_s, float w_s, float grad_s) -> (Tensor, Tensor, Tensor)",
)
def mm_op(x, w, x_s, w_s, grad_s):
    """`x @ w.T` in FP8: bfloat16 (T, out), with x and w in e4m3 for the backward pass.

    x: (T, in), w: (out, in), all sizes multiples of 16. grad_s: for the backward pass.
    """
    x_f8 = to_fp8(x, x_s, torch.float8_e4m3fn)
    w_f8 = to_fp8(w, w_s, torch.float8_e4m3fn)
    return scaled_mm(x_f8, w_f8, x_s, w_s, torch.bfloat16, fast=True), x_f8, w_f8


@visible_op(
    "nanogpt::mm_backward",
    "(Tensor grad, Tensor x_f8, Tensor w_f8, float x_s, float w_s, float grad_s)"
    " -> (Tensor, Tensor)",
)
def mm_backward_op(grad, x_f8, w_f8, x_s, w_s, grad_s):
    """Gradients of `mm` for grad (T, out): of x, bfloat16 (T, in), of w, float32 (out, in)."""
    grad_f8 = to_fp8(grad, grad_s, torch.float8_e5m2)
    grad_x = scaled_mm(grad_f8, w_f8.T, grad_s, w_s, torch.bfloat16)
    grad_w = scaled_mm(grad_f8.T, x_f8.T, grad_s, x_s, torch.float32)
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


def attention_under(block_mask):
    """Softmax attention under a mask: a function of q, k, v (1, heads, T, head_dim) and `scale`.

    On a CPU, where FlexAttention has no backward pass, each of the n query blocks attends to copies
    of K key blocks, as many as any block sees; `visible` (n, 128, K * 128) masks the others.
    """
    if block_mask.kv_indices.device.type != "cpu":
        return functools.partial(flex_attention, block_mask=block_mask)
    seen = block_mask.to_dense()[0, 0]
    n = len(seen)
    K = int(seen.sum(-1).max())
    listed, blocks = seen.topk(K)
    token = torch.arange(n * BLOCK).view(n, BLOCK)
    keys = token[blocks].view(n, 1, K * BLOCK)
    visible = block_mask.mask_mod(0, 0, token[:, :, None], keys)
    visible &= listed.bool().repeat_interleave(BLOCK, 1)[:, None]

    def attend(q, k, v, scale):
        _, H, T, D = q.shape

        def copies(t):
            t = t.reshape(H, n, -1).index_select(1, blocks.flatten())
            return t.view(H, n, K * BLOCK, D)

        q = q.reshape(H, n, BLOCK, D)
        y = F.scaled_dot_product_attention(q, copies(k), copies(v), visible, scale=scale)
        return y.reshape(1, H, T, D)

    return attend


# --------------------------------------------------------------------------------------------------
# Muon: momentum, orthogonalized.
# "Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024)


def apply_polynomials(X, coefficients):
    """Apply odd polynomials a x + b x**3 + c x**5 to the singular values of X (..., rows, cols)."""
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT  # the products below are (rows, rows), so rows should be the shorter side
    for a, b, c in coefficients:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def zeropower_via_newtonschulz5(G, steps, dtype=torch.bfloat16):
    """Approximately the nearest orthogonal matrix: U S V^T becomes U S' V^T, S' near 1.

    Each step applies an odd polynomial of degree five to all singular values, with matmuls alone.
    Its coefficients give the steepest slope at zero: small values grow 3.4-fold a step. In return
    large ones only hover around 1, which does no harm. "Old Optimizer, New Norm" (Bernstein &
    Newhouse, 2024).
    G: (..., rows, cols), of any float dtype. The result has its shape, in `dtype`.
    """
    X = G / (G.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values <= 1; zeros stay zero
    return apply_polynomials(X.to(dtype), [(3.4445, -4.7750, 2.0315)] * steps)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates, for matrices (the last two dimensions).

    Parameters of one shape form a group, whose updates are orthogonalized in one batch. The
    processes own them in turn: the owner reads their gradients, keeps their state, and sends their
    updates to all.

    lr scales the orthogonal update. It is multiplied by a parameter's attribute `lr_mul`, if there
    is one, and by sqrt(rows / cols) for a tall matrix, so that tall matrices change their output as
    much as wide ones.

    options: settings of a subclass, which each group gets as well.
    """

    zeropower = staticmethod(zeropower_via_newtonschulz5)

    def __init__(
        self,
        params,
        lr=0.02,
        momentum=0.95,
        nesterov=True,
        ns_steps=5,
        rank=0,
        world_size=1,
        dtype=torch.bfloat16,
        **options,
    ):
        groups = {}
        for p in params:
            if p.ndim < 2:
                raise ValueError(f"Muon is for matrices; give the {tuple(p.shape)} to Adam")
            groups.setdefault((p.shape, p.dtype), []).append(p)
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps, **options)
        super().__init__([dict(params=group) for group in groups.values()], defaults)
        self.rank = rank
        self.world_size = world_size
        self.dtype = dtype
        # Parameter: rank of the process that keeps its state
        self.owner = {p: i % world_size for group in groups.values() for i, p in enumerate(group)}

    @torch.no_grad()
    def step(self):
        """Update every parameter by its `.grad`; where that is None it counts as zero."""
        updates, handles = [], []
        for group in self.param_groups:
            params = group["params"]
            share = math.ceil(len(params) / self.world_size)
            shape = self.world_size, share, *params[0].shape
            update = params[0].new_zeros(shape, dtype=self.dtype)
            own = params[self.rank :: self.world_size]
            if own:
                update[self.rank, : len(own)] = self.orthogonal_updates(group, own)
            if self.world_size > 1:
                handles.append(dist.all_gather(list(update), update[self.rank], async_op=True))
            updates.append(update)
        for handle in handles:
            handle.wait()
        for group, update in zip(self.param_groups, updates):
            tall_factor = max(1, update.size(-2) / update.size(-1)) ** 0.5
            for i, p in enumerate(group["params"]):
                turn, rank = divmod(i, self.world_size)
                lr = group["lr"] * getattr(p, "lr_mul", 1.0) * tall_factor
                p.sub_(update[rank, turn], alpha=lr)

    def orthogonal_updates(self, group, own):
        """Advance the momentum of parameters of one shape. Returns their updates (n, *shape)."""
        for p in own:
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in own]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        if group["nesterov"]:
            buffers = torch._foreach_lerp(grads, buffers, group["momentum"])
        return self.zeropower(torch.stack(buffers), group["ns_steps"], self.dtype)


# --------------------------------------------------------------------------------------------------
# Network: a GPT whose tokens attend within their document and a sliding window


def norm(x):
    """RMS normalization over the last dimension, without weights. Shape and dtype stay.

    The eps is torch's default, 1.2e-7 for every dtype. The torch of record #21 took 0.0078 for
    bfloat16, by which its queries and keys were 1.5% smaller at the start.
    """
    return F.rms_norm(x, x.shape[-1:])


class CastedLinear(nn.Linear):
    """`x @ weight.T` with a float32 weight (out_features, in_features), cast at each use.

    use_fp8: multiply in FP8 while training, with these scales. The hardware has to support it.
    """

    def __init__(self, in_features, out_features, use_fp8=False, x_s=1.0, w_s=1.0, grad_s=1.0):
        super().__init__(in_features, out_features, bias=False)
        self.use_fp8 = use_fp8
        self.scales = x_s, w_s, grad_s
        self.weight.data *= 0.75**0.5  # to a standard deviation of 0.5 / sqrt(in_features)

    def forward(self, x):
        """(..., in_features) to (..., out_features). Leading dimensions of the weight are rows."""
        weight = self.weight.flatten(0, -2)
        if self.use_fp8 and self.training:
            out, *_ = torch.ops.nanogpt.mm(x.flatten(0, -2), weight, *self.scales)
            return out.view(*x.shape[:-1], -1).type_as(x)
        return F.linear(x, weight.type_as(x))


class Rotary(nn.Module):
    """Rotary positions for half of the channels, "RoFormer" (Su et al., 2021).

    The other half has no position: it compares contents at any distance.
    """

    def __init__(self, head_dim, max_seq_len):
        super().__init__()
        frequency = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        # Radians (max_seq_len, head_dim / 4) in float32: bfloat16 cannot tell late positions apart.
        angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)
        turn = torch.stack([angle.cos(), angle.sin()])
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, x):
        """(B, T, heads, head_dim), T at most max_seq_len, to the same shape and dtype."""
        cos, sin = self.turn[:, : x.size(1), None]
        # Channel i rotates with channel i + head_dim / 2, for i in the first quarter.
        x1, same1, x2, same2 = x.float().chunk(4, dim=-1)
        y1 = x1 * cos + x2 * sin
        y2 = x2 * cos - x1 * sin
        return torch.cat([y1, same1, y2, same2], dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    """Attention with normalized queries and keys, and value embeddings mixed into the values."""

    def __init__(self, dim, num_heads, head_dim, rotary):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.qkv = CastedLinear(dim, 3 * num_heads * head_dim)
        # One matmul with three matrices, which Muon orthogonalizes one by one.
        self.qkv.weight = nn.Parameter(self.qkv.weight.detach().view(3, -1, dim))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.c_proj = CastedLinear(num_heads * head_dim, dim)
        nn.init.zeros_(self.c_proj.weight)  # the residual stream starts undisturbed
        # A constant of the public speedrun, found by trial at head_dim 128, where the usual
        # 1 / sqrt(head_dim) is 0.088. Queries and keys have unit RMS: scores reach 0.12 * head_dim.
        self.scale = 0.12

    def forward(self, x, ve, attend):
        """x (1, T, dim), ve (1, T, num_heads * head_dim) or None; returns (1, T, dim)."""
        qkv = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=2)
        q, k = self.rotary(norm(qk)).chunk(2, dim=2)  # together: the backward pass moves less
        v = self.lambdas[0] * v
        if ve is not None:
            v = v + self.lambdas[1] * ve.view_as(v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = attend(q, k, v, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers, four times as wide inside, with a squared ReLU, "Primer" (So et al., 2021)."""

    def __init__(self, dim):
        super().__init__()
        self.c_fc = CastedLinear(dim, 4 * dim)
        self.c_proj = CastedLinear(4 * dim, dim)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x):
        """(..., dim) to the same shape and dtype."""
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention, where the layer has it, and MLP, after mixing in some of the embedding."""

    def __init__(self, dim, num_heads, head_dim, rotary, has_attention=True):
        super().__init__()
        self.attn = CausalSelfAttention(dim, num_heads, head_dim, rotary) if has_attention else None
        self.mlp = MLP(dim)
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, ve, x0, attend):
        """x and x0 (1, T, dim), ve as for attention; returns the shape and dtype of x."""
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        if self.attn is not None:
            x = x + self.attn(norm(x), ve, attend)
        return x + self.mlp(norm(x))


class ValueEmbedding(nn.Module):
    """Three embeddings of the tokens, for the values of the first and of the last three layers.

    "Value Residual Learning" (Zhou et al., 2024) shows the gain of a path from input to values.
    """

    def __init__(self, vocab_size, dim, num_layers, dtype):
        super().__init__()
        self.num_layers = num_layers
        self.embed = nn.ModuleList(nn.Embedding(vocab_size, dim, dtype=dtype) for _ in range(3))

    def forward(self, input_seq):
        """Ids (T,) to an entry for each layer: (1, T, dim), or None for the layers between."""
        ve = [table(input_seq)[None] for table in self.embed]
        return ve + [None] * (self.num_layers - 6) + ve


def window_pattern(num_layers):
    """L for each layer with the long window, S for the short one: LSSSLSSLSSSL for 12.

    From each end to the middle, one long window is followed by three short ones.
    """
    half = "LSSS" * num_layers
    return half[: (num_layers + 1) // 2] + half[: num_layers // 2][::-1]


def document_block_mask(document, window, exact=False):
    """The mask of causal attention within documents and a window of blocks.

    document: number of each token's document, (T,), T a multiple of 128. window: W, 0-d int32.
    Query block i sees the key blocks i - W < j <= i; inside them query q sees key k when k <= q and
    both are in one document. exact: it sees k from q - 128 W on instead. Block i itself is partly
    visible. Documents are numbered in order, so the other visible blocks are a run that ends at
    i - 1. If block i lies in one document, its fully visible blocks, which a kernel need not mask,
    come first in this run; otherwise none is fully visible. So all lists are arithmetic. For the
    queries of a key, i and j change roles.
    """
    n = len(document) // BLOCK
    first, last = document[::BLOCK], document[BLOCK - 1 :: BLOCK]
    j = torch.arange(n, dtype=torch.int32, device=document.device)
    i = j[:, None]
    near = (j < i) & (j > i - window)
    some_near = near | (j == i - window) if exact else near
    some_pair = some_near & (last == first[:, None])  # j ends in the document in which i starts
    every_pair = near & (first == last[:, None])  # j starts in the document in which i ends

    def nearest_first(dim, direction):
        """Numbers and indices of the partly, then of the fully visible blocks of each block."""
        full = every_pair.sum(dim).int()
        partial = 1 + some_pair.sum(dim).int() - full
        beyond = torch.where(j > 0, full[:, None], 0)
        partial_blocks = i + direction * (j + beyond)
        full_blocks = i + direction * (j + 1)
        lists = partial, partial_blocks.clamp(0, n - 1), full, full_blocks.clamp(0, n - 1)
        return [t[None, None] for t in lists]

    def causal_in_document(b, h, q, k):
        visible = (k <= q) & (document[q] == document[k])
        return visible & (q - k <= BLOCK * window) if exact else visible

    keys = nearest_first(1, -1)
    queries = nearest_first(0, 1)
    return BlockMask((n * BLOCK, n * BLOCK), *keys, *queries, (BLOCK, BLOCK), causal_in_document)


def loss_sum(logits, target_seq):
    """Sum of the cross-entropies of logits (T, vocabulary) and targets (T,), -100 for none.

    Logits between 0 and 30 need no shift before exp. The target's logit is taken by a sum over the
    row, which the compiler fuses; the backward pass of a gather would fill a float32 tensor of (T,
    vocabulary).
    """
    vocabulary = torch.arange(logits.size(-1), device=logits.device)
    is_target = vocabulary == target_seq[:, None]
    losses = logits.exp().sum(-1).log() - torch.where(is_target, logits, 0.0).sum(-1)
    return torch.where(target_seq >= 0, losses, 0.0).sum()


class GPT(nn.Module):
    """The network, for one sequence at a time, which may hold any number of documents.

    Each layer of the second half adds the output of its mirror image in the first half, with a
    learned weight, as in "U-Net" (Ronneberger et al., 2015). The last token of the vocabulary
    starts a document.

    dtype: of the activations and the embeddings; the other weights are float32.
    train_seq_len: the loss of a longer sequence is computed in pieces of this many tokens.
    """

    def __init__(
        self,
        vocab_size,
        num_layers,
        num_heads,
        head_dim,
        model_dim,
        max_seq_len,
        *,
        attention_free_layer=7,
        dtype=torch.bfloat16,
        train_seq_len=None,
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.windows = window_pattern(num_layers)
        self.train_seq_len = train_seq_len or max_seq_len
        self.embed = nn.Embedding(vocab_size, model_dim, dtype=dtype)
        self.value_embeds = ValueEmbedding(vocab_size, num_heads * head_dim, num_layers, dtype)
        rotary = Rotary(head_dim, max_seq_len)  # one table for all layers
        self.blocks = nn.ModuleList(
            Block(model_dim, num_heads, head_dim, rotary, i != attention_free_layer)
            for i in range(num_layers)
        )
        self.skip_weights = nn.Parameter(torch.ones(num_layers // 2))
        self.lm_head = CastedLinear(model_dim, next_multiple_of_n(vocab_size, n=128))
        nn.init.zeros_(self.lm_head.weight)

    def create_block_masks(self, input_seq, sliding_window_num_blocks):
        """The long and the short mask for ids (T,), T a multiple of 128, and a 0-d int32 window W.

        The window of the short mask is max(1, W // 2).
        """
        document = (input_seq == self.vocab_size - 1).cumsum(0)
        long = document_block_mask(document, sliding_window_num_blocks)
        short = document_block_mask(document, (sliding_window_num_blocks // 2).clamp(min=1))
        return long, short

    def hidden(self, input_seq, sliding_window_num_blocks):
        """The input of the head: ids (T,) to (T, model_dim), normalized."""
        masks = self.create_block_masks(input_seq, sliding_window_num_blocks)
        long, short = map(attention_under, masks)
        ve = self.value_embeds(input_seq)
        x = x0 = norm(self.embed(input_seq)[None])
        n = len(self.blocks)
        outputs = []
        for i, block in enumerate(self.blocks):
            mirror = n - 1 - i  # the layer as far from the other end
            if mirror < i:
                x = x + self.skip_weights[i - n] * outputs[mirror]
            x = block(x, ve[i], x0, long if self.windows[i] == "L" else short)
            outputs.append(x)
        return norm(x)[0]

    def logits(self, hidden):
        """Scores of the next token: (T, model_dim) to float32 (T, vocabulary padded to 128s).

        They are 15 + 15 tanh(x / 15), the cap of "Gemma 2" (Gemma Team, 2024) and a constant,
        which the softmax ignores.
        """
        return 30 * torch.sigmoid(self.lm_head(hidden).float() / 7.5)

    def forward(self, input_seq, target_seq, sliding_window_num_blocks):
        """Mean cross-entropy in nats per token, 0-d float32.

        Ids (T,) int32, targets (T,) int64 with -100 where there is none, a window, 0-d int32.
        """
        hidden = self.hidden(input_seq, sliding_window_num_blocks)
        # The logits of a longer sequence, as in validation, might not fit on the card at once.
        n = self.train_seq_len
        total = sum(map(loss_sum, map(self.logits, hidden.split(n)), target_seq.split(n)))
        return total / (target_seq >= 0).sum()


# --------------------------------------------------------------------------------------------------
# Training step and validation


def choose_fp8(network, fp8, step_tokens):
    """Decide which matmuls are in FP8, and what their operands are multiplied by.

    fp8: "none", "head", or "all", with the hidden ones. step_tokens: over which the loss is
    averaged; the more there are, the larger the scale of gradients. e4m3 holds up to 448:
    activations up to 224, head weights up to 0.875, hidden ones up to 3.5. Squares, the input of an
    MLP's second layer, are larger than other activations.
    """
    # As in record #21. A logit's gradient is at most 1 / step_tokens, scaled at most 10.7. e5m2
    # reaches from 57344 down to 2**-16.
    grad_s = 2.0**19 * step_tokens / (48 * 1024)
    for name, layer in network.named_modules():
        if isinstance(layer, CastedLinear):
            is_head = layer is network.lm_head
            x_s = 0.5 if name.endswith("mlp.c_proj") else 2.0
            layer.use_fp8 = fp8 == "all" or (fp8 == "head" and is_head)
            layer.scales = x_s, 512.0 if is_head else 128.0, grad_s


def build_model(hp, vocab_size, machine):
    """The network on the machine's device. A seed gives the same weights on every device."""
    torch.manual_seed(hp.seed)
    network = GPT(
        vocab_size,
        hp.num_layers,
        hp.num_heads,
        hp.head_dim,
        hp.model_dim,
        max(hp.train_seq_len, hp.val_seq_len),
        attention_free_layer=hp.attention_free_layer,
        dtype=machine.dtype,
        train_seq_len=hp.train_seq_len,
    )
    if machine.supports_fp8:
        choose_fp8(network, hp.fp8, hp.seqs_per_step * hp.train_seq_len)
    return network.to(machine.device)


def build_optimizers(network, hp, machine):
    """Adam for embeddings, head and scalars; Muon for all other parameters, which are matrices."""
    embeds = [*network.embed.parameters(), *network.value_embeds.parameters()]
    groups = [
        dict(params=[network.lm_head.weight], lr=hp.head_lr),
        dict(params=embeds, lr=hp.embed_lr),
        dict(params=[p for p in network.parameters() if p.ndim < 2], lr=hp.scalar_lr),
    ]
    # The betas are those of record #21. Gradients of a mean over many tokens are small, and Adam's
    # usual eps of 1e-8 would not be small beside them. The drawback of 1e-10: while the projections
    # are still zero, the gradients of the scalars, zero on paper, are rounding errors of 1e-10 to
    # 3e-9, which Adam turns into full steps. Runs that differ in rounding alone differ from there.
    adam = torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-10, fused=True)
    of_adam = {p for group in groups for p in group["params"]}
    muon = Muon(
        [p for p in network.parameters() if p not in of_adam],
        lr=hp.muon_lr,
        rank=machine.rank,
        world_size=machine.world_size,
        dtype=machine.dtype,  # float32 asks for precise updates, too
    )
    return [adam, muon]


def set_rates(optimizers, factor, momentum):
    """Give the optimizers their momentum, and learning rates that are `factor` times the first."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor
            if "momentum" in group:
                group["momentum"] = momentum


def set_schedule(optimizers, step, hp, machine):
    """Give the optimizers a step's learning rates and momentum.

    Returns the third argument of the network: the step's window in blocks, 0-d int32 on the device.
    As a tensor it may grow without another compilation.
    """
    set_rates(optimizers, learning_rate_factor(step, hp), muon_momentum(step))
    return torch.full((), window_blocks(step, hp), dtype=torch.int32, device=machine.device)


def training_step(network, optimizers, batches, window, step, stop, hp, machine):
    """One optimizer step on the mean gradient over the global batch.

    batches: this process's micro-batches. stop: whether this process was asked to stop. Returns
    float32 (2,): the mean loss of the global batch, and how many processes were asked to stop.
    """
    result = torch.tensor([0.0, stop], device=machine.device)
    for inputs, targets in batches:
        loss = network(inputs, targets, window) / hp.seqs_per_step
        loss.backward()
        result[0] += loss.detach()
    adam, muon = optimizers
    sum_gradients(network.parameters(), muon.owner, result, machine)
    adam.step()
    muon.step()
    network.zero_grad()
    return result


@torch.no_grad()
def validate(network, loader, window, machine):
    """Mean loss in nats per token over exactly loader.num_tokens, shared by the processes."""
    network.eval()
    total = torch.zeros((), dtype=torch.float64, device=machine.device)
    for index in range(machine.rank, loader.num_sequences, machine.world_size):
        inputs, targets = loader.sequence(index)
        total += network(inputs, targets, window) * (targets >= 0).sum()
    network.train()
    if machine.world_size > 1:
        dist.all_reduce(total)
    return total.item() / loader.num_tokens


# --------------------------------------------------------------------------------------------------
# Log


def warn(sentence):
    """Print a line for a person, which never ends a run."""
    with contextlib.suppress(OSError):
        tqdm.write(sentence, file=sys.stderr)


class Log:
    """Standard output of process 0, and a file to which lines are appended.

    A line that cannot be written, as on a full disk, is reported once and clears `complete`.
    path: None for no output at all. new: the file must be empty or absent.
    Raises UserError if it is not, cannot be made, or is being written by another run.
    """

    def __init__(self, path, new=False):
        self.path = path
        self.complete = True
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"the log {path} cannot be made ({error.strerror}); change --log_dir or --run_id."
            ) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path}; wait for it, or end it.") from None
        except OSError:  # a file system without locks
            pass
        if new and self.file.tell() > 0:
            raise UserError(f"the log {path} exists; choose another --run_id, or --resume.")

    def line(self, text, shown=True):
        """Append a line. shown: on standard output, too."""
        if self.path is None:
            return
        try:
            print(text, file=self.file, flush=True)
        except OSError as error:
            if self.complete:
                warn(f"a line of the log is lost ({error.strerror}); training continues.")
            self.complete = False
        if shown:
            with contextlib.suppress(OSError):  # such as a closed pipe
                tqdm.write(text)


# --------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT_FILES = "step_*.pt"


def on(device, entry):
    """An optimizer's state of one parameter, with its tensors on a device."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in entry.items()}


def gather_state(optimizer, machine):
    """The optimizer's state_dict, with the state of parameters that other processes own.

    All processes call it together.
    """
    state_dict = optimizer.state_dict()
    if machine.world_size > 1 and hasattr(optimizer, "owner"):
        shares = [None] * machine.world_size
        own = {number: on("cpu", entry) for number, entry in state_dict["state"].items()}
        dist.all_gather_object(shares, own)
        for share in shares:
            state_dict["state"] |= share
    return state_dict


def save_checkpoint(path, state, keep, warns=True):
    """Write a checkpoint under a temporary name, and rename it when it is on the disk.

    Then delete all but the `keep` newest of the folder, which is this run's own. Returns whether it
    could be written. warns: print a line if not.
    """
    unfinished = path.with_name("unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        for other in newest_first(path.parent.glob(CHECKPOINT_FILES))[keep:]:
            other.unlink()
    except (OSError, RuntimeError) as error:  # torch.save turns the first into the second
        if warns:
            warn(f"{path} is not written ({error.__context__ or error}); training continues.")
        with contextlib.suppress(OSError):
            unfinished.unlink()  # makes room
        return False
    return True


def newest_first(paths):
    """Checkpoints in the order of writing, the last one first."""
    return sorted(sorted(paths), key=os.path.getmtime)[::-1]


def load_checkpoint(path):
    """A checkpoint in host memory. Loading never executes code of the file.

    Raises UserError if the file is missing, corrupt or not a checkpoint of this script.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare its checksums
            corrupt = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        if corrupt or "run_id" not in state:
            raise ValueError(corrupt)
    except Exception as error:  # a file may hold anything
        raise UserError(
            f"{path} is not a valid checkpoint ({type(error).__name__}); resume from another one."
        ) from None
    return state


def find_checkpoint(hp, config):
    """The checkpoint of --resume and its path, or the state of a new run and None.

    For "auto" it is the newest valid one of --run_id, or under --log_dir without one. Raises
    UserError if its config differs.
    """
    paths = [Path(hp.resume)] if hp.resume else []
    if hp.resume == "auto":
        folder = glob.escape(hp.run_id) or "**"
        paths = newest_first(Path(hp.log_dir).glob(f"{folder}/{CHECKPOINT_FILES}"))
    for path in paths:
        try:
            state = load_checkpoint(path)
        except UserError as error:
            if hp.resume != "auto":
                raise
            warn(str(error))
            continue
        check_equal(config, state["config"], "this run", f"{path}; use the same settings and data")
        return state, path
    return dict(step=0, ms=0.0, run_id=""), None


def load_state(state, network, optimizers, rank):
    """Load a checkpoint's weights, and of its optimizers the state that this process keeps.

    Raises UserError if it belongs to another network.
    """
    try:
        network.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(saved | dict(state={}))
            owner = getattr(optimizer, "owner", {})
            # load_state_dict would round state to the dtype of its parameter.
            for number, entry in saved["state"].items():
                p = parameters[number]
                if owner.get(p, rank) == rank:
                    optimizer.state[p] = on(p.device, entry)
    except (RuntimeError, ValueError, LookupError) as error:
        raise UserError(
            f"the checkpoint is of another network ({type(error).__name__}); resume it with the "
            "script that wrote it."
        ) from None


# --------------------------------------------------------------------------------------------------
# The run. A recipe is a module that provides SOURCE, Hyperparameters, PRESETS, open_loaders,
# build_model, build_optimizers, sequences_of_step, can_stop, set_schedule, training_step and
# validate, as this file does. Another script passes itself to `main`.


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage."""

    def error(self, message):
        raise UserError(f"{message}; --help lists all flags and presets, and globs need quotes.")


def parse_bool(text):
    return ["false", "true"].index(text.lower()) == 1  # argparse reports a ValueError


def parse_arguments(argv, recipe):
    """The settings of a command line. Raises UserError."""
    parser = Parser(
        usage="%(prog)s [--preset NAME] [--FLAG VALUE ...]",
        description=recipe.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        default="speedrun",
        choices=recipe.PRESETS,
        help="settings to start from (speedrun)",
    )
    meanings = dict(re.findall(r"^    (\w+): \w+ = .+  # (.+)$", recipe.SOURCE, re.MULTILINE))
    parsers = {bool: parse_bool, str: os.path.expanduser}
    for field in dataclasses.fields(recipe.Hyperparameters):
        values = [str(field.default)]
        values += [f"{n} {p[field.name]}" for n, p in recipe.PRESETS.items() if field.name in p]
        optional = dict(nargs="?", const=True) if field.type is bool else {}
        parser.add_argument(
            f"--{field.name}",
            type=parsers.get(field.type, field.type),
            metavar="X",
            help=f"{meanings.get(field.name)} ({', '.join(values)})".replace("%", "%%"),
            **optional,
        )
    given = vars(parser.parse_args(argv))
    return recipe.Hyperparameters(**recipe.PRESETS[given.pop("preset")] | given)


def check_work(hp, sequences, machine):
    """Raise UserError if processes cannot share a batch, or a CPU would take weeks.

    sequences: the number in each step's global batch.
    """
    if any(count % machine.world_size for count in sequences):
        raise UserError(
            f"{machine.world_size} processes cannot share {hp.seqs_per_step} sequences a step "
            "evenly; change --seqs_per_step or --nproc_per_node."
        )
    # 6 operations for each of the 12 dim**2 weights of a layer, and 50 GFLOP/s a core
    operations = 72 * hp.num_layers * hp.model_dim**2 * sum(sequences) * hp.train_seq_len
    days = operations / (5e10 * os.cpu_count()) / 86400
    if days > 7 and not machine.is_gpu:
        raise UserError(
            f"this run would take about {days:.0f} days on the CPU, and torch {torch.__version__} "
            "finds no CUDA GPU; use --preset tiny, or fewer --num_iterations."
        )


def header(network, machine, description, source):
    """The start of a log: the script's source, versions, hardware and settings."""
    cpu = f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    description |= dict(
        python=sys.version,
        hardware=torch.cuda.get_device_name() if machine.is_gpu else cpu,
        world_size=machine.world_size,
        parameters=sum(p.numel() for p in network.parameters()),
        head="FP8" if network.lm_head.use_fp8 else str(machine.dtype),
        attention="FlexAttention" if machine.is_gpu else "block-sparse, in place of FlexAttention",
    )
    lines = (f"{name}: {value}" for name, value in description.items())
    nvidia_smi = subprocess.run("nvidia-smi", shell=True, capture_output=True, text=True)
    return "\n".join([source, "=" * 100, nvidia_smi.stdout, *lines, "=" * 100])


def warm_up(network, train_loader, val_loader, hp, machine, recipe):
    """Compile and run every kernel on the first tokens, and restore the weights."""
    optimizers = recipe.build_optimizers(network, hp, machine)
    weights = {name: t.cpu().clone() for name, t in network.state_dict().items()}
    # The last schedule has the longest window, which needs the most memory.
    schedule = recipe.set_schedule(optimizers, hp.num_iterations, hp, machine)
    # A second micro-step, where there is one, needs memory for the gradients of the first as well.
    most = recipe.sequences_of_step(hp.num_iterations, hp) // machine.world_size
    batches = [train_loader.sequence(0)] * min(2, most)
    for step in range(2):  # a recipe may do other things in odd steps
        recipe.training_step(network, optimizers, batches, schedule, step, False, hp, machine)
    with torch.no_grad():
        network.eval()(*val_loader.sequence(0), schedule)
    network.train()
    network.load_state_dict(weights)


@torch.no_grad()
def sample(network, schedule, hp, machine):
    """Sample the start of a document, at most train_seq_len - 1 tokens.

    Bytes become text, and so do GPT-2's tokens where tiktoken is installed; others are numbers.
    """
    network.eval()
    torch.manual_seed(hp.seed)
    boundary = network.vocab_size - 1
    length = min(hp.sample, hp.train_seq_len - 1)
    context = next_multiple_of_n(length + 1, n=BLOCK)
    ids = torch.full((context,), boundary, dtype=torch.int32, device=machine.device)
    # FlexAttention respects the lists of blocks only where it is compiled.
    hidden = torch.compile(network.hidden, dynamic=False) if machine.is_gpu else network.hidden
    for i in range(length):
        logits = network.logits(hidden(ids, schedule)[i])
        ids[i + 1] = torch.multinomial(logits[:boundary].softmax(-1), 1)
    tokens = ids[1 : length + 1].tolist()
    if network.vocab_size == 257:
        return bytes(tokens).decode(errors="replace")
    if network.vocab_size == GPT2_VOCAB:
        with contextlib.suppress(Exception):  # not installed, or without its vocabulary
            import tiktoken

            return tiktoken.get_encoding("gpt2").decode(tokens)
    return str(tokens)


def open_run(hp, resumed_id, checkpoint, machine):
    """The folder of the run's checkpoints, and its log.

    Raises UserError if another run's files have their names.
    """
    new_id = time.strftime("%Y-%m-%d_%H%M%S_") + os.urandom(3).hex()
    folder = Path(hp.log_dir) / (hp.run_id or resumed_id or new_id)
    continues = checkpoint and checkpoint.parent.resolve() == folder.resolve()
    if machine.rank > 0:
        return folder, Log(None)
    if not continues and any(folder.glob(CHECKPOINT_FILES)):
        raise UserError(
            f"{folder} holds checkpoints of an earlier run; choose another --run_id, or --resume "
            "one of them."
        )
    return folder, Log(Path(f"{folder}.txt"), new=not continues and hp.resume != "auto")


def train(hp, recipe):
    """Prepare everything, then train.

    Returns the exit code: 0, or 128 + N after a stop by signal N, or 1 where the log or the last
    checkpoint could not be written. Raises UserError at the first thing that is missing or wrong.
    """
    configure_torch(recipe.SOURCE)
    machine = detect_machine(hp.dtype)
    last = hp.num_iterations
    sequences = [recipe.sequences_of_step(step, hp) for step in range(last)]
    check_work(hp, sequences, machine)
    train_loader, val_loader = recipe.open_loaders(hp, machine, sum(sequences))
    config = vars(hp) | dict(activations=str(machine.dtype), train_shards=train_loader.summary())
    description = config | dict(
        script=hashlib.sha256(recipe.SOURCE.encode()).hexdigest()[:12],
        torch=torch.__version__,
        val_shards=val_loader.summary(),
    )
    for name in FREE_SETTINGS:
        del config[name]
    state, checkpoint = find_checkpoint(hp, config)
    first = state["step"]
    folder, log = open_run(hp, state["run_id"], checkpoint, machine)
    description["resumed"] = state["run_id"], first
    # From here on processes wait for each other.
    start_processes(description | dict.fromkeys(PATHS), machine)

    network = recipe.build_model(hp, train_loader.vocab_size, machine)
    if machine.is_gpu:
        network.compile(dynamic=False, fullgraph=True)
    if machine.rank == 0:
        log.line(header(network, machine, description, recipe.SOURCE), shown=False)
    warm_up(network, train_loader, val_loader, hp, machine, recipe)
    optimizers = recipe.build_optimizers(network, hp, machine)
    if checkpoint:
        load_state(state, network, optimizers, machine.rank)
        log.line(f"resumed from step {first} of {checkpoint}")
    train_loader.position = sum(sequences[:first])
    bar = tqdm(
        total=sum(sequences) * hp.train_seq_len,
        initial=train_loader.position * hp.train_seq_len,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=machine.rank > 0 or None,  # None: where stderr is not a terminal
    )
    loss = math.nan  # of the last step
    stopping = False  # whether a process was asked to stop
    saved = True  # whether the last checkpoint could be written

    def report(fields, shown=True):
        log.line(f"step:{step}/{last} {fields}", shown)
        if not math.isfinite(loss):
            place = "see process 0" if machine.rank else checkpoint or "none"
            raise UserError(
                f"the loss after step {step} is {loss}; lower the learning rates, or look at the "
                f"data; the last checkpoint: {place}."
            )

    def next_batches(step):
        share = sequences[step] // machine.world_size if step < last else 0
        return [train_loader.next_batch() for _ in range(share)]

    batches = next_batches(first)
    ms = state["ms"]  # of training, without compilation, validation and saving
    state = None  # frees the checkpoint's copy in host memory
    started = time.perf_counter()
    with bar, stop_signals() as signals:
        for step in range(first, last + 1):
            schedule = recipe.set_schedule(optimizers, step, hp, machine)
            ms += 1000 * (time.perf_counter() - started)
            times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
            if step > first:
                bar.set_postfix_str(f"step {step}, train_loss {loss:.4f}", refresh=False)
                bar.update(sequences[step - 1] * hp.train_seq_len)
                report(f"{times} train_loss:{loss:.4f}", shown=bar.disable)
            can_stop = recipe.can_stop(step)
            ends = step == last or (stopping and can_stop)
            validates = hp.val_loss_every and step % hp.val_loss_every == 0
            if step == last or (validates and not ends):
                loss = recipe.validate(network, val_loader, schedule, machine)
                report(f"val_loss:{loss:.4f} {times}")
            saves = hp.save_every and (ends or (can_stop and step % hp.save_every == 0))
            if saves and step > first:
                path = folder / f"step_{step:08d}.pt"
                state = dict(
                    step=step,
                    run_id=folder.name,
                    ms=ms,
                    config=config,
                    model=network.state_dict(),
                    optimizers=[gather_state(optimizer, machine) for optimizer in optimizers],
                )
                saved = machine.rank > 0 or save_checkpoint(path, state, hp.keep, saved)
                checkpoint = path if saved else checkpoint
            if ends:
                break
            started = time.perf_counter()
            result = recipe.training_step(
                network, optimizers, batches, schedule, step, bool(signals), hp, machine
            )
            batches = next_batches(step + 1)  # while a GPU works
            loss, stopping = result.tolist()  # waits for all work of this step

    if step < last:
        number = signals[0] if signals else signal.SIGTERM  # received by another process
        how = "nothing is saved without --save_every"
        if checkpoint:
            how = f"to continue, add --resume {shlex.quote(str(checkpoint))}"
        log.line(f"stopped by {signal.Signals(number).name} after step {step}; {how}")
        return 128 + number
    log.line(f"tokens per second: {bar.total / ms * 1000:.0f}")
    log.line(
        f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB "
        f"reserved: {torch.cuda.max_memory_reserved() >> 20} MiB"  # 0 without a GPU
    )
    if hp.sample and machine.rank == 0:
        log.line("sample: " + sample(network, schedule, hp, machine))
    log.line(f"log: {log.path}")
    return int(not (log.complete and saved))


def main(argv=None, recipe=None):
    """Run a recipe (default: this module) with the flags in argv (default: the command line's).

    Returns the exit code: 0, 1 where something could not be written, 2 after an error that the user
    can fix, 128 + N after a stop by signal N.
    """
    recipe = recipe or sys.modules[__name__]
    if hasattr(sys.stdout, "reconfigure"):
        # A sample may not fit the encoding of a terminal, and pipes want each line at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        code = train(parse_arguments(argv, recipe), recipe)
    except UserError as error:
        code = 2
        warn(f"{Path(recipe.__file__).name}: {error}")
    except torch.OutOfMemoryError:
        code = 2
        warn(
            "out of memory; half of --train_seq_len and twice --seqs_per_step train on as many "
            "tokens a step in smaller parts, a lower --val_seq_len does so in validation, and "
            "README.md has flags for each card."
        )
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if dist.is_initialized():
        if code in (1, 2):
            os._exit(code)  # shutting NCCL down would wait for processes that continue
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
