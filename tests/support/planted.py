"""Faults that deltawire does not have, planted for the time of a test: what checks it must find each of them."""

from contextlib import suppress

from deltawire.errors import DeltaWireError
from deltawire.format.codecs import fused, subset
from deltawire.publish import current_run
from deltawire.runlog import chain, keys, log, records, writing
from deltawire.testing.actors import BrokenOff
from deltawire.testing.stepped import SteppedPublisher
from deltawire.upkeep import compactor, retention
from deltawire.weights.delta import between_bits


def head_before_the_commit(patch):
    append = writing.append

    def wrong(bucket, attempt, **options):
        head = records.Head(attempt.run.run, attempt.commit.version, attempt.key_in(bucket))
        bucket.put(keys.HEAD_KEY, records.write(head))
        append(bucket, attempt, **options)

    patch.setattr(writing, "append", wrong)


def a_failed_upload_is_forgotten(patch):
    upload = SteppedPublisher.upload

    def wrong(self):
        try:
            return upload(self)
        except DeltaWireError:
            self._queue, self._shipment = self._queue.commit(), None
            raise

    patch.setattr(SteppedPublisher, "upload", wrong)


def a_capture_that_broke_off_is_forgotten(patch):
    publish = SteppedPublisher.publish

    def wrong(self, pairs):
        try:
            publish(self, pairs)
        except BrokenOff:
            self._capturer._tracker.uncovered.clear()
            raise

    patch.setattr(SteppedPublisher, "publish", wrong)


def a_commit_before_its_payloads(patch):
    put_payloads = writing.put_payloads

    def wrong(bucket, run, payloads, **options):
        if any("deltas/" in key for key in payloads):
            return
        put_payloads(bucket, run, payloads, **options)

    patch.setattr(writing, "put_payloads", wrong)


def a_manifest_before_its_payloads(patch):
    put = compactor.Compactor._put

    def wrong(self, record, payloads):
        put(self, record, {})
        return put(self, record, payloads)

    patch.setattr(compactor.Compactor, "_put", wrong)


def payloads_are_pruned_first(patch):
    patch.setattr(retention, "_ORDER", retention._ORDER[::-1])


def the_floors_anchor_is_pruned(patch):
    within = retention._within
    patch.setattr(retention, "_within", lambda name, span: within(name, (span[0] + 1, span[1])))


def a_reader_that_begins_looks_no_further_than_head(patch):
    def wrong(self):
        with suppress(DeltaWireError):
            head = log.read_head(self.bucket)
            self._newest = self._keep(self._load(head.version, head.commit))

    patch.setattr(chain.Chain, "_look_beyond", wrong)


def heartbeats_are_not_asked(patch):
    patch.setattr(retention, "read_all", lambda bucket: [])


def head_is_left_behind_by_a_prune(patch):
    prunable = retention.prunable
    patch.setattr(retention, "prunable", lambda *given, **options: prunable(*given, **{**options, "head": None}))


def one_look_at_the_newest_commit(patch):
    patch.setattr(current_run, "LOOKS", 1)


def class_is_ranked_by_the_bits_after_it(patch):
    def wrong(old, new, *, by_class, tile=None):
        change = between_bits(old, new)
        return change, subset.encode(change, new.data if by_class else None, tile=tile)

    patch.setattr(fused, "compare", wrong)


PLANTED = [
    head_before_the_commit,
    a_failed_upload_is_forgotten,
    a_capture_that_broke_off_is_forgotten,
    a_commit_before_its_payloads,
    a_manifest_before_its_payloads,
    payloads_are_pruned_first,
    the_floors_anchor_is_pruned,
    a_reader_that_begins_looks_no_further_than_head,
    heartbeats_are_not_asked,
    head_is_left_behind_by_a_prune,
    one_look_at_the_newest_commit,
    class_is_ranked_by_the_bits_after_it,
]
