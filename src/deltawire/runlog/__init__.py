"""The history of a run in a bucket: keys, records, signatures, the chain, the cheapest way through it."""
