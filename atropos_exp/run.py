"""Entry point: compose the configuration, check it, build the parts, run the loop.

python -m atropos_exp.run [group=option] [key=value] …
"""

import logging
import os
import signal
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig

from atropos_exp.assembly.assemble import Assembly
from atropos_exp.assembly.check import Checked, mistakes_of, validate
from atropos_exp.assembly.head import preparation_problems
from atropos_exp.assembly.sizes import describe
from atropos_exp.assembly.starting import refuse_start, remarks
from atropos_exp.assembly.submission import launch
from atropos_exp.config.command_line import hydra_main
from atropos_exp.config.freeze import FROZEN, config_hash, save_config
from atropos_exp.errors import StopRequested, UserError
from atropos_exp.processes import stopping
from atropos_exp.processes.ranks import Ranks
from atropos_exp.processes.startup import no_collections
from atropos_exp.runs.files import last_step, note_command, read_rows, write_summary
from atropos_exp.runs.folder import RunFolder, open_run_folder
from atropos_exp.runs.provenance import git_commit, versions
from atropos_exp.runs.summary import summarize_run
from atropos_exp.runs.waiting import dropped_while_waiting
from atropos_exp.sweep.start import start_sweep

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def run(config: DictConfig) -> int:
    """One experiment; returns the exit code, 0 when it finished or stopped on request. UserError is for the caller."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # trainer and engine take turns on the same cores
    checked = validate(config)
    if "WORLD_SIZE" not in os.environ:  # a rank of many checks where it runs, with the others
        if checked.parts.cluster.queue is None:
            refuse_start(checked)
        elif problems := preparation_problems(checked.parts.data.prepare):
            raise UserError("\n".join(["Wrong configuration:", *problems]))
    code = launch(checked)
    if code is not None:
        return code
    ranks = Ranks.of_environment()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if ranks.world_size > 1:
        from atropos_exp.parts.trainer.distributed import join_process_group

        join_process_group(checked.device, timeout_s=checked.parts.trainer.timeout_s)
    folder = _open_folder(checked, ranks)
    if ranks.is_zero:
        print(describe(checked.sizes), *remarks(checked), sep="\n", flush=True)
        print(f"{'Continuing' if folder.resumed else 'Run folder'}: {folder.path}", flush=True)
        save_config(checked.config, folder.path / "config.yaml")
        note_command(folder.path, ["python", "-m", "atropos_exp.run", *sys.argv[1:]])
    return Experiment(checked, folder, ranks).execute()


class Experiment:
    """One attempt at a run, from start-up to summary.json, whatever happens in between."""

    def __init__(self, checked: Checked, folder: RunFolder, ranks: Ranks) -> None:
        self._checked = checked
        self._folder = folder
        self._ranks = ranks
        self._stop_requested = False
        self._parts: Assembly | None = None

    def execute(self) -> int:
        """0: finished or stopped on request, 1: failed, 130: stopped at once by a second Ctrl-C."""
        handlers = {
            number: signal.signal(number, self._request_stop)
            for number in STOPS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        status, error, code = "failed", None, 1
        refused = False
        try:
            with ExitStack() as stack:
                done = self._train(stack)
            status, code = ("finished" if done == self._checked.parts.trainer.max_steps else "stopped"), 0
        except UserError as failure:
            error = str(failure)
            refused = not self._is_begun and FROZEN not in sys.argv  # of such a one others look for the summary
            raise
        except KeyboardInterrupt:
            status, code = "stopped", 130
        except StopRequested:
            status, code = "stopped", 0
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            self._keep_traceback(error)
        finally:
            if self._ranks.is_zero and refused:
                self._folder.withdraw()
            elif self._ranks.is_zero:
                self._conclude(status, error)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            stopping.request(False)
            if self._folder.lock is not None:
                self._folder.lock.close()
        return code

    @property
    def _is_begun(self) -> bool:
        """Whether anything that a summary could tell of may have happened."""
        return self._parts is not None and self._parts.checkpoints.is_restored

    def _train(self, stack: ExitStack) -> int:
        from atropos_exp.assembly.assemble import assemble
        from atropos_exp.loop import train

        with no_collections():
            self._parts = parts = assemble(self._checked, self._folder, self._ranks, stack)
        if self._ranks.any(self._stop_requested):  # while starting: nothing has been done that could be lost
            return 0
        return train(
            parts.schedule,
            source=parts.source,
            estimate=parts.estimate,
            update=parts.update,
            publisher=parts.publisher,
            evaluate=parts.evaluate,
            recorder=parts.recorder,
            checkpoints=parts.checkpoints,
            should_stop=lambda: self._ranks.any(self._stop_requested),
        )

    def _keep_traceback(self, error: str) -> None:
        path = self._folder.path / "log" / f"traceback_rank_{self._ranks.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
        print(f"Rank {self._ranks.rank} failed: {error}\nWhere: {path}", file=sys.stderr, flush=True)

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C: now
        is_first, self._stop_requested = not self._stop_requested, True
        stopping.request()
        if number == signal.SIGHUP:
            self._leave_terminal()
        if is_first and self._ranks.is_zero:
            what = "finishing this step, then saving" if self._parts is not None else "nothing has been trained yet"
            with suppress(OSError):
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: {what}; stopping (Ctrl-C again: stop now)\n".encode())

    def _leave_terminal(self) -> None:
        """What is printed goes to a file from now on: the terminal is gone, and writing to it would fail."""
        path = self._folder.path / "log" / f"after_hangup_rank_{self._ranks.rank}.log"
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(file)

    def _conclude(self, status: str, error: str | None) -> None:
        rows = read_rows(self._folder.path)
        parts = self._parts
        head = parts.head if parts is not None else None
        # the engine may live in another environment, with another torch than the trainer's
        libraries = head.libraries if head is not None else {}
        summary = summarize_run(
            rows,
            status=status,
            error=error.splitlines()[0] if error else None,
            policy_version=last_step(rows),
            resumed_from=parts.checkpoints.resumed_from if parts is not None else None,
            seed=self._checked.run.seed,
            git=git_commit(),
            versions=versions() | {f"engine: {name}": version for name, version in libraries.items()},
            config_hash=config_hash(self._checked.config),
            dropped_waiting=dropped_while_waiting(self._folder.path),
            num_failed_syncs=parts.publisher.num_syncs - parts.publisher.num_verified if parts is not None else 0,
            num_repeated_syncs=parts.publisher.num_repeated if parts is not None else 0,
        )
        write_summary(self._folder.path, summary)
        if head is not None:
            head.logger.close(summary)
        elif error:
            print(f"{status}: {error}", file=sys.stderr)
        self._write_report()

    def _write_report(self) -> None:
        from atropos_exp.report.page import write_report

        try:
            report = write_report([self._folder.path], self._folder.path / "report.html")
            print(f"Report: {report}", flush=True)
        except Exception as error:  # the run itself is done and recorded; say so and go on
            print(f"The report could not be written ({error}); try python -m atropos_exp.report {self._folder.path}")


def _open_folder(checked: Checked, ranks: Ranks) -> RunFolder:
    run = checked.run

    def open_it() -> RunFolder:
        if "WORLD_SIZE" in os.environ:
            refuse_start(checked)
        return open_run_folder(
            output_dir=Path(run.output_dir),
            name=run.name,
            run_dir=run.run_dir,
            resume=run.resume,
            config_hash=config_hash(checked.config),
        )

    opened = ranks.keep_on_zero(open_it)
    path, resumed = ranks.broadcast((opened.path, opened.resumed) if opened is not None else (Path(), False))
    return opened or RunFolder(path=path, resumed=resumed, lock=None)


main = hydra_main(run, start_sweep, mistakes_of)

if __name__ == "__main__":
    main()
