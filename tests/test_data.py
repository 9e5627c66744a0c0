"""Shards, the loader against NumPy, the exact mean of a validation, and shards made of any text."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_gpt
import twins
from conftest import ROOT

Loader, UserError = train_gpt.DistributedDataLoader, train_gpt.UserError
BOUNDARY = 256

spec = importlib.util.spec_from_file_location("local_text", ROOT / "data" / "local_text.py")
local_text = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local_text)


@pytest.fixture
def shards(make_shard, tmp_path):
    """Three shards of odd sizes, 2,000 tokens in all, and the pattern that finds them."""
    tokens = np.random.default_rng(0).integers(0, 257, 2000)
    for name, piece in zip(("a_2.bin", "a_0.bin", "a_1.bin"), np.split(tokens, [700, 701])):
        make_shard(name, piece)  # neither written in order, nor of one length, nor with room for a sequence
    return str(tmp_path / "a_*.bin")


# ---------------------------------------------------------------------------------------------------------
# The loader


def taken(pattern, seq_len, steps, world_size, **options):
    """What all processes together take in some steps of one sequence each, in the order of the sequences."""
    loaders = [Loader(pattern, seq_len, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [loader.next_batch() for _ in range(steps) for loader in loaders]


@pytest.mark.parametrize("seq_len", [1, 128, 130])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_processes_together_read_what_numpy_slices(shards, seq_len, world_size):
    """The same sequences in the same order, however many processes share them, and across the ends of shards."""
    tokens = twins.all_tokens(shards)
    steps = 8 // world_size
    batches = taken(shards, seq_len, steps, world_size, num_tokens=8 * seq_len)
    assert len(batches) == 8
    for index, (inputs, targets) in enumerate(batches):
        assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)
        assert inputs.shape == targets.shape == (seq_len,)
        expected_inputs, expected_targets = twins.sequence(tokens, index, seq_len, 8 * seq_len)
        assert inputs.tolist() == expected_inputs.tolist()
        assert targets.tolist() == expected_targets.tolist()


def test_every_token_is_read_once_and_in_order(shards):
    """All 2,000 tokens: 1,999 inputs, and each token after the first as a target."""
    tokens = twins.all_tokens(shards)
    loader = Loader(shards, 128)
    assert (loader.num_tokens, loader.total, loader.num_sequences) == (1999, 2000, 16)
    batches = [loader.sequence(index) for index in range(loader.num_sequences)]
    targets = torch.cat([targets for _, targets in batches])
    assert targets[targets >= 0].tolist() == tokens[1:].tolist()
    assert torch.cat([inputs for inputs, _ in batches])[:2000].tolist() == tokens.tolist()


def test_targets_beyond_the_last_token_do_not_count(shards):
    tokens = twins.all_tokens(shards)
    loader = Loader(shards, 128, num_tokens=300)
    assert loader.num_sequences == 3
    inputs, targets = loader.sequence(2)
    expected_inputs, expected_targets = twins.sequence(tokens, 2, 128, 300)
    assert targets.tolist() == expected_targets.tolist() and (targets == -100).sum() == 3 * 128 - 300
    assert inputs.tolist() == expected_inputs.tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_repeat_starts_over_without_a_gap(shards, world_size):
    tokens, needed = twins.all_tokens(shards), 60 * 128
    batches = taken(shards, 128, 60 // world_size, world_size, num_tokens=needed, repeat=True)  # almost four times around
    for index, (inputs, targets) in enumerate(batches):
        expected_inputs, expected_targets = twins.sequence(tokens, index, 128, needed)
        assert inputs.tolist() == expected_inputs.tolist() and targets.tolist() == expected_targets.tolist()


def test_sequence_longer_than_all_shards_goes_around_more_than_once(shards):
    tokens = twins.all_tokens(shards)
    inputs, _ = Loader(shards, 5000, num_tokens=5000, repeat=True).next_batch()
    assert inputs.tolist() == [*tokens, *tokens, *tokens[:1000]]


@pytest.mark.parametrize("num_tokens, missing", [(1999, 0), (2000, 1), (2001, 2), (5000, 3001)])
def test_missing_tokens_are_counted_before_the_first_step(shards, num_tokens, missing):
    """A run predicts num_tokens tokens, and so needs one more than that."""
    if not missing:
        Loader(shards, 128, num_tokens=num_tokens)
        return
    with pytest.raises(UserError) as error:
        Loader(shards, 128, num_tokens=num_tokens)
    message = str(error.value)
    assert str(missing) in message.replace(",", "") and "2000" in message.replace(",", "") and "--repeat" in message
    Loader(shards, 128, num_tokens=num_tokens, repeat=True)


def test_vocabulary_comes_from_the_header(make_shard):
    assert Loader(str(make_shard("a.bin", [1, 2, 3], vocab_size=300)), 1).vocab_size == 300
    assert Loader(str(make_shard("b.bin", [1, 2, 3], vocab_size=0)), 1).vocab_size == 50257  # as in the public shards


def test_shards_are_mapped_and_not_read(shards):
    assert all(isinstance(shard, np.memmap) for shard in Loader(shards, 128).shards)


# ---------------------------------------------------------------------------------------------------------
# Broken shards

BROKEN = {  # what is wrong: how to make the shard, what the sentence has to name
    "magic": (dict(magic=20240521), "20240521"),
    "version": (dict(version=2), "2"),
    "length too long": (dict(length=11), "11"),
    "length too short": (dict(length=9), "9"),
    "length zero": (dict(length=0), "0"),
    "negative length": (dict(length=-5), "-5"),
    "vocabulary of one": (dict(vocab_size=1), "1"),
    "negative vocabulary": (dict(vocab_size=-2), "-2"),
    "vocabulary beyond 16 bits": (dict(vocab_size=65537), "65537"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_header_is_refused_by_name(what, make_shard):
    fields, found = BROKEN[what]
    path = make_shard("broken.bin", list(range(10)), **fields)
    with pytest.raises(UserError) as error:
        Loader(str(path), 1)
    assert str(path) in str(error.value) and found in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 1000, 1023, 1024, 1025, 1043])
def test_truncated_file_is_refused_by_name(size, make_shard):
    path = make_shard("broken.bin", list(range(10)))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError) as error:
        Loader(str(path), 1)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_one_broken_shard_among_good_ones_is_found(make_shard, tmp_path):
    for name in "abc":
        make_shard(f"{name}.bin", list(range(10)))
    make_shard("b.bin", list(range(10)), magic=1)
    with pytest.raises(UserError, match="b.bin"):
        Loader(str(tmp_path / "*.bin"), 1)


def test_shards_of_two_vocabularies_are_refused(make_shard, tmp_path):
    make_shard("a.bin", [1, 2, 3], vocab_size=257)
    make_shard("b.bin", [1, 2, 3], vocab_size=50257)
    with pytest.raises(UserError) as error:
        Loader(str(tmp_path / "*.bin"), 1)
    assert all(word in str(error.value) for word in ("a.bin", "b.bin", "257", "50257"))


def test_token_beyond_the_vocabulary_is_found(make_shard, tmp_path):
    make_shard("a.bin", [1, 2, 256])
    path = make_shard("b.bin", [0, 1, 2, 257, 4])
    with pytest.raises(UserError) as error:
        Loader(str(tmp_path / "*.bin"), 1).check_tokens()
    assert str(path) in str(error.value) and "257" in str(error.value) and "3" in str(error.value)
    path.unlink()
    Loader(str(tmp_path / "*.bin"), 1).check_tokens()


def test_pattern_without_a_match_is_named(tmp_path):
    with pytest.raises(UserError) as error:
        Loader(str(tmp_path / "nothing_*.bin"), 1)
    assert "nothing_*.bin" in str(error.value)


# ---------------------------------------------------------------------------------------------------------
# Validation


class KnownLoss:
    """In the place of a network: each target costs what `costs` says, and -100 nothing."""

    costs = np.random.default_rng(1).random(257)
    training = True

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def __call__(self, inputs, targets, window):
        assert not self.training and not torch.is_grad_enabled()
        counted = targets[targets >= 0].numpy()
        return torch.tensor(self.costs[counted].mean(), dtype=torch.float64)


@pytest.mark.parametrize("num_tokens", [100, 128, 129, 640, 1000, 1999])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_validation_is_the_mean_over_exactly_its_tokens(shards, num_tokens, world_size, monkeypatch):
    """Also where some processes have fewer sequences than others, or none."""
    totals, model = [], KnownLoss()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, async_op: SimpleNamespace(wait=lambda: totals.append(total.item())))
    for rank in range(world_size):
        loader = Loader(shards, 128, num_tokens=num_tokens, rank=rank, world_size=world_size)
        machine = train_gpt.Machine(torch.device("cpu"), "a test", torch.float32, rank, rank, world_size)
        reducer = train_gpt.GradientReducer(torch.nn.Module(), [], machine, SimpleNamespace(place=0))
        alone = train_gpt.validate(model, loader, torch.tensor(1, dtype=torch.int32), reducer)
        assert model.training  # as it was
    expected = KnownLoss.costs[twins.all_tokens(shards)[1:num_tokens + 1]].mean()
    assert (sum(totals) / num_tokens if world_size > 1 else alone) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------
# data/local_text.py


@pytest.fixture
def make_texts(tmp_path):
    """A function that writes texts as the files of a folder, and returns the folder."""
    def make(texts, folder="texts"):
        for name, text in texts.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / folder
    return make


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """A function that runs local_text.py on paths: exit code, what it printed, and all shards' bytes by name."""
    def run(*arguments, out="out"):
        monkeypatch.setattr(sys, "argv", ["local_text.py", *map(str, arguments), "--out", str(tmp_path / out)])
        capsys.readouterr()
        code = local_text.main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err, {path.name: path.read_bytes() for path in sorted((tmp_path / out).glob("*.bin"))}
    return run


