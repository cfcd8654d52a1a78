"""Readers: verified updates out of a bucket, and copies on this host that follow it."""
