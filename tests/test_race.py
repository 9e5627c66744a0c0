"""Tests of records/race.py: what it says of made-up runs, and whole races of small trainers."""

import importlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "records" / "race.py"
sys.path.insert(0, str(ROOT / "records"))
race = importlib.import_module("race")
compare = race.compare

# A trainer in all that race.py sees of one, behind a line that sets its constants.
TRAINER = """
import random
import sys
import time
from pathlib import Path

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
seed = int(given["--seed"])
luck = random.Random(seed).gauss(0, 0.02)
own = random.Random(f"{seed} {SHIFT}").gauss(0, 0.001)
with open(Path(given["--log_dir"], given["--run_id"] + ".txt"), "x", buffering=1) as log:
    log.write(Path(__file__).read_text() + "\\n" + "=" * 100 + "\\n")
    log.write(f"hardware: {HARDWARE}\\nmuon_lr: {RATE}\\nseed: {seed}\\n" + "=" * 100 + "\\n")
    for step in (0, 5, 10):
        loss = 4 - 0.1 * step + luck + own + SHIFT
        ms = 100 + 10 * SHIFT + own
        log.write(f"step:{step}/10 val_loss:{loss:.4f} train_time:{step * ms:.0f}ms ")
        log.write(f"step_avg:{ms:.2f}ms\\n")
        time.sleep(PAUSE)
"""


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Each test has its scripts and its races in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def trainer(name, shift=0.0, rate=0.05, hardware="CPU", pause=0):
    """A stand-in script with these constants."""
    constants = f"SHIFT, RATE, HARDWARE, PAUSE = {shift}, {rate}, {hardware!r}, {pause}\n"
    Path(name).write_text(constants + TRAINER)
    return name


def start(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"COLUMNS": "80"}, **pipes)