def split_tokens(folder, split):
    return twins.all_tokens(folder / f"{split}_*.bin")


def split_documents(folder, split):
    """The documents of a split, as bytes; each has to begin with the boundary token."""
    tokens = split_tokens(folder, split)
    assert tokens[0] == BOUNDARY and tokens.max() <= BOUNDARY
    starts = [*np.flatnonzero(tokens == BOUNDARY), len(tokens)]
    return [bytes(tokens[start + 1:end].astype(np.uint8)) for start, end in zip(starts, starts[1:])]


PICTURE = b"\x89PNG\r\n\x1a\n\x00\x00"
MANY = {f"sub{i % 3}/text_{i}.txt": f"Text number {i}, 'größer' als ☃ and 𝄞.\n" * (i + 1) for i in range(60)}


def test_text_comes_back_as_it_was_with_documents_split(make_texts, convert, tmp_path):
    code, printed, errors, shards = convert(make_texts(MANY))
    assert code == 0 and {name.split("_")[0] for name in shards} == {"train", "val"}
    train, val = (split_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(text.encode() for text in MANY.values())  # each whole, and in one of the two
    assert len(val) == 3  # one in twenty
    vocabularies = {int(np.frombuffer(content[:1024], dtype="<i4")[3]) for content in shards.values()}
    assert vocabularies == {257}
    for split in ("train", "val"):
        Loader(str(tmp_path / "out" / f"{split}_*.bin"), 16).check_tokens()


def test_same_text_gives_the_same_bytes(make_texts, convert):
    folder = make_texts(MANY)
    first, again = convert(folder)[3], convert(folder, out="again")[3]
    assert first and first == again
    os.utime(folder / "sub0" / "text_0.txt")  # nor does the time matter
    assert convert(folder)[3] == first


def test_few_documents_give_their_last_parts_to_validation(make_texts, convert, tmp_path):
    texts = {f"{i}.txt": f"{i} " * 1000 for i in range(3)} | {"umlauts.txt": "ä" * 999 + "☃" * 333}
    assert convert(make_texts(texts))[0] == 0
    train, val = (split_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert len(train) == len(val) == 4
    assert sorted(a + b for a, b in zip(train, val)) == sorted(text.encode() for text in texts.values())
    for a, b in zip(train, val):
        assert 0.03 < len(b) / len(a + b) < 0.07
        a.decode(), b.decode()  # no character is cut in two


def test_one_document_among_files_that_are_no_text_still_trains_and_validates(make_texts, convert, tmp_path):
    """Documents count for the split, and not files."""
    texts = {"only.txt": "The only text here. " * 100} | {f"{i}.bin": b"\xff\xfe\x00" * 50 for i in range(30)}
    assert convert(make_texts(texts))[0] == 0
    train, val = (split_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert b"".join(train + val) == texts["only.txt"].encode()
    assert len(b"".join(train)) > len(b"".join(val)) > 0


def test_what_is_no_text_is_left_out_and_counted(make_texts, convert, tmp_path):
    texts = MANY | {"picture.png": PICTURE, "latin.txt": "größer".encode("latin-1"), "zero.txt": "a\0b", "empty.txt": ""}
    code, printed, _, _ = convert(make_texts(texts))
    assert code == 0 and "3 " in printed
    documents = split_documents(tmp_path / "out", "train") + split_documents(tmp_path / "out", "val")
    assert sorted(documents) == sorted(text.encode() for text in MANY.values())


def test_files_and_folders_can_be_mixed(make_texts, convert, tmp_path):
    one = make_texts({"a.txt": "first " * 100, "deep/er/b.txt": "second " * 100}, "one")
    two = make_texts({"c.txt": "third " * 100}, "two")
    assert convert(one, two / "c.txt")[0] == 0
    train, val = (split_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(a + b for a, b in zip(train, val)) == sorted(text * 100 for text in (b"first ", b"second ", b"third "))


def test_shards_of_an_earlier_larger_call_do_not_stay(make_texts, make_shard, convert, tmp_path):
    """Otherwise a run would train on both."""
    (tmp_path / "out").mkdir()
    for name in ("train_000001.bin", "train_000002.bin", "train_000007.bin", "val_000000.bin", "val_000003.bin"):
        make_shard(f"out/{name}", [256, 1, 2])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    shards = convert(make_texts(MANY))[3]
    assert len(shards) == 2
    documents = split_documents(tmp_path / "out", "train") + split_documents(tmp_path / "out", "val")
    assert sorted(documents) == sorted(text.encode() for text in MANY.values())
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("texts", [{}, {"picture.png": PICTURE}, {"empty.txt": ""}])
def test_no_text_at_all_is_a_sentence_and_leaves_earlier_shards_alone(texts, make_texts, make_shard, convert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "texts").mkdir()
    make_shard("out/train_000001.bin", [256, 1, 2])
    code, printed, errors, shards = convert(make_texts(texts))
    assert code == 2 and errors.count("\n") == 1 and not printed
    assert list(shards) == ["train_000001.bin"]


def test_missing_path_is_a_sentence(tmp_path):
    """As a person would meet it."""
    result = subprocess.run([sys.executable, ROOT / "data" / "local_text.py", tmp_path / "nowhere.txt", "--out", tmp_path / "out"],
                            capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.count("\n") == 1 and "nowhere.txt" in result.stderr


def test_without_a_path_it_reads_pythons_own_library(make_texts, convert, monkeypatch, tmp_path):
    """A small folder stands in for the library."""
    library = make_texts({f"{i}.py": f"print({i})\n" * 50 for i in range(20)} | {"notes.txt": "not Python",
                         "site-packages/other.py": "not this Python's own"}, "library")
    monkeypatch.setattr(local_text.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert convert()[0] == 0
    documents = split_documents(tmp_path / "out", "train") + split_documents(tmp_path / "out", "val")
    assert sorted(documents) == sorted(f"print({i})\n".encode() * 50 for i in range(20))


# ---------------------------------------------------------------------------------------------------------
# The public shards

DOCS = ROOT.parent / "shared" / "data" / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="needs ../shared/data/docs, which does not ship with the project")
def test_shards_of_gpt2_tokens_are_read():
    loader = Loader(str(DOCS / "docs_train_*.bin"), 48 * 1024)
    assert loader.vocab_size == 50257 and loader.total > 22_000_000 and len(loader.files) == 5
    inputs, targets = loader.next_batch()
    assert inputs[0] == 50256 and torch.equal(inputs[1:].long(), targets[:-1])
    tokens = twins.all_tokens(DOCS / "docs_train_*.bin")
    first_shard = (os.path.getsize(loader.files[0]) - 1024) // 2
    index = first_shard // (48 * 1024)  # runs across the end of the first shard
    for ours, expected in zip(loader.sequence(index), twins.sequence(tokens, index, 48 * 1024, len(tokens) - 1)):
        assert ours.tolist() == expected.tolist()
