"""Train a GPT to the speedrun's loss with three fifths of its compute: the recipe of January 2026.

The defaults are the public record #62, "Bigram Hash Embedding". Command line, processes, log,
checkpoints and training loop are those of train_gpt.py; its settings, network, optimizers, loader,
schedule and training step are replaced here.

    torchrun --standalone --nproc_per_node=8 records/modern/train_modern.py
    python records/modern/train_modern.py --preset tiny

Not yet run on a GPU. records/modern/README.md lists the ideas with their sources, and the settings
that turn them off.
"""

import dataclasses
import functools
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
    max_window: int = 13 * BLOCK  # attention window in tokens in the last stage; then 20/13 of it
    fp8: str = "head"  # matmul of the head in FP8 on GPUs that support it: none or head
    key_offset: bool = True  # layers with the long window: half a key is the previous token's
    paired_heads: bool = True  # in four layers, each head attends to another one's keys, too
    bigrams: int = 5  # size of the bigram table in vocabularies; 0 for none
    smear: bool = True  # add a part of the previous embedding to each one
    # Training
    train_seq_len: int = 16 * 1024  # tokens of a training sequence, one micro-step
    num_iterations: int = 1600  # steps; the last fortieth has the lowest rates
    cooldown_frac: float = 0.55  # fraction of the schedule over which learning rates decay
    embed_lr: float = 0.6  # learning rate of value and bigram embeddings (Adam)
    head_lr: float = 0.008  # learning rate of the head and the token embedding (Adam)
    scalar_lr: float = 0.04  # learning rate of the scalars; gates have parts of it (Adam)
    muon_lr: float = 0.023  # learning rate of the hidden matrices (NorMuon)
    growing_batch: bool = True  # 2 and 3 times seqs_per_step in later thirds of the run
    predict: int = 3  # number of next tokens to predict at first, up to 3
    normuon: bool = True  # normalize the update of each neuron
    decay: float = 1.0  # factor of all cautious weight decays
    # Data
    pack: bool = True  # training sequences consist of documents from their start
    max_document: int = 2048  # tokens of a document when packed

    def __post_init__(self):
        """Raise UserError at the first setting that cannot be right."""
        super().__post_init__()
        self.require(self.num_layers >= 11, "num_layers", "at least 11")
        self.require(self.fp8 != "all", "fp8", "none or head")
        pairs = self.num_heads % 2 == 0 or not self.paired_heads
        self.require(pairs, "num_heads", "even, or --paired_heads false")
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
        embed_lr=0.3,
        head_lr=0.008,
        scalar_lr=0.04,
        muon_lr=0.032,
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
    if hp.growing_batch:  # <= as in the record: the first step of a larger batch has the old rate
        peak = 1.0 if progress <= 1 / 3 else 1.52 if progress <= 2 / 3 else 1.73
    cooldown = min(1, max(0, 1 - progress) / hp.cooldown_frac)
    return peak * cooldown + 0.1 * (1 - cooldown)


def muon_momentum(step, hp):
    """From 0.85 to 0.95 over 300 steps, and back over the last 50."""
    return 0.85 + 0.1 * min(step / 300, 1, (hp.num_iterations - step) / 50)


