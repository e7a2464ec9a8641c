"""What averages hide: prompts with a check each, answered by the original and by what was made of it."""
