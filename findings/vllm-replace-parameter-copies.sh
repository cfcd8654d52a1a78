#!/usr/bin/env bash
# vLLM 0.33 writes the result of a post-load step into the parameter that it finds; 0.32 made a new one.
#
# `vllm.model_executor.utils.replace_parameter`, called by nearly every `process_weights_after_loading`, lost its
# `prefer_copy=False`. It now keeps the Parameter and copies into it when shape, stride, dtype and device match, and
# otherwise rebinds its `.data`. Whoever kept the weight "as it was loaded" (a reference to the parameter, or a module
# that shares its storage, to do the step again or to reload) holds the processed weight after 0.33, and a step done
# again is applied twice. Marks that a step leaves on the parameter stay, too.
#
# Packages: vllm 0.32.0 and 0.33.0 (wheels, of which only model_executor/utils.py is run), torch 2.13.0.
# Seen on 2026-11-29:
#   0.32.0: the loaded weight stays [1, 2], the layer has a new parameter [2, 4]; done again on the loaded one: [2, 4]
#   0.33.0: the loaded weight became [2, 4], the layer has the same parameter; done again on the loaded one: [4, 8]
# Exits 0 if that is still so, 1 if it changed, 2 if the packages cannot be had.
set -uo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" install --quiet torch==2.13.0 numpy || exit 2
for version in 0.32.0 0.33.0; do
    "$work/venv/bin/pip" download --quiet --no-deps --only-binary :all: --dest "$work" "vllm==$version" || exit 2
    "$work/venv/bin/python" -m zipfile -e "$work"/vllm-"$version"-*.whl "$work/all" || exit 2
    cp "$work/all/vllm/model_executor/utils.py" "$work/$version.py" || exit 2
    rm -rf "$work/all" "$work"/vllm-*.whl
done
"$work/venv/bin/python" - "$work" <<'PYTHON'
import ast
import sys
from pathlib import Path

import torch
from torch import nn


def replace_parameter_of(version):
    """The function itself, without the rest of vLLM."""
    tree = ast.parse(Path(sys.argv[1], f"{version}.py").read_text())
    body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "replace_parameter"]
    names = {"torch": torch}
    exec(compile(ast.Module(body, []), version, "exec"), names)
    return names["replace_parameter"]


def look(version):
    replace_parameter = replace_parameter_of(version)

    def step(layer):  # what a `process_weights_after_loading` does
        replace_parameter(layer, "weight", layer.weight.data * 2)

    layer, again = nn.Module(), nn.Module()
    loaded = layer.weight = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    step(layer)
    found = loaded.tolist(), layer.weight is loaded
    again.weight = nn.Parameter(loaded.data, requires_grad=False)
    step(again)
    print(f"{version}: loaded weight {found[0]}, same parameter {found[1]}, done again {again.weight.tolist()}")
    return *found, again.weight.tolist()


before, after = look("0.32.0"), look("0.33.0")
same = before == ([1.0, 2.0], False, [2.0, 4.0]) and after == ([2.0, 4.0], True, [4.0, 8.0])
print("as on 2026-11-29" if same else "CHANGED since 2026-11-29")
sys.exit(0 if same else 1)
PYTHON
