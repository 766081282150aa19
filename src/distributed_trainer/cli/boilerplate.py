# SPDX-License-Identifier: Apache-2.0
"""Leave out the lines that mpirun prints after a rank's traceback, so that the exception's own line is the last."""

from __future__ import annotations

import re
import time

HOLD_SECONDS = 0.1  # mpirun writes the lines of a block within a millisecond
_HOLD_BYTES = 1000  # longer than any block that is left out
_EXPLAINED_SECONDS = 30  # so long after an exception mpirun's lines are about its consequences

# Words of a rank that an exception ends. Python prints no traceback for a script that it can't parse or find.
_EXPLANATION = re.compile(
    rb"Traceback \(most recent call last\):|(?:Syntax|Indentation|Tab)Error: |: No module named "
    rb"|rank \d+ of \d+ on \S+ was interrupted"
)
_EXPLANATION_BYTES = 120  # longer than any of them

# Open MPI 4 and 5 break these lines at different words. The exit code of an exception is 1, of an interrupt 130.
_BLOCKS = (
    rb"MPI_ABORT was invoked on rank \d+ in communicator .{1,60} (?:Proc: \S+ Errorcode: |with errorcode )(?:1|130)\.? "
    rb"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes\. You may or may not see output from other "
    rb"processes, depending on exactly when Open MPI kills them\.",
    rb'\S+ has exited due to process rank \d+ with PID \d+ on node \S+ calling "abort"\. This may have caused other '
    rb"processes in the application to be terminated by signals sent by \S+ \(as reported here\)\.",
    rb"\S+ detected that one or more processes exited with non-zero status, thus causing the job to be terminated\. "
    rb"The first process to do so was: Process name: \S+ Exit code: 1",
    rb"Primary job terminated normally, but \d+ process(?:es)? returned a non-zero exit code\. Per user-direction, the "
    rb"job has been aborted\.",
)
_TAG = rb"(?:\[\d+,\d+\]<stderr>: ?)?"  # from --tag-output
_RULE = _TAG + rb"-{74}\n"
_WORDS = b"|".join(_BLOCKS).replace(b" ", rb"(?:\s" + _TAG + rb")+")
_MPICH_TAG = rb"(?:\[\d+\] )?"  # from -prepend-rank
_MPICH = (
    rb"Abort\((?:1|130)\) on node \d+ \(rank \d+ in comm \d+\): "
    rb"application called MPI_Abort\(.{1,60}, (?:1|130)\) - process \d+\n"
)
_BOILERPLATE = re.compile(
    _RULE + _TAG + b"(?:" + _WORDS + rb")\n" + _RULE
    + rb"|\A" + _TAG + rb"\0\Z"  # Open MPI 5 writes the end of a string, too
    + b"|" + _MPICH_TAG + _MPICH
)  # fmt: skip
_BEGINNING = re.compile(_RULE + b"|" + _MPICH_TAG + rb"Abort\(|\[\d+\] \Z")


class Boilerplate:
    """Filter for the bytes of mpirun's stderr, which are those of all ranks and mpirun's own.

    Bytes pass at once. After an exception only, bytes from what may be the beginning of boilerplate are held until more
    come, for `HOLD_SECONDS` at most: see `is_holding`. What is not exactly boilerplate passes: mpirun's words about a
    rank that was killed, or has ended without a traceback, are often the only ones.
    """

    def __init__(self) -> None:
        self._held = b""
        self._recent = b""
        self._explained_at = -float("inf")

    @property
    def is_holding(self) -> bool:
        """Whether bytes are held. If no more come within `HOLD_SECONDS`, call `flush`."""
        return bool(self._held)

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to show after `data` has come."""
        now = time.monotonic()
        self._recent += data
        if _EXPLANATION.search(self._recent):
            self._explained_at = now
        self._recent = self._recent[-_EXPLANATION_BYTES:]
        if now > self._explained_at + _EXPLAINED_SECONDS:
            return self.flush() + data
        text = _BOILERPLATE.sub(b"", self._held + data)
        beginning = _BEGINNING.search(text)
        shown = len(text) if beginning is None or len(text) > beginning.start() + _HOLD_BYTES else beginning.start()
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> bytes:
        """Return the bytes that are held."""
        held, self._held = self._held, b""
        return held
