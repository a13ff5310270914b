"""The command line that every builder gets: one option per argument."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml

from atropos_exp.errors import UserError
from data_prep.builder import Builder, defaults_of
from data_prep.folder import build_into
from data_prep.prepare import configure

_DEADLINE_S = 1800.0


def main(builder: type[Builder], argv: Sequence[str] | None = None) -> int:
    """Build what the options describe and print the manifest's numbers. A user's mistake ends with exit code 2."""
    helps = {name: field.description for name, field in builder.model_fields.items()}
    parser = argparse.ArgumentParser(
        prog=f"python -m data_prep.{builder.NAME}",
        description=builder.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/data") / builder.NAME, help="folder to write")
    for name, default in defaults_of(builder).items():
        shown = ",".join(default) if isinstance(default, list) else default
        parser.add_argument(_option(name), dest=name, default=shown, help=helps[name])
    values = vars(parser.parse_args(argv))
    folder = values.pop("out").expanduser()
    try:
        made = configure(builder.NAME, {name: _listed(value, builder, name) for name, value in values.items()})
        about = build_into(folder, made, deadline_s=_DEADLINE_S, say=lambda text: print(text, file=sys.stderr))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, table in about["tables"].items():
        print(f"{folder / name}: {table['num_rows']} rows, content {table['content_hash']}")
    print(
        f"from {about['source']}; "
        + ", ".join(f"{name[4:]} {count}" for name, count in about["counts"].items() if count)
    )
    return 0


def _option(name: str) -> str:
    return "--from" if name == "from_folder" else "--" + name.replace("_", "-")


def _listed(value: Any, builder: type[Builder], name: str) -> Any:
    """The value of an option: 'a,b,c' for a list, YAML such as '{a: 1}' for a table."""
    kind = get_origin(builder.model_fields[name].annotation)
    if isinstance(value, str) and kind is dict:
        return yaml.safe_load(value)
    return value.split(",") if isinstance(value, str) and kind is list else value
