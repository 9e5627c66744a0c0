"""What importing the script does (nothing), the names that stay, settings, bad input, schedules."""

import dataclasses
import inspect
import os
import subprocess
import sys

import pytest
import torch
import twins
from conftest import CPU, ROOT, refusal

import train_gpt

SCRIPT = ROOT / "train_gpt.py"
SMALL = dict(num_layers=6, num_heads=1, head_dim=16, model_dim=16, dtype="float32")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about a machine without CUDA, also where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def refused(capsys, tmp_path):
    """A function that expects a bad command line to end with one line, which it returns.

    Nothing in the test's folder changes, where the log would be written.
    """

    def files():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    def run(*argv):
        before = files()
        capsys.readouterr()
        assert train_gpt.main([str(argument) for argument in argv]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
        assert "step:" not in out
        assert files() == before
        return err

    return run


# ---------------------------------------------------------------------------------------------
# Import and names

IMPORT_CHECK = """
import sys
import torch
sys.argv = ["another program", "--no_such_flag", "--help"]
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
import train_gpt
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert torch.equal(before[0], torch.get_rng_state())
assert before[1:] == (torch.get_default_dtype(), torch.get_num_threads())
assert sys.argv == ["another program", "--no_such_flag", "--help"]
"""


def run_python(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_import_defines_and_does_nothing_else(tmp_path):
    """RANK and WORLD_SIZE are those of a process of torchrun: a group made here would wait."""
    paths = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = run_python(tmp_path, "-c", IMPORT_CHECK, RANK="1", WORLD_SIZE="4", **paths)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


FIELDS = {field.name: field for field in dataclasses.fields(train_gpt.Hyperparameters)}
PUBLIC_FIELDS = """train_files val_files val_tokens train_seq_len val_seq_len seqs_per_step
    num_iterations val_loss_every save_every resume repeat seed dtype log_dir
    coordinate_descent_tuning"""
PUBLIC_NAMES = """norm next_multiple_of_n zeropower_via_newtonschulz5 Muon CastedLinear Rotary
    CausalSelfAttention MLP Block ValueEmbedding GPT DistributedDataLoader Hyperparameters main"""


def test_names_stay():
    for name in PUBLIC_NAMES.split():
        assert callable(getattr(train_gpt, name))
    assert set(PUBLIC_FIELDS.split()) <= set(FIELDS)


@pytest.mark.parametrize(
    "function, arguments",
    [
        (train_gpt.GPT, "vocab_size num_layers num_heads head_dim model_dim max_seq_len"),
        (train_gpt.GPT.create_block_masks, "self input_seq sliding_window_num_blocks"),
        (train_gpt.GPT.forward, "self input_seq target_seq sliding_window_num_blocks"),
        (train_gpt.CastedLinear, "in_features out_features use_fp8 x_s w_s grad_s"),
        (train_gpt.Rotary, "head_dim max_seq_len"),
        (train_gpt.Muon, "params lr momentum nesterov ns_steps rank world_size"),
        (train_gpt.zeropower_via_newtonschulz5, "G steps"),
        (train_gpt.norm, "x"),
    ],
)
def test_signature_stays(function, arguments):
    """The named arguments come first and in this order; what follows has a default."""
    parameters = list(inspect.signature(function).parameters.values())
    number = len(arguments.split())
    first, rest = parameters[:number], parameters[number:]
    assert [p.name for p in first] == arguments.split()
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in first)
    assert all(p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in rest)


def test_defaults_and_operators_stay():
    parameters = inspect.signature(train_gpt.CastedLinear).parameters.values()
    defaults = [p.default for p in parameters if p.default is not p.empty]
    assert defaults == [False, 1.0, 1.0, 1.0]
    n = inspect.signature(train_gpt.next_multiple_of_n).parameters["n"]
    assert n.kind == n.KEYWORD_ONLY
    schema = torch.ops.nanogpt.mm.default._schema
    assert [a.name for a in schema.arguments] == ["x", "w", "x_s", "w_s", "grad_s"]
    assert torch.ops.nanogpt.mm_backward.default


# ---------------------------------------------------------------------------------------------
# Settings


def parsed(*argv):
    return train_gpt.parse_arguments(list(argv))[0]


def test_speedrun_is_the_default_and_the_recipe():
    hp, preset = train_gpt.parse_arguments([])
    assert preset == "speedrun"
    assert hp == train_gpt.Hyperparameters() == parsed("--preset", "speedrun")
    recipe = dict(num_layers=12, num_heads=6, head_dim=128, model_dim=768, max_window=1792)
    recipe |= dict(attention_free_layers=(7,), train_seq_len=49152, seqs_per_step=8, repeat=False)
    recipe |= dict(num_iterations=1770, cooldown_frac=0.4, val_tokens=10485760)
    recipe |= dict(embed_lr=0.6, head_lr=0.008, scalar_lr=0.04, muon_lr=0.05)
    recipe |= dict(coordinate_descent_tuning=False)
    assert {name: getattr(hp, name) for name in recipe} == recipe


def test_medium_is_a_350m_model_and_does_not_repeat():
    """Counted as GPT-2's sizes are: the embedding once, no value embeddings, no head."""
    hp = parsed("--preset", "medium")
    assert not hp.repeat
    with torch.device("meta"):
        model = train_gpt.GPT(50257, hp.num_layers, hp.num_heads, hp.head_dim, hp.model_dim, 1024)
    counted = sum(p.numel() for p in [*model.embed.parameters(), *model.blocks.parameters()])
    assert 330e6 < counted < 370e6


def test_tiny_repeats_local_text():
    hp = parsed("--preset", "tiny")
    assert hp.repeat and hp.sample > 0
    assert "local_text" in hp.train_files and "local_text" in hp.val_files


VALUES = {
    int: ("256", 256),
    float: ("0.25", 0.25),
    str: ("some/where_*.bin", "some/where_*.bin"),
    bool: ("true", True),
    tuple[int, ...]: ("1,3,5", (1, 3, 5)),
    "dtype": ("float32", "float32"),
    "fp8": ("all", "all"),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("preset", ["speedrun", "tiny"])
def test_every_field_is_a_flag_that_changes_it_alone(name, preset):
    text, value = VALUES.get(name) or VALUES[FIELDS[name].type]
    expected = dataclasses.replace(parsed("--preset", preset), **{name: value})
    assert parsed(f"--{name}", text, "--preset", preset) == expected
    assert parsed(f"--{name}={text}", "--preset", preset) == expected


@pytest.mark.parametrize("argv", ["", "true", "false", "False"])
def test_flags_of_yes_or_no(argv):
    value = argv in ("", "true")
    assert parsed("--repeat", *argv.split()).repeat is value
    assert parsed("--preset", "tiny", "--repeat", *argv.split()).repeat is value


@pytest.mark.parametrize("text, value", [("none", ()), ("7", (7,)), ("0,11", (0, 11))])
def test_flag_of_layers(text, value):
    assert parsed("--attention_free_layers", text).attention_free_layers == value


def test_help_lists_every_field_and_preset(capsys):
    with pytest.raises(SystemExit) as ended:
        train_gpt.main(["--help"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and not err
    assert all(name in out for name in (*FIELDS, "preset", *train_gpt.PRESETS))
    assert all(repr(field.default) in out for field in FIELDS.values())


# ---------------------------------------------------------------------------------------------
# Bad input gets a sentence

TOKENS = [256, *range(200)] * 4


@pytest.fixture
def data(make_shard, tmp_path):
    """Flags of a run of one small step on a good pair of small shards."""
    make_shard("train_1.bin", TOKENS)
    make_shard("val_0.bin", TOKENS)
    files = f"--train_files {tmp_path}/train_*.bin --val_files {tmp_path}/val_*.bin"
    sizes = "--train_seq_len 128 --val_seq_len 128 --val_tokens 300 --num_iterations 1"
    return f"--preset tiny {files} {sizes} --log_dir {tmp_path}/logs".split()


# An abbreviation is refused as well, for a later flag would make it ambiguous.
BAD_FLAGS = f"""--no_such_flag 3, --num_iter 3, stray, --num_iterations many, --num_iterations,
--repeat perhaps, --attention_free_layers x, --train_seq_len 0, --train_seq_len -128,
--num_iterations 0, --seqs_per_step 0, --val_tokens -1, --cooldown_frac 0, --cooldown_frac 1.5,
--seed {10**30}, --keep 0, --save_every -1, --log_dir /dev/null, --train_files nowhere_*.bin,
--val_files nowhere_*.bin"""
# Those of which the sentence names something else besides.
ALSO_NAMED = {
    "--preset huge": "speedrun medium tiny",
    "--preset speedrun": "CUDA tiny",
    "--preset medium": "CUDA tiny",
    "--dtype float64": "bfloat16",
    "--train_seq_len 1000": "128",
    "--val_seq_len 200": "128",
    "--max_window 100": "128",
    "--num_layers 5": "6",
    "--val_tokens 804": "val_*.bin",  # as many as there are, and the last target is one further
}


@pytest.mark.parametrize("flags", [*BAD_FLAGS.split(","), *ALSO_NAMED])
def test_bad_flag_is_named(flags, data, refused):
    sentence = refused(*data, *flags.split())
    words = [*flags.replace("--", "").split(), *ALSO_NAMED.get(flags, "").split()]
    assert all(word in sentence for word in words if word != "3")


@pytest.mark.parametrize("name", ["train_1.bin", "val_0.bin"])
def test_token_beyond_the_vocabulary(name, data, make_shard, refused):
    make_shard(name, [*TOKENS[:200], 257, *TOKENS])
    sentence = refused(*data)
    assert "vocabulary" in sentence and name in sentence


def test_folder_where_a_shard_was_expected(data, refused, tmp_path):
    (tmp_path / "train_2.bin").mkdir()
    assert "train_2.bin" in refused(*data)


def test_too_few_tokens(data, refused):
    flags = "--repeat false --num_iterations 5 --seqs_per_step 2"
    sentence = refused(*data, *flags.split())
    assert str(5 * 2 * 128 + 1 - 804) in sentence.replace(",", "")


@pytest.mark.parametrize("world_size, seqs", [(3, 2), (4, 6), (2, 3)])
def test_processes_that_do_not_divide_a_step(world_size, seqs):
    machine = dataclasses.replace(CPU, world_size=world_size)
    hp = train_gpt.Hyperparameters(seqs_per_step=seqs)
    with refusal(f"{world_size} processes cannot share {seqs} sequences"):
        train_gpt.check_settings(hp, "tiny", machine)


@pytest.mark.parametrize(
    "flags, named", [("", "CUDA"), ("--preset tiny --train_files nowhere/*.bin", "nowhere")]
)
def test_bad_input_as_a_person_meets_it(flags, named, tmp_path):
    result = run_python(tmp_path, SCRIPT, *flags.split(), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and named in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize(
    "steps, cooldown", [(1770, 0.4), (500, 0.4), (10, 0.4), (6000, 0.6), (100, 1.0)]
)
def test_learning_rate(steps, cooldown):
    hp = train_gpt.Hyperparameters(num_iterations=steps, cooldown_frac=cooldown)
    for step in range(steps + 1):
        expected = twins.learning_rate_factor(step, steps, cooldown)
        assert train_gpt.learning_rate_factor(step, hp) == pytest.approx(expected)


@pytest.mark.parametrize("steps, max_window", [(1770, 1792), (500, 512), (7, 1792), (100, 128)])
def test_window(steps, max_window):
    """From one block to the longest, in steps of one block, evenly."""
    hp = train_gpt.Hyperparameters(num_iterations=steps, max_window=max_window)
    windows = [train_gpt.window_blocks(step, hp) for step in range(steps + 1)]
    assert windows == [twins.window(step, steps, max_window) for step in range(steps + 1)]
    assert windows[0] == 1 and windows[-1] == max_window // 128 and windows == sorted(windows)


def test_schedules_of_the_speedrun_by_hand():
    """Those of the script, and the momentum's twin."""
    hp = train_gpt.Hyperparameters()
    for step, factor in {0: 1, 600: 1, 1061: 1, 1062: 1, 1416: 0.55, 1770: 0.1}.items():
        assert train_gpt.learning_rate_factor(step, hp) == pytest.approx(factor)
    for step, momentum in {0: 0.85, 30: 0.86, 150: 0.9, 300: 0.95, 301: 0.95, 1770: 0.95}.items():
        assert train_gpt.muon_momentum(step) == pytest.approx(momentum)
        assert twins.momentum(step) == pytest.approx(momentum)
    windows = [train_gpt.window_blocks(step, hp) for step in range(1771)]
    assert set(windows) == set(range(1, 15))  # 128 to 1792 tokens
    assert [windows[step] for step in (0, 131, 132, 885, 1769)] == [1, 1, 2, 7, 14]


def test_optimizers_are_those_of_the_recipe_and_follow_the_schedules():
    """Each group's own learning rate times the factor, and Muon's momentum; the window comes back
    as a tensor. Each parameter is trained by one of the two optimizers."""
    hp = train_gpt.Hyperparameters(**SMALL)
    model = train_gpt.build_model(hp, 257, CPU)
    adam, muon = train_gpt.build_optimizers(model, hp, CPU)
    for group in adam.param_groups:
        assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-10
        assert group["weight_decay"] == 0 and group["fused"]
    groups = adam.param_groups + muon.param_groups
    trained = sorted(id(p) for group in groups for p in group["params"])
    assert trained == sorted(id(p) for p in model.parameters())
    for step in (0, 100, 1416, 1770, 0):
        window = train_gpt.set_schedule([adam, muon], step, hp, CPU)
        assert window.item() == twins.window(step, 1770)
        assert (window.dtype, window.ndim) == (torch.int32, 0)
        factor = twins.learning_rate_factor(step, 1770)
        rates = sorted(group["lr"] for group in adam.param_groups)
        assert rates == pytest.approx([factor * lr for lr in (0.008, 0.04, 0.6)])
        for group in muon.param_groups:
            assert group["lr"] == pytest.approx(0.05 * factor)
            assert group["momentum"] == pytest.approx(twins.momentum(step))
