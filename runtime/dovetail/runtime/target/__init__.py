"""The model that decides: its session, OpenVINO's paged attention, the KV blocks."""
