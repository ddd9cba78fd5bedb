"""Forks a process for each role of a world, and kills, stops and restarts them as a seed has it.

A world derives from `Director`, gives it `Role`s and `play`s them; what a process does is a function of its `Life`.
Killed with -9 one after the other, they are started anew on what they have left on their disks: at once, or after a
while; often again before they are up; stopped ones as well. Now and then one kills itself, the moment it was told
something (`Life.perhaps_die`). Some are only stopped, for a moment or for so long that all others take them for lost,
and some are told to leave in good order.

A director has no threads and no sockets: it forks. The schedule follows from the seed, the instants from the machine:
a seed that has found something may have to be tried a few times.
"""

from __future__ import annotations

import ctypes
import heapq
import mmap
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

PR_SET_PDEATHSIG = 1
STEP = 0.18  # seconds between two deeds of the director, on average
LOST = 6.5  # seconds after which everybody takes a silent node for lost
YOUNG = 0.3  # seconds: a process of this age may not have opened its node yet, or not have met the others
FINALE = 60.0  # seconds for what must succeed once nobody is killed any more
SUICIDE = 0.003  # of the times that a process was just told something, it is killed then


class Stage:
    """Memory that all processes of a world share: which act it is. The first, in which they are killed, is 0."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, 16)).cast("Q")

    @property
    def act(self) -> int:
        """The number of the act."""
        return self._cells[0]

    @act.setter
    def act(self, act: int) -> None:
        self._cells[0] = act

    @property
    def left(self) -> int:
        """What is left to be done, as far as somebody has said so; for the others to see."""
        return self._cells[1]

    @left.setter
    def left(self, left: int) -> None:
        self._cells[1] = left


class Life:
    """One process of a role, from its start to its end."""

    def __init__(self, folder: Path, stage: Stage, seed: int, role: str, number: int) -> None:
        self.folder, self.stage, self.role, self.number = folder, stage, role, number
        self.name = f"{role}-{number:04}"
        self.rng = Random(f"{seed} {role} {number}")
        self.leaving = False
        """Told to end in good order, and soon."""

    def begin(self) -> None:
        """In the new process. SIGTERM is blocked until somebody looks for it."""

        def leave(*_: object) -> None:
            self.leaving = True

        signal.signal(signal.SIGTERM, leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def perhaps_die(self, chance: float = SUICIDE, last_words: Callable[[], None] = lambda: None) -> None:
        """By our own hand, where an instant is of interest that the director would hardly ever hit."""
        if self.stage.act == 0 and not self.leaving and self.rng.random() < chance:
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def pause(self, longest: float) -> None:
        time.sleep(self.rng.uniform(0, longest))


class Role:
    """One place in the world, and the process that fills it now."""

    def __init__(self, name: str, kind: str, weight: float, work: Callable[[Any], None], delay: float = 0.0) -> None:
        """`weight`: how often it is its turn, compared to others. `delay`: seconds, from the beginning of the world to
        that of its first life. `work` is given the life."""
        self.name, self.kind, self.weight, self.work, self.delay = name, kind, weight, work, delay
        self.lives = 0
        self.pid = 0
        self.stopped = self.leaving = False

    @property
    def process(self) -> str:
        """What its present life is called."""
        return f"{self.name}-{self.lives:04}"


class Ended(AssertionError):
    """A process ended that was not told to, or did not when it was."""


class Director:
    """Forks, kills, and waits."""

    def __init__(self, seed: int, folder: Path, roles: Iterable[Role]) -> None:
        self.seed, self.folder, self.roles = seed, folder, list(roles)
        self.rng = Random(seed)
        self.stage = Stage()
        self.kills: Counter[str] = Counter()
        """By kind of role."""
        self.stops = self.leaves = 0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0

    def life(self, role: Role) -> Life:
        """Of the process that is about to be forked."""
        return Life(self.folder, self.stage, self.seed, role.name, role.lives)

    def note_kill(self, role: Role) -> None:
        """It is about to be killed."""

    def note_stop(self, role: Role) -> None:
        """It is about to be stopped."""

    def note_go_on(self, role: Role) -> None:
        """It was stopped, and goes on now."""

    # --- processes -----------------------------------------------------------------------------------

    def start(self, role: Role) -> None:
        """A new life."""
        if role.pid:
            return
        role.lives += 1
        role.leaving = False
        life = self.life(role)
        parent = os.getpid()
        role.pid = os.fork()
        if role.pid == 0:
            code = 1
            try:
                os.dup2(os.open(self.folder / f"{role.process}.stderr", os.O_WRONLY | os.O_CREAT, 0o600), 2)
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == parent:
                    life.begin()
                    role.work(life)
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def kill(self, role: Role) -> None:
        """kill -9, and reap it."""
        if role.pid:
            self.look(role)
        if role.pid:
            self.note_kill(role)
            os.kill(role.pid, signal.SIGKILL)
            os.waitpid(role.pid, 0)
            role.pid, role.stopped = 0, False
            self.kills[role.kind] += 1

    def look(self, role: Role) -> bool:
        """Whether it still runs. Raises Ended, if it has ended badly."""
        if role.pid:
            pid, status = os.waitpid(role.pid, os.WNOHANG)
            if pid:
                role.pid = 0
                if status == signal.SIGKILL:  # by its own hand
                    self.kills[role.kind] += 1
                    if self.stage.act == 0:
                        self.later(0.05, partial(self.start, role))
                    else:
                        self.start(role)
                elif status:
                    reason = (self.folder / f"{role.process}.stderr").read_text()
                    raise Ended(f"{role.name}, life {role.lives}, has ended with status {status}: {reason}")
        return bool(role.pid)

    def stop(self, role: Role, seconds: float) -> None:
        """In its tracks, and let it go on later, if it still lives then."""
        if role.pid and not role.stopped and self.look(role):
            role.stopped = True
            self.stops += 1
            self.note_stop(role)
            os.kill(role.pid, signal.SIGSTOP)
            self.later(seconds, partial(self.go_on, role, role.lives))

    def go_on(self, role: Role, life: int) -> None:
        if role.stopped and role.lives == life:
            role.stopped = False
            os.kill(role.pid, signal.SIGCONT)
            self.note_go_on(role)

    def leave(self, role: Role) -> None:
        """Have it end in good order."""
        if role.pid and not role.stopped and self.look(role):
            self.leaves += 1
            role.leaving = True
            os.kill(role.pid, signal.SIGTERM)
            self.later(0.2, partial(self.return_, role, role.lives))

    def return_(self, role: Role, life: int) -> None:
        """Start it again once it has left; what has happened to it meanwhile has been seen to."""
        if role.lives == life and not role.stopped:
            if self.look(role):
                self.later(0.2, partial(self.return_, role, life))
            else:
                self.start(role)

    # --- the schedule --------------------------------------------------------------------------------

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._numbers, work))

    def step(self) -> None:
        """One deed; and see to the next."""
        rng = self.rng
        self.later(rng.expovariate(1 / STEP), self.step)
        for role in self.roles:
            self.look(role)
        (role,) = rng.choices(self.roles, [each.weight for each in self.roles])
        deed, seconds, age = rng.random(), rng.random(), rng.uniform(0, YOUNG)
        if deed < 0.15:
            self.stop(role, 1.5 * seconds)
        elif deed < 0.16:
            self.stop(role, LOST)
        elif deed < 0.2:
            self.leave(role)
        elif deed < 0.35:  # gone for a while
            self.kill(role)
            self.later(seconds, partial(self.start, role))
        else:
            self.kill(role)
            self.start(role)
            if deed < 0.6:  # and killed again before it is up
                self.later(age, partial(self.kill, role))
                self.later(age, partial(self.start, role))

    def play(self, kills: int) -> None:
        """The first act, until so many have been killed."""
        for role in self.roles:
            self.later(role.delay, partial(self.start, role))
        self.later(0.5, self.step)
        while self.kills.total() < kills:
            at, _, work = heapq.heappop(self._due)
            time.sleep(max(0.0, at - time.monotonic()))
            work()
        for role in self.roles:
            self.go_on(role, role.lives)

    def calm(self, act: int) -> None:
        """The next act. Nobody is killed any more, and everybody is there again."""
        self.stage.act = act
        leaving = [role for role in self.roles if role.leaving]
        for role in self.roles:
            if role not in leaving and not self.look(role):
                self.start(role)
        self.wait(leaving)
        for role in leaving:
            self.start(role)

    def of(self, *kinds: str) -> list[Role]:
        """The roles of these kinds."""
        return [role for role in self.roles if role.kind in kinds]

    def wait(self, roles: list[Role]) -> None:
        """Until all of them have ended."""
        self.wait_until(
            lambda: not any(self.look(role) for role in roles),
            lambda: f"{[role.name for role in roles if role.pid]} do not come to an end",
            2 * FINALE,
        )

    def wait_until(self, condition: Callable[[], bool], otherwise: Callable[[], str], seconds: float) -> None:
        """While everybody goes on. Raises Ended, with what `otherwise` says, when it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Ended(otherwise())
            for role in self.roles:
                self.look(role)
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """What came out of anybody's stderr."""
        return [f"{path.stem}: {text}" for path in sorted(self.folder.glob("*.stderr")) if (text := path.read_text())]

    def close(self) -> None:
        """Nobody is left behind."""
        for role in self.roles:
            if role.pid:
                os.kill(role.pid, signal.SIGKILL)
                os.waitpid(role.pid, 0)
                role.pid = 0
