"""The routed experts of one layer, wherever each of them lives."""
