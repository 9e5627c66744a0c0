"""What has to hold on the card itself: `bash tests/gpu.sh`, or `pytest -m gpu`.

Each kernel that only a GPU runs (FP8 matmuls, compiled FlexAttention, the compiled network) is held
against its slow twin. Without a GPU the same tests run on the CPU at small sizes, which proves the
tests, and nothing about a card.
"""

import subprocess
import sys

import pytest
import torch
import twins
from conftest import ROOT

import train_gpt

pytestmark = pytest.mark.gpu

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SCALES = dict(x_s=2.0, w_s=32.0, grad_s=4096.0)


def compiled(function):
    """Compile as the trainer does, without a graph break, for one shape; on a CPU do nothing."""
    return torch.compile(function, dynamic=False, fullgraph=True) if CUDA else function


def blocks(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int32, device=DEVICE)


def draw_ids(length: int, vocab_size: int, mean_document: int = 700) -> torch.Tensor:
    """Ids (length,) int32 with about one document's beginning in mean_document tokens."""
    ids = torch.randint(vocab_size - 1, (length,), dtype=torch.int32)
    ids[torch.rand(length) < 1 / mean_document] = vocab_size - 1
    return ids.to(DEVICE)


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    result = result.detach()
    return float((result.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize(
    "shape", [(512, 256, 384), (2048, 768, 3072)] if CUDA else [(512, 256, 384)]
)
def test_fp8_matmuls_err_as_their_formats_do(shape):
    """e4m3 rounds to 3 bits behind the point, an error of 2.6% in the mean, e5m2 to 2 bits, 5.3%.

    The errors of two operands add up as squares. A smaller error would mean that nothing was
    rounded, a larger one that scales or layouts are wrong.
    """
    T, K, N = shape
    x = torch.randn(T, K, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(N, K, device=DEVICE) / K**0.5).requires_grad_()
    grad = torch.randn(T, N, device=DEVICE, dtype=torch.bfloat16) / T
    out, x_f8, w_f8 = torch.ops.nanogpt.mm(x, w, *SCALES.values())
    out.backward(grad)
    assert (out.dtype, x.grad.dtype, w.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert 0.02 < error(out, x.double() @ w.double().T) < 0.05
    assert 0.04 < error(x.grad, grad.double() @ w.double()) < 0.08
    assert 0.04 < error(w.grad, grad.double().T @ x.double()) < 0.08
    # From products of the rounded operands it differs by the rounding of sums alone.
    assert error(out, twins.fp8_mm(x.detach(), w.detach(), SCALES["x_s"], SCALES["w_s"])) < 0.006


@pytest.mark.parametrize("window", [1, 14])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_attention_is_the_dense_one(window, dtype, tolerance):
    T, H, D = (2048, 6, 128) if CUDA else (512, 2, 32)
    model = train_gpt.GPT(257, 6, 1, 16, 16, T)
    ids = draw_ids(T, 257, mean_document=300)
    q, k, v = (
        torch.randn(1, H, T, D, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(3)
    )
    grad = torch.randn(1, H, T, D, device=DEVICE, dtype=dtype)

    def run(q, k, v, ids, window):
        long, short = model.create_block_masks(ids, window)
        return train_gpt.attention(q, k, v, long, 0.12), train_gpt.attention(q, k, v, short, 0.12)

    results = compiled(run)(q, k, v, ids, blocks(window))
    for result, width in zip(results, (window, max(1, window // 2)), strict=True):
        mask = twins.dense_mask(ids, 256, width)
        inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
        expected = twins.dense_attention(*(t[0] for t in inputs), mask, 0.12)
        grads = torch.autograd.grad(result, (q, k, v), grad, retain_graph=True)
        expected_grads = torch.autograd.grad(expected, inputs, grad[0].double())
        for got, wanted in zip((result[0], *grads), (expected, *expected_grads), strict=True):
            assert error(got, wanted) < tolerance, width


def test_attention_at_full_length():
    """48K tokens are too many for a dense reference; 64 queries and their gradients are not."""
    T, H, D, window = (48 * 1024, 6, 128, 14) if CUDA else (2048, 2, 32, 5)
    model = train_gpt.GPT(50257, 6, 1, 16, 16, 128)
    ids = draw_ids(T, 50257)
    q, k, v = (torch.randn(1, H, T, D, device=DEVICE).requires_grad_() for _ in range(3))
    rows = torch.randint(T, (64,), device=DEVICE).unique()
    grad = torch.zeros(1, H, T, D, device=DEVICE)
    grad[:, :, rows] = torch.randn(1, H, len(rows), D, device=DEVICE)
    out = compiled(
        lambda q, k, v, ids, window: train_gpt.attention(
            q, k, v, model.create_block_masks(ids, window)[0], 0.12
        )
    )(q, k, v, ids, blocks(window))
    grads = torch.autograd.grad(out, (q, k, v), grad)

    document, token = (ids == 50256).cumsum(0), torch.arange(T, device=DEVICE)
    seen = (token <= rows[:, None]) & (document == document[rows][:, None])
    seen &= token // 128 > (rows // 128 - window)[:, None]
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = twins.dense_attention(inputs[0][0, :, rows], inputs[1][0], inputs[2][0], seen, 0.12)
    expected_grads = torch.autograd.grad(expected, inputs, grad[0, :, rows].double())
    for got, wanted in zip((out[0, :, rows], *grads), (expected, *expected_grads), strict=True):
        assert error(got, wanted) < 2e-5


@pytest.mark.parametrize(
    "dtype, loss_tolerance, grad_tolerance",
    [(torch.float32, 1e-5, 2e-3), (torch.bfloat16, 2e-3, 0.1)],
)
def test_the_whole_network_is_the_dense_one(dtype, loss_tolerance, grad_tolerance):
    """The 12 layers of the speedrun, compiled without a graph break: loss and every gradient."""
    T, vocab_size, shape = (4096, 50257, (12, 6, 128, 768)) if CUDA else (256, 257, (12, 2, 32, 64))
    model = train_gpt.GPT(vocab_size, *shape, T, fp8="none", dtype=dtype)
    for p in model.parameters():  # what begins at zero hides half of the network
        if not p.any() or p.ndim < 2:
            p.data.add_(torch.randn_like(p) * 0.02)
    model.to(DEVICE)
    ids, targets = draw_ids(T, vocab_size), torch.randint(vocab_size, (T,), device=DEVICE)
    loss = compiled(model)(ids, targets, blocks(9))
    loss.backward()
    expected, grads = twins.gpt_loss_and_gradients(
        model.state_dict(),
        ids,
        targets,
        9,
        dtype=torch.float64 if dtype == torch.float32 else torch.float32,
        num_layers=shape[0],
        num_heads=shape[1],
        head_dim=shape[2],
        vocab_size=vocab_size,
    )
    assert abs(loss.item() - expected.item()) < loss_tolerance * expected.item()
    for name, p in model.named_parameters():
        # A mixing weight's gradient is a sum over all tokens in which nearly everything cancels, so
        # it can be compared in float32 alone.
        if p.ndim > 1 or dtype == torch.float32:
            assert error(p.grad, grads[name]) < grad_tolerance, name


def test_a_growing_window_compiles_once():
    T, vocab_size, shape = (2048, 50257, (6, 2, 64, 128)) if CUDA else (256, 257, (6, 2, 32, 64))
    model = train_gpt.GPT(vocab_size, *shape, T, fp8="none").to(DEVICE)
    ids, targets = draw_ids(T, vocab_size), torch.randint(vocab_size, (T,), device=DEVICE)
    step = compiled(model)
    losses = [step(ids, targets, blocks(1)).item()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for window in range(2, T // 128 + 3):
            loss = step(ids, targets, blocks(window))
            loss.backward()
            losses.append(loss.item())
    assert len(losses) == T // 128 + 2


@pytest.mark.parametrize(
    "shape",
    [(4, 768, 768), (3, 3072, 768), (2, 768, 3072)] if CUDA else [(4, 96, 96), (3, 128, 64)],
)
def test_newton_schulz(shape):
    G = torch.randn(shape, device=DEVICE)
    exact = train_gpt.zeropower_via_newtonschulz5(G, 5, torch.float32)
    rounded = train_gpt.zeropower_via_newtonschulz5(G, 5)
    for i in range(shape[0]):
        twin = twins.newton_schulz(G[i].double(), 5)
        assert error(exact[i], twin) < 1e-4
        assert error(rounded[i], twin) < 0.05
        alone = train_gpt.zeropower_via_newtonschulz5(G[i], 5)
        assert error(rounded[i], alone) < 0.02
    assert rounded.dtype == torch.bfloat16


def test_training_in_fp8_follows_bfloat16(tmp_path, make_shard):
    """The losses of ten steps stay together, with every matmul in FP8 and with none."""
    make_shard("train_0.bin", torch.randint(0, 24, (300_000,)).numpy() * 10 % 256)
    make_shard("val_0.bin", torch.randint(0, 24, (5_000,)).numpy() * 10 % 256)
    losses = {}
    for fp8 in ("none", "all"):
        files = f"--train_files {tmp_path}/train_*.bin --val_files {tmp_path}/val_*.bin"
        sizes = "--val_tokens 4096 --num_iterations 10 --sample 20 --dtype bfloat16"
        flags = f"--preset tiny {files} {sizes} --fp8 {fp8} --log_dir {tmp_path} --run_id {fp8}"
        command = [sys.executable, str(ROOT / "train_gpt.py"), *flags.split()]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        log = (tmp_path / f"{fp8}.txt").read_text()
        assert "peak memory allocated" in log and "sample: " in log
        assert ("head: FP8" in log) == (CUDA and fp8 != "none" and train_gpt.fp8_supported(DEVICE))
        losses[fp8] = float(log.split("val_loss:")[-1].split()[0])
    # The loss starts at log(384) = 5.95, and 24 tokens of equal chance allow log(24) = 3.18.
    assert losses["none"] < 4.5
    assert abs(losses["all"] - losses["none"]) < 0.2


@pytest.mark.skipif(not CUDA, reason="takes a GPU's memory")
def test_running_out_of_memory_ends_with_the_flags_that_fit(tmp_path, make_shard, capsys):
    make_shard("train_0.bin", torch.randint(0, 256, (200_000,)).numpy())
    make_shard("val_0.bin", torch.randint(0, 256, (5_000,)).numpy())
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        files = f"--train_files {tmp_path}/train_*.bin --val_files {tmp_path}/val_*.bin"
        sizes = "--val_tokens 4096 --num_iterations 1 --seqs_per_step 1 --repeat"
        code = train_gpt.main(f"{files} {sizes} --log_dir {tmp_path}".split())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and "out of memory" in said and "--train_seq_len" in said


OWN_CARD = """
import torch
import train_gpt
machine = train_gpt.Machine.detect()
assert torch.cuda.current_device() == machine.device.index
assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
values = torch.tensor([3.5, 1.0], device=machine.device)
assert machine.read_later(values)() == [3.5, 1.0]
"""


@pytest.mark.skipif(not CUDA, reason="asks a GPU's allocator")
def test_the_process_takes_its_own_card_with_growing_segments():
    subprocess.run([sys.executable, "-c", OWN_CARD], cwd=ROOT, check=True)
