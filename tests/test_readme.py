"""README.md keeps up with the code: its settings are the dataclass, what it names exists."""

import dataclasses
import importlib.util
import re

import pytest
from conftest import ROOT

import train_gpt

DOCUMENTS = [ROOT / "README.md", ROOT / "records/README.md", ROOT / "records/benchmarks.md"]
README = DOCUMENTS[0].read_text()
# Flags of tools that are not of this project.
TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}


def named(pattern: str) -> list[tuple]:
    """Each document with what the pattern finds in it, once."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    return [
        (path, name) for path in DOCUMENTS for name in sorted({*re.findall(pattern, texts[path])})
    ]


def shown(value) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value) if value != "" else "(empty)"


def meaning(field: dataclasses.Field) -> str:
    multiple = field.metadata.get("multiple_of")
    return field.metadata["meaning"] + (f"; a multiple of {multiple}" if multiple else "")


def settings_tables() -> str:
    """What has to stand under "Settings": what presets set in a column each, then the rest."""
    others = [train_gpt.PRESETS["medium"], train_gpt.PRESETS["tiny"]]
    varying = ["| flag | speedrun | medium | tiny | meaning |", "| --- | --- | --- | --- | --- |"]
    constant = ["| flag | value | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(train_gpt.Hyperparameters):
        cells = [f"`--{field.name}`", f"`{shown(field.default)}`"]
        rows = constant
        if any(field.name in preset for preset in others):
            rows = varying
            for preset in others:
                cells.append(f"`{shown(preset[field.name])}`" if field.name in preset else "")
        rows.append(f"| {' | '.join([*cells, meaning(field)])} |")
    return "\n".join([*varying, "", *constant])


def test_the_settings_tables_are_the_dataclass():
    assert settings_tables() in README, f"they have to be\n{settings_tables()}"


def test_a_newcomer_is_not_drowned():
    assert len(README.splitlines()) < 250


def test_every_picture_is_small_and_drawn_by_a_script_beside_it():
    pictures = sorted((ROOT / "records" / "pictures").glob("*.svg"))
    assert len(pictures) >= 3
    for picture in pictures:
        assert picture.stat().st_size < 100_000
        assert picture.with_suffix(".py").exists()


def test_the_picture_of_the_network_is_of_this_network():
    path = ROOT / "records" / "pictures" / "network.py"
    spec = importlib.util.spec_from_file_location("network", path)
    network = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(network)
    assert path.with_suffix(".svg").read_text() == network.picture()


@pytest.mark.parametrize(
    "document, name", named(r"(?:tests|data|records)/[\w./-]+\.(?:py|sh|md|txt)")
)
def test_files_that_are_named_exist(document, name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("document, name", named(r"\]\(([\w./-]+)\)"))
def test_links_lead_somewhere(document, name):
    assert (document.parent / name).exists()


@pytest.mark.parametrize("document, flag", named(r"--([a-z]\w+)"))
def test_flags_that_are_named_exist(document, flag):
    """Each is a setting, or a flag that some tool of the project, or torchrun, knows."""
    settings = {field.name for field in dataclasses.fields(train_gpt.Hyperparameters)}
    tools = [*ROOT.glob("*/*.py"), *ROOT.glob("*/*.sh"), ROOT / "train_gpt.py"]
    in_code = any(f'"--{flag}"' in tool.read_text() for tool in tools)
    assert flag in settings | TORCHRUN or in_code


def test_nothing_is_left_to_fill_in():
    for document in DOCUMENTS:
        assert not re.search(r"@[A-Z]+@|<!--|TODO", document.read_text())
