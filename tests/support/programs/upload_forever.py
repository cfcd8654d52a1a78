"""Uploads files of known content until it is killed: FIRST-NUMBER."""

import random
import sys

from huggingface_hub import HfApi

api = HfApi()
api.create_bucket("me/b", exist_ok=True)
number = int(sys.argv[1])
while True:
    content = random.Random(number).randbytes(200_000 + number * 1000 % 3_000_000)
    api.batch_bucket_files("me/b", add=[(content, f"{number:06d}"), (b"small %d" % number, f"small/{number:06d}")])
    print(number, flush=True)
    number += 1
