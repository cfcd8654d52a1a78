"""The vLLM side: an engine that patches live weights in place, and a follower that drives it. Stock vLLM, no fork."""


def register() -> None:
    """What vLLM calls in each of its processes (entry point `vllm.general_plugins`); doing it twice changes nothing."""
    from deltawire.vllm.hooks import install

    install()
