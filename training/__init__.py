"""How the model is made: corpora, tokenizer training, the loop, checkpoints, export."""
