"""The trainer's side: capture what changed, keep it until it is durable, upload it behind."""
