"""The whole network against a plain dense one.

Its first state, its loss, every gradient, what it must not see, steps of training, and the
full-size model traced on the meta device without a break.
"""

import math
import threading
from unittest import mock

import pytest
import torch
import twins
from conftest import CPU
from torch.nn.attention.flex_attention import flex_attention

import train_gpt

VOCAB = 257
# The heads together are narrower than the stream, so that nothing fits by accident.
SMALL = dict(num_heads=2, head_dim=16, model_dim=48)


def network(num_layers=6, T=256, dtype=torch.float32, **options):
    return train_gpt.GPT(VOCAB, num_layers, max_seq_len=T, dtype=dtype, **SMALL, **options)


def randomized(net, seed=0):
    """Move every parameter away from where it starts.

    Zeros and ones would leave half of the network without a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.ndim < 2:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
        elif not p.any():
            p.data = 0.7 * torch.randn(p.shape, generator=generator) * p.size(-1) ** -0.5
    return net


def window(blocks):
    return torch.tensor(blocks, dtype=torch.int32)


def draw_targets(T, seed=1):
    return torch.randint(VOCAB, (T,), generator=torch.Generator().manual_seed(seed))


def twin_shape(num_layers=6):
    """What the twin needs to know beside the weights."""
    return dict(num_layers=num_layers, num_heads=2, head_dim=16, vocab_size=VOCAB)


# ---------------------------------------------------------------------------------------------
# Small parts


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_norm(dtype, tolerance):
    x = (3 * torch.randn(2, 5, 64)).to(dtype)
    normed = train_gpt.norm(x)
    assert normed.dtype == dtype
    expected = twins.rms_norm(x.double())
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(
    "v, n, expected",
    [(1, 128, 128), (128, 128, 128), (129, 128, 256), (0, 128, 128), (128.5, 128, 256), (5, 1, 5)],
)
def test_next_multiple_of_n(v, n, expected):
    assert train_gpt.next_multiple_of_n(v, n=n) == expected


@pytest.mark.parametrize("num_layers", [1, 5])
def test_too_few_layers_for_the_value_embeddings_are_refused(num_layers):
    with pytest.raises(ValueError, match="six"):
        network(num_layers)


# ---------------------------------------------------------------------------------------------
# Before the first step


@pytest.fixture(scope="module")
def fresh():
    """A network in its first state, at the default settings and wide enough for statistics."""
    torch.manual_seed(0)
    return train_gpt.GPT(VOCAB, 12, 2, 64, 128, 256)


def test_embeddings_start_as_bfloat16_normal_numbers(fresh):
    tables = [fresh.embed.weight, *fresh.value_embeds.parameters()]
    assert len({table.float().sum().item() for table in tables}) == len(tables) == 4
    for table in tables:
        assert table.dtype == torch.bfloat16 and table.shape == (VOCAB, 128)
        assert abs(table.float().mean().item()) < 0.02
        assert table.float().std().item() == pytest.approx(1, rel=0.02)


def test_weights_start_as_the_recipe_says(fresh):
    spread = pytest.approx(0.5 / math.sqrt(128), rel=0.02)
    reach = pytest.approx(3**0.5 * 0.5 / math.sqrt(128), rel=0.01)  # of a uniform distribution
    assert fresh.skip_weights.tolist() == [1.0] * 6
    assert fresh.lm_head.weight.shape == (384, 128)
    assert not fresh.lm_head.weight.any()
    assert [i for i, block in enumerate(fresh.blocks) if block.attn is None] == [7]
    for block in fresh.blocks:
        assert block.lambdas.tolist() == [1.0, 0.0]
        assert not block.mlp.c_proj.weight.any()
        assert block.mlp.c_fc.weight.shape == (512, 128)
        drawn = [block.mlp.c_fc.weight]
        if block.attn is not None:
            assert block.attn.lambdas.tolist() == [0.5, 0.5]
            assert not block.attn.c_proj.weight.any()
            assert block.attn.qkv.weight.shape == (3, 128, 128)
            drawn.append(block.attn.qkv.weight)
        assert all(weight.std().item() == spread for weight in drawn)
        assert all(-weight.min().item() == reach == weight.max().item() for weight in drawn)
    for name, p in fresh.named_parameters():
        assert p.dtype == (torch.bfloat16 if "embed" in name else torch.float32)


def test_first_loss_is_that_of_a_guess_over_the_padded_vocabulary(fresh, documents):
    loss = fresh(documents(256, [0, 99]), draw_targets(256), window(2))
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert loss.item() == pytest.approx(math.log(384), rel=1e-6)


def test_speedrun_model_has_the_parameters_of_the_recipe():
    with torch.device("meta"):
        net = train_gpt.GPT(50257, 12, 6, 128, 768, 64 * 1024)
    embeddings = 4 * 50257 * 768  # of tokens, and three of values
    head = 50304 * 768  # of the vocabulary padded to a multiple of 128
    matrices = 11 * 4 * 768**2 + 12 * 8 * 768**2  # eleven layers of attention and twelve MLPs
    scalars = 11 * 2 + 12 * 2 + 6
    counted = sum(p.numel() for p in net.parameters())
    assert counted == embeddings + head + matrices + scalars


# ---------------------------------------------------------------------------------------------
# Loss and gradients


def check_against_twin(net, ids, targets, blocks, loss_rel=1e-5, grad_rel=1e-4, least_dims=0):
    """The loss, and the gradient of each parameter of at least least_dims dimensions.

    The error of a gradient is relative to its length.
    """
    shape = twin_shape(len(net.blocks))
    loss = net(ids, targets, window(blocks))
    loss.backward()
    expected = twins.gpt_loss_and_gradients(net.state_dict(), ids, targets, blocks, **shape)
    assert loss.item() == pytest.approx(expected[0].item(), rel=loss_rel)
    assert {name for name, p in net.named_parameters() if p.grad is not None} == set(expected[1])
    for name, p in net.named_parameters():
        grad = expected[1][name]
        assert grad.norm() > 0, f"{name} plays no part"
        error = (p.grad.double() - grad).norm() / grad.norm()
        assert p.ndim < least_dims or error.item() < grad_rel, name


@pytest.mark.parametrize(
    "num_layers, free, T, starts, blocks",
    [
        (6, (), 256, [0], 1),
        (6, (4,), 512, [0, 130, 256, 400], 2),
        (7, (2,), 384, [], 3),
        (7, (), 512, [60, 61, 300], 4),
        (12, (7,), 640, [0, 500], 4),
        (12, (0, 11), 512, range(0, 512, 50), 9),
    ],
)
def test_loss_and_gradients_are_the_plain_networks(num_layers, free, T, starts, blocks, documents):
    """Whichever layers have no attention. The first and the last three have value embeddings."""
    net = randomized(network(num_layers, T, attention_free_layers=free))
    assert tuple(i for i, block in enumerate(net.blocks) if block.attn is None) == free
    check_against_twin(net, documents(T, starts), draw_targets(T), blocks)


def test_bfloat16_network_is_near_the_plain_one(documents):
    """Without the mixing weights: the gradient of each is one sum of many terms of both signs, of
    which bfloat16 leaves the first digit."""
    net = randomized(network(12, 512, torch.bfloat16))
    ids = documents(512, [0, 130])
    check_against_twin(net, ids, draw_targets(512), 3, loss_rel=5e-3, grad_rel=0.05, least_dims=2)


def test_long_windows_of_twelve_layers():
    """The twin, by which the network's windows are checked, is itself as the recipe says."""
    assert [i for i in range(12) if twins.is_long(i, 12)] == [0, 4, 7, 11]


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_mean_over_the_targets_that_count(training, documents):
    net = randomized(network()).train(training)
    ids = documents(256, [0, 70])
    targets = draw_targets(256)
    targets[100:180] = -100
    expected = twins.gpt_loss(net.state_dict(), ids, targets, 2, **twin_shape())
    with torch.no_grad():
        loss = net(ids, targets, window(2)).item()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_logits_stay_between_zero_and_thirty(documents):
    """However large the head's weights are, the least likely target costs about 30 nats."""
    net = randomized(network(T=128))
    net.lm_head.weight.data *= 1e6
    ids = documents(128, [0])
    with torch.no_grad():
        losses = [net(ids, draw_targets(128, seed), window(1)).item() for seed in range(5)]
    assert max(losses) <= 30 + math.log(384) and min(losses) > 10


