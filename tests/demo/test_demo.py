"""The demo itself, with every part real."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick demo that ended well."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "deltawire.cli", "demo", "--quick", "--plain", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "printed.txt").write_text(done.stdout)
    return out


def test_it_ends_with_what_the_reference_shows(folder: Path) -> None:
    def ending(text: str) -> list[str]:
        """The last lines without figures and folders; the figures' width moves the table's edges."""
        lines = text[text.rindex(" deltawire demo") :].splitlines()
        kept = [re.sub(r"\S*/buckets|[\d.]+", "…", line) for line in lines if not set(line) & set("┏┡└│")]
        return [" ".join(line.split()) for line in kept if line.strip()]

    shown = (Path(__file__).parents[2] / "scripts" / "transcripts" / "demo.txt").read_text()
    assert ending((folder / "printed.txt").read_text()) == ending(shown)


def test_after_the_last_update_vllm_and_the_bucket_hold_exactly_the_trainers_weights(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["audit_equal"] is True
    assert summary["audit"]["vllm_differs"] == summary["audit"]["bucket_differs"] == []
    assert summary["audit"]["fresh_server_differs"] == []
    assert summary["audit"]["checksums"] > 10  # fewer than tensors: vLLM fuses some
    assert summary["audit"]["tensors"] == len(json.loads((folder / "trainer_digests.json").read_text())) > 20


def test_at_the_learning_rate_of_rl_few_weights_change_and_deltas_are_small(folder: Path) -> None:
    learn, rl = json.loads((folder / "summary.json").read_text())["acts"]
    assert learn["learning_rate"] > 1e-4
    assert rl["learning_rate"] < 5e-6
    assert 0 < rl["changed_fraction"] < 0.05 < learn["changed_fraction"]
    assert rl["delta_bytes"] < learn["delta_bytes"] / 4


def test_every_update_that_vllm_served_was_verified_and_the_last_is_the_trainers_last(folder: Path) -> None:
    said = [json.loads(line) for line in (folder / "logs" / "follower.log").read_text().splitlines()]
    updates = [record for record in said if record["event"] == "update"]
    done = json.loads((folder / "steps.jsonl").read_text().splitlines()[-1])
    assert all(update["verified"] for update in updates)
    assert updates[-1]["version"] == done["version"]
    assert [update["from_version"] for update in updates[1:]] == [update["version"] for update in updates[:-1]]
