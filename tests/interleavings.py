"""Every interleaving of a few small threads, over the real code: an exhaustive explorer.

Theory of operation
-------------------
A *scenario* makes objects of the code under test and a few threads that use them.  Only one of these threads runs
at a time; at each *point* the one that runs chooses who goes on.  A point is each line (or each bytecode) of the
files under test that may touch what is shared, and each place where a lock, a condition or a bed is waited for; the
locks are ours (`World` stands in for the module `threading`), so that who waits is known and nobody waits for real.

A run is a list of choices.  The first run always takes the first; every other possibility is noted and tried later,
depth first, by running the scenario again from its start.  Where a run comes to a state that was seen before, it
ends: whatever follows has been explored.  A state is where every thread stands (its lines and local variables) and
all that is reachable from there and from what the scenario declared as shared, by value, with identities numbered.
So when the exploration ends there is no reachable state that it has not seen, for these threads and this grain.

A wait with a timeout may also time out, at any moment: time itself stands still.

Found are: a state in which nobody can go on and not everybody is done (a deadlock, a lost wake-up), an invariant
that does not hold, any exception of a thread, and a result that the scenario refuses.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import dis
import functools
import gc
import re
import select
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

from bridge import crossing, inbox, outbox, seat, worker
from bridge.poll import EVERY, Doorbell, Poller

LONGEST_RUN = 20_000
"""Points of one run, beyond which it is taken for endless."""
_TOUCHING = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "CALL", "BINARY_SUBSCR", "STORE_SUBSCR", "BINARY_OP")
"""Bytecodes that may touch what is shared; between two of them nobody else can notice anything."""
_PRIVATE = re.compile(
    "RESUME|NOP|CACHE|EXTENDED_ARG|PUSH_NULL|POP_TOP|COPY|SWAP|IS_OP|LOAD_FAST|STORE_FAST|LOAD_CONST|LOAD_GLOBAL|"
    "JUMP|POP_JUMP_(FORWARD_|BACKWARD_)?IF_(NOT_)?NONE|RETURN_VALUE|RETURN_CONST|"
    "SETUP_FINALLY|POP_BLOCK|PUSH_EXC_INFO|CHECK_EXC_MATCH|POP_EXCEPT|RERAISE|RAISE_VARARGS"
)
"""Bytecodes that touch nothing but the locals of their thread: a line of nothing else is no point."""
_PLAIN = {int, str, bytes, bool, float, type(None)}


class Refuted(AssertionError):
    """A schedule that breaks a promise; the message holds it."""


class _Abandoned(BaseException):
    """Ends a thread whose run is over."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was explored."""

    runs: int
    states: int
    points: int


Scenario = Callable[["World"], None]
Choice = tuple[int, bool]
"""Which actor goes on, and whether because its time is out."""


def explore(scenario: Scenario, *files: str, opcodes: bool = False) -> Report:
    """Every interleaving of *scenario*'s threads, at each line of *files*; Refuted by the first that fails."""
    seen: set[int] = set()
    todo: list[tuple[Choice, ...]] = [()]
    runs = points = 0
    with _Crew() as crew, _collecting_only_between_runs() as collect:
        while todo:
            collect()
            world = World(crew, todo.pop(), seen, frozenset(files), opcodes)
            with world.in_place():
                scenario(world)
                world.run()
            todo += world.alternatives
            runs += 1
            points += len(world.choices)
            if world.failure is not None:
                raise Refuted(f"{world.failure!r} in run {runs}, after {world.story()}") from world.failure
    return Report(runs, len(seen), points)


@contextlib.contextmanager
def _collecting_only_between_runs() -> Iterator[Callable[[], object]]:
    """A finalizer in the middle of a run would be code under test that its schedule does not have."""
    enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    try:
        yield functools.partial(gc.collect, 0)  # what one run has left
    finally:
        if enabled:
            gc.enable()


class _Crew:
    """Real threads, to be used in run after run."""

    def __init__(self) -> None:
        self._idle: list[_Member] = []
        self._all: list[_Member] = []

    def member(self) -> _Member:
        if not self._idle:
            self._all.append(_Member(self._idle))
            return self._all[-1]
        return self._idle.pop()

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._all:
            member.job = None
            member.go.release()
            member.thread.join()


class _Member:
    def __init__(self, idle: list[_Member]) -> None:
        self.go = threading.Lock()
        self.go.acquire()
        self.job: Callable[[], None] | None = None
        self._idle = idle
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            self.go.acquire()
            if self.job is None:
                return
            self.job()


