"""What importing the script does (nothing), the names that stay, settings and command line, bad input, and schedules."""

import dataclasses
import inspect
import os
import subprocess
import sys

import pytest
import torch
import train_gpt
import twins
from conftest import ROOT

SCRIPT = ROOT / "train_gpt.py"
CPU = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32)
SMALL = dict(num_layers=6, num_heads=1, head_dim=16, model_dim=16, train_seq_len=128, val_seq_len=128, dtype="float32")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """These tests are about a machine without CUDA, also where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run_main(capsys, *argv):
    """Exit code, standard output and standard error of main, in this process."""
    capsys.readouterr()
    try:
        code = train_gpt.main([str(argument) for argument in argv])
    except SystemExit as stop:  # argparse's --help
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def refused(capsys, *argv):
    """The one line that a bad command line ends with."""
    code, out, err = run_main(capsys, *argv)
    assert code == 2
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
    assert "step:" not in out
    return err


# ---------------------------------------------------------------------------------------------------------
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


def test_import_defines_and_does_nothing_else(tmp_path):
    """RANK and WORLD_SIZE are those of a process of torchrun, that a group made here would wait for."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "RANK": "1", "WORLD_SIZE": "4"}
    result = subprocess.run([sys.executable, "-c", IMPORT_CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [
    "norm", "next_multiple_of_n", "zeropower_via_newtonschulz5", "Muon", "CastedLinear", "Rotary", "CausalSelfAttention", "MLP",
    "Block", "ValueEmbedding", "GPT", "DistributedDataLoader", "Hyperparameters", "main"])
def test_name_stays(name):
    assert callable(getattr(train_gpt, name))


@pytest.mark.parametrize("function, arguments", [
    (train_gpt.GPT, ["vocab_size", "num_layers", "num_heads", "head_dim", "model_dim", "max_seq_len"]),
    (train_gpt.GPT.create_block_masks, ["self", "input_seq", "sliding_window_num_blocks"]),
    (train_gpt.GPT.forward, ["self", "input_seq", "target_seq", "sliding_window_num_blocks"]),
    (train_gpt.CastedLinear, ["in_features", "out_features", "use_fp8", "x_s", "w_s", "grad_s"]),
    (train_gpt.Rotary, ["head_dim", "max_seq_len"]),
    (train_gpt.Muon, ["params", "lr", "momentum", "nesterov", "ns_steps", "rank", "world_size"]),
    (train_gpt.zeropower_via_newtonschulz5, ["G", "steps"]),
    (train_gpt.norm, ["x"]),
])
def test_signature_stays(function, arguments):
    """The named arguments come first and in this order; what follows has a default."""
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.name for p in parameters[:len(arguments)]] == arguments
    assert all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters[:len(arguments)])
    assert all(p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in parameters[len(arguments):])


def test_defaults_of_casted_linear_stay():
    defaults = {p.name: p.default for p in inspect.signature(train_gpt.CastedLinear).parameters.values() if p.default is not p.empty}
    assert defaults == dict(use_fp8=False, x_s=1.0, w_s=1.0, grad_s=1.0)
    assert inspect.signature(train_gpt.next_multiple_of_n).parameters["n"].kind == inspect.Parameter.KEYWORD_ONLY


def test_operators_stay():
    schema = torch.ops.nanogpt.mm.default._schema
    assert [a.name for a in schema.arguments] == ["x", "w", "x_s", "w_s", "grad_s"]
    assert torch.ops.nanogpt.mm_backward.default


# ---------------------------------------------------------------------------------------------------------
# Settings

FIELDS = {field.name: field for field in dataclasses.fields(train_gpt.Hyperparameters)}


@pytest.mark.parametrize("name", [
    "train_files", "val_files", "val_tokens", "train_seq_len", "val_seq_len", "seqs_per_step", "num_iterations", "val_loss_every",
    "repeat", "seed", "dtype", "log_dir", "coordinate_descent_tuning"])
def test_setting_of_the_design_is_there(name):
    assert name in FIELDS


