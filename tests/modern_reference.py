"""Reference implementation of the modern recipe: plain, dense, one matrix at a time.

It is written from the description of the recipe and shares no line with the script. `weights` are
a network's tensors by name, as in its state_dict.
"""

import math

import torch

LAYERS = 11
PAIRED = (0, 2, 5, 9)
LONG = (3, 10)
WITHOUT_ATTENTION = 6
VALUE_TABLE = {0: 1, 1: 2, 8: 0, 9: 1, 10: 2}  # layer: table


# ---------------------------------------------------------------------------------------------
# Data


def as_int32(number):
    """What is left of an integer in 32 bits with a sign."""
    return (number + 2**31) % 2**32 - 2**31


def bigram_rows(ids, last):
    """Row of the bigram table for each position; `last` is the number of the table's last row."""
    rows = [last]
    for t in range(1, len(ids)):
        before = ids[t - 1] if t > 1 else last
        rows.append((as_int32(36313 * ids[t]) ^ as_int32(27191 * before)) % last)
    return rows


def pack(tokens, boundary, seq_len, longest):
    """All sequences of seq_len + 1 tokens of one shard, as lists."""
    starts = [i for i, token in enumerate(tokens) if token == boundary]
    sequences = []
    current = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        document = tokens[start : min(end, start + longest)]
        current.extend(document[: seq_len + 1 - len(current)])
        if len(current) == seq_len + 1:
            sequences.append(current)
            current = []
    return sequences


# ---------------------------------------------------------------------------------------------
# Schedules, for S scheduled steps of N


def stage(step, S):
    return sum(step >= border for border in (S / 3, 2 * S / 3, S))


def rate_factor(step, S):
    x = step / S
    peak = 1 if 3 * step <= S else 1.52 if 3 * step <= 2 * S else 1.73
    if step > S:
        return 0.1
    w = 1 if x < 0.45 else (1 - x) / 0.55
    return peak * w + 0.1 * (1 - w)


def momentum(step, N):
    return 0.85 + 0.1 * min(step / 300, 1, (N - step) / 50)


def target_weights(step, S):
    x = step / S
    if 3 * step < S:
        return 1, 1 / 2, (1 - 3 * x) / 4
    if 3 * step < 2 * S:
        return 1, (2 - 3 * x) / 2, 0
    return 1, 0, 0


