"""README.md keeps up with the code: its settings table is the dataclass, what it names exists."""

import dataclasses
import re

import pytest
from conftest import ROOT

import train_gpt

# Flags of the other tools that the README names.
OTHER_FLAGS = """preset shakespeare gpu cpu vs target plot help tokenizer dataset verify data dist
    jsonl out standalone nproc_per_node nnodes rdzv_backend rdzv_endpoint rdzv_id
    rdzv_conf local_addr nodes ntasks gpus cpus time checkpoint shutdown_timeout"""
README = (ROOT / "README.md").read_text()


def shown(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value) if value != "" else "(empty)"


def settings_table() -> str:
    """What the table under "Settings" has to be."""
    rows = ["| flag | speedrun | medium | tiny | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(train_gpt.Hyperparameters):
        values = [shown(field.default)]
        values += [
            shown(preset[field.name]) if field.name in preset else ""
            for preset in (train_gpt.PRESETS["medium"], train_gpt.PRESETS["tiny"])
        ]
        meaning = field.metadata["meaning"]
        if "multiple_of" in field.metadata:
            meaning += f"; a multiple of {field.metadata['multiple_of']}"
        if "choices" in field.metadata:
            meaning += f" ({', '.join(field.metadata['choices'])})"
        rows.append(
            f"| `--{field.name}` | "
            + " | ".join(f"`{v}`" if v else "" for v in values)
            + f" | {meaning} |"
        )
    return "\n".join(rows)


def test_the_settings_table_is_the_dataclass():
    assert settings_table() in README


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:tests|data|records)/[\w./-]+\.(?:py|sh|md|txt)", README)))
)
def test_files_that_are_named_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--([a-z]\w+)", README))))
def test_flags_that_are_named_exist(flag):
    """Each is a setting, or a flag of the other tools that are named."""
    settings = {field.name for field in dataclasses.fields(train_gpt.Hyperparameters)}
    assert flag in settings | set(OTHER_FLAGS.split())


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README + (ROOT / "records" / "README.md").read_text())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
