"""A tiny Qwen3 that plays Wordle legally but not well: made on the spot and warm-started on random play.

    python -m examples.wordle.model OUT_DIR [--seed 0]

writes a bf16 checkpoint that transformers and vLLM load: 0.9 million parameters, about ten seconds on one CPU thread,
the same bits for the same seed on the same machine. A folder that already holds this very model is left as it is.

Wide and shallow on purpose: after 80 steps, two layers of 192 write legal words as well as five of 128 did after 200,
and reinforcement learning goes on from there at least as fast.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory

import torch
from examples.wordle.game import INVALID, Game, Rules, play, secret_for, vocabulary
from examples.wordle.grpo import token_logprobs
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

PAD, BEGIN, END_OF_LINE = "<pad>", "<bos>", "\n"
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the bits of the checkpoint."""

    rules: Rules = field(default_factory=Rules)
    seed: int = 0
    steps: int = 80
    batch: int = 32
    learning_rate: float = 5e-3
    hidden: int = 192
    layers: int = 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character a transcript can hold: letters, marks and the end of a line, which ends a turn."""
    characters = [PAD, BEGIN, END_OF_LINE, *ascii_lowercase, *"GYX", INVALID]
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate(characters)}, unk_token=INVALID))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, bos_token=BEGIN, eos_token=END_OF_LINE, unk_token=INVALID
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained fp32 model."""
    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=3 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.hidden // 32,
            num_key_value_heads=recipe.hidden // 64,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def random_transcript(rules: Rules, rng: random.Random) -> list[tuple[str, bool]]:
    """A game played with random words, none twice: its lines, and whether the player wrote each."""
    game = Game(rules, secret_for(rng.randrange(rules.secrets), rules))
    lines = []
    for word in rng.sample(vocabulary(rules), min(rules.guesses, rules.vocabulary)):
        game, answer = play(game, word)
        lines += [(word + END_OF_LINE, True), (answer.feedback + END_OF_LINE, False)]
        if game.over:
            break
    return lines


def batch_of_play(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of what the player wrote, both [batch, longest]."""
    ids, mask = [], []
    for _ in range(recipe.batch):
        lines = [(tokenizer.encode(text), own) for text, own in random_transcript(recipe.rules, rng)]
        ids.append(torch.tensor([tokenizer.bos_token_id, *(token for tokens, _ in lines for token in tokens)]))
        mask.append(torch.tensor([False, *(own for tokens, own in lines for _ in tokens)]))
    return pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad_sequence(
        mask, batch_first=True
    )


def warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> float:
    """Teach the model to write legal words, in place. The last batch's loss in nats per token the player wrote."""
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / recipe.steps)))
    loss = torch.tensor(float("nan"))
    for _ in range(recipe.steps):
        ids, mask = batch_of_play(recipe, tokenizer, rng)
        loss = -token_logprobs(model(ids).logits, ids)[mask[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    return loss.item()


def write_checkpoint(folder: Path, recipe: Recipe) -> float | None:
    """Put the warm-started bf16 checkpoint of `recipe` at `folder`, all at once or not at all.

    The last batch's loss, or None if the checkpoint was there already. The model of another recipe is replaced; raises
    FileExistsError when the folder holds anything else.
    """
    wanted = json.dumps(asdict(recipe), sort_keys=True)
    if (folder / RECIPE_FILE).is_file():
        if (folder / RECIPE_FILE).read_text(encoding="utf-8") == wanted:
            return None
        shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else than this example's model; name another folder")
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    loss = warm_start(model, tokenizer, recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        draft = Path(scratch) / "model"
        model.to(torch.bfloat16).save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / RECIPE_FILE).write_text(wanted, encoding="utf-8")
        os.replace(draft, folder)
    return loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    started = time.monotonic()
    try:
        loss = write_checkpoint(arguments.folder, Recipe(seed=arguments.seed))
    except OSError as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"event": "ready", "folder": str(arguments.folder), "loss": loss, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
