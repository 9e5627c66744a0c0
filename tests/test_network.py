"""The whole network against a plain dense one: its first state, loss, every gradient, what it must not see, one step of
training, and the full-size model traced on the meta device without a break."""

import math
import threading
from unittest import mock

import pytest
import torch
import train_gpt
import twins
from torch.nn.attention.flex_attention import flex_attention

VOCAB = 257
SMALL = dict(num_heads=2, head_dim=16, model_dim=48)  # heads narrower than the stream, so that nothing fits by accident


def network(num_layers=6, T=256, dtype=torch.float32, **options):
    return train_gpt.GPT(VOCAB, num_layers, max_seq_len=T, dtype=dtype, **SMALL, **options)


def randomized(net, seed=0):
    """Every parameter away from where it starts: zeros and ones would leave half of the network without a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.ndim < 2:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
        elif not p.any():
            p.data = 0.7 * torch.randn(p.shape, generator=generator) * p.size(-1) ** -0.5
    return net


def window(blocks):
    return torch.tensor(blocks, dtype=torch.int32)


def draw_targets(T, seed=1):
    return torch.randint(VOCAB, (T,), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------
# Small parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    x = (3 * torch.randn(2, 5, 64)).to(dtype)
    assert train_gpt.norm(x).dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(train_gpt.norm(x).double(), twins.rms_norm(x.double()), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("v, n, expected", [(1, 128, 128), (128, 128, 128), (129, 128, 256), (50257, 128, 50304), (257, 128, 384),
                                            (0, 128, 128), (128.5, 128, 256), (5, 1, 5)])
def test_next_multiple_of_n(v, n, expected):
    assert train_gpt.next_multiple_of_n(v, n=n) == expected


def test_mlp_is_a_squared_relu_four_times_as_wide():
    mlp = train_gpt.MLP(48)
    assert mlp.c_fc.weight.shape == (192, 48) and not mlp.c_proj.weight.any()
    torch.nn.init.normal_(mlp.c_proj.weight)
    x = torch.randn(1, 7, 48)
    expected = (x @ mlp.c_fc.weight.T).clamp(min=0) ** 2 @ mlp.c_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("num_layers", [6, 7, 12])
def test_value_embeddings_serve_the_first_three_layers_and_the_last(num_layers):
    net = network(num_layers)
    ids = torch.arange(10)
    ve = net.value_embeds(ids)
    assert len(ve) == num_layers
    tables = [p for p in net.value_embeds.parameters()]
    assert len(tables) == 3
    for n in range(3):
        for layer in (n, num_layers - 3 + n):
            assert torch.equal(ve[layer].view(10, -1), tables[n][ids])
    assert all(entry is None for entry in ve[3:-3])


@pytest.mark.parametrize("num_layers", [1, 5])
def test_too_few_layers_for_them_are_refused(num_layers):
    with pytest.raises(ValueError, match="six"):
        network(num_layers)


# ---------------------------------------------------------------------------------------------------------
# Before the first step


@pytest.fixture(scope="module")
def fresh():
    """A network in its first state, at the default settings and wide enough for statistics."""
    torch.manual_seed(0)
    return train_gpt.GPT(VOCAB, 12, 2, 64, 128, 256)


def test_embeddings_start_as_bfloat16_normal_numbers(fresh):
    tables = [fresh.embed.weight, *fresh.value_embeds.parameters()]
    assert len(tables) == 4
    for table in tables:
        assert table.dtype == torch.bfloat16 and table.shape == (VOCAB, 128)
        assert abs(table.float().mean().item()) < 0.02 and table.float().std().item() == pytest.approx(1, rel=0.02)
    for a, b in zip(tables, tables[1:]):
        assert not torch.equal(a, b)


def test_weights_start_as_the_recipe_says(fresh):
    assert fresh.skip_weights.tolist() == [1.0] * 6
    assert fresh.lm_head.weight.shape == (384, 128)
    assert not fresh.lm_head.weight.any()
    for i, block in enumerate(fresh.blocks):
        assert block.lambdas.tolist() == [1.0, 0.0]
        assert not block.mlp.c_proj.weight.any()
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.5 / math.sqrt(128), rel=0.03)
        assert (block.attn is None) == (i == 7)
        if block.attn is not None:
            assert block.attn.lambdas.tolist() == [0.5, 0.5]
            assert not block.attn.c_proj.weight.any()
            assert block.attn.qkv.weight.shape == (3, 128, 128)
            assert block.attn.qkv.weight.std().item() == pytest.approx(0.5 / math.sqrt(128), rel=0.03)
    for name, p in fresh.named_parameters():
        assert p.dtype == (torch.bfloat16 if "embed" in name else torch.float32)


def test_first_loss_is_that_of_a_guess_over_the_padded_vocabulary(fresh, documents):
    loss = fresh(documents(256, [0, 99]), draw_targets(256), window(2))
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert loss.item() == pytest.approx(math.log(384), rel=1e-6)


@pytest.mark.parametrize("vocab_size, padded", [(50257, 50304), (256, 256), (257, 384)])
def test_head_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert train_gpt.GPT(vocab_size, 6, 1, 16, 16, 128).lm_head.weight.shape == (padded, 16)


@pytest.mark.parametrize("free", [(), (7,), (0, 3, 11)])
def test_layers_without_attention_are_those_named(free):
    net = network(12, attention_free_layers=free)
    assert tuple(i for i, block in enumerate(net.blocks) if block.attn is None) == free


def test_speedrun_model_has_the_parameters_of_the_recipe():
    """Counted by hand: embedding and three value embeddings, head, eleven attention and twelve MLP layers, scalars."""
    with torch.device("meta"):
        net = train_gpt.GPT(50257, 12, 6, 128, 768, 64 * 1024)
    width = 768
    expected = 4 * 50257 * width + 50304 * width + 11 * 4 * width**2 + 12 * 8 * width**2 + 11 * 2 + 12 * 2 + 6
    assert sum(p.numel() for p in net.parameters()) == expected


# ---------------------------------------------------------------------------------------------------------
# Loss and gradients


def check_against_twin(net, ids, targets, blocks, loss_tolerance=1e-5, grad_tolerance=1e-4, least_dims=0):
    """The loss, and the gradient of each parameter of least_dims dimensions or more, its error relative to its length."""
    shape = dict(num_layers=len(net.blocks), num_heads=SMALL["num_heads"], head_dim=SMALL["head_dim"], vocab_size=VOCAB)
    expected_loss, expected_grads = twins.gpt_loss_and_gradients(net.state_dict(), ids, targets, blocks, **shape)
    net.zero_grad()
    loss = net(ids, targets, window(blocks))
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=loss_tolerance)
    assert {name for name, p in net.named_parameters() if p.grad is not None} == set(expected_grads)
    for name, p in net.named_parameters():
        expected = expected_grads[name]
        assert expected.norm() > 0, f"{name} plays no part"
        error = (p.grad.double() - expected).norm() / expected.norm()
        assert p.ndim < least_dims or error.item() < grad_tolerance, name


@pytest.mark.parametrize("num_layers, free, T, starts, blocks", [
    (6, (), 256, [0], 1),
    (6, (4,), 512, [0, 130, 256, 400], 2),
    (7, (2,), 384, [], 3),
    (7, (), 512, [60, 61, 300], 4),
    (12, (7,), 640, [0, 500], 4),
    (12, (0, 11), 512, range(0, 512, 50), 9),
])
def test_loss_and_gradients_are_those_of_the_plain_network(num_layers, free, T, starts, blocks, documents):
    net = randomized(network(num_layers, T, attention_free_layers=free))
    check_against_twin(net, documents(T, starts), draw_targets(T), blocks)


def test_bfloat16_network_is_near_the_plain_one(documents):
    net = randomized(network(12, 512, torch.bfloat16))
    # The gradient of a mixing weight is one sum of many terms of both signs, of which bfloat16 leaves the first digit.
    check_against_twin(net, documents(512, [0, 130]), draw_targets(512), 3, loss_tolerance=5e-3, grad_tolerance=0.05, least_dims=2)


def test_long_windows_of_twelve_layers():
    assert [i for i in range(12) if twins.is_long(i, 12)] == [0, 4, 7, 11]


@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_mean_over_the_targets_that_count(training, documents):
    net = randomized(network(6, 256)).train(training)
    ids, targets = documents(256, [0, 70]), draw_targets(256)
    targets[100:180] = -100
    with torch.no_grad():
        loss = net(ids, targets, window(2)).item()
    expected = twins.gpt_loss(net.state_dict(), ids, targets, 2, num_layers=6, num_heads=2, head_dim=16, vocab_size=VOCAB)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_gives_the_loss_of_training(documents):
    net = randomized(network(6, 256))
    ids, targets = documents(256, [0, 70]), draw_targets(256)
    with torch.no_grad():
        losses = [net.train(training)(ids, targets, window(2)).item() for training in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_logits_stay_between_zero_and_thirty(documents):
    """However large the head's weights: a target of the least logit among others at the most costs about 30 nats."""
    net = randomized(network(6, 128))
    net.lm_head.weight.data *= 1e6
    with torch.no_grad():
        losses = [net(documents(128, [0]), draw_targets(128, seed), window(1)).item() for seed in range(5)]
    assert max(losses) <= 30 + math.log(384) and min(losses) > 10


