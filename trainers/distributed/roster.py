"""Decides which workers form the next process group of a run: a pure state machine without threads or sockets.

Workers (*members*) come and go while a run trains. A *generation* is one process group: an ordered list of members.
A member is **ready** when it waits for its next generation: at the start, after its group broke, or at a step boundary
at which all members agreed to regroup. A generation is formed when every living member of the one before is ready, and
it also takes in the members that have joined since. So nobody is left behind, and nobody waits for a dead member.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NO_STATE = -1  # the finished steps of a member that holds no training state


@dataclass
class Member:
    """One worker as the coordinator knows it. ``rank``: its number at the launcher, not its rank in a group."""

    name: str
    rank: int
    host: str
    port: int
    ready: bool = False
    done: int = NO_STATE  # finished optimizer steps of the state that it holds
    leaving: str = ""  # the reason why it leaves at the next step boundary
    since: float = 0.0  # when it joined


@dataclass(frozen=True)
class Generation:
    """One process group: its members in order of rank, the rank that holds the newest state, and why it was formed.

    ``source`` is None if no member holds a state: the run then starts from its newest checkpoint. ``done``: the
    finished steps of the newest state; ``stale``: some members hold an older one or none. ``broke``: the generation
    before did not end at a step boundary. ``lost``: its members that died or were cut off; ``left``: those that left
    by agreement.
    """

    number: int
    members: tuple[str, ...]
    host: str
    port: int
    source: int | None
    done: int
    cause: str
    broke: bool = False
    stale: bool = False
    joined: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Generation:
        """Return the generation that :meth:`to_dict` described."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()
        }
        return cls(**values)