def yarn(windows, head_dim):
    """Frequencies and scale of the scores after these long windows, in blocks."""
    frequencies = [1024 ** (-j / (head_dim // 4 - 1)) for j in range(head_dim // 4)]
    scale = 0.1
    for a, b in zip(windows, windows[1:], strict=False):
        for j, frequency in enumerate(frequencies):
            turns = 128 * a * frequency / (2 * math.pi)
            u = min(1, max(0, (turns - 1) / 31))
            frequencies[j] = frequency * (a / b + u * (1 - a / b))
        scale *= 1 + 0.2 * math.log(b / a)
    return frequencies, scale


# ---------------------------------------------------------------------------------------------
# Network


def n(x):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)


def rotated(x, positions, frequencies):
    """x (T, heads, head_dim), positions (T, heads)."""
    y = x.clone()
    for j, frequency in enumerate(frequencies):
        cos = torch.cos(positions * frequency)
        sin = torch.sin(positions * frequency)
        y[..., 2 * j] = x[..., 2 * j] * cos + x[..., 2 * j + 1] * sin
        y[..., 2 * j + 1] = x[..., 2 * j + 1] * cos - x[..., 2 * j] * sin
    return y


def paired(x):
    """(T, heads, head_dim) to (2 T, heads / 2, head_dim): the first heads, then the others."""
    half = x.size(1) // 2
    return torch.stack([x[:, :half], x[:, half:]], dim=1).flatten(0, 1)


def attention(q, k, v, document, window):
    """q, k, v (rows, heads, head_dim), the document of each row, the window in rows."""
    row = torch.arange(len(q))
    back = row[:, None] - row
    visible = (back >= 0) & (back <= window) & (document[:, None] == document)
    heads = []
    for h in range(q.size(1)):
        scores = (q[:, h] @ k[:, h].T).masked_fill(~visible, -math.inf)
        heads.append(torch.softmax(scores, dim=-1) @ v[:, h])
    return torch.stack(heads, dim=1)


def attention_of_layer(weights, i, y, ve, document, windows, frequencies, scale):
    name = f"attentions.{i}."
    T = len(y)
    heads, head_dim = weights[name + "gate"].size(0), 4 * len(frequencies)
    λ0, λ1 = weights[name + "lambdas"]
    q, k, v = ((y @ (λ0 * W).T).view(T, heads, head_dim) for W in weights[name + "qkv.weight"])
    positions = torch.arange(T).double()[:, None].expand(T, heads)
    if i in PAIRED:
        positions = 2 * positions + torch.arange(heads) % 2
    q = scale * rotated(n(q), positions, frequencies)
    k = rotated(n(k), positions, frequencies)
    if i in LONG:
        earlier = torch.cat([k[:1], k[:-1]])
        k = torch.cat([k[..., : head_dim // 2], earlier[..., head_dim // 2 :]], dim=-1)
    if ve is not None:
        gate = torch.sigmoid(y[:, :12] @ weights[name + "value_gate"].T)
        v = v + 2 * gate[..., None] * ve.view(T, heads, head_dim)
    if i in PAIRED:
        rows = attention(*map(paired, (q, k, v)), document.repeat_interleave(2), windows[1])
        z = torch.cat([rows[0::2], rows[1::2]], dim=1)
    else:
        z = attention(q, k, v, document, windows[0] if i in LONG else windows[1])
    z = z * torch.sigmoid(y[:, :12] @ weights[name + "gate"].T)[..., None]
    return z.reshape(T, -1) @ (λ1 * weights[name + "c_proj.weight"]).T


def logits(weights, ids, boundary, windows, frequencies, scale):
    """Capped logits (T, padded vocabulary). windows: the long and the short one in tokens."""
    ids = torch.as_tensor(ids)
    document = torch.cumsum(ids == boundary, 0)
    e = weights["embed.weight"][ids]
    gate = torch.sigmoid(e[1:, :12] @ weights["smear_gate"].T)
    e = torch.cat([e[:1], e[1:] + weights["smear"] * gate * e[:-1]])
    x = x0 = n(e)
    table = weights["bigrams.weight"]
    b = table[bigram_rows(ids.tolist(), len(table) - 1)]
    after = []
    for i in range(LAYERS):
        if i == 6:
            gate = torch.sigmoid(x0[:, :12] @ weights["skip_gate"].T)
            x = x + 2 * torch.sigmoid(weights["skip"]) * gate * after[3]
        x = weights["residual"][i] * x + weights["from_input"][i] * x0
        x = x + weights["from_bigrams"][i] * b
        if i != WITHOUT_ATTENTION:
            ve = None
            if i in VALUE_TABLE:
                ve = weights[f"value_embeds.{VALUE_TABLE[i]}.weight"][ids]
            x = x + attention_of_layer(weights, i, n(x), ve, document, windows, frequencies, scale)
        hidden = torch.relu(n(x) @ weights[f"mlps.{i}.c_fc.weight"].T) ** 2
        x = x + hidden @ weights[f"mlps.{i}.c_proj.weight"].T
        after.append(x)
    h = n(x - weights["backout"] * after[7])
    return 23 * torch.sigmoid((h @ weights["lm_head.weight"].T + 5) / 7.5)


def loss(z, targets, weights_of_targets):
    """Weighted sum of the losses of the next tokens, of the ones after them, and so on."""
    log_p = z - torch.logsumexp(z, dim=-1, keepdim=True)
    total = 0
    for k, w in enumerate(weights_of_targets):
        for_t = torch.arange(len(z) - k)
        total = total - w * log_p[for_t, targets[k:]].sum()
    return total


# ---------------------------------------------------------------------------------------------
# Optimizers, of one matrix or tensor


POLAR_EXPRESS = """
    8.156554524902461 -22.48329292557795 15.878769915207462
    4.042929935166739 -2.808917465908714 0.5000178451051316
    3.8916678022926607 -2.772484153217685 0.5060648178503393
    3.285753657755655 -2.3681294933425376 0.46449024233003106
    2.3465413258596377 -1.7097828382687081 0.42323551169305323
"""


def polar_express(G):
    X = G / (1.02 * torch.sqrt((G**2).sum()) + 1e-6)
    for line in POLAR_EXPRESS.split("\n")[1:-1]:
        a, b, c = map(float, line.split())
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def normuon(p, g, state, lr, mu, factor):
    """One update of a matrix whose rows are neurons."""
    state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    X = polar_express((1 - mu) * g + mu * state["m"])
    state["s"] = 0.95 * state.get("s", 0) + 0.05 * (X**2).mean(dim=1)
    rows = []
    for row, s in zip(X, state["s"], strict=True):
        rows.append(row / math.sqrt(max(s, 1e-10)))
    rows = torch.stack(rows)
    u = rows * (torch.linalg.norm(X) / max(torch.linalg.norm(rows), 1e-10))
    p -= lr * factor * (u + 1.2 * lr * p * (u * p >= 0))


def adam(p, g, state, lr, beta1, beta2, decay):
    state["t"] = state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    m_hat = state["m"] / (1 - beta1 ** state["t"])
    v_root = torch.sqrt(state["v"]) + 1e-10
    correction = math.sqrt(1 - beta2 ** state["t"])
    update = lr * correction * m_hat / v_root
    p -= update + lr**2 * decay * p * (update * p > 0)


def adam_settings(name):
    """Learning rate, betas and weight decay."""
    if name in ("lm_head.weight", "embed.weight"):
        return 0.008, 0.5, 0.95, 0.75
    if name.startswith(("value_embeds", "bigrams")):
        return 0.6, 0.75, 0.95, 0.025
    if name.startswith("attentions") and name.endswith("gate"):
        return 0.008, 0.9, 0.99, 0.005
    if name == "from_input":
        return 0.04, 0.65, 0.95, 0
    if name == "smear_gate":
        return 0.00008, 0.9, 0.99, 0
    if name == "skip_gate":
        return 0.0004, 0.9, 0.99, 0
    return 0.04, 0.9, 0.99, 0


# ---------------------------------------------------------------------------------------------
# Training


class Reference:
    """A run of N steps, S of them scheduled. windows: the long one of each stage, in blocks."""

    def __init__(self, weights, boundary, windows, S, N, sequences):
        self.weights = {name: value.double().clone() for name, value in weights.items()}
        self.boundary, self.windows = boundary, windows
        self.S, self.N, self.sequences = S, N, sequences
        self.gradients = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.states = {name: {} for name in self.weights}
        self.untie_step = math.ceil(2 * S / 3) | 1

    def network_settings(self, step):
        """Windows in tokens, frequencies and scale."""
        past = self.windows[: stage(step, self.S) + 1]
        head_dim = self.weights["attentions.0.c_proj.weight"].size(1)
        head_dim //= len(self.weights["attentions.0.gate"])
        return (128 * past[-1], 128 * max(1, past[-1] // 2)), *yarn(past, head_dim)

    def logits(self, step, ids):
        return logits(self.weights, ids, self.boundary, *self.network_settings(step))

    def add_gradients(self, step, ids, targets):
        """Gradients of one sequence, as its share of the sum over the first stage's sequences."""
        for w in self.weights.values():
            w.requires_grad_()
        total = loss(self.logits(step, ids), targets, target_weights(step, self.S))
        names = list(self.weights)
        found = torch.autograd.grad(total / self.sequences, list(self.weights.values()))
        for name, gradient in zip(names, found, strict=True):
            self.weights[name].requires_grad_(False)
            self.gradients[name] += gradient

    def step(self, step, batch):
        for ids, targets in batch:
            self.add_gradients(step, ids, targets)
        rate, mu = rate_factor(step, self.S), momentum(step, self.N)
        matrices = [n for n in self.weights if n[0] in "am" and n.endswith("weight")]
        for name in matrices:
            self.muon_step(name, 0.023 * rate, mu)
        if step % 2 == 0:
            return
        head, embed = "lm_head.weight", "embed.weight"
        tied = step <= self.untie_step
        if tied:
            self.gradients[head] += self.gradients[embed]
        for name in self.weights.keys() - matrices:
            if not (tied and name == embed):
                lr, *others = adam_settings(name)
                adam(
                    self.weights[name], self.gradients[name], self.states[name], lr * rate, *others
                )
            self.gradients[name].zero_()
        if tied:
            self.weights[embed].copy_(self.weights[head])
        if step == self.untie_step:
            self.states[embed] = dict(self.states[head])

    def muon_step(self, name, lr, mu):
        """Its matrices one by one. Neurons are rows, or the columns of a wide matrix."""
        weight, gradient = self.weights[name], self.gradients[name]
        rows, columns = weight.shape[-2:]
        second = name.startswith("mlps") and name.endswith("c_proj.weight")
        factor = 4 if second else math.sqrt(max(1, rows / columns))
        for i, p in enumerate(weight.view(-1, rows, columns)):
            g = gradient.view(-1, rows, columns)[i]
            if rows < columns:
                p, g = p.T, g.T
            normuon(p, g, self.states[name].setdefault(i, {}), lr, mu, factor)
        gradient.zero_()
