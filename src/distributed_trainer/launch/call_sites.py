# SPDX-License-Identifier: Apache-2.0
"""Record where the user's script last called the trainer, so that ranks that wait for this one can report it."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import CheckpointError, DistributedTrainerError

if TYPE_CHECKING:
    from .._engine import Engine

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_DISAGREE = "ranks disagree on collective"  # beginning of the engine's error for ranks in different collectives

_engines: list[Engine] = []
os.register_at_fork(after_in_child=_engines.clear)  # a forked child does not have the engines' memory
_current: tuple[str, str, int] | None = None  # the call in progress: its name, file and line


def add_engine(engine: Engine) -> None:
    """Report all calls from now on to an engine, and give it the signal that prints the script's stack. Local."""
    _engines.append(engine)
    _report_current(engine)
    number = signal.SIGRTMIN + 9  # a signal that programs rarely use
    if signal.getsignal(number) is signal.SIG_DFL:
        stack, target = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # the engine prints what it reads from it
        faulthandler.register(number, file=target, all_threads=False)
        engine.set_stack_signal(number, stack)


def replace_engine(old: Engine, new: Engine) -> None:
    """Report all calls from now on to `new`, which has taken over the ranks and the signal of `old`. Local."""
    _engines.remove(old)
    _engines.append(new)
    _report_current(new)


def records_call(function: _Function) -> _Function:
    """Decorate a function that the script calls: its file and line are recorded until it returns."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _current is not None:  # called by another function that is recorded
            return function(*args, **kwargs)
        _enter(name, *_place_in_script())
        try:
            return function(*args, **kwargs)
        except DistributedTrainerError as error:
            _add_places(error)
            raise
        finally:
            _leave()

    return cast(_Function, _hidden(call))


def records_block(function: _Function) -> _Function:
    """Decorate a function that returns a context manager, as `records_call` does; the call lasts until its end."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return _record_block(_place_in_script(), function, args, kwargs)

    return cast(_Function, _hidden(call))


def _hidden(call: Any) -> Any:
    """Mark a function for torch.compile, which then calls it as it is (backend/register.py does the rest)."""
    call._torchdynamo_disable = True
    return call


@contextlib.contextmanager
def _record_block(
    place: tuple[str, int],
    function: Callable[..., AbstractContextManager[None]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[None]:
    if _current is not None:  # inside another call or block that is recorded
        with function(*args, **kwargs):
            yield
        return
    _enter(function.__name__, *place)
    try:
        with function(*args, **kwargs):
            yield
    except DistributedTrainerError as error:
        _add_places(error)
        raise
    finally:
        _leave()


def _place_in_script() -> tuple[str, int]:
    """Return file and line where the script called into this package."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _report_current(engine: Engine) -> None:
    if _current is not None:
        engine.note_call(*_current)


def _enter(name: str, file: str, line: int) -> None:
    global _current
    _current = (name, file, line)
    for engine in _engines:
        _report_current(engine)


def note_exception(error: Exception) -> None:
    """Show in the messages of other ranks that the call in progress has raised an exception here. Local."""
    if _current is not None:
        name, file, line = _current
        _enter(f"{name} ({type(error).__name__})", file, line)  # others see the first 31 characters


def _leave() -> None:
    global _current
    _current = None
    for engine in _engines:
        engine.note_return()


def _add_places(error: DistributedTrainerError) -> None:
    """Add to an error about several ranks where each of them was."""
    is_of_ranks = not isinstance(error, CheckpointError)  # a CheckpointError is about files
    if not is_of_ranks or len(error.args) != 1 or not _engines or _engines[0].size == 1:
        return
    text, places = str(error.args[0]).rstrip("."), _engines[0].describe_places()
    if text.startswith(_DISAGREE):  # the engine's words help only those who know it
        text = f"every rank must make the same calls in the same order, but these differ: {places}. ({text}.)"
    else:
        text = f"{text}. The ranks' last calls: {places}."
    error.args = (text,)


def is_rank_lost() -> bool:
    """Return whether some rank is dead, stopped or does not answer. Local; asks other nodes, for a second at most."""
    # This process may get an error before the report of the death that caused it.
    return any(engine.has_lost_rank(1.0) or engine.is_rank_lost() for engine in _engines)


def report_failure() -> None:
    """Report to the engines that an exception ends this rank. Local."""
    for engine in _engines:
        engine.note_failure()
