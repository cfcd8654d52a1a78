"""Follow a bucket and drive any inference engine through each version."""
