"""What the model is and how it generates: network, tokenizer, runtimes, sampling, engine."""
