"""What plugs into trainers: TRL, transformers, sharded loops. Each module imports its trainer's library; this none."""
