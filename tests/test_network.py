"""The network and steps of training against a dense network and plain optimizers."""

import functools
import math

import pytest
import reference
import torch
from helpers import documents
from torch.nn.attention.flex_attention import flex_attention

import train_gpt

VOCAB = 257
CPU = train_gpt.Machine(torch.device("cpu"), torch.float32)
# The heads together are narrower than the stream, so that no shape fits by accident.
SHAPE = dict(num_heads=2, head_dim=16)


def randomize(network):
    """Move every parameter from its start, where zeros leave half of the network unused."""
    for p in network.parameters():
        if p.ndim < 2:
            p.data += 0.3 * torch.randn(p.shape)
        elif not p.any():
            p.data = 0.7 * torch.randn(p.shape) * p.size(-1) ** -0.5
    return network


def random_network(num_layers=6, length=512, dtype=torch.float32, vocab_size=VOCAB, **options):
    shape = dict(SHAPE, model_dim=48, max_seq_len=length, dtype=dtype)
    return randomize(train_gpt.GPT(vocab_size, num_layers, **shape, **options))


def window(blocks):
    return torch.tensor(blocks, dtype=torch.int32)


def random_targets(length):
    return torch.randint(VOCAB, (length,))


# --------------------------------------------------------------------------------------------------
# Parts, and the network before training


def test_norm_matches_reference():
    """Small activations, too: its eps is that of float32 for bfloat16."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for scale in (3, 0.05):
            x = (scale * torch.randn(2, 5, 64)).to(dtype)
            normed = train_gpt.norm(x)
            assert normed.dtype == dtype
            expected = reference.rms_norm(x.double())
            torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=1e-3)


def test_next_multiple_of_n_by_hand():
    values = [0, 1, 128, 128.5, 129]
    multiples = [train_gpt.next_multiple_of_n(v, n=128) for v in values]
    assert multiples == [128, 128, 128, 256, 256]


def test_network_starts_as_documented():
    """Projections and head at zero, other matrices uniform, scalars as they change nothing."""
    network = train_gpt.GPT(VOCAB, 12, 2, 64, 128, 256)
    assert [i for i, block in enumerate(network.blocks) if block.attn is None] == [7]
    for name, p in network.named_parameters():
        embedding = "embed" in name
        assert p.dtype == (torch.bfloat16 if embedding else torch.float32)
        if embedding:
            assert p.float().std().item() == pytest.approx(1, rel=0.02)
        elif p.ndim < 2:
            start = [0.5, 0.5] if "attn" in name else [1.0, 0.0]
            assert p.tolist() == ([1.0] * 6 if name == "skip_weights" else start)
        elif "c_proj" in name or "lm_head" in name:
            assert not p.any()
        else:
            bound = 3**0.5 * 0.5 / math.sqrt(128)
            assert (-p.min().item(), p.max().item()) == pytest.approx((bound, bound), rel=0.01)
    loss = network(documents(256, [0, 99]), random_targets(256), window(2))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(384), rel=1e-6)  # all tokens alike, padded to 384


def test_long_windows_of_twelve_layers_by_hand():
    assert train_gpt.window_pattern(12) == "LSSSLSSLSSSL"
    assert [i for i in range(12) if reference.is_long(i, 12)] == [0, 4, 7, 11]


# --------------------------------------------------------------------------------------------------
# Loss and gradients


def check_against_reference(network, ids, blocks, loss_rel, grad_rel, scalar_rel):
    """The loss and all gradients, whose errors are relative to their norms.

    The gradient of a scalar is one sum of many terms of both signs, and less precise.
    """
    targets = random_targets(len(ids))
    targets[100:180] = -100
    loss = network(ids, targets, window(blocks))
    loss.backward()
    shape = dict(SHAPE, num_layers=len(network.blocks), vocab_size=VOCAB)
    expected, gradients = reference.gpt_loss_and_gradients(
        network.state_dict(), ids, targets, blocks, **shape
    )
    assert loss.item() == pytest.approx(expected.item(), rel=loss_rel)
    for name, p in network.named_parameters():
        grad = gradients[name]
        assert grad.norm() > 0, f"{name} is not used"
        error = (p.grad.double() - grad).norm() / grad.norm()
        assert error.item() < (grad_rel if p.ndim >= 2 else scalar_rel), name


@pytest.mark.parametrize(
    "num_layers, attention_free_layer, length, starts, blocks",
    [
        (6, 6, 256, [0], 1),
        (6, 4, 512, [0, 130, 256, 400], 2),
        (7, 0, 384, [], 3),
        (12, 7, 640, [0, 500], 4),
        (12, 11, 512, range(0, 512, 50), 9),
    ],
)
def test_loss_and_gradients_match_reference(
    num_layers, attention_free_layer, length, starts, blocks
):
    network = random_network(num_layers, length, attention_free_layer=attention_free_layer)
    check_against_reference(network, documents(length, starts), blocks, 1e-5, 1e-4, 1e-3)


def test_bfloat16_network_is_close_to_reference():
    network = random_network(12, dtype=torch.bfloat16)
    check_against_reference(network, documents(512, [0, 130]), 3, 5e-3, 0.05, math.inf)


@pytest.mark.parametrize("training", [True, False])
def test_loss_in_pieces_matches_reference(training):
    """A sequence that is longer than those of training, with a piece without targets."""
    network = random_network(train_seq_len=128).train(training)
    ids, targets = documents(512, [0, 70]), random_targets(512)
    targets[100:260] = -100
    shape = dict(SHAPE, num_layers=6, vocab_size=VOCAB)
    expected = reference.gpt_loss(network.state_dict(), ids, targets, 2, **shape)
    loss = network(ids, targets, window(2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_logits_are_capped():
    """However large the head's weights are, the least likely target costs about 30 nats."""
    network = random_network(length=128)
    network.lm_head.weight.data *= 1e6
    loss = network(documents(128, [0]), random_targets(128), window(1)).item()
    assert 10 < loss <= 30 + math.log(384)


