"""The episode store's images: Arrow shards under a manifest, written once, read by row."""
