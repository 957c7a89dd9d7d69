"""Runners: the drafter's graph on one kind of device each."""