def test_speedrun_is_the_default_and_the_recipe():
    hp, preset = train_gpt.parse_arguments([])
    assert preset == "speedrun" and hp == train_gpt.Hyperparameters() == train_gpt.parse_arguments(["--preset", "speedrun"])[0]
    recipe = dict(num_layers=12, num_heads=6, head_dim=128, model_dim=768, train_seq_len=49152, seqs_per_step=8, num_iterations=1770,
                  val_tokens=10485760, repeat=False, embed_lr=0.6, head_lr=0.008, scalar_lr=0.04, muon_lr=0.05, cooldown_frac=0.4,
                  max_window=1792, attention_free_layers=(7,), coordinate_descent_tuning=False)
    assert {name: getattr(hp, name) for name in recipe} == recipe


def test_medium_is_a_350m_model_and_does_not_repeat():
    hp, _ = train_gpt.parse_arguments(["--preset", "medium"])
    assert not hp.repeat
    # As GPT-2's sizes are counted: the embedding once, no value embeddings, no head.
    with torch.device("meta"):
        model = train_gpt.GPT(50257, hp.num_layers, hp.num_heads, hp.head_dim, hp.model_dim, 1024)
    counted = sum(p.numel() for p in [*model.embed.parameters(), *model.blocks.parameters()])
    assert 330e6 < counted < 370e6


def test_tiny_repeats_local_text():
    hp, _ = train_gpt.parse_arguments(["--preset", "tiny"])
    assert hp.repeat and "local_text" in hp.train_files and "local_text" in hp.val_files and hp.sample > 0


VALUES = {int: ("256", 256), float: ("0.25", 0.25), str: ("some/where_*.bin", "some/where_*.bin"), bool: ("true", True),
          tuple[int, ...]: ("1,3,5", (1, 3, 5))}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("preset", ["speedrun", "tiny"])
def test_every_field_is_a_flag_that_changes_it_alone(name, preset):
    text, value = {"dtype": ("float32", "float32"), "fp8": ("all", "all")}.get(name, VALUES[FIELDS[name].type])
    plain, _ = train_gpt.parse_arguments(["--preset", preset])
    for argv in ([f"--{name}", text], [f"--{name}={text}"]):
        hp, _ = train_gpt.parse_arguments([*argv, "--preset", preset])
        assert hp == dataclasses.replace(plain, **{name: value})


@pytest.mark.parametrize("argv, value", [(["--repeat"], True), (["--repeat", "true"], True), (["--repeat", "false"], False),
                                         (["--repeat", "False"], False), ([], True)])
def test_flags_of_yes_or_no(argv, value):
    assert train_gpt.parse_arguments(["--preset", "tiny", *argv])[0].repeat is value


@pytest.mark.parametrize("text, value", [("none", ()), ("7", (7,)), ("0,11", (0, 11))])
def test_flag_of_layers(text, value):
    assert train_gpt.parse_arguments(["--attention_free_layers", text])[0].attention_free_layers == value


def test_help_lists_every_field_and_preset(capsys):
    code, out, err = run_main(capsys, "--help")
    assert code == 0 and not err
    for name in (*FIELDS, "preset", *train_gpt.PRESETS):
        assert name in out
    for field in FIELDS.values():
        assert repr(field.default) in out


# ---------------------------------------------------------------------------------------------------------
# Bad input gets a sentence

TINY = ("--preset", "tiny")


@pytest.fixture
def data(make_shard, tmp_path):
    """Flags that find a good pair of small shards, and everything else that a run of one small step needs."""
    make_shard("train_1.bin", [256, *range(200)] * 4)
    make_shard("val_0.bin", [256, *range(200)] * 4)
    return (*TINY, "--train_files", tmp_path / "train_*.bin", "--val_files", tmp_path / "val_*.bin", "--train_seq_len", 128,
            "--val_seq_len", 128, "--val_tokens", 300, "--num_iterations", 1, "--log_dir", tmp_path / "logs")


