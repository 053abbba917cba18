"""Dense layers with packed weights."""
