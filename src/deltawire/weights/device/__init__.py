"""The inner loops where torch tensors lie, over many tensors at once. Only this folder of the room imports torch."""
