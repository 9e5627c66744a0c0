"""The FP8 matmul and the linear layer around it, held to a float64 matmul of rounded operands.

torch's `_scaled_mm` runs on the CPU as well, so all numerics can be tested without a GPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F
import twins
from conftest import CPU

import train_gpt

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The relative error of rounding to bfloat16 is at most half the distance of neighbouring numbers.
BF16_STEP = 2**-8

mm, mm_backward = torch.ops.nanogpt.mm, torch.ops.nanogpt.mm_backward


@pytest.fixture
def fp8_everywhere(monkeypatch):
    """Pretend that every device multiplies FP8 in hardware."""
    monkeypatch.setattr(train_gpt, "fp8_supported", lambda device: True)


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def assert_close(actual, expected, rtol):
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------
# The two operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T, n_in, n_out", [(64, 32, 48), (16, 64, 16), (32, 16, 128)])
@pytest.mark.parametrize("x_s, w_s", [(1.0, 1.0), (2.0, 512.0), (0.5, 3.0)])
def test_forward_is_the_matmul_of_the_rounded_operands(dtype, T, n_in, n_out, x_s, w_s):
    """And zeros stay zeros."""
    x, w = torch.randn(T, n_in, dtype=dtype), 0.1 * torch.randn(n_out, n_in)
    x[0] = 0
    w[0] = 0
    out, x_f8, w_f8 = mm(x, w, x_s, w_s, 1.0)
    assert (out.dtype, x_f8.dtype, w_f8.dtype) == (torch.bfloat16, E4M3, E4M3)
    assert (out.shape, x_f8.shape, w_f8.shape) == ((T, n_out), x.shape, w.shape)
    assert torch.equal(x_f8.double(), twins.rounded(x, x_s, E4M3))
    assert torch.equal(w_f8.double(), twins.rounded(w, w_s, E4M3))
    assert_close(out, twins.fp8_mm(x, w, x_s, w_s), BF16_STEP)
    assert not out[0].any() and not out[:, 0].any()
    # Each operand keeps three binary digits behind the point.
    assert relative_error(out, x.double() @ w.double().T) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (2.0, 512.0, 2.0**19), (0.5, 3.0, 64.0)])
def test_backward_is_the_matmuls_of_the_rounded_operands(dtype, scales):
    """By the operator itself, and by autograd in the dtypes of the inputs."""
    x = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    w = (0.1 * torch.randn(48, 32)).requires_grad_()
    grad = torch.randn(64, 48, dtype=torch.bfloat16) / scales[2]
    out, x_f8, w_f8 = mm(x, w, *scales)
    grad_x, grad_w = mm_backward(grad, x_f8, w_f8, *scales)
    assert (grad_x.dtype, grad_w.dtype) == (torch.bfloat16, torch.float32)
    assert (grad_x.shape, grad_w.shape) == (x.shape, w.shape)
    expected_x, expected_w = twins.fp8_mm_backward(grad, x.detach(), w.detach(), *scales)
    assert_close(grad_x, expected_x, BF16_STEP)
    assert_close(grad_w, expected_w, 1e-5)
    # The gradient keeps two binary digits behind the point.
    assert relative_error(grad_x, grad.double() @ w.detach().double()) < 0.1
    assert relative_error(grad_w, grad.double().T @ x.detach().double()) < 0.1
    out.backward(grad)
    assert (x.grad.dtype, w.grad.dtype) == (dtype, torch.float32)
    assert torch.equal(x.grad, grad_x.to(dtype)) and torch.equal(w.grad, grad_w)


def test_too_large_values_become_the_largest_instead_of_infinity():
    x, w = torch.full((16, 16), 1e6), torch.full((16, 16), -1e6)
    out, x_f8, w_f8 = mm(x, w, 1.0, 1.0, 1.0)
    assert bool((x_f8.float() == 448).all()) and bool((w_f8.float() == -448).all())
    grad_x, grad_w = mm_backward(torch.full((16, 16), 1e9), x_f8, w_f8, 1.0, 1.0, 1.0)
    for t, expected in ((out, -448 * 448), (grad_x, -57344 * 448), (grad_w, 57344 * 448)):
        expected = torch.full((16, 16), 16.0 * expected, dtype=torch.float64)
        torch.testing.assert_close(t.double(), expected, rtol=BF16_STEP, atol=0)


def test_operators_are_registered_properly():
    x = torch.randn(32, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(48, 16, requires_grad=True)
    _, x_f8, w_f8 = mm(x.detach(), w.detach(), 2.0, 512.0, 1024.0)
    # Each operator leaves out the one of opcheck's four checks that adds or multiplies its FP8
    # tensors, which a CPU cannot.
    common = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(mm, (x, w, 2.0, 512.0, 1024.0), test_utils=(*common, "test_schema"))
    torch.library.opcheck(
        mm_backward,
        (torch.randn(32, 48, dtype=torch.bfloat16), x_f8, w_f8, 2.0, 512.0, 1024.0),
        test_utils=(*common, "test_aot_dispatch_dynamic"),
    )


def test_compiles_in_one_graph():
    def loss(x, w):
        return mm(x, w, 2.0, 128.0, 64.0)[0].float().square().mean()

    torch._dynamo.reset()
    x, w = torch.randn(32, 16, dtype=torch.bfloat16), torch.randn(48, 16)
    results = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        value = f(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# ---------------------------------------------------------------------------------------------
# CastedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(8,), (1, 8), (2, 4, 8)])
def test_plain_linear_takes_the_dtype_and_shape_of_the_activations(dtype, leading):
    layer, x = train_gpt.CastedLinear(32, 48), torch.randn(*leading, 32, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype and out.shape == (*leading, 48)
    assert torch.equal(out, F.linear(x, layer.weight.to(dtype)))


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("use_fp8", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fp8_in_training_where_asked_for_and_possible(hardware, use_fp8, training, monkeypatch):
    if hardware:
        monkeypatch.setattr(train_gpt, "fp8_supported", lambda device: True)
    layer = train_gpt.CastedLinear(32, 48, use_fp8, 2.0, 128.0, 64.0).train(training)
    x = torch.randn(1, 16, 32, dtype=torch.bfloat16)
    in_8_bits = mm(x[0], layer.weight.detach(), 2.0, 128.0, 64.0)[0][None]
    plain = F.linear(x, layer.weight.bfloat16())
    assert not torch.equal(in_8_bits, plain)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, in_8_bits if hardware and use_fp8 and training else plain)


def test_fp8_layer_uses_all_three_scales(fp8_everywhere):
    layer = train_gpt.CastedLinear(32, 48, use_fp8=True, x_s=2.0, w_s=128.0, grad_s=2.0**20)
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    # A gradient so small that e5m2 would lose most of it without its scale.
    grad = torch.randn(16, 48, dtype=torch.bfloat16) * 2**-20
    layer(x[None]).backward(grad[None])
    operands = grad, x.detach(), layer.weight.detach()
    expected_x, expected_w = twins.fp8_mm_backward(*operands, 2.0, 128.0, 2.0**20)
    assert relative_error(x.grad, expected_x) < BF16_STEP
    assert relative_error(layer.weight.grad, expected_w) < 1e-5


# ---------------------------------------------------------------------------------------------
# Where the network uses it


def network(**options):
    return train_gpt.GPT(257, 6, 2, 16, 32, 48 * 1024, **options)


@pytest.mark.parametrize("tokens", [48 * 1024, 64 * 1024, 1024, 128, None])
def test_head_scales_its_gradient_by_the_tokens_of_a_micro_step(tokens):
    """Which are those of the longest sequence unless said."""
    x_s, w_s, grad_s = network(train_seq_len=tokens).lm_head.scales
    assert (x_s, w_s) == (2.0, 512.0)
    assert grad_s == pytest.approx(524288.0 * (tokens or 48 * 1024) / (48 * 1024))


def test_run_derives_the_scale_from_the_training_sequence(fp8_everywhere):
    """And not from the validation sequence, which is longer."""
    lengths = dict(train_seq_len=3072, val_seq_len=8192)
    sizes = dict(num_layers=6, model_dim=32, num_heads=2, head_dim=16)
    hp = train_gpt.Hyperparameters(**lengths, **sizes, dtype="bfloat16")
    head = train_gpt.build_model(hp, 257, CPU).lm_head
    assert head.scales[2] == pytest.approx(524288.0 * 3072 / (48 * 1024))


@pytest.mark.parametrize(
    "fp8, head, hidden", [("none", False, False), ("head", True, False), ("all", True, True)]
)
def test_setting_chooses_the_layers_in_fp8(fp8, head, hidden):
    net = network(fp8=fp8)
    assert net.lm_head.use_fp8 is head
    layers = {module for module in net.modules() if isinstance(module, train_gpt.CastedLinear)}
    assert {layer.use_fp8 for layer in layers - {net.lm_head}} == {hidden}


def test_network_in_fp8_stays_close_to_the_one_in_bfloat16(fp8_everywhere, documents):
    """Loss and gradients, with a head that is not zero, so that a forgotten scale shows."""
    ids = documents(256, [0, 100])
    targets, window = torch.randint(257, (256,)), torch.tensor(2, dtype=torch.int32)
    net = train_gpt.GPT(257, 6, 2, 16, 32, 256, fp8="all")
    torch.nn.init.normal_(net.lm_head.weight, std=0.05)
    results = []
    for training in (True, False):  # evaluation is the plain matmul
        net.train(training).zero_grad()
        loss = net(ids, targets, window)
        loss.backward()
        grads = [p.grad.clone() for p in (net.lm_head.weight, net.embed.weight)]
        results.append((loss.item(), *grads))
    (loss8, head8, embed8), (loss, head, embed) = results
    assert math.isfinite(loss8) and abs(loss8 - loss) < 0.02 and loss8 != loss
    assert relative_error(head8, head.double()) < 0.1
    assert relative_error(embed8, embed.double()) < 0.2
