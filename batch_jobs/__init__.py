"""The engines behind a data set: many prompts in, illustrated stories out, on Ray Data."""
