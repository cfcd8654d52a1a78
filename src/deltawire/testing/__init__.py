"""How a store, and deltawire on it, prove themselves: a state machine and a simulation, for tests of any package."""
