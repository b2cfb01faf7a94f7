"""From models and images to label maps: tiles, mirroring, streaming, files."""
