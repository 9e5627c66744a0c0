"""Newton-Schulz against one matrix at a time in float64, and Muon against a plain loop, in one
process and in several."""

from types import SimpleNamespace

import pytest
import torch
import twins
from conftest import LargestTensor

import train_gpt

zeropower = train_gpt.zeropower_via_newtonschulz5
Muon = train_gpt.Muon

# ---------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 24), (24, 1), (64, 48)])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_follows_the_quintic(shape, steps):
    G = torch.randn(shape)
    before = G.clone()
    expected = twins.newton_schulz(G, steps)
    exact = zeropower(G, steps, torch.float32)
    fast = zeropower(G, steps)
    assert torch.equal(G, before)  # the input is left as it was
    assert exact.dtype == torch.float32 and fast.dtype == torch.bfloat16
    assert exact.shape == fast.shape == G.shape
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=2e-6)
    # bfloat16 has three digits: after five steps the direction is right within a few percent.
    assert float((fast.double() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_singular_values_end_near_one_and_the_factors_stay(shape, scale):
    """Of a well-conditioned matrix, however large it is."""
    rows, cols = shape
    U, Vt = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (rows, cols))
    values = torch.linspace(0.2, 1, min(shape), dtype=torch.float64)
    G = (scale * U[:, : len(values)] * values @ Vt[: len(values)]).float()
    X = zeropower(G, 5, torch.float32).double()
    nearest = twins.nearest_orthogonal(G)
    singular = torch.linalg.svdvals(X)
    # The quintic brings any value between 0.03 and 1 into this range.
    assert singular.min() > 0.68 and singular.max() < 1.14
    # Where U and V are kept, this product is symmetric and has the same singular values.
    product = X @ nearest.T if rows <= cols else nearest.T @ X
    torch.testing.assert_close(product, product.T, rtol=0, atol=1e-4)
    eigenvalues = torch.linalg.eigvalsh(product)
    torch.testing.assert_close(eigenvalues, singular.sort().values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 256), (256, 8), (3, 256, 8)])
def test_products_are_of_the_shorter_side(shape):
    """A tall matrix is transposed, or its products would be (rows, rows)."""
    G = torch.randn(shape)
    with LargestTensor() as seen:
        zeropower(G, 5)
    assert seen.elements <= G.numel()


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="16"):
        zeropower(torch.randn(16), 5)
    with pytest.raises(ValueError, match="Adam"):
        Muon([torch.nn.Parameter(torch.randn(16))])


# ---------------------------------------------------------------------------------------------
# Muon in one process

MIXED = [(16, 16), (32, 8), (8, 32), (16, 16), (3, 8, 16), (32, 8), (16, 16), (3, 16, 8)]


def make_params(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_grads(params, seed, leave_out=()):
    generator = torch.Generator().manual_seed(seed)
    for index, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if index in leave_out else grad


def step_both(pairs, seed, leave_out=()):
    """A step of each optimizer, with the same gradients for the parameters of each."""
    for params, optimizer in pairs:
        set_grads(params, seed, leave_out)
        optimizer.step()


def muon_and_loop(dtype=torch.float32, **options):
    """Equal parameters twice, with Muon and with the plain loop: two pairs for `step_both`."""
    ours, plain = make_params(MIXED), make_params(MIXED)
    for params in (ours, plain):
        params[0].lr_mul = 3.0
        params[5].lr_mul = 0.25
    return (ours, Muon(ours, dtype=dtype, **options)), (plain, twins.PlainMuon(plain, **options))


def assert_equal_params(pairs):
    for p, expected in zip(pairs[0][0], pairs[1][0], strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.85, 0.95])
def test_several_steps_equal_a_plain_loop(nesterov, momentum):
    """A missing gradient counts as zero, and a matrix that never has one stays, beside others."""
    pairs = muon_and_loop(lr=0.05, momentum=momentum, nesterov=nesterov, ns_steps=5)
    never = pairs[0][0][6]
    start = never.detach().clone()
    for step, leave_out in enumerate([(6,), (0, 6), (1, 4, 6), (6,)]):
        step_both(pairs, step, leave_out)
    assert_equal_params(pairs)
    assert torch.equal(never, start)