@pytest.mark.parametrize("position", [0, 100, 127, 128, 200, 383, 511])
@pytest.mark.parametrize("free", [(0, 1, 2, 3, 4), ()], ids=["last layer alone", "all layers"])
def test_token_is_seen_from_its_document_its_past_and_the_window_alone(position, free):
    """With one layer that attends, a loss depends on exactly the tokens that the mask allows; with
    all layers, on none of the future or of another document.

    All ids are different, so that each row of the embedding's gradient belongs to one position.
    """
    T, vocab_size, start = 512, 1025, 150
    ids = torch.randperm(1024)[:T].int()
    ids[start] = vocab_size - 1
    options = dict(dtype=torch.float32, attention_free_layers=free, **SMALL)
    net = randomized(train_gpt.GPT(vocab_size, 6, max_seq_len=T, **options))
    targets = torch.full((T,), -100)
    targets[position] = 3
    net(ids, targets, window(2)).backward()
    depends = net.embed.weight.grad[ids.long()].norm(dim=-1) > 0
    token = torch.arange(T)
    allowed = (token <= position) & ((token >= start) == (position >= start))
    assert not depends[~allowed].any()
    if free:
        assert torch.equal(depends, twins.dense_mask(ids, vocab_size - 1, 2)[position])


# ---------------------------------------------------------------------------------------------
# Steps of training


