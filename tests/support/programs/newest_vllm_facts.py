"""Facts of whichever vLLM this process finds: WHICH. Prints them as one line of JSON, the last of its output."""

import inspect
import json
import os
import sys
import warnings


def plugin():
    """What the plugin says when it is loaded, the names it lacks, and the abstract methods that are left."""
    import deltawire.vllm

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        deltawire.vllm.register()
    from vllm.v1.worker.gpu_worker import Worker

    import vllm
    from deltawire.vllm import versions
    from deltawire.vllm.engine import DeltaWireEngine

    assert hasattr(Worker, "deltawire_status")
    held = inspect.getsource(Worker) + inspect.getsource(Worker.__mro__[1])
    assert "self._weight_update_active" in held and "self.weight_transfer_engine" in held and "self.rank" in held
    said = [str(one.message) for one in seen if "deltawire" in str(one.message)]
    lacking = versions.missing({**versions.NAMES, **versions.NAMES_ON_CPU, **versions.NAMES_OF_MIDDLEWARE})
    return vllm.__version__, said, lacking, sorted(DeltaWireEngine.__abstractmethods__)


def endpoints():
    """Every path of a server, with its methods."""
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    from fastapi import FastAPI
    from vllm.entrypoints.rl.online.api_router import router as online
    from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc
    from vllm.entrypoints.serve.instrumentator.basic import router as basic
    from vllm.entrypoints.serve.lora.api_router import attach_router

    app = FastAPI()
    attach_router(app)
    routers = [online, rpc, basic, app]
    return [[route.path, sorted(route.methods or ())] for router in routers for route in router.routes]


def weight_versions():
    """Whether completions and chat may be asked for the versions of their weights, and answer them."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponseChoice
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponseChoice

    asked = ["return_weight_versions" in kind.model_fields for kind in (CompletionRequest, ChatCompletionRequest)]
    answers = (CompletionResponseChoice, ChatCompletionResponseChoice)
    return asked + ["weight_versions" in kind.model_fields for kind in answers]


def replaced_parameters():
    """Whether `replace_parameter` keeps the parameter, for transforms that are done again alike with it."""
    import test_post_load
    from vllm.model_executor.utils import replace_parameter

    kept = set()

    def replace(layer, name, new, **marks):
        new.__dict__.update(marks)
        before = getattr(layer, name)
        replace_parameter(layer, name, new)
        kept.add(getattr(layer, name) is before)

    for method in (test_post_load.Doubled, test_post_load.Marked, test_post_load.Wider, test_post_load.Measured):
        test_post_load.assert_updated_as_loaded(lambda method=method: method(replace), test_post_load.SHAPE)
    return sorted(kept)


FACTS = {one.__name__: one for one in (plugin, endpoints, weight_versions, replaced_parameters)}
if __name__ == "__main__":
    sys.stdout.write(json.dumps(FACTS[sys.argv[1]]()) + "\n")
