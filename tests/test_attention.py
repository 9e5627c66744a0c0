"""Rotary positions, block masks and block-sparse attention, held to dense masks and dense softmax."""

import inspect
import math

import numpy as np
import pytest
import torch
import train_gpt
import twins
from conftest import LargestTensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK, BOUNDARY = 128, 256

# ---------------------------------------------------------------------------------------------------------
# Rotary


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
def test_rotary_is_the_written_out_rotation(head_dim, dtype, tolerance):
    x = torch.randn(1, 512, 3, head_dim).to(dtype)
    turned = train_gpt.Rotary(head_dim, 600)(x)
    assert turned.shape == x.shape and turned.dtype == dtype
    torch.testing.assert_close(turned[0].double(), twins.rotary(x[0].double()), rtol=tolerance, atol=tolerance)


def test_rotary_frequencies():
    """The angle at position 1, read back from what the buffers turn (1, 0) into."""
    unit = torch.cat([torch.ones(1, 2, 1, 32), torch.zeros(1, 2, 1, 32)], dim=-1)
    turned = train_gpt.Rotary(64, 2)(unit)[0, 1, 0]
    angle = torch.atan2(-turned[32:], turned[:32])
    expected = [1024 ** (-c / 15) for c in range(16)] + [0.0] * 16
    torch.testing.assert_close(angle, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_rotary_buffers_are_float32_and_not_saved():
    rotary = train_gpt.Rotary(64, 256)
    assert rotary.state_dict() == {} and not list(rotary.parameters())
    buffers = list(rotary.buffers())
    assert len(buffers) == 2 and {b.dtype for b in buffers} == {torch.float32}


def test_rotary_keeps_the_length_of_each_pair():
    x = torch.randn(1, 512, 2, 64)
    turned = train_gpt.Rotary(64, 512)(x)
    before, after = (torch.hypot(*t.chunk(2, dim=-1)) for t in (x, turned))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    rotary = train_gpt.Rotary(64, 512)
    turned_q, turned_k = (rotary(t.float().expand(1, 512, 1, 64))[0, :, 0].double() for t in (q, k))
    for distance in (0, 1, 17, 200):
        scores = (turned_q[distance:] * turned_k[:512 - distance]).sum(-1)
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), rtol=0, atol=2e-3)
    assert (turned_q[1] * turned_k[0]).sum() != (turned_q[0] * turned_k[1]).sum()


def test_rotary_refuses_more_positions_than_it_has():
    with pytest.raises(ValueError, match="300"):
        train_gpt.Rotary(64, 256)(torch.randn(1, 300, 1, 64))


# ---------------------------------------------------------------------------------------------------------
# Block masks


def masks(ids, window, vocab_size=BOUNDARY + 1):
    """The long and the short mask, of a network that has nothing else to do with them."""
    net = train_gpt.GPT(vocab_size, 6, 1, 16, 16, 128)
    return net.create_block_masks(ids, torch.tensor(window, dtype=torch.int32))


def listed(counts, indices):
    """Whether each block is listed for each, (rows, columns) bool, from counts (1, 1, rows), indices (1, 1, rows, columns)."""
    rows = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, index) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist())):
        assert len(set(index[:count])) == count  # none twice
        rows[row, index[:count]] = True
    return rows


def expand(mask):
    """A BlockMask as partial blocks (n, n), full blocks (n, n) and all tokens (T, T), bool."""
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    token = torch.arange(len(partial) * BLOCK)
    inside = mask.mask_mod(torch.tensor(0), torch.tensor(0), token[:, None], token[None, :])

    def blown_up(blocks):
        return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)

    return partial, full, blown_up(partial) & inside | blown_up(full)


def layouts():
    """Names and starts of documents over n blocks, as (n, starts)."""
    rng = np.random.default_rng(0)
    yield "one long document", 6, [0]
    yield "no boundary at all", 6, []
    yield "no boundary at the start", 6, [300]
    yield "a boundary at every edge", 6, range(0, 6 * BLOCK, BLOCK)
    yield "a boundary just before every edge", 6, range(BLOCK - 1, 6 * BLOCK, BLOCK)
    yield "a boundary just after every edge", 6, range(1, 6 * BLOCK, BLOCK)
    yield "a boundary everywhere", 3, range(3 * BLOCK)
    yield "two documents that meet at an edge", 6, [0, 3 * BLOCK]
    yield "a boundary in the last place", 4, [0, 4 * BLOCK - 1]
    yield "many short documents", 6, range(0, 6 * BLOCK, 10)
    yield "one block", 1, [0, 50]
    yield "one block without a boundary", 1, []
    for seed in range(8):
        n = int(rng.integers(1, 9))
        yield f"random {seed}", n, rng.choice(n * BLOCK, size=int(rng.choice([1, 2, 5, 40])), replace=False)


