"""The first measurements on a GPU: `bash tests/gpu.sh 1` runs this beside the GPU tests.

    python tests/first_gpu.py [--record LOG] [--wait FILE] [FLAGS OF train_gpt.py]

Compiles a micro-step with the head in FP8 and in bfloat16, with the same weights and tokens, and
the network in the log of the public record #21, where it is at hand. Waits for a file, after which
the GPU is free. Then compares losses and gradients, and prints times, profiles, and the times of
the head's weight gradient in two orders. A part that fails does not stop the others.
"""

import argparse
import functools
import re
import statistics
import sys
import time
import traceback
import types
from pathlib import Path

import bench
import torch
from bench import DEVICE, GPU

import train_gpt


def subject(fp8, flags):
    """Our network, in which no weight is zero, which would hide a part of it."""
    result = bench.Subject(train_gpt, [*flags, "--fp8", fp8])
    torch.manual_seed(0)
    for p in result.network.parameters():
        if not p.any():
            p.data.normal_(0, 0.02)
    return result


def their_name(name):
    return name.replace("qkv.weight", "qkv_w").replace("value_embeds.embed", "value_embeds")


def public_network(log, network, hp):
    """The network in the log of the public record, with the weights of ours.

    One of its lines is corrected: its fake of mm_backward returns a row-major grad_w where the real
    one is column-major, which the compiler checks since torch 2.6.
    """
    text = Path(log).read_text(encoding="utf-8").split("=" * 100)[0]
    text = text[text.index("from torch import Tensor") : text.index("# int main")]
    text = text.replace("nanogpt::", "public::").replace("ops.nanogpt", "ops.public")
    text = text.replace("50256", str(network.vocab_size - 1))
    text, count = re.subn(r"w_f8(\.to\(torch\.float32\)\n)", r"w_f8.t().contiguous().t()\1", text)
    assert count == 1
    if not GPU:
        text = re.sub(r"^ *@torch.compile\n", "", text.replace('"cuda"', '"cpu"'), flags=re.M)
    module = sys.modules["public"] = types.ModuleType("public")
    exec(
        "import torch\nfrom dataclasses import dataclass\nfrom pathlib import Path\n" + text,
        vars(module),
    )
    if not GPU:
        module.flex_attention = lambda q, k, v, block_mask, scale: train_gpt.attention_under(
            block_mask
        )(q, k, v, scale=scale)
    sizes = hp.num_layers, hp.num_heads, hp.model_dim, max(hp.train_seq_len, hp.val_seq_len)
    result = module.GPT(network.vocab_size, *sizes)
    for layer in result.modules():
        if isinstance(layer, torch.nn.Embedding):
            layer.bfloat16()
    result.load_state_dict({their_name(n): p for n, p in network.state_dict().items()})
    return result.to(DEVICE)


def compare(ours, theirs, step, their_step):
    """Print by how much losses and gradients differ, and where most."""
    print(f"loss, ours less theirs: {step.loss.item() - their_step.loss.item():+.2e}")
    gradients = {name: p.grad.double() for name, p in theirs.named_parameters()}
    rows = []
    for name, p in ours.named_parameters():
        expected = gradients[their_name(name)]
        difference = float((p.grad.double() - expected).norm() / expected.norm())
        rows.append((p.ndim < 2, difference, name))
    for scalars, kind in ((False, "matrices"), (True, "scalars")):
        some = sorted((row[1:] for row in rows if row[0] == scalars), reverse=True)
        worst = ", ".join(f"{name} {difference:.4f}" for difference, name in some[:4])
        median = statistics.median(difference for difference, _ in some)
        print(f"gradients of {kind}: median difference {median:.4f}, largest: {worst}")


def head_gradient(length, dim, vocab_size):
    """Times of the head's weight gradient in FP8, by the order of the product."""
    g = torch.randn(length, vocab_size, device=DEVICE).to(torch.float8_e5m2).T.contiguous()
    x = torch.randn(length, dim, device=DEVICE).to(torch.float8_e4m3fn).T.contiguous()
    product = functools.partial(train_gpt.scaled_mm, a_s=1, b_s=1, dtype=torch.float32)
    bench.show("grad.T @ x", bench.clock(lambda: product(g, x)))
    bench.show("(x.T @ grad).T", bench.clock(lambda: product(x, g).T))
    bench.show("(x.T @ grad).T, row-major", bench.clock(lambda: product(x, g).T.contiguous()))


def attempt(title, function, *args):
    print(f"== {title}", flush=True)
    try:
        return function(*args)
    except Exception:
        traceback.print_exc()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--record", type=Path, help="log of the public record #21")
    parser.add_argument("--wait", type=Path, help="file to wait for after the compilation")
    arguments, flags = parser.parse_known_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if GPU else 'CPU'}")
    ours = subject("head", flags)
    plain = subject("none", flags)
    step = attempt("compile, head in FP8", ours.micro_step, "FP8 head")
    plain_step = attempt("compile, head in bfloat16", plain.micro_step, "bfloat16 head")
    theirs = their_step = None
    if arguments.record and arguments.record.exists():
        theirs = attempt("record", public_network, arguments.record, ours.network, ours.hp)
        model = torch.compile(theirs, dynamic=False) if GPU else theirs
        their_step = attempt("compile, record", bench.MicroStep, "record", model, step.batch)
        attempt("the same recipe?", compare, ours.network, theirs, step, their_step)
    while arguments.wait and not arguments.wait.exists():
        time.sleep(0.5)
    attempt("FP8 and bfloat16 head in turns", bench.in_turns, step, plain_step)
    attempt("parts", bench.parts, ours, step)
    attempt("profile", bench.profile, step, 25)
    if their_step:
        attempt("ours and the record in turns", bench.in_turns, step, their_step)
        attempt("profile", bench.profile, their_step, 25)
    sizes = ours.hp.train_seq_len, *reversed(ours.network.lm_head.weight.shape)
    attempt("weight gradient of the head", head_gradient, *sizes)


if __name__ == "__main__":
    main()