def embedding_gradient(net, ids, position, blocks):
    """How much the loss at one position depends on the token at each, (T,). The ids are all different, so that each row of
    the embedding's gradient belongs to one position."""
    assert len(set(ids.tolist())) == len(ids)
    targets = torch.full((len(ids),), -100)
    targets[position] = 3
    net.zero_grad()
    net(ids, targets, window(blocks)).backward()
    return net.embed.weight.grad[ids.long()].norm(dim=-1)


@pytest.mark.parametrize("position", [0, 100, 127, 128, 200, 383, 511])
def test_token_is_seen_from_its_document_its_past_and_the_window_alone(position):
    """With one layer that attends, exactly what the mask says, and with all layers, nothing of the future or of another
    document."""
    T, vocab_size, start = 512, 1025, 150
    ids = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:T].int()
    ids[start] = vocab_size - 1
    for free in (tuple(range(5)), ()):  # the last layer alone, and all
        net = randomized(train_gpt.GPT(vocab_size, 6, max_seq_len=T, dtype=torch.float32, attention_free_layers=free, **SMALL))
        depends = embedding_gradient(net, ids, position, 2) > 0
        document = torch.arange(T) >= start
        allowed = (torch.arange(T) <= position) & (document == document[position])
        assert not depends[~allowed].any()
        if free:
            assert torch.equal(depends, twins.dense_mask(ids, vocab_size - 1, 2)[position])