LAYOUTS = {name: (n, sorted(int(s) for s in starts)) for name, n, starts in layouts()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_equal_the_definition_token_for_token(layout, documents):
    """For every window from one block to more than there are. Also: full blocks are exactly those that are all ones, no
    listed block is empty, and nearer ones come first."""
    n, starts = LAYOUTS[layout]
    ids = documents(n * BLOCK, starts)
    for window in range(1, n + 3):
        for mask, blocks in zip(masks(ids, window), (window, max(1, window // 2))):
            expected = twins.dense_mask(ids, BOUNDARY, blocks)
            partial, full, tokens = expand(mask)
            assert torch.equal(tokens, expected)
            allowed = expected.view(n, BLOCK, n, BLOCK).sum((1, 3))
            assert torch.equal(full, allowed == BLOCK * BLOCK)
            assert torch.equal(partial, (0 < allowed) & (allowed < BLOCK * BLOCK))
            # FlexAttention's backward pass walks the same lists by key block.
            assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
            assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)
            for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
                for count, index in zip(counts[0, 0].tolist(), indices[0, 0].tolist()):
                    assert index[:count] == sorted(index[:count], reverse=True)


def test_definition_itself_by_hand(documents):
    """The twin, and the mask, at a few places that a person can check."""
    ids = documents(4 * BLOCK, [0, 200])
    tokens = expand(masks(ids, 2)[0])[2]
    for q, k, sees in [(0, 0, True), (5, 6, False), (199, 0, True), (200, 199, False), (200, 200, True), (300, 200, True),
                       (300, 199, False), (384, 255, False), (384, 256, True), (511, 256, True), (511, 255, False)]:
        assert bool(tokens[q, k]) is sees
        assert bool(twins.dense_mask(ids, BOUNDARY, 2)[q, k]) is sees


def test_masks_are_made_of_small_integers_and_not_of_the_dense_mask(documents):
    for mask in masks(documents(5 * BLOCK, [0, 77]), 3):
        for counts, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
            assert (counts.shape, indices.shape) == ((1, 1, 5), (1, 1, 5, 5))
            assert counts.dtype == indices.dtype == torch.int32
        assert mask.BLOCK_SIZE == (BLOCK, BLOCK) and mask.seq_lengths == (5 * BLOCK, 5 * BLOCK)


def test_cost_of_the_masks_is_of_the_order_of_blocks_squared(documents):
    n = 64
    net = train_gpt.GPT(BOUNDARY + 1, 6, 1, 16, 16, 128)
    ids, window = documents(n * BLOCK, [0, 1000, 5000]), torch.tensor(4, dtype=torch.int32)
    with LargestTensor() as seen:
        net.create_block_masks(ids, window)
    assert seen.elements <= max(n * BLOCK, 2 * n * (n + 1))
    assert not seen.read_on_host  # on a GPU, a wait in every step


def test_boundary_token_is_the_vocabularys_last(documents):
    ids = documents(2 * BLOCK, [130], vocab_size=50257)
    tokens = expand(masks(ids, 2, vocab_size=50257)[0])[2]
    assert torch.equal(tokens, twins.dense_mask(ids, 50256, 2))


@pytest.mark.parametrize("ids", [torch.zeros(100, dtype=torch.int32), torch.zeros(1, 128, dtype=torch.int32)])
def test_sequences_that_are_not_whole_blocks_are_refused(ids):
    with pytest.raises(ValueError, match="128"):
        masks(ids, 1)


# ---------------------------------------------------------------------------------------------------------
# Block-sparse attention


def draw_qkv(heads, T, head_dim, dtype=torch.float32):
    return [torch.randn(1, heads, T, head_dim).to(dtype).requires_grad_() for _ in range(3)]


def output_and_gradients(function, inputs, d_out):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_against_dense(mask, tokens, dtype=torch.float32, tolerance=2e-5, heads=2, head_dim=16, scale=0.12):
    """Output and gradients, the largest error relative to the largest value."""
    inputs = draw_qkv(heads, len(tokens), head_dim, dtype)
    d_out = torch.randn(inputs[0].shape).to(dtype)
    ours = output_and_gradients(lambda q, k, v: train_gpt.block_sparse_attention(q, k, v, mask, scale), inputs, d_out)
    twin = output_and_gradients(lambda q, k, v: twins.dense_attention(q, k, v, tokens, scale), [t.double() for t in inputs], d_out)
    for actual, expected in zip(ours, twin):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert bool(actual.isfinite().all())
        error, size = (actual.double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(0.1, size)  # where all is zero: what float32 leaves over of sums of order one


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("n, starts, window", [
    (1, [0], 1), (1, [], 3), (5, [0], 1), (5, [0], 2), (5, [0], 7), (5, [0, 130, 256, 511], 3), (5, range(0, 640, 9), 4),
    (4, range(4 * BLOCK), 2)])
def test_sparse_attention_is_dense_attention_under_the_networks_masks(n, starts, window, dtype, tolerance, documents):
    ids = documents(n * BLOCK, starts)
    for mask, blocks in zip(masks(ids, window), (window, max(1, window // 2))):
        check_against_dense(mask, twins.dense_mask(ids, BOUNDARY, blocks), dtype, tolerance)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
def test_scale_is_the_callers_and_sharp_softmaxes_stay_finite(scale, documents):
    ids = documents(3 * BLOCK, [0, 200])
    check_against_dense(masks(ids, 2)[0], twins.dense_mask(ids, BOUNDARY, 2), scale=scale, tolerance=1e-4)


@pytest.mark.parametrize("heads, head_dim", [(1, 8), (3, 32)])
def test_heads_are_independent(heads, head_dim, documents):
    ids = documents(3 * BLOCK, [0, 200])
    check_against_dense(masks(ids, 2)[0], twins.dense_mask(ids, BOUNDARY, 2), heads=heads, head_dim=head_dim)


def test_tensors_need_not_be_contiguous(documents):
    """The network hands over transposed views."""
    ids = documents(3 * BLOCK, [0, 200])
    mask, _ = masks(ids, 2)
    stored = [torch.randn(1, 3 * BLOCK, 2, 16) for _ in range(4)]
    views, copies = [t.transpose(1, 2) for t in stored], [t.transpose(1, 2).contiguous() for t in stored]
    results = []
    for *inputs, d_out in (views, copies):
        results.append(output_and_gradients(lambda q, k, v: train_gpt.block_sparse_attention(q, k, v, mask, 0.12), inputs, d_out))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


# Masks that no network of this project makes, but FlexAttention takes: what is inside a block may depend on anything.
MASK_MODS = {
    "causal": lambda b, h, q, k: k <= q,
    "stripes": lambda b, h, q, k: (q + k) % 3 == 0,
    "some keys alone": lambda b, h, q, k: k % 5 == 0,
    "some queries alone": lambda b, h, q, k: q % 5 == 0,
    "almost nothing": lambda b, h, q, k: (q == 140) & (k == 7),
    "everything, as the default of BlockMask": None,
}


def random_block_mask(n, mask_mod, with_full, seed):
    """Blocks listed at random, in no order, for some rows none at all. In full ones the mask is true, as everywhere."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(4 if with_full else 2, (n, n), generator=generator)  # 1: partial, 2: full, otherwise not listed
    kind[seed % n] = 0

    def lists(chosen):
        index = torch.stack([torch.randperm(n, generator=generator) for _ in range(n)])
        index = torch.stack([torch.cat([row[chosen[i, row]], row[~chosen[i, row]]]) for i, row in enumerate(index)])
        return chosen.sum(-1, dtype=torch.int32)[None, None], index.int()[None, None]

    given = dict(mask_mod=lambda b, h, q, k: mask_mod(b, h, q, k) | (kind[q // BLOCK, k // BLOCK] == 2)) if mask_mod else {}
    return BlockMask.from_kv_blocks(*lists(kind == 1), *(lists(kind == 2) if with_full else ()), BLOCK_SIZE=BLOCK, **given)


@pytest.mark.parametrize("mask_mod", MASK_MODS)
@pytest.mark.parametrize("with_full", [True, False])
def test_any_block_mask_is_honoured(mask_mod, with_full):
    for seed in range(3):
        mask = random_block_mask(4, MASK_MODS[mask_mod], with_full, seed)
        partial, full, tokens = expand(mask)
        assert not tokens.any(-1).all()  # rows that see nothing are among them
        check_against_dense(mask, tokens)


def test_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    mask = random_block_mask(3, MASK_MODS["stripes"], True, seed=1)
    blind = ~expand(mask)[2].any(-1)
    assert blind[BLOCK:2 * BLOCK].all()
    q, k, v = draw_qkv(2, 3 * BLOCK, 16)
    out = train_gpt.block_sparse_attention(q, k, v, mask, 0.12)
    out.square().sum().backward()
    assert not out[:, :, blind].any() and not q.grad[:, :, blind].any()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_forward_equals_flex_attention(documents):
    """torch's own, whose forward pass runs on the CPU. Uncompiled it looks at the mask inside the blocks alone, so it is
    given that of all tokens."""
    shapes = [masks(documents(4 * BLOCK, [0, 77, 256]), 2)[0], masks(documents(4 * BLOCK, [0]), 3)[1],
              random_block_mask(4, MASK_MODS["causal"], True, 2), random_block_mask(4, MASK_MODS["stripes"], False, 3)]
    for mask in shapes:
        q, k, v = (t.detach() for t in draw_qkv(2, 4 * BLOCK, 16))
        ours = train_gpt.block_sparse_attention(q, k, v, mask, 0.12)
        tokens = expand(mask)[2]
        mask.mask_mod = lambda b, h, q, k: tokens[q, k]
        torch.testing.assert_close(ours, flex_attention(q, k, v, block_mask=mask, scale=0.12), rtol=1e-4, atol=1e-5)


def test_gradients_by_finite_differences(documents):
    """Without the twin: a step along a random direction changes the loss by the gradient's product with it."""
    mask, _ = masks(documents(2 * BLOCK, [0, 50]), 2)
    inputs = draw_qkv(1, 2 * BLOCK, 8)
    d_out = torch.randn(inputs[0].shape)

    def loss(q, k, v):
        return (train_gpt.block_sparse_attention(q, k, v, mask, 1.0).double() * d_out).sum()

    loss(*inputs).backward()
    for index, t in enumerate(inputs):
        direction = torch.randn_like(t)
        around = []
        for sign in (1, -1):
            moved = [u.detach().clone() for u in inputs]
            moved[index] += sign * 1e-2 * direction
            around.append(loss(*moved))
        slope = (around[0] - around[1]) / 2e-2
        assert slope.item() == pytest.approx((t.grad * direction).sum().item(), rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_cost_grows_with_the_window_and_not_with_the_square_of_the_length(n, window, documents):
    """No tensor, forward or backward, holds more than the scores of `window` blocks for each query."""
    heads, head_dim = 2, 16
    mask, _ = masks(documents(n * BLOCK, [0]), window)
    inputs = draw_qkv(heads, n * BLOCK, head_dim)
    with LargestTensor() as seen:
        train_gpt.block_sparse_attention(*inputs, mask, 0.12).sum().backward()
    assert seen.elements <= heads * n * BLOCK * window * BLOCK


def test_attention_on_a_cpu_is_the_sparse_one(documents):
    mask, _ = masks(documents(2 * BLOCK, [0, 50]), 2)
    q, k, v = draw_qkv(2, 2 * BLOCK, 16)
    assert torch.equal(train_gpt.attention(q, k, v, mask, 0.12), train_gpt.block_sparse_attention(q, k, v, mask, 0.12))


# ---------------------------------------------------------------------------------------------------------
# The attention layer


def test_layer_keeps_its_weights_as_three_matrices_and_a_zero_projection():
    layer = train_gpt.CausalSelfAttention(48, 2, 16, 256)
    weights = dict(layer.named_parameters())
    assert weights["qkv.weight"].shape == (3, 32, 48) and weights["c_proj.weight"].shape == (48, 32)
    assert not weights["c_proj.weight"].any()
    assert weights["lambdas"].tolist() == [0.5, 0.5]
    assert weights["qkv.weight"].std().item() == pytest.approx(0.5 / math.sqrt(48), rel=0.05)
    assert "head_dim" in inspect.signature(train_gpt.CausalSelfAttention).parameters
