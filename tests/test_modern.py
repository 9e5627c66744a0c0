"""The modern recipe against its reference implementation, and its runs."""

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace

import modern_reference as reference
import pytest
import torch
import train_modern
from helpers import SMALL, losses, run, write_shard, write_shards

import train_gpt

SPEEDRUN = train_modern.Hyperparameters(**train_modern.PRESETS["speedrun"])
CPU = train_gpt.Machine(torch.device("cpu"), torch.float64)
# The heads together are wider than the stream, so that nothing fits by accident.
TINY = dict(num_heads=2, head_dim=16, model_dim=16, seqs_per_step=1)
SCHEDULED = 6  # of eight steps


@pytest.fixture
def double(monkeypatch):
    """All numbers in float64, and an extension of two steps in eight."""
    monkeypatch.setattr(train_modern, "scheduled_steps", lambda hp: SCHEDULED)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_run(T, max_window):
    """Settings, a network far from where it starts, its optimizers, and their reference."""
    changes = dict(train_seq_len=T, max_window=max_window, num_iterations=8, **TINY)
    hp = dataclasses.replace(SPEEDRUN, **changes)
    network = train_modern.build_model(hp, 257, CPU)
    for p in network.parameters():
        p.data += torch.randn_like(p) * (0.3 if p.ndim < 2 else p.size(-1) ** -0.5)
    windows = [train_modern.window_blocks(stage, hp) for stage in range(4)]
    expected = reference.Reference(network.state_dict(), 256, windows, SCHEDULED, 8, 1)
    return hp, network, train_modern.build_optimizers(network, hp, CPU), expected


def sequence(T):
    """Inputs and targets with a few documents."""
    ids = torch.randint(256, (T + 1,))
    ids[torch.randint(T, (3,))] = 256
    return ids[:-1].int(), ids[1:]


# ---------------------------------------------------------------------------------------------
# Schedules


def test_schedule_at_the_borders_of_the_stages():
    optimizer = SimpleNamespace(param_groups=[dict(lr=1.0, momentum=0.0)])
    found = {}
    for step in (0, 519, 520, 521, 1040, 1041, 1559, 1560, 1575, 1600):
        schedule = train_modern.set_schedule([optimizer], step, SPEEDRUN, CPU)
        group = optimizer.param_groups[0]
        numbers = train_modern.sequences_of_step(step, SPEEDRUN), *schedule.windows.tolist()
        rates = group["lr"], group["momentum"], *schedule.target_weights.tolist()
        found[step] = *numbers, *(round(rate, 4) for rate in rates)
    assert found == {
        0: (8, 3, 1, 1.0, 0.85, 1.0, 0.5, 0.25),
        519: (8, 3, 1, 1.0, 0.95, 1.0, 0.5, 0.0005),
        520: (16, 7, 3, 1.0, 0.95, 1.0, 0.5, 0.0),
        521: (16, 7, 3, 1.52, 0.95, 1.0, 0.499, 0.0),
        1040: (24, 11, 5, 0.9606, 0.95, 1.0, 0.0, 0.0),
        1041: (24, 11, 5, 1.086, 0.95, 1.0, 0.0, 0.0),
        1559: (24, 11, 5, 0.1019, 0.932, 1.0, 0.0, 0.0),
        1560: (24, 13, 6, 0.1, 0.93, 1.0, 0.0, 0.0),
        1575: (24, 13, 6, 0.1, 0.9, 1.0, 0.0, 0.0),
        1600: (24, 20, 6, 0.1, 0.85, 1.0, 0.0, 0.0),
    }
    assert train_modern.untie_step(SPEEDRUN) == 1041


def test_yarn_scales_and_frequencies():
    windows = [3, 7, 11, 13]
    for stage, scale in enumerate([0.1, 0.11695, 0.12752, 0.13178]):
        frequencies, found = train_modern.yarn(stage, SPEEDRUN)
        expected, _ = reference.yarn(windows[: stage + 1], 128)
        assert found == pytest.approx(scale, abs=5e-6)
        assert frequencies[:32].tolist() == pytest.approx(expected, rel=1e-5)
        assert not frequencies[32:].any()


# ---------------------------------------------------------------------------------------------
# Data


def test_bigram_hash_wraps_around():
    last = 251519
    assert reference.as_int32(27191 * last) == -1750881463
    ids = torch.randint(50257, (1000,), generator=torch.Generator().manual_seed(0))
    rows = train_modern.bigram_rows(ids.int(), last).tolist()
    assert rows == reference.bigram_rows(ids.tolist(), last)
    assert rows[0] == last and max(rows[1:]) < last and min(rows) >= 0


