"""Slow, obvious reference implementations of every clever part of train_gpt.py.

They are written from the specification and share no line with the script. They work on one matrix,
one parameter or one sequence at a time, by default in float64.
"""

import glob
import math

import numpy as np
import torch

BLOCK = 128

# ---------------------------------------------------------------------------------------------
# Attention


def dense_mask(ids, boundary, window):
    """Which token may attend which, (T, T) bool, query first, by the definition."""
    ids = torch.as_tensor(ids)
    document = np.cumsum(ids.cpu().numpy() == boundary)
    q, k = np.arange(len(ids))[:, None], np.arange(len(ids))[None, :]
    i, j = q // BLOCK, k // BLOCK
    return torch.from_numpy(
        (i - window < j) & (j <= i) & (k <= q) & (document[q] == document[k])
    ).to(ids.device)


def block_lists(dense):
    """The blocks of a dense mask (T, T), as the lists of a BlockMask, sorted by nearness.

    For each query block the partly ("kv") and the fully visible key blocks ("full_kv"), and for
    each key block the query blocks that see it in part ("q") and in full ("full_q").
    """
    n = len(dense) // BLOCK
    visible_pairs = dense.view(n, BLOCK, n, BLOCK).sum((1, 3))
    full = visible_pairs == BLOCK**2
    partial = (visible_pairs > 0) & ~full

    def nearest_first(listed):
        rows = enumerate(listed.tolist())
        return [sorted(np.flatnonzero(row).tolist(), key=lambda j: abs(i - j)) for i, row in rows]

    return dict(
        kv=nearest_first(partial),
        full_kv=nearest_first(full),
        q=nearest_first(partial.T),
        full_q=nearest_first(full.T),
    )


