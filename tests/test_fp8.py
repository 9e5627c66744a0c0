"""Matmul in FP8 against a float64 matmul of rounded operands, and where the network uses it.

torch multiplies FP8 on a CPU, too, though not quickly.
"""

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import documents, run

import train_gpt

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16_STEP = 2**-8  # the largest relative error of rounding to bfloat16
CPU = train_gpt.Machine(torch.device("cpu"), torch.bfloat16)

mm, mm_backward = torch.ops.nanogpt.mm, torch.ops.nanogpt.mm_backward


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_close(actual, expected, rtol):
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


# --------------------------------------------------------------------------------------------------
# Operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (2.0, 512.0, 2.0**19), (0.5, 3.0, 64.0)])
def test_operators_match_reference(dtype, scales):
    """Forward and backward, called directly and by autograd. A row of zeros stays zero."""
    x = torch.randn(64, 32, dtype=dtype)
    x[0] = 0
    w = 0.1 * torch.randn(48, 32)
    grad = torch.randn(64, 48, dtype=torch.bfloat16) / scales[2]
    exact_x, exact_w = grad.double() @ w.double(), grad.double().T @ x.double()
    expected_x, expected_w = reference.fp8_mm_backward(grad, x, w, *scales)

    out, x_f8, w_f8 = mm(x.requires_grad_(), w.requires_grad_(), *scales)
    assert out.dtype == torch.bfloat16 and x_f8.dtype == w_f8.dtype == E4M3
    assert_close(out.detach(), reference.fp8_mm(x.detach(), w.detach(), *scales[:2]), BF16_STEP)
    assert relative_error(out, x.double() @ w.double().T) < 0.05  # e4m3 has four binary digits
    assert not out[0].any()

    grad_x, grad_w = mm_backward(grad, x_f8, w_f8, *scales)
    assert grad_x.dtype == torch.bfloat16 and grad_w.dtype == torch.float32
    assert_close(grad_x, expected_x, BF16_STEP)
    assert_close(grad_w, expected_w, 1e-5)
    assert max(relative_error(grad_x, exact_x), relative_error(grad_w, exact_w)) < 0.1
    out.backward(grad)
    assert torch.equal(x.grad, grad_x.to(dtype)) and torch.equal(w.grad, grad_w)


def test_large_values_are_clamped():
    """They become the largest of the format, 448 in e4m3 and 57344 in e5m2, not infinity."""
    large = torch.full((16, 16), 1e6)
    out, x_f8, w_f8 = mm(large, -large, 1.0, 1.0, 1.0)
    grad_x, grad_w = mm_backward(large, x_f8, w_f8, 1.0, 1.0, 1.0)
    for t, product in ((out, -448 * 448), (grad_x, -57344 * 448), (grad_w, 57344 * 448)):
        expected = torch.full((16, 16), 16.0 * product, dtype=torch.float64)
        assert_close(t, expected, BF16_STEP)


def test_operators_are_registered():
    x = torch.randn(32, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(48, 16, requires_grad=True)
    grad = torch.randn(32, 48, dtype=torch.bfloat16)
    scales = 2.0, 512.0, 1024.0
    _, x_f8, w_f8 = mm(x.detach(), w.detach(), *scales)
    # opcheck's other tests add or multiply tensors in FP8, which a CPU cannot.
    tests = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(mm, (x, w, *scales), test_utils=tests)
    torch.library.opcheck(mm_backward, (grad, x_f8, w_f8, *scales), test_utils=tests)


# Two processes, each with an operator of its own in place of train_gpt's, by the same name.
EDITED_OPERATORS = """
import os

import torch
import torch._inductor.compile_fx
import train_gpt

for body in ("x @ x", "x @ x @ x"):
    if os.fork() == 0:
        source = "def mm(x): return " + body
        exec(source)
        operator = train_gpt.visible_op("nanogpt::mm", "(Tensor x) -> Tensor")(mm)
        train_gpt.configure_torch(source)
        print(torch.compile(operator)(torch.full((2, 2), 3.0)).sum().item(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_edited_operator_is_compiled_again(tmp_path):
    """torch caches compiled graphs on the disk by the names of their operators."""
    script = tmp_path / "script.py"
    script.write_text(EDITED_OPERATORS)
    output = run(tmp_path, script=script, TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache").output
    assert "72.0\n" in output and output.endswith("432.0\n")


# --------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leading", [(16,), (1, 16), (2, 4, 8)])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_linear_multiplies_in_fp8_while_training(dtype, leading, use_fp8):
    """In the shape and dtype of the activations."""
    scales = 2.0, 128.0, 64.0
    layer = train_gpt.CastedLinear(32, 48, use_fp8, *scales)
    x = torch.randn(*leading, 32, dtype=dtype)
    plain = F.linear(x, layer.weight.to(dtype))
    in_fp8 = mm(x.view(-1, 32), layer.weight.detach(), *scales)[0].view(*leading, 48).to(dtype)
    assert not torch.equal(plain, in_fp8)
    assert torch.equal(layer(x), in_fp8 if use_fp8 else plain)
    assert torch.equal(layer.eval()(x), plain)


@pytest.mark.parametrize("fp8, head, hidden", [("none", 0, 0), ("head", 1, 0), ("all", 1, 1)])
def test_fp8_setting_chooses_layers_and_scales(fp8, head, hidden):
    network = train_gpt.GPT(257, 6, 2, 16, 32, 8192)
    train_gpt.choose_fp8(network, fp8, 24 * 1024)
    grad_s = 2**18  # half of that for 48K tokens
    for name, layer in network.named_modules():
        if isinstance(layer, train_gpt.CastedLinear):
            is_head = name == "lm_head"
            assert layer.use_fp8 == (head if is_head else hidden)
            x_s = 0.5 if name.endswith("mlp.c_proj") else 2.0
            assert layer.scales == (x_s, 512.0 if is_head else 128.0, grad_s)


@pytest.mark.parametrize(
    "capability, dtype, expected",
    [((9, 0), "bfloat16", 1), ((8, 0), "bfloat16", 0), ((9, 0), "float32", 0)],
)
def test_run_uses_fp8_where_hardware_and_dtype_allow(capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(train_gpt.Machine, "is_gpu", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    hp = train_gpt.Hyperparameters(
        num_layers=6, num_heads=2, head_dim=16, model_dim=32, train_seq_len=3072, val_seq_len=8192
    )
    machine = train_gpt.Machine(CPU.device, getattr(torch, dtype))
    head = train_gpt.build_model(hp, 257, machine).lm_head
    assert head.use_fp8 == expected
    assert not expected or head.scales[2] == 2**18  # for eight sequences of 3K tokens


def test_network_in_fp8_is_close_to_bfloat16():
    """The loss and gradients, with a head that is not zero, so that a missing scale shows."""
    ids, targets = documents(256, [0, 100]), torch.randint(257, (256,))
    network = train_gpt.GPT(257, 6, 2, 16, 32, 256)
    train_gpt.choose_fp8(network, "all", 256)
    torch.nn.init.normal_(network.lm_head.weight, std=0.05)
    results = []
    for training in (True, False):  # FP8 is used in training alone
        network.train(training).zero_grad()
        loss = network(ids, targets, torch.tensor(2, dtype=torch.int32))
        loss.backward()
        grads = network.lm_head.weight.grad.clone(), network.embed.weight.grad.clone()
        results.append((loss.item(), *grads))
    (loss8, head8, embed8), (loss, head, embed) = results
    assert 0 < abs(loss8 - loss) < 0.02
    assert relative_error(head8, head.double()) < 0.1
    assert relative_error(embed8, embed.double()) < 0.2