def draw_batches(documents, number, seed=0):
    """Ids and targets of some sequences of 256 tokens."""
    return [
        (documents(256, [0, 40 + 30 * i], seed=seed + i), draw_targets(256, seed + i))
        for i in range(number)
    ]


def test_three_steps_equal_plain_adam_and_plain_muon_on_the_plain_network(documents):
    """Which optimizer gets what, at which learning rate, and the mean over a step's sequences.

    The rates fall in these steps; Muon's momentum stays, and its schedule has a test of its own.
    """
    settings = SMALL | dict(num_layers=6, attention_free_layers=(4,), dtype="float32")
    hp = train_gpt.Hyperparameters(num_iterations=5, train_seq_len=256, **settings)
    net = randomized(train_gpt.build_model(hp, VOCAB, CPU))
    optimizers = train_gpt.build_optimizers(net, hp, CPU)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    initial_rates = [group["lr"] for group in groups]

    weights = {name: p.detach().clone() for name, p in net.state_dict().items()}
    rates = {"embed": 0.6, "value_embeds": 0.6, "lm_head": 0.008}
    matrices = {n: p for n, p in weights.items() if n.startswith("blocks") and p.ndim >= 2}
    others = {n: p for n, p in weights.items() if n not in matrices}
    adam = twins.PlainAdam((p, rates.get(n.split(".")[0], 0.04)) for n, p in others.items())
    muon = twins.PlainMuon(matrices.values(), lr=0.05, momentum=0.85)

    for step in range(3):
        factor = twins.learning_rate_factor(step, 5)
        for group, rate in zip(groups, initial_rates, strict=True):
            group["lr"] = rate * factor
        batches = draw_batches(documents, 2, seed=10 * step)
        loss = train_gpt.training_step(net, optimizers, batches, window(2), 2, CPU)

        first, second = (
            twins.gpt_loss_and_gradients(weights, *batch, 2, torch.float32, **twin_shape())
            for batch in batches
        )
        assert loss.item() == pytest.approx((first[0] + second[0]).item() / 2, rel=1e-4)
        for name, p in weights.items():
            p.grad = (first[1][name] + second[1][name]) / 2
        adam.step(factor)
        muon.lr = 0.05 * factor
        muon.step()
        for name, p in net.named_parameters():
            assert p.grad is None or not p.grad.any()
            # Adam's first steps have the length of the learning rate even where the gradient is
            # all but zero, and there the last bit of a sum decides. So the whole tensor is
            # compared, and not each number.
            moved = (p.detach() - weights[name]).norm() / weights[name].norm()
            assert moved.item() < 2e-3, name


