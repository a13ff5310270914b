"""The command line: Hydra composes, mistakes end in one message and exit code 2, and every job's code is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from atropos_exp.config_diagnose import COMPOSE_ERRORS, diagnose
from atropos_exp.config_origin import CONF_DIR
from atropos_exp.types import UserError

Task = Callable[[DictConfig], int | None]


def hydra_main(task: Task) -> Callable[[], None]:
    """Make `task(config) -> exit code` a program with Hydra's command line over the shipped conf/.

    It works from any directory, from a checkout and from a wheel, with `-m`, `--cfg job`, `--help` and
    `--config-dir DIR`. A UserError of the task and everything that Hydra cannot compose are printed without a
    traceback and exit with 2. With `-m` all jobs run, and the largest exit code of them is the program's.
    """

    def main() -> None:
        codes = [0]
        composed = False

        def job(config: DictConfig) -> None:
            nonlocal composed
            composed = True
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _announce(config)
            try:
                codes.append(task(config) or 0)
            except UserError as error:
                _complain(str(error))
                codes.append(2)

        run = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(job)
        try:
            with _unhandled_by_hydra():
                run()
        except (*COMPOSE_ERRORS, ValueError) as error:
            if composed:
                raise  # of the task itself: a defect, to be seen whole
            arguments = get_args_parser().parse_args()
            _complain(diagnose(error, arguments.overrides, arguments.config_dir))
            codes.append(2)
        sys.exit(max(codes))

    return main


def job_command() -> list[str]:
    """What starts this very job again: the command line, or of a sweep the part that this job is."""
    arguments = sys.argv[1:]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        hydra_config = HydraConfig.get()
        overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
        if not any(override.startswith("run_dir=") for override in overrides):
            overrides.append(f"run_dir={_job_folder()}")
        folder = get_args_parser().parse_args().config_dir
        arguments = [*(["--config-dir", folder] if folder else []), *overrides, "hydra.mode=RUN"]
    return [sys.executable, "-m", "atropos_exp.run", *arguments]


def _job_folder() -> Path:
    hydra_config = HydraConfig.get()
    return Path(hydra_config.sweep.dir) / str(hydra_config.sweep.subdir)


def _announce(config: DictConfig) -> None:
    """Name a job of a sweep, and give it the folder that Hydra made for it."""
    hydra_config = HydraConfig.get()
    if config.run_dir is None:
        with open_dict(config):
            config.run_dir = str(_job_folder())
    print(f"Job {hydra_config.job.num}: {' '.join(hydra_config.overrides.task)} -> {config.run_dir}", flush=True)


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
