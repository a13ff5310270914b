"""The command line of an environment, and what its source tells before it is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from atropos_exp.config.origin import CONF_DIR
from atropos_exp.metrics import sentence
from atropos_exp.parts.atropos.environment import Environment, Facts
from atropos_exp.parts.atropos.evaluations import Evaluations
from atropos_exp.parts.atropos.script import read_script

START = "class Env(BaseEnv):\n    @classmethod\n    def config_init(cls):\n"
SINGLE = "        return BaseEnvConfig(max_token_length=2048), APIServerConfig(base_url='http://localhost:9001/v1')\n"
LISTED = "        return BaseEnvConfig(max_token_length=512), [APIServerConfig()]\n"


def environment(**changes: Any) -> Environment:
    values = yaml.safe_load((CONF_DIR / "env/external.yaml").read_text())
    del values["_target_"]
    return Environment(**{**values, **changes})


def facts(folder: Path) -> Facts:
    return Facts(
        api_url="http://127.0.0.1:1", gateway_url="http://127.0.0.1:2", gateway_token="secret-token", model_name="m",
        tokenizer=folder / "tokenizer", run_config=folder / "config.yaml", run_folder=folder, group_size=4,
        max_token_length=40, uses_wandb=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "wants_list", "limit"),
    [
        (START + SINGLE, True, 2048),
        (START + LISTED, False, 512),
        (START + "        a = atropos.APIServerConfig()\n        return config, a\n", True, None),
        (START + "        a: list[object] = [APIServerConfig()]\n        return config, a\n", False, None),
        (START + "        a = [APIServerConfig(), APIServerConfig()]\n        return config, a\n", True, None),
        (START + "        return config, ServerBaseline()\n", True, None),
        ("class Env(BaseEnv):\n    pass\n", True, None),  # BaseEnv's own config_init has no list either
        ("class Env(Other):\n    pass\n", False, None),
        (START + "        return cls.make()\n", False, None),
        ("this is no Python", False, None),
    ],
)
def test_what_the_source_of_an_environment_says(
    source: str, wants_list: bool, limit: int | None, tmp_path: Path
) -> None:
    (tmp_path / "env.py").write_text(source)
    script = read_script(tmp_path / "env.py")
    assert (script.wants_server_list, script.max_token_length) == (wants_list, limit)


def test_flags_name_the_servers_of_an_environment_that_follows_them(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(START + LISTED)
    argv = environment(name="mine", command=[str(tmp_path / "env.py")]).argv(facts(tmp_path), 1)
    assert "--openai.base_url=http://127.0.0.1:2/v1" in argv and "--openai.api_key=secret-token" in argv
    assert "--env.wandb_name=mine" in argv
    assert f"--env.data_dir_to_save_evals={tmp_path / 'environments/mine_1'}" in argv
    assert not [word for word in argv if word.startswith("--config")]


def test_an_environment_that_ignores_its_base_url_gets_a_list_of_servers(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(START + SINGLE)
    given = environment(command=[str(tmp_path / "env.py")], server_arguments={"timeout": 7, "api_key": "{model_name}"})
    argv = given.argv(facts(tmp_path), 0)
    assert not [word for word in argv if word.startswith("--openai")], "atroposlib refuses them beside a list"
    [path] = [Path(word.removeprefix("--config=")) for word in argv if word.startswith("--config=")]
    assert path.stat().st_mode & 0o077 == 0, "it holds the gateway's token"
    [first, second] = yaml.safe_load(path.read_text())["openai"]
    assert first == second == {
        "base_url": "http://127.0.0.1:2/v1", "api_key": "m", "model_name": "m", "server_type": "vllm", "timeout": 7,
        "tokenizer_name": str(tmp_path / "tokenizer"),
    }  # fmt: skip
    assert json.loads(path.read_text()), "both JSON and YAML"


def test_a_script_is_found_from_the_run_s_folder_or_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/env.py").write_text(START + LISTED)
    monkeypatch.chdir(tmp_path)
    for command in (["own/env.py"], ["env.py"]):
        given = environment(command=command, cwd="own", python="bin/python")
        assert given.argv(facts(tmp_path), 0)[:3] == [
            str(tmp_path / "bin/python"), str(tmp_path / "own/env.py"), "serve",
        ]  # fmt: skip
        assert given.folder == tmp_path / "own"
    assert environment(command=["own/env.py"]).argv(facts(tmp_path), 0)[0].startswith(os.sep)


def problems(**changes: Any) -> list[str]:
    return list(environment(**changes).preflight(launches_atropos=True))


def test_what_cannot_work_is_said_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(START + LISTED)
    script = str(tmp_path / "env.py")
    assert problems(command=[script]) == []
    assert problems(command=[script], cwd=str(tmp_path)) == []
    [problem] = problems(command=[script], cwd=str(tmp_path / "nowhere"))
    assert problem == f"cwd: got {tmp_path / 'nowhere'}, but there is no such folder"
    for weight in (0, -1.0, "-1"):
        [problem] = problems(command=[script], arguments={"inference_weight": weight})
        assert problem.startswith(f"arguments: inference_weight is {weight}, expected a number above 0")


def test_each_evaluation_of_an_environment_is_read_once(tmp_path: Path) -> None:
    def write(name: str, text: str, at: int) -> None:
        path = tmp_path / name / "metrics.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        os.utime(path, ns=(at, at))

    result = '{"results": {"x": {}, "all": {"eval/percent correct": 0.25, "n": 8, "note": "text", "bad": NaN}}}'
    write("old_0", result, 1)
    evaluations = Evaluations(tmp_path)
    write("gsm8k_0", result, 2)
    write("torn_0", '{"results": {"all"', 2)
    assert evaluations.collect() == {
        "environment/gsm8k_0/eval_percent_correct": 0.25,
        "environment/gsm8k_0/n": 8.0,
    }, "what was there before belongs to an earlier attempt"
    assert evaluations.collect() == {}
    write("torn_0", result, 3)
    write("gsm8k_0", result.replace("0.25", "0.5"), 4)
    assert evaluations.collect()["environment/gsm8k_0/eval_percent_correct"] == 0.5
    assert all(sentence(name) for name in ("environment/gsm8k_0/n",))