class Actor:
    """One thread of a scenario."""

    def __init__(self, world: World, name: str, body: Callable[[], object], member: _Member) -> None:
        self.world, self.name, self.body = world, name, body
        self.member = member
        self.ready: Callable[[], object] = lambda: True  # what it waits for
        self.impatient = False  # whether that wait may time out
        self.timed_out = False
        self.done = False
        self.frame: types.FrameType | None = None
        self.label: str | int = "start"  # or the number of a line
        self.trail: list[int] = []  # of states since its line began, when switching within lines

    def job(self) -> None:
        world = self.world
        before = sys.gettrace()
        try:
            world.check_alive()
            if world.files:
                sys.settrace(self._trace)
            self.body()
        except _Abandoned:
            pass
        except BaseException as error:
            world.fail(error)
        finally:
            sys.settrace(before)
            self.done = True
            self.frame, self.label = None, "done"
            world.leave(self)

    def _trace(self, frame: types.FrameType, event: str, _: Any) -> Any:
        world = self.world
        if frame.f_code.co_filename not in world.files or world.over or world.deciding:
            return None
        frame.f_trace_opcodes = self.world.opcodes
        return self._step

    def _step(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.trail.clear()
            if not self.world.opcodes and frame.f_lineno in _public(frame.f_code):
                self.world.stop_at(self, frame.f_lineno, frame)
        elif event == "opcode" and frame.f_lasti in _touching(frame.f_code):
            self.world.stop_at(self, frame.f_lineno, frame)
        return self._step


@functools.cache
def _touching(code: types.CodeType) -> frozenset[int]:
    return frozenset(one.offset for one in dis.get_instructions(code) if one.opname.startswith(_TOUCHING))


@functools.cache
def _public(code: types.CodeType) -> frozenset[int]:
    """The lines that do anything another thread could notice."""
    starts, line, public = dict(dis.findlinestarts(code)), 0, set()
    for one in dis.get_instructions(code):
        line = starts.get(one.offset) or line
        if not _PRIVATE.match(one.opname):
            public.add(line)
    return frozenset(public)


class World:
    """One run of a scenario; and, while it runs, the module `threading` of the code under test."""

    TIMEOUT_MAX = threading.TIMEOUT_MAX

    def __init__(
        self, crew: _Crew, script: tuple[Choice, ...], seen: set[int], files: frozenset[str], opcodes: bool
    ) -> None:
        self.files, self.opcodes = files, opcodes
        self.choices: list[Choice] = []
        self.alternatives: list[tuple[Choice, ...]] = []
        self.failure: BaseException | None = None
        self.over = self._ended = self.deciding = False
        self.actors: list[Actor] = []
        self._crew = crew
        self._script = list(reversed(script))
        self._seen = seen
        self._by_thread: dict[threading.Thread, Actor] = {}
        self._shared: list[Any] = []
        self._invariants: list[Callable[[], bool]] = []
        self._at_end: list[Callable[[], object]] = []
        self._closing: list[Callable[[], object]] = []
        self._told: list[tuple[str, str | int, bool]] = []
        self._finished = threading.Semaphore(0)

    # What a scenario says.

    def actor(self, name: str, body: Callable[[], object]) -> None:
        """One more thread."""
        member = self._crew.member()
        made = Actor(self, name, body, member)
        self._by_thread[member.thread] = made
        self.actors.append(made)

    def share(self, *things: Any) -> None:
        """What belongs to the state although no thread may hold it just now."""
        self._shared += things

    def always(self, invariant: Callable[[], bool]) -> None:
        """What must hold at every point."""
        self._invariants.append(invariant)

    def finally_(self, check: Callable[[], object]) -> None:
        """To be called once everybody is done; asserts what must be so then."""
        self._at_end.append(check)

    def closing(self, close: Callable[[], object]) -> None:
        """To be called in any case."""
        self._closing.append(close)

    # A run.

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        clock = types.SimpleNamespace(monotonic=lambda: 0.0)
        crossing.threading = outbox.threading = inbox.threading = seat.threading = self  # type: ignore[assignment,attr-defined]
        crossing.time = worker.time = inbox.time = seat.time = clock  # type: ignore[assignment,attr-defined]
        try:
            yield
        finally:
            crossing.threading = outbox.threading = inbox.threading = seat.threading = threading  # type: ignore[attr-defined]
            crossing.time = worker.time = inbox.time = seat.time = time  # type: ignore[attr-defined]
            for close in self._closing:
                close()

    def run(self) -> None:
        for actor in self.actors:
            actor.member.job = actor.job
        first = self._choose(None)
        if first is None:
            self._end(None)
        else:
            first.member.go.release()
        for _ in self.actors:
            assert self._finished.acquire(timeout=50), (
                f"a thread of the scenario really waits: {self.story()}"
            )
        for actor in self.actors:
            self._crew._idle.append(actor.member)
        if self.failure is None and all(actor.label == "done" for actor in self.actors) and not self.over:
            try:
                for check in self._at_end:
                    check()
            except AssertionError as error:
                self.failure = error

    def story(self) -> str:
        """The schedule so far."""
        told = [
            f"{name} from {_shown(label)}{' (timed out)' * late}" for name, label, late in self._told[-60:]
        ]
        return " · ".join(told)

    def me(self) -> Actor:
        return self._by_thread[threading.current_thread()]

    def inside(self) -> bool:
        """Whether the calling thread is one of the scenario's, in a run that goes on."""
        return threading.current_thread() in self._by_thread and not (self.over or self.deciding)

    def check_alive(self) -> None:
        if self.over:
            raise _Abandoned

    def fail(self, error: BaseException) -> None:
        if self.failure is None and not self.over:
            self.failure = error
        self.over = True

    def point(self, label: str) -> None:
        """Here somebody else may go on."""
        self.stop_at(self.me(), label, sys._getframe(1))

    def stop_at(self, me: Actor, label: str | int, frame: types.FrameType) -> None:
        """*me*, which is at *label* in *frame*, lets somebody else go on, or goes on itself."""
        if self.over:
            raise _Abandoned
        me.frame, me.label = frame, label
        if self.opcodes:
            me.trail.append(hash(_freeze(self._shared)))
        chosen = self._choose(me)
        if chosen is None:
            self._end(me)
        elif chosen is not me:
            chosen.member.go.release()
            me.member.go.acquire()
        self.check_alive()

    def block(self, ready: Callable[[], object], label: str, may_time_out: bool = False) -> bool:
        """Wait until *ready*; false if it timed out instead."""
        me = self.me()
        me.ready, me.impatient, me.timed_out = ready, may_time_out, False
        self.stop_at(me, label, sys._getframe(1))
        me.ready, me.impatient = (lambda: True), False
        return not me.timed_out

    def leave(self, actor: Actor) -> None:
        """The thread of *actor* has ended."""
        chosen = None if self.over else self._choose(actor)
        if chosen is not None:
            chosen.member.go.release()
        elif self.over:
            self._end(actor)
        self._finished.release()

    def _end(self, me: Actor | None) -> None:
        """Nothing more is to be seen in this run: everybody but *me*, who all wait, leaves it."""
        self.over = True
        if not self._ended:
            self._ended = True
            for actor in self.actors:
                if actor is not me and not actor.done:
                    actor.member.go.release()

    def _choose(self, me: Actor | None) -> Actor | None:
        """Who goes on; None if the run is over."""
        if self._script:  # where all has been seen, states and promises
            return self._let_go_on(me, self._script.pop())
        self.deciding = True  # what is asked now may be code under test
        try:
            return self._decide(me)
        finally:
            self.deciding = False

    def _decide(self, me: Actor | None) -> Actor | None:
        possible = [(a, late) for a in self.actors if not a.done for late in self._ways(a)]
        possible.sort(key=lambda way: way[0] is not me)
        if not possible:
            if any(not actor.done for actor in self.actors):
                waiting = ", ".join(f"{a.name} at {_shown(a.label)}" for a in self.actors if not a.done)
                self.fail(AssertionError(f"nobody can go on: {waiting}"))
            return None
        for invariant in self._invariants:
            if not invariant():
                self.fail(AssertionError(f"an invariant does not hold: {invariant}"))
                return None
        if len(self.choices) >= LONGEST_RUN:
            self.fail(AssertionError("the run does not end"))
            return None
        state = hash(self._state(me))
        if state in self._seen:
            self.over = True
            return None
        self._seen.add(state)
        first, *others = [(self.actors.index(actor), late) for actor, late in possible]
        so_far = tuple(self.choices)
        self.alternatives += [(*so_far, other) for other in reversed(others)]
        return self._let_go_on(me, first)

    def _let_go_on(self, me: Actor | None, choice: Choice) -> Actor:
        self.choices.append(choice)
        index, late = choice
        actor = self.actors[index]
        assert not actor.done, "the scenario does not do the same each time"
        actor.timed_out = late
        if actor is not me or late:
            self._told.append((actor.name, actor.label, late))
        return actor

    def _ways(self, actor: Actor) -> list[bool]:
        return [False] * bool(actor.ready()) + [True] * (actor.impatient and not actor.ready())

    def _state(self, me: Actor | None) -> Any:
        memo: dict[int, int] = {}
        stands = []
        for actor in self.actors:
            frames, frame = [], actor.frame
            while frame is not None and frame.f_code is not Actor.job.__code__:
                frames.append((frame.f_code.co_name, frame.f_lineno, frame.f_lasti, _locals(frame, memo)))
                frame = frame.f_back
            stands.append((actor.done, actor.label, tuple(frames), tuple(actor.trail)))
        return tuple(stands), _freeze(self._shared, memo)

    # The module `threading`, as far as the code under test needs it.

    def Lock(self) -> Lock:
        return Lock(self, reentrant=False)

    def RLock(self) -> Lock:
        return Lock(self, reentrant=True)

    def get_ident(self) -> str:
        return self.me().name if self.inside() else "outside"

    def main_thread(self) -> Any:
        return types.SimpleNamespace(ident="main")

    def local(self) -> Local:
        made = Local(self)
        self.closing(made.values.clear)  # so that what has a finalizer does not end up in another run
        return made


class Lock:
    """A lock that only one thread of a world waits for at a time: the others do not run."""

    def __init__(self, world: World, reentrant: bool) -> None:
        self._world, self._reentrant = world, reentrant
        self.owner: str | None = None
        self.count = 0

    def _free(self) -> bool:
        return self.count == 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        world = self._world
        if not world.inside():
            name = "outside"
        else:
            name = world.me().name
            if not (self._reentrant and self.owner == name and self.count):
                world.point("lock")
                if not blocking and self.count:
                    return False
                if self.count and not world.block(self._free, "wait for a lock", timeout >= 0):
                    return False
        self.owner = name
        self.count += 1
        return True

    def release(self) -> None:
        if self.count == 0:
            raise RuntimeError("release unlocked lock")
        self.count -= 1
        if self._world.inside() and not self._world.files:
            self._world.point("unlock")

    def locked(self) -> bool:
        return self.count > 0

    def _is_owned(self) -> bool:
        name = self._world.me().name if self._world.inside() else "outside"
        return self.count > 0 and self.owner == name

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        if self._world.over:
            self.count = max(0, self.count - 1)
        else:
            self.release()


class Local:
    """As `threading.local`, for the threads of a world."""

    def __init__(self, world: World) -> None:
        self.__dict__["_world"] = world
        self.__dict__["values"] = {}

    def _mine(self) -> str:
        return self._world.me().name if self._world.inside() else "outside"

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[self._mine(), name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.values[self._mine(), name] = value


class Bed(Poller[Any]):
    """A real poller, over real descriptors, whose sleep is the world's."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def wait(self, timeout: float | None, most: int = EVERY) -> list[tuple[Any, int]]:
        if timeout != 0:
            self._world.block(lambda: super(Bed, self).wait(0), "sleep", timeout is not None)
        return super().wait(0, most)


def rung(bell: Doorbell) -> bool:
    """Whether the next sleep beside *bell* ends at once."""
    try:
        return bool(select.select([bell.fileno()], [], [], 0)[0])
    except ValueError:  # it is closed
        return False


# ── states, by value ──


def _locals(frame: types.FrameType, memo: dict[int, int]) -> Any:
    return tuple((name, _freeze(value, memo)) for name, value in sorted(frame.f_locals.items()))


def _freeze(value: Any, memo: dict[int, int] | None = None) -> Any:  # noqa: C901
    """*value* as something hashable: equal for states that nothing can tell apart."""
    if type(value) in _PLAIN:
        return value
    memo = {} if memo is None else memo
    if isinstance(value, tuple):
        return tuple([_freeze(item, memo) for item in value])
    if isinstance(value, (type, types.ModuleType, World, Actor, types.FrameType, types.TracebackType)):
        return getattr(value, "__name__", type(value).__name__)
    if id(value) in memo:
        return "the same as", memo[id(value)]
    memo[id(value)] = len(memo)
    if isinstance(value, Doorbell):
        return "bell", rung(value)
    if isinstance(value, types.FunctionType):
        cells = tuple(_freeze(_content(cell), memo) for cell in value.__closure__ or ())
        return value.__qualname__, cells
    if isinstance(value, types.MethodType):
        return value.__name__, _freeze(value.__self__, memo)
    if isinstance(value, types.BuiltinMethodType):
        return value.__name__
    if isinstance(value, functools.partial):
        return _freeze((value.func, value.args), memo)
    if isinstance(value, (list, collections.deque)):
        return type(value).__name__, tuple([_freeze(item, memo) for item in value])
    if isinstance(value, dict):
        return "dict", tuple([(_freeze(k, memo), _freeze(v, memo)) for k, v in value.items()])
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, Poller):
        return "poller"
    return type(value).__name__, tuple([(name, _freeze(found, memo)) for name, found in _attributes(value)])


def _shown(label: str | int) -> str:
    return f"line {label}" if isinstance(label, int) else label


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{kind.__name__.lstrip('_')}{name}"
            if name not in ("__weakref__", "__dict__") and hasattr(value, name):
                yield name, getattr(value, name)
    yield from getattr(value, "__dict__", {}).items()


CROSSING = (crossing.__file__, outbox.__file__, inbox.__file__, seat.__file__)
