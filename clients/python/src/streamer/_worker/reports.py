"""The reports of one attempt: numbered, kept until durable, sent in order, sent again after a
stream was lost. No I/O. The numbers in brackets are rules of docs/worker-protocol.md."""

from __future__ import annotations

from streamer._limits import Limits
from streamer._proto import common_pb2, worker_pb2


class ReportLog:
    """What one attempt has reported and may have to send (again)."""

    def __init__(self, uid: str, attempt: int) -> None:
        self._uid = uid
        self._attempt = attempt
        # Progress and output reports that are not acknowledged, by number, with their bytes.
        self._numbered: dict[int, tuple[worker_pb2.Report, int]] = {}
        self._bytes = 0
        # Of those, the bytes of the ones that were sent on the stream of now.
        self._sent_bytes = 0
        # Numbers of the last report made, the last one that is durable, and the last one sent on
        # the stream of now.
        self._made = 0
        self._durable = 0
        self._sent = 0
        # Only the latest checkpoint counts [14].
        self._checkpoint: worker_pb2.Report | None = None
        self._checkpoint_sent = False
        self._keep_alive = False
        self._final: worker_pb2.Report | None = None
        self._final_sent = False
        # How often the server asked for dropped reports on the stream of now.
        self._resends = 0

    @property
    def finished(self) -> bool:
        """Whether the last report has been made."""
        return self._final is not None

    def has_room(self, limits: Limits) -> bool:
        """Whether another progress or output report may be made [12]."""
        few = len(self._numbered) < limits.max_unacknowledged
        return few and self._bytes < limits.max_unacknowledged_bytes

    def add_progress(self, progress: common_pb2.Progress) -> None:
        """Makes a progress report."""
        size = len(progress.message.encode()) + len(progress.metadata.data)
        self._add(self._report(self._made + 1, progress=progress), size)

    def add_output(self, chunk: common_pb2.Payload) -> None:
        """Makes an output report."""
        self._add(self._report(self._made + 1, output=chunk), len(chunk.data))

    def add_checkpoint(self, data: bytes) -> None:
        """Leaves a checkpoint in place of the one before."""
        self._checkpoint = self._report(self._made, checkpoint=data)
        self._checkpoint_sent = False

    def add_keep_alive(self) -> None:
        """Says that the handler lives; several that wait are one."""
        self._keep_alive = True

    def finish(
        self,
        *,
        result: bytes | None = None,
        error: common_pb2.Error | None = None,
        release: worker_pb2.Release | None = None,
    ) -> None:
        """Makes the last report [13]: exactly one of the three."""
        payload = None if result is None else common_pb2.Payload(data=result)
        self._final = self._report(self._made, result=payload, error=error, release=release)

    def next_unsent(self, limits: Limits | None = None) -> worker_pb2.Report | None:
        """The next report to send on the stream of now, in order [11]; no more of them than the
        server takes before it acknowledges some [12]."""
        report = self._next_unsent(limits)
        if report is not None:
            report.resends = self._resends
        return report

    def _next_unsent(self, limits: Limits | None) -> worker_pb2.Report | None:
        checkpoint = None if self._checkpoint_sent else self._checkpoint
        if checkpoint is not None and checkpoint.number <= self._sent:
            self._checkpoint_sent = True
            return checkpoint
        if self._sent < self._made:
            if limits is not None and not self._has_window(limits):
                return None
            self._sent += 1
            self._sent_bytes += self._numbered[self._sent][1]
            return self._numbered[self._sent][0]
        if self._keep_alive and not self.finished:
            self._keep_alive = False
            return self._report(self._made, keep_alive=worker_pb2.KeepAlive())
        if self._final is not None and not self._final_sent:
            self._final_sent = True
            return self._final
        return None

    def acknowledge(self, number: int) -> None:
        """Reports up to `number` are durable; so are checkpoints that stand before it."""
        for durable in range(self._durable + 1, min(number, self._made) + 1):
            size = self._numbered.pop(durable)[1]
            self._bytes -= size
            if durable <= self._sent:
                self._sent_bytes -= size
            self._durable = durable
        self._sent = max(self._sent, self._durable)
        if self._checkpoint is not None and self._checkpoint.number < self._durable:
            self._checkpoint = None

    def resume(self, number: int) -> None:
        """A new stream goes on after `number`: what was made after it is sent (again) [18]."""
        self.acknowledge(number)
        self._sent = self._durable
        self._sent_bytes = 0
        self._checkpoint_sent = False
        self._final_sent = False
        self._resends = 0

    def resend(self, number: int, resends: int) -> None:
        """The server has dropped what was sent after `number`: it is sent again [13]."""
        self._resends = resends
        self._sent = max(self._durable, min(self._sent, number))
        sent = range(self._durable + 1, self._sent + 1)
        self._sent_bytes = sum(self._numbered[one][1] for one in sent)
        if self._checkpoint is not None and self._checkpoint.number >= number:
            self._checkpoint_sent = False
        self._final_sent = False

    def _has_window(self, limits: Limits) -> bool:
        few = self._sent - self._durable < limits.max_unacknowledged
        return few and self._sent_bytes < limits.max_unacknowledged_bytes

    def _add(self, report: worker_pb2.Report, size: int) -> None:
        self._made += 1
        self._numbered[self._made] = (report, size)
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
