"""What only vLLM has: the plugin for a stock vLLM, the client of its server, and its adapters."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltawire.follow.follower import Follower


def register() -> None:
    """What vLLM calls in each of its processes (entry point `vllm.general_plugins`); doing it twice changes nothing."""
    from deltawire.vllm.hooks import install

    install()


def follow(llm: object, bucket: str, **options: object) -> "Follower":
    """A follower of `bucket` for a `vllm.LLM` in this process; call its `step()` between calls of `generate`.

    The LLM is made with `weight_transfer_config=WeightTransferConfig(backend="deltawire")`. `options` are
    `FollowOptions`'; `Follower` says what is raised.
    """
    from deltawire.vllm import in_process

    return in_process.follow(llm, bucket, **options)