def target_weights(step, hp):
    """Weights of the next tokens in the loss. The third token's fades out first, then the second's.

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
    """Rotary frequencies, radians a token (head_dim / 2,), and the scale of the scores.

    Where the window grows, frequencies of less than one turn in it shrink by the same factor, those
    of more than 32 turns stay, and scores become sharper. "YaRN: Efficient Context Window Extension
    of Large Language Models" (Peng et al., 2023)
    """
    frequencies = (1 / 1024) ** torch.linspace(0, 1, hp.head_dim // 4)
    scale = 0.1
    for before in range(stage):
        window = window_blocks(before, hp)
        ratio = window / window_blocks(before + 1, hp)
        turns = BLOCK * window * frequencies / (2 * math.pi)
        stays = ((turns - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (ratio + stays * (1 - ratio))
        scale *= 1 - 0.2 * math.log(ratio)
    return F.pad(frequencies, (0, len(frequencies))), scale  # the other channels stay


class Schedule(NamedTuple):
    """What changes in the network during training. As tensors, they need no new compilation."""

    windows: Tensor  # (2,) int32: the long and the short window in blocks
    frequencies: Tensor  # (head_dim / 2,): radians a token, zero for the channels that stay
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
        self.packed = []  # of each sequence, the first token and the length of its documents
        shards = zip(self.files, self.starts, self.lengths, self.vocab_sizes)
        for path, start, length, vocab_size in shards:
            boundaries = np.flatnonzero(self.read(start, length) == vocab_size - 1)
            if not len(boundaries):
                raise UserError(
                    f"{path} has no token {vocab_size - 1}, which starts a document; leave it "
                    "out, or add --pack false."
                )
            lengths = np.diff(boundaries, append=length).clip(max=max_document)
            documents = np.stack([start + boundaries, lengths], axis=1)
            first, missing = 0, seq_len + 1
            for end, document_length in enumerate(lengths, 1):
                missing -= document_length
                if missing <= 0:
                    self.packed.append(documents[first:end])
                    first, missing = end, seq_len + 1
            if len(self.packed) >= self.num_sequences and not self.shuffle:
                break
        self.in_an_epoch = len(self.packed)
        needed = 1 if options.get("repeat") else self.num_sequences
        if self.in_an_epoch < needed:
            raise UserError(
                f"{filename_pattern} has documents for {self.in_an_epoch} sequences of {seq_len} "
                f"tokens, and the run needs {needed}; add shards, lower --num_iterations or "
                "--train_seq_len, or add --repeat or --pack false."
            )

    def tokens(self, place):
        """The seq_len + 1 tokens of the sequence at a place of the stream, uint16."""
        documents = self.packed[place % self.in_an_epoch]
        tokens = np.concatenate([self.read(*document) for document in documents])
        return tokens[: self.seq_len + 1]


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
    X = G / (1.02 * G.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    return train_gpt.apply_polynomials(X.to(dtype), POLAR_EXPRESS[:steps])


class NorMuon(train_gpt.Muon):
    """Muon with updates normalized by neuron, "NorMuon" (Li et al., 2025), and with weight decay.

    A matrix has a neuron for each row, and a wide one for each column. decay: the part of a weight,
    in learning rates, that is added to an update of its sign, "Cautious Weight Decay" (Chen et al.,
    2025).
    """

    zeropower = staticmethod(polar_express)

    def orthogonal_updates(self, group, own):
        """Advance the state of parameters of one shape. Returns their updates (n, *shape)."""
        updates = super().orthogonal_updates(group, own).type_as(own[0])
        axis = -1 if updates.size(-2) >= updates.size(-1) else -2
        for p, u in zip(own, updates):
            if group["normalize"]:
                length = u.norm(dim=(-2, -1), keepdim=True)
                square = u.square().mean(axis, keepdim=True)
                power = self.state[p].setdefault("power", torch.zeros_like(square))
                power.lerp_(square, 0.05)
                u *= power.clamp(min=1e-10).rsqrt()
                u.copy_(length * F.normalize(u, dim=(-2, -1)))
            u += group["decay"] * group["lr"] * p * (u * p >= 0)
        return updates


class CautiousAdam(torch.optim.Optimizer):
    """Adam with cautious weight decay, of parameters with a gradient. Its moments are float32.

    A group has lr, betas, decay (in squares of lr), and t, its number of steps.
    """

    @staticmethod
    def update(p, grad, numbers, m, v):
        """Adam of one tensor, in place, with weight decay where it has the sign of the update.

        numbers: five tensors, beta1, beta2, learning rate, decay, and the number of steps. m, v:
        moments.
        """
        beta1, beta2, lr, decay, t = numbers
        grad = grad.type_as(m)
        m.lerp_(grad, 1 - beta1)
        v.lerp_(grad.square(), 1 - beta2)
        correction = (1 - beta2**t).sqrt() / (1 - beta1**t)
        update = lr * correction * m / (v.sqrt() + 1e-10)
        p.sub_(update + lr**2 * decay * p * (update * p > 0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["t"] += 1
            numbers = [*group["betas"], group["lr"], group["decay"], group["t"]]
            # Filled on the device: a copy to it would wait for the backward pass.
            numbers = [torch.full((), n, device=group["params"][0].device) for n in numbers]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    zeros = torch.zeros_like(p, dtype=numbers[0].dtype)
                    self.state[p] = dict(m=zeros, v=zeros.clone())
                # p.data: the shape of a Parameter would be part of the compiled code.
                self.update(p.data, p.grad, numbers, **self.state[p])


# --------------------------------------------------------------------------------------------------
# Network


def gate(x, weight):
    """A sigmoid of the first channels: x (T, dim), weight (n, 12), to (T, n)."""
    return torch.sigmoid(F.linear(x[:, :12], weight.type_as(x)))


def bigram_rows(ids, last):
    """Row of the bigram table for each of the ids (T,) int32, from a hash with the id before.

    Position 0 has the last row, whose number also stands for its id in the hash of position 1. The
    products wrap around.
    """
    ids = F.pad(ids[1:], (1, 0), value=last)
    hashed = (36313 * ids[1:]) ^ (27191 * ids[:-1])
    return torch.cat([ids[:1], hashed.remainder(last)])


def rotated(x, turn):
    """Turn neighbouring channels of x (T, heads, head_dim).

    turn: cos and sin (2, T, heads or 1, head_dim / 2).
    """
    cos, sin = turn
    a, b = x.view(*x.shape[:2], -1, 2).unbind(-1)
    return torch.stack([a * cos + b * sin, b * cos - a * sin], dim=-1).flatten(-2)


def attention_within(document, window):
    """Attention to the document's rows from `window` blocks before the query on."""
    return train_gpt.attention_under(train_gpt.document_block_mask(document, window, exact=True))


