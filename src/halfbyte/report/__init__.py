"""The run's report as JSON, and the pages that a person reads."""
