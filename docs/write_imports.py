"""Write the tables of docs/imports.md, settings x trainers, from the tables of the importers (`make pages`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from dreamfleet.trainers.config.method import METHODS
from dreamfleet.trainers.config.recipe_keys import recipe_keys
from dreamfleet.trainers.imports.importer import IMPORTERS, Importer
from dreamfleet.trainers.imports.rules import Effect, Gone, Joined, Rule, To, unchanged
from dreamfleet.trainers.recipe import Recipe

PAGE = Path(__file__).with_name("imports.md")
BLOCK = re.compile(r"(<!-- (supported|left-out) -->\n).*?(<!-- end -->)", re.S)
Entry = tuple[str, str, Rule]  # program, key there, rule


def write() -> str:
    """Return the page with the current tables."""
    tables = {"supported": _supported(), "left-out": _left_out()}
    return BLOCK.sub(
        lambda found: found[1] + "\n".join(tables[found[2]]) + "\n" + found[3],
        PAGE.read_text(encoding="utf-8"),
    )


def _programs() -> list[tuple[str, type[Importer]]]:
    return [(name, entry) for name, entry in IMPORTERS.items() if "dreamfleet." in entry.__module__]


def _entries() -> Iterator[Entry]:
    """Yield the rules of every program; an importer that extends another one has its own only."""
    for name, importer in _programs():
        parent = importer.__mro__[1]
        inherited = getattr(parent, "rules", {}) if parent is not Importer else {}
        patterns = {} if inherited else importer.patterns
        for key, rule in {**importer.rules, **patterns}.items():
            if inherited.get(key) != rule:
                yield name, key, rule


def _known_keys() -> set[str]:
    keys: set[str] = {"method.name", "output_dir", "report_to"}
    for method in METHODS.names():
        sections: dict[str, type[BaseModel]] = {"method": METHODS.get(method)}
        keys |= {key.path for key in recipe_keys(Recipe, sections).values()}
    return keys


def _supported() -> list[str]:
    """Return the table of recipe keys: the settings of each program that become them."""
    known = _known_keys()
    cells: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, key, rule in _entries():
        for target in _targets(rule):
            if target in known:
                word = (
                    "same"
                    if isinstance(rule, To) and not rule.note and rule.convert is unchanged
                    else "translated"
                )
                cells.setdefault(target, {}).setdefault(name, {}).setdefault(word, []).append(key)
    programs = [name for name, _ in _programs()]
    lines = ["| recipe | " + " | ".join(programs) + " |", "| --- |" + " --- |" * len(programs)]
    for target in sorted(cells):
        row = [
            "; ".join(f"{word}: {_names(keys)}" for word, keys in sorted(cells[target].get(name, {}).items()))
            for name in programs
        ]
        lines.append(f"| `{target}` | " + " | ".join(row) + " |")
    return lines


def _left_out() -> list[str]:
    """Return the table of settings without a counterpart, with the effect and the reason."""
    known = _known_keys()
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, key, rule in _entries():
        if isinstance(rule, Gone):
            rows.setdefault((rule.effect, rule.reason), {}).setdefault(name, []).append(key)
        elif _targets(rule) and not any(key in known or "." not in key for key in _targets(rule)):
            place = (Effect.CHANGES, f"there is no {_targets(rule)[0]}")
            rows.setdefault(place, {}).setdefault(name, []).append(key)
    order = [Effect.BLOCKS, Effect.CHANGES, Effect.IGNORED]
    lines = ["| effect | reason | settings |", "| --- | --- | --- |"]
    for (effect, reason), found in sorted(rows.items(), key=lambda item: order.index(Effect(item[0][0]))):
        names = "; ".join(f"{name}: {_names(keys)}" for name, keys in found.items())
        lines.append(f"| {Effect(effect)} | {reason} | {names} |")
    return lines


def _targets(rule: Rule) -> tuple[str, ...]:
    if isinstance(rule, To):
        return (rule.key,)
    return rule.keys if isinstance(rule, Joined) else ()


def _names(keys: list[str]) -> str:
    """Return keys without repetitions: those of kohya's dataset configs are also options of the command line."""
    short = [re.sub(r"^(datasets\.\*\.subsets\.\*|datasets\.\*|general)\.", "", key) for key in keys]
    return ", ".join(f"`{key}`" for key in dict.fromkeys(short))


if __name__ == "__main__":
    PAGE.write_text(write(), encoding="utf-8")
