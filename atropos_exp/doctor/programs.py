"""Programs in environments of their own: the engine's interpreter and the Atropos environment's."""

import os
import subprocess
import sys

from atropos_exp.assembly.check import Checked
from atropos_exp.doctor.line import Line, fail, ok
from atropos_exp.parts.engine.launch import ServerSettings
from atropos_exp.processes.child import child_environment

_IMPORT_SECONDS = 90.0
_TRY = (
    "import importlib.metadata as m\n"
    "names = [d for d in ('atroposlib', 'transformers') if any(True for _ in m.distributions(name=d))]\n"
    "print(*(n + ' ' + m.version(n) for n in names), sep=', ')\n"
    "import atroposlib.envs.base\n"
)


def check_engine(checked: Checked) -> list[Line]:
    """Tell the interpreter of the engine, which its `preflight` has examined with the configuration."""
    engine = checked.parts.engine
    python = engine.python if isinstance(engine, ServerSettings) else None
    return [ok("engine", f"{type(engine).__name__}, run by {python or sys.executable}")]


def check_environment(checked: Checked) -> list[Line]:
    """Import what an environment imports, with the interpreter that will run it."""
    env = checked.parts.env
    if not checked.parts.rollout.uses_atropos or not checked.parts.atropos.launch:
        return [ok("environment", "the run starts none")]
    if env.python is None and env.command[:1] == ["-m"] and str(env.command[-1]).startswith("atropos_exp."):
        return [ok("environment", f"{env.name}, of this package")]
    python = os.path.expanduser(env.python or sys.executable)
    try:
        done = subprocess.run(
            [python, "-c", _TRY], capture_output=True, text=True, timeout=_IMPORT_SECONDS,
            env=child_environment(env.python), check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return [fail("environment", f"{python} does not run: {error}", "name another interpreter in env.python")]
    there = done.stdout.strip() or "neither atroposlib nor transformers"
    if done.returncode == 0:
        return [ok("environment", f"{env.name}: {python} has {there}")]
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    remedy = (
        "most published environments want transformers<5: python3 -m venv .venv-env && .venv-env/bin/pip install "
        '"atroposlib==0.4.0" "transformers<5", then env.python=.venv-env/bin/python'
    )
    return [fail("environment", f"{python} cannot import atroposlib's environments ({reason}); it has {there}", remedy)]
