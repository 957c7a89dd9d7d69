"""The drafters that a run can train, one module for the format of each."""
