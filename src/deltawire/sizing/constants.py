"""The measured numbers that a forecast is made of. Each names its source; `benchmarks/RESULTS.md` has the tables.

`tests/sizing/test_constants.py` reads those tables and holds these numbers to them.
"""

from collections.abc import Mapping

BYTES_A_CHANGE = ((0.0011, 1.67), (0.0084, 1.29), (0.012, 1.24), (0.106, 0.87), (0.728, 0.96))
"""(share of weights changed, bytes of codec subset for each): `codecs.py`, the two recorded RL runs, then
`adapter_bytes.py`, whole model at 1e-6 and 1e-5 and adapter at 1e-4. A share between is read off a line over its
logarithm; one below the first takes the first's bytes."""
PUBLISH_BYTES_PER_SECOND = 5.26e9
"""bytes of weights that a trainer compares a second: `publish.py` at 0.1 %"""
PUBLISH_SECONDS_A_CHANGE = 14e-9
"""and what each change adds: `publish.py`, 0.1 to 3 %"""
STAGE_SECONDS = 0.112
"""from the request to stage to the version being served, beside what each change takes: `vllm_pause.py`, codec
subset"""
STAGE_SECONDS_A_CHANGE = 12.3e-9
"""what each change adds to it: `vllm_pause.py`, 0.1 to 3 %"""
PAUSE_SECONDS = 0.044
"""a pause that writes next to nothing, most of it vLLM's own: `vllm_pause.py`"""
PAUSE_SECONDS_A_CHANGE = 2.0e-9
"""what each change adds to it: `vllm_pause.py`, 0.1 to 3 %"""
RELOAD_BYTES_PER_SECOND = 3.95e9
"""a checkpoint reloaded from the page cache: `vllm_pause.py`, 302 ms for 596,049,920 weights of bf16"""

TRAINER_REQUESTS = 12
"""Hub API requests of a version, by its trainer: `hub_requests.py`"""
READER_REQUESTS = 8
"""Hub API requests of one version, by one reader: `hub_requests.py`. A replica has two: its follower and its worker."""
LOOK_REQUESTS = 1
"""Hub API requests of a look where nothing is new: `hub_requests.py`"""
HEARTBEAT_REQUESTS = 2
"""Hub API requests of a heartbeat: `hub_requests.py`"""
HEARTBEAT_SECONDS = 30.0
"""seconds between heartbeats of one replica"""
READERS = 2
"""readers in one replica: the follower, and vLLM's worker"""
HUB_LIMITS: Mapping[str, int] = {"free": 1_000, "pro": 2_500, "team": 3_000, "enterprise": 6_000}
"""Hub API requests in five minutes by plan, as the Hub documents them (hub-docs, rate limits, September 2025)"""
HUB_WINDOW = 300.0
"""seconds that those are counted over"""
HUB_POLL = 5.0
"""seconds between looks at the Hub: `buckets/hub.py`"""
ROUND_TRIP = 0.1
"""seconds of one request over the internet: an assumption"""
PUBLISH_ROUND_TRIPS = 6
"""requests of a version that wait for one another, by its trainer: payload, commit and head, each a pair; an assumption
from the write order of docs/FORMAT.md §6"""
READ_ROUND_TRIPS = 8
"""requests of a version that wait for one another, by a reader: `hub_requests.py`"""

POST_BYTES_A_CHANGE = 6.0
"""int32 position and bf16 value: the layout of the Hugging Face post "Shipping a Trillion Parameters With a Hub
Bucket" (docs/FORMAT.md §5.4)"""
FABRIC_BYTES_PER_SECOND = 100e9
"""a broadcast over NCCL in one cluster: the post's own assumption for 405 billion weights"""
