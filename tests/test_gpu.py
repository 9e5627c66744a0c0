"""What has to hold on a GPU: `bash tests/gpu.sh 1`, or `pytest -m gpu`.

Everything that only a GPU runs (FP8 matmuls, compiled FlexAttention, the compiled network) is
compared with its reference. Without a GPU the same tests run on the CPU at small sizes, which
proves the tests and nothing about a GPU.
"""

import pytest
import reference
import torch
from helpers import documents, write_shards

import train_gpt

pytestmark = pytest.mark.gpu

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
VOCAB = 50257 if GPU else 257
SHAPE = (
    dict(num_layers=12, num_heads=6, head_dim=128)
    if GPU
    else dict(num_layers=6, num_heads=2, head_dim=32)
)
DIM = SHAPE["num_heads"] * SHAPE["head_dim"]
T = 2048 if GPU else 256

train_gpt.configure_torch(train_gpt.SOURCE)


def compiled(function):
    """Compile as training does, without a graph break; on a CPU do nothing."""
    return torch.compile(function, dynamic=False, fullgraph=True) if GPU else function


def blocks(number):
    return torch.tensor(number, dtype=torch.int32, device=DEVICE)


def random_ids(length):
    """Ids (length,) int32 in documents of about 700 tokens, as in FineWeb."""
    starts = torch.randint(length, (1 + length // 700,)).tolist()
    return documents(length, starts, VOCAB).to(DEVICE)


def random_network(**options):
    """A network in which no weight is zero, which would hide a part of it."""
    network = train_gpt.GPT(VOCAB, **SHAPE, model_dim=DIM, max_seq_len=T, **options)
    for p in network.parameters():
        if not p.any() or p.ndim < 2:
            p.data.add_(torch.randn_like(p) * 0.02)
    return network.to(DEVICE)


def error(result, expected):
    """Relative error in the Frobenius norm."""
    expected = expected.double()
    return float((result.detach().double() - expected).norm() / expected.norm())


def test_fp8_matmul_and_gradients_equal_their_definition():
    scales = dict(x_s=2.0, w_s=32.0, grad_s=4096.0)
    x = torch.randn(T, DIM, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(4 * DIM, DIM, device=DEVICE).div_(DIM**0.5).requires_grad_()
    grad = torch.randn(T, 4 * DIM, device=DEVICE, dtype=torch.bfloat16) / T
    out, *_ = compiled(torch.ops.nanogpt.mm)(x, w, *scales.values())
    out.backward(grad)
    x_and_w = x.detach(), w.detach()
    expected = reference.fp8_mm(*x_and_w, scales["x_s"], scales["w_s"])
    expected_grads = reference.fp8_mm_backward(grad, *x_and_w, *scales.values())
    # Sums are rounded to bfloat16, or accumulated in less than float32.
    for result, exact in zip((out, x.grad, w.grad), (expected, *expected_grads), strict=True):
        assert error(result, exact) < 0.006
    assert [t.dtype for t in (out, x.grad, w.grad)] == [x.dtype, x.dtype, torch.float32]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("length", [256, 2048, 48 * 1024] if GPU else [256, 512])
def test_attention_and_gradients_equal_the_dense_ones(length, dtype, tolerance):
    """Of a long sequence, 64 queries are compared: all would be too many for dense attention."""
    window, H, D = 2, SHAPE["num_heads"], SHAPE["head_dim"]  # less than most documents
    ids = random_ids(length)
    q, k, v = (torch.randn(1, H, length, D, device=DEVICE, dtype=dtype) for _ in range(3))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    rows = torch.randint(length, (64,), device=DEVICE).unique()
    grad = torch.zeros_like(q)
    grad[:, :, rows] = torch.randn(1, H, len(rows), D, device=DEVICE, dtype=dtype)

    def attend(q, k, v, ids, window):
        document = (ids == VOCAB - 1).cumsum(0)
        mask = train_gpt.document_block_mask(document, window)
        return train_gpt.attention_under(mask)(q, k, v, scale=0.12)

    out = compiled(attend)(*inputs, ids, blocks(window))
    grads = torch.autograd.grad(out, inputs, grad)
    document, token = (ids == VOCAB - 1).cumsum(0), torch.arange(length, device=DEVICE)
    seen = (token <= rows[:, None]) & (document == document[rows][:, None])
    seen &= token // 128 > (rows // 128 - window)[:, None]
    exact = [t.detach().double()[0].requires_grad_() for t in inputs]
    expected = reference.dense_attention(exact[0][:, rows], *exact[1:], seen, 0.12)
    expected_grads = torch.autograd.grad(expected, exact, grad[0, :, rows].double())
    assert error(out[0, :, rows], expected) < tolerance
    for result, wanted in zip(grads, expected_grads, strict=True):
        assert error(result[0], wanted) < tolerance


@pytest.mark.parametrize(
    "dtype, fp8, loss_tolerance, grad_tolerance",
    [
        (torch.float32, "none", 1e-5, 2e-3),
        (torch.bfloat16, "none", 2e-3, 0.05),
        (torch.bfloat16, "all", 1e-2, 0.3),  # e5m2 rounds gradients by 5% in every layer
    ],
)
def test_network_and_gradients_equal_the_reference(dtype, fp8, loss_tolerance, grad_tolerance):
    if fp8 != "none" and GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    network = random_network(dtype=dtype)
    train_gpt.choose_fp8(network, fp8, T)
    ids, targets = random_ids(T), torch.randint(VOCAB, (T,), device=DEVICE)
    loss = compiled(network)(ids, targets, blocks(9))
    loss.backward()
    weights = network.state_dict()
    expected, grads = reference.gpt_loss_and_gradients(
        weights, ids, targets, 9, vocab_size=VOCAB, **SHAPE
    )
    assert abs(loss.item() - expected.item()) < loss_tolerance * expected.item()
    for name, p in network.named_parameters():
        # A scalar's gradient is a sum over all tokens in which nearly everything cancels, so it is
        # precise in float32 only.
        if p.ndim > 1 or dtype == torch.float32:
            assert error(p.grad, grads[name]) < grad_tolerance, name


def test_growing_window_compiles_once():
    network = random_network()
    model = compiled(network)
    ids, targets = random_ids(T), torch.randint(VOCAB, (T,), device=DEVICE)
    losses = {model(ids, targets, blocks(1)).item()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for window in range(2, 6):
            losses.add(model(ids, targets, blocks(window)).item())
    assert len(losses) > 1


@pytest.mark.parametrize("rows, cols", [(DIM, DIM), (4 * DIM, DIM), (DIM, 4 * DIM)])
def test_newton_schulz_of_a_batch_equals_that_of_each_matrix(rows, cols):
    G = torch.randn(3, rows, cols, device=DEVICE)
    for dtype, tolerance in ((torch.float32, 3e-4), (torch.bfloat16, 0.04)):
        batch = train_gpt.zeropower_via_newtonschulz5(G, 5, dtype)
        for matrix, result in zip(G, batch, strict=True):
            alone = train_gpt.zeropower_via_newtonschulz5(matrix, 5, dtype)
            assert error(result, alone) < tolerance
            assert error(result, reference.newton_schulz(matrix, 5)) < max(1e-3, 2 * tolerance)


@pytest.mark.skipif(not GPU, reason="needs a GPU's allocator")
def test_memory_segments_grow():
    torch.empty(1, device=DEVICE)
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]


@pytest.mark.skipif(not GPU, reason="needs a GPU's memory")
def test_out_of_memory_is_one_sentence(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path, 200_000)
    monkeypatch.chdir(tmp_path)
    torch.cuda.set_per_process_memory_fraction(0.02)
    flags = "--train_files train_*.bin --val_files val_*.bin --val_tokens 4096"
    try:
        code = train_gpt.main([*flags.split(), "--num_iterations", "1", "--repeat"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    sentence = capsys.readouterr().err.strip()
    assert code == 2
    assert "\n" not in sentence and "out of memory" in sentence and "--train_seq_len" in sentence
