"""`[coordinator.goliat]` is checked before anything is started, and by nobody who speaks something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor.config import load
from supervisor.errors import ConfigError

URL = "http://127.0.0.1:3000"
MODEL = '[[models]]\nname = "studies"\nengine = "command"\n[models.options]\nargv = ["true"]\nenv_allow = {env}\n'
BOTH = '["GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS"]'


def written(
    folder: Path, goliat: str, models: str = MODEL.format(env=BOTH), url: str = "http://127.0.0.1:3000"
) -> Path:
    path = folder / "worker.toml"
    link = f'[coordinator]\nurl = "{url}"\ndialect = "goliat"\n[coordinator.goliat]\n{goliat}\n'
    path.write_text(link + models)
    return path


def problems(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    return "\n".join(caught.value.problems)


def test_what_is_right_is_taken_and_its_folder_belongs_to_the_file(tmp_path: Path) -> None:
    settings = load(written(tmp_path, 'model = "studies"\nstudy = "x"\nresults_dir = "kept"'), {})
    assert settings.coordinator.goliat.results_dir == str(tmp_path / "kept")
    planned = load(written(tmp_path, 'protocol = "planned"\nmodel = "studies"', url="https://example.org/goliat"), {})
    assert planned.coordinator.goliat.protocol == "planned"


@pytest.mark.parametrize(
    ("goliat", "models", "expected"),
    [
        ('study = "x"', "", "coordinator.goliat.model: is missing"),
        ('model = "studies"', MODEL.format(env=BOTH), "coordinator.goliat.study: is missing"),
        ('study = "x"\nmodel = "studie"', MODEL.format(env=BOTH), '(did you mean "studies"?)'),
        (
            'study = "x"\nmodel = "m"',
            '[[models]]\nname = "m"\nengine = "synthetic"\n',
            "coordinator.goliat.model: ",
        ),
        (
            'study = "x"\nmodel = "studies"',
            MODEL.format(env='["GOLIAT_ASSIGNMENT_ID"]'),
            "models[0].options.env_allow: lacks GOLIAT_REUPLOAD_RESULTS",
        ),
        ('study = "x"\nmodel = "studies"\nupdates_per_s = 6', MODEL.format(env=BOTH), "updates_per_s"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, goliat: str, models: str, expected: str) -> None:
    assert expected in problems(written(tmp_path, goliat, models))


def test_an_operator_may_tell_studies_less(tmp_path: Path) -> None:
    goliat = 'study = "x"\nmodel = "studies"\nenv = ["GOLIAT_ASSIGNMENT_ID"]'
    settings = load(written(tmp_path, goliat, MODEL.format(env='["GOLIAT_ASSIGNMENT_ID"]')), {})
    assert settings.coordinator.goliat.env == ["GOLIAT_ASSIGNMENT_ID"]


@pytest.mark.parametrize("url", ["ws://127.0.0.1:3000", "embedded", "127.0.0.1:3000"])
def test_a_dashboard_has_an_http_address(tmp_path: Path, url: str) -> None:
    assert "https:// or http://" in problems(written(tmp_path, 'study = "x"\nmodel = "studies"', url=url))


def test_nobody_else_has_to_fill_the_table(tmp_path: Path) -> None:
    path = tmp_path / "worker.toml"
    path.write_text("")
    assert load(path, {}).coordinator.goliat.model == ""