def test_later_tokens_do_not_change_earlier_losses(documents):
    net = randomized(network(7, 512))
    first, second = documents(512, [0, 150], seed=1), documents(512, [0, 150, 300, 310], seed=2)
    second[:300] = first[:300]
    targets = draw_targets(512)
    targets[300:] = -100
    with torch.no_grad():
        losses = [net(ids, targets, window(4)).item() for ids in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_document_does_not_know_what_stands_before_it(documents):
    net = randomized(network(7, 512))
    first, second = documents(512, [0, 150], seed=1), documents(512, [20, 30, 150], seed=2)
    second[150:] = first[150:]
    targets = draw_targets(512)
    targets[:150] = -100
    with torch.no_grad():
        losses = [net(ids, targets, window(4)).item() for ids in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Steps of training


def test_three_steps_equal_plain_adam_and_plain_muon_on_the_plain_network(documents):
    """Which optimizer gets what, at which learning rate, the mean over a step's sequences, and the schedules."""
    hp = train_gpt.Hyperparameters(num_layers=6, seqs_per_step=2, num_iterations=5, train_seq_len=256, val_seq_len=256, max_window=256,
                                   dtype="float32", attention_free_layers=(4,), **SMALL)
    machine = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)
    net = randomized(train_gpt.build_model(hp, VOCAB, machine))
    optimizers = train_gpt.build_optimizers(net, hp, machine)

    weights = {name: p.detach().clone() for name, p in net.state_dict().items()}
    matrices = [p for name, p in weights.items() if name.startswith("blocks") and p.ndim >= 2]
    rates = [(p, 0.6 if "embed" in name else 0.008 if name == "lm_head.weight" else 0.04)
             for name, p in weights.items() if not any(p is matrix for matrix in matrices)]
    adam, muon = twins.PlainAdam(rates), twins.PlainMuon(matrices, lr=0.05, momentum=0.85)
    shape = dict(num_layers=6, num_heads=2, head_dim=16, vocab_size=VOCAB)

    for step in range(3):  # of five, and so all three learning rates of the cooldown's beginning
        batches = [(documents(256, [0, 40 + 30 * seq], seed=10 * step + seq), draw_targets(256, 10 * step + seq)) for seq in range(2)]
        for optimizer in optimizers:
            for group in optimizer.param_groups:  # momentum by the twin; its schedule has a test of its own
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * twins.learning_rate_factor(step, 5)
        loss, stops = train_gpt.training_step(net, optimizers, batches, window(2), 2, train_gpt.GradientReducer(net, optimizers, machine))

        results = [twins.gpt_loss_and_gradients(weights, ids, targets, 2, dtype=torch.float32, **shape) for ids, targets in batches]
        assert stops == 0 and loss.item() == pytest.approx((results[0][0] + results[1][0]).item() / 2, rel=1e-4)
        for name, p in weights.items():
            p.grad = (results[0][1][name] + results[1][1][name]) / 2
        adam.step(twins.learning_rate_factor(step, 5))
        muon.lr = 0.05 * twins.learning_rate_factor(step, 5)
        muon.step()
        for name, p in net.named_parameters():
            assert p.grad is None or not p.grad.any()
            # Adam's first steps have the length of the learning rate even where the gradient is all but zero, and there
            # the last bit of a sum decides; so the whole tensor is compared, and not each number.
            moved = (p.detach() - weights[name]).norm() / weights[name].norm()
            assert moved.item() < 2e-3, name


def test_optimizers_are_given_the_mean_gradient_of_a_step(documents):
    """Which Adam and Muon, indifferent to its length, would not tell from the sum."""
    class Recorder:
        def step(self):
            self.grads = {name: p.grad.clone() for name, p in net.named_parameters()}

    net, recorder = randomized(network(6, 256)), Recorder()
    batches = [(documents(256, [0, 40], seed=seq), draw_targets(256, seq)) for seq in range(3)]
    machine = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)
    train_gpt.training_step(net, [recorder], batches, window(2), 3, train_gpt.GradientReducer(net, [], machine))
    net.zero_grad()
    sum(net(*batch, window(2)) for batch in batches).div(3).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(recorder.grads[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())


@pytest.mark.parametrize("cores, sequences, side_by_side", [(1, 2, 1), (2, 2, 2), (5, 2, 2), (5, 3, 1)])
def test_sequences_side_by_side_give_the_gradients_of_one_after_the_other(cores, sequences, side_by_side, documents, monkeypatch):
    """And the loss of a step and of a validation. Three gradients are not added up as they come: the order would tell."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    machine = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)
    net, threads, recorded = randomized(network(6, 256)), set(), {}
    net.register_forward_hook(lambda *args: threads.add(threading.get_ident()))

    class Recorder:
        def step(self):
            recorded.update({name: p.grad.clone() for name, p in net.named_parameters()})

    class Loader:
        rank, world_size, seq_len, num_sequences, num_tokens = 0, 1, 256, sequences, sequences * 256

        def sequence(self, index):
            return batches[index]

    batches = [(documents(256, [0, 40], seed=seq), draw_targets(256, seq)) for seq in range(sequences)]
    reducer = train_gpt.GradientReducer(net, [], machine)
    loss, stops = train_gpt.training_step(net, [Recorder()], batches, window(2), sequences, reducer)
    assert len(threads) <= side_by_side and (threading.get_ident() in threads) == (side_by_side == 1)
    losses = [net(*batch, window(2)) for batch in batches]
    assert loss.item() == pytest.approx(sum(losses).item() / sequences, rel=1e-6)
    assert train_gpt.validate(net, Loader(), window(2), reducer) == pytest.approx(loss.item(), rel=1e-5)
    sum(losses).div(sequences).backward()
    for name, p in net.named_parameters():
        # A mixing weight's gradient is a sum of both signs, of which the order of the sequences decides the last digits.
        torch.testing.assert_close(recorded[name], p.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())


# ---------------------------------------------------------------------------------------------------------
# The full size, traced


class CountingBackend:
    """Runs a graph as it is, and counts how often it is asked to."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("eager")(graph, inputs)


def flex(q, k, v, block_mask, scale):
    """A GPU's attention, in the place of what the script does on a CPU and on the meta device."""
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale)


