"""A door before several engines: each request goes to one that is ready, new enough, and has seen its prefix before."""