def packing(folder, seq_len, num_sequences, **options):
    return train_modern.PackingDataLoader(
        f"{folder}/*.bin", seq_len, num_tokens=num_sequences * seq_len, **options
    )


def test_packing_by_hand(tmp_path):
    """Documents up to 4 tokens in sequences of 5 + 1; 9 starts a document."""
    write_shard(tmp_path / "a.bin", [1, 1, 9, 2, 9, 3, 3, 3, 3, 3, 9, 4, 4, 9, 5, 5, 9, 6, 6], 10)
    write_shard(tmp_path / "b.bin", [9, 7, 7, 7, 9, 8, 8, 9, 1], 10)
    loader = packing(tmp_path, 5, 4, max_document=4, repeat=True)
    tokens = [torch.cat([x, y[-1:].int()]).tolist() for x, y in map(loader.sequence, range(4))]
    first, second, third = [9, 2, 9, 3, 3, 3], [9, 4, 4, 9, 5, 5], [9, 7, 7, 7, 9, 8]
    assert tokens == [first, second, third, first]


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_packing_of_random_documents(tmp_path, vocab_size):
    """Some longer than 2,048 tokens. Each sequence is used once where they are shuffled."""
    draw = random.Random(0)
    expected = []
    for name in "ab":
        tokens = [5] * 10
        for _ in range(60):
            tokens += [vocab_size - 1] + draw.choices(range(256), k=draw.choice([0, 30, 900, 5000]))
        write_shard(tmp_path / f"{name}.bin", tokens, vocab_size)
        expected += reference.pack(tokens, vocab_size - 1, 4096, 2048)
    n = len(expected)
    loader = packing(tmp_path, 4096, n, max_document=2048, repeat=False)
    shuffled = packing(tmp_path, 4096, n, max_document=2048, repeat=False, shuffle=True)
    for index, tokens in enumerate(expected):
        inputs, targets = loader.sequence(index)
        assert inputs.tolist() == tokens[:-1] and targets.tolist() == tokens[1:]
    inputs = [shuffled.sequence(index)[0].tolist() for index in range(n)]
    assert inputs != [e[:-1] for e in expected] and sorted(inputs) == sorted(
        e[:-1] for e in expected
    )
    with pytest.raises(train_gpt.UserError, match=f"{n} sequences"):
        packing(tmp_path, 4096, n + 1, max_document=2048, repeat=False)


def test_shard_without_documents_is_rejected(tmp_path):
    path = write_shard(tmp_path / "a.bin", [1] * 100)
    with pytest.raises(train_gpt.UserError, match=f"{path}.*256.*--pack false"):
        packing(tmp_path, 5, 1, max_document=4, repeat=True)


@pytest.mark.parametrize("vocab_sizes", [(257, 50257), (50257, 257)])
def test_packed_shards_of_two_vocabularies_are_rejected(tmp_path, vocab_sizes):
    """Each shard is searched for its own vocabulary's boundary."""
    for name, vocab_size in zip("ab", vocab_sizes):
        write_shard(tmp_path / f"{name}.bin", [vocab_size - 1, 1, 1] * 200, vocab_size)
    write_shard(tmp_path / "val.bin", [1] * 200)
    flags = [f"--train_files={tmp_path}/?.bin", f"--val_files={tmp_path}/val.bin"]
    hp = train_gpt.parse_arguments(
        ["--val_tokens=100", "--train_seq_len=128", *flags], train_modern
    )
    with pytest.raises(train_gpt.UserError, match="vocabularies of .257, 50257."):
        train_modern.open_loaders(hp, CPU, 8)


# ---------------------------------------------------------------------------------------------
# Network and optimizers


@pytest.mark.parametrize("step", [0, 4, 8])
def test_losses_in_all_stages(double, step):
    """In validation, and in training for each of the next tokens. Step 8: a longer window."""
    hp, network, optimizers, expected = small_run(T=1024, max_window=512)
    inputs, targets = sequence(1024)
    settings = expected.network_settings(step)
    if step == 8:
        settings = (128 * 6, 128 * 2), *settings[1:]
    z = reference.logits(expected.weights, inputs, 256, *settings)
    losses = [reference.loss(z, targets, weights).item() for weights in ([1], [0, 1], [0, 0, 1])]
    schedule = train_modern.set_schedule(optimizers, step, hp, CPU)
    with torch.no_grad():
        found = network(inputs, targets, schedule).tolist()
        mean = network.eval()(inputs, targets, schedule).item()
    assert found == pytest.approx(losses, rel=1e-12)
    assert mean == pytest.approx(losses[0] / 1024, rel=1e-12)


