"The list of the official repositories' tools: nothing in it is empty, and what it names is there."

import dataclasses
import importlib
import re

import pytest
import typer

from segkern.cli.app import app
from segkern.core import Recipe, load_table
from segkern.infer import PROTOCOLS
from segkern.testing import shared

TOOLS = load_table("tools")["tools"]


def commands(command, path="segkern"):
    "Every command with its options, as one writes them."
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{path} {name}")
    if not hasattr(command, "commands"):
        yield path
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                yield f"{path} {option}"


@pytest.fixture(scope="module")
def there():
    return set(commands(typer.main.get_command(app)))


def test_nothing_is_empty():
    for row in TOOLS:
        ways = sum(len(row.get(kind, ())) for kind in ("command", "python", "field"))
        assert bool(ways) != bool(row.get("not_offered")), row
    assert len({(row["source"], row["tool"]) for row in TOOLS}) == len(TOOLS)


def test_commands_are_there(there):
    "A command, or a command with an option; a value may follow."
    ways = {way for row in TOOLS for way in row.get("command", ())}
    named = {re.sub(r"( --?[\w-]+) \w+$", r"\1", way) for way in ways}
    protocols = {
        way.split()[-1] for way in ways if re.search(r"(eval|predict) --protocol \w+$", way)
    }
    assert protocols and protocols <= set(PROTOCOLS), protocols - set(PROTOCOLS)
    assert not named - there, sorted(named - there)


def test_fields_are_there():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    named = {field for row in TOOLS for field in row.get("field", ())}
    assert named <= fields, sorted(named - fields)


def test_names_are_there():
    for name in sorted({name for row in TOOLS for name in row.get("python", ())}):
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def test_specifications_are_covered():
    "Flags, keys of the configuration files and numbered tools that the specifications name."
    folder = shared("specs")
    if folder is None:
        pytest.skip("the shared specifications are not beside the checkout")
    text = {path.stem: path.read_text() for path in folder.glob("*.md")}
    listed = " ".join(row["tool"] for row in TOOLS)
    flags = {f for t in text.values() for f in re.findall(r"`(--[a-z][a-z-]+)", t)}
    tree = re.search(r"YAML keys \(yacs tree\): (.*)", text["sanet"]).group(1)
    keys = {
        f"{section}.{key}" if section in ("TRAIN", "TEST", "MODEL", "DATASET", "LOSS") else key
        for section, inner in re.findall(r"([A-Z]+)\{([^}]*)\}", tree)
        for key in inner.split(",")
    }
    plain = set(re.findall(r"\b[A-Z_]{4,}\b", re.sub(r"[A-Z]+\{[^}]*\}", "", tree)))
    chapters = set(re.findall(r"^### (8\.\d)", text["sanet"], re.M))
    named = flags | keys | plain | chapters
    assert len(flags) >= 4 and len(keys) > 40 and len(plain) >= 6 and len(chapters) == 7
    assert not {name for name in named if name not in listed}
