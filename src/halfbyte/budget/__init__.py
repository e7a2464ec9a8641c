"""Which grid each weight gets, so that all of them together lose least within a budget."""
