"""The command line: Hydra composes, mistakes end in one message and exit code 2, and every job's code is kept."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from atropos_exp.config.build import refuse_moved
from atropos_exp.config.diagnose import COMPOSE_ERRORS, Check, diagnose
from atropos_exp.config.freeze import FROZEN
from atropos_exp.config.sources import Sources
from atropos_exp.config.verbatim import verbatim
from atropos_exp.errors import UserError
from atropos_exp.processes.startup import load_own

Task = Callable[[DictConfig], int | None]
Sweep = Callable[[Sequence[str], Sources], int]


def hydra_main(task: Task, sweep: Sweep, check: Check) -> Callable[[], None]:
    """Make `task(config) -> exit code` a program with Hydra's command line over the shipped conf/.

    It works from any directory, from a checkout and from a wheel, with `-m`, `--cfg job`, `--help`, `--config-name`,
    `--config-path` and `--config-dir`, before and after overrides. A UserError of the task and everything that Hydra
    cannot compose are printed without a traceback and exit with 2. `-m` and `+sweeps=NAME` make it
    `sweep(overrides, sources)`; `--frozen FILE` alone runs the task on a configuration that was frozen when its job was
    submitted.
    """

    def main() -> None:
        load_own("data_prep")
        if sys.argv[1:2] == [FROZEN]:
            sys.exit(_told(lambda: task(_frozen(sys.argv[2:])) or 0))
        version.setbase("1.3")
        parser = get_args_parser()
        arguments = parser.parse_intermixed_args()
        try:
            code = _told(lambda: compose_and_run(parser, arguments))
        except KeyboardInterrupt:  # before anything was started that would see to it
            print("\nStopped: nothing was started yet", file=sys.stderr)
            code = 130
        sys.exit(code)

    def compose_and_run(parser: ArgumentParser, arguments: Namespace) -> int:
        sources = Sources.of(arguments)
        arguments.overrides = verbatim(arguments.overrides, sources.folders)
        if _is_sweep(arguments):
            return _start(sweep, check, arguments.overrides, sources)
        # Hydra would look for them elsewhere: beside this file
        arguments.config_path, arguments.config_dir = str(sources.path), sources.own and str(sources.own)
        codes = [0]
        composed = False

        def job(config: DictConfig) -> None:
            nonlocal composed
            composed = True
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _complain("hydra.mode: a file sets MULTIRUN; start it with -m, or as +sweeps=NAME")
                codes.append(2)
                return
            lost = [text for text in arguments.overrides if text.lstrip("+").startswith("sweep")]
            if lost:
                _complain(f"{lost[0]}: only where many runs are started: with -m, or +sweeps=NAME")
                codes.append(2)
                return
            with open_dict(config):
                config.pop("sweep", None)  # no part of a single run
            codes.append(_told(lambda: task(config) or 0))

        try:
            with _unhandled_by_hydra():
                _run_hydra(arguments, parser, job, str(sources.path), sources.name)
        except (*COMPOSE_ERRORS, ValueError) as error:
            if composed:
                raise  # of the task itself: a defect, to be seen whole
            raise UserError(diagnose(error, arguments.overrides, sources, check=check)) from error
        return max(codes)

    return main


def job_command() -> list[str]:
    """What starts this very job again, as one of several ranks."""
    return [sys.executable, "-m", "atropos_exp.run", *sys.argv[1:]]


def _is_sweep(arguments: Namespace) -> bool:
    """Only looking (--cfg, --info, --help) is Hydra's business, also at a sweep."""
    looks = arguments.cfg or arguments.info or arguments.help or arguments.hydra_help or arguments.shell_completion
    named = any(text.startswith(("+sweeps=", "hydra.mode=MULTIRUN")) for text in arguments.overrides)
    return not looks and bool(arguments.multirun or named)


def _start(sweep: Sweep, check: Check, overrides: Sequence[str], sources: Sources) -> int:
    try:
        return sweep(overrides, sources)
    except COMPOSE_ERRORS as error:
        raise UserError(diagnose(error, overrides, sources, check=check)) from error


def _frozen(arguments: Sequence[str]) -> DictConfig:
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise UserError(f"{FROZEN}: got {' '.join(arguments) or 'nothing'}, expected one frozen configuration")
    config = OmegaConf.load(arguments[0])
    assert isinstance(config, DictConfig)
    nodes: Any = OmegaConf.to_container(config, resolve=False)
    refuse_moved(nodes, Path(arguments[0]))
    return config


def _told(work: Callable[[], int]) -> int:
    """Its exit code; a UserError, or a folder that the system refuses, becomes a message and 2."""
    try:
        return work()
    except UserError as error:
        _complain(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}; mend it, or choose another (output_dir, run_dir, sweep.dir)")
    return 2


def _complain(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # once, not by every rank
        print(message, file=sys.stderr, flush=True)


@contextmanager
def _unhandled_by_hydra() -> Iterator[None]:
    """Let exceptions leave Hydra as they are, rather than as its own report and exit code 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
