"""How many weights a model has, by its files and by its config alone."""

import pytest
from servers import save_checkpoint
from verbs import records

from deltawire.errors import FormatError
from deltawire.trainers.counting import count_weights


def test_plan_counts_a_checkpoint_and_a_config(tmp_path):
    save_checkpoint(tmp_path / "model")
    (whole,) = records("plan", tmp_path / "model")
    (config,) = records("plan", tmp_path / "model" / "config.json")
    assert whole["checkpoint_bytes"] == config["checkpoint_bytes"] == 2 * whole["scenario"]["weights"]
    (tmp_path / "model" / "model.safetensors").unlink()
    (bare,) = records("plan", tmp_path / "model")
    assert bare["scenario"] == config["scenario"]


def test_a_config_of_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="not the config"):
        count_weights(tmp_path / "config.json")
