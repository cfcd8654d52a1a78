"""A run's first version as an anchor: the files of a whole checkpoint, written beside the assets."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

from deltawire.buckets.atomic import file_system_errors
from deltawire.buckets.verified import hash_file
from deltawire.errors import NotFound
from deltawire.format import checkpoint
from deltawire.runlog.keys import anchor_hash, anchor_prefix
from deltawire.weights.bits import Bits
from deltawire.weights.table import TensorEntry


def write_anchor(
    spool: Path, table: tuple[TensorEntry, ...], weights: Mapping[str, Bits], *, assets: Path | None
) -> dict[str, bytes | Path]:
    """Weights as checkpoint files in a folder of the spool, by key below the run.

    Raises NotFound for an adapter without its config, which nothing could load; OutOfSpace, AccessRefused.
    """
    folder = spool / "anchor"
    shutil.rmtree(folder, ignore_errors=True)
    with file_system_errors(f"{folder} (TMPDIR chooses another disk)"):
        folder.mkdir()
    if assets is not None:
        checkpoint.copy_assets(assets, folder)
    if checkpoint.is_adapter(table) and not (folder / checkpoint.ADAPTER_CONFIG).is_file():
        raise NotFound(
            f"these tensors are named as PEFT names an adapter's, and assets={assets} holds no "
            f"{checkpoint.ADAPTER_CONFIG}. Pass the folder that deltawire.trainers.lora.save_config wrote, or "
            "publish merged weights under the model's own names"
        )
    checkpoint.write(folder, table, weights)
    files = sorted(folder.iterdir())
    prefix = anchor_prefix(0, anchor_hash({path.name: hash_file(path) for path in files}))
    return {f"{prefix}/{path.name}": path for path in files}


def asset_payloads(assets: Path) -> dict[str, bytes | Path]:
    """The config and tokenizer files of a folder, as payloads of version 0 by key below the run."""
    files = {path.name: path.read_bytes() for path in checkpoint.assets(assets)}
    prefix = anchor_prefix(0, anchor_hash({name: blake3(data).hexdigest() for name, data in files.items()}))
    return {f"{prefix}/{name}": data for name, data in files.items()}
