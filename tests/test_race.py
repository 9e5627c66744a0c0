"""records/race.py: verdicts worked out by hand, and whole races, most of them of a stand-in."""

import json
import math
import signal
import subprocess
import time
from pathlib import Path

import compare
import pytest
import race
from helpers import SMALL, Processes, write_shards

# A trainer in all that race.py sees of one, behind a line that sets its constants.
TRAINER = """
import random
import sys
import time
from pathlib import Path

def main():
    given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    seed = int(given["--seed"])
    luck = random.Random(seed).gauss(0, 0.02) + random.Random(seed + SHIFT).gauss(0, 0.001)
    with open(Path(given["--log_dir"], given["--run_id"] + ".txt"), "x", buffering=1) as log:
        log.write(Path(sys.argv[0]).read_text() + "\\n" + "=" * 100 + "\\n")
        log.write(f"hardware: {HARDWARE}\\nmuon_lr: {0.05 + SHIFT}\\n" + "=" * 100 + "\\n")
        for step in (0, 5, 10):
            log.write(f"step:{step}/10 val_loss:{4 - 0.1 * step + luck + SHIFT:.4f} ")
            log.write(f"train_time:{step * 100 + seed}ms step_avg:100.00ms\\n")
            time.sleep(PAUSE)

if __name__ == "__main__":
    main()
"""
FLAGS = [
    "--seeds",
    "2",
    "--out",
    "record",
    "--train_files",
    "train_*.bin",
    "--val_files",
    "val_0.bin",
]


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """Each test has its scripts, shards and races in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path)


def trainer(name, shift=0.0, hardware="CPU", pause=0):
    """A stand-in script with these constants."""
    constants = f"SHIFT, HARDWARE, PAUSE = {shift}, {hardware!r}, {pause}\n"
    Path(name).write_text(constants + TRAINER)


def run(capsys, *arguments):
    """Exit code, standard output and standard error of race.py."""
    try:
        code = race.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def refused(capsys, words, *arguments):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and words in err and len(err.splitlines()) == 1, err


# Mean 1, standard deviation 2: (1.96 + 0.84)^2 * 4 = 31.4 by the normal distribution, and two more
# for Student's t.
WIDE = [1 + sign * math.sqrt(3) for sign in (-1, 1, -1, 1)]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ([0.01, 0.02, 0.01, 0.02], "idea is worse than main: its final loss is higher by 0.0150."),
        (
            [-0.01, -0.02, -0.01, -0.02],
            "idea is better than main: its final loss is lower by 0.0150.",
        ),
        (WIDE, "No difference seen between idea and main: to see one of 1.0000, about 34 seeds"),
        ([0.0] * 4, "No difference seen between idea and main: the final loss changes by +0.0000"),
    ],
)
def test_verdicts(changes, sentence):
    main, idea = (race.Version(label, {}) for label in ("main", "idea"))
    loss = compare.difference([3 + change for change in changes], [3.0] * 4, paired=True)
    assert race.verdict(main, idea, loss).startswith(sentence)


def test_race_its_record_and_its_repetition(capsys):
    trainer("main.py")
    trainer("idea.py", shift=-0.1)
    arguments = ["idea.py", "--base", "main.py", *FLAGS, "--at", "3.2"]
    code, out, err = run(capsys, *arguments, "--plot")
    assert code == 0, out + err
    assert (
        "idea is better than main: its final loss is lower by 0." in out and "steps to 3.2" in out
    )
    assert "muon_lr is -0.05 in idea and 0.05 in main." in out
    turns = [line.split()[1:3] for line in out.splitlines() if line.startswith("seed ")]
    assert turns == [["0", "main"], ["0", "idea"], ["1", "idea"], ["1", "main"]]
    readme = Path("record/README.md").read_text()
    assert "$ python records/race.py idea.py" in readme and "idea is better than main" in readme
    assert Path("record/curves.png").stat().st_size > 10_000
    assert Path("record/idea/seed_1.txt").read_text().startswith(Path("idea.py").read_text())
    # The same again has nothing to do; another race does not mix with this one.
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "4 are there already" in out and "\nseed " not in out
    refused(capsys, "something else than a race of these", *arguments, "--preset", "tiny")
    write_shards(Path(), seed=1)
    refused(capsys, "something else than a race of these", *arguments)


def test_interrupted_race_is_resumed(capsys):
    """While it runs, an equal one is refused."""
    trainer("main.py", pause=0.3)
    trainer("idea.py", pause=0.3, shift=0.1)
    arguments = ["idea.py", "--base", "main.py", *FLAGS]
    first = Processes(Path(), *arguments, script=Path(race.__file__))
    while not Path("record/idea/seed_0.txt").exists() and first.processes[0].is_alive():
        time.sleep(0.02)
    refused(capsys, "a race is running in record", *arguments)
    first.send(signal.SIGTERM)
    assert first.wait() == [130] and "No verdict before all seeds have run." in first.output
    kept = Path("record/main/seed_0.txt").stat().st_mtime_ns
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "1 are there already" in out and "idea is worse than main" in out
    assert Path("record/main/seed_0.txt").stat().st_mtime_ns == kept


def test_failed_and_unfair_candidates_have_no_verdict(capsys):
    trainer("main.py")
    trainer("idea.py", shift=-0.1)
    trainer("broken.py", pause=-1)
    trainer("elsewhere.py", hardware="H100")
    names = ["broken.py", "elsewhere.py", "idea.py", "--base", "main.py"]
    code, out, _ = run(capsys, *names, *FLAGS)
    assert code == 1 and "idea is better than main" in out
    assert "No verdict: broken failed, exit code 1 with seed 0: ValueError: sleep length" in out
    assert "ValueError" in Path("record/broken/seed_0.out").read_text()
    assert "hardware is H100 in elsewhere and CPU in main." in out
    assert "No verdict: elsewhere and main ran under different conditions." in out


def test_revisions_of_a_folder_in_a_larger_repository(capsys, monkeypatch):
    """Scripts that import train_gpt get that of their revision."""
    folder = Path("inner").resolve()
    folder.mkdir()
    monkeypatch.setattr(race, "ROOT", folder)
    trainer("train_gpt.py", shift=5.0)
    trainer("inner/train_gpt.py")
    Path("inner/other.py").write_text("import train_gpt\n\ntrain_gpt.main()\n")
    identity = ["-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], check=True)
    trainer("inner/train_gpt.py", shift=0.1)
    code, out, _ = run(capsys, "HEAD", "inner/other.py", "HEAD:other.py", *FLAGS)
    assert code == 0 and "HEAD is better than working_tree" in out
    assert "between other and working_tree: the final loss changes by +0.0000" in out
    assert "HEAD_other.py is better than working_tree" in out
    refused(capsys, "git cannot show it: fatal: invalid object name 'nothing'", "nothing", *FLAGS)


def test_real_trainer(capsys):
    trainer("main.py")
    flags = " ".join(SMALL).replace("--run_id run ", "").split()
    code, out, err = run(capsys, "--base", "main.py", *FLAGS, *flags)
    assert code == 1 and "working_tree and main ran under different conditions" in out, out + err
    (log,) = compare.read_log(Path("record/working_tree/seed_1.txt"))
    assert log.finished and log.settings["seed"] == "1"
    # What the race takes for the identity of its data is what the log has.
    shards = [log.settings[name].split()[-1] for name in ("train_shards", "val_shards")]
    assert shards == json.loads(Path("record/settings.json").read_text())["data"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name a candidate"),
        (["main.py", "--seeds", "1"], "take at least 2"),
        (["main.py", "--seeds", "some"], "invalid parse_seeds value: 'some'"),
        (["main.py", "--seed", "3"], "--seed is set for each run"),
        (["main.py", "--train_files", "missing.bin"], "no shard matches"),
    ],
)
def test_mistake_is_one_sentence(capsys, arguments, words):
    trainer("main.py")
    refused(capsys, words, *arguments)
