"""Host memory: regions, the safetensors reader, and the checkpoints that live in them."""
