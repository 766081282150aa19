# SPDX-License-Identifier: Apache-2.0
"""Lines of mpirun that `distributed-trainer run` leaves out after an exception, as the MPIs have printed them."""

import pytest

from distributed_trainer.cli import boilerplate
from distributed_trainer.cli.boilerplate import Boilerplate

TRACEBACK = """rank 1 of 2 on node1 failed:
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    1 / 0
ZeroDivisionError: division by zero
"""
RULE = "-" * 74 + "\n"
NOTE = """
NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
You may or may not see output from other processes, depending on
exactly when Open MPI kills them.
"""
BLOCKS = {
    "openmpi-5-abort": f"""MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
  Proc: [[30248,1],1]
  Errorcode: 1
{NOTE}""",
    "openmpi-5-end": """prterun has exited due to process rank 1 with PID 0 on node node1 calling
"abort". This may have caused other processes in the application to be
terminated by signals sent by prterun (as reported here).
""",
    "openmpi-5-code": """prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-node1-8279@1,1]
   Exit code:    1
""",
    "openmpi-4-abort": f"""MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
with errorcode 1.
{NOTE}""",
    "openmpi-4-job": """Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
""",
    "openmpi-4-code": """orterun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[23998,1],1]
  Exit code:    1
""",
}
TEXTS = {name: RULE + block + RULE for name, block in BLOCKS.items()} | {
    "mpich": "Abort(1) on node 1 (rank 1 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 1) - process 1\n"
}
KILLED = f"""{RULE}prterun noticed that process rank 1 with PID 8371 on node node1 exited on
signal 9 (Killed).
{RULE}"""


def tag(text, tag):
    return "".join(tag + line for line in text.splitlines(keepends=True))


def show(*pieces):
    """Return what is shown of pieces, of which the last is followed by nothing for a while."""
    parser = Boilerplate()
    return "".join(parser.feed(piece.encode()).decode() for piece in pieces) + parser.flush().decode()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_is_left_out(text):
    assert show(TRACEBACK + text) == TRACEBACK
    assert show(TRACEBACK, *text.splitlines(keepends=True)) == TRACEBACK  # Open MPI 5 may write it in lines
    assert show(TRACEBACK, text, TRACEBACK, text, "\0") == TRACEBACK * 2
    assert show(TRACEBACK, "no end of line" + text) == TRACEBACK + "no end of line"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_with_tags_of_ranks(text):
    rank = "[1] " if text == TEXTS["mpich"] else "[1,1]<stderr>: "
    trace = tag(TRACEBACK, rank)
    assert show(trace, tag(text, rank)) == trace
    if text == TEXTS["mpich"]:
        assert show(trace, rank, text) == trace  # MPICH may write the tag first
    else:
        assert show(trace, text, rank + "\0") == trace  # Open MPI 5 tags only some


@pytest.mark.parametrize(
    "explanation",
    [
        "IndentationError: unexpected indent\n",
        "/usr/bin/python: No module named tarin\n",
        "rank 1 of 2 on node1 was interrupted\n",
    ],
)
def test_ends_without_a_traceback(explanation):
    text = TEXTS["openmpi-5-abort"].replace("code: 1", "code: 130")
    for cut in range(len(explanation)):
        assert show(explanation[:cut], explanation[cut:], text) == explanation


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_only_explanation_is_shown(text, monkeypatch):
    """mpirun's words are shown if no rank has said why it ends, or the script has chosen another exit code."""
    assert show("loss 0.5\n", text) == "loss 0.5\n" + text
    if "1 process returned" not in text:
        other = text.replace("code: 1", "code: 3").replace("code:    1", "code:    3").replace("code 1", "code 3")
        other = other.replace("Abort(1)", "Abort(3)").replace("calling", "exiting")
        assert show(TRACEBACK, other) == TRACEBACK + other
    monkeypatch.setattr(boilerplate, "_EXPLAINED_SECONDS", -1)  # the exception was long ago, and caught
    assert show(TRACEBACK, text) == TRACEBACK + text


def test_a_killed_rank_is_shown():
    for parts in ([KILLED], [KILLED, TEXTS["openmpi-5-end"]], [TEXTS["openmpi-4-job"], KILLED]):
        assert show(TRACEBACK, *parts) == TRACEBACK + KILLED


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_lines_of_ranks_stay(text):
    """Lines of a rank within a block are shown, and then the block is, too."""
    lines = text.splitlines(keepends=True)
    for place in range(1, len(lines)):
        mixed = "".join([*lines[:place], "rank 0: loss 0.5\n", *lines[place:]])
        assert show(TRACEBACK, mixed) == TRACEBACK + mixed
    assert show(TRACEBACK, RULE, "table\n", RULE, text) == TRACEBACK + RULE + "table\n" + RULE
    assert show(TRACEBACK, "a\0b", text) == TRACEBACK + "a\0b"


def test_what_is_held():
    """Bytes are held only after an exception, only from a possible beginning on, and never many of them."""
    parser = Boilerplate()
    assert parser.feed(RULE.encode()) == RULE.encode()
    assert parser.feed(TRACEBACK.encode()) == TRACEBACK.encode()
    for piece in (b"\r 50%", b"---", b"[1", b"Abo", b"\xff\xfe"):
        assert parser.feed(piece) == piece
        assert not parser.is_holding
    assert parser.feed(b"loss\n" + RULE.encode()) == b"loss\n"
    assert parser.is_holding
    line = b"x" * 99 + b"\n"
    shown = b"".join(parser.feed(line) for _ in range(10))
    assert shown == RULE.encode() + line * 10
    assert not parser.is_holding
