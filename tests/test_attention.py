"""Rotary positions, block masks and block-sparse attention, held to dense masks and softmax."""

import numpy as np
import pytest
import torch
import twins
from conftest import LargestTensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import train_gpt

BLOCK = 128
BOUNDARY = 256

# ---------------------------------------------------------------------------------------------
# Rotary


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
def test_rotary_is_the_written_out_rotation(head_dim, dtype, tolerance):
    x = torch.randn(1, 512, 3, head_dim).to(dtype)
    turned = train_gpt.Rotary(head_dim, 600)(x)
    assert turned.shape == x.shape and turned.dtype == dtype
    expected = twins.rotary(x[0].double())
    torch.testing.assert_close(turned[0].double(), expected, rtol=tolerance, atol=tolerance)


def test_rotary_buffers_are_float32_and_not_saved():
    rotary = train_gpt.Rotary(64, 256)
    assert rotary.state_dict() == {} and not list(rotary.parameters())
    assert [b.dtype for b in rotary.buffers()] == [torch.float32] * 2


def test_rotary_refuses_more_positions_than_it_has():
    with pytest.raises(ValueError, match="300"):
        train_gpt.Rotary(64, 256)(torch.randn(1, 300, 1, 64))


# ---------------------------------------------------------------------------------------------
# Block masks


def masks(ids, window, vocab_size=BOUNDARY + 1):
    """The long and the short mask, made by a network that is used for nothing else."""
    net = train_gpt.GPT(vocab_size, 6, 1, 16, 16, 128)
    return net.create_block_masks(ids, torch.tensor(window, dtype=torch.int32))


def long_mask(ids, window):
    """The long mask, and which token may attend which by the definition, (T, T) bool."""
    return masks(ids, window)[0], twins.dense_mask(ids, BOUNDARY, window)


def listed(counts, indices):
    """Which column each row lists, (rows, columns) bool, from a BlockMask's counts and indices."""
    rows = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (count, index) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
        assert len(index[:count].unique()) == count  # none twice
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
    partial_tokens, full_tokens = (
        blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) for blocks in (partial, full)
    )
    return partial, full, partial_tokens & inside | full_tokens


