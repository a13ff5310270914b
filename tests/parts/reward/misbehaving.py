"""A reward that does what the answer says. Importable by the pool's processes."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from atropos_exp.errors import UserError
from atropos_exp.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Obedient:
    """Scores the length of an ordinary answer."""

    def __call__(self, answer: str, prompt: Prompt) -> float:
        command, _, argument = answer.partition(" ")
        action = getattr(self, f"do_{command}", None)
        return float(len(answer)) if action is None else action(argument)

    def warm_up(self) -> None:
        pass

    def do_loop(self, _: str) -> float:
        while True:
            pass

    def do_sleep(self, seconds: str) -> float:
        time.sleep(float(seconds))
        return 1.0

    def do_regex(self, _: str) -> float:
        """Exponential, and all of it inside one call of C that holds the interpreter's lock."""
        return float(re.match(r"(a+)+$", "a" * 60 + "b") is None)

    def do_stubborn(self, path: str) -> float:
        """Ignores every signal it may, and starts a process that does so too."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
        with open(path, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        while True:
            time.sleep(1)

    def do_thread(self, _: str) -> float:
        threading.Thread(target=self.do_loop, args=("",)).start()
        return self.do_loop("")

    def do_raise(self, name: str) -> float:
        raise {"value": ValueError, "exit": SystemExit, "interrupt": KeyboardInterrupt, "user": UserError}[name](
            "x" * 9
        )

    def do_recurse(self, _: str) -> float:
        return self.do_recurse(_)

    def do_exit(self, _: str) -> float:
        os._exit(0)

    def do_segfault(self, _: str) -> float:
        return float(len(ctypes.string_at(0)))

    def do_hog(self, _: str) -> float:
        held = []
        while True:
            held.append(bytearray(1 << 24))

    def do_flood(self, _: str) -> float:
        for _line in range(3000):
            print("x" * 10_000)
            os.write(2, b"y" * 10_000)
        os.system("yes | head -c 10000000")
        return 1.0

    def do_give(self, value: str) -> float:
        return {"none": None, "text": "many"}.get(value, value)  # type: ignore[return-value]

    def do_environment(self, name: str) -> float:
        return float(name in os.environ)

    def do_alarm(self, _: str) -> float:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return 1.0

    def do_sign(self, argument: str) -> float:
        """Given a number and a path, write the process id there, and wait to be killed if as many have not yet."""
        number, path = argument.split()
        with open(path, "a+") as file:
            file.seek(0)
            signed = file.read().count("\n")
            file.write(f"{os.getpid()}\n")
        if signed < int(number):
            time.sleep(600)
        return 2.0

    def do_process(self, _: str) -> float:
        return float(os.getpid())

    def do_template(self, _: str) -> float:
        return float(os.getppid())


@dataclass(frozen=True, kw_only=True)
class Unloadable(Obedient):
    def warm_up(self) -> None:
        raise ImportError("no module named warp_drive")


@dataclass(frozen=True, kw_only=True)
class CrashingAtLoad(Obedient):
    def warm_up(self) -> None:
        ctypes.string_at(0)


@dataclass(frozen=True, kw_only=True)
class SlowToLoad(Obedient):
    def warm_up(self) -> None:
        time.sleep(1.0)