class GradientRecorder:
    """In the place of an optimizer: keeps the gradients that it is given."""

    def __init__(self, net):
        self.net = net

    def step(self):
        self.grads = {name: p.grad.clone() for name, p in self.net.named_parameters()}


@pytest.mark.parametrize(
    "cores, sequences, side_by_side", [(1, 2, 1), (2, 2, 2), (5, 2, 2), (5, 3, 1)]
)
def test_a_step_has_the_mean_gradient_and_loss_of_its_sequences(
    cores, sequences, side_by_side, documents, monkeypatch
):
    """Also where two sequences are computed side by side, which three are not: with the order of
    their additions the sum would change. Validation gives the same loss."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    machine = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)
    net = randomized(network())
    recorder = GradientRecorder(net)
    threads = set()
    net.register_forward_hook(lambda *args: threads.add(threading.get_ident()))
    batches = draw_batches(documents, sequences)
    loss = train_gpt.training_step(net, [recorder], batches, window(2), sequences, machine)
    assert len(threads) <= side_by_side
    assert (threading.get_ident() in threads) == (side_by_side == 1)

    loader = mock.Mock(rank=0, world_size=1, seq_len=256, num_sequences=sequences)
    loader.num_tokens = sequences * 256
    loader.sequence = batches.__getitem__
    validation = train_gpt.validate(net, loader, window(2), machine)
    mean = sum(net(*batch, window(2)) for batch in batches) / sequences
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
    assert validation == pytest.approx(mean.item(), rel=1e-5)
    net.zero_grad()
    mean.backward()
    for name, p in net.named_parameters():
        # The gradient of a mixing weight is a sum of both signs, of which the order of the
        # additions decides the last digits.
        atol = 1e-5 * p.grad.abs().max().item()
        torch.testing.assert_close(recorder.grads[name], p.grad, rtol=1e-3, atol=atol)


# ---------------------------------------------------------------------------------------------
# The full size, traced


def flex(q, k, v, block_mask, scale):
    """A GPU's attention, in the place of what the script does on a CPU and on the meta device."""
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale)


@pytest.fixture
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:aten..nll_loss")
@pytest.mark.parametrize("fp8", ["all"])
def test_speedrun_model_is_one_graph_at_full_size(fp8, clean_dynamo, monkeypatch):
    """Twelve layers, 48K tokens, FlexAttention and FP8, forward and backward, on the meta device:
    shapes and dtypes without a GPU, and fullgraph raises at a break."""
    T = 48 * 1024
    yes = torch.compiler.assume_constant_result(lambda device: True)
    monkeypatch.setattr(train_gpt, "fp8_supported", yes)
    monkeypatch.setattr(train_gpt, "attention", flex)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *args: None)
    with torch.device("meta"):
        net = train_gpt.GPT(50257, 12, 6, 128, 768, T, fp8=fp8)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
        ids = torch.empty(T, dtype=torch.int32)
        targets = torch.empty(T, dtype=torch.int64)
        loss = compiled(ids, targets, torch.empty((), dtype=torch.int32))
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.is_meta
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_growing_window_compiles_nothing_new(clean_dynamo, documents, monkeypatch):
    """Nor do other documents. A second compilation would raise an error here."""
    monkeypatch.setattr(train_gpt, "attention", flex)
    net = randomized(network(6, 512, attention_free_layers=(1, 2, 3, 4)))
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(net, backend="eager", fullgraph=True, dynamic=False)
        for start, blocks in ((400, 1), (400, 2), (10, 4)):
            compiled(documents(512, [0, start]), draw_targets(512), window(blocks))
