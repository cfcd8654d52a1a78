"""What plugs into trainers: TRL, transformers, sharded loops; each module imports the library of its own."""
