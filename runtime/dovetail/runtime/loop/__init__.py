"""One round after the other: prefill, draft, verify, accept, commit, yield."""
