"""Real vLLM servers on GPUs: what an update leaves in them is what they would have loaded themselves, and how long it takes."""
