"""A trainer that may be killed at any moment: noise, not learning, sent as TRL sends; run by test_trl_trainer.py.

    python trl_loop.py BUCKET RUN STEPS RESULT

RUN is the publisher's option. RESULT gets, as JSON, the last position and the digests of the last weights as a server
holds them.
"""

import json
import sys
from pathlib import Path

import torch
from servers import tiny_qwen3

import deltawire as dw
from deltawire.trainers.trl import DeltaWeightTransfer


def main(bucket, run, steps, result):
    model = tiny_qwen3()
    torch.seed()
    transfer = DeltaWeightTransfer(bucket, poll=0.02, run=run)
    for _ in range(int(steps)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        transfer.send_weights(model.named_parameters())
    weights = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    told = {
        "position": str(transfer.position),
        "digests": {name: f"{value:016x}" for name, value in dw.digest(weights).items()},
    }
    transfer.destroy()
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