def run(*arguments):
    """Exit code, standard output and standard error of race.py."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def refused(words, *arguments):
    code, _, err = run(*arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1, err


def made_up(label, losses, average=100.0, **settings):
    """A version whose runs have these final losses, one a seed."""
    runs = {}
    for seed, loss in enumerate(losses):
        course, ms = [compare.Validation(10, loss, 1.0)], average + seed / 100
        runs[seed] = compare.Run(str(seed), label, 10, 10, course, ms, None, 0, settings)
    return race.Version(label, b"", runs)


def sentence(base, candidate):
    return race.verdict(base, candidate, race.compare_runs(base, candidate, None))


# -------------------------------------------------------------------------------------------------
# The verdict


def test_a_script_against_itself_shows_no_difference():
    draw = random.Random(0)
    said = []
    for _ in range(20):
        base, candidate = (made_up(x, [draw.gauss(1.9, 0.004) for _ in range(8)]) for x in "ab")
        said.append(sentence(base, candidate))
    assert sum(text.startswith("No difference seen") for text in said) >= 18
    assert all("seeds would be needed" in t for t in said if t.startswith("No difference seen"))


def test_verdicts_by_hand():
    base = made_up("main", [1.0, 2.0, 3.0, 4.0])
    # Differences 1 2 1 2 hundredths: mean 1.5, standard error 1 / sqrt(12) = 0.2887, t 3.1824.
    worse = made_up("idea", [1.01, 2.02, 3.01, 4.02], average=110)
    _, _, loss, _ = race.compare_runs(base, worse, None)[0]
    half = 0.031824 / math.sqrt(12)
    assert loss["interval"] == pytest.approx([0.015 - half, 0.015 + half], abs=1e-6)
    start = "idea is worse than main: its final loss is higher by 0.0150"
    assert sentence(base, worse) == f"{start}, and a step takes 10.0% longer."
    assert "main is better than idea: its final loss is lower" in sentence(worse, base)
    assert "the same with every seed." in sentence(base, made_up("idea", [1.0, 2.0, 3.0, 4.0]))
    # Mean 1 at a standard deviation of 2: (1.96 + 0.84)^2 * 4 = 31.4 by the normal distribution,
    # and two more for Student's t.
    changes = [1 + 2 * math.sqrt(3 / 4) * sign for sign in (-1, 1, -1, 1)]
    assert compare.paired(changes, [0.0] * 4)["needed"] in (33, 34)


def test_settings_that_no_script_sets_are_named():
    base = made_up("main", [1.0, 1.1], hardware="CPU", muon_lr="0.05", seed="0")
    idea = made_up("idea", [1.0, 1.1], hardware="H100", muon_lr="0.04", seed="1")
    changed, unfair = race.compare_settings(base, idea)
    assert changed == ["muon_lr is 0.04 in idea and 0.05 in main"]
    assert unfair == ["hardware is H100 in idea and CPU in main"]
    idea.runs[1].settings = base.runs[1].settings | {"dtype": "float32"}
    assert len(race.compare_settings(base, idea)[1]) == 3  # now all but the seed change within idea


# -------------------------------------------------------------------------------------------------
# Whole races


def test_a_race_its_record_and_its_repetition():
    main, idea = trainer("main.py"), trainer("idea.py", shift=-0.1, rate=0.04)
    arguments = [idea, "--base", main, "--seeds", "4", "--at", "3.2", "--out", "record"]
    code, out, err = run(*arguments, "--plot", "--preset", "tiny")
    assert code == 0, out + err
    assert "idea is better than main: its final loss is lower by 0." in out
    assert "By its script, muon_lr is 0.04 in idea and 0.05 in main." in out
    assert max(map(len, out.splitlines())) <= 80
    runs = [line.split()[1:3] for line in out.splitlines() if line.startswith("seed ")]
    in_turns = [["main", "idea"], ["idea", "main"]] * 2
    assert runs == [[str(seed), label] for seed, pair in enumerate(in_turns) for label in pair]
    readme = Path("record/README.md").read_text()
    assert "$ python records/race.py" in readme and "idea is better than main" in readme
    assert Path("record/curves.png").read_bytes().startswith(b"\x89PNG")
    logs = {log: log.read_text() for log in Path("record").rglob("seed_*.txt")}
    assert len(logs) == 8
    assert logs[Path("record/idea/seed_0.txt")].startswith(Path(idea).read_text())
    # The same again has nothing to do; other settings or another script do not mix with these.
    code, out, _ = run(*arguments, "--preset", "tiny")
    assert code == 0 and "; 8 are there already" in out and "\nseed " not in out
    assert {log: log.read_text() for log in logs} == logs
    refused("other settings", *arguments, "--preset", "medium")
    trainer(idea, shift=-0.2)
    refused("is of another script than idea", *arguments, "--preset", "tiny")


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_race_says_so_and_goes_on(times):
    main, idea = trainer("main.py", pause=0.5), trainer("idea.py", pause=0.5, shift=0.1)
    arguments = [idea, "--base", main, "--seeds", "2", "--out", "record"]
    process = start(*arguments)
    first, second = Path("record/main/seed_0.txt"), Path("record/idea/seed_0.txt")
    while not second.exists() and process.poll() is None:
        time.sleep(0.05)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "This is partial: there is no verdict before all seeds have run." in out
    assert "than main" not in out and "No difference" not in out
    finished = compare.read_log(second).finished
    assert finished == (times == 1)  # the first Ctrl-C lets the run end, the second does not
    kept = first.stat().st_mtime_ns
    code, out, _ = run(*arguments)
    assert code == 0 and f"; {1 + finished} are there already" in out
    assert "idea is worse than main" in out
    assert first.stat().st_mtime_ns == kept


def test_a_crash_is_named_and_does_not_stop_the_others():
    main, idea = trainer("main.py"), trainer("idea.py", shift=-0.1)
    broken = trainer("broken.py", pause=-1)
    code, out, _ = run(broken, idea, "--base", main, "--seeds", "2", "--out", "record")
    assert code == 1
    out = " ".join(out.split())
    assert "No verdict on broken: broken crashed with seed 0 (exit code 1): " in out
    assert "ValueError: sleep length must be" in out and "idea is better than main" in out
    assert "ValueError" in Path("record/broken/seed_0.out").read_text()
    elsewhere = trainer("elsewhere.py", hardware="another machine")
    code, out, _ = run(elsewhere, "--base", main, "--seeds", "2")
    assert code == 1 and "No verdict on elsewhere" in out
    assert "hardware is another machine in elsewhere and CPU in main." in " ".join(out.split())


def test_the_real_trainer_by_revision_and_working_tree(make_shard):
    shard = make_shard("shard.bin", [256, *([1, 2, 3, 4, 5, 6, 7, 8] * 200)])
    small = "--num_layers 6 --num_heads 1 --head_dim 16 --model_dim 16 --train_seq_len 128"
    small += " --val_seq_len 128 --val_tokens 256 --seqs_per_step 1 --num_iterations 2 --sample 0"
    flags = ["--preset", "tiny", "--train_files", shard, "--val_files", shard, *small.split()]
    code, out, err = run("--base", "HEAD", "--seeds", "2", "--out", "record", *flags)
    assert code == 0, out + err
    assert "working_tree against HEAD, 2 seeds" in out and "By its script" not in out
    settings = compare.read_log(Path("record/working_tree/seed_1.txt")).settings
    assert settings["seed"] == "1" and settings["model_dim"] == "16"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name a candidate"),
        (["nothing_like_it.py"], "neither a file nor a git revision"),
        (["main.py", "--seeds", "1"], "at least 2"),
        (["main.py", "--seeds", "some"], "seeds are a number"),
        (["main.py", "--nproc", "0"], "at least 1"),
        (["main.py", "--seed", "3"], "--seed is set for each run"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words):
    trainer("main.py")
    refused(words, *arguments)
