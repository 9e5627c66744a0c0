"""Train a GPT to the speedrun's loss with three fifths of its compute: the recipe of January 2026.

The defaults are the public record #62, "Bigram Hash Embedding". Command line, processes, log,
checkpoints and training loop are those of train_gpt.py; its settings, network, optimizers, loader,
schedule and training step are replaced here.

    torchrun --standalone --nproc_per_node=8 records/modern/train_modern.py
    python records/modern/train_modern.py --preset tiny

README.md lists the ideas with their sources, and the settings that turn them off.
"""

import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[2]))

import train_gpt  # noqa: E402
from train_gpt import BLOCK, CastedLinear, UserError, norm  # noqa: E402

SOURCE = train_gpt.SOURCE + Path(__file__).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Settings and schedules


@dataclasses.dataclass
class Hyperparameters(train_gpt.Hyperparameters):
    """The settings of train_gpt.py with other defaults, and those of this recipe's ideas."""

    # The network
    num_layers: int = 11  # layers
    attention_free_layer: int = 6  # the layer without attention; num_layers for none
    max_window: int = 13 * BLOCK  # attention window at the end of training, in tokens
    fp8: str = "head"  # matmul of the head in FP8 on GPUs that support it: none or head
    key_offset: bool = True  # layers with the long window: half a key is the previous token's
    paired_heads: bool = True  # in four layers, each head attends to another one's keys, too
    bigrams: int = 5  # size of the bigram table in vocabularies; 0 for none
    smear: bool = True  # add a part of the previous embedding to each one
    # Training
    train_seq_len: int = 16 * 1024  # tokens of a training sequence, one micro-step
    num_iterations: int = 1600  # steps; the last fortieth comes after the schedule
    cooldown_frac: float = 0.55  # fraction of the schedule over which learning rates decay
    embed_lr: float = 0.6  # learning rate of value and bigram embeddings (Adam)
    head_lr: float = 0.008  # learning rate of the head and its embedding (Adam)
    scalar_lr: float = 0.04  # learning rate of the scalars; gates have parts of it (Adam)
    muon_lr: float = 0.023  # learning rate of the hidden matrices (NorMuon)
    growing_batch: bool = True  # 2 and 3 times seqs_per_step in the schedule's later thirds
    predict: int = 3  # number of next tokens to predict at first, up to 3
    normuon: bool = True  # normalize the update of each neuron
    decay: float = 1.0  # factor of all cautious weight decays
    # Data
    pack: bool = True  # training sequences consist of documents from their start
    max_document: int = 2048  # tokens of a document when packed

    def check(self):
        """Raise UserError at the first setting that cannot be right."""
        super().check()
        self.require(self.num_layers >= 11, "num_layers", "at least 11")
        self.require(self.fp8 != "all", "fp8", "none or head")
        even = self.num_heads % 2 == 0
        self.require(even or not self.paired_heads, "num_heads", "even for --paired_heads")
        self.require(1 <= self.predict <= 3, "predict", "1, 2 or 3")
        self.require(self.max_document > 0, "max_document", "positive")


PRESETS = {
    "speedrun": {},
    "tiny": train_gpt.PRESETS["tiny"]
    | dict(  # the steps have 1, 2 and 3 thousand tokens
        num_layers=11,
        attention_free_layer=6,
        train_seq_len=512,
        cooldown_frac=0.55,
        muon_lr=0.016,
        pack=False,  # few long texts: packing would leave most of their tokens out
    ),
}


def scheduled_steps(hp):
    """Number of steps of the schedule. The last fortieth of the run comes after them."""
    return hp.num_iterations - hp.num_iterations // 40


