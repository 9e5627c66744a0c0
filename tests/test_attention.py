"""Rotary positions, block masks and block-sparse attention against their reference."""

import random

import pytest
import reference
import torch
from helpers import documents
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

BOUNDARY = 256  # the last token of the vocabulary, which starts a document


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.bfloat16, 2e-2)])
def test_rotary_matches_reference(head_dim, dtype, tolerance):
    x = torch.randn(1, 512, 3, head_dim).to(dtype)
    rotated = train_gpt.Rotary(head_dim, 600)(x)
    assert rotated.dtype == dtype
    expected = reference.rotary(x[0].double())
    torch.testing.assert_close(rotated[0].double(), expected, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------
# Block masks


NETWORK = train_gpt.GPT(BOUNDARY + 1, 6, 1, 16, 16, 128)


def block_masks(ids, window):
    """The long and the short mask."""
    return NETWORK.create_block_masks(ids, torch.tensor(window, dtype=torch.int32))


def check_mask(mask, dense):
    """Compare a mask with a dense one (T, T), and its lists of blocks with sorted ones."""
    lists = reference.block_lists(dense)
    n, token = len(lists["kv"]), torch.arange(len(dense))
    dense = dense.view(n, -1, n, len(dense) // n)
    visible_blocks = dense.any(3, keepdim=True).any(1, keepdim=True)
    inside = mask.mask_mod(0, 0, token[:, None], token).view_as(dense)
    assert torch.equal(visible_blocks & inside, dense)
    for name, expected in lists.items():
        counts = getattr(mask, f"{name}_num_blocks")
        indices = getattr(mask, f"{name}_indices")
        rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
        assert [row[:count] for count, row in rows] == expected
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.min() >= 0 and indices.max() < n


def check_masks(ids, window):
    """The long and the short mask."""
    for mask, width in zip(block_masks(ids, window), (window, max(1, window // 2)), strict=True):
        check_mask(mask, reference.dense_mask(ids, BOUNDARY, width))


# The number of blocks, and the positions at which documents start.
LAYOUTS = {
    "one document": (6, [0]),
    "no boundary": (6, []),
    "no boundary at the start": (6, [300]),
    "a boundary at every edge": (6, range(0, 768, 128)),
    "a boundary before every edge": (6, range(127, 768, 128)),
    "a boundary after every edge": (6, range(1, 768, 128)),
    "boundaries only": (3, range(384)),
    "a boundary in the last place": (4, [0, 511]),
    "many short documents": (6, range(0, 768, 10)),
    "one block": (1, [0, 50]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_masks_match_definition(layout):
    blocks, starts = LAYOUTS[layout]
    for window in range(1, blocks + 3):
        check_masks(documents(blocks * 128, starts), window)


def test_block_masks_of_random_documents_match_definition(monkeypatch):
    """With blocks of 8 tokens, to be quick."""
    for module in (train_gpt, reference):
        monkeypatch.setattr(module, "BLOCK", 8)
    generator = random.Random(0)
    for seed in range(1000):
        length = 8 * generator.randint(1, 12)
        starts = generator.sample(range(length), generator.choice([0, 1, 2, 5, length // 4]))
        ids, window = documents(length, starts, seed=seed), generator.randint(1, 14)
        check_masks(ids, window)
        # The modern recipe's window, which ends at a token.
        token = torch.arange(length)
        near = token[:, None] - token <= 8 * window
        document = (ids == BOUNDARY).cumsum(0)
        mask = train_gpt.document_block_mask(document, torch.tensor(window), exact=True)
        check_mask(mask, near & reference.dense_mask(ids, BOUNDARY, length))


def test_visible_tokens_by_hand():
    """The reference, which the other tests trust."""
    dense = reference.dense_mask(documents(512, [0, 200]), BOUNDARY, 2)
    for q, k in [(0, 0), (199, 0), (200, 200), (300, 200), (384, 256), (511, 256)]:
        assert dense[q, k]
    for q, k in [(5, 6), (200, 199), (300, 199), (384, 255), (511, 255)]:
        assert not dense[q, k]


def test_block_masks_of_a_validation_sequence_fit_in_memory():
    """A dense mask of 256K tokens would have 64 GiB."""
    mask, _ = block_masks(documents(256 * 1024, [0]), 14)
    assert mask.kv_num_blocks[0, 0, -1] + mask.full_kv_num_blocks[0, 0, -1] == 14


# --------------------------------------------------------------------------------------------------
# Block-sparse attention


def views(length, dtype=torch.float32):
    """A tensor (1, 2, length, 16), not contiguous, as the network's queries, keys and values."""
    return torch.randn(1, length, 2, 16).to(dtype).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "blocks, starts, window",
    [
        (1, [], 3),
        (5, [0], 1),
        (5, [0], 2),
        (5, [0], 7),
        (5, [0, 130, 256, 511], 3),
        (5, range(0, 640, 9), 4),
        (4, range(512), 2),
    ],
)
def test_block_sparse_attention_matches_dense(blocks, starts, window, dtype, tolerance):
    """The output, and the gradients of queries, keys and values."""
    ids = documents(blocks * 128, starts)
    inputs = [views(len(ids), dtype) for _ in range(3)]
    grad = torch.randn(1, 2, len(ids), 16).to(dtype)
    attend = train_gpt.attention_under(block_masks(ids, window)[0])
    output = attend(*inputs, scale=0.12)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    dense = reference.dense_mask(ids, BOUNDARY, window)
    exact_output = reference.dense_attention(*exact_inputs, dense, 0.12)
    actual = [output, *torch.autograd.grad(output, inputs, grad)]
    expected = [exact_output, *torch.autograd.grad(exact_output, exact_inputs, grad.double())]
    for t, exact in zip(actual, expected, strict=True):
        assert t.dtype == dtype
        # Where the result is zero, rounding of sums of order one remains.
        assert (t.double() - exact).abs().max() <= tolerance * max(0.1, exact.abs().max())


def test_attention_costs_a_window_for_each_query():
    attend = train_gpt.attention_under(block_masks(documents(2048, [0]), 2)[0])
    inputs = [views(2048) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        attend(*inputs, scale=0.12)
    two_matmuls = 2 * 2 * 2 * 2048 * 256 * 16
    assert counter.get_total_flops() == two_matmuls
