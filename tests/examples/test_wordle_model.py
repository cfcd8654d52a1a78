"""The model recipe, made so small that it takes a moment: the same bits each time, a whole folder or none."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples.wordle.game import Rules
from examples.wordle.model import Recipe, build_tokenizer, random_transcript, write_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Recipe(steps=2, batch=4, hidden=64, layers=1)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, recipe in [("a", TINY), ("b", TINY), ("c", replace(TINY, seed=1))]:
        write_checkpoint(tmp_path / name, recipe)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_folder_that_holds_the_model_is_left_as_it_is_and_one_of_another_recipe_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert write_checkpoint(folder, TINY) is not None
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert write_checkpoint(folder, TINY) is None
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert write_checkpoint(folder, replace(TINY, seed=1)) is not None
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="name another folder"):
        write_checkpoint(tmp_path, TINY)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_checkpoint_loads_in_transformers_as_bf16_with_its_head_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", TINY)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in stored
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_tokenizer_reads_and_writes_any_transcript_a_character_a_token(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    transcript = "cat\nGYX\nquiz\n???\n"
    ids = tokenizer.encode(transcript)
    assert len(ids) == len(transcript)
    assert tokenizer.decode(ids) == transcript
    assert tokenizer.encode("\n") == [tokenizer.eos_token_id]


def test_random_play_is_legal_ends_with_a_win_or_the_last_turn_and_marks_whose_lines_are_whose() -> None:
    rng = random.Random(7)
    for _ in range(50):
        lines = random_transcript(Rules(), rng)
        own = [text for text, mine in lines if mine]
        assert len(set(own)) == len(own) <= 4
        assert [mine for _, mine in lines] == [True, False] * len(own)
        assert lines[-1][0] == "GGG\n" or len(own) == 4
