"""Operations on weights: a torch reference of each, faster twins, and one place that chooses."""
