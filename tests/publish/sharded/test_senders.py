"""A rank's sender, beside ranks that are a stand-in."""

import threading
import time
from types import SimpleNamespace

from runs import fresh

from deltawire.publish.sharded.senders import RankSender


def test_no_thread_of_a_rank_outlives_its_sender():
    """One inside torch's store while the interpreter ends would abort the process."""
    posting = threading.Event()

    def post(key, note):
        posting.set()
        time.sleep(0.2)

    ranks = SimpleNamespace(rank=1, notes=SimpleNamespace(post=post, read=lambda key: None), close=lambda timeout: None)
    sender = RankSender(fresh(), ranks)
    assert posting.wait(60)
    sender.close(60.0)
    assert [thread for thread in threading.enumerate() if thread.name == "deltawire-pulse"] == []
