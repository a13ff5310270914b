"""Text that looks like a number is text where its key takes text, and a number where it does not."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.config.verbatim import verbatim


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("name=2024_11", ["2024_11"]),
        ("name=1e3,0x_1,true,1.10", ["1e3", "0x_1", "true", "1.10"]),
        ("name=choice(1e3,7)", ["1e3", "7"]),
        ("model.revision=12e4567", ["12e4567"]),
        ("++model.revision=nan", ["nan"]),
        ("logger.tags=[1e3,'2e3',a]", [["1e3", "2e3", "a"]]),
        ("data.ability=1_0", ["1_0"]),
        ("data.prepare.folder=2024_11", ["2024_11"]),
        ("sweep.dir=1_0", ["1_0"]),
        ("cluster.partition=1e3", ["1e3"]),  # of an option that is not the default
        ("run_dir=null", [None]),
        ("name='1e3'", ["1e3"]),
        ("seed=1_0", [10]),
        ("trainer.learning_rate=1e-4,1e-3", [1e-4, 1e-3]),
        ("env.arguments={a:1e3}", [{"a": 1000.0}]),  # of any type, so as Hydra reads it
        ("name=range(1,3)", [1, 2]),
        ("nothing.of.ours=1e3", [1000.0]),
    ],
)
def test_what_is_read(text: str, values: list[object]) -> None:
    override = OverridesParser.create().parse_override(verbatim([text], [CONF_DIR])[0])
    values_of = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    read = [one.text if isinstance(one, QuotedString) else one for one in values_of]
    assert read == values and list(map(type, read)) == list(map(type, values))


def test_what_cannot_be_parsed_is_left_to_hydra() -> None:
    assert verbatim(["seed=[1", "name = 1e3"], [CONF_DIR]) == ["seed=[1", "name = 1e3"]
