# SPDX-License-Identifier: Apache-2.0
"""Where the user's script last called the trainer, which the engine's watch tells ranks that wait for this one."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from .errors import CheckpointError, DistributedTrainerError

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PACKAGE = os.path.dirname(__file__) + os.sep
_STDERR = 2

_engines: list[Any] = []
os.register_at_fork(after_in_child=_engines.clear)  # their memory is not there
_current: tuple[str, str, int] | None = None  # the call in progress: its name, file and line


def watch(engine: Any, instead_of: Any = None) -> None:
    """Tells an engine of all calls from now on, and lets it have the script's stack printed. Local."""
    if instead_of is not None:
        _engines.remove(instead_of)
    _engines.append(engine)
    if _current is not None:
        engine.note_call(*_current)
    number = signal.SIGRTMIN + 9  # one that programs rarely use
    if instead_of is not None:
        return  # whose signal it has
    if signal.getsignal(number) is signal.SIG_DFL:
        with contextlib.suppress(RuntimeError, ValueError):  # no stderr
            faulthandler.register(number, file=_STDERR, all_threads=False)
            engine.set_stack_signal(number)


def noted(function: _Function) -> _Function:
    """A function that the script calls: its file and line are noted when it is called, and when it has returned."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _current is not None:  # called by another one
            return function(*args, **kwargs)
        _enter(name, *_place_in_script())
        try:
            return function(*args, **kwargs)
        except DistributedTrainerError as error:
            _add_places(error)
            raise
        finally:
            _leave()

    return call  # type: ignore[return-value]


def noted_block(function: _Function) -> _Function:
    """The same for a context manager, of which the script's block counts as part."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return _note_block(_place_in_script(), function, args, kwargs)

    return call  # type: ignore[return-value]


@contextlib.contextmanager
def _note_block(
    place: tuple[str, int],
    function: Callable[..., AbstractContextManager[None]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[None]:
    if _current is not None:  # in another block
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
    """File and line of the call that has led out of the script into this package."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _enter(name: str, file: str, line: int) -> None:
    global _current
    _current = (name, file, line)
    for engine in _engines:
        engine.note_call(name, file, line)


def _leave() -> None:
    global _current
    _current = None
    for engine in _engines:
        engine.note_return()


def _add_places(error: DistributedTrainerError) -> None:
    """Says in an error about several ranks where each of them was."""
    is_of_ranks = not isinstance(error, CheckpointError)  # that is of files
    if is_of_ranks and len(error.args) == 1 and _engines and _engines[0].size > 1:
        error.args = (f"{error.args[0]}. The ranks' last calls: {_engines[0].describe_places()}.",)


def is_rank_lost() -> bool:
    """Whether some rank is dead, stopped or does not answer. Local; asks other nodes, which takes up to a second."""
    # An error may be here before the word of the death that it comes from.
    return any(engine.has_lost_rank(1.0) or engine.is_rank_lost() for engine in _engines)


def note_failure() -> None:
    """This rank has told of the exception that ends it. Local."""
    for engine in _engines:
        engine.note_failure()
