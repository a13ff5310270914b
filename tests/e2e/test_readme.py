"""What the README tells a user to type is true."""

import re
import shlex

from hydra import compose, initialize_config_dir

from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    lines = [line.split(" #")[0] for line in README.splitlines() if line.startswith("python -m atropos_exp.run ")]
    return [shlex.split(line)[3:] for line in lines]


def test_every_command_line_of_the_readme_composes():
    found = commands()
    assert len(found) >= 6
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        for arguments in found:
            overrides = [word for word in arguments if "=" in word and not word.startswith("+sweeps")]
            if "-m" in arguments:
                overrides = [re.sub(r",.*", "", word) for word in overrides]
            compose("config", overrides=overrides)


def test_the_table_of_parts_lists_the_options_there_are():
    for group in (ROOT / "conf").iterdir():
        if not group.is_dir():
            continue
        row = re.search(rf"^\| `{group.name}` \| ([^|]*)\|", README, re.MULTILINE)
        assert row, f"README.md has no row for the group {group.name}"
        listed = set(re.findall(r"`(\w+)`", row[1]))
        assert listed == {path.stem for path in group.glob("*.yaml")}, group.name
