"""The loop: warm-up without a trace, the same losses from the same seed, the clock, and a whole
run, from text to a sample. Several processes are the matter of test_distributed.py."""

import copy
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train_gpt

SCRIPT = ROOT / "train_gpt.py"
CPU = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)
VOCAB = 257

# A run of a few tenths of a second.
SMALL = dict(
    train_seq_len=256,
    val_seq_len=384,
    seqs_per_step=2,
    num_layers=6,
    num_heads=2,
    head_dim=16,
    model_dim=32,
    attention_free_layers=(4,),
    num_iterations=6,
    val_tokens=900,
    val_loss_every=2,
    max_window=256,
    dtype="float32",
    repeat=True,
)


def as_flags(**settings):
    flags = ["--preset", "tiny"]
    for name, value in settings.items():
        flags += [
            f"--{name}",
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
        ]
    return flags


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Flags that find the shards that data/local_text.py made of a few texts."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(40):
        path = folder / "texts" / f"{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f"This is text number {index}. "
            + "It says the same again and again. " * (15 + index % 7)
        )
    script = ROOT / "data" / "local_text.py"
    made = folder / "shards"
    subprocess.run([sys.executable, script, folder / "texts", "--out", made], check=True)
    return dict(train_files=made / "train_*.bin", val_files=made / "val_*.bin")


# --------------------------------------------------------------------------------------------------
# Warm-up


def snapshot(model, optimizers):
    """All that a run goes on from."""
    return copy.deepcopy(
        dict(
            weights=model.state_dict(),
            grads=[p.grad for p in model.parameters()],
            training=[m.training for m in model.modules()],
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
            lr_mul=[getattr(p, "lr_mul", None) for p in model.parameters()],
            random=torch.get_rng_state(),
        )
    )


def assert_identical(a, b, where="state"):
    """Bit for bit, through all dictionaries and lists."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{index}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_warm_up_leaves_no_trace(dtype):
    hp = train_gpt.Hyperparameters(**SMALL | dict(dtype=dtype))
    model = train_gpt.build_model(hp, VOCAB, CPU)
    optimizers = train_gpt.build_optimizers(model, hp, CPU)
    weights = [p.data_ptr() for p in model.parameters()]
    before = snapshot(model, optimizers)
    train_gpt.warm_up(model, model, optimizers, hp, CPU)
    assert_identical(before, snapshot(model, optimizers))
    assert weights == [p.data_ptr() for p in model.parameters()]  # compiled code has hold of these
    assert not any(optimizer.state for optimizer in optimizers)


def test_warm_up_keeps_what_the_optimizers_remember():
    """After steps have been taken, as where a run is resumed."""
    hp = train_gpt.Hyperparameters(**SMALL)
    model = train_gpt.build_model(hp, VOCAB, CPU)
    optimizers = train_gpt.build_optimizers(model, hp, CPU)
    ids = torch.arange(256, dtype=torch.int32)
    window = train_gpt.set_schedule(optimizers, 3, hp, CPU)
    for _ in range(2):
        train_gpt.training_step(model, optimizers, [(ids, ids.long())], window, 1, CPU)
    before = snapshot(model, optimizers)
    train_gpt.warm_up(model, model, optimizers, hp, CPU)
    assert_identical(before, snapshot(model, optimizers))


# --------------------------------------------------------------------------------------------------
# Runs in this process


@pytest.fixture
def run(shards, tmp_path, monkeypatch, capsys):
    """A function that trains with the small settings and some others, and returns the lines of the
    log that follow the settings."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []

    def train(**settings):
        name = f"run{len(calls)}"
        calls.append(name)
        place = dict(log_dir=tmp_path, run_id=name, sample=0)
        code = train_gpt.main(as_flags(**SMALL | shards | place | settings))
        assert code == 0, capsys.readouterr().err
        return body((tmp_path / f"{name}.txt").read_text())

    return train


RULE = re.compile("^={20,}$", re.MULTILINE)


def body(log):
    """The lines after the settings, which two lines of equal signs enclose."""
    return RULE.split(log)[-1].strip("\n").splitlines()


def step_lines(lines):
    return [line for line in lines if line.startswith("step:")]


def losses(lines):
    """What was validated and trained, by kind and step."""
    found = {}
    for line in lines:
        if match := re.match(r"step:(\d+)/\d+ .*?(val_loss|train_loss):([\d.]+)", line):
            found[match[2], int(match[1])] = float(match[3])
    return found


def test_same_seed_gives_the_same_losses_and_another_seed_others(run):
    first, again, other = losses(run()), losses(run()), losses(run(seed=1))
    assert len(first) == 6 + 4
    assert first == again
    assert first != other


def test_warm_up_does_not_change_a_run(run, monkeypatch):
    with_warm_up = losses(run())
    monkeypatch.setattr(train_gpt, "warm_up", lambda *args: None)
    assert with_warm_up == losses(run())


