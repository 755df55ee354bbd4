"""Models: what connected workers serve."""

from __future__ import annotations

from typing import Any

import openai
import pytest


def test_models_come_and_go_with_their_workers(ai: openai.OpenAI, serve: Any) -> None:
    serve(lambda job: None, "org/name", "llm", "embedding", slots=3)
    assert "org/name" in [model.id for model in ai.models.list()]
    model = ai.models.retrieve("org/name")
    assert (model.object, model.owned_by) == ("model", "bulkhead")
    assert model.model_extra
    assert model.model_extra["kinds"] == ["embedding", "llm"]
    assert model.model_extra["slots"] == 3
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
