"""The command line: Hydra composes, mistakes end in one message and exit code 2, and every job's code is kept."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from atropos_exp.config.build import refuse_moved
from atropos_exp.config.diagnose import COMPOSE_ERRORS, Check, diagnose
from atropos_exp.config.freeze import FROZEN
from atropos_exp.config.origin import CONF_DIR
from atropos_exp.errors import UserError

Task = Callable[[DictConfig], int | None]
Sweep = Callable[[Sequence[str], str | None], int]


def hydra_main(task: Task, sweep: Sweep, check: Check) -> Callable[[], None]:
    """Make `task(config) -> exit code` a program with Hydra's command line over the shipped conf/.

    It works from any directory, from a checkout and from a wheel, with `-m`, `--cfg job`, `--help` and
    `--config-dir DIR`. A UserError of the task and everything that Hydra cannot compose are printed without a
    traceback and exit with 2. `-m` and `+sweeps=NAME` make it `sweep(overrides, config_dir)`; `--frozen FILE` alone
    runs the task on a configuration that was frozen when its job was submitted.
    """

    def main() -> None:
        if sys.argv[1:2] == [FROZEN]:
            sys.exit(_told(lambda: task(_frozen(sys.argv[2:])) or 0))
        arguments = get_args_parser().parse_args()
        if _is_sweep(arguments):
            sys.exit(_told(lambda: _start(sweep, check, arguments)))
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

        run = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)
        try:
            with _unhandled_by_hydra():
                run()
        except (*COMPOSE_ERRORS, ValueError) as error:
            if composed:
                raise  # of the task itself: a defect, to be seen whole
            _complain(diagnose(error, arguments.overrides, arguments.config_dir, check=check))
            codes.append(2)
        sys.exit(max(codes))

    return main


def job_command() -> list[str]:
    """What starts this very job again, as one of several ranks."""
    return [sys.executable, "-m", "atropos_exp.run", *sys.argv[1:]]


def _is_sweep(arguments: Namespace) -> bool:
    """Only looking (--cfg, --info, --help) is Hydra's business, also at a sweep."""
    looks = arguments.cfg or arguments.info or arguments.help or arguments.hydra_help or arguments.shell_completion
    named = any(text.startswith(("+sweeps=", "hydra.mode=MULTIRUN")) for text in arguments.overrides)
    return not looks and bool(arguments.multirun or named)


def _start(sweep: Sweep, check: Check, arguments: Namespace) -> int:
    try:
        return sweep(arguments.overrides, arguments.config_dir)
    except COMPOSE_ERRORS as error:
        raise UserError(diagnose(error, arguments.overrides, arguments.config_dir, check=check)) from error


def _frozen(arguments: Sequence[str]) -> DictConfig:
    if len(arguments) != 1 or not Path(arguments[0]).is_file():
        raise UserError(f"{FROZEN}: got {' '.join(arguments) or 'nothing'}, expected one frozen configuration")
    config = OmegaConf.load(arguments[0])
    assert isinstance(config, DictConfig)
    nodes: Any = OmegaConf.to_container(config, resolve=False)
    refuse_moved(nodes, Path(arguments[0]))
    return config


def _told(work: Callable[[], int]) -> int:
    """Its exit code; a UserError becomes a message and 2."""
    try:
        return work()
    except UserError as error:
        _complain(str(error))
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
