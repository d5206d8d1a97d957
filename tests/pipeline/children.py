"""Children: medseg commands in forked processes of a script that has imported everything once, to be killed at will.

Importing torch takes longer than a tiny training. The script forks a child for each command, so that a kill meets a
real process with real files; only the drawing of curves is left out.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

if __name__ != "__main__":
    from tiny_runs import WEAK


class Children:
    """The script, and its one child at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.script = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | WEAK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.script.stdin.close()
        self.script.wait(timeout=60)
        self.script.stdout.close()

    def start(self, *arguments: object) -> Child:
        """Start a command."""
        self.count += 1
        errors = self.folder / f"stderr_{self.count}"
        command = [*map(str, arguments), "--progress", "json"]
        self.script.stdin.write(json.dumps({"arguments": command, "stderr": str(errors)}) + "\n")
        return Child(self.script, int(self.script.stdout.readline()), errors)

    def run(self, *arguments: object) -> tuple[int, str]:
        """Run a command to its end; its exit code and stderr."""
        return self.start(*arguments).end()

    def kill(self, arguments: Sequence[object], stage: str, updates: int) -> bool:
        """Start a command and SIGKILL it after some updates of a stage; False if it ended before."""
        child = self.start(*arguments)
        reached = child.wait_for(stage, updates)
        return child.end(signal.SIGKILL)[0] == -signal.SIGKILL and reached

    def kill_after(self, arguments: Sequence[object], seconds: float) -> bool:
        """Start a command and SIGKILL it after some time; False if it ended before."""
        child = self.start(*arguments)
        child.sleep(seconds)
        return child.end(signal.SIGKILL)[0] == -signal.SIGKILL


class Child:
    """A command that runs; its events are read as they come."""

    def __init__(self, script: subprocess.Popen[str], pid: int, errors: Path) -> None:
        self.script, self.pid, self.errors = script, pid, errors
        self.code: int | None = None

    def events(self) -> Iterator[dict]:
        """Events until the process ends."""
        with self.errors.open() as file:
            text = ""
            while True:
                ended = self.code is not None or self._has_ended(0.002)
                text += file.read()
                *lines, text = text.split("\n")
                yield from (json.loads(line) for line in lines if line.startswith("{"))
                if ended:
                    return

    def wait_for(self, stage: str, updates: int = 1) -> bool:
        """Whether ``updates`` updates of a stage came before the process ended."""
        for event in self.events():
            updates -= event.get("event") == "update" and event["stage"].startswith(stage)
            if updates <= 0:
                return True
        return False

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal, wait for the end; exit code (negative: killed by that signal) and stderr."""
        if number is not None and self.code is None:
            os.kill(self.pid, number)
        while self.code is None:
            self._has_ended(60)
        return self.code, self.errors.read_text()

    def sleep(self, seconds: float) -> None:
        """Wait this long, or until it ends."""
        if self.code is None:
            self._has_ended(seconds)

    def _has_ended(self, wait_s: float) -> bool:
        if select.select([self.script.stdout], [], [], wait_s)[0]:
            self.code = os.waitstatus_to_exitcode(int(self.script.stdout.readline()))
        return self.code is not None


def main() -> None:
    """Fork a child for each line on stdin; write its process number, then how it ended."""
    import matplotlib.figure  # noqa: F401  imported here, for all children

    import medseg.pipeline.run
    from medseg.cli.main import main as medseg_main

    medseg.pipeline.train.training_picture = lambda path, points: None
    for line in sys.stdin:
        order = json.loads(line)
        errors = os.open(order["stderr"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        child = os.fork()
        if child == 0:
            os.dup2(errors, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(medseg_main(order["arguments"]))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
        os.close(errors)


if __name__ == "__main__":
    main()
