"""The picture world of the default model: scenes, captions, stories and their scorer, all drawn from a seed."""
