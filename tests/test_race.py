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

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "records" / "race.py"
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT / "records"))
race = importlib.import_module("race")
compare = race.compare

# A trainer in all that race.py sees of one. It says where it ran, so that a test can count.
TRAINER = '''"""A stand-in for the trainer."""
import argparse
import random
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for flag in ("--seed", "--log_dir", "--run_id", "--preset"):
    parser.add_argument(flag)
given = parser.parse_args()
SHIFT, RATE, HARDWARE, PAUSE = 0.0, 0.05, "CPU", 0
luck = random.Random(int(given.seed)).gauss(0, 0.02)
own = random.Random(f"{given.seed} {SHIFT}").gauss(0, 0.001)
with open(Path(given.log_dir, given.run_id + ".txt"), "x") as log:
    log.write(Path(__file__).read_text() + "\\n" + "=" * 100 + "\\n")
    log.write(f"hardware: {HARDWARE}\\nmuon_lr: {RATE}\\nseed: {given.seed}\\n" + "=" * 100 + "\\n")
    for step in (0, 5, 10):
        loss = 4 - 0.1 * step + luck + own + SHIFT
        ms = 100 + 10 * SHIFT + own
        log.write(f"step:{step}/10 val_loss:{loss:.4f} train_time:{step * ms:.0f}ms ")
        log.write(f"step_avg:{ms:.2f}ms\\n")
        log.flush()
        time.sleep(PAUSE)
'''


def trainer(path, **values):
    """A stand-in script with other values of its constants."""
    text = TRAINER
    for name, value in values.items():
        at = ["SHIFT", "RATE", "HARDWARE", "PAUSE"].index(name)
        constants = ["0.0", "0.05", '"CPU"', "0"]
        line = next(line for line in text.splitlines() if line.startswith("SHIFT"))
        constants = line.partition(" = ")[2].split(", ")
        constants[at] = repr(value)
        text = text.replace(line, "SHIFT, RATE, HARDWARE, PAUSE = " + ", ".join(constants))
    path.write_text(text)
    return path


def start(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"COLUMNS": "80"}, **pipes)


def run(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def made_up(label, losses, average=100.0, **settings):
    """A version whose runs have these final losses, one a seed."""
    runs = {
        seed: compare.Run(
            f"{label}/{seed}", label, 10, 10, [compare.Validation(10, loss, 1.0)],
            average + seed / 100, None, 0, settings,
        )
        for seed, loss in enumerate(losses)
    }  # fmt: skip
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
    text = sentence(base, worse)
    assert text.startswith(
        "idea is worse than main: its final loss is higher by 0.0150, and a step"
    )
    assert "takes 10.0% longer." in text
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


def test_a_race_its_record_and_its_repetition(tmp_path):
    pytest.importorskip("matplotlib")
    main, idea = trainer(tmp_path / "main.py"), trainer(tmp_path / "idea.py", SHIFT=-0.1, RATE=0.04)
    arguments = [idea, "--base", main, "--seeds", "4", "--at", "3.2", "--preset", "tiny"]
    code, out, err = run(tmp_path, *arguments, "--out", "record", "--plot")
    assert code == 0, out + err
    assert "idea is better than main: its final loss is lower by 0." in out
    assert "By its script, muon_lr is 0.04 in idea and 0.05 in main." in out
    assert max(map(len, out.splitlines())) <= 80
    runs = [line.split()[1:3] for line in out.splitlines() if line.startswith("seed ")]
    in_turns = [["main", "idea"], ["idea", "main"]] * 2
    assert runs == [[str(seed), label] for seed, pair in enumerate(in_turns) for label in pair]
    readme = (tmp_path / "record" / "README.md").read_text()
    assert "$ python records/race.py" in readme and "idea is better than main" in readme
    assert (tmp_path / "record" / "curves.png").read_bytes().startswith(b"\x89PNG")
    logs = {log: log.read_text() for log in (tmp_path / "record").rglob("seed_*.txt")}
    assert len(logs) == 8 and logs[tmp_path / "record/idea/seed_0.txt"].startswith(idea.read_text())
    # The same again has nothing to do; other settings or another script do not mix with these.
    code, out, _ = run(tmp_path, *arguments, "--out", "record")
    assert code == 0 and "; 8 are there already" in out and "\nseed " not in out
    assert {log: log.read_text() for log in logs} == logs
    code, _, err = run(tmp_path, *arguments[:-1], "medium", "--out", "record")
    assert code == 2 and "other settings" in err and len(err.splitlines()) == 1
    trainer(idea, SHIFT=-0.2)
    code, _, err = run(tmp_path, *arguments, "--out", "record")
    assert code == 2 and "is of another script than idea" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_race_says_so_and_goes_on(tmp_path, times):
    main = trainer(tmp_path / "main.py", PAUSE=0.5)
    idea = trainer(tmp_path / "idea.py", PAUSE=0.5, SHIFT=0.1)
    arguments = [idea, "--base", main, "--seeds", "2", "--out", "record"]
    process = start(tmp_path, *arguments)
    second = tmp_path / "record/idea/seed_0.txt"
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
    kept = (tmp_path / "record/main/seed_0.txt").stat().st_mtime_ns
    code, out, _ = run(tmp_path, *arguments)
    assert code == 0 and f"; {1 + finished} are there already" in out
    assert "idea is worse than main" in out
    assert (tmp_path / "record/main/seed_0.txt").stat().st_mtime_ns == kept


def test_a_crash_is_named_and_does_not_stop_the_others(tmp_path):
    main, idea = trainer(tmp_path / "main.py"), trainer(tmp_path / "idea.py", SHIFT=-0.1)
    broken = tmp_path / "broken.py"
    broken.write_text(TRAINER.replace("    time.sleep", "    raise ValueError('no such shape')\n#"))
    code, out, _ = run(tmp_path, broken, idea, "--base", main, "--seeds", "2", "--out", "record")
    assert code == 1
    out = " ".join(out.split())
    assert "No verdict on broken: broken crashed with seed 0 (exit code 1): " in out
    assert "ValueError: no such shape" in out and "idea is better than main" in out
    assert "ValueError" in (tmp_path / "record/broken/seed_0.out").read_text()
    elsewhere = trainer(tmp_path / "elsewhere.py", HARDWARE="another machine")
    code, out, _ = run(tmp_path, elsewhere, "--base", main, "--seeds", "2")
    assert code == 1 and "No verdict on elsewhere" in out
    assert "hardware is another machine in elsewhere and CPU in main." in " ".join(out.split())


def test_the_real_trainer_by_revision_and_working_tree(tmp_path, make_shard, monkeypatch):
    tokens = [256, *([1, 2, 3, 4, 5, 6, 7, 8] * 200)]
    shard = make_shard("shard.bin", tokens)
    small = "--num_layers 6 --num_heads 1 --head_dim 16 --model_dim 16 --train_seq_len 128"
    small += " --val_seq_len 128 --val_tokens 256 --seqs_per_step 1 --num_iterations 2 --sample 0"
    flags = ["--preset", "tiny", "--train_files", shard, "--val_files", shard, *small.split()]
    code, out, err = run(ROOT, "--base", "HEAD", "--seeds", "2", "--out", tmp_path / "r", *flags)
    assert code == 0, out + err
    assert "working_tree against HEAD, 2 seeds" in out and "By its script" not in out
    settings = compare.read_log(tmp_path / "r/working_tree/seed_1.txt").settings
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
def test_a_mistake_is_one_sentence(tmp_path, arguments, words):
    trainer(tmp_path / "main.py")
    code, _, err = run(tmp_path, *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1, err
