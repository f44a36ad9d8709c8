"""The interface of an importer, which translates the config of one other trainer, and the registry of importers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import ClassVar

from dreamfleet.datasets.errors import UserError
from dreamfleet.datasets.registry import Registry
from dreamfleet.trainers.imports.draft import Draft
from dreamfleet.trainers.imports.rules import Effect, Rule, Table, To, is_off
from dreamfleet.trainers.imports.secrets import is_secret
from dreamfleet.trainers.imports.settings import Document, Setting, Settings


class Importer:
    """Translates the settings of one program by tables; a subclass adds what depends on several settings.

    To add a program in another package, define a subclass and register it in :data:`IMPORTERS` or by an entry point
    ``NAME = package.module:Class`` in the group ``dreamfleet.importers``.
    """

    #: name in the registry and for --from
    name: ClassVar[str]
    #: human-readable name, and the version whose options the tables list
    title: ClassVar[str]
    version: ClassVar[str]
    #: kinds of documents that the program writes (json, toml, yaml, command)
    kinds: ClassVar[tuple[str, ...]] = ("json", "toml", "yaml", "command")
    #: what happens to each setting, by its key (nested keys are joined by dots, with ``*`` for positions in lists)
    rules: ClassVar[Table] = {}
    #: the same for keys that match a pattern (``flow_*``), where ``rules`` has no entry
    patterns: ClassVar[Table] = {}
    #: defaults of the program that change results, translated by the same rules where the config lacks the key
    defaults: ClassVar[Mapping[str, object]] = {}
    #: keys that no other program has; one of them suffices to recognise a config
    markers: ClassVar[frozenset[str]] = frozenset()
    #: scripts of pasted command lines -> method; "" for those that train something that does not exist here
    scripts: ClassVar[Mapping[str, str]] = {}
    #: keys whose values are files with more settings, which are read if they exist
    named_files: ClassVar[tuple[str, ...]] = ()
    #: pairs of settings that exclude each other, with the reason
    contradictions: ClassVar[Sequence[tuple[str, str, str]]] = ()

    def detect(self, document: Document) -> float:
        """Return how likely a document is this program's: above 1 if certain, below 0.5 if it is not."""
        if document.kind not in self.kinds:
            return 0.0
        if document.kind == "command" and document.script:
            return 3.0 if document.script in self.scripts else 0.0
        keys = Settings.of(self.flat(document)).found
        known = sum(self.find_rule(key) is not None for key in keys)
        marked = not self.markers.isdisjoint(keys)
        share = known / max(len(keys), 1)
        return share + marked if marked or known >= 3 else 0.0

    def flat(self, document: Document) -> object:
        """Return the content of a document, in which the keys of the tables are looked up."""
        return document.content

    def read(self, documents: Sequence[Document]) -> Settings:
        """Return the settings of the files given, which are together one config."""
        settings = Settings()
        for document in documents:
            settings.merge(Settings.of(self.flat(document)))
        return settings

    def method(self, settings: Settings, documents: Sequence[Document]) -> str:
        """Return the recipe's method that does what the config does. Raises UserError if there is none."""
        raise NotImplementedError

    def defaults_for(self, settings: Settings) -> Mapping[str, object]:
        """Return the program's defaults for this config."""
        return self.defaults

    def finish(self, settings: Settings, draft: Draft) -> None:
        """Translate the settings that depend on each other (rules of kind ``Joined``)."""

    def find_rule(self, key: str) -> Rule | None:
        """Return the rule of a general key, None for an unknown one."""
        if key in self.rules:
            return self.rules[key]
        return next((rule for pattern, rule in self.patterns.items() if fnmatch.fnmatch(key, pattern)), None)

    def translate(self, settings: Settings, draft: Draft) -> None:
        """Fill a draft: every setting by its rule, then the program's defaults, then :meth:`finish`."""
        for one, other, reason in self.contradictions:
            if not is_off(settings.get(one), (False, 0)) and not is_off(settings.get(other), (False, 0)):
                draft.conflicts.append(f"{one} and {other}: {reason}; keep one")
        draft.check()
        for key, items in settings.items():
            self._apply(key, items, draft)
        for key, value in self.defaults_for(settings).items():
            if not settings.has(key) and (rule := self.find_rule(key)):
                draft.apply(rule, key, Setting(key, value), is_default=True)
        self.finish(settings, draft)
        draft.check()

    def _apply(self, key: str, items: Sequence[Setting], draft: Draft) -> None:
        rule = self.find_rule(key)
        for item in items:
            if is_secret(key.rpartition(".")[2], item.value):
                draft.leave(item.where, item.value, Effect.IGNORED, "")
            elif rule is None and not is_off(item.value, ()):
                near = difflib.get_close_matches(key, self.rules, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                reason = f"unknown key: {self.title} of {self.version} has none of this name{hint}"
                draft.leave(item.where, item.value, Effect.CHANGES, reason)
            elif isinstance(rule, To) and "*" in key and item.value != items[0].value:
                reason = (
                    f"holds for all folders of a recipe; that of {items[0].where} is used: {items[0].value}"
                )
                draft.leave(item.where, item.value, Effect.CHANGES, reason)
            elif rule is not None:
                draft.apply(rule, key, item)


def find_problem(name: str, entry: type[Importer]) -> str | None:
    """Return a description of what an importer lacks, None if it is complete."""
    if not (isinstance(entry, type) and issubclass(entry, Importer)):
        return "it must be a subclass of Importer"
    missing = [part for part in ("name", "title", "version", "rules") if not getattr(entry, part, None)]
    return f"{entry.__name__} does not set {missing[0]}" if missing else None


_PROGRAMS = "dreamfleet.trainers.imports.programs"

IMPORTERS: Registry[type[Importer]] = Registry(
    "importer",
    group="dreamfleet.importers",
    builtin={
        "kohya": f"{_PROGRAMS}.kohya:Kohya",
        "kohya-gui": f"{_PROGRAMS}.kohya_gui:KohyaGui",
        "onetrainer": f"{_PROGRAMS}.onetrainer:OneTrainer",
        "simpletuner": f"{_PROGRAMS}.simpletuner:SimpleTuner",
        "ai-toolkit": f"{_PROGRAMS}.ai_toolkit:AiToolkit",
        "diffusers": f"{_PROGRAMS}.diffusers_scripts:DiffusersScripts",
        "webui": f"{_PROGRAMS}.webui:WebUI",
    },
    find_problem=find_problem,
)


def find_importer(documents: Sequence[Document], program: str | None = None) -> type[Importer]:
    """Return the importer of the program that wrote the documents, or the named one.

    Raises UserError if no program is likely, with the nearest one.
    """
    if program is not None:
        return IMPORTERS.get(program)
    scores = {
        name: max(entry().detect(document) for document in documents) for name, entry in IMPORTERS.items()
    }
    best = max(scores, key=lambda name: scores[name])
    if scores[best] >= 0.5:
        return IMPORTERS.get(best)
    names = ", ".join(document.path for document in documents)
    hint = f"; the most similar is {best}, with {scores[best]:.0%} of its keys" if scores[best] else ""
    raise UserError(
        f"{names}: no config of a known trainer (known: {', '.join(scores)}){hint}. Name the program with --from, or "
        "give the file that the trainer itself reads"
    )