def test_training_follows_reference(double):
    """Gradients, and the weights after each of eight steps through all stages."""
    hp, network, optimizers, expected = small_run(T=256, max_window=256)
    counts = []
    for step in range(8):
        schedule = train_modern.set_schedule(optimizers, step, hp, CPU)
        counts.append(train_modern.sequences_of_step(step, hp))
        batch = [sequence(256) for _ in range(counts[-1])]
        if step in (0, 2):  # the optimizers ignore the length of a gradient
            (network(*batch[0], schedule) @ schedule.target_weights).backward()
            expected.add_gradients(step, *batch[0])
            for name, p in network.named_parameters():
                gradient = expected.gradients[name]
                assert gradient.any(), f"{name} plays no part"
                torch.testing.assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10, msg=name)
                p.grad = None
                gradient.zero_()
        train_modern.training_step(network, optimizers, batch, schedule, step, False, hp, CPU)
        expected.step(step, batch)
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.data, expected.weights[name], rtol=1e-8, atol=1e-10)
    assert counts == [1, 1, 2, 2, 3, 3, 3, 3]


# ---------------------------------------------------------------------------------------------
# Runs


def train(folder, *flags, run_id="run", count=1):
    """A run of ten steps. Returns its losses, and the weights that it saved at the end."""
    settings = "--num_heads=2 --head_dim=16 --pack --num_iterations=10 --seqs_per_step=1"
    flags = [*SMALL, *settings.split(), *flags, f"--run_id={run_id}", "--save_every=1", "--keep=9"]
    run(folder, *flags, script=train_modern.__file__, count=count)
    log = (folder / "logs" / f"{run_id}.txt").read_text(encoding="utf-8")
    newest = max((folder / "logs" / run_id).iterdir())
    return losses(log), torch.load(newest)["model"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with shards and the checkpoints of ten steps on them; their losses and weights."""
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder)
    return folder, *train(folder)


def test_log_contains_both_sources(finished):
    log = (finished[0] / "logs" / "run.txt").read_text(encoding="utf-8")
    assert log.startswith(train_gpt.SOURCE + Path(train_modern.__file__).read_text())


def test_only_even_steps_are_saved(finished):
    names = sorted(path.name for path in (finished[0] / "logs" / "run").iterdir())
    assert names == [f"step_{step:08d}.pt" for step in (2, 4, 6, 8, 10)]


@pytest.mark.parametrize("step", [4, 8])
def test_resumed_run_is_exact(finished, step):
    """From before and after the head and the embedding part."""
    folder, expected, weights = finished
    checkpoint = f"--resume=logs/run/step_{step:08d}.pt"
    found, resumed = train(folder, checkpoint, run_id=f"from_{step}")
    assert found[-4:] == expected[-4:]
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name


def test_two_processes_train_the_same(tmp_path):
    write_shards(tmp_path)
    flags = "--num_iterations=6", "--seqs_per_step=2"
    expected = train(tmp_path, *flags, run_id="alone")[1]
    found = train(tmp_path, *flags, count=2)[1]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


SHORT = "--num_iterations=2"


@pytest.fixture(scope="module")
def short(finished):
    """Weights after two steps without a switch."""
    return train(finished[0], SHORT, run_id="short")[1]


@pytest.mark.parametrize(
    "switch",
    [
        "bigrams=0",
        "smear=false",
        "key_offset=false",
        "paired_heads=false",
        "predict=1",
        "normuon=false",
        "decay=0",
        "growing_batch=false",
        "pack=false",
        "max_document=50",
    ],
)
def test_switch_changes_the_weights(finished, short, switch):
    weights = train(finished[0], SHORT, f"--{switch}", run_id=switch)[1]
    assert any(not torch.equal(value, short[name]) for name, value in weights.items())


def test_bad_settings_are_rejected():
    for flag in ("num_layers=10", "fp8=all", "num_heads=3", "predict=4", "max_document=0"):
        with pytest.raises(train_gpt.UserError, match=flag.split("=")[0]):
            train_gpt.parse_arguments(["--preset=tiny", f"--{flag}"], train_modern)
