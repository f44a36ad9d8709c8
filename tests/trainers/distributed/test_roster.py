"""Which workers form the next group, decided without sockets."""

from __future__ import annotations

from typing import Any

from dreamfleet.trainers.distributed.roster import NO_STATE, Generation, Member, Roster


def joined(roster: Roster, *ranks: int, now: float = 0.0) -> list[dict[str, Any]]:
    return [
        roster.join(
            Member(str(rank), rank, f"host-{rank}", 7000 + rank),
            expected=roster.expected,
            now=now + rank / 100,
        )[0][1]
        for rank in ranks
    ]


def started(num: int, **options: Any) -> Roster:
    roster = Roster(num, **options)
    joined(roster, *range(num))
    for rank in range(num):
        roster.ready(str(rank), done=NO_STATE, broken=False, now=1)
    assert roster.current is not None
    return roster


def test_a_start_waits_for_all_and_orders_them_by_rank() -> None:
    roster = Roster(3)
    joined(roster, 2, 0, 1)
    assert roster.ready("2", done=NO_STATE, broken=False, now=1) == []
    assert roster.ready("0", done=NO_STATE, broken=False, now=1) == []
    messages = roster.ready("1", done=NO_STATE, broken=False, now=1)
    assert {name for name, _ in messages} == {"0", "1", "2"}
    assert roster.current is not None
    assert roster.current.members == ("0", "1", "2")
    assert roster.current.source is None
    assert (roster.current.host, roster.current.port) == ("host-0", 7000)


def test_a_start_with_fewer_waits_for_the_patience() -> None:
    roster = Roster(3, least=2, patience=30)
    joined(roster, 0, 1)
    for name in "01":
        roster.ready(name, done=NO_STATE, broken=False, now=0)
    assert roster.form(now=29) == []
    assert roster.form(now=31)
    assert roster.current is not None and len(roster.current.members) == 2


def test_survivors_are_aborted_and_continue_with_the_newest_state() -> None:
    roster = started(3)
    told = roster.remove("0", "its process ended", now=2)
    assert [(name, message["kind"]) for name, message in told] == [
        ("0", "lost"),
        ("1", "abort"),
        ("2", "abort"),
    ]
    roster.ready("1", done=4, broken=True, now=2)
    assert roster.current is not None and roster.current.number == 1
    roster.ready("2", done=5, broken=True, now=2)
    found = roster.current
    assert (found.members, found.source, found.done, found.host) == (("1", "2"), 1, 5, "host-1")
    assert found.broke and found.stale and found.lost == ("0",)


def test_a_broken_connection_without_a_death_aborts_the_others() -> None:
    roster = started(2)
    assert roster.ready("0", done=4, broken=True, now=2) == [("1", {"kind": "abort", "generation": 1})]
    roster.ready("1", done=4, broken=True, now=2)
    assert roster.current is not None and roster.current.members == ("0", "1")


def test_a_joiner_builds_alone_and_is_taken_in_at_a_step_boundary() -> None:
    roster = started(2)
    roster.remove("0", "its process ended", now=2)
    roster.ready("1", done=4, broken=True, now=2)
    assert joined(roster, 9)[0]["alone"]
    told = roster.ready("9", done=NO_STATE, broken=False, now=5)
    assert told == [("1", {"kind": "regroup", "generation": 2})]
    roster.ready("1", done=7, broken=False, now=6)
    found = roster.current
    assert found is not None and found.members == ("1", "9")
    assert (found.source, found.stale, found.broke) == (0, True, False)


def test_a_member_leaves_by_agreement() -> None:
    roster = started(2)
    assert {name for name, _ in roster.leave("0", "preemption")} == {"0", "1"}
    roster.ready("0", done=3, broken=False, now=2)
    told = dict(roster.ready("1", done=3, broken=False, now=2))
    assert told["0"] == {"kind": "left", "reason": "preemption"}
    assert roster.current is not None and roster.current.left == ("0",) and not roster.current.stale


def test_after_all_died_a_start_waits_for_all_again() -> None:
    roster = started(2)
    for name in "01":
        roster.remove(name, "its process ended", now=2)
    for welcome in joined(roster, 10, 11):
        assert not welcome["alone"]
    roster.ready("10", done=NO_STATE, broken=False, now=3)
    assert roster.current is not None and roster.current.number == 1
    roster.ready("11", done=NO_STATE, broken=False, now=3)
    assert roster.current.number == 2 and roster.current.source is None


def test_those_that_wait_end_with_the_run() -> None:
    roster = started(2)
    joined(roster, 5)
    roster.ready("5", done=NO_STATE, broken=False, now=2)
    assert ("5", {"kind": "finished"}) in roster.complete("0")
    assert roster.ready("1", done=9, broken=True, now=3) == [("1", {"kind": "finished"})]
    assert joined(roster, 6)[0]["finished"]


def test_generations_survive_json() -> None:
    found = started(2).current
    assert found is not None
    assert Generation.from_dict({**found.to_dict(), "members": list(found.members)}) == found