@pytest.mark.parametrize("position", [100, 127, 128, 200, 511])
def test_loss_depends_on_the_documents_past_alone(position):
    """All ids differ, so that each row of the embedding's gradient belongs to one position."""
    ids = torch.randperm(1024)[:512].int()
    ids[150] = 1024
    network = random_network(vocab_size=1025)
    targets = torch.full((512,), -100)
    targets[position] = 3
    network(ids, targets, window(2)).backward()
    used = network.embed.weight.grad[ids.long()].norm(dim=-1) > 0
    token = torch.arange(512)
    allowed = (token <= position) & ((token >= 150) == (position >= 150))
    assert used[position] and not used[~allowed].any()


# --------------------------------------------------------------------------------------------------
# Training


def test_training_steps_match_plain_optimizers_on_reference():
    """Which optimizer trains which parameter, schedules, and the mean over two sequences."""
    options = dict(num_iterations=5, seqs_per_step=2, train_seq_len=256, val_seq_len=256)
    options |= dict(SHAPE, model_dim=48, num_layers=6, attention_free_layer=4, max_window=384)
    hp = train_gpt.Hyperparameters(**options)
    network = randomize(train_gpt.build_model(hp, VOCAB, CPU))
    optimizers = train_gpt.build_optimizers(network, hp, CPU)

    weights = {name: p.detach().clone() for name, p in network.state_dict().items()}
    matrices = {n: p for n, p in weights.items() if n.startswith("blocks") and p.ndim >= 2}
    rates = dict(embed=hp.embed_lr, value_embeds=hp.embed_lr, lm_head=hp.head_lr)
    others = [(n.split(".")[0], p) for n, p in weights.items() if n not in matrices]
    adam = reference.PlainAdam((p, rates.get(name, hp.scalar_lr)) for name, p in others)
    muon = reference.PlainMuon(matrices.values(), lr=None, momentum=None)

    for step in (0, 3, 4):  # the last one has a lower rate and a longer window
        factor = reference.learning_rate_factor(step, 5)
        blocks = reference.window(step, 5, 384)
        batches = [(documents(256, [0, 40 + step], seed=i), random_targets(256)) for i in range(2)]
        schedule = train_gpt.set_schedule(optimizers, step, hp, CPU)
        momentum = reference.momentum(step)
        assert optimizers[1].param_groups[0]["momentum"] == pytest.approx(momentum)
        loss, stops = train_gpt.training_step(
            network, optimizers, batches, schedule, step, True, hp, CPU
        )
        shape = dict(SHAPE, num_layers=6, vocab_size=VOCAB, dtype=torch.float32)
        (loss0, grads0), (loss1, grads1) = (
            reference.gpt_loss_and_gradients(weights, *batch, blocks, **shape) for batch in batches
        )
        assert loss.item() == pytest.approx((loss0 + loss1).item() / 2, rel=1e-4)
        assert stops.item() == 1
        for name, p in weights.items():
            p.grad = (grads0[name] + grads1[name]) / 2
        adam.step(factor)
        muon.lr, muon.momentum = hp.muon_lr * factor, momentum
        muon.step()
        for name, p in network.named_parameters():
            assert p.grad is None
            # A first step of Adam has the length of its rate even where the gradient is almost
            # zero, and there the last bit of a sum decides. So tensors are compared by norm.
            error = (p.detach() - weights[name]).norm() / weights[name].norm()
            assert error.item() < 2e-3, name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_growing_window_compiles_once(monkeypatch):
    """In one graph, with FlexAttention and FP8 as on a GPU. A second compilation is an error."""
    monkeypatch.setattr(
        train_gpt,
        "attention_under",
        lambda mask: functools.partial(flex_attention, block_mask=mask),
    )
    torch._dynamo.reset()
    network = random_network(dtype=torch.bfloat16)
    train_gpt.choose_fp8(network, "all", 512)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        network.compile(backend="eager", fullgraph=True, dynamic=False)
        for start, blocks in ((400, 1), (400, 2), (10, 4)):
            network(documents(512, [0, start]), random_targets(512), window(blocks))
