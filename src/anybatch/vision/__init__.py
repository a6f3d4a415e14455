"""Images without labels: random views, a projection head, a small encoder. Optional packages are imported when used."""