def random_layout(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    starts = rng.choice(n * BLOCK, size=int(rng.choice([1, 2, 5, 40])), replace=False)
    return n, sorted(starts.tolist())


# The number of blocks, and the positions at which documents start.
LAYOUTS = {
    "one long document": (6, [0]),
    "no boundary at all": (6, []),
    "no boundary at the start": (6, [300]),
    "a boundary at every edge": (6, range(0, 6 * BLOCK, BLOCK)),
    "a boundary just before every edge": (6, range(BLOCK - 1, 6 * BLOCK, BLOCK)),
    "a boundary just after every edge": (6, range(1, 6 * BLOCK, BLOCK)),
    "a boundary everywhere": (3, range(3 * BLOCK)),
    "two documents that meet at an edge": (6, [0, 3 * BLOCK]),
    "a boundary in the last place": (4, [0, 4 * BLOCK - 1]),
    "many short documents": (6, range(0, 6 * BLOCK, 10)),
    "one block": (1, [0, 50]),
    "one block without a boundary": (1, []),
} | {f"random {seed}": random_layout(seed) for seed in range(8)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_equal_the_definition_token_for_token(layout, documents):
    """For every window from one block to more than there are.

    Also: full blocks are exactly those without a masked pair, no listed block is empty, and nearer
    blocks come first.
    """
    n, starts = LAYOUTS[layout]
    ids = documents(n * BLOCK, starts)
    for window in range(1, n + 3):
        for mask, width in zip(masks(ids, window), (window, max(1, window // 2)), strict=True):
            expected = twins.dense_mask(ids, BOUNDARY, width)
            partial, full, tokens = expand(mask)
            assert torch.equal(tokens, expected)
            allowed = expected.view(n, BLOCK, n, BLOCK).sum((1, 3))
            assert torch.equal(full, allowed == BLOCK * BLOCK)
            assert torch.equal(partial, (allowed > 0) & (allowed < BLOCK * BLOCK))
            # FlexAttention's backward pass walks the same lists by key block.
            assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), partial.T)
            assert torch.equal(listed(mask.full_q_num_blocks, mask.full_q_indices), full.T)
            check_lists(mask, n)


def check_lists(mask, n):
    """The block lists are small, of the integers that FlexAttention takes, and nearest first."""
    assert mask.BLOCK_SIZE == (BLOCK, BLOCK) and mask.seq_lengths == (n * BLOCK, n * BLOCK)
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert (counts.shape, indices.shape) == ((1, 1, n), (1, 1, n, n))
        assert counts.dtype == indices.dtype == torch.int32
        for count, index in zip(counts[0, 0], indices[0, 0].tolist(), strict=True):
            assert index[:count] == sorted(index[:count], reverse=True)


def test_definition_itself_by_hand(documents):
    """The twin, and the mask, at a few places that a person can check."""
    ids = documents(4 * BLOCK, [0, 200])
    mask, dense = long_mask(ids, 2)
    seen = [(0, 0), (199, 0), (200, 200), (300, 200), (384, 256), (511, 256)]
    unseen = [(5, 6), (200, 199), (300, 199), (384, 255), (511, 255)]
    for tokens in (expand(mask)[2], dense):
        assert all(tokens[q, k] for q, k in seen)
        assert not any(tokens[q, k] for q, k in unseen)


def test_cost_of_the_masks_is_of_the_order_of_blocks_squared(documents):
    n = 64
    net = train_gpt.GPT(BOUNDARY + 1, 6, 1, 16, 16, 128)
    ids = documents(n * BLOCK, [0, 1000, 5000])
    window = torch.tensor(4, dtype=torch.int32)
    with LargestTensor() as seen:
        net.create_block_masks(ids, window)
    assert seen.elements <= max(n * BLOCK, 2 * n * (n + 1))
    assert not seen.read_on_host  # on a GPU this would be a wait in every step


def test_boundary_token_is_the_vocabularys_last(documents):
    ids = documents(2 * BLOCK, [130], vocab_size=50257)
    tokens = expand(masks(ids, 2, vocab_size=50257)[0])[2]
    assert torch.equal(tokens, twins.dense_mask(ids, 50256, 2))


@pytest.mark.parametrize("shape", [(100,), (1, 128)])
def test_sequences_that_are_not_whole_blocks_are_refused(shape):
    with pytest.raises(ValueError, match="128"):
        masks(torch.zeros(shape, dtype=torch.int32), 1)


# ---------------------------------------------------------------------------------------------
# Block-sparse attention


def draw_qkv(heads, T, head_dim, dtype=torch.float32):
    return [torch.randn(1, heads, T, head_dim).to(dtype).requires_grad_() for _ in range(3)]


def output_and_gradients(function, inputs, d_out):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(d_out.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_against_dense(
    mask, tokens, dtype=torch.float32, tolerance=2e-5, heads=2, head_dim=16, scale=0.12
):
    """Output and gradients, the largest error relative to the largest value."""

    def sparse(q, k, v):
        return train_gpt.block_sparse_attention(q, k, v, mask, scale)

    def dense(q, k, v):
        return twins.dense_attention(q, k, v, tokens, scale)

    inputs = draw_qkv(heads, len(tokens), head_dim, dtype)
    d_out = torch.randn(inputs[0].shape).to(dtype)
    ours = output_and_gradients(sparse, inputs, d_out)
    twin = output_and_gradients(dense, [t.double() for t in inputs], d_out)
    for actual, expected in zip(ours, twin, strict=True):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert bool(actual.isfinite().all())
        error = (actual.double() - expected).abs().max()
        # Where all is zero, float32 leaves its rounding of sums of order one.
        assert error <= tolerance * max(0.1, expected.abs().max())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "n, starts, window",
    [
        (1, [0], 1),
        (1, [], 3),
        (5, [0], 1),
        (5, [0], 2),
        (5, [0], 7),
        (5, [0, 130, 256, 511], 3),
        (5, range(0, 640, 9), 4),
        (4, range(4 * BLOCK), 2),
    ],
)
def test_sparse_attention_is_dense_attention_under_the_networks_masks(
    n, starts, window, dtype, tolerance, documents
):
    ids = documents(n * BLOCK, starts)
    for mask, width in zip(masks(ids, window), (window, max(1, window // 2)), strict=True):
        check_against_dense(mask, twins.dense_mask(ids, BOUNDARY, width), dtype, tolerance)


@pytest.mark.parametrize(
    "options",
    [dict(scale=0.01), dict(scale=1.0), dict(scale=8.0, tolerance=1e-4), dict(heads=1, head_dim=8)],
    ids=str,
)
def test_any_scale_and_number_of_heads_is_taken(options, documents):
    mask, tokens = long_mask(documents(3 * BLOCK, [0, 200]), 2)
    check_against_dense(mask, tokens, **options)


def test_tensors_need_not_be_contiguous(documents):
    """The network gives transposed views."""
    mask, _ = long_mask(documents(3 * BLOCK, [0, 200]), 2)
    views = [torch.randn(1, 3 * BLOCK, 2, 16).transpose(1, 2) for _ in range(4)]
    copies = [t.contiguous() for t in views]

    def attend(q, k, v):
        return train_gpt.block_sparse_attention(q, k, v, mask, 0.12)

    results = [output_and_gradients(attend, inputs, d) for *inputs, d in (views, copies)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# Masks that this project's network never makes, but FlexAttention takes: what is allowed inside a
# block may depend on anything.
MASK_MODS = {
    "causal": lambda b, h, q, k: k <= q,
    "stripes": lambda b, h, q, k: (q + k) % 3 == 0,
    "some keys alone": lambda b, h, q, k: k % 5 == 0,
    "some queries alone": lambda b, h, q, k: q % 5 == 0,
    "almost nothing": lambda b, h, q, k: (q == 140) & (k == 7),
    "everything, as the default of BlockMask": None,
}


def random_block_mask(n, mask_mod, with_full, seed):
    """Blocks listed at random, in no order, for one row none at all.

    In full blocks the mask is true, as FlexAttention takes for granted.
    """
    generator = torch.Generator().manual_seed(seed)
    # 1 stands for a partial block, 2 for a full one, and 0 and 3 for one that is not listed.
    kind = torch.randint(4 if with_full else 2, (n, n), generator=generator)
    kind[seed % n] = 0

    def lists(chosen):
        index = torch.stack([torch.randperm(n, generator=generator) for _ in range(n)])
        order = chosen.gather(1, index).argsort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)  # the chosen ones first
        return chosen.sum(-1, dtype=torch.int32)[None, None], index.int()[None, None]

    def allowed(b, h, q, k):
        return mask_mod(b, h, q, k) | (kind[q // BLOCK, k // BLOCK] == 2)

    blocks = [*lists(kind == 1), *(lists(kind == 2) if with_full else ())]
    options = {"mask_mod": allowed} if mask_mod else {}
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, **options)


@pytest.mark.parametrize("mask_mod", MASK_MODS)
@pytest.mark.parametrize("with_full", [True, False])
def test_any_block_mask_is_honoured(mask_mod, with_full):
    for seed in range(3):
        mask = random_block_mask(4, MASK_MODS[mask_mod], with_full, seed)
        tokens = expand(mask)[2]
        assert not tokens.any(-1).all()  # rows that see nothing are among them
        check_against_dense(mask, tokens)


def test_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    mask = random_block_mask(3, MASK_MODS["stripes"], True, seed=1)
    blind = ~expand(mask)[2].any(-1)
    assert blind[BLOCK : 2 * BLOCK].all()
    q, k, v = draw_qkv(2, 3 * BLOCK, 16)
    out = train_gpt.block_sparse_attention(q, k, v, mask, 0.12)
    out.square().sum().backward()
    assert not out[:, :, blind].any() and not q.grad[:, :, blind].any()
    assert all(bool(t.grad.isfinite().all()) for t in (q, k, v))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_forward_equals_flex_attention(documents):
    """torch's own, whose forward pass runs on the CPU.

    Uncompiled it looks at the mask inside the blocks alone, so it is given the mask of all tokens.
    """
    for mask in (
        masks(documents(4 * BLOCK, [0, 77, 256]), 2)[0],
        masks(documents(4 * BLOCK, [0]), 3)[1],
        random_block_mask(4, MASK_MODS["causal"], True, 2),
        random_block_mask(4, MASK_MODS["stripes"], False, 3),
    ):
        q, k, v = (t.detach() for t in draw_qkv(2, 4 * BLOCK, 16))
        ours = train_gpt.block_sparse_attention(q, k, v, mask, 0.12)
        tokens = expand(mask)[2]
        mask.mask_mod = lambda b, h, q, k, tokens=tokens: tokens[q, k]
        flex = flex_attention(q, k, v, block_mask=mask, scale=0.12)
        torch.testing.assert_close(ours, flex, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_cost_grows_with_the_window_and_not_with_the_square_of_the_length(n, window, documents):
    """No tensor, forward or backward, is larger than the scores of `window` blocks a query."""
    heads = 2
    mask, _ = masks(documents(n * BLOCK, [0]), window)
    inputs = draw_qkv(heads, n * BLOCK, 16)
    with LargestTensor() as seen:
        train_gpt.block_sparse_attention(*inputs, mask, 0.12).sum().backward()
    assert seen.elements <= heads * n * BLOCK * window * BLOCK


def test_attention_on_a_cpu_is_the_sparse_one(documents):
    mask, _ = masks(documents(2 * BLOCK, [0, 50]), 2)
    qkv = draw_qkv(2, 2 * BLOCK, 16)
    sparse = train_gpt.block_sparse_attention(*qkv, mask, 0.12)
    assert torch.equal(train_gpt.attention(*qkv, mask, 0.12), sparse)