@pytest.mark.parametrize("flags, named", [
    (["--no_such_flag", "3"], ["no_such_flag"]),
    (["--num_iter", "3"], ["num_iter"]),  # no abbreviations: a later flag would change what they mean
    (["stray"], ["stray"]),
    (["--preset", "huge"], ["huge", "speedrun", "medium", "tiny"]),
    (["--num_iterations", "many"], ["num_iterations", "many"]),
    (["--num_iterations"], ["num_iterations"]),
    (["--repeat", "perhaps"], ["repeat", "perhaps"]),
    (["--attention_free_layers", "x"], ["attention_free_layers", "x"]),
    (["--dtype", "float64"], ["dtype", "float64", "bfloat16"]),
    (["--train_seq_len", "1000"], ["train_seq_len", "1000", "128"]),
    (["--val_seq_len", "200"], ["val_seq_len", "200", "128"]),
    (["--train_seq_len", "0"], ["train_seq_len", "0"]),
    (["--train_seq_len", "-128"], ["train_seq_len", "-128"]),
    (["--max_window", "100"], ["max_window", "100", "128"]),
    (["--num_layers", "5"], ["num_layers", "5", "6"]),
    (["--num_iterations", "0"], ["num_iterations", "0"]),
    (["--seqs_per_step", "0"], ["seqs_per_step", "0"]),
    (["--val_tokens", "-1"], ["val_tokens", "-1"]),
    (["--cooldown_frac", "0"], ["cooldown_frac", "0"]),
    (["--cooldown_frac", "1.5"], ["cooldown_frac", "1.5"]),
    (["--seed", str(10**30)], ["seed", str(10**30)]),
])
def test_bad_flag_is_named(flags, named, data, capsys, tmp_path):
    sentence = refused(capsys, *data, *flags)
    assert all(word in sentence for word in named)
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("preset", [[], ["--preset", "speedrun"], ["--preset", "medium"]])
def test_presets_for_gpus_say_that_there_is_none(preset, capsys):
    sentence = refused(capsys, *preset)
    assert "CUDA" in sentence and "tiny" in sentence


@pytest.mark.parametrize("which", ["train_files", "val_files"])
def test_pattern_without_shards(which, data, capsys, tmp_path):
    sentence = refused(capsys, *data, f"--{which}", tmp_path / "nowhere_*.bin")
    assert str(tmp_path / "nowhere_*.bin") in sentence


@pytest.mark.parametrize("name", ["train_1.bin", "val_0.bin"])
@pytest.mark.parametrize("what, fields, found", [
    ("magic", dict(magic=7), "7"), ("version", dict(version=3), "3"), ("length", dict(length=1000), "1000"),
    ("no length", dict(length=0), "0"), ("vocabulary", dict(vocab_size=300), "300"), ("token", dict(vocab_size=100), "vocabulary")])
def test_bad_shard(name, what, fields, found, data, make_shard, capsys, tmp_path):
    make_shard(name, [256, *range(200)] * 4, **fields)
    if what == "token":  # both files alike, or the sentence would be about their difference
        make_shard("val_0.bin" if name == "train_1.bin" else "train_1.bin", [*range(90)] * 9, vocab_size=100)
    sentence = refused(capsys, *data)
    assert found in sentence and (name in sentence or what == "vocabulary")
    assert not (tmp_path / "logs").exists()


def test_folder_where_a_shard_was_expected(data, capsys, tmp_path):
    (tmp_path / "train_2.bin").mkdir()
    assert "train_2.bin" in refused(capsys, *data)


def test_single_token_leaves_nothing_to_validate_on(data, make_shard, capsys):
    make_shard("val_0.bin", [256])
    assert "val_" in refused(capsys, *data, "--val_tokens", 0)


def test_too_few_tokens(data, capsys):
    sentence = refused(capsys, *data, "--repeat", "false", "--num_iterations", 5, "--seqs_per_step", 2)
    assert str(5 * 2 * 128 + 1 - 804) in sentence.replace(",", "")
    sentence = refused(capsys, *data, "--val_tokens", 804)
    assert "1 " in sentence and "val_0.bin" in sentence or "val_*.bin" in sentence


@pytest.mark.parametrize("world_size, seqs", [(3, 2), (4, 6), (2, 3)])
def test_processes_that_do_not_divide_a_step(world_size, seqs):
    machine = dataclasses.replace(CPU, world_size=world_size)
    with pytest.raises(train_gpt.UserError, match=f"{world_size} processes cannot share {seqs} sequences"):
        train_gpt.check_settings(train_gpt.Hyperparameters(seqs_per_step=seqs), "tiny", machine)