def test_default_dtype_stays_near_the_plain_loop():
    pairs = muon_and_loop(dtype=torch.bfloat16, lr=0.05, momentum=0.9)
    start = [p.detach().clone() for p in pairs[0][0]]
    step_both(pairs, 1)
    for p, expected, before in zip(pairs[0][0], pairs[1][0], start, strict=True):
        assert ((p - expected).norm() / (expected - before).norm()).item() < 0.05


def test_learning_rate_and_momentum_of_the_groups_are_read_at_each_step():
    """The momentum ends at none: after any other change the twin's would be another sum."""
    pairs = muon_and_loop(lr=0.05, momentum=0.9)
    muon, loop = pairs[0][1], pairs[1][1]
    rates = (0.05, 0.9), (0.02, 0.9), (0.0, 0.9), (0.01, 0.9), (0.01, 0.0)
    for step, (lr, momentum) in enumerate(rates):
        for group in muon.param_groups:
            group.update(lr=lr, momentum=momentum)
        loop.lr = lr
        loop.momentum = momentum
        step_both(pairs, step)
    assert_equal_params(pairs)


@pytest.fixture
def events(monkeypatch):
    """What Muon does in which order; the other process exists in name only, and sends zeros."""
    recorded = []

    def orthogonalise(G, *args):
        recorded.append(("work on", tuple(G.shape)))
        return zeropower(G, *args)

    def gather(gathered, mine, async_op):
        shape = tuple(mine.shape[1:])
        recorded.append(("send", shape))
        gathered.zero_()[: len(mine)] = mine
        return SimpleNamespace(wait=lambda: recorded.append(("wait for", shape)))

    monkeypatch.setattr(train_gpt, "zeropower_via_newtonschulz5", orthogonalise)
    for name in ("all_gather_into_tensor", "all_gather_single"):
        monkeypatch.setattr(torch.distributed, name, gather, raising=False)
    return recorded


def test_updates_of_one_shape_are_one_batch_which_travels_while_the_next_is_worked_on(events):
    params = make_params([(16, 16), (32, 8), (3, 8, 16), (16, 16), (16, 16), (32, 8), (16, 16)])
    set_grads(params, seed=0)
    Muon(params, lr=0.05, rank=0, world_size=2).step()
    expected = []
    shares = {(16, 16): 2, (32, 8): 1, (3, 8, 16): 1}
    for shape, share in shares.items():
        expected += [("work on", (share, *shape)), ("send", shape)]
    assert events == expected + [("wait for", shape) for shape in shares]


# ---------------------------------------------------------------------------------------------
# Muon in several processes

# 5, 1 and 2 of a shape: no number of processes divides them all.
SHARED_OUT = [(16, 16)] * 5 + [(32, 8)] + [(3, 8, 16)] * 2


def train(rank, world_size):
    """Three steps; the parameters, and which of them this process keeps momentum for."""
    params = make_params(SHARED_OUT)
    params[3].lr_mul = 2.0
    options = dict(lr=0.05, momentum=0.9, dtype=torch.float32)
    muon = Muon(params, rank=rank, world_size=world_size, **options)
    for step in range(3):
        set_grads(params, step, leave_out=(1,) if step == 1 else ())
        muon.step()
    return [p.detach() for p in params], [bool(muon.state.get(p)) for p in params]


def worker(rank, world_size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.save(train(rank, world_size), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_processes_agree_with_one_and_share_the_momentum_out(world_size, tmp_path):
    expected, _ = train(0, 1)
    # The processes are forked, because importing torch takes longer than all the rest.
    torch.multiprocessing.start_processes(
        worker, (world_size, str(tmp_path)), nprocs=world_size, start_method="fork"
    )
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    for params, _ in results:
        for p, of_first, alone in zip(params, results[0][0], expected, strict=True):
            torch.testing.assert_close(p, alone, rtol=0, atol=1e-6)
            assert torch.equal(p, of_first)  # processes must not drift apart by a single bit
    keepers = torch.tensor([kept for _, kept in results]).sum(0)
    assert keepers.tolist() == [1] * len(SHARED_OUT)  # each parameter's momentum is kept once
    assert max(sum(kept[:5]) for _, kept in results) == -(-5 // world_size)  # an equal share
