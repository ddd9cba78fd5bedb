"""Deliberate bugs, switched on one at a time: each must make its check fail, or the check is worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import forwarder_checks as checks
import pytest
import sabotages
from forwarder_checks import CHECKS, Place

from zmqbus import NotDurable

CASES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Place], None]]] = [
    (sabotages.ack_before_sync, checks.nobody_is_told_before_the_sync),
    (sabotages.ack_before_sync, checks.the_outbox_says_durable_when_it_is),
    (sabotages.ack_on_arrival, checks.nobody_is_told_before_the_sync),
    (sabotages.waiters_told_of_a_lower_seq, checks.who_waits_is_told_of_its_own_message),
    (sabotages.acks_given_once, checks.a_lost_acknowledgement_is_given_again),
    (sabotages.one_ack_is_enough, checks.as_many_forwarders_as_are_wanted_have_it),
    (sabotages.dedup_forgotten_on_restart, checks.a_stream_goes_on_after_a_restart),
    (sabotages.holes_journaled, checks.what_follows_a_hole_waits_for_it),
    (sabotages.impatient, checks.a_publisher_that_does_not_answer_is_waited_for),
    (sabotages.history_evicts_what_is_not_acknowledged, checks.what_is_not_acknowledged_stays_in_the_history),
    (sabotages.readers_not_held_back, checks.only_what_is_on_disk_is_read),
    (sabotages.committed_ahead_of_consumption, checks.what_a_consumer_has_in_hand_comes_again),
    (sabotages.committed_with_what_is_in_hand, checks.what_a_consumer_has_in_hand_comes_again),
    (sabotages.commit_confirmed_at_once, checks.a_commit_is_confirmed_when_it_is_on_disk),
    (sabotages.stale_commits_accepted, checks.who_has_been_taken_over_commits_nothing),
    (sabotages.commits_taken_back, checks.a_reader_takes_no_commit_back),
    (sabotages.cursor_ignored, checks.a_reading_begins_at_its_cursor),
    (sabotages.outbox_trimmed_before_delivery, checks.the_outbox_keeps_what_is_not_delivered),
    (sabotages.outbox_begins_at_its_end, checks.the_outbox_keeps_what_is_not_delivered),
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_passes(check: Callable[[Place], None], tmp_path: Path) -> None:
    check(Place(tmp_path))


@pytest.mark.parametrize(("sabotage", "check"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_sabotage_is_caught(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Place], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    monkeypatch.setattr(checks, "NEVER", 5.0)  # a bug has the time to show, which it mostly does at once
    with pytest.raises((AssertionError, NotDurable, pytest.fail.Exception)):
        check(Place(tmp_path))