def test_training_lowers_the_loss(run):
    found = losses(run(num_iterations=30, val_loss_every=10))
    validated = [found["val_loss", step] for step in (0, 10, 20, 30)]
    assert validated == sorted(validated, reverse=True) and validated[-1] < validated[0] - 1


@pytest.mark.parametrize(
    "every, steps",
    [(0, [6]), (1, list(range(7))), (2, [0, 2, 4, 6]), (4, [0, 4, 6]), (100, [0, 6])],
)
def test_steps_that_are_validated(every, steps, run):
    found = losses(run(val_loss_every=every))
    assert [step for kind, step in found if kind == "val_loss"] == steps
    assert [step for kind, step in found if kind == "train_loss"] == [1, 2, 3, 4, 5, 6]


def test_clock_stands_still_while_validating(run, monkeypatch):
    """A validation takes an hour, and a step a second, by a clock that nothing else moves."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(name, seconds):
        function = getattr(train_gpt, name)

        def slow(*args):
            now[0] += seconds
            return function(*args)

        monkeypatch.setattr(train_gpt, name, slow)

    takes("validate", 3600)
    takes("training_step", 1)
    lines = run()
    for line in lines:
        if match := re.match(r"step:(\d+)/6 .*train_time:(\d+)ms step_avg:([\d.]+)ms", line):
            step = int(match[1])
            assert int(match[2]) == 1000 * step, line
            assert float(match[3]) == (1000 if step else 0), line
    assert f"tokens per second: {2 * 256}" in "\n".join(lines)


def test_log_counts_the_passes_over_the_tokens(run, shards):
    """Six steps of two sequences of 256 tokens."""
    files = shards["train_files"].parent.glob("train_*.bin")
    size = sum(path.stat().st_size - 1024 for path in files) // 2
    assert f"passes over the training tokens: {6 * 2 * 256 / size:.2f}," in "\n".join(run())


# --------------------------------------------------------------------------------------------------
# Whole runs, as a person starts them


def start(command, **environment):
    environment = os.environ | dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1") | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole_run(shards, tmp_path_factory):
    """A run through the command line: what it printed, and its log."""
    folder = tmp_path_factory.mktemp("logs")
    source = SCRIPT.read_text()
    place = dict(log_dir=folder, run_id="whole", sample=40)
    result = start([SCRIPT, *as_flags(**SMALL | shards | place)])
    return result, (folder / "whole.txt").read_text(), source


def test_whole_run_succeeds_and_prints_plain_lines(whole_run):
    result, log, _ = whole_run
    assert result.returncode == 0, result.stderr
    assert not set("\r\x1b") & set(result.stdout)  # no bar where there is no terminal
    assert not result.stderr
    printed = result.stdout.splitlines()
    logged = body(log)
    assert step_lines(printed) == step_lines(logged)
    assert len(step_lines(logged)) == 10


def test_log_begins_with_the_source_and_every_setting(whole_run):
    _, log, source = whole_run
    assert log.startswith(source)
    settings = RULE.split(log[len(source) :])[1]
    for name, value in SMALL.items():
        assert f"{name}: {value}\n" in settings
    for name in train_gpt.Hyperparameters.__dataclass_fields__:
        assert f"\n{name}: " in settings
    for fact in (torch.__version__, sys.version.split()[0], "CPU"):
        assert fact in settings


# Further fields may follow.
STEP = re.compile(r"step:(\d+)/6 train_time:\d+ms step_avg:\d+\.\d+ms( \w+:\S+)*")
VALIDATION = re.compile(
    r"step:(\d+)/6 val_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d+ms( \w+:\S+)*"
)
PEAK = re.compile(r"peak memory allocated: \d+ MiB reserved: \d+ MiB")


def test_log_lines_have_the_public_form_and_order(whole_run):
    lines = body(whole_run[1])
    expected = [(VALIDATION, 0)]
    for step in range(1, 7):
        expected.append((STEP, step))
        if step % 2 == 0:
            expected.append((VALIDATION, step))
    for line, (form, step) in zip(step_lines(lines), expected, strict=True):
        assert int(form.fullmatch(line)[1]) == step
    times = [int(re.search(r"train_time:(\d+)ms", line)[1]) for line in step_lines(lines)]
    assert times == sorted(times)
    (peak,) = [index for index, line in enumerate(lines) if PEAK.fullmatch(line)]
    assert peak > lines.index(step_lines(lines)[-1])


def test_run_ends_with_a_sample(whole_run):
    result, log, _ = whole_run
    assert "sample: " in result.stdout and "sample: " in log
    assert result.stdout.index("sample: ") > result.stdout.index("step:6/6 val_loss")


def test_log_without_a_sample_ends_with_the_peak_memory_and_its_own_path(run, tmp_path):
    *_, peak, path, plot = run()
    assert PEAK.fullmatch(peak)
    assert path == f"log: {tmp_path / 'run0.txt'}"
    assert plot == f"to plot it: python records/compare.py {tmp_path / 'run0.txt'} --plot"