@pytest.mark.filterwarnings("ignore:aten..nll_loss")
@pytest.mark.parametrize("fp8", ["all", "head"])
def test_speedrun_model_is_one_graph_at_full_size(fp8):
    """Twelve layers, 48K tokens, FlexAttention and FP8, forward and backward, on the meta device: shapes and dtypes
    without a GPU, and fullgraph raises at a break."""
    torch._dynamo.reset()
    T = 48 * 1024
    with (torch.device("meta"), mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *a: None),
          mock.patch.object(train_gpt, "attention", flex),
          mock.patch.object(train_gpt, "fp8_supported", torch.compiler.assume_constant_result(lambda device: True))):
        net = train_gpt.GPT(50257, 12, 6, 128, 768, T, fp8=fp8)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
        ids, targets = torch.empty(T, dtype=torch.int32), torch.empty(T, dtype=torch.int64)
        loss = compiled(ids, targets, torch.empty((), dtype=torch.int32))
        loss.backward()
    torch._dynamo.reset()
    assert loss.shape == () and loss.dtype == torch.float32 and loss.is_meta
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.shape, p.grad.dtype) == (p.shape, p.dtype), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_growing_window_is_no_new_compilation(documents):
    """Nor are other documents."""
    torch._dynamo.reset()
    backend = CountingBackend()
    net = randomized(network(6, 512, attention_free_layers=(1, 2, 3, 4)))
    with mock.patch.object(train_gpt, "attention", flex), torch.no_grad():
        compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
        for start, blocks in ((400, 1), (400, 2), (10, 4)):
            compiled(documents(512, [0, start]), draw_targets(512), window(blocks))
    torch._dynamo.reset()
    assert backend.graphs == 1
