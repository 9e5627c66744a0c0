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


# ---------------------------------------------------------------------------------------------
# The two operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T, n_in, n_out", [(64, 32, 48), (16, 64, 16), (32, 16, 128)])
@pytest.mark.parametrize("x_s, w_s", [(1.0, 1.0), (2.0, 512.0), (0.5, 3.0)])
def test_forward_is_the_matmul_of_the_rounded_operands(dtype, T, n_in, n_out, x_s, w_s):
    x, w = torch.randn(T, n_in, dtype=dtype), 0.1 * torch.randn(n_out, n_in)
    out, x_f8, w_f8 = mm(x, w, x_s, w_s, 1.0)
    assert (out.dtype, x_f8.dtype, w_f8.dtype) == (torch.bfloat16, E4M3, E4M3)
    assert (out.shape, x_f8.shape, w_f8.shape) == ((T, n_out), x.shape, w.shape)
    assert torch.equal(x_f8.double(), twins.rounded(x, x_s, E4M3))
    assert torch.equal(w_f8.double(), twins.rounded(w, w_s, E4M3))
    expected = twins.fp8_mm(x, w, x_s, w_s)
    torch.testing.assert_close(
        out.double(), expected, rtol=BF16_STEP, atol=1e-5 * float(expected.abs().max())
    )
    # Each operand keeps three binary digits behind the point.
    assert relative_error(out, x.double() @ w.double().T) < 0.05


@pytest.mark.parametrize(
    "x_s, w_s, grad_s", [(1.0, 1.0, 1.0), (2.0, 512.0, 524288.0), (0.5, 3.0, 64.0)]
)
def test_backward_is_the_matmuls_of_the_rounded_operands(x_s, w_s, grad_s):
    x = torch.randn(64, 32)
    w = 0.1 * torch.randn(48, 32)
    grad = torch.randn(64, 48, dtype=torch.bfloat16) / grad_s
    _, x_f8, w_f8 = mm(x, w, x_s, w_s, grad_s)
    grad_x, grad_w = mm_backward(grad, x_f8, w_f8, x_s, w_s, grad_s)
    assert (grad_x.dtype, grad_w.dtype) == (torch.bfloat16, torch.float32)
    assert (grad_x.shape, grad_w.shape) == (x.shape, w.shape)
    expected_x, expected_w = twins.fp8_mm_backward(grad, x, w, x_s, w_s, grad_s)
    torch.testing.assert_close(
        grad_x.double(), expected_x, rtol=BF16_STEP, atol=1e-5 * float(expected_x.abs().max())
    )
    torch.testing.assert_close(
        grad_w.double(), expected_w, rtol=1e-5, atol=1e-5 * float(expected_w.abs().max())
    )
    # The gradient keeps two binary digits behind the point.
    assert relative_error(grad_x, grad.double() @ w.double()) < 0.1
    assert relative_error(grad_w, grad.double().T @ x.double()) < 0.1


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_autograd_gives_both_gradients_in_the_dtypes_of_the_inputs(x_dtype):
    x = torch.randn(64, 32, dtype=x_dtype, requires_grad=True)
    w = (0.1 * torch.randn(48, 32)).requires_grad_()
    grad = torch.randn(64, 48, dtype=torch.bfloat16)
    mm(x, w, 2.0, 512.0, 16.0)[0].backward(grad)
    assert (x.grad.dtype, w.grad.dtype) == (x_dtype, torch.float32)
    expected_x, expected_w = twins.fp8_mm_backward(grad, x.detach(), w.detach(), 2.0, 512.0, 16.0)
    torch.testing.assert_close(
        x.grad.double(), expected_x, rtol=BF16_STEP, atol=1e-5 * float(expected_x.abs().max())
    )
    torch.testing.assert_close(
        w.grad.double(), expected_w, rtol=1e-5, atol=1e-5 * float(expected_w.abs().max())
    )


def test_gradients_are_close_to_those_of_a_plain_matmul():
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    mm(x, w, 1.0, 1.0, 1.0)[0].float().square().sum().backward()
    x2, w2 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    (x2 @ w2.T).square().sum().backward()
    assert relative_error(x.grad, x2.grad) < 0.1
    assert relative_error(w.grad, w2.grad) < 0.1


def test_too_large_values_become_the_largest_instead_of_infinity():
    x, w = torch.full((16, 16), 1e6), torch.full((16, 16), -1e6)
    out, x_f8, w_f8 = mm(x, w, 1.0, 1.0, 1.0)
    assert bool((x_f8.float() == 448).all()) and bool((w_f8.float() == -448).all())
    grad_x, grad_w = mm_backward(torch.full((16, 16), 1e9), x_f8, w_f8, 1.0, 1.0, 1.0)
    for t, expected in (
        (out, -16 * 448**2),
        (grad_x, -16 * 57344 * 448),
        (grad_w, 16 * 57344 * 448),
    ):
        torch.testing.assert_close(
            t.double(),
            torch.full((16, 16), float(expected), dtype=torch.float64),
            rtol=BF16_STEP,
            atol=0,
        )


