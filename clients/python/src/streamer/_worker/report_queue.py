"""Queue of the reports of one attempt, which are numbered, kept until they are durable, sent in
order, and sent again on a new stream. No I/O. Numbers in brackets are rules of
docs/worker-protocol.md."""

from __future__ import annotations

from streamer._limits import Limits
from streamer._proto import common_pb2, worker_pb2


class ReportQueue:
    """Queues the reports of one attempt until they are known to be durable."""

    def __init__(self, uid: str, attempt: int) -> None:
        self._uid = uid
        self._attempt = attempt
        # Unacknowledged progress and output reports by number, with their size in bytes.
        self._unacknowledged: dict[int, tuple[worker_pb2.Report, int]] = {}
        # Total size of the unacknowledged reports, in bytes.
        self._bytes = 0
        # Total size of the unacknowledged reports sent on the current stream, in bytes.
        self._sent_bytes = 0
        # Number of the last progress or output report created.
        self._created = 0
        # Number of the last durable report.
        self._durable = 0
        # Number of the last report sent on the current stream.
        self._sent = 0
        # Latest checkpoint; earlier ones are not kept [14].
        self._checkpoint: worker_pb2.Report | None = None
        self._checkpoint_sent = False
        self._keep_alive = False
        self._final: worker_pb2.Report | None = None
        self._final_sent = False
        # Number of `resend` messages for this attempt on the current stream.
        self._resends = 0

    @property
    def finished(self) -> bool:
        """Whether the final report has been created."""
        return self._final is not None

    def has_room(self, limits: Limits) -> bool:
        """Returns whether the limits allow another progress or output report [12]."""
        has_slot = len(self._unacknowledged) < limits.max_unacknowledged
        return has_slot and self._bytes < limits.max_unacknowledged_bytes

    def add_progress(self, progress: common_pb2.Progress) -> None:
        """Adds a progress report."""
        size = len(progress.message.encode()) + len(progress.metadata.data)
        self._add(self._report(self._created + 1, progress=progress), size)

    def add_output(self, chunk: common_pb2.Payload) -> None:
        """Adds an output report."""
        self._add(self._report(self._created + 1, output=chunk), len(chunk.data))

    def add_checkpoint(self, data: bytes) -> None:
        """Adds a checkpoint, which replaces the previous one."""
        self._checkpoint = self._report(self._created, checkpoint=data)
        self._checkpoint_sent = False

    def add_keep_alive(self) -> None:
        """Adds a keep-alive; pending ones are merged into one."""
        self._keep_alive = True

    def finish(
        self,
        *,
        result: bytes | None = None,
        error: common_pb2.Error | None = None,
        release: worker_pb2.Release | None = None,
    ) -> None:
        """Adds the final report [13]. Pass exactly one of the three arguments."""
        payload = None if result is None else common_pb2.Payload(data=result)
        self._final = self._report(self._created, result=payload, error=error, release=release)

    def next_unsent(self, limits: Limits | None = None) -> worker_pb2.Report | None:
        """Returns the next report to send on the current stream, in order [11]; None if all reports
        were sent or the send window is full [12]."""
        report = self._next_unsent(limits)
        if report is not None:
            report.resends = self._resends
        return report

    def _next_unsent(self, limits: Limits | None) -> worker_pb2.Report | None:
        checkpoint = None if self._checkpoint_sent else self._checkpoint
        if checkpoint is not None and checkpoint.number <= self._sent:
            self._checkpoint_sent = True
            return checkpoint
        if self._sent < self._created:
            if limits is not None and not self._has_window(limits):
                return None
            self._sent += 1
            self._sent_bytes += self._unacknowledged[self._sent][1]
            return self._unacknowledged[self._sent][0]
        if self._keep_alive and not self.finished:
            self._keep_alive = False
            return self._report(self._created, keep_alive=worker_pb2.KeepAlive())
        if self._final is not None and not self._final_sent:
            self._final_sent = True
            return self._final
        return None

    def acknowledge(self, number: int) -> None:
        """Removes the reports up to `number`, and a checkpoint before it, which are durable."""
        for durable in range(self._durable + 1, min(number, self._created) + 1):
            size = self._unacknowledged.pop(durable)[1]
            self._bytes -= size
            if durable <= self._sent:
                self._sent_bytes -= size
            self._durable = durable
        self._sent = max(self._sent, self._durable)
        if self._checkpoint is not None and self._checkpoint.number < self._durable:
            self._checkpoint = None

    def resume(self, number: int) -> None:
        """Handles a new stream, on which the reports after report `number` are sent [18]."""
        self.acknowledge(number)
        self._sent = self._durable
        self._sent_bytes = 0
        self._checkpoint_sent = False
        self._final_sent = False
        self._resends = 0

    def resend(self, number: int, resends: int) -> None:
        """Resends the reports after report `number`, which the server dropped [12]. `resends` is
        the number of `resend` messages on the current stream."""
        self._resends = resends
        self._sent = max(self._durable, min(self._sent, number))
        sent = range(self._durable + 1, self._sent + 1)
        self._sent_bytes = sum(self._unacknowledged[one][1] for one in sent)
        if self._checkpoint is not None and self._checkpoint.number >= number:
            self._checkpoint_sent = False
        self._final_sent = False

    def _has_window(self, limits: Limits) -> bool:
        has_slot = self._sent - self._durable < limits.max_unacknowledged
        return has_slot and self._sent_bytes < limits.max_unacknowledged_bytes

    def _add(self, report: worker_pb2.Report, size: int) -> None:
        self._created += 1
        self._unacknowledged[self._created] = (report, size)
        self._bytes += size

    def _report(
        self,
        number: int,
        *,
        progress: common_pb2.Progress | None = None,
        output: common_pb2.Payload | None = None,
        checkpoint: bytes | None = None,
        result: common_pb2.Payload | None = None,
        error: common_pb2.Error | None = None,
        release: worker_pb2.Release | None = None,
        keep_alive: worker_pb2.KeepAlive | None = None,
    ) -> worker_pb2.Report:
        return worker_pb2.Report(
            uid=self._uid,
            attempt=self._attempt,
            number=number,
            progress=progress,
            output=output,
            checkpoint=checkpoint,
            result=result,
            error=error,
            release=release,
            keep_alive=keep_alive,
        )