class CausalSelfAttention(train_gpt.CausalSelfAttention):
    """Attention with a gate on each head, "Gated Attention" (Qiu et al., 2025).

    A layer is of one of three kinds: short, long, by its window, or paired. Then a token has two
    rows, one with the first half of its heads and one with the second, so that each head attends to
    the keys of another one as well.
    key_offset: the channels that do not turn come from the previous token's key, so that a query
    finds what followed an earlier token like its own.
    """

    def __init__(self, hp, layer):
        super().__init__(hp.model_dim, hp.num_heads, hp.head_dim, rotary=None)
        self.kind = "long" if layer in (3, hp.num_layers - 1) else "short"
        if hp.paired_heads and layer in (0, 2, 5, 9):
            self.kind = "paired"
        self.key_offset = hp.key_offset and self.kind == "long"
        self.qkv.weight.data *= 2  # a standard deviation of 1 / sqrt(model_dim)
        self.lambdas.data[1] = 1.0
        self.gate = nn.Parameter(torch.zeros(hp.num_heads, 12))
        if layer < 2 or layer >= hp.num_layers - 3:
            self.value_gate = nn.Parameter(torch.zeros(hp.num_heads, 12))

    def forward(self, x, ve, scale, turn, attend):
        """x (T, dim), ve (T, num_heads * head_dim) or None; returns (T, dim)."""
        T = len(x)
        q, k, v = self.qkv(x).view(T, 3, self.num_heads, self.head_dim).unbind(1)
        q = rotated(norm(q), turn) * scale
        k = rotated(norm(k), turn)
        if self.key_offset:
            turning, still = k.chunk(2, dim=-1)
            k = torch.cat([turning, torch.cat([still[:1], still[:-1]])], dim=-1)
        v = self.lambdas[0] * v
        if ve is not None:
            v = v + 2 * gate(x, self.value_gate)[..., None] * ve.view_as(v)
        rows = 2 * T if self.kind == "paired" else T
        q, k, v = (t.reshape(1, rows, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
        y = attend(q, k, v, scale=1.0).transpose(1, 2) * gate(x, self.gate).view(1, rows, -1, 1)
        return self.lambdas[1] * self.c_proj(y.reshape(T, -1))


class GPT(train_gpt.GPT):
    """The network, for one sequence at a time.

    Layer 6 also reads the output of layer 3, by a gate, and the head does without a part of layer
    7's output. Activations and embeddings have the machine's dtype; other weights are float32.
    """

    def __init__(self, vocab_size, hp, machine):
        nn.Module.__init__(self)  # and not the parent's: all layers are others
        self.vocab_size = vocab_size
        self.train_seq_len = hp.train_seq_len
        self.hp = hp
        n = hp.num_layers
        self.attentions = nn.ModuleList(
            None if i == hp.attention_free_layer else CausalSelfAttention(hp, i) for i in range(n)
        )
        self.mlps = nn.ModuleList(train_gpt.MLP(hp.model_dim) for _ in range(n))
        rows = train_gpt.next_multiple_of_n(vocab_size, n=128)
        fp8 = hp.fp8 == "head" and machine.supports_fp8
        # The loss is a sum over tokens, divided by the first batch's number of sequences.
        grad_s = 448 / 0.75 * hp.seqs_per_step
        self.lm_head = CastedLinear(hp.model_dim, rows, fp8, 448 / 100, 448 / 1.6, grad_s)
        nn.init.normal_(self.lm_head.weight, std=0.005)

        def table(*shape):
            zeros = torch.zeros(shape, dtype=machine.dtype)
            return nn.Embedding.from_pretrained(zeros, freeze=False)

        self.embed = table(rows, hp.model_dim)
        self.embed.weight.data.copy_(self.lm_head.weight.data)
        self.value_embeds = nn.ModuleList(table(rows, hp.num_heads * hp.head_dim) for _ in range(3))
        self.bigrams = table(hp.bigrams * rows, hp.model_dim)
        self.residual = nn.Parameter(1.1 * torch.ones(n))
        self.from_input = nn.Parameter(torch.zeros(n))
        self.from_bigrams = nn.Parameter(0.1 * torch.ones(n))
        self.smear = nn.Parameter(torch.tensor(0.0), requires_grad=hp.smear)
        self.smear_gate = nn.Parameter(torch.zeros(1, 12))
        self.skip = nn.Parameter(torch.tensor(-1.5))
        self.skip_gate = nn.Parameter(torch.zeros(1, 12))
        self.backout = nn.Parameter(torch.tensor(0.5))

    def hidden(self, input_seq, schedule):
        """The input of the head: ids (T,) to (T, model_dim), normalized."""
        e = self.embed(input_seq)
        before = F.pad(e[:-1], (0, 0, 1, 0))  # the embedding of the token before
        x = x0 = norm(e + self.smear * gate(e, self.smear_gate) * before)
        bigrams = 0.0
        if self.hp.bigrams:
            bigrams = self.bigrams(bigram_rows(input_seq, self.bigrams.num_embeddings - 1))
        ve = [table(input_seq) for table in self.value_embeds]
        ve = ve[1:] + [None] * (len(self.mlps) - 5) + ve

        # In paired heads the position depends on the head's number and not on its row.
        position = torch.arange(len(input_seq), device=input_seq.device)[:, None, None]
        parity = torch.arange(self.hp.num_heads, device=input_seq.device)[:, None] % 2
        angles = [place * schedule.frequencies for place in (position, 2 * position + parity)]
        turn, turn_paired = (torch.stack([a.cos(), a.sin()]).type_as(x) for a in angles)
        document = (input_seq == self.vocab_size - 1).cumsum(0)
        long, short = schedule.windows
        kinds = dict(
            long=(turn, attention_within(document, long)),
            short=(turn, attention_within(document, short)),
            paired=(turn_paired, attention_within(document.repeat_interleave(2), short)),
        )

        outputs = []
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps)):
            if i == 6:
                x = x + 2 * self.skip.sigmoid() * gate(x0, self.skip_gate) * outputs[3]
            x = self.residual[i] * x + self.from_input[i] * x0 + self.from_bigrams[i] * bigrams
            if attention is not None:
                x = x + attention(norm(x), ve[i], schedule.scale, *kinds[attention.kind])
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
        if not self.training:
            return super().forward(input_seq, target_seq, schedule)
        logits = self.logits(self.hidden(input_seq, schedule))
        shifts = range(self.hp.predict)
        targets = [F.pad(target_seq[shift:], (0, shift), value=-100) for shift in shifts]
        return torch.stack([train_gpt.loss_sum(logits, target) for target in targets])


