"""What the model is: configuration, network, tokenizer, weights and the model folder."""