@dataclass
class Roster:
    """The members of a run and its generations. Methods return the messages to send, as (member, message).

    ``expected``: the number of members to wait for at a start without state. After ``patience`` seconds a start with
    at least ``least`` members goes ahead.
    """

    expected: int
    least: int = 1
    patience: float = 60.0
    members: dict[str, Member] = field(default_factory=dict)
    current: Generation | None = None
    finished: bool = False
    facts: dict[str, Any] = field(
        default_factory=dict
    )  # what rank 0 decided at the start, for those that join
    lost: dict[str, str] = field(default_factory=dict)  # name -> why, of all members lost so far
    _departed: list[str] = field(default_factory=list)
    _lost_now: list[str] = field(default_factory=list)
    _aborted: bool = False  # members of the current generation were told to give up its collective operations
    _forming_since: float | None = None

    def join(self, member: Member, *, expected: int, now: float) -> list[tuple[str, dict[str, Any]]]:
        """Add a member; it is told whether it builds its parts alone, because a generation is training.

        ``expected``: the number of workers that the launcher has started with it.
        """
        member.since, self.expected = now, expected
        self.members[member.name] = member
        alone = self.current is not None and any(name in self.members for name in self.current.members)
        welcome = {"kind": "welcome", "alone": alone, "finished": self.finished, "facts": self.facts}
        return [(member.name, welcome)]

    def ready(self, name: str, *, done: int, broken: bool, now: float) -> list[tuple[str, dict[str, Any]]]:
        """Record that a member waits for its next generation, holding the state after ``done`` steps.

        ``broken``: a collective operation of its group failed.
        """
        member = self.members.get(name)
        if member is None:
            return []
        if self.finished:
            return [(name, {"kind": "finished"})]
        member.ready, member.done = True, done
        messages = self._abort() if broken and self._is_current(name) else []
        if not self._is_current(name) and self.current is not None:
            messages += self._ask_for_regroup()
        return messages + self.form(now=now)

    def leave(self, name: str, reason: str) -> list[tuple[str, dict[str, Any]]]:
        """Let a member leave at the next step boundary."""
        if name not in self.members:
            return []
        self.members[name].leaving = reason
        return self._ask_for_regroup()

    def remove(self, name: str, why: str, *, now: float) -> list[tuple[str, dict[str, Any]]]:
        """Remove a member that died, failed or is cut off; the others give up their collective operations with it."""
        member = self.members.pop(name, None)
        if member is None:
            return []
        why = f"worker {member.rank}: {why}"
        self.lost[name] = why
        messages: list[tuple[str, dict[str, Any]]] = [(name, {"kind": "lost", "why": why})]
        if self._is_current(name):
            self._lost_now.append(name)
            messages += self._abort()
        return messages + self.form(now=now)

    def complete(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """Remove a member that has completed the run; those that wait for a generation are told to end too."""
        self.members.pop(name, None)
        self.finished = True
        return [(other, {"kind": "finished"}) for other, one in self.members.items() if one.ready]

    def form(self, *, now: float) -> list[tuple[str, dict[str, Any]]]:
        """Form the next generation if it is time; return the messages that announce it."""
        if self.finished or not self._is_time(now):
            return []
        before = [name for name in (self.current.members if self.current else ()) if name in self.members]
        left = [name for name in before if self.members[name].leaving]
        # Members that hold a state come first and keep their order, so that rank 0 stays rank 0.
        waiting = sorted(self.members.values(), key=lambda one: (one.since, one.rank))
        joined = [one.name for one in waiting if one.ready and one.name not in before and not one.leaving]
        stay = [name for name in before if name not in left]
        names = stay + joined
        cause = self._cause(left, joined, stay)
        messages = [(name, {"kind": "left", "reason": self.members.pop(name).leaving}) for name in left]
        if not names:
            return messages
        if not stay:  # a start: in the launcher's order
            names.sort(key=lambda name: self.members[name].rank)
        done = max(self.members[name].done for name in names)
        source = next(number for number, name in enumerate(names) if self.members[name].done == done)
        first = self.members[names[0]]
        self.current = Generation(
            number=self.current.number + 1 if self.current else 1,
            members=tuple(names),
            host=first.host,
            port=first.port,
            source=None if done == NO_STATE else source,
            done=done,
            cause=cause,
            broke=self._aborted,
            stale=any(self.members[name].done != done for name in names),
            joined=tuple(joined),
            lost=tuple(self._lost_now),
            left=tuple(left),
        )
        self._lost_now, self._aborted, self._forming_since = [], False, None
        for name in names:
            self.members[name].ready = False
        announced = {"kind": "generation", **self.current.to_dict()}
        return messages + [(name, announced) for name in names]

    def _is_time(self, now: float) -> bool:
        """Return whether every living member of the current generation is ready, or a start has enough members."""
        before = [name for name in (self.current.members if self.current else ()) if name in self.members]
        if before:
            return all(self.members[name].ready for name in before)
        ready = [one for one in self.members.values() if one.ready and not one.leaving]
        if len(ready) >= self.expected:
            return True
        if not ready:
            self._forming_since = None
            return False
        if self._forming_since is None:
            self._forming_since = now
        everybody = all(one.ready for one in self.members.values())
        return everybody and len(ready) >= self.least and now - self._forming_since >= self.patience

    def _is_current(self, name: str) -> bool:
        return self.current is not None and name in self.current.members

    def _abort(self) -> list[tuple[str, dict[str, Any]]]:
        """Tell the members that still train to give up the current generation's collective operations, once."""
        assert self.current is not None
        self._aborted = True
        return [
            (name, {"kind": "abort", "generation": self.current.number})
            for name in self.current.members
            if name in self.members and not self.members[name].ready
        ]

    def _ask_for_regroup(self) -> list[tuple[str, dict[str, Any]]]:
        """Ask the members that train to regroup at the next step boundary."""
        if self.current is None:
            return []
        return [
            (name, {"kind": "regroup", "generation": self.current.number})
            for name in self.current.members
            if name in self.members and not self.members[name].ready
        ]

    def _cause(self, left: list[str], joined: list[str], stay: list[str]) -> str:
        if self._lost_now:
            return "; ".join(self.lost[name] for name in self._lost_now)
        if left:
            return "left: " + "; ".join(sorted({self.members[name].leaving for name in left}))
        if not stay:
            return "start"
        return f"{len(joined)} joined" if joined else "a connection broke"