# --------------------------------------------------------------------------------------------------
# Training step


def build_model(hp, vocab_size, machine):
    """The network on the machine's device. A seed gives the same weights on every device."""
    torch.manual_seed(hp.seed)
    return GPT(vocab_size, hp, machine).to(machine.device)


def build_optimizers(model, hp, machine):
    """Adam for embeddings, head, gates and scalars; NorMuon for the matrices between."""
    layers = [*model.attentions.named_parameters(), *model.mlps.named_parameters()]
    matrices = [p for name, p in layers if "weight" in name]
    gates = [p for name, p in layers if "gate" in name]
    scalars = [p for p in model.parameters() if p.ndim < 2 and p is not model.from_input]
    head = [model.lm_head.weight, model.embed.weight]
    tables = [*model.value_embeds.parameters(), model.bigrams.weight]
    groups = [
        dict(params=head, lr=hp.head_lr, betas=(0.5, 0.95), decay=0.75 * hp.decay),
        dict(params=tables, lr=hp.embed_lr, betas=(0.75, 0.95), decay=0.025 * hp.decay),
        dict(params=scalars, lr=hp.scalar_lr),
        dict(params=[model.from_input], lr=hp.scalar_lr, betas=(0.65, 0.95)),
        dict(params=gates, lr=hp.scalar_lr / 5, decay=0.005 * hp.decay),
        dict(params=[model.skip_gate], lr=hp.scalar_lr / 100),
        dict(params=[model.smear_gate], lr=hp.scalar_lr / 500),
    ]
    adam = CautiousAdam(groups, dict(betas=(0.9, 0.99), decay=0.0, t=0.0))
    if machine.is_gpu:  # one kernel instead of a dozen: the tables are large
        adam.update = torch.compile(adam.update, dynamic=True)
    for mlp in model.mlps:
        mlp.c_proj.weight.lr_mul = 4.0
    muon = NorMuon(
        matrices,
        lr=hp.muon_lr,
        rank=machine.rank,
        world_size=machine.world_size,
        dtype=machine.dtype,
        normalize=hp.normuon,
        decay=1.2 * hp.decay,
    )
    return [adam, muon]


