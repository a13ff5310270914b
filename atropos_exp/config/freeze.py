"""What is written of a configuration: the resolved file without secrets, and the hash that identifies its results."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from atropos_exp.runs.atomic import write_atomic
from atropos_exp.runs.redaction import redact

# Where a run is stored, watched and executed does not change what it computes.
NOT_HASHED = ("logger", "output_dir", "run_dir", "resume", "name", "cluster")
CACHE = "data.cache"  # neither does the place of what can be made again
FROZEN = "--frozen"  # FILE: run the configuration in it, and nothing of conf/


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, interpolations filled in."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_config(config: DictConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, secrets redacted, so that a reader sees the whole file or none."""
    plain = redact(resolved(config))
    write_atomic(path, OmegaConf.to_yaml(OmegaConf.create(plain)))


def config_hash(config: DictConfig) -> str:
    """SHA-256, in hex, of everything in the resolved configuration that can change a result."""
    same = copy.deepcopy(config)
    with read_write(same), open_dict(same):
        same.pop("sweep", None)  # no part of a run
        same.update(dict.fromkeys(NOT_HASHED))  # before resolving: other keys may refer to these
        if OmegaConf.select(same, CACHE) is not None:
            OmegaConf.update(same, CACHE, None)
    plain = _canonical(OmegaConf.to_container(same, resolve=True))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def freeze_config(config: DictConfig, path: Path, *, run_dir: Path) -> tuple[str, ...]:
    """Write the whole configuration to `path`; what follows the interpreter to run just that.

    Later edits of conf/ do not reach it. It runs in `run_dir`, and continues there however often it is started. Unlike
    the run's own config.yaml it keeps secrets, for the run needs them: only its owner may read it.
    """
    # Interpolations stay: what they refer to is in the file too, and the hash depends on them.
    plain: Any = OmegaConf.to_container(config, resolve=False)
    plain |= {"run_dir": str(run_dir.absolute()), "resume": "auto"}
    text = OmegaConf.to_yaml(OmegaConf.create(plain))
    assert OmegaConf.to_container(OmegaConf.create(text)) == plain, "lost in YAML"
    write_atomic(path.absolute(), text, mode=0o600)
    return ("-m", "atropos_exp.run", FROZEN, str(path.absolute()))


def _canonical(value: Any) -> Any:
    """0 and 0.0 are the same setting."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
