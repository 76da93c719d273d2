"""From raw text to batches: sources, tokenizer, the prepared corpus and packing."""