def set_schedule(optimizers, step, hp, machine):
    """Give the optimizers a step's learning rates and momentum. Returns the network's schedule."""
    train_gpt.set_rates(optimizers, learning_rate_factor(step, hp), muon_momentum(step, hp))
    stage = stage_of_step(step, hp)
    short = max(1, window_blocks(stage, hp) // 2)
    long = window_blocks(4 if step == hp.num_iterations else stage, hp)
    windows = torch.tensor([long, short], dtype=torch.int32)
    values = windows, *yarn(stage, hp), target_weights(step, hp)
    return Schedule(*(torch.as_tensor(value, device=machine.device) for value in values))


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
    result = torch.tensor([0.0, stop], device=machine.device)
    tokens = sequences_of_step(step, hp) * hp.train_seq_len
    for inputs, targets in batches:
        losses = model(inputs, targets, schedule)
        # A constant, so that gradients grow with the batch, as in the record.
        (losses @ schedule.target_weights / hp.seqs_per_step).backward()
        result[0] += losses[0].detach() / tokens
    adam, muon = optimizers
    adam_steps = step % 2 == 1
    parameters = model.parameters() if adam_steps else muon.owner
    train_gpt.sum_gradients(parameters, muon.owner, result, machine)
    muon.step()
    muon.zero_grad()
    if adam_steps:
        head, embed = model.lm_head.weight, model.embed.weight
        tied = step <= untie_step(hp)
        if tied:
            head.grad += embed.grad
            embed.grad.copy_(head.grad)
        adam.step()
        adam.zero_grad()
        if tied:
            embed.data.copy_(head.data)
    return result


validate = train_gpt.validate


if __name__ == "__main__":
    sys.exit(train_gpt.main(recipe=sys.modules[__name__]))
