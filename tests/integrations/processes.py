"""Real processes for the tests in this folder: start scripts, on one rank or several, wait for them, kill them, resume.

A script is a Python file that ends with exit status 0 and prints a line whenever it made progress. It runs in a process
forked from a server that has imported the slow packages once, else the imports would take most of the lane's time;
``under`` starts it the way users do. Whatever is still running when a call returns has been killed: only processes
started here, by their ids.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
TO_ITS_END = Path(__file__).parent / "loops" / "to_its_end.py"
FORKS = multiprocessing.get_context("forkserver")
_PARTS = ("distributed.fsdp", "distributed.checkpoint", "nn.parallel", "_dynamo")
PRELOADED = [*(f"torch.{part}" for part in _PARTS), "regimewrap"]
FORKS.set_forkserver_preload(PRELOADED)


def preload(*modules: str) -> None:
    """Have the server import these before the first fork, those that are installed; call it at a test file's top."""
    PRELOADED.extend(name for name in modules if find_spec(name.partition(".")[0]) and name not in PRELOADED)
    FORKS.set_forkserver_preload(PRELOADED)


class Job:
    """A script running on one rank or several, each a process with the environment that torchrun would give it."""

    def __init__(self, script: Path, *args: object, ranks: int = 1, env: dict[str, str] | None = None) -> None:
        for name, value in ONE_THREAD.items():
            os.environ.setdefault(name, value)  # before the server starts: it reads them when it imports
        self.outputs = [Path(tempfile.mkstemp(suffix=".log")[1]) for _ in range(ranks)]
        port = str(_free_port())
        self.processes = []
        for rank, output in enumerate(self.outputs):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
            place = {**place, **meeting} if ranks > 1 else {}
            call = (str(script), [str(arg) for arg in args], {**ONE_THREAD, **place, **(env or {})}, str(output))
            self.processes.append(FORKS.Process(target=_run_script, args=call, daemon=True))
        for process in self.processes:
            process.start()

    def said(self, rank: int = 0) -> str:
        """Return what a rank has printed so far, errors included."""
        return self.outputs[rank].read_text()

    def kill(self, ranks: Sequence[int] | None = None) -> None:
        """Kill -9 these ranks, or all."""
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()

    def wait(self, timeout: float = 120) -> list[int]:
        """Wait for all ranks and return their exit statuses; kill them and complain when that takes too long."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not late, f"ranks {late} were not done after {timeout:g} s:\n{self._tails()}"
        return [process.exitcode for process in self.processes]

    def succeed(self, timeout: float = 120) -> list[str]:
        """Wait for all ranks, all of which must exit with 0, and return what each printed."""
        statuses = self.wait(timeout)
        assert not any(statuses), f"exit statuses {statuses}:\n{self._tails()}"
        return [self.said(rank) for rank in range(len(self.processes))]

    def wait_for_lines(self, count: int, timeout: float = 120) -> None:
        """Wait until rank 0 has printed so many lines."""
        deadline = time.monotonic() + timeout
        while self.said().count("\n") < count and self.processes[0].is_alive():
            assert time.monotonic() < deadline, f"rank 0 did not print {count} lines in {timeout:g} s:\n{self._tails()}"
            time.sleep(0.001)

    def _tails(self) -> str:
        return "\n".join(f"-- rank {rank}\n{self.said(rank)[-3000:]}" for rank in range(len(self.processes)))

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for output in self.outputs:
            output.unlink()


def run(
    script: Path, *args: object, ranks: int = 1, timeout: float = 120, env: dict[str, str] | None = None
) -> list[str]:
    """Run a script to its end and return what each rank printed."""
    with Job(script, *args, ranks=ranks, env=env) as job:
        return job.succeed(timeout)


def run_with_kills(
    script: Path, *args: object, lines: int, kills: int = 3, ranks: int = 1, seed: int = 0, timeout: float = 120
) -> list[str]:
    """Run a script that resumes by itself, kill -9 it at random moments, and return what the last, whole run printed.

    Args:
        script: prints a line at every update, and goes on from where its last checkpoint was when started again.
        *args: its arguments.
        lines: how many it prints when nothing stops it; each kill comes within the next ``lines // (kills + 1)``.
        kills: how often all ranks are killed.
        ranks: processes.
        seed: of the random moments.
        timeout: seconds, for each start.
    """
    moments = random.Random(seed)  # noqa: S311 - nothing secret
    for _ in range(kills):
        with Job(script, *args, ranks=ranks) as job:
            job.wait_for_lines(moments.randint(1, lines // (kills + 1)), timeout)
            time.sleep(moments.uniform(0, 0.01))
            running = all(process.is_alive() for process in job.processes)
            assert running, f"it ended before it could be killed:\n{job._tails()}"
            job.kill()
            assert {process.exitcode for process in job.processes} == {-signal.SIGKILL}
    return run(script, *args, ranks=ranks, timeout=timeout)


def under(launcher: Sequence[str], script: Path, *args: object, timeout: float = 180) -> str:
    """Run a script the way users start it, such as ``under(torchrun(2), script)``, and return what it printed."""
    command = [sys.executable, *launcher, str(TO_ITS_END), str(script), *map(str, args)]
    started = subprocess.Popen(
        command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = started.communicate(timeout=timeout)
    except BaseException:
        # Launchers end their ranks when they are asked to end; killed, they would leave them behind.
        started.terminate()
        said, _ = started.communicate(timeout=60)
        print(said)  # noqa: T201 - pytest shows it with the failure
        raise
    assert started.returncode == 0, f"{command} exited with {started.returncode}:\n{said[-6000:]}"
    return said


def torchrun(ranks: int) -> list[str]:
    """Return the arguments of Python that start a script under torchrun, on a port of its own choice."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _run_script(script: str, args: list[str], env: dict[str, str], output: str) -> None:
    os.environ.update(env)
    with open(output, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor is what is wanted
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The server's own streams were made before; a line must be out before the kill comes.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))  # as Python does for a script
    runpy.run_path(script, run_name="__main__")
