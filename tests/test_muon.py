"""Newton-Schulz and Muon against plain loops, in one process and in several."""

import copy
import math

import pytest
import reference
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

newton_schulz = train_gpt.zeropower_via_newtonschulz5

# --------------------------------------------------------------------------------------------------
# Newton-Schulz


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (1, 24), (24, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_matches_reference(shape, steps):
    """A batch, of which one matrix is zero, against one matrix at a time."""
    G = torch.randn(3, *shape)
    G[1] = 0
    expected = torch.stack([reference.newton_schulz(matrix, steps) for matrix in G])
    exact = newton_schulz(G, steps, torch.float32)
    fast = newton_schulz(G, steps)
    assert exact.dtype == torch.float32 and fast.dtype == torch.bfloat16
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=2e-6)
    assert (fast.double() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_newton_schulz_orthogonalizes(shape, scale):
    """It keeps the singular vectors, so that U S' V^T (U V^T)^T is symmetric with values S'."""
    G = scale * torch.randn(shape)
    X = newton_schulz(G, 5, torch.float32).double()
    nearest = reference.nearest_orthogonal(G)
    product = X @ nearest.T if shape[0] < shape[1] else X.T @ nearest
    torch.testing.assert_close(product, product.T, rtol=0, atol=1e-4)
    values = torch.linalg.eigvalsh(product)
    assert values.min() > 0.68 and values.max() < 1.14


def test_tall_matrix_costs_as_much_as_wide():
    flops = []
    for shape in [(8, 256), (256, 8)]:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(shape), 5)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


# --------------------------------------------------------------------------------------------------
# Muon

SHAPES = [(16, 16)] * 5 + [(32, 8)] + [(3, 8, 16)] * 2  # no world size divides all of these groups


def random_parameters():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    parameters[0].lr_mul = 3.0
    parameters[5].lr_mul = 0.25
    return parameters


def set_gradients(parameters, seed):
    """Random gradients. One parameter has none in the second step, another one never has."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(parameters):
        grad = torch.randn(p.shape, generator=generator)
        p.grad = None if i == 4 or (i == 1 and seed == 1) else grad


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_muon_matches_plain_loop(nesterov, dtype, tolerance):
    """The groups' learning rate and momentum are read at each step.

    The momentum ends at zero, since after any other change the textbook's buffer is another sum.
    """
    starts, parameters, plain_parameters = (random_parameters() for _ in range(3))
    muon = train_gpt.Muon(parameters, lr=9.0, nesterov=nesterov, dtype=dtype)
    plain = reference.PlainMuon(plain_parameters, lr=9.0, momentum=9.0, nesterov=nesterov)
    for step, (lr, momentum) in enumerate([(0.05, 0.9), (0.02, 0.9), (0.03, 0.9), (0.01, 0.0)]):
        for group in muon.param_groups:
            group.update(lr=lr, momentum=momentum)
        plain.lr, plain.momentum = lr, momentum
        for optimizer, owned in ((muon, parameters), (plain, plain_parameters)):
            set_gradients(owned, step)
            optimizer.step()
    for start, p, expected in zip(starts, parameters, plain_parameters, strict=True):
        assert (p - expected).norm() <= tolerance * (expected - start).norm()
    assert torch.equal(parameters[4], starts[4])


def test_vector_is_rejected():
    with pytest.raises(ValueError, match="Adam"):
        train_gpt.Muon([torch.nn.Parameter(torch.randn(16))])


def train(rank, world_size, state=None):
    """Three steps, before the last of which Muon is made anew from `state`.

    Returns the parameters, the state after two steps, and for which parameters it is kept here.
    """
    parameters = random_parameters()
    options = dict(lr=0.05, momentum=0.9, rank=rank, world_size=world_size, dtype=torch.float32)
    muon = train_gpt.Muon(parameters, **options)
    for step in range(2):
        set_gradients(parameters, step)
        muon.step()
    kept = [p in muon.state for p in parameters]
    machine = train_gpt.Machine(torch.device("cpu"), torch.float32, rank, world_size)
    gathered = copy.deepcopy(train_gpt.gather_state(muon, machine))
    if state:
        muon = train_gpt.Muon(parameters, **options)
        muon.load_state_dict(state)
    set_gradients(parameters, 2)
    muon.step()
    return [p.detach() for p in parameters], gathered, kept


def worker(rank, world_size, state, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.save(train(rank, world_size, state), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_agree_with_one_and_share_the_state(world_size, tmp_path):
    expected, state, _ = train(0, 1)
    # Forked, because importing torch takes longer than all the rest.
    torch.multiprocessing.start_processes(
        worker, (world_size, state, str(tmp_path)), nprocs=world_size, start_method="fork"
    )
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    torch.testing.assert_close(results[0][1], state, rtol=0, atol=1e-6)
    for parameters, _, _ in results:
        for p, first, alone in zip(parameters, results[0][0], expected, strict=True):
            torch.testing.assert_close(p, alone, rtol=0, atol=1e-6)
            assert torch.equal(p, first)  # processes must not differ by a single bit
    kept = torch.tensor([kept for _, _, kept in results])
    assert kept.sum(0).tolist() == [1] * len(SHAPES)
    assert kept[:, :5].sum(1).max() == math.ceil(5 / world_size)
