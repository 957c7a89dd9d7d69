"""The target model: its session, OpenVINO's paged attention, KV blocks."""