def stage_of_step(step, hp):
    """0, 1 and 2 for the thirds of the schedule, 3 for the steps after."""
    return min(3 * step // scheduled_steps(hp), 3)


def sequences_of_step(step, hp):
    """Number of sequences in a step's global batch.

    "Don't Decay the Learning Rate, Increase the Batch Size" (Smith et al., 2018)
    """
    factor = (1, 2, 3, 3)[stage_of_step(step, hp)]
    return hp.seqs_per_step * (factor if hp.growing_batch else 1)


def learning_rate_factor(step, hp):
    """Higher for larger batches, with a linear cooldown to 0.1."""
    progress = step / scheduled_steps(hp)
    peak = 1.0
    if hp.growing_batch:
        peak = 1.0 if progress <= 1 / 3 else 1.52 if progress <= 2 / 3 else 1.73
    warm = min(1, max(0, 1 - progress) / hp.cooldown_frac)
    return peak * warm + 0.1 * (1 - warm)


def muon_momentum(step, hp):
    """From 0.85 to 0.95 over 300 steps, and back over the last 50."""
    return 0.85 + 0.1 * min(step / 300, 1, (hp.num_iterations - step) / 50)


def target_weights(step, hp):
    """Weights of the next tokens in the loss. One of them fades out in each of the first thirds.

    "Better & Faster Large Language Models via Multi-token Prediction" (Gloeckle et al., 2024)
    """
    third = 3 * step / scheduled_steps(hp)
    second_token = min(1, max(0, 2 - third)) / 2
    third_token = max(0, 1 - third) / 4
    return [1.0, second_token, third_token][: hp.predict]


def window_blocks(stage, hp):
    """The long window of a stage in blocks of 128 tokens. Stage 4 is the last validation."""
    return max(1, round((3, 7, 11, 13, 20)[stage] / 13 * hp.max_window / BLOCK))


def yarn(stage, hp):
    """Rotary frequencies, radians a token (head_dim / 4,), and the scale of the scores.

    Where the window grows, frequencies of less than one turn in it shrink by the same factor, those
    of more than 32 turns stay, and scores become sharper. "YaRN: Efficient Context Window Extension
    of Large Language Models" (Peng et al., 2023)
    """
    frequencies = (1 / 1024) ** torch.linspace(0, 1, hp.head_dim // 4)
    scale = 0.1
    windows = [window_blocks(s, hp) for s in range(stage + 1)]
    for before, after in itertools.pairwise(windows):
        turns = BLOCK * before * frequencies / (2 * math.pi)
        stays = ((turns - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (before / after + stays * (1 - before / after))
        scale *= 1 + 0.2 * math.log(after / before)
    return frequencies, scale


class Schedule(NamedTuple):
    """What changes in the network during training. As tensors, they need no new compilation."""

    windows: Tensor  # (2,) int32: the long and the short window in blocks
    frequencies: Tensor  # (head_dim / 4,): radians a token
    scale: Tensor  # 0-d: of the attention scores
    target_weights: Tensor  # (predict,)


# --------------------------------------------------------------------------------------------------
# Data


class PackingDataLoader(train_gpt.DistributedDataLoader):
    """Training sequences of documents from their start, each cut to max_document tokens.

    Every shard by itself: its documents fill sequences in their order. What is left of a sequence's
    last document is skipped, and so are the last documents of a shard, which fill none. Raises
    UserError where a shard has no documents, or all shards have too few.
    """

    def __init__(self, filename_pattern, seq_len, *, max_document, **options):
        super().__init__(filename_pattern, seq_len, **options)
        self.packed = []  # of each sequence, the first tokens and the lengths of its documents
        for path, start, length in zip(self.files, self.starts, self.lengths, strict=True):
            boundaries = np.flatnonzero(self.read(start, length) == self.vocab_size - 1)
            lengths = np.diff(boundaries, append=length).clip(max=max_document)
            if not len(boundaries):
                raise UserError(
                    f"{path} has no token {self.vocab_size - 1}, which starts a document; leave it "
                    "out, or add --pack false."
                )
            before = np.cumsum(np.append(0, lengths))  # tokens before each document
            first = 0
            while before[-1] >= (end := before[first] + seq_len + 1):
                last = np.searchsorted(before, end)
                self.packed.append((start + boundaries[first:last], lengths[first:last]))
                first = last
            if len(self.packed) >= self.num_sequences and not self.shuffle:
                break
        needed = 1 if options["repeat"] else self.num_sequences
        if len(self.packed) < needed:
            raise UserError(
                f"{filename_pattern} has documents for {len(self.packed)} sequences of {seq_len} "
                f"tokens, and the run needs {needed}; add shards, lower --num_iterations, or add "
                "--repeat or --pack false."
            )

    def sequence(self, index):
        """Sequence `index`: inputs (seq_len,) int32 and targets (seq_len,) int64 on the device."""
        epoch, place = divmod(index, len(self.packed))
        if self.shuffle:
            place = np.random.default_rng(epoch).permutation(len(self.packed))[place]
        documents = [
            self.read(int(start), int(n)) for start, n in zip(*self.packed[place], strict=True)
        ]
        return self.to_device(np.concatenate(documents)[: self.seq_len + 1], self.seq_len)


def open_loaders(hp, machine, num_sequences):
    """The loaders of the training and of the validation tokens. Raises UserError."""
    loader = train_gpt.DistributedDataLoader
    if hp.pack:
        loader = functools.partial(PackingDataLoader, max_document=hp.max_document)
    return train_gpt.open_loaders(hp, machine, num_sequences, loader)


# --------------------------------------------------------------------------------------------------
# Optimizers


POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G, steps, dtype):
    """Approximately the nearest orthogonal matrices to G (..., rows, cols), in `dtype`.

    The polynomial of each step is the best one for what the step before leaves. "The Polar Express"
    (Amsel et al., 2025)
    """
    X = (G / (1.02 * G.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    tall = G.size(-2) > G.size(-1)
    if tall:
        X = X.mT  # the products below are (rows, rows), so rows should be the shorter side
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class NorMuon(train_gpt.Muon):
    """Muon with updates normalized by neuron, "NorMuon" (Li et al., 2025), and with weight decay.

    A matrix has a neuron for each row, and a wide one for each column. decay: of weights whose
    update has their sign, in learning rates, "Cautious Weight Decay" (Chen et al., 2025).
    """

    zeropower = staticmethod(polar_express)

    def __init__(self, params, *, normalize, decay, **options):
        super().__init__(params, **options)
        self.normalize = normalize
        self.decay = decay

    def orthogonal_updates(self, group, own):
        """Advance the state of parameters of one shape. Returns their updates (n, *shape)."""
        weights = torch.stack(own)
        updates = super().orthogonal_updates(group, own).type_as(weights)
        if self.normalize:
            length = torch.linalg.matrix_norm(updates, keepdim=True)
            axis = -1 if updates.size(-2) >= updates.size(-1) else -2
            for p, power in zip(own, updates.square().mean(axis, keepdim=True), strict=True):
                self.state[p].setdefault("power", torch.zeros_like(power)).lerp_(power, 0.05)
            power = torch.stack([self.state[p]["power"] for p in own])
            updates *= power.clamp(min=1e-10).rsqrt()
            updates *= length / torch.linalg.matrix_norm(updates, keepdim=True).clamp(min=1e-10)
        agree = updates * weights >= 0
        return updates + self.decay * group["lr"] * weights * agree


def adam_update(p, grad, m, v, numbers):
    """Adam of one tensor, in place, with weight decay where it has the sign of the update.

    numbers (5,): 1 - beta1, 1 - beta2, learning rate over 1 - beta1 ** t, root of 1 - beta2 ** t,
    and decay.
    """
    weight1, weight2, lr, correction, decay = numbers
    grad = grad.type_as(m)
    m.lerp_(grad, weight1)
    v.lerp_(grad.square(), weight2)
    update = lr * correction * m / (v.sqrt() + 1e-10)
    p.copy_(p - update - decay * p * (update * p > 0))


@functools.cache
def compiled(function):
    """One kernel for matrices of any size, instead of a dozen: the tables are large."""
    return torch.compile(function, dynamic=True)


class CautiousAdam(torch.optim.Optimizer):
    """Adam with cautious weight decay, of parameters with a gradient. Its moments are float32.

    A group has lr, betas, decay (in squares of lr), and t, the number of its next step.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr, t = group["betas"], group["lr"], group["t"]
            corrections = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
            numbers = [1 - beta1, 1 - beta2, *corrections, lr**2 * group["decay"]]
            numbers = torch.tensor(numbers, device=group["params"][0].device)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    zeros = torch.zeros_like(p, dtype=numbers.dtype)
                    self.state[p] = dict(m=zeros, v=zeros.clone())
                update = compiled(adam_update) if p.is_cuda and p.ndim == 2 else adam_update
                # p.data: the shape of a Parameter would be part of the compiled code.
                update(p.data, p.grad, self.state[p]["m"], self.state[p]["v"], numbers)


# --------------------------------------------------------------------------------------------------
# Network


def gate(x, weight):
    """A sigmoid of the first channels: x (T, dim), weight (n, 12), to (T, n)."""
    return torch.sigmoid(F.linear(x[:, : weight.size(1)], weight.type_as(x)))


def bigram_rows(ids, last):
    """Row of the bigram table for each of the ids (T,) int32, from a hash with the id before.

    Position 0 has the last row, whose number also stands for its id in the hash of position 1. The
    products wrap around.
    """
    ids = F.pad(ids[1:], (1, 0), value=last)
    hashed = (36313 * ids[1:]) ^ (27191 * ids[:-1])
    return torch.cat([ids[:1], hashed.remainder(last)])


def rotary(position, frequencies, dtype):
    """cos and sin of positions (T, heads or 1): (T, heads or 1, head_dim / 4)."""
    angle = position[..., None] * frequencies
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x, cos, sin):
    """Turn neighbouring channels of the first half of x (T, heads, head_dim), and keep the rest."""
    turning, still = x.chunk(2, dim=-1)
    a, b = turning.reshape(*x.shape[:2], -1, 2).unbind(-1)
    turned = torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1)
    return torch.cat([turned.flatten(-2), still], dim=-1)


def attention_within(document, window):
    """Attention to the document's rows from `window` blocks before the query on."""
    return train_gpt.attention_under(train_gpt.document_block_mask(document, window, exact=True))


class CausalSelfAttention(train_gpt.CausalSelfAttention):
    """Attention with a gate on each head, "Gated Attention" (Qiu et al., 2025).

    paired: a token has two rows, one with the first half of its heads and one with the second, so
    that each head attends to the keys of another one as well.
    key_offset: the channels that do not turn come from the previous token's key, so that a query
    finds what followed an earlier token like its own.
    """

    def __init__(self, hp, layer, has_values):
        super().__init__(hp.model_dim, hp.num_heads, hp.head_dim, rotary=None)
        self.paired = hp.paired_heads and layer in (0, 2, 5, 9)
        self.long = layer in (3, hp.num_layers - 1)
        self.key_offset = hp.key_offset and self.long
        self.qkv.weight.data *= 2  # a standard deviation of 1 / sqrt(model_dim)
        self.lambdas.data[1] = 1.0
        self.gate = nn.Parameter(torch.zeros(hp.num_heads, 12))
        self.value_gate = nn.Parameter(torch.zeros(hp.num_heads, 12)) if has_values else None

    def forward(self, x, ve, scale, turn, attend):
        """x (T, dim), ve (T, num_heads * head_dim) or None, turn (cos, sin); returns (T, dim)."""
        T = len(x)
        heads = self.num_heads, self.head_dim
        q, k, v = self.qkv(x).view(T, 3, *heads).unbind(1)
        q = rotated(norm(q), *turn) * scale
        k = rotated(norm(k), *turn)
        if self.key_offset:
            turning, still = k.chunk(2, dim=-1)
            k = torch.cat([turning, torch.cat([still[:1], still[:-1]])], dim=-1)
        v = self.lambdas[0] * v
        if ve is not None:
            v = v + 2 * gate(x, self.value_gate)[..., None] * ve.view_as(v)
        if self.paired:
            q, k, v = (t.reshape(2 * T, -1, self.head_dim) for t in (q, k, v))
        y = attend(*(t.transpose(0, 1)[None] for t in (q, k, v)), scale=1.0)
        y = y[0].transpose(0, 1).reshape(T, *heads) * gate(x, self.gate)[..., None]
        return self.lambdas[1] * self.c_proj(y.flatten(1))


class GPT(nn.Module):
    """The network, for one sequence at a time.

    Layer 6 also reads the output of layer 3, by a gate, and the head does without a part of layer
    7's output. dtype: of the activations and the embeddings; the other weights are float32.
    """

    def __init__(self, vocab_size, hp, fp8, dtype):
        super().__init__()
        self.vocab_size = vocab_size
        self.hp = hp
        n = hp.num_layers
        self.attentions = nn.ModuleList(
            None
            if i == hp.attention_free_layer
            else CausalSelfAttention(hp, i, has_values=i < 2 or i >= n - 3)
            for i in range(n)
        )
        self.mlps = nn.ModuleList(train_gpt.MLP(hp.model_dim) for _ in range(n))
        rows = train_gpt.next_multiple_of_n(vocab_size, n=128)
        # The loss is a sum over tokens, divided by the first batch's number of sequences.
        grad_s = 448 / 0.75 * hp.seqs_per_step
        self.lm_head = CastedLinear(hp.model_dim, rows, fp8, 448 / 100, 448 / 1.6, grad_s)
        nn.init.normal_(self.lm_head.weight, std=0.005)

        def table(rows, columns):
            return nn.Embedding.from_pretrained(torch.zeros(rows, columns, dtype=dtype), False)

        self.embed = table(rows, hp.model_dim)
        self.embed.weight.data.copy_(self.lm_head.weight.data)
        self.value_embeds = nn.ModuleList(table(rows, hp.num_heads * hp.head_dim) for _ in range(3))
        self.bigrams = table(hp.bigrams * rows, hp.model_dim)
        self.residual = nn.Parameter(torch.full((n,), 1.1))
        self.from_input = nn.Parameter(torch.zeros(n))
        self.from_bigrams = nn.Parameter(torch.full((n,), 0.1))
        self.smear = nn.Parameter(torch.tensor(0.0), requires_grad=hp.smear)
        self.smear_gate = nn.Parameter(torch.zeros(1, 12))
        self.skip = nn.Parameter(torch.tensor(-1.5))
        self.skip_gate = nn.Parameter(torch.zeros(1, 12))
        self.backout = nn.Parameter(torch.tensor(0.5))

    def hidden(self, input_seq, schedule):
        """The input of the head: ids (T,) to (T, model_dim), normalized."""
        e = self.embed(input_seq)
        smeared = e[1:] + self.smear * gate(e[1:], self.smear_gate) * e[:-1]
        x = x0 = norm(torch.cat([e[:1], smeared]))
        bigrams = 0.0
        if self.hp.bigrams:
            bigrams = self.bigrams(bigram_rows(input_seq, len(self.bigrams.weight) - 1))
        ve = [table(input_seq) for table in self.value_embeds]
        ve = ve[1:] + [None] * (len(self.mlps) - 5) + ve

        document = (input_seq == self.vocab_size - 1).cumsum(0)
        two_rows = document.repeat_interleave(2)
        long, short = schedule.windows
        long = attention_within(document, long)
        paired = attention_within(two_rows, short)
        short = attention_within(document, short)
        position = torch.arange(len(input_seq), device=input_seq.device)[:, None]
        # In paired heads the position depends on the head's number and not on its row.
        parity = torch.arange(self.hp.num_heads, device=input_seq.device) % 2
        turn = rotary(position, schedule.frequencies, x.dtype)
        turn_paired = rotary(2 * position + parity, schedule.frequencies, x.dtype)

        outputs = []
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            if i == 6:
                x = x + 2 * self.skip.sigmoid() * gate(x0, self.skip_gate) * outputs[3]
            x = self.residual[i] * x + self.from_input[i] * x0 + self.from_bigrams[i] * bigrams
            if attention is not None:
                place = (turn, long) if attention.long else (turn, short)
                if attention.paired:
                    place = turn_paired, paired
                x = x + attention(norm(x), ve[i], schedule.scale, *place)
            x = x + mlp(norm(x))
            outputs.append(x)
        return norm(x - self.backout * outputs[7])

    def logits(self, hidden):
        """Scores of the next token: (T, model_dim) to float32 (T, padded vocabulary), 0 to 23."""
        return 23 * torch.sigmoid((self.lm_head(hidden).type_as(self.backout) + 5) / 7.5)

    def forward(self, input_seq, target_seq, schedule):
        """Losses in nats. In training, sums over the next tokens and those after: (predict,).

        In validation the mean cross-entropy of the next token, 0-d. Ids (T,) int32, targets (T,)
        int64 with -100 where there is none.
        """
        hidden = self.hidden(input_seq, schedule)
        if self.training:
            return self.loss_sums(hidden, target_seq, self.hp.predict)
        # The logits of a longer sequence might not fit on the card at once.
        n = self.hp.train_seq_len
        parts = zip(hidden.split(n), target_seq.split(n), strict=True)
        total = sum(self.loss_sums(*part, 1) for part in parts)
        return total[0] / (target_seq >= 0).sum()

    def loss_sums(self, hidden, target_seq, predict):
        """Summed cross-entropies of the tokens 1, 2, ... `predict` positions ahead."""
        logits = self.logits(hidden)
        normalizer = logits.exp().sum(-1).log()  # logits up to 23 need no shift
        vocabulary = torch.arange(logits.size(-1), device=logits.device)
        sums = []
        for ahead in range(predict):
            target = F.pad(target_seq[ahead:], (0, ahead), value=-100)
            picked = torch.where(vocabulary == target[:, None], logits, 0.0).sum(-1)
            sums.append(torch.where(target >= 0, normalizer - picked, 0.0).sum())
        return torch.stack(sums)


# --------------------------------------------------------------------------------------------------
# Training step


def build_model(hp, vocab_size, machine):
    """The network on the machine's device. A seed gives the same weights on every device."""
    torch.manual_seed(hp.seed)
    fp8 = hp.fp8 == "head" and machine.supports_fp8
    return GPT(vocab_size, hp, fp8, machine.dtype).to(machine.device)


def build_optimizers(model, hp, machine):
    """Adam for embeddings, head, gates and scalars; NorMuon for the matrices between."""
    layers = [*model.attentions.named_parameters(), *model.mlps.named_parameters()]
    gates = [p for name, p in layers if name.endswith("gate")]
    matrices = [p for name, p in layers if name.endswith("weight")]
    for mlp in model.mlps:
        mlp.c_proj.weight.lr_mul = 4.0
    scalars = [p for p in model.parameters() if p.ndim < 2 and p is not model.from_input]

    def group(params, lr, betas, decay=0.0):
        return dict(params=params, lr=lr, betas=betas, decay=hp.decay * decay)

    tables = [*model.value_embeds.parameters(), model.bigrams.weight]
    groups = [
        group([model.lm_head.weight, model.embed.weight], hp.head_lr, (0.5, 0.95), 0.75),
        group(tables, hp.embed_lr, (0.75, 0.95), 0.025),
        group(scalars, hp.scalar_lr, (0.9, 0.99)),
        group([model.from_input], hp.scalar_lr, (0.65, 0.95)),
        group(gates, hp.scalar_lr / 5, (0.9, 0.99), 0.005),
        group([model.skip_gate], hp.scalar_lr / 100, (0.9, 0.99)),
        group([model.smear_gate], hp.scalar_lr / 500, (0.9, 0.99)),
    ]
    muon = NorMuon(
        matrices,
        normalize=hp.normuon,
        decay=1.2 * hp.decay,
        lr=hp.muon_lr,
        rank=machine.rank,
        world_size=machine.world_size,
        dtype=machine.dtype,
    )
    return [CautiousAdam(groups, dict(t=1)), muon]


def set_schedule(optimizers, step, hp, machine):
    """Give the optimizers a step's learning rates and momentum. Returns the network's schedule."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * learning_rate_factor(step, hp)
            group["momentum"] = muon_momentum(step, hp)
            group["t"] = step // 2 + 1  # of Adam, which steps after every second batch
    stage = stage_of_step(step, hp)
    long = window_blocks(stage, hp)
    short = max(1, long // 2)
    if step == hp.num_iterations:
        long = window_blocks(4, hp)
    frequencies, scale = yarn(stage, hp)
    weights = torch.tensor(target_weights(step, hp))
    tensors = torch.tensor([long, short], dtype=torch.int32), frequencies, torch.tensor(scale)
    return Schedule(*(t.to(machine.device) for t in (*tensors, weights)))


def untie_step(hp):
    """The step after which embedding and head are two: an odd one, at two thirds of the schedule.

    Tied before: "Using the Output Embedding to Improve Language Models" (Press & Wolf, 2017)
    """
    return math.ceil(2 * scheduled_steps(hp) / 3) | 1


def can_stop(step):
    """Whether no gradients are kept for the next step."""
    return step % 2 == 0


def training_step(model, optimizers, batches, schedule, step, stop, hp, machine):
    """One step of Muon, and of Adam in odd steps, with the gradients of two.

    batches: this process's micro-batches. stop: whether this process was asked to stop. Returns
    float32 (2,): the mean loss of the next token, and how many processes were asked to stop.
    """
    total = torch.zeros((), device=machine.device)
    for inputs, targets in batches:
        losses = model(inputs, targets, schedule)
        # Not the batch's number of sequences: with it, the gradients grow.
        (losses @ schedule.target_weights / hp.seqs_per_step).backward()
        total += losses[0].detach()
    mean = total / (sequences_of_step(step, hp) * hp.train_seq_len)
    result = torch.stack([mean, torch.full_like(mean, stop)])
    adam, muon = optimizers
    head, embed = model.lm_head.weight, model.embed.weight
    adam_steps = step % 2 == 1
    tied = adam_steps and step <= untie_step(hp)
    if tied:
        head.grad += embed.grad
        embed.grad = None
    parameters = model.parameters() if adam_steps else muon.owner
    train_gpt.sum_gradients(parameters, muon.owner, result, machine)
    muon.step()
    muon.zero_grad()
    if adam_steps:
        adam.step()
        adam.zero_grad()
    if tied:
        embed.data.copy_(head.data)
    if step == untie_step(hp):
        adam.state[embed] = {name: t.clone() for name, t in adam.state[head].items()}
    return result


validate = train_gpt.validate


if __name__ == "__main__":
    sys.exit(train_gpt.main(recipe=sys.modules[__name__]))