def test_log_that_exists_is_not_overwritten(data, capsys, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("precious")
    sentence = refused(capsys, *data, "--run_id", "mine")
    assert "mine.txt" in sentence and (tmp_path / "logs" / "mine.txt").read_text() == "precious"


def test_log_folder_that_cannot_be_made(data, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, *data, "--log_dir", tmp_path / "file")


@pytest.mark.parametrize("flags, named", [
    ([], "CUDA"),
    ([*TINY, "--train_files", "nowhere/*.bin"], "nowhere"),
])
def test_bad_input_as_a_person_meets_it(flags, named, tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, SCRIPT, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and named in result.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("steps, cooldown", [(1770, 0.4), (500, 0.4), (10, 0.4), (6000, 0.6), (100, 1.0)])
def test_learning_rate(steps, cooldown):
    hp = train_gpt.Hyperparameters(num_iterations=steps, cooldown_frac=cooldown)
    for step in range(steps + 1):
        assert train_gpt.learning_rate_factor(step, hp) == pytest.approx(twins.learning_rate_factor(step, steps, cooldown))


@pytest.mark.parametrize("step, factor", [(0, 1), (600, 1), (1061, 1), (1062, 1), (1416, 0.55), (1770, 0.1)])
def test_learning_rate_by_hand(step, factor):
    assert train_gpt.learning_rate_factor(step, train_gpt.Hyperparameters()) == pytest.approx(factor)


@pytest.mark.parametrize("step, expected", [(0, 0.85), (30, 0.86), (150, 0.9), (300, 0.95), (301, 0.95), (1770, 0.95)])
def test_momentum(step, expected):
    assert train_gpt.muon_momentum(step) == pytest.approx(expected) == pytest.approx(twins.momentum(step))


@pytest.mark.parametrize("steps, max_window", [(1770, 1792), (500, 512), (7, 1792), (100, 128)])
def test_window(steps, max_window):
    """From one block to the longest, in steps of one block, evenly."""
    hp = train_gpt.Hyperparameters(num_iterations=steps, max_window=max_window)
    windows = [train_gpt.window_blocks(step, hp) for step in range(steps + 1)]
    assert windows == [twins.window(step, steps, max_window) for step in range(steps + 1)]
    assert windows[0] == 1 and windows[-1] == max_window // 128 and windows == sorted(windows)


def test_window_of_the_speedrun():
    windows = [train_gpt.window_blocks(step, train_gpt.Hyperparameters()) for step in range(1771)]
    assert set(windows) == set(range(1, 15))  # 128 to 1792 tokens
    assert [windows[step] for step in (0, 131, 132, 885, 1769)] == [1, 1, 2, 7, 14]


def test_schedules_reach_the_optimizers():
    """Each group's own learning rate times the factor, and Muon's momentum; the window comes back as a tensor."""
    hp = train_gpt.Hyperparameters(**SMALL)
    optimizers = train_gpt.build_optimizers(train_gpt.build_model(hp, 257, CPU), hp, CPU)
    for step in (0, 100, 1416, 1770, 0):
        window = train_gpt.set_schedule(optimizers, step, hp, CPU)
        assert (window.item(), window.dtype, window.ndim) == (twins.window(step, 1770), torch.int32, 0)
        factor = twins.learning_rate_factor(step, 1770)
        adam, muon = optimizers
        assert sorted(group["lr"] for group in adam.param_groups) == pytest.approx([factor * lr for lr in (0.008, 0.04, 0.6)])
        for group in muon.param_groups:
            assert (group["lr"], group["momentum"]) == pytest.approx((0.05 * factor, twins.momentum(step)))


def test_adam_is_set_as_in_the_recipe():
    hp = train_gpt.Hyperparameters(**SMALL)
    model = train_gpt.build_model(hp, 257, CPU)
    adam, muon = train_gpt.build_optimizers(model, hp, CPU)
    for group in adam.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.8, 0.95), 1e-10, 0, True)
    trained = [id(p) for optimizer in (adam, muon) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())  # each by one of the two
