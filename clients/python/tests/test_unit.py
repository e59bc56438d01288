"""Unit tests, without a server."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone

import pytest

from streamer import BrokenLog, ErrorCode, Failure, OutputCollector, RawJson, Worker, events
from streamer._backoff import Backoff
from streamer._limits import Limits
from streamer._proto import common_pb2, worker_pb2
from streamer._websocket import rawjson
from streamer._worker.report_queue import ReportQueue
from streamer.model import OutputSummary
from streamer.output import LogVerifier

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def progress(message: str) -> common_pb2.Progress:
    return common_pb2.Progress(message=message)


def drain(log: ReportQueue, limits: Limits | None = None) -> list[tuple[str | None, int]]:
    """Returns the kind and number of every report that can be sent."""
    sent: list[tuple[str | None, int]] = []
    while (report := log.next_unsent(limits)) is not None:
        sent.append((report.WhichOneof("kind"), report.number))
    return sent


def test_reports_are_numbered_and_sent_in_order() -> None:
    log = ReportQueue("U", 1)
    log.add_checkpoint(b"0")
    log.add_progress(progress("a"))
    log.add_output(common_pb2.Payload(data=b"b"))
    log.add_checkpoint(b"2")
    log.add_keep_alive()
    log.add_progress(progress("c"))
    log.finish(result=b"{}")
    # The second checkpoint replaced the first one before it was sent.
    assert drain(log) == [
        ("progress", 1),
        ("output", 2),
        ("checkpoint", 2),
        ("progress", 3),
        ("result", 3),
    ]


def test_reports_that_are_not_durable_are_sent_again() -> None:
    log = ReportQueue("U", 1)
    for message in "abcd":
        log.add_progress(progress(message))
    log.add_checkpoint(b"4")
    log.finish(error=common_pb2.Error(message="no"))
    drain(log)
    log.acknowledge(1)
    log.resume(2)
    assert drain(log) == [("progress", 3), ("progress", 4), ("checkpoint", 4), ("error", 4)]
    # A checkpoint with exactly that number is also sent again.
    log.resume(4)
    assert drain(log) == [("checkpoint", 4), ("error", 4)]


def test_a_checkpoint_before_the_last_durable_report_is_removed() -> None:
    log = ReportQueue("U", 1)
    log.add_progress(progress("a"))
    log.add_checkpoint(b"1")
    log.add_progress(progress("b"))
    drain(log)
    log.resume(2)
    assert drain(log) == []


def test_unacknowledged_reports_are_bounded_in_number_and_bytes() -> None:
    limits = Limits(max_unacknowledged=2, max_unacknowledged_bytes=10)
    log = ReportQueue("U", 1)
    log.add_output(common_pb2.Payload(data=b"123456789"))
    assert log.has_room(limits)
    log.add_output(common_pb2.Payload(data=b"1"))
    assert not log.has_room(limits)
    log.acknowledge(1)
    assert log.has_room(limits)
    log.add_progress(progress("more than ten bytes"))
    log.acknowledge(2)
    assert not log.has_room(limits)


def test_the_send_window_follows_a_server_with_smaller_limits() -> None:
    log = ReportQueue("U", 1)
    for message in ("a", "b", "c", "d", "much longer", "e"):
        log.add_progress(progress(message))
    log.finish(result=b"{}")
    drain(log)
    # The server was restarted with smaller limits.
    log.resume(1)
    limits = Limits(max_unacknowledged=2, max_unacknowledged_bytes=10)
    assert drain(log, limits) == [("progress", 2), ("progress", 3)]
    log.acknowledge(2)
    assert drain(log, limits) == [("progress", 4)]
    log.acknowledge(4)
    assert drain(log, limits) == [("progress", 5)]
    log.acknowledge(5)
    assert drain(log, limits) == [("progress", 6), ("result", 6)]


def test_dropped_reports_are_sent_again_from_the_first_one() -> None:
    log = ReportQueue("U", 1)
    for message in ("a", "b", "c"):
        log.add_progress(progress(message))
        if message == "b":
            log.add_checkpoint(b"1")
    log.finish(result=b"{}")
    drain(log)
    log.resend(2, 1)
    report = log.next_unsent()
    assert report is not None and report.resends == 1
    assert drain(log) == [("progress", 3), ("result", 3)]
    log.resend(1, 2)
    assert drain(log) == [("progress", 2), ("checkpoint", 2), ("progress", 3), ("result", 3)]
    log.resume(2)
    report = log.next_unsent()
    assert report is not None and (report.checkpoint, report.resends) == (b"1", 0)


def test_dropped_reports_free_the_send_window() -> None:
    limits = Limits(max_unacknowledged=2, max_unacknowledged_bytes=10)
    log = ReportQueue("U", 1)
    for message in ("a", "b", "c"):
        log.add_progress(progress(message))
    assert drain(log, limits) == [("progress", 1), ("progress", 2)]
    log.resend(1, 1)
    assert drain(log, limits) == [("progress", 2)]
    log.acknowledge(1)
    assert drain(log, limits) == [("progress", 3)]


def test_limits_missing_in_welcome_have_defaults() -> None:
    assert Limits.of(worker_pb2.Welcome(max_unacknowledged=5)) == Limits(max_unacknowledged=5)
    assert Limits().max_unacknowledged_bytes == 1024 * 1024


def output(seq: int, attempt: int, data: bytes) -> events.Output:
    return events.Output(seq, attempt, NOW, data, "text/plain", 0)


def retrying(seq: int, attempt: int, rewind: int) -> events.Retrying:
    failure = Failure(ErrorCode.PROCESSING_FAILED, "no", True)
    return events.Retrying(seq, attempt, NOW, NOW, rewind, failure)


def succeeded(seq: int, chunks: int, data: bytes) -> events.Succeeded:
    summary = OutputSummary(chunks, hashlib.sha256(data).digest())
    return events.Succeeded(seq, 2, NOW, None, summary)


def log_with_a_retry(last: events.Event) -> list[events.Event]:
    return [
        events.Started(1, 1, NOW, "w"),
        output(2, 1, b"a"),
        output(3, 1, b"b"),
        retrying(4, 1, 1),
        output(5, 2, b"c"),
        last,
    ]


def test_the_output_is_verified_after_every_rewind() -> None:
    verifier, collector = LogVerifier(), OutputCollector()
    for event in log_with_a_retry(succeeded(6, 1, b"c")):
        verifier.apply(event)
        collector.apply(event)
    assert collector.data == b"c"


@pytest.mark.parametrize(
    "last", [succeeded(6, 1, b"x"), succeeded(6, 2, b"c"), succeeded(7, 1, b"c")]
)
def test_an_incomplete_log_raises_broken_log(last: events.Event) -> None:
    verifier = LogVerifier()
    with pytest.raises(BrokenLog):
        for event in log_with_a_retry(last):
            verifier.apply(event)


def test_members_keep_their_source_text() -> None:
    text = ' { "a" : 1.50 , "b":{ "c": [1, 2] },"d":"\\u00e9}", "e":null } '
    found = rawjson.members(text)
    texts = {name: member.text for name, member in found.items()}
    assert texts == {"a": " 1.50 ", "b": '{ "c": [1, 2] }', "d": '"\\u00e9}"', "e": "null "}
    assert (found["d"].value, found["e"].value) == ("é}", None)
    assert rawjson.members("{ }") == {}
    for broken in (
        "",
        "[]",
        "{",
        '{"a"}',
        '{"a":1',
        '{"a":1,}',
        "{1:2}",
        '{"a":}',
        '{"a": ,"b":1}',
    ):
        with pytest.raises(ValueError):
            rawjson.members(broken)


def test_raw_json_must_be_json() -> None:
    assert RawJson(b" [1] ").data == b" [1] "
    for broken in (b"", b"{", b"NaN"):
        with pytest.raises(ValueError):
            RawJson(broken)


def test_delays_are_drawn_below_a_bound_that_doubles() -> None:
    backoff = Backoff(0.1, 10.0)
    for bound in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0):
        assert 0 <= backoff.next() <= bound
    backoff.reset()
    assert backoff.next() <= 0.1


def test_invalid_declarations_raise() -> None:
    worker = Worker("http://127.0.0.1:1", "token")

    async def handler(context: object, payload: object) -> None:
        pass

    def plain(context: object, payload: object) -> None:
        pass

    worker.action("once")(handler)
    for name in ("once", "Upper", ""):
        with pytest.raises(ValueError):
            worker.action(name)(handler)
    with pytest.raises(ValueError):
        worker.action("timed", start_to_close=0)(handler)
    with pytest.raises(ValueError, match="max_attempts: must be at least 1"):
        worker.action("never", max_attempts=0)(handler)
    with pytest.raises(ValueError):
        worker.action("final", final_errors=["NO_SUCH_CODE"])
    with pytest.raises(TypeError):
        worker.action("plain")(plain)  # type: ignore[type-var]
    for server, slots in (("http://127.0.0.1:1", 0), ("ftp://127.0.0.1:1", 1), ("", 1)):
        with pytest.raises(ValueError):
            Worker(server, "token", slots=slots)
