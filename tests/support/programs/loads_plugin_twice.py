"""A process in which vLLM lacks a name when it loads the plugin, and then has it. Prints what it saw, as JSON."""

import json
import sys
import warnings

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.worker.gpu_worker import Worker

import deltawire.vllm as plugin
import vllm
from deltawire.vllm import versions

if __name__ == "__main__":
    right = vllm.__version__, WeightTransferEngineFactory.__dict__["register_engine"]
    vllm.__version__ = "0.99.0"
    del WeightTransferEngineFactory.register_engine
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plugin.register()
        plugin.register()
    said = [str(one.message) for one in seen if "deltawire" in str(one.message)]
    left_alone = not hasattr(Worker, "deltawire_status")

    vllm.__version__, WeightTransferEngineFactory.register_engine = right
    plugin.register()
    plugin.register()
    assert "numba" not in sys.modules
    from vllm.model_executor.model_loader import base_loader, utils

    assert "deltawire" in WeightTransferEngineFactory._registry
    assert WeightTransferEngineFactory._registry["deltawire"]().__name__ == "DeltaWireEngine"
    assert utils.process_weights_after_loading is base_loader.process_weights_after_loading
    assert not hasattr(utils.process_weights_after_loading.__wrapped__, "__wrapped__")
    assert all(hasattr(Worker, f"deltawire_{name}") for name in ("status", "holdings", "stage", "begin", "take"))
    lacking = versions.missing({**versions.NAMES, **versions.NAMES_ON_CPU, **versions.NAMES_OF_MIDDLEWARE})
    sys.stdout.write(json.dumps([said, left_alone, lacking]))