def test_zeros_stay_zeros():
    x, w = torch.zeros(16, 16, requires_grad=True), torch.zeros(16, 16, requires_grad=True)
    mm(x, w, 2.0, 512.0, 1.0)[0].sum().backward()
    assert not x.grad.any() and not w.grad.any()


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


def test_weight_is_float32_uniform_and_of_half_the_usual_spread():
    weight = train_gpt.CastedLinear(256, 1024).weight
    std = 0.5 / 256**0.5
    assert weight.dtype == torch.float32 and weight.shape == (1024, 256)
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    # A uniform distribution reaches as far as sqrt(3) standard deviations.
    assert weight.abs().max().item() == pytest.approx(3**0.5 * std, rel=0.01)
    assert abs(weight.mean().item()) < 0.02 * std
    names = [name for name, _ in train_gpt.CastedLinear(16, 16).named_parameters()]
    assert names == ["weight"]  # and no bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(8,), (1, 8), (2, 4, 8)])
def test_plain_linear_takes_the_dtype_and_shape_of_the_activations(dtype, leading):
    layer, x = train_gpt.CastedLinear(32, 48), torch.randn(*leading, 32, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype and out.shape == (*leading, 48)
    assert torch.equal(out, F.linear(x, layer.weight.to(dtype)))


@pytest.mark.parametrize("training", [True, False])
def test_without_the_hardware_fp8_falls_back_to_a_plain_matmul(training):
    layer = train_gpt.CastedLinear(32, 48, True, 2.0, 512.0, 64.0).train(training)
    x = torch.randn(16, 32)
    assert torch.equal(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("use_fp8", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_fp8_in_training_alone_and_where_asked_for(fp8_everywhere, use_fp8, training):
    layer = train_gpt.CastedLinear(32, 48, use_fp8, 2.0, 128.0, 64.0).train(training)
    x = torch.randn(1, 16, 32, dtype=torch.bfloat16)
    in_8_bits = mm(x[0], layer.weight.detach(), 2.0, 128.0, 64.0)[0][None]
    plain = F.linear(x, layer.weight.bfloat16())
    assert not torch.equal(in_8_bits, plain)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, in_8_bits if use_fp8 and training else plain)


def test_fp8_layer_uses_all_three_scales(fp8_everywhere):
    layer = train_gpt.CastedLinear(32, 48, use_fp8=True, x_s=2.0, w_s=128.0, grad_s=2.0**20)
    x = torch.randn(1, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    # A gradient so small that e5m2 would lose most of it without its scale.
    grad = torch.randn(1, 16, 48, dtype=torch.bfloat16) * 2**-20
    layer(x).backward(grad)
    expected_x, expected_w = twins.fp8_mm_backward(
        grad[0], x.detach()[0], layer.weight.detach(), 2.0, 128.0, 2.0**20
    )
    assert relative_error(x.grad[0], expected_x) < BF16_STEP
    assert relative_error(layer.weight.grad, expected_w) < 1e-5


# ---------------------------------------------------------------------------------------------
# Where the network uses it


def network(**options):
    return train_gpt.GPT(257, 6, 2, 16, 32, 48 * 1024, **options)


@pytest.mark.parametrize("tokens", [48 * 1024, 64 * 1024, 1024, 128])
def test_head_scales_its_gradient_by_the_tokens_of_a_micro_step(tokens):
    head = network(train_seq_len=tokens).lm_head
    assert head.scales[:2] == (2.0, 512.0)
    assert head.scales[2] == pytest.approx(524288.0 * tokens / (48 * 1024))


def test_tokens_of_a_micro_step_are_those_of_the_longest_sequence_unless_said():
    assert network().lm_head.scales[2] == 524288.0


def test_run_derives_the_scale_from_the_training_sequence_and_not_the_validation_sequence(
    fp8_everywhere,
):
    hp = train_gpt.Hyperparameters(
        train_seq_len=3072,
        val_seq_len=8192,
        num_layers=6,
        model_dim=32,
        num_heads=2,
        head_dim=16,
        dtype="bfloat16",
    )
    head = train_gpt.build_model(hp, 257, CPU).lm_head
    assert head.scales[2] == pytest.approx(524288.0 * 3072 / (48 * 1024))


@pytest.mark.parametrize(
    "fp8, head, hidden", [("none", False, False), ("head", True, False), ("all", True, True)]
)
def test_setting_chooses_the_layers_in_fp8(fp8, head, hidden):
    net = network(fp8=fp8)
    layers = {
        name: module.use_fp8
        for name, module in net.named_modules()
        if isinstance(module, train_gpt.CastedLinear)
    }
    assert layers.pop("lm_head") is head
    assert set(layers.values()) == {hidden}


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
        results.append(
            (loss.item(), net.lm_head.weight.grad.clone(), net.embed.weight.grad.clone())
        )
    (loss8, head8, embed8), (loss, head, embed) = results
    assert math.isfinite(loss8) and abs(loss8 - loss) < 0.02 and loss8 != loss
    assert relative_error(head8, head.double()) < 0.1
    assert relative_error(embed8, embed.double()) < 0.2
