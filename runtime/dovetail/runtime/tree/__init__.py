"""What is proposed: draft trees, their limits, and how they grow."""
