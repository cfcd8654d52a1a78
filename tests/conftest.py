"""What every test shares: hypothesis without a deadline, because the first call of a kernel compiles it."""

from hypothesis import settings

settings.register_profile("deltawire", deadline=None, max_examples=60)
settings.load_profile("deltawire")
