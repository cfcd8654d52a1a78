"""How many weights a model of transformers has, by its config alone: nothing is allocated."""

from pathlib import Path

from deltawire.errors import FormatError


def count_weights(config: Path) -> int:
    """Weights of the model that a config.json, or the folder with one, describes; tied ones once.

    Raises ImportError without transformers and torch, FormatError for a config of no causal language model.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ImportError(
            "a config needs transformers to be counted: pip install 'deltawire[transformers]', or name a number, as 7B"
        ) from None

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{config}: not the config of a causal language model: {error}") from None
    return sum(weight.numel() for weight in model.parameters())