def dense_attention(q, k, v, mask, scale):
    """Softmax attention of q, k, v (..., T, head_dim) under a mask (T, T).

    A query that sees nothing gets zeros.
    """
    scores = (scale * q @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    return torch.nan_to_num(torch.softmax(scores, dim=-1), nan=0.0) @ v


def rotary(x):
    """x (T, heads, head_dim) to the same shape and dtype.

    The channels c and c + head_dim / 2 are one complex number, which is rotated clockwise by its
    position times its frequency. The first half of these numbers has frequencies from 1 down to
    1/1024, and the other half is not rotated.
    """
    T, half = len(x), x.size(-1) // 2
    rotating = half // 2
    frequency = [(1 / 1024) ** (c / (rotating - 1)) for c in range(rotating)] + [0.0] * rotating
    exact = dict(dtype=torch.float64, device=x.device)
    angle = torch.arange(T, **exact)[:, None, None] * torch.tensor(frequency, **exact)
    rotated = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angle), -angle
    )
    return torch.cat([rotated.real, rotated.imag], dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------
# FP8


def rounded(t, scale, dtype):
    """t times the scale, clamped to the FP8 format's range and rounded to it, in float64."""
    largest = torch.finfo(dtype).max
    return (t.float() * scale).clamp(-largest, largest).to(dtype).double()


def fp8_mm(x, w, x_s, w_s):
    """x (T, in) @ w.T, with both operands in e4m3."""
    x, w = rounded(x, x_s, torch.float8_e4m3fn), rounded(w, w_s, torch.float8_e4m3fn)
    return x @ w.T / (x_s * w_s)


def fp8_mm_backward(grad, x, w, x_s, w_s, grad_s):
    """The gradients of x and of w, with grad in e5m2."""
    g = rounded(grad, grad_s, torch.float8_e5m2)
    grad_x = g @ rounded(w, w_s, torch.float8_e4m3fn) / (grad_s * w_s)
    grad_w = g.T @ rounded(x, x_s, torch.float8_e4m3fn) / (grad_s * x_s)
    return grad_x, grad_w


# ---------------------------------------------------------------------------------------------
# Optimizers


def newton_schulz(G, steps):
    """Repeat X <- a X + b (X X^T) X + c (X X^T)^2 X for one matrix, scaled to norm 1 at first."""
    X = G.double() / (torch.linalg.matrix_norm(G.double()) + 1e-7)
    for _ in range(steps):
        XXt = X @ X.T
        X = 3.4445 * X - 4.7750 * XXt @ X + 2.0315 * XXt @ XXt @ X
    return X


def nearest_orthogonal(G):
    """U V^T of G = U S V^T, which Newton-Schulz approximates."""
    U, _, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vt


class PlainMuon:
    """One matrix at a time; a parameter of three dimensions is a stack of matrices.

    Momentum has the textbook's form, buffer = momentum * buffer + grad. For a fixed momentum it
    differs from Muon's by a constant factor, which the normalization removes.
    """

    def __init__(self, params, lr, momentum, nesterov=True, ns_steps=5):
        self.params = list(params)
        self.lr = lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.ns_steps = ns_steps
        self.buffers = [torch.zeros_like(p, dtype=torch.float64) for p in self.params]

    @torch.no_grad()
    def step(self):
        for p, buffer in zip(self.params, self.buffers, strict=True):
            grad = torch.zeros_like(buffer) if p.grad is None else p.grad.double()
            buffer.mul_(self.momentum).add_(grad)
            ahead = grad + self.momentum * buffer if self.nesterov else buffer
            rows, cols = p.shape[-2:]
            length = self.lr * getattr(p, "lr_mul", 1.0) * max(1, rows / cols) ** 0.5
            directions = ahead.view(-1, rows, cols)
            for matrix, direction in zip(p.view(-1, rows, cols), directions, strict=True):
                matrix.sub_(length * newton_schulz(direction, self.ns_steps).to(p.dtype))


class PlainAdam:
    """Adam as in its paper, for (parameter, learning rate) pairs."""

    def __init__(self, params_and_rates, betas=(0.8, 0.95), eps=1e-10):
        self.items = []
        for p, lr in params_and_rates:
            zeros = torch.zeros_like(p, dtype=torch.float64)
            self.items.append((p, lr, zeros, zeros.clone()))
        self.betas, self.eps, self.steps = betas, eps, 0

    @torch.no_grad()
    def step(self, lr_factor=1.0):
        self.steps += 1
        beta1, beta2 = self.betas
        for p, lr, m, v in self.items:
            grad = p.grad.double()
            m.copy_(beta1 * m + (1 - beta1) * grad)
            v.copy_(beta2 * v + (1 - beta2) * grad**2)
            m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
            p.sub_((lr * lr_factor * m_hat / (v_hat.sqrt() + self.eps)).to(p.dtype))


# ---------------------------------------------------------------------------------------------
# Data


def all_tokens(pattern):
    """The tokens of all shards that match, in the order of their names, as one array."""
    return np.concatenate(
        [np.fromfile(path, dtype="<u2", offset=1024) for path in sorted(glob.glob(str(pattern)))]
    ).astype(np.int64)


def sequence(tokens, index, seq_len, num_tokens):
    """Inputs and targets of sequence number `index` of the endlessly repeated tokens.

    Targets from number num_tokens on are -100.
    """
    at = index * seq_len + np.arange(seq_len)
    inputs, targets = tokens[at % len(tokens)], tokens[(at + 1) % len(tokens)]
    return inputs, np.where(at < num_tokens, targets, -100)


# ---------------------------------------------------------------------------------------------
# Schedules: a step's learning rate factor, momentum, and window in blocks


def learning_rate_factor(step, steps, cooldown=0.4):
    constant = (1 - cooldown) * steps
    return 1.0 if step <= constant else 1 - 0.9 * (step - constant) / (steps - constant)


def momentum(step):
    return 0.95 if step >= 300 else 0.85 + (0.95 - 0.85) * step / 300


def window(step, steps, max_window=1792):
    """The smallest number of blocks, at least one, that holds a length which grows with the step.

    It grows linearly from 0 to 64 tokens less than the longest window, so that the longest window
    is reached before the last step.
    """
    blocks = 1
    while blocks * BLOCK < (max_window - 64) * step / steps:
        blocks += 1
    return blocks


# ---------------------------------------------------------------------------------------------
# Network: from the weights by name, with dense attention


def rms_norm(x):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def is_long(layer, num_layers):
    """Whether a layer has the long window.

    The first and the last layer do, and every fourth, counted from the nearer of these two.
    """
    return min(layer, num_layers - 1 - layer) % 4 == 0


def gpt_logits(weights, ids, window, *, num_layers, num_heads, head_dim, vocab_size):
    """Logits (T, padded vocabulary). weights: the network's state_dict, of any float dtype."""
    T, ids = len(ids), ids.long()
    long_mask = dense_mask(ids, vocab_size - 1, window)
    short_mask = dense_mask(ids, vocab_size - 1, max(1, window // 2))
    tables = [weights[f"value_embeds.embed.{n}.weight"][ids] for n in range(3)]
    tables = [table.view(T, num_heads, head_dim) for table in tables]
    # For the first three and for the last three layers.
    value_embeds = dict(enumerate(tables)) | dict(enumerate(tables, num_layers - 3))
    half, stored = num_layers // 2, {}
    x = x0 = rms_norm(weights["embed.weight"][ids])
    for layer in range(num_layers):
        name = f"blocks.{layer}."
        mirror = num_layers - 1 - layer  # the last layer adds what the first one stored
        if mirror < half:
            x = x + weights["skip_weights"][layer - (num_layers - half)] * stored[mirror]
        x = weights[name + "lambdas"][0] * x + weights[name + "lambdas"][1] * x0
        if name + "attn.qkv.weight" in weights:
            h = rms_norm(x)
            q, k, v = (
                (h @ matrix.T).view(T, num_heads, head_dim)
                for matrix in weights[name + "attn.qkv.weight"]
            )
            q, k = rotary(rms_norm(q)), rotary(rms_norm(k))
            v = weights[name + "attn.lambdas"][0] * v
            if layer in value_embeds:
                v = v + weights[name + "attn.lambdas"][1] * value_embeds[layer]
            mask = long_mask if is_long(layer, num_layers) else short_mask
            y = dense_attention(*(t.transpose(0, 1) for t in (q, k, v)), mask, 0.12)
            y = y.transpose(0, 1).reshape(T, num_heads * head_dim)
            x = x + y @ weights[name + "attn.c_proj.weight"].T
        hidden = torch.relu(rms_norm(x) @ weights[name + "mlp.c_fc.weight"].T) ** 2
        x = x + hidden @ weights[name + "mlp.c_proj.weight"].T
        if layer < half:
            stored[layer] = x
    return 30 / (1 + torch.exp(-(rms_norm(x) @ weights["lm_head.weight"].T) / 7.5))


def gpt_loss(weights, ids, targets, window, **shape):
    """Mean of -log p(target) in nats over the targets that are not -100."""
    log_p = torch.log_softmax(gpt_logits(weights, ids, window, **shape), dim=-1)
    counts = targets != -100
    return -log_p[counts, targets[counts]].mean()


def gpt_loss_and_gradients(weights, ids, targets, window, dtype=torch.float64, **shape):
    """The loss, and its gradient with respect to each weight, by name."""
    weights = {name: value.detach().to(dtype).requires_grad_() for name, value in weights.items()}
    loss = gpt_loss(weights, ids, targets, window, **shape)
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in weights.items()}
